"""The dense reference in place of the kernels, for NUMBA_DISABLE_JIT=1. It is slow and needs O(Sq Sk) memory, and a
warning says so."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from . import plan, reference
from .arrays import Array
from .gradients import Backward, Gradients, Tangents, in_dtypes


def _warn(what: str) -> None:
    warnings.warn(
        f"numba_attn: NUMBA_DISABLE_JIT is set, so {what} the dense NumPy reference: slow, O(Sq Sk) memory",
        RuntimeWarning,
        stacklevel=5,
    )


def forward(out: Array, lse: Array | None, q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> None:
    """Writes out, and lse if there is one."""
    _warn("attention() runs")
    out[...], dense_lse = reference.attention(q, k, v, **options, return_lse=True)
    if lse is not None:
        lse[...] = dense_lse


def backward(
    problem: plan.Problem, inputs: tuple[Any, Any, Any], options: Mapping[str, Any], given: Backward
) -> Gradients[Array]:
    """The gradients in the caller's layout, shapes and dtypes."""
    _warn("gradients come from")
    dlse = None if given.dlse is None else plan.in_layout(given.dlse, problem.layout)
    found = reference.attention_backward(
        plan.in_layout(given.dout, problem.layout),
        *inputs,
        dlse=dlse,
        aux_grad=tuple(n for n, wanted in enumerate(given.asked) if wanted),
        **options,
    )
    arguments = (*inputs, options.get("bias"), options.get("sinks"), options.get("alibi_slopes"))
    dq, dk, dv, dbias, dsinks, dslopes = (
        None if g is None else g.astype(x.dtype) for g, x in zip(found[:6], arguments, strict=True)
    )
    assert dq is not None and dk is not None and dv is not None
    daux = None if found.daux is None else in_dtypes(found.daux, options["aux"])
    return Gradients(dq, dk, dv, dbias, dsinks, dslopes, daux)


def jvp(
    results: tuple[Array, ...], problem: plan.Problem, inputs: Any, options: Mapping[str, Any], dots: Tangents
) -> None:
    """Writes out, lse, out_dot and lse_dot."""
    _warn("attention_jvp() runs")
    out, lse, out_dot, lse_dot = results
    tangents = (None if x is None else plan.in_layout(x, problem.layout) for x in (dots.q, dots.k, dots.v))
    (out[...], lse[...]), (out_dot[...], lse_dot[...]) = reference.attention_jvp(
        *inputs,
        *tangents,
        **options,
        bias_dot=dots.bias,
        sinks_dot=dots.sinks,
        alibi_slopes_dot=dots.slopes,
        aux_dot=dots.aux or None,
        return_lse=True,
    )
