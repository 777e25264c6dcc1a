"""Attention on NVIDIA GPUs. Nothing is imported before the first call that asks for it."""

from __future__ import annotations

from typing import Any

from . import driver


def attention(*args: Any) -> None:
    """See `launch.attention`."""
    driver.current()  # says what is missing, before numba-cuda is imported
    from . import launch

    launch.attention(*args)


def attention_backward(*args: Any) -> Any:
    """See `launch.attention_backward`."""
    driver.current()
    from . import launch

    return launch.attention_backward(*args)
