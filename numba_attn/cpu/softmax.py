"""Online softmax over a tile of scores, lanes are queries: every operation is vertical."""

from typing import Any, NamedTuple

from .. import online
from .compile import inner
from .simd import lanes
from .vectors import MINUS_INF, exp2, load, maximum, select, splat, store


class State(NamedTuple):
    """What a tile has summed so far, see online.py."""

    m: Any  # of each lane: the largest score,
    l: Any  # and the sum of its weights relative to m
    o: Any  # sums of the values, o[d, lane]


@inner
def equal_minus_inf(m):
    return m == splat(m, MINUS_INF)


@inner
def zeros_like(m):
    return splat(m, 0)


_shared = online.build(inner, exp2, select, equal_minus_inf, zeros_like)
finite_or_zero, rescale = _shared.finite_or_zero, _shared.rescale


@inner
def raise_maximum(s, w, first, last, m, alpha):
    """m becomes the maximum of itself and rows first:last. alpha becomes the factor of sums taken with the old m."""
    # Four chains, of keys 0, 4, ..., of 1, 5, ... and so on, so that their latencies overlap.
    for c in range(0, w, lanes(s)):
        a0 = load(s + (first * w + c))
        a1 = load(s + ((first + 1) * w + c))
        a2 = load(s + ((first + 2) * w + c))
        a3 = load(s + ((first + 3) * w + c))
        for j in range(first + 4, last, 4):
            row = s + (j * w + c)
            a0 = maximum(load(row), a0)
            a1 = maximum(load(row + w), a1)
            a2 = maximum(load(row + 2 * w), a2)
            a3 = maximum(load(row + 3 * w), a3)
        old = load(m + c)
        new = maximum(maximum(maximum(a0, a1), maximum(a2, a3)), old)
        store(alpha + c, rescale(old, new))
        store(m + c, new)


@inner
def weigh(s, w, first, last, state, alpha):
    """Rows first:last of s become weights, 2**(s - m), and l gets their sum."""
    m, l = state.m, state.l
    for c in range(0, w, lanes(s)):
        # A lane that has seen nothing yet gets weights 2**(-inf - 0) = 0.
        safe = finite_or_zero(load(m + c))
        s0 = splat(s, 0)
        s1 = s0
        s2 = s0
        s3 = s0
        for j in range(first, last, 4):
            row = s + (j * w + c)
            e0 = exp2(load(row) - safe)
            e1 = exp2(load(row + w) - safe)
            e2 = exp2(load(row + 2 * w) - safe)
            e3 = exp2(load(row + 3 * w) - safe)
            store(row, e0)
            store(row + w, e1)
            store(row + 2 * w, e2)
            store(row + 3 * w, e3)
            s0 = s0 + e0
            s1 = s1 + e1
            s2 = s2 + e2
            s3 = s3 + e3
        # Two levels: the block's own sum is added to the running sum here, once.
        store(l + c, load(l + c) * load(alpha + c) + ((s0 + s1) + (s2 + s3)))


@inner
def online_softmax(s, w, keys, state, alpha):
    """s: scores of a block in, weights out; m and l of the state updated, alpha as in `raise_maximum`.

    The rows are taken in fours, those past the end as -inf: which of the four partial sums a key goes to depends on its
    index alone, so the bits of a row do not depend on the range that its tile needs. (keys.first is a multiple of 8.)
    """
    first, last = keys.first & ~3, (keys.last + 3) & ~3
    for x in range(keys.last * w, last * w):
        s[x] = MINUS_INF
    raise_maximum(s, w, first, last, state.m, alpha)
    weigh(s, w, first, last, state, alpha)
