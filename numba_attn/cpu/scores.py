"""Which pairs a tile of queries sees, and the one step scores -> modified -> hidden that every kernel calls.

A tile of queries is a table of int64 (`locate`): counts, then row index, head, first and end key of each lane. Where a
kernel asks for derivatives, the step keeps what the chain rule needs: the score before score_mod and the derivatives of
score_mod and of softcap.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np

from ..philox import build as build_philox
from . import tiles
from .call import OPEN
from .compile import inner, outlined
from .simd import (
    address_of,
    any_bit,
    call_address,
    i32_ptr,
    i64_ptr,
    load,
    load_bits,
    prefetch,
    select,
    splat,
    store,
    store_bytes,
    u8_ptr,
)
from .target import MATH

TILE_INFO = 8  # counts in a tile's table
NONE, ALL, SOME = 0, 1, 2  # visible pairs of a tile with a block of keys


def info_size(w: int) -> int:
    """Numbers in the table of a tile of w queries."""
    return TILE_INFO + 4 * w


@cache
def build(elem: str, derivatives: bool = False) -> SimpleNamespace:
    """The functions for accumulation type "f32" or "f64", to be inlined into kernels; derivatives: see above."""
    jit = inner
    base = tiles.build(elem)
    L, W, acc, acc_ptr = base.L, base.W, base.acc, base.acc_ptr
    scores, read_rows, row_addresses, gather_bytes = base.scores, base.read_rows, base.row_addresses, base.gather_bytes
    all_finite = base.all_finite
    ZERO, ONE, NEG_INF = acc(0), acc(1), acc(-np.inf)
    tanh = MATH[elem].tanh

    # ------------------------------------------------------------ hidden pairs

    @outlined
    def hide(s, visible, w, first, last):
        """-inf where the byte of visible is 0, whatever stood there."""
        for x in range(first * w, last * w, L):
            store(s + x, select(load_bits(visible + x, L), load(s + x, L), splat(NEG_INF, L)))

    @jit
    def lane_bounds(lo, hi, j0, w, block, bounds):
        """Each lane's first and end key, counted from the block's start, as 32-bit numbers."""
        for r in range(w):
            bounds[r] = min(max(lo[r] - j0, 0), block)
            bounds[w + r] = min(max(hi[r] - j0, 0), block)

    @jit
    def hide_outside(s, w, first, last, bounds):
        """-inf where a lane's interval does not hold the key: hide() without bytes."""
        for c in range(0, w, L):
            low, high = load(bounds + c, L), load(bounds + (w + c), L)
            for j in range(first, last):
                at, row = splat(np.int32(j), L), s + (j * w + c)
                store(row, select((low <= at) & (at < high), load(row, L), splat(NEG_INF, L)))

    @outlined
    def interval_bytes(visible, w, first, last, bounds):
        """visible[j, lane]: whether the lane's interval holds the key."""
        for c in range(0, w, L):
            low, high = load(bounds + c, L), load(bounds + (w + c), L)
            for j in range(first, last):
                at = splat(np.int32(j), L)
                store_bytes(visible + (j * w + c), (low <= at) & (at < high))

    # ------------------------------------------------------------ pair masks and modifiers

    @outlined
    def mask_bytes(call, n, b, heads, rows, w, count, key, keys, table, seen, visible):
        """visible &= the n-th bool array."""
        spec = i64_ptr(call.masks) + 5 * n
        row_addresses(table, spec[0] + b * spec[1] + key * spec[4], spec[2], spec[3], heads, rows, w, count)
        if spec[4] == 1:
            gather_bytes(table, seen, w, keys)
        else:
            for r in range(w):
                for j in range(keys):
                    seen[j * w + r] = u8_ptr(table[r] + j * spec[4])[0]
        for x in range(keys * w):
            visible[x] = visible[x] if seen[x] else 0

    @outlined
    def segment_bytes(call, n, b, rows, w, count, key, keys, visible):
        spec = i64_ptr(call.segments) + 4 * n
        q_ids, k_ids = i64_ptr(spec[0] + b * spec[1]), i64_ptr(spec[2] + b * spec[3]) + key
        for r in range(w):
            own = q_ids[rows[min(r, count - 1)]]
            for j in range(keys):
                if k_ids[j] != own:
                    visible[j * w + r] = 0

    @jit
    def clear_hidden(s, x, w, first, last):
        """0 in x for the pairs that s hides."""
        for n in range(first * w, last * w, L):
            store(x + n, select(load(s + n, L) == splat(NEG_INF, L), splat(ZERO, L), load(x + n, L)))

    @jit
    def same_head(heads, r, count):
        """The end of the run of lanes that share lane r's head: users' functions are called a run at a time."""
        end = r + 1
        while end < count and heads[end] == heads[r]:
            end += 1
        return end

    @outlined
    def mod_calls(fn, aux, target, b, heads, rows, w, count, key, keys):
        """fn over the tile, one call a run of lanes that share a head: fn(target, w, lanes, b, h, i0, key, keys,
        aux)."""
        r = 0
        while r < count:
            end = same_head(heads, r, count)
            call_address(fn, address_of(target + r), w, end - r, b, heads[r], rows[r], key, keys, aux)
            r = end

    @outlined
    def slope_calls(fn, aux, target, slope, b, heads, rows, w, count, key, keys):
        """mod_calls() for a function that also writes its derivative: fn(target, slope, w, lanes, ...)."""
        r = 0
        while r < count:
            end = same_head(heads, r, count)
            at, to = address_of(target + r), address_of(slope + r)
            call_address(fn, at, to, w, end - r, b, heads[r], rows[r], key, keys, aux)
            r = end

    @outlined
    def softcap(s, w, first, last, scale_in, scale_out):
        """c tanh(s / c)."""
        for x in range(first * w, last * w):
            s[x] = acc(scale_out) * tanh(s[x] * acc(scale_in))

    @outlined
    def softcap_slopes(s, curve, w, first, last, scale_in, scale_out):
        """softcap() that keeps its derivative, 1 - tanh(s / c)**2."""
        for x in range(first * w, last * w):
            t = tanh(s[x] * acc(scale_in))
            s[x] = acc(scale_out) * t
            curve[x] = ONE - t * t

    @outlined
    def add_bias(s, bias, w, first, last, unit):
        for x in range(first * w, last * w):
            s[x] = s[x] + bias[x] * acc(unit)

    @outlined
    def add_alibi(s, slopes, position, w, first, last):
        """s -= slope |i + offset - j|; slopes carry the unit; position is relative to the block."""
        for j in range(first, last):
            row = s + j * w
            for r in range(w):
                row[r] = row[r] - slopes[r] * abs(position[r] - acc(j))

    philox_word = build_philox(jit)

    @outlined
    def dropout(call, p, b, heads, rows, w, count, key, first, last):
        """Weights of dropped pairs become 0, the others are divided by the chance to stay; l is summed already."""
        k0, k1 = np.uint64(call.seed) & np.uint64(0xFFFFFFFF), np.uint64(call.seed) >> np.uint64(32)
        scale = acc(call.drop_scale)
        for j in range(first, last):
            block, word = np.uint64(key + j) >> np.uint64(2), (key + j) & 3
            for r in range(count):
                x = philox_word(np.uint64(rows[r]), block, np.uint64(heads[r]), np.uint64(b), k0, k1, word)
                p[j * w + r] = p[j * w + r] * scale if x >= np.uint64(call.drop_below) else ZERO

    # ------------------------------------------------------------ one tile of queries

    # Per tile, in a table of int64: counts, then W numbers each of row index, head, first and end key.
    COUNT, WIDTH, LOW, HIGH, INNER_LOW, INNER_HIGH, FINITE, FINITE_2, ROWS_AT = 0, 1, 2, 3, 4, 5, 6, 7, TILE_INFO
    HEADS_AT, LO_AT, HI_AT, INFO = ROWS_AT + W, ROWS_AT + 2 * W, ROWS_AT + 3 * W, info_size(W)

    @outlined
    def locate(call, sequence, kv_head, index, info):
        """Which queries tile `index` of a (sequence, key head) holds, and which keys they may see, counted from the
        sequence's start."""
        b, q_start, q_len, k_start, k_len = sequence[0], sequence[1], sequence[2], sequence[3], sequence[4]
        offset, prefix, group = sequence[5], sequence[6], call.group
        rows, heads, lo, hi = info + ROWS_AT, info + HEADS_AT, info + LO_AT, info + HI_AT
        size = call.tile_rows
        if q_len < size:  # short: the queries of a group's heads lie side by side
            first = index * size
            count = min(size, group * q_len - first)
            head, row = first // q_len, first % q_len
            for r in range(count):
                heads[r], rows[r] = kv_head * group + head, row
                row += 1
                if row == q_len:
                    head, row = head + 1, 0
        else:  # a tile lies in one head; the heads of a group take turns
            first = (index // group) * size
            count = min(size, q_len - first)
            for r in range(count):
                heads[r] = kv_head * group + index % group
                rows[r] = first + r
        width = (count + L - 1) // L * L
        low, high, inner_low, inner_high = k_len, 0, 0, k_len
        for r in range(count):
            i = rows[r] + offset
            start = max(0, i - call.left) if call.left < OPEN else 0
            end = k_len
            if call.has_prefix:
                end = min(end, max(prefix, i + 1))
            if call.right < OPEN:
                end = min(end, i + call.right + 1)
            if call.start:
                at = b * call.bounds_b + heads[r] * call.bounds_h + (q_start + rows[r]) * call.bounds_s
                start = max(start, i64_ptr(call.start + at)[0] - k_start)
                end = min(end, i64_ptr(call.end + at)[0] - k_start)
            if start >= end:
                start, end = k_len, k_len  # sees nothing
                inner_high = 0
            else:
                low, high = min(low, start), max(high, end)
                inner_low, inner_high = max(inner_low, start), min(inner_high, end)
            lo[r], hi[r] = start, end
            rows[r] += q_start
        for r in range(count, width):  # idle lanes repeat the last query
            rows[r], heads[r], lo[r], hi[r] = rows[count - 1], heads[count - 1], lo[count - 1], hi[count - 1]
        info[COUNT], info[WIDTH], info[LOW], info[HIGH], info[INNER_LOW], info[INNER_HIGH] = (
            count,
            width,
            low,
            high,
            inner_low,
            inner_high,
        )

    @jit
    def prefetch_queries(base, stride_h, stride_i, info, size):
        """Ask for a tile's rows of q ahead of the transposes, which would wait for one line after another.

        Halves the time of `gather` where q comes from memory; the same for rows of out gained nothing.
        """
        rows, heads = info + ROWS_AT, info + HEADS_AT
        for r in range(info[COUNT]):
            at = base + heads[r] * stride_h + rows[r] * stride_i
            for x in range(0, size, 64):
                prefetch(at + x)

    @jit
    def key_range(info, j0, keys):
        """The keys of the block at j0 that a tile needs, first on a multiple of 8."""
        first, last = max(info[LOW] - j0, 0) & ~7, min(info[HIGH] - j0, keys)
        return first, (min((last + 7) & ~7, keys) if first < last else first)

    @jit
    def load_queries(call, scratch, b, info, q):
        """A tile's queries, transposed and scaled: q[c, lane]."""
        w, n, table = info[WIDTH], call.qk_dim, i64_ptr(scratch + call.at_table)
        heads, rows = info + HEADS_AT, info + ROWS_AT
        row_addresses(table, call.q + b * call.q_b, call.q_h, call.q_s, heads, rows, w, info[COUNT])
        read_rows(table, call.q_d, call.storage, acc_ptr(scratch + call.at_rows), q, w, n)
        factor = acc(call.q_scale)
        for x in range(n * w):
            q[x] = q[x] * factor
        info[FINITE] = all_finite(q, n * w)

    # ------------------------------------------------------------ the step

    @jit
    def score_block(call, scratch, b, info, j0, first, last, key, k, k_finite, q, s, bytes_wanted, offset):
        """Final scores, in log2 units, of keys first:last of the block at j0 (sequence) and key (array): NONE, ALL or
        SOME.

        s holds -inf for exactly the hidden pairs, and is not written where the answer is NONE. With SOME and
        bytes_wanted, the bytes at at_visible are 0 for those.
        """
        w, count = info[WIDTH], info[COUNT]
        rows, heads = info + ROWS_AT, info + HEADS_AT
        visible, bounds = u8_ptr(scratch + call.at_visible), i32_ptr(scratch + call.at_bounds)
        partial = j0 + first < info[INNER_LOW] or j0 + last > info[INNER_HIGH]
        pairwise = call.n_masks + call.n_segments + call.n_mask_mods > 0
        pairwise = pairwise or call.bias != 0
        bytes_filled = pairwise or (partial and bytes_wanted)
        if partial or bytes_filled:
            lane_bounds(info + LO_AT, info + HI_AT, j0, w, call.block, bounds)
        if bytes_filled:
            interval_bytes(visible, w, first, last, bounds)
        keys = last - first
        bias = acc_ptr(scratch + call.at_bias)
        if pairwise:
            table, seen = i64_ptr(scratch + call.at_table), u8_ptr(scratch + call.at_seen)
            part = visible + first * w
            for n in range(call.n_masks):
                mask_bytes(call, n, b, heads, rows, w, count, key + first, keys, table, seen, part)
            for n in range(call.n_segments):
                segment_bytes(call, n, b, rows, w, count, key + first, keys, part)
            for n in range(call.n_mask_mods):
                spec = i64_ptr(call.mask_mods) + 2 * n
                mod_calls(spec[0], spec[1], part, b, heads, rows, w, count, key + first, keys)
            if call.bias:
                at = call.bias + b * call.bias_b + (key + first) * call.bias_j
                tile = bias + first * w
                row_addresses(table, at, call.bias_h, call.bias_i, heads, rows, w, count)
                read_rows(table, call.bias_j, call.bias_storage, acc_ptr(scratch + call.at_rows), tile, w, keys)
                for x in range(keys * w):
                    part[x] = 0 if tile[x] == NEG_INF else part[x]
            total = 0
            for j in range(keys):
                for r in range(count):
                    total += np.int64(part[j * w + r] != 0)
            if total == 0:
                return NONE
            partial = total < keys * count
        scores(k, call.qk_dim, q, s, w, first, last, call.qk_dim)
        if not k_finite or not info[FINITE]:
            # an infinite feature has no finite answer: its -inf must not pass for a hidden pair
            for x in range(first * w, last * w):
                s[x] = s[x] + (s[x] - s[x])
        if call.use_softcap:
            if derivatives:
                curve = acc_ptr(scratch + call.at_curve)
                softcap_slopes(s, curve, w, first, last, call.softcap_in, call.softcap_out)
            else:
                softcap(s, w, first, last, call.softcap_in, call.softcap_out)
        if call.bias:
            add_bias(s, bias, w, first, last, call.unit)
        if call.slopes:
            lanes = acc_ptr(scratch + call.at_lanes)
            slopes = acc_ptr(call.slopes + b * call.slopes_b)
            for r in range(w):
                lanes[r] = slopes[heads[r]] * acc(call.unit)
                lanes[W + r] = acc(rows[r] + offset - j0)
            add_alibi(s, lanes, lanes + W, w, first, last)
        if call.score_mod:
            part_s = s + first * w
            if derivatives:
                raw, slope = acc_ptr(scratch + call.at_raw), acc_ptr(scratch + call.at_slope) + first * w
                for x in range(first * w, last * w):
                    raw[x] = s[x]
                slope_calls(call.score_mod, call.score_aux, part_s, slope, b, heads, rows, w, count, key + first, keys)
            else:
                mod_calls(call.score_mod, call.score_aux, part_s, b, heads, rows, w, count, key + first, keys)
            any_hidden = False
            for x in range(first * w, last * w, L):
                any_hidden = any_hidden or any_bit(load(s + x, L) == splat(NEG_INF, L))
            if any_hidden:  # score_mod hid a pair by returning -inf
                if not bytes_filled:
                    lane_bounds(info + LO_AT, info + HI_AT, j0, w, call.block, bounds)
                    interval_bytes(visible, w, first, last, bounds)
                    bytes_filled = True
                partial = True
                for x in range(first * w, last * w):
                    visible[x] = 0 if s[x] == NEG_INF else visible[x]
        if partial and bytes_filled:
            hide(s, visible, w, first, last)
        elif partial:  # only keys before the last lane's first, or after the first lane's end, are hidden
            inner_low = min(max(info[INNER_LOW] - j0, first), last)
            inner_high = max(min(info[INNER_HIGH] - j0, last), first)
            if inner_low < inner_high:
                hide_outside(s, w, first, inner_low, bounds)
                hide_outside(s, w, inner_high, last, bounds)
            else:
                hide_outside(s, w, first, last, bounds)
        return SOME if partial else ALL

    return SimpleNamespace(
        COUNT=COUNT,
        WIDTH=WIDTH,
        LOW=LOW,
        HIGH=HIGH,
        INNER_LOW=INNER_LOW,
        INNER_HIGH=INNER_HIGH,
        FINITE=FINITE,
        FINITE_2=FINITE_2,
        ROWS_AT=ROWS_AT,
        HEADS_AT=HEADS_AT,
        INFO=INFO,
        locate=locate,
        load_queries=load_queries,
        key_range=key_range,
        prefetch_queries=prefetch_queries,
        clear_hidden=clear_hidden,
        same_head=same_head,
        dropout=dropout,
        score_block=score_block,
    )
