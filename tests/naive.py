"""Dense attention and its gradients in a precision of the caller's choice, written from the resolved `Problem`.

The reference reads the arguments, so that the two check each other. In long double this is the truth that float64
results are held to. How far off a result may be is bounds.py's matter.
"""

import math
from types import FunctionType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from numba_attn import plan, reference
from numba_attn.userfn.accepted import plain_function

# What `math` means in a user's function here: the argument's precision, where math itself is double.
NUMPY_MATH = SimpleNamespace(inf=math.inf, pow=np.power, **{
    name: getattr(np, name) for name in ("exp", "log", "log1p", "tanh", "sin", "cos", "sqrt")
})  # fmt: skip


def resolve(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> plan.Problem:
    return plan.resolve(q, k, v, **options)


def geometry(p: plan.Problem) -> tuple[np.ndarray, np.ndarray]:
    """(visible by the sequences, window, causal and prefix; i + offset - j), both (B, 1, Sq, Sk)."""
    seen = np.zeros((p.batch, 1, p.q_len, p.kv_len), bool)
    distance = np.zeros(seen.shape, np.int64)
    for batch, q_start, q_len, k_start, k_len, offset, prefix in p.sequences.tolist():
        i, j = np.ogrid[:q_len, :k_len]
        ok = j >= i + offset - p.left
        right = j <= i + offset + p.right
        if p.has_prefix:
            right &= (j < prefix) | (j <= i + offset)
        tile = np.s_[batch, 0, q_start : q_start + q_len, k_start : k_start + k_len]
        seen[tile], distance[tile] = ok & right, i + offset - j
    return seen, distance


def with_math(fn: Any, math: SimpleNamespace) -> FunctionType:
    """A user's function that takes its functions of `math` from this."""
    fn = plain_function(fn)
    return FunctionType(fn.__code__, fn.__globals__ | {"math": math}, fn.__name__, fn.__defaults__, fn.__closure__)


def sink_scores(p: plan.Problem, dtype: Any) -> np.ndarray:
    """(B, Hq, Sq, 1): the score of each row's sink, -inf where it has none."""
    scores = np.full((p.batch, p.q_heads, p.q_len, 1), -np.inf, dtype)
    if p.sinks is not None:
        for batch, q_start, q_len, *_ in p.sequences.tolist():
            scores[batch, :, q_start : q_start + q_len] = p.sinks.astype(dtype)[:, None, None]
    return scores


def everywhere(fn: Any, *arrays: np.ndarray, aux: tuple[np.ndarray, ...], dtype: np.dtype) -> np.ndarray:
    """A user's scalar function at every pair; the score is a scalar of `dtype`, and so is its arithmetic."""
    fn = with_math(fn, NUMPY_MATH)
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    out = np.empty(shape, dtype)
    columns = [np.broadcast_to(x, shape).ravel() for x in arrays]
    columns = [x if x.dtype.kind == "f" else x.tolist() for x in columns]
    for n, values in enumerate(zip(*columns, strict=True)):
        out.flat[n] = fn(*values, *aux)
    return out


def attention(
    dtype: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, weights_dtype: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in (B, H, S, D) and (B, H, S), every step in `dtype`; the weights rounded to weights_dtype, as they
    are where matrix units take halves."""
    p = resolve(q, k, v, **options)
    t = np.dtype(dtype).type
    group = p.q_heads // p.kv_heads
    qc, kc, vc = (x.astype(dtype) for x in (p.q, np.repeat(p.k, group, 1), np.repeat(p.v, group, 1)))
    b, h, i, j = np.ogrid[: p.batch, : p.q_heads, : p.q_len, : p.kv_len]
    seen, distance = visible(p), geometry(p)[1]
    s = (qc @ kc.swapaxes(-1, -2)) * t(p.scale)
    if p.softcap:
        s = t(p.softcap) * np.tanh(s / t(p.softcap))
    if p.bias is not None:
        seen &= p.bias != -np.inf
        s = s + p.bias.astype(dtype)
    if p.slopes is not None:
        s = s - p.slopes[:, :, None, None].astype(dtype) * np.abs(distance).astype(dtype)
    if p.score_mod is not None:
        s = everywhere(p.score_mod, np.where(np.isfinite(s), s, t(0)), b, h, i, j, aux=p.aux, dtype=np.dtype(dtype))
        # score_mod comes before the mask, but -inf from the bias stays hidden whatever the function makes of it
    s = np.where(seen, s, t(-np.inf))

    sink = sink_scores(p, dtype)
    m = np.maximum(np.max(s, axis=-1, initial=-np.inf, keepdims=True), sink)
    m[np.isneginf(m)] = 0
    e = np.exp(s - m)
    denominator = e.sum(-1, keepdims=True) + np.exp(sink - m)
    with np.errstate(divide="ignore"):
        lse = (m + np.log(denominator))[..., 0]
    weights = e / np.where(denominator == 0, t(1), denominator)
    if p.dropout_p:
        keep = reference.dropout_keep(p)
        weights = np.where(keep, weights / t(1 - p.dropout_p), t(0))
    if weights_dtype is not None:
        weights = weights.astype(weights_dtype).astype(dtype)
    return weights @ vc, lse


def truth(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return attention(np.longdouble, q, k, v, **options)


def rounding(dtype: np.dtype) -> float:
    """The spacing of the numbers of a dtype at 1."""
    return float(ml_dtypes.finfo(dtype).eps)


def backward(
    dtype: Any,
    dout: np.ndarray,
    dlse: np.ndarray | None,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    **options: Any,
) -> dict[str, np.ndarray]:
    """The gradients of `attention` without score_mod, every step in `dtype`, by name: (B, H, S, D), and those of bias,
    sinks and slopes in their own shape. out is rounded to q's dtype, as the caller keeps it."""
    p = resolve(q, k, v, **options)
    assert p.score_mod is None, "this does not differentiate a function"
    t = np.dtype(dtype).type
    group = p.q_heads // p.kv_heads
    qc, kc, vc = (x.astype(dtype) for x in (p.q, np.repeat(p.k, group, 1), np.repeat(p.v, group, 1)))
    out, lse = attention(dtype, q, k, v, **options)
    out = out.astype(p.dtype).astype(dtype)
    do = plan.bhsd_view(dout, p.layout).astype(dtype)
    s = t(p.scale) * (qc @ kc.swapaxes(-1, -2))
    curve = np.ones_like(s)
    if p.softcap:
        curved = np.tanh(s / t(p.softcap))
        s, curve = t(p.softcap) * curved, t(1) - curved * curved
    seen = visible(p)
    distance = np.abs(geometry(p)[1]).astype(dtype)
    if p.bias is not None:
        seen &= p.bias != -np.inf
        s = s + p.bias.astype(dtype)
    if p.slopes is not None:
        s = s - p.slopes[:, :, None, None].astype(dtype) * distance
    with np.errstate(all="ignore"):
        weights = np.where(seen, np.exp(s - lse[..., None]), t(0))
    keep = t(1)
    if p.dropout_p:
        keep = np.where(reference.dropout_keep(p), t(1) / t(1 - p.dropout_p), t(0))
    dp = keep * (do @ vc.swapaxes(-1, -2))
    empty = ~seen.any(-1)
    delta = np.where(empty, t(0), (do * out).sum(-1))
    if dlse is not None:
        delta = delta - plan.bhsd_view(dlse[..., None], p.layout)[..., 0].astype(dtype)
    ds = weights * (dp - delta[..., None])
    found: dict[str, np.ndarray] = {}

    def by_group(x: np.ndarray) -> np.ndarray:
        return x.reshape(p.batch, p.kv_heads, group, *x.shape[2:]).sum(2)

    if p.bias is not None:
        found["dbias"] = summed_to(ds, options["bias"].shape)
    if p.slopes is not None:
        over = (2, 3) if options["alibi_slopes"].ndim == 2 else (0, 2, 3)
        found["dalibi_slopes"] = -(ds * distance).sum(over)
    if p.sinks is not None:
        with np.errstate(all="ignore"):
            weight = np.where(np.isneginf(lse), t(0), np.exp(p.sinks[:, None].astype(dtype) - lse))
        found["dsinks"] = -(weight * delta).sum((0, 2))
    ds = ds * curve * t(p.scale)
    found["dq"] = ds @ kc
    found["dk"] = by_group(ds.swapaxes(-1, -2) @ qc)
    found["dv"] = by_group((weights * keep).swapaxes(-1, -2) @ do)
    return found


def visible(p: plan.Problem) -> np.ndarray:
    """bool (B, Hq, Sq, Sk): the pairs that every mask leaves visible. Those of bias -inf are among them."""
    b, h, i, j = np.ogrid[: p.batch, : p.q_heads, : p.q_len, : p.kv_len]
    seen = np.broadcast_to(geometry(p)[0], (p.batch, p.q_heads, p.q_len, p.kv_len)).copy()
    if p.start is not None:
        seen &= (p.start[..., None] <= j) & (j < p.end[..., None])
    for q_ids, kv_ids in p.segments:
        seen &= (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
    for mask in p.masks:
        seen &= mask
    for fn, aux in p.mask_mods:
        seen &= everywhere(fn, b, h, i, j, aux=aux, dtype=np.dtype(bool))
    return seen


def summed_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(B, H, Sq, Sk) summed over what an array of `shape` was broadcast along."""
    axes = tuple(n for n, size in enumerate((1,) * (4 - len(shape)) + shape) if size == 1)
    return x.sum(axes).reshape(shape)
