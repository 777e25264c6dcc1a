"""Hands a public call to a backend: the CPU's kernels, a GPU, or the dense reference if NUMBA_DISABLE_JIT=1.

`bind` checks the kinds of a call once, and keeps the result for all calls of the same kinds. Each call then fills in
its own addresses and numbers, which are checked at every call. This is so for all options.

The kernels are imported by the first call, not with the package: the checks and the reference need no Numba.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import plan
from .arrays import Array, advice, plain
from .gradients import Backward, Gradients, Tangents, Wanted, in_dtypes, sink_gradient
from .mask.shape import Shape, over_pairs
from .options import NAMES, precision_of

if TYPE_CHECKING:
    from .cpu.launch.forward import Launch
    from .cpu.launch.record import Record

_BOUND: dict[Any, Bound] = {}
_MOST_BOUND = 1024

_NO_OPTIONS: Mapping[str, Any] = {}


@dataclass(slots=True)
class Bound:
    """Everything that the kinds of a call decide. The call adds addresses and numbers."""

    plan: plan.Plan
    on: HostBackend
    # For the forward kernel. The launch is kept if the kinds decide the sequences. The record is kept, too, if each
    # call only adds q, k, v, out and lse. None before the first call. One tuple, so that a thread sees both or neither.
    forward: tuple[Launch | None, Record | None] = (None, None)


def bind(q: Any, k: Any, v: Any, options: Mapping[str, Any], stacklevel: int) -> Bound:
    """Check the kinds of a call with arrays in host memory, or find a call of the same kinds that was checked before.

    options: the keywords of the call; any public function's.
    stacklevel: of a warning, so that it names the user's line.

    Raises
    ------
    TypeError, ValueError
        For everything that `plan.kinds` decides.
    """
    if not type(q) is type(k) is type(v) is np.ndarray:
        q, k, v = plain(q, "q"), plain(k, "k"), plain(v, "v")
    key = plan.kinds(q, k, v, options)
    bound = None if key is None else _BOUND.get(key)
    if bound is None:
        bound = Bound(plan.bind(q, k, v, semantic(options)), host_backend(options, stacklevel + 1))
        if key is not None and "tf32" not in options:  # the deprecated name warns at every call
            if len(_BOUND) >= _MOST_BOUND:
                _BOUND.clear()
            _BOUND[key] = bound
    return bound


def forward(
    bound: Bound,
    q: Any,
    k: Any,
    v: Any,
    want_lse: bool,
    options: Mapping[str, Any],
    problem: plan.Problem | None = None,
) -> tuple[Any, Any]:
    """out, and lse or None.

    problem: the checked call, if the caller has it already.
    """
    kept, (launch, record) = bound.plan, bound.forward
    out, layout = options.get("out") if options else None, kept.layout
    if problem is None and (record is None or out is not None):
        problem = kept.problem(q, k, v, options)
    if out is None:
        result = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        view = result if layout == "bhsd" else plan.bhsd_view(result, layout)
    else:
        assert problem is not None
        result, view = out, plan.check_out(problem, out)
    lse = np.empty(q.shape[:-1], kept.acc) if want_lse else None
    lse_view = lse if lse is None or layout == "bhsd" else plan.bhsd_view(lse, layout)
    if problem is not None:
        if bound.on.backend == "cuda":
            from .cuda.host import from_numpy

            from_numpy.attention(problem, view, lse_view, bound.on.stream, bound.on.tf32)
            return result, lse
        if jit_is_off():
            from . import dense

            dense.forward(result, lse, q, k, v, semantic(options))
            return result, lse
        q, k, v = problem.q, problem.k, problem.v
        if record is None:
            launch, record = _filled_in(bound, problem)
    elif layout != "bhsd":
        q, k, v = (plan.bhsd_view(x, layout) for x in (q, k, v))
    assert launch is not None and record is not None
    launch.run(record, q, k, v, view, lse_view)
    return result, lse


def _filled_in(bound: Bound, problem: plan.Problem) -> tuple[Launch, Record]:
    """The launch and the record of a problem's forward kernel. What the kinds decide of them is kept in `bound`."""
    launch = bound.forward[0] or _prepare(problem)
    record = launch.filled_in(problem)
    if bound.plan.decides_sequences and bound.forward[0] is None:
        bound.forward = launch, None if bound.plan.steps else record
    return launch, record


def _prepare(problem: plan.Problem) -> Launch:
    from .cpu.launch.forward import prepare

    return prepare(problem)


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
    dq_view, dk_view, dv_view = (plan.bhsd_view(x, problem.layout) for x in (dq, dk, dv))
    bias_shape = None if bias is None else (1,) * (4 - bias.ndim) + bias.shape
    slopes_shape = None if slopes is None else (1,) * (2 - slopes.ndim) + slopes.shape
    wanted = Wanted(dq_view, dk_view, dv_view, bias_shape, slopes_shape)
    if given.dlse is not None and given.dlse.dtype != problem.acc:
        given = given._replace(dlse=given.dlse.astype(problem.acc))
    if on.backend == "cuda":
        from .cuda.host import from_numpy

        dbias, dslopes, daux, dsinks = from_numpy.attention_backward(problem, given, wanted, on.stream, on.tf32)
    else:
        from .cpu.launch.backward import backward as on_cpu

        dbias, dslopes, daux, deltas = on_cpu(problem, given, wanted)
        dsinks = None if sinks is None else sink_gradient(problem, given.lse, deltas)
    with np.errstate(over="ignore"):  # a gradient in float16 may be infinite, whoever writes it
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
    from .cpu.launch.jvp import Results
    from .cpu.launch.jvp import jvp as on_cpu

    bias_dot = dots.bias
    if bias_dot is not None:
        missing = 4 - len(problem.layout)
        pairs = Shape(problem.batch, problem.q_heads, problem.q_len, problem.kv_len, missing)
        bias_dot = over_pairs(bias_dot, "bias_dot", pairs)
    dots = dots._replace(
        bias=bias_dot,
        sinks=None if dots.sinks is None else np.ascontiguousarray(dots.sinks, problem.acc),
        slopes=None if dots.slopes is None else np.ascontiguousarray(np.atleast_2d(dots.slopes), problem.acc),
        aux=tuple(None if a is None else a.astype(problem.acc) for a in dots.aux),
    )
    on_cpu(problem, dots, Results(*(plan.bhsd_view(x, problem.layout) for x in results)))
    return results


# --- which backend ----------------------------------------------------------------------------------------------------


class HostBackend(NamedTuple):
    """Where a call of arrays in host memory is computed."""

    backend: str
    stream: Any
    tf32: bool


def host_backend(options: Mapping[str, Any], stacklevel: int) -> HostBackend:
    """The backend of a call with arrays in host memory. stacklevel: of a warning, so that it names the user's line.

    Raises
    ------
    TypeError, ValueError
        For a backend, stream or precision that is unknown, or that only a GPU has.
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
    if x is True or x is False:
        return x
    if not isinstance(x, np.bool_):
        raise TypeError(f"{name} is {x!r}; it takes a bool")
    return bool(x)


def semantic(options: Mapping[str, Any]) -> Any:
    """The options that say what attention computes, without those that say where and how: see `plan.resolve`."""
    return {name: x for name, x in options.items() if name in NAMES} if options else _NO_OPTIONS


def on_gpu(q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> bool:
    """Whether the arrays of the call are in the memory of a GPU."""
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


@cache
def jit_is_off() -> bool:
    """Whether NUMBA_DISABLE_JIT=1 is set: vector kernels cannot run as Python. Numba reads it once, at its import."""
    from numba import config

    return bool(config.DISABLE_JIT)
