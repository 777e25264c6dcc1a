"""Short vectors: loads and stores, arithmetic, comparisons and 2**x.

A vector's element type and its number of lanes follow from the pointer that it is loaded from. Where another type is to
have as many lanes (32-bit bounds beside float64 scores, a byte a lane), an argument `like`, a pointer or a vector, has
the number of lanes.

No instruction carries a fast-math flag: an fma is written where one is meant, and NaN and -inf keep their meaning.
"""

import math
import operator

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic

from .simd import BYTES, F32, I8, I32, I64, NUMBA_TYPE, ROW, Bits, Vec, lanes_of

MINUS_INF = -math.inf  # the score of a hidden pair

# ---------------------------------------------------------------- LLVM values, for intrinsics here and in registers.py


def constant(vec_ir, value):
    return ir.Constant(vec_ir, [value] * vec_ir.count)


def splat_of(builder, vec_ir, scalar):
    first = builder.insert_element(ir.Constant(vec_ir, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        first, ir.Constant(vec_ir, ir.Undefined), ir.Constant(ir.VectorType(I32, vec_ir.count), [0] * vec_ir.count)
    )


def vector_at(builder, pointer, vec_ir, offset=0):
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


def multiply_add_of(builder, a, b, c):
    return _call(builder, "fma", a.type, [a, b, c]) if ROW.fma else builder.fadd(builder.fmul(a, b), c)


# ---------------------------------------------------------------- loads and stores


def _load(vec):
    def codegen(context, builder, sig, args):
        return builder.load(vector_at(builder, args[0], vec.ir), align=BYTES[vec.elem])

    return codegen


@intrinsic
def load(typingctx, p):
    """p[0:lanes(p)]; unaligned addresses are fine."""
    vec = Vec(p.elem, lanes_of(p))
    return vec(p), _load(vec)


@intrinsic
def load_lanes(typingctx, p, like):
    """p[0:lanes(like)]."""
    vec = Vec(p.elem, lanes_of(like))
    return vec(p, like), _load(vec)


@intrinsic
def splat(typingctx, like, x):
    """x as a number of like's element type, in every lane."""
    vec = Vec(like.elem, lanes_of(like))

    def codegen(context, builder, sig, args):
        return splat_of(builder, vec.ir, args[1])

    return vec(like, NUMBA_TYPE[like.elem]), codegen


@intrinsic
def store(typingctx, p, v):
    def codegen(context, builder, sig, args):
        builder.store(args[1], vector_at(builder, args[0], v.ir), align=BYTES[v.elem])
        return context.get_dummy_value()

    return types.void(p, v), codegen


# ---------------------------------------------------------------- lane by lane


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
        return multiply_add_of(builder, *args)

    return x(x, y, z), codegen


# ---------------------------------------------------------------- bits and bytes


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
        builder.store(builder.sext(args[1], bytes_ir), vector_at(builder, args[0], bytes_ir), align=1)
        return context.get_dummy_value()

    return types.void(p, bits), codegen


def bytes_to_bits(builder, p, lanes, offset=0):
    bytes_ir = ir.VectorType(I8, lanes)
    return builder.icmp_unsigned(
        "!=", builder.load(vector_at(builder, p, bytes_ir, offset), align=1), ir.Constant(bytes_ir, None)
    )


@intrinsic
def load_bits(typingctx, p, like):
    """Bits from one byte a lane."""
    n = lanes_of(like)

    def codegen(context, builder, sig, args):
        return bytes_to_bits(builder, args[0], n)

    return Bits(n)(p, like), codegen


# ---------------------------------------------------------------- 2**x

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
        magic = constant(vec, 1.5 * 2.0**mantissa)  # adding it rounds to an integer, held in the low bits
        v = args[0]
        small = builder.fcmp_ordered("<", v, constant(vec, lowest))
        if ROW.name != "avx512":
            v = builder.select(small, constant(vec, lowest), v)
        shifted = builder.fadd(v, magic)
        n = builder.fsub(shifted, magic)
        f = builder.fsub(v, n)
        p = constant(vec, coefficients[0])
        for c in coefficients[1:]:
            p = multiply_add_of(builder, p, f, constant(vec, c))
        if ROW.name == "avx512":  # p * 2**n in one instruction, 0 where the mask says so: 3 fewer than below
            mask_ir = ir.IntType(x.lanes)
            kind = "ps" if x.elem == "f32" else "pd"
            scalef = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(vec, [vec, vec, vec, mask_ir, I32]),
                f"llvm.x86.avx512.mask.scalef.{kind}.512",
            )
            return builder.call(
                scalef, [p, n, constant(vec, 0.0), builder.not_(builder.bitcast(small, mask_ir)), ir.Constant(I32, 4)]
            )
        int_ir = ir.VectorType(I32 if x.elem == "f32" else I64, x.lanes)
        bias = ir.Constant(int_ir, [2 ** (7 if x.elem == "f32" else 10) - 1] * x.lanes)
        exponent = builder.shl(
            builder.add(builder.bitcast(shifted, int_ir), bias), ir.Constant(int_ir, [mantissa] * x.lanes)
        )
        return builder.select(small, constant(vec, 0.0), builder.fmul(p, builder.bitcast(exponent, vec)))

    return x(x), codegen
