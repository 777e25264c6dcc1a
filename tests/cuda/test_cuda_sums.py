"""Gradients that are sums over pairs, with "cuda" in the emulator: of a bias broadcast along any axes, of slopes, sinks
and arrays of aux, held to the reference by test_backward's rules; the same bits whatever order blocks run in; no memory
of O(Sq Sk).

Two tiles meet in both directions. In problems this small every unit is a part of its own, so launch.BLOCKS is set to 1
where a block is to sum more than one.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import seeds

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

import emulator
import ptxas
import test_backward
from cases import BY_NAME, DTYPES, build, table_by_distance
from defaults import cuda_by_default

import numba_attn as na
from numba_attn import plan
from numba_attn.cuda import bias_sums, derivatives, modifiers, record, sums, tiling
from numba_attn.cuda.compile import kernel_ptx
from numba_attn.cuda.host import driver, launch, loading
from numba_attn.cuda.host.call import On
from numba_attn.gradients import Backward, Wanted

SIZES = B, H, SQ, SK = 2, 2, 70, 40  # halves have tiles of 64 keys: SK_HALF
SK_HALF, D = 67, 16
AXES = [axes for n in range(4) for axes in itertools.combinations(range(4), n)]  # those that a bias has
COMMON = [(), (1,), (3,), (0, 3), (1, 2), (2, 3)]


@pytest.fixture(scope="module")
def shared() -> emulator.EmulatedDevice:
    """One device for all tests: kernels are compiled once."""
    return emulator.EmulatedDevice((8, 0))


@pytest.fixture
def cuda(shared: emulator.EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[emulator.EmulatedDevice]:
    """An emulated device, and "cuda" for the backend of calls that name none."""
    cuda_by_default(monkeypatch)
    with driver.use(shared) as device:
        yield device


def inputs(dtype: str = "float32", sk: int = SK, hkv: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = seeds.generator(3)
    q, k, v = (rng.standard_normal((B, h, s, D)) for h, s in ((H, SQ), (hkv, sk), (hkv, sk)))
    return q.astype(DTYPES[dtype]), k.astype(DTYPES[dtype]), v.astype(DTYPES[dtype])


def bias_over(axes: tuple[int, ...], sk: int = SK, dtype: str = "float32", hidden: float = 0.0) -> np.ndarray:
    rng = seeds.generator(7)
    shape = [n if axis in axes else 1 for axis, n in enumerate((B, H, SQ, sk))]
    return np.where(rng.random(shape) < hidden, -np.inf, rng.standard_normal(shape)).astype(DTYPES[dtype])


def of_axes(axes: tuple[int, ...]) -> str:
    return "".join("bhij"[axis] for axis in axes) or "none"


# ---------------------------------------------------------------- a bias


def rows_of_axes() -> list[Any]:
    rare = [axes for axes in AXES if axes not in COMMON]
    return COMMON + [pytest.param(axes, marks=pytest.mark.ladder) for axes in rare]


@pytest.mark.parametrize("axes", rows_of_axes(), ids=of_axes)
def test_bias(axes: tuple[int, ...], cuda: emulator.EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to broadcast. A sum in one part and one in many differ by roundings of float64, if at all."""
    bias = bias_over(axes, hidden=0.1 if len(axes) > 1 else 0.0)
    found = []
    for blocks in (launch.BLOCKS, 1):
        monkeypatch.setattr(launch, "BLOCKS", blocks)
        found.append(test_backward.check(inputs(), {"bias": bias}).dbias)
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2**-24 * np.abs(found[0]).max())


@pytest.mark.ladder
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "axes", [(1, 3), *(pytest.param(a, marks=pytest.mark.ladder) for a in ((), (0, 2), (2, 3)))], ids=of_axes
)
def test_bias_with_every_option(
    axes: tuple[int, ...], dtype: str, cuda: emulator.EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that begin in the midst of tiles, one of them without keys, one short enough to be packed; and all that
    comes between a product and its gradient."""
    monkeypatch.setattr(launch, "BLOCKS", 3)
    sk = SK if dtype in ("float32", "float64") else SK_HALF
    rng = seeds.generator(5)
    options = {
        "mask": na.varlen(np.array([0, 3, 41, 50, SQ]), np.array([0, 9, 9, 17, sk])) & (rng.random((SQ, sk)) < 0.8),
        "causal": True,
        "align": "bottom_right",
        "window": (25, None),
        "bias": bias_over(axes, sk, dtype, hidden=0.1),
        "softcap": 3.0,
        "alibi_slopes": np.array([0.5, 0.1], np.float32),
        "sinks": np.array([0.3, -0.2], np.float32),
        "dropout_p": 0.25,
        "seed": 11,
    }
    test_backward.check(inputs(dtype, sk), options)


@pytest.mark.parametrize("axes", [(1,), (2,), (0, 3)], ids=of_axes)
def test_hidden_pairs_are_not_read(axes: tuple[int, ...], cuda: emulator.EmulatedDevice) -> None:
    """NaN behind every mask changes no bit; NaN in a visible pair is in the sums that it belongs to, in no other."""
    q, k, v = inputs()
    bias = bias_over(axes)
    options = {"bias": bias, "mask": na.lengths(np.array([SK, 25]), np.array([SQ, 30]))}
    dout, _ = test_backward.cotangents(q, v)

    def gradient() -> np.ndarray:
        return na.attention_vjp(q, k, v, **options)[1](dout).dbias

    clean = gradient()
    for x in (q, dout):
        x[1, :, 30:] = np.nan
    for x in (k, v):
        x[1, :, 25:] = np.nan
    np.testing.assert_array_equal(gradient(), clean)
    assert np.isfinite(clean).all()
    q[0, 0, 3] = np.nan
    wrong = np.zeros((B, H, SQ, SK), np.bool_)
    wrong[0, 0, 3] = True
    wrong = wrong.any(axis=tuple(a for a in range(4) if a not in axes), keepdims=True)
    found = gradient()
    assert np.isnan(found[wrong]).all()
    np.testing.assert_array_equal(found[~wrong], clean[~wrong])


def test_long_sums_are_sums_in_float64(cuda: emulator.EmulatedDevice) -> None:
    """One number that everything goes into: as good as the gradient of every pair, added in float64."""
    q, k, v = inputs()
    dout = np.abs(test_backward.cotangents(q, v)[0])
    out, lse = na.attention(q, k, v, bias=np.zeros((1, 1, 1, 1), np.float32), return_lse=True)

    def gradient(*shape: int) -> np.ndarray:
        return na.attention_backward(dout, q, k, v, out, lse, bias=np.zeros(shape, np.float32)).dbias.astype(float)

    pairs = gradient(B, H, SQ, SK)
    for shape in ((1, 1, 1, 1), (1, H, 1, 1), (1, 1, SQ, 1), (1, 1, 1, SK), (1, 1, SQ, SK)):
        axes = tuple(axis for axis, n in enumerate(shape) if n == 1)
        error = np.abs(gradient(*shape) - pairs.sum(axis=axes, keepdims=True))
        assert (error <= 2**-23 * np.abs(pairs).sum(axis=axes, keepdims=True)).all(), shape


# ---------------------------------------------------------------- slopes and sinks


def on_host(problem: plan.Problem, options: dict[str, Any], dout: np.ndarray) -> Any:
    """What launch.attention_backward returns, of a call in layout "bhsd"."""
    q, k, v = problem.q, problem.k, problem.v
    out, lse = na.attention(q, k, v, **options, return_lse=True)
    slopes = options.get("alibi_slopes")
    results = [np.empty(x.shape, x.dtype) for x in (q, k, v)]
    shape = None if slopes is None else np.atleast_2d(slopes).shape
    asked = tuple(a.dtype.kind == "f" for a in problem.aux)
    given, wanted = Backward(out, lse, dout, None, asked), Wanted(*results, None, shape)
    return lse, launch.attention_backward(problem, given, wanted, On(driver.current()))[:4]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sinks(dtype: str, cuda: emulator.EmulatedDevice) -> None:
    """Summed on the device; a sink of -inf and queries in no sequence have none."""
    q, k, v = inputs(dtype, hkv=2)
    sinks = np.array([0.7, -np.inf], q.dtype)
    options = {"sinks": sinks, "mask": na.lengths(np.array([SK, 0]), np.array([SQ, 31]))}
    problem = plan.resolve(q, k, v, **options)
    dout, _ = test_backward.cotangents(q, v)
    _, (*_, found) = on_host(problem, options, dout)
    want = na.reference.attention_backward(dout, q, k, v, **options).dsinks
    assert found.shape == (1, H) and found[0, 1] == want[1] == 0
    np.testing.assert_allclose(found[0, 0], want[0], rtol=1e-5 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize("name", ["alibi-batch", "alibi-lengths", "sinks-empty-rows", "sinks-padding"])
def test_slopes_and_sinks(name: str, cuda: emulator.EmulatedDevice) -> None:
    test_backward.check(*build(BY_NAME[name]))


# ---------------------------------------------------------------- aux


def several(s, b, h, i, j, whole, row, per_batch, column, offsets):
    return s * row[b, i] * whole[()] + column[j] * per_batch[b] + column[j + offsets[0]]


def outside(s, b, h, i, j, row):
    return s + row[i + 1]


def reads_two(s, b, h, i, j, row):
    return s + row[i] * row[0]


def grad_two(s, b, h, i, j, row):
    return 1.0, row[0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_aux(dtype: str, cuda: emulator.EmulatedDevice) -> None:
    """Arrays of no axis to two, one read twice, one of integers; with GQA, a window, dropout and softcap."""
    arrays = inputs(dtype, SK if dtype != "float16" else SK_HALF)
    sk, rng = arrays[1].shape[2], seeds.generator(9)
    shapes = (), (B, SQ), (B,), (sk + 1,)
    tables = [np.asarray(1 + 0.3 * rng.standard_normal(shape), np.float32) for shape in shapes]
    options = {
        "score_mod": several,
        "aux": (*tables, np.array([1], np.int32)),
        "mask": na.lengths(np.array([sk, sk - 5]), np.array([SQ, 20])),
        "window": (50, 9),
        "align": "top_left",
        "softcap": 4.0,
        "dropout_p": 0.2,
        "seed": 3,
    }
    test_backward.check(arrays, options)


def test_a_table_by_distance(cuda: emulator.EmulatedDevice) -> None:
    """Of short queries, of which the heads of a group share a tile."""
    q, k, v = inputs()
    table = seeds.generator(2).standard_normal((H, SK)).astype(np.float32)
    test_backward.check((q[:, :, :7], k, v), {"score_mod": table_by_distance, "aux": (table,)})


@pytest.mark.parametrize(
    "mod, size, message",
    [
        (outside, SQ, r"score_mod reads outside aux\[0\]"),
        (na.score_mod(reads_two, grad=grad_two), SQ, r"reads not exactly one element of aux\[0\]"),
    ],
)
def test_aux_errors(mod: Any, size: int, message: str, cuda: emulator.EmulatedDevice) -> None:
    q, k, v = inputs()
    aux = (np.ones(size, np.float32),)
    out, lse = na.attention(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match=message):
        na.attention_backward(out, q, k, v, out, lse, score_mod=mod, aux=aux, aux_grad=(0,))


def test_a_read_outside_aux_is_nan(cuda: emulator.EmulatedDevice) -> None:
    """And not an access outside of memory, after which a device does nothing more for the process."""
    q, k, v = inputs()
    for row, n in ((np.ones(SQ, np.float32), 1), (np.ones(SQ - 9, np.float32), 10)):
        found = na.attention(q, k, v, score_mod=outside, aux=(row,))
        assert np.isnan(found[:, :, -n:]).all()
        np.testing.assert_array_equal(found[:, :, :-n], na.attention(q[:, :, :-n], k, v, score_mod=outside, aux=(row,)))


# ---------------------------------------------------------------- order, memory, resources


def everything() -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    rng = seeds.generator(1)
    return inputs(), {
        "bias": bias_over((1,)),
        "alibi_slopes": np.array([0.5, 0.1], np.float32),
        "align": "top_left",
        "sinks": np.array([0.3, -0.2], np.float32),
        "score_mod": table_by_distance,
        "aux": (rng.standard_normal((H, SQ)).astype(np.float32),),
    }


def gradients_of_everything() -> list[np.ndarray]:
    (q, k, v), options = everything()
    dout, dlse = test_backward.cotangents(q, v)
    out, lse = na.attention(q, k, v, **options, return_lse=True)
    grads = na.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options, aux_grad=(0,))
    found = [x for _, x in test_backward.entries(grads)]
    assert len(found) == 7
    return found


def test_the_same_bits_in_any_order(cuda: emulator.EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    want = gradients_of_everything()
    for order in ({"schedule": "random", "seed": 1}, {"schedule": "random", "seed": 2}, {"async_late": False}):
        monkeypatch.setattr(cuda, "options", order)
        for x, y in zip(gradients_of_everything(), want, strict=True):
            assert x.tobytes() == y.tobytes(), order


def test_no_memory_for_every_pair(cuda: emulator.EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    empty = cuda.empty

    def recorded(nbytes: int, stream: int) -> driver.Memory:
        sizes.append(nbytes)
        return empty(nbytes, stream)

    monkeypatch.setattr(cuda, "empty", recorded)
    gradients_of_everything()
    assert max(sizes) == B * H * SQ * D * 4  # q and dq


TILES = [("f16", 64), ("f32", 64), ("f64", 64), ("f16", 128), ("f32", 128), ("f64", 128), ("f16", 256), ("f32", 256)]


@pytest.mark.skipif(ptxas.missing() is not None, reason=str(ptxas.missing()))
@pytest.mark.parametrize("cc", [(8, 0), (9, 0)], ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
@pytest.mark.parametrize(
    "storage, d", [pytest.param(s, d, marks=pytest.mark.ladder if (s, d) != ("f16", 64) else ()) for s, d in TILES]
)
def test_nothing_is_spilled(storage: str, d: int, cc: tuple[int, int]) -> None:
    def spilled(build: Any, t: tiling.Tiling, f: record.Features, *more: Any) -> int:
        bounds = loading.bounds(build, t, t.threads)
        r = ptxas.assemble(kernel_ptx(lambda: build(t, f, *more), record.signature(f.fields), cc, bounds, None), cc)
        return r.spill_stores + r.spill_loads + r.stack

    t = tiling.choose("sums", storage, (d, d), bias_sums.memory_bias, emulator.SHARED[cc], cc=cc)
    assert t is not None
    f = record.Features(bias="f32", derivatives=True, extra=bias_sums.BIAS)
    for sum_rows, sum_keys in itertools.product((False, True), repeat=2):
        assert spilled(bias_sums.build_bias, t, f, sum_rows, sum_keys, "f64") == 0, (sum_rows, sum_keys)

    t = tiling.choose("sums", storage, (d, d), sums.memory_aux, emulator.SHARED[cc], cc=cc)
    assert t is not None
    aux = (np.zeros((4, 9), np.float32),)
    mod = sums.with_score(modifiers.mod_function(table_by_distance, t.acc, aux))
    f = record.Features(score_mod=mod, score_table=5, derivatives=True, extra=sums.aux_fields(1))
    assert spilled(sums.build_aux, t, f, derivatives.aux_functions(table_by_distance, t.acc, aux, (True,))) == 0
