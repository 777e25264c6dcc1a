"""Dense attention in a precision of the caller's choice: the yardstick of the accuracy tests.

The float64 reference says what is right; this says how far plain NumPy in the kernel's own precision lands from it,
which is what the kernels are held to (at most twice as far). It reads the resolved `Problem`, where the reference
reads the arguments, so the two also check each other. In long double it is the truth that float64 results are
measured against.
"""

import math
from types import FunctionType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from numba_attn import plan, reference

DEFAULTS: dict[str, Any] = dict(
    causal=False, window=None, align=None, mask=None, bias=None, scale=None, softcap=None, alibi_slopes=None,
    sinks=None, score_mod=None, aux=(), dropout_p=0.0, seed=None, layout="bhsd",
)  # fmt: skip


# What `math` means in a user's function here: NumPy's functions keep their argument's precision, math's are double.
NUMPY_MATH = SimpleNamespace(inf=math.inf, pow=np.power, **{
    name: getattr(np, name) for name in ("exp", "log", "log1p", "tanh", "sin", "cos", "sqrt")
})  # fmt: skip


def resolve(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> plan.Problem:
    return plan.resolve(q, k, v, **(DEFAULTS | options))


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


def everywhere(fn: Any, *arrays: np.ndarray, aux: tuple[np.ndarray, ...], dtype: np.dtype) -> np.ndarray:
    """A user's scalar function at every pair; the score is a scalar of `dtype`, and so is its arithmetic."""
    fn = getattr(fn, "fn", fn)
    fn = getattr(fn, "py_func", fn)
    fn = FunctionType(fn.__code__, fn.__globals__ | {"math": NUMPY_MATH}, fn.__name__, fn.__defaults__, fn.__closure__)
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    out = np.empty(shape, dtype)
    columns = [np.broadcast_to(x, shape).ravel() for x in arrays]
    columns = [x if x.dtype.kind == "f" else x.tolist() for x in columns]
    for n, values in enumerate(zip(*columns, strict=True)):
        out.flat[n] = fn(*values, *aux)
    return out


def attention(dtype: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in (B, H, S, D) and (B, H, S), every step in `dtype`."""
    p = resolve(q, k, v, **options)
    t = np.dtype(dtype).type
    group = p.q_heads // p.kv_heads
    qc, kc, vc = (x.astype(dtype) for x in (p.q, np.repeat(p.k, group, 1), np.repeat(p.v, group, 1)))
    b, h, i, j = np.ogrid[: p.batch, : p.q_heads, : p.q_len, : p.kv_len]
    seen, distance = geometry(p)
    seen = np.broadcast_to(seen, (p.batch, p.q_heads, p.q_len, p.kv_len)).copy()
    if p.start is not None:
        seen &= (p.start[..., None] <= j) & (j < p.end[..., None])
    for q_ids, kv_ids in p.segments:
        seen &= (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
    for mask in p.masks:
        seen &= mask
    for fn, aux in p.mask_mods:
        seen &= everywhere(fn, b, h, i, j, aux=aux, dtype=np.dtype(bool))

    s = qc @ kc.swapaxes(-1, -2) * t(p.scale)
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

    m = np.max(s, axis=-1, initial=-np.inf, keepdims=True)
    sink = None if p.sinks is None else np.broadcast_to(p.sinks.astype(dtype)[:, None, None], m.shape).copy()
    if sink is not None:
        covered = np.zeros((p.batch, 1, p.q_len, 1), bool)
        for batch, q_start, q_len, *_ in p.sequences.tolist():
            covered[batch, 0, q_start : q_start + q_len] = True
        sink[~np.broadcast_to(covered, sink.shape)] = -np.inf
        m = np.maximum(m, sink)
    m[np.isneginf(m)] = 0
    e = np.exp(s - m)
    total = e.sum(axis=-1, keepdims=True, dtype=dtype)
    if sink is not None:
        total = total + np.exp(sink - m)
    with np.errstate(divide="ignore"):
        lse = (m + np.log(total))[..., 0]
    weights = e / np.where(total == 0, t(1), total)
    if p.dropout_p:
        keep = reference.dropout_keep(p)
        weights = np.where(keep, weights / t(1 - p.dropout_p), t(0))
    return weights @ vc, lse


def truth(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return attention(np.longdouble, q, k, v, **options)


def rounding(dtype: np.dtype) -> float:
    """The spacing of the numbers of a dtype at 1."""
    return float(ml_dtypes.finfo(dtype).eps)
