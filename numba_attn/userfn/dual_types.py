"""Dual numbers and the arrays of aux in a derivative pass, as Numba types: one source for every target.

In a derivative pass the score is a Dual, a pair (value, tangent) that takes the operations of a Score and carries the
derivative along: the user's function is compiled as it stands, once more, for that type. Both halves are branch-free;
tanh and exp cost their value alone, since the tangent is made from it. A number that is no Dual has the derivative 0,
and no arithmetic is spent on it.

Where there is no derivative: abs'(0) is 0, min and max follow the operand that they return (the first of two equal
ones), where follows the chosen side alone, comparisons, // and math.floor have the derivative 0.
"""

# Typed by Numba, whose stubs lack most of what is used here.
# mypy: disable-error-code="attr-defined, name-defined, assignment, call-overload"

import itertools
import math
import operator
from types import SimpleNamespace

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from . import accepted
from .scalar_types import COMPARISONS, FLOAT, Target, absolute
from .transcendental import F32, F64, floored, rules, small_powers


def pack(builder, value, tangent):
    pair = ir.Constant(ir.LiteralStructType([value.type] * 2), ir.Undefined)
    tangent = ir.Constant(value.type, 0.0) if tangent is None else tangent
    return builder.insert_value(builder.insert_value(pair, value, 0), tangent, 1)


# ---------------------------------------------------------------- operators: rules on (value, tangent), None for a 0


class _Rules:
    """rule(builder, (value, tangent), ...) -> (value, tangent), or the value alone where the result is no Dual."""

    def __init__(self, target: Target):
        self.negative, self.multiply_add = target.negative, target.multiply_add

    def minus(self, builder, x, y):
        """x - y of tangents."""
        if y is None:
            return x
        return self.negative(builder, y) if x is None else builder.fsub(x, y)

    @staticmethod
    def scaled(builder, x, by):
        return None if x is None else builder.fmul(x, by)

    def add(self, builder, x, y):
        given = [t for t in (x[1], y[1]) if t is not None]
        return builder.fadd(x[0], y[0]), builder.fadd(*given) if len(given) == 2 else given[0]

    def sub(self, builder, x, y):
        return builder.fsub(x[0], y[0]), self.minus(builder, x[1], y[1])

    def mul(self, builder, x, y):
        value, left = builder.fmul(x[0], y[0]), self.scaled(builder, x[1], y[0])
        if y[1] is None:
            return value, left
        return value, builder.fmul(x[0], y[1]) if left is None else self.multiply_add(builder, x[0], y[1], left)

    def truediv(self, builder, x, y):
        value = builder.fdiv(x[0], y[0])
        return value, builder.fdiv(self.minus(builder, x[1], self.scaled(builder, y[1], value)), y[0])

    def mod(self, builder, x, y):
        whole = floored(builder, builder.fdiv(x[0], y[0]))
        value = builder.fsub(x[0], builder.fmul(y[0], whole))
        return value, self.minus(builder, x[1], self.scaled(builder, y[1], whole))

    def absolute(self, builder, x):
        zero = ir.Constant(x[0].type, 0.0)
        below, above = (builder.fcmp_ordered(sign, x[0], zero) for sign in "<>")
        tangent = builder.select(below, self.negative(builder, x[1]), builder.select(above, x[1], zero))
        return absolute(builder, x[0], self.negative), tangent

    @staticmethod
    def better(sign):
        def rule(builder, x, y):
            second = builder.fcmp_ordered(sign, y[0], x[0])
            tangents = [ir.Constant(x[0].type, 0.0) if t is None else t for t in (y[1], x[1])]
            return builder.select(second, y[0], x[0]), builder.select(second, *tangents)

        return rule


def _register_operators(target, t, Dual, with_dual):
    def register(op, count, rule, result=Dual):
        @target.infer_global(op)
        class Typing(target.AbstractTemplate):
            def generic(self, args, kws):
                kinds = with_dual(args, count)
                if kinds is not None:
                    to = result if isinstance(result, types.Type) else result(kinds[0].elem)
                    return target.signature(to, *kinds)

        for kinds in itertools.product((Dual, t.Score), repeat=count):
            if Dual in kinds:

                @target.lower_builtin(op, *kinds)
                def lower(context, builder, sig, args):
                    pairs = [
                        tuple(cgutils.unpack_tuple(builder, a, 2)) if isinstance(x, Dual) else (a, None)
                        for a, x in zip(args, sig.args, strict=True)
                    ]
                    out = rule(builder, *pairs)
                    return pack(builder, *out) if result is Dual else out

    r = _Rules(target)
    for name in ("add", "sub", "mul", "truediv"):
        register(getattr(operator, name), 2, getattr(r, name))
        register(getattr(operator, "i" + name), 2, getattr(r, name))
    register(operator.mod, 2, r.mod)
    register(operator.floordiv, 2, lambda b, x, y: floored(b, b.fdiv(x[0], y[0])), t.Score)
    for op, sign in COMPARISONS:
        register(op, 2, lambda b, x, y, s=sign: b.fcmp_ordered(s, x[0], y[0]), types.boolean)
    register(operator.ne, 2, lambda b, x, y: b.fcmp_unordered("!=", x[0], y[0]), types.boolean)
    for op in (bool, operator.truth):
        register(op, 1, lambda b, x: b.fcmp_unordered("!=", x[0], x[0].type(0.0)), types.boolean)
    register(operator.not_, 1, lambda b, x: b.fcmp_ordered("==", x[0], x[0].type(0.0)), types.boolean)
    register(operator.neg, 1, lambda b, x: (target.negative(b, x[0]), target.negative(b, x[1])))
    register(operator.pos, 1, lambda b, x: x)
    register(abs, 1, r.absolute)
    register(math.fabs, 1, r.absolute)
    register(min, 2, r.better("<"))
    register(max, 2, r.better(">"))


# ---------------------------------------------------------------- the type, and functions: x -> (value, derivative)


def build(target: Target, t: SimpleNamespace) -> SimpleNamespace:
    """Register Dual with a target that has the types of scalar_types.py.

    Returns
    -------
    Dual : the type, Dual(elem)
    dual, value_of, tangent_of : functions of compiled code
    AS_DUAL : elem -> function that makes any real number a Dual
    numbers : (elem, count) -> function that makes floats of what a hand-written gradient returns
    """

    Dual = _type(t)
    _register_type(target, t, Dual)

    def with_dual(args, count):
        """The types that count real arguments take beside a Dual, Dual or Score; None if there is no Dual among
        them."""
        given = next((a for a in args if isinstance(a, Dual)), None)
        if given is None or len(args) != count or not all(isinstance(a, (Dual, *t.real)) for a in args):
            return None
        return [a if isinstance(a, Dual) else t.Score(given.elem) for a in args]

    d = SimpleNamespace(Dual=Dual, pack=pack, with_dual=with_dual, **_conversions(target, t, Dual))
    _register_operators(target, t, Dual, with_dual)
    _register_functions(target, t, d)
    _register_powers(target, d)
    return d


def _type(t):
    class Dual(types.Type):
        """A score or an element of aux and its derivative, both of the accumulation type."""

        def __init__(self, elem):
            self.elem, self.float = elem, t.Score(elem).float
            super().__init__(name=f"Dual({elem})")

        def unify(self, typingctx, other):
            return self if isinstance(other, t.real) else None

    return Dual


def _register_type(target, t, Dual):
    @target.register_model(Dual)
    class DualModel(target.models.PrimitiveModel):
        def __init__(self, dmm, fe_type):
            super().__init__(dmm, fe_type, ir.LiteralStructType([F32 if fe_type.elem == "f32" else F64] * 2))

    @target.lower_cast(types.Number, Dual)
    @target.lower_cast(types.Boolean, Dual)
    @target.lower_cast(t.Index, Dual)
    @target.lower_cast(t.Score, Dual)
    def number_to_dual(context, builder, fromty, toty, val):
        return pack(builder, context.cast(builder, val, fromty, t.Score(toty.elem)), None)


def _conversions(target, t, Dual):
    """To a Dual and back, by their names in what `build` returns."""

    @target.intrinsic
    def dual(typingctx, value, tangent):
        def codegen(context, builder, sig, args):
            return pack(builder, *args)

        return Dual("f32" if value == types.float32 else "f64")(value, value), codegen

    def half(position):
        @target.intrinsic
        def half(typingctx, x):
            def codegen(context, builder, sig, args):
                return builder.extract_value(args[0], position)

            return x.float(x), codegen

        return half

    def converted(elem):
        @target.intrinsic
        def convert(typingctx, x):
            """Any real number as a Dual."""

            def codegen(context, builder, sig, args):
                return context.cast(builder, args[0], x, Dual(elem))

            return Dual(elem)(x) if isinstance(x, (Dual, *t.real)) else None, codegen

        return convert

    return {
        "dual": dual,
        "value_of": half(0),
        "tangent_of": half(1),
        "AS_DUAL": {elem: converted(elem) for elem in FLOAT},
        "numbers": _numbers(target, t),
    }


def _numbers(target, t):
    def numbers(elem, count, found=None):
        """What a user's gradient returns, a number or a tuple of them, as count floats, zeros where it has fewer; how
        many it has is appended to found."""
        kind = t.Score(elem)

        @target.intrinsic
        def numbers(typingctx, result):
            parts = tuple(result) if isinstance(result, types.BaseTuple) else (result,)
            if found is not None:
                found.append(len(parts))

            def codegen(context, builder, sig, args):
                items = cgutils.unpack_tuple(builder, args[0], len(parts)) if parts != (result,) else args
                items = [context.cast(builder, v, p, kind) for v, p in zip(items, parts, strict=True)][:count]
                items += [context.get_constant(kind.float, 0.0)] * (count - len(items))
                return context.make_tuple(builder, sig.return_type, items)

            real = all(isinstance(p, t.real) for p in parts)
            return (types.UniTuple(kind.float, count)(result), codegen) if real else None

        return numbers

    return numbers


def _register_functions(target, t, d):
    Dual, dual, value_of, tangent_of, choose = d.Dual, d.dual, d.value_of, d.tangent_of, target.names.choose

    @target.names.inner
    def chain(derivative, tangent):
        """derivative * tangent. A tangent of 0 belongs to a constant and stays 0, also where the derivative is
        infinite, as sqrt'(0) is."""
        return choose(tangent == 0, tangent, derivative * tangent)

    d.chain = chain
    of = {
        elem: {name: target.names.inner(rule) for name, rule in rules(elem, target.math[elem], target.libm).items()}
        for elem in FLOAT
    }

    def unary(fn, name):
        @target.overload(fn)
        def resolve(x):
            if isinstance(x, Dual):
                rule = of[x.elem][name]

                def of_dual(x):
                    y, derivative = rule(value_of(x))
                    return dual(y, chain(derivative, tangent_of(x)))

                return of_dual

    for name in of["f32"]:
        unary(getattr(math, name), name)
    for name in ("exp", "tanh", "log", "log1p", "sin", "cos", "sqrt"):
        unary(getattr(np, name), name)

    def whole(fn):
        @target.overload(fn)
        def resolve(x):
            if isinstance(x, Dual):
                f, cast = target.libm(fn)(x.elem), t.AS_SCORE[x.elem]
                return lambda x: cast(f(value_of(x)))

    whole(math.floor)
    whole(math.ceil)

    @target.overload(int)
    def int_of(x):
        if isinstance(x, Dual):
            return lambda x: np.int64(value_of(x))

    @target.overload(float)
    def float_of(x):
        if isinstance(x, Dual):
            return lambda x: x

    @target.overload(accepted.where)
    def where(condition, yes, no):
        kinds = d.with_dual((yes, no), 2)
        if kinds is not None:
            convert = d.AS_DUAL[kinds[0].elem]

            def chosen(condition, yes, no):
                c, yes, no = bool(condition), convert(yes), convert(no)
                return dual(choose(c, value_of(yes), value_of(no)), choose(c, tangent_of(yes), tangent_of(no)))

            return chosen


def _powers(target, d, elem):
    """x**y for x, y or both a Dual."""
    power, log, acc, chain, choose = (
        target.math[elem].pow,
        target.math[elem].log,
        FLOAT[elem],
        d.chain,
        target.names.choose,
    )
    dual, value_of, tangent_of = d.dual, d.value_of, d.tangent_of
    zero, one = acc(0), acc(1)

    @target.names.inner
    def of_base(x, y):
        n = value_of(y)
        slope = choose(n == zero, zero, n * power(value_of(x), n - one))
        return dual(power(value_of(x), n), chain(slope, tangent_of(x)))

    @target.names.inner
    def of_exponent(x, y):
        value = power(value_of(x), value_of(y))
        slope = choose(value == zero, zero, value * log(value_of(x)))
        return dual(value, chain(slope, tangent_of(y)))

    @target.names.inner
    def of_both(x, y):
        a, b = of_base(x, y), of_exponent(x, y)
        return dual(value_of(a), tangent_of(a) + tangent_of(b))

    return of_base, of_exponent, of_both


def _register_powers(target, d):
    dual, value_of, tangent_of = d.dual, d.value_of, d.tangent_of
    general = {elem: _powers(target, d, elem) for elem in FLOAT}
    small = {elem: {n: target.names.inner(f) for n, f in small_powers(elem)[1].items()} for elem in FLOAT}

    def power(fn):
        @target.overload(fn, prefer_literal=True)
        def resolve(x, y):
            kinds = d.with_dual((x, y), 2)
            if kinds is None:
                return None
            elem = kinds[0].elem
            of_small = small[elem].get(y.literal_value) if isinstance(y, types.IntegerLiteral) else None
            if of_small is not None:

                def whole(x, y):
                    value, derivative = of_small(value_of(x))
                    return dual(value, derivative * tangent_of(x))

                return whole
            of_base, of_exponent, of_both = general[elem]
            convert = d.AS_DUAL[elem]
            f = of_both if kinds[0] == kinds[1] else of_base if isinstance(x, d.Dual) else of_exponent
            return lambda x, y: f(convert(x), convert(y))

    for fn in (operator.pow, math.pow, pow):
        power(fn)
