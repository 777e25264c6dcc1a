"""Calls with NumPy arrays: copied to the device, computed, copied back."""

from __future__ import annotations

from typing import Any

from ...gradients import Backward
from . import driver


def attention(problem: Any, out: Any, lse: Any, stream: Any, tf32: bool) -> None:
    """`launch.attention` of NumPy arrays, on a stream as the caller gave it."""
    device = driver.current()  # says what is missing, before numba-cuda is imported
    from . import launch, streams
    from .call import On

    launch.attention(problem, out, lse, On(device, streams.resolve_stream(stream), tf32=tf32))


def attention_backward(problem: Any, out: Any, lse: Any, *rest: Any) -> Any:
    """`launch.attention_backward` of NumPy arrays. rest: dout, dlse, the fields of launch.Wanted, which arrays of aux
    get a gradient, the stream as the caller gave it, tf32."""
    device = driver.current()
    from . import launch, streams
    from .call import On

    dout, dlse, *wanted, asked, stream, tf32 = rest
    on = On(device, streams.resolve_stream(stream), tf32=tf32)
    given = Backward(out, lse, dout, dlse, asked)
    return launch.attention_backward(problem, given, launch.Wanted(*wanted), on)[:4]
