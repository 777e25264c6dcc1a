"""Register-tile products, and the way in and out of the caller's arrays, for one accumulation type.

Every product of the forward and the backward pass is one of three loops over `simd.outer`:

    scores       s[i, :] = sum_c k[i, c] q[c, :]              rows of K or V against transposed queries
    values       o[i, :] = o[i, :] alpha + sum_j v[j, i] p[j, :]   columns of V or K against weights
    row_products c[j, :] += sum_q p[j, q] x[q, :]             weights against rows of queries, over several tiles

The last two start from zero and meet the running sum once, at the store: two-level sums.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np

from . import simd
from .call import F16, F32, F64
from .compile import inner, outlined
from .simd import (
    ROW,
    address_of,
    any_bit,
    f32_ptr,
    f64_ptr,
    fold_tile,
    load,
    multiply_add,
    outer,
    outer_visible,
    splat,
    store_tile,
    transpose_in,
    transpose_out,
    u8_ptr,
    u16_ptr,
    zeros,
)


@cache
def build(elem: str) -> SimpleNamespace:
    """The functions for accumulation type "f32" or "f64", to be inlined into kernels."""
    jit = inner
    L = ROW.lanes(elem)
    MR, NR = ROW.mr, ROW.nr
    W = L * NR
    acc_ptr = f32_ptr if elem == "f32" else f64_ptr
    acc = np.float32 if elem == "f32" else np.float64
    ACC_BYTES = 4 if elem == "f32" else 8
    ACC_STORAGE = F32 if elem == "f32" else F64
    ZERO = acc(0)

    @jit
    def not_zero(x):
        return any_bit(x != splat(ZERO, L))

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

        @jit
        def row_product(p, p_step, x, x_step, ldx, parts, n_parts, j, c, ldc, ones):
            """c[i, :] += sum over tiles and their queries r of p[j + i, r] x[r, :] for mr keys i.

            parts: of each tile its first and end key, queries and width; one that does not hold key j adds nothing.
            """
            t = zeros(p, L, mr, nr)
            for part in range(n_parts):
                if parts[4 * part] <= j and j < parts[4 * part + 1]:
                    count, w = parts[4 * part + 2], parts[4 * part + 3]
                    a, b = p + (part * p_step + j * w), x + part * x_step
                    for r in range(0, count - 3, 4):
                        t = outer(t, a + r, w, b + r * ldx)
                        t = outer(t, a + (r + 1), w, b + (r + 1) * ldx)
                        t = outer(t, a + (r + 2), w, b + (r + 2) * ldx)
                        t = outer(t, a + (r + 3), w, b + (r + 3) * ldx)
                    for r in range(count & ~3, count):
                        t = outer(t, a + r, w, b + r * ldx)
            fold_tile(t, c, ldc, ones, 0)

        return score_rows, value_rows, visible_value_rows, row_product

    # By width: a tile is 1 to 3 vectors of queries wide. (Rows of the SIMD table with another NR would need more cases
    # here.)
    (
        (score_1, value_1, visible_1, product_1),
        (score_2, value_2, visible_2, product_2),
        (score_3, value_3, visible_3, product_3),
    ) = (tile_products(MR, nr) for nr in (1, 2, 3))

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

    @jit
    def row_products(p, p_step, x, x_step, ldx, parts, n_parts, c, ldc, ones, low, high):
        """c[j, :] += sum over tiles and their queries r of p[j, r] x[r, :] for keys low:high; low is a multiple of MR.

        Up to MR - 1 rows of c past high are written too; ldx and ldc are multiples of L, and ones holds 3 L ones. The
        keys are innermost: three columns of x, 18 KB for two tiles of 48 queries, stay in the first-level cache (1 to 4
        % faster than the other order).
        """
        d = 0
        while d < ldc:
            left = (ldc - d) // L
            at = x + d
            if left == 3 or left > 4:
                for j in range(low, high, MR):
                    product_3(p, p_step, at, x_step, ldx, parts, n_parts, j, c + (j * ldc + d), ldc, ones)
                d += 3 * L
            elif left > 1:
                for j in range(low, high, MR):
                    product_2(p, p_step, at, x_step, ldx, parts, n_parts, j, c + (j * ldc + d), ldc, ones)
                d += 2 * L
            else:
                for j in range(low, high, MR):
                    product_1(p, p_step, at, x_step, ldx, parts, n_parts, j, c + (j * ldc + d), ldc, ones)
                d += L

    # ------------------------------------------------------------ reading and writing the caller's arrays

    @outlined
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

    @outlined
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

    @outlined
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

    @outlined
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

    @jit
    def row_addresses(table, base, stride_h, stride_i, heads, rows, w, count):
        for r in range(w):
            x = min(r, count - 1)
            table[r] = base + heads[x] * stride_h + rows[x] * stride_i

    return SimpleNamespace(
        L=L,
        W=W,
        acc=acc,
        acc_ptr=acc_ptr,
        ACC_BYTES=ACC_BYTES,
        ACC_STORAGE=ACC_STORAGE,
        scores=scores,
        values=values,
        row_products=row_products,
        read_row=read_row,
        write_row=write_row,
        gather=gather,
        gather_bytes=gather_bytes,
        read_rows=read_rows,
        write_rows=write_rows,
        row_addresses=row_addresses,
        all_finite=all_finite,
        copy_block=copy_block,
    )
