"""The CPU's tests with "cuda" as the backend that is meant where none is named."""

import functools

import pytest
import test_backward

import numba_attn as na


def cuda_by_default(patch: pytest.MonkeyPatch) -> None:
    """Calls that name no backend, and the rule for gradients of halves: tensor cores take weights in halves too."""
    for name in ("attention", "attention_vjp", "attention_backward"):
        patch.setattr(na, name, functools.partial(getattr(na, name), backend="cuda"))
    patch.setattr(test_backward, "HALF_WEIGHTS", True)
