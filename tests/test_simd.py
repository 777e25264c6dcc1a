"""Every intrinsic of the CPU kernels against its plain twin in NumPy, and the branch-free mathematics against double
precision."""

import math
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import seeds
from numba import njit

from numba_attn.cpu import halves, products, registers, simd, vectors
from numba_attn.cpu.compile import inner
from numba_attn.cpu.queries import Keys
from numba_attn.cpu.simd import ROW, f32_ptr, f64_ptr, i32_ptr, i64_ptr, u8_ptr
from numba_attn.cpu.target import MATH
from numba_attn.online import merge, numpy_online

ELEMS = {"f32": (np.float32, f32_ptr), "f64": (np.float64, f64_ptr)}
either = pytest.mark.parametrize("elem", ["f32", "f64"])


@either
def test_exp2(elem):
    dtype, ptr = ELEMS[elem]
    lanes = ROW.lanes(elem)

    @njit
    def run(x, n):
        p = ptr(x)
        for i in range(0, n, lanes):
            vectors.store(p + i, vectors.exp2(vectors.load(p + i)))

    lowest = -126 if elem == "f32" else -1022
    x = np.linspace(lowest, 100, 64 * 4096).astype(dtype)
    y = x.copy()
    run(y.ctypes.data, y.size)
    exact = np.exp2(x.astype(np.longdouble))
    assert np.max(np.abs((y - exact) / exact)) < 1.5 * np.finfo(dtype).eps
    edge = np.full(64, 0.0, dtype)
    nan_bits = np.array([0x7FC00001, 0x7F800001, 0xFFC001FF, 0x7FFFFFFF], np.uint32).view(np.float32)
    edge[:10] = [0.0, -0.0, -np.inf, np.nan, lowest, np.nextafter(dtype(lowest), dtype(-np.inf)), -1e30, 1, -1, 10]
    edge[10:14] = nan_bits  # NaNs with a payload stay NaN
    y = edge.copy()
    run(y.ctypes.data, y.size)
    assert y[0] == y[1] == 1 and y[2] == 0 and y[5] == y[6] == 0 and y[7] == 2 and y[8] == 0.5 and y[9] == 1024
    assert y[4] == np.finfo(dtype).tiny
    assert np.isnan(y[3]) and np.isnan(y[10:14]).all()


@either
def test_products(elem):
    """outer, outer_visible, store_tile and fold_tile against einsum."""
    dtype, ptr = ELEMS[elem]
    lanes, mr, nr = ROW.lanes(elem), ROW.mr, ROW.nr
    w, n = lanes * nr, 5

    @njit
    def run(a, b, seen, alpha, plain, masked, folded, first):
        t = registers.zeros(ptr(a), registers.shape(mr, nr))
        u = registers.zeros(ptr(a), registers.shape(mr, nr))
        for c in range(n):
            t = registers.outer(t, ptr(a) + c, n, ptr(b) + c * w)
            u = registers.outer_visible(u, ptr(a) + c, n, ptr(b) + c * w, u8_ptr(seen) + c * w)
        registers.store_tile(t, ptr(plain), w)
        registers.store_tile(u, ptr(masked), w)
        registers.fold_tile(t, ptr(folded), w, ptr(alpha), first)

    rng = seeds.generator(0)
    a, b = rng.standard_normal((mr, n)).astype(dtype), rng.standard_normal((n, w)).astype(dtype)
    alpha, before = rng.random(w).astype(dtype), rng.standard_normal((mr, w)).astype(dtype)
    seen = rng.integers(0, 2, (n, w)).astype(np.uint8) * 255
    b_nan = np.where(seen, b, np.nan).astype(dtype)
    plain, masked, folded = np.empty((mr, w), dtype), np.empty((mr, w), dtype), before.copy()
    run(*(x.ctypes.data for x in (a, b_nan, seen, alpha, plain, masked, folded)), 2)
    exact = np.where(seen[None].astype(bool), a[:, :, None].astype(np.float64) * b[None], 0).sum(1)
    np.testing.assert_allclose(masked, exact, atol=20 * np.finfo(dtype).eps)
    run(*(x.ctypes.data for x in (a, b, seen, alpha, plain, masked, folded)), 2)
    exact = a.astype(np.float64) @ b
    np.testing.assert_allclose(plain, exact, atol=20 * np.finfo(dtype).eps)
    folded = before.copy()
    run(*(x.ctypes.data for x in (a, b, seen, alpha, plain, masked, folded)), 2)
    np.testing.assert_array_equal(folded[:2], before[:2])
    np.testing.assert_allclose(
        folded[2:], before[2:] * alpha.astype(np.float64) + exact[2:], atol=40 * np.finfo(dtype).eps
    )


@either
def test_elements_travel_with_pointers(elem):
    """Lanes, item size and numbers follow from the pointer; a vector of another type takes its lanes from one."""
    dtype, ptr = ELEMS[elem]

    @njit
    def facts(x):
        return simd.lanes(ptr(x)), simd.itemsize(ptr(x)), simd.full_width(ptr(x)), simd.lanes(u8_ptr(x))

    @njit
    def run(x, at, third, bounds, below):
        p = simd.at_byte(ptr(x), at)
        vectors.store(p, vectors.splat(p, 2.5))
        p[0] = simd.scalar(p, 1) / simd.scalar(p, 3)
        simd.pointer_like(p, third)[0] = p[0]
        low = vectors.load_lanes(i32_ptr(bounds), p)  # as many lanes as p has, whatever an int32 vector would hold
        vectors.store_bytes(u8_ptr(below), low < vectors.splat(low, 2))

    lanes, size = ROW.lanes(elem), np.dtype(dtype).itemsize
    assert facts(0) == (lanes, size, lanes * ROW.nr, ROW.bits // 8)
    x, third = np.zeros(lanes + 2, dtype), np.zeros(1, dtype)
    bounds, below = np.arange(lanes, dtype=np.int32), np.full(lanes + 1, 7, np.uint8)
    run(x.ctypes.data, size, third.ctypes.data, bounds.ctypes.data, below.ctypes.data)
    assert x[0] == x[-1] == 0 and (x[2:-1] == 2.5).all() and x[1] == third[0] == dtype(1) / dtype(3)
    np.testing.assert_array_equal(below, [*np.where(bounds < 2, 255, 0), 7])


@cache
def block_products(elem):
    ptr = ELEMS[elem][1]
    # Dispatchers of the test's own: a kernel that was compiled before has a private copy of each outlined function,
    # which LLVM may have changed, and the JIT would find that one by its name.
    score_products, value_products = (inner(f.py_func) for f in (products.score_products, products.value_products))

    @njit
    def scores(k, q, s, keys, w, n):
        score_products(ptr(k), ptr(q), ptr(s), keys, w, n)

    @njit
    def values(v, p, seen, o, alpha, keys, w, n):
        visible, masked = seen
        value_products(ptr(v), ptr(p), products.Seen(u8_ptr(visible), masked), ptr(o), ptr(alpha), keys, w, n)

    return scores, values


@either
@pytest.mark.parametrize("vectors_wide", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_block_products(elem, vectors_wide, n):
    """Scores and sums of values, for each width of a tile and lengths that no register tile divides."""
    scores, values = block_products(elem)
    dtype = ELEMS[elem][0]
    w, first, last = vectors_wide * ROW.lanes(elem), 8, 21
    keys = Keys(0, 0, first, last)
    rng = seeds.generator(5)
    k, q = rng.standard_normal((last, n)).astype(dtype), rng.standard_normal((n, w)).astype(dtype)
    s = np.full((last + 1, w), 7, dtype)
    scores(*(x.ctypes.data for x in (k, q, s)), keys, w, n)
    close = {"rtol": 0, "atol": 40 * np.finfo(dtype).eps * n}
    np.testing.assert_allclose(s[first:last], (k.astype(np.float64) @ q)[first:], **close)
    assert (s[:first] == 7).all() and (s[last] == 7).all()

    p, o, alpha = rng.random((last, w)).astype(dtype), rng.random((n, w)).astype(dtype), rng.random(w).astype(dtype)
    visible = rng.integers(0, 2, (last, w)).astype(np.uint8) * 255
    p[visible == 0] = 0
    for masked in (False, True):
        v, got = rng.standard_normal((last, n)).astype(dtype), o.copy()
        finite = v.copy()
        if masked:  # a NaN that only hidden pairs meet is left out
            v[10], p[10], visible[10], finite[10] = np.nan, 0, 0, 0
        seen = visible.ctypes.data, masked
        values(v.ctypes.data, p.ctypes.data, seen, got.ctypes.data, alpha.ctypes.data, keys, w, n)
        want = o * alpha.astype(np.float64) + finite[first:].T.astype(np.float64) @ p[first:]
        np.testing.assert_allclose(got, want, rtol=0, atol=40 * np.finfo(dtype).eps * (last - first))


@either
def test_transposes(elem):
    dtype, ptr = ELEMS[elem]
    lanes = ROW.lanes(elem)

    @njit
    def run(addresses, back_addresses, middle, factor, count):
        registers.transpose_in(i64_ptr(addresses), 3, ptr(middle), lanes + 2, ptr(factor))
        registers.transpose_out(ptr(middle), lanes + 2, ptr(factor), i64_ptr(back_addresses), 1, count)

    rng = seeds.generator(1)
    rows = rng.standard_normal((lanes, lanes + 5)).astype(dtype)
    middle, factor = np.zeros((lanes, lanes + 2), dtype), rng.random(lanes).astype(dtype)
    for count in (lanes, lanes - 1, 1):
        back = np.full((lanes, lanes + 2), 7, dtype)
        tables = [np.array([r.ctypes.data for r in x], np.int64) for x in (rows, back)]
        run(tables[0].ctypes.data, tables[1].ctypes.data, middle.ctypes.data, factor.ctypes.data, count)
        np.testing.assert_array_equal(middle[:, :lanes], rows[:, 3 : 3 + lanes].T)
        np.testing.assert_array_equal(back[:count, 1 : 1 + lanes], rows[:count, 3 : 3 + lanes] * factor[:count, None])
        assert (back[count:] == 7).all() and (back[:, 0] == 7).all() and (back[:, lanes + 1] == 7).all()


@either
def test_comparisons_and_bytes(elem):
    dtype, ptr = ELEMS[elem]
    lanes = ROW.lanes(elem)

    @njit
    def run(x, y, out, picked):
        a, b = vectors.load(ptr(x)), vectors.load(ptr(y))
        vectors.store_bytes(u8_ptr(out), a < b)
        vectors.store_bytes(u8_ptr(out) + lanes, a != b)
        vectors.store_bytes(u8_ptr(out) + 2 * lanes, (a >= b) & (a != b))
        vectors.store(ptr(picked), vectors.select(vectors.load_bits(u8_ptr(out), a), a, b))
        vectors.store(ptr(picked) + lanes, vectors.maximum(a, b))
        return vectors.any_bit(a != a)

    rng = seeds.generator(2)
    for _ in range(20):
        x, y = rng.integers(-2, 3, (2, lanes)).astype(dtype)
        x[rng.random(lanes) < 0.1] = np.nan
        out, picked = np.empty((3, lanes), np.uint8), np.empty((2, lanes), dtype)
        assert run(x.ctypes.data, y.ctypes.data, out.ctypes.data, picked.ctypes.data) == np.isnan(x).any()
        np.testing.assert_array_equal(out != 0, [x < y, x != y, x > y])
        np.testing.assert_array_equal(picked, [np.where(x < y, x, y), np.where(x > y, x, y)])


def test_halves_exactly():
    """All 65,536 halves to float, and floats to halves as NumPy and ml_dtypes round, by instruction or by integer
    arithmetic."""

    @njit
    def widen(h, f, b, n):
        for i in range(n):
            f[i] = halves.half_to_float(h[i])
            b[i] = halves.bfloat_to_float(h[i])

    @njit
    def narrow(x, h, b, n):
        for i in range(n):
            h[i] = halves.float_to_half(x[i])
            b[i] = halves.float_to_bfloat(x[i])

    bits = np.arange(2**16, dtype=np.uint16)
    f, b = np.empty((2, bits.size), np.float32)
    widen(bits, f, b, bits.size)
    np.testing.assert_array_equal(f, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(b, bits.view(ml_dtypes.bfloat16).astype(np.float32))
    rng = seeds.generator(3)
    x = rng.integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    near = np.concatenate(
        [f, b, np.nextafter(f, np.inf), np.nextafter(f, -np.inf), (f[1:] + f[:-1]) / 2, (b[1:] + b[:-1]) / 2]
    )
    x = np.concatenate([x, near]).astype(np.float32)
    h, c = np.empty(x.size, np.uint16), np.empty(x.size, np.uint16)
    narrow(x, h, c, x.size)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(h.view(np.float16).astype(np.float32), x.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(
            c.view(ml_dtypes.bfloat16).astype(np.float32), x.astype(ml_dtypes.bfloat16).astype(np.float32)
        )


DOMAIN = {
    "exp": (-80, 80),
    "tanh": (-12, 12),
    "log": (1e-6, 1e6),
    "log1p": (-0.99, 100),
    "sin": (-1000, 1000),
    "cos": (-1000, 1000),
}


@either
@pytest.mark.parametrize("name", DOMAIN)
def test_math(elem, name):
    dtype = ELEMS[elem][0]
    f = getattr(MATH[elem], name)

    @njit(error_model="numpy")
    def run(x, y):
        for i in range(x.size):
            y[i] = f(x[i])

    low, high = DOMAIN[name]
    x = np.concatenate([np.linspace(low, high, 100_001), np.geomspace(1e-6, 1, 20_001)]).astype(dtype)
    y = np.empty_like(x)
    run(x, y)
    wide = np.longdouble if elem == "f64" else np.float64
    exact = getattr(np, name)(x.astype(wide))
    # near a zero of sin and cos the error is bounded absolutely
    floor = 0.1 if name in ("sin", "cos") else 0.0
    error = np.abs(y - exact) / (np.finfo(dtype).eps * np.maximum(np.abs(exact), floor))
    assert error[exact != 0].max() < 3, (name, x[np.argmax(error)])
    edges = np.array([np.nan, 0.0, np.inf, -np.inf], dtype)
    got = np.empty_like(edges)
    run(edges, got)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, getattr(np, name)(edges))


def test_online_twin():
    """Blocks of keys through the shared update, in NumPy, give softmax; merge of two halves gives the whole."""
    rng = seeds.generator(4)
    s, v = rng.standard_normal((7, 60)) * 5, rng.standard_normal((60, 3))
    s[2, :20] = -np.inf
    s[3] = -np.inf
    m, l, o = np.full(7, -np.inf), np.zeros(7), np.zeros((7, 3))
    for j in range(0, 60, 20):
        block = s[:, j : j + 20] * math.log2(math.e)
        new = np.maximum(m, block.max(1))
        with np.errstate(invalid="raise"):
            alpha, p = numpy_online.rescale(m, new), np.exp2(block - numpy_online.finite_or_zero(new)[:, None])
        m, l, o = new, l * alpha + p.sum(1), o * alpha[:, None] + p @ v[j : j + 20]
    seen = np.arange(7) != 3
    p = np.exp(s[seen] - s[seen].max(1, keepdims=True))
    np.testing.assert_allclose(o[seen] / l[seen, None], p @ v / p.sum(1, keepdims=True), rtol=1e-12)
    assert l[3] == 0 and (o[3] == 0).all()

    def part(s, v):
        with np.errstate(invalid="ignore", divide="ignore"):
            lse = np.log(np.exp(s).sum(1))
            return np.nan_to_num(np.exp(s - lse[:, None])) @ v, lse

    out, lse = merge(*part(s[:, :20], v[:20]), *part(s[:, 20:], v[20:]))
    whole, whole_lse = part(s, v)
    np.testing.assert_allclose(out, whole, atol=1e-12)
    np.testing.assert_allclose(lse, whole_lse)
