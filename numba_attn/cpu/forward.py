"""The forward kernel: tiles of queries against blocks of keys, lanes are queries (DESIGN.md section 4).

    for a tile of queries, transposed and scaled once:                      Q' [d, lane]
        for a block of keys that the tile needs:
            S' = K Q'            products      rows of K are read as broadcasts
            S' = modified(S')    softcap, bias, ALiBi, score_mod; ends in log2 units
            S' = -inf            where hidden, only in blocks that hold a hidden pair
            P', m, l, alpha      online softmax, all vertical
            O' = O' alpha + V' P'
        out, lse = O' / l, m + log l

One source serves float32 (with float16 and bfloat16 storage) and float64: `build` makes the functions for one
accumulation type. Everything that changes per call is a number in a CALL record, so a call never compiles anything.
"""

import math

import numpy as np

from ..online import LN2, LOG2E
from . import scores, softmax, tiles
from .call import buffers, tile_rows
from .compile import inner
from .items import work_items
from .scores import NONE, SOME, info_size
from .simd import exp2, i64_ptr, load, splat, store, u8_ptr

FLUSH = 4096  # keys after which sums go to a third level: keeps the error of long sums at that of dense NumPy
MAX_QUERIES = 192  # that share a pass over K and V; twice as many are no faster, and leave a thread idle at the end
MAX_QUERIES_COPY = 384  # where the pass also copies or converts K and V


def key_block(elem: str, head_dim: int) -> int:
    """Keys a block: a function of accumulation type and head size alone, since a row's bits depend on it.

    Long blocks pay the fold of O' seldom; S', K and V of a block stay in the second-level cache. Share of FMA peak of
    the three inner loops (Zen 4, D = 64): 64 keys 80 %, 128 keys 84, 192 keys 87, 256 keys 89; D = 128: 64 keys 89, 128
    keys 95.
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
            "infos": n_tiles * info_size(w) * 8,
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


def build(elem: str):
    """drain(call_address): the worker for one accumulation type, "f32" or "f64"."""
    jit = inner
    base, step = tiles.build(elem), scores.build(elem)
    L, W, acc, acc_ptr, ACC_BYTES, ACC_STORAGE = (
        base.L,
        base.W,
        base.acc,
        base.acc_ptr,
        base.ACC_BYTES,
        base.ACC_STORAGE,
    )
    values, write_rows, row_addresses = base.values, base.write_rows, base.row_addresses
    all_finite, copy_block = base.all_finite, base.copy_block
    locate, load_queries, prefetch_queries = step.locate, step.load_queries, step.prefetch_queries
    key_range, score_block, dropout = step.key_range, step.score_block, step.dropout
    COUNT, WIDTH, LOW, HIGH, INNER_LOW, INNER_HIGH = (
        step.COUNT, step.WIDTH, step.LOW, step.HIGH, step.INNER_LOW, step.INNER_HIGH,
    )  # fmt: skip
    ROWS_AT, HEADS_AT, INFO = step.ROWS_AT, step.HEADS_AT, step.INFO
    ZERO, ONE, NEG_INF = acc(0), acc(1), acc(-np.inf)

    online_softmax = softmax.build(elem)

    # ------------------------------------------------------------ one tile of queries

    @jit
    def begin(call, scratch, b, info, q, o, m, l):
        w, heads = info[WIDTH], info + HEADS_AT
        load_queries(call, scratch, b, info, q)
        for x in range(call.v_dim * w):
            o[x] = ZERO
        for r in range(w):
            m[r] = NEG_INF
            l[r] = ZERO
        if call.sinks:
            sinks = acc_ptr(call.sinks)
            for r in range(w):
                m[r] = sinks[heads[r]] * acc(LOG2E)
                l[r] = ZERO if m[r] == NEG_INF else ONE

    @jit
    def flush(w, n, o, m, l, o_sum, m_sum, l_sum):
        """Third level: what a tile has summed so far moves to (o_sum, m_sum, l_sum); exact for a lane that has summed
        nothing since."""
        for r in range(w):
            m_new = m[r]
            safe = ZERO if m_new == NEG_INF else m_new
            # alpha as the vector code computes it, lane by lane
            m_sum[W + r] = m_sum[r] - safe
            m_sum[r] = m_new
        for c in range(0, w, L):
            al = exp2(load(m_sum + (W + c), L))
            store(l_sum + c, load(l_sum + c, L) * al + load(l + c, L))
            store(l + c, splat(ZERO, L))
            for d in range(n):
                at = d * w + c
                store(o_sum + at, load(o_sum + at, L) * al + load(o + at, L))
                store(o + at, splat(ZERO, L))

    @jit
    def finish(call, scratch, b, info, o, m, l):
        """out = O' / l, 0 for an empty row; lse = m + log l in natural units.

        -0 becomes +0 on the way out: a block of which a row sees nothing may turn -0 into +0, and a row's bits may not
        depend on that.
        """
        w, count = info[WIDTH], info[COUNT]
        rows, heads, table = info + ROWS_AT, info + HEADS_AT, i64_ptr(scratch + call.at_table)
        if call.lse:
            base = call.lse + b * call.lse_b
            for r in range(count):
                value = np.float64(m[r]) * LN2 + math.log(np.float64(l[r]))
                acc_ptr(base + heads[r] * call.lse_h + rows[r] * call.lse_s)[0] = acc(value)
        for r in range(w):
            l[r] = ZERO if l[r] == ZERO else ONE / l[r]
        row_addresses(table, call.out + b * call.out_b, call.out_h, call.out_s, heads, rows, w, count)
        write_rows(o, l, table, call.out_d, call.storage, acc_ptr(scratch + call.at_rows), w, count, call.v_dim)

    @jit
    def attend_block(call, scratch, b, info, j0, first, last, key, k, k_finite, v, v_finite, q, o, m, l, offset):
        """Keys first:last of the block at j0 (sequence), key (array) into the state of one tile."""
        w = info[WIDTH]
        s, alpha = acc_ptr(scratch + call.at_s), acc_ptr(scratch + call.at_state)
        seen = score_block(call, scratch, b, info, j0, first, last, key, k, k_finite, q, s, not v_finite, offset)
        if seen == NONE:
            return
        padded = (last + 3) & ~3
        for x in range(last * w, padded * w):
            s[x] = NEG_INF
        online_softmax(s, w, first & ~3, padded, m, l, alpha)
        if call.drop:
            dropout(call, s, b, info + HEADS_AT, info + ROWS_AT, w, info[COUNT], key, first, last)
        visible = u8_ptr(scratch + call.at_visible)
        values(v, call.v_dim, s, visible, seen == SOME and not v_finite, o, alpha, w, first, last, call.v_dim)

    @jit
    def attend(call, sequence, kv_head, first_tile, n_tiles, scratch):
        """n_tiles query tiles of one (sequence, key head), together over the keys that any of them needs."""
        b, k_start, k_len, block = sequence[0], sequence[3], sequence[4], call.block
        qk, dv = call.qk_dim, call.v_dim
        long = k_len > FLUSH
        q_all, o_all, o_sums = (
            acc_ptr(scratch + call.at_q),
            acc_ptr(scratch + call.at_o),
            acc_ptr(scratch + call.at_sums),
        )
        k_copy, v_copy = acc_ptr(scratch + call.at_k), acc_ptr(scratch + call.at_v)
        infos, state = i64_ptr(scratch + call.at_infos), acc_ptr(scratch + call.at_state) + W

        low, high = k_len, 0
        item = ACC_BYTES if call.storage == ACC_STORAGE else 2
        for t in range(n_tiles):
            info = infos + t * INFO
            locate(call, sequence, kv_head, first_tile + t, info)
            low, high = min(low, info[LOW]), max(high, info[HIGH])
            prefetch_queries(call.q + b * call.q_b, call.q_h, call.q_s, info, qk * item)
        for t in range(n_tiles):
            info = infos + t * INFO
            m = state + 2 * t * W
            begin(call, scratch, b, info, q_all + t * qk * W, o_all + t * dv * W, m, m + W)
            if long:
                o_sum = o_sums + t * (dv + 4) * W
                for x in range((dv + 1) * W):
                    o_sum[x] = ZERO
                for x in range((dv + 1) * W, (dv + 2) * W):
                    o_sum[x] = NEG_INF

        copy_k = call.storage != ACC_STORAGE or call.k_d != ACC_BYTES or call.k_s != qk * ACC_BYTES
        copy_v = call.storage != ACC_STORAGE or call.v_d != ACC_BYTES or call.v_s != dv * ACC_BYTES
        j0 = low // block * block
        while j0 < high:
            keys = min(block, k_len - j0)
            key = k_start + j0
            low_row, high_row = keys, 0
            mixed = call.n_masks + call.n_segments + call.n_mask_mods + call.bias + call.score_mod != 0
            for t in range(n_tiles):
                info = infos + t * INFO
                first, last = key_range(info, j0, keys)
                if first < last:
                    low_row, high_row = min(low_row, first), max(high_row, last)
                    mixed = mixed or j0 + first < info[INNER_LOW] or j0 + last > info[INNER_HIGH]
            if low_row < high_row:
                k_at = call.k + b * call.k_b + kv_head * call.k_h + key * call.k_s
                v_at = call.v + b * call.v_b + kv_head * call.v_h + key * call.v_s
                if copy_k:
                    copy_block(k_at, call.k_s, call.k_d, call.storage, k_copy, keys, qk)
                if copy_v:
                    copy_block(v_at, call.v_s, call.v_d, call.storage, v_copy, keys, dv)
                k = k_copy if copy_k else acc_ptr(k_at)
                v = v_copy if copy_v else acc_ptr(v_at)
                k_finite = all_finite(k + low_row * qk, (high_row - low_row) * qk)
                v_finite = not mixed or all_finite(v + low_row * dv, (high_row - low_row) * dv)
                for t in range(n_tiles):
                    info = infos + t * INFO
                    first, last = key_range(info, j0, keys)
                    if first < last:
                        m, q, o = state + 2 * t * W, q_all + t * qk * W, o_all + t * dv * W
                        attend_block(
                            call, scratch, b, info, j0, first, last, key, k, k_finite, v, v_finite, q, o, m, m + W,
                            sequence[5] - sequence[1],
                        )  # fmt: skip
            j0 += block
            if long and j0 % FLUSH == 0:
                for t in range(n_tiles):
                    o_sum = o_sums + t * (dv + 4) * W
                    flush(
                        infos[t * INFO + WIDTH],
                        dv,
                        o_all + t * dv * W,
                        state + 2 * t * W,
                        state + (2 * t + 1) * W,
                        o_sum,
                        o_sum + (dv + 1) * W,
                        o_sum + dv * W,
                    )
        for t in range(n_tiles):
            info = infos + t * INFO
            o, m, l = o_all + t * dv * W, state + 2 * t * W, state + (2 * t + 1) * W
            if long:
                o_sum = o_sums + t * (dv + 4) * W
                flush(info[WIDTH], dv, o, m, l, o_sum, o_sum + (dv + 1) * W, o_sum + dv * W)
                o, l = o_sum, o_sum + dv * W
            finish(call, scratch, b, info, o, m, l)

    return work_items(attend)
