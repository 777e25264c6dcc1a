"""The reference's gradients against what can be said without them: central differences, complex steps through a dense
implementation of their own, and the identity <dout, J x> = <J' dout, x> between its two modes.
"""

import math
from typing import Any

import numpy as np
import pytest
import seeds
from cases_of_gradients import (
    CASES,
    INF,
    Case,
    arguments,
    cotangents,
    many_functions,
    normal,
    one_head,
    scaled_by_table,
)

import numba_attn as na
from numba_attn.gradients import Gradients, check_cotangents
from numba_attn.plan import resolve
from numba_attn.reference import attention, attention_backward, attention_jvp

each_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def evaluate(case: Case, named: dict[str, np.ndarray], dout: np.ndarray, dlse: np.ndarray) -> float:
    """sum(dout * out) + sum(dlse * lse), where lse is finite."""
    options = dict(case.options)
    options.update({name: named[f"d{name}"] for name in ("bias", "sinks", "alibi_slopes") if name in options})
    if "aux" in options:
        options["aux"] = tuple(named.get(f"daux {n}", a) for n, a in enumerate(options["aux"]))
    out, lse = attention(named["dq"], named["dk"], named["dv"], **options, return_lse=True)
    return math.fsum((dout * out).ravel()) + math.fsum(np.where(np.isfinite(lse), dlse * lse, 0.0).ravel())


def entry(grads: Gradients, name: str) -> Any:
    if name.startswith("daux "):
        assert grads.daux is not None
        return grads.daux[int(name[5:])]
    return getattr(grads, name)


# ---- derivatives ----


@each_case
def test_central_differences(case: Case) -> None:
    dout, dlse = cotangents(case)
    grads = attention_backward(dout, *case.arrays(), dlse=dlse, aux_grad=case.aux_grad, **case.options)
    named, eps = arguments(case), 1e-6
    for name, x in named.items():
        got = entry(grads, name)
        assert got.dtype == np.float64 and got.shape == x.shape
        want = np.zeros(x.shape)
        for at in np.ndindex(x.shape):
            if not np.isfinite(x[at]):
                continue
            moved = []
            for step in (eps, -eps):
                y = x.copy()
                y[at] += step
                moved.append(evaluate(case, {**named, name: y}, dout, dlse))
            want[at] = (moved[0] - moved[1]) / (2 * eps)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-8, err_msg=name)
    for name in ("bias", "sinks", "alibi_slopes"):
        assert (getattr(grads, f"d{name}") is None) == (name not in case.options)
    aux = case.options.get("aux", ())
    assert (
        grads.daux is None
        if not aux
        else [g is not None for g in grads.daux or ()] == [n in case.aux_grad for n in range(len(aux))]
    )


@each_case
def test_forward_and_backward_mode_agree(case: Case) -> None:
    dout, dlse = cotangents(case)
    grads = attention_backward(dout, *case.arrays(), dlse=dlse, aux_grad=case.aux_grad, **case.options)
    rng = seeds.generator(3)
    named = arguments(case)
    dots = {name: rng.standard_normal(x.shape) for name, x in named.items()}
    tangents: dict[str, Any] = {f"{name[1:]}_dot": x for name, x in dots.items() if name[:4] != "daux"}
    if case.aux_grad:
        tangents["aux_dot"] = tuple(dots.get(f"daux {n}") for n in range(len(case.options["aux"])))
    primal, moved = attention_jvp(*case.arrays(), **tangents, **case.options, return_lse=True)
    for x, y in zip(primal, attention(*case.arrays(), **case.options, return_lse=True), strict=True):
        np.testing.assert_array_equal(x, y)
    forward = (dout * moved[0]).sum() + (dlse * moved[1]).sum()
    backward = sum((entry(grads, name) * x).sum() for name, x in dots.items())
    np.testing.assert_allclose(forward, backward, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 0.9])
@pytest.mark.parametrize("biased", [False, True])
def test_complex_step(softcap: float | None, biased: bool) -> None:
    """Dense attention over complex numbers, whose imaginary part at 1e-30 i is the derivative to the last digit."""

    def dense(q, k, v, bias):
        s = np.einsum("bhid,bhjd->bhij", q, np.repeat(k, 2, axis=1)) / math.sqrt(3)
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        weights = np.exp(s + bias)
        total = weights.sum(axis=-1)
        return np.einsum("bhij,bhje->bhie", weights, np.repeat(v, 2, axis=1)) / total[..., None], np.log(total)

    case = Case({"softcap": softcap, "bias": normal(4, 3, 4) if biased else None})
    q, k, v = case.arrays()
    arrays = [q, k, v, case.options["bias"] if biased else np.zeros((4, 3, 4))]
    dout, dlse = normal(2, 4, 3, 2), normal(2, 4, 3)
    grads = attention_backward(dout, q, k, v, dlse=dlse, **case.options)
    for n, got in enumerate(grads[:4] if biased else grads[:3]):
        want = np.zeros(arrays[n].shape)
        for at in np.ndindex(want.shape):
            moved = [x.astype(complex) for x in arrays]
            moved[n][at] += 1e-30j
            out, lse = dense(*moved)
            want[at] = ((dout * out).sum() + (dlse * lse).sum()).imag / 1e-30
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_two_keys_by_hand() -> None:
    """Weights 3/4 and 1/4, values 4 and 0, out 3: ds = 3/4 (4 - 3) and 1/4 (0 - 3)."""
    q, k, v = np.array([[math.log(3.0)]]), np.array([[1.0], [0.0]]), np.array([[4.0], [0.0]])
    grads = attention_backward(np.ones((1, 1)), q, k, v, layout="sd", bias=np.zeros((1, 2)))
    np.testing.assert_allclose(grads.dbias, [[0.75, -0.75]], rtol=1e-15)
    np.testing.assert_allclose(grads.dv, [[0.75], [0.25]], rtol=1e-15)
    np.testing.assert_allclose(grads.dq, [[0.75]], rtol=1e-15)
    np.testing.assert_allclose(grads.dk, np.array([[0.75], [-0.75]]) * math.log(3.0), rtol=1e-15)


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    case = Case(lengths=(4, 4))
    dout, _ = cotangents(case)
    bias = normal(4, 4)
    t = [torch.from_numpy(x.copy()).requires_grad_() for x in (*case.arrays(), bias)]
    q, k, v = t[0], t[1].repeat_interleave(2, 1), t[2].repeat_interleave(2, 1)
    hidden = torch.from_numpy(np.where(np.tri(4, dtype=bool), 0.0, -INF))
    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=t[3] + hidden).backward(torch.from_numpy(dout))
    grads = attention_backward(dout, *case.arrays(), bias=bias, causal=True)
    for got, want in zip(grads[:4], t, strict=True):
        np.testing.assert_allclose(got, want.grad.numpy(), rtol=1e-11, atol=1e-13)


def test_grads_by_hand_are_those_derived() -> None:
    case = CASES["grad by hand, table"]
    dout, dlse = cotangents(case)
    by_hand = attention_backward(dout, *case.arrays(), dlse=dlse, aux_grad=(0,), **case.options)
    options = case.options | {"score_mod": scaled_by_table.fn}
    derived = attention_backward(dout, *case.arrays(), dlse=dlse, aux_grad=(0,), **options)
    for x, y in zip((*by_hand[:3], *by_hand.daux), (*derived[:3], *derived.daux), strict=True):
        np.testing.assert_array_equal(x, y)
    wrong = na.score_mod(scaled_by_table.fn, lambda s, b, h, i, j, t: 0.0)  # the user's word counts
    grads = attention_backward(dout, *case.arrays(), **case.options | {"score_mod": wrong})
    assert not grads.dq.any() and not grads.dk.any() and grads.dv.any()


def test_a_grad_by_hand_needs_nothing_to_be_derived() -> None:
    q, k, v = Case().arrays()
    mod = na.score_mod(lambda s, b, h, i, j: s * math.gamma(2.0 + s * 0), lambda s, b, h, i, j: 1.0)
    dout = np.ones((2, 4, 3, 2))
    np.testing.assert_allclose(
        attention_backward(dout, q, k, v, score_mod=mod).dq, attention_backward(dout, q, k, v).dq
    )
    with pytest.raises(TypeError, match=r"not differentiated; use the functions .*tanh.*grad=\.\.\."):
        attention_backward(dout, q, k, v, score_mod=mod.fn)


def test_every_dtype_is_computed_in_float64() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    case = Case({"bias": normal(3, 4), "sinks": normal(4), "score_mod": many_functions, "aux": (normal(4),)})
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        q, k, v, dout, dlse, bias, sinks, table = (
            x.astype(dtype)
            for x in (*case.arrays(), *cotangents(case), *(case.options[n] for n in ("bias", "sinks")), normal(4))
        )
        options = {"score_mod": many_functions, "aux_grad": (0,)}
        low = attention_backward(dout, q, k, v, dlse=dlse, bias=bias, sinks=sinks, aux=(table,), **options)
        q, k, v, dout, dlse, bias, sinks, table = (
            x.astype(np.float64) for x in (q, k, v, dout, dlse, bias, sinks, table)
        )
        high = attention_backward(dout, q, k, v, dlse=dlse, bias=bias, sinks=sinks, aux=(table,), **options)
        for x, y in zip((*low[:5], *low.daux), (*high[:5], *high.daux), strict=True):
            assert x.dtype == np.float64
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("layout", ["bshd", "hsd", "shd", "sd"])
def test_layouts(layout: str) -> None:
    shape = {} if layout == "bshd" else one_head if layout == "sd" else {"batch": 1}
    case = Case({"causal": True, "align": 1}, **shape)
    lead = (0,) * (4 - len(layout))

    def view(x: np.ndarray) -> np.ndarray:
        return (x.swapaxes(1, 2) if "sh" in layout else x)[lead]

    dout, dlse = cotangents(case)
    want = attention_backward(dout, *case.arrays(), dlse=dlse, **case.options)
    views = map(view, case.arrays())
    got = attention_backward(view(dout), *views, dlse=view(dlse), layout=layout, **case.options)
    for x, y in zip(got[:3], want[:3], strict=True):
        np.testing.assert_array_equal(x, view(y))


# ---- errors ----


def test_cotangents_that_do_not_fit() -> None:
    q, k, v = (x.astype(np.float32) for x in Case().arrays())
    dout, dlse = normal(2, 4, 3, 2).astype(np.float32), normal(2, 4, 3).astype(np.float32)
    problem = resolve(q, k, v)
    assert check_cotangents(problem, dout, None)[1] is None
    view, row = check_cotangents(problem, dout, dlse)
    assert view is dout and row is dlse
    for args, error, message in (
        ((dout.astype(np.float64), None), TypeError, "dout has dtype float64; it takes q's, float32"),
        ((dout.astype(int), None), TypeError, r"dout has dtype int64; .*dout\.astype"),
        ((dout.tolist(), None), TypeError, "dout is a list; it takes a NumPy array"),
        ((None, None), TypeError, "dout is None"),
        (
            (dout[:, :, :2], None),
            ValueError,
            r"dout has shape \(2, 4, 2, 2\); it takes \(2, 4, 3, 2\), out's in layout",
        ),
        ((dout, dlse[..., None]), ValueError, r"dlse has shape \(2, 4, 3, 1\); it takes \(2, 4, 3\), lse's in layout"),
        ((dout, dlse > 0), TypeError, "dlse has dtype bool"),
        ((dout, 1.0), TypeError, "dlse is a float"),
    ):
        with pytest.raises(error, match=message):
            check_cotangents(problem, *args)
    packed = resolve(*(x[0].swapaxes(0, 1) for x in (q, k, v)), layout="shd")
    view, row = check_cotangents(packed, dout[0].swapaxes(0, 1), dlse[0].swapaxes(0, 1))
    np.testing.assert_array_equal(view, dout[:1])
    np.testing.assert_array_equal(row, dlse[:1])


def test_arguments_that_do_not_fit() -> None:
    q, k, v = Case().arrays()
    dout, table = np.ones((2, 4, 3, 2)), normal(4)
    two = na.score_mod(lambda s, b, h, i, j, t: s + t[j] - t[h], lambda s, b, h, i, j, t: (1.0, 1.0))
    none = na.score_mod(lambda s, b, h, i, j, t: s, lambda s, b, h, i, j, t: (1.0, 1.0))
    number = na.score_mod(lambda s, b, h, i, j, t: s + t[j], lambda s, b, h, i, j, t: 1.0)
    short = na.score_mod(lambda s, b, h, i, j, t: s + t[j], lambda s, b, h, i, j, t: (1.0,))
    for mod, message in (
        (two, r"reads 2 elements of aux\[0\] at .*leave grad out"),
        (none, r"reads 0 elements of aux\[0\] at .*leave grad out"),
        (number, r"returns one number; it takes a tuple .*leave grad out"),
        (short, r"returns a tuple of 1; it takes a tuple .*leave grad out"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_backward(dout, q, k, v, score_mod=mod, aux=(table,), aux_grad=(0,))
        assert attention_backward(dout, q, k, v, score_mod=mod, aux=(table,)).daux == (None,)
        with pytest.raises(ValueError, match=message):
            attention_jvp(q, k, v, q, k, v, score_mod=mod, aux=(table,), aux_dot=(table,))
    for aux_grad, error, message in (
        (0, TypeError, "it takes a tuple of positions"),
        ((1,), ValueError, "names position 1; aux has 1 arrays"),
    ):
        with pytest.raises(error, match=message):
            attention_backward(dout, q, k, v, score_mod=number, aux=(table,), aux_grad=aux_grad)
    with pytest.raises(TypeError, match="only arrays of floats have a gradient"):
        attention_backward(dout, q, k, v, score_mod=number, aux=(np.arange(4),), aux_grad=(0,))
    for dots, error, message in (
        ({"bias_dot": table}, ValueError, "bias_dot is given, but bias is not"),
        ({"sinks_dot": table[:2], "sinks": table}, ValueError, r"sinks_dot has shape \(2,\); it takes sinks's, \(4,\)"),
        ({"sinks_dot": np.arange(4), "sinks": table}, TypeError, "sinks_dot has dtype int64"),
        ({"aux_dot": table}, ValueError, "aux_dot takes a tuple"),
    ):
        with pytest.raises(error, match=message):
            attention_jvp(q, k, v, q, k, v, **dots)


def test_the_arguments_are_left_alone() -> None:
    case = CASES["everything"]
    dout, dlse = cotangents(case)
    arrays = [dout, dlse, *case.arrays(), *arguments(case).values()]
    before = [x.copy() for x in arrays]
    attention_backward(dout, *arrays[2:5], dlse=dlse, aux_grad=(0,), **case.options)
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y)
