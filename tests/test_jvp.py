"""The tangent kernel against the dense reference, and against the backward kernel: <dout, jvp(x)> = <vjp(dout), x>."""

from typing import Any

import bounds
import numpy as np
import pytest
import seeds
from cases import BY_NAME, CASES, DTYPES, Case, build, from_layout, seed_of
from naive import resolve
from test_attention import from_bhsd
from test_nan import PARTIAL

import numba_attn as na
from numba_attn.plan import Problem, bhsd_view


def directions(case: Case, arrays: Any, options: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """A random direction for every argument that has one."""
    rng = seeds.generator(seed_of(case.name) + 1)
    dots = [rng.standard_normal(x.shape).astype(x.dtype) for x in arrays]
    more: dict[str, Any] = {}
    for name in ("bias", "sinks", "alibi_slopes"):
        if options.get(name) is not None:
            more[f"{name}_dot"] = rng.standard_normal(options[name].shape).astype(options[name].dtype)
    if options.get("aux"):
        more["aux_dot"] = tuple(
            rng.standard_normal(a.shape).astype(a.dtype) if a.dtype.kind not in "iub" else None for a in options["aux"]
        )
    return dots, more


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    arrays, options = build(case)
    dots, more = directions(case, arrays, options)
    (out, lse), found = na.attention_jvp(*arrays, *dots, **options, **more, return_lse=True)
    (want, want_lse), right = na.reference.attention_jvp(*arrays, *dots, **options, **more, return_lse=True)
    assert out.dtype == found[0].dtype == arrays[0].dtype
    p = resolve(*arrays, **options)
    bound = bounds.forward(p)
    sizes = bound.out, bound.lse, *bounds.tangents(p, bound, directions_of(p, dots, more))
    results = zip(
        ("out", "lse", "out_dot", "lse_dot"), (out, lse, *found), (want, want_lse, *right), sizes, strict=True
    )
    for name, x, y, size in results:
        size = bounds.Size(*(from_bhsd(part, case.layout) for part in size))
        bounds.within(x, y, size, name, p.acc, 2 if p.acc is np.float64 else 1)


def directions_of(p: Problem, dots: list[np.ndarray], more: dict[str, Any]) -> bounds.Dots:
    bias = more.get("bias_dot")
    if bias is not None:
        bias = np.broadcast_to(bias, (p.batch, p.q_heads, p.q_len, p.kv_len))
    q, k, v = (bhsd_view(x, p.layout) for x in dots)
    return bounds.Dots(q, k, v, bias, more.get("sinks_dot"), more.get("alibi_slopes_dot"), more.get("aux_dot"))


@pytest.mark.parametrize("name", ["everything", "gqa-4", "dv-larger", "lengths-both", "varlen", "layout-shd", "dv-one"])
def test_transpose_of_the_pullback(name: str) -> None:
    case = BY_NAME[name]
    arrays, options = build(case)
    arrays = tuple(x.astype(np.float64) for x in arrays)
    dots, more = directions(case, arrays, options)
    asked = tuple(n for n, a in enumerate(options.get("aux", ())) if a.dtype.kind not in "iub")
    (out, lse), (out_dot, lse_dot) = na.attention_jvp(*arrays, *dots, **options, **more, return_lse=True)
    _, pullback = na.attention_vjp(*arrays, **options, aux_grad=asked)
    rng = seeds.generator(0)
    dout, dlse = rng.standard_normal(out.shape), np.where(np.isfinite(lse), rng.standard_normal(lse.shape), 0.0)
    grads = pullback(dout, dlse)
    forward = float((dout * out_dot).sum() + (dlse * lse_dot).sum())
    pairs = list(zip(grads[:3], dots, strict=True))
    pairs += [
        (g, more[f"{n}_dot"])
        for g, n in ((grads.dbias, "bias"), (grads.dsinks, "sinks"), (grads.dalibi_slopes, "alibi_slopes"))
        if g is not None
    ]
    pairs += [(grads.daux[n], more["aux_dot"][n]) for n in asked] if asked else []
    backward = sum(float((g.astype(np.float64) * d.astype(np.float64)).sum()) for g, d in pairs)
    assert forward == pytest.approx(backward, rel=1e-5 if more else 1e-11, abs=1e-5 if more else 1e-10)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("given", range(3))
def test_absent_tangents_are_zero(given: int, dtype: str) -> None:
    arrays, options = build(BY_NAME["gqa-4"])
    arrays = tuple(x.astype(DTYPES[dtype]) for x in arrays)
    dots = [np.zeros_like(x) for x in arrays]
    dots[given] = seeds.generator(0).standard_normal(arrays[given].shape).astype(DTYPES[dtype])
    zeros = na.attention_jvp(*arrays, *dots, **options)
    absent = na.attention_jvp(*arrays, *(x if n == given else None for n, x in enumerate(dots)), **options)
    for x, y in zip(zeros, absent, strict=True):
        np.testing.assert_array_equal(x.astype(np.float32), y.astype(np.float32))
    for y in na.attention_jvp(*arrays, None, None, None, **options)[1:]:
        assert not y.astype(np.float32).any()


@pytest.mark.parametrize("kind", list(PARTIAL))
def test_nan_in_a_hidden_tangent(kind: str) -> None:
    """A tangent that no visible pair reads changes no bit; one that is visible makes the rows that see it NaN."""
    options = PARTIAL[kind]
    rng = seeds.generator(2)
    q, k, v = (rng.standard_normal((2, 4, 130, 40)).astype(np.float32) for _ in range(3))
    dots = [rng.standard_normal(x.shape).astype(np.float32) for x in (q, k, v)]
    out, out_dot = na.attention_jvp(q, k, v, *dots, **options)
    one_hot = np.broadcast_to(np.eye(130), (2, 4, 130, 130))
    plain = {n: x for n, x in options.items() if n not in ("dropout_p", "seed", "score_mod", "softcap", "sinks")}
    weights = na.reference.attention(np.zeros((2, 4, 130, 1)), np.zeros((2, 4, 130, 1)), one_hot, **plain)
    for which in (1, 2):
        stale = [x.copy() for x in dots]
        stale[which][:, :, 77] = np.nan
        again, again_dot = na.attention_jvp(q, k, v, *stale, **options)
        assert again.tobytes() == out.tobytes()
        sees = weights[..., 77] > 0
        assert (again_dot[~sees] == out_dot[~sees]).all()
        if kind != "dropout":
            assert np.isnan(again_dot[sees]).all()


@pytest.mark.parametrize("form", ["strided", "broadcast", "shd"])
def test_strides(form: str) -> None:
    rng = seeds.generator(4)
    arrays = [rng.standard_normal((1, 2, 70, 40)).astype(np.float32) for _ in range(6)]
    want = na.attention_jvp(*arrays, causal=True)
    if form == "strided":
        got = na.attention_jvp(*(np.repeat(x, 2, axis=3)[..., ::2] for x in arrays), causal=True)
    elif form == "shd":
        got = na.attention_jvp(*(x[0].swapaxes(0, 1).copy() for x in arrays), causal=True, layout="shd")
        got = tuple(from_layout(x, "shd") for x in got)
    else:
        ones = np.broadcast_to(np.float32(1), (1, 2, 70, 40))
        got = na.attention_jvp(*arrays[:3], ones, ones, ones, causal=True)
        want = na.attention_jvp(*arrays[:3], *(ones.copy() for _ in range(3)), causal=True)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": (dict(q_dot=np.zeros((1, 1, 4, 7))), ValueError, "q_dot has shape"),
    "dtype": (dict(v_dot=np.zeros((1, 1, 4, 8), np.float32)), TypeError, "v_dot has dtype float32; it takes v's"),
    "a list": (dict(k_dot=[[1.0]]), TypeError, "k_dot"),
    "no bias": (dict(bias_dot=np.zeros(4)), ValueError, "bias_dot is given, but bias is not"),
    "no aux": (dict(aux_dot=(np.zeros(4),)), ValueError, "aux_dot"),
    "backend": (dict(backend="tpu"), ValueError, "backend"),
    "return_lse": (dict(return_lse=2), TypeError, "return_lse"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_errors(name: str) -> None:
    wrong, error, text = BAD[name]
    x = np.zeros((1, 1, 4, 8))
    tangents = dict(q_dot=None, k_dot=None, v_dot=None)
    with pytest.raises(error, match=text):
        na.attention_jvp(x, x, x, **(tangents | wrong))
