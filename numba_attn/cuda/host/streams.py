"""Streams: the handle of any object that a caller gives as a stream."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

PER_THREAD = 2  # the handle of every thread's own default stream
STREAMS = "None, a stream of torch, CuPy, Numba or cuda.core, or a CUstream handle as an int"


def full_name(x: Any) -> str:
    kind = type(x)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class Stream(int):
    """A stream's handle that keeps the object alive that it was taken from. Memory is freed in the order of its stream,
    maybe long after the call: the handle must mean something then."""

    owner: Any


def resolve_stream(stream: Any, kind: str = "", device: int | None = None) -> int:
    """The handle of a stream, for work on arrays of this kind on this device.

    Parameters
    ----------
    stream : None, int or object
        None is the current stream of torch or CuPy for their arrays, else the legacy default stream, 0.

    Raises
    ------
    TypeError, ValueError
        If it is no stream.
    """
    if stream is None:
        stream = _current_stream(kind, device)
        if stream is None:
            return 0
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream < 0:
            raise ValueError(f"stream is {stream}; it takes {STREAMS}")
        return stream
    handle = _handle_of(stream)
    if handle is None:
        raise TypeError(f"stream is a {full_name(stream)}; it takes {STREAMS}")
    result = Stream(handle)
    result.owner = stream
    return result


def lasts(stream: int) -> bool:
    """Whether the handle means the same stream, in every thread, for as long as it is kept."""
    return int(stream) in (0, 1) or (isinstance(stream, Stream) and stream != PER_THREAD)


def _current_stream(kind: str, device: int | None) -> Any:
    library = sys.modules.get(kind) if kind in ("torch", "cupy") else None
    if library is None:
        return None
    return library.cuda.current_stream(device) if kind == "torch" else library.cuda.get_current_stream()


def _handle_of(stream: Any) -> int | None:
    """The handle inside a stream object, by the protocol that all of them move to, else by each library's own name."""
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr", "handle"):  # torch, CuPy, Numba
        handle = getattr(stream, name, None)
        if handle is not None:
            # A c_void_p holds None for 0.
            return int((handle.value or 0) if isinstance(handle, ctypes.c_void_p) else handle)
    return None
