"""Numbers that keep account of their roundings: what a user's scalar function makes of an error, and adds to it."""

import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from naive import with_math

from numba_attn import plan

FUNCTION = 8.0  # the error of a function of math, in u: 4 ulp


Number = Any  # a float, or an array of float64


class Tracked:
    """A number of a user's function: its value, its first and second derivative by the score, and the squares of the
    function's own roundings, in the value and in the first derivative. Or an array of such numbers."""

    __slots__ = ("bend", "slope", "slope_squares", "squares", "value")
    __array_ufunc__ = None  # a number of NumPy on the left leaves the operation to this class

    def __init__(
        self, value: Number, slope: Number = 0.0, bend: Number = 0.0, squares: Number = 0.0, slope_squares: Number = 0.0
    ) -> None:
        self.value, self.slope, self.bend = value, slope, bend
        self.squares, self.slope_squares = squares, slope_squares

    def then(
        self,
        other: "Tracked",
        value: Number,
        first: tuple[Number, Number],
        second: tuple[Number, Number, Number],
        error: float,
    ) -> "Tracked":
        """A function of two numbers, by its derivatives: by self, by other; twice by self, by both, twice by other."""
        (a, b), (aa, ab, bb) = first, second
        x, y = self.slope, other.slope
        slope, by_self, by_other = a * x + b * y, aa * x + ab * y, ab * x + bb * y
        bend = a * self.bend + b * other.bend + by_self * x + by_other * y
        squares = a**2 * self.squares + b**2 * other.squares + (error * value) ** 2
        slopes = a**2 * self.slope_squares + b**2 * other.slope_squares + slope**2
        slopes += by_self**2 * self.squares + by_other**2 * other.squares + error**2 * ((a * x) ** 2 + (b * y) ** 2)
        return Tracked(value, slope, bend, squares, slopes)

    def __add__(self, other: Any) -> "Tracked":
        other = tracked(other)
        return self.then(other, self.value + other.value, (1.0, 1.0), (0.0, 0.0, 0.0), 1.0)

    def __sub__(self, other: Any) -> "Tracked":
        return self + -tracked(other)

    def __mul__(self, other: Any) -> "Tracked":
        other = tracked(other)
        return self.then(other, self.value * other.value, (other.value, self.value), (0.0, 1.0, 0.0), 1.0)

    def __truediv__(self, other: Any) -> "Tracked":
        x, y = self.value, tracked(other).value
        return self.then(tracked(other), x / y, (1 / y, -x / y**2), (0.0, -1 / y**2, 2 * x / y**3), 1.0)

    def __rsub__(self, other: Any) -> "Tracked":
        return tracked(other) - self

    def __rtruediv__(self, other: Any) -> "Tracked":
        return tracked(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> "Tracked":
        return Tracked(-self.value, -self.slope, -self.bend, self.squares, self.slope_squares)

    def __abs__(self) -> "Tracked":
        sign = np.sign(self.value)
        return Tracked(sign * self.value, sign * self.slope, sign * self.bend, self.squares, self.slope_squares)

    def __int__(self) -> int:
        return int(self.value)

    def __lt__(self, other: Any) -> Any:
        return self.value < tracked(other).value

    def __gt__(self, other: Any) -> Any:
        return self.value > tracked(other).value


def tracked(x: Any) -> Tracked:
    if isinstance(x, Tracked):
        return x
    return Tracked(x.astype(np.float64) if isinstance(x, np.ndarray) else float(x))


def _of_one(*derivatives: Callable[[Number], Number]) -> Callable[[Any], Tracked]:
    """A function of one number from itself and its first and second derivative."""

    def call(x: Any) -> Tracked:
        x = tracked(x)
        value, first, second = (fn(x.value) for fn in derivatives)
        return x.then(Tracked(0.0), value, (first, 0.0), (second, 0.0, 0.0), FUNCTION)

    return call


def _pow(x: Any, y: float) -> Tracked:
    """Of a number to a power that is no function of the score."""
    x = tracked(x)
    value = np.power(x.value, y)
    return x.then(
        Tracked(0.0), value, (y * value / x.value, 0.0), (y * (y - 1) * value / x.value**2, 0.0, 0.0), FUNCTION
    )


def _tanh(x: Any) -> Tracked:
    """Its derivative is made as 1 - tanh**2, which cancels."""
    x = tracked(x)
    value = np.tanh(x.value)
    first = 1 - value * value
    result = x.then(Tracked(0.0), value, (first, 0.0), (-2 * value * first, 0.0, 0.0), FUNCTION)
    result.slope_squares += (2 * FUNCTION * value**2 * x.slope) ** 2
    return result


def _minus(fn: Callable[[Number], Number]) -> Callable[[Number], Number]:
    return lambda x: -fn(x)


MATH = SimpleNamespace(
    inf=math.inf,
    pow=_pow,
    exp=_of_one(np.exp, np.exp, np.exp),
    log=_of_one(np.log, lambda x: 1 / x, lambda x: -1 / x**2),
    log1p=_of_one(np.log1p, lambda x: 1 / (1 + x), lambda x: -1 / (1 + x) ** 2),
    tanh=_tanh,
    sin=_of_one(np.sin, np.cos, _minus(np.sin)),
    cos=_of_one(np.cos, _minus(np.sin), _minus(np.cos)),
    sqrt=_of_one(np.sqrt, lambda x: 0.5 / np.sqrt(x), lambda x: -0.25 / x**1.5),
)


def modified(p: plan.Problem, s: np.ndarray) -> Tracked:
    """score_mod of every score."""
    x, _ = everywhere(p, Tracked(s, np.ones_like(s)), p.aux)
    # The score comes from log2 units and goes back to them, and is rounded on both ways.
    squares = x.squares + (x.slope * s) ** 2 + np.where(np.isfinite(x.value), x.value, 0.0) ** 2
    return Tracked(x.value, x.slope, x.bend, squares, x.slope_squares + (x.bend * s) ** 2)


class Tangent(NamedTuple):
    """The tangent of score_mod along directions of the score and of the arrays of aux."""

    value: np.ndarray
    bend: np.ndarray  # its derivative by the score
    squares: np.ndarray  # of the function's own roundings


class Direction:
    """An array of aux, whose numbers have their tangents beside them."""

    def __init__(self, x: np.ndarray, dot: np.ndarray) -> None:
        self.x, self.dot = x, dot

    def __getitem__(self, at: Any) -> Tracked:
        return Tracked(self.x[at].astype(np.float64), self.dot[at].astype(np.float64))


def tangent(p: plan.Problem, s: np.ndarray, s_dot: np.ndarray, aux_dot: tuple[np.ndarray | None, ...]) -> Tangent:
    aux = tuple(x if dot is None else Direction(x, dot) for x, dot in zip(p.aux, aux_dot, strict=True))
    x, bend, _ = with_bend(p, Tracked(s, s_dot), aux)
    return Tangent(x.slope, bend, x.slope_squares + (bend * s) ** 2)


class Read(NamedTuple):
    """One read of an array of aux by score_mod, at every pair: the first read, the second, ..."""

    element: np.ndarray  # the flat index of what is read, -1 where the function does not read so often
    value: np.ndarray  # the derivative of score_mod by it
    bend: np.ndarray  # the derivative of that by the score
    squares: np.ndarray  # of the function's own roundings


def reads(p: plan.Problem, s: np.ndarray, n: int) -> Iterator[Read]:
    """The reads of aux[n], by the score that goes into score_mod."""
    for asked in itertools.count():
        table = Seeded(p.aux[n], asked)
        x, bend, element = with_bend(p, Tracked(s, np.zeros_like(s)), (*p.aux[:n], table, *p.aux[n + 1 :]), table)
        if np.all(element < 0):
            return
        yield Read(element, x.slope, bend, x.slope_squares + (bend * s) ** 2)


class Seeded:
    """An array of aux, of whose reads one has the tangent 1: that of the number `asked`."""

    def __init__(self, x: np.ndarray, asked: int) -> None:
        self.x, self.asked, self.flat = x, asked, np.arange(x.size).reshape(x.shape)
        self.begin()

    def begin(self) -> None:
        self.count, self.element = 0, np.array(-1)

    def __getitem__(self, at: Any) -> Any:
        return self.rows(at if isinstance(at, tuple) else (at,))

    def rows(self, at: tuple[Any, ...]) -> Any:
        if len(at) < self.x.ndim:
            return SeededRows(self, at)
        asked = self.count == self.asked
        if asked:
            self.element = self.flat[at]
        self.count += 1
        return Tracked(self.x[at].astype(np.float64), float(asked))


class SeededRows(NamedTuple):
    of: Seeded
    before: tuple[Any, ...]

    def __getitem__(self, at: Any) -> Any:
        return self.of.rows((*self.before, *(at if isinstance(at, tuple) else (at,))))


UNREAD = Seeded(np.empty(0), 0)
FIELDS = ("value", "slope", "bend", "squares", "slope_squares")


def with_bend(
    p: plan.Problem, s: Tracked, aux: tuple[Any, ...], seeded: Seeded = UNREAD
) -> tuple[Tracked, np.ndarray, np.ndarray]:
    """`everywhere`, and between the two the derivative of the slope by the score: 0 where the read moves with it."""
    step = 1e-4 * (1 + np.abs(s.value))  # two digits of the second derivative are enough
    x, element = everywhere(p, s, aux, seeded)
    y, element_beside = everywhere(p, Tracked(s.value + step, s.slope), aux, seeded)
    return x, np.where(element_beside == element, (y.slope - x.slope) / step, 0.0), element


def everywhere(
    p: plan.Problem, s: Tracked, aux: tuple[Any, ...], seeded: Seeded = UNREAD
) -> tuple[Tracked, np.ndarray]:
    """score_mod of every score: of all at once, or one by one where the function has branches. And which element of
    `seeded` was read."""
    fn, shape = with_math(p.score_mod, MATH), s.value.shape
    seeded.begin()
    try:
        x = fn(s, *np.ogrid[tuple(map(slice, shape))], *aux)
    except ValueError:  # the truth of an array
        x = None
    if isinstance(x, Tracked):
        element = seeded.element
    else:
        found, element = np.empty((5, *shape)), np.empty(shape, int)
        for at in np.ndindex(shape):
            seeded.begin()
            one = tracked(fn(Tracked(s.value[at], s.slope[at]), *at, *aux))
            found[(slice(None), *at)] = one.value, one.slope, one.bend, one.squares, one.slope_squares
            element[at] = seeded.element
        x = Tracked(*found)
    return Tracked(*(np.broadcast_to(getattr(x, name), shape) for name in FIELDS)), np.broadcast_to(element, shape)
