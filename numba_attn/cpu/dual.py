"""Derivatives of users' score functions by dual numbers.

In a derivative pass the score is a Dual, a pair (value, tangent) that takes the operations of a Score and carries the
derivative along: the user's function is compiled as it stands, once more, for that type. Both halves are branch-free,
so LLVM turns the loop over a row into vector code as it does for Score; tanh and exp cost their value alone, since the
tangent is made from it. A number that is no Dual has the derivative 0, and no arithmetic is spent on it.

At a kink: abs'(0) is 0, min and max follow the operand that they return (the first of two equal ones), where follows
the chosen side alone, comparisons, // and math.floor have the derivative 0.

The arrays of aux reach the function as Aux, which says what reading an element means. There are three passes, each a C
function over a tile as in modifiers.py; every argument is an intp:

    score_grad (target, slope, row stride, lanes, b, h, first i, first j, keys, aux table)
        target[j, lane]: score s in, mod(s) log2(e) out; slope[j, lane] = d mod / d s.
    score_jvp (target, tangent, row stride, lanes, b, h, first i, first j, keys, aux table, dot table)
        target likewise; tangent[j, lane] = d mod / d s * tangent[j, lane] + the sum over reads of d mod / d aux * dot.
        The dot table is the aux_table of the tangent arrays alone.
    aux_grad (score, weight, row stride, lanes, b, h, first i, first j, keys, aux table, sums table)
        sums[n][element] += weight * d mod / d aux[n][element] for pairs whose weight is not 0, j by j, lane by lane.
        The sums table is (status, address of sums[0] or 0, ...), sums float64, C-contiguous, of their arrays' shapes.
        status becomes 1 + n where a hand-written gradient meets an fn that does not read one element of aux[n], and
        -1 - n where fn reads outside aux[n].

`asked` says which arrays of aux take part, one entry each: a bool; for score_jvp the dtype of the tangent array, or
True for the accumulation type. Slope and tangent are 0 where mod(s) is -inf. A hand-written gradient takes the place of
the dual numbers; in score_jvp the tangent is NaN where aux_grad would set the status.
"""

import itertools
import math
import operator

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin, lower_cast
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, overload, overload_attribute, register_model
from numba.np.arrayobj import load_item, populate_array

from .. import score
from ..online import LOG2E
from .compile import array_type, compile_cfunc, inner
from .modifiers import (
    AS_INDEX,
    AS_SCORE,
    MATH,
    Index,
    Score,
    absolute,
    aux_arrays,
    choose,
    floored,
    libm,
    multiply_add,
)
from .simd import F32, F64, I64, Ptr, f32_ptr, f64_ptr, i64_ptr

# ---------------------------------------------------------------- the type


class Dual(types.Type):
    """A score or an element of aux and its derivative, both of the accumulation type."""

    def __init__(self, elem):
        self.elem, self.float = elem, Score(elem).float
        super().__init__(name=f"Dual({elem})")

    def unify(self, typingctx, other):
        return self if isinstance(other, _REAL) else None


_REAL = (Score, Index, types.Integer, types.Float, types.Boolean)


@register_model(Dual)
class _DualModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.LiteralStructType([F32 if fe_type.elem == "f32" else F64] * 2))


def _pack(builder, value, tangent):
    pair = ir.Constant(ir.LiteralStructType([value.type] * 2), ir.Undefined)
    tangent = ir.Constant(value.type, 0.0) if tangent is None else tangent
    return builder.insert_value(builder.insert_value(pair, value, 0), tangent, 1)


@lower_cast(types.Number, Dual)
@lower_cast(types.Boolean, Dual)
@lower_cast(Index, Dual)
@lower_cast(Score, Dual)
def _number_to_dual(context, builder, fromty, toty, val):
    return _pack(builder, context.cast(builder, val, fromty, Score(toty.elem)), None)


@intrinsic
def dual(typingctx, value, tangent):
    def codegen(context, builder, sig, args):
        return _pack(builder, *args)

    return Dual("f32" if value == types.float32 else "f64")(value, value), codegen


def _half(position):
    @intrinsic
    def half(typingctx, x):
        def codegen(context, builder, sig, args):
            return builder.extract_value(args[0], position)

        return x.float(x), codegen

    return half


value_of, tangent_of = _half(0), _half(1)


def _converted(elem):
    @intrinsic
    def convert(typingctx, x):
        """Any real number as a Dual."""

        def codegen(context, builder, sig, args):
            return context.cast(builder, args[0], x, Dual(elem))

        return Dual(elem)(x) if isinstance(x, (Dual, *_REAL)) else None, codegen

    return convert


AS_DUAL = {elem: _converted(elem) for elem in ("f32", "f64")}
FLOAT = {"f32": np.float32, "f64": np.float64}


def _with_dual(args, count):
    """The types that count real arguments take beside a Dual, Dual or Score; None if there is no Dual among them."""
    given = next((a for a in args if isinstance(a, Dual)), None)
    if given is None or len(args) != count or not all(isinstance(a, (Dual, *_REAL)) for a in args):
        return None
    return [a if isinstance(a, Dual) else Score(given.elem) for a in args]


# ---------------------------------------------------------------- operators: rules on (value, tangent), None for a 0


def _operator(op, count, rule, result=Dual):
    """rule(builder, (value, tangent), ...) -> (value, tangent), or the value alone where the result is no Dual."""

    @infer_global(op)
    class Typing(AbstractTemplate):
        def generic(self, args, kws):
            kinds = _with_dual(args, count)
            if kinds is not None:
                return signature(result if isinstance(result, types.Type) else result(kinds[0].elem), *kinds)

    for kinds in itertools.product((Dual, Score), repeat=count):
        if Dual in kinds:

            @lower_builtin(op, *kinds)
            def lower(context, builder, sig, args):
                pairs = [
                    tuple(cgutils.unpack_tuple(builder, a, 2)) if isinstance(t, Dual) else (a, None)
                    for a, t in zip(args, sig.args, strict=True)
                ]
                out = rule(builder, *pairs)
                return _pack(builder, *out) if result is Dual else out


def _minus(builder, x, y):
    """x - y of tangents."""
    if y is None:
        return x
    return builder.fneg(y) if x is None else builder.fsub(x, y)


def _scaled(builder, x, by):
    return None if x is None else builder.fmul(x, by)


def _add(builder, x, y):
    given = [t for t in (x[1], y[1]) if t is not None]
    return builder.fadd(x[0], y[0]), builder.fadd(*given) if len(given) == 2 else given[0]


def _subtract(builder, x, y):
    return builder.fsub(x[0], y[0]), _minus(builder, x[1], y[1])


def _multiply(builder, x, y):
    value, left = builder.fmul(x[0], y[0]), _scaled(builder, x[1], y[0])
    if y[1] is None:
        return value, left
    return value, builder.fmul(x[0], y[1]) if left is None else multiply_add(builder, x[0], y[1], left)


def _divide(builder, x, y):
    value = builder.fdiv(x[0], y[0])
    return value, builder.fdiv(_minus(builder, x[1], _scaled(builder, y[1], value)), y[0])


def _modulo(builder, x, y):
    whole = floored(builder, builder.fdiv(x[0], y[0]))
    return builder.fsub(x[0], builder.fmul(y[0], whole)), _minus(builder, x[1], _scaled(builder, y[1], whole))


def _absolute(builder, x):
    zero = ir.Constant(x[0].type, 0.0)
    below, above = (builder.fcmp_ordered(sign, x[0], zero) for sign in "<>")
    return absolute(builder, x[0]), builder.select(below, builder.fneg(x[1]), builder.select(above, x[1], zero))


def _better(sign):
    def rule(builder, x, y):
        second = builder.fcmp_ordered(sign, y[0], x[0])
        tangents = [ir.Constant(x[0].type, 0.0) if t is None else t for t in (y[1], x[1])]
        return builder.select(second, y[0], x[0]), builder.select(second, *tangents)

    return rule


for _name, _rule in (("add", _add), ("sub", _subtract), ("mul", _multiply), ("truediv", _divide)):
    _operator(getattr(operator, _name), 2, _rule)
    _operator(getattr(operator, "i" + _name), 2, _rule)
_operator(operator.mod, 2, _modulo)
_operator(operator.floordiv, 2, lambda b, x, y: floored(b, b.fdiv(x[0], y[0])), Score)
for _op, _sign in (
    (operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">="), (operator.eq, "=="),
):  # fmt: skip
    _operator(_op, 2, lambda b, x, y, s=_sign: b.fcmp_ordered(s, x[0], y[0]), types.boolean)
_operator(operator.ne, 2, lambda b, x, y: b.fcmp_unordered("!=", x[0], y[0]), types.boolean)
for _op in (bool, operator.truth):
    _operator(_op, 1, lambda b, x: b.fcmp_unordered("!=", x[0], x[0].type(0.0)), types.boolean)
_operator(operator.not_, 1, lambda b, x: b.fcmp_ordered("==", x[0], x[0].type(0.0)), types.boolean)
_operator(operator.neg, 1, lambda b, x: (b.fneg(x[0]), b.fneg(x[1])))
_operator(operator.pos, 1, lambda b, x: x)
_operator(abs, 1, _absolute)
_operator(math.fabs, 1, _absolute)
_operator(min, 2, _better("<"))
_operator(max, 2, _better(">"))


# ---------------------------------------------------------------- functions: x -> (value, derivative)


@inner
def chain(derivative, tangent):
    """derivative * tangent, where a tangent of 0 is that of a constant: sqrt'(0) = inf does not make it NaN."""
    return choose(tangent == 0, tangent, derivative * tangent)


def _rules(elem):
    """For each name x -> (f(x), f'(x))."""
    m, acc = MATH[elem], FLOAT[elem]
    one, half = acc(1), acc(0.5)
    per_ln2, per_ln10, erf_slope = acc(1 / math.log(2)), acc(1 / math.log(10)), acc(2 / math.sqrt(math.pi))
    exp, tanh, log, log1p, sin, cos, sqrt = m.exp, m.tanh, m.log, m.log1p, m.sin, m.cos, m.sqrt
    expm1, log2, log10, atan, sinh, cosh, erf = (
        libm(getattr(math, name))(elem) for name in ("expm1", "log2", "log10", "atan", "sinh", "cosh", "erf")
    )

    def of_exp(x):
        y = exp(x)
        return y, y

    def of_tanh(x):
        y = tanh(x)
        return y, one - y * y

    def of_sqrt(x):
        y = sqrt(x)
        return y, half / y

    def of_expm1(x):
        y = expm1(x)
        return y, y + one

    return {
        "exp": of_exp,
        "tanh": of_tanh,
        "sqrt": of_sqrt,
        "log": lambda x: (log(x), one / x),
        "log1p": lambda x: (log1p(x), one / (one + x)),
        "sin": lambda x: (sin(x), cos(x)),
        "cos": lambda x: (cos(x), -sin(x)),
        "expm1": of_expm1,
        "log2": lambda x: (log2(x), per_ln2 / x),
        "log10": lambda x: (log10(x), per_ln10 / x),
        "atan": lambda x: (atan(x), one / (one + x * x)),
        "sinh": lambda x: (sinh(x), cosh(x)),
        "cosh": lambda x: (cosh(x), sinh(x)),
        "erf": lambda x: (erf(x), erf_slope * exp(-x * x)),
    }


RULES = {elem: {name: inner(rule) for name, rule in _rules(elem).items()} for elem in ("f32", "f64")}


def _unary(fn, name):
    @overload(fn)
    def resolve(x):
        if isinstance(x, Dual):
            rule = RULES[x.elem][name]

            def of_dual(x):
                y, derivative = rule(value_of(x))
                return dual(y, chain(derivative, tangent_of(x)))

            return of_dual


for _name in RULES["f32"]:
    _unary(getattr(math, _name), _name)
for _name in ("exp", "tanh", "log", "log1p", "sin", "cos", "sqrt"):
    _unary(getattr(np, _name), _name)


def _whole(fn):
    @overload(fn)
    def resolve(x):
        if isinstance(x, Dual):
            f, cast = libm(fn)(x.elem), AS_SCORE[x.elem]
            return lambda x: cast(f(value_of(x)))


_whole(math.floor)
_whole(math.ceil)


@overload(int)
def _int(x):
    if isinstance(x, Dual):
        return lambda x: np.int64(value_of(x))


@overload(float)
def _float(x):
    if isinstance(x, Dual):
        return lambda x: x


def _powers(elem):
    """x**y for x, y or both a Dual."""
    power, log, acc = MATH[elem].pow, MATH[elem].log, FLOAT[elem]
    zero, one = acc(0), acc(1)

    @inner
    def of_base(x, y):
        n = value_of(y)
        d = choose(n == zero, zero, n * power(value_of(x), n - one))
        return dual(power(value_of(x), n), chain(d, tangent_of(x)))

    @inner
    def of_exponent(x, y):
        value = power(value_of(x), value_of(y))
        d = choose(value == zero, zero, value * log(value_of(x)))
        return dual(value, chain(d, tangent_of(y)))

    @inner
    def of_both(x, y):
        a, b = of_base(x, y), of_exponent(x, y)
        return dual(value_of(a), tangent_of(a) + tangent_of(b))

    return of_base, of_exponent, of_both


POWERS = {elem: _powers(elem) for elem in ("f32", "f64")}


def _small_powers(elem):
    """x -> (x**n, n x**(n - 1)) for a whole n that stands in the source."""
    one, two, three, four = (FLOAT[elem](n) for n in (1, 2, 3, 4))
    powers = (
        lambda x: (x, one),
        lambda x: (x * x, two * x),
        lambda x: (x * x * x, three * (x * x)),
        lambda x: ((x * x) * (x * x), four * (x * x * x)),
    )
    return {n: inner(f) for n, f in enumerate(powers, start=1)}


SMALL_POWERS = {elem: _small_powers(elem) for elem in ("f32", "f64")}


def _power(fn):
    @overload(fn, prefer_literal=True)
    def resolve(x, y):
        kinds = _with_dual((x, y), 2)
        if kinds is None:
            return None
        elem = kinds[0].elem
        small = SMALL_POWERS[elem].get(y.literal_value) if isinstance(y, types.IntegerLiteral) else None
        if small is not None:

            def whole(x, y):
                value, derivative = small(value_of(x))
                return dual(value, derivative * tangent_of(x))

            return whole
        of_base, of_exponent, of_both = POWERS[elem]
        convert = AS_DUAL[elem]
        f = of_both if kinds[0] == kinds[1] else of_base if isinstance(x, Dual) else of_exponent
        return lambda x, y: f(convert(x), convert(y))


_power(operator.pow)
_power(math.pow)
_power(pow)


@overload(score.where)
def _where(condition, yes, no):
    kinds = _with_dual((yes, no), 2)
    if kinds is not None:
        convert = AS_DUAL[kinds[0].elem]

        def chosen(condition, yes, no):
            c, yes, no = bool(condition), convert(yes), convert(no)
            return dual(choose(c, value_of(yes), value_of(no)), choose(c, tangent_of(yes), tangent_of(no)))

        return chosen


# ---------------------------------------------------------------- the arrays of aux


class Aux(types.Type):
    """An array of aux in a derivative pass, or its rows behind the first indices.

    how "seed": an element is a Dual, its tangent 1 if this read is the one that the record asks for, else 0
    how "trace": an element is a number; the record notes which one was read, and with a dot its tangent
    how "dot": an element is a Dual, its tangent the element of dot at the same place
    """

    def __init__(self, elem, how, n, array, dot):
        self.elem, self.how, self.n, self.array, self.dot, self.ndim = elem, how, n, array, dot, array.ndim
        super().__init__(name=f"Aux({elem},{how},{n},{array},{dot})")

    def element(self):
        return self.array.dtype if self.how == "trace" else Dual(self.elem)

    def rows(self, given):
        """Its type behind so many indices."""
        array, dot = (
            a and types.Array(a.dtype, a.ndim - given, "A", readonly=True, aligned=False)
            for a in (self.array, self.dot)
        )
        return Aux(self.elem, self.how, self.n, array, dot)


@register_model(Aux)
class _AuxModel(models.StructModel):
    def __init__(self, dmm, fe_type):
        members = [("array", fe_type.array), ("first", types.intp), ("record", Ptr("i64"))]
        super().__init__(dmm, fe_type, members + ([("dot", fe_type.dot)] if fe_type.dot else []))


# The record of a pass, 64-bit cells. "seed": how many reads there were, the number of the one that is asked for, its
# array, its element. "trace": for each array the element and the bits of its tangent in float64.
READS, SEED, ARRAY, ELEMENT = range(4)
UNREAD, SEVERAL, OUTSIDE = -1, -2, -3  # an element there is none of


def _cells(count):
    @intrinsic
    def cells(typingctx):
        def codegen(context, builder, sig, args):
            return builder.bitcast(cgutils.alloca_once(builder, ir.ArrayType(I64, count)), I64.as_pointer())

        return Ptr("i64")(), codegen

    return cells


def _as_aux(kinds):
    """kinds: for each array its Aux type, or None where it stays as it is."""

    @intrinsic
    def wrap(typingctx, arrays, dots, record):
        to = types.Tuple([kind or array for kind, array in zip(kinds, arrays, strict=True)])

        def codegen(context, builder, sig, args):
            items = cgutils.unpack_tuple(builder, args[0], len(kinds))
            dot = iter(cgutils.unpack_tuple(builder, args[1], len(dots)))
            for n, kind in enumerate(kinds):
                if kind is not None:
                    aux = cgutils.create_struct_proxy(kind)(context, builder)
                    aux.array, aux.first, aux.record = items[n], ir.Constant(I64, 0), args[2]
                    if kind.dot:
                        aux.dot = next(dot)
                    items[n] = aux._getvalue()
            return context.make_tuple(builder, to, items)

        return to(arrays, dots, record), codegen

    return wrap


def _item(context, builder, kind, array, indices):
    """The address of array[indices], which may be fewer than it has axes."""
    array = context.make_array(kind)(context, builder, value=array)
    strides = cgutils.unpack_tuple(builder, array.strides, kind.ndim)
    offset = I64(0)
    for i, stride in zip(indices, strides, strict=False):
        offset = builder.add(offset, builder.mul(i, stride))
    return cgutils.pointer_add(builder, array.data, offset)


def _rows(context, builder, kind, to, array, indices):
    """array[indices] as an array of type `to`."""
    data, given = _item(context, builder, kind, array, indices), len(indices)
    array = context.make_array(kind)(context, builder, value=array)
    rows = context.make_array(to)(context, builder)
    populate_array(
        rows,
        data=data,
        shape=cgutils.unpack_tuple(builder, array.shape, kind.ndim)[given:],
        strides=cgutils.unpack_tuple(builder, array.strides, kind.ndim)[given:],
        itemsize=array.itemsize,
        meminfo=None,
    )
    return rows._getvalue()


@infer_global(operator.getitem)
class _AuxAt(AbstractTemplate):
    def generic(self, args, kws):
        aux, at = args
        if not isinstance(aux, Aux):
            return None
        parts = tuple(at) if isinstance(at, types.BaseTuple) else (at,)
        if not min(1, aux.ndim) <= len(parts) <= aux.ndim or not all(
            isinstance(p, (Index, types.Integer)) for p in parts
        ):
            return None
        result = aux.element() if len(parts) == aux.ndim else aux.rows(len(parts))
        return signature(result, aux, types.UniTuple(types.intp, len(parts)) if parts != (at,) else types.intp)


@lower_builtin(operator.getitem, Aux, types.Integer)
@lower_builtin(operator.getitem, Aux, types.BaseTuple)
def _aux_at(context, builder, sig, args):
    kind, at = sig.args
    aux = cgutils.create_struct_proxy(kind)(context, builder, value=args[0])
    given = cgutils.unpack_tuple(builder, args[1], len(at)) if isinstance(at, types.BaseTuple) else [args[1]]
    array = context.make_array(kind.array)(context, builder, value=aux.array)
    indices, element, inside = [], aux.first, ir.Constant(ir.IntType(1), 1)
    for i, n in zip(given, cgutils.unpack_tuple(builder, array.shape, kind.ndim), strict=False):
        i = builder.select(builder.icmp_signed("<", i, I64(0)), builder.add(i, n), i)
        inside = builder.and_(inside, builder.icmp_unsigned("<", i, n))
        element = builder.add(builder.mul(element, n), i)
        indices.append(i)
    # once outside, outside in the rows too
    element = builder.select(builder.and_(inside, builder.icmp_signed(">=", aux.first, I64(0))), element, I64(OUTSIDE))
    if len(given) < kind.ndim:
        to = sig.return_type
        rows = cgutils.create_struct_proxy(to)(context, builder)
        rows.array, rows.first = _rows(context, builder, kind.array, to.array, aux.array, indices), element
        rows.record = aux.record
        if kind.dot:
            rows.dot = _rows(context, builder, kind.dot, to.dot, aux.dot, indices)
        return rows._getvalue()

    value = load_item(context, builder, kind.array, _item(context, builder, kind.array, aux.array, indices))
    cell = lambda n: builder.gep(aux.record, [I64(n)])  # noqa: E731
    to = F32 if kind.elem == "f32" else F64
    tangent = None
    if kind.dot:
        tangent = load_item(context, builder, kind.dot, _item(context, builder, kind.dot, aux.dot, indices))
    if kind.how == "seed":
        reads = builder.load(cell(READS))
        asked = builder.icmp_signed("==", reads, builder.load(cell(SEED)))
        builder.store(builder.add(reads, I64(1)), cell(READS))
        for n, new in ((ARRAY, I64(kind.n)), (ELEMENT, element)):
            builder.store(builder.select(asked, new, builder.load(cell(n))), cell(n))
        tangent = builder.uitofp(asked, to)
    elif kind.how == "trace":
        old = builder.load(cell(2 * kind.n))
        same = builder.or_(builder.icmp_signed("==", old, I64(UNREAD)), builder.icmp_signed("==", old, element))
        builder.store(builder.select(same, element, I64(SEVERAL)), cell(2 * kind.n))
        if kind.dot:
            wide = context.cast(builder, tangent, kind.dot.dtype, types.float64)
            builder.store(builder.bitcast(wide, I64), cell(2 * kind.n + 1))
        return value
    else:
        tangent = context.cast(builder, tangent, kind.dot.dtype, Score(kind.elem))
    return _pack(builder, context.cast(builder, value, kind.array.dtype, Score(kind.elem)), tangent)


@intrinsic
def _array_of(typingctx, aux):
    def codegen(context, builder, sig, args):
        return cgutils.create_struct_proxy(aux)(context, builder, value=args[0]).array

    return (aux.array(aux), codegen) if isinstance(aux, Aux) else None


overload_attribute(Aux, "shape")(lambda aux: lambda aux: _array_of(aux).shape)
overload_attribute(Aux, "size")(lambda aux: lambda aux: _array_of(aux).size)
overload_attribute(Aux, "ndim")(lambda aux: lambda aux: _array_of(aux).ndim)


@overload(len)
def _length(aux):
    if isinstance(aux, Aux):
        return lambda aux: len(_array_of(aux))


# ---------------------------------------------------------------- compiling a derivative


def _numbers(elem, count, found):
    """What a gradient returns, as count floats; how many it has goes to found."""

    @intrinsic
    def numbers(typingctx, result):
        parts = tuple(result) if isinstance(result, types.BaseTuple) else (result,)
        found.append(len(parts))
        to = Score(elem)

        def codegen(context, builder, sig, args):
            items = cgutils.unpack_tuple(builder, args[0], len(parts)) if parts != (result,) else args
            items = [context.cast(builder, v, t, to) for v, t in zip(items, parts, strict=True)][:count]
            items += [context.get_constant(to.float, 0.0)] * (count - len(items))
            return context.make_tuple(builder, sig.return_type, items)

        return (types.UniTuple(to.float, count)(result), codegen) if all(isinstance(p, _REAL) for p in parts) else None

    return numbers


def compile_derivative(mod, kind, elem, aux, asked):
    """The address of one of the three passes; see the top of this file."""
    fn, grad = (mod.fn, mod.grad) if isinstance(mod, score.ScoreMod) else (mod, None)
    name = getattr(score.plain_function(fn), "__name__", "?")
    asked = tuple(asked) or (False,) * len(aux)
    found: list[int] = []
    if grad is None:
        tile = _tile_of_duals(fn, kind, elem, aux, asked)
    else:
        tile = _tile_of_gradient(fn, grad, kind, elem, aux, asked, found)
    arguments = {"score_grad": 10, "aux_grad": 11, "score_jvp": 11}[kind]
    try:
        address = compile_cfunc(tile, types.void(*[types.intp] * arguments), f"{kind} {name}", cached=False)
    except Exception as error:
        if grad is not None:
            raise TypeError(f"score_mod: the function and its grad could not be compiled: {error}") from error
        raise TypeError(
            "score_mod: the function could not be differentiated; write its gradient and pass na.score_mod(fn, "
            f"grad=...): {error}"
        ) from error
    needed = 1 + max((1 + n for n, a in enumerate(asked) if a), default=0)
    if kind != "score_grad" and found and found[0] < needed:
        raise ValueError(
            f"score_mod: a gradient by aux[{needed - 2}] is asked for, but grad returns {found[0]} number(s); it takes "
            f"the tuple (d/dscore, d/daux[0], ...), here of {needed} or more. Or leave grad out: na.score_mod(fn) is "
            "differentiated by the library"
        )
    return address


def _types(elem, kind, how, aux, asked):
    """Types of the arrays of aux, of the tangent arrays, and the Aux that each array becomes or None."""
    arrays = [array_type(a.dtype, a.ndim) for a in aux]
    acc = np.dtype(FLOAT[elem])
    if kind == "score_grad":
        return types.Tuple(arrays), types.Tuple([]), (None,) * len(arrays)
    dots = [None] * len(arrays)
    if kind == "score_jvp":
        dots = [(array_type(acc if a is True else a, x.ndim) if a else None) for a, x in zip(asked, aux, strict=True)]
    kinds = [Aux(elem, how, n, a, d) if asked[n] else None for n, (a, d) in enumerate(zip(arrays, dots, strict=True))]
    return types.Tuple(arrays), types.Tuple([d for d in dots if d]), tuple(kinds)


def _tile_of_duals(fn, kind, elem, aux, asked):
    call, index, convert = inner(score.plain_function(fn)), AS_INDEX[elem], AS_DUAL[elem]
    acc, pointer = FLOAT[elem], f32_ptr if elem == "f32" else f64_ptr
    log2e, zero, one, hidden = acc(LOG2E), acc(0), acc(1), acc(-np.inf)
    kinds, dot_kinds, wrapped = _types(elem, kind, "dot" if kind == "score_jvp" else "seed", aux, asked)
    wrap, cells = _as_aux(wrapped), _cells(4)

    def grad_tile(target, slope, w, lanes, b, h, i, j, keys, table):
        arrays = aux_arrays(i64_ptr(table), kinds)
        for key in range(keys):
            row, slopes = pointer(target) + key * w, pointer(slope) + key * w
            for r in range(lanes):
                y = convert(call(dual(row[r], one), index(b), index(h), index(i + r), index(j + key), *arrays))
                slopes[r] = choose(value_of(y) == hidden, zero, tangent_of(y))
                row[r] = value_of(y) * log2e

    def jvp_tile(target, tangent, w, lanes, b, h, i, j, keys, table, dot_table):
        dots = aux_arrays(i64_ptr(dot_table), dot_kinds)
        arrays = wrap(aux_arrays(i64_ptr(table), kinds), dots, i64_ptr(0))
        for key in range(keys):
            row, tangents = pointer(target) + key * w, pointer(tangent) + key * w
            for r in range(lanes):
                s = dual(row[r], tangents[r])
                y = convert(call(s, index(b), index(h), index(i + r), index(j + key), *arrays))
                tangents[r] = choose(value_of(y) == hidden, zero, tangent_of(y))
                row[r] = value_of(y) * log2e

    def aux_tile(target, weight, w, lanes, b, h, i, j, keys, table, sums_table):
        """One evaluation for each read of an array that is asked for, that read's tangent being 1."""
        record, sums = cells(), i64_ptr(sums_table)
        arrays = wrap(aux_arrays(i64_ptr(table), kinds), (), record)
        for key in range(keys):
            row, weights = pointer(target) + key * w, pointer(weight) + key * w
            for r in range(lanes):
                factor = np.float64(weights[r])
                seed, reads = 0, 1 if factor != 0 else 0
                while seed < reads:
                    record[READS], record[SEED], record[ARRAY], record[ELEMENT] = 0, seed, 0, 0
                    s = dual(row[r], zero)
                    y = convert(call(s, index(b), index(h), index(i + r), index(j + key), *arrays))
                    reads = record[READS]
                    if seed < reads:
                        if record[ELEMENT] < 0:
                            sums[0] = -1 - record[ARRAY]
                        else:
                            at = f64_ptr(sums[1 + record[ARRAY]]) + record[ELEMENT]
                            at[0] = at[0] + factor * np.float64(tangent_of(y))
                    seed += 1

    return {"score_grad": grad_tile, "score_jvp": jvp_tile, "aux_grad": aux_tile}[kind]


def _tile_of_gradient(fn, grad, kind, elem, aux, asked, found):
    call, derivatives = inner(score.plain_function(fn)), inner(score.plain_function(grad))
    index, natural, to_float = AS_INDEX[elem], AS_SCORE[elem], AS_DUAL[elem]
    acc, pointer = FLOAT[elem], f32_ptr if elem == "f32" else f64_ptr
    log2e, zero, hidden, unknown = acc(LOG2E), acc(0), acc(-np.inf), acc(np.nan)
    kinds, dot_kinds, wrapped = _types(elem, kind, "trace", aux, asked)
    n_aux, wanted = len(aux), (*map(bool, asked), False)
    wrap, cells, numbers = _as_aux(wrapped), _cells(2 * n_aux + 1), _numbers(elem, 1 + n_aux, found)

    def grad_tile(target, slope, w, lanes, b, h, i, j, keys, table):
        arrays = aux_arrays(i64_ptr(table), kinds)
        for key in range(keys):
            row, slopes = pointer(target) + key * w, pointer(slope) + key * w
            for r in range(lanes):
                s, at_b, at_h, at_i, at_j = natural(row[r]), index(b), index(h), index(i + r), index(j + key)
                y = value_of(to_float(call(s, at_b, at_h, at_i, at_j, *arrays)))
                g = numbers(derivatives(s, at_b, at_h, at_i, at_j, *arrays))
                slopes[r] = choose(y == hidden, zero, g[0])
                row[r] = y * log2e

    def jvp_tile(target, tangent, w, lanes, b, h, i, j, keys, table, dot_table):
        record, arrays = cells(), aux_arrays(i64_ptr(table), kinds)
        traced = wrap(arrays, aux_arrays(i64_ptr(dot_table), dot_kinds), record)
        dots = f64_ptr(record)
        for key in range(keys):
            row, tangents = pointer(target) + key * w, pointer(tangent) + key * w
            for r in range(lanes):
                for n in range(n_aux):
                    record[2 * n] = UNREAD
                s, at_b, at_h, at_i, at_j = natural(row[r]), index(b), index(h), index(i + r), index(j + key)
                y = value_of(to_float(call(s, at_b, at_h, at_i, at_j, *traced)))
                g = numbers(derivatives(s, at_b, at_h, at_i, at_j, *arrays))
                t = g[0] * tangents[r]
                for n in range(n_aux):
                    if wanted[n]:
                        t += g[1 + n] * acc(dots[2 * n + 1]) if record[2 * n] >= 0 else unknown
                tangents[r] = choose(y == hidden, zero, t)
                row[r] = y * log2e

    def aux_tile(target, weight, w, lanes, b, h, i, j, keys, table, sums_table):
        record, arrays, sums = cells(), aux_arrays(i64_ptr(table), kinds), i64_ptr(sums_table)
        traced = wrap(arrays, (), record)
        for key in range(keys):
            row, weights = pointer(target) + key * w, pointer(weight) + key * w
            for r in range(lanes):
                factor = np.float64(weights[r])
                if factor != 0:
                    for n in range(n_aux):
                        record[2 * n] = UNREAD
                    s, at_b, at_h, at_i, at_j = natural(row[r]), index(b), index(h), index(i + r), index(j + key)
                    call(s, at_b, at_h, at_i, at_j, *traced)
                    g = numbers(derivatives(s, at_b, at_h, at_i, at_j, *arrays))
                    for n in range(n_aux):
                        if wanted[n]:
                            element = record[2 * n]
                            if element >= 0:
                                at = f64_ptr(sums[1 + n]) + element
                                at[0] = at[0] + factor * np.float64(g[1 + n])
                            else:
                                sums[0] = -1 - n if element == OUTSIDE else 1 + n

    return {"score_grad": grad_tile, "score_jvp": jvp_tile, "aux_grad": aux_tile}[kind]
