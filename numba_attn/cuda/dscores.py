"""P and dS of a tile, computed anew: the step that the backward kernels and the sums over pairs share.

The formulas are at the top of backward.py.
"""

from __future__ import annotations

from typing import Any

from . import scalar, tile
from .code import SIZE
from .compile import inline
from .queries import where_of
from .record import Features
from .rows import Copies, rows_of
from .scalar import add, choose, load_row, mul, sync
from .step import build_dropout, build_exponent, build_modify, exact_functions
from .tiling import Tiling, products


def build_weights(t: Tiling, f: Features, stats: int, swapped: bool) -> tuple[Any, Any]:
    """weight(s, row, col, given) = p, and inner(p, dp, row, col, given) = p (dp - delta)."""
    number, weight_from = exact_functions(t.acc).number, build_exponent(f, t.acc).weight
    load, size, one = scalar.load_shared(t.acc, t.acc), SIZE[t.acc], number(1)

    @inline
    def weight_of(s, q, given):
        p = weight_from(s, load(add(given.stage, add(stats, mul(q, 2 * size)))), given.reals)
        return choose(p > one, one, p)  # lse is rounded

    @inline
    def inner_of(p, dp, q, given):
        return p * (dp - load(add(given.stage, add(stats + size, mul(q, 2 * size)))))

    if swapped:

        def weight(s, row, col, given):
            return weight_of(s, col, given)

        def inner(p, dp, row, col, given):
            return inner_of(p, dp, col, given)

    else:

        def weight(s, row, col, given):
            return weight_of(s, row, given)

        def inner(p, dp, row, col, given):
            return inner_of(p, dp, row, given)

    return weight, inner


def build_load_stats(t: Tiling, rows: int, table: int, stats: int) -> Any:
    """(call, tid, b, count, stage): L and delta of the table's rows to shared memory, asynchronously; idle rows, whose
    q and dout are 0, get zeros."""
    copy, size = scalar.copy_async(SIZE[t.acc]), SIZE[t.acc]

    @inline
    def load_stats(call, tid, b, count, stage):
        if tid < rows:
            i, h, _, _ = load_row(add(stage, add(table, mul(tid, 16))))
            at = b * call.stats_b + h * call.stats_h + i * size
            to = add(stage, add(stats, mul(tid, 2 * size)))
            copy(to, call.log_sums + at, tid < count)
            copy(add(to, size), call.deltas + at, tid < count)

    return load_stats


def build_load_queries(t: Tiling, f: Features, rows: int, places: dict[str, int], locate: Any = None) -> Any:
    """(call, tid, sequence, queries, stage): q, dout, L and delta of a tile of queries on their way to shared memory,
    `stage` bytes behind their places. locate: fills the table there first, which else is filled."""
    TABLE, Q, DOUT, FILL = places["table"], places["q"], places["dout"], locate is not None
    copies = Copies(t, f.aligned)
    load_q, load_dout = copies.load_queries(t.qk_dim, rows), copies.load_queries(t.v_dim, rows)
    q_of, dout_of = rows_of(f, "q", "qk_dim"), rows_of(f, "dout", "v_dim")
    load_stats = build_load_stats(t, rows, TABLE, places["stats"])

    @inline
    def load(call, tid, sequence, queries, stage):
        b, table, where = sequence.batch, add(TABLE, stage), where_of(call, sequence, queries)
        if FILL:
            locate(call, tid, table, sequence, queries)
            if sequence.q_len < rows:
                sync()  # others read the table
        load_q(tid, add(Q, stage), q_of(call, b, 0, 0), table, where)
        load_dout(tid, add(DOUT, stage), dout_of(call, b, 0, 0), table, where)
        load_stats(call, tid, b, queries.count, stage)

    return load


def build_step(t: Tiling, f: Features, table: int, stats: int, swapped: bool) -> Any:
    """(tid, edge, row, col, given, (a, b, c, d)) -> (P for dV, dS before softcap, dS, hidden pairs), scores being A B'
    and dP = C D'. edge: some pair of the tile may be hidden."""
    regs, parts = t.scores, products(t)
    modify = build_modify(f, t.acc, table, swapped)
    RESULTS, DROPOUT = modify.results, f.dropout
    MOD, CAP = f.score_mod is not None, f.softcap
    whole = tile.mapped(modify.whole, regs, results=RESULTS)
    partial = tile.mapped(modify.partial, regs, results=RESULTS)
    weight, inner = build_weights(t, f, stats, swapped)
    weights, inners = tile.mapped(weight, regs), tile.mapped(inner, regs, n_tiles=2)
    drop_bits = build_dropout(regs, parts.element, table, swapped)
    scaled_where, number = tile.scaled_where(regs), exact_functions(t.acc).number
    times, cleared = tile.both(lambda x, y: x * y, regs), tile.cleared(regs)
    hidden_bits, no_bits = tile.hidden_bits(regs), tile.no_bits(regs.size)
    scores, dots = parts.abt(t.qk_dim), parts.abt(t.v_dim)

    @inline
    def step(tid, edge, row, col, given, operands):
        a, b, c, d = operands
        product = scores(tid, a, b)
        bits = no_bits()
        if edge:
            modified = partial(product, row, col, given)
        else:
            modified = whole(product, row, col, given)
        s = modified[0] if RESULTS > 1 else modified
        if edge:
            bits = hidden_bits(s)
        p = weights(s, row, col, given)
        if edge:
            p = cleared(p, bits)
        dp = dots(tid, c, d)
        dropped = p
        if DROPOUT:
            gone, factor = drop_bits(row, col, given), number(given.reals.drop_scale)
            dp, dropped = scaled_where(dp, gone, factor), scaled_where(p, gone, factor)
        ds = inners(p, dp, row, col, given)
        if MOD:
            ds = times(ds, modified[1])
        if edge:
            ds = cleared(ds, bits)
        capped = ds
        if CAP:
            capped = times(ds, modified[RESULTS - 1])
            if edge:
                capped = cleared(capped, bits)
        return dropped, ds, capped, bits

    return step
