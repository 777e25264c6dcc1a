"""The gradients against the float64 reference and against central differences, over every feature, stride and error.

The rule is `check`: a gradient is finite, has its argument's shape and dtype, and each number of it is no further off
than its own roundings can throw it (bounds.py).
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import bounds
import numpy as np
import pytest
import seeds
from bounds import Size, first, within
from cases import (
    BY_NAME,
    CASES,
    DTYPES,
    Case,
    build,
    draw,
    variant,
)
from hypothesis import given, settings
from naive import backward as naive
from naive import resolve
from test_attention import FORMS, STRIDED, from_bhsd, problems

import numba_attn as na
from numba_attn.gradients import Gradients
from numba_attn.plan import bhsd_view


def float_aux(options: dict[str, Any]) -> tuple[int, ...]:
    """The positions in aux that can have a gradient."""
    if "score_mod" not in options:
        return ()
    return tuple(n for n, a in enumerate(options.get("aux", ())) if a.dtype.kind not in "iub")


def cotangents(q: np.ndarray, v: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(dout, dlse) for these arguments, in every layout."""
    rng = seeds.generator(seed)
    lse_dtype = np.float64 if q.dtype == np.float64 else np.float32
    dout = rng.standard_normal((*q.shape[:-1], v.shape[-1])).astype(q.dtype)
    return dout, rng.standard_normal(q.shape[:-1]).astype(lse_dtype)


def entries(grads: Gradients) -> Iterator[tuple[str, np.ndarray]]:
    """What is there: ("dq", array), ..., ("daux0", array)."""
    for name, x in grads._asdict().items():
        if name == "daux":
            yield from ((f"daux{n}", a) for n, a in enumerate(x or ()) if a is not None)
        elif x is not None:
            yield name, x


def argument(name: str, arrays: tuple[np.ndarray, ...], options: dict[str, Any]) -> np.ndarray:
    """What the gradient of this name is the gradient of."""
    if name.startswith("daux"):
        return options["aux"][int(name[4:])]
    given_ = dict(zip("qkv", arrays, strict=True)) | options
    return given_[name[1:]]


def check(
    arrays: tuple[np.ndarray, ...],
    options: dict[str, Any],
    dout: np.ndarray | None = None,
    dlse: np.ndarray | None = None,
) -> Gradients:
    """The library's gradients for these arguments, held to the reference."""
    q, k, v = arrays
    if dout is None:
        dout, dlse = cotangents(q, v)
    aux_grad, layout = float_aux(options), options.get("layout", "bhsd")
    _, pullback = na.attention_vjp(q, k, v, **options, aux_grad=aux_grad, return_lse=True)
    grads = pullback(dout, dlse)
    want = na.reference.attention_backward(dout, q, k, v, dlse=dlse, aux_grad=aux_grad, **options)
    names = [name for name, _ in entries(grads)]
    assert names == [name for name, _ in entries(want)]
    assert (grads.daux is None) == (want.daux is None)

    problem = resolve(q, k, v, **options)
    shapes = {name: x.shape for name, x in entries(grads) if name not in ("dq", "dk", "dv")}
    rows = None if dlse is None else bhsd_view(dlse[..., None], layout)[..., 0]
    sizes = bounds.backward(problem, bhsd_view(dout, layout), rows, shapes)
    exact: dict[str, np.ndarray] = {}
    times = 1.0
    if q.dtype == np.float64:  # the reference is no better than the kernel
        if "score_mod" in options:
            times = 2.0
        else:
            exact = naive(np.longdouble, dout, dlse, q, k, v, **options)
    for (name, x), (_, y) in zip(entries(grads), entries(want), strict=True):
        of = argument(name, arrays, options)
        assert x.shape == of.shape and x.dtype == of.dtype, f"{name} is {x.shape}, {x.dtype}"
        assert type(x) is np.ndarray and x.flags.writeable
        assert np.isfinite(y).all(), f"{name}: the reference is not finite"
        size, right = sizes[name], exact.get(name, y)
        if name in ("dq", "dk", "dv"):
            size = Size(*(from_bhsd(part, layout) for part in size))
            right = from_bhsd(exact[name], layout) if exact else right
        if exact:
            within(y, right, size, f"the reference's {name}", problem.acc)
        within(x, right, size, name, problem.acc, times)
    return grads


def largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    check(*build(case))


PLAIN = [case.name for case in CASES if case.name.startswith(("head-59", "layout", "gqa", "empty", "lengths", "sinks"))]


@pytest.mark.parametrize("name", ["dv-larger", "everything", "dropout-float16", "score-mod-two-tables", *PLAIN])
def test_attention_backward_is_the_pullback(name: str) -> None:
    """From (out, lse) of `attention`, without dlse as with dlse of zeros; and with out= and without return_lse."""
    arrays, options = build(BY_NAME[name])
    out, lse = na.attention(*arrays, **options, return_lse=True)
    dout, dlse = cotangents(arrays[0], arrays[2])
    extra = {"aux_grad": float_aux(options)}
    for row in (dlse, None):
        (vjp_out, vjp_lse), pullback = na.attention_vjp(*arrays, **options, **extra, return_lse=True)
        assert vjp_out.tobytes() == out.tobytes() and vjp_lse.tobytes() == lse.tobytes()
        want = pullback(dout, row)
        same(na.attention_backward(dout, *arrays, out, lse, dlse=row, **options, **extra), want)
    place = np.full_like(out, np.nan)
    only_out, pullback = na.attention_vjp(*arrays, **options, **extra, out=place)
    assert only_out is place and place.tobytes() == out.tobytes()
    same(pullback(dout), want)
    zeros = pullback(dout, dlse=np.zeros_like(lse))
    for (name, x), (_, y) in zip(entries(zeros), entries(want), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)  # a zero may change its sign


def same(got: Gradients, want: Gradients, what: str = "") -> None:
    """To the last bit."""
    assert [name for name, _ in entries(got)] == [name for name, _ in entries(want)]
    for (name, x), (_, y) in zip(entries(got), entries(want), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, f"{what} {name}"
        a, b = (np.ascontiguousarray(z).view(f"u{z.itemsize}") for z in (x, y))
        assert (a == b).all(), f"{what} {name}: {np.sum(a != b)} of {x.size} differ, first at {first(a != b)}"


def test_none_for_what_was_not_given() -> None:
    arrays, options = build(BY_NAME["everything"])
    q, _, v = arrays
    dout, _ = cotangents(q, v)
    for left_out in ("bias", "sinks", "alibi_slopes", "score_mod"):
        given_ = {name: x for name, x in options.items() if name != left_out}
        if left_out == "score_mod":
            del given_["aux"]
        grads = na.attention_vjp(*arrays, **given_)[1](dout)
        none = {name for name, x in grads._asdict().items() if x is None}
        assert none == ({"daux"} if left_out == "score_mod" else {f"d{left_out}"})
    assert na.attention_vjp(*arrays, **options)[1](dout).daux == (None,)
    arrays, options = build(BY_NAME["score-mod-two-tables"])
    dout, _ = cotangents(arrays[0], arrays[2])
    for asked in ((), (0,), (1,), (1, 0), [0]):
        daux = na.attention_vjp(*arrays, **options, aux_grad=asked)[1](dout).daux
        assert [x is not None for x in daux] == [0 in asked, 1 in asked]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dlse_of_any_dtype(dtype: str) -> None:
    """And dlse alone: with dout 0 the gradients are those of lse."""
    arrays, options = build(variant("sinks", name="dlse", dtype=dtype))
    q, _, v = arrays
    dout, dlse = cotangents(q, v)
    for other in DTYPES.values():
        row = dlse.astype(other)
        check(arrays, options, dout, row)
    grads = check(arrays, options, np.zeros_like(dout), dlse)
    assert (grads.dv == 0).all() and (grads.dq != 0).any()


# ---- strides ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_strides_of_inputs(form: Any, dtype: str) -> None:
    """q, k, v and dout, and out and lse of a forward pass kept in any memory."""
    arrays, options = build(replace(STRIDED, dtype=dtype))
    dout, dlse = cotangents(arrays[0], arrays[2])
    out, lse = na.attention(*arrays, **options, return_lse=True)
    want = na.attention_backward(dout, *arrays, out, lse, dlse=dlse, **options)
    plain = [dout, *arrays, out]
    formed = [form(x) for x in plain]
    rows = [form(x[..., None])[..., 0] for x in (lse, dlse)]
    before = [x.tobytes() for x in (*formed, *rows)]
    same(na.attention_backward(*formed, rows[0], dlse=rows[1], **options), want, "all")
    assert [x.tobytes() for x in (*formed, *rows)] == before
    for n, what in enumerate(("dout", "q", "k", "v", "out")):
        mixed = [x if m != n else formed[m] for m, x in enumerate(plain)]
        same(na.attention_backward(*mixed, lse, dlse=dlse, **options), want, what)


def test_broadcast_inputs() -> None:
    """Zero strides; the gradients are those of an array of the full shape. A dout of ones takes one number."""
    rng = seeds.generator(3)
    q = np.broadcast_to(draw(rng, (2, 1, 63, 40), "normal", DTYPES["float32"]), (2, 4, 63, 40))
    k = np.broadcast_to(draw(rng, (1, 2, 203, 40), "normal", DTYPES["float32"]), (2, 2, 203, 40))
    v = np.broadcast_to(draw(rng, (2, 2, 1, 33), "normal", DTYPES["float32"]), (2, 2, 203, 33))
    dout, dlse = np.broadcast_to(np.float32(1), (2, 4, 63, 33)), np.broadcast_to(np.float32(-0.5), (2, 4, 63))
    options = {"causal": True, "align": "top_left"}
    grads = check((q, k, v), options, dout, dlse)
    want = na.attention_vjp(q.copy(), k.copy(), v.copy(), **options)[1](dout.copy(), dlse.copy())
    same(grads, want)


def test_strides_of_options() -> None:
    """bias, mask, sinks, slopes and aux in any memory; a bias that the caller broadcast has a full gradient."""
    arrays, options = build(BY_NAME["everything"])
    dout, dlse = cotangents(arrays[0], arrays[2])
    want = na.attention_vjp(*arrays, **options, aux_grad=(0,))[1](dout, dlse)
    for form in (np.asfortranarray, lambda x: np.flip(np.flip(x).copy()), lambda x: np.repeat(x, 2, -1)[..., ::2]):
        again = options | {name: form(options[name]) for name in ("bias", "sinks", "alibi_slopes")}
        again["aux"] = (form(options["aux"][0]),)
        same(na.attention_vjp(*arrays, **again, aux_grad=(0,))[1](dout, dlse), want)
    arrays, options = build(BY_NAME["bias-heads"])
    dout, dlse = cotangents(arrays[0], arrays[2])
    full = np.broadcast_to(options["bias"], (2, 4, 63, 203))
    dbias = na.attention_vjp(*arrays, bias=full)[1](dout, dlse).dbias
    narrow = na.attention_vjp(*arrays, **options)[1](dout, dlse).dbias
    np.testing.assert_allclose(dbias.sum(0), narrow, rtol=0, atol=1e-5)


@given(problems())
@settings(max_examples=60)
def test_drawn_problem(problem: tuple[tuple[np.ndarray, ...], dict[str, Any]]) -> None:
    """The forward's problems: every dtype, stride, layout, broadcast and offset."""
    check(*problem)


# ---- numbers at the limit ----


@pytest.mark.parametrize("dims", [(16, 8), (16, 1)])
def test_a_visible_value_row_of_nan(dims: tuple[int, int]) -> None:
    """Where every number of a row of out is NaN, the row still does not pass for one that sees nothing."""
    rng = seeds.generator(0)
    q, k = (rng.standard_normal((1, 2, 6, dims[0])).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((1, 2, 6, dims[1])).astype(np.float32)
    v[:, :, 2] = np.nan
    options = dict(causal=True, sinks=np.zeros(2, np.float32))
    _, pullback = na.attention_vjp(q, k, v, **options)
    dout = np.ones_like(v)
    got, want = pullback(dout), na.reference.attention_backward(dout, q, k, v, **options)
    for name, x, y in zip(got._fields, got, want, strict=True):
        if y is not None:
            assert (np.isfinite(x) == np.isfinite(y)).all(), name


@pytest.mark.parametrize("factor", [1e3, 1e5, 1e8, 1e10])
def test_weights_stay_weights(factor: float) -> None:
    """lse is a rounded number: with scores of 1e8 it may be smaller than the largest of them by 8."""
    rng = seeds.generator(0)
    q, k, v, dout = (rng.standard_normal((1, 1, 64, 16)).astype(np.float32) for _ in range(4))
    q *= np.float32(factor)
    _, pullback = na.attention_vjp(q, k, v)
    grads = pullback(dout)
    assert np.isfinite(grads.dq).all() and np.isfinite(grads.dk).all()
    assert np.abs(grads.dv).sum() <= np.abs(dout).sum() * 16 and np.abs(grads.dv).max() <= np.abs(dout).sum()


def test_saturated_rows_lose_no_more_than_the_rounding_of_lse() -> None:
    """Two keys share a row, and their scores are exact in log2 units. lse is rounded to float32 once, and the weights
    of 1/2 are found again from it: the log sum is made in float64, where a product in float32 may miss by 2**-17."""
    scores = 63 + np.arange(28 * 64) / 64
    q, k = np.zeros((1, scores.size, 1, 8), np.float32), np.zeros((1, scores.size, 5, 8), np.float32)
    q[0, :, 0, 0], k[0, :, :2, 0] = scores, 1
    v, dout = (seeds.generator(n).standard_normal((1, scores.size, n, 8)).astype(np.float32) for n in (5, 1))
    (_, lse), pullback = na.attention_vjp(q, k, v, scale=math.log(2), return_lse=True)
    np.testing.assert_array_equal(lse[0, :, 0], (scores * math.log(2) + math.log(2)).astype(np.float32))
    np.testing.assert_array_equal(pullback(dout).dv[:, :, :2], np.repeat(dout / 2, 2, axis=2))


def test_softcap_with_an_infinite_inverse_is_refused() -> None:
    x = np.ones((1, 1, 4, 8), np.float32)
    with pytest.raises(ValueError, match="softcap is 1e-39"):
        na.attention(x, x, x, softcap=1e-39)


def test_return_lse_is_a_bool() -> None:
    x = np.ones((1, 1, 4, 8))
    with pytest.raises(TypeError, match="return_lse is 2"):
        na.attention_vjp(x, x, x, return_lse=2)


def test_float16_gradients_overflow_silently() -> None:
    x, bias = np.ones((1, 1, 64, 8), np.float16), np.zeros((1, 1), np.float16)
    v = (np.arange(64)[:, None] * np.ones((1, 1, 64, 8))).astype(np.float16)
    _, pullback = na.attention_vjp(x, x, v, sinks=np.zeros(1, np.float16), bias=bias)
    grads = pullback(np.full((1, 1, 64, 8), 6e4, np.float16))
    assert np.isinf(grads.dsinks).all()


# ---- a table that is learned ----


def t5(s, b, h, i, j, table):
    """A bias for each bucket of the distance, exact up to 4 and logarithmic beyond (Raffel et al. 2020)."""
    distance = i - j
    bucket = 8 if distance < 0 else 0
    distance = abs(distance)
    if distance < 4:
        bucket += distance
    else:
        bucket += min(4 + int(math.log((distance + 0.5) / 4) / math.log(4.0) * 4), 7)
    return s + table[bucket, h]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_relative_position_table_is_learned(dtype: str) -> None:
    """T5's table, found again by gradient descent from what attention with it gave."""
    rng = seeds.generator(0)
    q, k, v = (rng.standard_normal((4, heads, 70, 24)).astype(dtype) for heads in (4, 2, 2))
    wanted, table = rng.standard_normal((16, 4)).astype(dtype), np.zeros((16, 4), dtype)
    target = na.attention(q, k, v, score_mod=t5, aux=(wanted,))
    losses, mean, square = [], np.zeros_like(table), np.zeros_like(table)
    for n in range(1, 61):
        out, pullback = na.attention_vjp(q, k, v, score_mod=t5, aux=(table,), aux_grad=(0,))
        losses.append(float(((out - target) ** 2).sum() / 2))
        grads = pullback(out - target)
        if len(losses) == 1:
            check((q, k, v), {"score_mod": t5, "aux": (table,)}, out - target)
        mean, square = 0.9 * mean + 0.1 * grads.daux[0], 0.99 * square + 0.01 * grads.daux[0] ** 2  # Adam
        step = mean / (1 - 0.9**n) / (np.sqrt(square / (1 - 0.99**n)) + 1e-8)
        table = (table - 0.1 * step).astype(dtype)
    assert losses[-1] < 1e-2 * losses[0]
    # Bucket 8 has no distance, and a constant for a whole head changes no weight: the rest is known.
    found, hidden = (np.delete(x, 8, axis=0) for x in (table, wanted))
    found, hidden = (x - x.mean(axis=0) for x in (found, hidden))
    assert np.abs(found - hidden).mean() < 0.25 * np.abs(hidden).mean()


# ---- long sums ----


def dense_in_blocks(
    dtype: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, block: int
) -> dict[str, np.ndarray]:
    """What dense NumPy makes of one head (S, D): every sum in one matrix product, a block of rows of its result at a
    time."""
    t = np.dtype(dtype).type
    q, k, v, dout = (x.astype(dtype) for x in (q, k, v, dout))
    scale = t(1 / math.sqrt(q.shape[1]))
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    lse, delta = np.empty(len(q), dtype), np.empty(len(q), dtype)
    for at in range(0, len(q), block):
        i = slice(at, at + block)
        s = scale * (q[i] @ k.T)
        m = s.max(axis=1)
        p = np.exp(s - m[:, None])
        lse[i] = m + np.log(p.sum(axis=1))
        p /= p.sum(axis=1)[:, None]
        delta[i] = (dout[i] * (p @ v)).sum(axis=1)
        dq[i] = scale * ((p * (dout[i] @ v.T - delta[i, None])) @ k)
    for at in range(0, len(k), block):
        j = slice(at, at + block)
        p = np.exp(scale * (k[j] @ q.T) - lse)
        dv[j] = p @ dout
        dk[j] = scale * ((p * (v[j] @ dout.T - delta)) @ q)
    return {"dq": dq, "dk": dk, "dv": dv}


def test_long_sums() -> None:
    """8,192 queries and keys in [0, 1): sums of one sign, where one running chain is many times worse than NumPy."""
    rng = seeds.generator(0)
    q, k, v, dout = (rng.random((8192, 64), dtype=np.float32) for _ in range(4))
    want = dense_in_blocks(np.float64, q, k, v, dout, 512)
    dense = dense_in_blocks(np.float32, q, k, v, dout, 512)
    grads = na.attention_vjp(q, k, v, layout="sd")[1](dout)
    for name, factor in (("dv", 4), ("dq", 12), ("dk", 12)):
        error, dense_error = (largest(x[name].astype(np.float64) - want[name]) for x in (grads._asdict(), dense))
        allowed = max(factor * dense_error, 1e-5 * largest(want[name]))
        assert error <= allowed, f"{name}: {error:.3g}, dense NumPy {dense_error:.3g}, of {largest(want[name]):.3g}"


# ---- the rule itself ----


@pytest.mark.parametrize("name", ["everything", "varlen-alibi", "sinks-padding", "bias-hidden", "dropout-sinks",
                                  "layout-shd", "softcap-bias", "and-three-masks", "alibi-batch", "gqa-4"])  # fmt: skip
def test_reference_and_dense_numpy_agree(name: str) -> None:
    """Two derivations of the gradients, one from the arguments and one from the resolved problem, in float64."""
    arrays, options = build(BY_NAME[name])
    arrays = tuple(x.astype(np.float64) for x in arrays)
    options = {name: x for name, x in options.items() if name not in ("score_mod", "aux")}
    dout, dlse = cotangents(arrays[0], arrays[2])
    want = na.reference.attention_backward(dout, *arrays, dlse=dlse, **options)
    for what, x in naive(np.float64, dout, dlse, *arrays, **options).items():
        y = getattr(want, what)
        x = from_bhsd(x, options.get("layout", "bhsd")) if what in ("dq", "dk", "dv") else x
        assert largest(x - y) <= 1e-13 * largest(y), what


def test_the_rule_can_fail() -> None:
    arrays, options = build(BY_NAME["plain-63x203"])
    dout, dlse = cotangents(arrays[0], arrays[2])
    want = na.reference.attention_backward(dout, *arrays, dlse=dlse, **options).dq
    dense = naive(np.float32, dout, dlse, *arrays, **options)["dq"]
    size = bounds.backward(resolve(*arrays, **options), dout, dlse, {})["dq"]
    within(dense, want, size, "dq", np.float32)
    last = np.arange(63)[:, None] == 62
    noise = 8e-7 * largest(want) * seeds.generator(0).standard_normal(want.shape)
    for wrong in (want * (1 + 2e-5), np.where(last, np.nan, want), np.where(last, 0, want), want + noise):
        with pytest.raises(AssertionError, match="dq: "):
            within(wrong.astype(np.float32), want, size, "dq", np.float32)
