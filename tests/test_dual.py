"""Derivatives of score_mod functions: the compiled passes over a tile, against central differences in Python."""

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import seeds
from test_modifiers import FUNCTIONS, PER_HEAD, TABLE

import numba_attn as na
from numba_attn.cpu.compile import LOG
from numba_attn.cpu.modifiers import tile_function
from numba_attn.cpu.target import aux_table
from numba_attn.userfn.accepted import plain_function

KEYS, LANES, B, H, I, J = 7, 9, 1, 2, 4, 6  # a tile of queries 4 to 12 and keys 6 to 12
STRIDE = LANES + 3
RNG = seeds.generator(0)
LONG = RNG.standard_normal(40)
SMALL = RNG.standard_normal((3, 4))


def t5(s, b, h, i, j, t):
    """Raffel et al. 2020: buckets of relative positions, exact ones and logarithmic ones."""
    d, bucket = i - j, 0
    if d < 0:
        d, bucket = -d, 8
    if d < 4:
        bucket += d
    else:
        bucket += min(4 + int(math.log((d + 0.5) / 4) / math.log(4.0) * 4), 7)
    return s + t[bucket, h]


@numba.njit
def weighted(x, t, n):
    return x * t[n] + 1.0 / (1.0 + t[n] * t[n])


def polynomial(s, b, h, i, j, t):
    y, x = 0.0, 1.0
    for n in range(t.shape[0]):
        y += t[n, h] * x
        x *= s
    return y


def branches(s, b, h, i, j, t, u):
    if j > i + 3:
        return -math.inf
    return s * t[h, j] if j <= i else s - u[h] * (j - i)


MORE = {
    "softcap": (lambda s, b, h, i, j: 30 * math.tanh(s / 30), ()),
    "learned decay": (lambda s, b, h, i, j, t: s - math.exp(t[h]) * abs(i - j), (PER_HEAD,)),
    "t5": (t5, (RNG.standard_normal((16, 4)),)),
    "two reads": (lambda s, b, h, i, j, t: s * t[h, i] + t[h, j] * t[h, i], (TABLE,)),
    "branches": (branches, (TABLE, PER_HEAD)),
    "a loop of reads": (polynomial, (SMALL,)),
    "rows": (lambda s, b, h, i, j, t: s + t[int(b)][int(h)] * t[int(b), int(i) % 4] * len(t) * t.ndim, (SMALL,)),
    "negative indices": (lambda s, b, h, i, j, t, u: s * t[-1, -h - 1] + u[i - 20] + t[-2, 0], (SMALL, LONG)),
    "strided": (lambda s, b, h, i, j, t: s * t[i % 4, j % 3], (SMALL.T,)),
    "helper": (lambda s, b, h, i, j, t: weighted(s, t, j) + weighted(t[j], t, i), (LONG,)),
    "njit": (numba.njit(lambda s, b, h, i, j, t: math.sin(s * t[j])), (LONG,)),
    "an array of ints": (lambda s, b, h, i, j, n, t: s * t[n[j]], (np.arange(40)[::-1].copy(), LONG)),
    "integer powers": (lambda s, b, h, i, j, t: s**2 - s**3 / 3 + s**1 * t[j] ** 4 + s**0 + (i - j) ** 2, (LONG,)),
    "powers": (lambda s, b, h, i, j, t: (s * s + 1) ** -1.5 + math.pow(s * s + 1, t[j]) + 2.0**s + pow(3, s), (LONG,)),
    "power of the index": (lambda s, b, h, i, j, t: s + (i + 1) ** t[h], (PER_HEAD,)),
    "exp, log": (lambda s, b, h, i, j: math.exp(s / 2) + math.log(s * s + 0.1) + math.log1p(s * s), ()),
    "numpy": (lambda s, b, h, i, j: np.exp(s) * np.sin(s) + np.cos(s) * np.sqrt(s * s + 1) - np.log(s * s + 1), ()),
    "np.log1p": (lambda s, b, h, i, j: np.log1p(abs(s)) * np.tanh(s), ()),
    "libm": (lambda s, b, h, i, j: math.expm1(s) + math.log2(s * s + 1) + math.log10(s * s + 2) + math.atan(s), ()),
    "hyperbolic": (lambda s, b, h, i, j: math.sinh(s) - math.cosh(s / 2) + math.erf(s), ()),
    "quotients": (
        lambda s, b, h, i, j, t: s / (1 + t[j] * t[j]) + 2 / (s * s + 1) + t[j] / (s * s + 3) + s / 7,
        (LONG,),
    ),
    "remainders": (lambda s, b, h, i, j, t: s % 0.7 + 5 % (2 + s * s) + s // 0.5 + 4 * s % (1 + t[j] * t[j]), (LONG,)),
    "floor, ceil": (lambda s, b, h, i, j: s * math.floor(3 * s) + math.ceil(s) + int(2 * s) * s, ()),
    "fabs, signs": (lambda s, b, h, i, j: math.fabs(s) - abs(-s * 2) + +s, ()),
    "min, max": (lambda s, b, h, i, j, t: min(s, t[j]) * 2 + max(s, 0.1) - max(0, s) + min(s, i - j), (LONG,)),
    "comparisons": (lambda s, b, h, i, j: s * (s > 0.3) + s * s * (s <= 0) if s != 0.25 and s != 2 else 3.0, ()),
    "truth": (lambda s, b, h, i, j: s * 2 if s else -s, ()),
    "where": (lambda s, b, h, i, j, t: na.where(s > 0, math.log(abs(s)), na.where(i > j, t[j], 2)), (LONG,)),
    "where, index": (lambda s, b, h, i, j: na.where(s > 0, s, i - j) * 0.5, ()),
    "a number": (lambda s, b, h, i, j, t: t[()] * float(s) + float(t[()]) / (1 + float(i)), (np.array(0.7),)),
    "constant": (lambda s, b, h, i, j: 0, ()),
    "no score": (lambda s, b, h, i, j, t: t[h], (PER_HEAD,)),
    "bool": (lambda s, b, h, i, j: i > j, ()),
}
ALL = FUNCTIONS | MORE
DTYPES = [np.float64, np.float32]


def run(fn: Any, kind: str, *tiles: np.ndarray, aux: tuple[Any, ...] = (), asked: Any = (), tail: Any = None) -> None:
    """Call the tile function on (KEYS, STRIDE) tiles, in place."""
    elem = "f32" if tiles[0].dtype == np.float32 else "f64"
    table = aux_table(aux)
    address = tile_function(fn, kind, elem, aux, asked=asked)
    numbers = [*(x.ctypes.data for x in tiles), STRIDE, LANES, B, H, I, J, KEYS, table.ctypes.data]
    numbers += [] if tail is None else [tail.ctypes.data]
    ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * len(numbers))(address)(*numbers)


def aux_grad(fn: Any, s: np.ndarray, weight: np.ndarray, aux: Any, asked: Any = None) -> tuple[Any, int]:
    asked = tuple(a.dtype.kind == "f" for a in aux) if asked is None else asked
    sums = [np.zeros(a.shape) if yes else None for a, yes in zip(aux, asked, strict=True)]
    table = np.array([0, *(0 if x is None else x.ctypes.data for x in sums)])
    run(fn, "aux_grad", s, weight, aux=aux, asked=asked, tail=table)
    return sums, int(table[0])


def python(fn: Any, s: Any, aux: Any = ()) -> np.ndarray:
    """fn of every pair, called from Python in float64; a hidden one is 0."""
    fn, out = plain_function(fn), np.zeros((KEYS, LANES))
    wide = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in aux]
    for j, i in np.ndindex(KEYS, LANES):
        y = float(fn(float(s[j, i]), B, H, I + i, J + j, *wide))
        out[j, i] = 0.0 if y == -math.inf else y
    return out


def tile(dtype: Any, seed: int = 5) -> np.ndarray:
    return seeds.generator(seed).standard_normal((KEYS, STRIDE)).astype(dtype)


def close(got: Any, want: Any, dtype: Any) -> None:
    tol = 1e-7 if dtype == np.float64 else 1e-4
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


STEP = 1e-5
HAND: dict[str, tuple[Any, Any]] = {
    "softcap": (
        na.score_mod(MORE["softcap"][0], grad=lambda s, b, h, i, j: 1 - math.tanh(s / 30) ** 2),
        (),
    ),
    "table": (
        na.score_mod(FUNCTIONS["table"][0], grad=lambda s, b, h, i, j, t: (1, 1.0)),
        (TABLE,),
    ),
    "two arrays": (
        na.score_mod(FUNCTIONS["two arrays"][0], grad=numba.njit(lambda s, b, h, i, j, t, u: (True, u[h], t[h, j]))),
        FUNCTIONS["two arrays"][1],
    ),
    "hides": (
        na.score_mod(
            lambda s, b, h, i, j, t: s * t[j] * t[j] if j <= i else -math.inf,
            grad=lambda s, b, h, i, j, t: (t[j] * t[j], 2 * s * t[j]),
        ),
        (LONG,),
    ),
}
CASES = ALL | {f"{name}, by hand": case for name, case in HAND.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_derivative_by_the_score(name: str, dtype: Any) -> None:
    fn, aux = CASES[name]
    s = tile(dtype)
    got, slope, value = s.copy(), np.full_like(s, np.nan), s.copy()
    run(fn, "score_grad", got, slope, aux=aux)
    run(fn, "score", value, aux=aux)
    np.testing.assert_array_equal(got, value)  # what the forward pass computes, to the bit
    wide = s.astype(np.float64)
    want = (python(fn, wide + STEP, aux) - python(fn, wide - STEP, aux)) / (2 * STEP)
    close(slope[:, :LANES], want, dtype)
    np.testing.assert_array_equal(got[:, LANES:], s[:, LANES:])
    assert np.isnan(slope[:, LANES:]).all()


@pytest.mark.parametrize("name", [name for name, (_, aux) in CASES.items() if aux])
@pytest.mark.parametrize("dtype", DTYPES)
def test_derivative_by_aux(name: str, dtype: Any) -> None:
    fn, aux = CASES[name]
    s, weight = tile(dtype), tile(dtype, 6)
    hidden = s[:, :LANES].copy()
    for j, i in np.ndindex(KEYS, LANES):
        if plain_function(fn)(float(hidden[j, i]), B, H, I + i, J + j, *aux) == -math.inf:
            weight[j, i] = 0
    before = s.copy()
    sums, status = aux_grad(fn, s, weight, aux)
    assert status == 0
    np.testing.assert_array_equal(s, before)
    wide = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in aux]
    for n, got in enumerate(sums):
        if got is None:
            continue
        want = np.zeros(aux[n].shape)
        for at in np.ndindex(want.shape):
            ends = []
            for step in (STEP, -STEP):
                moved = wide.copy()
                moved[n] = moved[n].copy()
                moved[n][at] += step
                ends.append(np.sum(weight[:, :LANES].astype(np.float64) * python(fn, s, moved)))
            want[at] = (ends[0] - ends[1]) / (2 * STEP)
        close(got, want, dtype)


@pytest.mark.parametrize("name", [*(name for name, (_, aux) in CASES.items() if aux), "softcap", "softcap, by hand"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_derivative_along_a_direction(name: str, dtype: Any) -> None:
    fn, aux = CASES[name]
    s, tangent = tile(dtype), tile(dtype, 6)
    dots = [seeds.generator(7).standard_normal(a.shape) if a.dtype.kind == "f" else None for a in aux]
    for n, dot in enumerate(dots):  # any strides, float64 or the accumulation type
        if dot is not None and n == 0 and dot.ndim:
            dots[n] = np.asfortranarray(dot)[::-1].astype(dtype, order="K")
    asked = tuple(d is not None and (True if d.dtype == dtype else d.dtype) for d in dots)
    got, along = s.copy(), tangent.copy()
    run(fn, "score_jvp", got, along, aux=aux, asked=asked, tail=aux_table(tuple(d for d in dots if d is not None)))
    wide = s[:, :LANES].astype(np.float64)
    ends = []
    for step in (STEP, -STEP):
        moved = [a if d is None else a.astype(np.float64) + step * d for a, d in zip(aux, dots, strict=True)]
        ends.append(python(fn, wide + step * tangent[:, :LANES].astype(np.float64), moved))
    close(along[:, :LANES], (ends[0] - ends[1]) / (2 * STEP), dtype)
    log2e = 1 / math.log(2)
    value = np.where(np.isneginf(got), 0, got)[:, :LANES] / log2e
    np.testing.assert_allclose(value, python(fn, wide, aux), rtol=1e-5 if dtype == np.float32 else 1e-12, atol=1e-6)
    np.testing.assert_array_equal(along[:, LANES:], tangent[:, LANES:])


def slope_at(fn: Callable[..., Any], s: float, dtype: Any = np.float64) -> float:
    at = np.full((KEYS, STRIDE), s, dtype)
    slope = np.full_like(at, 77)
    run(fn, "score_grad", at, slope)
    assert len(np.unique(slope[:, :LANES])) == 1 or np.isnan(slope[:, :LANES]).all()
    return float(slope[0, 0])


@pytest.mark.parametrize(("fn", "s", "want"), [
    (lambda s, b, h, i, j: abs(s), 0.0, 0.0),
    (lambda s, b, h, i, j: math.fabs(s), -0.0, 0.0),
    (lambda s, b, h, i, j: min(s, 2 * s), 0.0, 1.0),
    (lambda s, b, h, i, j: max(2 * s, s), 0.0, 2.0),
    (lambda s, b, h, i, j: max(s, 0), 0.0, 1.0),
    (lambda s, b, h, i, j: max(0, s), 0.0, 0.0),
    (lambda s, b, h, i, j: na.where(s > 0, math.log(s), 3 * s), -1.0, 3.0),
    (lambda s, b, h, i, j: na.where(s > 0, math.sqrt(s), 3 * s), 0.0, 3.0),
    (lambda s, b, h, i, j: math.sqrt(s), 0.0, math.inf),
    (lambda s, b, h, i, j: math.sqrt(max(s, 0)) + s, -1.0, 1.0),
    (lambda s, b, h, i, j: s**2, 0.0, 0.0),
    (lambda s, b, h, i, j: s**1, 0.0, 1.0),
    (lambda s, b, h, i, j: s**0, 0.0, 0.0),
    (lambda s, b, h, i, j: s**0.0, 0.0, 0.0),
    (lambda s, b, h, i, j: s**1.0, 0.0, 1.0),
    (lambda s, b, h, i, j: s**7, 0.0, 0.0),
    (lambda s, b, h, i, j: s**0.5, 0.0, math.inf),
    (lambda s, b, h, i, j: 0.0**s, 2.0, 0.0),
    (lambda s, b, h, i, j: s % 2, 3.0, 1.0),
    (lambda s, b, h, i, j: s // 2 + math.floor(s) + math.ceil(s), 4.0, 0.0),
    (lambda s, b, h, i, j: s if s > 0 else -math.inf, -1.0, 0.0),
    (lambda s, b, h, i, j: -math.inf * s, 1.0, 0.0),
    (lambda s, b, h, i, j: math.tanh(s), 1e30, 0.0),
    (lambda s, b, h, i, j: s * 2, math.nan, 2.0),
    (lambda s, b, h, i, j: s * s, math.nan, math.nan),
], ids=range(25))  # fmt: skip
def test_kinks(fn: Callable[..., Any], s: float, want: float) -> None:
    for dtype in DTYPES:
        np.testing.assert_equal(slope_at(fn, s, dtype), want)


def test_a_read_of_derivative_infinity_leaves_the_others_alone() -> None:
    table = np.array([0.0, 2.0])
    s, weight = tile(np.float64), np.ones((KEYS, STRIDE))
    sums, _ = aux_grad(lambda s, b, h, i, j, t: s * t[1] + math.sqrt(t[0]), s, weight, (table,))
    assert sums[0][0] == math.inf
    np.testing.assert_allclose(sums[0][1], s[:, :LANES].sum())


def test_sums_are_in_the_order_of_the_tile() -> None:
    """j by j, lane by lane, products in float64; pairs of weight 0 are not evaluated, NaN is a weight."""
    s, weight = tile(np.float32), tile(np.float32, 6)
    weight[2, 3] = 0
    weight[3, 4] = np.nan
    s[2, 3] = np.nan
    for fn in (
        lambda s, b, h, i, j, t: s * t[i, 1],
        na.score_mod(lambda s, b, h, i, j, t: s * t[i, 1], grad=lambda s, b, h, i, j, t: (t[i, 1], s)),
    ):
        sums, _ = aux_grad(fn, s, weight, (np.ones((14, 2)),))
        want = np.zeros((14, 2))
        for j, i in np.ndindex(KEYS, LANES):
            if weight[j, i] != 0:
                want[I + i, 1] += np.float64(weight[j, i]) * np.float64(s[j, i])
        np.testing.assert_array_equal(sums[0], want)


def test_only_the_arrays_that_are_asked_for() -> None:
    fn, aux = MORE["branches"]
    s, weight = tile(np.float64), tile(np.float64, 6)
    both, _ = aux_grad(fn, s, weight, aux)
    second, _ = aux_grad(fn, s, weight, aux, (False, True))
    assert second[0] is None
    np.testing.assert_array_equal(second[1], both[1])


def test_status_where_a_gradient_by_hand_does_not_know_the_element() -> None:
    s, weight = tile(np.float64), tile(np.float64, 6)

    def status(fn: Any, grad: Any = lambda s, b, h, i, j, t, u: (1.0, 1.0, 1.0)) -> int:
        mod = na.score_mod(fn, grad=grad) if grad else fn
        return aux_grad(mod, s, weight, (LONG[:20], LONG[20:]))[1]

    assert status(lambda s, b, h, i, j, t, u: s + t[j] + u[j] + u[int(j)]) == 0
    assert status(lambda s, b, h, i, j, t, u: s + t[j]) == 2
    assert status(lambda s, b, h, i, j, t, u: s + t[j] + t[j + 1] + u[i]) == 1
    assert status(lambda s, b, h, i, j, t, u: s + t[i] + (u[j] if j < i else s)) == 2
    for grad in (None, lambda s, b, h, i, j, t, u: (1.0, 1.0, 1.0)):  # outside t, but inside what it is a part of
        assert status(lambda s, b, h, i, j, t, u: s + t[j + 10] * u[i], grad) == -1


def test_a_direction_is_nan_where_a_gradient_by_hand_does_not_know_the_element() -> None:
    mod = na.score_mod(lambda s, b, h, i, j, t: s + t[j] + t[j + 1], grad=lambda s, b, h, i, j, t: (1.0, 1.0))
    s, tangent = tile(np.float64), tile(np.float64, 6)
    run(mod, "score_jvp", s, tangent, aux=(LONG,), asked=(True,), tail=aux_table((LONG,)))
    assert np.isnan(tangent[:, :LANES]).all()


@pytest.mark.parametrize("kind", ["score_grad", "aux_grad", "score_jvp"])
def test_a_function_compiles_once(kind: str) -> None:
    def address(c: float, grad: Any = None, asked: Any = (True,), kind: str = kind) -> int:
        fn = na.score_mod(lambda s, b, h, i, j, t: s * c + t[j], grad=grad)
        return tile_function(fn, kind, "f64", (LONG,), asked=asked)

    def by_hand(c: float) -> Callable[..., Any]:
        return lambda s, b, h, i, j, t: (c, 1.0)

    first, n = address(2.0), len(LOG)
    assert all(address(2.0) == first for _ in range(3)) and len(LOG) == n
    others = {address(3.0), address(2.0, by_hand(2.0)), address(2.0, by_hand(3.0)), address(2.0, asked=(False,))}
    assert len({first, *others}) == 5 and len(LOG) == n + 4
    assert address(2.0, by_hand(3.0)) in others and len(LOG) == n + 4


@pytest.mark.parametrize("fn", [
    lambda s, b, h, i, j, t: s + t[1:3].sum(),
    lambda s, b, h, i, j, t: s + np.max(t),
], ids=range(2))  # fmt: skip
def test_what_cannot_be_differentiated(fn: Callable[..., Any]) -> None:
    s = tile(np.float64)
    run(fn, "score", s.copy(), aux=(LONG,))
    with pytest.raises(TypeError, match=r"score_mod: .* na\.score_mod\(fn, grad=\.\.\.\)"):
        aux_grad(fn, s, s.copy(), (LONG,))


def test_a_gradient_that_cannot_be_compiled() -> None:
    mod = na.score_mod(lambda s, b, h, i, j: s * 2, grad=lambda s, b, h, i, j: s.derivative())
    with pytest.raises(TypeError, match="score_mod: the function and its grad could not be compiled"):
        slope_at(mod, 1.0)


@pytest.mark.parametrize("grad", [
    lambda s, b, h, i, j, t, u: t[j],
    lambda s, b, h, i, j, t, u: (t[j], s),
], ids=range(2))  # fmt: skip
def test_a_gradient_without_what_is_asked_for(grad: Callable[..., Any]) -> None:
    mod = na.score_mod(lambda s, b, h, i, j, t, u: s * t[j] + u[i], grad=grad)
    s = tile(np.float64)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"score_mod: .*aux\[1\].*leave grad out"):
            aux_grad(mod, s, s.copy(), (LONG, LONG))
    run(mod, "score_grad", s.copy(), s.copy(), aux=(LONG, LONG))  # which does not need it
