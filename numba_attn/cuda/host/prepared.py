"""The launches of a call, kept for the calls that differ from it in addresses alone."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

from . import streams
from .call import Call

_FIELD = struct.Struct("<q")


class Prepared:
    """The launches of a call of `attention` or `attention_backward`, for others that differ from it in addresses
    alone, on any stream.

    The call's numbers on the device belong to the device's own stream, and they are freed in its order. When this
    object dies, that stream is made to wait for all launches that read them, through marks of their streams. For a
    stream that may be gone by then it waits at once. So the host waits only for devices that free nothing in the order
    of a stream.
    """

    ARRAYS = ("q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv")

    def __init__(self, call: Call) -> None:
        self.device = device = call.device
        self.used: dict[int, Any] = {}  # stream -> mark behind the last launch there
        memory, self.offsets = call.scratch or (None, {})
        self.workspace = None if memory is None else memory.nbytes
        self.keep = [x for x in call.keep if x is not memory]
        names = [name for name in (*self.ARRAYS, *self.offsets) if name in call.numbers]
        self.steps = [
            (*step, [(fields.index(name), name) for name in names if name in fields]) for *step, fields in call.steps
        ]
        self.ready = device.mark(call.stream)  # what the call has put there: copies and launches; None when it is done
        device.after(device.own, self.ready)
        for x in self.keep:
            x.stream = device.own

    def __del__(self, suppress: Any = contextlib.suppress) -> None:
        with suppress(Exception):  # as for driver.Memory
            for mark in self.used.values():
                self.device.after(self.device.own, mark)

    def run(self, stream: int, addresses: dict[str, int]) -> None:
        """addresses: of every array."""
        device, ready = self.device, self.ready
        if ready is not None:
            if device.passed(ready):
                self.ready = None
            else:
                device.after(stream, ready)
        mark = None
        if streams.lasts(stream):
            mark = self.used.get(stream) or self.used.setdefault(stream, device.mark(stream))
        try:
            self._launch(stream, addresses)
        finally:
            if mark is None:
                device.wait(device.own, stream)
            else:
                device.record(mark, stream)

    def _launch(self, stream: int, addresses: dict[str, int]) -> None:
        device, memory = self.device, None
        if self.workspace is not None:
            memory = device.empty(self.workspace, stream)
            addresses = addresses | {name: memory.address + at for name, at in self.offsets.items()}
        for function, grid, threads, shared, params, places in self.steps:
            own = bytearray(params)
            for n, name in places:
                _FIELD.pack_into(own, 8 * n, addresses[name])
            device.launch(function, grid, threads, shared, bytes(own), stream)
        if memory is not None and not device.ordered:
            device.hold([memory], stream)
