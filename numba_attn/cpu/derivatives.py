"""Derivatives of users' score functions on the CPU, by dual numbers (dual_types.py).

There are three passes, each a C function over a tile as in modifiers.py; every argument is an intp:

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

import numpy as np
from numba.core import types

from ..online import LOG2E
from ..userfn import accepted, aux_types, dual_types
from ..userfn.aux_types import ARRAY, ELEMENT, OUTSIDE, READS, SEED, UNREAD
from ..userfn.scalar_types import FLOAT
from .compile import array_type, compile_cfunc, inner
from .simd import f32_ptr, f64_ptr, i64_ptr
from .target import AS_INDEX, AS_SCORE, NAMES, SCORES, TARGET, aux_arrays

DUALS = dual_types.build(TARGET, SCORES)
AUX = aux_types.build(TARGET, SCORES, DUALS, lambda elem, dtype: dtype)
AS_DUAL, dual, value_of, tangent_of = DUALS.AS_DUAL, DUALS.dual, DUALS.value_of, DUALS.tangent_of
choose = NAMES.choose

# ---------------------------------------------------------------- compiling a derivative


def compile_derivative(mod, kind, elem, aux, asked):
    """The address of one of the three passes; see the top of this file."""
    fn, grad = (mod.fn, mod.grad) if isinstance(mod, accepted.ScoreMod) else (mod, None)
    name = getattr(accepted.plain_function(fn), "__name__", "?")
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
    both = enumerate(zip(arrays, dots, strict=True))
    kinds = [AUX.Aux(elem, how, n, a, d) if asked[n] else None for n, (a, d) in both]
    return types.Tuple(arrays), types.Tuple([d for d in dots if d]), tuple(kinds)


def _tile_of_duals(fn, kind, elem, aux, asked):
    call, index, convert = inner(accepted.plain_function(fn)), AS_INDEX[elem], AS_DUAL[elem]
    acc, pointer = FLOAT[elem], f32_ptr if elem == "f32" else f64_ptr
    log2e, zero, one, hidden = acc(LOG2E), acc(0), acc(1), acc(-np.inf)
    kinds, dot_kinds, wrapped = _types(elem, kind, "dot" if kind == "score_jvp" else "seed", aux, asked)
    wrap, cells = AUX.wrapped(wrapped), AUX.cells(4)

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
    call, derivatives = inner(accepted.plain_function(fn)), inner(accepted.plain_function(grad))
    index, natural, to_float = AS_INDEX[elem], AS_SCORE[elem], AS_DUAL[elem]
    acc, pointer = FLOAT[elem], f32_ptr if elem == "f32" else f64_ptr
    log2e, zero, hidden, unknown = acc(LOG2E), acc(0), acc(-np.inf), acc(np.nan)
    kinds, dot_kinds, wrapped = _types(elem, kind, "trace", aux, asked)
    n_aux, wanted = len(aux), (*map(bool, asked), False)
    wrap, cells, numbers = AUX.wrapped(wrapped), AUX.cells(2 * n_aux + 1), DUALS.numbers(elem, 1 + n_aux, found)

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
