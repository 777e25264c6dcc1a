"""The instructions that work lane by lane: a table from a name to LLVM code for the 32 lanes of a warp at once.

A row has the types of its result and operands and a function that emits the code; computing.py jumps to it. LLVM's
vectors of 32 numbers become whatever the CPU has. Names are those of the PTX ISA manual with what does not matter left
out: `add.f32` is add.rn.f32 too, `mul.lo.b32` serves .s32 and .u32. With .ftz, operands and results below 2**-126 are
0 of the same sign. A predicate is a number of 32 bits, one for a lane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils

LANES = 32
IR = {
    "pred": ir.IntType(1), "b8": ir.IntType(8), "b16": ir.IntType(16), "b32": ir.IntType(32), "b64": ir.IntType(64),
    "f32": ir.FloatType(), "f64": ir.DoubleType(),
}  # fmt: skip
BITS = {"b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}
Build = Callable[..., Any]


class Row(NamedTuple):
    result: str
    operands: tuple[str, ...]
    build: Build  # of a builder and the operands' vectors


TABLE: dict[str, Row] = {}


def _row(name: str, result: str, operands: str, build: Build) -> None:
    TABLE[name] = Row(result, tuple(operands.split()), build)


# ------------------------------------------------------------------------------------------------------ LLVM's vectors


def vector(kind: ir.Type) -> ir.VectorType:
    return ir.VectorType(kind, LANES)


def _same(like: Any, value: Any) -> ir.Constant:
    """A constant in every lane, of the type of `like`, a value or a type of vectors."""
    kind = like if isinstance(like, ir.Type) else like.type
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * LANES)


def _call(b: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    """One of LLVM's own functions of vectors."""
    kind = ir.FunctionType(result, [x.type for x in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def _suffix(kind: ir.VectorType) -> str:
    element = kind.element
    width = {ir.FloatType: "f32", ir.DoubleType: "f64"}.get(type(element)) or f"i{element.width}"
    return f"v{LANES}{width}"


def _unary(name: str) -> Build:
    return lambda b, x: _call(b, f"llvm.{name}.{_suffix(x.type)}", x.type, x)


def _binary(name: str) -> Build:
    return lambda b, x, y: _call(b, f"llvm.{name}.{_suffix(x.type)}", x.type, x, y)


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """Rounded once, on any CPU."""
    return _call(b, f"llvm.fma.{_suffix(x.type)}", x.type, x, y, z)


def _resized(b: Any, x: Any, kind: ir.VectorType, signed: bool) -> Any:
    have, want = x.type.element.width, kind.element.width
    if want == have:
        return x
    return b.trunc(x, kind) if want < have else (b.sext if signed else b.zext)(x, kind)


def _flush(b: Any, x: Any) -> Any:
    """0 of the same sign for what is below 2**-126."""
    tiny = b.fcmp_ordered("<", _unary("fabs")(b, x), _same(x, 2.0**-126))
    return b.select(tiny, _binary("copysign")(b, _same(x, 0.0), x), x)


def _flushing(operands: tuple[str, ...], result: str, build: Build) -> Build:
    def built(b: Any, *values: Any) -> Any:
        flushed = [_flush(b, v) if kind == "f32" else v for kind, v in zip(operands, values, strict=True)]
        out = build(b, *flushed)
        return _flush(b, out) if result == "f32" else out

    return built


# ------------------------------------------------------------------------------------- integers (sections 9.7.1, 9.7.8)


def _high(signed: bool, add: bool = False) -> Build:
    def built(b: Any, x: Any, y: Any, *z: Any) -> Any:
        bits = x.type.element.width
        wide = vector(ir.IntType(2 * bits))
        product = b.mul(_resized(b, x, wide, signed), _resized(b, y, wide, signed))
        high = b.trunc(b.lshr(product, _same(wide, bits)), x.type)
        return b.add(high, z[0]) if add else high

    return built


def _wide(signed: bool, add: bool = False) -> Build:
    def built(b: Any, x: Any, y: Any, *z: Any) -> Any:
        wide = vector(ir.IntType(2 * x.type.element.width))
        product = b.mul(_resized(b, x, wide, signed), _resized(b, y, wide, signed))
        return b.add(product, z[0]) if add else product

    return built


def _divide(signed: bool, remainder: bool) -> Build:
    """Division by 0 gives all ones, its remainder the first operand, as GPUs do (the manual leaves it open)."""

    def built(b: Any, x: Any, y: Any) -> Any:
        zero = b.icmp_unsigned("==", y, _same(y, 0))
        by = b.select(zero, _same(y, 1), y)
        if signed:  # the smallest number divided by -1 is itself, where a CPU traps
            minus = b.icmp_signed("==", y, _same(y, -1))
            by = b.select(minus, _same(y, 1), by)
            if remainder:
                return b.select(zero, x, b.srem(x, by))
            quotient = b.sdiv(x, by)
            return b.select(zero, _same(x, -1), b.select(minus, b.neg(x), quotient))
        return b.select(zero, x, b.urem(x, by)) if remainder else b.select(zero, _same(x, -1), b.udiv(x, by))

    return built


def _shift(name: str) -> Build:
    """By more than all bits: 0, or the sign of a signed number."""

    def built(b: Any, x: Any, by: Any) -> Any:
        bits = x.type.element.width
        most = _same(by, bits - 1)
        over = b.icmp_unsigned(">", by, most)
        shift = getattr(b, name)(x, _resized(b, b.select(over, most, by), x.type, False))
        return shift if name == "ashr" else b.select(over, _same(x, 0), shift)

    return built


def _funnel(left: bool, wrap: bool) -> Build:
    """shf (section 9.7.8.6): the upper or lower half of a shifted pair."""

    def built(b: Any, low: Any, high: Any, by: Any) -> Any:
        over = b.icmp_unsigned(">", by, _same(by, 31))
        shifted = _call(b, f"llvm.{'fshl' if left else 'fshr'}.{_suffix(low.type)}", low.type, high, low, by)
        return shifted if wrap else b.select(over, low if left else high, shifted)

    return built


def _lop3(b: Any, x: Any, y: Any, z: Any, table: Any) -> Any:
    """Any function of three bits, as its eight results (section 9.7.8.6)."""
    out = _same(x, 0)
    for n in range(8):
        chosen = b.and_(b.and_(x if n & 4 else b.not_(x), y if n & 2 else b.not_(y)), z if n & 1 else b.not_(z))
        wanted = b.neg(b.and_(b.lshr(table, _same(x, n)), _same(x, 1)))
        out = b.or_(out, b.and_(chosen, wanted))
    return out


def _permute(b: Any, x: Any, y: Any, selection: Any) -> Any:
    """prmt (section 9.7.9.7): four of eight bytes, or their signs."""
    wide = vector(IR["b64"])
    both = b.or_(b.zext(x, wide), b.shl(b.zext(y, wide), _same(wide, 32)))
    out = _same(x, 0)
    for n in range(4):
        nibble = b.and_(b.lshr(selection, _same(x, 4 * n)), _same(x, 15))
        place = b.zext(b.shl(b.and_(nibble, _same(x, 7)), _same(x, 3)), wide)
        byte = b.trunc(b.lshr(both, place), vector(IR["b8"]))
        sign = b.ashr(byte, _same(byte, 7))
        byte = b.select(b.icmp_unsigned(">", nibble, _same(x, 7)), sign, byte)
        out = b.or_(out, b.shl(b.zext(byte, x.type), _same(x, 8 * n)))
    return out


def _field(b: Any, like: Any, n: Any) -> Any:
    """The low eight bits of a number, as wide as `like`."""
    return _resized(b, b.and_(n, _same(n, 255)), like.type, False)


def _mask(b: Any, like: Any, length: Any) -> Any:
    """So many low bits set, up to all."""
    bits = like.type.element.width
    all_ = b.icmp_unsigned(">=", length, _same(like, bits))
    short = b.select(all_, _same(like, 0), length)
    return b.select(all_, _same(like, -1), b.sub(b.shl(_same(like, 1), short), _same(like, 1)))


def _extract(signed: bool) -> Build:
    """bfe (section 9.7.1.19): a field of bits; a signed one is filled with its own sign, or that of the number."""

    def built(b: Any, x: Any, start: Any, length: Any) -> Any:
        bits = x.type.element.width
        start, length = _field(b, x, start), _field(b, x, length)
        beyond = b.icmp_unsigned(">=", start, _same(x, bits))
        at = b.select(beyond, _same(x, bits - 1), start)
        shifted = b.lshr(x, at)
        if not signed:
            return b.select(beyond, _same(x, 0), b.and_(shifted, _mask(b, x, length)))
        sign_at = b.sub(b.add(start, length), _same(x, 1))
        sign_at = b.select(b.icmp_unsigned(">=", sign_at, _same(x, bits)), _same(x, bits - 1), sign_at)
        sign = b.ashr(b.shl(x, b.sub(_same(x, bits - 1), sign_at)), _same(x, bits - 1))
        kept = b.select(beyond, _same(x, 0), _mask(b, x, length))
        # Bits that lie beyond the number are its sign's as well.
        inside = b.and_(kept, b.lshr(_same(x, -1), at))
        found = b.or_(b.and_(shifted, inside), b.and_(sign, b.not_(inside)))
        return b.select(b.icmp_unsigned("==", length, _same(x, 0)), _same(x, 0), found)

    return built


def _insert(b: Any, x: Any, y: Any, start: Any, length: Any) -> Any:
    """bfi (section 9.7.1.20)."""
    bits = x.type.element.width
    start, length = _field(b, x, start), _field(b, x, length)
    beyond = b.icmp_unsigned(">=", start, _same(x, bits))
    at = b.select(beyond, _same(x, 0), start)
    mask = b.select(beyond, _same(x, 0), b.shl(_mask(b, x, length), at))
    return b.or_(b.and_(y, b.not_(mask)), b.and_(b.shl(x, at), mask))


def _counted(name: str) -> Build:
    """Of ctpop and ctlz: a result of 32 bits."""

    def built(b: Any, x: Any) -> Any:
        if name == "ctlz":
            flag = ir.Constant(IR["pred"], 0)
            found = _call(b, f"llvm.ctlz.{_suffix(x.type)}", x.type, x, flag)
        else:
            found = _unary(name)(b, x)
        return _resized(b, found, vector(IR["b32"]), False)

    return built


def _integers() -> None:
    for bits in (16, 32, 64):
        t, two, three = f"b{bits}", f"b{bits} b{bits}", f"b{bits} b{bits} b{bits}"
        for name, op in (
            ("add", "add"),
            ("sub", "sub"),
            ("mul.lo", "mul"),
            ("and", "and_"),
            ("or", "or_"),
            ("xor", "xor"),
        ):
            _row(f"{name}.{t}", t, two, lambda b, x, y, op=op: getattr(b, op)(x, y))
        _row(f"mad.lo.{t}", t, three, lambda b, x, y, z: b.add(b.mul(x, y), z))
        _row(f"not.{t}", t, t, lambda b, x: b.not_(x))
        _row(f"cnot.{t}", t, t, lambda b, x: b.zext(b.icmp_unsigned("==", x, _same(x, 0)), x.type))
        _row(f"neg.{t}", t, t, lambda b, x: b.neg(x))
        _row(f"abs.{t}", t, t, lambda b, x: b.select(b.icmp_signed("<", x, _same(x, 0)), b.neg(x), x))
        _row(f"mov.{t}", t, t, lambda b, x: x)
        _row(f"selp.{t}", t, f"{two} pred", lambda b, x, y, p: b.select(p, x, y))
        _row(f"slct.{t}", t, f"{two} b32", lambda b, x, y, z: b.select(b.icmp_signed(">=", z, _same(z, 0)), x, y))
        _row(
            f"slct.f32.{t}", t, f"{two} f32", lambda b, x, y, z: b.select(b.fcmp_ordered(">=", z, _same(z, 0.0)), x, y)
        )
        _row(f"shl.{t}", t, f"{t} b32", _shift("shl"))
        for sign, signed in (("s", True), ("u", False)):
            own = f"{sign}{bits}"
            _row(f"mul.hi.{own}", t, two, _high(signed))
            _row(f"mad.hi.{own}", t, three, _high(signed, add=True))
            _row(f"div.{own}", t, two, _divide(signed, remainder=False))
            _row(f"rem.{own}", t, two, _divide(signed, remainder=True))
            for name in ("min", "max"):
                _row(f"{name}.{own}", t, two, _binary(sign.replace("s", "s") + name))
            _row(f"shr.{own}", t, f"{t} b32", _shift("ashr" if signed else "lshr"))
            if bits < 64:
                _row(f"mul.wide.{own}", f"b{2 * bits}", two, _wide(signed))
                _row(f"mad.wide.{own}", f"b{2 * bits}", f"{two} b{2 * bits}", _wide(signed, add=True))
            if bits > 16:
                _row(f"bfe.{own}", t, f"{t} b32 b32", _extract(signed))
        if bits > 16:
            _row(f"bfi.{t}", t, f"{two} b32 b32", _insert)
            _row(f"popc.{t}", "b32", t, _counted("ctpop"))
            _row(f"clz.{t}", "b32", t, _counted("ctlz"))
            _row(f"brev.{t}", t, t, _unary("bitreverse"))
    for left, wrap in ((True, True), (True, False), (False, True), (False, False)):
        name = f"shf.{'l' if left else 'r'}.{'wrap' if wrap else 'clamp'}.b32"
        _row(name, "b32", "b32 b32 b32", _funnel(left, wrap))
    _row("lop3.b32", "b32", "b32 b32 b32 b32", _lop3)
    _row("prmt.b32", "b32", "b32 b32 b32", _permute)
    for name, op in (("and", "and_"), ("or", "or_"), ("xor", "xor")):
        _row(f"{name}.pred", "pred", "pred pred", lambda b, x, y, op=op: getattr(b, op)(x, y))
    _row("not.pred", "pred", "pred", lambda b, x: b.not_(x))
    _row("mov.pred", "pred", "pred", lambda b, x: x)
    # Vectors in braces: the parts of a register and back (mov, section 9.7.9.3).
    for part, whole in (("b16", "b32"), ("b32", "b64"), ("b16", "b64"), ("b8", "b32"), ("b8", "b16")):
        kind = vector(IR[part])
        _row(f"part.{part}.{whole}", part, f"{whole} b32",
             lambda b, x, at, kind=kind: b.trunc(b.lshr(x, _resized(b, at, x.type, False)), kind))  # fmt: skip
        _row(f"join.{part}.{whole}", whole, f"{whole} {part} b32",
             lambda b, x, y, at: b.or_(x, b.shl(b.zext(y, x.type), _resized(b, at, x.type, False))))  # fmt: skip


# ------------------------------------------------------------------------------------- comparisons (section 9.7.6)

_ORDER = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def _comparisons() -> None:
    for bits in (16, 32, 64):
        two = f"b{bits} b{bits}"
        for name, sign in _ORDER.items():
            _row(f"setp.{name}.s{bits}", "pred", two, lambda b, x, y, s=sign: b.icmp_signed(s, x, y))
            _row(f"setp.{name}.u{bits}", "pred", two, lambda b, x, y, s=sign: b.icmp_unsigned(s, x, y))
        for name, sign in _UNSIGNED.items():
            _row(f"setp.{name}.u{bits}", "pred", two, lambda b, x, y, s=sign: b.icmp_unsigned(s, x, y))
    for t in ("f32", "f64"):
        for name, sign in _ORDER.items():
            _float_row(f"setp.{name}", t, "pred", f"{t} {t}", lambda b, x, y, s=sign: b.fcmp_ordered(s, x, y))
            _float_row(f"setp.{name}u", t, "pred", f"{t} {t}", lambda b, x, y, s=sign: b.fcmp_unordered(s, x, y))
        _float_row("setp.num", t, "pred", f"{t} {t}", lambda b, x, y: b.fcmp_ordered("ord", x, y))
        _float_row("setp.nan", t, "pred", f"{t} {t}", lambda b, x, y: b.fcmp_unordered("uno", x, y))


# -------------------------------------------------------------------------------- floating point (section 9.7.3)


def _float_row(name: str, kind: str, result: str, operands: str, build: Build) -> None:
    """For f32 with .ftz too."""
    _row(f"{name}.{kind}", result, operands, build)
    if kind == "f32":
        _row(f"{name}.ftz.f32", result, operands, _flushing(tuple(operands.split()), result, build))


def _is_nan(b: Any, x: Any) -> Any:
    return b.fcmp_unordered("uno", x, x)


def _extremum(name: str, of_nan: bool) -> Build:
    """The operand that is no NaN, or with .NaN the NaN; -0 below +0."""

    def built(b: Any, x: Any, y: Any) -> Any:
        bits = vector(IR["b32"] if isinstance(x.type.element, ir.FloatType) else IR["b64"])
        sign = "<" if name == "min" else ">"
        # Of two equal numbers, the signs decide: or of the bits for the smaller zero, and for the larger.
        join = b.or_ if name == "min" else b.and_
        zeros = b.bitcast(join(b.bitcast(x, bits), b.bitcast(y, bits)), x.type)
        found = b.select(b.fcmp_ordered(sign, x, y), x, y)
        found = b.select(b.fcmp_ordered("==", x, y), zeros, found)
        if of_nan:
            return b.select(_is_nan(b, x), x, b.select(_is_nan(b, y), y, found))
        return b.select(_is_nan(b, x), y, b.select(_is_nan(b, y), x, found))

    return built


def _saturate(b: Any, x: Any) -> Any:
    """Between 0 and 1, NaN to 0."""
    x = b.select(b.fcmp_ordered(">", x, _same(x, 0.0)), x, _same(x, 0.0))
    return b.select(b.fcmp_ordered("<", x, _same(x, 1.0)), x, _same(x, 1.0))


def _floats() -> None:
    for t in ("f32", "f64"):
        two, three = f"{t} {t}", f"{t} {t} {t}"
        arithmetic: list[tuple[str, str, Build]] = [
            ("add", two, lambda b, x, y: b.fadd(x, y)),
            ("sub", two, lambda b, x, y: b.fsub(x, y)),
            ("mul", two, lambda b, x, y: b.fmul(x, y)),
            ("fma", three, _fma),
        ]
        for name, operands, build in arithmetic:
            _float_row(name, t, t, operands, build)
            if t == "f32":
                _float_row(f"{name}.sat", t, t, operands, lambda b, *v, build=build: _saturate(b, build(b, *v)))
        _float_row("div", t, t, two, lambda b, x, y: b.fdiv(x, y))
        _float_row("rcp", t, t, t, lambda b, x: b.fdiv(_same(x, 1.0), x))
        _float_row("sqrt", t, t, t, _unary("sqrt"))
        _float_row("neg", t, t, t, lambda b, x: b.fneg(x))
        _float_row("abs", t, t, t, _unary("fabs"))
        _row(f"copysign.{t}", t, two, lambda b, sign, x: _binary("copysign")(b, x, sign))
        for name in ("min", "max"):
            _float_row(name, t, t, two, _extremum(name, of_nan=False))
            _float_row(f"{name}.NaN", t, t, two, _extremum(name, of_nan=True))
        infinite: Build = lambda b, x: b.fcmp_ordered("==", _unary("fabs")(b, x), _same(x, float("inf")))  # noqa: E731
        _row(f"testp.infinite.{t}", "pred", t, infinite)
        _row(f"testp.finite.{t}", "pred", t,
             lambda b, x: b.fcmp_ordered("<", _unary("fabs")(b, x), _same(x, float("inf"))))  # fmt: skip
        _row(f"testp.number.{t}", "pred", t, lambda b, x: b.fcmp_ordered("ord", x, x))
        _row(f"testp.notanumber.{t}", "pred", t, _is_nan)


# ------------------------------------------------------------------------------------ conversions (section 9.7.9.21)


def _half_to_float(b: Any, h: Any) -> Any:
    """float16's exponent is moved by a product, which makes normal numbers of denormal ones as well."""
    wide = vector(IR["b32"])
    h = b.zext(h, wide)
    magnitude = b.bitcast(b.shl(b.and_(h, _same(wide, 0x7FFF)), _same(wide, 13)), vector(IR["f32"]))
    bits = b.bitcast(b.fmul(magnitude, _same(magnitude, 2.0**112)), wide)
    not_finite = b.icmp_unsigned(">=", b.and_(h, _same(wide, 0x7FFF)), _same(wide, 0x7C00))
    bits = b.select(not_finite, b.or_(bits, _same(wide, 0x7F800000)), bits)
    return b.bitcast(b.or_(bits, b.shl(b.and_(h, _same(wide, 0x8000)), _same(wide, 16))), vector(IR["f32"]))


def _float_to_half(b: Any, x: Any) -> Any:
    """To nearest, ties to even. Adding 1/2 leaves a denormal float16 in the low bits, rounded."""
    wide = vector(IR["b32"])
    bits = b.bitcast(x, wide)
    magnitude = b.and_(bits, _same(wide, 0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, _same(wide, 13)), _same(wide, 1))
    rebiased = b.add(magnitude, _same(wide, ((15 - 127) << 23) + 0xFFF))
    normal = b.lshr(b.add(rebiased, odd), _same(wide, 13))
    shifted = b.fadd(b.bitcast(magnitude, x.type), _same(x, 0.5))
    denormal = b.sub(b.bitcast(shifted, wide), _same(wide, 0x3F000000))
    out = b.select(b.icmp_unsigned("<", magnitude, _same(wide, 113 << 23)), denormal, normal)
    out = b.select(b.icmp_unsigned(">=", magnitude, _same(wide, 143 << 23)), _same(wide, 0x7C00), out)
    out = b.select(b.icmp_unsigned(">", magnitude, _same(wide, 0x7F800000)), _same(wide, 0x7FFF), out)
    sign = b.and_(b.lshr(bits, _same(wide, 16)), _same(wide, 0x8000))
    return b.trunc(b.or_(out, sign), vector(IR["b16"]))


def _float_to_bfloat(b: Any, x: Any) -> Any:
    """To nearest, ties to even; NaN is 0x7FFF."""
    wide = vector(IR["b32"])
    bits = b.bitcast(x, wide)
    odd = b.and_(b.lshr(bits, _same(wide, 16)), _same(wide, 1))
    rounded = b.lshr(b.add(b.add(bits, _same(wide, 0x7FFF)), odd), _same(wide, 16))
    return b.trunc(b.select(_is_nan(b, x), _same(wide, 0x7FFF), rounded), vector(IR["b16"]))


def _bfloat_to_float(b: Any, h: Any) -> Any:
    wide = vector(IR["b32"])
    return b.bitcast(b.shl(b.zext(h, wide), _same(wide, 16)), vector(IR["f32"]))


def _float_to_tf32(b: Any, x: Any) -> Any:
    """.rna: to nearest, ties away from 0, 13 bits less."""
    wide = vector(IR["b32"])
    bits = b.bitcast(x, wide)
    rounded = b.and_(b.add(bits, _same(wide, 0x1000)), _same(wide, 0xFFFFE000))
    return b.select(_is_nan(b, x), _same(wide, 0x7FFFFFFF), rounded)


def _pair(convert: Build) -> Build:
    """Two numbers in the halves of a register, the first one above."""

    def built(b: Any, high: Any, low: Any) -> Any:
        wide = vector(IR["b32"])
        return b.or_(b.shl(b.zext(convert(b, high), wide), _same(wide, 16)), b.zext(convert(b, low), wide))

    return built


_ROUND = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


def _to_integer(mode: str, bits: int, signed: bool) -> Build:
    """NaN to 0, what is too large to the largest, as .sat is implied."""

    def built(b: Any, x: Any) -> Any:
        to = vector(ir.IntType(bits))
        name = f"llvm.fpto{'s' if signed else 'u'}i.sat.{_suffix(to)}.{_suffix(x.type)}"
        return _call(b, name, to, _unary(_ROUND[mode])(b, x))

    return built


def _clamped(source: str, target: str) -> Build:
    """cvt.sat between integers."""
    (s, bits), (t, wanted) = (source[0], int(source[1:])), (target[0], int(target[1:]))
    low = -(1 << (wanted - 1)) if t == "s" else 0
    high = (1 << (wanted - (t == "s"))) - 1
    least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if s == "s" else (0, (1 << bits) - 1)

    def built(b: Any, x: Any) -> Any:
        compare = b.icmp_signed if s == "s" else b.icmp_unsigned
        if low > least:
            x = b.select(compare("<", x, _same(x, low)), _same(x, low), x)
        if high < most:
            x = b.select(compare(">", x, _same(x, high)), _same(x, high), x)
        return _resized(b, x, vector(ir.IntType(wanted)), s == "s")

    return built


def _conversions() -> None:
    sizes = (8, 16, 32, 64)
    for bits in sizes:
        for wanted in sizes:
            if bits < wanted:
                for sign in "su":
                    to, signed = vector(ir.IntType(wanted)), sign == "s"
                    _row(f"extend.{sign}{bits}.b{wanted}", f"b{wanted}", f"b{bits}",
                         lambda b, x, to=to, signed=signed: _resized(b, x, to, signed))  # fmt: skip
            elif bits > wanted:
                _row(f"cut.b{bits}.b{wanted}", f"b{wanted}", f"b{bits}",
                     lambda b, x, w=wanted: b.trunc(x, vector(ir.IntType(w))))  # fmt: skip
            for source in (f"s{bits}", f"u{bits}"):
                for target in (f"s{wanted}", f"u{wanted}"):
                    _row(f"cvt.sat.{target}.{source}", f"b{wanted}", f"b{bits}", _clamped(source, target))
    for f in ("f32", "f64"):
        for bits in sizes:
            for sign, signed in (("s", True), ("u", False)):
                name = f"{sign}{bits}"
                to = vector(IR[f])
                _row(f"cvt.{f}.{name}", f, f"b{bits}",
                     lambda b, x, to=to, signed=signed: (b.sitofp if signed else b.uitofp)(x, to))  # fmt: skip
                for mode in _ROUND:
                    _row(f"cvt.{mode}.{name}.{f}", f"b{bits}", f, _to_integer(mode, bits, signed))
        for mode, function in _ROUND.items():
            _float_row(f"cvt.{mode}", f, f, f, _unary(function))
    for name, build in (("", lambda b, x: x), (".sat", _saturate)):
        _float_row(f"cvt{name}", "f32", "f32", "f32", build)
    _row("cvt.f64.f32", "f64", "f32", lambda b, x: b.fpext(x, vector(IR["f64"])))
    _row("cvt.f32.f64", "f32", "f64", lambda b, x: b.fptrunc(x, vector(IR["f32"])))
    _row("cvt.f32.f16", "f32", "b16", _half_to_float)
    _row("cvt.f64.f16", "f64", "b16", lambda b, x: b.fpext(_half_to_float(b, x), vector(IR["f64"])))
    _row("cvt.f16.f32", "b16", "f32", _float_to_half)
    _row("cvt.f32.bf16", "f32", "b16", _bfloat_to_float)
    _row("cvt.bf16.f32", "b16", "f32", _float_to_bfloat)
    _row("cvt.f16x2.f32", "b32", "f32 f32", _pair(_float_to_half))
    _row("cvt.bf16x2.f32", "b32", "f32 f32", _pair(_float_to_bfloat))
    _row("cvt.rna.tf32.f32", "b32", "f32", _float_to_tf32)


_integers()
_comparisons()
_floats()
_conversions()
NUMBER = {name: n for n, name in enumerate(TABLE)}
