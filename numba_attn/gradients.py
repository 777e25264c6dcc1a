"""What the backward pass returns, and the checks of the arguments that only it or the tangents take."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple

import numpy as np

from .arrays import Array, accumulation, plain
from .options import ArrayT
from .plan import Problem, bhsd_view, lse_shape, output_shape


class Gradients(NamedTuple, Generic[ArrayT]):
    """Gradients of sum(dout * out) + sum(dlse * lse): each has the shape, layout and dtype of its argument.

    None for what was not given. daux is a tuple with an entry for each array of aux, None for those that aux_grad does
    not name.
    """

    dq: ArrayT
    dk: ArrayT
    dv: ArrayT
    dbias: ArrayT | None = None
    dsinks: ArrayT | None = None
    dalibi_slopes: ArrayT | None = None
    daux: tuple[ArrayT | None, ...] | None = None


class Backward(NamedTuple):
    """What a backward pass is given besides the problem: (B, H, S, ...) views of the caller's arrays."""

    out: Array
    lse: Array
    dout: Array
    dlse: Array | None
    asked: tuple[bool, ...]  # which arrays of aux get a gradient


class Wanted(NamedTuple):
    """Where the gradients go: (B, H, S, D) views, and the shapes of those that are sums over pairs."""

    dq: Array
    dk: Array
    dv: Array
    bias_shape: tuple[int, ...] | None  # (B or 1, Hq or 1, Sq or 1, Sk or 1)
    slopes_shape: tuple[int, ...] | None  # (B or 1, Hq)


class Tangents(NamedTuple):
    """A direction: each in its argument's shape, None for zeros. q, k and v are (B, H, S, D) views."""

    q: Array | None
    k: Array | None
    v: Array | None
    bias: Array | None
    sinks: Array | None
    slopes: Array | None
    aux: tuple[Array | None, ...]


def check_aux_grad(aux_grad: Any, aux: tuple[Array, ...], name: str = "aux_grad") -> tuple[bool, ...]:
    """Which arrays of aux get a gradient, from their positions.

    Raises
    ------
    TypeError, ValueError
        If aux_grad is no tuple of positions in aux, or names an array of integers or bools.
    """
    if not isinstance(aux_grad, (tuple, list)) or not all(type(n) is int for n in aux_grad):
        raise TypeError(f"aux_grad is {aux_grad!r}; it takes a tuple of positions in aux, (0,) for its first array")
    for n in aux_grad:
        if not 0 <= n < len(aux):
            raise ValueError(f"aux_grad names position {n}; aux has {len(aux)} arrays, counted from 0")
        if aux[n].dtype.kind in "iub":
            raise TypeError(
                f"{name} names position {n}, an array of {aux[n].dtype}; only arrays of floats have a gradient"
            )
    return tuple(n in aux_grad for n in range(len(aux)))


def check_cotangents(problem: Problem, dout: Any, dlse: Any) -> tuple[Array, Array | None]:
    """`dout` (B, Hq, Sq, Dv) and, if there is one, `dlse` (B, Hq, Sq): views of the caller's arrays.

    Raises
    ------
    TypeError
        If one is no NumPy array of floats, or dout's dtype is not q's.
    ValueError
        If one has another shape than out or lse.
    """
    view = plain(dout, "dout")
    accumulation(view.dtype, "dout")
    if view.dtype != problem.dtype:
        raise TypeError(
            f"dout has dtype {view.dtype}; it takes q's, {problem.dtype}: convert it, for example dout.astype(q.dtype)"
        )
    if view.shape != output_shape(problem):
        raise ValueError(
            f"dout has shape {view.shape}; it takes {output_shape(problem)}, out's in layout='{problem.layout}'"
        )
    view = bhsd_view(view, problem.layout)
    if dlse is None:
        return view, None
    row = plain(dlse, "dlse")
    accumulation(row.dtype, "dlse")
    if row.shape != lse_shape(problem):
        raise ValueError(
            f"dlse has shape {row.shape}; it takes {lse_shape(problem)}, lse's in layout='{problem.layout}'"
        )
    return view, bhsd_view(row, problem.layout)


def check_results(problem: Problem, out: Any, lse: Any) -> tuple[Array, Array]:
    """`out` (B, Hq, Sq, Dv) and `lse` (B, Hq, Sq) of a forward call: views of the caller's arrays.

    Raises
    ------
    TypeError, ValueError
        If one does not have the shape and dtype that `attention(..., return_lse=True)` gives.
    """
    views = []
    for x, name, shape, dtype in (
        (out, "out", output_shape(problem), problem.dtype),
        (lse, "lse", lse_shape(problem), np.dtype(problem.acc)),
    ):
        array = plain(x, name)
        if array.dtype != dtype:
            raise TypeError(f"{name} has dtype {array.dtype}; it takes {dtype}, as attention(return_lse=True) gave it")
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; it takes {shape}, as attention(return_lse=True) gave it")
        views.append(bhsd_view(array, problem.layout))
    return views[0], views[1]


def sink_gradient(problem: Problem, lse: Array, deltas: Array) -> Array:
    """(Hq,) in float64: minus the sum over batch and queries of exp(sink - lse) (rowsum(dout out) - dlse).

    lse and deltas are (B, Hq, Sq). Where lse is -inf there is no sink: a query in no sequence, or a sink of -inf.
    """
    assert problem.sinks is not None
    log_sum, sinks = lse.astype(np.float64), problem.sinks[:, None].astype(np.float64)
    with np.errstate(invalid="ignore"):  # where lse is -inf
        terms = np.where(log_sum == -np.inf, 0.0, np.exp(sinks - log_sum) * deltas)
    return np.asarray(-terms.sum(axis=(0, 2)))


def check_tangent(x: Any, of: Any, name: str) -> Array | None:
    """The direction `x` of the argument `of`, as a base-class view, or None.

    Raises
    ------
    TypeError, ValueError
        If it is no array of floats, has another shape, or belongs to an argument that is not given.
    """
    if x is None:
        return None
    if of is None:
        raise ValueError(f"{name}_dot is given, but {name} is not")
    array = plain(x, f"{name}_dot")
    accumulation(array.dtype, f"{name}_dot")
    if array.shape != np.shape(of):
        raise ValueError(f"{name}_dot has shape {array.shape}; it takes {name}'s, {np.shape(of)}")
    return array


def check_aux_tangents(aux_dot: Any, aux: tuple[Array, ...]) -> tuple[Array | None, ...]:
    """An array or None for each array of aux: see `check_tangent`."""
    if aux_dot is None:
        return (None,) * len(aux)
    if not isinstance(aux_dot, (tuple, list)) or len(aux_dot) != len(aux):
        raise ValueError(f"aux_dot takes a tuple with an array or None for each of the {len(aux)} arrays of aux")
    check_aux_grad([n for n, x in enumerate(aux_dot) if x is not None], aux, "aux_dot")
    return tuple(check_tangent(x, a, f"aux[{n}]") for n, (x, a) in enumerate(zip(aux_dot, aux, strict=True)))


def in_dtypes(daux: tuple[Array | None, ...], aux: Any) -> tuple[Array | None, ...]:
    """Each gradient in the dtype of its array."""
    return tuple(None if d is None else d.astype(a.dtype, copy=False) for d, a in zip(daux, aux, strict=True))
