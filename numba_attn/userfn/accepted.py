"""User functions in the score: what is accepted as score_mod and mask_mod, and how a function is recognised.

A score_mod is fn(score, b, h, i, j, *aux) -> score, a mask_mod fn(b, h, i, j, *aux) -> bool: plain Python functions, or
@njit ones, of scalars. This file needs no Numba; cpu/modifiers.py compiles them, reference.py calls them.
"""

import dis
import inspect
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import FLOAT_NAMES, Array, plain

_SCALARS = (bool, int, float, np.bool_, np.integer, np.floating)

_ACCEPTED: set[Any] = set()  # functions that were checked, by identity: asking Python for a signature takes 20 us
_MOST_ACCEPTED = 1024

# Modules whose numbers nobody changes.
_STEADY = frozenset({math, np, sys.modules[__name__.partition(".")[0]]})


@dataclass(frozen=True)
class ScoreMod:
    """A score modifier with, if the user has one, its hand-written gradient."""

    fn: Callable[..., Any]
    grad: Callable[..., Any] | None = None


def score_mod(fn: Callable[..., Any], grad: Callable[..., Any] | None = None) -> ScoreMod:
    """A score modifier for `attention(score_mod=...)`, optionally with its gradient.

    ``fn(score, b, h, i, j, *aux)`` returns the modified score; grad, with the same arguments, returns d/dscore, or a
    tuple that begins with it followed by d/daux. The forward pass needs fn alone, so `attention(score_mod=fn)` with the
    bare function does the same.

    >>> import math, numba_attn as na
    >>> capped = na.score_mod(lambda score, b, h, i, j: 30 * math.tanh(score / 30))
    """
    check_function(fn, "score_mod", 5, None)
    if grad is not None:
        check_function(grad, "grad", 5, None)
    return ScoreMod(fn, grad)


def where(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`: a branch-free choice for score_mod functions.

    In a compiled score_mod all three are scalars; called from Python it is numpy.where, or a plain choice for Python
    scalars.
    """
    if isinstance(condition, np.ndarray) or isinstance(yes, np.ndarray) or isinstance(no, np.ndarray):
        return np.where(condition, yes, no)
    return yes if condition else no


def plain_function(fn: Any) -> Any:
    """The Python function behind fn: itself, the one of a ScoreMod, or the one that an @njit dispatcher wraps."""
    fn = fn.fn if isinstance(fn, ScoreMod) else fn
    return getattr(fn, "py_func", fn)


def check_function(fn: Any, name: str, n_leading: int, n_aux: int | None) -> None:
    """Raise TypeError, naming the way out, unless fn is a function of n_leading scalars (and n_aux arrays) that can be
    compiled.

    n_aux None leaves the number of arrays open.
    """
    fn = plain_function(fn)
    if not isinstance(fn, types.FunctionType):
        raise TypeError(
            f"{name}: got {type(fn).__name__}; accepted is a plain Python function or an @njit one "
            f"(wrap a callable object, a partial or a builtin in a def or lambda)"
        )
    key = (identity(fn), n_leading, n_aux)
    if key in _ACCEPTED:
        return
    for kind, what, value in _reached(fn):
        if isinstance(value, np.ndarray):
            raise TypeError(
                f"{name}: the function reads the array {what!r} from its {kind}; Numba would freeze the values it has "
                f"now, and later changes would silently have no effect. Pass it through aux=({what},) and take it as a "
                "parameter behind the indices"
            )
    leading = "score, b, h, i, j" if n_leading == 5 else "b, h, i, j"
    try:
        inspect.signature(fn).bind(*range(n_leading + (n_aux or 0)))
    except TypeError as error:
        if n_aux is not None or "missing" not in str(error):
            given = f" and the {n_aux} arrays of aux" if n_aux else ""
            raise TypeError(f"{name}: the function must take ({leading}){given}: {error}") from None
    if len(_ACCEPTED) >= _MOST_ACCEPTED:
        _ACCEPTED.clear()
    _ACCEPTED.add(key)


def _captured(fn: Any, exactly: bool = False) -> list[tuple[str, str, Any]]:
    """What a function reads from outside its arguments: (kind, name, value).

    A name behind a dot is taken for that of a global too, which may find more than the function reads; exactly: it is
    not, which takes ten times as long.
    """
    found: list[tuple[str, str, Any]] = []
    for what, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            found.append(("closure", what, cell.cell_contents))
        except ValueError:  # not assigned yet
            continue
    code, names = [fn.__code__], []
    while code:
        one = code.pop()
        names += one.co_names
        read = _global_names(one) if exactly else one.co_names
        found += [("globals", n, fn.__globals__[n]) for n in read if n in fn.__globals__]
        code += [c for c in one.co_consts if isinstance(c, types.CodeType)]
    parameters = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    defaults = zip(parameters[::-1], (fn.__defaults__ or ())[::-1], strict=False)  # the last parameters have them
    found += [("defaults", what, value) for what, value in (*defaults, *(fn.__kwdefaults__ or {}).items())]
    modules = [one for one in found if type(one[2]) is types.ModuleType and one[2] not in _STEADY]
    return found + _read_from(modules, names) if modules else found


def _read_from(modules: list[tuple[str, str, Any]], names: list[str]) -> list[tuple[str, str, Any]]:
    """The attributes of these names, of the modules and of modules in them."""
    found: list[tuple[str, str, Any]] = []
    seen: set[int] = set()
    while modules:
        _, path, module = modules.pop()
        if id(module) not in seen:
            seen.add(id(module))
            has = vars(module)
            found += (inside := [("module", f"{path}.{n}", has[n]) for n in names if n in has])
            modules += [one for one in inside if isinstance(one[2], types.ModuleType)]
    return found


def _global_names(code: types.CodeType) -> set[str]:
    return {x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _reached(fn: Any) -> list[tuple[str, str, Any]]:
    """What a function and those that it calls read from outside their arguments, and what the tuples among it hold."""
    found = waiting = _captured(fn, exactly=True)
    seen = {fn, where}
    while waiting:
        more: list[tuple[str, str, Any]] = []
        for kind, what, value in waiting:
            called = plain_function(value)
            if isinstance(value, tuple):
                more += [(kind, f"{what}[{n}]", x) for n, x in enumerate(value)]
            elif isinstance(called, types.FunctionType) and called not in seen:
                seen.add(called)
                more += _captured(called, exactly=True)
        found, waiting = found + more, more
    return found


class _Same:
    """An object as a part of a key, equal to itself alone. The key keeps it alive, so that no later object has its
    id."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def identity(fn: Callable[..., Any], inside: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """A hashable key that two functions share iff they compile to the same code: code, defaults and captured scalars,
    functions alike. inside: the functions that call this one.

    So a lambda made anew in a loop compiles once, and one that captures another number compiles again.
    """
    fn = plain_function(fn)
    inside = (*inside, fn)
    parts: list[Any] = [fn.__code__]
    for kind, what, value in _captured(fn):
        parts.append((kind, what, _key(value, inside)))
    return tuple(parts)


def _key(value: Any, inside: tuple[Any, ...]) -> Any:
    """What a function captures, as a part of its key."""
    if isinstance(value, _SCALARS):
        return type(value), repr(value)  # 0.0 and -0.0 are equal, and NaN is not equal to itself
    if isinstance(value, tuple):
        return type(value), *(_key(x, inside) for x in value)
    called = plain_function(value)
    if isinstance(called, types.FunctionType) and called is not where and not any(called is x for x in inside):
        return identity(called, inside)
    return _Same(value)


def aux_arrays(aux: Any, name: str) -> tuple[Array, ...]:
    """The arrays for a user's function. float16 and bfloat16, which Numba cannot load, become float32 copies."""
    if isinstance(aux, np.ndarray) or not isinstance(aux, (tuple, list)):
        raise TypeError(f"{name} is a {type(aux).__name__}; it takes a tuple of arrays, ({name.split()[0]},) for one")
    arrays = []
    for n, given in enumerate(aux):
        a = plain(given, f"{name}[{n}]")
        half = a.dtype.char == "e" or a.dtype.name == "bfloat16"
        if not a.dtype.isnative or (not half and a.dtype.char not in "?bBhHiIlLqQfd"):
            raise TypeError(
                f"{name}[{n}] has dtype {a.dtype}; it takes {FLOAT_NAMES}, int or bool, in this machine's byte order"
            )
        arrays.append(a.astype(np.float32) if half else a)
    return tuple(arrays)


def widened(a: Array) -> Array:
    """`a` with its numbers in float64 or int64, so that a user's function run in Python does not round or wrap in a
    narrow type."""
    if a.dtype.kind == "i" or (a.dtype.kind == "u" and a.dtype.itemsize < 8):
        return a.astype(np.int64)
    return a if a.dtype.kind in "bu" else a.astype(np.float64)
