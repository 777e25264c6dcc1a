"""User functions on the CPU: each is compiled alone, as a loop over a tile of scores, and the kernel calls it through
its address.

So a new function costs a tenth of a second, and no kernel is ever compiled for it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import types

from ..online import LOG2E
from ..userfn import accepted
from .compile import array_type, compile_cfunc, inner
from .simd import f32_ptr, f64_ptr, i64_ptr, u8_ptr
from .target import AS_INDEX, AS_SCORE, as_float, aux_arrays

_ADDRESSES: dict[Any, int] = {}


def tile_function(
    fn: Callable[..., Any] | accepted.ScoreMod,
    kind: str,
    elem: str,
    aux: tuple[np.ndarray, ...],
    *,
    asked: tuple[Any, ...] = (),
) -> int:
    """The address of fn as a loop over a tile; a kind of "score" or "mask", or one of the derivatives of a score.

    C signature of these two: (target, row stride, lanes, b, h, first i, first j, keys, aux table). A score function
    replaces target[j, lane] and ends in log2 units; a mask function clears the bytes of the pairs that it hides. For
    the derivatives, and for asked, see derivatives.py.
    """
    grad = None if kind in ("score", "mask") or not isinstance(fn, accepted.ScoreMod) else fn.grad
    functions = accepted.identity(accepted.plain_function(fn)), grad and accepted.identity(grad)
    key = (kind, elem, functions, tuple((a.dtype, a.ndim) for a in aux), asked)
    address = _ADDRESSES.get(key)
    if address is None:
        address = _ADDRESSES[key] = _compile(fn, kind, elem, aux, asked)
    return address


def _compile(fn, kind, elem, aux, asked):
    if kind not in ("score", "mask"):
        from .derivatives import compile_derivative  # a process that wants no gradient does not pay for its types

        return compile_derivative(fn, kind, elem, aux, asked)
    call = inner(accepted.plain_function(fn))
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

    name = f"{kind}_mod {getattr(accepted.plain_function(fn), '__name__', '?')}"
    try:
        return compile_cfunc(
            score_tile if kind == "score" else mask_tile, types.void(*[types.intp] * 9), name, cached=False
        )
    except Exception as error:
        raise TypeError(f"{kind}_mod: the function could not be compiled: {error}") from error
