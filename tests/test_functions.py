"""score_mod and mask_mod: which functions are taken, when two are the same, and what their arguments are.

Numba freezes what a function captures. So a function is recognised by its code, defaults and captured scalars, and
arrays come in through aux, where a change between two calls has to show.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import seeds
from cases import DTYPES

import numba_attn as na

RNG = seeds.generator(0)
Q, K, V = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 21, 16), (2, 2, 35, 16), (2, 2, 35, 16)))
FACTOR = 2.0
TABLE = np.arange(35.0, dtype=np.float32)


def agrees(
    fn: Any, aux: tuple[Any, ...] = (), kind: str = "score_mod", dtype: Any = np.float32, tol: float = 3e-6
) -> np.ndarray:
    """The library's result with fn, once the reference, which calls it from Python, has said the same."""
    q, k, v = (x.astype(dtype) for x in (Q, K, V))
    options: dict[str, Any] = {"score_mod": fn, "aux": aux} if kind == "score_mod" else {"mask": na.mask_mod(fn, aux)}
    out, lse = na.attention(q, k, v, **options, return_lse=True)
    want, want_lse = na.reference.attention(q, k, v, **options, return_lse=True)
    assert np.isfinite(out.astype(np.float32)).all()
    np.testing.assert_allclose(out.astype(np.float64), want, rtol=0, atol=tol)
    np.testing.assert_allclose(lse.astype(np.float64), want_lse, rtol=0, atol=3 * tol)
    return out


def compiled() -> int:
    from numba_attn.cpu.compile import LOG

    return len(LOG)


def test_captured_scalars_are_part_of_a_function() -> None:
    def scaled(c: float) -> Callable[..., Any]:
        return lambda s, b, h, i, j: s * c

    results = [agrees(scaled(c)) for c in (0.5, 2.0, 2, -1.0, 0.5, True)]
    assert (results[0] == results[4]).all()
    for n in (1, 3):
        assert np.abs(results[0] - results[n]).max() > 1e-3


def test_defaults_are_part_of_a_function() -> None:
    results = []
    for c in (0.5, 2.0, 3.0):

        def scaled(s, b, h, i, j, c=c):
            return s * c

        results.append(agrees(scaled))
    assert np.abs(results[0] - results[1]).max() > 1e-3 and np.abs(results[1] - results[2]).max() > 1e-3


def test_a_global_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(s, b, h, i, j):
        return s * FACTOR

    first = agrees(scaled)
    monkeypatch.setitem(globals(), "FACTOR", 0.5)
    assert np.abs(agrees(scaled) - first).max() > 1e-3


def test_a_helper_that_changes() -> None:
    def make(c: float) -> Callable[..., Any]:
        @numba.njit
        def helper(x):
            return x * c

        return lambda s, b, h, i, j: helper(s) + helper(1.0)

    assert np.abs(agrees(make(0.5)) - agrees(make(2.0))).max() > 1e-3


def test_captured_tuples_of_short_life() -> None:
    """Whatever a function captures, its address says nothing once it is gone."""

    def make(c: float) -> Callable[..., Any]:
        pair = (c, c + 1.0)
        return lambda s, b, h, i, j: s * pair[0] + pair[1] * (j % 2)

    for n in range(12):
        agrees(make(0.25 * n))


def test_zeros_of_both_signs() -> None:
    """0.0 == -0.0, but they are not the same function."""

    def make(c: float) -> Callable[..., Any]:
        return lambda s, b, h, i, j: s + min(max(1.0 / c, -1.0), 1.0) * (j % 2)

    q, k, v = Q, K, V
    up, down = (na.attention(q, k, v, score_mod=make(c)) for c in (0.0, -0.0))
    assert np.abs(up - down).max() > 1e-3


def test_a_lambda_in_a_loop_compiles_once() -> None:
    agrees(lambda s, b, h, i, j: s * 0.123)
    before = None
    for _ in range(4):
        agrees(lambda s, b, h, i, j: s * 0.25 + 0.5)
        before = compiled() if before is None else before
    assert compiled() == before


def test_njit_functions_and_records() -> None:
    def halved(s, b, h, i, j):
        return s * 0.5 - 0.01 * abs(i - j)

    want = agrees(halved)
    assert (agrees(numba.njit(halved)) == want).all()
    assert (agrees(na.score_mod(halved)) == want).all()
    assert (agrees(na.score_mod(halved, grad=lambda s, b, h, i, j: 0.5)) == want).all()

    def even(b, h, i, j):
        return (i + j) % 2 == 0

    assert (agrees(numba.njit(even), kind="mask_mod") == agrees(even, kind="mask_mod")).all()


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int8", "int32", "int64", "uint8", "bool"]
)
def test_aux_of_every_dtype(dtype: str) -> None:
    table = (8 * RNG.random(35)).astype(DTYPES.get(dtype, dtype))
    agrees(lambda s, b, h, i, j, t: s + 0.1 * t[j], (table,))
    agrees(lambda b, h, i, j, t: t[j] < 3 or j == 0, (table,), kind="mask_mod")


def test_aux_of_every_rank() -> None:
    tables = [RNG.standard_normal(shape).astype(np.float32) for shape in ((35,), (21, 35), (4, 21, 35), (2, 4, 21, 35))]

    def four(s, b, h, i, j, t1, t2, t3, t4):
        return s + t1[j] + t2[i, j] * t3[h, i, j] - t4[b, h, i, j]

    agrees(four, tuple(tables), tol=1e-5)
    agrees(four, tuple(np.asfortranarray(t) for t in tables), tol=1e-5)
    agrees(lambda s, b, h, i, j, t: s + t.shape[0] * 0.01, (tables[0],))


def test_aux_that_changes_between_calls() -> None:
    def shifted(s, b, h, i, j, t):
        return s + t[j]

    table = np.zeros(35, np.float32)
    first = agrees(shifted, (table,))
    table[3] = 4.0
    assert np.abs(agrees(shifted, (table,)) - first).max() > 1e-3
    half = table.astype(np.float16)
    second = agrees(shifted, (half,))
    half[3] = 0
    assert (agrees(shifted, (half,)) == first).all() and (second != first).any()


def test_a_mask_record_reads_its_aux_when_it_is_used() -> None:
    allowed = np.ones(35, bool)
    mask = na.mask_mod(lambda b, h, i, j, t: t[j], (allowed,))
    first = na.attention(Q, K, V, mask=mask)
    allowed[10:] = False
    second = na.attention(Q, K, V, mask=mask)
    assert np.abs(second - na.reference.attention(Q, K, V, mask=mask)).max() < 3e-6
    assert (first != second).any()


def test_arrays_that_would_freeze_are_refused() -> None:
    local = TABLE.copy()
    for fn in (
        lambda s, b, h, i, j: s + local[j],
        lambda s, b, h, i, j: s + TABLE[j],
        lambda s, b, h, i, j, t=local: s + t[j],
    ):
        with pytest.raises(TypeError, match="aux"):
            na.attention(Q, K, V, score_mod=fn)

    with pytest.raises(TypeError, match="aux"):
        na.attention(Q, K, V, mask=na.mask_mod(lambda b, h, i, j: local[j] > 3))


@numba.njit
def from_the_table(j):
    return TABLE[j]


def test_arrays_that_would_freeze_in_a_helper_are_refused() -> None:
    with pytest.raises(TypeError, match="aux"):
        na.attention(Q, K, V, score_mod=lambda s, b, h, i, j: s + from_the_table(j))


@pytest.mark.parametrize("fn", [
    lambda s, b, h, i, j: s + 0.1 * (i // 4) - 0.1 * (j % 5),
    lambda s, b, h, i, j: s * (0.5 if i >= j else 2.0),
    lambda s, b, h, i, j: -math.inf if (j > i + 3 and h == 1) else s,
    lambda s, b, h, i, j: s + (j - i) ** 2 * 1e-3,
    lambda s, b, h, i, j: abs(s) + min(s, 0.25) - max(s, -0.25),
    lambda s, b, h, i, j: na.where((i + h) % 2 == 0, s, s - 1.0),
    lambda s, b, h, i, j: na.where(i == j, s, na.where(i < j, -math.inf, 2 * s)),
    lambda s, b, h, i, j: math.exp(-abs(s)) + math.log1p(abs(s)) + math.tanh(s),
    lambda s, b, h, i, j: math.sin(s) * math.cos(j) + math.sqrt(abs(s) + b),
    lambda s, b, h, i, j: math.pow(abs(s) + 1, 1.5) - math.log(abs(s) + 1),
    lambda s, b, h, i, j: s / (1 + abs(i - j)),
    lambda s, b, h, i, j: 1.0,
    lambda s, b, h, i, j: 0,
    lambda s, b, h, i, j: j,
    lambda s, b, h, i, j: s + (i > j) - (i < j and b == 1),
    lambda s, b, h, i, j: -s if not (i & 1) else s,
    lambda s, b, h, i, j: s + 2.0 ** (-(h + 1)) * j,
], ids=range(17))  # fmt: skip
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_what_a_score_mod_may_compute(fn: Callable[..., Any], dtype: str) -> None:
    agrees(fn, dtype=DTYPES[dtype], tol={"float64": 1e-13, "float32": 2e-5, "bfloat16": 3e-2}[dtype])


@pytest.mark.parametrize("fn", [
    lambda b, h, i, j: True,
    lambda b, h, i, j: 1,
    lambda b, h, i, j: j <= i or j == 34,
    lambda b, h, i, j: (j ^ i) & 1,
    lambda b, h, i, j: (i // 3 == j // 5) | (j == 0),
    lambda b, h, i, j: (abs(i - j) < 4 + h and b >= 0) or j == 1,
    lambda b, h, i, j: not (j % 3),
    lambda b, h, i, j: (-5 // (j + 1) < 0 and (i - j) % 4 != 3) or j == 0,
    lambda b, h, i, j: na.where(i < 5, j < 3, j > 2),
], ids=range(9))  # fmt: skip
def test_what_a_mask_mod_may_compute(fn: Callable[..., Any]) -> None:
    agrees(fn, kind="mask_mod")


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_indices_are_array_indices(layout: str) -> None:
    """Every pair its own number: b, h, i and j arrive where they belong, in groups and in packed sequences too."""
    q, k, v = (np.zeros(x.shape) for x in (Q, K, V))
    v[...] = np.eye(35, 16)
    if layout == "bshd":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    table = RNG.standard_normal((2, 4, 21, 35))

    def look_up(s, b, h, i, j, t):
        return t[b, h, i, j]

    for mask in (None, na.varlen([0, 6, 21], [0, 20, 35]), na.lengths([35, 20])):
        options = dict(score_mod=look_up, aux=(table,), mask=mask, layout=layout)
        np.testing.assert_allclose(
            na.attention(q, k, v, **options), na.reference.attention(q, k, v, **options), atol=1e-14
        )
