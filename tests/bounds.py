"""How far rounding may throw a result: a bound for every number of out, lse, the gradients and the tangents.

The bound comes from the formats and from the order of the kernels' sums, not from a run of anything. It is a running
error analysis (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.3) with roundings as independent
numbers of mean 0 (Higham and Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41,
2019). A rounding moves the result by at most a known size, in units of u, half the spacing of the numbers at 1. A
`Size` keeps two kinds apart:

    squares     the sum of the squares of the sizes of independent roundings. Spread evenly, they add up to more than
                LAMBDA times the root of it with a chance of at most 2 exp(-3 LAMBDA**2 / 2), 8e-11: Hoeffding's
                inequality for numbers whose variance is a third of the largest square.
    certain     the sum of the sizes of those that many terms share, such as the rounding of a constant.

An error is at most u (LAMBDA sqrt(squares) + certain). The root mean square of error / (u sqrt(squares)) over many rows
is 0.58 at most, and is held to 1. Neither depends on the machine.

The order of the sums that a bound holds the kernels to: a score is one chain of additions over the head. A sum over
keys is a chain in a block of at most BLOCK keys, then a chain over blocks. A sum over queries, as in dk and dv, is a
chain over tiles of at least TILE queries. The numbers themselves are computed in float64 from the definition: of a size
two digits are enough.
"""

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from naive import geometry, rounding, sink_scores, visible
from tracked import modified, reads, tangent

from numba_attn import plan, reference

LAMBDA = 4.0
BLOCK = 256  # keys
TILE = 8  # queries
EXP2 = 4.0  # the error of exp2 in u: 1 ulp on a CPU, 2 on a GPU, an ulp being up to 2 u
TANH = 4.0


class Size(NamedTuple):
    """How far a result may be off, in units of u."""

    squares: np.ndarray
    certain: np.ndarray


def unit(acc: np.dtype) -> float:
    """Half the spacing of the numbers of a dtype at 1."""
    return rounding(acc) / 2


# ---- the rule ----


# Products on tensor cores take the weights in the arrays' own dtype: the tests of CUDA say so.
HALF_WEIGHTS = False
MANY = 32  # rows, of which the root mean square of an error says something


def half_weights(p: plan.Problem) -> float:
    """The relative size of the rounding of a weight before its product, 0 where there is none."""
    return rounding(p.dtype) / 2 if HALF_WEIGHTS and p.dtype.itemsize == 2 else 0.0


def within(x: np.ndarray, want: np.ndarray, size: Size, what: str, acc: Any, times: float = 1.0) -> None:
    """x is finite where `want` is and equal where it is not, and no further off than its size and its dtype say.

    times: how many results that are as far off have been compared, 2 where `want` was computed in the same precision.
    """
    assert x.shape == want.shape, f"{what} has shape {x.shape}, the reference {want.shape}"
    u, dtype = times * unit(np.dtype(acc)), x.dtype
    x = x.astype(want.dtype)
    ok = np.isfinite(want)
    odd = ~ok & (x != want) & ~(np.isnan(x) & np.isnan(want))
    assert not odd.any(), f"{what}: {odd.sum()} of {np.sum(~ok)} infinities and NaNs are missing, first at {first(odd)}"
    lost = ok & ~np.isfinite(x)
    assert not lost.any(), f"{what}: {lost.sum()} elements are not finite, first at {first(lost)}"
    want = np.where(ok, want, 0)
    error = np.abs(np.where(ok, x, 0) - want).astype(np.float64)
    certain = u * np.where(ok, size.certain, 0.0) + float(np.finfo(acc).tiny)
    if dtype != acc:  # stored in another format: half a spacing there
        certain = (
            certain * (1 + unit(dtype)) + unit(dtype) * np.abs(want) + float(ml_dtypes.finfo(dtype).smallest_subnormal)
        )
    root = u * np.sqrt(np.where(ok, size.squares, 0.0))
    over = error / (LAMBDA * root + certain)
    assert over.max(initial=0.0) <= 1, (
        f"{what}: {np.sum(over > 1)} of {over.size} errors are too large; at {first(over == over.max())} it is "
        f"{error.flat[over.argmax()]:.3g}, {over.max():.3g} times what is allowed"
    )
    # Rows of the same numbers have the same roundings, and say no more than one of them.
    if math.prod(x.shape[:-1]) >= MANY and ok.any() and np.unique(want[..., 0].astype(np.float32)).size >= MANY:
        excess = np.divide(np.maximum(error - certain, 0.0), root, out=np.zeros_like(error), where=root > 0)
        rms = float(np.sqrt(np.mean(excess**2, where=ok)))
        assert rms <= 1, f"{what}: the root mean square error is {rms:.3g} of the bound's, 0.58 at most expected"


def first(where: np.ndarray) -> tuple[int, ...]:
    return tuple(int(n) for n in np.argwhere(where)[0])


# ---- sums ----


def chains(a: np.ndarray, b: np.ndarray, block: int, step: int = 1) -> np.ndarray:
    """The squares of a @ b: each product and each partial sum of a block is rounded, then, twice a block, the running
    sum, which may be rescaled. step: blocks of that size at least meet the running sum."""
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    squares, whole, part, one = a**2 @ b**2, np.zeros(shape), np.empty(shape), np.empty(shape)
    for first in range(0, a.shape[-1], block):
        part[...] = 0.0
        for m in range(first, min(first + block, a.shape[-1])):
            part += np.multiply(a[..., :, m, None], b[..., None, m, :], out=one)
            squares += np.multiply(part, part, out=one)
            if step > 1 and (m + 1) % step == 0:
                np.add(whole, part, out=one)
                squares += np.multiply(one, one, out=one)
        whole += part
        squares += 2 * whole * whole
    return squares


def t(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(-1, -2)


def moved(weight: np.ndarray, factor: np.ndarray | float, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """sum_j weight[i, j] (factor[i, j] x[j, d] - mean[i, d])**2"""
    weighted, twice = (
        (weight, weight) if isinstance(factor, float) and factor == 1 else (weight * factor, weight * factor**2)
    )
    total = twice @ x**2 - 2 * mean * (weighted @ x) + mean**2 * weight.sum(-1, keepdims=True)
    return np.maximum(total, 0.0)


# ---- scores ----


class Slope(NamedTuple):
    """The derivative of one step of a score by the step before it, and how far off it may be."""

    value: np.ndarray
    squares: np.ndarray
    certain: np.ndarray


class Scores(NamedTuple):
    """Every pair's score in natural units, (B, Hq, Sq, Sk), and how far off it may be."""

    s: np.ndarray  # final, -inf where hidden
    squares: np.ndarray  # of roundings that no other pair has
    shared: np.ndarray  # of those that the pairs of a row share, each in its own way: of the scaled query
    certain: np.ndarray
    capped: Slope | None  # of softcap
    modified: Slope | None  # of score_mod
    before: "Scores | None"  # what score_mod is given


def scores(p: plan.Problem, q: np.ndarray, k: np.ndarray) -> Scores:
    q = q * p.scale
    s = q @ t(k)
    squares, shared, certain = chains(q, t(k), max(1, p.qk_dim)), q**2 @ t(k) ** 2, np.abs(s)
    capped = slope = before = None
    if p.softcap:
        # The argument, the function and the product with softcap are rounded; so are two constants.
        x = s / p.softcap
        th = np.tanh(x)
        by_product = 1 - th * th
        bend = 2 * np.abs(th) * by_product / p.softcap
        capped = Slope(
            by_product,
            bend**2 * (squares + shared + s**2) + (2 * TANH * th * th) ** 2 + th**4 + by_product**2,
            bend * (certain + np.abs(s)),
        )
        shared, certain = by_product**2 * shared, by_product * (certain + np.abs(s))
        squares, s = by_product**2 * (squares + s**2), p.softcap * th
        squares, certain = squares + ((1 + TANH) * s) ** 2, certain + np.abs(s)
    seen = visible(p)
    if p.bias is not None:
        seen &= p.bias != -np.inf
        bias = np.where(p.bias == -np.inf, 0.0, p.bias.astype(np.float64))
        s = s + bias
        squares, certain = squares + bias**2 + s**2, certain + np.abs(bias)
    if p.slopes is not None:
        term = p.slopes[:, :, None, None].astype(np.float64) * np.abs(geometry(p)[1])
        s = s - term
        # The distance beyond 2**24 keys, the slope in log2 units and their product.
        squares, certain = squares + term**2 + s**2, certain + 3 * np.abs(term)
    if p.score_mod is not None:
        # What goes into the function is off, and so is its derivative there.
        s = np.where(np.isfinite(s), s, 0.0)
        before = Scores(s, squares, shared, certain, None, None, None)
        y = modified(p, s)
        slope = Slope(y.slope, y.bend**2 * (squares + shared) + y.slope_squares, np.abs(y.bend) * certain)
        shared, certain = y.slope**2 * shared, np.abs(y.slope) * certain
        squares, s = y.slope**2 * squares + y.squares, y.value
        seen &= s != -np.inf
    s = np.where(seen, s, -np.inf)
    squares, shared, certain = (np.where(seen, x, 0.0) for x in (squares, shared, certain))
    return Scores(s, squares, shared, certain, shown(capped, seen), shown(slope, seen), before)


def shown(slope: Slope | None, seen: np.ndarray) -> Slope | None:
    """0 where a pair is hidden."""
    return None if slope is None else Slope(*(np.where(seen, x, 0.0) for x in slope))


# ---- out and lse ----


class Forward(NamedTuple):
    """What a forward pass computes, and how far off it may be. Rows are (B, Hq, Sq)."""

    scores: Scores
    weights: np.ndarray  # (B, Hq, Sq, Sk), without dropout
    sink: np.ndarray  # the weight of the row's sink, and the squares of its error
    sink_squares: np.ndarray
    kept: np.ndarray | float  # 0 or 1 / (1 - dropout_p), what dropout makes of each
    relative: np.ndarray  # squares of the relative error of a weight that is its own
    out_values: np.ndarray
    out: Size
    lost: np.ndarray  # what a weight below the smallest normal number may lose, in u
    own: np.ndarray  # of out.squares: those of the sums, which no weight has
    lse_values: np.ndarray
    lse: Size


def forward(p: plan.Problem) -> Forward:
    q, k, v = operands(p)
    x = scores(p, q, k)
    sink = sink_scores(p, np.float64)
    m = np.maximum(np.max(x.s, axis=-1, initial=-np.inf, keepdims=True), sink)
    m = np.where(np.isneginf(m), 0.0, m)
    e, e_sink = np.exp(x.s - m), np.exp(sink - m)
    l = e.sum(-1, keepdims=True) + e_sink
    some = np.where(l == 0, 1.0, l)
    weights, sink_weight = e / some, e_sink / some
    kept: np.ndarray | float = reference.dropout_keep(p) / (1 - p.dropout_p) if p.dropout_p else 1.0
    below = np.where(weights > 0, x.s - m, 0.0)
    relative = x.squares + below**2 + EXP2**2
    of_sink = np.where(sink_weight > 0, sink, 0.0)
    of_sink = sink_weight**2 * (of_sink**2 + np.where(sink_weight > 0, sink - m, 0.0) ** 2 + EXP2**2)

    out = (weights * kept) @ v
    sums_l = chains(weights, np.ones((p.kv_len, 1)), BLOCK)
    # The sum, the sum of the weights, 1 / l and its product; under dropout the weight times the chance to stay.
    own = chains(weights * kept, v, BLOCK) + out**2 * (sums_l + 9)
    rounded = (half_weights(p) / unit(np.dtype(p.acc))) ** 2 + (1 if p.dropout_p else 0)
    own = own + rounded * ((weights * kept) ** 2 @ v**2)
    squares = moved(weights**2 * relative + weights * x.shared, kept, v, out) + of_sink * out**2 + own
    tiny = float(np.finfo(p.acc).tiny)
    lost = np.where((x.s > -np.inf) & (weights < 2 * tiny), tiny / unit(np.dtype(p.acc)), 0.0)
    certain = np.sqrt(moved(weights * x.certain**2, kept, v, out)) + (lost * kept) @ np.abs(v)

    with np.errstate(divide="ignore"):
        lse = (m + np.log(l))[..., 0]
    size = np.where(np.isfinite(lse), lse, 0.0)
    lse_squares = (weights**2 * relative + weights * x.shared).sum(-1) + (of_sink + sums_l)[..., 0]
    lse_squares = lse_squares + m[..., 0] ** 2 + 4 * np.log(some[..., 0]) ** 2
    lse_certain = np.sqrt((weights * x.certain**2).sum(-1)) + np.abs(size)
    return Forward(
        x,
        weights,
        sink_weight,
        of_sink,
        kept,
        relative,
        out,
        Size(squares, certain),
        lost,
        own,
        lse,
        Size(lse_squares, lse_certain),
    )


def operands(p: plan.Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k and v in float64, a head of K and V for each of the queries'."""
    group = p.q_heads // max(p.kv_heads, 1)
    q, k, v = (x.astype(np.float64) for x in (p.q, np.repeat(p.k, group, 1), np.repeat(p.v, group, 1)))
    return q, k, v


# ---- gradients ----


class Weighed(NamedTuple):
    """ds of every pair, weight times (dp - delta), by one score or another, and how far off it may be."""

    ds: np.ndarray
    squares: np.ndarray  # of the pair's own roundings
    shared: np.ndarray  # of those that the pairs of a row share, but each in its own way: of a scaled query
    certain: np.ndarray
    by_delta: np.ndarray  # the derivative of ds by its row's delta

    def times(self, slope: Slope | None) -> "Weighed":
        """By the chain rule."""
        if slope is None:
            return self
        value, squares, certain = slope
        ds = self.ds * value
        return Weighed(
            ds,
            value**2 * self.squares + self.ds**2 * squares + ds**2,
            value**2 * self.shared,
            np.abs(value) * self.certain + np.abs(self.ds) * certain,
            self.by_delta * value,
        )


class Rows(NamedTuple):
    """What all pairs of a row share, (B, Hq, Sq, 1)."""

    delta: Size
    lse: Size


def backward(
    p: plan.Problem, dout: np.ndarray, dlse: np.ndarray | None, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Size]:
    """How far off dq, dk, dv, and dbias, dsinks, dalibi_slopes, daux0, ... of the given shapes, may be.

    dout is (B, Hq, Sq, Dv) and dlse (B, Hq, Sq).
    """
    q, k, v = operands(p)
    f, dout = forward(p), dout.astype(np.float64)
    x, weights, kept, acc = f.scores, f.weights, f.kept, unit(np.dtype(p.acc))
    lse = np.where(np.isfinite(f.lse_values), f.lse_values, 0.0)[..., None]
    coarse = (half_weights(p) / acc) ** 2

    dp, dots = dout @ t(v), (dout * f.out_values).sum(-1, keepdims=True)
    delta = dots if dlse is None else dots - dlse[..., None]
    rows = Rows(of_delta(p, f, dout, dp, delta), Size(f.lse.squares[..., None] + 2 * lse**2, f.lse.certain[..., None]))
    # A weight anew, from a score and lse.
    below = np.where(weights > 0, x.s - lse, 0.0)
    relative = x.squares + below**2 + EXP2**2
    difference = kept * dp - delta
    ds = weights * difference
    own = weights**2 * (np.asarray(kept) ** 2 * (chains(dout, t(v), max(1, p.v_dim)) + dp**2) + 2 * difference**2)
    final = Weighed(
        ds, own + ds**2 * relative, ds**2 * x.shared, np.abs(ds) * x.certain + f.lost * np.abs(difference), weights
    )
    last = final.times(x.modified)  # by the score that goes into score_mod
    product = last.times(x.capped)
    found = {}

    def add(name: str, squares: np.ndarray, certain: np.ndarray) -> None:
        found[name] = Size(squares, certain)

    # dq = scale sum_j ds k
    by_row = product.squares @ k**2 + coarse * product.ds**2 @ k**2 + chains(product.ds, k, BLOCK)
    by_row += np.abs(product.ds).sum(-1, keepdims=True) * (ratio(product.shared, product.ds) @ k**2)
    moves, dq = product.by_delta @ k, product.ds @ k
    by_row += rows.delta.squares * moves**2 + rows.lse.squares * dq**2
    certain = product.certain @ np.abs(k) + rows.delta.certain * np.abs(moves) + rows.lse.certain * np.abs(dq)
    add("dq", p.scale**2 * (by_row + 2 * dq**2), abs(p.scale) * (certain + 2 * np.abs(dq)))

    # dk = scale sum_i ds q and dv = sum_i p dout: what a row shares is one of many terms.
    def by_key(x: np.ndarray) -> np.ndarray:
        """(B, Hq, Sq, n) -> (B, Hkv, group Sq, n)"""
        return x.reshape(p.batch, p.kv_heads, p.q_heads // p.kv_heads * p.q_len, x.shape[-1])

    squares = product.squares + product.shared + coarse * product.ds**2
    squares = squares + product.by_delta**2 * rows.delta.squares + product.ds**2 * rows.lse.squares
    certain = product.certain + np.abs(product.by_delta) * rows.delta.certain + np.abs(product.ds) * rows.lse.certain
    ds, squares, certain, q, dout = map(by_key, (product.ds, squares, certain, q, dout))
    dk = t(ds) @ q
    squares = t(squares) @ q**2 + chains(t(ds), q, BLOCK, TILE) + 2 * dk**2
    add("dk", p.scale**2 * squares, abs(p.scale) * (t(certain) @ np.abs(q) + 2 * np.abs(dk)))
    of_weight = relative + x.shared + rows.lse.squares + coarse + (1 if p.dropout_p else 0)
    weight, of_weight, certain = map(by_key, (weights * kept, of_weight, x.certain + rows.lse.certain))
    squares = t(weight**2 * of_weight) @ dout**2 + chains(t(weight), dout, BLOCK, TILE)
    add("dv", squares, t(weight * certain + by_key(f.lost * kept)) @ np.abs(dout))

    if "dbias" in shapes:
        size = summed(last, rows, np.ones_like(last.ds), shapes["dbias"], p)
        add("dbias", *(x.reshape(shapes["dbias"]) for x in size))
    if "dalibi_slopes" in shapes:
        shape = (*shapes["dalibi_slopes"], 1, 1)
        distance = np.broadcast_to(np.abs(geometry(p)[1]).astype(np.float64), last.ds.shape)
        size = summed(last, rows, distance, shape, p)
        add("dalibi_slopes", *(x.reshape(shapes["dalibi_slopes"]) for x in size))
    if "dsinks" in shapes:
        found["dsinks"] = of_sinks(p, f, rows, delta)
    for n, array in enumerate(p.aux):
        if f"daux{n}" in shapes:
            squares, certain = of_aux(p, x, final, rows, n)
            add(f"daux{n}", squares.reshape(array.shape), certain.reshape(array.shape))
    return found


def of_delta(p: plan.Problem, f: Forward, dout: np.ndarray, dp: np.ndarray, delta: np.ndarray) -> Size:
    """dout . out - dlse. It takes out as stored, whose error is made of those of the weights and of the sums."""
    dots = (dout * f.out_values).sum(-1, keepdims=True)
    difference = f.kept * dp - dots
    stored = (rounding(p.dtype) / 2 / unit(np.dtype(p.acc))) ** 2
    squares = (f.weights**2 * f.relative + f.weights * f.scores.shared) * difference**2
    squares = squares.sum(-1, keepdims=True) + (dout**2 * (f.own + stored * f.out_values**2)).sum(-1, keepdims=True)
    squares = squares + chain_of_terms(dout * f.out_values) + delta**2
    return Size(squares, np.sqrt((f.weights * (f.scores.certain * difference) ** 2).sum(-1, keepdims=True)))


def of_sinks(p: plan.Problem, f: Forward, rows: Rows, delta: np.ndarray) -> Size:
    """The sum of weight times delta over batch and queries, the weight anew from lse."""
    assert p.sinks is not None
    below = np.where(f.sink > 0, p.sinks.astype(np.float64)[:, None, None] - f.lse_values[..., None], 0.0)
    term = np.abs(f.sink * delta)
    squares = term**2 * (rows.lse.squares + below**2 + EXP2**2) + f.sink**2 * rows.delta.squares
    squares = squares.sum((0, 2, 3)) + chain_of_terms(f.sink * delta, (0, 2, 3)).reshape(-1)
    return Size(squares, (term * rows.lse.certain + f.sink * rows.delta.certain).sum((0, 2, 3)))


def of_aux(p: plan.Problem, x: Scores, final: Weighed, rows: Rows, n: int) -> Size:
    """The sum over pairs of ds times the derivative of score_mod by each element of aux[n], which are in a row."""
    assert x.before is not None
    size, found = p.aux[n].size, list(reads(p, x.before.s, n))
    squares, certain, total, count = (np.zeros(size) for _ in range(4))
    for read in found:
        seen = np.isfinite(x.s) & (read.element >= 0)
        at = np.nonzero(seen)
        element, ds, by = read.element[at], final.ds[at], read.value[at]
        # Pairs of a row that read one element: what the row shares meets their sum.
        row = np.ravel_multi_index(at[:3], seen.shape[:3])
        places, place = np.unique(row * size + element, return_inverse=True)
        row, to = places // size, places % size

        def summed_up(values: np.ndarray, place: np.ndarray = place) -> np.ndarray:
            return np.bincount(place, values)

        before, bend = (x.before.squares + x.before.shared)[at], read.bend[at]
        own = by**2 * (final.squares[at] + ds**2) + ds**2 * (read.squares[at] + bend**2 * before)
        own = summed_up(own) + summed_up(np.abs(ds * by)) * summed_up(np.abs(by) * ratio(final.shared[at], ds))
        by_delta, by_lse = np.abs(summed_up(final.by_delta[at] * by)), np.abs(summed_up(ds * by))
        delta, lse = ((of.squares.reshape(-1)[row], of.certain.reshape(-1)[row]) for of in rows)
        own += delta[0] * by_delta**2 + lse[0] * by_lse**2
        sure = summed_up(np.abs(by) * final.certain[at] + np.abs(ds * bend) * x.before.certain[at])
        squares += np.bincount(to, own, size)
        certain += np.bincount(to, sure + delta[1] * by_delta + lse[1] * by_lse, size)
        total += np.bincount(element, np.abs(ds * by), size)
        count += np.bincount(element, minlength=size)
    # A pair's reads of one element share the roundings of the pair. The sum is one of float64, in any order.
    squares = max(1, len(found)) * squares + (count * total**2 if p.acc is np.float64 else 0.0)
    return Size(squares, certain)


def ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / |y|, 0 where y is."""
    return np.divide(x, np.abs(y), out=np.zeros_like(x), where=y != 0)


def chain_of_terms(x: np.ndarray, axis: tuple[int, ...] = (-1,)) -> np.ndarray:
    """The squares of a sum over the axes, one chain of products: those of each product and each partial sum."""
    axes = tuple(n % x.ndim for n in axis)
    rest = [n for n in range(x.ndim) if n not in axes]
    kept, terms = [x.shape[n] for n in rest], math.prod(x.shape[n] for n in axes)
    flat = x.transpose(*rest, *axes).reshape(*kept, terms)
    squares = (np.cumsum(flat, axis=-1) ** 2 + flat**2).sum(-1)
    return squares.reshape([1 if n in axes else x.shape[n] for n in range(x.ndim)])


def summed(ds: Weighed, rows: Rows, factor: np.ndarray, shape: tuple[int, ...], p: plan.Problem) -> Size:
    """The sum of ds times a factor over what an array of `shape` was broadcast along.

    The kernels sum in float64, so the sum itself counts where that is their precision.
    """
    shape = (1,) * (4 - len(shape)) + shape
    axes = tuple(n for n, size in enumerate(shape) if size == 1)

    def over_keys(x: np.ndarray) -> np.ndarray:
        return x.sum(-1, keepdims=True) if 3 in axes else x

    def over_rows(x: np.ndarray) -> np.ndarray:
        return x.sum(tuple(n for n in axes if n < 3), keepdims=True).reshape(shape)

    by_delta, by_lse = over_keys(ds.by_delta * factor), over_keys(ds.ds * factor)
    squares = over_keys((ds.squares + ds.ds**2) * factor**2)
    # By Cauchy's inequality, for what pairs share in ways of their own.
    squares = squares + over_keys(np.abs(ds.ds) * factor) * over_keys(ratio(ds.shared, ds.ds) * factor)
    squares = squares + rows.delta.squares * by_delta**2 + rows.lse.squares * by_lse**2
    certain = over_keys(ds.certain * factor)
    certain = certain + rows.delta.certain * np.abs(by_delta) + rows.lse.certain * np.abs(by_lse)
    squares, certain = over_rows(squares), over_rows(certain)
    if p.acc is np.float64:
        squares = squares + chain_of_terms(ds.ds * factor, axes).reshape(shape) if axes else squares
    return Size(squares, certain)


# ---- tangents ----


class Dots(NamedTuple):
    """Directions, (B, H, S, D) and as bias, sinks and slopes are; None for none."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None = None
    sinks: np.ndarray | None = None
    slopes: np.ndarray | None = None
    aux: tuple[np.ndarray | None, ...] | None = None


def tangents(p: plan.Problem, f: Forward, dots: Dots) -> tuple[Size, Size]:
    """How far off the tangents of out and lse may be; f: the problem's forward pass."""
    q, k, v = operands(p)
    x, weights, kept, out = f.scores, f.weights, f.kept, f.out_values
    group = p.q_heads // max(p.kv_heads, 1)
    q_dot, k_dot, v_dot = (
        y.astype(np.float64) for y in (dots.q, np.repeat(dots.k, group, 1), np.repeat(dots.v, group, 1))
    )

    # The score's tangent: two products, the chain rule, what bias and slopes add.
    q_dot, q = q_dot * p.scale, q * p.scale
    one, two = q_dot @ t(k), q @ t(k_dot)
    s_dot, n = one + two, max(1, p.qk_dim)
    squares = chains(q_dot, t(k), n) + chains(q, t(k_dot), n) + s_dot**2 + 2 * two**2
    shared, certain = q_dot**2 @ t(k) ** 2 + q**2 @ t(k_dot) ** 2, np.abs(one) + 3 * np.abs(two)
    s_dot, squares, shared, certain = along(x.capped, s_dot, squares, shared, certain)
    if dots.bias is not None:
        s_dot = s_dot + dots.bias.astype(np.float64)
        squares = squares + s_dot**2
    if dots.slopes is not None:
        term = dots.slopes.astype(np.float64).reshape(-1, p.q_heads)[:, :, None, None] * np.abs(geometry(p)[1])
        s_dot = s_dot - term
        squares, certain = squares + term**2 + s_dot**2, certain + 2 * np.abs(term)

    if dots.aux is None or x.before is None:
        s_dot, squares, shared, certain = along(x.modified, s_dot, squares, shared, certain)
    else:
        assert x.modified is not None
        y, slope = tangent(p, x.before.s, s_dot, dots.aux), x.modified.value
        squares = slope**2 * squares + y.bend**2 * (x.before.squares + x.before.shared) + y.squares
        shared, certain = slope**2 * shared, np.abs(slope) * certain + np.abs(y.bend) * x.before.certain
        s_dot = np.where(np.isfinite(x.s), y.value, 0.0)
        squares, certain = (np.where(np.isfinite(x.s), z, 0.0) for z in (squares, certain))

    # c = sum p s_dot is the tangent of lse; out_dot = sum p kept (v_dot + s_dot v) - c out
    p_dot = weights * s_dot
    c = p_dot.sum(-1, keepdims=True)
    relative, column = f.relative, np.ones((p.kv_len, 1))
    sink_dot = 0.0 if dots.sinks is None else dots.sinks.astype(np.float64)[:, None, None]
    c = c + f.sink * sink_dot
    of_weight, of_shared = weights**2 * relative, weights * x.shared
    c_squares = moved(of_weight + of_shared, s_dot, column, c) + ((weights**2 * squares + p_dot**2) @ column)
    c_squares += (
        (weights * shared) @ column + chains(p_dot, column, BLOCK) + c**2 * (chains(weights, column, BLOCK) + 9)
    )
    c_squares += f.sink_squares * (sink_dot - c) ** 2 + (f.sink * sink_dot) ** 2
    c_certain = np.sqrt(moved(weights * x.certain**2, s_dot, column, c)) + weights * certain @ column

    both = (weights * kept) @ v_dot + (p_dot * kept) @ v
    a_squares = 2 * moved(of_weight + of_shared, kept, v_dot, 0 * out) + 2 * moved(
        of_weight + of_shared, kept * s_dot, v, 0 * out
    )
    a_squares = a_squares + both**2 * ((of_weight + of_shared).sum(-1, keepdims=True) + f.sink_squares)
    a_squares += (np.asarray(kept) ** 2 * (weights**2 * squares + weights * shared + 2 * p_dot**2)) @ v**2
    a_squares += chains(weights * kept, v_dot, BLOCK) + chains(p_dot * kept, v, BLOCK) + 9 * both**2
    a_certain = np.sqrt(moved(weights * x.certain**2, kept * s_dot, v, 0 * out)) + np.sqrt(
        moved(weights * x.certain**2, kept, v_dot, 0 * out)
    )
    a_certain = a_certain + np.abs(both) * np.sqrt((weights * x.certain**2).sum(-1, keepdims=True))
    a_certain = a_certain + (weights * kept * certain) @ np.abs(v)
    # Three parts whose roundings are not independent of one another: their roots add up.
    squares = 3 * (a_squares + out**2 * c_squares + c**2 * f.out.squares + (c * out) ** 2)
    certain = a_certain + np.abs(out) * c_certain + np.abs(c) * f.out.certain
    return Size(squares, certain), Size(c_squares[..., 0], c_certain[..., 0])


def along(slope: Slope | None, x: np.ndarray, *of: np.ndarray) -> tuple[np.ndarray, ...]:
    """x times a derivative, and its (squares, shared, certain)."""
    squares, shared, certain = of
    if slope is None:
        return x, squares, shared, certain
    value, y = slope.value, x * slope.value
    squares = value**2 * squares + x**2 * slope.squares + y**2
    return y, squares, value**2 * shared, np.abs(value) * certain + np.abs(x) * slope.certain
