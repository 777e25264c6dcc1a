"""Register tiles: mr x nr vectors of sums that stay in registers, and square transposes of vectors.

One primitive carries every product of the kernels, outer(): acc[i, :] += a[i] * b[:]. The lanes run over queries, so a
row of K or V is read as broadcasts and no sum over lanes is ever needed.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from .simd import BYTES, I32, I64, LLVM_TYPE, Tile, Vec, lanes_of
from .vectors import bytes_to_bits, constant, multiply_add_of, splat_of, vector_at


class Shape(types.Type):
    """The shape of a register tile as a type: it selects code and has no value."""

    def __init__(self, mr, nr):
        self.mr, self.nr = mr, nr
        super().__init__(name=f"Shape({mr},{nr})")


register_model(Shape)(models.OpaqueModel)


@intrinsic(prefer_literal=True)
def shape(typingctx, mr, nr):
    """mr rows by nr vectors, both known when the kernel is compiled."""

    def codegen(context, builder, sig, args):
        return context.get_dummy_value()

    return Shape(mr.literal_value, nr.literal_value)(mr, nr), codegen


@intrinsic
def zeros(typingctx, p, shape):
    """A tile of zeros of p's element type."""
    tile = Tile(p.elem, lanes_of(p), shape.mr, shape.nr)

    def codegen(context, builder, sig, args):
        return ir.Constant(tile.ir, None)

    return tile(p, shape), codegen


@intrinsic
def width(typingctx, tile):
    """Numbers of a row of the tile."""

    def codegen(context, builder, sig, args):
        return ir.Constant(I64, tile.nr * tile.lanes)

    return types.intp(tile), codegen


def _outer(builder, tile, args, visible):
    acc, a, lda, b = args[:4]
    lanes, nr = tile.lanes, tile.nr
    bv = [builder.load(vector_at(builder, b, tile.vec.ir, j * lanes), align=BYTES[tile.elem]) for j in range(nr)]
    seen = visible and [bytes_to_bits(builder, visible, lanes, j * lanes) for j in range(nr)]
    for i in range(tile.mr):
        av = splat_of(
            builder,
            tile.vec.ir,
            builder.load(builder.gep(a, [builder.mul(lda, ir.Constant(I64, i))]), align=BYTES[tile.elem]),
        )
        for j in range(nr):
            old = builder.extract_value(acc, i * nr + j)
            new = multiply_add_of(builder, av, bv[j], old)
            acc = builder.insert_value(acc, builder.select(seen[j], new, old) if seen else new, i * nr + j)
    return acc


@intrinsic
def outer(typingctx, acc, a, lda, b):
    """acc[i, :] += a[i * lda] * b[:]"""

    def codegen(context, builder, sig, args):
        return _outer(builder, acc, args, None)

    return acc(acc, a, types.intp, b), codegen


@intrinsic
def outer_visible(typingctx, acc, a, lda, b, visible):
    """outer() in the lanes whose byte of visible is not 0; the others keep their bits whatever a and b hold.

    LLVM folds the select into a masked FMA (160 against 164 GFLOP/s on AVX-512).
    """

    def codegen(context, builder, sig, args):
        return _outer(builder, acc, args, args[4])

    return acc(acc, a, types.intp, b, visible), codegen


@intrinsic
def store_tile(typingctx, acc, c, ldc):
    """c[i * ldc + :] = acc[i, :]"""

    def codegen(context, builder, sig, args):
        value, c, ldc = args
        for i in range(acc.mr):
            row = builder.gep(c, [builder.mul(ldc, ir.Constant(I64, i))])
            for j in range(acc.nr):
                builder.store(
                    builder.extract_value(value, i * acc.nr + j),
                    vector_at(builder, row, acc.vec.ir, j * acc.lanes),
                    align=BYTES[acc.elem],
                )
        return context.get_dummy_value()

    return types.void(acc, c, types.intp), codegen


@intrinsic
def fold_tile(typingctx, acc, c, ldc, alpha, first):
    """c[i, :] = c[i, :] * alpha[:] + acc[i, :] for i >= first: a block's own sum is added to the running sum here,
    once.

    first > 0 is for the last tile of a length that mr does not divide: it overlaps rows that are folded already.
    """

    def codegen(context, builder, sig, args):
        value, c, ldc, alpha, first = args
        vec = acc.vec.ir
        av = [builder.load(vector_at(builder, alpha, vec, j * acc.lanes), align=BYTES[acc.elem]) for j in range(acc.nr)]
        for i in range(acc.mr):
            with builder.if_then(builder.icmp_signed("<=", first, ir.Constant(I64, i))):
                row = builder.gep(c, [builder.mul(ldc, ir.Constant(I64, i))])
                for j in range(acc.nr):
                    at = vector_at(builder, row, vec, j * acc.lanes)
                    new = multiply_add_of(
                        builder,
                        builder.load(at, align=BYTES[acc.elem]),
                        av[j],
                        builder.extract_value(value, i * acc.nr + j),
                    )
                    builder.store(new, at, align=BYTES[acc.elem])
        return context.get_dummy_value()

    return types.void(acc, c, types.intp, alpha, types.intp), codegen


# ---------------------------------------------------------------- transposes


def _transposed(builder, rows):
    """The n x n transpose of n vectors of n lanes, log2(n) rounds of two-input shuffles."""
    n = len(rows)
    half = n // 2
    index = ir.VectorType(I32, n)
    while half:
        low = ir.Constant(index, [(i if not i & half else n + (i - half)) for i in range(n)])
        high = ir.Constant(index, [(i + half if not i & half else n + i) for i in range(n)])
        new = list(rows)
        for i in range(n):
            if not i & half:
                new[i] = builder.shuffle_vector(rows[i], rows[i + half], low)
                new[i + half] = builder.shuffle_vector(rows[i], rows[i + half], high)
        rows, half = new, half // 2
    return rows


@intrinsic
def transpose_in(typingctx, addresses, offset, dst, ldd, like):
    """dst[c * ldd + r] = (row at addresses[r])[offset + c] for r, c < lanes(like); offset in elements of dst."""
    vec = Vec(dst.elem, lanes_of(like))

    def codegen(context, builder, sig, args):
        table, offset, dst, ldd, _ = args
        rows = []
        for r in range(vec.lanes):
            base = builder.inttoptr(
                builder.load(builder.gep(table, [ir.Constant(I64, r)])), LLVM_TYPE[vec.elem].as_pointer()
            )
            rows.append(builder.load(vector_at(builder, builder.gep(base, [offset]), vec.ir), align=1))
        for c, column in enumerate(_transposed(builder, rows)):
            builder.store(
                column,
                vector_at(builder, builder.gep(dst, [builder.mul(ldd, ir.Constant(I64, c))]), vec.ir),
                align=BYTES[vec.elem],
            )
        return context.get_dummy_value()

    return types.void(addresses, types.intp, dst, types.intp, like), codegen


@intrinsic
def transpose_out(typingctx, src, lds, factor, addresses, offset, count):
    """(row at addresses[r])[offset + c] = src[c * lds + r] * factor[r] for c < lanes(src), r < min(count, lanes)."""
    vec = Vec(src.elem, lanes_of(src))

    def codegen(context, builder, sig, args):
        src, lds, factor, table, offset, count = args
        scale = builder.load(vector_at(builder, factor, vec.ir), align=BYTES[vec.elem])
        rows = []
        for c in range(vec.lanes):
            at = vector_at(builder, builder.gep(src, [builder.mul(lds, ir.Constant(I64, c))]), vec.ir)
            product = builder.fmul(builder.load(at, align=BYTES[vec.elem]), scale)
            rows.append(builder.fadd(product, constant(vec.ir, 0.0)))  # -0 becomes +0: see `finish` in forward.py
        for r, row in enumerate(_transposed(builder, rows)):
            with builder.if_then(builder.icmp_signed(">", count, ir.Constant(I64, r))):
                base = builder.inttoptr(
                    builder.load(builder.gep(table, [ir.Constant(I64, r)])), LLVM_TYPE[vec.elem].as_pointer()
                )
                builder.store(row, vector_at(builder, builder.gep(base, [offset]), vec.ir), align=1)
        return context.get_dummy_value()

    return types.void(src, types.intp, factor, addresses, types.intp, types.intp), codegen
