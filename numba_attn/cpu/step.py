"""The one step that every kernel calls for a tile of queries and a block of keys: products -> modified -> hidden.

    s = K Q'                            rows of keys against transposed, scaled queries
    s = softcap(s), + bias, - ALiBi, score_mod(s)           ends in log2 units
    s = -inf                            where hidden, only in blocks that hold a hidden pair

Where a kernel asks for derivatives, the step keeps what the chain rule needs: the score before score_mod and the
derivatives of score_mod and of softcap.
"""

import numpy as np
from numba.core import types
from numba.extending import overload

from ..philox import build as build_philox
from .compile import inner, outlined
from .products import score_products
from .queries import same_head
from .simd import address_of, at_byte, call_address, full_width, pointer_like, scalar
from .target import MATH
from .visible import NONE, hidden_by_score, hide_pairs, mod_calls, visible_pairs

philox_word = build_philox(inner)


def tanh(x):
    """tanh of a float, branch-free, so that LLVM makes vector code of a loop over it."""
    raise NotImplementedError("for kernels only")


@overload(tanh, jit_options={"error_model": "numpy", "no_rewrites": True})
def _tanh(x):
    function = MATH["f32" if x == types.float32 else "f64"].tanh
    return lambda x: function(x)


# ---------------------------------------------------------------- what changes a score


@outlined
def softcap(s, begin, end, scale_in, scale_out):
    """c tanh(s / c)."""
    for x in range(begin, end):
        s[x] = scalar(s, scale_out) * tanh(s[x] * scalar(s, scale_in))


@outlined
def softcap_slopes(s, curve, begin, end, scale_in, scale_out):
    """softcap() that keeps its derivative, 1 - tanh(s / c)**2."""
    for x in range(begin, end):
        t = tanh(s[x] * scalar(s, scale_in))
        s[x] = scalar(s, scale_out) * t
        curve[x] = scalar(s, 1) - t * t


@outlined
def add_bias(s, bias, begin, end, unit):
    for x in range(begin, end):
        s[x] = s[x] + bias[x] * scalar(s, unit)


@outlined
def add_alibi(s, slopes, position, w, first, last):
    """s -= slope |i + offset - j|; slopes carry the unit; position is relative to the block."""
    for j in range(first, last):
        row = s + j * w
        for r in range(w):
            row[r] = row[r] - slopes[r] * abs(position[r] - scalar(s, j))


@inner
def add_terms(task, queries, keys, s):
    """Bias and ALiBi. The buffer of lanes keeps each query's position, which the derivative by the slopes needs."""
    call, scratch, w = task.call, task.scratch, queries.width
    if call.bias:
        add_bias(s, at_byte(scratch, call.at_bias), keys.first * w, keys.last * w, call.unit)
    if call.slopes:
        lanes = at_byte(scratch, call.at_lanes)
        position = lanes + full_width(s)
        slopes = pointer_like(s, call.slopes + queries.batch * call.slopes_b)
        for r in range(w):
            lanes[r] = slopes[queries.heads[r]] * scalar(s, call.unit)
            position[r] = scalar(s, queries.rows[r] + queries.offset - keys.j0)
        add_alibi(s, lanes, position, w, keys.first, keys.last)


@outlined
def slope_calls(call, target, slope, queries, keys):
    """mod_calls() for score_mod and its derivative; both buffers begin at keys.first."""
    rows, heads, w, count = queries.rows, queries.heads, queries.width, queries.count
    fn, aux, b = call.score_mod, call.score_aux, queries.batch
    r = 0
    while r < count:
        end = same_head(heads, r, count)
        key, n, at, to = keys.key + keys.first, keys.last - keys.first, address_of(target + r), address_of(slope + r)
        call_address(fn, at, to, w, end - r, b, heads[r], rows[r], key, n, aux)
        r = end


@outlined
def dropout(call, p, queries, keys):
    """Weights of dropped pairs become 0, the others are divided by their probability to stay. l was summed before."""
    rows, heads, w, count = queries.rows, queries.heads, queries.width, queries.count
    # The random number of a pair is a function of seed, batch row, head, query and key, whatever the order of work.
    k0, k1 = np.uint64(call.seed) & np.uint64(0xFFFFFFFF), np.uint64(call.seed) >> np.uint64(32)
    scale, b = scalar(p, call.drop_scale), np.uint64(queries.batch)
    for j in range(keys.first, keys.last):
        # A block of random numbers serves four keys.
        block, word = np.uint64(keys.key + j) >> np.uint64(2), (keys.key + j) & 3
        for r in range(count):
            x = philox_word(np.uint64(rows[r]), block, np.uint64(heads[r]), b, k0, k1, word)
            p[j * w + r] = p[j * w + r] * scale if x >= np.uint64(call.drop_below) else scalar(p, 0)


# ---------------------------------------------------------------- the step


@inner
def raw_scores(task, queries, keys, k, q, s):
    """k: KeyRows of the block."""
    w, n = queries.width, task.call.qk_dim
    score_products(k.at, q, s, keys, w, n)
    if not k.finite or not queries.q_finite:
        # A score of an infinite feature becomes NaN: -inf would look like a hidden pair.
        for x in range(keys.first * w, keys.last * w):
            s[x] = s[x] + (s[x] - s[x])


@inner
def score_block(task, queries, keys, k, q, s, bytes_wanted):
    """Final scores, in log2 units, of a block of keys: NONE, ALL or SOME.

    s holds -inf for exactly the hidden pairs, and is not written where the answer is NONE. With SOME and bytes_wanted,
    the bytes at call.at_visible are 0 for those.
    """
    call, w = task.call, queries.width
    # What masks hide is known before anything is multiplied: a block of which nothing is seen is skipped.
    pairs = visible_pairs(task, queries, keys, bytes_wanted)
    if pairs.seen == NONE:
        return NONE
    # Products and modifiers take all pairs, hidden ones too: all lanes of a vector do the same.
    raw_scores(task, queries, keys, k, q, s)
    if call.use_softcap:
        softcap(s, keys.first * w, keys.last * w, call.softcap_in, call.softcap_out)
    add_terms(task, queries, keys, s)
    if call.score_mod:
        mod_calls(call.score_mod, call.score_aux, s + keys.first * w, queries, keys)
        pairs = hidden_by_score(task, queries, keys, s, pairs)
    # -inf last, whatever the steps before have made of a hidden pair.
    hide_pairs(task, queries, keys, s, pairs)
    return pairs.seen


@inner
def score_block_slopes(task, queries, keys, k, q, s, bytes_wanted):
    """score_block() that keeps, for the chain rule, the scores before score_mod and the derivatives of it and of
    softcap."""
    call, scratch, w = task.call, task.scratch, queries.width
    pairs = visible_pairs(task, queries, keys, bytes_wanted)
    if pairs.seen == NONE:
        return NONE
    raw_scores(task, queries, keys, k, q, s)
    if call.use_softcap:
        curve = at_byte(scratch, call.at_curve)
        softcap_slopes(s, curve, keys.first * w, keys.last * w, call.softcap_in, call.softcap_out)
    add_terms(task, queries, keys, s)
    if call.score_mod:
        # The gradients of the function's arrays are taken at the scores that went in.
        raw, slope = at_byte(scratch, call.at_raw), at_byte(scratch, call.at_slope)
        for x in range(keys.first * w, keys.last * w):
            raw[x] = s[x]
        slope_calls(call, s + keys.first * w, slope + keys.first * w, queries, keys)
        pairs = hidden_by_score(task, queries, keys, s, pairs)
    hide_pairs(task, queries, keys, s, pairs)
    return pairs.seen
