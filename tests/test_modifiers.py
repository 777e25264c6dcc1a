"""Users' functions: every operation that a score_mod may use, compiled, against the same called from Python."""

import math

import numpy as np
import pytest
import seeds

import numba_attn as na

TABLE = seeds.generator(1).standard_normal((4, 70)).astype(np.float32)
PER_HEAD = seeds.generator(2).standard_normal(4)

FUNCTIONS = {
    "alibi": (lambda s, b, h, i, j: s - 0.5 ** (h + 1) * abs(i - j), ()),
    "table": (lambda s, b, h, i, j, t: s + t[h, i - j + 30], (TABLE,)),
    "one per head": (lambda s, b, h, i, j, t: s * t[h] - abs(i - j) / 3, (PER_HEAD,)),
    "int()": (lambda s, b, h, i, j, t: s + t[int(h), int(i)], (TABLE,)),
    "two arrays": (lambda s, b, h, i, j, t, u: s + t[h, j] * u[h], (TABLE, PER_HEAD)),
    "branch": (lambda s, b, h, i, j: s if j <= i else -math.inf, ()),
    "where": (lambda s, b, h, i, j: na.where(i // 4 == j // 4, s, s - 1.0), ()),
    "sin, cos": (lambda s, b, h, i, j: s * math.cos(i * 0.1) + math.sin(j) * (b + 1), ()),
    "min, max, %": (lambda s, b, h, i, j: max(min(s, 2), -2) + (i * j) % 7 - math.log1p(abs(i - j)), ()),
    "exp, **, sqrt": (lambda s, b, h, i, j: s - math.exp(-((i - j) ** 2) / 50.0) + math.sqrt(i + j), ()),
    "log, negative": (lambda s, b, h, i, j: -s + math.log(s * s + 1) - (-j // 3) % 5, ()),
    "index alone": (lambda s, b, h, i, j: i - j, ()),
    "float alone": (lambda s, b, h, i, j: 1.0 * i, ()),
    "numpy, floor": (lambda s, b, h, i, j: np.tanh(s) + math.floor(s) * 0.25 + np.exp(-s * s), ()),
    "comparisons": (lambda s, b, h, i, j: s + (s > 0) - (s != s) + (i != j) * 0.5, ()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_operations(name, dtype):
    fn, aux = FUNCTIONS[name]
    rng = seeds.generator(0)
    q, k, v = (rng.standard_normal((2, 4, 30, 16)).astype(dtype) for _ in range(3))
    out = na.attention(q, k, v, score_mod=fn, aux=aux)
    exact = na.reference.attention(q, k, v, score_mod=fn, aux=aux)
    np.testing.assert_allclose(out, exact, atol=4e-6 if dtype == np.float32 else 1e-13)


def small():
    return [seeds.generator(3).standard_normal((1, 1, 9, 8)) for _ in range(3)]


def test_a_function_compiles_once():
    """A lambda made anew in a loop is recognised; one that captures another number is another function."""
    from numba_attn.cpu.compile import LOG

    q, k, v = small()

    def run(c):
        return na.attention(q, k, v, score_mod=lambda s, b, h, i, j: s * c)

    first = run(2.0)
    n = len(LOG)
    for _ in range(3):
        np.testing.assert_array_equal(run(2.0), first)
    assert len(LOG) == n
    assert not np.array_equal(run(3.0), first)
    assert len(LOG) == n + 1


def test_a_new_value_of_aux_is_seen():
    q, k, v = small()
    table = np.zeros(9)

    def fn(s, b, h, i, j, t):
        return s + t[j]

    before = na.attention(q, k, v, score_mod=fn, aux=(table,))
    table[3] = 5
    after = na.attention(q, k, v, score_mod=fn, aux=(table,))
    assert not np.array_equal(before, after)
    np.testing.assert_allclose(after, na.reference.attention(q, k, v, score_mod=fn, aux=(table,)), atol=1e-13)


def test_strided_aux():
    q, k, v = small()
    wide = np.arange(36.0).reshape(4, 9)

    def fn(s, b, h, i, j, t):
        return s + t[j, 1]

    np.testing.assert_array_equal(
        na.attention(q, k, v, score_mod=fn, aux=(wide.T,)),
        na.attention(q, k, v, score_mod=fn, aux=(np.ascontiguousarray(wide.T),)),
    )


def test_a_function_that_numba_cannot_compile_says_so():
    q, k, v = small()
    with pytest.raises(TypeError, match="score_mod: the function could not be compiled"):
        na.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + h.bit_length())
