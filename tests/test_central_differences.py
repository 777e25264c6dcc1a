"""The gradients against central differences of the forward kernel, in float64, over every feature."""

import math
from typing import Any

import numpy as np
import pytest
import seeds
from bounds import first
from case_options import dilated
from cases import (
    alibi_by_hand,
    cap_30,
    checkerboard,
    dilated_causal,
    hides_odd_keys,
    hides_the_future,
    limits,
    many_functions,
    table_by_distance,
    two_tables,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backward import check, cotangents, entries, float_aux

import numba_attn as na


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
