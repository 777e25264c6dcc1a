"""The reference's gradients against what can be said without them: central differences, complex steps through a dense
implementation of their own, and the identity <dout, J x> = <J' dout, x> between its two modes. Then what is defined
rather than derived: kinks, empty rows, and that nothing leaks from behind a mask.
"""

import doctest
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import pytest
import seeds
from hypothesis import given, settings
from hypothesis import strategies as st

import numba_attn as na
from numba_attn import reference
from numba_attn.gradients import Gradients, check_cotangents
from numba_attn.plan import resolve
from numba_attn.reference import attention, attention_backward, attention_jvp
from numba_attn.userfn import derivative
from numba_attn.userfn.derivative import differentiated

INF = math.inf
RNG = seeds.generator(12)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


# ---- the cases ----


def cap(s, b, h, i, j):
    return 1.5 * math.tanh(s / 1.5) - 0.25 * (h + b) * abs(i - j)


def many_functions(s, b, h, i, j, t):
    x = math.exp(-s * s) + math.log1p(abs(s)) * t[h] + math.sqrt(s * s + 1) / (2 + math.sin(t[h]))
    return na.where(j > i, x, s * np.tanh(s)) + max(min(s, 0.5), -0.5) + (s % 0.75) ** 2


def hides_odd_keys(s, b, h, i, j, t):
    return -INF if (i + j) % 2 else s * t[i, j]


def t5_bucket(distance):
    """Raffel et al. 2020: exact up to 2, logarithmic beyond, 4 buckets to either side."""
    n = abs(distance)
    far = 2 + int(math.log(max(n, 1) / 2) / math.log(8 / 2) * 2)
    return (4 if distance > 0 else 0) + (n if n < 2 else min(far, 3))


def t5(s, b, h, i, j, table):
    return s + table[t5_bucket(j - i), h]


def by_distance(s, b, h, i, j, table, ids, factor):
    return s * factor[ids[h]] + table[h, i - j + 3] * table[h, i - j + 3]


scaled_by_table = na.score_mod(lambda s, b, h, i, j, t: s * t[h, j], lambda s, b, h, i, j, t: (t[h, j], s))
hides_by_hand = na.score_mod(
    lambda s, b, h, i, j, t: s + t[j] if j <= i + 1 else -INF, lambda s, b, h, i, j, t: (1.0, 1.0)
)
cubed = na.score_mod(numba.njit(lambda s, b, h, i, j: s**3), numba.njit(lambda s, b, h, i, j: 3 * s**2))


@numba.njit
def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2.0)))


@dataclass
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 2
    heads: tuple[int, int] = (4, 2)
    lengths: tuple[int, int] = (3, 4)
    dims: tuple[int, int] = (3, 2)
    aux_grad: tuple[int, ...] = ()

    def arrays(self) -> list[np.ndarray]:
        """q, k and v in the layout of the options."""
        rng = seeds.generator(1)
        layout = self.options.get("layout", "bhsd")
        out = []
        for heads, length, dim in zip(
            (self.heads[0], self.heads[1], self.heads[1]),
            (self.lengths[0], self.lengths[1], self.lengths[1]),
            (self.dims[0], *self.dims),
            strict=True,
        ):
            size = {"b": self.batch, "h": heads, "s": length, "d": dim}
            out.append(rng.standard_normal([size[axis] for axis in layout]))
        return out


def everything() -> dict[str, Any]:
    return {
        "causal": True, "window": (3, None), "align": 1, "mask": na.lengths([4, 3]), "bias": normal(3, 1),
        "scale": 0.8, "softcap": 1.25, "alibi_slopes": abs(normal(4)), "sinks": normal(4), "score_mod": many_functions,
        "aux": (normal(4),), "dropout_p": 0.25, "seed": 9,
    }  # fmt: skip


some_hidden = np.where(np.arange(12).reshape(3, 4) % 5 == 1, -INF, normal(3, 4))
empty_row = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], bool)
one_head = {"batch": 1, "heads": (1, 1)}

CASES = {
    "plain": Case(),
    "one query, Dv = 5": Case(lengths=(1, 4), dims=(2, 5)),
    "MQA": Case(heads=(3, 1)),
    "scale": Case({"scale": -0.7}),
    "scale 0": Case({"scale": 0.0}),
    "causal bottom right": Case({"causal": True, "align": "bottom_right"}),
    "causal top left": Case({"causal": True, "align": "top_left"}),
    "causal, first row empty": Case({"causal": True, "align": -1, "sinks": normal(4)}),
    "causal, an offset a row": Case({"causal": True, "align": np.array([0, 2])}),
    "window": Case({"window": (1, 0), "align": "bottom_right"}),
    "bool mask": Case({"mask": empty_row}),
    "bool mask of heads": Case({"mask": RNG.random((2, 4, 3, 4)) < 0.6}),
    "lengths": Case({"mask": na.lengths([4, 2], [3, 1]), "sinks": normal(4)}),
    "no keys in a row": Case({"mask": na.lengths([3, 0]), "sinks": normal(4)}),
    "varlen": Case({"mask": na.varlen([0, 1, 2], [0, 2, 3]), "sinks": normal(4), "alibi_slopes": abs(normal(4)),
                    "align": "bottom_right", "causal": True}),
    "segments": Case({"mask": na.segments([0, 1, 0], [0, 0, 1, 2])}),
    "prefix": Case({"mask": na.prefix(2), "align": "top_left"}),
    "intervals": Case({"mask": na.intervals([0, 1, 2], [2, 4, 2])}),
    "mask_mod": Case({"mask": na.mask_mod(lambda b, h, i, j, t: t[h] * i <= j, (np.arange(4),))}),
    "bias (B, Hq, Sq, Sk)": Case({"bias": normal(2, 4, 3, 4)}),
    "bias (B, 1, 1, Sk)": Case({"bias": normal(2, 1, 1, 4)}),
    "bias (Hq, 1, Sk)": Case({"bias": normal(4, 1, 4)}),
    "bias (Sq, 1)": Case({"bias": normal(3, 1), "sinks": normal(4)}),
    "bias (1,)": Case({"bias": normal(1), "sinks": normal(4)}),
    "bias ()": Case({"bias": np.array(0.3), "sinks": normal(4)}),
    "bias with -inf": Case({"bias": some_hidden}),
    "softcap": Case({"softcap": 0.7}),
    "ALiBi (Hq,)": Case({"alibi_slopes": abs(normal(4)), "align": "bottom_right"}),
    "ALiBi (B, Hq)": Case({"alibi_slopes": normal(2, 4), "align": 1}),
    "sinks": Case({"sinks": normal(4)}),
    "sinks, one of them none": Case({"sinks": np.array([0.5, -INF, 1.0, 0.0]), "mask": empty_row[[0, 0, 2]]}),
    "dropout": Case({"dropout_p": 0.4, "seed": 5}),
    "score_mod": Case({"score_mod": cap}),
    "score_mod, helpers": Case({"score_mod": lambda s, b, h, i, j: gelu(s) - gelu(-s) / 3}),
    "score_mod, table": Case({"score_mod": many_functions, "aux": (normal(4),)}, aux_grad=(0,)),
    "score_mod that hides": Case({"score_mod": hides_odd_keys, "aux": (normal(3, 4),)}, aux_grad=(0,)),
    "score_mod, three arrays": Case({"score_mod": by_distance,
                                     "aux": (normal(4, 7), np.array([1, 0, 0, 1]), normal(2))}, aux_grad=(0, 2)),
    "score_mod that ignores the score": Case({"score_mod": lambda s, b, h, i, j, t: t[j], "aux": (normal(4),)},
                                             aux_grad=(0,)),
    "score_mod of indices": Case({"score_mod": lambda s, b, h, i, j: j - i}),
    "T5": Case({"score_mod": t5, "aux": (normal(8, 4),)}, lengths=(6, 7), heads=(2, 1), aux_grad=(0,)),
    "grad by hand": Case({"score_mod": cubed}),
    "grad by hand, table": Case({"score_mod": scaled_by_table, "aux": (normal(4, 4).T,)}, aux_grad=(0,)),
    "grad by hand, hides": Case({"score_mod": hides_by_hand, "aux": (normal(4),)}, aux_grad=(0,)),
    "softcap, bias, causal, sinks": Case({"softcap": 1.1, "bias": normal(4, 1, 4), "causal": True, "sinks": normal(4),
                                          "align": "bottom_right"}),
    "dropout, GQA, lengths": Case({"dropout_p": 0.3, "seed": 1, "mask": na.lengths([2, 4]), "bias": some_hidden}),
    "everything": Case(everything(), aux_grad=(0,)),
    "bshd": Case({"layout": "bshd", "bias": normal(4, 3, 4), "sinks": normal(4)}),
    "hsd": Case({"layout": "hsd", "bias": normal(4, 1, 1), "mask": empty_row}, batch=1),
    "shd": Case({"layout": "shd", "bias": normal(3, 4), "alibi_slopes": normal(4), "align": 0}, batch=1),
    "sd": Case({"layout": "sd", "bias": normal(1, 4), "score_mod": cap}, **one_head),
}  # fmt: skip

each_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def cotangents(case: Case) -> tuple[np.ndarray, np.ndarray]:
    rng = seeds.generator(2)
    out, lse = attention(*case.arrays(), **case.options, return_lse=True)
    return rng.standard_normal(out.shape), rng.standard_normal(lse.shape)


def arguments(case: Case) -> dict[str, np.ndarray]:
    """What has a gradient, by the name of its entry in Gradients."""
    q, k, v = case.arrays()
    named = {"dq": q, "dk": k, "dv": v}
    for name in ("bias", "sinks", "alibi_slopes"):
        if name in case.options:
            named[f"d{name}"] = case.options[name]
    return named | {f"daux {n}": case.options["aux"][n] for n in case.aux_grad}


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


# ---- empty rows ----


def test_an_empty_row_reaches_the_sink_alone() -> None:
    q, k, v = Case().arrays()
    mask = np.array([[True], [False], [True]]) & np.ones(4, bool)
    dout, dlse, bias, sinks = normal(2, 4, 3, 2), normal(2, 4, 3), normal(3, 4), normal(4)
    options = {"mask": mask, "bias": bias}
    grads = attention_backward(dout, q, k, v, dlse=dlse, sinks=sinks, **options)
    assert not grads.dq[:, :, 1].any() and not grads.dbias[1].any()
    others = [x[:, :, [0, 2]] for x in (dout, q, dlse)]
    alone = attention_backward(
        others[0], others[1], k, v, dlse=others[2], sinks=sinks, mask=mask[[0, 2]], bias=bias[[0, 2]]
    )
    np.testing.assert_allclose(grads.dk, alone.dk, rtol=1e-13)
    np.testing.assert_allclose(grads.dv, alone.dv, rtol=1e-13)
    np.testing.assert_allclose(grads.dsinks - alone.dsinks, dlse[:, :, 1].sum(0), rtol=1e-12)
    dout[:, :, 1] = np.nan
    again = attention_backward(dout, q, k, v, dlse=dlse, sinks=sinks, **options)
    for x, y in zip(again[:5], grads[:5], strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_query_in_no_sequence_reaches_nothing() -> None:
    q, k, v = Case().arrays()
    dout, dlse, sinks = normal(2, 4, 3, 2), normal(2, 4, 3), normal(4)
    for mask, rows in ((na.lengths([4, 4], [2, 2]), 2), (na.varlen([0, 1], [0, 4]), 1)):
        grads = attention_backward(dout, q, k, v, dlse=dlse, sinks=sinks, mask=mask)
        cut = [x[:, :, :rows] for x in (dout, q, dlse)]
        want = attention_backward(cut[0], cut[1], k, v, dlse=cut[2], sinks=sinks)
        bad = [np.where((np.arange(3) < rows).reshape(3, *(1,) * (x.ndim - 3)), x, np.nan) for x in (dout, q, dlse)]
        again = attention_backward(bad[0], bad[1], k, v, dlse=bad[2], sinks=sinks, mask=mask)
        assert not grads.dq[:, :, rows:].any()
        np.testing.assert_allclose(grads.dsinks, want.dsinks, rtol=1e-13)
        for x, y in zip((*again[:3], again.dsinks), (*grads[:3], grads.dsinks), strict=True):
            np.testing.assert_array_equal(x, y)
        _, moved = attention_jvp(
            *bad[1:2], k, v, *bad[1:2], k, v, sinks=sinks, sinks_dot=np.full(4, np.nan), mask=mask, return_lse=True
        )
        for x in moved:
            assert not x[:, :, rows:].any() and np.isnan(x[:, :, :rows]).all()


def test_nothing_visible() -> None:
    q, k, v = Case().arrays()
    dout, dlse, bias = normal(2, 4, 3, 2), normal(2, 4, 3), normal(3, 4)
    for hidden in ({"mask": np.zeros((3, 4), bool)}, {"score_mod": lambda s, b, h, i, j: -INF}):
        grads = attention_backward(dout, q, k, v, dlse=dlse, bias=bias, sinks=np.zeros(4), **hidden)
        assert not any(x.any() for x in grads[:4])
        np.testing.assert_allclose(grads.dsinks, dlse.sum(axis=(0, 2)), rtol=1e-13)
        (_, lse), (out_dot, lse_dot) = attention_jvp(
            q, k, v, q, k, v, sinks=np.zeros(4), sinks_dot=np.arange(4.0), bias=bias, return_lse=True, **hidden
        )
        assert not out_dot.any() and not lse.any()
        np.testing.assert_array_equal(lse_dot, np.broadcast_to(np.arange(4.0)[:, None], (2, 4, 3)))
        _, (out_dot, lse_dot) = attention_jvp(q, k, v, q, k, v, return_lse=True, **hidden)
        assert not out_dot.any() and not lse_dot.any()


def test_empty_shapes() -> None:
    for lengths, batch, dv in (((0, 3), 1, 2), ((3, 0), 1, 2), ((3, 3), 0, 2), ((3, 3), 1, 0)):
        case = Case({"sinks": np.zeros(4)}, lengths=lengths, batch=batch, dims=(2, dv))
        dout, dlse = cotangents(case)
        grads = attention_backward(dout, *case.arrays(), dlse=dlse, **case.options)
        for x, y in zip(grads[:3], case.arrays(), strict=True):
            assert x.shape == y.shape
        _, out_dot = attention_jvp(*case.arrays(), *case.arrays(), **case.options)
        assert out_dot.shape == dout.shape


# ---- numbers that are not finite ----


def flat(grads: Gradients) -> list[np.ndarray]:
    return [x for x in (*grads[:-1], *(grads.daux or ())) if x is not None]


HIDING = {
    "mask": {"mask": np.kron(np.eye(2, dtype=bool), np.ones((2, 3), bool))[:4, :5]},
    "segments": {"mask": na.segments([0, 0, 1, 1], [0, 0, 0, 1, 1])},
    "bias": {"bias": np.where(np.kron(np.eye(2, dtype=bool), np.ones((2, 3), bool))[:4, :5], 0.5, -INF)},
    "score_mod": {"score_mod": lambda s, b, h, i, j, t: s if t[i, j] else -INF,
                  "aux": (np.kron(np.eye(2, dtype=bool), np.ones((2, 3), bool))[:4, :5],)},
}  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0, "dropout_p": 0.3, "seed": 2}], ids=["plain", "softcap, dropout"])
def test_what_a_bad_number_feeds(bad: float, hiding: str, more: dict[str, Any]) -> None:
    """Two blocks, queries 0 and 1 with keys 0 to 2, queries 2 and 3 with keys 3 and 4. A bad number in the second
    leaves every bit of the first, and shows in all that it feeds."""
    case = Case({**HIDING[hiding], **more}, lengths=(4, 5))
    clean = dict(zip(("q", "k", "v"), case.arrays(), strict=True))
    clean["dout"], clean["dlse"] = cotangents(case)
    want = attention_backward(**clean, **case.options)
    for where, fed in (("q", "qkv"), ("k", "qkv"), ("v", "qk"), ("dout", "qkv"), ("dlse", "qk")):
        arrays = {name: x.copy() for name, x in clean.items()}
        arrays[where][:, :, 3] = bad
        got = attention_backward(**arrays, **case.options)
        for name in "qkv":
            x, y = getattr(got, f"d{name}"), getattr(want, f"d{name}")
            first = 2 if name == "q" else 3
            np.testing.assert_array_equal(x[:, :, :first], y[:, :, :first])
            if name not in fed:
                np.testing.assert_array_equal(x, y)
            elif name == "q" and where not in "kv":  # a key's number feeds both queries, a query's only its own
                np.testing.assert_array_equal(x[:, :, 2], y[:, :, 2])
                assert not np.isfinite(x[:, :, 3]).any()
            else:
                assert not np.isfinite(x[:, :, first:]).any()


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
def test_nothing_leaks_from_behind_a_mask(bad: float) -> None:
    """Keys 1 and 5 and query 3 in no visible pair; bias, aux and every tangent bad in all hidden pairs."""
    mask = np.tri(5, 6, dtype=bool) & (np.arange(6) != 1)
    mask[3] = False
    case = Case(lengths=(5, 6))
    q, k, v = case.arrays()
    dout, dlse = cotangents(case)
    bias, table = normal(5, 6), normal(5, 6)
    dots = [normal(*x.shape) for x in (q, k, v, bias, table)]

    def options(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        return {"mask": mask, "bias": x, "score_mod": lambda s, b, h, i, j, t: s * t[i, j], "aux": (y,)}

    def run(dout, q, k, v, bias, table, dots):
        given = options(bias, table)
        grads = attention_backward(dout, q, k, v, dlse=dlse, aux_grad=(0,), **given)
        moved = attention_jvp(q, k, v, *dots[:3], bias_dot=dots[3], aux_dot=(dots[4],), return_lse=True, **given)
        return [*flat(grads), *moved[0], *moved[1]]

    want = run(dout, q, k, v, bias, table, dots)
    no_query, no_key = np.arange(5) == 3, np.isin(np.arange(6), (1, 5))
    poisoned = [np.where(no_query[:, None], bad, x) for x in (dout, q)]
    poisoned += [np.where(no_key[:, None], bad, x) for x in (k, v)] + [np.where(mask, x, bad) for x in (bias, table)]
    bad_dots = [np.where(no_query[:, None], bad, dots[0]), *(np.where(no_key[:, None], bad, x) for x in dots[1:3])]
    bad_dots += [np.where(mask, x, bad) for x in dots[3:]]
    for x, y in zip(run(*poisoned, bad_dots), want, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not want[3][~mask].any() and not want[4][~mask].any()


def test_a_pair_that_score_mod_hides_has_no_slope() -> None:
    """log 0 hides the key, and its slopes, infinite with the table and NaN with the score, reach nothing."""
    case = Case({"score_mod": lambda s, b, h, i, j, t: s + np.log(t[j] + 0 * s * t[j])})
    dout, dlse = cotangents(Case())
    table, shown = np.array([0.5, 0.0, 2.0, 1.0]), np.array([0, 2, 3])
    more = {"bias": np.zeros((3, 4)), "alibi_slopes": np.zeros(4), "align": 0, "aux": (table,)}
    grads = attention_backward(dout, *case.arrays(), dlse=dlse, aux_grad=(0,), **more, **case.options)
    q, k, v = case.arrays()
    want = attention_backward(dout, q, k[:, :, shown], v[:, :, shown], dlse=dlse, bias=np.log(table[shown]))
    np.testing.assert_allclose(grads.dq, want.dq, rtol=1e-13)
    for x, y in ((grads.dk, want.dk), (grads.dv, want.dv)):
        np.testing.assert_allclose(x[:, :, shown], y, rtol=1e-13)
        assert not x[:, :, 1].any()
    np.testing.assert_allclose(grads.daux[0][shown], want.dbias / table[shown], rtol=1e-12, atol=1e-14)
    assert grads.daux[0][1] == 0
    np.testing.assert_allclose(grads.dbias[:, shown].sum(0), want.dbias, rtol=1e-12, atol=1e-14)
    assert not grads.dbias[:, 1].any() and np.isfinite(grads.dalibi_slopes).all()
    moved = attention_jvp(q, k, v, q, k, v, aux=(table,), aux_dot=(table,), **case.options)[1]
    assert np.isfinite(moved).all()


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes", "bias", "aux"])
def test_a_bad_parameter_shows(name: str) -> None:
    q, k, v = Case().arrays()
    x = normal(3, 4) if name in ("bias", "aux") else normal(4)
    options: dict[str, Any] = {"align": 0} if name == "alibi_slopes" else {}
    if name == "aux":
        options["score_mod"] = lambda s, b, h, i, j, t: s + t[i, j]
    clean = attention_backward(np.ones((2, 4, 3, 2)), q, k, v, **{name: (x,) if name == "aux" else x}, **options)
    x[1] = np.nan
    bad = attention_backward(np.ones((2, 4, 3, 2)), q, k, v, **{name: (x,) if name == "aux" else x}, **options)
    fed = (slice(None), slice(None), 1) if name in ("bias", "aux") else (slice(None), 1)
    assert np.isnan(bad.dq[fed]).all()
    bad.dq[fed] = clean.dq[fed]
    np.testing.assert_array_equal(bad.dq, clean.dq)


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


# ---- dual numbers ----

SCALAR = {
    "+": lambda s, t: s + t + 1 + (2 + s) + np.float64(3) + t,
    "-": lambda s, t: s - t - 1 + (2 - s) - (np.float64(3) - t),
    "*": lambda s, t: s * t * 2 * (3 * s) * (np.float64(0.5) * t),
    "/": lambda s, t: s / t + s / 4 + 2 / s + np.float64(3) / t,
    "//": lambda s, t: (s * 10) // t + s,
    "%": lambda s, t: s % 0.3 + 1.7 % t + s % t + (-s) % t,
    "** number": lambda s, t: s**3 + s**0.5 + t**-2 + s**0 + pow(s, 1),
    "** dual": lambda s, t: s**t + 2.0**s + math.pow(s, t) + math.pow(2.0, t) + math.pow(s, 2) + np.power(t, s),
    "negative": lambda s, t: -s + +t * -t,
    "abs": lambda s, t: abs(s) * 2 + abs(-t) + math.fabs(-s) + np.abs(t) + np.fabs(-t),
    "min, max": lambda s, t: min(s, t) * 2 + max(s, t, 0.1) + min(s, 5) + max(0.9, s),
    "comparisons": lambda s, t: s * ((s > t) + (s < t) * 2 + (s >= 0.5) + (t <= 1) + (s == s) + (s != t) + bool(t)),
    "branch": lambda s, t: s * s if s > t and not t < 0 else t * t,
    "where": lambda s, t: na.where(s > t, s * t, s) + na.where(t, t, 0) + np.where(s < t, s, t),
    "exp": lambda s, t: math.exp(s) + np.exp(-t) + math.expm1(s * t) + np.expm1(t),
    "log": lambda s, t: math.log(s) + np.log(t) * math.log1p(s) + np.log1p(t) + math.log2(s) * np.log10(t),
    "log2, log10": lambda s, t: np.log2(s) + math.log10(t) + math.log(2.0) * s,
    "sqrt": lambda s, t: math.sqrt(s) + np.sqrt(t * t + 1),
    "sin, cos": lambda s, t: math.sin(s) * math.cos(t) + np.sin(t) * np.cos(s),
    "tanh": lambda s, t: math.tanh(s * t) + np.tanh(s),
    "sinh, cosh": lambda s, t: math.sinh(s) * math.cosh(t) + np.sinh(t) + np.cosh(s),
    "atan, erf": lambda s, t: math.atan(s) + np.arctan(t) + math.erf(s * t),
    "floor, ceil": lambda s, t: math.floor(s * 3) * t + np.ceil(t * 3) * s + np.floor(s) + math.ceil(t),
    "int, float": lambda s, t: float(s) * int(t * 5) + round(s * 10) * t + math.isnan(s) * s,
}


@pytest.mark.parametrize("name", SCALAR)
@given(s=st.floats(0.15, 2.5), t=st.floats(0.15, 2.5))
@settings(seeds.hypothesis_profile(10))
def test_operations_of_dual_numbers(name: str, s: float, t: float) -> None:
    fn, eps = SCALAR[name], 1e-6
    s, t = np.float64(s), np.float64(t)
    value, slope, reads = differentiated(lambda s, b, h, i, j, aux: fn(s, aux[j]))(s, 0, 0, 0, 1, np.array([7.0, t]))
    assert value == fn(s, t)
    assert list(reads) == [(0, 1)]
    sides = [[(fn(s + d, t) - fn(s, t)) / d, (fn(s, t + d) - fn(s, t)) / d] for d in (eps, -eps)]
    if not np.allclose(sides[0], sides[1], rtol=1e-3, atol=1e-3):
        return  # a kink
    wide = [(fn(s + eps, t) - fn(s - eps, t)) / (2 * eps), (fn(s, t + eps) - fn(s, t - eps)) / (2 * eps)]
    np.testing.assert_allclose([slope, reads[0, 1]], wide, rtol=1e-6, atol=1e-7)


def slopes_at(fn: Callable[..., Any], s: float, t: float) -> tuple[float, float]:
    _, slope, reads = differentiated(lambda s, b, h, i, j, aux: fn(s, aux[0]))(s, 0, 0, 0, 0, np.array([t]))
    return float(slope), float(reads[0, 0])


@pytest.mark.parametrize(
    "fn, s, t, want",
    [
        (lambda s, t: abs(s) + 0 * t, 0.0, 1.0, (0.0, 0.0)),
        (lambda s, t: math.fabs(s) + np.abs(s) + 0 * t, -0.0, 1.0, (0.0, 0.0)),
        (lambda s, t: min(s, t), 1.0, 1.0, (1.0, 0.0)),
        (lambda s, t: min(t, s), 1.0, 1.0, (0.0, 1.0)),
        (lambda s, t: max(s, t), 1.0, 1.0, (1.0, 0.0)),
        (lambda s, t: max(t, s), 1.0, 1.0, (0.0, 1.0)),
        (lambda s, t: max(2.0, s) + t, 2.0, 1.0, (0.0, 1.0)),
        (lambda s, t: na.where(s > 0, np.log(s), t), -1.0, 1.0, (0.0, 1.0)),
        (lambda s, t: na.where(s > 0, s, t / 0.0), 1.0, 1.0, (1.0, 0.0)),
        (lambda s, t: na.where(True, s, np.sqrt(t - 2)), 1.0, 1.0, (1.0, 0.0)),
        (lambda s, t: math.floor(s) + math.ceil(s) + np.floor(s) + s // t, 2.0, 1.0, (0.0, 0.0)),
        (lambda s, t: s % t, 2.0, 1.0, (1.0, -2.0)),
        (lambda s, t: (s > t) + (s == t) + 0 * s, 1.0, 1.0, (0.0, 0.0)),
        (lambda s, t: s**2 + t, 0.0, 1.0, (0.0, 1.0)),
        (lambda s, t: s**1 + t, 0.0, 1.0, (1.0, 1.0)),
        (lambda s, t: s**0 + t, 0.0, 1.0, (0.0, 1.0)),
        (lambda s, t: s**t, 0.0, 2.0, (0.0, 0.0)),
        (lambda s, t: s ** (0 * t), 0.0, 1.0, (0.0, 0.0)),
        (lambda s, t: 0.0**s + t, 2.0, 1.0, (0.0, 1.0)),
        (lambda s, t: (-2.0) ** 3 * s + s**2 + t, -1.0, 1.0, (-10.0, 1.0)),
        (lambda s, t: math.sqrt(s) + t, 0.0, 1.0, (INF, 1.0)),
        (lambda s, t: 1.0 + 0 * t, 0.5, 1.0, (0.0, 0.0)),
        (lambda s, t: 3 if t > 0 else s, 0.5, 1.0, (0.0, 0.0)),
    ],
)
def test_conventions_where_there_is_no_derivative(fn, s, t, want) -> None:
    assert slopes_at(fn, s, t) == want


def test_names_of_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """However a function came to its name: a global, a closure, a default, a module in a module, a helper's helper."""
    from numba_attn import where

    tanh = math.tanh

    @numba.njit
    def inner(x, f=math.exp):
        return f(x) + tanh(x)

    def outer(x):
        square = lambda y: y * np.exp(0 * y) * y  # noqa: E731
        return where(x > 0, inner(x) + na.userfn.accepted.where(x < 0, 0.0, square(x)), 0.0)

    def power(x, n):
        return x * power(x, n - 1) if n else 1.0

    value, slope, reads = differentiated(lambda s, b, h, i, j: outer(s) + power(s, 3))(0.5, 0, 0, 0, 0)
    assert reads == {}
    np.testing.assert_allclose(value, math.exp(0.5) + math.tanh(0.5) + 0.25 + 0.125, rtol=1e-15)
    np.testing.assert_allclose(slope, math.exp(0.5) + 1 / math.cosh(0.5) ** 2 + 1.0 + 0.75, rtol=1e-15)
    assert inner.py_func.__defaults__ == (math.exp,), "the user's functions are as they were"


def test_what_is_read_of_aux() -> None:
    table, ids = np.arange(24.0).reshape(2, 3, 4), np.array([2, 0])

    def fn(s, b, h, i, j, t, ids):
        unused = t[0, 0, 0]
        row = t[b][h]
        return s * row[-1] + t[b, h, ids[i]] ** 2 + t.shape[2] + len(row) + (unused < 0)

    for x in (table, np.asfortranarray(table), np.repeat(table, 2, axis=2)[:, :, ::2]):
        value, slope, reads = differentiated(fn)(2.0, 1, 2, 0, 3, x, ids)
        assert value == 2 * 23 + 22.0**2 + 8 and slope == 23
        assert reads == {(0, 0): 0.0, (0, 23): 2.0, (0, 22): 44.0}


def test_one_element_read_twice() -> None:
    def fn(s, b, h, i, j, t):
        return t[j] * t[j] + s

    assert differentiated(fn)(0.0, 0, 0, 0, 1, np.array([1.0, 3.0]))[2] == {(0, 1): 6.0}


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(reference).failed == 0
    assert doctest.testmod(derivative).failed == 0
