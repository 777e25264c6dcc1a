"""The score and the indices that a user's function is called with, as Numba types: one source for every target.

Numba types `s * 0.5` with a float32 s as float64. So the score is a type of ours in which Python numbers take the
score's precision, and an index one that becomes a score where it meets a float. What an operator or a function means
for them is written once, here, as rules over LLVM values; `build` registers it with one target's Numba (CPU and CUDA
have registries of their own, and each its own classes, so that neither sees the other's).
"""

# Typed by Numba, whose stubs lack most of what is used here.
# mypy: disable-error-code="attr-defined, name-defined, assignment, call-overload"

import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types

from . import accepted
from .transcendental import F32, F64, I32, I64, Math, Names, floored, small_powers

FLOAT = {"f32": np.float32, "f64": np.float64}


class Target(NamedTuple):
    """One target's Numba: how types, operators and functions are registered, and what they are made of."""

    register_model: Callable[..., Any]
    models: Any
    infer_global: Callable[..., Any]
    AbstractTemplate: Any
    signature: Callable[..., Any]
    lower_builtin: Callable[..., Any]
    lower_cast: Callable[..., Any]
    intrinsic: Callable[..., Any]
    overload: Callable[..., Any]
    overload_attribute: Callable[..., Any]
    populate_array: Callable[..., Any]
    load_item: Callable[..., Any]
    record: Any  # the type of a pointer to int64
    names: Names
    math: dict[str, Math]
    libm: Callable[..., Any]  # libm(fn)(elem) is a function of the math module in one precision
    multiply_add: Callable[..., Any]  # (builder, a, b, c) -> a * b + c
    negative: Callable[..., Any]  # (builder, x) -> -x
    guarded: bool  # whether a number read outside an array of aux is NaN, or 0 where there is none


# ---------------------------------------------------------------- what an operator means, as LLVM


def absolute(builder, x, negative):
    return builder.select(builder.fcmp_ordered("<", x, ir.Constant(x.type, 0.0)), negative(builder, x), x)


def _absolute_index(builder, x):
    return builder.select(builder.icmp_signed("<", x, I64(0)), builder.neg(x), x)


def _floor_divide(builder, x, y):
    """Python's //: towards minus infinity."""
    q, r = builder.sdiv(x, y), builder.srem(x, y)
    wrong = builder.and_(
        builder.icmp_signed("!=", r, I64(0)),
        builder.xor(builder.icmp_signed("<", r, I64(0)), builder.icmp_signed("<", y, I64(0))),
    )
    return builder.select(wrong, builder.sub(q, I64(1)), q)


def _modulo(builder, x, y):
    return builder.sub(x, builder.mul(_floor_divide(builder, x, y), y))


def _better(sign):
    return (
        lambda b, x, y: b.select(b.fcmp_ordered(sign, y, x), y, x),
        lambda b, x, y: b.select(b.icmp_signed(sign, y, x), y, x),
    )


COMPARISONS = (
    (operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">="), (operator.eq, "=="),
)  # fmt: skip


def _operators(negative):
    """(operator, number of arguments, of scores or None, of indices or None, whether the result is a bool)."""
    arithmetic = (("add", "fadd", "add"), ("sub", "fsub", "sub"), ("mul", "fmul", "mul"), ("truediv", "fdiv", None))
    for name, of_scores, of_indices in arithmetic:
        for op in (getattr(operator, name), getattr(operator, "i" + name)):
            yield (
                op,
                2,
                lambda b, x, y, n=of_scores: getattr(b, n)(x, y),
                of_indices and (lambda b, x, y, n=of_indices: getattr(b, n)(x, y)),
                False,
            )
    yield operator.floordiv, 2, lambda b, x, y: floored(b, b.fdiv(x, y)), _floor_divide, False
    yield operator.mod, 2, lambda b, x, y: b.fsub(x, b.fmul(y, floored(b, b.fdiv(x, y)))), _modulo, False
    for op, symbol in COMPARISONS:
        yield (
            op,
            2,
            lambda b, x, y, s=symbol: b.fcmp_ordered(s, x, y),
            lambda b, x, y, s=symbol: b.icmp_signed(s, x, y),
            True,
        )
    unequal = lambda b, x, y: b.fcmp_unordered("!=", x, y)  # noqa: E731
    yield operator.ne, 2, unequal, lambda b, x, y: b.icmp_signed("!=", x, y), True
    for op, name in (
        (operator.and_, "and_"), (operator.or_, "or_"), (operator.xor, "xor"), (operator.lshift, "shl"),
        (operator.rshift, "ashr"),
    ):  # fmt: skip
        yield op, 2, None, lambda b, x, y, n=name: getattr(b, n)(x, y), False
    for op in (bool, operator.truth):
        yield op, 1, lambda b, x: unequal(b, x, x.type(0.0)), lambda b, x: b.icmp_signed("!=", x, I64(0)), True
    zero = lambda b, x: b.fcmp_ordered("==", x, x.type(0.0))  # noqa: E731
    yield operator.not_, 1, zero, lambda b, x: b.icmp_signed("==", x, I64(0)), True
    yield operator.invert, 1, None, lambda b, x: b.not_(x), False
    yield operator.neg, 1, negative, lambda b, x: b.neg(x), False
    yield operator.pos, 1, lambda b, x: x, lambda b, x: x, False
    yield abs, 1, lambda b, x: absolute(b, x, negative), _absolute_index, False
    yield math.fabs, 1, lambda b, x: absolute(b, x, negative), None, False
    yield min, 2, *_better("<"), False
    yield max, 2, *_better(">"), False


# How many bits the result of an operation of indices takes, from those of its operands: 31 for what lies in [0, 2**31),
# 32 for less than 2**31 in magnitude, else 64. A GPU turns 64 bits into a float at a small part of the speed of 32.
_BITS: dict[Any, Callable[..., int]] = {
    operator.sub: lambda x, y: 32 if x == y == 31 else 64,
    operator.floordiv: lambda x, y: max(32, x),
    operator.rshift: lambda x, y: x,
    operator.and_: lambda x, y: 31 if 31 in (x, y) else 64,
    operator.neg: lambda x: max(32, x),
    operator.pos: lambda x: x,
    abs: lambda x: 31 if x < 64 else 64,
    min: max,
    max: max,
}


# ---------------------------------------------------------------- the types


class _Types(SimpleNamespace):
    """The two types of one target, and the type of an operation with operands of different types."""

    def __init__(self):
        class Score(types.Type):
            """A score inside a user's function: a float of the accumulation type. Numbers that are combined with it are
            rounded to that type."""

            def __init__(self, elem):
                self.elem = elem
                self.float = types.float32 if elem == "f32" else types.float64
                super().__init__(name=f"Score({elem})")

            def unify(self, typingctx, other):
                return self if isinstance(other, (types.Number, types.Boolean, Index)) else None

        class Index(types.Type):
            """An index inside a score_mod: an integer among integers; with a float, or under /, ** and math, it becomes
            a Score.

            A plain int64 would make `0.5 ** (h + 1) * abs(i - j)` a computation in float64, with a loop for the power.
            """

            def __init__(self, elem, bits=64):
                self.elem, self.bits = elem, bits
                super().__init__(name=f"Index({elem},{bits})")

            def unify(self, typingctx, other):
                if isinstance(other, Index):
                    return Index(self.elem, max(self.bits, other.bits))
                if isinstance(other, (types.Integer, types.Boolean)):
                    return Index(self.elem)
                return Score(self.elem) if isinstance(other, (Score, types.Float)) else None

        self.Score, self.Index = Score, Index
        self.real = (Score, Index, types.Integer, types.Float, types.Boolean)

    def common(self, args, count):
        """The common type of `count` real arguments, Score or Index. None if they have neither of the two, or an
        argument that is not real."""
        Score, Index = self.Score, self.Index
        ours = next((a for a in args if isinstance(a, (Score, Index))), None)
        if ours is None or len(args) != count or not all(isinstance(a, self.real) for a in args):
            return None
        whole = all(isinstance(a, (Index, types.Integer, types.Boolean)) for a in args)
        return Index(ours.elem) if whole else Score(ours.elem)

    def score_of(self, args, count):
        """The Score type that count real arguments become, or None."""
        common = self.common(args, count)
        return common and self.Score(common.elem)

    def bits(self, op, args):
        given = [31 if isinstance(a, types.Boolean) else getattr(a, "bits", 64) for a in args]
        return _BITS[op](*given) if op in _BITS else 64


def _register_types(target, t):
    Score, Index = t.Score, t.Index

    @target.register_model(Score)
    class ScoreModel(target.models.PrimitiveModel):
        def __init__(self, dmm, fe_type):
            super().__init__(dmm, fe_type, F32 if fe_type.elem == "f32" else F64)

    @target.register_model(Index)
    class IndexModel(target.models.PrimitiveModel):
        def __init__(self, dmm, fe_type):
            super().__init__(dmm, fe_type, I64)

    @target.lower_cast(types.Number, Score)
    @target.lower_cast(types.Boolean, Score)
    def number_to_score(context, builder, fromty, toty, val):
        return context.cast(builder, val, fromty, toty.float)

    @target.lower_cast(Index, Score)
    def index_to_score(context, builder, fromty, toty, val):
        val = val if fromty.bits == 64 else builder.trunc(val, I32)
        return builder.sitofp(val, F32 if toty.elem == "f32" else F64)

    @target.lower_cast(types.Integer, Index)
    @target.lower_cast(types.Boolean, Index)
    def number_to_index(context, builder, fromty, toty, val):
        return context.cast(builder, val, fromty, types.int64)

    @target.lower_cast(Index, Index)
    def index_to_index(context, builder, fromty, toty, val):
        return val

    @target.lower_cast(Index, types.Integer)
    def index_to_number(context, builder, fromty, toty, val):
        return context.cast(builder, val, types.int64, toty)


def _register_operators(target, t):
    """Every operator over Scores and Indices; indices become scores where there is no code for them."""

    def register(op, count, of_scores, of_indices, is_bool):
        @target.infer_global(op)
        class Typing(target.AbstractTemplate):
            def generic(self, args, kws):
                common = t.common(args, count) if of_indices else t.score_of(args, count)
                if common is None or not (of_scores or isinstance(common, t.Index)):
                    return None
                result = t.Index(common.elem, t.bits(op, args)) if isinstance(common, t.Index) else common
                return target.signature(types.boolean if is_bool else result, *[common] * count)

        if of_scores:

            @target.lower_builtin(op, *[t.Score] * count)
            def lower_scores(context, builder, sig, args):
                return of_scores(builder, *args)

        if of_indices:

            @target.lower_builtin(op, *[t.Index] * count)
            def lower_indices(context, builder, sig, args):
                return of_indices(builder, *args)

    for rule in _operators(target.negative):
        register(*rule)

    @target.infer_global(operator.getitem)
    class ArrayAtIndex(target.AbstractTemplate):
        """aux[i] and aux[h, i - j + n]: an Index is an integer to an array."""

        def generic(self, args, kws):
            array, at = args
            if not isinstance(array, types.Array):
                return None
            one = isinstance(at, t.Index)
            parts = (at,) if one else tuple(at) if isinstance(at, types.BaseTuple) else ()
            if len(parts) != array.ndim or not any(isinstance(p, t.Index) for p in parts):
                return None
            if all(isinstance(p, (t.Index, types.Integer)) for p in parts):
                to = types.intp if one else types.UniTuple(types.intp, array.ndim)
                return target.signature(array.dtype, array, to)
            return None


# ---------------------------------------------------------------- conversions, and functions


def _conversions(target, t):
    @target.intrinsic
    def as_int64(typingctx, x):
        def codegen(context, builder, sig, args):
            return args[0]

        return types.int64(x), codegen

    @target.intrinsic
    def as_float(typingctx, x):
        """A score, an index or any real number as a float: of the score's type where there is one to tell it."""
        ours = isinstance(x, (t.Score, t.Index))
        to = t.Score(x.elem).float if ours else types.float64

        def codegen(context, builder, sig, args):
            if isinstance(x, t.Score):
                return args[0]
            return context.cast(builder, args[0], x, t.Score(x.elem) if ours else to)

        return to(x), codegen

    def wrapped(kind, carrier):
        @target.intrinsic
        def cast(typingctx, x):
            def codegen(context, builder, sig, args):
                return args[0]

            return kind(carrier), codegen

        return cast

    t.as_float = as_float
    t.AS_SCORE = {elem: wrapped(t.Score(elem), t.Score(elem).float) for elem in FLOAT}
    t.AS_INDEX = {elem: wrapped(t.Index(elem), types.int64) for elem in FLOAT}
    # of an int64 that is known to lie in [0, 2**31)
    t.AS_SHORT_INDEX = {elem: wrapped(t.Index(elem, 31), types.int64) for elem in FLOAT}

    @target.overload(int)
    def int_of(x):
        if isinstance(x, t.Index):
            return lambda x: as_int64(x)
        if isinstance(x, t.Score):
            return lambda x: np.int64(as_float(x))

    @target.overload(float)
    def float_of(x):
        if isinstance(x, (t.Index, t.Score)):
            cast = t.AS_SCORE[x.elem]
            return lambda x: cast(as_float(x))


def _register_functions(target, t):
    as_float, choose, inner = t.as_float, target.names.choose, target.names.inner

    def unary(fn, implementation):
        @target.overload(fn)
        def resolve(x):
            if isinstance(x, (t.Score, t.Index)):
                f, cast = implementation(x.elem), t.AS_SCORE[x.elem]
                return lambda x: cast(f(as_float(x)))

    for name in ("exp", "tanh", "log", "log1p", "sin", "cos", "sqrt"):
        for module in (math, np):
            unary(getattr(module, name), lambda elem, n=name: getattr(target.math[elem], n))
    for name in ("expm1", "log2", "log10", "atan", "sinh", "cosh", "erf", "floor", "ceil"):
        unary(getattr(math, name), target.libm(getattr(math, name)))

    products = {elem: {n: inner(f) for n, f in small_powers(elem)[0].items()} for elem in FLOAT}

    def power(fn):
        @target.overload(fn, prefer_literal=True)
        def resolve(x, y):
            s = t.score_of((x, y), 2)
            if s is None:
                return None
            f, cast, to = target.math[s.elem].pow, t.AS_SCORE[s.elem], FLOAT[s.elem]
            product = products[s.elem].get(y.literal_value) if isinstance(y, types.IntegerLiteral) else None
            if product is not None:
                return lambda x, y: cast(product(to(as_float(x))))
            return lambda x, y: cast(f(to(as_float(x)), to(as_float(y))))

    for fn in (operator.pow, math.pow, pow):
        power(fn)

    @target.overload(accepted.where)
    def where(condition, yes, no):
        s = t.score_of((yes, no), 2)
        if s is not None:
            cast, to = t.AS_SCORE[s.elem], FLOAT[s.elem]
            return lambda condition, yes, no: cast(choose(bool(condition), to(as_float(yes)), to(as_float(no))))
        if all(isinstance(x, (types.Number, types.Boolean)) for x in (yes, no)):
            return lambda condition, yes, no: yes if condition else no


def build(target: Target) -> SimpleNamespace:
    """Register the types with a target.

    Returns
    -------
    Score, Index : the types, Score(elem) and Index(elem, bits)
    AS_SCORE, AS_INDEX, AS_SHORT_INDEX : elem -> function that makes one of a float of that type, or of an int64
    as_float : the way back
    real : the types of a real number
    common, score_of : see _Types
    """
    t = _Types()
    _register_types(target, t)
    _register_operators(target, t)
    _conversions(target, t)
    _register_functions(target, t)
    return t
