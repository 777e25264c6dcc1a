"""Dense attention in a precision of the caller's choice: the yardstick of the accuracy tests.

The float64 reference says what is right; this says how far dense arithmetic in the kernel's own precision lands from
it, which is what the kernels are held to (at most twice as far). No BLAS takes part: the order of every sum is written
here, so that the yardstick is the same on every CPU. It reads the resolved `Problem`, where the reference
reads the arguments, so the two also check each other. In long double it is the truth that float64 results are
measured against.
"""

import math
from types import FunctionType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from numba_attn import plan, reference

WIDER = {np.dtype(np.float32): np.float64}  # of the rest long double, where the machine has one


def rounded_once(fn: Any) -> Any:
    """A function of NumPy computed in a wider type and rounded to the precision of its first argument: NumPy's own
    differ from CPU to CPU in the last bits."""

    def call(x: Any, *more: Any) -> Any:
        x = np.asarray(x)
        dtype = x.dtype if x.dtype.kind == "f" else np.dtype(np.float64)
        wide = WIDER.get(dtype, np.longdouble)
        with np.errstate(over="ignore"):
            return fn(x.astype(wide), *(np.asarray(y).astype(wide) for y in more)).astype(dtype)[()]

    return call


exponential, logarithm, tanh = map(rounded_once, (np.exp, np.log, np.tanh))

# What `math` means in a user's function here: the argument's precision, where math itself is double.
NUMPY_MATH = SimpleNamespace(inf=math.inf, pow=rounded_once(np.power), **{
    name: rounded_once(getattr(np, name)) for name in ("exp", "log", "log1p", "tanh", "sin", "cos", "sqrt")
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


BLOCK = 64  # terms of a sum that are added up before they meet the running sum


def product(a: np.ndarray, b: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """a @ b in a fixed order of summation: term by term in blocks, each from zero, then block by block.

    A BLAS sums in an order of its own for every CPU, with or without fused multiply-adds. Multiplications and additions
    of whole arrays are rounded to nearest, one after the other, on every CPU, so that the yardstick is one number. Its
    order is that of the kernels in length: as many roundings as a block has terms, then one for each block. The scores,
    sums over a head's dimensions, are one chain there: `dots`.
    """
    shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    whole = np.zeros((*shape, a.shape[-2], b.shape[-1]), a.dtype)
    for first in range(0, a.shape[-1], block):
        part = np.zeros_like(whole)
        for n in range(first, min(first + block, a.shape[-1])):
            part += a[..., :, n, None] * b[..., None, n, :]
        whole += part
    return whole


def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a[i] . b[j] for rows i and j, one chain of additions each."""
    return product(a, b.swapaxes(-1, -2), max(1, a.shape[-1]))


def total(x: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """x.sum(axis) in the same order."""
    axes = {n % x.ndim for n in ((axis,) if isinstance(axis, int) else axis)}
    kept = [n for n in range(x.ndim) if n not in axes]
    terms = math.prod(x.shape[n] for n in axes)
    rows = x.transpose(*kept, *sorted(axes)).reshape(*(x.shape[n] for n in kept), terms)
    return product(rows[..., None, :], np.ones((terms, 1), x.dtype))[..., 0, 0]


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

    s = dots(qc, kc) * t(p.scale)
    if p.softcap:
        s = t(p.softcap) * tanh(s / t(p.softcap))
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
    e = exponential(s - m)
    denominator = total(e, -1)[..., None]
    if sink is not None:
        denominator = denominator + exponential(sink - m)
    with np.errstate(divide="ignore"):
        lse = (m + logarithm(denominator))[..., 0]
    weights = e / np.where(denominator == 0, t(1), denominator)
    if p.dropout_p:
        keep = reference.dropout_keep(p)
        weights = np.where(keep, weights / t(1 - p.dropout_p), t(0))
    if weights_dtype is not None:
        weights = weights.astype(weights_dtype).astype(dtype)
    return product(weights, vc), lse


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
    weights_dtype: Any = None,
    **options: Any,
) -> dict[str, tuple[np.ndarray, float]]:
    """The gradients of `attention` without score_mod, every step in `dtype`: {name: (gradient, size)}.

    The gradients are (B, H, S, D), and of bias, sinks and slopes in their own shape; `size` is the largest sum of
    absolute values that an entry is made of, which says how far rounding may throw it. out is rounded to q's dtype, as
    the caller keeps it. weights_dtype: as for `attention`, and of ds too.
    """
    p = resolve(q, k, v, **options)
    assert p.score_mod is None, "the yardstick does not differentiate"
    t = np.dtype(dtype).type
    group = p.q_heads // p.kv_heads
    qc, kc, vc = (x.astype(dtype) for x in (p.q, np.repeat(p.k, group, 1), np.repeat(p.v, group, 1)))
    out, lse = attention(dtype, q, k, v, **options)
    out = out.astype(p.dtype).astype(dtype)
    do = plan.bhsd_view(dout, p.layout).astype(dtype)
    s = t(p.scale) * dots(qc, kc)
    curve = np.ones_like(s)
    if p.softcap:
        curved = tanh(s / t(p.softcap))
        s, curve = t(p.softcap) * curved, t(1) - curved * curved
    seen = visible(p)
    distance = np.abs(geometry(p)[1]).astype(dtype)
    if p.bias is not None:
        seen &= p.bias != -np.inf
        s = s + p.bias.astype(dtype)
    if p.slopes is not None:
        s = s - p.slopes[:, :, None, None].astype(dtype) * distance
    with np.errstate(all="ignore"):
        weights = np.where(seen, exponential(s - lse[..., None]), t(0))
    keep = t(1)
    if p.dropout_p:
        keep = np.where(reference.dropout_keep(p), t(1) / t(1 - p.dropout_p), t(0))
    dp = keep * dots(do, vc)
    empty = ~seen.any(-1)
    delta = np.where(empty, t(0), total(do * out, -1))
    if dlse is not None:
        delta = delta - plan.bhsd_view(dlse[..., None], p.layout)[..., 0].astype(dtype)
    ds = weights * (dp - delta[..., None])
    size = weights * (np.abs(dp) + np.abs(delta[..., None]))
    found: dict[str, tuple[np.ndarray, float]] = {}

    def add(name: str, gradient: np.ndarray, sizes: np.ndarray) -> None:
        found[name] = gradient, float(np.max(sizes, initial=0.0))

    def by_group(x: np.ndarray) -> np.ndarray:
        return total(x.reshape(p.batch, p.kv_heads, group, *x.shape[2:]), 2)

    if p.bias is not None:
        shape = options["bias"].shape
        add("dbias", summed_to(ds, shape), summed_to(size, shape))
    if p.slopes is not None:
        shape = options["alibi_slopes"].shape
        over = (2, 3) if len(shape) == 2 else (0, 2, 3)
        add("dalibi_slopes", -total(ds * distance, over), (size * distance).sum(over))
    if p.sinks is not None:
        with np.errstate(all="ignore"):
            weight = np.where(np.isneginf(lse), t(0), exponential(p.sinks[:, None].astype(dtype) - lse))
        add("dsinks", -total(weight * delta, (0, 2)), (weight * np.abs(delta)).sum((0, 2)))
    ds, size = ds * curve * t(p.scale), np.abs(size * curve * t(p.scale))
    if weights_dtype is not None:
        ds = ds.astype(weights_dtype).astype(dtype)
    add("dq", product(ds, kc), size @ np.abs(kc))
    add("dk", by_group(product(ds.swapaxes(-1, -2), qc)), by_group(size.swapaxes(-1, -2) @ np.abs(qc)))
    weights = weights * keep
    if weights_dtype is not None:
        weights = weights.astype(weights_dtype).astype(dtype)
    add("dv", by_group(product(weights.swapaxes(-1, -2), do)), by_group(weights.swapaxes(-1, -2) @ np.abs(do)))
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
    return total(x, axes).reshape(shape)
