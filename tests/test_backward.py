"""The gradients against the float64 reference and against central differences, over every feature, stride and error.

The rule is `check`: a gradient is finite, has its argument's shape and dtype, and each number of it is no further off
than its own roundings can throw it (bounds.py). Those of the arrays of a score_mod are held to a share of the largest.
"""

import math
import os
import sys
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
    alibi_by_hand,
    build,
    cap_30,
    checkerboard,
    dilated,
    dilated_causal,
    draw,
    hides_odd_keys,
    hides_the_future,
    limits,
    many_functions,
    table_by_distance,
    two_tables,
    variant,
)
from child import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import attention as naive_attention
from naive import backward as naive
from naive import resolve, rounding
from test_attention import FORMS, STRIDED, from_bhsd, problems

import numba_attn as na
from numba_attn.gradients import Gradients
from numba_attn.plan import bhsd_view

FLOOR = {"float64": 300 * 2.0**-52, "float32": 1e-5}  # of the largest entry, by the precision of the arithmetic


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
    shapes = {f"d{name}": options[name].shape for name in ("bias", "sinks", "alibi_slopes") if f"d{name}" in names}
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
        if name not in sizes:
            slack = sums_of_halves(arrays, options, dout, dlse, aux_grad, want).get(name, 0.0)
            near(x, y, name, problem.acc, slack)
            continue
        size, right = sizes[name], exact.get(name, y)
        if name in ("dq", "dk", "dv"):
            size = Size(*(from_bhsd(part, layout) for part in size))
            right = from_bhsd(exact[name], layout) if exact else right
        if exact:
            within(y, right, size, f"the reference's {name}", problem.acc)
        within(x, right, size, name, problem.acc, times)
    return grads


def sums_of_halves(
    arrays: tuple[np.ndarray, ...],
    options: dict[str, Any],
    dout: np.ndarray,
    dlse: np.ndarray | None,
    aux_grad: tuple[int, ...],
    want: Gradients,
) -> dict[str, float]:
    """How far dense arithmetic in halves throws the gradients of the arrays of aux, by name, where tensor cores take
    weights in halves.

    Their pairs are not rounded, but p (dP - delta) takes delta from an out that is: by its own dtype and by that of the
    weights it was made with. What a row's delta is off by adds up over rows with any sign, so the largest error of a
    few draws of signs is what is asked for.
    """
    names, dtype = [name for name, _ in entries(want) if name.startswith("daux")], arrays[0].dtype
    if not bounds.HALF_WEIGHTS or dtype.itemsize != 2:
        return {}
    exact = na.reference.attention(*arrays, **options)
    rounded = from_bhsd(
        naive_attention(np.float32, *arrays, weights_dtype=dtype, **options)[0], options.get("layout", "bhsd")
    )
    off = (dout.astype(np.float64) * (rounded.astype(dtype).astype(np.float64) - exact)).sum(-1)
    rng, found = seeds.generator(0), dict.fromkeys(names, 0.0)
    for _ in range(4):
        signs = rng.choice([-1.0, 1.0], off.shape)
        shifted = (0.0 if dlse is None else dlse) - signs * np.abs(off)
        grads = na.reference.attention_backward(
            dout, *arrays, dlse=shifted.astype(np.float32), aux_grad=aux_grad, **options
        )
        for (name, x), (_, y) in zip(entries(grads), entries(want), strict=True):
            if name in found:
                found[name] = max(found[name], largest(np.asarray(x, np.float64) - y))
    return found


def near(x: np.ndarray, want: np.ndarray, what: str, acc: type, slack: float) -> None:
    """x is finite, and its largest error a share of the largest entry, a rounding in x's own dtype, and twice slack."""
    assert x.shape == want.shape, f"{what} has shape {x.shape}, the reference {want.shape}"
    own, floor = 0.0 if x.dtype == acc else rounding(x.dtype), FLOOR[acc.__name__]
    error = np.abs(x.astype(np.float64) - want)
    assert np.isfinite(error).all(), f"{what}: elements are not finite, first at {first(~np.isfinite(error))}"
    allowed = (floor + own) * largest(want) + 2 * slack + float(np.finfo(np.float32).tiny)
    assert largest(error) <= allowed, (
        f"{what}: error {largest(error):.3g}, allowed {allowed:.3g}; at {first(error == error.max())}"
    )


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


# ---- central differences ----


def numeric_loss(arrays: dict[str, np.ndarray], options: dict[str, Any], dout: np.ndarray, dlse: np.ndarray) -> float:
    """sum(dout * out) + sum(dlse * lse), where lse is finite, from the kernel's forward."""
    options = dict(options)
    options.update({name: x for name, x in arrays.items() if name in ("bias", "sinks", "alibi_slopes")})
    if "aux" in options:
        options["aux"] = tuple(arrays.get(f"aux{n}", a) for n, a in enumerate(options["aux"]))
    out, lse = na.attention(arrays["q"], arrays["k"], arrays["v"], **options, return_lse=True)
    return math.fsum((dout * out).ravel()) + math.fsum((dlse * np.where(np.isfinite(lse), lse, 0.0)).ravel())


def gradcheck(
    arrays: tuple[np.ndarray, ...], options: dict[str, Any], most: int = 8, atol: float = 2e-8, eps: float = 1e-6
) -> None:
    """Every gradient along a random direction and along at most `most` axes, by central differences in float64."""
    dout, dlse = cotangents(arrays[0], arrays[2])
    grads = na.attention_vjp(*arrays, **options, aux_grad=float_aux(options))[1](dout, dlse)
    named = dict(zip("qkv", arrays, strict=True))
    named |= {name: options[name] for name in ("bias", "sinks", "alibi_slopes") if name in options}
    named |= {f"aux{n}": options["aux"][n] for n in float_aux(options)}
    rng = seeds.generator(2)
    assert [f"d{name}" for name in named] == [name for name, _ in entries(grads)]
    for name, gradient in entries(grads):
        x = named[name[1:]]
        assert x.dtype == gradient.dtype == np.float64
        free = np.argwhere(np.isfinite(x))
        steps = []
        for at in rng.permutation(free)[:most]:
            steps.append(np.zeros(x.shape))
            steps[-1][tuple(at)] = 1.0
        steps.append(np.where(np.isfinite(x), rng.choice([-1.0, 1.0], x.shape), 0.0))
        for step in steps:
            moved = (named | {name[1:]: np.asarray(x + sign * step)} for sign in (eps, -eps))
            ends = [numeric_loss(one, options, dout, dlse) for one in moved]
            numeric, exact = (ends[0] - ends[1]) / (2 * eps), float((gradient * step).sum())
            size = float(np.abs(gradient * step).sum())
            assert abs(numeric - exact) <= 1e-6 * size + atol, (
                f"{name}: {exact} along {np.count_nonzero(step)} axes from {first(step != 0)}, differences: {numeric}"
            )


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return seeds.generator(seed).standard_normal(shape)


EMPTY_ROWS = seeds.generator(5).random((7, 19)) < 0.3
EMPTY_ROWS[[0, 3]] = False
ONE_KEY = np.arange(19) == (5 * np.arange(7)[:, None]) % 19
HIDDEN_BIAS = np.where(seeds.generator(6).random((4, 7, 19)) < 0.2, -np.inf, normal(4, 7, 19))
# B 2, Hq 4, Hkv 2, Sq 7, Sk 19
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.6},
    "scale-zero": {"scale": 0.0},
    "causal": {"causal": True, "align": "bottom_right"},
    "causal-empty-rows": {"causal": True, "align": -3, "sinks": normal(4)},
    "window": {"window": (3, 2), "align": "bottom_right"},
    "mask": {"mask": EMPTY_ROWS},
    "one-key": {"mask": ONE_KEY},
    "one-key-bias-sinks": {"mask": ONE_KEY, "bias": normal(7, 19), "sinks": normal(4)},
    "nothing-visible": {"mask": np.zeros((7, 19), bool), "sinks": normal(4), "bias": normal(19)},
    "lengths": {"mask": na.lengths([19, 5], [4, 7]), "sinks": normal(4)},
    "varlen": {"mask": na.varlen([0, 2, 6], [0, 8, 17]), "alibi_slopes": normal(4), "align": "bottom_right"},
    "segments": {"mask": na.segments(np.arange(7) % 3, np.arange(19) % 4)},
    "prefix": {"mask": na.prefix(9), "align": 1},
    "intervals": {"mask": na.intervals(np.arange(7), 19 - 3 * np.arange(7))},
    "mask-mod": {"mask": na.mask_mod(dilated)},
    "bias": {"bias": normal(2, 4, 7, 19)},
    "bias-keys": {"bias": normal(2, 1, 1, 19)},
    "bias-rows": {"bias": normal(4, 7, 1), "sinks": normal(4)},
    "bias-one": {"bias": normal(1), "sinks": normal(4)},
    "bias-no-axis": {"bias": np.array(0.3), "sinks": normal(4)},
    "bias-hidden": {"bias": HIDDEN_BIAS},
    "softcap": {"softcap": 0.8},
    "softcap-bias": {"softcap": 1.3, "bias": normal(4, 1, 19)},
    "alibi": {"alibi_slopes": normal(4), "align": "bottom_right"},
    "alibi-batch": {"alibi_slopes": normal(2, 4), "align": np.array([3, -5])},
    "sinks": {"sinks": normal(4)},
    "sinks-none": {"sinks": np.array([0.5, -np.inf, 1.0, 0.0]), "mask": EMPTY_ROWS},
    "dropout": {"dropout_p": 0.4, "seed": 5},
    "dropout-sinks-bias": {"dropout_p": 0.4, "seed": 5, "sinks": normal(4), "bias": normal(7, 19)},
    "score-mod": {"score_mod": cap_30, "scale": 5.0},
    "score-mod-indices": {"score_mod": alibi_by_hand},
    "score-mod-table": {"score_mod": table_by_distance, "aux": (normal(4, 19),)},
    "score-mod-two-tables": {"score_mod": two_tables, "aux": (normal(2, 7), normal(19)), "bias": normal(7, 19)},
    "score-mod-functions": {"score_mod": many_functions},
    "score-mod-limits": {"score_mod": limits},
    "score-mod-hides": {"score_mod": hides_odd_keys},
    "score-mod-hides-branch": {"score_mod": hides_the_future},
}


@pytest.mark.parametrize("name", list(FEATURES))
def test_central_differences(name: str) -> None:
    gradcheck((normal(2, 4, 7, 5), normal(2, 2, 19, 5, seed=1), normal(2, 2, 19, 3, seed=2)), FEATURES[name], most=40)


@pytest.mark.parametrize("layout", ["bshd", "hsd", "shd", "sd"])
def test_central_differences_in_every_layout(layout: str) -> None:
    sizes = [{"b": 2, "h": heads, "s": s, "d": d} for heads, s, d in ((4, 7, 5), (2, 19, 5), (2, 19, 3))]
    if layout == "sd":
        sizes = [size | {"h": 1} for size in sizes]
    arrays = tuple(normal(*(size[axis] for axis in layout), seed=n) for n, size in enumerate(sizes))
    heads = () if layout == "sd" else (4,)
    gradcheck(arrays, {"layout": layout, "bias": normal(*heads, 7, 1), "sinks": normal(*heads or (1,))})


@pytest.mark.parametrize("options", [{}, {"causal": True, "align": "bottom_right"}, {"mask": ONE_KEY}])
def test_central_differences_of_a_saturated_softmax(options: dict[str, Any]) -> None:
    """q times 50: nearly one-hot, and the weights that are not 0 have a steep slope."""
    arrays = (50 * normal(2, 4, 7, 5), normal(2, 2, 19, 5, seed=1), normal(2, 2, 19, 3, seed=2))
    gradcheck(arrays, options, most=30, eps=1e-7, atol=2e-6)
    check(arrays, options)


@st.composite
def smooth_problems(draw_: st.DrawFn) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """A random combination of features in float64, of sizes that divide nothing."""
    sizes = st.sampled_from([1, 2, 3, 7, 11, 17, 19, 33, 35, 67, 131])
    group, kv_heads, batch = draw_(st.integers(1, 3)), draw_(st.integers(1, 2)), draw_(st.integers(1, 2))
    heads, sq, sk = group * kv_heads, draw_(sizes), draw_(sizes)
    dk, dv = draw_(st.sampled_from([1, 3, 5, 9, 17])), draw_(st.sampled_from([1, 2, 7, 19]))
    rng = seeds.generator(draw_(st.integers(0, 2**32 - 1)))
    q, k, v = (
        rng.standard_normal((batch, h, s, d)) for h, s, d in ((heads, sq, dk), (kv_heads, sk, dk), (kv_heads, sk, dv))
    )
    size = (batch, heads, sq, sk)

    def chosen(one_in: int) -> bool:
        return draw_(st.integers(1, one_in)) == 1

    options: dict[str, Any] = {}
    if chosen(3):
        options["causal"] = True
    if chosen(4):
        options["window"] = (draw_(st.integers(0, 20)), draw_(st.sampled_from([None, 0, 5])))
    masks: list[Any] = []
    if chosen(4):
        masks.append(na.lengths(rng.integers(0, sk + 1, batch), rng.integers(0, sq + 1, batch)))
    if chosen(5):
        masks.append(na.varlen(np.array([0, sq // 2, sq]), np.array([0, sk // 3, sk])))
    if chosen(5):
        masks.append(na.segments(rng.integers(0, 3, sq), rng.integers(0, 3, sk)))
    if chosen(5):
        masks.append(na.intervals(*rng.integers(0, sk + 1, (2, batch, heads, sq))))
    if chosen(5):
        masks.append(na.mask_mod(draw_(st.sampled_from([checkerboard, dilated, dilated_causal]))))
    if masks:
        options["mask"] = masks[0]
        for mask in masks[1:]:
            options["mask"] &= mask
        if chosen(2):
            options["mask"] &= rng.random(size) < 0.7
    if chosen(2):
        shape = tuple(n if rng.random() < 0.5 else 1 for n in size)[draw_(st.integers(0, 3)) :]
        options["bias"] = rng.standard_normal(shape)
        options["bias"][rng.random(shape) < draw_(st.sampled_from([0.0, 0.3]))] = -np.inf
    if chosen(3):
        options["softcap"] = draw_(st.sampled_from([0.7, 3.0]))
    if chosen(3):
        options["alibi_slopes"] = 0.1 * rng.standard_normal((batch, heads) if chosen(2) else heads)
    if chosen(3):
        options["sinks"] = rng.standard_normal(heads)
    if chosen(3):
        options["dropout_p"], options["seed"] = draw_(st.sampled_from([0.1, 0.6])), draw_(st.integers(0, 2**40))
    if chosen(3):
        fn = draw_(st.sampled_from([cap_30, alibi_by_hand, table_by_distance, two_tables, hides_odd_keys]))
        options["score_mod"] = fn
        if fn is table_by_distance:
            options["aux"] = (rng.standard_normal((heads, max(sq, sk))),)
        if fn is two_tables:
            options["aux"] = (rng.standard_normal((batch, sq)), rng.standard_normal(sk))
    if options.keys() & {"causal", "window", "alibi_slopes"}:
        options["align"] = draw_(st.sampled_from(["bottom_right", "top_left", 3, -4]))
    return (q, k, v), options


@given(smooth_problems())
@settings(max_examples=40)
def test_central_differences_of_a_drawn_problem(problem: tuple[tuple[np.ndarray, ...], dict[str, Any]]) -> None:
    gradcheck(*problem, most=4, atol=1e-7)


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
    """Two keys share a row, and their scores are exact in log2 units. lse is rounded to float32 once, and the weights of
    1/2 are found again from it: the log sum is made in float64, where a product in float32 may miss by 2**-17."""
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
            want = na.reference.attention_backward(
                out - target, q, k, v, score_mod=t5, aux=(table,), aux_grad=(0,)
            ).daux[0]
            assert np.abs(grads.daux[0] - want).max() <= FLOOR[dtype] * np.abs(want).max()
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
    noise = 2e-7 * largest(want) * seeds.generator(0).standard_normal(want.shape)
    for wrong in (want * (1 + 2e-5), np.where(last, np.nan, want), np.where(last, 0, want), want + noise):
        with pytest.raises(AssertionError, match="dq: "):
            within(wrong.astype(np.float32), want, size, "dq", np.float32)


# ---- errors ----

# ruff: noqa: E501  # a row of a table is one line

F4 = np.float32
GOOD_Q, GOOD_K, GOOD_V = (np.ones(shape, F4) for shape in ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 6)))
GOOD = {"dout": np.ones((2, 4, 5, 6), F4), "q": GOOD_Q, "k": GOOD_K, "v": GOOD_V}
GOOD |= {"out": np.ones((2, 4, 5, 6), F4), "lse": np.ones((2, 4, 5), F4), "dlse": np.ones((2, 4, 5), F4)}
TABLES = {"score_mod": two_tables, "aux": (np.ones((2, 5)), np.ones(7))}
MIXED = {"score_mod": two_tables, "aux": (np.ones((2, 5)), np.ones(7, int))}

BAD = [
    ("dout's dtype", {"dout": np.ones((2, 4, 5, 6))}, TypeError, r"^dout has dtype float64.*q's, float32.*astype"),
    ("dout half", {"dout": np.ones((2, 4, 5, 6), np.float16)}, TypeError, r"^dout has dtype float16.*q's, float32"),
    ("dout integer", {"dout": np.ones((2, 4, 5, 6), int)}, TypeError, r"^dout has dtype int64"),
    ("dout complex", {"dout": np.ones((2, 4, 5, 6), "c8")}, TypeError, r"^dout has dtype complex64"),
    ("dout big-endian", {"dout": np.ones((2, 4, 5, 6), ">f4")}, TypeError, r"^dout has dtype >f4.*byte"),
    ("dout list", {"dout": [[1.0]]}, TypeError, r"^dout is a list.*NumPy array"),
    ("dout none", {"dout": None}, TypeError, r"^dout is None.*NumPy array"),
    ("dout number", {"dout": 1.0}, TypeError, r"^dout is a float.*NumPy array"),
    ("dout masked", {"dout": np.ma.masked_array(GOOD["dout"])}, TypeError, r"^dout is a masked array"),
    ("dout's shape", {"dout": np.ones((2, 4, 5, 3), F4)}, ValueError, r"^dout has shape \(2, 4, 5, 3\).*\(2, 4, 5, 6\)"),
    ("dout to be broadcast", {"dout": np.ones((5, 6), F4)}, ValueError, r"^dout has shape \(5, 6\).*\(2, 4, 5, 6\)"),
    ("dout's layout", {"dout": np.ones((2, 5, 4, 6), F4)}, ValueError, r"^dout has shape .*layout='bhsd'"),
    ("dout is out and lse", {"dout": (GOOD["out"], GOOD["lse"])}, TypeError, r"^dout is a tuple.*NumPy array"),
    ("dlse's shape", {"dlse": np.ones((2, 4, 5, 1), F4)}, ValueError, r"^dlse has shape \(2, 4, 5, 1\).*\(2, 4, 5\)"),
    ("dlse's type", {"dlse": 0.0}, TypeError, r"^dlse is a float.*NumPy array"),
    ("dlse integer", {"dlse": np.ones((2, 4, 5), int)}, TypeError, r"^dlse has dtype int64"),
    ("dlse of axes", {"dlse": np.ones((2, 5, 4), F4)}, ValueError, r"^dlse has shape \(2, 5, 4\).*lse's in layout"),
    ("aux_grad int", TABLES | {"aux_grad": 0}, TypeError, r"^aux_grad is 0; .*tuple of positions in aux, \(0,\)"),
    ("aux_grad True", TABLES | {"aux_grad": True}, TypeError, r"^aux_grad is True.*tuple of positions"),
    ("aux_grad bools", TABLES | {"aux_grad": (True, False)}, TypeError, r"^aux_grad is \(True, False\).*positions"),
    ("aux_grad text", TABLES | {"aux_grad": "all"}, TypeError, r"^aux_grad is 'all'.*positions"),
    ("aux_grad array", TABLES | {"aux_grad": np.array([0])}, TypeError, r"^aux_grad is array.*positions"),
    ("aux_grad none", TABLES | {"aux_grad": None}, TypeError, r"^aux_grad is None.*positions"),
    ("aux_grad beyond", TABLES | {"aux_grad": (2,)}, ValueError, r"^aux_grad names position 2; aux has 2 arrays"),
    ("aux_grad negative", TABLES | {"aux_grad": (-1,)}, ValueError, r"^aux_grad names position -1; aux has 2"),
    ("aux_grad of integers", MIXED | {"aux_grad": (1,)}, TypeError, r"^aux_grad names position 1.*int64.*floats"),
    ("aux_grad without aux", {"aux_grad": (0,)}, ValueError, r"^aux_grad names position 0; aux has 0 arrays"),
    ("backend", {"backend": "gpu"}, ValueError, r"^backend is 'gpu'; it takes 'auto', 'cpu' or 'cuda'"),
    ("backend none", {"backend": None}, ValueError, r"^backend is None"),
    ("q", {"q": [1.0]}, TypeError, r"^q is a list.*NumPy array"),
    ("k's dtype", {"k": np.ones((2, 2, 7, 3))}, TypeError, r"^q, k and v have dtypes"),
    ("align", {"causal": True}, ValueError, r"(?s)^align is None, but causal.*'bottom_right'.*'top_left'"),
    ("mask", {"mask": np.ones((5, 7), int)}, TypeError, r"^mask has dtype int64.*bool"),
    ("scale", {"scale": math.nan}, ValueError, r"^scale is nan"),
    ("seed", {"dropout_p": 0.5}, ValueError, r"seed"),
    ("layout", {"layout": "bhds"}, ValueError, r"^layout is 'bhds'"),
]  # fmt: skip
BAD_RESULTS = [
    ("out's dtype", {"out": np.ones((2, 4, 5, 6))}, TypeError, r"^out has dtype float64; it takes float32.*return_lse=True"),
    ("out's shape", {"out": np.ones((2, 4, 5, 3), F4)}, ValueError, r"^out has shape \(2, 4, 5, 3\).*\(2, 4, 5, 6\)"),
    ("out list", {"out": [1.0]}, TypeError, r"^out is a list.*NumPy array"),
    ("out none", {"out": None}, TypeError, r"^out is None.*NumPy array"),
    ("lse's dtype", {"lse": np.ones((2, 4, 5))}, TypeError, r"^lse has dtype float64; it takes float32"),
    ("lse in q's dtype", {n: x.astype(np.float16) for n, x in GOOD.items()}, TypeError, r"^lse has dtype float16.*float32"),
    ("lse in float32", {n: x.astype(float) for n, x in GOOD.items() if n != "lse"}, TypeError, r"^lse .*float32.*float64"),
    ("lse's shape", {"lse": np.ones((2, 4, 5, 1), F4)}, ValueError, r"^lse has shape \(2, 4, 5, 1\).*\(2, 4, 5\)"),
    ("out and lse swapped", {"out": GOOD["lse"], "lse": GOOD["out"]}, ValueError, r"^out has shape \(2, 4, 5\)"),
]  # fmt: skip


def named(row: Any) -> Any:
    return pytest.param(*row[1:], id=row[0])


def refused(call: Any, arrays: list[Any], error: type[Exception], message: str) -> None:
    """The call raises, and every array is as it was."""
    arrays = [x for x in arrays if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in arrays]
    with pytest.raises(error, match=message):
        call()
    assert [x.tobytes() for x in arrays] == before


@pytest.mark.parametrize(("wrong", "error", "message"), [named(row) for row in BAD + BAD_RESULTS])
def test_attention_backward_refuses(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    given_ = GOOD | wrong
    positional = [given_.pop(name) for name in ("dout", "q", "k", "v", "out", "lse")]
    refused(lambda: na.attention_backward(*positional, **given_), [*positional, given_["dlse"]], error, message)


@pytest.mark.parametrize(("wrong", "error", "message"), [named(row) for row in BAD])
def test_attention_vjp_or_its_pullback_refuses(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    """What the forward pass can know is refused before it runs; the rest by the pullback."""
    given_ = GOOD | wrong
    dout, dlse, *arrays = (given_.pop(name) for name in ("dout", "dlse", "q", "k", "v"))
    for name in ("out", "lse"):
        del given_[name]
    if wrong.keys() <= {"dout", "dlse"}:
        _, pullback = na.attention_vjp(*arrays, **given_)
        refused(lambda: pullback(dout, dlse), [dout, dlse, *arrays], error, message)
        assert pullback(GOOD["dout"]).dq.shape == (2, 4, 5, 3)  # and goes on
    else:
        out = np.full((2, 4, 5, 6), 7, F4)
        refused(lambda: na.attention_vjp(*arrays, **given_, out=out), [*arrays, out], error, message)


def test_no_argument_is_written_to() -> None:
    """Read-only views of everything, and what they view is as it was."""
    arrays, options = build(BY_NAME["everything"])
    dout, dlse = cotangents(arrays[0], arrays[2])
    everything_given = [
        *arrays,
        dout,
        dlse,
        options["bias"],
        options["sinks"],
        options["alibi_slopes"],
        options["aux"][0],
    ]
    for x in everything_given:
        x.flags.writeable = False
    before = [x.tobytes() for x in everything_given]
    (out, lse), pullback = na.attention_vjp(*arrays, **options, aux_grad=(0,), return_lse=True)
    grads = pullback(dout, dlse)
    out.flags.writeable = lse.flags.writeable = False
    same(na.attention_backward(dout, *arrays, out, lse, dlse=dlse, **options, aux_grad=(0,)), grads)
    assert [x.tobytes() for x in everything_given] == before
    for name, x in entries(grads):
        assert not any(np.shares_memory(x, y) for y in everything_given), name


def test_the_pullback_keeps_its_own_out_and_lse() -> None:
    """What the caller does to the results in between changes nothing; and two pullbacks don't mix."""
    arrays, options = build(BY_NAME["layout-bshd"])
    dout, dlse = cotangents(arrays[0], arrays[2])
    want = na.attention_vjp(*arrays, **options)[1](dout, dlse)
    place = np.empty_like(dout)
    for out in (None, place):
        (got, lse), pullback = na.attention_vjp(*arrays, **options, out=out, return_lse=True)
        got += 1
        lse[...] = np.nan
        na.attention_vjp(*(2 * x for x in arrays), **options)[1](dout, dlse)
        first_ = pullback(dout, dlse)
        same(first_, want)
        first_.dq[...] = np.nan
        same(pullback(dout, dlse), want)


# ---- memory and processes ----


def guarded_sweep(edge: str, form_name: str, first_one: int) -> None:
    """Run in a child: every problem from `first_one` on with all its arrays, results and scratch at a page's edge."""
    from types import SimpleNamespace

    from guard import guarded, guarded_rows
    from test_memory import guard_cases, shut_in

    from numba_attn import dispatch
    from numba_attn.cpu.launch import backward as launch_backward

    form = {"packed": guarded, "rows": guarded_rows}[form_name]

    def at_edge(make: Any, form: Any) -> Any:
        return lambda shape, dtype=np.float64: form(make(shape, dtype), edge)

    edged = SimpleNamespace(**vars(np) | {"empty": at_edge(np.empty, form)})
    packed = SimpleNamespace(**vars(np) | {"empty": at_edge(np.empty, guarded), "zeros": at_edge(np.zeros, guarded)})
    for n, case in enumerate(guard_cases()[first_one:], first_one):
        print("at", n, case.name, flush=True)
        arrays, options = build(case)
        out, lse = na.attention(*arrays, **options, return_lse=True)
        dout, dlse = cotangents(arrays[0], arrays[2])
        aux_grad = float_aux(options)
        want = na.attention_backward(dout, *arrays, out, lse, dlse=dlse, aux_grad=aux_grad, **options)
        fenced = {name: shut_in(value, form, edge) for name, value in options.items()}
        given_ = [form(x, edge) for x in (dout, *arrays, out)]
        rows = [form(x, edge) if x.ndim > 1 else guarded(x, edge) for x in (lse, dlse)]
        dispatch.np, launch_backward.np = edged, packed
        got = na.attention_backward(*given_, rows[0], dlse=rows[1], aux_grad=aux_grad, **fenced)
        dispatch.np = launch_backward.np = np
        try:
            same(got, want)
        except AssertionError as error:
            print("differs", case.name, error, flush=True)
    print("done", flush=True)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="mprotect")
@pytest.mark.parametrize(("edge", "form"), [("end", "packed"), ("start", "packed"), ("end", "rows"), ("start", "rows")])
def test_no_byte_outside_the_arrays(edge: str, form: str) -> None:
    from test_memory import guard_cases

    wrong, first_one, total = [], 0, len(guard_cases())
    while first_one < total and len(wrong) < 5:
        code = "import sys, test_backward as t; t.guarded_sweep(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
        done = run_python(code, edge, form, str(first_one), check=False)
        lines = done.stdout.splitlines()
        wrong += [line for line in lines if line.startswith("differs")]
        if lines and lines[-1] == "done":
            break
        where = [line.split() for line in lines if line.startswith("at ")]
        assert where and done.returncode < 0, f"the sweep itself failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        wrong.append(f"signal {-done.returncode} at {where[-1][2]}")
        first_one = int(where[-1][1]) + 1
    assert not wrong, f"arrays at a page edge ({edge}, {form}): {wrong}"


PEAK = """
import numpy as np, seeds, numba_attn as na
def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024
n = {n}
q, k, v, dout = (seeds.generator(i).standard_normal((1, {heads}, n, 64), dtype=np.float32) for i in range(4))
def call(n, **options):
    few = np.s_[:, :, :n]
    out, pullback = na.attention_vjp(q[few], k[few], v[few], **options)
    return pullback(dout[few])
call(300, {small})
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak starts again from here
before = status("VmRSS")
grads = call(n, {options})
grown = status("VmHWM") - before - sum(x.nbytes for x in grads if x is not None)
assert all(np.isfinite(x).all() for x in grads if x is not None)
print(grown)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(("n", "heads", "options", "small"), [
    (32_768, 1, "causal=True", "causal=True"),
    (32_768, 1, "window=(700, 300)", "window=(7, 3)"),
    (16_384, 2, "window=(2000, 0), bias=np.ones(n), alibi_slopes=np.ones(2), sinks=np.ones(2), softcap=9.0",
     "window=(20, 0), bias=np.ones(300), alibi_slopes=np.ones(2), sinks=np.ones(2), softcap=9.0"),
    (8_192, 1, "dropout_p=0.5, seed=1", "dropout_p=0.5, seed=1"),
], ids=["causal", "window", "reduced", "dropout"])  # fmt: skip
def test_peak_memory(n: int, heads: int, options: str, small: str) -> None:
    """Forward and backward of 32,768 tokens, beyond the arguments and the gradients. Dense scores alone are 4.3 GB."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pytest.skip("the peak of a process cannot be reset here")
    code = PEAK.format(n=n, heads=heads, options=options, small=small)
    grown = int(run_python(code, env={"NUMBA_NUM_THREADS": "2"}).stdout) / 1e6
    assert grown < 128, f"{grown:.0f} MB"


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_is_given_back() -> None:
    """Scratch and sums do not pile up from call to call, shape to shape."""
    done = run_python("""
import numpy as np, seeds, numba_attn as na
from cases import table_by_distance
rng = seeds.generator(0)
q, k, v, dout = (rng.standard_normal((1, 2, 400, 64), dtype=np.float32) for _ in range(4))
table = rng.standard_normal((2, 400))
def rss():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) * 1024
def call(n):
    options = dict(bias=table[:, None, n:], score_mod=table_by_distance, aux=(table,), aux_grad=(0,)) if n % 2 else {}
    na.attention_vjp(q, k[:, :, n:], v[:, :, n:], **options, scale=0.1 + n)[1](dout)
for n in range(40): call(n)
before = rss()
for n in range(300): call(n)
print(rss() - before)
""")
    assert int(done.stdout) < 16e6


CALLS = """
import os, sys, warnings
import numpy as np
import seeds
import numba_attn as na
rng = seeds.generator(0)
BIG = [rng.standard_normal((2, 4, 500, 64), dtype=np.float32) for _ in range(4)]
SMALL = [rng.standard_normal((1, 1, 17, 40)) for _ in range(4)]
def gradients(dout, q, k, v, **options):
    out, lse = na.attention(q, k, v, **options, return_lse=True)
    return na.attention_backward(dout, q, k, v, out, lse, **options)
def reference(dout, q, k, v, **options):
    return na.reference.attention_backward(dout, q, k, v, **options)
BIAS = rng.standard_normal((4, 1, 500)).astype(np.float32)
BIG_WANT, SMALL_WANT = reference(*BIG, causal=True, bias=BIAS), reference(*SMALL)
def right():
    big, small = gradients(*BIG, causal=True, bias=BIAS), gradients(*SMALL)
    ok = all(np.abs(x - y).max() < 1e-5 * np.abs(y).max() for x, y in zip(big[:4], BIG_WANT[:4]))
    return bool(ok and all(np.abs(x - y).max() < 1e-13 * np.abs(y).max() for x, y in zip(small[:3], SMALL_WANT[:3])))
"""
FOUR = {"NUMBA_NUM_THREADS": "4", "NUMBA_THREADING_LAYER": None, "NUMBA_THREADING_LAYER_PRIORITY": None}


@pytest.mark.processes
def test_eight_python_threads_at_once() -> None:
    """Eight threads whose first calls meet, and one pullback that they share."""
    from test_process import EIGHT_THREADS

    shared = """
dout, q, k, v = BIG
pullback = na.attention_vjp(q, k, v, causal=True)[1]
want = [x.tobytes() for x in pullback(dout)[:3]]
with ThreadPoolExecutor(8) as pool:
    for got in pool.map(pullback, [dout] * 16):
        assert [x.tobytes() for x in got[:3]] == want
"""
    run_python(CALLS + EIGHT_THREADS + shared, env=FOUR)


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("layer", [None, "omp"])
def test_forks_after_a_call(layer: str | None) -> None:
    """A bare fork, multiprocessing and joblib, in a process that has called before. GNU OpenMP does not survive it."""
    from test_process import FORK

    pools = """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(result.get(timeout=120) for result in [pool.apply_async(right) for _ in range(4)])
if __name__ == "__main__":
    from functools import partial
    from joblib import Parallel, delayed
    dout, q, k, v = (x.repeat(2, axis=1) for x in BIG)
    out, lse = na.attention(q, k, v, causal=True, return_lse=True)
    assert q.nbytes > 1 << 20  # so that it reaches the workers as a read-only memory map
    work = partial(na.attention_backward, causal=True)
    want = work(dout, q, k, v, out, lse)
    for backend in ("loky", "multiprocessing"):
        for got in Parallel(n_jobs=2, backend=backend)(delayed(work)(dout, q, k, v, out, lse) for _ in range(2)):
            assert all(x.tobytes() == y.tobytes() for x, y in zip(got[:3], want[:3]))
    assert right()
"""
    done = run_python(
        CALLS + FORK + (pools if layer is None else ""), env=FOUR | {"NUMBA_THREADING_LAYER": layer}, check=False
    )
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"Numba has no {layer} layer here")
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.mark.processes
def test_disabled_jit() -> None:
    """The reference does the work, says so, and its results come in the arguments' dtypes and layout."""
    code = """
import warnings
import numpy as np
import numba_attn as na
from cases import BY_NAME, build
from test_backward import argument, cotangents, entries, float_aux
for name in ("layout-shd", "everything", "head-59-float16", "empty-k-sinks"):
    arrays, options = build(BY_NAME[name])
    dout, dlse = cotangents(arrays[0], arrays[2])
    aux_grad = float_aux(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out, pullback = na.attention_vjp(*arrays, **options, aux_grad=aux_grad)
        before = len(caught)
        got = pullback(dout, dlse)
    assert [w.category for w in caught[before:]] == [RuntimeWarning], caught
    assert "NUMBA_DISABLE_JIT" in str(caught[-1].message)
    want = na.reference.attention_backward(dout, *arrays, dlse=dlse, **options, aux_grad=aux_grad)
    for (entry, x), (_, y) in zip(entries(got), entries(want), strict=True):
        of = argument(entry, arrays, options)
        assert x.shape == of.shape and x.dtype == of.dtype and (x == y.astype(of.dtype)).all(), entry
print("fine")
"""
    assert run_python(code, env={"NUMBA_DISABLE_JIT": "1"}).stdout.strip() == "fine"
