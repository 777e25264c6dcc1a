"""The tangent kernel, forward mode: out and its derivative along given tangents in one pass over the pairs.

    S'  = K Q', modified; -inf where hidden                 as in the forward kernel
    S.' = (K Q.' + K. Q') through the derivatives of softcap, bias, ALiBi and score_mod
    P', m, l, alpha                                         online softmax
    c  = c alpha + sum P' S.'
    O' = O' alpha + V' P'        O.' = O.' alpha + V.' P' + V' (P' S.')
    out = O / l         lse = m + log l         lse. = c / l         out. = O. / l - lse. out

since d softmax = P (S. - sum P S.). A tangent that is absent is 0 and costs nothing. Sums are two-level: at 65,536
keys out is off by 5e-6 in float32, where the forward kernel, with a third level, is off by 1e-6.
"""

import math

import numpy as np

from ..online import LN2, LOG2E
from . import scores, softmax, tiles
from .call import buffers, tile_rows
from .compile import inner
from .items import work_items
from .scores import NONE, SOME, info_size
from .simd import address_of, call_address, i64_ptr, u8_ptr


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
            "infos": info_size(w) * 8,
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


def build(elem: str):
    """drain(call_address): the worker for one accumulation type, "f32" or "f64"."""
    jit = inner
    base, step = tiles.build(elem), scores.build(elem, derivatives=True)
    online_softmax = softmax.build(elem)
    W, acc, acc_ptr = base.W, base.acc, base.acc_ptr
    ACC_BYTES, ACC_STORAGE = base.ACC_BYTES, base.ACC_STORAGE
    products, values, read_rows, write_rows = base.scores, base.values, base.read_rows, base.write_rows
    row_addresses, all_finite, copy_block = base.row_addresses, base.all_finite, base.copy_block
    locate, load_queries, key_range = step.locate, step.load_queries, step.key_range
    score_block, dropout = step.score_block, step.dropout
    COUNT, WIDTH, LOW, HIGH = step.COUNT, step.WIDTH, step.LOW, step.HIGH
    clear_hidden, same_head = step.clear_hidden, step.same_head
    ROWS_AT, HEADS_AT = step.ROWS_AT, step.HEADS_AT
    ZERO, ONE, NEG_INF = acc(0), acc(1), acc(-np.inf)

    @jit
    def add_scaled(x, y, factor, first, last):
        for n in range(first, last):
            x[n] = x[n] + y[n] * factor

    @jit
    def multiply(x, y, first, last):
        for n in range(first, last):
            x[n] = x[n] * y[n]

    @jit
    def tangent_calls(call, raw, s_dot, b, heads, rows, w, count, key, keys):
        """The tangent of score_mod, one call a run of lanes that share a head."""
        r = 0
        while r < count:
            end = same_head(heads, r, count)
            at, tangent = address_of(raw + r), address_of(s_dot + r)
            call_address(
                call.score_jvp, at, tangent, w, end - r, b, heads[r], rows[r], key, keys, call.score_aux, call.aux_dot
            )
            r = end

    @jit
    def score_tangents(call, scratch, b, info, first, last, key, k, k_dot, q, q_dot, s_dot):
        """S.' before the pairs are hidden, in natural units, by the chain rule through what score_block did."""
        w, count, qk = info[WIDTH], info[COUNT], call.qk_dim
        rows, heads, more = info + ROWS_AT, info + HEADS_AT, acc_ptr(scratch + call.at_more)
        if call.q_dot:
            products(k, qk, q_dot, s_dot, w, first, last, qk)
        else:
            for x in range(first * w, last * w):
                s_dot[x] = ZERO
        if call.k_dot:
            products(k_dot, qk, q, more, w, first, last, qk)
            add_scaled(s_dot, more, acc(call.dot_unit), first * w, last * w)
        if call.use_softcap:
            multiply(s_dot, acc_ptr(scratch + call.at_curve), first * w, last * w)
        if call.bias_dot:
            table, tile = i64_ptr(scratch + call.at_table), more + first * w
            at = call.bias_dot + b * call.bias_dot_b + (key + first) * call.bias_dot_j
            row_addresses(table, at, call.bias_dot_h, call.bias_dot_i, heads, rows, w, count)
            rows_scratch = acc_ptr(scratch + call.at_rows)
            read_rows(table, call.bias_dot_j, call.bias_dot_storage, rows_scratch, tile, w, last - first)
            add_scaled(s_dot, more, ONE, first * w, last * w)
        if call.slopes_dot:
            slopes, position = acc_ptr(call.slopes_dot + b * call.slopes_dot_b), acc_ptr(scratch + call.at_lanes) + W
            for j in range(first, last):
                for r in range(w):
                    s_dot[j * w + r] = s_dot[j * w + r] - slopes[heads[r]] * abs(position[r] - acc(j))
        if call.score_mod:
            raw, at = acc_ptr(scratch + call.at_raw), first * w
            tangent_calls(call, raw + at, s_dot + at, b, heads, rows, w, count, key + first, last - first)

    @jit
    def attend_tile(call, scratch, sequence, kv_head, tile):
        b, k_start, k_len, block = sequence[0], sequence[3], sequence[4], call.block
        qk, dv = call.qk_dim, call.v_dim
        info, table = i64_ptr(scratch + call.at_infos), i64_ptr(scratch + call.at_table)
        locate(call, sequence, kv_head, tile, info)
        w, count = info[WIDTH], info[COUNT]
        rows, heads = info + ROWS_AT, info + HEADS_AT
        rows_scratch, visible = acc_ptr(scratch + call.at_rows), u8_ptr(scratch + call.at_visible)
        q, q_dot = acc_ptr(scratch + call.at_q), acc_ptr(scratch + call.at_q_dot)
        o, o_dot = acc_ptr(scratch + call.at_o), acc_ptr(scratch + call.at_o_dot)
        s, s_dot, p_dot = (
            acc_ptr(scratch + call.at_s),
            acc_ptr(scratch + call.at_s_dot),
            acc_ptr(scratch + call.at_p_dot),
        )
        alpha = acc_ptr(scratch + call.at_state)
        ones, m, l, c = alpha + W, alpha + 2 * W, alpha + 3 * W, alpha + 4 * W
        load_queries(call, scratch, b, info, q)
        if call.q_dot:
            at = call.q_dot + b * call.q_dot_b
            row_addresses(table, at, call.q_dot_h, call.q_dot_s, heads, rows, w, count)
            read_rows(table, call.q_dot_d, call.storage, rows_scratch, q_dot, w, qk)
            for x in range(qk * w):
                q_dot[x] = q_dot[x] * acc(call.scale)
        for x in range(dv * w):
            o[x] = ZERO
            o_dot[x] = ZERO
        for r in range(w):
            ones[r] = ONE
            m[r] = NEG_INF
            l[r] = ZERO
            c[r] = ZERO
        if call.sinks:
            sinks = acc_ptr(call.sinks)
            for r in range(w):
                m[r] = sinks[heads[r]] * acc(LOG2E)
                l[r] = ZERO if m[r] == NEG_INF else ONE
                if call.sinks_dot and m[r] != NEG_INF:
                    c[r] = acc_ptr(call.sinks_dot)[heads[r]]

        same = call.storage == ACC_STORAGE
        k_here = same and call.k_d == ACC_BYTES and call.k_s == qk * ACC_BYTES
        v_here = same and call.v_d == ACC_BYTES and call.v_s == dv * ACC_BYTES
        k_dot_here = same and call.k_dot_d == ACC_BYTES and call.k_dot_s == qk * ACC_BYTES
        v_dot_here = same and call.v_dot_d == ACC_BYTES and call.v_dot_s == dv * ACC_BYTES
        j0 = info[LOW] // block * block
        while j0 < info[HIGH]:
            keys = min(block, k_len - j0)
            key = k_start + j0
            first, last = key_range(info, j0, keys)
            k_at = call.k + b * call.k_b + kv_head * call.k_h + key * call.k_s
            v_at = call.v + b * call.v_b + kv_head * call.v_h + key * call.v_s
            k_dot_at = call.k_dot + b * call.k_dot_b + kv_head * call.k_dot_h + key * call.k_dot_s
            v_dot_at = call.v_dot + b * call.v_dot_b + kv_head * call.v_dot_h + key * call.v_dot_s
            k, v, k_dot, v_dot = acc_ptr(k_at), acc_ptr(v_at), acc_ptr(k_dot_at), acc_ptr(v_dot_at)
            if not k_here:
                k = acc_ptr(scratch + call.at_k)
                copy_block(k_at, call.k_s, call.k_d, call.storage, k, keys, qk)
            if not v_here:
                v = acc_ptr(scratch + call.at_v)
                copy_block(v_at, call.v_s, call.v_d, call.storage, v, keys, dv)
            if call.k_dot and not k_dot_here:
                k_dot = acc_ptr(scratch + call.at_k_dot)
                copy_block(k_dot_at, call.k_dot_s, call.k_dot_d, call.storage, k_dot, keys, qk)
            if call.v_dot and not v_dot_here:
                v_dot = acc_ptr(scratch + call.at_v_dot)
                copy_block(v_dot_at, call.v_dot_s, call.v_dot_d, call.storage, v_dot, keys, dv)
            k_finite = all_finite(k + first * qk, (last - first) * qk)
            v_finite = all_finite(v + first * dv, (last - first) * dv)
            if call.v_dot:
                v_finite = v_finite and all_finite(v_dot + first * dv, (last - first) * dv)
            offset = sequence[5] - sequence[1]
            seen = score_block(call, scratch, b, info, j0, first, last, key, k, k_finite, q, s, not v_finite, offset)
            if seen != NONE:
                score_tangents(call, scratch, b, info, first, last, key, k, k_dot, q, q_dot, s_dot)
                if seen == SOME:
                    clear_hidden(s, s_dot, w, first, last)
                padded = (last + 3) & ~3
                for x in range(last * w, padded * w):
                    s[x] = NEG_INF
                online_softmax(s, w, first & ~3, padded, m, l, alpha)
                for r in range(w):
                    c[r] = c[r] * alpha[r]
                for x in range(first * w, last * w):
                    p_dot[x] = s[x] * s_dot[x]
                for r in range(w):
                    rows_scratch[r] = ZERO
                for j in range(first, last):
                    for r in range(w):
                        rows_scratch[r] = rows_scratch[r] + p_dot[j * w + r]
                for r in range(w):
                    c[r] = c[r] + rows_scratch[r]
                if call.drop:
                    keep = acc_ptr(scratch + call.at_keep)
                    for x in range(first * w, last * w):
                        keep[x] = ONE
                    dropout(call, keep, b, heads, rows, w, count, key, first, last)
                    multiply(s, keep, first * w, last * w)
                    multiply(p_dot, keep, first * w, last * w)
                masked = seen == SOME and not v_finite
                values(v, dv, s, visible, masked, o, alpha, w, first, last, dv)
                values(v, dv, p_dot, visible, masked, o_dot, alpha, w, first, last, dv)
                if call.v_dot:
                    values(v_dot, dv, s, visible, masked, o_dot, ones, w, first, last, dv)
            j0 += block

        # out = O / l, lse. = c / l, out. = O. / l - lse. out
        if call.lse:
            at, dot_at = call.lse + b * call.lse_b, call.lse_dot + b * call.lse_dot_b
            for r in range(count):
                value = np.float64(m[r]) * LN2 + math.log(np.float64(l[r]))
                acc_ptr(at + heads[r] * call.lse_h + rows[r] * call.lse_s)[0] = acc(value)
        for r in range(w):
            l[r] = ZERO if l[r] == ZERO else ONE / l[r]
            c[r] = c[r] * l[r]
        if call.lse:
            for r in range(count):
                acc_ptr(dot_at + heads[r] * call.lse_dot_h + rows[r] * call.lse_dot_s)[0] = c[r]
        for d in range(dv):
            for r in range(w):
                x = d * w + r
                o_dot[x] = o_dot[x] - c[r] * o[x]
        row_addresses(table, call.out + b * call.out_b, call.out_h, call.out_s, heads, rows, w, count)
        write_rows(o, l, table, call.out_d, call.storage, rows_scratch, w, count, dv)
        row_addresses(table, call.out_dot + b * call.out_dot_b, call.out_dot_h, call.out_dot_s, heads, rows, w, count)
        write_rows(o_dot, l, table, call.out_dot_d, call.storage, rows_scratch, w, count, dv)

    @jit
    def attend(call, sequence, kv_head, first_tile, n_tiles, scratch):
        for t in range(n_tiles):
            attend_tile(call, scratch, sequence, kv_head, first_tile + t)

    return work_items(attend)
