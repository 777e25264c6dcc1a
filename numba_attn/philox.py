"""Philox4x32-10 (Salmon et al. 2011), the random numbers of dropout: the same on every device."""

from collections.abc import Callable
from typing import Any

import numpy as np


def build(compile_function: Callable[..., Any]) -> Callable[..., Any]:
    """word(c0, c1, c2, c3, k0, k1, n): 32-bit word n of the block at counter (c0, c1, c2, c3), all of them uint64."""

    @compile_function
    def word(c0, c1, c2, c3, k0, k1, n):
        low = np.uint64(0xFFFFFFFF)
        for _ in range(10):
            p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
            c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
        return c0 if n == 0 else c1 if n == 1 else c2 if n == 2 else c3

    return word
