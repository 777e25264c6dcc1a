"""The public calls: arguments -> plan -> kernel -> result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Literal, Unpack, overload

from . import dispatch, plan
from .arrays import Array
from .gradients import (
    Backward,
    Gradients,
    Tangents,
    check_aux_grad,
    check_aux_tangents,
    check_cotangents,
    check_results,
    check_tangent,
)
from .options import (
    ArrayT,
    CallOptions,
    ForwardOptions,
    HostOptions,
    check_names,
    documented,
)


@overload
def attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_lse: Literal[False] = False, **options: Unpack[ForwardOptions]
) -> ArrayT: ...
@overload
def attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_lse: Literal[True], **options: Unpack[ForwardOptions]
) -> tuple[ArrayT, ArrayT]: ...
@overload
def attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_lse: bool, **options: Unpack[ForwardOptions]
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@documented(ForwardOptions)
def attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_lse: bool = False, **options: Unpack[ForwardOptions]
) -> ArrayT | tuple[ArrayT, ArrayT]:
    """Scaled dot-product attention, softmax(scale q k' + ...) v, in O(S) memory.

    Parameters
    ----------
    q, k, v : ndarray
        (B, Hq, Sq, Dk), (B, Hkv, Sk, Dk), (B, Hkv, Sk, Dv) in layout "bhsd"; one dtype: float64, float32, float16 or
        ml_dtypes.bfloat16. Any strides, read-only and memory-mapped arrays are read in place. Hq is a multiple of Hkv
        (grouped-query attention): query head h reads key head h // (Hq // Hkv). Computed in float64 for float64, else
        accumulated in float32.
    return_lse : bool
        Also return lse, the log of the softmax denominator (sinks included), q's shape without the last axis; float64
        for float64, else float32.
    {options}

    Returns
    -------
    out : ndarray
        (B, Hq, Sq, Dv) in q's dtype and layout; or (out, lse). A row that sees no key is 0 with lse -inf (or its sink).

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is accepted. The caller's arrays are unchanged.
    RuntimeError
        For a call on a GPU where a package, the driver or a device is missing; the message names it.

    Notes
    -----
    The arrays may also lie on a GPU: arrays of torch, CuPy, JAX, Numba or any library with DLPack or
    __cuda_array_interface__. Then all of them must lie on one device, while the settings in a Mask and align stay in
    host memory. The result is an array of q's library. The call does not wait for the work on the stream and copies
    nothing to the host.

    The order is scale, softcap, bias and ALiBi, score_mod, mask. No number of a hidden pair is read into the result: a
    NaN there changes no bit. A row's bits do not depend on threads, batch, strides or other rows. On a GPU a sequence
    with few queries (Sq * Hq / Hkv <= 16) has a kernel of its own, whose last bits differ. Online softmax: Milakov and
    Gimelshein 2018; tiles: Dao et al. 2022.

    Examples
    --------
    >>> import numpy as np, numba_attn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 8, 128, 64), dtype=np.float32) for _ in range(3))
    >>> na.attention(q, k, v, causal=True).shape
    (2, 8, 128, 64)
    """
    if options:
        check_names(options, attention)
    return_lse = dispatch.check_bool(return_lse, "return_lse")
    if dispatch.on_gpu(q, k, v, options):
        from .cuda.host import on_device

        out, lse = on_device.attention(q, k, v, options, return_lse)
    else:
        bound = dispatch.bind(q, k, v, options, stacklevel=3)
        out, lse = dispatch.forward(bound, q, k, v, return_lse, options)
    return (out, lse) if return_lse else out


@overload
def attention_vjp(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    aux_grad: tuple[int, ...] = (),
    return_lse: Literal[False] = False,
    **options: Unpack[ForwardOptions],
) -> tuple[ArrayT, Pullback[ArrayT]]: ...
@overload
def attention_vjp(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    aux_grad: tuple[int, ...] = (),
    return_lse: Literal[True],
    **options: Unpack[ForwardOptions],
) -> tuple[tuple[ArrayT, ArrayT], Pullback[ArrayT]]: ...
@overload
def attention_vjp(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    aux_grad: tuple[int, ...] = (),
    return_lse: bool,
    **options: Unpack[ForwardOptions],
) -> tuple[ArrayT | tuple[ArrayT, ArrayT], Pullback[ArrayT]]: ...
@documented(ForwardOptions)
def attention_vjp(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    aux_grad: tuple[int, ...] = (),
    return_lse: bool = False,
    **options: Unpack[ForwardOptions],
) -> tuple[ArrayT | tuple[ArrayT, ArrayT], Pullback[ArrayT]]:
    """Attention and its pullback: the gradients of whatever is computed from out, in O(S) memory.

    Parameters
    ----------
    q, k, v : ndarray
        As in `attention`.
    aux_grad : tuple of int
        Positions in aux of the arrays that get a gradient, (0,) for the first; arrays of floats only. On a GPU the
        pullback then waits for the kernels, since they report whether score_mod reads an array that has no gradient.
    return_lse : bool
        Also return lse.
    {options}

    Returns
    -------
    out : ndarray, or (out, lse)
        As `attention` returns them.
    pullback : Pullback
        pullback(dout, dlse=None, stream=None) -> Gradients. dout has out's shape and dtype, dlse lse's shape. It may be
        called several times. It keeps copies of out and lse, and references to the arguments, which must not change
        before it is called.

    Notes
    -----
    precision holds for both passes. stream is that of the forward pass; the pullback takes its own.

    Gradients(dq, dk, dv, dbias, dsinks, dalibi_slopes, daux) have their argument's shape and dtype; None for what was
    not given. score_mod is differentiated by dual numbers, or by its own gradient: see `score_mod`. No number of a
    hidden pair is read, and the same call gives the same bits for any number of threads. The formulas are derived in
    `reference.attention_backward`; tiles recompute the weights from lse (Dao et al. 2022).

    Examples
    --------
    >>> import numpy as np, numba_attn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, target = (rng.standard_normal((1, 2, 16, 8)) for _ in range(4))
    >>> out, pullback = na.attention_vjp(q, k, v, causal=True)
    >>> grads = pullback(out - target)  # of 0.5 * ((out - target) ** 2).sum()
    >>> grads.dq.shape
    (1, 2, 16, 8)
    """
    check_names(options, attention_vjp)
    return_lse = dispatch.check_bool(return_lse, "return_lse")
    out: Any
    kept: tuple[Any, Any]
    problem: plan.Problem | None = None
    if dispatch.on_gpu(q, k, v, options):
        from .cuda.host import on_device

        out, lse, kept = on_device.attention_vjp(q, k, v, options, aux_grad, return_lse)
    else:
        bound = dispatch.bind(q, k, v, options, stacklevel=3)
        problem = bound.plan.problem(q, k, v, options)
        check_aux_grad(aux_grad, problem.aux)
        out, lse = dispatch.forward(bound, q, k, v, True, options, problem)
        kept = plan.bhsd_view(out.copy(), problem.layout), plan.bhsd_view(lse.copy(), problem.layout)
    pullback = Pullback((q, k, v), options, tuple(aux_grad), problem, kept)
    return ((out, lse) if return_lse else out), pullback


@documented(CallOptions)
def attention_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: ArrayT,
    *,
    dlse: ArrayT | None = None,
    aux_grad: tuple[int, ...] = (),
    **options: Unpack[CallOptions],
) -> Gradients[ArrayT]:
    """The gradients of `attention`, from its results: `attention_vjp` without a closure.

    The options are those that `attention` was called with; the stream may be another.

    Parameters
    ----------
    dout : ndarray
        The gradient with respect to out: its shape and dtype.
    q, k, v : ndarray
        As `attention` was called with.
    out, lse : ndarray
        What `attention` returned with return_lse=True.
    dlse : ndarray
        The gradient with respect to lse, of its shape; 0 if left out.
    aux_grad : tuple of int
        Positions in aux of the arrays that get a gradient.
    {options}

    Returns
    -------
    Gradients
        See `attention_vjp`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what is accepted.

    Examples
    --------
    >>> import numpy as np, numba_attn as na
    >>> q, k, v, dout = (np.random.default_rng(n).standard_normal((1, 2, 16, 8)) for n in range(4))
    >>> out, lse = na.attention(q, k, v, return_lse=True)
    >>> na.attention_backward(dout, q, k, v, out, lse).dv.shape
    (1, 2, 16, 8)
    """
    check_names(options, attention_backward)
    if dispatch.on_gpu(q, k, v, options):
        from .cuda.host import on_device

        return on_device.attention_backward(dout, (q, k, v), (out, lse), dlse, options, aux_grad)
    bound = dispatch.bind(q, k, v, options, stacklevel=3)
    problem = bound.plan.problem(q, k, v, options)
    asked = check_aux_grad(aux_grad, problem.aux)
    given = Backward(*check_results(problem, out, lse), *check_cotangents(problem, dout, dlse), asked)
    return dispatch.backward(problem, (q, k, v), options, given, bound.on)


@overload
def attention_jvp(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    q_dot: ArrayT | None,
    k_dot: ArrayT | None,
    v_dot: ArrayT | None,
    *,
    bias_dot: ArrayT | None = None,
    sinks_dot: ArrayT | None = None,
    alibi_slopes_dot: ArrayT | None = None,
    aux_dot: tuple[ArrayT | None, ...] | None = None,
    return_lse: Literal[False] = False,
    **options: Unpack[HostOptions],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def attention_jvp(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    q_dot: ArrayT | None,
    k_dot: ArrayT | None,
    v_dot: ArrayT | None,
    *,
    bias_dot: ArrayT | None = None,
    sinks_dot: ArrayT | None = None,
    alibi_slopes_dot: ArrayT | None = None,
    aux_dot: tuple[ArrayT | None, ...] | None = None,
    return_lse: Literal[True],
    **options: Unpack[HostOptions],
) -> tuple[tuple[ArrayT, ArrayT], tuple[ArrayT, ArrayT]]: ...
@documented(HostOptions)
def attention_jvp(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    q_dot: ArrayT | None,
    k_dot: ArrayT | None,
    v_dot: ArrayT | None,
    *,
    bias_dot: ArrayT | None = None,
    sinks_dot: ArrayT | None = None,
    alibi_slopes_dot: ArrayT | None = None,
    aux_dot: tuple[ArrayT | None, ...] | None = None,
    return_lse: bool = False,
    **options: Unpack[HostOptions],
) -> tuple[ArrayT | tuple[ArrayT, ArrayT], ArrayT | tuple[ArrayT, ArrayT]]:
    """Attention and its derivative along a direction (forward mode, a Jacobian-vector product), in one pass.

    Parameters
    ----------
    q, k, v : ndarray
        As in `attention`.
    q_dot, k_dot, v_dot, bias_dot, sinks_dot, alibi_slopes_dot : float ndarray or None
        The direction, each in its argument's shape; q_dot, k_dot and v_dot in q's dtype. None is 0, and costs nothing.
    aux_dot : tuple
        An array or None for each array of aux.
    return_lse : bool
        Also return lse and its derivative.
    {options}

    Returns
    -------
    out, out_dot : ndarray
        In out's shape, dtype and layout; with return_lse (out, lse), (out_dot, lse_dot).

    Raises
    ------
    TypeError, ValueError
        As `attention` does, and for a tangent that does not fit its argument.

    Notes
    -----
    No tangent of a hidden pair is read. A row that sees no key has out_dot 0; its lse_dot is that of its sink, or 0.
    Where score_mod has a gradient of its own and reads not exactly one element of an array with a tangent, out_dot is
    NaN. The formulas stand at `reference.attention_jvp`.

    Examples
    --------
    >>> import numpy as np, numba_attn as na
    >>> q, k, v, direction = (np.random.default_rng(n).standard_normal((1, 2, 16, 8)) for n in range(4))
    >>> out, out_dot = na.attention_jvp(q, k, v, direction, None, None)
    >>> further = na.attention(q + 1e-6 * direction, k, v)
    >>> bool(np.allclose((further - out) / 1e-6, out_dot, atol=1e-5))
    True
    """
    check_names(options, attention_jvp)
    if dispatch.check_backend(options) == "cuda":
        raise ValueError("backend is 'cuda', but attention_jvp runs on the CPU only; it takes 'auto' or 'cpu'")
    return_lse = dispatch.check_bool(return_lse, "return_lse")
    problem = dispatch.bind(q, k, v, options, stacklevel=3).plan.problem(q, k, v, options)
    views: list[Array | None] = []
    for x, of, name in ((q_dot, q, "q"), (k_dot, k, "k"), (v_dot, v, "v")):
        tangent = check_tangent(x, of, name)
        if tangent is not None and tangent.dtype != problem.dtype:
            raise TypeError(f"{name}_dot has dtype {tangent.dtype}; it takes {name}'s, {problem.dtype}")
        views.append(None if tangent is None else plan.bhsd_view(tangent, problem.layout))
    dots = Tangents(
        views[0],
        views[1],
        views[2],
        check_tangent(bias_dot, options.get("bias"), "bias"),
        check_tangent(sinks_dot, options.get("sinks"), "sinks"),
        check_tangent(alibi_slopes_dot, options.get("alibi_slopes"), "alibi_slopes"),
        check_aux_tangents(aux_dot, problem.aux),
    )
    results: Any = dispatch.jvp(problem, (q, k, v), options, dots)
    out, lse, out_dot, lse_dot = results
    return ((out, lse), (out_dot, lse_dot)) if return_lse else (out, out_dot)


class Pullback(Generic[ArrayT]):
    """From the gradient with respect to out (and lse) to those of the arguments: see `attention_vjp`."""

    def __init__(
        self,
        inputs: tuple[ArrayT, ArrayT, ArrayT],
        options: Mapping[str, Any],
        aux_grad: tuple[int, ...],
        problem: plan.Problem | None,  # None: the arrays are on a GPU
        results: tuple[Any, Any],  # out and lse: (B, H, S, ...) views, on a GPU the arrays
    ) -> None:
        self._inputs, self._options, self._aux_grad = inputs, dict(options), aux_grad
        self._problem, self._results = problem, results
        if options:  # the forward call has warned of deprecated options
            self._options |= {"precision": "tf32"} if self._options.pop("tf32", None) else {}

    def __call__(self, dout: ArrayT, dlse: ArrayT | None = None, *, stream: object = None) -> Gradients[ArrayT]:
        """The gradients of sum(dout * out) + sum(dlse * lse).

        stream: for a GPU, as in `attention`; it need not be the stream of the forward call.
        """
        problem, inputs, (out, lse) = self._problem, self._inputs, self._results
        options = self._options | {"stream": stream} if self._options or stream is not None else self._options
        if problem is None:
            from .cuda.host import on_device

            return on_device.attention_backward(dout, inputs, (out, lse), dlse, options, self._aux_grad)
        on = dispatch.host_backend(options, stacklevel=3)
        asked = check_aux_grad(self._aux_grad, problem.aux)
        given = Backward(out, lse, *check_cotangents(problem, dout, dlse), asked)
        return dispatch.backward(problem, inputs, options, given, on)
