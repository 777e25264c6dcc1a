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
from .dscores import build_load_queries, build_step
from .queries import (
    FLAG,
    HIGH,
    INNER_HIGH,
    INNER_LOW,
    LOW,
    Queries,
    block_of,
    build_counted,
    build_find,
    build_locate,
    build_seen,
    read_narrow,
    table_bytes,
)
from .record import Features
from .rows import Copies, bitmap_words, repairer, rows_of
from .scalar import (
    add,
    block,
    commit,
    inside,
    load_row,
    load_word,
    mul,
    narrow,
    opaque,
    shared_max,
    store_word,
    sub,
    sync,
    thread,
    udiv,
    urem,
    wait_all,
)
from .step import Given, exact_functions
from .tiling import Tiling, placed, products

# Fields besides record.CALL. log_sums and deltas are L and delta, (B, Hq, Sq) each, with the strides stats_*.
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
    """Shared memory of the kernel of dK and dV. Each stage has its own place for what comes from a tile of queries."""
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
    warp_sum, warps = scalar.warp_sum(acc), ROWS_THREADS // 32

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
    zero, minus_inf, warps = number(0), number(-np.inf), ROWS_THREADS // 32
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


def build_put(t: Tiling, dim: int, at: int) -> Any:
    """(tid, x): the sums of an output with `dim` columns to shared memory at `at`, as the call stores its numbers."""
    stride, size, output_corner = t.stride(dim), t.size, products(t).output_corner
    store_tile = scalar.store_tile(t.output(dim), t.storage, stride, 2 if t.mma else VECTOR // size)

    @inline
    def put(tid, x):
        row, col = output_corner(tid)
        store_tile(x, add(at, add(mul(row, stride), mul(col, size))))

    return put


def _scaled(t: Tiling) -> Any:
    """(x, reals): dQ or dK of the scores -> of q and k."""
    number = exact_functions(t.acc).number
    scale_all = tile.mapped(lambda x, row, col, reals: x * number(reals.grad_scale), t.output(t.qk_dim))
    return inline(lambda x, reals: scale_all(x, 0, 0, reals))


# --- dQ ---------------------------------------------------------------------------------------------------------------


def build_queries(t: Tiling, f: Features) -> Any:
    """queries(call, reals): dQ; with DBIAS or DSLOPES among f.extra also the gradient of every pair's bias, or each
    row's part of the gradient of its slope."""
    places = memory_queries(t)
    TABLE, STATS, Q, DOUT, K, V, P = (places[n] for n in ("table", "stats", "q", "dout", "k", "v", "p"))
    AT_FLAG, ROWS, COLS, EVERY = TABLE + t.rows * 16 + FLAG, t.rows, t.cols, f.every_pair
    step, corner = build_step(t, f, TABLE, STATS, False), products(t).corner
    weigh, ones = products(t).pb(t.qk_dim, rescaled=False), tile.filled(t.acc, len(t.scores.rows), 1.0)
    start, scaled, clean = tile.filled(t.acc, t.output(t.qk_dim).size, 0.0), _scaled(t), repairer(t, t.qk_dim, 0).clean
    copies, load_queries = Copies(t, f.aligned), build_load_queries(t, f, ROWS, places)
    load_k, load_v = copies.load(t.qk_dim, COLS), copies.load(t.v_dim, COLS)
    put, store_dq, finite_k = (
        build_put(t, t.qk_dim, Q),
        copies.store_queries(t.qk_dim, ROWS),
        copies.finite(t.qk_dim, COLS),
    )
    k_of, v_of, dq_of = rows_of(f, "k", "qk_dim"), rows_of(f, "v", "v_dim"), rows_of(f, "dq", "qk_dim")
    locate, find, seen = build_locate(ROWS), build_find(ROWS), build_seen(ROWS, COLS)
    start_pairs, take_pairs, leave_pairs = _pair_gradients(t, f, TABLE)

    def queries(call, reals):
        tid = thread()
        of, kv_head, index = block_of(call)
        sequence = read_narrow(call, of)
        b, k_start, k_len = sequence.batch, sequence.k_start, sequence.k_len
        queries = find(call, sequence.q_len, kv_head, index)
        if queries.count <= 0:
            return
        locate(call, tid, TABLE, sequence, queries)
        first, last, inner_low, inner_high = seen(TABLE)
        given = Given(call, reals, b, k_start, sequence.offset - sequence.q_start, 0)
        k, v = k_of(call, b, kv_head, k_start), v_of(call, b, kv_head, k_start)
        load_queries(call, tid, sequence, queries, 0)
        if tid == 0:
            store_word(AT_FLAG, -1)
        if first < last:
            load_v(tid, V, v.base + first * v.stride_s, v, k_len - first)
        commit()

        dq, slopes = start(), start_pairs()
        for j0 in range(first, last, COLS):
            sync()  # K of the block before was read
            load_k(tid, K, k.base + j0 * k.stride_s, k, k_len - j0)
            commit()
            wait_all()
            sync()
            edge = EVERY or j0 < inner_low or j0 + COLS > inner_high
            row, col = corner(opaque(tid))
            _, ds, capped, _ = step(tid, edge, row, add(j0, col), given, (Q, K, DOUT, V))
            slopes = take_pairs(slopes, ds, row, add(j0, col), given)
            sync()  # V was read
            if j0 + COLS < last:
                load_v(tid, V, v.base + (j0 + COLS) * v.stride_s, v, k_len - j0 - COLS)
            commit()
            if edge:
                if not finite_k(tid, K):
                    shared_max(AT_FLAG, j0)
                sync()
                if load_word(AT_FLAG) == j0:
                    clean(tid, K)
            dq = weigh(tid, dq, ones(), capped, K, P)

        row, col = corner(opaque(tid))
        leave_pairs(slopes, row, col, given, queries.count)
        dq = scaled(dq, reals)
        wait_all()
        sync()
        put(tid, dq)
        sync()
        out = dq_of(call, b, 0, 0)
        store_dq(tid, Q, out.base, out, TABLE, queries.count)

    return queries


def _pair_gradients(t: Tiling, f: Features, table: int) -> tuple[Any, Any, Any]:
    """What the kernel of dQ gives for pairs with DBIAS or DSLOPES: start() -> a number for each row,
    take(numbers, ds, row, col, given) -> the same with a tile, and leave(numbers, row, col, given, count)."""
    regs, WITH_BIAS, WITH_SLOPES = t.scores, "dbias" in f.extra, "dslopes" in f.extra
    store_bias: Any = tile.mapped(_bias_writer(t.acc, table), regs) if WITH_BIAS else None
    store_slopes: Any = tile.row_mapped(_slope_writer(t.acc, table), regs) if WITH_SLOPES else None
    by_distance, row_sum = tile.mapped(_by_distance(t.acc, table), regs), tile.row_sum(regs)
    plus = tile.each_row(lambda x, y: x + y, regs)

    @inline
    def take(numbers, ds, row, col, given):
        if WITH_BIAS:
            store_bias(ds, row, col, given)
        if WITH_SLOPES:
            numbers = plus(numbers, row_sum(by_distance(ds, row, col, given)))
        return numbers

    @inline
    def leave(numbers, row, col, given, count):
        if WITH_SLOPES and col == 0:
            store_slopes(numbers, row, (given.call, given.batch, count))

    return tile.filled(t.acc, len(regs.rows), 0.0), take, leave


def _bias_writer(acc: str, table: int) -> Any:
    """Writes the gradient of a visible pair's bias; the others are 0 from the start."""
    store = scalar.store_global(acc)

    def write(x, row, col, given):
        call, k_start = given.call, given.k_start
        i, h, first, end = load_row(add(table, mul(row, 16)))
        if inside(col, first, end):
            to = given.batch * call.dbias_b + h * call.dbias_h + i * call.dbias_i + (k_start + col) * call.dbias_j
            store(call.dbias + to, x)
        return x

    return write


def _by_distance(acc: str, table: int) -> Any:
    """A pair's part of the gradient of its slope."""
    number = np.float64 if acc == "f64" else np.float32
    zero = number(0)

    def part(x, row, col, given):
        i, _, _, _ = load_row(add(table, mul(row, 16)))
        return zero - x * abs(number(i + given.shift - col))

    return part


def _slope_writer(acc: str, table: int) -> Any:
    store, size = scalar.store_global(acc), SIZE[acc]

    def write(value, row, given):
        call, b, count = given
        if row < count:
            i, h, _, _ = load_row(add(table, mul(row, 16)))
            store(call.dslopes + b * call.stats_b + h * call.stats_h + i * size, value)
        return value

    return write


# --- dK and dV --------------------------------------------------------------------------------------------------------


def build_keys(t: Tiling, f: Features, with_dk: bool = True, with_dv: bool = True) -> Any:
    """keys(call, reals): dK and dV, or one of them where both would not fit in registers."""
    places = memory_keys(t)
    TABLE, STATS, K, V, Q, DOUT, P = (places[n] for n in ("table", "stats", "k", "v", "q", "dout", "p"))
    ROWS, COLS, STAGES, STAGE = t.rows, t.cols, t.stages, places["stage"]  # rows are keys, columns queries
    BOUNDS, EVERY, DK, DV = TABLE + COLS * 16, f.every_pair, with_dk, with_dv
    step, corner = build_step(t, f, TABLE, STATS, True), products(t).corner
    weigh_k, weigh_v = products(t).pb(t.qk_dim, rescaled=False), products(t).pb(t.v_dim, rescaled=False)
    ones = tile.filled(t.acc, len(t.scores.rows), 1.0)
    start_k = tile.filled(t.acc, t.output(t.qk_dim).size, 0.0)
    start_v = tile.filled(t.acc, t.output(t.v_dim).size, 0.0)
    copies, k_of, v_of = Copies(t, f.aligned), rows_of(f, "k", "qk_dim"), rows_of(f, "v", "v_dim")
    load_k, load_v = copies.load(t.qk_dim, ROWS), copies.load(t.v_dim, ROWS)
    behind, next_tile = _next_row(COLS), _next_tile(t)
    fetch = build_load_queries(t, f, COLS, places, build_locate(COLS, ordered=False))
    start_guard, protect = _guard(t, f, places, with_dk, with_dv)
    leave = _leave(t, f, places, with_dk, with_dv)

    def keys(call, reals):
        tid = thread()
        rest = udiv(block(), call.key_tiles)
        j0 = mul(urem(block(), call.key_tiles), ROWS)  # the first keys of a causal call have the most queries
        kv_head = urem(rest, call.kv_heads)
        of = udiv(rest, call.kv_heads)
        sequence = read_narrow(call, np.int64(of))
        b, k_start, k_len = sequence.batch, sequence.k_start, sequence.k_len
        if j0 >= k_len:
            return
        k, v = k_of(call, b, kv_head, k_start + j0), v_of(call, b, kv_head, k_start + j0)
        load_k(tid, K, k.base, k, k_len - j0)
        load_v(tid, V, v.base, v, k_len - j0)
        commit()
        start_guard(tid)

        dk, dv = start_k(), start_v()
        # A turn is a tile of queries, which is there. The next one, `count` queries from (head, tile_row) on, is on its
        # way meanwhile: turn 0 has nothing else to do.
        head, tile_row, turn, stage = narrow(0), narrow(-COLS), narrow(0), narrow(0)
        count, there = narrow(0), True
        while there:
            sequence = read_narrow(call, np.int64(opaque(of)))
            head, tile_row = behind(head, tile_row, sequence.q_len)
            head, tile_row, count = next_tile(call, sequence, head, tile_row, j0)
            wait_all()
            sync()  # the tile is there, and the one before was read
            if STAGES == 2 and count > 0:
                fetch(call, opaque(tid), sequence, Queries(kv_head, head, tile_row, count), sub(STAGE, stage))
                commit()
            if turn > 0:
                bounds = add(BOUNDS, stage)
                low, high = load_word(add(bounds, LOW)), load_word(add(bounds, HIGH))
                if low < j0 + ROWS and high > j0:
                    inner_low, inner_high = load_word(add(bounds, INNER_LOW)), load_word(add(bounds, INNER_HIGH))
                    q, dout = add(Q, stage), add(DOUT, stage)
                    row, col = corner(opaque(tid))
                    shift = sequence.offset - sequence.q_start
                    given = Given(call, reals, sequence.batch, sequence.k_start, shift, stage)
                    edge = EVERY or j0 < inner_low or j0 + ROWS > inner_high
                    p, _, ds, bits = step(tid, edge, add(j0, row), col, given, (K, q, V, dout))
                    if edge:
                        protect(tid, turn, row, col, bits, (q, dout))
                    if DV:
                        dv = weigh_v(tid, dv, ones(), p, dout, P)
                    if DK:
                        dk = weigh_k(tid, dk, ones(), ds, q, P)
            if STAGES == 1 and count > 0:
                sync()  # the tile was read
                fetch(call, opaque(tid), sequence, Queries(kv_head, head, tile_row, count), stage)
                commit()
            turn, there = add(turn, 1), count > 0
            stage = sub(STAGE, stage) if STAGES == 2 else stage
        leave(call, reals, tid, (of, kv_head, j0), dk, dv)

    return keys


def _next_row(rows: int) -> Any:
    """(head, row, q_len) -> where the tile of queries behind the one there begins."""

    @inline
    def behind(head, row, q_len):
        row = add(row, rows)
        if q_len >= rows and row >= q_len:
            return add(head, 1), narrow(0)
        return head, row

    return behind


def _next_tile(t: Tiling) -> Any:
    """(call, sequence, head, row, j0) -> the first tile of queries from (head, row) on that may see a key of the tile
    that begins at j0, and how many it holds: 0 behind the last."""
    ROWS, counted, needed, behind = t.rows, build_counted(t.cols), tile_needed(t.cols), _next_row(t.cols)

    @inline
    def next_tile(call, sequence, head, row, j0):
        q_len = sequence.q_len
        count = narrow(counted(call, q_len, head, row))
        while count > 0 and not needed(call, sequence, row, count, j0, j0 + ROWS):
            head, row = behind(head, row, q_len)
            count = narrow(counted(call, q_len, head, row))
        return head, row, count

    return next_tile


BAD_Q, BAD_DOUT = FLAG, FLAG + 4  # behind the first stage's table: the last turn whose tile was bad


def _guard(t: Tiling, f: Features, places: dict[str, int], with_dk: bool, with_dv: bool) -> tuple[Any, Any]:
    """start(tid), and protect(tid, turn, row, col, bits, (q, dout)): keeps what hidden pairs point to out of dK and dV,
    see rows.repairer."""
    BOUNDS, DK, DV = places["table"] + t.cols * 16, with_dk, with_dv
    clean, guard = repairer(t, t.qk_dim, 0).clean, repairer(t, t.v_dim, places["bad"])
    clear_bad, repair, copies = guard.clear, guard.repair, Copies(t, f.aligned)
    finite_q, finite_dout = copies.finite(t.qk_dim, t.cols), copies.finite(t.v_dim, t.cols)

    @inline
    def start(tid):
        clear_bad(tid)
        if tid == 0:
            store_word(BOUNDS + BAD_Q, 0)
            store_word(BOUNDS + BAD_DOUT, 0)

    @inline
    def protect(tid, turn, row, col, bits, tiles):
        q, dout = tiles
        if DK and not finite_q(tid, q):
            shared_max(BOUNDS + BAD_Q, turn)
        if DV and not finite_dout(tid, dout):
            shared_max(BOUNDS + BAD_DOUT, turn)
        sync()
        if DV and load_word(BOUNDS + BAD_DOUT) == turn:
            repair(tid, row, col, bits, dout)
        if DK and load_word(BOUNDS + BAD_Q) == turn:
            clean(tid, q)

    return start, protect


def _leave(t: Tiling, f: Features, places: dict[str, int], with_dk: bool, with_dv: bool) -> Any:
    """(call, reals, tid, (sequence, key head, first key), dk, dv): the results, through the places of K and V."""
    BOUNDS, K, V, DK, DV = places["table"] + t.cols * 16, places["k"], places["v"], with_dk, with_dv
    copies, scaled, output_corner = Copies(t, f.aligned), _scaled(t), products(t).output_corner
    put_k, put_v = build_put(t, t.qk_dim, K), build_put(t, t.v_dim, V)
    store_k, store_v = copies.store(t.qk_dim, t.rows), copies.store(t.v_dim, t.rows)
    dk_of, dv_of = rows_of(f, "dk", "qk_dim"), rows_of(f, "dv", "v_dim")
    spoil = repairer(t, t.v_dim, places["bad"]).spoil

    @inline
    def leave(call, reals, tid, whose, dk, dv):
        of, kv_head, j0 = whose
        wait_all()
        sync()  # K and V were read
        if DK:
            put_k(tid, scaled(dk, reals))
        if DV:
            if load_word(BOUNDS + BAD_DOUT) != 0:
                row, col = output_corner(tid)
                dv = spoil(dv, row, col, 0)
            put_v(tid, dv)
        sync()
        sequence = read_narrow(call, np.int64(opaque(of)))
        b, first, count = sequence.batch, sequence.k_start + j0, sequence.k_len - j0
        if DK:
            store_k(tid, K, dk_of(call, b, kv_head, first), count)
        if DV:
            store_v(tid, V, dv_of(call, b, kv_head, first), count)

    return leave


def tile_needed(rows: int) -> Any:
    """(call, sequence, row, count, low, high) -> whether the tile of queries that begins at `row` may see a key in low
    : high, from causal and window bounds alone: what is asked before a tile is looked at."""

    @inline
    def needed(call, sequence, row, count, low, high):
        q_len, offset = sequence.q_len, sequence.offset
        first, last = np.int64(0), q_len - 1
        if q_len >= rows:
            first, last = row, row + count - 1
        if call.left >= 0 and first + offset - call.left >= high:
            return False
        end = last + offset
        if call.right >= 0 and end + call.right < low:
            return False
        return call.has_prefix == 0 or max(sequence.prefix, end + 1) > low

    return needed
