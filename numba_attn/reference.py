"""Attention as a textbook writes it: dense, in float64, in NumPy, with its derivatives. It defines what is right; the
kernels are tested against it.

It shares the checks of the arguments with the kernels and no arithmetic: masks come from each part's own formula, not
from the bounds that the kernels read, and no row is ever scaled, skipped or merged. It needs the memory of several Sq x
Sk arrays of float64.

`attention` is the forward pass, `attention_backward` its gradients and `attention_jvp` its derivative in a direction.
All three go through `_heads`, which computes one query head after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from .arrays import Array
from .gradients import Gradients, check_aux_grad, check_aux_tangents, check_cotangents, check_tangent
from .mask.parts import Part, dense, positions
from .mask.shape import Align, Shape, check_align, over_pairs
from .options import Options, check_names, documented
from .plan import Problem, bhsd_view, in_layout, keyword_parts, resolve, window_part
from .userfn.accepted import ScoreMod, plain_function, widened
from .userfn.derivative import Differentiated, differentiated, differentiated_by_hand

INF = np.inf


@documented(Options)
def attention(q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Unpack[Options]) -> Any:
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
    IEEE arithmetic would give a finite number (exp(-inf) = 0, tanh(inf) = 1). A row that sees no key is 0. Its lse is
    -inf, or the sink where its query is in a sequence.

    Parameters
    ----------
    q : (B, Hq, Sq, Dk), k : (B, Hkv, Sk, Dk), v : (B, Hkv, Sk, Dv)
        Arrays of float64, float32, float16 or bfloat16, which here may be mixed. Shapes are for layout="bhsd".
    return_lse : bool
        Return (out, lse).
    {options}

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
    check_names(options, attention)
    layout, score_mod = options.get("layout", "bhsd"), options.get("score_mod")
    call = _resolved(q, k, v, **options)
    out, lse = _empty_results(call.problem)
    for head in _heads(call, _plain_score_mod(score_mod)):
        out[head.b, head.h], lse[head.b, head.h] = head.out, head.lse
    return _in_layout((out, lse), layout) if return_lse else _in_layout(out, layout)


@documented(Options)
def attention_backward(
    dout: Any, q: Any, k: Any, v: Any, *, dlse: Any = None, aux_grad: Any = (), **options: Unpack[Options]
) -> Gradients[Array]:
    """The gradients of sum(dout * out) + sum(dlse * lse), from the formulas, in float64.

    Writing d for the gradient of that sum, P for the weights before dropout and Z = keep / (1 - dropout_p)::

        out = (P Z) v            dv = (P Z)' dout          dP = Z * (dout v')
        lse                      dlse is given

    With s the scores that enter the softmax and t the sink, P[j] = exp(s[j] - lse) and lse = log(sum exp(s) + exp(t)).
    When s[n] grows, lse grows at the rate P[n] and P[j] at the rate P[j] ([j = n] - P[n]). Hence, in each row::

        ds[n] = P[n] (dP[n] - sum over j of P[j] dP[j] + dlse) = P[n] (dP[n] - delta)
        delta = dout . out - dlse, as sum of P dP = dout . sum of P Z v = dout . out
        dt    = -P_sink delta, P_sink = exp(t - lse): the same for a key whose dP is 0

    and backwards through the steps of the score::

        s = score_mod(s, *aux)   daux += ds * d score_mod / d aux      ds *= d score_mod / d s
        s + bias                 dbias = ds, summed over what was broadcast
        s - slope |i+offset-j|   dslope = -sum of ds |i + offset - j|
        c tanh(s / c)            ds *= 1 - tanh(s / c)**2
        scale q k'               dq = scale ds k                       dk = scale ds' q

    No number of a pair that is not visible is read. A row that sees no key has ds = 0: its dout is ignored, and its
    dlse goes to the sink only, or nowhere if its query is in no sequence. A non-finite number in a visible pair makes
    the gradients that are computed from it non-finite. The derivative of score_mod is its own grad, or is found by dual
    numbers (`numba_attn.userfn.derivative`).

    Parameters
    ----------
    dout : out's shape
        Any of the four float dtypes, like q, k and v.
    q, k, v : as in `attention`
    dlse : lse's shape, optional
    aux_grad : tuple of ints
        Positions in aux of the arrays whose gradient is wanted.
    {options}

    Returns
    -------
    Gradients
        float64, each in the shape and layout of its argument; None for what was not given, and for the arrays of aux
        that aux_grad does not name. daux is None without aux.

    Raises
    ------
    TypeError, ValueError
        As `attention` does, and for a dout, dlse or aux_grad that does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from numba_attn import reference
    >>> q = np.zeros((1, 1, 2, 4))
    >>> v = np.array([1.0, 3.0]).reshape(1, 1, 2, 1)
    >>> reference.attention_backward(np.ones_like(v), q, q, v, causal=True).dv.ravel()  # the sums of the weights
    array([1.5, 0.5])
    """
    check_names(options, attention_backward)
    given: Any = options
    call = _resolved(q, k, v, **options)
    problem, scale, layout = call.problem, call.problem.scale, call.problem.layout
    dout, dlse = check_cotangents(problem, _float64(dout), _float64(dlse))
    wanted = check_aux_grad(aux_grad, problem.aux)

    dq, dk, dv = (np.zeros(x.shape) for x in (problem.q, problem.k, problem.v))
    dbias = None if problem.bias is None else np.zeros(problem.bias.shape)
    dsinks = None if problem.sinks is None else np.zeros(problem.q_heads)
    dslopes = None if problem.slopes is None else np.zeros(problem.slopes.shape)
    daux = tuple(np.zeros(a.shape) if w else None for a, w in zip(problem.aux, wanted, strict=True))
    for head in _heads(call, _score_mod_with_derivatives(problem, wanted)):
        b, h, seen, weights = head.b, head.h, head.seen, head.p * head.z
        with np.errstate(all="ignore"):
            do = dout[b, h]
            dp = head.z * (do @ head.v.T)
            delta = np.where(seen.any(axis=1), (do * head.out).sum(axis=1), 0.0)
            delta = delta - (0.0 if dlse is None else dlse[b, h])
            ds = np.where(seen, head.p * (dp - delta[:, None]), 0.0)
            if dsinks is not None:
                dsinks[h] -= np.where(head.in_sequence, head.p_sink * delta, 0.0).sum()
            for i, j, (n, at), slope in head.reads:
                table = daux[n]
                if table is not None:
                    table.reshape(-1)[at] += ds[i, j] * slope
            ds = ds * head.score_mod_slope
            if dbias is not None:
                dbias[b, h] = ds
            if dslopes is not None:
                dslopes[b % dslopes.shape[0], h] -= (ds * head.distance).sum()
            ds = ds * head.softcap_slope
            dq[b, h] = scale * _product(ds, seen, head.k)
            dk[b, head.kv] += scale * _product(ds.T, seen.T, head.q)
            dv[b, head.kv] += _product(weights.T, seen.T, do)
    return Gradients(
        dq=_in_layout(dq, layout),
        dk=_in_layout(dk, layout),
        dv=_in_layout(dv, layout),
        dbias=None if dbias is None else _summed_to(dbias, np.shape(given["bias"])),
        dsinks=dsinks,
        dalibi_slopes=None if dslopes is None else dslopes.reshape(np.shape(given["alibi_slopes"])),
        daux=daux or None,
    )


@documented(Options)
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
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Any:
    """`attention` and its derivative in a direction (a Jacobian-vector product, forward mode), in float64.

    Writing x_dot for the derivative of x along the direction, the steps of the score give s_dot one after the other,
    and with the weights P, Z = keep / (1 - dropout_p) and the sink t::

        scale q k'               s_dot = scale (q_dot k' + q k_dot')
        c tanh(s / c)            s_dot *= 1 - tanh(s / c)**2
        s + bias                 s_dot += bias_dot
        s - slope |i+offset-j|   s_dot -= slope_dot |i + offset - j|
        score_mod(s, *aux)       s_dot = s_dot * d score_mod / d s + aux_dot * d score_mod / d aux
        lse                      lse_dot = sum of P s_dot + P_sink t_dot
        P                        P_dot = P (s_dot - lse_dot)
        out                      out_dot = sum of P Z (v_dot + (s_dot - lse_dot) v)

    No tangent of a pair that is not visible is read. A row that sees no key has out_dot 0; its lse_dot is that of the
    sink, or 0.

    Parameters
    ----------
    q, k, v : as in `attention`
    q_dot, k_dot, v_dot, bias_dot, sinks_dot, alibi_slopes_dot : float arrays in their argument's shape, or None
        None is a direction of zeros.
    aux_dot : tuple, optional
        An array or None for each array of aux.
    return_lse : bool
        Return lse and its derivative, too.
    {options}

    Returns
    -------
    out, out_dot : float64, in out's shape
        With return_lse: (out, lse), (out_dot, lse_dot).

    Raises
    ------
    TypeError, ValueError
        As `attention` does, and for a tangent that does not fit its argument.

    Examples
    --------
    >>> import numpy as np
    >>> from numba_attn import reference
    >>> q = np.zeros((1, 1, 2, 4))
    >>> v = np.array([1.0, 3.0]).reshape(1, 1, 2, 1)
    >>> out, out_dot = reference.attention_jvp(q, q, v, None, None, np.ones_like(v), causal=True)
    >>> out_dot.ravel()  # weights add up to one
    array([1., 1.])
    """
    check_names(options, attention_jvp)
    call = _resolved(q, k, v, **options)
    problem, layout = call.problem, call.problem.layout
    q_dot, k_dot, v_dot = (
        None if x is None else bhsd_view(x, layout)
        for x in (_tangent(q_dot, q, "q"), _tangent(k_dot, k, "k"), _tangent(v_dot, v, "v"))
    )
    bias_dot = _tangent(bias_dot, options.get("bias"), "bias")
    bias_dot = None if bias_dot is None else over_pairs(bias_dot, "bias_dot", call.shape)
    sinks_dot = _tangent(sinks_dot, options.get("sinks"), "sinks")
    slopes_dot = _tangent(alibi_slopes_dot, options.get("alibi_slopes"), "alibi_slopes")
    slopes_dot = None if slopes_dot is None else np.atleast_2d(slopes_dot)
    tables_dot = tuple(map(_float64, check_aux_tangents(aux_dot, problem.aux)))

    out, lse = _empty_results(problem)
    out_dot, lse_dot = np.zeros(out.shape), np.zeros(lse.shape)
    derivatives = _score_mod_with_derivatives(problem, tuple(x is not None for x in tables_dot))
    for head in _heads(call, derivatives):
        b, h, seen, weights = head.b, head.h, head.seen, head.p * head.z
        with np.errstate(all="ignore"):
            s_dot = np.zeros(seen.shape)
            if q_dot is not None:
                s_dot = s_dot + problem.scale * (q_dot[b, h] @ head.k.T)
            if k_dot is not None:
                s_dot = s_dot + problem.scale * (head.q @ k_dot[b, head.kv].T)
            s_dot = s_dot * head.softcap_slope
            if bias_dot is not None:
                s_dot = s_dot + bias_dot[b, h]
            if slopes_dot is not None:
                s_dot = s_dot - slopes_dot[b % slopes_dot.shape[0], h] * head.distance
            s_dot = s_dot * head.score_mod_slope
            for i, j, (n, at), slope in head.reads:
                table_dot = tables_dot[n]
                if table_dot is not None:
                    s_dot[i, j] += slope * table_dot.reshape(-1)[at]
            s_dot = np.where(seen, s_dot, 0.0)
            lse_dot[b, h] = (head.p * s_dot).sum(axis=1)
            if sinks_dot is not None:
                lse_dot[b, h] += np.where(head.in_sequence, head.p_sink * sinks_dot[h], 0.0)
            out_dot[b, h] = _product(weights * (s_dot - lse_dot[b, h][:, None]), seen, head.v)
            if v_dot is not None:
                out_dot[b, h] += _product(weights, seen, v_dot[b, head.kv])
        out[b, h], lse[b, h] = head.out, head.lse
    if return_lse:
        return _in_layout((out, lse), layout), _in_layout((out_dot, lse_dot), layout)
    return _in_layout(out, layout), _in_layout(out_dot, layout)


# --- a call -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A checked call in float64, with the parts of its mask as they were given: `Problem` has them lowered."""

    problem: Problem
    parts: list[Part]
    align: Align
    shape: Shape


def _resolved(q: Any, k: Any, v: Any, **options: Unpack[Options]) -> _Call:
    q, k, v = _float64(q), _float64(k), _float64(v)
    problem = resolve(q, k, v, **options)
    shape = Shape(problem.batch, problem.q_heads, problem.q_len, problem.kv_len, 4 - np.ndim(q))
    parts = keyword_parts(bool(options.get("causal", False)), window_part(options), options.get("mask"))
    return _Call(problem, parts, check_align(options.get("align"), "align"), shape)


def _float64(x: Any) -> Any:
    """An array of one of the other float dtypes in float64. Anything else is returned unchanged, and the checks refuse
    it."""
    if type(x) not in (np.ndarray, np.memmap) or not x.dtype.isnative:
        return x
    return x.astype(np.float64) if x.dtype.char in "fe" or x.dtype.name == "bfloat16" else x


def _tangent(x: Any, of: Any, name: str) -> Any:
    return _float64(check_tangent(x, of, name))


def _empty_results(problem: Problem) -> tuple[Array, Array]:
    size = (problem.batch, problem.q_heads, problem.q_len)
    return np.zeros((*size, problem.v_dim)), np.full(size, -INF)


def _in_layout(x: Any, layout: str) -> Any:
    """A result, or a tuple of results, in the caller's layout."""
    if isinstance(x, tuple):
        return tuple(_in_layout(one, layout) for one in x)
    return np.ascontiguousarray(in_layout(x, layout))


def _summed_to(x: Array, shape: tuple[int, ...]) -> Array:
    """(B, H, Sq, Sk) summed over the axes along which an array of `shape` was broadcast to it."""
    padded = (1,) * (4 - len(shape)) + shape
    broadcast = tuple(axis for axis in range(4) if padded[axis] == 1)
    with np.errstate(all="ignore"):
        return np.asarray(x.sum(axis=broadcast, keepdims=True).reshape(shape))


# --- one head ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    """The forward pass of one query head, a row for each query, and the derivative of every step of its scores."""

    b: int
    h: int
    kv: int  # the head of k and v that it reads
    q: Array  # (Sq, Dk)
    k: Array  # (Sk, Dk)
    v: Array  # (Sk, Dv)
    seen: Array  # (Sq, Sk): the pairs that are visible
    in_sequence: Array  # (Sq,): the queries that are in a sequence
    distance: Array  # (Sq, Sk): |i + offset - j|, counted within the sequence
    softcap_slope: Array  # (Sq, Sk): d softcap / d score, 0 where not visible
    score_mod_slope: Array  # (Sq, Sk): d score_mod / d score, 0 where not visible
    reads: list[tuple[int, int, tuple[int, int], float]]  # (i, j, (n, at), d score_mod / d aux[n].flat[at])
    p: Array  # (Sq, Sk): the weights before dropout
    p_sink: Array  # (Sq,): the sink's weight
    z: Array  # (Sq, Sk): what dropout multiplies a weight by
    out: Array  # (Sq, Dv)
    lse: Array  # (Sq,)


def _heads(call: _Call, score_mod: Differentiated | None) -> Iterator[_Head]:
    """Every head of every batch row. The derivatives of score_mod are what `score_mod` says."""
    problem, shape = call.problem, call.shape
    visible = dense(call.parts, call.align, shape)
    at = positions(call.parts, shape)
    distance = np.abs((at.i + at.offset(call.align))[:, :, None] - at.j[:, None, :])
    keep = dropout_keep(problem)
    aux = tuple(widened(a) for a in problem.aux)
    group = problem.q_heads // problem.kv_heads
    for b, h in np.ndindex(shape.batch, shape.q_heads):
        q, k, v = problem.q[b, h], problem.k[b, h // group], problem.v[b, h // group]
        seen = visible[b, h]
        in_sequence = at.q_sequence[b] >= 0
        reads: list[tuple[int, int, tuple[int, int], float]] = []
        with np.errstate(all="ignore"):  # non-finite inputs are allowed, so no warnings
            s = problem.scale * (q @ k.T)
            s = np.where(np.isfinite(s), s, np.nan)  # an infinite feature gives no finite score
            softcap_slope = score_mod_slope = np.ones(s.shape)
            if problem.softcap != 0.0:
                t = np.tanh(s / problem.softcap)
                s, softcap_slope = problem.softcap * t, 1.0 - t * t
            if problem.bias is not None:
                added = problem.bias[b, h].astype(np.float64)
                seen = seen & (added != -INF)
                s = s + added
            if problem.slopes is not None:
                s = s - problem.slopes[b % problem.slopes.shape[0], h] * distance[b]
            if score_mod is not None:
                s, score_mod_slope, reads = _modified(s, score_mod, aux, b, h, seen)
                seen = seen & (s != -INF)
            sink = np.where(in_sequence, -INF if problem.sinks is None else problem.sinks[h], -INF)
            p, p_sink, lse = _softmax(s, seen, sink)
            dropped = p * keep[b, h] / (1.0 - problem.dropout_p) if problem.dropout_p > 0.0 else p
            out = _product(dropped, seen, v)
        yield _Head(
            b, h, h // group, q, k, v, seen, in_sequence, distance[b],
            np.where(seen, softcap_slope, 0.0), np.where(seen, score_mod_slope, 0.0), reads,
            p, p_sink, keep[b, h] / (1.0 - problem.dropout_p), out, lse,
        )  # fmt: skip


def _plain_score_mod(score_mod: Any) -> Differentiated | None:
    """score_mod as it is, for the forward pass, which needs no derivatives."""
    if score_mod is None:
        return None
    fn = plain_function(score_mod)
    return lambda *args: (fn(*args), 0.0, {})


def _score_mod_with_derivatives(problem: Problem, aux_grad: tuple[bool, ...]) -> Differentiated | None:
    score_mod = problem.score_mod
    if score_mod is None:
        return None
    if isinstance(score_mod, ScoreMod) and score_mod.grad is not None:
        return differentiated_by_hand(score_mod, aux_grad)
    return differentiated(score_mod)


def _modified(
    s: Array, score_mod: Differentiated, aux: tuple[Array, ...], b: int, h: int, seen: Array
) -> tuple[Array, Array, list[tuple[int, int, tuple[int, int], float]]]:
    """score_mod(s, b, h, i, j, *aux) for the pairs that are seen, d/ds, and d/daux of those that it leaves visible."""
    modified, slope = s.copy(), np.zeros(s.shape)
    reads = []
    for i, j in zip(*(index.tolist() for index in np.nonzero(seen)), strict=True):
        modified[i, j], slope[i, j], elements = score_mod(s[i, j], b, h, i, j, *aux)
        if modified[i, j] != -INF:
            reads += [(i, j, key, one) for key, one in elements.items()]
    return modified, slope, reads


def _softmax(s: Array, seen: Array, sink: Array) -> tuple[Array, Array, Array]:
    """The weights of each row, 0 where not seen, the sink's weight, and the log of their denominator. `sink` (Sq,)
    joins the denominator alone."""
    s = np.where(seen, s, -INF)
    m = np.maximum(s.max(axis=1, initial=-INF), sink)
    m = np.where(m == -INF, 0.0, m)  # an empty row: exp(-inf - 0) is 0, where -inf - -inf would be NaN
    p, p_sink = np.exp(s - m[:, None]), np.exp(sink - m)
    total = p.sum(axis=1) + p_sink
    divisor = np.where(total == 0.0, 1.0, total)
    return p / divisor[:, None], p_sink / divisor, m + np.log(total)


def _product(weights: Array, seen: Array, x: Array) -> Array:
    """weights x over the pairs that are seen. 0 * NaN is NaN, so a row of x that is not finite is added only where it
    is seen."""
    finite = np.asarray(np.isfinite(x).all(axis=1))
    out = np.where(seen, weights, 0.0) @ np.where(finite[:, None], x, 0.0)
    for j in np.flatnonzero(~finite):
        out += np.where(seen[:, j, None], weights[:, j, None] * x[j], 0.0)
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
