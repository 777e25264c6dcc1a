"""The forward kernel: tiles of queries against blocks of keys, lanes are queries.

    for a tile of queries, transposed and scaled once:                      Q' [d, lane]
        for a block of keys that the tile needs:
            S' = K Q'            products      rows of K are read as broadcasts
            S' = modified(S')    softcap, bias, ALiBi, score_mod; ends in log2 units
            S' = -inf            where hidden, only in blocks that hold a hidden pair
            P', m, l, alpha      online softmax, all vertical
            O' = O' alpha + V' P'
        out, lse = O' / l, m + log l

One source serves float32 (with float16 and bfloat16 storage) and float64: the element type travels with the pointers,
and Numba specialises each function on it. Everything that changes per call is a number in a CALL record, so a call
never compiles anything. The letters are explained in products.py.
"""

import math

import numpy as np

from ..online import LN2, LOG2E
from .call import TILE, buffers, tile_rows
from .compile import inner, outlined
from .items import work_items
from .products import Seen, value_products
from .queries import (
    Keys,
    k_array,
    key_range,
    load_queries,
    locate,
    prefetch_queries,
    queries_at,
    v_array,
    write_queries,
)
from .simd import at_byte, full_width, lanes, pointer_like, scalar, u8_ptr
from .softmax import State, online_softmax
from .step import dropout, score_block
from .storage import KeyRows, Strided, all_finite, key_rows
from .vectors import MINUS_INF, exp2, load, splat, store
from .visible import NONE, SOME

FLUSH = 4096  # keys after which sums go to a third level: keeps the error of long sums at that of dense NumPy
MAX_QUERIES = 192  # that share a pass over K and V; twice as many are no faster, and leave a thread idle at the end
MAX_QUERIES_COPY = 384  # where the pass also copies or converts K and V


def key_block(elem: str, head_dim: int) -> int:
    """Keys a block: a function of accumulation type and head size alone, since a row's bits depend on it.

    With long blocks O' is folded less often. S', K and V of a block stay in the second-level cache. Share of FMA peak
    of the three inner loops (Zen 4, D = 64): 64 keys 80 %, 128 keys 84, 192 keys 87, 256 keys 89; D = 128: 64 keys 89,
    128 keys 95.
    """
    keys = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64
    return keys if elem == "f32" else keys // 2


def layout(elem: str, n_tiles: int, qk_dim: int, v_dim: int, long: bool, bias: bool) -> dict[str, int]:
    """The buffers of a thread that takes n_tiles tiles at a time."""
    w, size, block = tile_rows(elem), 4 if elem == "f32" else 8, key_block(elem, qk_dim)
    return buffers(
        {
            "s": block * w * size,
            "q": n_tiles * qk_dim * w * size,
            "o": n_tiles * v_dim * w * size,
            "state": (1 + 2 * n_tiles) * w * size,
            "sums": n_tiles * (v_dim + 4) * w * size * long,
            "infos": n_tiles * TILE.itemsize,
            "table": 2 * w * 8,
            "bounds": 2 * w * 4,
            "lanes": 2 * w * size,
            "visible": block * w,
            "seen": block * w,
            "bias": block * w * size * bias,
            "rows": max(qk_dim, v_dim, block) * w * size,
            "k": block * qk_dim * size,
            "v": block * v_dim * size,
        }
    )


# ---------------------------------------------------------------- the state of a tile


@inner
def queries_of(task, t):
    """Q' of the t-th tile that the thread has in its memory."""
    return at_byte(task.scratch, task.call.at_q) + t * task.call.qk_dim * full_width(task.scratch)


@inner
def state_of(task, t):
    """The running sums of the t-th tile."""
    call, scratch, w = task.call, task.scratch, full_width(task.scratch)
    m = at_byte(scratch, call.at_state) + (1 + 2 * t) * w  # alpha, which all tiles use in turns, stands in front
    return State(m, m + w, at_byte(scratch, call.at_o) + t * call.v_dim * w)


@inner
def long_sums_of(task, t):
    """The third level of the t-th tile's sums; alpha stands behind m."""
    w, n = full_width(task.scratch), task.call.v_dim
    o = at_byte(task.scratch, task.call.at_sums) + t * (n + 4) * w
    return State(o + (n + 1) * w, o + n * w, o)


@inner
def begin(task, queries, q, state):
    """Load the tile's queries; only a sink is summed already: it is a key whose value is 0."""
    call, w = task.call, queries.width
    m, l, o = state.m, state.l, state.o
    load_queries(task, queries, q)
    for x in range(call.v_dim * w):
        o[x] = 0.0
    for r in range(w):
        m[r] = MINUS_INF
        l[r] = 0.0
    # A sink of -inf is no key at all, so l stays 0: the row may be empty.
    if call.sinks:
        sinks = pointer_like(m, call.sinks)
        for r in range(w):
            m[r] = sinks[queries.heads[r]] * scalar(m, LOG2E)
            l[r] = 0.0 if m[r] == MINUS_INF else 1.0


@inner
def begin_long_sums(sums, w, n):
    """The third level of a tile's sums before the first flush."""
    for x in range(n * w):
        sums.o[x] = 0.0
    for r in range(w):
        sums.l[r] = 0.0
        sums.m[r] = MINUS_INF


@outlined
def flush(w, n, state, sums):
    """Third level: what a tile has summed so far moves to sums; exact for a lane that has summed nothing since."""
    m_sum, l_sum, o_sum = sums.m, sums.l, sums.o
    l, o = state.l, state.o
    alpha = m_sum + full_width(m_sum)
    # The tile keeps its m, which is the largest score of both. Only the older sums must be rescaled.
    for r in range(w):
        m_new = state.m[r]
        safe = scalar(m_sum, 0) if m_new == MINUS_INF else m_new  # -inf - -inf must not happen
        alpha[r] = m_sum[r] - safe
        m_sum[r] = m_new
    # Add, and start again from 0.
    for c in range(0, w, lanes(l)):
        factor = exp2(load(alpha + c))
        store(l_sum + c, load(l_sum + c) * factor + load(l + c))
        store(l + c, splat(l, 0))
        for d in range(n):
            at = d * w + c
            store(o_sum + at, load(o_sum + at) * factor + load(o + at))
            store(o + at, splat(l, 0))


@inner
def finish(task, queries, state):
    """out = O' / l, 0 for an empty row; lse = m + log l in natural units.

    -0 becomes +0 at the store: a block of which a row sees no key may turn -0 into +0, and a row's bits must not depend
    on that.
    """
    call, m, l = task.call, state.m, state.l
    rows, heads = queries.rows, queries.heads
    # In float64 and rounded once: beside a large m a float32 sum would lose log l.
    if call.lse:
        base = call.lse + queries.batch * call.lse_b
        for r in range(queries.count):
            value = np.float64(m[r]) * LN2 + math.log(np.float64(l[r]))
            pointer_like(m, base + heads[r] * call.lse_h + rows[r] * call.lse_s)[0] = scalar(m, value)
    # l becomes the factor of the row: one division, and 0 where nothing was seen.
    for r in range(queries.width):
        l[r] = scalar(l, 0) if l[r] == 0.0 else scalar(l, 1) / l[r]
    out = Strided(call.out + queries.batch * call.out_b, call.out_h, call.out_s, call.out_d, call.storage)
    write_queries(task, queries, out, state.o, l, call.v_dim)


# ---------------------------------------------------------------- blocks of keys


@inner
def attend_tile(task, queries, keys, k, v, q, state):
    """Keys of a block into the state of one tile."""
    call, scratch, w = task.call, task.scratch, queries.width
    s, alpha = at_byte(scratch, call.at_s), at_byte(scratch, call.at_state)
    # S', in log2 units. Bytes of the hidden pairs only where 0 times a value of V would not be 0.
    seen = score_block(task, queries, keys, k, q, s, not v.finite)
    if seen == NONE:
        return
    # P' replaces S'. alpha is the factor of the sums so far.
    online_softmax(s, w, keys, state, alpha)
    # After the sum of the weights: a dropped pair still takes part in the softmax.
    if call.drop:
        dropout(call, s, queries, keys)
    # O' = O' alpha + V' P'
    hidden = Seen(u8_ptr(at_byte(scratch, call.at_visible)), seen == SOME and not v.finite)
    value_products(v.at, s, hidden, state.o, alpha, keys, w, call.v_dim)


@inner
def attend_block(task, n_tiles, j0):
    """The block of keys at j0 into the state of every tile that needs it."""
    call, sequence, scratch = task.call, task.sequence, task.scratch
    qk, dv = call.qk_dim, call.v_dim
    n_keys, key = min(call.block, sequence.k_len - j0), sequence.k_start + j0
    # The rows that some tile needs, and whether some pair of them is hidden: then V must be finite, see `Seen`.
    low, high = n_keys, 0
    mixed = call.n_masks + call.n_segments + call.n_mask_mods + call.bias + call.score_mod != 0
    for t in range(n_tiles):
        queries = queries_at(task, t)
        first, last = key_range(queries, j0, n_keys)
        if first < last:
            low, high = min(low, first), max(high, last)
            mixed = mixed or j0 + first < queries.inner_low or j0 + last > queries.inner_high
    if low >= high:
        return
    # Rows as accumulation type: read where they lie if they can be, else copied once for all tiles.
    k_at = key_rows(k_array(task, key), at_byte(scratch, call.at_k), n_keys, qk)
    v_at = key_rows(v_array(task, key), at_byte(scratch, call.at_v), n_keys, dv)
    # V is searched for NaN and infinity only if some pair is hidden. Otherwise every product follows IEEE arithmetic.
    k = KeyRows(k_at, all_finite(k_at + low * qk, (high - low) * qk))
    v = KeyRows(v_at, not mixed or all_finite(v_at + low * dv, (high - low) * dv))
    for t in range(n_tiles):
        queries = queries_at(task, t)
        first, last = key_range(queries, j0, n_keys)
        if first < last:
            keys = Keys(j0, key, first, last)
            attend_tile(task, queries, keys, k, v, queries_of(task, t), state_of(task, t))


@inner
def attend(task, first_tile, n_tiles):
    """n_tiles query tiles of one (sequence, key head), together, over all keys that one of them needs."""
    dv, block = task.call.v_dim, task.call.block
    long = task.sequence.k_len > FLUSH
    # Where each tile is, and the keys that one of them sees.
    low, high = task.sequence.k_len, 0
    for t in range(n_tiles):
        queries = queries_at(task, t)
        locate(task, first_tile + t, queries)
        low, high = min(low, queries.low), max(high, queries.high)
        prefetch_queries(task, queries)
    # The rows that were prefetched above are read here.
    for t in range(n_tiles):
        queries = queries_at(task, t)
        begin(task, queries, queries_of(task, t), state_of(task, t))
        if long:
            begin_long_sums(long_sums_of(task, t), full_width(task.scratch), dv)
    # Blocks begin at multiples of `block` whatever the tile: a key's place in its block decides the bits of its sum.
    j0 = low // block * block
    while j0 < high:
        attend_block(task, n_tiles, j0)
        j0 += block
        if long and j0 % FLUSH == 0:
            for t in range(n_tiles):
                flush(queries_at(task, t).width, dv, state_of(task, t), long_sums_of(task, t))
    for t in range(n_tiles):
        queries, state = queries_at(task, t), state_of(task, t)
        if long:
            sums = long_sums_of(task, t)
            flush(queries.width, dv, state, sums)
            state = State(state.m, sums.l, sums.o)
        finish(task, queries, state)


def build(elem: str):
    """drain(call_address): the worker for one accumulation type, "f32" or "f64"."""
    return work_items(attend, elem)
