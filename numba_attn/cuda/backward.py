"""The backward kernels: dQ of a tile of queries; dK and dV of a tile of keys.

Each gradient is summed by one block, in the order of the tiles, so that the same call gives the same bits: nothing is
added by atomics. The price is that scores are recomputed in both kernels, seven products in all where a kernel with
atomics has five. With S' = K Q' and dP' = V dO' the second kernel has the same two products as the first and as the
forward kernel: its rows are keys and its columns queries.

    p = 2**(s - L)      dV = P' dO      dP = dO V'      dS = P (dP - delta)      dQ = dS K      dK = dS' Q

L is the row's lse in log2 units and delta = rowsum(dO O) - dlse, both from `build_rows`. The formulas are derived at
`reference.attention_backward`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..online import LOG2E
from . import scalar, tile
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
    build_counted,
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

# Fields besides scores.CALL. log_sums and deltas are L and delta, (B, Hq, Sq) each, with the strides stats_*.
EXTRA = (
    "dout", "dout_b", "dout_h", "dout_s", "dout_d", "dq", "dq_b", "dq_h", "dq_s", "dq_d",
    "dk", "dk_b", "dk_h", "dk_s", "dk_d", "dv", "dv_b", "dv_h", "dv_s", "dv_d",
    "log_sums", "deltas", "stats_b", "stats_h", "key_tiles", "dlse", "dlse_b", "dlse_h", "dlse_s", "out_rows",
)  # fmt: skip
DBIAS = ("dbias", "dbias_b", "dbias_h", "dbias_i", "dbias_j")
DSLOPES = ("dslopes",)  # a number for each row, (B, Hq, Sq) with the strides stats_*


def memory_queries(t: Tiling) -> dict[str, int]:
    """Shared memory of the kernel of dQ."""
    return placed(
        {
            "table": table_bytes(t.rows),
            "stats": t.rows * 2 * SIZE[t.acc],
            "q": t.rows * t.stride(t.qk_dim),
            "dout": t.rows * t.stride(t.v_dim),
            "k": t.cols * t.stride(t.qk_dim),
            "v": t.cols * t.stride(t.v_dim),
            "p": t.p_bytes,
        }
    )


def memory_keys(t: Tiling) -> dict[str, int]:
    """Shared memory of the kernel of dK and dV: what is of a tile of queries is there once for each stage."""
    stage = placed(
        {
            "table": table_bytes(t.cols),
            "stats": t.cols * 2 * SIZE[t.acc],
            "q": t.cols * t.stride(t.qk_dim),
            "dout": t.cols * t.stride(t.v_dim),
        }
    )
    bytes_of_stage = stage.pop("size")
    rest = placed(
        {
            "stages": t.stages * bytes_of_stage,
            "k": t.rows * t.stride(t.qk_dim),
            "v": t.rows * t.stride(t.v_dim),
            "p": t.p_bytes,
            "bad": (t.rows + t.cols) * bitmap_words(t.v_dim) * 4,
        }
    )
    return {**rest, **stage, "stage": bytes_of_stage}


ROWS_THREADS = 128


def build_rows(storage: str, acc: str, f: Features) -> Any:
    """rows(call, reals): L and delta of every row, one warp a row. Fields: CALL and EXTRA."""
    load, load_acc, store = scalar.load_global(storage, acc), scalar.load_global(acc, acc), scalar.store_global(acc)
    number, size = (np.float64, 8) if acc == "f64" else (np.float32, 4)
    zero, log2e, infinite, minus_inf = number(0), number(LOG2E), number(np.inf), number(-np.inf)
    warp_sum, urem, udiv = scalar.warp_sum(acc), scalar.urem, scalar.udiv
    thread, block = scalar.thread, scalar.block
    warps = ROWS_THREADS // 32

    def rows(call, reals):
        n = np.int64(block()) * warps + np.int64(udiv(thread(), 32))
        if n >= call.out_rows:
            return
        heads = call.kv_heads * call.group
        i = np.int64(urem(n, call.tiles))  # tiles: queries, here
        bh = np.int64(udiv(n, call.tiles))
        b, h = np.int64(udiv(bh, heads)), np.int64(urem(bh, heads))
        lse = load_acc(call.lse + b * call.lse_b + h * call.lse_h + i * call.lse_s)
        at_out = call.out + b * call.out_b + h * call.out_h + i * call.out_s
        at_dout = call.dout + b * call.dout_b + h * call.dout_h + i * call.dout_s
        lane = np.int64(urem(thread(), 32))
        total = zero
        for d in range(lane, call.v_dim, 32):
            total += load(at_out + d * call.out_d) * load(at_dout + d * call.dout_d)
        total = warp_sum(total)
        if lane == 0:
            if call.dlse != 0:
                total -= load_acc(call.dlse + b * call.dlse_b + h * call.dlse_h + i * call.dlse_s)
            to = b * call.stats_b + h * call.stats_h + i * size
            store(call.log_sums + to, infinite if lse == minus_inf else lse * log2e)  # an empty row has weights 0
            store(call.deltas + to, total)

    return rows


def build_fill(storage: str, acc: str, f: Features) -> Any:
    """fill(call, reals): 0 in every row of out, -inf in lse where there is one; one warp a row."""
    store, store_lse, fields = scalar.store_global(storage), scalar.store_global(acc), f.fields
    number = np.float64 if acc == "f64" else np.float32
    zero, minus_inf = number(0), number(-np.inf)
    thread, block, urem, udiv, warps = scalar.thread, scalar.block, scalar.urem, scalar.udiv, ROWS_THREADS // 32
    assert "out_rows" in fields

    def fill(call, reals):
        n = np.int64(block()) * warps + np.int64(udiv(thread(), 32))
        if n >= call.out_rows:
            return
        heads = call.kv_heads * call.group
        i, bh = np.int64(urem(n, call.tiles)), np.int64(udiv(n, call.tiles))
        b, h = np.int64(udiv(bh, heads)), np.int64(urem(bh, heads))
        lane = np.int64(urem(thread(), 32))
        for d in range(lane, call.v_dim, 32):
            store(call.out + b * call.out_b + h * call.out_h + i * call.out_s + d * call.out_d, zero)
        if lane == 0 and call.lse != 0:
            store_lse(call.lse + b * call.lse_b + h * call.lse_h + i * call.lse_s, minus_inf)

    return fill


def _weights(t: Tiling, f: Features, stats: int, swapped: bool) -> tuple[Any, Any]:
    """weight(s, row, col, given) = p, and inner(p, dp, row, col, given) = p (dp - delta)."""
    number, weight_from, choose = exact_functions(t.acc).number, build_exponent(f, t.acc).weight, scalar.choose
    load, size, one = scalar.load_shared(t.acc, t.acc), SIZE[t.acc], number(1)
    add, mul = scalar.add, scalar.mul

    @inline
    def weight_of(s, q, given):
        p = weight_from(s, load(add(given[5], add(stats, mul(q, 2 * size)))), given[1])
        return choose(p > one, one, p)  # lse is rounded

    @inline
    def inner_of(p, dp, q, given):
        return p * (dp - load(add(given[5], add(stats + size, mul(q, 2 * size)))))

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


def _stats_loader(t: Tiling, rows: int, table: int, stats: int) -> Any:
    """(call, tid, b, count, stage): L and delta of the table's rows to shared memory, asynchronously; idle rows, whose
    q and dout are 0, get zeros."""
    copy, size, load_row, add, mul = (
        scalar.copy_async(SIZE[t.acc]),
        SIZE[t.acc],
        scalar.load_row,
        scalar.add,
        scalar.mul,
    )

    @inline
    def load_stats(call, tid, b, count, stage):
        if tid < rows:
            i, h, _, _ = load_row(add(stage, add(table, mul(tid, 16))))
            at = b * call.stats_b + h * call.stats_h + i * size
            to = add(stage, add(stats, mul(tid, 2 * size)))
            copy(to, call.log_sums + at, tid < count)
            copy(add(to, size), call.deltas + at, tid < count)

    return load_stats


def _step(t: Tiling, f: Features, table: int, stats: int, swapped: bool) -> Any:
    """(tid, edge, row, col, given, a, b, c, d) -> (P for dV, dS before softcap, dS, hidden pairs), scores being A B'
    and dP = C D'. edge: some pair of the tile may be hidden."""
    regs, parts = t.scores, products(t)
    modify = build_modify(f, t.acc, table, swapped)
    RESULTS, DROPOUT = modify.results, f.dropout
    MOD, CAP = f.score_mod is not None, f.softcap
    whole = tile.mapped(modify.whole, regs, results=RESULTS)
    partial = tile.mapped(modify.partial, regs, results=RESULTS)
    weight, inner = _weights(t, f, stats, swapped)
    weights, inners = tile.mapped(weight, regs), tile.mapped(inner, regs, n_tiles=2)
    drop_bits = build_dropout(regs, parts.element, table, swapped)
    scaled_where, number = tile.scaled_where(regs), exact_functions(t.acc).number
    times, cleared = tile.both(lambda x, y: x * y, regs), tile.cleared(regs)
    hidden_bits, no_bits = tile.hidden_bits(regs), tile.no_bits(regs.size)
    scores, dots = parts.abt(t.qk_dim), parts.abt(t.v_dim)

    @inline
    def step(tid, edge, row, col, given, a, b, c, d):
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
            gone, factor = drop_bits(row, col, given), number(given[1].drop_scale)
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


def build_queries(t: Tiling, f: Features) -> Any:
    """queries(call, reals): dQ; with DBIAS or DSLOPES among f.extra also the gradient of every pair's bias, or each
    row's part of the gradient of its slope."""
    places = memory_queries(t)
    TABLE, STATS, Q, DOUT, K, V, P = (places[n] for n in ("table", "stats", "q", "dout", "k", "v", "p"))
    BOUNDS, ROWS, COLS, size = TABLE + t.rows * 16, t.rows, t.cols, t.size
    regs, o_regs = t.scores, t.output(t.qk_dim)
    number = exact_functions(t.acc).number
    step, EVERY = _step(t, f, TABLE, STATS, False), f.every_pair
    parts = products(t)
    corner, output_corner, weigh = parts.corner, parts.output_corner, parts.pb(t.qk_dim, rescaled=False)
    clean = repairer(t, t.qk_dim, 0).clean
    copies = loaders(t, f.aligned)
    load_q, load_dout = copies.load_queries(t.qk_dim, ROWS), copies.load_queries(t.v_dim, ROWS)
    load_k, load_v = copies.load(t.qk_dim, COLS), copies.load(t.v_dim, COLS)
    store_dq, finite_k = copies.store_queries(t.qk_dim, ROWS), copies.finite(t.qk_dim, COLS)
    load_stats = _stats_loader(t, ROWS, TABLE, STATS)
    start, ones = tile.filled(t.acc, o_regs.size, 0.0), tile.filled(t.acc, len(regs.rows), 1.0)
    scale_all = tile.mapped(lambda x, row, col, reals: x * number(reals.grad_scale), o_regs)
    store_tile = scalar.store_tile(o_regs, t.storage, t.stride(t.qk_dim), 2 if t.mma else VECTOR // size)
    locate, find, commit, wait_all, sync = (
        build_locate(ROWS),
        build_find(ROWS),
        scalar.commit,
        scalar.wait_all,
        scalar.sync,
    )
    thread, block, udiv, urem, add, mul = scalar.thread, scalar.block, scalar.udiv, scalar.urem, scalar.add, scalar.mul
    load_word, store_word, shared_max = scalar.load_word, scalar.store_word, scalar.shared_max
    Q_STRIDE, opaque = t.stride(t.qk_dim), scalar.opaque
    WITH_BIAS, WITH_SLOPES = "dbias" in f.extra, "dslopes" in f.extra
    store_bias: Any = tile.mapped(_bias_writer(t.acc, TABLE), regs) if WITH_BIAS else None
    by_distance = tile.mapped(_by_distance(t.acc, TABLE), regs)
    no_slopes, row_sum = tile.filled(t.acc, len(regs.rows), 0.0), tile.row_sum(regs)
    plus = tile.each_row(lambda x, y: x + y, regs)
    store_slopes: Any = tile.row_mapped(_slope_writer(t.acc, TABLE), regs) if WITH_SLOPES else None

    def queries(call, reals):
        tid = thread()
        rest = udiv(block(), call.tiles)
        index = call.tiles - 1 - np.int64(urem(block(), call.tiles))
        kv_head = urem(rest, call.kv_heads)
        sequence = read_narrow(call, np.int64(udiv(rest, call.kv_heads)))
        b, q_start, q_len, k_start, k_len, offset, _prefix = sequence
        head, first_row, count = find(call, q_len, index)
        if count <= 0:
            return
        locate(call, tid, TABLE, sequence, kv_head, head, first_row, count)
        first, last = mul(udiv(load_word(BOUNDS + LOW), COLS), COLS), load_word(BOUNDS + HIGH)
        inner_low, inner_high = load_word(BOUNDS + INNER_LOW), load_word(BOUNDS + INNER_HIGH)
        given = (call, reals, b, k_start, offset - q_start, 0)
        k_base = call.k + b * call.k_b + kv_head * call.k_h + k_start * call.k_s
        v_base = call.v + b * call.v_b + kv_head * call.v_h + k_start * call.v_s
        where = (q_len, q_start + first_row, kv_head * call.group + head, count)
        load_q(tid, Q, call.q + b * call.q_b, call.q_h, call.q_s, call.q_d, TABLE, where, call.qk_dim)
        dout = call.dout + b * call.dout_b
        load_dout(tid, DOUT, dout, call.dout_h, call.dout_s, call.dout_d, TABLE, where, call.v_dim)
        load_stats(call, tid, b, count, 0)
        if tid == 0:
            store_word(BOUNDS + FLAG, -1)
        if first < last:
            load_v(tid, V, v_base + first * call.v_s, call.v_s, call.v_d, k_len - first, call.v_dim)
        commit()

        dq, slopes = start(), no_slopes()
        for j0 in range(first, last, COLS):
            sync()  # K of the block before was read
            load_k(tid, K, k_base + j0 * call.k_s, call.k_s, call.k_d, k_len - j0, call.qk_dim)
            commit()
            wait_all()
            sync()
            edge = EVERY or j0 < inner_low or j0 + COLS > inner_high
            row, col = corner(opaque(tid))
            _, ds, capped, _ = step(tid, edge, row, add(j0, col), given, Q, K, DOUT, V)
            if WITH_BIAS:
                store_bias(ds, row, add(j0, col), given)
            if WITH_SLOPES:
                slopes = plus(slopes, row_sum(by_distance(ds, row, add(j0, col), given)))
            sync()  # V was read
            if j0 + COLS < last:
                load_v(tid, V, v_base + (j0 + COLS) * call.v_s, call.v_s, call.v_d, k_len - j0 - COLS, call.v_dim)
            commit()
            if edge:
                if not finite_k(tid, K):
                    shared_max(BOUNDS + FLAG, j0)
                sync()
                if load_word(BOUNDS + FLAG) == j0:
                    clean(tid, K)
            dq = weigh(tid, dq, ones(), capped, K, P)

        row, col = corner(opaque(tid))
        if WITH_SLOPES and col == 0:
            store_slopes(slopes, row, (call, b, count))
        dq = scale_all(dq, 0, 0, reals)
        wait_all()
        sync()
        row_o, col_o = output_corner(tid)
        store_tile(dq, add(Q, add(mul(row_o, Q_STRIDE), mul(col_o, size))))
        sync()
        store_dq(tid, Q, call.dq + b * call.dq_b, call.dq_h, call.dq_s, call.dq_d, TABLE, count, call.qk_dim)

    return queries


def _bias_writer(acc: str, table: int) -> Any:
    """Writes the gradient of a visible pair's bias; the others are 0 from the start."""
    store, load_row, add, mul, inside = scalar.store_global(acc), scalar.load_row, scalar.add, scalar.mul, scalar.inside

    def write(x, row, col, given):
        call, _, b, k_start, _, _ = given
        i, h, first, end = load_row(add(table, mul(row, 16)))
        if inside(col, first, end):
            to = b * call.dbias_b + h * call.dbias_h + i * call.dbias_i + (k_start + col) * call.dbias_j
            store(call.dbias + to, x)
        return x

    return write


def _by_distance(acc: str, table: int) -> Any:
    """A pair's part of the gradient of its slope."""
    number = np.float64 if acc == "f64" else np.float32
    load_row, add, mul, zero = scalar.load_row, scalar.add, scalar.mul, number(0)

    def part(x, row, col, given):
        i, _, _, _ = load_row(add(table, mul(row, 16)))
        return zero - x * abs(number(i + given[4] - col))

    return part


def _slope_writer(acc: str, table: int) -> Any:
    store, load_row, add, mul, size = scalar.store_global(acc), scalar.load_row, scalar.add, scalar.mul, SIZE[acc]

    def write(value, row, given):
        call, b, count = given
        if row < count:
            i, h, _, _ = load_row(add(table, mul(row, 16)))
            store(call.dslopes + b * call.stats_b + h * call.stats_h + i * size, value)
        return value

    return write


def build_keys(t: Tiling, f: Features, with_dk: bool = True, with_dv: bool = True) -> Any:
    """keys(call, reals): dK and dV, or one of them where both would not fit in registers."""
    places = memory_keys(t)
    TABLE, STATS, K, V, Q, DOUT, P = (places[n] for n in ("table", "stats", "k", "v", "q", "dout", "p"))
    ROWS, COLS, size = t.rows, t.cols, t.size  # keys and queries
    BOUNDS = TABLE + COLS * 16
    regs, k_regs, v_regs = t.scores, t.output(t.qk_dim), t.output(t.v_dim)
    number = exact_functions(t.acc).number
    step, EVERY = _step(t, f, TABLE, STATS, True), f.every_pair
    parts = products(t)
    corner, output_corner = parts.corner, parts.output_corner
    weigh_k, weigh_v = parts.pb(t.qk_dim, rescaled=False), parts.pb(t.v_dim, rescaled=False)
    clean = repairer(t, t.qk_dim, 0).clean
    guard = repairer(t, t.v_dim, places["bad"])
    clear_bad, repair, spoil = guard.clear, guard.repair, guard.spoil
    copies = loaders(t, f.aligned)
    load_q, load_dout = copies.load_queries(t.qk_dim, COLS), copies.load_queries(t.v_dim, COLS)
    load_k, load_v = copies.load(t.qk_dim, ROWS), copies.load(t.v_dim, ROWS)
    store_k, store_v = copies.store(t.qk_dim, ROWS), copies.store(t.v_dim, ROWS)
    finite_q, finite_dout = copies.finite(t.qk_dim, COLS), copies.finite(t.v_dim, COLS)
    load_stats = _stats_loader(t, COLS, TABLE, STATS)
    start_k, start_v = tile.filled(t.acc, k_regs.size, 0.0), tile.filled(t.acc, v_regs.size, 0.0)
    ones = tile.filled(t.acc, len(regs.rows), 1.0)
    scale_all = tile.mapped(lambda x, row, col, reals: x * number(reals.grad_scale), k_regs)
    vector = 2 if t.mma else VECTOR // size
    put_k = scalar.store_tile(k_regs, t.storage, t.stride(t.qk_dim), vector)
    put_v = scalar.store_tile(v_regs, t.storage, t.stride(t.v_dim), vector)
    locate, counted, commit, wait_all, sync = (
        build_locate(COLS, ordered=False),
        build_counted(COLS),
        scalar.commit,
        scalar.wait_all,
        scalar.sync,
    )
    thread, block, udiv, urem, add, mul = scalar.thread, scalar.block, scalar.udiv, scalar.urem, scalar.add, scalar.mul
    sub, narrow, opaque = scalar.sub, scalar.narrow, scalar.opaque
    load_word, store_word, shared_max = scalar.load_word, scalar.store_word, scalar.shared_max
    K_STRIDE, V_STRIDE = t.stride(t.qk_dim), t.stride(t.v_dim)
    DK, DV = with_dk, with_dv
    BAD_Q, BAD_DOUT = FLAG, FLAG + 4  # behind the first stage's table: the last turn whose tile was bad
    STAGES, STAGE = t.stages, places["stage"]
    needed = tile_needed(COLS)

    @inline
    def behind(head, tile_row, q_len):
        """The next tile."""
        tile_row = add(tile_row, COLS)
        if q_len >= COLS and tile_row >= q_len:
            return add(head, 1), narrow(0)
        return head, tile_row

    @inline
    def next_tile(call, sequence, head, tile_row, j0):
        """The first tile of queries from (head, tile_row) on that may see the keys, and how many it holds: 0 behind the
        last."""
        q_len = sequence[2]
        count = narrow(counted(call, q_len, head, tile_row))
        while count > 0 and not needed(call, sequence, tile_row, count, j0, j0 + ROWS):
            head, tile_row = behind(head, tile_row, q_len)
            count = narrow(counted(call, q_len, head, tile_row))
        return head, tile_row, count

    @inline
    def fetch(call, tid, stage, sequence, kv_head, head, tile_row, count):
        """A tile of queries on its way to a stage."""
        tid = opaque(tid)
        b, q_start, q_len = sequence[0], sequence[1], sequence[2]
        locate(call, tid, add(TABLE, stage), sequence, kv_head, head, tile_row, count)
        if q_len < COLS:
            sync()  # others read the table
        table, q, dout = add(TABLE, stage), call.q + b * call.q_b, call.dout + b * call.dout_b
        where = (q_len, q_start + tile_row, kv_head * call.group + head, count)
        load_q(tid, add(Q, stage), q, call.q_h, call.q_s, call.q_d, table, where, call.qk_dim)
        load_dout(tid, add(DOUT, stage), dout, call.dout_h, call.dout_s, call.dout_d, table, where, call.v_dim)
        load_stats(call, tid, b, count, stage)
        commit()

    def keys(call, reals):
        tid = thread()
        rest = udiv(block(), call.key_tiles)
        j0 = mul(urem(block(), call.key_tiles), ROWS)  # the first keys of a causal call have the most queries
        kv_head = urem(rest, call.kv_heads)
        of = udiv(rest, call.kv_heads)
        sequence = read_narrow(call, np.int64(of))
        b, _, _, k_start, k_len, _, _ = sequence
        if j0 >= k_len:
            return
        k_base = call.k + b * call.k_b + kv_head * call.k_h + (k_start + j0) * call.k_s
        v_base = call.v + b * call.v_b + kv_head * call.v_h + (k_start + j0) * call.v_s
        load_k(tid, K, k_base, call.k_s, call.k_d, k_len - j0, call.qk_dim)
        load_v(tid, V, v_base, call.v_s, call.v_d, k_len - j0, call.v_dim)
        commit()
        clear_bad(tid)
        if tid == 0:
            store_word(BOUNDS + BAD_Q, 0)
            store_word(BOUNDS + BAD_DOUT, 0)

        dk, dv = start_k(), start_v()
        # A turn is a tile of queries, which is there. The next one, `count` queries from (head, tile_row) on, is on its
        # way meanwhile: turn 0 has nothing else to do.
        head, tile_row, turn, stage = narrow(0), narrow(-COLS), narrow(0), narrow(0)
        count, there = narrow(0), True
        while there:
            sequence = read_narrow(call, np.int64(opaque(of)))
            b, q_start, q_len, k_start, k_len, offset, _prefix = sequence
            head, tile_row = behind(head, tile_row, q_len)
            head, tile_row, count = next_tile(call, sequence, head, tile_row, j0)
            wait_all()
            sync()  # the tile is there, and the one before was read
            if STAGES == 2 and count > 0:
                fetch(call, tid, sub(STAGE, stage), sequence, kv_head, head, tile_row, count)
            if turn > 0:
                bounds = add(BOUNDS, stage)
                low, high = load_word(add(bounds, LOW)), load_word(add(bounds, HIGH))
                if low < j0 + ROWS and high > j0:
                    inner_low, inner_high = load_word(add(bounds, INNER_LOW)), load_word(add(bounds, INNER_HIGH))
                    q, dout = add(Q, stage), add(DOUT, stage)
                    row, col = corner(opaque(tid))
                    given = (call, reals, b, k_start, offset - q_start, stage)
                    edge = EVERY or j0 < inner_low or j0 + ROWS > inner_high
                    p, _, ds, bits = step(tid, edge, add(j0, row), col, given, K, q, V, dout)
                    if edge:
                        if DK and not finite_q(tid, q):
                            shared_max(BOUNDS + BAD_Q, turn)
                        if DV and not finite_dout(tid, dout):
                            shared_max(BOUNDS + BAD_DOUT, turn)
                        sync()
                        if DV and load_word(BOUNDS + BAD_DOUT) == turn:
                            repair(tid, row, col, bits, dout)
                        if DK and load_word(BOUNDS + BAD_Q) == turn:
                            clean(tid, q)
                    if DV:
                        dv = weigh_v(tid, dv, ones(), p, dout, P)
                    if DK:
                        dk = weigh_k(tid, dk, ones(), ds, q, P)
            if STAGES == 1 and count > 0:
                sync()  # the tile was read
                fetch(call, tid, stage, sequence, kv_head, head, tile_row, count)
            turn, there = add(turn, 1), count > 0
            stage = sub(STAGE, stage) if STAGES == 2 else stage

        wait_all()
        sync()  # K and V were read: the results leave through their places
        row_o, col_o = output_corner(tid)
        if DK:
            dk = scale_all(dk, 0, 0, reals)
            put_k(dk, add(K, add(mul(row_o, K_STRIDE), mul(col_o, size))))
        if DV:
            if load_word(BOUNDS + BAD_DOUT) != 0:
                dv = spoil(dv, row_o, col_o, 0)
            put_v(dv, add(V, add(mul(row_o, V_STRIDE), mul(col_o, size))))
        sync()
        b, _, _, k_start, k_len, _, _ = read_narrow(call, np.int64(opaque(of)))
        to_k = call.dk + b * call.dk_b + kv_head * call.dk_h + (k_start + j0) * call.dk_s
        to_v = call.dv + b * call.dv_b + kv_head * call.dv_h + (k_start + j0) * call.dv_s
        if DK:
            store_k(tid, K, to_k, call.dk_s, call.dk_d, k_len - j0, call.qk_dim)
        if DV:
            store_v(tid, V, to_v, call.dv_s, call.dv_d, k_len - j0, call.v_dim)

    return keys


def tile_needed(rows: int) -> Any:
    """(call, sequence, row, count, low, high) -> whether the tile of queries that begins at `row` may see a key in low
    : high, from causal and window bounds alone: what is asked before a tile is looked at."""

    @inline
    def needed(call, sequence, row, count, low, high):
        _, _, q_len, _, _, offset, prefix = sequence
        first, last = np.int64(0), q_len - 1
        if q_len >= rows:
            first, last = row, row + count - 1
        if call.left >= 0 and first + offset - call.left >= high:
            return False
        end = last + offset
        if call.right >= 0 and end + call.right < low:
            return False
        return call.has_prefix == 0 or max(prefix, end + 1) > low

    return needed
