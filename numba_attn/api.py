"""The public calls: arguments -> plan -> kernel -> result."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from . import plan
from .arrays import Array, advice, exact
from .gradients import (
    Gradients,
    check_aux_grad,
    check_aux_tangents,
    check_cotangents,
    check_results,
    check_tangent,
    sink_gradient,
)
from .mask.shape import Shape, over_pairs

# Launches of plain calls (no mask, bias or function), by everything that decides them: a repeated shape costs a
# dictionary look-up.
_PLAIN: dict[Any, Any] = {}
_MOST_PLAIN = 1024


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: Any = None,
    align: Any = None,
    mask: Any = None,
    bias: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    aux: Any = (),
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    out: Any = None,
    return_lse: bool = False,
    backend: str = "auto",
    stream: Any = None,
    tf32: bool = False,
) -> Any:
    """Scaled dot-product attention, softmax(scale q k' + ...) v, in O(S) memory.

    Parameters
    ----------
    q, k, v : ndarray
        (B, Hq, Sq, Dk), (B, Hkv, Sk, Dk), (B, Hkv, Sk, Dv) in layout "bhsd"; one dtype: float64, float32, float16 or
        ml_dtypes.bfloat16. Any strides, read-only and memory-mapped arrays are read in place. Hq is a multiple of Hkv
        (grouped-query attention): query head h reads key head h // (Hq // Hkv). Computed in float64 for float64, else
        accumulated in float32.
    causal : bool
        Key j is visible to query i iff j <= i + offset (see align).
    window : (left, right) or None
        Visible iff i + offset - left <= j <= i + offset + right, inclusive; None on a side leaves it open.
        Hugging Face's sliding_window=w is (w - 1, 0).
    align : "bottom_right", "top_left", int or (B,) ints
        offset, the position of query 0 among the keys: Sk - Sq (a KV cache), 0, or the number itself. It may be left
        out only where both names agree, Sq == Sk.
    mask : bool ndarray or Mask
        True = attend, of shape (B, Hq, Sq, Sk) or broadcastable to it, never materialised; or a `Mask`: causal, window,
        lengths, varlen, segments, prefix, intervals, mask_mod, combined with `&`. causal, window and mask intersect.
        Cost follows the visible pairs.
    bias : ndarray
        Added to the scaled score, shaped like mask, any of the float dtypes. -inf hides the pair.
    scale : float
        1 / sqrt(Dk) if left out; any finite number.
    softcap : float > 0
        Scores become softcap * tanh(score / softcap), before bias.
    alibi_slopes : (Hq,) or (B, Hq) float ndarray
        -slope * abs(i + offset - j) is added (Press et al. 2022).
    sinks : (Hq,) float ndarray
        One more logit a head that joins the softmax denominator without a value.
    score_mod : function
        fn(score, b, h, i, j, *aux) -> score, of scalars: a plain Python function, compiled once and run inside the
        kernel; it may hide a pair by returning -inf. Indices are array indices. math.exp, tanh, ... and
        numba_attn.where are vectorised.
    aux : tuple of ndarray
        Arrays that score_mod reads.
    dropout_p, seed : float in [0, 1), int
        Dropout of the weights, Philox4x32-10 on (seed, b, h, i, j): the same for every thread count and tile size.
    layout : "bhsd", "bshd", "hsd", "shd" or "sd"
        Order of the axes batch, heads, sequence, head size.
    out : ndarray
        Where to write the result: q's dtype, the result's shape, any strides. Returned itself.
    return_lse : bool
        Also return lse, the log of the softmax denominator (sinks included), q's shape without the last axis; float64
        for float64, else float32.
    backend : "auto", "cpu" or "cuda"
        "auto" computes where the arrays are; "cuda" copies NumPy arrays to the GPU and the results back.
    stream : None, int or stream
        For a GPU: the CUDA stream to compute on, a CUstream handle or an object of torch, CuPy, Numba or cuda.core;
        the current one of torch or CuPy for their arrays, else the default stream, if left out.
    tf32 : bool
        On a GPU, for float32: products by tensor cores, which round their operands to 10 bits of mantissa, float16's,
        and keep float32's range and sums. The forward pass of few queries (Sq * Hq / Hkv <= 16) is computed in float32
        all the same: reading the keys is what takes time.

    Returns
    -------
    out : ndarray
        (B, Hq, Sq, Dv) in q's dtype and layout; or (out, lse). A row that sees no key is 0 with lse -inf (or its sink).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what is accepted; the caller's arrays are as they were.
    RuntimeError
        Naming what a GPU was asked for and lacks: a package, the driver, a device.

    Notes
    -----
    Every array may be one on a GPU instead: of torch, CuPy, JAX, Numba or any library with DLPack or
    __cuda_array_interface__. Then all are, on one device; the settings in a Mask and align stay in host memory. The
    result is an array of q's library. The work is left on the stream: nothing waits for it, and nothing is copied to
    the host.

    The order is scale, softcap, bias and ALiBi, score_mod, mask. Nothing of a hidden pair is read into the result: a
    NaN behind a mask changes no bit. A row's bits do not depend on threads, batch, strides or other rows; on a GPU only
    on whether its sequence has few queries (Sq * Hq / Hkv <= 16), which have a kernel of their own. Online softmax:
    Milakov and Gimelshein 2018; tiles: Dao et al. 2022.

    Examples
    --------
    >>> import numpy as np, numba_attn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 8, 128, 64), dtype=np.float32) for _ in range(3))
    >>> na.attention(q, k, v, causal=True).shape
    (2, 8, 128, 64)
    """
    key: Any = None
    launch: Any = None
    if (
        mask is None
        and bias is None
        and score_mod is None
        and out is None
        and alibi_slopes is None
        and sinks is None
        and seed is None
        and stream is None
        and tf32 is False
        and type(aux) is tuple
        and not aux
        and type(dropout_p) is float
        and dropout_p == 0.0
        and type(q) is type(k) is type(v) is np.ndarray
        and backend != "cuda"
    ):
        if (
            scale is softcap is window is align is None
            and (causal is True or causal is False)
            and (return_lse is True or return_lse is False)
            and backend == "auto"
        ):
            key = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, layout, causal, return_lse)
        else:
            key = exact(
                (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, layout),
                (causal, scale, softcap, window, align, return_lse, backend),
            )
        try:
            launch = _PLAIN.get(key) if key is not None else None
        except TypeError:  # an unhashable layout: plan says what is wrong with it
            key = None
    if launch is not None:
        bhsd = layout == "bhsd"
        result = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        lse = np.empty(q.shape[:-1], np.float64 if launch.elem == "f64" else np.float32) if return_lse else None
        if bhsd:
            _run(launch, q, k, v, result, lse)
        else:
            _run(
                launch,
                *(plan.bhsd_view(x, layout) for x in (q, k, v, result)),
                None if lse is None else plan.bhsd_view(lse, layout),
            )
        return (result, lse) if return_lse else result

    _check_backend(backend)
    if not isinstance(return_lse, (bool, np.bool_)):
        raise TypeError(f"return_lse is {return_lse!r}; it takes a bool")
    options = _options(locals())
    if _on_gpu(q, k, v, backend):
        from .cuda.host import on_device

        _check_tf32(tf32, "cuda")
        result, lse = on_device.attention(q, k, v, options, out, bool(return_lse), stream, tf32)
        return (result, lse) if return_lse else result
    _check_stream(stream, backend)
    _check_tf32(tf32, backend)
    problem = plan.resolve(q, k, v, **options)
    if out is None:
        result = np.empty(plan.output_shape(problem), problem.dtype)
        view = plan.bhsd_view(result, layout)
    else:
        view, result = plan.check_out(problem, out), out
    lse = np.empty(plan.lse_shape(problem), problem.acc) if return_lse else None
    lse_view = None if lse is None else plan.bhsd_view(lse, layout)
    if backend == "cuda":
        from .cuda.host.from_numpy import attention as on_cuda

        on_cuda(problem, view, lse_view, stream, tf32)
    elif _jit_is_off():
        _dense(result, lse, q, k, v, options)
    else:
        launch = _prepare(problem, bool(return_lse))
        if key is not None:
            if len(_PLAIN) >= _MOST_PLAIN:
                _PLAIN.clear()
            _PLAIN[key] = launch
        _run(launch, problem.q, problem.k, problem.v, view, lse_view)
    return (result, lse) if return_lse else result


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: Any = None,
    align: Any = None,
    mask: Any = None,
    bias: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    aux: Any = (),
    aux_grad: tuple[int, ...] = (),
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    out: Any = None,
    return_lse: bool = False,
    backend: str = "auto",
    stream: Any = None,
    tf32: bool = False,
) -> tuple[Any, Pullback]:
    """Attention and its pullback: the gradients of whatever is computed from out, in O(S) memory.

    Parameters
    ----------
    q, k, v, causal, ..., backend
        As in `attention`.
    aux_grad : tuple of int
        Positions in aux of the arrays that get a gradient, (0,) for the first; arrays of floats only. On a GPU the
        pullback then waits for the kernels, which tell whether score_mod reads what has no gradient.
    stream : None, int or stream
        As in `attention`, for the forward pass; the pullback takes its own.
    tf32 : bool
        As in `attention`, for both passes.

    Returns
    -------
    out : ndarray, or (out, lse)
        As `attention` returns them.
    pullback : Pullback
        pullback(dout, dlse=None, stream=None) -> Gradients. dout has out's shape and dtype, dlse lse's shape. It may be
        called again and again; it keeps references to the arguments, which must not have changed by then, and copies of
        out and lse.

    Notes
    -----
    Gradients(dq, dk, dv, dbias, dsinks, dalibi_slopes, daux) have their argument's shape and dtype; None for what was
    not given. score_mod is differentiated by dual numbers, or by its own gradient: see `score_mod`. Of a hidden pair
    nothing is read, and the same call gives the same bits for any number of threads. The formulas are derived in
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
    options = _options(locals())
    _check_backend(backend)
    if not isinstance(return_lse, (bool, np.bool_)):
        raise TypeError(f"return_lse is {return_lse!r}; it takes a bool")
    if _on_gpu(q, k, v, backend):
        from .cuda.host import on_device

        _check_tf32(tf32, "cuda")
        result, lse, kept = on_device.attention_vjp(q, k, v, options, aux_grad, out, bool(return_lse), stream, tf32)
        pullback = Pullback(None, (q, k, v), options, kept, tuple(aux_grad), backend, tf32)
    else:
        problem = plan.resolve(q, k, v, **options)
        check_aux_grad(aux_grad, problem.aux)
        result, lse = attention(q, k, v, **options, out=out, return_lse=True, backend=backend, stream=stream, tf32=tf32)
        views = plan.bhsd_view(result.copy(), layout), plan.bhsd_view(lse.copy(), layout)
        pullback = Pullback(problem, (q, k, v), options, views, tuple(aux_grad), backend, tf32)
    return ((result, lse) if return_lse else result), pullback


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    causal: bool = False,
    window: Any = None,
    align: Any = None,
    mask: Any = None,
    bias: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    aux: Any = (),
    aux_grad: tuple[int, ...] = (),
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    backend: str = "auto",
    stream: Any = None,
    tf32: bool = False,
) -> Gradients:
    """The gradients of `attention`, from its results: `attention_vjp` without a closure.

    Parameters
    ----------
    dout : ndarray
        The gradient with respect to out: its shape and dtype.
    q, k, v, causal, ..., backend, stream, tf32
        As `attention` was called with; the stream may be another.
    out, lse : ndarray
        What it returned with return_lse=True.
    dlse : ndarray
        The gradient with respect to lse, of its shape; 0 if left out.
    aux_grad : tuple of int
        Positions in aux of the arrays that get a gradient.

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
    options = _options(locals())
    _check_backend(backend)
    if _on_gpu(q, k, v, backend):
        from .cuda.host import on_device

        _check_tf32(tf32, "cuda")
        return on_device.attention_backward(dout, q, k, v, out, lse, dlse, options, aux_grad, stream, tf32)
    _check_stream(stream, backend)
    _check_tf32(tf32, backend)
    problem = plan.resolve(q, k, v, **options)
    asked = check_aux_grad(aux_grad, problem.aux)
    views = check_results(problem, out, lse)
    cotangents = check_cotangents(problem, dout, dlse)
    return _backward(problem, (q, k, v), options, *views, *cotangents, asked, backend, stream, tf32)


def attention_jvp(
    q: Any,
    k: Any,
    v: Any,
    q_dot: Any,
    k_dot: Any,
    v_dot: Any,
    *,
    bias_dot: Any = None,
    sinks_dot: Any = None,
    alibi_slopes_dot: Any = None,
    aux_dot: Any = None,
    causal: bool = False,
    window: Any = None,
    align: Any = None,
    mask: Any = None,
    bias: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    aux: Any = (),
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention and its derivative along a direction (forward mode, a Jacobian-vector product), in one pass.

    Parameters
    ----------
    q, k, v, causal, ..., backend
        As in `attention`.
    q_dot, k_dot, v_dot, bias_dot, sinks_dot, alibi_slopes_dot : float ndarray or None
        The direction, each in its argument's shape; q_dot, k_dot and v_dot in q's dtype. None is 0, and costs nothing.
    aux_dot : tuple
        An array or None for each array of aux.
    return_lse : bool
        Also return lse and its derivative.

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
    Of a hidden pair no tangent is read. A row that sees nothing has out_dot 0, and lse_dot that of its sink or 0. Where
    score_mod has a gradient of its own and reads not exactly one element of an array with a tangent, out_dot is NaN.
    The formulas stand at `reference.attention_jvp`.

    Examples
    --------
    >>> import numpy as np, numba_attn as na
    >>> q, k, v, direction = (np.random.default_rng(n).standard_normal((1, 2, 16, 8)) for n in range(4))
    >>> out, out_dot = na.attention_jvp(q, k, v, direction, None, None)
    >>> further = na.attention(q + 1e-6 * direction, k, v)
    >>> bool(np.allclose((further - out) / 1e-6, out_dot, atol=1e-5))
    True
    """
    options = _options(locals())
    _check_backend(backend)
    if backend == "cuda":
        raise ValueError("backend is 'cuda', but attention_jvp runs on the CPU only; it takes 'auto' or 'cpu'")
    if not isinstance(return_lse, (bool, np.bool_)):
        raise TypeError(f"return_lse is {return_lse!r}; it takes a bool")
    problem = plan.resolve(q, k, v, **options)
    tangents: list[Array | None] = []
    for x, of, name in ((q_dot, q, "q"), (k_dot, k, "k"), (v_dot, v, "v")):
        tangent = check_tangent(x, of, name)
        if tangent is not None and tangent.dtype != problem.dtype:
            raise TypeError(f"{name}_dot has dtype {tangent.dtype}; it takes {name}'s, {problem.dtype}")
        tangents.append(None if tangent is None else plan.bhsd_view(tangent, layout))
    bias_dot = check_tangent(bias_dot, bias, "bias")
    sinks_dot = check_tangent(sinks_dot, sinks, "sinks")
    slopes_dot = check_tangent(alibi_slopes_dot, alibi_slopes, "alibi_slopes")
    tables_dot = check_aux_tangents(aux_dot, problem.aux)

    shape, rows = plan.output_shape(problem), plan.lse_shape(problem)
    out, out_dot = np.empty(shape, problem.dtype), np.empty(shape, problem.dtype)
    acc: np.dtype[Any] = np.dtype(problem.acc)
    lse, lse_dot = np.empty(rows, acc), np.empty(rows, acc)
    if _jit_is_off():
        _dense_jvp(
            (out, lse, out_dot, lse_dot), q, k, v, q_dot, k_dot, v_dot, options,
            dict(bias_dot=bias_dot, sinks_dot=sinks_dot, alibi_slopes_dot=slopes_dot, aux_dot=aux_dot),
        )  # fmt: skip
    else:
        from .cpu.launch.jvp import jvp

        if bias_dot is not None:
            missing = 4 - len(layout)
            pairs = Shape(problem.batch, problem.q_heads, problem.q_len, problem.kv_len, missing)
            bias_dot = over_pairs(bias_dot, "bias_dot", pairs)
        jvp(
            problem,
            (tangents[0], tangents[1], tangents[2]),
            bias_dot,
            None if sinks_dot is None else np.ascontiguousarray(sinks_dot, problem.acc),
            None if slopes_dot is None else np.ascontiguousarray(np.atleast_2d(slopes_dot), problem.acc),
            tuple(None if a is None else a.astype(problem.acc) for a in tables_dot),
            *(plan.bhsd_view(x, layout) for x in (out, lse, out_dot, lse_dot)),
        )
    return ((out, lse), (out_dot, lse_dot)) if return_lse else (out, out_dot)


class Pullback:
    """From the gradient with respect to out (and lse) to those of the arguments: see `attention_vjp`."""

    def __init__(
        self,
        problem: plan.Problem | None,  # None: the arrays are on a GPU
        inputs: tuple[Any, Any, Any],
        options: dict[str, Any],
        results: tuple[Any, Any],  # out and lse: (B, H, S, ...) views, on a GPU the arrays
        aux_grad: tuple[int, ...],
        backend: str,
        tf32: bool,
    ):
        self._problem, self._inputs, self._options, self._aux_grad = problem, inputs, options, aux_grad
        self._results, self._backend, self._tf32 = results, backend, tf32

    def __call__(self, dout: Any, dlse: Any = None, *, stream: Any = None) -> Gradients:
        """The gradients of sum(dout * out) + sum(dlse * lse).

        stream: for a GPU, as in `attention`; it need not be the one that the forward call was on.
        """
        problem, inputs, options, (out, lse) = self._problem, self._inputs, self._options, self._results
        if problem is None:
            from .cuda.host import on_device

            return on_device.attention_backward(
                dout, *inputs, out, lse, dlse, options, self._aux_grad, stream, self._tf32
            )
        _check_stream(stream, self._backend)
        asked = check_aux_grad(self._aux_grad, problem.aux)
        cotangents = check_cotangents(problem, dout, dlse)
        return _backward(problem, inputs, options, out, lse, *cotangents, asked, self._backend, stream, self._tf32)


def _backward(
    problem: plan.Problem,
    inputs: tuple[Any, Any, Any],
    options: dict[str, Any],
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array | None,
    asked: tuple[bool, ...],
    backend: str,
    stream: Any,
    tf32: bool,
) -> Gradients:
    """The gradients in the caller's layout, shapes and dtypes; out, lse, dout and dlse are (B, H, S, ...) views."""
    if backend != "cuda" and _jit_is_off():
        return _dense_backward(problem, inputs, options, dout, dlse, asked)

    bias, slopes, sinks = options["bias"], options["alibi_slopes"], options["sinks"]
    dq, dk, dv = (np.empty(x.shape, problem.dtype) for x in inputs)
    dq_view, dk_view, dv_view = (plan.bhsd_view(x, problem.layout) for x in (dq, dk, dv))
    bias_shape = None if bias is None else (1,) * (4 - bias.ndim) + bias.shape
    slopes_shape = None if slopes is None else (1,) * (2 - slopes.ndim) + slopes.shape
    if dlse is not None and dlse.dtype != problem.acc:
        dlse = dlse.astype(problem.acc)
    arguments = problem, out, lse, dout, dlse, dq_view, dk_view, dv_view, bias_shape, slopes_shape, asked
    if backend == "cuda":
        from .cuda.host.from_numpy import attention_backward as on_cuda

        dbias, dslopes, daux, dsinks = on_cuda(*arguments, stream, tf32)
    else:
        from .cpu.launch.backward import backward

        dbias, dslopes, daux, deltas = backward(*arguments)
        dsinks = None if sinks is None else sink_gradient(problem, lse, deltas)
    with np.errstate(over="ignore"):  # a float16 gradient may be infinite, as those that the kernels write
        return Gradients(
            dq,
            dk,
            dv,
            None if dbias is None else dbias.reshape(bias.shape).astype(bias.dtype, copy=False),
            None if sinks is None else dsinks.reshape(-1).astype(sinks.dtype, copy=False),
            None if dslopes is None else dslopes.reshape(slopes.shape).astype(slopes.dtype, copy=False),
            _in_dtypes(daux, options["aux"]) if problem.score_mod is not None and problem.aux else None,
        )


def _in_dtypes(daux: tuple[Array | None, ...], aux: Any) -> tuple[Array | None, ...]:
    return tuple(None if d is None else d.astype(a.dtype, copy=False) for d, a in zip(daux, aux, strict=True))


def _check_backend(backend: Any) -> None:
    if backend not in ("auto", "cpu", "cuda"):
        raise ValueError(f"backend is {backend!r}; it takes 'auto', 'cpu' or 'cuda'")


def _check_stream(stream: Any, backend: str) -> None:
    if stream is not None and backend != "cuda":
        raise ValueError(
            "stream is given, but the arrays are in host memory and the CPU computes; it takes arrays on a GPU, or "
            "backend='cuda', beside it"
        )


def _check_tf32(tf32: Any, backend: str) -> None:
    if not isinstance(tf32, (bool, np.bool_)):
        raise TypeError(f"tf32 is {tf32!r}; it takes a bool")
    if tf32 and backend != "cuda":
        raise ValueError(
            "tf32 is True, but the arrays are in host memory and the CPU computes; it takes arrays on a GPU, or "
            "backend='cuda', beside it"
        )


def _on_gpu(q: Any, k: Any, v: Any, backend: str) -> bool:
    """Whether the call is one with arrays in the memory of a GPU."""
    if type(q) is type(k) is type(v) is np.ndarray:
        return False
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


_OPTIONS = (
    "causal", "window", "align", "mask", "bias", "scale", "softcap", "alibi_slopes", "sinks", "score_mod", "aux",
    "dropout_p", "seed", "layout",
)  # fmt: skip


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of a public function's arguments those that say what attention is: the keywords of `plan.resolve`."""
    return {name: arguments[name] for name in _OPTIONS}


# The kernels are imported with the first call, not with the package: checking arguments and the reference need no
# Numba.


def _prepare(problem: plan.Problem, want_lse: bool) -> Any:
    global _prepare, _run
    from .cpu.launch.forward import prepare, run

    _prepare, _run = prepare, run
    return prepare(problem, want_lse)


def _run(*args: Any) -> None:
    raise AssertionError("no launch exists before _prepare has run")


def _jit_is_off() -> bool:
    from numba import config

    return bool(config.DISABLE_JIT)


def _dense(out: Any, lse: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> None:
    """NUMBA_DISABLE_JIT=1: vector kernels can't run as Python, so the dense float64 reference does the work, and says
    so."""
    from . import reference

    warnings.warn(
        "numba_attn: NUMBA_DISABLE_JIT is set, so attention() runs the dense NumPy reference: slow, O(Sq Sk) memory",
        RuntimeWarning,
        stacklevel=3,
    )
    out[...], dense_lse = reference.attention(q, k, v, **options, return_lse=True)
    if lse is not None:
        lse[...] = dense_lse


def _dense_backward(
    problem: plan.Problem,
    inputs: tuple[Any, Any, Any],
    options: dict[str, Any],
    dout: Array,
    dlse: Array | None,
    asked: tuple[bool, ...],
) -> Gradients:
    from . import reference

    warnings.warn(
        "numba_attn: NUMBA_DISABLE_JIT is set, so gradients come from the dense NumPy reference: slow, O(Sq Sk)",
        RuntimeWarning,
        stacklevel=4,
    )
    found = reference.attention_backward(
        plan.in_layout(dout, problem.layout),
        *inputs,
        dlse=None if dlse is None else plan.in_layout(dlse, problem.layout),
        aux_grad=tuple(n for n, wanted in enumerate(asked) if wanted),
        **options,
    )
    given = (*inputs, options["bias"], options["sinks"], options["alibi_slopes"])
    dq, dk, dv, dbias, dsinks, dslopes = (
        None if g is None else g.astype(x.dtype) for g, x in zip(found[:6], given, strict=True)
    )
    assert dq is not None and dk is not None and dv is not None
    daux = None if found.daux is None else _in_dtypes(found.daux, options["aux"])
    return Gradients(dq, dk, dv, dbias, dsinks, dslopes, daux)


def _dense_jvp(
    results: Any, q: Any, k: Any, v: Any, q_dot: Any, k_dot: Any, v_dot: Any, options: Any, dots: Any
) -> None:
    from . import reference

    warnings.warn(
        "numba_attn: NUMBA_DISABLE_JIT is set, so attention_jvp() runs the dense NumPy reference: slow, O(Sq Sk)",
        RuntimeWarning,
        stacklevel=3,
    )
    out, lse, out_dot, lse_dot = results
    found = reference.attention_jvp(q, k, v, q_dot, k_dot, v_dot, **options, **dots, return_lse=True)
    (out[...], lse[...]), (out_dot[...], lse_dot[...]) = found
