"""float16 and bfloat16 to float32 and back, by instruction where the CPU has one, else by integer arithmetic."""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .simd import F32, I16, I32, ROW


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
        # normal range: rebias and round to nearest even on the 13 bits that are dropped
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
