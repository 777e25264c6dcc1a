"""The backward kernel: dq, dk, dv and the reduced gradients in one pass over the pairs, from (q, k, v, out, lse, dout).

    delta = rowsum(dout out) - dlse                       a pass of its own: `build_delta`
    for a range of keys, with dK and dV in scratch:
        for a few tiles of queries: Q', dO' transposed, Q, dO as rows; dQ' = 0
            for a block of keys of the range, for each tile that sees it:
                S'  = K Q'          the forward's step: modified, -inf where hidden
                dP' = V dO'
                P'  = 2**(S' - lse)          dS' = P' (dP' - delta), then the chain rule through the modifiers
                dQ' += K' dS'
            dV += P' dO, dK += dS' Q         over all those tiles at once
        dK scale, dV go out; dQ' is added to the head's

Seven products with the forward's two. P is 0 and dS is 0 for a hidden pair whatever else stands there. A product starts
from zero in every block and meets the running sum once: two-level sums, dQ' three-level.

Key ranges are at most RANGES equal runs of whole blocks, a function of Sk alone. One thread takes all ranges of a head
in order, and adds their dQ' as it goes; the last heads, one for each thread, are dealt range by range, and who finishes
such a head adds the same sums in the same order. So no bit depends on threads, and dQ' of a range is kept for a few
heads only.
"""

import numpy as np

from ..online import LOG2E
from . import scores, tiles
from .call import SEQUENCE, buffers, call_record, own_scratch, tile_rows, tiles_of
from .compile import inner
from .scores import NONE, SOME, info_size
from .simd import (
    ROW,
    address_of,
    call_address,
    exp2,
    f64_ptr,
    fetch_add,
    i64_ptr,
    load,
    multiply_add,
    select,
    splat,
    store,
    u8_ptr,
)

RANGES = 8
TILES = 2  # of queries that share a pass over K and V, and one sum of dK and dV: 1 to 8 are within 2 %


def key_block(elem: str, head_dim: int) -> int:
    """Keys a block: a function of accumulation type and head size alone, since a row's bits depend on it.

    Beside 256, 128 keys are 2 to 4 % slower, 64 keys 3 to 5, 512 keys no faster. Nor is it faster to take all ranges of
    a head with the same tiles, which are then loaded once: K, V, dK and dV of a head leave the second-level cache (Zen
    4, D = 64 and 128).
    """
    keys = 256 if head_dim <= 128 else 128
    return keys if elem == "f32" else keys // 2


def range_keys(elem: str, head_dim: int, kv_len: int) -> int:
    """Keys of a range."""
    block = key_block(elem, head_dim)
    blocks = (kv_len + block - 1) // block
    return (blocks + RANGES - 1) // RANGES * block


def padded(elem: str, n: int) -> int:
    """n rounded up to whole vectors."""
    lanes = ROW.lanes(elem)
    return -(-n // lanes) * lanes


def layout(
    elem: str, qk_dim: int, v_dim: int, keys: int, head_size: int, copies: bool, bias: bool, modified: bool, drop: bool
) -> dict[str, int]:
    """The buffers of a thread: keys in the longest range, numbers in the longest head's dQ'."""
    w, size, block = tile_rows(elem), 4 if elem == "f32" else 8, key_block(elem, max(qk_dim, v_dim))
    tile = block * w * size
    return buffers(
        {
            "s": TILES * tile,
            "dp": TILES * tile,
            "q": TILES * qk_dim * w * size,
            "o": max(TILES, 2) * v_dim * w * size,  # `delta` puts dout and out of a tile there
            "q_rows": TILES * padded(elem, qk_dim) * w * size,
            "dout_rows": TILES * padded(elem, v_dim) * w * size,
            "dq_tile": TILES * qk_dim * w * size,
            "dq": head_size * size,
            "dk": (keys + ROW.mr) * padded(elem, qk_dim) * size,
            "dv": (keys + ROW.mr) * padded(elem, v_dim) * size,
            "state": (1 + 2 * TILES) * w * size,
            "infos": TILES * info_size(w) * 8,
            "parts": TILES * 4 * 8,
            "bad": TILES * w * 8,
            "flags": (keys // block + 1) * 8,
            "table": 2 * w * 8,
            "bounds": 2 * w * 4,
            "lanes": 2 * w * size,
            "sums": w * 8,
            "visible": block * w,
            "seen": block * w,
            "bias": tile * bias,
            "slope": tile * modified,
            "curve": tile * modified,
            "raw": tile * modified,
            "keep": tile * drop,
            "rows": max(qk_dim, v_dim, block) * w * size,
            "k": keys * qk_dim * size * copies,
            "v": keys * v_dim * size * copies,
        }
    )


def build_delta(elem: str):
    """drain(call_address): log sums in log2 units and delta of every query."""
    base = tiles.build(elem)
    L, W, acc, acc_ptr = base.L, base.W, base.acc, base.acc_ptr
    read_rows = base.read_rows
    ZERO, ONE, NEG_INF = acc(0), acc(1), acc(-np.inf)

    @inner
    def delta(call, scratch, b, h, first):
        """A tile of queries of one head."""
        count, n = min(W, call.rows - first), call.v_dim
        table, rows_scratch = i64_ptr(scratch + call.at_table), acc_ptr(scratch + call.at_rows)
        x, sums = acc_ptr(scratch + call.at_o), acc_ptr(scratch + call.at_state)
        y = x + n * W
        w = (count + L - 1) // L * L
        for r in range(w):
            table[r] = call.dout + b * call.dout_b + h * call.dout_h + (first + min(r, count - 1)) * call.dout_s
        read_rows(table, call.dout_d, call.storage, rows_scratch, x, w, n)
        for r in range(w):
            table[r] = call.out + b * call.out_b + h * call.out_h + (first + min(r, count - 1)) * call.out_s
        read_rows(table, call.out_d, call.storage, rows_scratch, y, w, n)
        zero, one = splat(ZERO, L), splat(ONE, L)
        for c in range(0, w, L):
            even, odd, used = zero, zero, zero
            for d in range(0, n - 1, 2):
                at = d * w + c
                o0, o1 = load(y + at, L), load(y + (at + w), L)
                even = multiply_add(load(x + at, L), o0, even)
                odd = multiply_add(load(x + (at + w), L), o1, odd)
                used = select(o0 == zero, select(o1 == zero, used, one), one)  # NaN is no 0
            if n & 1:
                at = (n - 1) * w + c
                o0 = load(y + at, L)
                even = multiply_add(load(x + at, L), o0, even)
                used = select(o0 == zero, used, one)
            # out is 0 throughout in a row that sees nothing: its dout may hold anything
            store(sums + c, select(used == zero, zero, even + odd))
        to = (b * call.heads + h) * call.rows + first
        log_sums, deltas = acc_ptr(call.log_sums), acc_ptr(call.deltas)
        for r in range(count):
            lse = acc_ptr(call.lse + b * call.lse_b + h * call.lse_h + (first + r) * call.lse_s)[0]
            log_sums[to + r] = ZERO if lse == NEG_INF else acc(np.float64(lse) * LOG2E)
            deltas[to + r] = sums[r]
        if call.dlse:
            for r in range(count):
                at = call.dlse + b * call.dlse_b + h * call.dlse_h + (first + r) * call.dlse_s
                deltas[to + r] = deltas[to + r] - acc_ptr(at)[0]

    def drain(call_at):
        """Tile after tile off the shared counter."""
        call = call_record(call_at)
        scratch = own_scratch(call)
        counter = i64_ptr(call.counter)
        in_head = (call.rows + W - 1) // W
        while True:
            item = fetch_add(counter, 1)
            if item >= call.n_items:
                break
            head, tile = item // in_head, item % in_head
            delta(call, scratch, head // call.heads, head % call.heads, tile * W)

    return drain


def build(elem: str):
    """drain(call_address): the worker for one accumulation type, "f32" or "f64"."""
    jit = inner
    base, step = tiles.build(elem), scores.build(elem, derivatives=True)
    L, W, acc, acc_ptr = base.L, base.W, base.acc, base.acc_ptr
    MR = ROW.mr
    ACC_BYTES, ACC_STORAGE = base.ACC_BYTES, base.ACC_STORAGE
    products, values, row_products = base.scores, base.values, base.row_products
    read_row, write_row, gather, write_rows = base.read_row, base.write_row, base.gather, base.write_rows
    row_addresses, all_finite, copy_block = base.row_addresses, base.all_finite, base.copy_block
    locate, key_range, score_block, dropout = step.locate, step.key_range, step.score_block, step.dropout
    COUNT, WIDTH, LOW, HIGH, FINITE, FINITE_2 = step.COUNT, step.WIDTH, step.LOW, step.HIGH, step.FINITE, step.FINITE_2
    clear_hidden, same_head = step.clear_hidden, step.same_head
    ROWS_AT, HEADS_AT, INFO = step.ROWS_AT, step.HEADS_AT, step.INFO
    ZERO, ONE, NEG_INF = acc(0), acc(1), acc(-np.inf)

    # ------------------------------------------------------------ P and dS

    @jit
    def weights(s, dp, log_sums, deltas, w, first, last):
        """s: scores in, weights p out; dp: dP in, dS = p (dP - delta) out; both 0 for a hidden pair.

        A weight is at most 1, also where the log sum of large scores is rounded to less than the largest.
        """
        hidden, zero = splat(NEG_INF, L), splat(ZERO, L)
        for c in range(0, w, L):
            log_sum, delta = load(log_sums + c, L), load(deltas + c, L)
            for j in range(first, last):
                at = j * w + c
                x = load(s + at, L)
                y = x - log_sum
                p = select(x == hidden, zero, exp2(select(y > zero, zero, y)))
                ds = select(x == hidden, zero, p * (load(dp + at, L) - delta))
                store(s + at, p)
                store(dp + at, ds)

    @jit
    def dropped_weights(s, dp, keep, log_sums, deltas, w, first, last):
        """weights() under dropout: keep holds 0 or 1 / (1 - dropout_p), and p goes out times it."""
        hidden, zero = splat(NEG_INF, L), splat(ZERO, L)
        for c in range(0, w, L):
            log_sum, delta = load(log_sums + c, L), load(deltas + c, L)
            for j in range(first, last):
                at = j * w + c
                x, z = load(s + at, L), load(keep + at, L)
                y = x - log_sum
                p = select(x == hidden, zero, exp2(select(y > zero, zero, y)))
                ds = select(x == hidden, zero, p * (load(dp + at, L) * z - delta))
                store(s + at, p * z)
                store(dp + at, ds)

    @jit
    def chain(ds, slope, w, first, last):
        for x in range(first * w, last * w):
            ds[x] = ds[x] * slope[x]

    # ------------------------------------------------------------ reduced gradients

    @jit
    def aux_calls(call, sums, raw, ds, b, heads, rows, w, count, key, keys):
        """The gradients of aux, one call a run of lanes that share a head."""
        r = 0
        while r < count:
            end = same_head(heads, r, count)
            at, weight, aux = address_of(raw + r), address_of(ds + r), call.score_aux
            call_address(call.aux_grad, at, weight, w, end - r, b, heads[r], rows[r], key, keys, aux, sums)
            r = end

    @jit
    def add_dbias(call, unit, b, heads, rows, ds, w, count, key, first, last):
        """dS into the sums of this unit, in float64; broadcast axes have stride 0."""
        sums = f64_ptr(call.dbias + unit * call.dbias_unit) + (b * call.dbias_b + key * call.dbias_j)
        for j in range(first, last):
            for r in range(count):
                at = heads[r] * call.dbias_h + rows[r] * call.dbias_i + j * call.dbias_j
                sums[at] = sums[at] + np.float64(ds[j * w + r])

    @jit
    def write_dbias(call, table, rows_scratch, ones, b, heads, rows, ds, w, count, key, first, last):
        """dS to a bias that is nowhere broadcast: each pair has its own place."""
        at = call.dbias + b * call.dbias_b + (key + first) * ACC_BYTES
        row_addresses(table, at, call.dbias_h, call.dbias_i, heads, rows, w, count)
        write_rows(ds + first * w, ones, table, ACC_BYTES, ACC_STORAGE, rows_scratch, w, count, last - first)

    @jit
    def add_dslopes(call, unit, b, heads, ds, lanes, position, w, count, first, last):
        """-dS |i + offset - j|, summed over the tile's pairs lane by lane, then by head."""
        for r in range(w):
            lanes[r] = 0.0
        for j in range(first, last):
            for r in range(w):
                lanes[r] = lanes[r] - np.float64(ds[j * w + r] * abs(position[r] - acc(j)))
        sums = f64_ptr(call.dslopes + unit * call.dslopes_unit) + b * call.dslopes_b
        for r in range(count):
            sums[heads[r]] = sums[heads[r]] + lanes[r]

    # ------------------------------------------------------------ one tile of queries

    @jit
    def load_rows(table, base, stride_b, stride_h, stride_s, stride, storage, b, info, rows, ld, n):
        """The tile's rows of one array as accumulation type, padded with zeros; their addresses are left in table."""
        w, count = info[WIDTH], info[COUNT]
        row_addresses(table, base + b * stride_b, stride_h, stride_s, info + HEADS_AT, info + ROWS_AT, w, count)
        for r in range(count):
            to = rows + r * ld
            read_row(table[r], stride, storage, to, n)
            for c in range(n, ld):
                to[c] = ZERO
        for r in range(w):
            table[r] = address_of(rows + min(r, count - 1) * ld)

    @jit
    def load_tile(call, scratch, b, info, t):
        """Q' scaled and dO', Q and dO as rows, log sums, delta, dQ' = 0. A row that is not finite becomes 0 among the
        rows, and is marked: see `add_bad_rows`."""
        w, qk, dv = info[WIDTH], call.qk_dim, call.v_dim
        ldq, ldo = (qk + L - 1) // L * L, (dv + L - 1) // L * L
        table, bad = i64_ptr(scratch + call.at_table), i64_ptr(scratch + call.at_bad) + t * W
        q, dout = acc_ptr(scratch + call.at_q) + t * qk * W, acc_ptr(scratch + call.at_o) + t * dv * W
        q_rows = acc_ptr(scratch + call.at_q_rows) + t * ldq * W
        dout_rows = acc_ptr(scratch + call.at_dout_rows) + t * ldo * W
        load_rows(table, call.q, call.q_b, call.q_h, call.q_s, call.q_d, call.storage, b, info, q_rows, ldq, qk)
        gather(table, q, w, qk)
        factor = acc(call.q_scale)
        for x in range(qk * w):
            q[x] = q[x] * factor
        load_rows(
            table, call.dout, call.dout_b, call.dout_h, call.dout_s, call.dout_d, call.storage, b, info, dout_rows,
            ldo, dv,
        )  # fmt: skip
        gather(table, dout, w, dv)
        info[FINITE], info[FINITE_2] = all_finite(q, qk * w), all_finite(dout, dv * w)
        if not (info[FINITE] and info[FINITE_2]):
            for r in range(info[COUNT]):
                bad[r] = 0
                if not all_finite(q_rows + r * ldq, qk):
                    bad[r] = 1
                    for c in range(qk):
                        q_rows[r * ldq + c] = ZERO
                if not all_finite(dout_rows + r * ldo, dv):
                    bad[r] = bad[r] | 2
                    for c in range(dv):
                        dout_rows[r * ldo + c] = ZERO
        log_sums = acc_ptr(scratch + call.at_state) + (1 + 2 * t) * W
        rows, heads = info + ROWS_AT, info + HEADS_AT
        for r in range(w):
            at = (b * call.heads + heads[r]) * call.rows + rows[r]
            log_sums[r] = acc_ptr(call.log_sums)[at]
            log_sums[W + r] = acc_ptr(call.deltas)[at]
        dq = acc_ptr(scratch + call.at_dq_tile) + t * qk * W
        for x in range(qk * w):
            dq[x] = ZERO

    @jit
    def pair_block(call, scratch, b, info, t, unit, j0, first, last, key, k, k_finite, v, offset):
        """P' and dS' of tile t with keys first:last of the block at j0 (sequence), key (array); dQ' += K' dS'."""
        w, count, qk, dv, block = info[WIDTH], info[COUNT], call.qk_dim, call.v_dim, call.block
        rows, heads = info + ROWS_AT, info + HEADS_AT
        p, ds = acc_ptr(scratch + call.at_s) + t * block * W, acc_ptr(scratch + call.at_dp) + t * block * W
        q, dout = acc_ptr(scratch + call.at_q) + t * qk * W, acc_ptr(scratch + call.at_o) + t * dv * W
        ones = acc_ptr(scratch + call.at_state)
        log_sums = ones + (1 + 2 * t) * W
        seen = score_block(call, scratch, b, info, j0, first, last, key, k, k_finite, q, p, not k_finite, offset)
        if seen == NONE:
            return seen
        products(v, dv, dout, ds, w, first, last, dv)
        raw, slope = acc_ptr(scratch + call.at_raw), acc_ptr(scratch + call.at_slope)
        curve = acc_ptr(scratch + call.at_curve)
        if seen == SOME:
            if call.score_mod:
                clear_hidden(p, slope, w, first, last)
            if call.use_softcap:
                clear_hidden(p, curve, w, first, last)
        if call.drop:
            keep = acc_ptr(scratch + call.at_keep)
            for x in range(first * w, last * w):
                keep[x] = ONE
            dropout(call, keep, b, heads, rows, w, count, key, first, last)
            dropped_weights(p, ds, keep, log_sums, log_sums + W, w, first, last)
        else:
            weights(p, ds, log_sums, log_sums + W, w, first, last)
        if call.aux_grad:
            sums = call.aux_sums + unit * call.aux_sums_unit
            at = first * w
            aux_calls(call, sums, raw + at, ds + at, b, heads, rows, w, count, key + first, last - first)
        if call.score_mod:
            chain(ds, slope, w, first, last)
        if call.dslopes:
            position = acc_ptr(scratch + call.at_lanes) + W
            add_dslopes(call, unit, b, heads, ds, f64_ptr(scratch + call.at_sums), position, w, count, first, last)
        if call.dbias_whole:
            table, rows_scratch = i64_ptr(scratch + call.at_table), acc_ptr(scratch + call.at_rows)
            write_dbias(call, table, rows_scratch, ones, b, heads, rows, ds, w, count, key, first, last)
        elif call.dbias:
            add_dbias(call, unit, b, heads, rows, ds, w, count, key, first, last)
        if call.use_softcap:
            chain(ds, curve, w, first, last)
        visible, dq = u8_ptr(scratch + call.at_visible), acc_ptr(scratch + call.at_dq_tile) + t * qk * W
        values(k, qk, ds, visible, seen == SOME and not k_finite, dq, ones, w, first, last, qk)
        return seen

    @jit
    def add_bad_rows(call, scratch, info, t, first, last, dk, ldk, dv, ldv):
        """What marked rows feed: dS is not finite where such a row is visible, and 0 where it is hidden.

        Left out of the products, where 0 weights of hidden pairs would turn its NaN into everybody's.
        """
        w, n = info[WIDTH], call.v_dim
        bad = i64_ptr(scratch + call.at_bad) + t * W
        p = acc_ptr(scratch + call.at_s) + t * call.block * W
        ds = acc_ptr(scratch + call.at_dp) + t * call.block * W
        dout = acc_ptr(scratch + call.at_o) + t * n * W
        for r in range(info[COUNT]):
            for j in range(first, last):
                if bad[r] and ds[j * w + r] != ZERO:
                    if bad[r] & 1:
                        for c in range(call.qk_dim):
                            dk[j * ldk + c] = dk[j * ldk + c] + ds[j * w + r]
                    if bad[r] & 2:
                        for c in range(n):
                            dv[j * ldv + c] = dv[j * ldv + c] + p[j * w + r] * dout[c * w + r]

    # ------------------------------------------------------------ a range of keys, a head

    @jit
    def write_keys(address, row_stride, stride, storage, src, ld, factor, rows, n):
        for j in range(rows):
            row = src + j * ld
            for c in range(n):
                row[c] = row[c] * factor + ZERO
            write_row(row, address + j * row_stride, stride, storage, n)

    @jit
    def attend_range(call, scratch, sequence, kv_head, low, high, unit, dq):
        """Keys low:high of one (sequence, key head) with all queries: writes their dk and dv, adds to dq."""
        b, k_start, block = sequence[0], sequence[3], call.block
        qk, dv = call.qk_dim, call.v_dim
        ldk, ldv = (qk + L - 1) // L * L, (dv + L - 1) // L * L
        keys, key = high - low, k_start + low
        k_at = call.k + b * call.k_b + kv_head * call.k_h + key * call.k_s
        v_at = call.v + b * call.v_b + kv_head * call.v_h + key * call.v_s
        k, v = acc_ptr(k_at), acc_ptr(v_at)
        if call.storage != ACC_STORAGE or call.k_d != ACC_BYTES or call.k_s != qk * ACC_BYTES:
            k = acc_ptr(scratch + call.at_k)
            copy_block(k_at, call.k_s, call.k_d, call.storage, k, keys, qk)
        if call.storage != ACC_STORAGE or call.v_d != ACC_BYTES or call.v_s != dv * ACC_BYTES:
            v = acc_ptr(scratch + call.at_v)
            copy_block(v_at, call.v_s, call.v_d, call.storage, v, keys, dv)
        dk_sum, dv_sum = acc_ptr(scratch + call.at_dk), acc_ptr(scratch + call.at_dv)
        for x in range((keys + MR) * ldk):
            dk_sum[x] = ZERO
        for x in range((keys + MR) * ldv):
            dv_sum[x] = ZERO
        flags, parts, ones = (
            i64_ptr(scratch + call.at_flags),
            i64_ptr(scratch + call.at_parts),
            acc_ptr(scratch + call.at_state),
        )
        for r in range(W):
            ones[r] = ONE
        for j0 in range(0, keys, block):
            flags[j0 // block] = all_finite(k + j0 * qk, min(block, keys - j0) * qk)
        infos, p, ds = (
            i64_ptr(scratch + call.at_infos),
            acc_ptr(scratch + call.at_s),
            acc_ptr(scratch + call.at_dp),
        )
        q_rows, dout_rows = acc_ptr(scratch + call.at_q_rows), acc_ptr(scratch + call.at_dout_rows)
        dq_tile = acc_ptr(scratch + call.at_dq_tile)
        n_tiles = tiles_of(call, sequence[2])
        for first_tile in range(0, n_tiles, TILES):
            n = min(TILES, n_tiles - first_tile)
            from_key, to_key = high, low
            for t in range(n):
                info = infos + t * INFO
                locate(call, sequence, kv_head, first_tile + t, info)
                if info[LOW] < high and info[HIGH] > low:
                    load_tile(call, scratch, b, info, t)
                    from_key, to_key = min(from_key, info[LOW]), max(to_key, info[HIGH])
                else:
                    info[LOW], info[HIGH] = high, 0
            j0 = low + max(from_key - low, 0) // block * block
            while j0 < min(to_key, high):
                n_keys = min(block, high - j0)
                at = j0 - low
                low_row, high_row = n_keys, 0
                for t in range(n):
                    info, part = infos + t * INFO, parts + 4 * t
                    first, last = key_range(info, j0, n_keys)
                    if first < last:
                        seen = pair_block(
                            call, scratch, b, info, t, unit, j0, first, last, key + at, k + at * qk,
                            flags[at // block] != 0, v + at * dv, sequence[5] - sequence[1],
                        )  # fmt: skip
                        if seen == NONE:
                            last = first
                        else:
                            low_row, high_row = min(low_row, first), max(high_row, last)
                    part[0], part[1], part[2], part[3] = first, last, info[COUNT], info[WIDTH]
                if low_row < high_row:
                    step_p = block * W
                    dk_at, dv_at = dk_sum + at * ldk, dv_sum + at * ldv
                    row_products(p, step_p, dout_rows, ldv * W, ldv, parts, n, dv_at, ldv, ones, low_row, high_row)
                    row_products(ds, step_p, q_rows, ldk * W, ldk, parts, n, dk_at, ldk, ones, low_row, high_row)
                    for t in range(n):
                        info, part = infos + t * INFO, parts + 4 * t
                        if part[0] < part[1] and not (info[FINITE] and info[FINITE_2]):
                            add_bad_rows(call, scratch, info, t, part[0], part[1], dk_at, ldk, dv_at, ldv)
                j0 += block
            for t in range(n):
                info = infos + t * INFO
                if info[LOW] < info[HIGH]:
                    to, own = dq + (first_tile + t) * qk * W, dq_tile + t * qk * W
                    for x in range(qk * info[WIDTH]):
                        to[x] = to[x] + own[x]
        dk_at = call.dk + b * call.dk_b + kv_head * call.dk_h + key * call.dk_s
        write_keys(dk_at, call.dk_s, call.dk_d, call.storage, dk_sum, ldk, acc(call.scale), keys, qk)
        dv_at = call.dv + b * call.dv_b + kv_head * call.dv_h + key * call.dv_s
        write_keys(dv_at, call.dv_s, call.dv_d, call.storage, dv_sum, ldv, ONE, keys, dv)

    @jit
    def finish(call, scratch, sequence, kv_head, dq):
        """dq = scale dQ', in the caller's array."""
        b, info, table = sequence[0], i64_ptr(scratch + call.at_infos), i64_ptr(scratch + call.at_table)
        factor, rows_scratch = acc_ptr(scratch + call.at_state), acc_ptr(scratch + call.at_rows)
        for r in range(W):
            factor[r] = acc(call.scale)
        for t in range(tiles_of(call, sequence[2])):
            locate(call, sequence, kv_head, t, info)
            w, count, at = info[WIDTH], info[COUNT], call.dq + b * call.dq_b
            row_addresses(table, at, call.dq_h, call.dq_s, info + HEADS_AT, info + ROWS_AT, w, count)
            src = dq + t * call.qk_dim * W
            write_rows(src, factor, table, call.dq_d, call.storage, rows_scratch, w, count, call.qk_dim)

    def drain(call_at):
        """Take work items off the shared counter until none is left: whole heads, then ranges of the last ones."""
        call = call_record(call_at)
        scratch = own_scratch(call)
        counter, done = i64_ptr(call.counter), i64_ptr(call.done)
        while True:
            item = fetch_add(counter, 1)
            if item >= call.n_items:
                break
            fine = item - call.whole
            head = item if fine < 0 else call.whole + fine // RANGES
            sequence, kv_head = i64_ptr(call.sequences) + SEQUENCE * (head // call.kv_heads), head % call.kv_heads
            k_len, block = sequence[4], call.block
            run = ((k_len + block - 1) // block + RANGES - 1) // RANGES * block
            n = tiles_of(call, sequence[2]) * call.qk_dim * W
            dq = acc_ptr(scratch + call.at_dq)
            if fine >= 0:
                dq = acc_ptr(call.partial + fine * call.head_size * ACC_BYTES)
            for x in range(n):
                dq[x] = ZERO
            first_range = 0 if fine < 0 else fine % RANGES
            for r in range(first_range, RANGES if fine < 0 else first_range + 1):
                if r * run < k_len:
                    unit = head * call.unit_of_head + r * call.unit_of_range
                    attend_range(call, scratch, sequence, kv_head, r * run, min((r + 1) * run, k_len), unit, dq)
            if fine < 0:
                finish(call, scratch, sequence, kv_head, dq)
            elif fetch_add(done + fine // RANGES, 1) == RANGES - 1:
                dq = acc_ptr(call.partial + fine // RANGES * RANGES * call.head_size * ACC_BYTES)
                for r in range(1, RANGES):
                    more = dq + r * call.head_size
                    for x in range(n):
                        dq[x] = dq[x] + more[x]
                finish(call, scratch, sequence, kv_head, dq)

    return drain
