"""The vector vocabulary of the CPU kernels: pointers, short vectors and register tiles as Numba types.

Numba has no vector type, and LLVM does not keep a matrix tile in registers when it is an array in a loop. So four
types:

    Ptr(elem)             a raw address with an element type; p + n moves by elements, p[i] reads and writes a scalar
    Vec(elem, lanes)      one SIMD register (or the few that a narrower CPU needs); + - * / and comparisons work lane by
                          lane
    Bits(lanes)           the result of a comparison, one bit a lane
    Tile(elem, lanes, mr, nr)   mr x nr vectors: an LLVM array of vectors, which stays in registers

and one primitive that carries every product: outer(), acc[i, :] += a[i] * b[:]. The lanes run over queries (DESIGN.md
section 4), so a row of K or V is read as broadcasts and no reduction over lanes is ever needed.

No instruction carries a fast-math flag: an fma is written where one is meant, and NaN and -inf keep their meaning.
"""

import math
import operator
import os
from dataclasses import dataclass

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
LLVM_TYPE = {"f32": F32, "f64": F64, "u8": I8, "u16": I16, "i32": I32, "i64": I64}
NUMBA_TYPE = {
    "f32": types.float32,
    "f64": types.float64,
    "u8": types.uint8,
    "u16": types.uint16,
    "i32": types.int32,
    "i64": types.int64,
}
BYTES = {"f32": 4, "f64": 8, "u8": 1, "u16": 2, "i32": 4, "i64": 8}


# ---------------------------------------------------------------- which instructions this CPU has


@dataclass(frozen=True)
class Row:
    """One line of the SIMD table: vector length and register tile of each accumulation type."""

    name: str
    bits: int  # of a vector register
    mr: int  # rows of the register tile (keys, or head dimensions)
    nr: int  # vectors of the register tile (queries / lanes)
    fma: bool  # a fused multiply-add instruction exists; without one llvm.fma is a library call
    f16c: bool  # half <-> float conversion exists; without it LLVM calls a function that is not there

    def lanes(self, elem: str) -> int:
        return self.bits // (8 * BYTES[elem])


# mr * nr accumulators + nr operands + 1 broadcast must fit the registers: 32 for AVX-512 and NEON, 16 elsewhere.
# 8 x 3 beats 6 x 4, 14 x 2, 12 x 2, 4 x 6 and 16 x 1 with AVX-512 (shared/prototypes, 2 FMA units).
ROWS = {
    "avx512": Row("avx512", 512, 8, 3, True, True),
    "avx2": Row("avx2", 256, 4, 3, True, True),
    "sse2": Row("sse2", 128, 4, 3, False, False),
    "neon": Row("neon", 128, 8, 3, True, True),
}


def _compiled_isa() -> str:
    """The row that Numba's own target machine can run: read off the assembly that LLVM writes for it.

    llvmlite's get_host_cpu_features ignores NUMBA_CPU_NAME and NUMBA_CPU_FEATURES; the code generator does not.
    """
    from numba.core.registry import cpu_target

    if "x86" not in llvm.get_process_triple() and "amd64" not in llvm.get_process_triple():
        return "neon"
    machine = cpu_target.target_context.codegen()._tm
    probe = llvm.parse_assembly("""
        declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
        define <16 x float> @probe(<16 x float> %a) {
            %b = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %a, <16 x float> %a)
            ret <16 x float> %b
        }""")
    probe.triple = llvm.get_process_triple()
    text = machine.emit_assembly(probe)
    if "zmm" in text:
        return "avx512"
    return "avx2" if "vfmadd" in text else "sse2"


def choose_row() -> Row:
    """The SIMD row: NUMBA_ATTN_SIMD if set, else what Numba compiles for."""
    asked = os.environ.get("NUMBA_ATTN_SIMD", "")
    if asked and asked not in ROWS:
        raise ValueError(f"NUMBA_ATTN_SIMD={asked!r}: one of {', '.join(ROWS)}, or leave it unset")
    return ROWS[asked or _compiled_isa()]


ROW = choose_row()  # fixed for the process, like the CPU name that Numba compiles for


# ---------------------------------------------------------------- types


class Ptr(types.Type):
    def __init__(self, elem):
        self.elem = elem
        super().__init__(name=f"Ptr({elem})")


class Vec(types.Type):
    def __init__(self, elem, lanes):
        self.elem, self.lanes = elem, lanes
        self.ir = ir.VectorType(LLVM_TYPE[elem], lanes)
        super().__init__(name=f"Vec({elem},{lanes})")


class Bits(types.Type):
    def __init__(self, lanes):
        self.lanes = lanes
        self.ir = ir.VectorType(I1, lanes)
        super().__init__(name=f"Bits({lanes})")


class Tile(types.Type):
    def __init__(self, elem, lanes, mr, nr):
        self.elem, self.lanes, self.mr, self.nr = elem, lanes, mr, nr
        self.vec = Vec(elem, lanes)
        self.ir = ir.ArrayType(self.vec.ir, mr * nr)
        super().__init__(name=f"Tile({elem},{lanes},{mr},{nr})")


@register_model(Ptr)
class _PtrModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, LLVM_TYPE[fe_type.elem].as_pointer())


@register_model(Vec)
@register_model(Bits)
@register_model(Tile)
class _ValueModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir)


# ---------------------------------------------------------------- pointers


def _ptr_cast(name, elem):
    @intrinsic
    def cast(typingctx, address):
        """The address, an intp or another pointer, as a Ptr of this element type."""

        def codegen(context, builder, sig, args):
            to = LLVM_TYPE[elem].as_pointer()
            return builder.bitcast(args[0], to) if isinstance(sig.args[0], Ptr) else builder.inttoptr(args[0], to)

        return Ptr(elem)(address if isinstance(address, Ptr) else types.intp), codegen

    cast.__name__ = name
    return cast


f32_ptr, f64_ptr, u8_ptr, u16_ptr, i32_ptr, i64_ptr = (
    _ptr_cast(n + "_ptr", n) for n in ("f32", "f64", "u8", "u16", "i32", "i64")
)


@intrinsic
def address_of(typingctx, p):
    def codegen(context, builder, sig, args):
        return builder.ptrtoint(args[0], I64)

    return types.intp(p), codegen


@infer_global(operator.add)
class _PtrAdd(AbstractTemplate):
    def generic(self, args, kws):
        if len(args) == 2 and isinstance(args[0], Ptr) and isinstance(args[1], types.Integer):
            return signature(args[0], args[0], types.intp)


@lower_builtin(operator.add, Ptr, types.Integer)
def _ptr_add(context, builder, sig, args):
    return builder.gep(args[0], [args[1]])


@infer_global(operator.getitem)
class _PtrGet(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], Ptr) and isinstance(args[1], types.Integer):
            return signature(NUMBA_TYPE[args[0].elem], args[0], types.intp)


@lower_builtin(operator.getitem, Ptr, types.Integer)
def _ptr_get(context, builder, sig, args):
    return builder.load(builder.gep(args[0], [args[1]]), align=1)


@infer_global(operator.setitem)
class _PtrSet(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], Ptr) and isinstance(args[1], types.Integer):
            return signature(types.none, args[0], types.intp, NUMBA_TYPE[args[0].elem])


@lower_builtin(operator.setitem, Ptr, types.Integer, types.Any)
def _ptr_set(context, builder, sig, args):
    builder.store(args[2], builder.gep(args[0], [args[1]]), align=1)
    return context.get_dummy_value()


# ---------------------------------------------------------------- vectors


def _const(vec_ir, value):
    return ir.Constant(vec_ir, [value] * vec_ir.count)


def _splat(builder, vec_ir, scalar):
    first = builder.insert_element(ir.Constant(vec_ir, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        first, ir.Constant(vec_ir, ir.Undefined), ir.Constant(ir.VectorType(I32, vec_ir.count), [0] * vec_ir.count)
    )


def _at(builder, pointer, vec_ir, offset=0):
    """pointer + offset elements, as a pointer to a vector."""
    if offset:
        pointer = builder.gep(pointer, [ir.Constant(I64, offset)])
    return builder.bitcast(pointer, vec_ir.as_pointer())


def _call(builder, name, ret, args):
    suffix = f"v{ret.count}f{32 if ret.element == F32 else 64}"
    fn = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ret, [a.type for a in args]), f"llvm.{name}.{suffix}"
    )
    return builder.call(fn, args)


def _multiply_add(builder, a, b, c):
    return _call(builder, "fma", a.type, [a, b, c]) if ROW.fma else builder.fadd(builder.fmul(a, b), c)


@intrinsic(prefer_literal=True)
def load(typingctx, p, lanes):
    """p[0:lanes] as a vector; unaligned addresses are fine."""
    vec = Vec(p.elem, lanes.literal_value)

    def codegen(context, builder, sig, args):
        return builder.load(_at(builder, args[0], vec.ir), align=BYTES[vec.elem])

    return vec(p, lanes), codegen


@intrinsic
def store(typingctx, p, v):
    def codegen(context, builder, sig, args):
        builder.store(args[1], _at(builder, args[0], v.ir), align=BYTES[v.elem])
        return context.get_dummy_value()

    return types.void(p, v), codegen


@intrinsic(prefer_literal=True)
def splat(typingctx, x, lanes):
    """A scalar in every lane."""
    elem = {types.float32: "f32", types.float64: "f64", types.int32: "i32", types.int64: "i64"}[types.unliteral(x)]
    vec = Vec(elem, lanes.literal_value)

    def codegen(context, builder, sig, args):
        return _splat(builder, vec.ir, args[0])

    return vec(types.unliteral(x), lanes), codegen


def _arithmetic(op, name):
    @infer_global(op)
    class Typing(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Vec) and args[0] == args[1]:
                return signature(args[0], *args)

    @lower_builtin(op, Vec, Vec)
    def lower(context, builder, sig, args):
        return getattr(builder, ("f" if sig.return_type.elem[0] == "f" else "") + name)(*args)


for _op, _name in ((operator.add, "add"), (operator.sub, "sub"), (operator.mul, "mul"), (operator.truediv, "div")):
    _arithmetic(_op, _name)


def _comparison(op, symbol):
    @infer_global(op)
    class Typing(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Vec) and args[0] == args[1]:
                return signature(Bits(args[0].lanes), *args)

    @lower_builtin(op, Vec, Vec)
    def lower(context, builder, sig, args):
        return (builder.fcmp_ordered if sig.args[0].elem[0] == "f" else builder.icmp_signed)(symbol, *args)


def _not_equal_typing():
    @infer_global(operator.ne)
    class Typing(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Vec) and args[0] == args[1]:
                return signature(Bits(args[0].lanes), *args)


_not_equal_typing()


@lower_builtin(operator.ne, Vec, Vec)
def _not_equal(context, builder, sig, args):
    """True where either is NaN."""
    return builder.fcmp_unordered("!=", *args) if sig.args[0].elem[0] == "f" else builder.icmp_signed("!=", *args)


for _op, _symbol in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
):
    _comparison(_op, _symbol)


@infer_global(operator.and_)
class _BitsAnd(AbstractTemplate):
    def generic(self, args, kws):
        if len(args) == 2 and isinstance(args[0], Bits) and args[0] == args[1]:
            return signature(args[0], *args)


@lower_builtin(operator.and_, Bits, Bits)
def _bits_and(context, builder, sig, args):
    return builder.and_(*args)


@intrinsic
def select(typingctx, bits, yes, no):
    def codegen(context, builder, sig, args):
        return builder.select(*args)

    return yes(bits, yes, no), codegen


@intrinsic
def maximum(typingctx, x, y):
    """The larger of each lane; y where x is NaN (a NaN score reaches its row through p, not through the maximum)."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return x(x, y), codegen


@intrinsic
def multiply_add(typingctx, x, y, z):
    """x * y + z, fused where the CPU can."""

    def codegen(context, builder, sig, args):
        return _multiply_add(builder, *args)

    return x(x, y, z), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address, which may lie anywhere."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fn, [pointer, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def any_bit(typingctx, bits):
    def codegen(context, builder, sig, args):
        whole = ir.IntType(bits.lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], whole), ir.Constant(whole, 0))

    return types.boolean(bits), codegen


@intrinsic
def store_bytes(typingctx, p, bits):
    """One byte a lane: 255 where the bit is set, 0 elsewhere."""

    def codegen(context, builder, sig, args):
        bytes_ir = ir.VectorType(I8, bits.lanes)
        builder.store(builder.sext(args[1], bytes_ir), _at(builder, args[0], bytes_ir), align=1)
        return context.get_dummy_value()

    return types.void(p, bits), codegen


def _bytes_to_bits(builder, p, lanes, offset=0):
    bytes_ir = ir.VectorType(I8, lanes)
    return builder.icmp_unsigned(
        "!=", builder.load(_at(builder, p, bytes_ir, offset), align=1), ir.Constant(bytes_ir, None)
    )


@intrinsic(prefer_literal=True)
def load_bits(typingctx, p, lanes):
    """Bits from one byte a lane."""
    n = lanes.literal_value

    def codegen(context, builder, sig, args):
        return _bytes_to_bits(builder, args[0], n)

    return Bits(n)(p, lanes), codegen


# 2**f for |f| <= 1/2. Float32: minimax, 2e-9 relative before rounding. Float64: Taylor to degree 13, 5e-18.
EXP2_F32 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
EXP2_F64 = (*(math.log(2.0) ** k / math.factorial(k) for k in range(13, 0, -1)), 1.0)


def exp2_constants(elem):
    """(coefficients from the highest degree down, lowest exponent, mantissa bits)."""
    return (EXP2_F32, -126.0, 23) if elem == "f32" else (EXP2_F64, -1022.0, 52)


@intrinsic
def exp2(typingctx, x):
    """2**x for x < 128: exactly 0 below the smallest normal number (-inf too), exactly 1 at 0, NaN stays NaN."""

    def codegen(context, builder, sig, args):
        vec = x.ir
        coefficients, lowest, mantissa = exp2_constants(x.elem)
        magic = _const(vec, 1.5 * 2.0**mantissa)  # adding it rounds to an integer, held in the low bits
        v = args[0]
        small = builder.fcmp_ordered("<", v, _const(vec, lowest))
        if ROW.name != "avx512":
            v = builder.select(small, _const(vec, lowest), v)
        shifted = builder.fadd(v, magic)
        n = builder.fsub(shifted, magic)
        f = builder.fsub(v, n)
        p = _const(vec, coefficients[0])
        for c in coefficients[1:]:
            p = _multiply_add(builder, p, f, _const(vec, c))
        if ROW.name == "avx512":  # p * 2**n in one instruction, 0 where the mask says so: 3 fewer than below
            mask_ir = ir.IntType(x.lanes)
            kind = "ps" if x.elem == "f32" else "pd"
            scalef = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(vec, [vec, vec, vec, mask_ir, I32]),
                f"llvm.x86.avx512.mask.scalef.{kind}.512",
            )
            return builder.call(
                scalef, [p, n, _const(vec, 0.0), builder.not_(builder.bitcast(small, mask_ir)), ir.Constant(I32, 4)]
            )
        int_ir = ir.VectorType(I32 if x.elem == "f32" else I64, x.lanes)
        bias = ir.Constant(int_ir, [2 ** (7 if x.elem == "f32" else 10) - 1] * x.lanes)
        exponent = builder.shl(
            builder.add(builder.bitcast(shifted, int_ir), bias), ir.Constant(int_ir, [mantissa] * x.lanes)
        )
        return builder.select(small, _const(vec, 0.0), builder.fmul(p, builder.bitcast(exponent, vec)))

    return x(x), codegen


# ---------------------------------------------------------------- register tiles


@intrinsic(prefer_literal=True)
def zeros(typingctx, p, lanes, mr, nr):
    """A tile of zeros of p's element type."""
    tile = Tile(p.elem, lanes.literal_value, mr.literal_value, nr.literal_value)

    def codegen(context, builder, sig, args):
        return ir.Constant(tile.ir, None)

    return tile(p, lanes, mr, nr), codegen


def _outer(builder, tile, args, visible):
    acc, a, lda, b = args[:4]
    lanes, nr = tile.lanes, tile.nr
    bv = [builder.load(_at(builder, b, tile.vec.ir, j * lanes), align=BYTES[tile.elem]) for j in range(nr)]
    seen = visible and [_bytes_to_bits(builder, visible, lanes, j * lanes) for j in range(nr)]
    for i in range(tile.mr):
        av = _splat(
            builder,
            tile.vec.ir,
            builder.load(builder.gep(a, [builder.mul(lda, ir.Constant(I64, i))]), align=BYTES[tile.elem]),
        )
        for j in range(nr):
            old = builder.extract_value(acc, i * nr + j)
            new = _multiply_add(builder, av, bv[j], old)
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
                    _at(builder, row, acc.vec.ir, j * acc.lanes),
                    align=BYTES[acc.elem],
                )
        return context.get_dummy_value()

    return types.void(acc, c, types.intp), codegen


@intrinsic
def fold_tile(typingctx, acc, c, ldc, alpha, first):
    """c[i, :] = c[i, :] * alpha[:] + acc[i, :] for i >= first: a block's own sum meets the running one here, once.

    first > 0 is for the last tile of a length that mr does not divide: it overlaps rows that are folded already.
    """

    def codegen(context, builder, sig, args):
        value, c, ldc, alpha, first = args
        vec = acc.vec.ir
        av = [builder.load(_at(builder, alpha, vec, j * acc.lanes), align=BYTES[acc.elem]) for j in range(acc.nr)]
        for i in range(acc.mr):
            with builder.if_then(builder.icmp_signed("<=", first, ir.Constant(I64, i))):
                row = builder.gep(c, [builder.mul(ldc, ir.Constant(I64, i))])
                for j in range(acc.nr):
                    at = _at(builder, row, vec, j * acc.lanes)
                    new = _multiply_add(
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


@intrinsic(prefer_literal=True)
def transpose_in(typingctx, addresses, offset, dst, ldd, lanes):
    """dst[c * ldd + r] = (row at addresses[r])[offset + c] for r, c < lanes; offset in elements of dst."""
    vec = Vec(dst.elem, lanes.literal_value)

    def codegen(context, builder, sig, args):
        table, offset, dst, ldd, _ = args
        rows = []
        for r in range(vec.lanes):
            base = builder.inttoptr(
                builder.load(builder.gep(table, [ir.Constant(I64, r)])), LLVM_TYPE[vec.elem].as_pointer()
            )
            rows.append(builder.load(_at(builder, builder.gep(base, [offset]), vec.ir), align=1))
        for c, column in enumerate(_transposed(builder, rows)):
            builder.store(
                column,
                _at(builder, builder.gep(dst, [builder.mul(ldd, ir.Constant(I64, c))]), vec.ir),
                align=BYTES[vec.elem],
            )
        return context.get_dummy_value()

    return types.void(addresses, types.intp, dst, types.intp, lanes), codegen


@intrinsic(prefer_literal=True)
def transpose_out(typingctx, src, lds, factor, addresses, offset, count, lanes):
    """(row at addresses[r])[offset + c] = src[c * lds + r] * factor[r] for c < lanes and r < min(count, lanes)."""
    vec = Vec(src.elem, lanes.literal_value)

    def codegen(context, builder, sig, args):
        src, lds, factor, table, offset, count, _ = args
        scale = builder.load(_at(builder, factor, vec.ir), align=BYTES[vec.elem])
        rows = []
        for c in range(vec.lanes):
            at = _at(builder, builder.gep(src, [builder.mul(lds, ir.Constant(I64, c))]), vec.ir)
            product = builder.fmul(builder.load(at, align=BYTES[vec.elem]), scale)
            rows.append(builder.fadd(product, _const(vec.ir, 0.0)))  # -0 becomes +0: see finish() in forward.py
        for r, row in enumerate(_transposed(builder, rows)):
            with builder.if_then(builder.icmp_signed(">", count, ir.Constant(I64, r))):
                base = builder.inttoptr(
                    builder.load(builder.gep(table, [ir.Constant(I64, r)])), LLVM_TYPE[vec.elem].as_pointer()
                )
                builder.store(row, _at(builder, builder.gep(base, [offset]), vec.ir), align=1)
        return context.get_dummy_value()

    return types.void(src, types.intp, factor, addresses, types.intp, types.intp, lanes), codegen


# ---------------------------------------------------------------- halves, atomics, calls through an address


@intrinsic
def half_to_float(typingctx, x):
    """The float32 value of float16 bits."""

    def codegen(context, builder, sig, args):
        if ROW.f16c:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), F32)
        # integer arithmetic: shift the magnitude into place, rescale by 2**112 (this also normalises subnormals), patch
        # inf and NaN
        bits = builder.zext(args[0], I32)
        c = lambda v: ir.Constant(I32, v)  # noqa: E731
        magnitude = builder.shl(builder.and_(bits, c(0x7FFF)), c(13))
        scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, F32), ir.Constant(F32, 2.0**112)), I32)
        special = builder.or_(magnitude, c(0x7F800000))
        value = builder.select(builder.icmp_unsigned(">=", magnitude, c(0x7C00 << 13)), special, scaled)
        return builder.bitcast(builder.or_(value, builder.shl(builder.and_(bits, c(0x8000)), c(16))), F32)

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx, x):
    """float16 bits of a float32, rounded to nearest even."""

    def codegen(context, builder, sig, args):
        if ROW.f16c:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), I16)
        bits = builder.bitcast(args[0], I32)
        c = lambda v: ir.Constant(I32, v)  # noqa: E731
        sign = builder.and_(builder.lshr(bits, c(16)), c(0x8000))
        magnitude = builder.and_(bits, c(0x7FFFFFFF))
        # normal range: rebias and round to nearest even on the 13 bits that go
        odd = builder.and_(builder.lshr(magnitude, c(13)), c(1))
        normal = builder.lshr(builder.add(builder.sub(magnitude, c(112 << 23)), builder.add(c(0xFFF), odd)), c(13))
        normal = builder.select(builder.icmp_unsigned(">", normal, c(0x7C00)), c(0x7C00), normal)
        # subnormal range: adding 0.5 leaves the rounded mantissa in the low bits
        tiny = builder.sub(
            builder.bitcast(builder.fadd(builder.bitcast(magnitude, F32), ir.Constant(F32, 0.5)), I32), c(0x3F000000)
        )
        value = builder.select(builder.icmp_unsigned("<", magnitude, c(113 << 23)), tiny, normal)
        nan = builder.or_(c(0x7E00), builder.and_(builder.lshr(magnitude, c(13)), c(0x3FF)))
        value = builder.select(builder.icmp_unsigned(">", magnitude, c(0x7F800000)), nan, value)
        value = builder.select(builder.icmp_unsigned("==", magnitude, c(0x7F800000)), c(0x7C00), value)
        return builder.trunc(builder.or_(value, sign), I16)

    return types.uint16(types.float32), codegen


@intrinsic
def bfloat_to_float(typingctx, x):
    """The float32 value of bfloat16 bits."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), ir.Constant(I32, 16)), F32)

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_bfloat(typingctx, x):
    """bfloat16 bits of a float32, rounded to nearest even; NaN stays NaN."""

    def codegen(context, builder, sig, args):
        bits = builder.bitcast(args[0], I32)
        c = lambda v: ir.Constant(I32, v)  # noqa: E731
        odd = builder.and_(builder.lshr(bits, c(16)), c(1))
        rounded = builder.lshr(builder.add(bits, builder.add(c(0x7FFF), odd)), c(16))
        nan = builder.or_(builder.lshr(bits, c(16)), c(0x40))
        return builder.trunc(builder.select(builder.fcmp_unordered("uno", args[0], args[0]), nan, rounded), I16)

    return types.uint16(types.float32), codegen


@intrinsic
def fetch_add(typingctx, p, n):
    """The old value of *p, which n is added to atomically; what other threads wrote before their own is visible after
    it."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", args[0], args[1], "acq_rel")

    return types.int64(p, types.int64), codegen


@intrinsic
def call_address(typingctx, address, *args):
    """Call a C function (integers and pointers in, nothing out) that lies at an address.

    A user's function is compiled alone and reached so: a kernel that closed over it would be compiled anew for each
    function.
    """
    arg_types = args[0] if len(args) == 1 and isinstance(args[0], types.BaseTuple) else types.Tuple(args)

    def codegen(context, builder, sig, values):
        target, packed = values
        items = cgutils.unpack_tuple(builder, packed, len(arg_types))
        fn = ir.FunctionType(ir.VoidType(), [v.type for v in items])
        builder.call(builder.inttoptr(target, fn.as_pointer()), items)
        return context.get_dummy_value()

    return types.void(types.intp, arg_types), codegen
