"""Where the numbers of the tests come from: one generator a test, by a seed that the test names.

NUMBA_ATTN_TEST_SEED, an int, moves every seed of the suite at once, those of hypothesis and of child processes too:
bounds have to hold for numbers that nobody has looked at. 0, or nothing, gives the numbers that the tests were written
with.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hypothesis import settings

SHIFT = int(os.environ.get("NUMBA_ATTN_TEST_SEED") or 0)
_STEP = 1_000_003  # seeds of tests are small: shifted ones do not meet them


def generator(seed: int | Sequence[int]) -> np.random.Generator:
    """numpy.random.default_rng of the seed, moved by NUMBA_ATTN_TEST_SEED."""
    if isinstance(seed, int):
        return np.random.default_rng(seed + SHIFT * _STEP)
    first, *rest = seed
    return np.random.default_rng([first + SHIFT * _STEP, *rest])


def hypothesis_profile(examples: int) -> settings:
    """Settings whose examples are the same in every run with the same NUMBA_ATTN_TEST_SEED."""
    import hypothesis.core  # here, so that a child process that draws its numbers imports no more than NumPy
    from hypothesis import HealthCheck, settings

    if SHIFT:
        hypothesis.core.global_force_seed = SHIFT
    return settings(
        derandomize=not SHIFT,
        deadline=None,
        max_examples=examples,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
