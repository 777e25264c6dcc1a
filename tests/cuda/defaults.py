"""The CPU's tests with "cuda" as the backend that is meant where none is named."""

import functools

import bounds
import pytest

import numba_attn as na


def cuda_by_default(patch: pytest.MonkeyPatch) -> None:
    """Calls that name no backend, and the bounds of halves: tensor cores take weights in halves too."""
    for name in ("attention", "attention_vjp", "attention_backward"):
        patch.setattr(na, name, functools.partial(getattr(na, name), backend="cuda"))
    patch.setattr(bounds, "HALF_WEIGHTS", True)
