"""Attention as a textbook writes it: dense, in float64, in NumPy. It defines what is right; the kernels are tested
against it.

It shares the checks of the arguments with the kernels and no arithmetic: masks come from each part's own formula, not
from the bounds that the kernels read, and no row is ever scaled, skipped or merged. It needs the memory of several Sq x
Sk arrays of float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array
from .mask import Shape, check_align, dense, positions, widened
from .plan import Problem, in_layout, keyword_parts, resolve
from .score import ScoreMod, plain_function

INF = np.inf


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
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
) -> Any:
    """What `numba_attn.attention` computes, from the formulas, in float64.

    For each query i of query head h (which reads the keys and values of head h // (Hq // Hkv)) and each visible key j::

        s = scale * q[i] . k[j]                          scale
        s = softcap * tanh(s / softcap)                  softcap
        s = s + bias[i, j] - slope[h] * |i + offset - j| bias, ALiBi (Press et al. 2022)
        s = score_mod(s, b, h, i, j, *aux)               score_mod
        p = exp(s) / (sum over visible j of exp(s) + exp(sink[h]))
        p = p * keep(seed, b, h, i, j) / (1 - dropout_p) dropout
        out[i] = sum over visible j of p * v[j]          lse[i] = log of the denominator

    A pair is visible iff every mask says so, bias is not -inf, and score_mod did not return -inf. Nothing is read of a
    pair that is not visible. A non-finite number in a pair that is visible makes that row of out non-finite, also where
    IEEE arithmetic would forget it (exp(-inf) = 0, tanh(inf) = 1). A row that sees nothing is 0, with lse -inf, or the
    sink where its query is in a sequence.

    Parameters
    ----------
    q : (B, Hq, Sq, Dk), k : (B, Hkv, Sk, Dk), v : (B, Hkv, Sk, Dv)
        Arrays of float64, float32, float16 or bfloat16, which here may be mixed. Shapes are for layout="bhsd".
    causal, window, align, mask, bias, scale, softcap, alibi_slopes, sinks, score_mod, aux, dropout_p, seed, layout
        As in `numba_attn.attention`. User functions are called from Python, a pair at a time, with float64 scores.
    return_lse : bool
        Return (out, lse).

    Returns
    -------
    out : float64, q's shape with Dv for Dk
    lse : float64, q's shape without its last axis; only with return_lse

    Raises
    ------
    TypeError, ValueError
        As `numba_attn.attention` does.

    Examples
    --------
    >>> import numpy as np
    >>> from numba_attn import reference
    >>> q = np.zeros((1, 1, 2, 4))
    >>> v = np.array([1.0, 3.0]).reshape(1, 1, 2, 1)
    >>> reference.attention(q, q, v, causal=True).ravel()  # equal scores: the mean of what each query sees
    array([1., 2.])
    """
    problem = resolve(
        *(_float64(x) for x in (q, k, v)),
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
    shape = Shape(problem.batch, problem.q_heads, problem.q_len, problem.kv_len, 4 - np.ndim(q))
    parts = keyword_parts(bool(causal), window, mask)
    visible = dense(parts, check_align(align, "align"), shape)
    at = positions(parts, shape)
    # |i + offset - j|, counted within the sequence; (B, Sq, Sk)
    distance = np.abs((at.i + at.offset(check_align(align, "align")))[:, :, None] - at.j[:, None, :])

    out = np.zeros((shape.batch, shape.q_heads, shape.q_len, problem.v_dim))
    lse = np.full((shape.batch, shape.q_heads, shape.q_len), -INF)
    keep = dropout_keep(problem)
    group = problem.q_heads // problem.kv_heads
    for b in range(shape.batch):
        for h in range(shape.q_heads):
            seen = visible[b, h]
            with np.errstate(all="ignore"):  # non-finite inputs are allowed, and mean what they mean
                s = _scores(problem, problem.q[b, h], problem.k[b, h // group])
                if problem.bias is not None:
                    added = problem.bias[b, h].astype(np.float64)
                    seen = seen & (added != -INF)
                    s = s + added
                if problem.slopes is not None:
                    s = s - problem.slopes[b % problem.slopes.shape[0], h] * distance[b]
                if problem.score_mod is not None:
                    s = _modified(s, problem.score_mod, problem.aux, b, h, seen)
                    seen = seen & (s != -INF)
                sink = np.where(at.q_sequence[b] >= 0, -INF if problem.sinks is None else problem.sinks[h], -INF)
                p, lse[b, h] = _softmax(s, seen, sink)
                if problem.dropout_p > 0.0:
                    p = p * keep[b, h] / (1.0 - problem.dropout_p)
                out[b, h] = _values(p, seen, problem.v[b, h // group])
    result = np.ascontiguousarray(in_layout(out, layout))
    return (result, np.ascontiguousarray(in_layout(lse, layout))) if return_lse else result


def _float64(x: Any) -> Any:
    """An array of one of the other float dtypes in float64. The rest goes through as it is, to be refused by the
    checks."""
    if type(x) not in (np.ndarray, np.memmap) or not x.dtype.isnative:
        return x
    return x.astype(np.float64) if x.dtype.char in "fe" or x.dtype.name == "bfloat16" else x


def _scores(problem: Problem, q: Array, k: Array) -> Array:
    """scale * q k', then softcap. A product that is not finite is NaN: an infinite feature has no finite answer."""
    s = problem.scale * (q @ k.T)
    s = np.where(np.isfinite(s), s, np.nan)
    return s if problem.softcap == 0.0 else problem.softcap * np.tanh(s / problem.softcap)


def _modified(s: Array, score_mod: Any, aux: tuple[Array, ...], b: int, h: int, seen: Array) -> Array:
    """score_mod(s, b, h, i, j, *aux) for the pairs that are seen."""
    fn = plain_function(score_mod.fn if isinstance(score_mod, ScoreMod) else score_mod)
    wide = [widened(a) for a in aux]
    modified = s.copy()
    for i, j in zip(*(index.tolist() for index in np.nonzero(seen)), strict=True):
        modified[i, j] = fn(s[i, j], b, h, i, j, *wide)
    return modified


def _softmax(s: Array, seen: Array, sink: Array) -> tuple[Array, Array]:
    """The weights of each row, 0 where not seen, and the log of their denominator. `sink` (Sq,) joins the denominator
    alone."""
    s = np.where(seen, s, -INF)
    m = np.maximum(s.max(axis=1, initial=-INF), sink)
    m = np.where(m == -INF, 0.0, m)  # an empty row: exp(-inf - 0) is 0, where -inf - -inf would be NaN
    p = np.exp(s - m[:, None])
    total = p.sum(axis=1) + np.exp(sink - m)
    return p / np.where(total == 0.0, 1.0, total)[:, None], m + np.log(total)


def _values(p: Array, seen: Array, v: Array) -> Array:
    """p v over the pairs that are seen. 0 * NaN is NaN, so a value row that is not finite is added only where it is
    seen."""
    finite = np.asarray(np.isfinite(v).all(axis=1))
    out = np.where(seen, p, 0.0) @ np.where(finite[:, None], v, 0.0)
    for j in np.flatnonzero(~finite):
        out += np.where(seen[:, j, None], p[:, j, None] * v[j], 0.0)
    return out


# --- dropout ----------------------------------------------------------------------------------------------------------


def philox4x32(
    counter: tuple[Any, Any, Any, Any], key: tuple[int, int], rounds: int = 10
) -> tuple[Array, Array, Array, Array]:
    """Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): four random words of 32 bits
    for each counter.

    Parameters
    ----------
    counter : four ints or arrays of ints
        Broadcast against each other; only the low 32 bits count.
    key : two ints
    rounds : int
        10 in all published uses.

    Returns
    -------
    four uint64 arrays of numbers below 2**32

    Examples
    --------
    >>> [f"{int(word):08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint64) & low for c in counter)
    k0, k1 = key
    for _ in range(rounds):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0 = (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & low, product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.asarray(c0), np.asarray(c1), np.asarray(c2), np.asarray(c3)


def dropout_keep(problem: Problem) -> Array:
    """Which weights dropout leaves: bool (B, Hq, Sq, Sk). All indices are array indices.

    The counter is (i, j >> 2, h, b), the key the low and the high half of the seed, and pair (i, j) takes word j & 3 of
    the four. A weight stays iff its word >= round(dropout_p * 2**32).
    """
    size = (problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
    if problem.dropout_p == 0.0:
        return np.broadcast_to(np.asarray(True), size)
    b, h, i, j = np.ogrid[: size[0], : size[1], : size[2], : (size[3] + 3) // 4]
    words = philox4x32((i, j, h, b), (problem.seed & 0xFFFFFFFF, problem.seed >> 32))
    by_key = np.stack(np.broadcast_arrays(*words), axis=-1).reshape(*size[:3], 4 * j.size)[..., : size[3]]
    return np.asarray(by_key >= np.uint64(round(problem.dropout_p * 2**32)))
