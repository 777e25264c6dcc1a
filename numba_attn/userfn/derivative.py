"""Derivatives of a user's score_mod in Python, exact, by dual numbers: what the reference differentiates with.

A dual number is x + sum of d e, with one e for the score and one for each element of aux that was read, and e * e' = 0.
Arithmetic on it is the chain rule. The user's function runs as it is on such numbers, except that math.tanh(x) takes
floats alone: so it is rebuilt, with the helpers that it calls, with names that stand for functions of dual numbers.

Where there is no derivative, a convention holds, also for the compiled functions: abs has 0 at 0; min, max and where
have that of the operand they return; floor, ceil, // and comparisons have 0.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ..arrays import Array
from .accepted import ScoreMod, plain_function, where

Key = tuple[int, int]  # (n, flat index in aux[n])
SCORE: Key = (-1, 0)

# (score, b, h, i, j, *aux) -> (value, d value / d score, {key: d value / d element} over the elements that were read)
Differentiated = Callable[..., tuple[Any, Any, dict[Key, Any]]]


class Dual:
    """A number with its partial derivatives: `partials` maps SCORE or an element's key to d value / d that."""

    __slots__ = ("partials", "value")
    __array_ufunc__ = None  # so that np.float64 * Dual comes here
    __hash__ = None  # equal by value, like a float, but not hashable

    def __init__(self, value: Any, partials: Mapping[Key, Any]) -> None:
        self.value = np.float64(value)  # IEEE: 1 / 0 is inf
        self.partials = partials

    def __repr__(self) -> str:
        return f"Dual({self.value}, {dict(self.partials)})"

    def __add__(self, other: Any) -> Dual:
        return _add(self, other)

    def __radd__(self, other: Any) -> Dual:
        return _add(other, self)

    def __sub__(self, other: Any) -> Dual:
        return _subtract(self, other)

    def __rsub__(self, other: Any) -> Dual:
        return _subtract(other, self)

    def __mul__(self, other: Any) -> Dual:
        return _multiply(self, other)

    def __rmul__(self, other: Any) -> Dual:
        return _multiply(other, self)

    def __truediv__(self, other: Any) -> Dual:
        return _divide(self, other)

    def __rtruediv__(self, other: Any) -> Dual:
        return _divide(other, self)

    def __floordiv__(self, other: Any) -> Any:
        return self.value // _value(other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _value(other) // self.value

    def __mod__(self, other: Any) -> Dual:
        return _modulo(self, other)

    def __rmod__(self, other: Any) -> Dual:
        return _modulo(other, self)

    def __pow__(self, other: Any) -> Dual:
        return _power(self, other, _value(self) ** _value(other))

    def __rpow__(self, other: Any) -> Dual:
        return _power(other, self, _value(other) ** _value(self))

    def __neg__(self) -> Dual:
        return _chain(-self.value, (self, -1.0))

    def __pos__(self) -> Dual:
        return self

    def __abs__(self) -> Dual:
        return _chain(abs(self.value), (self, np.sign(self.value)))

    def __lt__(self, other: Any) -> bool:
        return bool(self.value < _value(other))

    def __le__(self, other: Any) -> bool:
        return bool(self.value <= _value(other))

    def __gt__(self, other: Any) -> bool:
        return bool(self.value > _value(other))

    def __ge__(self, other: Any) -> bool:
        return bool(self.value >= _value(other))

    def __eq__(self, other: Any) -> bool:
        return bool(self.value == _value(other))

    def __ne__(self, other: Any) -> bool:
        return bool(self.value != _value(other))

    def __bool__(self) -> bool:
        return bool(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __round__(self, digits: int | None = None) -> Any:
        return round(float(self.value), digits)

    def __float__(self) -> float:
        raise TypeError(
            "score_mod passes the score, or what it computed of it, to a function that is not differentiated; use the "
            f"functions {', '.join(sorted(_SLOPES))} of math, and numba_attn.where, "
            "or give the derivative: numba_attn.score_mod(fn, grad=...)"
        )


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Dual) else x


def _chain(value: Any, *terms: tuple[Any, Any]) -> Dual:
    """The chain rule: the value of f(x, y, ...), and for each Dual among them (x, df/dx)."""
    partials: dict[Key, Any] = {}
    for x, slope in terms:
        if isinstance(x, Dual):
            for key, partial in x.partials.items():
                partials[key] = partials.get(key, 0.0) + slope * partial
    return Dual(value, partials)


def _add(x: Any, y: Any) -> Dual:
    return _chain(_value(x) + _value(y), (x, 1.0), (y, 1.0))


def _subtract(x: Any, y: Any) -> Dual:
    return _chain(_value(x) - _value(y), (x, 1.0), (y, -1.0))


def _multiply(x: Any, y: Any) -> Dual:
    return _chain(_value(x) * _value(y), (x, _value(y)), (y, _value(x)))


def _divide(x: Any, y: Any) -> Dual:
    quotient = _value(x) / _value(y)
    return _chain(quotient, (x, 1.0 / np.float64(_value(y))), (y, -quotient / _value(y)))


def _modulo(x: Any, y: Any) -> Dual:
    """x - y floor(x / y), the floor a constant."""
    return _chain(_value(x) % _value(y), (x, 1.0), (y, -np.floor(_value(x) / _value(y))))


def _power(x: Any, y: Any, value: Any) -> Dual:
    """d x**y = y x**(y-1) dx + log(x) x**y dy, where 0 x**-1 and log(0) 0**y are 0."""
    base, exponent = np.float64(_value(x)), np.float64(_value(y))
    return _chain(
        value,
        (x, exponent * base ** (exponent - 1.0) if exponent != 0.0 else 0.0),
        (y, np.log(base) * value if isinstance(y, Dual) and base != 0.0 else 0.0),
    )


# --- the functions ----------------------------------------------------------------------------------------------------

# df/dx from x and y = f(x)
_SLOPES: dict[str, Callable[[Any, Any], Any]] = {
    "exp": lambda x, y: y,
    "expm1": lambda x, y: np.exp(x),
    "log": lambda x, y: 1.0 / x,
    "log1p": lambda x, y: 1.0 / (1.0 + x),
    "log2": lambda x, y: 1.0 / (x * math.log(2.0)),
    "log10": lambda x, y: 1.0 / (x * math.log(10.0)),
    "sqrt": lambda x, y: 0.5 / np.float64(y),
    "sin": lambda x, y: np.cos(x),
    "cos": lambda x, y: -np.sin(x),
    "atan": lambda x, y: 1.0 / (1.0 + x * x),
    "sinh": lambda x, y: np.cosh(x),
    "cosh": lambda x, y: np.sinh(x),
    "tanh": lambda x, y: 1.0 - y * y,
    "erf": lambda x, y: 2.0 / math.sqrt(math.pi) * np.exp(-x * x),
    "fabs": lambda x, y: np.sign(x),
}


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return yes if condition else no


def _smooth(fn: Any, slope: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def of(x: Any) -> Any:
        if not isinstance(x, Dual):
            return fn(x)
        y = fn(x.value)
        return _chain(y, (x, slope(x.value, y)))

    return of


def _by_value(fn: Any) -> Callable[..., Any]:
    return lambda *args: fn(*map(_value, args))


def _pow(fn: Any) -> Callable[[Any, Any], Any]:
    def of(x: Any, y: Any) -> Any:
        value = fn(_value(x), _value(y))
        return _power(x, y, value) if isinstance(x, Dual) or isinstance(y, Dual) else value

    return of


def _float(x: Any = 0.0) -> Any:
    return x if isinstance(x, Dual) else float(x)


def _twins() -> dict[int, Any]:
    """The functions that take Duals, by the id of the function that each replaces."""
    twins: dict[int, Any] = {id(where): _where, id(np.where): _where, id(float): _float}
    for name, slope in _SLOPES.items():
        fns = [getattr(math, name)] + ([getattr(np, name)] if hasattr(np, name) else [])
        twins.update({id(fn): _smooth(fn, slope) for fn in fns})
    twins[id(np.absolute)] = _smooth(np.absolute, _SLOPES["fabs"])
    for name in ("floor", "ceil", "isnan", "isinf", "isfinite"):
        twins.update({id(fn): _by_value(fn) for fn in (getattr(math, name), getattr(np, name))})
    twins.update({id(fn): _pow(fn) for fn in (math.pow, np.power)})
    return twins


_TWINS = _twins()


# --- the user's function over them ------------------------------------------------------------------------------------


class _Module:
    """A module whose functions take Duals: what the name `math`, `np` or `na` means in a rebuilt function."""

    def __init__(self, module: types.ModuleType, known: dict[int, Any]) -> None:
        self._module, self._known = module, known

    def __getattr__(self, name: str) -> Any:
        return _rebuilt(getattr(self._module, name), self._known)


def _rebuilt(x: Any, known: dict[int, Any]) -> Any:
    """`x`, a function or anything that one refers to, for Duals. `known` holds what was rebuilt before, since functions
    may call each other recursively."""
    if id(x) in _TWINS:
        return _TWINS[id(x)]
    if isinstance(x, types.ModuleType):
        return _Module(x, known)
    fn = plain_function(x)
    if not isinstance(fn, types.FunctionType):
        return x
    if id(fn) in known:
        return known[id(fn)]
    names: set[str] = set()
    codes = [fn.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]  # functions inside it
    scope: dict[str, Any] = {"float": _float, "__builtins__": fn.__globals__.get("__builtins__", __builtins__)}
    cells = tuple(types.CellType() for _ in fn.__closure__ or ())
    new = types.FunctionType(fn.__code__, scope, fn.__name__, None, cells)
    known[id(fn)] = new
    scope.update({name: _rebuilt(fn.__globals__[name], known) for name in names if name in fn.__globals__})
    for cell, old in zip(cells, fn.__closure__ or (), strict=True):
        try:
            cell.cell_contents = _rebuilt(old.cell_contents, known)
        except ValueError:  # not assigned yet
            continue
    new.__defaults__ = fn.__defaults__ and tuple(_rebuilt(d, known) for d in fn.__defaults__)
    new.__kwdefaults__ = fn.__kwdefaults__ and {k: _rebuilt(d, known) for k, d in fn.__kwdefaults__.items()}
    return new


@lru_cache(maxsize=16)
def _flat_indices(shape: tuple[int, ...]) -> Array:
    return np.arange(math.prod(shape)).reshape(shape)


class _Table:
    """An array of floats of aux that notes which elements are read."""

    def __init__(self, values: Array, flat: Array, note: Callable[[int, Any], Any]) -> None:
        self._values, self._flat, self._note = values, flat, note
        self.shape, self.ndim, self.size = values.shape, values.ndim, values.size

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, at: Any) -> Any:
        value, flat = self._values[at], self._flat[at]
        return _Table(value, flat, self._note) if np.ndim(flat) else self._note(int(flat), value)


def _tables(aux: tuple[Any, ...], note: Callable[[Key, Any], Any]) -> list[Any]:
    """aux with its float arrays as tables, whose elements are note(key, element)."""

    def table(n: int, a: Array) -> _Table:
        return _Table(a, _flat_indices(a.shape), lambda flat, x: note((n, flat), x))

    return [a if a.dtype.kind in "iub" else table(n, a) for n, a in enumerate(aux)]


# --- what the reference calls -----------------------------------------------------------------------------------------


def differentiated(fn: Any) -> Differentiated:
    """score_mod with its derivatives, by dual numbers.

    Parameters
    ----------
    fn : function, @njit function or ScoreMod
        fn(score, b, h, i, j, *aux) -> score. It may use + - * / // % **, abs, min, max, comparisons, `numba_attn.where`
        and what `math` and `numpy` have of exp, expm1, log, log1p, log2, log10, sqrt, sin, cos, atan, sinh, cosh, tanh,
        erf, fabs, pow, floor and ceil, and helpers that do.

    Returns
    -------
    function
        (score, b, h, i, j, *aux) -> (value, d value / d score, reads). reads has d value / d aux[n].flat[at] under
        (n, at) for each element of an array of floats that fn read.

    Examples
    --------
    >>> of = differentiated(lambda s, b, h, i, j, table: s * s + table[j])
    >>> value, slope, reads = of(3.0, 0, 0, 0, 1, np.array([5.0, 7.0]))
    >>> float(value), float(slope), reads
    (16.0, 6.0, {(0, 1): 1.0})
    """
    run = _rebuilt(fn, {})

    def call(score: Any, b: Any, h: Any, i: Any, j: Any, *aux: Any) -> tuple[Any, Any, dict[Key, Any]]:
        elements: dict[Key, Dual] = {}

        def note(key: Key, x: Any) -> Dual:
            return elements.setdefault(key, Dual(x, {key: 1.0}))

        with np.errstate(all="ignore"):
            y = run(Dual(score, {SCORE: 1.0}), b, h, i, j, *_tables(aux, note))
        partials = y.partials if isinstance(y, Dual) else {}
        return _value(y), partials.get(SCORE, 0.0), {key: partials.get(key, 0.0) for key in elements}

    return call


def differentiated_by_hand(mod: ScoreMod, aux_grad: tuple[bool, ...]) -> Differentiated:
    """score_mod with the user's own grad: the same as `differentiated`, the entries of reads for the arrays that
    aux_grad marks.

    Entry n of grad's tuple, behind d/dscore, is the derivative with respect to the one element of aux[n] that fn reads.

    Raises
    ------
    ValueError
        From the result, if grad gives no entry for an array that is marked, or fn does not read one element of it.
    """
    grad = plain_function(mod.grad)
    run = _rebuilt(mod, {})

    def call(score: Any, b: Any, h: Any, i: Any, j: Any, *aux: Any) -> tuple[Any, Any, dict[Key, Any]]:
        read: dict[Key, None] = {}

        def note(key: Key, x: Any) -> Any:
            read[key] = None
            return x

        with np.errstate(all="ignore"):
            value = run(score, b, h, i, j, *_tables(aux, note))
            if value == -np.inf:  # a hidden pair has no derivative
                return value, 0.0, {}
            given = grad(score, b, h, i, j, *aux)
        slopes = given if isinstance(given, tuple) else (given,)
        reads: dict[Key, Any] = {}
        for n in (n for n, wanted in enumerate(aux_grad) if wanted):
            if n + 1 >= len(slopes):
                what = f"a tuple of {len(given)}" if isinstance(given, tuple) else "one number"
                raise ValueError(
                    f"aux_grad names position {n}, but grad of score_mod returns {what}; it takes a tuple "
                    f"(d/dscore, d/daux[0], ...) as far as d/daux[{n}], or leave grad out to have it derived"
                )
            keys = [key for key in read if key[0] == n]
            if len(keys) != 1:
                raise ValueError(
                    f"aux_grad names position {n}, and score_mod reads {len(keys)} elements of aux[{n}] at "
                    f"(b, h, i, j) = {(b, h, i, j)}; a hand-written grad has one number for it, so it takes a function "
                    "that reads exactly one: leave grad out, and the gradient is derived automatically"
                )
            reads[keys[0]] = slopes[n + 1]
        return value, slopes[0], reads

    return call
