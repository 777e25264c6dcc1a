"""Calls with NumPy arrays: copied to the device, computed, copied back."""

from __future__ import annotations

from typing import Any

from . import driver


def attention(problem: Any, out: Any, lse: Any, stream: Any, tf32: bool) -> None:
    """`launch.attention` of NumPy arrays, on a stream as the caller gave it."""
    driver.current()  # says what is missing, before numba-cuda is imported
    from . import launch, streams

    launch.attention(problem, out, lse, streams.resolve_stream(stream), tf32=tf32)


def attention_backward(*args: Any) -> Any:
    """`launch.attention_backward` of NumPy arrays; the last arguments are the stream as the caller gave it and tf32."""
    driver.current()
    from . import launch, streams

    backward: Any = launch.attention_backward
    return backward(*args[:-2], streams.resolve_stream(args[-2]), tf32=args[-1])[:4]
