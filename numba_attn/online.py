"""Online softmax, the few lines that every backend shares.

A row that has seen some of its keys is the state (m, l, o): m the largest score, l = sum p, o = sum p v with p = 2**(s
- m). Scores are in log2 units, so that 2**x, which is cheaper than e**x, is the only transcendental. More keys with
largest score m' give, with M = max(m, m') and alpha = 2**(m - M),

    l <- l alpha + sum 2**(s - M)        o <- o alpha + sum 2**(s - M) v            (Milakov and Gimelshein 2018, Rabe
    and Staats 2021)

Both are two-level sums: a block's own sum starts from zero and is added to the running sum once.

The functions use operators and the names that are passed to `build`. These mean vectors on the CPU, scalars on a GPU
and arrays in NumPy. A state starts at m = -inf, l = 0, o = 0. No finite number stands for -inf: `finite_or_zero`
prevents -inf - -inf.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


class Online(NamedTuple):
    finite_or_zero: Callable[..., Any]
    rescale: Callable[..., Any]


def build(compile_function, exp2, where, equal_minus_inf, zeros_like) -> Online:
    """The shared functions over one backend's names."""

    @compile_function
    def finite_or_zero(m):
        """-inf becomes 0, so that s - m is -inf and never NaN where nothing was seen yet."""
        return where(equal_minus_inf(m), zeros_like(m), m)

    @compile_function
    def rescale(m_old, m_new):
        """alpha, the factor that sums taken with m_old have under m_new >= m_old: exactly 1 where the two are equal, 0
        for an empty state."""
        return exp2(m_old - finite_or_zero(m_new))

    return Online(finite_or_zero, rescale)


# The same in NumPy: the tests compare the vector code with it.
numpy_online = build(lambda f: f, np.exp2, np.where, np.isneginf, np.zeros_like)


def merge(out_a, lse_a, out_b, lse_b):
    """Attention over the union of two disjoint key sets, from (out, lse) of each.

    out (..., D), lse (...) in natural units; a set with no visible key has lse -inf. Associative and commutative up to
    rounding.
    """
    m = np.maximum(lse_a, lse_b)
    safe = np.where(np.isneginf(m), 0, m)
    wa, wb = np.exp(lse_a - safe), np.exp(lse_b - safe)
    total = wa + wb
    divisor = np.where(total == 0, 1, total)
    out = (out_a * wa[..., None] + out_b * wb[..., None]) / divisor[..., None]
    with np.errstate(divide="ignore"):
        return out.astype(np.result_type(out_a, out_b)), safe + np.log(total)
