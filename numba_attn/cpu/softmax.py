"""Online softmax over a tile of scores, lanes are queries: every operation is vertical."""

from functools import cache

import numpy as np

from .. import online
from . import tiles
from .compile import inner
from .simd import exp2, load, maximum, select, splat, store


@cache
def build(elem: str):
    """online_softmax for one accumulation type, to be inlined into kernels."""
    jit = inner
    base = tiles.build(elem)
    L, acc = base.L, base.acc
    ZERO, NEG_INF = acc(0), acc(-np.inf)

    @jit
    def equal_minus_inf(m):
        return m == splat(NEG_INF, L)

    @jit
    def zeros_like(m):
        return splat(ZERO, L)

    shared = online.build(jit, exp2, select, equal_minus_inf, zeros_like)
    finite_or_zero, rescale = shared.finite_or_zero, shared.rescale

    @jit
    def online_softmax(s, w, first, last, m, l, alpha):
        """s: scores in, weights p out; m, l updated; alpha: what the old sums are worth now.

        first and last are multiples of 4 (rows past the end hold -inf): which of the four partial sums a key goes to
        depends on its index alone, so the bits of a row do not depend on the range that its tile needs.
        """
        for c in range(0, w, L):
            a0 = load(s + (first * w + c), L)
            a1 = load(s + ((first + 1) * w + c), L)
            a2 = load(s + ((first + 2) * w + c), L)
            a3 = load(s + ((first + 3) * w + c), L)
            for j in range(first + 4, last, 4):
                row = s + (j * w + c)
                a0 = maximum(load(row, L), a0)
                a1 = maximum(load(row + w, L), a1)
                a2 = maximum(load(row + 2 * w, L), a2)
                a3 = maximum(load(row + 3 * w, L), a3)
            old = load(m + c, L)
            new = maximum(maximum(maximum(a0, a1), maximum(a2, a3)), old)
            store(alpha + c, rescale(old, new))
            store(m + c, new)
        for c in range(0, w, L):
            safe = finite_or_zero(load(m + c, L))
            s0 = splat(ZERO, L)
            s1 = s0
            s2 = s0
            s3 = s0
            for j in range(first, last, 4):
                row = s + (j * w + c)
                e0 = exp2(load(row, L) - safe)
                e1 = exp2(load(row + w, L) - safe)
                e2 = exp2(load(row + 2 * w, L) - safe)
                e3 = exp2(load(row + 3 * w, L) - safe)
                store(row, e0)
                store(row + w, e1)
                store(row + 2 * w, e2)
                store(row + 3 * w, e3)
                s0 = s0 + e0
                s1 = s1 + e1
                s2 = s2 + e2
                s3 = s3 + e3
            store(l + c, load(l + c, L) * load(alpha + c, L) + ((s0 + s1) + (s2 + s3)))

    return online_softmax
