"""The reference's gradients where they are defined rather than derived: rows that see nothing, numbers that are not
finite, and that nothing leaks from behind a mask.
"""

from typing import Any

import numpy as np
import pytest
from cases_of_gradients import INF, Case, cotangents, normal

import numba_attn as na
from numba_attn.gradients import Gradients
from numba_attn.reference import attention_backward, attention_jvp

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
