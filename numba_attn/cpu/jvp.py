"""The tangent kernel, forward mode: out and its derivative along given tangents in one pass over the pairs.

    S'  = K Q', modified; -inf where hidden                 as in the forward kernel
    S.' = (K Q.' + K. Q') through the derivatives of softcap, bias, ALiBi and score_mod
    P', m, l, alpha                                         online softmax
    c  = c alpha + sum P' S.'
    O' = O' alpha + V' P'        O.' = O.' alpha + V.' P' + V' (P' S.')
    out = O / l         lse = m + log l         lse. = c / l         out. = O. / l - lse. out

since d softmax = P (S. - sum P S.). A tangent that is absent is 0 and costs nothing. Sums are two-level: at 65,536 keys
the error of out in float32 is 5e-6. In the forward kernel, which has a third level, it is 1e-6.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ..online import LN2, LOG2E
from .call import TILE, buffers, tile_rows
from .compile import inner, outlined
from .items import work_items
from .products import Seen, score_products, value_products
from .queries import (
    Keys,
    k_array,
    key_range,
    load_queries,
    locate,
    queries_at,
    read_queries,
    same_head,
    v_array,
    write_queries,
)
from .simd import address_of, at_byte, call_address, full_width, pointer_like, scalar, u8_ptr
from .softmax import State, online_softmax
from .step import dropout, score_block_slopes
from .storage import KeyRows, Strided, all_finite, key_rows
from .vectors import MINUS_INF
from .visible import NONE, SOME, clear_hidden


def key_block(elem: str, head_dim: int) -> int:
    """Keys a block: a function of accumulation type and head size alone, since a row's bits depend on it."""
    keys = 128 if head_dim <= 128 else 64
    return keys if elem == "f32" else keys // 2


def layout(elem: str, qk_dim: int, v_dim: int, bias: bool, modified: bool, drop: bool) -> dict[str, int]:
    """The buffers of a thread."""
    w, size, block = tile_rows(elem), 4 if elem == "f32" else 8, key_block(elem, qk_dim)
    tile, keys, values = block * w * size, block * qk_dim * size, block * v_dim * size
    return buffers(
        {
            **dict.fromkeys(("s", "s_dot", "more", "p_dot"), tile),
            **dict.fromkeys(("q", "q_dot"), qk_dim * w * size),
            **dict.fromkeys(("o", "o_dot"), v_dim * w * size),
            "state": 5 * w * size,  # alpha, ones, m, l, c
            "infos": TILE.itemsize,
            "table": 2 * w * 8,
            "bounds": 2 * w * 4,
            "lanes": 2 * w * size,
            "visible": block * w,
            "seen": block * w,
            "bias": tile * bias,
            **dict.fromkeys(("slope", "curve", "raw"), tile * modified),
            "keep": tile * drop,
            "rows": max(qk_dim, v_dim, block) * w * size,
            **dict.fromkeys(("k", "k_dot"), keys),
            **dict.fromkeys(("v", "v_dot"), values),
        }
    )


class Tile(NamedTuple):
    """A tile of queries, its sums and their tangents."""

    queries: Any  # its TILE record
    q: Any  # scaled queries, transposed, and their tangent
    q_dot: Any
    state: State
    c: Any  # of each lane: the sum of P' S.'
    o_dot: Any
    alpha: Any  # of each lane: the factor of the old sums
    ones: Any  # a row of ones


class Block(NamedTuple):
    """Rows of K and V of a block of keys, and of their tangents, as accumulation type."""

    k: KeyRows
    v: KeyRows  # finite: v_dot is finite too
    k_dot: Any
    v_dot: Any


@inner
def tile_of(task):
    call, scratch, w = task.call, task.scratch, full_width(task.scratch)
    alpha = at_byte(scratch, call.at_state)
    return Tile(
        queries_at(task, 0),
        at_byte(scratch, call.at_q),
        at_byte(scratch, call.at_q_dot),
        State(alpha + 2 * w, alpha + 3 * w, at_byte(scratch, call.at_o)),
        alpha + 4 * w,
        at_byte(scratch, call.at_o_dot),
        alpha,
        alpha + w,
    )


# ---------------------------------------------------------------- small loops


@outlined
def add_scaled(x, y, factor, begin, end):
    for n in range(begin, end):
        x[n] = x[n] + y[n] * factor


@outlined
def multiply(x, y, begin, end):
    for n in range(begin, end):
        x[n] = x[n] * y[n]


@outlined
def add_lanes(sums, x, part, w, keys):
    """sums[lane] += sum_j x[j, lane] over a block of keys, summed from zero in part: two-level sums."""
    for r in range(w):
        part[r] = 0.0
    for j in range(keys.first, keys.last):
        for r in range(w):
            part[r] = part[r] + x[j * w + r]
    for r in range(w):
        sums[r] = sums[r] + part[r]


# ---------------------------------------------------------------- S.'


@inner
def tangent_calls(call, raw, s_dot, queries, keys):
    """The tangent of score_mod, one call a run of lanes that share a head; both buffers begin at keys.first."""
    rows, heads, w, count = queries.rows, queries.heads, queries.width, queries.count
    key, n, b = keys.key + keys.first, keys.last - keys.first, queries.batch
    fn, aux, aux_dot = call.score_jvp, call.score_aux, call.aux_dot
    r = 0
    while r < count:
        end = same_head(heads, r, count)
        at, tangent = address_of(raw + r), address_of(s_dot + r)
        call_address(fn, at, tangent, w, end - r, b, heads[r], rows[r], key, n, aux, aux_dot)
        r = end


@inner
def product_tangents(task, tile, keys, block, s_dot, more):
    """K Q.' + K. Q', in natural units."""
    call, w, qk = task.call, tile.queries.width, task.call.qk_dim
    begin, end = keys.first * w, keys.last * w
    if call.q_dot:
        score_products(block.k.at, tile.q_dot, s_dot, keys, w, qk)
    else:
        for x in range(begin, end):
            s_dot[x] = 0.0
    if call.k_dot:
        score_products(block.k_dot, tile.q, more, keys, w, qk)
        add_scaled(s_dot, more, scalar(more, call.dot_unit), begin, end)


@inner
def score_tangents(task, tile, keys, block, s_dot):
    """S.' before the pairs are hidden, in natural units, by the chain rule through what score_block_slopes() did."""
    call, scratch, queries, w = task.call, task.scratch, tile.queries, tile.queries.width
    more, begin, end, b = at_byte(scratch, call.at_more), keys.first * w, keys.last * w, queries.batch
    # The steps of score_block_slopes() in their order, each by its derivative.
    product_tangents(task, tile, keys, block, s_dot, more)
    if call.use_softcap:
        multiply(s_dot, at_byte(scratch, call.at_curve), begin, end)
    # A bias adds its tangent.
    if call.bias_dot:
        at = call.bias_dot + b * call.bias_dot_b + (keys.key + keys.first) * call.bias_dot_j
        array = Strided(at, call.bias_dot_h, call.bias_dot_i, call.bias_dot_j, call.bias_dot_storage)
        read_queries(task, queries, array, more + begin, keys.last - keys.first)
        add_scaled(s_dot, more, scalar(more, 1), begin, end)
    # A slope adds -slope. |i + offset - j|.
    if call.slopes_dot:
        slopes = pointer_like(more, call.slopes_dot + b * call.slopes_dot_b)
        position = at_byte(scratch, call.at_lanes) + full_width(more)
        for j in range(keys.first, keys.last):
            for r in range(w):
                x = j * w + r
                s_dot[x] = s_dot[x] - slopes[queries.heads[r]] * abs(position[r] - scalar(more, j))
    # The tangent of score_mod includes those of its arrays.
    if call.score_mod:
        tangent_calls(call, at_byte(scratch, call.at_raw) + begin, s_dot + begin, queries, keys)


# ---------------------------------------------------------------- a tile of queries


@inner
def begin(task, tile):
    """Load the tile's queries and their tangents; only a sink is summed already: it is a key whose value is 0."""
    call, queries, w = task.call, tile.queries, tile.queries.width
    m, l, c, o, o_dot, ones = tile.state.m, tile.state.l, tile.c, tile.state.o, tile.o_dot, tile.ones
    load_queries(task, queries, tile.q)
    if call.q_dot:
        q_dot, factor = tile.q_dot, scalar(o, call.scale)
        at = call.q_dot + queries.batch * call.q_dot_b
        array = Strided(at, call.q_dot_h, call.q_dot_s, call.q_dot_d, call.storage)
        read_queries(task, queries, array, q_dot, call.qk_dim)
        for x in range(call.qk_dim * w):
            q_dot[x] = q_dot[x] * factor
    for x in range(call.v_dim * w):
        o[x] = 0.0
        o_dot[x] = 0.0
    for r in range(w):
        ones[r] = 1.0
        m[r] = MINUS_INF
        l[r] = 0.0
        c[r] = 0.0
    # A sink begins with the weight 1, so c begins with the tangent of its score.
    if call.sinks:
        sinks = pointer_like(m, call.sinks)
        for r in range(w):
            head = queries.heads[r]
            m[r] = sinks[head] * scalar(m, LOG2E)
            l[r] = 0.0 if m[r] == MINUS_INF else 1.0
            if call.sinks_dot and m[r] != MINUS_INF:
                c[r] = pointer_like(m, call.sinks_dot)[head]


@inner
def rows_of_block(task, keys, n_keys):
    """Rows of K, V and the tangents that are given, from the block's first key on."""
    call, scratch, b, h, key = task.call, task.scratch, task.sequence.batch, task.kv_head, keys.key
    qk, dv, storage = call.qk_dim, call.v_dim, call.storage
    k = key_rows(k_array(task, key), at_byte(scratch, call.at_k), n_keys, qk)
    v = key_rows(v_array(task, key), at_byte(scratch, call.at_v), n_keys, dv)
    k_dot, v_dot = at_byte(scratch, call.at_k_dot), at_byte(scratch, call.at_v_dot)
    if call.k_dot:
        at = call.k_dot + b * call.k_dot_b + h * call.k_dot_h + key * call.k_dot_s
        k_dot = key_rows(Strided(at, 0, call.k_dot_s, call.k_dot_d, storage), k_dot, n_keys, qk)
    if call.v_dot:
        at = call.v_dot + b * call.v_dot_b + h * call.v_dot_h + key * call.v_dot_s
        v_dot = key_rows(Strided(at, 0, call.v_dot_s, call.v_dot_d, storage), v_dot, n_keys, dv)
    # V and its tangent are multiplied with the same weights, so they share one flag.
    first, n = keys.first, keys.last - keys.first
    v_finite = all_finite(v + first * dv, n * dv)
    if call.v_dot:
        v_finite = v_finite and all_finite(v_dot + first * dv, n * dv)
    return Block(KeyRows(k, all_finite(k + first * qk, n * qk)), KeyRows(v, v_finite), k_dot, v_dot)


@inner
def drop_pairs(task, queries, keys, p, p_dot):
    """Dropout of the weights and, with the same pairs, of what multiplies V in the tangent."""
    w = queries.width
    keep, begin, end = at_byte(task.scratch, task.call.at_keep), keys.first * w, keys.last * w
    for x in range(begin, end):
        keep[x] = 1.0
    dropout(task.call, keep, queries, keys)
    multiply(p, keep, begin, end)
    multiply(p_dot, keep, begin, end)


@inner
def attend_block(task, tile, keys, block):
    """A block of keys into the sums of a tile and their tangents."""
    call, scratch, queries, w = task.call, task.scratch, tile.queries, tile.queries.width
    s, s_dot, p_dot = at_byte(scratch, call.at_s), at_byte(scratch, call.at_s_dot), at_byte(scratch, call.at_p_dot)
    c, alpha, v, dv = tile.c, tile.alpha, block.v, call.v_dim
    seen = score_block_slopes(task, queries, keys, block.k, tile.q, s, not v.finite)
    if seen == NONE:
        return
    score_tangents(task, tile, keys, block, s_dot)
    # P' is 0 for a hidden pair, but 0 times a tangent that is not finite would not be.
    if seen == SOME:
        clear_hidden(s, s_dot, w, keys)
    online_softmax(s, w, keys, tile.state, alpha)
    # c = c alpha + sum P' S.'
    for r in range(w):
        c[r] = c[r] * alpha[r]
    for x in range(keys.first * w, keys.last * w):
        p_dot[x] = s[x] * s_dot[x]
    add_lanes(c, p_dot, at_byte(scratch, call.at_rows), w, keys)
    if call.drop:
        drop_pairs(task, queries, keys, s, p_dot)
    # O' and O.' are rescaled once each, so the second sum into O.' takes ones for alpha.
    hidden = Seen(u8_ptr(at_byte(scratch, call.at_visible)), seen == SOME and not v.finite)
    value_products(v.at, s, hidden, tile.state.o, alpha, keys, w, dv)
    value_products(v.at, p_dot, hidden, tile.o_dot, alpha, keys, w, dv)
    if call.v_dot:
        value_products(block.v_dot, s, hidden, tile.o_dot, tile.ones, keys, w, dv)


@outlined
def write_lse(call, queries, tile):
    """lse = m + log l in natural units."""
    m, l, rows, heads = tile.state.m, tile.state.l, queries.rows, queries.heads
    at = call.lse + queries.batch * call.lse_b
    for r in range(queries.count):
        value = np.float64(m[r]) * LN2 + math.log(np.float64(l[r]))
        pointer_like(m, at + heads[r] * call.lse_h + rows[r] * call.lse_s)[0] = scalar(m, value)


@inner
def finish(task, tile):
    """out = O / l, lse. = c / l, out. = O. / l - lse. out"""
    call, queries, b = task.call, tile.queries, tile.queries.batch
    l, c, o, o_dot = tile.state.l, tile.c, tile.state.o, tile.o_dot
    w, rows, heads = queries.width, queries.rows, queries.heads
    if call.lse:
        write_lse(call, queries, tile)
    for r in range(w):
        l[r] = scalar(l, 0) if l[r] == 0.0 else scalar(l, 1) / l[r]
        c[r] = c[r] * l[r]
    if call.lse:
        at = call.lse_dot + b * call.lse_dot_b
        for r in range(queries.count):
            pointer_like(l, at + heads[r] * call.lse_dot_h + rows[r] * call.lse_dot_s)[0] = c[r]
    # O. - lse. O, which the factor 1 / l makes out. = O. / l - lse. out
    for d in range(call.v_dim):
        for r in range(w):
            x = d * w + r
            o_dot[x] = o_dot[x] - c[r] * o[x]
    out = Strided(call.out + b * call.out_b, call.out_h, call.out_s, call.out_d, call.storage)
    write_queries(task, queries, out, o, l, call.v_dim)
    dot_at = call.out_dot + b * call.out_dot_b
    out_dot = Strided(dot_at, call.out_dot_h, call.out_dot_s, call.out_dot_d, call.storage)
    write_queries(task, queries, out_dot, o_dot, l, call.v_dim)


@inner
def attend(task, first_tile, n_tiles):
    """Tile after tile, over the keys that it needs."""
    sequence, block, tile = task.sequence, task.call.block, tile_of(task)
    queries = tile.queries
    for t in range(n_tiles):
        locate(task, first_tile + t, queries)
        begin(task, tile)
        # As in the forward kernel a key's place in its block decides the bits of its sum.
        j0 = queries.low // block * block
        while j0 < queries.high:
            n_keys = min(block, sequence.k_len - j0)
            first, last = key_range(queries, j0, n_keys)
            keys = Keys(j0, sequence.k_start + j0, first, last)
            attend_block(task, tile, keys, rows_of_block(task, keys, n_keys))
            j0 += block
        finish(task, tile)


def build(elem: str):
    """drain(call_address): the worker for one accumulation type, "f32" or "f64"."""
    return work_items(attend, elem)
