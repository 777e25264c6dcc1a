"""Calls with NumPy arrays: copied to the device, computed, copied back."""

from __future__ import annotations

from typing import Any

from ...gradients import Backward, Wanted
from . import driver


def attention(problem: Any, out: Any, lse: Any, stream: Any, tf32: bool) -> None:
    """`launch.attention` of NumPy arrays, on a stream as the caller gave it."""
    device = driver.current()  # says what is missing, before numba-cuda is imported
    from . import launch, streams
    from .call import On

    launch.attention(problem, out, lse, On(device, streams.resolve_stream(stream), tf32=tf32))


def attention_backward(problem: Any, given: Backward, wanted: Wanted, stream: Any, tf32: bool) -> Any:
    """`launch.attention_backward` of NumPy arrays, on a stream as the caller gave it."""
    device = driver.current()
    from . import launch, streams
    from .call import On

    on = On(device, streams.resolve_stream(stream), tf32=tf32)
    return launch.attention_backward(problem, given, wanted, on)[:4]
