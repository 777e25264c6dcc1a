"""Users' functions compiled for CUDA, run in an emulator of PTX: values against Python in float64, derivatives against
the dual numbers of numba_attn/userfn/derivative.py."""

import importlib.util
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import seeds

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

import emulator
import numba
import ptxas
import test_dual
from test_dual import CASES, LONG, MORE, SMALL

import numba_attn as na
from numba_attn.cuda import derivatives, modifiers
from numba_attn.cuda.compile import cuda, intrinsic, types
from numba_attn.userfn.accepted import plain_function
from numba_attn.userfn.derivative import differentiated, differentiated_by_hand

KEYS, QUERIES, B, H, I, J = 8, 32, 1, 2, 4, 6  # a tile of queries 4 to 35 and keys 6 to 13
BLOCKS = 2  # of a thread for each query, which goes through its share of the keys
REAL = {"f32": types.float32, "f64": types.float64}
ELEMS = ("f32", "f64")
INDICES = (types.int32,) * 4


def dtype_of(elem: str) -> Any:
    return np.float32 if elem == "f32" else np.float64


def tile(elem: str, seed: int = 5) -> np.ndarray:
    return seeds.generator(seed).standard_normal((KEYS, QUERIES)).astype(dtype_of(elem))


def of_float(aux: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    """aux, its arrays of floats in one dtype and with the strides that they have."""
    return tuple(a.astype(dtype, order="K") if a.dtype.kind == "f" else a for a in aux)


# ---------------------------------------------------------------- kernels, and what they are run with


def calling(fn: Callable[..., Any], result: Any, arguments: tuple[Any, ...]) -> Any:
    """A function of kernels, called with a tuple, that calls the plain function fn as a kernel's own code does."""
    signature = result(*arguments)

    @intrinsic
    def call(typingctx, given):
        def codegen(context, builder, sig, args):
            values = [builder.extract_value(args[0], n) for n in range(len(arguments))]
            values = [context.cast(builder, value, a, b) for value, a, b in zip(values, given, arguments, strict=True)]
            return context.compile_internal(builder, fn, signature, values)

        return result(given), codegen

    return call


def table_type(aux: tuple[Any, ...]) -> Any:
    return types.UniTuple(types.int64, sum(1 + 2 * a.ndim for a in aux) or 1)


def compiled(kernel: Callable[..., Any], arguments: tuple[Any, ...], cc: tuple[int, int] = (8, 0)) -> str:
    ptx = cuda.compile_ptx(kernel, arguments, cc=cc)[0]
    assert ".func" not in ptx and ".local" not in ptx  # everything is inlined and in registers
    return ptx


class Device:
    """An emulated GPU with arrays: what a launch reads and writes comes back."""

    def __init__(self, **options: Any) -> None:
        self.device = emulator.EmulatedDevice(**options)

    def aux_numbers(self, aux: tuple[Any, ...]) -> tuple[int, ...]:
        where = []
        for a in aux:
            fake = emulator.InterfaceArray(self.device, np.asarray(a), read_only=True)
            self.keep = [*getattr(self, "keep", []), fake]
            where.append((fake.address, fake.shape, fake.strides))
        return modifiers.aux_numbers(where)

    def run(self, ptx: str, *arguments: Any, blocks: int = BLOCKS, threads: int = QUERIES) -> None:
        """Arrays are C-contiguous and written in place; a tuple is a tuple of integers, and in it an array is the
        address of its memory."""
        numbers: list[int] = []
        arrays = []

        def address(a: np.ndarray) -> int:
            memory = self.device.upload(a, 0)
            arrays.append((a, memory))
            return memory.address

        for a in arguments:
            if isinstance(a, np.ndarray):
                numbers += [0, 0, a.size, a.itemsize, address(a), *a.shape, *a.strides]
            else:
                numbers += [address(n) if isinstance(n, np.ndarray) else int(n) for n in a]
        params = struct.pack(f"={len(numbers)}q", *numbers)
        self.device.launch(self.device.load(ptx), blocks, threads, 0, params, 0)
        for a, memory in arrays:
            self.device.download(memory, a, 0)


def array_type(elem: str, ndim: int = 2) -> Any:
    return types.Array(REAL[elem], ndim, "C")


def value_kernel(fn: Any, elem: str, aux: tuple[Any, ...], cc: tuple[int, int] = (8, 0)) -> str:
    """(scores, values, values, slopes, table): the first values without the slopes."""
    real, table = REAL[elem], table_type(aux)
    mod = calling(modifiers.mod_function(fn, elem, aux), real, (real, *INDICES, table))
    slope = calling(modifiers.slope_function(fn, elem, aux), types.UniTuple(real, 2), (real, *INDICES, table))

    def kernel(s, values, again, slopes, table):
        i = cuda.threadIdx.x
        for n in range(KEYS // BLOCKS):
            j = cuda.blockIdx.x * (KEYS // BLOCKS) + n
            values[j, i] = mod((s[j, i], B, H, I + i, J + j, table))
            again[j, i], slopes[j, i] = slope((s[j, i], B, H, I + i, J + j, table))

    return compiled(kernel, (*[array_type(elem)] * 4, table), cc)


def evaluated(fn: Any, s: np.ndarray, elem: str, aux: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray, str]:
    """Values, slopes and the PTX."""
    ptx, device = value_kernel(fn, elem, aux), Device()
    values, again, slopes = (np.empty_like(s) for _ in range(3))
    device.run(ptx, s.copy(), values, again, slopes, device.aux_numbers(aux))
    np.testing.assert_array_equal(values, again)  # what the forward pass computes, to the bit
    return values, slopes, ptx


def exact(fn: Any, s: np.ndarray, aux: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Values and slopes in Python."""
    by_hand = isinstance(fn, na.ScoreMod) and fn.grad is not None
    of = differentiated_by_hand(fn, (False,) * len(aux)) if by_hand else differentiated(fn)
    both = np.empty((2, *s.shape))
    for j, i in np.ndindex(*s.shape):
        value, slope, _ = of(float(s[j, i]), B, H, I + i, J + j, *of_float(aux, np.float64))
        both[:, j, i] = value, 0.0 if value == -np.inf else slope
    return both[0], both[1]


def close(got: np.ndarray, want: np.ndarray, elem: str, factor: float = 1.0) -> None:
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    got, want = got[finite].astype(np.float64), want[finite]
    tol = factor * (1e-6 if elem == "f32" else 2e-15)
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol * max(1.0, np.abs(want).max(initial=0.0)))


# ---------------------------------------------------------------- score_mod


# In float64 the functions of aux are those of test_gradients_by_aux.
@pytest.mark.parametrize(
    ("name", "elem"),
    [(name, "f32") for name in CASES] + [(name, "f64") for name, (_, aux) in MORE.items() if not aux],
)
def test_values_and_slopes(name: str, elem: str) -> None:
    fn, aux = CASES[name]
    aux, s = of_float(aux, dtype_of(elem)), tile(elem)
    values, slopes, ptx = evaluated(fn, s, elem, aux)
    want, want_slopes = exact(fn, s, aux)
    close(values, want, elem)
    close(slopes, want_slopes, elem, 3.0)
    if elem == "f32":
        assert ".f64" not in ptx  # float32 stays float32


@pytest.mark.parametrize("elem", ELEMS)
@pytest.mark.parametrize("dtypes", [("f4", "i1", "u2"), ("i2", "i4", "u1"), ("i8", "?", "u4"), ("f8", "u8", "f4")])
def test_aux_of_every_dtype(elem: str, dtypes: tuple[str, ...]) -> None:
    def fn(s, b, h, i, j, t, u, v):
        return (s * 0.5 + 0.1 * t[j] if t[i] else s) + 0.1 * u[j] - 2 * u[-i - 1] + v[j] * s

    tables = tuple((8 * seeds.generator(n).random(40)).astype(dtype) for n, dtype in enumerate(dtypes))
    s = tile(elem)
    values, slopes, ptx = evaluated(fn, s, elem, tables)
    want, want_slopes = exact(fn, s, tuple(a.astype(np.float64) for a in tables))
    close(values, want, elem)
    close(slopes, want_slopes, elem)
    if elem == "f32" and "f8" not in dtypes:
        assert ".f64" not in ptx


def test_strides_and_views() -> None:
    wide = seeds.generator(1).standard_normal((9, 40))
    for t in (wide.T, wide[::-2, ::-3], np.broadcast_to(wide[:, :1], (9, 40)), wide[3:5]):
        values, _, _ = evaluated(lambda s, b, h, i, j, t: s * t[i % 2, -1] + t[-1, j % 2], tile("f64"), "f64", (t,))
        close(values, exact(lambda s, b, h, i, j, t: s * t[i % 2, -1] + t[-1, j % 2], tile("f64"), (t,))[0], "f64")


@pytest.mark.parametrize(("fn", "s", "want"), [
    (lambda s, b, h, i, j: abs(s), 0.0, 0.0),
    (lambda s, b, h, i, j: math.fabs(s), -0.0, 0.0),
    (lambda s, b, h, i, j: min(s, 2 * s), 0.0, 1.0),
    (lambda s, b, h, i, j: max(2 * s, s), 0.0, 2.0),
    (lambda s, b, h, i, j: max(0, s), 0.0, 0.0),
    (lambda s, b, h, i, j: na.where(s > 0, math.log(s), 3 * s), -1.0, 3.0),
    (lambda s, b, h, i, j: math.sqrt(s), 0.0, math.inf),
    (lambda s, b, h, i, j: math.sqrt(max(s, 0)) + s, -1.0, 1.0),
    (lambda s, b, h, i, j: s**0, 0.0, 0.0),
    (lambda s, b, h, i, j: s**7, 0.0, 0.0),
    (lambda s, b, h, i, j: s**0.5, 0.0, math.inf),
    (lambda s, b, h, i, j: 0.0**s, 2.0, 0.0),
    (lambda s, b, h, i, j: s // 2 + math.floor(s) + math.ceil(s), 4.0, 0.0),
    (lambda s, b, h, i, j: s if s > 0 else -math.inf, -1.0, 0.0),
    (lambda s, b, h, i, j: -math.inf * s, 1.0, 0.0),
    (lambda s, b, h, i, j: math.tanh(s), 1e30, 0.0),
    (lambda s, b, h, i, j: s * s, math.nan, math.nan),
], ids=range(17))  # fmt: skip
def test_kinks(fn: Callable[..., Any], s: float, want: float) -> None:
    slopes = evaluated(fn, np.full((KEYS, QUERIES), s), "f64", ())[1]
    np.testing.assert_equal(slopes, np.full_like(slopes, want))


def test_large_indices() -> None:
    """31 bits times 31 bits: integers do not overflow, and differences are exact."""

    def fn(s, b, h, i, j):
        return s + (i * j) % 1000003 + (i + j) // 7 - (j - i) * 2.0

    real, table = types.float64, table_type(())
    mod = calling(modifiers.mod_function(fn, "f64", ()), real, (real, *INDICES, table))

    def kernel(out, at, table):
        t = cuda.threadIdx.x
        out[t] = mod((0.5, 0, 0, at[0, t], at[1, t], table))

    at = seeds.generator(0).integers(0, 2**31, (2, QUERIES))
    at[:, :3] = [[2**31 - 1, 0, 2**31 - 1], [2**31 - 1, 2**31 - 1, 0]]
    out = np.empty(QUERIES)
    ptx = compiled(kernel, (array_type("f64", 1), types.Array(types.int64, 2, "C"), table))
    Device().run(ptx, out, at, (0,), blocks=1)
    np.testing.assert_array_equal(out, [fn(0.5, 0, 0, int(i), int(j)) for i, j in at.T])


# ---------------------------------------------------------------- mask_mod

ALLOWED = seeds.generator(3).random((4, 50)) < 0.5
MASKS = {
    "always": (lambda b, h, i, j: True, ()),
    "a number": (lambda b, h, i, j: (j ^ i) & 1, ()),
    "a float": (lambda b, h, i, j: (i - j) * 0.5, ()),
    "blocks": (lambda b, h, i, j: (i // 3 == j // 5) | (j == 0), ()),
    "window": (lambda b, h, i, j: (abs(i - j) < 4 + h and b >= 0) or j == 1, ()),
    "not": (lambda b, h, i, j: not (j % 3), ()),
    "negative": (lambda b, h, i, j: (-5 // (j + 1) < 0 and (i - j) % 4 != 3) or j == 0, ()),
    "where": (lambda b, h, i, j: na.where(i < 12, j < 8, j > 9), ()),
    "math": (lambda b, h, i, j: math.sqrt(i * j) > 9.5 and max(i, j) - min(i, j) < 20, ()),
    "bools": (lambda b, h, i, j, t: t[h, i] or t[-1, j], (ALLOWED,)),
    "floats": (lambda b, h, i, j, t: t[j] < 0.1 and t.shape[0] > 5, (LONG,)),
    "float32": (lambda b, h, i, j, t: t[j] < 0.1 and len(t) > 5, (LONG.astype(np.float32),)),
    "rows": (lambda b, h, i, j, t, n: t[n[i % 3]][j % 4] > 0, (SMALL, np.array([2, 0, 1], np.int8))),
    "njit": (numba.njit(lambda b, h, i, j: i >= j), ()),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    fn, aux = MASKS[name]
    table = table_type(aux)
    mask = calling(modifiers.mask_function(fn, "f32", aux), types.boolean, (*INDICES, table))

    def kernel(out, table):
        i = cuda.threadIdx.x
        for n in range(KEYS // BLOCKS):
            j = cuda.blockIdx.x * (KEYS // BLOCKS) + n
            out[j, i] = mask((B, H, I + i, J + j, table))

    ptx, device = compiled(kernel, (types.Array(types.int64, 2, "C"), table)), Device()
    out = np.empty((KEYS, QUERIES), np.int64)
    device.run(ptx, out, device.aux_numbers(aux))
    want = [[bool(plain_function(fn)(B, H, I + i, J + j, *aux)) for i in range(QUERIES)] for j in range(KEYS)]
    np.testing.assert_array_equal(out, want)
    assert name == "always" or 0 < out.sum() < out.size


# ---------------------------------------------------------------- the functions themselves

NAMES = ("exp", "tanh", "log", "log1p", "sin", "cos", "sqrt", "pow")
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3.0, -3.0, np.inf, -np.inf, np.nan, 1e-40, 5e-324, 1e30, -1e30]


@pytest.mark.parametrize("elem", ELEMS)
def test_functions(elem: str) -> None:
    """Against NumPy in float64 (float32), or in the longer float that there is."""
    real, dtype = REAL[elem], dtype_of(elem)
    functions = [
        calling(getattr(modifiers.MATH[elem], name).py_func, real, (real,) if name != "pow" else (real, real))
        for name in NAMES
    ]
    f0, f1, f2, f3, f4, f5, f6, f7 = functions

    def kernel(x, y, out):
        n = cuda.grid(1)
        a = (x[n],)
        out[0, n], out[1, n], out[2, n], out[3, n] = f0(a), f1(a), f2(a), f3(a)
        out[4, n], out[5, n], out[6, n], out[7, n] = f4(a), f5(a), f6(a), f7((x[n], y[n]))

    rng = seeds.generator(0)
    special = np.array([(x, y) for x in SPECIAL for y in SPECIAL]).T
    usual = np.stack([rng.standard_normal(1500) * np.exp(rng.uniform(-6, 5, 1500)), rng.uniform(-8, 8, 1500)])
    usual[0, :700] = abs(usual[0, :700])
    usual[1, 300:1000] = np.rint(usual[1, 300:1000])
    both = np.concatenate([special, usual], axis=1)
    x, y = np.ascontiguousarray(both[:, : both.shape[1] // QUERIES * QUERIES].astype(dtype))
    out = np.empty((len(NAMES), x.size), dtype)
    ptx = compiled(kernel, (array_type(elem, 1), array_type(elem, 1), array_type(elem)))
    assert elem == "f64" or ".f64" not in ptx
    Device().run(ptx, x, y, out, blocks=x.size // QUERIES)
    wide = np.float64 if elem == "f32" else np.longdouble
    for got, name in zip(out, NAMES, strict=True):
        with np.errstate(all="ignore"):
            f = np.power if name == "pow" else getattr(np, name)
            want = f(x.astype(wide), y.astype(wide)) if name == "pow" else f(x.astype(wide))
            if name in ("sin", "cos"):  # good for less than 1e6
                got, want = got[abs(x) < 1e6], want[abs(x) < 1e6]
            rounded = want.astype(dtype)
        same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        usual_size = np.isfinite(rounded) & (abs(rounded) > np.finfo(dtype).tiny)
        assert (same | usual_size | (abs(want) <= np.finfo(dtype).tiny)).all(), name
        error = abs(got[usual_size].astype(wide) - want[usual_size]) / np.spacing(abs(rounded[usual_size]))
        assert error.max() < 3.5, name
        tiny = abs(rounded) <= np.finfo(dtype).tiny
        assert (abs(got[tiny]) <= 2 * np.finfo(dtype).tiny).all(), name


# ---------------------------------------------------------------- errors, and which functions are the same


@pytest.mark.parametrize("fn", [
    lambda s, b, h, i, j: s + h.bit_length(),
    lambda s, b, h, i, j: (s, s),
    lambda s, b, h, i, j: None,
    lambda s, b, h, i, j: tile(s),
    lambda s, b, h, i, j: round(s),  # nor does the CPU take it
], ids=range(5))  # fmt: skip
def test_a_score_mod_that_cannot_be_compiled_says_so(fn: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="score_mod: the function could not be compiled"):
        modifiers.mod_function(fn, "f32", ())


@pytest.mark.parametrize("fn", [lambda b, h, i, j: i.name, lambda b, h, i, j: (i, j)], ids=range(2))
def test_a_mask_mod_that_cannot_be_compiled_says_so(fn: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="mask_mod: the function could not be compiled"):
        modifiers.mask_function(fn, "f32", ())


def test_derivatives_that_cannot_be_compiled_say_so() -> None:
    whole = lambda s, b, h, i, j, t: s + t[1:3].sum()  # noqa: E731
    for aux_or_slope in (modifiers.slope_function, lambda *a: derivatives.aux_functions(*a, (True,))):
        with pytest.raises(TypeError, match=r"score_mod: .* na\.score_mod\(fn, grad=\.\.\.\)"):
            aux_or_slope(whole, "f64", (LONG,))
        with pytest.raises(TypeError, match="score_mod: the function and its grad could not be compiled"):
            mod = na.score_mod(lambda s, b, h, i, j, t: s * t[j], grad=lambda s, b, h, i, j, t: s.derivative())
            aux_or_slope(mod, "f64", (LONG,))
    for grad in (lambda s, b, h, i, j, t, u: t[j], lambda s, b, h, i, j, t, u: (t[j], s)):
        mod = na.score_mod(lambda s, b, h, i, j, t, u: s * t[j] + u[i], grad=grad)
        with pytest.raises(ValueError, match=r"score_mod: .*aux\[1\].*leave grad out"):
            derivatives.aux_functions(mod, "f64", (LONG, LONG), (False, True))
        modifiers.slope_function(mod, "f64", (LONG, LONG))  # which does not need it


def test_functions_are_recognised() -> None:
    def of(c: float, aux: Any = LONG, elem: str = "f32") -> Any:
        return modifiers.mod_function(lambda s, b, h, i, j, t: s * c + t[j], elem, (aux,))

    assert of(2.0) is of(2.0)
    assert len({of(2.0), of(3.0), of(2.0, LONG.astype(np.float32)), of(2.0, SMALL[0]), of(2.0, elem="f64")}) == 4

    def by_hand(c: float) -> Any:
        mod = na.score_mod(lambda s, b, h, i, j: s * 2, grad=lambda s, b, h, i, j: c)
        return modifiers.slope_function(mod, "f32", ())

    assert by_hand(2.0) is by_hand(2.0) is not by_hand(3.0)


def test_zeros_of_both_signs() -> None:
    def make(c: float) -> Callable[..., Any]:
        return lambda s, b, h, i, j: min(max(1.0 / (s * 0.0 + c), -1.0), 1.0)

    assert all((evaluated(make(c), np.ones((KEYS, QUERIES)), "f64", ())[0] == 1 / c).all() for c in (1.0, -1.0))
    assert (evaluated(make(0.0), np.ones((KEYS, QUERIES)), "f64", ())[0] == 1).all()
    assert (evaluated(make(-0.0), -np.ones((KEYS, QUERIES)), "f64", ())[0] == -1).all()


def test_beside_the_cpu() -> None:
    """Both targets in one process leave each other alone."""

    def make(c: float) -> Callable[..., Any]:
        return lambda s, b, h, i, j, t: s * math.tanh(t[j]) + (s - c) ** 2 + na.where(i > j, s, 1.0)

    for c in (1.25, 2.25):
        s = tile("f64")
        on_cpu, cpu_slopes = (
            s[: test_dual.KEYS, : test_dual.STRIDE].copy(),
            np.empty((test_dual.KEYS, test_dual.STRIDE)),
        )
        test_dual.run(make(c), "score_grad", on_cpu, cpu_slopes, aux=(LONG,))
        values, slopes, _ = evaluated(make(c), s, "f64", (LONG,))
        lanes = np.s_[: test_dual.KEYS, : test_dual.LANES]
        np.testing.assert_allclose(values[lanes] / math.log(2), on_cpu[lanes], rtol=1e-13)
        np.testing.assert_allclose(slopes[lanes], cpu_slopes[lanes], rtol=1e-13)


@pytest.mark.parametrize("cc", ptxas.TARGETS, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
def test_every_target(cc: tuple[int, int]) -> None:
    """Inlined, in registers, without a float64, and differences of indices are 32-bit numbers."""
    for fn, aux in (CASES["alibi"], CASES["softcap"], CASES["t5"]):
        aux = of_float(aux, np.float32)
        ptx = value_kernel(fn, "f32", aux, cc)
        assert ".f64" not in ptx and "cvt.rn.f32.s64" not in ptx
        if aux:
            ptx = aux_kernel(fn, "f32", aux, (True,), cc)
            assert ".f64" not in ptx and "cvt.rn.f32.s64" not in ptx


# ---------------------------------------------------------------- gradients by aux


def aux_kernel(fn: Any, elem: str, aux: tuple[Any, ...], asked: tuple[bool, ...], cc: tuple[int, int] = (8, 0)) -> str:
    """(scores, weights, table, sums)"""
    real, table, count = REAL[elem], table_type(aux), sum(asked)
    sums, pending = types.UniTuple(types.int64, 2 + count), types.UniTuple(types.int64, derivatives.PENDING * count)
    functions = derivatives.aux_functions(fn, elem, aux, asked)
    start = calling(functions.start, pending, (sums,))
    pair = types.UniTuple(types.int32, 4)
    add = calling(functions.add, pending, (real, pair, table, real, sums, pending))
    flush = calling(functions.flush, types.void, (sums, pending))

    def kernel(s, weight, table, sums):
        i = cuda.threadIdx.x
        carried = start((sums,))
        for n in range(KEYS // BLOCKS):
            j = cuda.blockIdx.x * (KEYS // BLOCKS) + n
            carried = add((s[j, i], (B, H, I + i, J + j), table, weight[j, i], sums, carried))
        flush((sums, carried))

    return compiled(kernel, (array_type(elem), array_type(elem), table, sums), cc)


def summed(
    fn: Any, s: np.ndarray, weight: np.ndarray, elem: str, aux: tuple[Any, ...], asked: Any = None, **options: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The gradients of the arrays that are asked for, and their buffers, after both stages."""
    asked = tuple(a.dtype.kind == "f" for a in aux) if asked is None else asked
    wanted = [a for a, yes in zip(aux, asked, strict=True) if yes]
    limb = derivatives.limb_bits(s.size)
    ptx, device = aux_kernel(fn, elem, aux, asked), Device(**options)
    table = device.aux_numbers(aux)
    buffers = [np.zeros(derivatives.buffer_size(a.size), np.int64) for a in wanted]
    for stage in (0, 1):
        device.run(ptx, s, weight, table, derivatives.sums_numbers(stage, limb, buffers))  # type: ignore[arg-type]
    return [derivatives.totals(x, elem, limb).reshape(a.shape) for x, a in zip(buffers, wanted, strict=True)], buffers


def exact_sums(fn: Any, s: np.ndarray, weight: np.ndarray, aux: tuple[Any, ...], asked: Any = None) -> list[np.ndarray]:
    asked = tuple(a.dtype.kind == "f" for a in aux) if asked is None else asked
    by_hand = isinstance(fn, na.ScoreMod) and fn.grad is not None
    of = differentiated_by_hand(fn, asked) if by_hand else differentiated(fn)
    want = [np.zeros(a.shape) for a in aux]
    for j, i in np.ndindex(*s.shape):
        if weight[j, i] != 0:
            reads = of(float(s[j, i]), B, H, I + i, J + j, *of_float(aux, np.float64))[2]
            for (n, at), slope in reads.items():
                want[n].reshape(-1)[at] += float(weight[j, i]) * slope
    return [a for a, yes in zip(want, asked, strict=True) if yes]


def weights(fn: Any, s: np.ndarray, elem: str, aux: tuple[Any, ...]) -> np.ndarray:
    """As in a backward pass: 0 where the function hides the pair."""
    weight = tile(elem, 6)
    for j, i in np.ndindex(*s.shape):
        if plain_function(fn)(float(s[j, i]), B, H, I + i, J + j, *aux) == -math.inf:
            weight[j, i] = 0
    return weight


WITH_AUX = [name for name, (_, aux) in CASES.items() if aux]
OFTEN = ("table", "t5", "a loop of reads", "learned decay", "two arrays, by hand")


@pytest.mark.parametrize(
    ("name", "elem"), [(name, elem) for name in WITH_AUX for elem in ELEMS if elem == "f64" or name in OFTEN]
)
def test_gradients_by_aux(name: str, elem: str) -> None:
    fn, aux = CASES[name]
    aux, s = of_float(aux, dtype_of(elem)), tile(elem)
    weight = weights(fn, s, elem, aux)
    got, buffers = summed(fn, s, weight, elem, aux)
    assert not any(x[1] for x in buffers)
    for a, b in zip(got, exact_sums(fn, s, weight, aux), strict=True):
        close(a, b, elem)


@pytest.mark.parametrize("name", ["t5", "learned decay", "two arrays, by hand"])
def test_the_order_of_threads_does_not_matter(name: str) -> None:
    fn, aux = CASES[name]
    s, weight = tile("f64"), tile("f64", 6)
    first = summed(fn, s, weight, "f64", aux)[1]
    for seed in range(2):
        again = summed(fn, s, weight, "f64", aux, schedule="random", seed=seed)[1]
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("elem", ELEMS)
def test_contributions_of_every_size(elem: str) -> None:
    """Nothing overflows, and what is far below the largest contribution is lost in no other sum than a float's."""
    largest = np.finfo(dtype_of(elem)).max
    for scale in (1e-36, 1e-20, 1.0, 1e20, 1e36) if elem == "f32" else (1e-305, 1e-200, 1.0, 1e200, 1e305):
        table, weight = np.ones(40, dtype_of(elem)), tile(elem, 6) * dtype_of(elem)(scale)
        got = summed(lambda s, b, h, i, j, t: s + t[j] + t[i], tile(elem), weight, elem, (table,))[0][0]
        want = np.zeros(40)
        for j, i in np.ndindex(*weight.shape):
            want[J + j] += weight[j, i]
            want[I + i] += weight[j, i]
        np.testing.assert_allclose(got / scale, want / scale, rtol=1e-14, atol=1e-14)
    weight = np.zeros((KEYS, QUERIES), dtype_of(elem))
    weight[0, 0], weight[1, 1], weight[2, 2] = largest, -largest, 1e-3
    got = summed(lambda s, b, h, i, j, t: s + t[0], tile(elem), weight, elem, (np.ones(1, dtype_of(elem)),))[0][0]
    assert 0 <= got[0] <= float(largest) * 2.0**-100
    got = summed(lambda s, b, h, i, j, t: s + t[j], tile(elem), weight, elem, (np.ones(40, dtype_of(elem)),))[0][0]
    assert got[J] == largest and got[J + 1] == -largest


def test_what_is_not_finite_stays_in_its_element() -> None:
    s, weight = tile("f64"), np.ones((KEYS, QUERIES))
    weight[0, 0], weight[1, :2], weight[2, :2], weight[3, :] = np.inf, (-np.inf, -1), (np.inf, -np.inf), np.nan
    got = summed(lambda s, b, h, i, j, t: s * t[j], np.ones_like(s), weight, "f64", (np.ones(40),))[0][0]
    np.testing.assert_array_equal(got[J : J + 5], [np.inf, -np.inf, np.nan, np.nan, QUERIES])
    got = summed(lambda s, b, h, i, j, t: s * t[1] + math.sqrt(t[0]), s, np.ones_like(s), "f64", (np.array([0.0, 2]),))
    assert got[0][0][0] == np.inf
    np.testing.assert_allclose(got[0][0][1], s.sum(), rtol=1e-13)


def test_the_sums_on_the_device() -> None:
    """total_function says in a kernel what totals says in NumPy."""
    weight = tile("f64", 6)
    weight[0, 0], weight[1, 1], weight[2, 2], weight[2, 3] = np.inf, np.nan, -np.inf, 1.0
    buffer = summed(lambda s, b, h, i, j, t: s + t[j] * t[i], tile("f64"), weight, "f64", (LONG,))[1][0]
    limb = derivatives.limb_bits(KEYS * QUERIES)
    total = calling(derivatives.total_function("f64"), types.float64, (types.int64,) * 3)

    def kernel(out, numbers):
        n = cuda.threadIdx.x
        if n < out.shape[0]:
            out[n] = total((numbers[0], n, numbers[1]))

    out = np.empty(LONG.size)
    ptx = compiled(kernel, (array_type("f64", 1), types.UniTuple(types.int64, 2)))
    Device().run(ptx, out, (buffer, limb), blocks=1, threads=64)
    np.testing.assert_array_equal(out, derivatives.totals(buffer, "f64", limb))
    assert np.isinf(out).any() and np.isnan(out).any() and np.isfinite(out).sum() > 20


def test_limbs() -> None:
    assert derivatives.limb_bits(1) == derivatives.limb_bits(2**18) == 40 and derivatives.limb_bits(2**31) == 27
    for pairs in (1, 100, 2**20, 2**31 + 1, 2**40):  # 16 reads of every pair, each as large as the largest
        assert 2 ** derivatives.limb_bits(pairs) * 16 * pairs <= 2**62


def test_only_the_arrays_that_are_asked_for() -> None:
    fn, aux = MORE["branches"]
    s = tile("f64")
    weight = weights(fn, s, "f64", aux)
    both, second = summed(fn, s, weight, "f64", aux)[0], summed(fn, s, weight, "f64", aux, (False, True))[0]
    assert len(second) == 1
    np.testing.assert_array_equal(second[0], both[1])


def test_status() -> None:
    """Where a hand-written gradient does not know the element, and where the function reads outside an array."""
    s, weight = tile("f64"), tile("f64", 6)

    def status(fn: Any, grad: Any = lambda s, b, h, i, j, t, u: (1.0, 1.0, 1.0), shape: Any = (20,)) -> list[int]:
        mod = na.score_mod(fn, grad=grad) if grad else fn
        return [int(x[1]) for x in summed(mod, s, weight, "f64", (LONG, LONG[:20].reshape(shape)))[1]]

    assert status(lambda s, b, h, i, j, t, u: s + t[j] + u[j] + u[int(j)]) == [0, 0]
    assert status(lambda s, b, h, i, j, t, u: s + t[j]) == [0, derivatives.ONE_ELEMENT]
    assert status(lambda s, b, h, i, j, t, u: s + t[j] + t[j + 1] + u[j]) == [derivatives.ONE_ELEMENT, 0]
    for grad in (None, lambda s, b, h, i, j, t, u: (1.0, 1.0, 1.0)):  # outside u, but in its memory
        assert status(lambda s, b, h, i, j, t, u: s + t[j] * u[0, j], grad, (2, 10)) == [0, derivatives.INSIDE]
