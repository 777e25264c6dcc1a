"""Derivatives of users' functions by dual numbers in Python, as the reference has them: each operation against
differences, the conventions at kinks, names, and what is read of aux.
"""

import doctest
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import seeds
from hypothesis import given, settings
from hypothesis import strategies as st

import numba_attn as na
from numba_attn.userfn import derivative
from numba_attn.userfn.derivative import differentiated

INF = math.inf

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
    assert doctest.testmod(derivative).failed == 0
