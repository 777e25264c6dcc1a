"""From the arguments of a public call to a backend: the CPU's kernels, a GPU, or the dense reference where Numba's
compiler is switched off.

A call is bound once: checked, planned and prepared. What it was bound to is kept under its shapes, dtypes and settings,
so that the next call alike only fills in addresses. Calls that bring more arrays, a Mask or a function are bound anew,
by the same path.

The kernels are imported with the first call, not with the package: checking arguments and the reference need no Numba.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import plan
from .arrays import Array, advice, exact
from .gradients import Backward, Gradients, Tangents, in_dtypes, sink_gradient
from .mask.shape import Shape, over_pairs
from .options import NAMES, precision_of

if TYPE_CHECKING:
    from .cpu.launch.forward import Launch

_LAUNCHES: dict[Any, Launch] = {}
_MOST_LAUNCHES = 1024

_NO_OPTIONS: Mapping[str, Any] = {}


def forward(
    q: Any, k: Any, v: Any, want_lse: Any, options: Mapping[str, Any], problem: plan.Problem | None = None
) -> tuple[Any, Any]:
    """out, and lse or None; the arrays are in host memory.

    options: the keywords of `attention` that were given, of any name that it takes.
    problem: the same call, where it was checked already.
    """
    key = _key(q, k, v, want_lse, options)
    try:
        launch = None if key is None else _LAUNCHES.get(key)
    except TypeError:  # an unhashable layout, whose error comes below
        launch = key = None
    if launch is None:
        return _bind(q, k, v, want_lse, options, problem, key)
    result = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    lse = np.empty(q.shape[:-1], np.float64 if launch.elem == "f64" else np.float32) if want_lse else None
    layout = options.get("layout", "bhsd") if options else "bhsd"
    if layout == "bhsd":
        _run(launch, q, k, v, result, lse)
    else:
        views = (plan.bhsd_view(x, layout) for x in (q, k, v, result))
        _run(launch, *views, None if lse is None else plan.bhsd_view(lse, layout))
    return result, lse


def _key(q: Any, k: Any, v: Any, want_lse: Any, options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What two calls have in common that differ in the numbers of q, k and v alone. None for one whose options hold
    more than plain settings, and for one that warns."""
    if not type(q) is type(k) is type(v) is np.ndarray or "tf32" in options:
        return None
    arrays = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype)
    if not options and (want_lse is True or want_lse is False):
        return (*arrays, want_lse)
    return exact(arrays, (want_lse, *chain.from_iterable(options.items())))


def _bind(
    q: Any,
    k: Any,
    v: Any,
    want_lse: Any,
    options: Mapping[str, Any],
    problem: plan.Problem | None,
    key: tuple[Any, ...] | None,
) -> tuple[Any, Any]:
    """The call in full; its launch is kept under `key`, if there is one."""
    want_lse = check_bool(want_lse, "return_lse")
    on = host_backend(options, stacklevel=5)
    given = semantic(options)
    if problem is None:
        problem = plan.resolve(q, k, v, **given)
    out, layout = options.get("out"), problem.layout
    if out is None:
        out = np.empty(plan.output_shape(problem), problem.dtype)
        view = plan.bhsd_view(out, layout)
    else:
        view = plan.check_out(problem, out)
    lse: Array | None = np.empty(plan.lse_shape(problem), problem.acc) if want_lse else None
    lse_view = None if lse is None else plan.bhsd_view(lse, layout)
    if on.backend == "cuda":
        from .cuda.host import from_numpy

        from_numpy.attention(problem, view, lse_view, on.stream, on.tf32)
    elif jit_is_off():
        from . import dense

        dense.forward(out, lse, q, k, v, given)
    else:
        from .cpu.launch.forward import prepare, run

        global _run
        _run = run
        launch = prepare(problem, want_lse)
        if key is not None:
            if len(_LAUNCHES) >= _MOST_LAUNCHES:
                _LAUNCHES.clear()
            _LAUNCHES[key] = launch
        run(launch, problem.q, problem.k, problem.v, view, lse_view)
    return out, lse


def _run(*args: Any) -> None:
    raise AssertionError("no launch exists before a call was bound")


def backward(
    problem: plan.Problem,
    inputs: tuple[Any, Any, Any],
    options: Mapping[str, Any],
    given: Backward,
    on: HostBackend,
) -> Gradients[Any]:
    """The gradients in the caller's layout, shapes and dtypes."""
    if on.backend != "cuda" and jit_is_off():
        from . import dense

        return dense.backward(problem, inputs, semantic(options), given)

    bias, slopes, sinks = (options.get(name) for name in ("bias", "alibi_slopes", "sinks"))
    dq, dk, dv = (np.empty(x.shape, problem.dtype) for x in inputs)
    views = (plan.bhsd_view(x, problem.layout) for x in (dq, dk, dv))
    bias_shape = None if bias is None else (1,) * (4 - bias.ndim) + bias.shape
    slopes_shape = None if slopes is None else (1,) * (2 - slopes.ndim) + slopes.shape
    dlse = given.dlse
    if dlse is not None and dlse.dtype != problem.acc:
        dlse = dlse.astype(problem.acc)
    arguments: tuple[Any, ...] = (
        problem,
        given.out,
        given.lse,
        given.dout,
        dlse,
        *views,
        bias_shape,
        slopes_shape,
        given.asked,
    )
    if on.backend == "cuda":
        from .cuda.host import from_numpy

        dbias, dslopes, daux, dsinks = from_numpy.attention_backward(*arguments, on.stream, on.tf32)
    else:
        from .cpu.launch.backward import backward as on_cpu

        dbias, dslopes, daux, deltas = on_cpu(*arguments)
        dsinks = None if sinks is None else sink_gradient(problem, given.lse, deltas)
    with np.errstate(over="ignore"):  # a float16 gradient may be infinite, as those that the kernels write
        return Gradients(
            dq,
            dk,
            dv,
            None if bias is None else dbias.reshape(bias.shape).astype(bias.dtype, copy=False),
            None if sinks is None else dsinks.reshape(-1).astype(sinks.dtype, copy=False),
            None if slopes is None else dslopes.reshape(slopes.shape).astype(slopes.dtype, copy=False),
            in_dtypes(daux, options["aux"]) if problem.score_mod is not None and problem.aux else None,
        )


def jvp(problem: plan.Problem, inputs: Any, options: Mapping[str, Any], dots: Tangents) -> tuple[Array, ...]:
    """out, lse, out_dot and lse_dot in the caller's layout."""
    shape, rows = plan.output_shape(problem), plan.lse_shape(problem)
    acc: np.dtype[Any] = np.dtype(problem.acc)
    results = (
        np.empty(shape, problem.dtype),
        np.empty(rows, acc),
        np.empty(shape, problem.dtype),
        np.empty(rows, acc),
    )
    if jit_is_off():
        from . import dense

        dense.jvp(results, problem, inputs, semantic(options), dots)
        return results
    from .cpu.launch.jvp import jvp as on_cpu

    bias_dot = dots.bias
    if bias_dot is not None:
        missing = 4 - len(problem.layout)
        pairs = Shape(problem.batch, problem.q_heads, problem.q_len, problem.kv_len, missing)
        bias_dot = over_pairs(bias_dot, "bias_dot", pairs)
    on_cpu(
        problem,
        (dots.q, dots.k, dots.v),
        bias_dot,
        None if dots.sinks is None else np.ascontiguousarray(dots.sinks, problem.acc),
        None if dots.slopes is None else np.ascontiguousarray(np.atleast_2d(dots.slopes), problem.acc),
        tuple(None if a is None else a.astype(problem.acc) for a in dots.aux),
        *(plan.bhsd_view(x, problem.layout) for x in results),
    )
    return results


# --- which backend ----------------------------------------------------------------------------------------------------


class HostBackend(NamedTuple):
    """Where a call of arrays in host memory is computed."""

    backend: str
    stream: Any
    tf32: bool


def host_backend(options: Mapping[str, Any], stacklevel: int) -> HostBackend:
    """The backend of a call of arrays in host memory. stacklevel: how far up the user's line is, for a warning.

    Raises
    ------
    TypeError, ValueError
        For a backend, stream or precision that is not known, or that only a GPU has.
    """
    if not options:
        return HostBackend("auto", None, False)
    backend, stream = check_backend(options), options.get("stream")
    precision = precision_of(options, stacklevel + 1)
    if backend != "cuda":
        for name, given in (("stream", stream is not None), ("precision", precision != "ieee")):
            if given:
                said = "stream is given" if name == "stream" else f"precision is {precision!r}"
                raise ValueError(
                    f"{said}, but the arrays are in host memory and the CPU computes; it takes arrays on a GPU, or "
                    "backend='cuda', beside it"
                )
    return HostBackend(backend, stream, precision == "tf32")


def check_backend(options: Mapping[str, Any]) -> str:
    """The backend that the options name."""
    backend = options.get("backend", "auto")
    if backend not in ("auto", "cpu", "cuda"):
        raise ValueError(f"backend is {backend!r}; it takes 'auto', 'cpu' or 'cuda'")
    return str(backend)


def check_bool(x: Any, name: str) -> bool:
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name} is {x!r}; it takes a bool")
    return bool(x)


def semantic(options: Mapping[str, Any]) -> Any:
    """Those of a call's options that say what attention is: the keywords of `plan.resolve`."""
    return {name: x for name, x in options.items() if name in NAMES} if options else _NO_OPTIONS


def on_gpu(q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> bool:
    """Whether the call is one with arrays in the memory of a GPU."""
    if type(q) is type(k) is type(v) is np.ndarray:
        return False
    backend = check_backend(options)
    given = {"q": q, "k": k, "v": v}
    for name, x in given.items():
        kind = type(x)
        if isinstance(x, np.ndarray) or not (
            hasattr(kind, "__dlpack_device__") or hasattr(kind, "__cuda_array_interface__")
        ):
            continue
        from .cuda.host.arrays import is_device_array

        if is_device_array(x):
            if backend == "cpu":
                raise TypeError(
                    f"backend is 'cpu', and {name} is {advice(x, name)}; 'auto' computes where the arrays are"
                )
            return True
    return False


def jit_is_off() -> bool:
    """NUMBA_DISABLE_JIT=1: vector kernels cannot run as Python."""
    from numba import config

    return bool(config.DISABLE_JIT)
