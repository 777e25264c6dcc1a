"""The forward kernel: one tile of queries, all its keys, online softmax.

K of one block is in flight while the previous block's P V is computed, and V while its own scores are: each has one
buffer, and two barriers a block order them. With few queries a block takes a part of the keys: see decode.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..online import LN2
from ..online import build as build_online
from . import decode, scalar, tile
from .code import SIZE, VECTOR
from .compile import inline
from .rows import bitmap_words, loaders, repairer
from .scores import (
    FLAG,
    HIGH,
    INNER_HIGH,
    INNER_LOW,
    LOW,
    Features,
    build_dropout,
    build_exponent,
    build_find,
    build_locate,
    build_modify,
    exact_functions,
    read_narrow,
    table_bytes,
)
from .tiling import Tiling, placed, products


def memory(t: Tiling) -> dict[str, int]:
    """Where things lie in shared memory, and its size."""
    wide = max(t.qk_dim, t.v_dim)  # the result leaves through the queries' place
    return placed(
        {
            "table": table_bytes(t.rows),
            "q": t.rows * t.stride(wide),
            "k": t.cols * t.stride(t.qk_dim),
            "v": t.cols * t.stride(t.v_dim),
            "p": t.p_bytes,
            "bad": (t.rows + t.cols) * bitmap_words(t.v_dim) * 4,
        }
    )


def build(t: Tiling, f: Features, split: int = 0) -> Any:
    """The kernel: forward(call, reals). split: a block takes so many keys, and leaves its rows' states for decode.py
    instead of the result."""
    places = memory(t)
    TABLE, Q, K, V, P = (places[name] for name in ("table", "q", "k", "v", "p"))
    BOUNDS = TABLE + t.rows * 16
    ROWS, COLS = t.rows, t.cols
    s_regs, o_regs = t.scores, t.output(t.v_dim)
    functions = exact_functions(t.acc)
    number, exp2, log2 = functions.number, functions.exp2, functions.log2
    zero, ln2, log2e, minus_inf = number(0), number(LN2), number(1 / LN2), number(-np.inf)
    choose, maximum = scalar.choose, max

    online = build_online(inline, exp2, choose, inline(lambda m: m == minus_inf), inline(lambda m: zero))
    safe, rescale = online.finite_or_zero, online.rescale
    modify = build_modify(f, t.acc, TABLE)
    whole, partial = tile.mapped(modify.whole, s_regs), tile.mapped(modify.partial, s_regs)
    parts = products(t)
    corner, output_corner = parts.corner, parts.output_corner
    scores, weigh = parts.abt(t.qk_dim), parts.pb(t.v_dim)
    guard = repairer(t, t.v_dim, places["bad"])
    clear_bad, repair, spoil = guard.clear, guard.repair, guard.spoil
    row_max, row_sum = tile.row_max(s_regs), tile.row_sum(s_regs)
    tops = tile.row_mapped(lambda x, row, reals: largest(x, reals), s_regs)
    larger = tile.each_row(_raised(t.mma, number, choose, maximum), s_regs)
    alphas = tile.each_row(lambda old, new: rescale(old, new), s_regs)
    exponent = build_exponent(f, t.acc)
    weight, largest = exponent.weight, exponent.largest
    weights = tile.with_row(lambda x, m, reals: weight(x, safe(m), reals), s_regs)
    running = tile.each_row(lambda x, y: x * y, s_regs)
    plus = tile.each_row(lambda x, y: x + y, s_regs)
    inverse = tile.each_row(lambda l, _: choose(l == zero, zero, number(1) / l), s_regs)
    divided = tile.with_rows(_divided(t.acc), o_regs)
    log_sums = tile.each_row(lambda m, l: choose(l == zero, minus_inf, (safe(m) + log2(l)) * ln2), s_regs)
    scale_rows = tile.with_row(lambda x, y, _: x * y, o_regs)
    start_o, start_l = tile.filled(t.acc, o_regs.size, 0.0), tile.filled(t.acc, len(s_regs.rows), 0.0)
    start_m, no_bits = tile.filled(t.acc, len(s_regs.rows), float("-inf")), tile.no_bits(s_regs.size)
    hidden_bits = tile.hidden_bits(s_regs)
    RAW, suspect, spoilt = f.raw, tile.suspect(s_regs), tile.mapped(lambda x, row, col, given: x + (x - x), s_regs)
    # The result leaves through the queries' place, states through the values' if they are wider than the queries.
    LEAVE, kind = (V, t.acc) if split and t.mma else (Q, t.storage)
    LEAVE_SIZE, LEAVE_STRIDE = SIZE[kind], t.v_dim * SIZE[kind] + VECTOR
    store_tile = scalar.store_tile(o_regs, kind, LEAVE_STRIDE, 2 if t.mma else VECTOR // LEAVE_SIZE)

    copies = loaders(t, f.aligned)
    load_q, load_k, load_v = (
        copies.load_queries(t.qk_dim, ROWS),
        copies.load(t.qk_dim, COLS),
        copies.load(t.v_dim, COLS),
    )
    store_o, finite_v = copies.store_queries(t.v_dim, ROWS), copies.finite(t.v_dim, COLS)
    locate, find, commit, wait_all, sync = (
        build_locate(ROWS),
        build_find(ROWS),
        scalar.commit,
        scalar.wait_all,
        scalar.sync,
    )
    thread, block, udiv, urem, add, mul = scalar.thread, scalar.block, scalar.udiv, scalar.urem, scalar.add, scalar.mul
    load_word, store_word, shared_max, narrow = scalar.load_word, scalar.store_word, scalar.shared_max, scalar.narrow
    opaque = scalar.opaque
    dropped, DROPOUT = build_dropout(s_regs, parts.element, TABLE, False), f.dropout
    scaled_where = tile.scaled_where(s_regs)
    EVERY, SPLIT, find_part, find_states = f.every_pair, split, decode.find_part, decode.find_states
    keep_stats, keep_rows = decode.build_keep(t)
    write_lse = tile.row_mapped(_writer(t.acc, TABLE), s_regs)
    sink = _sink(t.acc, TABLE)
    with_sink = tile.row_mapped(lambda m, row, given: maximum(m, sink(given, row) * log2e), s_regs)
    sink_weight = tile.row_mapped(lambda m, row, given: exp2(sink(given, row) * log2e - safe(m)), s_regs)

    def forward(call, reals):
        tid = thread()
        rest = udiv(block(), call.tiles)
        index = call.tiles - 1 - np.int64(urem(block(), call.tiles))  # the longest rows of a causal call first
        kv_head = urem(rest, call.kv_heads)
        of = np.int64(udiv(rest, call.kv_heads))
        if SPLIT:
            of, part = find_part(call, of)
        sequence = read_narrow(call, of)
        b, q_start, q_len, k_start, k_len, offset, _prefix = sequence
        head, first_row, count = find(call, q_len, index)
        if count <= 0:
            return
        locate(call, tid, TABLE, sequence, kv_head, head, first_row, count)
        first, last = mul(udiv(load_word(BOUNDS + LOW), COLS), COLS), load_word(BOUNDS + HIGH)
        inner_low, inner_high = load_word(BOUNDS + INNER_LOW), load_word(BOUNDS + INNER_HIGH)
        if SPLIT:
            first, last = narrow(max(first, part * SPLIT)), narrow(min(last, part * SPLIT + SPLIT))
            if first >= last:
                return
        given = (call, reals, b, k_start, offset - q_start, 0)

        k_base = call.k + b * call.k_b + kv_head * call.k_h + k_start * call.k_s
        v_base = call.v + b * call.v_b + kv_head * call.v_h + k_start * call.v_s
        where = (q_len, q_start + first_row, kv_head * call.group + head, count)
        load_q(tid, Q, call.q + b * call.q_b, call.q_h, call.q_s, call.q_d, TABLE, where, call.qk_dim)
        if first < last:
            load_k(tid, K, k_base + first * call.k_s, call.k_s, call.k_d, k_len - first, call.qk_dim)
        commit()
        clear_bad(tid)
        if tid == 0:
            store_word(BOUNDS + FLAG, -1)

        m, l, o = start_m(), start_l(), start_o()
        for j0 in range(first, last, COLS):
            wait_all()
            sync()  # K is there, and V of the block before was read
            load_v(tid, V, v_base + j0 * call.v_s, call.v_s, call.v_d, k_len - j0, call.v_dim)
            commit()
            row, col = corner(opaque(tid))
            s = scores(tid, Q, K)
            edge = EVERY or j0 < inner_low or j0 + COLS > inner_high
            if edge:
                s = partial(s, row, add(j0, col), given)
            else:
                s = whole(s, row, add(j0, col), given)
                if RAW and suspect(s):  # an infinite feature has no finite answer: NaN
                    s = spoilt(s, row, col, given)
            m_new = larger(m, tops(row_max(s), row, reals))
            alpha = alphas(m, m_new)
            bits = no_bits()
            if edge:
                bits = hidden_bits(s)
            p = weights(s, m_new, reals)
            m = m_new
            l = plus(running(l, alpha), row_sum(p))
            if DROPOUT:
                p = scaled_where(p, dropped(row, add(j0, col), given), number(reals.drop_scale))
            wait_all()
            sync()  # V is there, and K was read
            if j0 + COLS < last:
                load_k(tid, K, k_base + (j0 + COLS) * call.k_s, call.k_s, call.k_d, k_len - j0 - COLS, call.qk_dim)
            commit()
            if edge:
                if not finite_v(tid, V):
                    shared_max(BOUNDS + FLAG, j0)
                sync()
                if load_word(BOUNDS + FLAG) == j0:
                    repair(tid, row, col, bits, V)
            o = weigh(tid, o, alpha, p, V, P)

        row, col = corner(opaque(tid))
        if SPLIT:
            n, step = find_states(call, of, kv_head)
            states = (call, n + part, step, count)
            if col == 0:
                keep_stats(m, l, row, states)
        else:
            if call.sinks != 0:
                m_new = with_sink(m, row, given)
                alpha = alphas(m, m_new)
                m = m_new
                l = plus(running(l, alpha), sink_weight(m, row, given))
                o = scale_rows(o, alpha, 0)
            o = divided(o, l, inverse(l, l))
            if call.lse != 0 and col == 0:
                write_lse(log_sums(m, l), row, (call, b, count))
        wait_all()
        sync()  # Q and V were read: what leaves goes through their place
        row_o, col_o = output_corner(tid)
        if load_word(BOUNDS + FLAG) >= 0:
            o = spoil(o, row_o, col_o, 0)
        store_tile(o, add(LEAVE, add(mul(row_o, LEAVE_STRIDE), mul(col_o, LEAVE_SIZE))))
        sync()
        if SPLIT:
            keep_rows(tid, LEAVE, states)
        else:
            store_o(tid, Q, call.out + b * call.out_b, call.out_h, call.out_s, call.out_d, TABLE, count, call.v_dim)

    return forward


# A row's weights may be up to 2**LAZY: m stays where it is until a score is so much larger, so that o is rescaled once
# or twice and not for every tile. What each row does is its own affair.
LAZY = 8


def _raised(lazy: bool, number: Any, choose: Any, maximum: Any) -> Any:
    """(m, top) -> the new m. Not lazy: the kernels without tensor cores, which rescale while they multiply."""
    if not lazy:
        return lambda m, top: maximum(m, top)
    by = number(LAZY)
    return lambda m, top: choose(top <= m + by, m, top)


def _divided(acc: str) -> Any:
    """(o, l, 1 / l or 0) -> o / l. In float64 with the remainder, as a division has it: half a rounding of all that are
    made, where the yardstick is as exact as the kernel."""
    if acc == "f32":
        return lambda x, l, y: x * y
    choose, fma = scalar.choose, scalar.multiply_add

    def divided(x, l, y):
        quotient = x * y
        exact = fma(fma(-quotient, l, x), y, quotient)
        return choose(exact == exact, exact, quotient)  # an infinite quotient has no remainder

    return divided


def _writer(acc: str, table: int) -> Any:
    """Writes the lse of one row."""
    store, load_row, add, mul = scalar.store_global(acc), scalar.load_row, scalar.add, scalar.mul

    def write(value, row, given):
        call, b, count = given
        if row < count:
            i, h, _, _ = load_row(add(table, mul(row, 16)))
            store(call.lse + b * call.lse_b + h * call.lse_h + i * call.lse_s, value)
        return value

    return write


def _sink(acc: str, table: int) -> Any:
    """The sink of a row's head."""
    load, load_row, add, mul, size = scalar.load_global(acc, acc), scalar.load_row, scalar.add, scalar.mul, SIZE[acc]

    @inline
    def sink(given, row):
        _, h, _, _ = load_row(add(table, mul(row, 16)))
        return load(given[0].sinks + h * size)

    return sink
