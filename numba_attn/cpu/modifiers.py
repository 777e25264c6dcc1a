"""User functions and transcendental functions on the CPU.

Numba types `s * 0.5` with a float32 s as float64, and libm calls run lane by lane (tanh 0.13 G pairs/s where the
products do 0.9). So the score is a type of ours in which Python numbers take the score's precision, and exp, log,
log1p, tanh, sin, cos, sqrt and pow of it are the branch-free functions below, which LLVM turns into vector code as part
of a loop over a row of the score tile.

A user's function is compiled alone, as that loop, and the kernel calls it through its address: a new function costs a
tenth of a second, and no kernel is ever compiled for it.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin, lower_cast
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, overload, register_model

from .. import score
from ..online import LOG2E
from .compile import array_type, compile_cfunc, inner
from .simd import F32, F64, I32, I64, ROW, f32_ptr, f64_ptr, i64_ptr, u8_ptr

# ---------------------------------------------------------------- scalar pieces that LLVM can vectorise


def multiply_add(builder, a, b, c):
    """a * b + c of LLVM values, fused where the CPU can."""
    if not ROW.fma:
        return builder.fadd(builder.fmul(a, b), c)
    name = f"llvm.fma.f{32 if a.type == F32 else 64}"
    fn = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(fn, [a, b, c])


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, fused where the CPU can."""

    def codegen(context, builder, sig, args):
        return multiply_add(builder, *args)

    return a(a, a, a), codegen


@intrinsic
def power_of_two(typingctx, shifted):
    """2**n as a float, from n + magic (see `magic`): n must be a normal exponent."""

    def codegen(context, builder, sig, args):
        f32 = sig.args[0] == types.float32
        to, mantissa, bias = (I32, 23, 127) if f32 else (I64, 52, 1023)
        bits = builder.shl(builder.add(builder.bitcast(args[0], to), ir.Constant(to, bias)), ir.Constant(to, mantissa))
        return builder.bitcast(bits, args[0].type)

    return shifted(shifted), codegen


@intrinsic
def split_float(typingctx, x):
    """(m, e) with x = m * 2**e and m in [sqrt(1/2), sqrt(2)), for positive normal x; e as a float."""

    def codegen(context, builder, sig, args):
        f32 = sig.args[0] == types.float32
        to, mantissa, half = (I32, 23, 0x3F3504F3) if f32 else (I64, 52, 0x3FE6A09E667F3BCD)
        c = lambda v: ir.Constant(to, v)  # noqa: E731
        bits = builder.bitcast(args[0], to)
        e = builder.ashr(builder.sub(bits, c(half)), c(mantissa))
        m = builder.bitcast(builder.sub(bits, builder.shl(e, c(mantissa))), args[0].type)
        return context.make_tuple(builder, sig.return_type, [m, builder.sitofp(e, args[0].type)])

    return types.UniTuple(x, 2)(x), codegen


@intrinsic
def choose(typingctx, condition, yes, no):
    """select: both sides are computed."""

    def codegen(context, builder, sig, args):
        return builder.select(*args)

    return yes(types.boolean, yes, yes), codegen


class Math:
    """The functions for one accumulation type. Errors are 1 to 3 units in the last place; sin and cos for |x| < 1e6."""

    def __init__(self, elem: str):
        f32 = elem == "f32"
        acc = np.float32 if f32 else np.float64
        magic = acc(1.5 * 2.0 ** (23 if f32 else 52))  # adding it rounds to an integer, held in the low bits
        log2e, one, two, half, zero = acc(LOG2E), acc(1), acc(2), acc(0.5), acc(0)
        ln2_high = (
            acc(0.693145751953125) if f32 else acc(0.6931471803691238)
        )  # few enough bits that n * ln2_high is exact
        ln2_low = acc(math.log(2.0) - float(ln2_high)) if f32 else acc(1.9082149292705877e-10)
        biggest, smallest = (acc(88.8), acc(-104.0)) if f32 else (acc(709.9), acc(-746.0))
        # e**r - 1 = r + r**2 (1/2 + r/6 + ...), |r| <= ln2 / 2: Taylor, 5e-9 and 4e-18 relative
        terms = tuple(acc(1.0 / math.factorial(k)) for k in range(8 if f32 else 14, 1, -1))

        @inner
        def reduced(x):
            """(e**r - 1, n + magic) with x = n ln2 + r."""
            shifted = fma(x, log2e, magic)
            n = shifted - magic
            r = fma(-n, ln2_low, fma(-n, ln2_high, x))
            p = terms[0]
            for k in range(1, len(terms)):
                p = fma(p, r, terms[k])
            return fma(r * r, p, r), shifted

        @inner
        def exp(x):
            c = choose(x > biggest, biggest, choose(x < smallest, smallest, x))
            p, shifted = reduced(c)
            n = shifted - magic
            low = fma(n, half, magic)  # 2**n in two halves, each a normal number
            scaled = (p + one) * power_of_two(low) * power_of_two((n - (low - magic)) + magic)
            return scaled

        @inner
        def tanh(x):
            """-E / (E + 2) with E = e**(-2|x|) - 1, which loses nothing near 0."""
            a = abs(x)
            limit = acc(10.0) if f32 else acc(22.0)
            p, shifted = reduced(-two * choose(a > limit, limit, a))
            scale = power_of_two(shifted)
            e = fma(p, scale, scale - one)
            t = -e / (e + two)
            return choose(x < zero, -t, t)

        atanh_terms = tuple(acc(2.0 / (2 * k + 1)) for k in range(5 if f32 else 11, 0, -1))
        tiny, huge = acc(np.finfo(acc).tiny), acc(np.finfo(acc).max)
        lift = acc(2.0 ** (23 if f32 else 52))
        lifted = acc(23 if f32 else 52)

        @inner
        def log(x):
            """2 atanh((m - 1) / (m + 1)) + e ln2."""
            sub = x < tiny
            m, e = split_float(choose(sub, x * lift, x))
            e = choose(sub, e - lifted, e)
            f = m - one
            s = f / (two + f)
            z = s * s
            p = atanh_terms[0]
            for k in range(1, len(atanh_terms)):
                p = fma(p, z, atanh_terms[k])
            y = fma(e, ln2_high, fma(e, ln2_low, fma(s * z, p, two * s)))
            y = choose(x > huge, x, y)
            y = choose(x == zero, acc(-np.inf), y)
            return choose(x >= zero, y, acc(np.nan))

        @inner
        def log1p(x):
            u = one + x
            y = log(u) + choose(u > huge, zero, (x - (u - one)) / u)
            return choose(u == one, x, choose(u == zero, acc(-np.inf), y))

        # sin and cos in double, whatever the score is: r = x - n pi/2 in three steps, the first two exact also without
        # a fused multiply-add
        pio2_high = np.float64(int(math.pi / 2 * 2**32) / 2**32)
        pio2_middle, pio2_low = np.float64(math.pi / 2) - pio2_high, np.float64(6.123233995736766e-17)
        two_over_pi, magic64 = np.float64(2 / math.pi), np.float64(1.5 * 2.0**52)
        sin_terms = tuple(np.float64((-1.0) ** k / math.factorial(2 * k + 1)) for k in range(8, 0, -1))
        cos_terms = tuple(np.float64((-1.0) ** k / math.factorial(2 * k)) for k in range(8, 0, -1))

        @inner
        def sine(x, quarter):
            """sin(x + quarter pi/2)."""
            d = np.float64(x)
            shifted = d * two_over_pi + magic64
            n = shifted - magic64
            r = fma(-n, pio2_low, fma(-n, pio2_middle, fma(-n, pio2_high, d)))
            z = r * r
            s, c = sin_terms[0], cos_terms[0]
            for k in range(1, len(sin_terms)):
                s = fma(s, z, sin_terms[k])
                c = fma(c, z, cos_terms[k])
            s = fma(r * z, s, r)
            c = fma(z, c, np.float64(1))
            turn = n + quarter
            turn = turn - np.float64(4) * math.floor(turn * np.float64(0.25))
            y = choose((turn == 1) | (turn == 3), c, s)
            return acc(choose(turn >= 2, -y, y))

        @inner
        def sin(x):
            return sine(x, np.float64(0))

        @inner
        def cos(x):
            return sine(x, np.float64(1))

        @inner
        def power(x, y):
            return acc(np.float64(x) ** np.float64(y))

        @inner
        def sqrt(x):
            return math.sqrt(x)

        self.exp, self.tanh, self.log, self.log1p, self.sin, self.cos, self.pow, self.sqrt = (
            exp,
            tanh,
            log,
            log1p,
            sin,
            cos,
            power,
            sqrt,
        )


MATH = {elem: Math(elem) for elem in ("f32", "f64")}


# ---------------------------------------------------------------- the score and the indices as types


class Score(types.Type):
    """A score inside a user's function: a float of the accumulation type; numbers that meet it are rounded to it."""

    def __init__(self, elem):
        self.elem = elem
        self.float = types.float32 if elem == "f32" else types.float64
        super().__init__(name=f"Score({elem})")

    def unify(self, typingctx, other):
        return self if isinstance(other, (types.Number, types.Boolean, Index)) else None


class Index(types.Type):
    """An index inside a score_mod: an integer among integers; with a float, or under /, ** and math, it becomes a
    Score.

    A plain int64 would make `0.5 ** (h + 1) * abs(i - j)` a computation in float64, with a loop for the power.
    """

    def __init__(self, elem):
        self.elem = elem
        super().__init__(name=f"Index({elem})")

    def unify(self, typingctx, other):
        if isinstance(other, types.Integer):
            return self
        return Score(self.elem) if isinstance(other, (Score, types.Float)) else None


@register_model(Score)
class _ScoreModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, F32 if fe_type.elem == "f32" else F64)


@register_model(Index)
class _IndexModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, I64)


@lower_cast(types.Number, Score)
@lower_cast(types.Boolean, Score)
def _number_to_score(context, builder, fromty, toty, val):
    return context.cast(builder, val, fromty, toty.float)


@lower_cast(Index, Score)
def _index_to_score(context, builder, fromty, toty, val):
    return builder.sitofp(val, F32 if toty.elem == "f32" else F64)


@lower_cast(types.Integer, Index)
@lower_cast(types.Boolean, Index)
def _number_to_index(context, builder, fromty, toty, val):
    return context.cast(builder, val, fromty, types.int64)


@lower_cast(Index, types.Integer)
def _index_to_number(context, builder, fromty, toty, val):
    return context.cast(builder, val, types.int64, toty)


def _common(args, count):
    """The type that count real arguments meet in, Score or Index; None if neither is among them, or anything else."""
    kinds = (Score, Index, types.Integer, types.Float, types.Boolean)
    ours = next((a for a in args if isinstance(a, (Score, Index))), None)
    if ours is None or len(args) != count or not all(isinstance(a, kinds) for a in args):
        return None
    whole = all(isinstance(a, (Index, types.Integer, types.Boolean)) for a in args)
    return Index(ours.elem) if whole else Score(ours.elem)


def _score_of(args, count):
    """The Score type that count real arguments become, or None."""
    common = _common(args, count)
    return common and Score(common.elem)


def _operator(op, count, of_scores, of_indices=None, result=None):
    """op over Scores and Indices: code for either or both; indices become scores where there is none for them."""

    @infer_global(op)
    class Typing(AbstractTemplate):
        def generic(self, args, kws):
            common = _common(args, count) if of_indices else _score_of(args, count)
            if common is not None and (of_scores or isinstance(common, Index)):
                return signature(result or common, *[common] * count)

    if of_scores:

        @lower_builtin(op, *[Score] * count)
        def lower_scores(context, builder, sig, args):
            return of_scores(builder, *args)

    if of_indices:

        @lower_builtin(op, *[Index] * count)
        def lower_indices(context, builder, sig, args):
            return of_indices(builder, *args)


def floored(builder, x):
    name = f"llvm.floor.f{32 if x.type == F32 else 64}"
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(x.type, [x.type]), name), [x])


def _floor_divide(builder, x, y):
    """Python's //: towards minus infinity."""
    q, r = builder.sdiv(x, y), builder.srem(x, y)
    zero = ir.Constant(I64, 0)
    wrong = builder.and_(
        builder.icmp_signed("!=", r, zero),
        builder.xor(builder.icmp_signed("<", r, zero), builder.icmp_signed("<", y, zero)),
    )
    return builder.select(wrong, builder.sub(q, ir.Constant(I64, 1)), q)


def _modulo(builder, x, y):
    return builder.sub(x, builder.mul(_floor_divide(builder, x, y), y))


def absolute(builder, x):
    return builder.select(builder.fcmp_ordered("<", x, ir.Constant(x.type, 0.0)), builder.fneg(x), x)


def _absolute_index(builder, x):
    return builder.select(builder.icmp_signed("<", x, ir.Constant(I64, 0)), builder.neg(x), x)


for _names, _score_name, _index_name in (
    (("add", "iadd"), "fadd", "add"),
    (("sub", "isub"), "fsub", "sub"),
    (("mul", "imul"), "fmul", "mul"),
    (("truediv", "itruediv"), "fdiv", None),
):
    for _name in _names:
        _operator(
            getattr(operator, _name),
            2,
            lambda b, x, y, n=_score_name: getattr(b, n)(x, y),
            _index_name and (lambda b, x, y, n=_index_name: getattr(b, n)(x, y)),
        )
_operator(operator.floordiv, 2, lambda b, x, y: floored(b, b.fdiv(x, y)), _floor_divide)
_operator(operator.mod, 2, lambda b, x, y: b.fsub(x, b.fmul(y, floored(b, b.fdiv(x, y)))), _modulo)
for _op, _symbol in (
    (operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">="), (operator.eq, "=="),
):  # fmt: skip
    _operator(
        _op,
        2,
        lambda b, x, y, s=_symbol: b.fcmp_ordered(s, x, y),
        lambda b, x, y, s=_symbol: b.icmp_signed(s, x, y),
        result=types.boolean,
    )
_operator(
    operator.ne,
    2,
    lambda b, x, y: b.fcmp_unordered("!=", x, y),
    lambda b, x, y: b.icmp_signed("!=", x, y),
    result=types.boolean,
)
for _op, _name in (
    (operator.and_, "and_"), (operator.or_, "or_"), (operator.xor, "xor"), (operator.lshift, "shl"),
    (operator.rshift, "ashr"),
):  # fmt: skip
    _operator(_op, 2, None, lambda b, x, y, n=_name: getattr(b, n)(x, y))
for _op, _nonzero in ((bool, True), (operator.truth, True), (operator.not_, False)):
    _operator(
        _op,
        1,
        lambda b, x, yes=_nonzero: (b.fcmp_unordered if yes else b.fcmp_ordered)("!=" if yes else "==", x, x.type(0.0)),
        lambda b, x, yes=_nonzero: b.icmp_signed("!=" if yes else "==", x, x.type(0)),
        result=types.boolean,
    )
_operator(operator.invert, 1, None, lambda b, x: b.not_(x))
_operator(operator.neg, 1, lambda b, x: b.fneg(x), lambda b, x: b.neg(x))
_operator(operator.pos, 1, lambda b, x: x, lambda b, x: x)
_operator(abs, 1, absolute, _absolute_index)
_operator(math.fabs, 1, absolute)
_operator(
    min,
    2,
    lambda b, x, y: b.select(b.fcmp_ordered("<", y, x), y, x),
    lambda b, x, y: b.select(b.icmp_signed("<", y, x), y, x),
)
_operator(
    max,
    2,
    lambda b, x, y: b.select(b.fcmp_ordered(">", y, x), y, x),
    lambda b, x, y: b.select(b.icmp_signed(">", y, x), y, x),
)


@infer_global(operator.getitem)
class _ArrayAtIndex(AbstractTemplate):
    """aux[i] and aux[h, i - j + n]: an Index is an integer to an array."""

    def generic(self, args, kws):
        array, at = args
        if not isinstance(array, types.Array):
            return None
        one = isinstance(at, Index)
        parts = (at,) if one else tuple(at) if isinstance(at, types.BaseTuple) else ()
        if len(parts) != array.ndim or not any(isinstance(p, Index) for p in parts):
            return None
        if all(isinstance(p, (Index, types.Integer)) for p in parts):
            return signature(array.dtype, array, types.intp if one else types.UniTuple(types.intp, array.ndim))
        return None


@overload(int)
def _int(x):
    if isinstance(x, Index):
        return lambda x: _as_int64(x)
    if isinstance(x, Score):
        return lambda x: np.int64(as_float(x))


@overload(float)
def _float(x):
    if isinstance(x, (Index, Score)):
        cast = AS_SCORE[x.elem]
        return lambda x: cast(as_float(x))


@intrinsic
def _as_int64(typingctx, x):
    def codegen(context, builder, sig, args):
        return args[0]

    return types.int64(x), codegen


@intrinsic
def as_float(typingctx, x):
    """A score, an index or any real number as a float: of the score's type where there is one to tell it."""
    to = x.float if isinstance(x, Score) else Score(x.elem).float if isinstance(x, Index) else types.float64

    def codegen(context, builder, sig, args):
        if isinstance(x, Score):
            return args[0]
        return context.cast(builder, args[0], x, Score(x.elem) if isinstance(x, Index) else to)

    return to(x), codegen


def _wrapped(kind, carrier):
    @intrinsic
    def cast(typingctx, x):
        def codegen(context, builder, sig, args):
            return args[0]

        return kind(carrier), codegen

    return cast


AS_SCORE = {elem: _wrapped(Score(elem), Score(elem).float) for elem in ("f32", "f64")}
AS_INDEX = {elem: _wrapped(Index(elem), types.int64) for elem in ("f32", "f64")}


def _unary(fn, implementation):
    @overload(fn)
    def resolve(x):
        if isinstance(x, (Score, Index)):
            f, cast = implementation(x.elem), AS_SCORE[x.elem]
            return lambda x: cast(f(as_float(x)))


def libm(fn):
    """Lane by lane, in the score's precision: right, but slow."""

    @inner
    def call(x):
        return fn(x)

    def of(elem):
        if elem == "f64":
            return call
        return inner(lambda x: np.float32(call(x)))

    return of


for _name in ("exp", "tanh", "log", "log1p", "sin", "cos", "sqrt"):
    for _module in (math, np):
        _unary(getattr(_module, _name), lambda elem, n=_name: getattr(MATH[elem], n))
for _name in ("expm1", "log2", "log10", "atan", "sinh", "cosh", "erf", "floor", "ceil"):
    _unary(getattr(math, _name), libm(getattr(math, _name)))


# x**n for a whole n that stands in the source
_POWERS = {
    n: inner(f)
    for n, f in enumerate((lambda x: x, lambda x: x * x, lambda x: x * x * x, lambda x: (x * x) * (x * x)), start=1)
}


def _power(fn):
    @overload(fn, prefer_literal=True)
    def resolve(x, y):
        s = _score_of((x, y), 2)
        if s is None:
            return None
        f, cast, to = MATH[s.elem].pow, AS_SCORE[s.elem], np.float32 if s.elem == "f32" else np.float64
        product = _POWERS.get(y.literal_value) if isinstance(y, types.IntegerLiteral) else None
        if product is not None:
            return lambda x, y: cast(product(to(as_float(x))))
        return lambda x, y: cast(f(to(as_float(x)), to(as_float(y))))


_power(operator.pow)
_power(math.pow)
_power(pow)


@overload(score.where)
def _where(condition, yes, no):
    s = _score_of((yes, no), 2)
    if s is not None:
        cast, to = AS_SCORE[s.elem], np.float32 if s.elem == "f32" else np.float64
        return lambda condition, yes, no: cast(choose(bool(condition), to(as_float(yes)), to(as_float(no))))
    if all(isinstance(x, (types.Number, types.Boolean)) for x in (yes, no)):
        return lambda condition, yes, no: yes if condition else no


# ---------------------------------------------------------------- compiling a user's function


@intrinsic
def aux_arrays(typingctx, table, kinds):
    """The arrays that a table of (address, shape, strides) describes; kinds: a tuple type of their array types."""
    kinds = kinds.instance_type

    def codegen(context, builder, sig, args):
        at, arrays = 0, []
        for kind in kinds:
            numbers = [builder.load(builder.gep(args[0], [ir.Constant(I64, at + n)])) for n in range(1 + 2 * kind.ndim)]
            at += len(numbers)
            array = context.make_array(kind)(context, builder)
            data = builder.inttoptr(numbers[0], array.data.type)
            itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
            from numba.np.arrayobj import populate_array

            populate_array(
                array,
                data=data,
                shape=numbers[1 : 1 + kind.ndim],
                strides=numbers[1 + kind.ndim :],
                itemsize=itemsize,
                meminfo=None,
            )
            arrays.append(array._getvalue())
        return context.make_tuple(builder, kinds, arrays)

    return kinds(table, types.TypeRef(kinds)), codegen


def aux_table(aux: tuple[np.ndarray, ...]) -> np.ndarray:
    """Address, shape and strides of each array, as `aux_arrays` reads them."""
    numbers: list[int] = []
    for a in aux:
        numbers += [a.ctypes.data, *a.shape, *a.strides]
    return np.array(numbers or [0], np.int64)


_ADDRESSES: dict[Any, int] = {}


def tile_function(
    fn: Callable[..., Any] | score.ScoreMod,
    kind: str,
    elem: str,
    aux: tuple[np.ndarray, ...],
    *,
    asked: tuple[Any, ...] = (),
) -> int:
    """The address of fn as a loop over a tile; a kind of "score" or "mask", or one of the derivatives of a score.

    C signature of these two: (target, row stride, lanes, b, h, first i, first j, keys, aux table). A score function
    replaces target[j, lane] and ends in log2 units; a mask function clears the bytes of the pairs that it hides. For
    the derivatives, and for asked, see dual.py.
    """
    grad = None if kind in ("score", "mask") or not isinstance(fn, score.ScoreMod) else fn.grad
    functions = score.identity(score.plain_function(fn)), grad and score.identity(grad)
    key = (kind, elem, functions, tuple((a.dtype, a.ndim) for a in aux), asked)
    address = _ADDRESSES.get(key)
    if address is None:
        address = _ADDRESSES[key] = _compile(fn, kind, elem, aux, asked)
    return address


def _compile(fn, kind, elem, aux, asked):
    if kind not in ("score", "mask"):
        from .dual import compile_derivative  # a process that wants no gradient does not pay for its types

        return compile_derivative(fn, kind, elem, aux, asked)
    call = inner(score.plain_function(fn))
    kinds = types.Tuple([array_type(a.dtype, a.ndim) for a in aux])
    index = AS_INDEX[elem]
    acc, pointer, cast = (
        (np.float32, f32_ptr, AS_SCORE[elem]) if elem == "f32" else (np.float64, f64_ptr, AS_SCORE[elem])
    )
    log2e = acc(LOG2E)

    def score_tile(target, w, lanes, b, h, i, j, keys, table):
        arrays = aux_arrays(i64_ptr(table), kinds)
        for key in range(keys):
            row = pointer(target) + key * w
            for r in range(lanes):
                at_i, at_j = index(i + r), index(j + key)
                row[r] = acc(as_float(call(cast(row[r]), index(b), index(h), at_i, at_j, *arrays))) * log2e

    def mask_tile(target, w, lanes, b, h, i, j, keys, table):
        arrays = aux_arrays(i64_ptr(table), kinds)
        for key in range(keys):
            row = u8_ptr(target) + key * w
            for r in range(lanes):
                row[r] = row[r] if call(b, h, i + r, j + key, *arrays) else 0

    name = f"{kind}_mod {getattr(score.plain_function(fn), '__name__', '?')}"
    try:
        return compile_cfunc(
            score_tile if kind == "score" else mask_tile, types.void(*[types.intp] * 9), name, cached=False
        )
    except Exception as error:
        raise TypeError(f"{kind}_mod: the function could not be compiled: {error}") from error
