"""Launches of the package's own kernels, recorded from calls of the public functions in the emulator, to be run again
with other PTX, other schedules, or profiled.

A launch is the memory of the device before it, its parameters, and what it wrote. The call that it is taken from is
held to the reference, so what was written is right; a replay is held to that.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import emulator
import numpy as np
import seeds

import numba_attn as na
from numba_attn.cuda import backward, forward, tiling
from numba_attn.cuda.host import arrays, convert, driver, loading

MEMORY = {
    "forward": forward.memory, "decode": forward.memory,
    "queries": backward.memory_queries, "keys": backward.memory_keys,
}  # fmt: skip


@dataclass
class Recorded:
    """One launch. before, after: the device's allocations, None where freed."""

    name: str
    ptx: str = field(repr=False)
    grid: int
    threads: int
    shared: int
    params: bytes
    before: list[np.ndarray | None]
    after: list[np.ndarray | None]
    what: str = ""  # of WRITES


class Recorder(emulator.EmulatedDevice):
    """An emulated device that keeps its launches."""

    def __init__(self, cc: tuple[int, int] = (8, 0), **options: Any) -> None:
        super().__init__(cc, **options)
        self.recorded: list[Recorded] = []
        self.texts: dict[int, str] = {}

    def load(self, ptx: str, name: str | None = None) -> driver.Function:
        found = super().load(ptx, name)
        self.texts[id(found)] = ptx
        return found

    def launch(
        self, function: driver.Function, grid: int, threads: int, shared: int, params: bytes, stream: int
    ) -> None:
        before = [None if x is None else x.copy() for x in self.buffers]
        super().launch(function, grid, threads, shared, params, stream)
        after = [None if x is None else x.copy() for x in self.buffers]
        ptx = self.texts[id(function)]
        self.recorded.append(Recorded(function.name, ptx, grid, threads, shared, params, before, after))


@contextlib.contextmanager
def recording(cc: tuple[int, int] = (8, 0), **options: Any) -> Iterator[Recorder]:
    """Calls inside run on a Recorder."""
    known = set(loading.functions)
    try:
        with driver.use(Recorder(cc, **options)) as device:
            yield device
    finally:
        for key in set(loading.functions) - known:  # they would keep the device
            del loading.functions[key]


def replay(one: Recorded, ptx: str, **options: Any) -> tuple[emulator.EmulatedDevice, list[np.ndarray | None]]:
    """Run a recorded launch with this PTX: the device, with the findings of its checks, and its memory afterwards."""
    device = emulator.EmulatedDevice((8, 0), collect=True, **options)
    held = []  # memory that nobody holds is freed
    for x in one.before:
        if x is None:
            device.buffers.append(None)
        else:
            held.append(device.upload(x, 0))
    try:
        device.launch(device.load(ptx, one.name), one.grid, one.threads, one.shared, one.params, 0)
    finally:
        if ptx != one.ptx:
            emulator._parsed.pop((ptx, one.name), None)
    return device, list(device.buffers[: len(one.before)])


def short(name: str) -> str:
    """A kernel's own name, of its mangled one."""
    found = re.search(r"locals_3e(\d+)", name)
    return name[found.end() : found.end() + int(found[1])] if found else name


# What a kernel writes: the dtypes of the arrays in order of their addresses ("s" the storage type, "a" the accumulation
# type, "d" float64, "i" integers, which are exact); `rows` writes both of its arrays into one.
WRITES = {
    "forward": "sa", "merge": "sa", "rows": "a", "queries": "s", "keys": "ss", "decode": "aa", "fill": "sa",
    "bias": "d", "total": "a", "slopes": "d", "sinks": "d", "aux": "i", "aux_total": "d", "convert": "a",
}  # fmt: skip


def differs(one: Recorded, memory: list[Any], storage: np.dtype, tolerance: float) -> str | None:
    """What a replay wrote, against what was recorded: each array's largest error relative to its largest number, the
    same infinities and NaN, and nothing written elsewhere."""
    acc = np.dtype(np.float64 if storage == np.float64 else np.float32)
    kinds = {"s": storage, "a": acc, "d": np.dtype("f8"), "i": np.dtype("i8")}
    wrote = list(WRITES[one.what])
    for n, (before, after, now) in enumerate(zip(one.before, one.after, memory, strict=True)):
        if before is None or after is None or now is None:
            continue
        if (before == after).all():
            if (now != after).any():
                return f"allocation {n} was written to"
            continue
        if (now == after).all():
            wrote = wrote[1:]
            continue
        kind = kinds[wrote.pop(0)] if wrote else kinds["a"]
        if kind == kinds["i"]:
            return f"allocation {n} holds other integers"
        with np.errstate(all="ignore"):
            got, want = (x.view(kind).astype(np.float64) for x in (now, after))
            same = (np.isnan(got) & np.isnan(want)) | (got == want)
            finite = np.isfinite(want)
            largest = np.abs(want[finite]).max(initial=0.0)
            error = np.where(same, 0.0, np.abs(got - want))
            worst = np.where(np.isnan(error), np.inf, error).max(initial=0.0)
        if not worst <= tolerance * largest:
            return f"allocation {n} ({kind}) is off by {worst:.2g} of {largest:.2g}"
    return None


TOLERANCE = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-12}


def run_of(one: Recorded, dtype: str, **options: Any) -> Callable[[str], str | None]:
    """For mutations.survivors."""

    def run(ptx: str) -> str | None:
        device, memory = replay(one, ptx, **options)
        said = [f"{kind} x{count}: {text}" for (kind, text), count in device.findings.items()]
        wrong = differs(one, memory, np.dtype(dtype), TOLERANCE[dtype])
        return "\n".join(([f"numbers: {wrong}"] if wrong else []) + said) or None

    return run


# --------------------------------------------------------------------------------------------------------- the problems


@dataclass(frozen=True)
class Problem:
    """A small call that reaches some of a kernel's code.

    options: of the public functions. steep: scores of one key and the next lie far apart, so that weights are 0 or 1;
    "alone": each query has one score far above its others, in such places that every element of a thread's tile of
    scores is once the only maximum of a row.
    nan: "hidden" in every key and value that no query sees; "values" in one number of each of 64 values, another one
    from key to key, and "dout" likewise in rows of dout, so that each pair of a tile decides alone whether it shows;
    "qk" in one query and one key.
    """

    name: str
    batch: int = 1
    heads: tuple[int, int] = (2, 1)
    q_len: int = 37
    kv_len: int = 150
    dim: int = 64
    spread: float = 1.0
    steep: bool | str = False
    nan: tuple[str, ...] = ()
    on_device: bool = False  # the arrays: what the host does for NumPy's, kernels do then
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def forward(self) -> dict[str, Any]:
        """The options of the forward pass alone."""
        return {name: x for name, x in self.options.items() if name != "aux_grad"}


def _sinks() -> dict[str, Any]:
    return {"sinks": np.array([0.5, -1.0], np.float32)}


# Same PTX for all: nothing here is compiled in. Two query heads share a key head, and 37 rows of each a tile.
PROBLEMS = [
    Problem("causal", options={"causal": True, "align": "bottom_right"}),
    Problem("window", q_len=150, kv_len=131, heads=(1, 1), options={"window": (20, 3), "align": "top_left"}),
    Problem("lengths", batch=2, dim=56, options={"mask": na.lengths([150, 33], [37, 20]), **_sinks()}),
    Problem("steep", q_len=40, kv_len=100, steep=True,
            options={"causal": True, "align": 60, "sinks": np.array([300.0, -300.0], np.float32)}),
    Problem("alone", heads=(1, 1), q_len=160, kv_len=160, steep="alone", options={"causal": False}),
    Problem("nan", q_len=70, kv_len=100, nan=("values",), options={"causal": True, "align": "bottom_right"}),
    Problem("nan-dout", q_len=70, kv_len=100, nan=("dout",), options={"causal": True, "align": "bottom_right"}),
    Problem("nan-qk", q_len=70, kv_len=100, nan=("qk",), options={"causal": True, "align": "bottom_right"}),
    Problem("empty", batch=2, q_len=140, kv_len=40, heads=(1, 1), nan=("hidden",),
            options={"mask": na.lengths([0, 40]), "causal": True, "align": -130}),
    Problem("varlen", q_len=80, kv_len=170, options={"mask": na.varlen([0, 3, 40, 80], [0, 90, 100, 170])}),
]  # fmt: skip
FEW = [
    Problem("few-causal", heads=(4, 1), q_len=2, kv_len=650, options={"causal": True, "align": "bottom_right"}),
    Problem("few-steep", q_len=5, kv_len=300, steep=True,
            options={"sinks": np.array([300.0, -300.0], np.float32)}),
    Problem("few-lengths", batch=3, heads=(8, 2), q_len=2, kv_len=520, nan=("hidden",), dim=56,
            options={"mask": na.lengths([520, 40, 0]), "sinks": np.linspace(-1, 1, 8).astype(np.float32)}),
    Problem("few-window", heads=(1, 1), q_len=7, kv_len=700, nan=("hidden", "values"),
            options={"window": (300, 0), "align": 300}),
]  # fmt: skip


def by_key_and_distance(s: float, b: int, h: int, i: int, j: int, by_key: np.ndarray, by_distance: np.ndarray) -> float:
    return s + by_key[h, j] + by_distance[abs(i - j) // 8]


def _bias(shape: tuple[int, ...]) -> dict[str, Any]:
    return {"bias": seeds.generator(1).standard_normal(shape).astype(np.float32)}


def _tables(heads: int, kv_len: int) -> dict[str, Any]:
    rng = seeds.generator(2)
    tables = tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((heads, kv_len), (kv_len // 8 + 1,)))
    return {"score_mod": by_key_and_distance, "aux": tables, "aux_grad": (0, 1)}


# The kernels of gradients that are sums over pairs, and of queries in no sequence: kernel -> its problems.
SUMS = {
    "bias": [
        Problem("bias-causal", batch=2, options={"causal": True, "align": "bottom_right", **_bias((1, 1, 37, 150))}),
        Problem("bias-lengths", batch=2, options={"mask": na.lengths([150, 33], [37, 20]), **_bias((1, 1, 37, 150))}),
        Problem("bias-nan", q_len=70, kv_len=100, nan=("hidden", "dout"),
                options={"window": (20, 3), "align": "top_left", **_bias((1, 1, 70, 100))}),
    ],
    "slopes": [
        Problem("slopes", batch=2, q_len=300,
                options={"align": "top_left", "alibi_slopes": np.array([0.25, 0.5], np.float32)}),
        Problem("slopes-batch", batch=3, q_len=20,
                options={"align": "top_left", "alibi_slopes": np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 2)}),
    ],
    "sinks": [
        Problem("sinks", batch=2, q_len=300, on_device=True, options=_sinks()),
        Problem("sinks-gaps", q_len=80, on_device=True,
                options={"mask": na.varlen([0, 40, 70], [0, 90, 150]), **_sinks()}),
    ],
    "aux": [
        Problem("aux-causal", batch=2, options={"causal": True, "align": "bottom_right", **_tables(2, 150)}),
        Problem("aux-lengths", batch=2, nan=("hidden",), dim=56,
                options={"mask": na.lengths([150, 33], [37, 20]), **_tables(2, 150)}),
        Problem("aux-nan", q_len=70, kv_len=100, nan=("dout",),
                options={"window": (20, 3), "align": "top_left", **_tables(2, 100)}),
    ],
    "fill": [
        Problem("gaps", q_len=80, options={"mask": na.varlen([0, 40, 70], [0, 90, 150])}),
        Problem("gaps-batch", batch=2, dim=56, options={"mask": na.lengths([150, 33], [37, 0])}),
    ],
}  # fmt: skip
SUMS["total"], SUMS["aux_total"] = SUMS["bias"], SUMS["aux"]
NAMED = {p.name: p for p in [*PROBLEMS, *FEW, *(p for problems in SUMS.values() for p in problems)]}


def arrays_of(problem: Problem, dtype: str) -> tuple[np.ndarray, ...]:
    """q, k, v, dout and dlse."""
    rng = seeds.generator(len(problem.name) + problem.kv_len)
    p = problem
    q = rng.standard_normal((p.batch, p.heads[0], p.q_len, p.dim))
    k, v = (rng.standard_normal((p.batch, p.heads[1], p.kv_len, p.dim)) for _ in range(2))
    if p.steep == "alone":  # a thread has rows n, n + 8, n + 16, n + 24 of a warp's 32, and two columns of each eight
        i = np.arange(p.q_len)
        k[...] = np.sign(k)
        q[...] = 30.0 * k[:, :, i // 32 * 32 + i % 8 // 2 * 8 + i // 8 % 4 * 2 + i % 2]
    elif p.steep:  # scores of one key to the next are some 150 apart, up and down
        q[..., 0], k[..., 0] = 40.0, 10.0 * rng.permuted(np.arange(p.kv_len) % 7 - 3.0)
    dout = rng.standard_normal(q.shape)
    dlse = rng.standard_normal(q.shape[:3])
    acc = np.float64 if dtype == "float64" else np.float32
    return (*(x.astype(dtype) for x in (q, k, v, dout)), dlse.astype(acc))


def poison(problem: Problem, q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray) -> None:
    """As problem.nan says."""
    dim = problem.dim
    if "qk" in problem.nan:
        q[:, :, 20, 5] = k[:, :, 60, 7] = np.nan
    if "hidden" in problem.nan:
        for j in range(problem.kv_len):  # a value is seen if out shows it
            probe = np.zeros_like(v)
            probe[:, :, j] = 1
            nothing = np.zeros_like(q), np.zeros_like(k)
            seen = np.abs(na.reference.attention(*nothing, probe, **problem.forward)).max(axis=(2, 3)) > 0
            hidden = ~seen.reshape(problem.batch, problem.heads[1], -1).any(axis=2)
            k[hidden, j] = v[hidden, j] = np.nan
    first = 32 if problem.kv_len > 96 else 0
    for n in range(dim):
        if "values" in problem.nan and first + n < problem.kv_len:
            v[:, :, first + n, n] = np.nan
        if "dout" in problem.nan and n < problem.q_len:
            dout[:, :, n, n] = np.nan


def record(problem: Problem, dtype: str, **options: Any) -> list[Recorded]:
    """The launches of a call and its gradients, whose numbers are held to the reference. options: recording's."""
    q, k, v, dout, dlse = arrays_of(problem, dtype)
    poison(problem, q, k, v, dout)
    few = problem in FEW
    with recording(**options) as device:
        own, given, back = problem.options, [q, k, v, dout, dlse], list
        if problem.on_device:
            own = {name: placed(x, device) if isinstance(x, np.ndarray) else x for name, x in own.items()}
            given = [placed(x, device) for x in given]
            back = functools.partial(map, arrays.DeviceArray.copy_to_host)
        (out, lse), pullback = na.attention_vjp(*given[:3], **own, return_lse=True, backend="cuda")
        got = [out, lse]
        if not few:
            got += gradients_of(pullback(*given[3:]))
        got = list(back(got))
    with np.errstate(all="ignore"):
        wanted = list(na.reference.attention(q, k, v, **problem.forward, return_lse=True))
        if not few:
            grads = na.reference.attention_backward(dout, q, k, v, dlse=dlse, **problem.options)
            wanted += gradients_of(grads)
        for x, want in zip(got, wanted, strict=True):
            x, y = x.astype(np.float64), np.asarray(want, np.float64)
            finite = np.isfinite(y)
            assert (np.isfinite(x) == finite).all(), f"{problem.name}: other numbers are not finite"
            worst = np.abs(x - y)[finite].max(initial=0.0)
            bound = {"float16": 2e-2, "float32": 2e-4, "float64": 1e-10}[dtype] * np.abs(y[finite]).max(initial=1.0)
            assert worst <= bound, f"{problem.name}: off by {worst:.2g}, allowed {bound:.2g}"
    for one, before in zip(device.recorded, [None, *device.recorded], strict=False):
        one.what = short(one.name)
        if one.what == "merge" and before:  # what it merges, the forward kernel left with its keys split
            before.what = "decode"
        if one.what == "heads":
            one.what = "slopes" if "alibi_slopes" in problem.options else "sinks"
    return device.recorded


def placed(x: np.ndarray, device: Any) -> arrays.DeviceArray:
    return arrays.DeviceArray(x.shape, x.dtype, device.upload(x, 0))


def gradients_of(grads: Any) -> list[np.ndarray]:
    found = [grads.dq, grads.dk, grads.dv, grads.dbias, grads.dsinks, grads.dalibi_slopes, *(grads.daux or ())]
    return [x for x in found if x is not None]


def record_convert() -> list[Recorded]:
    """A copy of an array whose axes do not follow on each other, into another type."""
    rng = seeds.generator(0)
    x = rng.standard_normal((9, 7, 100)).astype(np.float16)
    with recording() as device:
        there = placed(x, device)
        result = convert.converted(arrays.shadow(there)[::2, 1:, ::-3], np.dtype(np.float32), device, 0)
        assert (result.copy_to_host() == x[::2, 1:, ::-3]).all()
    for one in device.recorded:
        one.what = "convert"
    return device.recorded


@functools.cache
def recorded(name: str, dtype: str) -> list[Recorded]:
    return record_convert() if name == "convert" else record(NAMED[name], dtype)


Runs = dict[str, Callable[[str], str | None]]


def runs_of(what: str, dtype: str, names: Iterable[str] | None = None) -> tuple[str, Runs]:
    """The PTX of a kernel, and its runs: every problem, then with copies that land at once or warps in random order."""
    first, then, ptx = {}, {}, None
    if names is None:
        chosen = FEW if what in ("decode", "merge") else SUMS.get(what, PROBLEMS)
        names = ["convert"] if what == "convert" else [p.name for p in chosen]
    for n, name in enumerate(names):
        mine = [one for one in recorded(name, dtype) if one.what == what]
        for m, one in enumerate(mine):  # aux has two
            assert ptx in (None, one.ptx), f"{name} has another {what} kernel"
            ptx = one.ptx
            title = f"{name} {m}" if len(mine) > 1 else name
            first[title] = run_of(one, dtype)
            if n % 2:
                then[f"{title} early"] = run_of(one, dtype, async_late=False)
            else:
                then[f"{title} random"] = run_of(one, dtype, schedule="random", seed=n)
    assert ptx is not None
    return ptx, first | then


# -------------------------------------------------------------------------------------------------------- the profile


def profile(
    what: str, dtype: str, dim: int, tf32: bool = False, cc: tuple[int, int] = (8, 0)
) -> dict[str, dict[str, list[float]]]:
    """Wavefronts of shared memory that a warp needs, and the fewest for as many accesses: {"loop": {opcode:
    [wavefronts, ideal]}, "once": ...}, for each tile of the main loop, and for all that is outside it.

    Full attention of one tile of rows with one tile of columns, then with three more. Asynchronous copies are in it.
    """
    numpy_type = {"f16": "float16", "f32": "float32", "f64": "float64"}[dtype]
    with recording(cc) as device:
        name = "keys" if what.startswith("keys") else what
        t = tiling.choose(name, dtype, (dim, dim), MEMORY[name], device.shared_limit, tf32=tf32, cc=device.cc)
        assert t is not None
    found = []
    for tiles in (1, 2 if what == "decode" else 4):
        rows, cols = t.rows, t.cols * tiles
        shape = (1, cols) if what == "decode" else (cols, rows) if name == "keys" else (rows, cols)
        rng = seeds.generator(tiles)
        heads = rows if what == "decode" else 1
        q, dout = (rng.standard_normal((1, heads, shape[0], dim)).astype(numpy_type) for _ in range(2))
        k, v = (rng.standard_normal((1, 1, shape[1], dim)).astype(numpy_type) for _ in range(2))
        with recording(cc, profile=True, async_late=False) as device:
            _, pullback = na.attention_vjp(q, k, v, backend="cuda", precision="tf32" if tf32 else "ieee")
            if what not in ("forward", "decode"):
                pullback(dout)
        wanted = "forward" if what == "decode" else name
        mine = [one for one in device.launches if short(one.name) == wanted]
        one = mine[1 if what == "keys-dv" else 0]
        counts: Counter[tuple[str, str]] = Counter()
        for access in one.accesses:
            if access.space == "shared":
                counts[_opcode(access.text), "wavefronts"] += access.wavefronts
                counts[_opcode(access.text), "ideal"] += access.ideal
        found.append({key: n / one.grid / (one.threads // 32) for key, n in counts.items()})
    few, many = found
    turns = 1 if what == "decode" else 3
    out: dict[str, dict[str, list[float]]] = {"loop": {}, "once": {}}
    for opcode in sorted({key[0] for key in many}):
        pairs = [(few.get((opcode, kind), 0), many.get((opcode, kind), 0)) for kind in ("wavefronts", "ideal")]
        loop = [(b - a) / turns for a, b in pairs]
        once = [a - n for (a, _), n in zip(pairs, loop, strict=True)]
        for part, numbers in (("loop", loop), ("once", once)):
            if max(numbers) > 0.01:
                out[part][opcode] = [round(n, 2) for n in numbers]
    return out


def _opcode(text: str) -> str:
    """Of an instruction's text, without its guard."""
    return next(word for word in text.split() if not word.startswith("@")).rstrip(";")
