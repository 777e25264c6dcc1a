"""Decoding in the emulator: few queries, the keys in parts, and the kernel that joins the parts.

Every case of the table with few queries takes this path too: test_cuda_cases.py.
"""

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import seeds

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

import emulator
import multiprocessor
import mutations
import ptxas
import test_attention
from cases import DTYPES, Case, bias, bool_mask, build, everything, given, lengths, sinks, slopes, varlen
from defaults import cuda_by_default

import numba_attn as na
from numba_attn import plan
from numba_attn.cuda import decode, forward
from numba_attn.cuda.compile import cuda as numba_cuda
from numba_attn.cuda.host import call, driver
from numba_attn.cuda.record import Features, signature
from numba_attn.cuda.tiling import choose

needs_ptxas = pytest.mark.skipif(ptxas.missing() is not None, reason=str(ptxas.missing()))

KV = decode.KEYS
LENGTHS = [0, 1, 63, 1000, 5000]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[emulator.EmulatedDevice]:
    """An emulated device, warps in random order, and "cuda" for the backend of calls that name none."""
    cuda_by_default(monkeypatch)
    with driver.use(emulator.EmulatedDevice((8, 0), schedule="random", seed=3)) as device:
        yield device


def decodes(device: emulator.EmulatedDevice) -> bool:
    """Whether the last call was of the two kernels of decoding."""
    return "merge" in device.launches[-1].name


def case(name: str, options: Any = None, **shape: Any) -> Case:
    return Case(name, "decoding", options or given(), **{"kv_len": 2 * KV + 88, **shape})


FEW = [
    case("one-query", heads=(8, 2), q_len=1, dims=(128, 128), dtype="float16", batch=1),
    case("one-query-f64", heads=(2, 2), q_len=1, dims=(59, 59), dtype="float64", batch=1),
    case("group-16", heads=(16, 1), q_len=1, dims=(128, 128), dtype="bfloat16", batch=1),
    case("three-queries", given(causal=True, align="bottom_right"), heads=(5, 1), q_len=3, batch=1),
    case("sixteen-queries", given(causal=True, align="bottom_right"), heads=(2, 2), q_len=16, batch=1),
    case("dv-larger", heads=(4, 2), q_len=2, dims=(16, 96), dtype="float16", batch=1),
    case("cache", lengths([0, 1, 63, 600], causal=True, align="bottom_right"), q_len=2, batch=4),
    case("padded-queries", lengths([600, 40, 300], [4, 0, 1]), q_len=4, batch=3, dtype="float64"),
    case("varlen", varlen([0, 1, 4, 4, 7], [0, 520, 523, 563, 563], causal=True, align="bottom_right"), q_len=7,
         kv_len=600, batch=1, heads=(8, 2)),
    case("window", given(window=(40, 0), align="bottom_right"), q_len=3, batch=1),
    case("window-cuts-parts", given(window=(KV, KV), align=KV), q_len=5, batch=1),
    case("prefix", lambda rng, c: {"mask": na.prefix(300, align="top_left")}, q_len=2, batch=1),
    case("hides-all", given(causal=True, align=-5), q_len=4, batch=1),
    case("mask", bool_mask(0, 1, 2, 3, density=0.01), q_len=4, heads=(4, 1)),
    case("bias-hides", bias(1, 2, 3, hidden=0.5), q_len=4, heads=(2, 1), dtype="float16"),
    case("sinks", sinks(causal=True, align=-1), q_len=3, heads=(4, 2)),
    case("dropout", given(dropout_p=0.4, seed=5), q_len=2, heads=(2, 1)),
    case("large-scores", given(scale=40.0), q_len=2, batch=1),
    case("large-bias", bias(3, size=1e4), q_len=1, batch=1),
    case("alibi", given(alibi_slopes=slopes(4), align="bottom_right"), q_len=1, heads=(4, 4), batch=1),
    case("everything", everything, q_len=7, heads=(4, 2)),
    case("everything-f16", everything, q_len=6, heads=(4, 2), dtype="float16"),
]  # fmt: skip
QUICK = ("one-query", "three-queries", "cache", "varlen", "everything")


@pytest.mark.parametrize(
    "few", [pytest.param(c, id=c.name, marks=[] if c.name in QUICK else pytest.mark.ladder) for c in FEW]
)
def test_case(few: Case, cuda: emulator.EmulatedDevice) -> None:
    test_attention.check(*build(few))
    assert decodes(cuda)


def test_packing_decides_nothing(cuda: emulator.EmulatedDevice) -> None:
    """A row's own sequence decides which kernel computes it: short ones among long ones, batches of both, in order and
    not, are computed as they are alone."""
    rng = seeds.generator(0)
    q_lens, kv_lens = [3, 40, 0, 8, 17, 1], [300, 300, 60, 520, 30, 1]
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(x)]) for x in (q_lens, kv_lens))
    q = rng.standard_normal((cu_q[-1] + 2, 4, 40)).astype(np.float32)
    k, v = (rng.standard_normal((cu_k[-1], 2, 40)).astype(np.float32) for _ in range(2))
    shd = dict(layout="shd", causal=True, align="bottom_right", return_lse=True)
    sinks = np.linspace(-1, 1, 4).astype(np.float32)
    out, lse = na.attention(q, k, v, mask=na.varlen(cu_q, cu_k), sinks=sinks, **shd)
    names = [launch.name for launch in cuda.launches]
    assert sum("merge" in name for name in names) == 1 and sum("forward" in name for name in names) == 2
    for n in range(len(q_lens)):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        alone = na.attention(q[rows], k[keys], v[keys], sinks=sinks, **shd)
        assert q_lens[n] == 0 or decodes(cuda) == (2 * q_lens[n] <= decode.ROWS)
        np.testing.assert_array_equal(out[rows], alone[0])
        np.testing.assert_array_equal(lse[rows], alone[1])
    assert (out[-2:] == 0).all() and (lse[-2:] == -np.inf).all()
    b = rng.standard_normal((2, 2, 40, 8)).astype(np.float32)
    few, mixed = (na.attention(b, b, b, mask=na.lengths([40, 33], [3, n])) for n in (3, 40))
    np.testing.assert_array_equal(few[0], mixed[0])


def cache_of(dtype: str, dim: int, group: int, q_len: int) -> tuple[np.ndarray, ...]:
    """A batch of caches of LENGTHS keys; behind them NaN and infinities."""
    rng = seeds.generator([dim, group])
    q = rng.standard_normal((len(LENGTHS), group, q_len, dim)).astype(DTYPES[dtype])
    k, v = (rng.standard_normal((len(LENGTHS), 1, LENGTHS[-1], dim)).astype(DTYPES[dtype]) for _ in range(2))
    for b, n in enumerate(LENGTHS):
        k[b, :, n:], v[b, :, n:] = np.nan, np.inf
    return q, k, v


@pytest.mark.ladder
@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 7, 16])
@pytest.mark.parametrize("dim", [40, 59, 64, 128, 256])
def test_caches(dim: int, group: int, dtype: str, late: bool) -> None:
    if dim == 59 and not late:
        pytest.skip("without asynchronous copies, and the slowest")
    q, k, v = cache_of(dtype, dim, group, 16 // group if dim in (40, 128) else 1)
    options: dict[str, Any] = dict(causal=True, align="bottom_right", mask=na.lengths(LENGTHS), return_lse=True)
    with driver.use(emulator.EmulatedDevice((8, 0), schedule="random", seed=dim + group, async_late=late)):
        out, lse = na.attention(q, k, v, **options, backend="cuda")
    want, want_lse = na.reference.attention(q, k, v, **options)
    largest = {"float64": 4e-15, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    np.testing.assert_allclose(out.astype(np.float64), want, rtol=0, atol=largest)
    most = 4e-15 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(lse, want_lse, rtol=most, atol=most)  # the scores' sums may cancel


# ---------------------------------------------------------------- which kernel, and which parts


@pytest.mark.parametrize(
    ("group", "q_len", "few"), [(1, 16, True), (1, 17, False), (4, 4, True), (4, 5, False), (17, 1, False)]
)
def test_few_is_said_by_queries_and_group_alone(
    group: int, q_len: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    monkeypatch.setattr(call.Call, "run", lambda self, build, *rest: built.append(build))
    q, k = np.zeros((1, 2 * group, q_len, 8), np.float32), np.zeros((1, 2, 40, 8), np.float32)
    with driver.use(emulator.EmulatedDevice((8, 0))):
        na.attention(q, k, k, backend="cuda")
    assert built == [forward.build, decode.build_merge] if few else [forward.build]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, [[0, 1, 2], [0, 1, 2]]),
        (dict(mask=na.lengths([0, KV + 1])), [[], [0, 1]]),
        (dict(causal=True, align="bottom_right", mask=na.lengths([1, KV])), [[0], [0]]),
        (dict(causal=True, align=np.array([0, KV - 2])), [[0], [0, 1]]),  # 3 queries
        (dict(window=(KV - 1, 0), align=3 * KV - 3), [[1, 2], [1, 2]]),
        (dict(window=(KV - 2, 0), align=3 * KV - 2), [[2], [2]]),
        (dict(causal=True, align=-3), [[], []]),
        (dict(window=(0, 0), align=3 * KV), [[], []]),
        (dict(mask=na.prefix(np.array([0, 2 * KV]), align="top_left")), [[0, 1, 2]] * 2),
        (dict(mask=na.lengths([KV, 3 * KV], [0, 3])), [[], [0, 1, 2]]),
    ],
)
def test_parts_are_those_that_some_query_may_see(options: dict[str, Any], parts: list[list[int]]) -> None:
    q, k = np.zeros((2, 1, 3, 8), np.float32), np.zeros((2, 1, 3 * KV, 8), np.float32)
    places, items = decode.workspace(plan.resolve(q, k, k, **options))
    assert places[:, 2].tolist() == [len(p) for p in parts]
    assert items.tolist() == [[n, s] for n, p in enumerate(parts) for s in p]
    for n, (start, first, count) in enumerate(places):  # as the kernels find a state
        assert all(items[start - first + s].tolist() == [n, s] for s in range(first, first + count))


def test_the_workspace_is_small(cuda: emulator.EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the bytes of k and v in halves, and no room for what nobody sees, however long one sequence is."""
    asked = []
    empty = cuda.empty
    monkeypatch.setattr(call.Call, "run", lambda *arguments: None)
    monkeypatch.setattr(cuda, "empty", lambda nbytes, stream: asked.append(nbytes) or empty(nbytes, stream))
    q, k = np.zeros((8, 16, 1, 128), np.float16), np.zeros((8, 1, 16 * KV, 128), np.float16)
    na.attention(q, k, k)
    states = 16 * 16 * 8
    assert states * (128 + 2) * 4 in asked and max(asked) <= k.nbytes
    assert states * (128 + 2) * 4 < 1.02 * (2 * k.nbytes / 16)
    asked.clear()
    na.attention(q, k, k, mask=na.lengths([16 * KV, *[1] * 7]))
    assert (16 + 7) * 16 * (128 + 2) * 4 in asked


# ---------------------------------------------------------------- the same bits


def results(q: Any, k: Any, v: Any, order: int = 0, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """order: of the warps, and with odd numbers copies land early."""
    emulated = emulator.EmulatedDevice((8, 0), schedule="random", seed=order, async_late=order % 2 == 0)
    with driver.use(emulated) as device:
        out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
        assert decodes(device)
    return out, lse


def same(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]) -> None:
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and x.tobytes() == y.tobytes()


def drawn(dtype: str, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = seeds.generator(0)
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


BITS = pytest.mark.parametrize(
    "dtype", ["float32", "float16", *(pytest.param(x, marks=pytest.mark.ladder) for x in ("float64", "bfloat16"))]
)


@BITS
def test_keys_behind_and_other_rows_do_not_matter(dtype: str) -> None:
    """A row is the same with more keys behind those it sees, alone, in a batch, packed, and wherever a tile has it."""
    n = 2 * KV + 90
    q, k, v = drawn(dtype, (3, 4, 2, 40), (3, 2, 5 * KV, 40), (3, 2, 5 * KV, 24))
    want = results(q, k[:, :, :n], v[:, :, :n], causal=True, align="bottom_right")
    same(results(q, k, v, causal=True, align=n - 2), want)
    padded = na.lengths([n, n, n])
    same(results(q, k, v, causal=True, align="bottom_right", mask=padded), want)

    def alone(b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
        one = np.s_[b : b + 1, h : h + 1], np.s_[b : b + 1, h // 2 : h // 2 + 1, :n]
        return results(q[one[0]], k[one[1]], v[one[1]], causal=True, align="bottom_right")

    for b, h in ((0, 0), (1, 3)):
        same(alone(b, h), tuple(x[b : b + 1, h : h + 1] for x in want))
    last = results(q[:, :, 1:], k[:, :, :n], v[:, :, :n], causal=True, align="bottom_right")
    same(last, tuple(x[:, :, 1:] for x in want))
    repeated = results(q, *(x[:, :, :n].repeat(2, 1) for x in (k, v)), causal=True, align="bottom_right")
    same(repeated, want)

    # packed, behind a sequence with more queries
    more = drawn(dtype, (4, 4, 40))[0]
    packed_q = np.concatenate([more.swapaxes(0, 1)[:, :4], q[0]], axis=1)[None]
    packed_k, packed_v = (np.concatenate([x[1, :, :70], x[0, :, :n]], axis=1)[None] for x in (k, v))
    packed = na.varlen([0, 4, 6], [0, 70, 70 + n])
    got = results(packed_q, packed_k, packed_v, causal=True, align="bottom_right", mask=packed)
    same(tuple(x[:, :, 4:] for x in got), tuple(x[:1] for x in want))


@BITS
def test_keys_before_do_not_matter(dtype: str) -> None:
    """Blocks and warps that have nothing to see of a row leave it alone."""
    q, k, v = drawn(dtype, (1, 2, 3, 40), (1, 1, 6 * KV, 40), (1, 1, 6 * KV, 40))
    start = np.array([0, 3 * KV + 5, 5 * KV + 1])
    want = results(q, k, v, mask=na.intervals(start, np.full(3, 6 * KV)))
    for i in range(3):
        row = results(q[:, :, i : i + 1], k, v, mask=na.intervals(start[i : i + 1], np.array([6 * KV])))
        same(row, tuple(x[:, :, i : i + 1] for x in want))
    k[:, :, : 3 * KV], v[:, :, : 3 * KV] = np.nan, np.inf
    changed = results(q, k, v, mask=na.intervals(start, np.full(3, 6 * KV)))
    same(tuple(x[:, :, 1:] for x in changed), tuple(x[:, :, 1:] for x in want))
    assert not np.isfinite(changed[0][:, :, 0].astype(np.float32)).any()


@BITS
def test_the_order_of_the_blocks_does_not_matter(dtype: str) -> None:
    q, k, v = drawn(dtype, (2, 4, 1, 64), (2, 1, 700, 64), (2, 1, 700, 64))
    want = results(q, k, v)
    for order in range(1, 4):
        same(results(q, k, v, order), want)


def test_nan_in_a_key_or_value_reaches_the_rows_that_see_it(cuda: emulator.EmulatedDevice) -> None:
    for which in ("k", "v"):
        q, k, v = drawn("float32", (1, 2, 3, 40), (1, 1, 700, 40), (1, 1, 700, 40))
        (k if which == "k" else v)[0, 0, 698] = np.nan
        out, lse = na.attention(q, k, v, causal=True, align="bottom_right", return_lse=True)
        assert np.isfinite(out[:, :, 0]).all() and not np.isfinite(out[:, :, 1:]).any()
        assert np.isfinite(lse[:, :, 0]).all() and np.isfinite(lse).all() == (which == "v")
    k[...] = np.nan
    assert np.isnan(na.attention(q, k, v)).all()


# ---------------------------------------------------------------- the machine code


def both_kernels(dtype: str, dim: int, rows: int, cc: tuple[int, int]) -> Iterator[tuple[str, Any, int, int]]:
    """(name, what ptxas says, threads, bytes of shared memory)"""
    storage, f = call.STORAGE[dtype], Features(extra=decode.EXTRA)
    t = choose("decode", storage, (dim, dim), forward.memory, emulator.SHARED[cc])
    assert t is not None
    t = decode.with_rows(t, rows)
    for name, kernel, threads, shared in (
        ("part", forward.build(t, f, decode.KEYS), t.threads, forward.memory(t)["size"]),
        ("merge", decode.build_merge(t, f), decode.THREADS, decode.memory_merge(t)["size"]),
    ):
        ptx, _ = numba_cuda.compile_ptx(kernel, signature(f.fields), cc=cc, launch_bounds=threads)
        yield name, ptxas.assemble(ptx, cc), threads, shared


@needs_ptxas
@pytest.mark.ladder
@pytest.mark.parametrize("cc", [(8, 0), (8, 6), (9, 0)], ids=["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("rows", [16, 1])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_no_spills_and_enough_in_flight(dtype: str, dim: int, rows: int, cc: tuple[int, int]) -> None:
    for name, made, threads, shared in both_kernels(dtype, dim, rows, cc):
        assert made.spill_stores == made.spill_loads == made.stack == 0, name
        blocks = multiprocessor.occupancy(made.registers, threads, shared, cc).blocks
        if name == "part":  # a tile of K or of V: docs at the top of decode.py
            assert blocks * 16 * 1024 >= (32 if dtype == "float16" or cc != (8, 6) else 16) * 1024
        else:
            assert blocks >= 10


# ---------------------------------------------------------------- bugs put in


class Swapping(emulator.EmulatedDevice):
    """Loads another kernel for the last one of a call, and runs the others once: then their results are taken from
    `memory`."""

    def __init__(self, old: str, new: str, memory: list[Any]) -> None:
        super().__init__((8, 0), collect=True, schedule="random")
        self.old, self.new, self.memory = old, new, memory

    def load(self, ptx: str, name: str | None = None) -> driver.Function:
        return super().load(self.new if ptx == self.old else ptx, name)

    def launch(self, function: driver.Function, *rest: Any) -> None:
        if "merge" in function.name:
            super().launch(function, *rest)
        elif self.memory:
            for to, kept in zip(self.buffers, self.memory, strict=True):
                assert to is not None
                to[:] = kept
        else:
            super().launch(function, *rest)
            self.memory += [None if buffer is None else buffer.copy() for buffer in self.buffers]


@functools.cache
def problems(ptx: str) -> dict[str, mutations.Run]:
    """What notices a bug in the kernel that joins the parts: results held to the right kernel's."""

    def problem(options: dict[str, Any], *shapes: tuple[int, ...], one_sign: bool = False) -> mutations.Run:
        q, k, v = drawn("float32", *shapes)
        if one_sign:
            q, k = np.abs(q), np.abs(k)
        memory: list[Any] = []

        def call(new: str) -> tuple[Any, np.ndarray, np.ndarray]:
            with driver.use(Swapping(ptx, new, memory)) as device:
                out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
            return device, out, lse

        _, want, want_lse = call(ptx)

        def run(new: str) -> str | None:
            device, out, lse = call(new)
            wrong = None
            with np.errstate(invalid="ignore"):
                if not (np.allclose(out, want, 2e-6, 2e-6, True) and np.allclose(lse, want_lse, 2e-6, 2e-6, True)):
                    wrong = "other results"
            return mutations.findings(SimpleNamespace(msgs=device.findings), wrong)

        return run

    sinks_of = np.array([0.5, -1.0, 300.0, -np.inf], np.float32)
    low, high = np.array([KV + 9, 4 * KV + 1]), np.array([3 * KV, 5 * KV - 1])
    return {
        "two sequences": problem(
            dict(causal=True, align="bottom_right", mask=na.lengths([13 * KV + 5, 40])),
            (2, 4, 2, 40), (2, 2, 13 * KV + 5, 40), (2, 2, 13 * KV + 5, 40),
        ),
        "sinks, empty rows": problem(
            dict(causal=True, align=np.array([-1, 30]), sinks=sinks_of), (2, 4, 2, 40), (2, 2, 40, 40), (2, 2, 40, 40)
        ),
        "far scores": problem(dict(scale=20.0), (1, 1, 1, 40), (1, 1, 6 * KV, 40), (1, 1, 6 * KV, 40)),
        "far below 0": problem(
            dict(scale=-100.0), (1, 1, 1, 40), (1, 1, 6 * KV, 40), (1, 1, 6 * KV, 40), one_sign=True
        ),
        "window": problem(
            dict(window=(5 * KV, 0), align=9 * KV), (1, 2, 3, 40), (1, 1, 9 * KV + 3, 40), (1, 1, 9 * KV + 3, 72)
        ),
        "intervals": problem(
            dict(mask=na.intervals(low, high)), (1, 2, 2, 40), (1, 1, 6 * KV, 40), (1, 1, 6 * KV, 40)
        ),
        "prefix": problem(
            dict(mask=na.prefix(2 * KV, align="top_left")), (1, 2, 3, 40), (1, 1, 3 * KV, 40), (1, 1, 3 * KV, 40)
        ),
        "many parts": problem(dict(scale=-5.0), (1, 1, 1, 8), (1, 1, 200 * KV, 8), (1, 1, 200 * KV, 8), one_sign=True),
    }  # fmt: skip


@pytest.mark.ladder
@pytest.mark.parametrize("kind", mutations.KINDS)
def test_bugs_in_the_merge_are_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = choose("decode", "f32", (40, 40), forward.memory, emulator.SHARED[8, 0])
    assert t is not None
    loaded: list[str] = []
    with driver.use(emulator.EmulatedDevice((8, 0))) as device:
        load = device.load
        monkeypatch.setattr(device, "load", lambda ptx, name=None: loaded.append(ptx) or load(ptx, name))
        na.attention(*drawn("float32", (1, 1, 1, 40), (1, 1, 40, 40), (1, 1, 40, 40)), return_lse=True, backend="cuda")
    ptx = loaded[-1]
    mutants = mutations.draw(ptx, seeds.generator(0), 12, [kind])
    report = mutations.survivors(problems(ptx), ptx, mutants)
    assert not [str(o) for o in report.survived if o.fate == "survived"]
    assert len(report.survived) <= len(mutants) / 3, "\n".join(map(str, report.survived))
