"""Reading and writing the caller's arrays: any of the four float types and any strides, to rows of the accumulation
type and back.

A tile of queries is stored transposed, lanes innermost. Rows are found through a table of their addresses, one a lane.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .call import F16, F32, F64
from .compile import inner, outlined
from .halves import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from .registers import transpose_in, transpose_out
from .simd import I64, address_of, f32_ptr, f64_ptr, full_width, itemsize, lanes, pointer_like, scalar, u16_ptr
from .vectors import any_bit, load, multiply_add, splat


class Strided(NamedTuple):
    """One of the caller's arrays at one row of the batch."""

    address: int
    h: int  # bytes from one head to the next,
    s: int  # from one row,
    d: int  # and from one column
    storage: int  # its type's code, see call.py


class KeyRows(NamedTuple):
    """The rows of K or V of a block of keys, as accumulation type, one after another."""

    at: Any
    finite: bool  # nothing in the rows that are used is NaN or infinite


@intrinsic
def storage_of(typingctx, p):
    """The storage code of p's element type, float32 or float64."""
    code = {"f32": F32, "f64": F64}[p.elem]

    def codegen(context, builder, sig, args):
        return ir.Constant(I64, code)

    return types.intp(p), codegen


# ---------------------------------------------------------------- one row


@outlined
def read_row(address, stride, storage, dst, n):
    """n numbers of any storage type, stride bytes apart, as accumulation type."""
    # A loop of its own for numbers that lie side by side, where LLVM makes vectors of it.
    if storage == F32:
        if stride == 4:
            p = f32_ptr(address)
            for c in range(n):
                dst[c] = scalar(dst, p[c])
        else:
            for c in range(n):
                dst[c] = scalar(dst, f32_ptr(address + c * stride)[0])
    elif storage == F64:
        for c in range(n):
            dst[c] = scalar(dst, f64_ptr(address + c * stride)[0])
    elif storage == F16:
        if stride == 2:
            h = u16_ptr(address)
            for c in range(n):
                dst[c] = scalar(dst, half_to_float(h[c]))
        else:
            for c in range(n):
                dst[c] = scalar(dst, half_to_float(u16_ptr(address + c * stride)[0]))
    else:
        if stride == 2:
            h = u16_ptr(address)
            for c in range(n):
                dst[c] = scalar(dst, bfloat_to_float(h[c]))
        else:
            for c in range(n):
                dst[c] = scalar(dst, bfloat_to_float(u16_ptr(address + c * stride)[0]))


@outlined
def write_row(src, address, stride, storage, n):
    """The inverse of read_row, for the storage types of out: the accumulation type, float16, bfloat16."""
    if storage == storage_of(src):
        for c in range(n):
            pointer_like(src, address + c * stride)[0] = src[c]
    elif storage == F16:
        for c in range(n):
            u16_ptr(address + c * stride)[0] = float_to_half(np.float32(src[c]))
    else:
        for c in range(n):
            u16_ptr(address + c * stride)[0] = float_to_bfloat(np.float32(src[c]))


# ---------------------------------------------------------------- rows of a tile of queries, transposed


@outlined
def gather(addresses, dst, w, n, like):
    """dst[c, r] = (row at addresses[r])[c] for c < n: rows of dst's own type, transposed in squares of lanes(like)."""
    vector = lanes(like)
    whole = n - n % vector
    for r in range(0, w, vector):
        for c in range(0, whole, vector):
            transpose_in(addresses + r, c, dst + (c * w + r), w, like)
    # Columns that no square covers, one by one.
    for r in range(w):
        row = pointer_like(dst, addresses[r])
        for c in range(whole, n):
            dst[c * w + r] = row[c]


@inner
def read_rows(addresses, stride, storage, rows, dst, w, n):
    """gather() for any storage and column stride; rows: scratch of w * n."""
    if storage != storage_of(dst) or stride != itemsize(dst):
        for r in range(w):
            read_row(addresses[r], stride, storage, rows + r * n, n)
            addresses[r] = address_of(rows + r * n)
    gather(addresses, dst, w, n, dst)


@inner
def write_rows(src, factor, addresses, target, rows, queries, n):
    """(row at addresses[r])[c] = src[c, r] * factor[r] for the queries of a tile, in target's storage."""
    w, count, vector = queries.width, queries.count, lanes(src)
    whole = n - n % vector
    behind = addresses + full_width(src)
    direct = target.storage == storage_of(src) and target.d == itemsize(src)
    if not direct:
        for r in range(w):  # first into row-major scratch; the targets' addresses are behind its own in the table
            behind[r] = addresses[r]
            addresses[r] = address_of(rows + r * n)
    for r in range(0, w, vector):
        for c in range(0, whole, vector):
            transpose_out(src + (c * w + r), w, factor + r, addresses + r, c, count - r)
    # Columns that no square of vectors covers, one by one.
    for r in range(count):
        row = pointer_like(src, addresses[r])
        for c in range(whole, n):
            row[c] = src[c * w + r] * factor[r] + scalar(src, 0)  # -0 becomes +0, as in transpose_out()
    # Converted on the way from the scratch rows to the targets.
    if not direct:
        for r in range(count):
            write_row(rows + r * n, behind[r], target.d, target.storage, n)


# ---------------------------------------------------------------- rows of keys


@outlined
def all_finite(p, n):
    """Whether n numbers are finite: x * 0 is 0 for those, NaN for the others."""
    vector, zero = lanes(p), splat(p, 0)
    # Four chains, so that a multiply-add need not wait for the one before.
    a0 = zero
    a1 = zero
    a2 = zero
    a3 = zero
    whole = n - n % (4 * vector)
    for x in range(0, whole, 4 * vector):
        a0 = multiply_add(load(p + x), zero, a0)
        a1 = multiply_add(load(p + (x + vector)), zero, a1)
        a2 = multiply_add(load(p + (x + 2 * vector)), zero, a2)
        a3 = multiply_add(load(p + (x + 3 * vector)), zero, a3)
    bad = any_bit((a0 + a1) + (a2 + a3) != zero)
    for x in range(whole, n):
        bad = bad or p[x] - p[x] != 0.0
    return not bad


@outlined
def key_rows(array, copy, rows, n):
    """A pointer to rows of n numbers, as accumulation type: the caller's own if they are stored so, else a copy in
    `copy`."""
    if array.storage == storage_of(copy) and array.d == itemsize(copy) and array.s == n * itemsize(copy):
        return pointer_like(copy, array.address)
    for j in range(rows):
        read_row(array.address + j * array.s, array.d, array.storage, copy + j * n, n)
    return copy
