"""The transcendental functions that a user's score_mod may call, and their derivatives: one source for all targets.

They are plain functions of a float, without branches. They use a few functions that each target provides (`Names`).
LLVM turns a loop over them into vector code on a CPU, and on a GPU no thread waits for another.
"""

# Typed by Numba, whose stubs lack most of what is used here.
# mypy: disable-error-code="attr-defined, name-defined, assignment, call-overload"

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from ..online import LOG2E

I32, I64, F32, F64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()


class Names(NamedTuple):
    """What a target provides for the functions, beside + - * / and comparisons of floats of one type."""

    inner: Callable[..., Any]  # makes a plain function callable from compiled functions
    fma: Callable[..., Any]  # a * b + c, fused where the target can
    choose: Callable[..., Any]  # choose(condition, yes, no): both sides are computed
    power_of_two: Callable[..., Any]  # 2**n as a float, from n + magic (see below): n must be a normal exponent
    split_float: Callable[..., Any]  # (m, e), x = m 2**e and m in [sqrt(1/2), sqrt(2)), for positive normal x
    floor: Callable[..., Any]
    polynomial: Callable[..., Any]  # polynomial(terms) is the function of x by Horner's rule, the highest power first


def names(inner: Callable[..., Any], intrinsic: Callable[..., Any], multiply_add: Callable[..., Any]) -> Names:
    """The names of one target, from what it makes functions and intrinsics with; multiply_add(builder, a, b, c)."""

    @intrinsic
    def fma(typingctx, a, b, c):
        def codegen(context, builder, sig, args):
            return multiply_add(builder, *args)

        return a(a, a, a), codegen

    @intrinsic
    def choose(typingctx, condition, yes, no):
        def codegen(context, builder, sig, args):
            return builder.select(*args)

        return yes(types.boolean, yes, yes), codegen

    @intrinsic
    def power_of_two(typingctx, shifted):
        def codegen(context, builder, sig, args):
            to, mantissa, bias = (I32, 23, 127) if sig.args[0] == types.float32 else (I64, 52, 1023)
            exponent = builder.add(builder.bitcast(args[0], to), to(bias))
            return builder.bitcast(builder.shl(exponent, to(mantissa)), args[0].type)

        return shifted(shifted), codegen

    @intrinsic
    def split_float(typingctx, x):
        def codegen(context, builder, sig, args):
            f32 = sig.args[0] == types.float32
            to, mantissa, half = (I32, 23, 0x3F3504F3) if f32 else (I64, 52, 0x3FE6A09E667F3BCD)
            bits = builder.bitcast(args[0], to)
            e = builder.ashr(builder.sub(bits, to(half)), to(mantissa))
            m = builder.bitcast(builder.sub(bits, builder.shl(e, to(mantissa))), args[0].type)
            return context.make_tuple(builder, sig.return_type, [m, builder.sitofp(e, args[0].type)])

        return types.UniTuple(x, 2)(x), codegen

    @intrinsic
    def floor(typingctx, x):
        def codegen(context, builder, sig, args):
            return floored(builder, args[0])

        return x(x), codegen

    def polynomial(terms):
        @intrinsic
        def value(typingctx, x):
            def codegen(context, builder, sig, args):
                p, *others = (ir.Constant(args[0].type, float(term)) for term in terms)
                for term in others:
                    p = multiply_add(builder, p, args[0], term)
                return p

            return x(x), codegen

        return value

    return Names(inner, fma, choose, power_of_two, split_float, floor, polynomial)


def floored(builder, x):
    """floor of an LLVM value."""
    name = f"llvm.floor.f{32 if x.type == F32 else 64}"
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(x.type, [x.type]), name), [x])


class Math:
    """The functions for one accumulation type. Errors are 1 to 3 units in the last place; sin and cos for |x| < 1e6.

    power : x**y
    wide_sine : sin and cos of a float32 are computed in float64: without a fused fma float32 has not enough digits
    """

    def __init__(self, elem: str, names: Names, power: Callable[..., Any], wide_sine: bool):
        acc = np.float32 if elem == "f32" else np.float64

        @names.inner
        def sqrt(x):
            return math.sqrt(x)

        self.exp, self.tanh = _exponentials(acc, names)
        self.log, self.log1p = _logarithms(acc, names)
        self.sin, self.cos = _sines(acc, np.float64 if wide_sine else acc, names)
        self.sqrt, self.pow = sqrt, power


def _magic(acc):
    """A float: adding it rounds to an integer, held in the low bits."""
    return acc(1.5 * 2.0 ** (23 if acc is np.float32 else 52))


def _ln2(acc):
    """ln2 as a sum, the first so short that its product with an exponent is exact."""
    if acc is np.float32:
        high = acc(0.693145751953125)
        return high, acc(math.log(2.0) - float(high))
    return acc(0.6931471803691238), acc(1.9082149292705877e-10)


def _exponentials(acc, names):
    """exp and tanh."""
    inner, fma, choose, power_of_two, polynomial = (
        names.inner,
        names.fma,
        names.choose,
        names.power_of_two,
        names.polynomial,
    )
    f32 = acc is np.float32
    magic, log2e, (ln2_high, ln2_low) = _magic(acc), acc(LOG2E), _ln2(acc)
    one, two, half, zero = acc(1), acc(2), acc(0.5), acc(0)
    biggest, smallest = (acc(88.8), acc(-104.0)) if f32 else (acc(709.9), acc(-746.0))
    # e**r - 1 = r + r**2 (1/2 + r/6 + ...), |r| <= ln2 / 2: Taylor, 5e-9 and 4e-18 relative
    exp_terms = polynomial(tuple(acc(1.0 / math.factorial(k)) for k in range(8 if f32 else 14, 1, -1)))

    @inner
    def reduced(x):
        """(e**r - 1, n + magic) with x = n ln2 + r."""
        shifted = fma(x, log2e, magic)
        n = shifted - magic
        r = fma(-n, ln2_low, fma(-n, ln2_high, x))
        return fma(r * r, exp_terms(r), r), shifted

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

    return exp, tanh


def _logarithms(acc, names):
    """log and log1p."""
    inner, fma, choose, split_float = names.inner, names.fma, names.choose, names.split_float
    f32 = acc is np.float32
    one, two, zero, (ln2_high, ln2_low) = acc(1), acc(2), acc(0), _ln2(acc)
    atanh_terms = names.polynomial(tuple(acc(2.0 / (2 * k + 1)) for k in range(5 if f32 else 11, 0, -1)))
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
        y = fma(e, ln2_high, fma(e, ln2_low, fma(s * z, atanh_terms(z), two * s)))
        y = choose(x > huge, x, y)
        y = choose(x == zero, acc(-np.inf), y)
        return choose(x >= zero, y, acc(np.nan))

    @inner
    def log1p(x):
        u = one + x
        y = log(u) + choose(u > huge, zero, (x - (u - one)) / u)
        return choose(u == one, x, choose(u == zero, acc(-np.inf), y))

    return log, log1p


def _sines(acc, arc, names):
    """sin and cos, computed in the float type arc."""
    inner, fma, choose, floor, polynomial = names.inner, names.fma, names.choose, names.floor, names.polynomial
    wide = arc is np.float64
    # r = x - n pi/2 in three steps, the first two exact also without a fused multiply-add in double
    pio2_high = np.float64(int(math.pi / 2 * 2**32) / 2**32) if wide else np.float32(math.pi / 2)
    pio2_middle = arc(math.pi / 2 - float(pio2_high))
    pio2_low = arc(math.pi / 2 - float(pio2_high) - float(pio2_middle) + 6.123233995736766e-17)
    two_over_pi, magic = arc(2 / math.pi), _magic(arc)
    zero, one, two, three, four, quarter = (arc(x) for x in (0, 1, 2, 3, 4, 0.25))
    count = 8 if wide else 5
    sin_terms = polynomial(tuple(arc((-1.0) ** k / math.factorial(2 * k + 1)) for k in range(count, 0, -1)))
    cos_terms = polynomial(tuple(arc((-1.0) ** k / math.factorial(2 * k)) for k in range(count, 0, -1)))

    @inner
    def sine(x, quarters):
        """sin(x + quarters pi/2)."""
        d = arc(x)
        shifted = d * two_over_pi + magic
        n = shifted - magic
        r = fma(-n, pio2_low, fma(-n, pio2_middle, fma(-n, pio2_high, d)))
        z = r * r
        s = fma(r * z, sin_terms(z), r)
        c = fma(z, cos_terms(z), one)
        turn = n + quarters
        turn = turn - four * floor(turn * quarter)
        y = choose((turn == one) | (turn == three), c, s)
        return acc(choose(turn >= two, -y, y))

    @inner
    def sin(x):
        return sine(x, zero)

    @inner
    def cos(x):
        return sine(x, one)

    return sin, cos


def power64(names: Names) -> Any:
    """x**y of float64, to 1 unit in the last place, with the special cases of C's pow.

    For a target that has none to inline. log(x) is computed to 64 bits and more as a sum of two floats, high + low,
    since y multiplies its error.
    """
    inner, fma, choose, power_of_two, split_float, floor, polynomial = names
    magic, tiny, lift, lifted = (np.float64(x) for x in (1.5 * 2.0**52, np.finfo(np.float64).tiny, 2.0**52, 52))
    log2e, ln2_high, ln2_low = np.float64(LOG2E), np.float64(0.6931471803691238), np.float64(1.9082149292705877e-10)
    biggest, smallest, infinity, nan = (np.float64(x) for x in (709.9, -746.0, np.inf, np.nan))
    zero, half, one, two = (np.float64(x) for x in (0, 0.5, 1, 2))
    third = np.float64(1 / 3)
    third_low = np.float64(1.850371707708594e-17)
    # atanh(s) / s = 1 + z (1/3 + z (1/5 + z/7 + ...)), z = s**2 < 0.0295
    atanh_terms = polynomial(tuple(np.float64(1 / (2 * k + 1)) for k in range(12, 1, -1)))
    exp_terms = polynomial(tuple(np.float64(1.0 / math.factorial(k)) for k in range(14, 1, -1)))

    @inner
    def log(x):
        """(high, low) of log(x), for positive finite x."""
        sub = x < tiny
        m, e = split_float(choose(sub, x * lift, x))
        e = choose(sub, e - lifted, e)
        f = m - one
        d = m + one
        d_low = choose(m > one, one - (d - m), m - (d - one))
        s = f / d
        s_low = fma(-s, d_low, fma(-s, d, f)) / d
        z = s * s
        z_low = fma(two * s, s_low, fma(s, s, -z))
        more = z * atanh_terms(z)
        t = third + more
        t_low = (more - (t - third)) + third_low
        zt = z * t
        zt_low = fma(z, t, -zt) + fma(z, t_low, z_low * t)
        w = two * s * zt
        w_low = two * fma(s, zt_low, fma(s_low, zt, fma(s, zt, -half * w)))
        base = e * ln2_high
        high = base + two * s
        low = choose(abs(base) > abs(two * s), two * s - (high - base), base - (high - two * s))
        total = high + w
        low = (w - (total - high)) + low + fma(e, ln2_low, fma(two, s_low, w_low))
        high = total + low
        return high, low - (high - total)

    @inner
    def power(x, y):
        a = abs(x)
        high, low = log(a)
        p = y * high
        p_low = fma(y, low, fma(y, high, -p))
        out = (p > biggest) | (p < smallest)
        p = choose(p > biggest, biggest, choose(p < smallest, smallest, p))
        shifted = fma(p, log2e, magic)
        n = shifted - magic
        r = fma(-n, ln2_high, p) + (choose(out, zero, p_low) - n * ln2_low)
        half_n = fma(n, half, magic)
        q = (fma(r * r, exp_terms(r), r) + one) * power_of_two(half_n)
        q = q * power_of_two((n - (half_n - magic)) + magic)
        q = choose((a == one) & (y == y), one, q)
        q = choose(a == zero, choose(y < zero, infinity, zero), q)
        q = choose(a == infinity, choose(y < zero, zero, infinity), q)
        whole = floor(y) == y
        odd = whole & (floor(y * half) * two != y)
        negative = (x < zero) | ((x == zero) & (one / x < zero))
        q = choose(negative & odd, -q, q)
        q = choose((x < zero) & (a != infinity) & (a != one) & (abs(y) != infinity) & (floor(y) != y), nan, q)
        q = choose((x == -one) & (abs(y) != infinity) & (floor(y) != y), nan, q)
        q = choose(x != x, x, choose(y != y, y, q))
        return choose((x == one) | (y == zero), one, q)

    return power


def rules(elem: str, m: Math, libm: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """For each name x -> (f(x), f'(x)); libm(fn)(elem) is what the target has for a function of the math module."""
    acc = np.float32 if elem == "f32" else np.float64
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


def small_powers(elem: str) -> tuple[dict[int, Callable[..., Any]], dict[int, Callable[..., Any]]]:
    """x -> x**n, and x -> (x**n, n x**(n - 1)), for the whole n that a power in the source is often taken to."""
    one, two, three, four = (np.float32(n) if elem == "f32" else np.float64(n) for n in (1, 2, 3, 4))
    values = (lambda x: x, lambda x: x * x, lambda x: x * x * x, lambda x: (x * x) * (x * x))
    slopes = (
        lambda x: (x, one),
        lambda x: (x * x, two * x),
        lambda x: (x * x * x, three * (x * x)),
        lambda x: ((x * x) * (x * x), four * (x * x * x)),
    )
    return dict(enumerate(values, start=1)), dict(enumerate(slopes, start=1))
