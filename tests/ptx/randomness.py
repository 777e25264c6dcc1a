"""Random numbers for compiled code: splitmix64 (Steele, Lea and Flood 2014), whose state is one number."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit
def bits(state):  # type: ignore[no-untyped-def]
    """64 random bits; state is an array of one uint64."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    x = state[0]
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit
def below(state, n):  # type: ignore[no-untyped-def]
    """A whole number from 0 to n - 1."""
    return np.int64((bits(state) >> np.uint64(33)) % np.uint64(n))


@njit
def symmetric(state):  # type: ignore[no-untyped-def]
    """A number between -1 and 1."""
    return np.float64(bits(state) >> np.uint64(11)) * 2.0**-52 - 1.0
