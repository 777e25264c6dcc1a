"""What a device hands out: kernels, memory, and marks in a stream."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Function:
    """A kernel, loaded. It stays loaded for the life of the process: unloading would have to wait for its launches."""

    name: str
    handle: Any
    static: int  # bytes of shared memory per block that it has anyway
    dynamic: int  # bytes that a launch may ask for on top; raised by the first launch that asks for more


class Memory:
    """Device memory: `nbytes` bytes at `address`, which is a multiple of 256.

    It is freed when the object dies, in the order of its stream: what was put on the stream before may still use it.
    The stream may be an int that keeps its stream alive (see arrays.Stream).
    """

    __slots__ = ("__weakref__", "address", "device", "nbytes", "settle", "stream")

    def __init__(self, device: Any, address: int, nbytes: int, stream: int) -> None:
        self.device, self.address, self.nbytes, self.stream = device, address, nbytes, stream
        # Used by streams that are not known here, or whose own is gone by then: wait for the device before it is freed.
        self.settle = False

    def __del__(self, suppress: Any = contextlib.suppress) -> None:  # bound here: at exit the module's names are None
        # Then, in a forked child and after an error of the device there is nothing to free, and nobody to tell.
        with suppress(Exception):
            self.device.free(self)


class Mark:
    """A point of a stream: what was on it when this was last recorded."""

    __slots__ = ("device", "event")

    def __init__(self, device: Any, event: Any) -> None:
        self.device, self.event = device, event

    def __del__(self, suppress: Any = contextlib.suppress) -> None:
        with suppress(Exception):  # as for Memory
            self.device.forget(self)
