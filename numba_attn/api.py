"""The public calls: arguments -> plan -> kernel -> result."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from . import plan

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
    backend : "auto" or "cpu"

    Returns
    -------
    out : ndarray
        (B, Hq, Sq, Dv) in q's dtype and layout; or (out, lse). A row that sees no key is 0 with lse -inf (or its sink).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what is accepted; the caller's arrays are as they were.

    Notes
    -----
    The order is scale, softcap, bias and ALiBi, score_mod, mask. Nothing of a hidden pair is read into the result: a
    NaN behind a mask changes no bit. A row's bits do not depend on threads, batch, strides or other rows. Online
    softmax: Milakov and Gimelshein 2018; tiles: Dao et al. 2022.

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
        and type(aux) is tuple
        and not aux
        and type(dropout_p) is float
        and dropout_p == 0.0
        and type(q) is type(k) is type(v) is np.ndarray
    ):
        if (
            scale is softcap is window is align is None
            and (causal is True or causal is False)
            and (return_lse is True or return_lse is False)
            and backend == "auto"
        ):
            key = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, layout, causal, return_lse)
        else:
            key = _exact(
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

    if backend not in ("auto", "cpu"):
        raise ValueError(f"backend is {backend!r}; it takes 'auto' or 'cpu' (CUDA kernels are not in this release)")
    if not isinstance(return_lse, (bool, np.bool_)):
        raise TypeError(f"return_lse is {return_lse!r}; it takes a bool")
    options = dict(
        causal=causal,
        window=window,
        align=align,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        score_mod=score_mod,
        aux=aux,
        dropout_p=dropout_p,
        seed=seed,
        layout=layout,
    )
    problem = plan.resolve(q, k, v, **options)
    if out is None:
        result = np.empty(plan.output_shape(problem), problem.dtype)
        view = plan.bhsd_view(result, layout)
    else:
        view, result = plan.check_out(problem, out), out
    lse = np.empty(plan.lse_shape(problem), problem.acc) if return_lse else None
    lse_view = None if lse is None else plan.bhsd_view(lse, layout)
    if _jit_is_off():
        _dense(result, lse, q, k, v, options)
    else:
        launch = _prepare(problem, bool(return_lse))
        if key is not None:
            if len(_PLAIN) >= _MOST_PLAIN:
                _PLAIN.clear()
            _PLAIN[key] = launch
        _run(launch, problem.q, problem.k, problem.v, view, lse_view)
    return (result, lse) if return_lse else result


def _exact(key: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """key with settings and their types, since True == 1 == 1.0 while the checks tell them apart; None for one that is
    no plain number."""
    for x in settings:
        if type(x) is tuple:
            key = _exact((*key, len(x)), x) or ()
            if not key:
                return None
        elif x is None or type(x) in (bool, int, float, str):
            key = (*key, type(x), x)
        else:
            return None
    return key


# The kernels are imported with the first call, not with the package: checking arguments and the reference need no
# Numba.


def _prepare(problem: plan.Problem, want_lse: bool) -> Any:
    global _prepare, _run
    from .cpu.launch import prepare, run

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
