"""A Problem -> the kernels' calls on a device: the counterpart of cpu/launch.py and cpu/launch_backward.py."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import score
from ..arrays import Array
from ..online import LOG2E
from . import backward, driver, forward, modifiers
from .compile import kernel_ptx
from .scores import REALS, Features, signature
from .tile import SIZE, VECTOR
from .tiling import LARGEST, Tiling, choose

if TYPE_CHECKING:
    from ..plan import Problem

STORAGE = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
OLDEST = (8, 0)  # asynchronous copies and the tensor-core instructions begin here
OPEN = 2**62  # plan's mark of a window that is open on a side
MOST_POSITIONS = 2**30  # queries and keys of a sequence are counted in 32 bits inside a tile


@dataclass(frozen=True)
class Placed:
    """An array on the device: where it starts, and its strides in bytes. keep: what must outlive the call."""

    address: int
    strides: tuple[int, ...]
    keep: Any = None


class Call:
    """One problem on one device: its arrays there, the features that it needs and the numbers that kernels take.

    on_device: the problem's arrays are shadows, NumPy views of device memory that nobody may read here.
    """

    def __init__(self, problem: Problem, device: Any, stream: int, on_device: bool, derivatives: bool = False):
        self.problem, self.device, self.stream, self.on_device = problem, device, stream, on_device
        check(problem, device)
        self.storage = STORAGE[problem.dtype.name]
        self.acc = "f64" if self.storage == "f64" else "f32"
        self.keep: list[Any] = []
        self.numbers: dict[str, int] = {}
        p = problem
        for name, x in (("q", p.q), ("k", p.k), ("v", p.v)):
            self.place(name, x)
        sequences = self.small(p.sequences)
        natural = bool(p.softcap or p.bias is not None or p.slopes is not None or p.score_mod is not None)
        self.numbers |= {
            "kv_heads": p.kv_heads,
            "group": p.q_heads // p.kv_heads,
            "qk_dim": p.qk_dim,
            "v_dim": p.v_dim,
            "sequences": sequences,
            "left": -1 if p.left >= OPEN else p.left,
            "right": -1 if p.right >= OPEN else p.right,
            "has_prefix": int(p.has_prefix),
            "seed": p.seed - 2**64 if p.seed >= 2**63 else p.seed,
            "drop_below": round(p.dropout_p * 2**32),
        }
        self.reals = {
            "scale": p.scale * (1.0 if natural else LOG2E),
            "softcap_in": 1.0 / p.softcap if p.softcap else 0.0,
            "softcap_out": p.softcap,
            "drop_scale": 1.0 / (1.0 - p.dropout_p),
            "grad_scale": p.scale,
        }
        if p.start is not None and p.end is not None:
            self.numbers |= {"start": self.small(p.start), "end": self.small(p.end)}
            for axis, n, stride in zip("bhs", p.start.shape, p.start.strides, strict=True):
                self.numbers[f"bounds_{axis}"] = stride if n > 1 else 0
        if p.slopes is not None:
            self.numbers["slopes"] = self.given(p.slopes)
            self.numbers["slopes_b"] = p.slopes.strides[0] if len(p.slopes) > 1 else 0
        if p.sinks is not None:
            self.numbers["sinks"] = self.given(p.sinks)
        if p.bias is not None:
            self.place_pairs("bias", p.bias)
        for n, mask in enumerate(p.masks):
            self.place_pairs(f"mask{n}", mask)
        for n, (q_ids, k_ids) in enumerate(p.segments):
            self.numbers |= {f"q_ids{n}": self.small(q_ids), f"k_ids{n}": self.small(k_ids)}
            self.numbers[f"q_ids{n}_b"] = q_ids.strides[0] if len(q_ids) > 1 else 0
            self.numbers[f"k_ids{n}_b"] = k_ids.strides[0] if len(k_ids) > 1 else 0
        mask_mods, sizes = [], []
        for n, (fn, aux) in enumerate(p.mask_mods):
            table = self.table(aux, on_device=False)
            self.numbers |= {f"mask_mod{n}_{x}": number for x, number in enumerate(table)}
            mask_mods.append(modifiers.mask_function(fn, self.acc, aux))
            sizes.append(len(table))
        mod, size = None, 0
        if p.score_mod is not None:
            table = self.table(p.aux, on_device)
            self.numbers |= {f"score_mod_{x}": number for x, number in enumerate(table)}
            size = len(table)
            make = modifiers.slope_function if derivatives else modifiers.mod_function
            mod = make(p.score_mod if derivatives else _plain(p.score_mod), self.acc, p.aux)
        self.features = Features(
            softcap=p.softcap != 0.0,
            bias="" if p.bias is None else STORAGE[p.bias.dtype.name],
            slopes=p.slopes is not None,
            masks=len(p.masks),
            segments=len(p.segments),
            mask_mods=tuple(mask_mods),
            mask_tables=tuple(sizes),
            score_mod=mod,
            score_table=size,
            dropout=p.dropout_p > 0,
            derivatives=derivatives,
        )

    # --- arrays -------------------------------------------------------------------------------------------------------

    def small(self, x: Array) -> int:
        """The device address of a copy of an array of ours."""
        memory = self.device.upload(np.ascontiguousarray(x), self.stream)
        self.keep.append(memory)
        return int(memory.address)

    def given(self, x: Array) -> int:
        """The device address of a contiguous array of the caller's."""
        return int(x.ctypes.data) if self.on_device else self.small(x)

    def located(self, x: Array) -> Placed:
        """An array of the caller's on the device: where it is, or a copy without its broadcast axes."""
        if self.on_device:
            return Placed(int(x.ctypes.data), _strides(x))
        once = slice(0, 1)
        base = np.ascontiguousarray(x[tuple(once if s == 0 else slice(None) for s in _strides(x))])
        return Placed(self.small(base), _strides(base))

    def place(self, name: str, x: Array) -> None:
        """A (B, H, S, D) or (B, H, S) array as fields of the call."""
        at = self.located(x)
        self.numbers[name] = at.address
        for axis, stride in zip("bhsd", at.strides, strict=False):
            self.numbers[f"{name}_{axis}"] = stride
        if x.ndim == 4 and x.shape[3] == 1:
            self.numbers[f"{name}_d"] = x.itemsize

    def place_pairs(self, name: str, x: Array) -> None:
        at = self.located(x)
        self.numbers[name] = at.address
        for axis, stride in zip("bhij", at.strides, strict=True):
            self.numbers[f"{name}_{axis}"] = stride

    def table(self, aux: tuple[Array, ...], on_device: bool) -> tuple[int, ...]:
        """The numbers of arrays that a user's function reads."""
        rows = []
        for a in aux:
            if on_device:
                rows.append((int(a.ctypes.data), a.shape, a.strides))
            else:
                base = np.ascontiguousarray(a)
                rows.append((self.small(base), base.shape, base.strides))
        return modifiers.aux_numbers(rows)

    def result(self, name: str, shape: tuple[int, ...], dtype: Any, target: Array | None) -> Any:
        """Memory for a result: the caller's own, where that is on the device. Returns what `fetch` takes."""
        if self.on_device:
            assert target is not None
            self.place(name, target)
            return None
        dtype = np.dtype(dtype)
        memory = self.device.empty(int(np.prod(shape)) * dtype.itemsize, self.stream)
        self.keep.append(memory)
        strides = [dtype.itemsize]
        for n in shape[:0:-1]:
            strides.insert(0, strides[0] * n)
        self.numbers[name] = memory.address
        for axis, stride in zip("bhsd", strides, strict=False):
            self.numbers[f"{name}_{axis}"] = stride
        return memory, shape, dtype

    def fetch(self, result: Any, target: Array) -> None:
        """Copy a result to the caller's array, once the stream has come to it."""
        if result is None:
            return
        memory, shape, dtype = result
        if target.flags.c_contiguous and target.dtype == dtype:
            self.device.download(memory, target, self.stream)
        else:
            host = np.empty(shape, dtype)
            self.device.download(memory, host, self.stream)
            target[...] = host

    def finish(self) -> None:
        """Results are there, or their memory is kept until the stream has come to its end."""
        if self.on_device:
            self.device.hold(self.keep, self.stream)
        else:
            self.device.synchronize(self.stream)

    # --- kernels ------------------------------------------------------------------------------------------------------

    def aligned(self, names: tuple[str, ...]) -> bool:
        """Whether rows of these arrays can be read 16 bytes at a time."""
        n = self.numbers
        size = SIZE[self.storage]
        if self.problem.qk_dim * size % VECTOR or self.problem.v_dim * size % VECTOR:
            return False
        return all(
            n[f"{x}_d"] == size and not any(n[x + part] % VECTOR for part in ("", "_b", "_h", "_s")) for x in names
        )

    def run(
        self, build: Callable[..., Any], t: Tiling | None, f: Features, grid: int, threads: int, shared: int, *more: Any
    ) -> None:
        """Launch a kernel with this call's numbers."""
        if grid <= 0:
            return
        function = _function(self.device, build, t, f, threads, more)
        fields = [self.numbers.get(name, 0) for name in f.fields]
        reals = [self.reals[name] for name in REALS]
        params = struct.pack(f"<{len(fields)}q{len(reals)}d", *fields, *reals)
        self.device.launch(function, grid, threads, shared, params, self.stream)

    def tiles(self, rows: int) -> int:
        """Tiles of the queries of one key head, in the longest sequence."""
        q_lens = self.problem.sequences[:, 2]
        group = self.problem.q_heads // self.problem.kv_heads
        n = np.where(q_lens < rows, (group * q_lens + rows - 1) // rows, group * ((q_lens + rows - 1) // rows))
        return int(n.max(initial=0))

    def tiling(self, kernel: str, memory: Callable[[Tiling], dict[str, int]]) -> Tiling:
        p = self.problem
        t = choose(kernel, self.storage, p.qk_dim, p.v_dim, memory, self.device.shared_limit)
        if t is None:
            raise ValueError(
                f"q has head size {p.qk_dim} and v {p.v_dim} in {p.dtype}: the CUDA kernels have no tile for these "
                f"that fits in the {self.device.shared_limit // 1024} KB of shared memory of {self.device.name}; "
                "backend='cpu' takes any head size"
            )
        return t


def _strides(x: Array) -> tuple[int, ...]:
    """Strides in bytes, 0 along axes of length 1."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.strides, strict=True))


def _plain(mod: Any) -> Any:
    return mod.fn if isinstance(mod, score.ScoreMod) else mod


def check(problem: Problem, device: Any) -> None:
    """Raise ValueError for what the CUDA kernels cannot do, naming it and the way out."""
    if device.cc < OLDEST:
        raise ValueError(
            f"{device.name} has compute capability {device.cc[0]}.{device.cc[1]}; the CUDA kernels take 8.0 (Ampere) "
            "or later: backend='cpu'"
        )
    if max(problem.qk_dim, problem.v_dim) > LARGEST:
        raise ValueError(
            f"q has head size {problem.qk_dim} and v {problem.v_dim}; the CUDA kernels take up to {LARGEST}: "
            "backend='cpu' takes any"
        )
    if max(problem.q_len, problem.kv_len) > MOST_POSITIONS:
        raise ValueError(
            f"q has {problem.q_len} positions and k {problem.kv_len}; the CUDA kernels take up to 2**30: backend='cpu'"
        )


_functions: dict[Any, Any] = {}
_lock = threading.Lock()


def _function(device: Any, build: Callable[..., Any], t: Tiling | None, f: Features, threads: int, more: Any) -> Any:
    """The loaded kernel, compiled if this is its first use on such a device."""
    key = (device, build, t, f, threads, more)
    found = _functions.get(key)
    if found is None:
        with _lock:
            found = _functions.get(key)
            if found is None:
                make = (lambda: build(t, f, *more)) if t is not None else (lambda: build(*more, f))
                plain = f.score_mod is None and not f.mask_mods  # users' functions have no name that lasts
                name = f"{build.__module__}.{build.__name__} {t} {f} {more}" if plain else None
                ptx = kernel_ptx(make, signature(f.fields), device.cc, threads, name)
                found = _functions[key] = device.load(ptx, None)
    return found


# --- the calls --------------------------------------------------------------------------------------------------------


def attention(
    problem: Problem, out: Array, lse: Array | None, stream: int = 0, on_device: bool = False, device: Any = None
) -> None:
    """Write out, and lse if wanted, (B, H, S, D) and (B, H, S) views.

    on_device: they and the problem's arrays are shadows of device memory; the work is left on the stream.
    """
    device = driver.current() if device is None else device
    call = Call(problem, device, stream, on_device)
    p = problem
    t = call.tiling("forward", forward.memory)
    shape = (p.batch, p.q_heads, p.q_len, p.v_dim)
    results = [(call.result("out", shape, p.dtype, out), out)]
    if lse is not None:
        results.append((call.result("lse", shape[:3], p.acc, lse), lse))
    if int(p.sequences[:, 2].sum()) < p.batch * p.q_len:
        _fill(call)
    call.numbers["tiles"] = tiles = call.tiles(t.rows)
    f = replace(call.features, aligned=call.aligned(("q", "k", "v", "out")))
    grid = tiles * p.kv_heads * len(p.sequences)
    call.run(forward.build, t, f, grid, t.threads, forward.memory(t)["size"])
    for result, target in results:
        call.fetch(result, target)
    call.finish()


def _fill(call: Call) -> None:
    """The result of queries in no sequence: out 0, lse -inf. Written for all; the others are written over."""
    p = call.problem
    call.numbers |= {"tiles": p.q_len, "out_rows": p.batch * p.q_heads * p.q_len}
    grid = -(-call.numbers["out_rows"] // (backward.ROWS_THREADS // 32))
    f = Features(extra=("out_rows",))
    call.run(backward.build_fill, None, f, grid, backward.ROWS_THREADS, 0, call.storage, call.acc)


def attention_backward(
    problem: Problem,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array | None,
    dq: Array,
    dk: Array,
    dv: Array,
    dbias_shape: tuple[int, ...] | None,
    dslopes_shape: tuple[int, ...] | None,
    asked: tuple[bool, ...],
) -> tuple[Array | None, Array | None, tuple[Array | None, ...], Array]:
    """As cpu.launch_backward.backward: write dq, dk and dv; return dbias, dslopes, daux and deltas."""
    p, device, stream = problem, driver.current(), 0
    call = Call(p, device, stream, False, derivatives=True)
    for name, x in (("out", out), ("lse", lse), ("dout", dout), ("dlse", dlse)):
        if x is not None:
            call.place(name, x)
    q_shape = (p.batch, p.q_heads, p.q_len)
    kv_shape = (p.batch, p.kv_heads, p.kv_len)
    results = [
        (call.result("dq", (*q_shape, p.qk_dim), p.dtype, None), dq),
        (call.result("dk", (*kv_shape, p.qk_dim), p.dtype, None), dk),
        (call.result("dv", (*kv_shape, p.v_dim), p.dtype, None), dv),
    ]
    sequences = p.sequences
    if int(sequences[:, 2].sum()) < p.batch * p.q_len or int(sequences[:, 4].sum()) < p.batch * p.kv_len:
        for (memory, _, _), _ in results:
            device.fill(memory, 0, stream)
    acc = np.dtype(p.acc)
    rows = int(np.prod(q_shape))
    stats = device.empty(2 * rows * acc.itemsize, stream)
    call.keep.append(stats)
    call.numbers |= {
        "log_sums": stats.address,
        "deltas": stats.address + rows * acc.itemsize,
        "stats_b": p.q_heads * p.q_len * acc.itemsize,
        "stats_h": p.q_len * acc.itemsize,
        "out_rows": rows,
        "tiles": p.q_len,
    }
    extra: tuple[str, ...] = backward.EXTRA
    grid = -(-rows // (backward.ROWS_THREADS // 32))
    f = Features(extra=extra)
    call.run(backward.build_rows, None, f, grid, backward.ROWS_THREADS, 0, call.storage, call.acc)

    names = ("q", "k", "v", "dout", "dq", "dk", "dv")
    f = replace(call.features, aligned=call.aligned(names), extra=extra)
    more: tuple[str, ...] = extra
    bias_memory = slopes_memory = None
    pairs = (*q_shape, p.kv_len)
    if dbias_shape is not None:
        bias_memory = call.result("dbias", pairs, acc, None)
        for axis, stride in zip("bhij", (call.numbers[f"dbias_{x}"] for x in "bhsd"), strict=True):
            call.numbers[f"dbias_{axis}"] = stride
        device.fill(bias_memory[0], 0, stream)
        more += backward.DBIAS
    if dslopes_shape is not None:
        slopes_memory = call.result("dslopes", q_shape, acc, None)
        device.fill(slopes_memory[0], 0, stream)
        more += backward.DSLOPES

    t = call.tiling("queries", backward.memory_queries)
    call.numbers["tiles"] = tiles = call.tiles(t.rows)
    heads = p.kv_heads * len(sequences)
    shared = backward.memory_queries(t)["size"]
    call.run(backward.build_queries, t, replace(f, extra=more), tiles * heads, t.threads, shared)

    t = call.tiling("keys", backward.memory_keys)
    call.numbers["tiles"] = call.tiles(t.cols)
    call.numbers["key_tiles"] = key_tiles = -(-int(sequences[:, 4].max(initial=0)) // t.rows)
    shared = backward.memory_keys(t)["size"]
    for which in ((True, True),) if max(p.qk_dim, p.v_dim) <= TOGETHER else ((True, False), (False, True)):
        call.run(backward.build_keys, t, f, key_tiles * heads, t.threads, shared, *which)

    for result, target in results:
        call.fetch(result, target)
    deltas = np.empty(q_shape, acc)
    device.download(call.numbers["deltas"], deltas, stream)
    dbias = dslopes = None
    if bias_memory is not None and dbias_shape is not None:
        dbias = np.empty(pairs, acc)
        call.fetch(bias_memory, dbias)
        dbias = _summed(dbias, dbias_shape)
    if slopes_memory is not None and dslopes_shape is not None:
        dslopes = np.empty(q_shape, acc)
        call.fetch(slopes_memory, dslopes)
        dslopes = _summed(dslopes[..., None], (*dslopes_shape, 1, 1))[..., 0, 0]
    call.finish()
    return dbias, dslopes, (None,) * len(p.aux), deltas


TOGETHER = 128  # the largest head size at which a thread has registers for dK and dV


def _summed(x: Array, shape: tuple[int, ...]) -> Array:
    """x summed, in float64, over the axes along which `shape` is 1."""
    axes = tuple(n for n, (size, wanted) in enumerate(zip(x.shape, shape, strict=True)) if wanted == 1 and size != 1)
    return x.sum(axis=axes, keepdims=True, dtype=np.float64) if axes else x
