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
from numba.core import types
from numba.extending import intrinsic
from numba.np import numpy_support

from .. import online
from ..online import LN2, LOG2E
from . import simd
from .compile import inner
from .modifiers import MATH
from .simd import (
    ROW,
    address_of,
    any_bit,
    call_address,
    exp2,
    f32_ptr,
    f64_ptr,
    fetch_add,
    fold_tile,
    i32_ptr,
    i64_ptr,
    load,
    load_bits,
    maximum,
    multiply_add,
    outer,
    outer_visible,
    prefetch,
    select,
    splat,
    store,
    store_bytes,
    store_tile,
    transpose_in,
    transpose_out,
    u8_ptr,
    u16_ptr,
    zeros,
)

# Storage codes of q, k, v, out and bias.
F32, F64, F16, BF16 = 0, 1, 2, 3
STORAGE = {"float32": F32, "float64": F64, "float16": F16, "bfloat16": BF16}

OPEN = 2**62  # an absent window bound, as in plan.py
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


def _fields(prefix, names):
    return [(prefix + n, np.int64) for n in names.split()]


# What a kernel call reads: addresses, byte strides, sizes. 8-byte fields only.
CALL = np.dtype(
    _fields("", "q k v out lse storage")
    + _fields("q_", "b h s d")
    + _fields("k_", "b h s d")
    + _fields("v_", "b h s d")
    + _fields("out_", "b h s d")
    + _fields("lse_", "b h s")
    + _fields(
        "", "group kv_heads qk_dim v_dim block tile_rows tiles fine sequences n_sequences first_item n_items counter"
    )
    + _fields("", "left right has_prefix start end bounds_b bounds_h bounds_s")
    + _fields("", "bias bias_storage")
    + _fields("bias_", "b h i j")
    + _fields(
        "",
        "masks n_masks segments n_segments mask_mods n_mask_mods score_mod score_aux slopes slopes_b sinks use_softcap",
    )
    + _fields("", "drop drop_below seed")
    + _fields("at_", "s q o state sums infos table bounds visible seen bias rows k v")
    + _fields("", "scratch")
    + [(n, np.float64) for n in ("q_scale", "softcap_in", "softcap_out", "unit", "drop_scale")]
)

SEQUENCE = 7  # columns of the sequence table: batch, q_start, q_len, k_start, k_len, offset, prefix


def tile_rows(elem: str) -> int:
    """Queries of a full tile."""
    return ROW.nr * ROW.lanes(elem)


TILE_INFO = 8  # counts in a tile's table, before row index, head, first and end key of each query


def scratch_layout(
    elem: str, tiles: int, qk_dim: int, v_dim: int, block: int, long: bool, bias: bool
) -> dict[str, int]:
    """Byte offset of each buffer in a thread's scratch memory, and its size as "scratch".

    Each starts on a 64-byte boundary: the largest single gain in speed (the QK loop reaches 92 % of peak with it, 80
    without).
    """
    w, size = tile_rows(elem), 4 if elem == "f32" else 8
    sizes = {
        "s": block * w * size,
        "q": tiles * qk_dim * w * size,
        "o": tiles * v_dim * w * size,
        "state": (4 + 2 * tiles) * w * size,
        "sums": tiles * (v_dim + 4) * w * size * long,
        "infos": tiles * (TILE_INFO + 4 * w) * 8,
        "table": 2 * w * 8,
        "bounds": 2 * w * 4,
        "visible": block * w,
        "seen": block * w,
        "bias": block * w * size * bias,
        "rows": max(qk_dim, v_dim, block) * w * size,
        "k": block * qk_dim * size,
        "v": block * v_dim * size,
    }
    layout, at = {}, 0
    for name, n in sizes.items():
        layout["at_" + name] = at
        at += n + 63 & ~63
    return layout | {"scratch": at}


@intrinsic
def _call_record(typingctx, address):
    """The CALL record at an address."""
    record = numpy_support.from_dtype(CALL)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(record))

    return record(types.intp), codegen


def build(elem: str):
    """drain(call_address): the worker for one accumulation type, "f32" or "f64", as plain Python functions under
    njit."""
    jit = inner
    L = ROW.lanes(elem)
    MR, NR = ROW.mr, ROW.nr
    W = L * NR
    acc_ptr = f32_ptr if elem == "f32" else f64_ptr
    acc = np.float32 if elem == "f32" else np.float64
    ACC_BYTES = 4 if elem == "f32" else 8
    ACC_STORAGE = F32 if elem == "f32" else F64
    ZERO, ONE, NEG_INF = acc(0), acc(1), acc(-np.inf)

    @jit
    def equal_minus_inf(m):
        return m == splat(NEG_INF, L)

    @jit
    def not_zero(x):
        return any_bit(x != splat(ZERO, L))

    @jit
    def zeros_like(m):
        return splat(ZERO, L)

    tanh = MATH[elem].tanh
    shared = online.build(jit, exp2, select, equal_minus_inf, zeros_like)
    finite_or_zero, rescale = shared.finite_or_zero, shared.rescale

    # ------------------------------------------------------------ products

    def tile_products(mr, nr):
        """The inner loops for a register tile of mr rows by nr vectors of queries."""
        w = nr * L

        @jit
        def score_rows(k, ldk, q, s, n):
            """s[i, :] = sum_c k[i, c] q[c, :] for mr keys i."""
            t = zeros(k, L, mr, nr)
            for c in range(0, n - 3, 4):
                a, b = k + c, q + c * w
                t = outer(t, a, ldk, b)
                t = outer(t, a + 1, ldk, b + w)
                t = outer(t, a + 2, ldk, b + 2 * w)
                t = outer(t, a + 3, ldk, b + 3 * w)
            for c in range(n & ~3, n):
                t = outer(t, k + c, ldk, q + c * w)
            store_tile(t, s, w)

        @jit
        def value_rows(v, ldv, p, o, alpha, n, skip):
            """o[i, :] = o[i, :] alpha + sum_j v[j, i] p[j, :] for mr dimensions i."""
            t = zeros(v, L, mr, nr)
            for j in range(0, n - 3, 4):
                a, b = v + j * ldv, p + j * w
                t = outer(t, a, 1, b)
                t = outer(t, a + ldv, 1, b + w)
                t = outer(t, a + 2 * ldv, 1, b + 2 * w)
                t = outer(t, a + 3 * ldv, 1, b + 3 * w)
            for j in range(n & ~3, n):
                t = outer(t, v + j * ldv, 1, p + j * w)
            fold_tile(t, o, w, alpha, skip)

        @jit
        def visible_value_rows(v, ldv, p, visible, o, alpha, n, skip):
            t = zeros(v, L, mr, nr)
            for j in range(0, n - 1, 2):
                a, b, seen = v + j * ldv, p + j * w, visible + j * w
                t = outer_visible(t, a, 1, b, seen)
                t = outer_visible(t, a + ldv, 1, b + w, seen + w)
            if n & 1:
                t = outer_visible(t, v + (n - 1) * ldv, 1, p + (n - 1) * w, visible + (n - 1) * w)
            fold_tile(t, o, w, alpha, skip)

        return score_rows, value_rows, visible_value_rows

    # By width: a tile is 1 to 3 vectors of queries wide. (Rows of the SIMD table with another NR would need more cases
    # here.)
    (score_1, value_1, visible_1), (score_2, value_2, visible_2), (score_3, value_3, visible_3) = (
        tile_products(MR, nr) for nr in (1, 2, 3)
    )

    @jit
    def score_rows(k, ldk, q, s, w, n):
        if w == 3 * L:
            score_3(k, ldk, q, s, n)
        elif w == 2 * L:
            score_2(k, ldk, q, s, n)
        else:
            score_1(k, ldk, q, s, n)

    @jit
    def value_rows(v, ldv, p, o, w, alpha, n, skip):
        if w == 3 * L:
            value_3(v, ldv, p, o, alpha, n, skip)
        elif w == 2 * L:
            value_2(v, ldv, p, o, alpha, n, skip)
        else:
            value_1(v, ldv, p, o, alpha, n, skip)

    @jit
    def visible_value_rows(v, ldv, p, visible, o, w, alpha, n, skip):
        if w == 3 * L:
            visible_3(v, ldv, p, visible, o, alpha, n, skip)
        elif w == 2 * L:
            visible_2(v, ldv, p, visible, o, alpha, n, skip)
        else:
            visible_1(v, ldv, p, visible, o, alpha, n, skip)

    @jit
    def score_row(k, q, s, w, n):
        """One key alone: blocks of under MR keys."""
        for r in range(0, w, L):
            t = zeros(k, L, 1, 1)
            for c in range(n):
                t = outer(t, k + c, 0, q + (c * w + r))
            store_tile(t, s + r, w)

    @jit
    def visible_value_row(v, ldv, p, visible, o, w, alpha, n):
        """One dimension alone: head sizes under MR."""
        for r in range(0, w, L):
            t = zeros(v, L, 1, 1)
            for j in range(n):
                t = outer_visible(t, v + j * ldv, 0, p + (j * w + r), visible + (j * w + r))
            fold_tile(t, o + r, w, alpha + r, 0)

    @jit
    def scores(k, ldk, q, s, w, first, last, n):
        """S'[first:last] over n dimensions; first is a multiple of MR; the last tile reaches back over rows that are
        done."""
        if last >= MR:
            for j in range(first, last, MR):
                at = min(j, last - MR)
                score_rows(k + at * ldk, ldk, q, s + at * w, w, n)
        else:
            for j in range(first, last):
                score_row(k + j * ldk, q, s + j * w, w, n)

    @jit
    def values(v, ldv, p, visible, masked, o, alpha, w, first, last, n):
        """O' over keys first:last and n dimensions.

        Hidden pairs have p = 0, which changes nothing where v is finite; masked is for a block of keys with a NaN or
        infinity in v.
        """
        v, p, visible, keys = v + first * ldv, p + first * w, visible + first * w, last - first
        if n < MR:
            if not masked:
                for x in range(keys * w):
                    visible[x] = 255
            for d in range(n):
                visible_value_row(v + d, ldv, p, visible, o + d * w, w, alpha, keys)
            return
        for d in range(0, n, MR):
            at = min(d, n - MR)
            if masked:
                visible_value_rows(v + at, ldv, p, visible, o + at * w, w, alpha, keys, d - at)
            else:
                value_rows(v + at, ldv, p, o + at * w, w, alpha, keys, d - at)

    # ------------------------------------------------------------ softmax

    @jit
    def online_softmax(s, w, first, last, m, l, alpha):
        """s: scores in, weights p out; m, l updated; alpha: what the old sums are worth now.

        first and last are multiples of 4 (rows past the end hold -inf): which of the four partial sums a key goes to
        depends on its index alone, so the bits of a row do not depend on the range that its tile needs.
        """
        for c in range(0, w, L):
            a0 = load(s + (first * w + c), L)
            a1 = load(s + ((first + 1) * w + c), L)
            a2 = load(s + ((first + 2) * w + c), L)
            a3 = load(s + ((first + 3) * w + c), L)
            for j in range(first + 4, last, 4):
                row = s + (j * w + c)
                a0 = maximum(load(row, L), a0)
                a1 = maximum(load(row + w, L), a1)
                a2 = maximum(load(row + 2 * w, L), a2)
                a3 = maximum(load(row + 3 * w, L), a3)
            old = load(m + c, L)
            new = maximum(maximum(maximum(a0, a1), maximum(a2, a3)), old)
            store(alpha + c, rescale(old, new))
            store(m + c, new)
        for c in range(0, w, L):
            safe = finite_or_zero(load(m + c, L))
            s0 = splat(ZERO, L)
            s1 = s0
            s2 = s0
            s3 = s0
            for j in range(first, last, 4):
                row = s + (j * w + c)
                e0 = exp2(load(row, L) - safe)
                e1 = exp2(load(row + w, L) - safe)
                e2 = exp2(load(row + 2 * w, L) - safe)
                e3 = exp2(load(row + 3 * w, L) - safe)
                store(row, e0)
                store(row + w, e1)
                store(row + 2 * w, e2)
                store(row + 3 * w, e3)
                s0 = s0 + e0
                s1 = s1 + e1
                s2 = s2 + e2
                s3 = s3 + e3
            store(l + c, load(l + c, L) * load(alpha + c, L) + ((s0 + s1) + (s2 + s3)))

    @jit
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

    @jit
    def interval_bytes(visible, w, first, last, bounds):
        """visible[j, lane]: whether the lane's interval holds the key."""
        for c in range(0, w, L):
            low, high = load(bounds + c, L), load(bounds + (w + c), L)
            for j in range(first, last):
                at = splat(np.int32(j), L)
                store_bytes(visible + (j * w + c), (low <= at) & (at < high))

    # ------------------------------------------------------------ reading and writing the caller's arrays

    @jit
    def read_row(address, stride, storage, dst, n):
        """n numbers of any storage type, stride bytes apart, as accumulation type."""
        if storage == F32:
            if stride == 4:
                p = f32_ptr(address)
                for c in range(n):
                    dst[c] = acc(p[c])
            else:
                for c in range(n):
                    dst[c] = acc(f32_ptr(address + c * stride)[0])
        elif storage == F64:
            for c in range(n):
                dst[c] = acc(f64_ptr(address + c * stride)[0])
        elif storage == F16:
            if stride == 2:
                h = u16_ptr(address)
                for c in range(n):
                    dst[c] = acc(simd.half_to_float(h[c]))
            else:
                for c in range(n):
                    dst[c] = acc(simd.half_to_float(u16_ptr(address + c * stride)[0]))
        else:
            if stride == 2:
                h = u16_ptr(address)
                for c in range(n):
                    dst[c] = acc(simd.bfloat_to_float(h[c]))
            else:
                for c in range(n):
                    dst[c] = acc(simd.bfloat_to_float(u16_ptr(address + c * stride)[0]))

    @jit
    def write_row(src, address, stride, storage, n):
        """The inverse of read_row, for the storage types of out: the accumulation type, float16, bfloat16."""
        if storage == ACC_STORAGE:
            for c in range(n):
                acc_ptr(address + c * stride)[0] = src[c]
        elif storage == F16:
            for c in range(n):
                u16_ptr(address + c * stride)[0] = simd.float_to_half(np.float32(src[c]))
        else:
            for c in range(n):
                u16_ptr(address + c * stride)[0] = simd.float_to_bfloat(np.float32(src[c]))

    @jit
    def gather(addresses, dst, w, n):
        """dst[c, r] = (row at addresses[r])[c] for c < n: rows of accumulation type, transposed."""
        whole = n - n % L
        for r in range(0, w, L):
            for c in range(0, whole, L):
                transpose_in(addresses + r, c, dst + (c * w + r), w, L)
        for r in range(w):
            row = acc_ptr(addresses[r])
            for c in range(whole, n):
                dst[c * w + r] = row[c]

    @jit
    def gather_bytes(addresses, dst, w, n):
        whole = n - n % L
        for r in range(0, w, L):
            for c in range(0, whole, L):
                transpose_in(addresses + r, c, dst + (c * w + r), w, L)
        for r in range(w):
            row = u8_ptr(addresses[r])
            for c in range(whole, n):
                dst[c * w + r] = row[c]

    @jit
    def read_rows(addresses, stride, storage, rows, dst, w, n):
        """gather() for any storage and column stride; rows: scratch of w * n."""
        if storage != ACC_STORAGE or stride != ACC_BYTES:
            for r in range(w):
                read_row(addresses[r], stride, storage, rows + r * n, n)
                addresses[r] = address_of(rows + r * n)
        gather(addresses, dst, w, n)

    @jit
    def write_rows(src, factor, addresses, stride, storage, rows, w, count, n):
        """(row at addresses[r])[c] = src[c, r] * factor[r] for r < count."""
        whole = n - n % L
        direct = storage == ACC_STORAGE and stride == ACC_BYTES
        if not direct:
            for r in range(w):  # into row-major scratch first; the targets wait behind it in the table
                addresses[W + r] = addresses[r]
                addresses[r] = address_of(rows + r * n)
        for r in range(0, w, L):
            for c in range(0, whole, L):
                transpose_out(src + (c * w + r), w, factor + r, addresses + r, c, count - r, L)
        for r in range(count):
            row = acc_ptr(addresses[r])
            for c in range(whole, n):
                row[c] = src[c * w + r] * factor[r] + ZERO
        if not direct:
            for r in range(count):
                write_row(rows + r * n, addresses[W + r], stride, storage, n)

    @jit
    def all_finite(p, n):
        """Whether n numbers are finite: x * 0 is 0 for those, NaN for the others."""
        zero = splat(ZERO, L)
        a0 = zero
        a1 = zero
        a2 = zero
        a3 = zero
        whole = n - n % (4 * L)
        for x in range(0, whole, 4 * L):
            a0 = multiply_add(load(p + x, L), zero, a0)
            a1 = multiply_add(load(p + (x + L), L), zero, a1)
            a2 = multiply_add(load(p + (x + 2 * L), L), zero, a2)
            a3 = multiply_add(load(p + (x + 3 * L), L), zero, a3)
        bad = not_zero((a0 + a1) + (a2 + a3))
        for x in range(whole, n):
            bad = bad or p[x] - p[x] != ZERO
        return not bad

    @jit
    def copy_block(address, row_stride, stride, storage, dst, rows, n):
        for j in range(rows):
            read_row(address + j * row_stride, stride, storage, dst + j * n, n)

    # ------------------------------------------------------------ pair masks and modifiers

    @jit
    def row_addresses(table, base, stride_h, stride_i, heads, rows, w, count):
        for r in range(w):
            x = min(r, count - 1)
            table[r] = base + heads[x] * stride_h + rows[x] * stride_i

    @jit
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

    @jit
    def segment_bytes(call, n, b, rows, w, count, key, keys, visible):
        spec = i64_ptr(call.segments) + 4 * n
        q_ids, k_ids = i64_ptr(spec[0] + b * spec[1]), i64_ptr(spec[2] + b * spec[3]) + key
        for r in range(w):
            own = q_ids[rows[min(r, count - 1)]]
            for j in range(keys):
                if k_ids[j] != own:
                    visible[j * w + r] = 0

    @jit
    def mod_calls(fn, aux, target, b, heads, rows, w, count, key, keys):
        """fn over the tile, one call a run of lanes that share a head: fn(target, w, lanes, b, h, i0, key, keys,
        aux)."""
        r = 0
        while r < count:
            end = r + 1
            while end < count and heads[end] == heads[r]:
                end += 1
            call_address(fn, address_of(target + r), w, end - r, b, heads[r], rows[r], key, keys, aux)
            r = end

    @jit
    def softcap(s, w, first, last, scale_in, scale_out):
        """c tanh(s / c)."""
        for x in range(first * w, last * w):
            s[x] = acc(scale_out) * tanh(s[x] * acc(scale_in))

    @jit
    def add_bias(s, bias, w, first, last, unit):
        for x in range(first * w, last * w):
            s[x] = s[x] + bias[x] * acc(unit)

    @jit
    def add_alibi(s, slopes, position, w, first, last):
        """s -= slope |i + offset - j|; slopes carry the unit; position is relative to the block."""
        for j in range(first, last):
            row = s + j * w
            for r in range(w):
                row[r] = row[r] - slopes[r] * abs(position[r] - acc(j))

    @jit
    def philox_word(c0, c1, c2, c3, k0, k1, word):
        """Philox4x32-10 (Salmon et al. 2011): one 32-bit word of the block at counter (c0, c1, c2, c3)."""
        low = np.uint64(0xFFFFFFFF)
        for _ in range(10):
            p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
            c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
        return c0 if word == 0 else c1 if word == 1 else c2 if word == 2 else c3

    @jit
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
    COUNT, WIDTH, LOW, HIGH, INNER_LOW, INNER_HIGH, FINITE, ROWS_AT = 0, 1, 2, 3, 4, 5, 6, TILE_INFO
    HEADS_AT, LO_AT, HI_AT, INFO = ROWS_AT + W, ROWS_AT + 2 * W, ROWS_AT + 3 * W, ROWS_AT + 4 * W

    @jit
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
    def begin(call, b, info, table, rows_scratch, q, o, m, l):
        w, count, n = info[WIDTH], info[COUNT], call.qk_dim
        heads = info + HEADS_AT
        row_addresses(table, call.q + b * call.q_b, call.q_h, call.q_s, heads, info + ROWS_AT, w, count)
        read_rows(table, call.q_d, call.storage, rows_scratch, q, w, n)
        factor = acc(call.q_scale)
        for x in range(n * w):
            q[x] = q[x] * factor
        info[FINITE] = all_finite(q, n * w)
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
    def finish(call, b, info, table, rows_scratch, o, m, l):
        """out = O' / l, 0 for an empty row; lse = m + log l in natural units.

        -0 becomes +0 on the way out: a block of which a row sees nothing may turn -0 into +0, and a row's bits may not
        depend on that.
        """
        w, count = info[WIDTH], info[COUNT]
        rows, heads = info + ROWS_AT, info + HEADS_AT
        if call.lse:
            base = call.lse + b * call.lse_b
            for r in range(count):
                value = np.float64(m[r]) * LN2 + math.log(np.float64(l[r]))
                acc_ptr(base + heads[r] * call.lse_h + rows[r] * call.lse_s)[0] = acc(value)
        for r in range(w):
            l[r] = ZERO if l[r] == ZERO else ONE / l[r]
        row_addresses(table, call.out + b * call.out_b, call.out_h, call.out_s, heads, rows, w, count)
        write_rows(o, l, table, call.out_d, call.storage, rows_scratch, w, count, call.v_dim)

    @jit
    def attend_block(
        call,
        b,
        info,
        j0,
        first,
        last,
        key,
        k,
        ldk,
        k_finite,
        v,
        ldv,
        v_finite,
        q,
        o,
        m,
        l,
        s,
        visible,
        seen,
        bias,
        alpha,
        bounds,
        lanes,
        table,
        rows_scratch,
        offset,
    ):
        """Keys first:last of the block at j0 (sequence), key (array) into the state of one tile."""
        w, count = info[WIDTH], info[COUNT]
        rows, heads = info + ROWS_AT, info + HEADS_AT
        partial = j0 + first < info[INNER_LOW] or j0 + last > info[INNER_HIGH]
        pairwise = call.n_masks + call.n_segments + call.n_mask_mods > 0
        pairwise = pairwise or call.bias != 0
        bytes_filled = pairwise or (partial and not v_finite)
        if partial or bytes_filled:
            lane_bounds(info + LO_AT, info + HI_AT, j0, w, call.block, bounds)
        if bytes_filled:
            interval_bytes(visible, w, first, last, bounds)
        keys = last - first
        if pairwise:
            part = visible + first * w
            for n in range(call.n_masks):
                mask_bytes(call, n, b, heads, rows, w, count, key + first, keys, table, seen, part)
            for n in range(call.n_segments):
                segment_bytes(call, n, b, rows, w, count, key + first, keys, part)
            for n in range(call.n_mask_mods):
                spec = i64_ptr(call.mask_mods) + 2 * n
                mod_calls(spec[0], spec[1], part, b, heads, rows, w, count, key + first, keys)
            if call.bias:
                row_addresses(
                    table,
                    call.bias + b * call.bias_b + (key + first) * call.bias_j,
                    call.bias_h,
                    call.bias_i,
                    heads,
                    rows,
                    w,
                    count,
                )
                read_rows(table, call.bias_j, call.bias_storage, rows_scratch, bias + first * w, w, keys)
                tile = bias + first * w
                for x in range(keys * w):
                    part[x] = 0 if tile[x] == NEG_INF else part[x]
            total = 0
            for j in range(keys):
                for r in range(count):
                    total += np.int64(part[j * w + r] != 0)
            if total == 0:
                return
            partial = total < keys * count
        scores(k, ldk, q, s, w, first, last, call.qk_dim)
        if (
            not k_finite or not info[FINITE]
        ):  # an infinite feature has no finite answer: its -inf must not pass for a hidden pair
            for x in range(first * w, last * w):
                s[x] = s[x] + (s[x] - s[x])
        if call.use_softcap:
            softcap(s, w, first, last, call.softcap_in, call.softcap_out)
        if call.bias:
            add_bias(s, bias, w, first, last, call.unit)
        if call.slopes:
            slopes = acc_ptr(call.slopes + b * call.slopes_b)
            for r in range(w):
                lanes[r] = slopes[heads[r]] * acc(call.unit)
                lanes[W + r] = acc(rows[r] + offset - j0)
            add_alibi(s, lanes, lanes + W, w, first, last)
        if call.score_mod:
            mod_calls(call.score_mod, call.score_aux, s + first * w, b, heads, rows, w, count, key + first, keys)
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
            inner_low, inner_high = (
                min(max(info[INNER_LOW] - j0, first), last),
                max(min(info[INNER_HIGH] - j0, last), first),
            )
            if inner_low < inner_high:
                hide_outside(s, w, first, inner_low, bounds)
                hide_outside(s, w, inner_high, last, bounds)
            else:
                hide_outside(s, w, first, last, bounds)
        padded = (last + 3) & ~3
        for x in range(last * w, padded * w):
            s[x] = NEG_INF
        online_softmax(s, w, first & ~3, padded, m, l, alpha)
        if call.drop:
            dropout(call, s, b, heads, rows, w, count, key, first, last)
        values(v, ldv, s, visible, partial and not v_finite, o, alpha, w, first, last, call.v_dim)

    # ------------------------------------------------------------ work items

    @jit
    def key_range(info, j0, keys):
        """The keys of the block at j0 that a tile needs, first on a multiple of 8."""
        first, last = max(info[LOW] - j0, 0) & ~7, min(info[HIGH] - j0, keys)
        return first, (min((last + 7) & ~7, keys) if first < last else first)

    @jit
    def attend(call, sequence, kv_head, first_tile, n_tiles, scratch):
        """n_tiles query tiles of one (sequence, key head), together over the keys that any of them needs."""
        b, k_start, k_len, block = sequence[0], sequence[3], sequence[4], call.block
        qk, dv = call.qk_dim, call.v_dim
        long = k_len > FLUSH
        s, q_all, o_all = acc_ptr(scratch + call.at_s), acc_ptr(scratch + call.at_q), acc_ptr(scratch + call.at_o)
        alpha, o_sums = acc_ptr(scratch + call.at_state), acc_ptr(scratch + call.at_sums)
        infos, table, bounds = (
            i64_ptr(scratch + call.at_infos),
            i64_ptr(scratch + call.at_table),
            i32_ptr(scratch + call.at_bounds),
        )
        visible, seen, bias = (
            u8_ptr(scratch + call.at_visible),
            u8_ptr(scratch + call.at_seen),
            acc_ptr(scratch + call.at_bias),
        )
        rows_scratch, k_copy, v_copy = (
            acc_ptr(scratch + call.at_rows),
            acc_ptr(scratch + call.at_k),
            acc_ptr(scratch + call.at_v),
        )
        lanes, state = alpha + W, alpha + 4 * W  # W factors, 2 W numbers of ALiBi; then m and l of each tile

        low, high = k_len, 0
        item = ACC_BYTES if call.storage == ACC_STORAGE else 2
        for t in range(n_tiles):
            info = infos + t * INFO
            locate(call, sequence, kv_head, first_tile + t, info)
            low, high = min(low, info[LOW]), max(high, info[HIGH])
            prefetch_queries(call.q + b * call.q_b, call.q_h, call.q_s, info, qk * item)
        for t in range(n_tiles):
            info = infos + t * INFO
            begin(
                call,
                b,
                info,
                table,
                rows_scratch,
                q_all + t * qk * W,
                o_all + t * dv * W,
                state + 2 * t * W,
                state + (2 * t + 1) * W,
            )
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
                        attend_block(
                            call,
                            b,
                            info,
                            j0,
                            first,
                            last,
                            key,
                            k,
                            qk,
                            k_finite,
                            v,
                            dv,
                            v_finite,
                            q_all + t * qk * W,
                            o_all + t * dv * W,
                            state + 2 * t * W,
                            state + (2 * t + 1) * W,
                            s,
                            visible,
                            seen,
                            bias,
                            alpha,
                            bounds,
                            lanes,
                            table,
                            rows_scratch,
                            sequence[5] - sequence[1],
                        )
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
            finish(call, b, info, table, rows_scratch, o, m, l)

    def drain(call_at):
        """Take work items off the shared counter until none is left; items are independent, so bits do not depend on
        who takes which."""
        call = _call_record(call_at)
        buffer = np.empty(call.scratch + 64, np.uint8)
        scratch = (buffer.ctypes.data + 63) & ~63
        first_item = i64_ptr(call.first_item)
        counter = i64_ptr(call.counter)
        while True:
            item = fetch_add(counter, 1)
            if item >= call.n_items:
                break
            low, high = 0, call.n_sequences  # the sequence whose items hold this one
            while high - low > 1:
                middle = (low + high) // 2
                if first_item[middle] <= item:
                    low = middle
                else:
                    high = middle
            sequence = i64_ptr(call.sequences) + SEQUENCE * low
            q_len, group = sequence[2], call.group
            size = call.tile_rows
            n_tiles = (group * q_len + size - 1) // size if q_len < size else group * ((q_len + size - 1) // size)
            local = item - first_item[low]
            # Head after head, so that its keys and values stay in the second-level cache. Within a head the first
            # `fine` tiles are items of their own, then come items of call.tiles; late queries are taken first, as with
            # a causal mask they are the heavy ones: the last items to be taken are small.
            fine = min(call.fine, n_tiles)
            chunks = fine + (n_tiles - fine + call.tiles - 1) // call.tiles
            kv_head, chunk = local // chunks, chunks - 1 - local % chunks
            first_tile = chunk if chunk < fine else fine + (chunk - fine) * call.tiles
            count = 1 if chunk < fine else min(call.tiles, n_tiles - first_tile)
            attend(call, sequence, kv_head, first_tile, count, scratch)
        buffer[0] = 0  # must stay the last use: Numba frees an array after it, and addresses don't count

    return drain
