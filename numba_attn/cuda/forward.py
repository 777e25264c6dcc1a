"""The forward kernel: one tile of queries, all its keys, online softmax.

K of one block is in flight while the previous block's P V is computed, and V while its own scores are: each has one
buffer, and two barriers a block order them. With few queries a block takes a part of the keys: see decode.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..online import LN2
from ..online import build as build_online
from . import decode, scalar, tile
from .code import SIZE, VECTOR
from .compile import inline
from .queries import FLAG, block_of, build_find, build_locate, build_seen, read_narrow, table_bytes, where_of
from .record import Features
from .rows import Copies, bitmap_words, repairer, rows_of
from .scalar import (
    add,
    choose,
    commit,
    load_row,
    load_word,
    mul,
    multiply_add,
    narrow,
    opaque,
    shared_max,
    store_word,
    sync,
    thread,
    wait_all,
)
from .step import Given, build_dropout, build_exponent, build_modify, exact_functions
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
    AT_FLAG, ROWS, COLS = TABLE + t.rows * 16 + FLAG, t.rows, t.cols
    EVERY, DROPOUT, SPLIT, find_part = f.every_pair, f.dropout, split, decode.find_part
    parts, copies, guard = products(t), Copies(t, f.aligned), repairer(t, t.v_dim, places["bad"])
    corner, weigh = parts.corner, parts.pb(t.v_dim)
    clear_bad, repair = guard.clear, guard.repair
    q_of, k_of, v_of = rows_of(f, "q", "qk_dim"), rows_of(f, "k", "qk_dim"), rows_of(f, "v", "v_dim")
    load_q, load_k = copies.load_queries(t.qk_dim, ROWS), copies.load(t.qk_dim, COLS)
    load_v, finite_v = copies.load(t.v_dim, COLS), copies.finite(t.v_dim, COLS)
    locate, find, seen = build_locate(ROWS), build_find(ROWS), build_seen(ROWS, COLS)
    scores, hidden_bits, no_bits = _scores(t, f, TABLE), tile.hidden_bits(t.scores), tile.no_bits(t.scores.size)
    softmax = _softmax(t, f, TABLE)
    start, follow, weights, plus = softmax.start, softmax.follow, softmax.weights, softmax.plus
    dropped, scaled_where = build_dropout(t.scores, parts.element, TABLE, False), tile.scaled_where(t.scores)
    number = exact_functions(t.acc).number
    leave = _leave_states(t, f, places) if split else _leave_result(t, f, places, softmax)

    def forward(call, reals):
        tid = thread()
        of, kv_head, index = block_of(call)
        part = 0
        if SPLIT:
            of, part = find_part(call, of)
        sequence = read_narrow(call, of)
        b, k_start, k_len = sequence.batch, sequence.k_start, sequence.k_len
        queries = find(call, sequence.q_len, kv_head, index)
        if queries.count <= 0:
            return
        locate(call, tid, TABLE, sequence, queries)
        first, last, inner_low, inner_high = seen(TABLE)
        if SPLIT:
            first, last = narrow(max(first, part * SPLIT)), narrow(min(last, part * SPLIT + SPLIT))
            if first >= last:
                return
        given = Given(call, reals, b, k_start, sequence.offset - sequence.q_start, 0)
        k, v = k_of(call, b, kv_head, k_start), v_of(call, b, kv_head, k_start)
        load_q(tid, Q, q_of(call, b, 0, 0), TABLE, where_of(call, sequence, queries))
        if first < last:
            load_k(tid, K, k.base + first * k.stride_s, k, k_len - first)
        commit()
        clear_bad(tid)
        if tid == 0:
            store_word(AT_FLAG, -1)

        m, l, o = start()
        for j0 in range(first, last, COLS):
            wait_all()
            sync()  # K is there, and V of the block before was read
            load_v(tid, V, v.base + j0 * v.stride_s, v, k_len - j0)
            commit()
            row, col = corner(opaque(tid))
            edge = EVERY or j0 < inner_low or j0 + COLS > inner_high
            s = scores(tid, edge, row, add(j0, col), given, Q, K)
            m, alpha = follow(s, m, row, reals)
            bits = no_bits()
            if edge:
                bits = hidden_bits(s)
            p = weights(s, m, reals)
            l = plus(l, alpha, p)
            if DROPOUT:
                p = scaled_where(p, dropped(row, add(j0, col), given), number(reals.drop_scale))
            wait_all()
            sync()  # V is there, and K was read
            if j0 + COLS < last:
                load_k(tid, K, k.base + (j0 + COLS) * k.stride_s, k, k_len - j0 - COLS)
            commit()
            if edge:
                if not finite_v(tid, V):
                    shared_max(AT_FLAG, j0)
                sync()
                if load_word(AT_FLAG) == j0:
                    repair(tid, row, col, bits, V)
            o = weigh(tid, o, alpha, p, V, P)
        leave(tid, m, l, o, given, (queries, of, part))

    return forward


def _scores(t: Tiling, f: Features, table: int) -> Any:
    """(tid, edge, row, col, given, q, k) -> the scores as step.py has them, Q and K being at q and k. edge: some pair
    of the tile may be hidden."""
    regs, product, RAW = t.scores, products(t).abt(t.qk_dim), f.raw
    modify = build_modify(f, t.acc, table)
    whole, partial = tile.mapped(modify.whole, regs), tile.mapped(modify.partial, regs)
    suspect, spoilt = tile.suspect(regs), tile.mapped(lambda x, row, col, given: x + (x - x), regs)

    @inline
    def scores(tid, edge, row, col, given, q, k):
        s = product(tid, q, k)
        if edge:
            s = partial(s, row, col, given)
        else:
            s = whole(s, row, col, given)
            if RAW and suspect(s):  # an infinite number in q or k has no finite answer: NaN
                s = spoilt(s, row, col, given)
        return s

    return scores


# --- online softmax ---------------------------------------------------------------------------------------------------

# A row's weights may be up to 2**LAZY. m stays as it is until a score is larger by so much, so that o is rescaled once
# or twice and not for every tile. Each row does this on its own.
LAZY = 8


class _Softmax(NamedTuple):
    """Online softmax of a thread's rows, see online.py: functions for the kernel. m and l are tuples of one number a
    row, alpha is 2**(m before - m)."""

    start: Any  # () -> (m, l, o)
    follow: Any  # (s, m, row, reals) -> (m, alpha)
    weights: Any  # (s, m, reals) -> p
    plus: Any  # (l, alpha, p) -> l
    with_sinks: Any  # (m, l, o, row, call) -> (m, l, o)
    over: Any  # (o, l) -> o / l, 0 where l is
    log_sums: Any  # (m, l) -> lse


def _softmax(t: Tiling, f: Features, table: int) -> _Softmax:
    regs, o_regs, functions = t.scores, t.output(t.v_dim), exact_functions(t.acc)
    number, exp2, log2 = functions.number, functions.exp2, functions.log2
    zero, ln2, minus_inf = number(0), number(LN2), number(-np.inf)
    online = build_online(inline, exp2, choose, inline(lambda m: m == minus_inf), inline(lambda m: zero))
    safe, rescale, exponent = online.finite_or_zero, online.rescale, build_exponent(f, t.acc)
    weight, largest = exponent.weight, exponent.largest

    row_max, row_sum = tile.row_max(regs), tile.row_sum(regs)
    tops = tile.row_mapped(lambda x, row, reals: largest(x, reals), regs)
    larger = tile.each_row(_raised(t.mma, number), regs)
    alphas = tile.each_row(lambda old, new: rescale(old, new), regs)
    running = tile.each_row(lambda x, y: x * y, regs)
    added = tile.each_row(lambda x, y: x + y, regs)
    inverse = tile.each_row(lambda l, _: choose(l == zero, zero, number(1) / l), regs)
    divided = tile.with_rows(_divided(t.acc), o_regs)
    start_o, start_l = tile.filled(t.acc, o_regs.size, 0.0), tile.filled(t.acc, len(regs.rows), 0.0)
    start_m = tile.filled(t.acc, len(regs.rows), float("-inf"))

    @inline
    def start():
        return start_m(), start_l(), start_o()

    @inline
    def follow(s, m, row, reals):
        new = larger(m, tops(row_max(s), row, reals))
        return new, alphas(m, new)

    @inline
    def plus(l, alpha, p):
        return added(running(l, alpha), row_sum(p))

    @inline
    def over(o, l):
        return divided(o, l, inverse(l, l))

    return _Softmax(
        start=start,
        follow=follow,
        weights=tile.with_row(lambda x, m, reals: weight(x, safe(m), reals), regs),
        plus=plus,
        with_sinks=_with_sinks(t, table, safe, (alphas, running, added)),
        over=over,
        log_sums=tile.each_row(lambda m, l: choose(l == zero, minus_inf, (safe(m) + log2(l)) * ln2), regs),
    )


def _raised(lazy: bool, number: Any) -> Any:
    """(m, top) -> the new m. Not lazy: the kernels without tensor cores, which rescale while they multiply."""
    if not lazy:
        return lambda m, top: max(m, top)
    by = number(LAZY)
    return lambda m, top: choose(top <= m + by, m, top)


def _divided(acc: str) -> Any:
    """(o, l, 1 / l or 0) -> o / l. In float64 one step with the remainder makes it as exact as a division."""
    if acc == "f32":
        return lambda x, l, y: x * y

    def divided(x, l, y):
        quotient = x * y
        exact = multiply_add(multiply_add(-quotient, l, x), y, quotient)
        return choose(exact == exact, exact, quotient)  # an infinite quotient has no remainder

    return divided


def _with_sinks(t: Tiling, table: int, safe: Any, by_row: tuple[Any, Any, Any]) -> Any:
    """(m, l, o, row, call) -> the same with each row's sink, a score without a value."""
    regs, functions = t.scores, exact_functions(t.acc)
    number, exp2, (alphas, times, plus) = functions.number, functions.exp2, by_row
    load, log2e, size = scalar.load_global(t.acc, t.acc), number(1 / LN2), SIZE[t.acc]

    @inline
    def sink(call, row):
        _, h, _, _ = load_row(add(table, mul(row, 16)))
        return load(call.sinks + h * size) * log2e

    top = tile.row_mapped(lambda m, row, call: max(m, sink(call, row)), regs)
    weight = tile.row_mapped(lambda m, row, call: exp2(sink(call, row) - safe(m)), regs)
    scale_rows = tile.with_row(lambda x, y, _: x * y, t.output(t.v_dim))

    @inline
    def with_sinks(m, l, o, row, call):
        new = top(m, row, call)
        alpha = alphas(m, new)
        return new, plus(times(l, alpha), weight(new, row, call)), scale_rows(o, alpha, 0)

    return with_sinks


# --- the way out ------------------------------------------------------------------------------------------------------


def _leave_result(t: Tiling, f: Features, places: dict[str, int], softmax: _Softmax) -> Any:
    """(tid, m, l, o, given, (queries, sequence, part)): the result of a tile, through the queries' place."""
    Q, TABLE = places["q"], places["table"]
    corner, put = products(t).corner, _put(t, places, Q, t.storage)
    out_of, store_o = rows_of(f, "out", "v_dim"), Copies(t, f.aligned).store_queries(t.v_dim, t.rows)
    with_sinks, over, log_sums = softmax.with_sinks, softmax.over, softmax.log_sums
    write_lse = tile.row_mapped(_writer(t.acc, TABLE), t.scores)

    @inline
    def leave(tid, m, l, o, given, whose):
        call, b, count = given.call, given.batch, whose[0].count
        row, col = corner(opaque(tid))
        if call.sinks != 0:
            m, l, o = with_sinks(m, l, o, row, call)
        o = over(o, l)
        if call.lse != 0 and col == 0:
            write_lse(log_sums(m, l), row, (call, b, count))
        put(tid, o)
        out = out_of(call, b, 0, 0)
        store_o(tid, Q, out.base, out, TABLE, count)

    return leave


def _leave_states(t: Tiling, f: Features, places: dict[str, int]) -> Any:
    """The same of a part of the keys: the rows' states."""
    # Through the queries' place, or the values' if they are wider than the queries.
    AT = places["v"] if t.mma else places["q"]
    corner, put = products(t).corner, _put(t, places, AT, t.acc if t.mma else t.storage)
    find_states, (keep_stats, keep_rows) = decode.find_states, decode.build_keep(t)

    @inline
    def leave(tid, m, l, o, given, whose):
        queries, of, part = whose
        row, col = corner(opaque(tid))
        n, step = find_states(given.call, of, queries.kv_head)
        states = (given.call, n + part, step, queries.count)
        if col == 0:
            keep_stats(m, l, row, states)
        put(tid, o)
        keep_rows(tid, AT, states)

    return leave


def _put(t: Tiling, places: dict[str, int], at: int, kind: str) -> Any:
    """(tid, o): numbers of this kind to shared memory at `at`, NaN where a hidden pair's value was not finite and some
    other row's sees it; begins and ends with a barrier."""
    AT_FLAG, size, stride = places["table"] + t.rows * 16 + FLAG, SIZE[kind], t.v_dim * SIZE[kind] + VECTOR
    output_corner, spoil = products(t).output_corner, repairer(t, t.v_dim, places["bad"]).spoil
    store_tile = scalar.store_tile(t.output(t.v_dim), kind, stride, 2 if t.mma else VECTOR // size)

    @inline
    def put(tid, o):
        wait_all()
        sync()  # Q and V were read
        row, col = output_corner(tid)
        if load_word(AT_FLAG) >= 0:
            o = spoil(o, row, col, 0)
        store_tile(o, add(at, add(mul(row, stride), mul(col, size))))
        sync()

    return put


def _writer(acc: str, table: int) -> Any:
    """Writes the lse of one row."""
    store = scalar.store_global(acc)

    def write(value, row, given):
        call, b, count = given
        if row < count:
            i, h, _, _ = load_row(add(table, mul(row, 16)))
            store(call.lse + b * call.lse_b + h * call.lse_h + i * call.lse_s, value)
        return value

    return write
