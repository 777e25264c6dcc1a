"""A Problem -> the kernels' calls on a device: the counterpart of cpu/launch/."""

from __future__ import annotations

import contextlib
import math
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...arrays import Array
from ...online import LOG2E
from ...userfn import accepted
from .. import backward, decode, derivatives, forward, modifiers, sums
from ..code import SIZE, VECTOR
from ..compile import kernel_ptx
from ..scores import REALS, Features, signature
from ..tiling import LARGEST, Tiling, choose
from . import arrays, driver

if TYPE_CHECKING:
    from ...plan import Problem

STORAGE = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
OLDEST = (8, 0)  # asynchronous copies and the tensor-core instructions begin here
OPEN = 2**62  # plan's mark of a window that is open on a side
MOST_ROWS = 2**32 - 1  # of the result
MOST_POSITIONS = 2**30  # queries and keys of a sequence are counted in 32 bits inside a tile


# An array of ours on the device: its memory, shape and dtype.
Result = tuple[Any, tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True)
class Placed:
    """An array on the device: where it starts, and its strides in bytes. keep: what must outlive the call."""

    address: int
    strides: tuple[int, ...]
    keep: Any = None


class Call:
    """One problem on one device: its arrays there, the features that it needs and the numbers that kernels take.

    on_device: the problem's arrays are shadows, NumPy views of device memory that nobody may read here.
    tf32: float32 by tensor cores.
    steps: what was launched: function, grid, threads, bytes of shared memory, parameters and their names.
    lasting: for a Prepared: `steps` are kept.
    """

    def __init__(
        self,
        problem: Problem,
        device: Any,
        stream: int,
        on_device: bool,
        derivatives: bool = False,
        tf32: bool = False,
        lasting: bool = False,
    ):
        self.problem, self.device, self.stream, self.on_device = problem, device, stream, on_device
        self.tf32, self.lasting = tf32, lasting
        self.steps: list[tuple[Any, int, int, int, bytes, tuple[str, ...]]] = []
        check(problem, device)
        if tf32 and problem.dtype != np.float32:
            raise ValueError(
                f"precision is 'tf32' and q has dtype {problem.dtype}; tf32 is a way to compute with float32 arrays"
            )
        if not on_device:  # else asked before there were results
            device.refuse_capture(stream)
        self.storage = STORAGE[problem.dtype.name]
        self.acc = "f64" if self.storage == "f64" else "f32"
        self.keep: list[Any] = []
        self.scratch: tuple[Any, dict[str, int]] | None = None  # see workspace
        self.numbers: dict[str, int] = {}
        p = problem
        for name, x in (("q", p.q), ("k", p.k), ("v", p.v)):
            self.place(name, x)
        sequences = self.small(p.sequences)
        # Scores are in log2 units as soon as nothing comes behind that is in natural ones (Features.natural).
        late = p.bias is not None or p.slopes is not None or p.score_mod is not None
        unit = 1.0 if late else LOG2E
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
            "scale": p.scale / p.softcap if p.softcap else p.scale * unit,
            "softcap": p.softcap * unit,
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
            positive=1e-30 < self.reals["scale"] < 1e30,
        )

    def take(self, part: Problem) -> None:
        """Go on with a part of the problem's sequences."""
        if part is not self.problem:
            self.problem = part
            self.numbers["sequences"] = self.small(part.sequences)

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
                base = np.asarray(a, order="C")  # ascontiguousarray gives an array of no axis one
                rows.append((self.small(base), base.shape, base.strides))
        return modifiers.aux_numbers(rows)

    def result(self, name: str, shape: tuple[int, ...], dtype: Any, target: Array | None) -> Any:
        """Memory for a result: the caller's own, where that is on the device. Returns what `fetch` takes."""
        if self.on_device and target is not None:
            self.place(name, target)
            return None
        found = self.empty(shape, dtype)
        self.numbers[name] = found[0].address
        for axis, stride in zip("bhsd", _steps(shape, found[2].itemsize), strict=False):
            self.numbers[f"{name}_{axis}"] = stride
        return found

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Result:
        """Memory for an array in C order."""
        dtype = np.dtype(dtype)
        memory = self.device.empty(math.prod(shape) * dtype.itemsize, self.stream)
        self.keep.append(memory)
        return memory, shape, dtype

    def workspace(self, nbytes: int, **offsets: int) -> None:
        """Memory in which kernels leave something for the next ones: the call's field -> where in it that begins."""
        memory = self.device.empty(nbytes, self.stream)
        self.keep.append(memory)
        self.numbers |= {name: memory.address + at for name, at in offsets.items()}
        self.scratch = memory, offsets

    def clear(self, result: Any, target: Array) -> None:
        """Zeros in a result; one of the caller's own has no gaps between its elements."""
        self.device.fill(_Span(int(target.ctypes.data), target.nbytes) if result is None else result[0], 0, self.stream)

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

    def fetched(self, result: Result | None) -> Array | None:
        """A result as a NumPy array."""
        if result is None:
            return None
        host = np.empty(result[1], result[2])
        self.device.download(result[0], host, self.stream)
        return host

    def finish(self) -> None:
        """Results are there, or what the kernels use is kept until the stream has come to its end."""
        if not self.on_device:
            self.device.synchronize(self.stream)
        elif not self.device.ordered:
            self.device.hold(self.keep, self.stream)

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
        function = _function(self.device, build, t, f, bounds(build, t, threads, more), more)
        fields = [self.numbers.get(name, 0) for name in f.fields]
        reals = [self.reals[name] for name in REALS]
        params = struct.pack(f"<{len(fields)}q{len(reals)}d", *fields, *reals)
        self.device.launch(function, grid, threads, shared, params, self.stream)
        if self.lasting:
            self.steps.append((function, grid, threads, shared, params, f.fields))

    def tiles(self, rows: int) -> int:
        """Tiles of the queries of one key head, in the longest sequence."""
        q_lens = self.problem.sequences[:, 2]
        group = self.problem.q_heads // self.problem.kv_heads
        n = np.where(q_lens < rows, (group * q_lens + rows - 1) // rows, group * ((q_lens + rows - 1) // rows))
        return int(n.max(initial=0))

    def tiling(self, kernel: str, memory: Callable[[Tiling], dict[str, int]]) -> Tiling:
        p = self.problem
        t = choose(
            kernel,
            self.storage,
            p.qk_dim,
            p.v_dim,
            memory,
            self.device.shared_limit,
            tf32=self.tf32 and kernel != "decode",
            options=self.features.options,
            cc=self.device.cc,
        )
        if t is None:
            raise ValueError(
                f"q has head size {p.qk_dim} and v {p.v_dim} in {p.dtype}: the CUDA kernels have no tile for these "
                f"that fits in the {self.device.shared_limit // 1024} KB of shared memory of {self.device.name}; "
                "backend='cpu' takes any head size"
            )
        return t


class _Span(NamedTuple):
    """Device memory that is not ours to free."""

    address: int
    nbytes: int


def _steps(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Strides in bytes of an array in C order."""
    steps = [itemsize]
    for n in shape[:0:-1]:
        steps.insert(0, steps[0] * n)
    return steps


def _strides(x: Array) -> tuple[int, ...]:
    """Strides in bytes, 0 along axes of length 1."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.strides, strict=True))


def _plain(mod: Any) -> Any:
    return mod.fn if isinstance(mod, accepted.ScoreMod) else mod


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
    if problem.batch * problem.q_heads * problem.q_len > MOST_ROWS:
        raise ValueError(
            f"q has {problem.batch} x {problem.q_heads} x {problem.q_len} queries; the CUDA kernels take up to 2**32 - "
            "1: split the batch"
        )
    if max(problem.q_len, problem.kv_len) > MOST_POSITIONS:
        raise ValueError(
            f"q has {problem.q_len} positions and k {problem.kv_len}; the CUDA kernels take up to 2**30: backend='cpu'"
        )


def bounds(
    build: Callable[..., Any], t: Tiling | None, threads: int, more: tuple[Any, ...] = ()
) -> int | tuple[int, int]:
    """The launch bounds of a kernel: threads of a block, or those and the blocks for which a multiprocessor must have
    registers at least. Where nothing is said, ptxas may save registers for more blocks than shared memory allows, and
    spill for them: so it did for dQ on sm_100 and sm_120, for forward in float64 on sm_120, for decode (forward with
    split keys, in more) in float64 on sm_80 and sm_90, for dK and dV in tf32 on sm_80, and for these sums."""
    if build in (sums.build_bias, sums.build_aux):
        return threads, 1
    wide = build is forward.build and (more or (t is not None and t.size == 8))
    if wide or build in (backward.build_queries, backward.build_keys):
        return threads, REGISTERS // (256 * threads)
    return threads


REGISTERS = 65536  # of a multiprocessor; a thread has at most 255


class Prepared:
    """The launches of a call of `attention` or `attention_backward`, for others that differ from it in addresses
    alone, on any stream.

    The call's numbers on the device become the device's own stream's, on which they are freed some day: it is told of
    all launches that read them, by marks of their streams, when this object dies; for a stream that may be gone then,
    at once. So the host does not wait, but on devices that free nothing in the order of a stream.
    """

    ARRAYS = ("q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv")

    def __init__(self, call: Call) -> None:
        self.device = device = call.device
        self.used: dict[int, Any] = {}  # stream -> mark behind the last launch there
        memory, self.offsets = call.scratch or (None, {})
        self.workspace = None if memory is None else memory.nbytes
        self.keep = [x for x in call.keep if x is not memory]
        names = [name for name in (*self.ARRAYS, *self.offsets) if name in call.numbers]
        self.steps = [
            (*step, [(fields.index(name), name) for name in names if name in fields]) for *step, fields in call.steps
        ]
        self.ready = device.mark(call.stream)  # what the call has put there: copies and launches; None when it is done
        device.after(device.own, self.ready)
        for x in self.keep:
            x.stream = device.own

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # as for driver.Memory
            for mark in self.used.values():
                self.device.after(self.device.own, mark)

    def run(self, stream: int, addresses: dict[str, int]) -> None:
        """addresses: of every array."""
        device, ready = self.device, self.ready
        if ready is not None:
            if device.passed(ready):
                self.ready = None
            else:
                device.after(stream, ready)
        mark = None
        if arrays.lasts(stream):
            mark = self.used.get(stream) or self.used.setdefault(stream, device.mark(stream))
        try:
            self._launch(stream, addresses)
        finally:
            if mark is None:
                device.wait(device.own, stream)
            else:
                device.record(mark, stream)

    def _launch(self, stream: int, addresses: dict[str, int]) -> None:
        device, memory = self.device, None
        if self.workspace is not None:
            memory = device.empty(self.workspace, stream)
            addresses = addresses | {name: memory.address + at for name, at in self.offsets.items()}
        for function, grid, threads, shared, params, places in self.steps:
            own = bytearray(params)
            for n, name in places:
                _FIELD.pack_into(own, 8 * n, addresses[name])
            device.launch(function, grid, threads, shared, bytes(own), stream)
        if memory is not None and not device.ordered:
            device.hold([memory], stream)


_FIELD = struct.Struct("<q")

_functions: dict[Any, Any] = {}
_texts: dict[Any, str] = {}
_lock = threading.Lock()


def _function(device: Any, build: Callable[..., Any], t: Tiling | None, f: Features, threads: Any, more: Any) -> Any:
    """The loaded kernel, compiled if this is its first use on a device of such compute capability."""
    key = (device, build, t, f, threads, more)
    found = _functions.get(key)
    if found is None:
        with _lock:
            found = _functions.get(key)
            if found is None:
                text = (device.cc, *key[1:])
                if text not in _texts:
                    make = (lambda: build(t, f, *more)) if t is not None else (lambda: build(*more, f))
                    plain = f.score_mod is None and not f.mask_mods  # users' functions have no name that lasts
                    name = f"{build.__module__}.{build.__name__} {t} {f} {more}" if plain else None
                    _texts[text] = kernel_ptx(make, signature(f.fields), device.cc, threads, name)
                found = _functions[key] = device.load(_texts[text], None)
    return found


# --- the calls --------------------------------------------------------------------------------------------------------


def attention(
    problem: Problem,
    out: Array,
    lse: Array | None,
    stream: int = 0,
    on_device: bool = False,
    device: Any = None,
    tf32: bool = False,
    lasting: bool = False,
) -> Prepared | None:
    """Write out, and lse if wanted, (B, H, S, D) and (B, H, S) views.

    on_device: they and the problem's arrays are shadows of device memory; the work is left on the stream.
    lasting: what later calls need that differ in addresses alone is returned, all of them on_device; the problem has no
        array but q, k and v.
    """
    device = driver.current() if device is None else device
    call = Call(problem, device, stream, on_device, tf32=tf32, lasting=lasting)
    p = problem
    shape = (p.batch, p.q_heads, p.q_len, p.v_dim)
    results = [(call.result("out", shape, p.dtype, out), out)]
    if lse is not None:
        results.append((call.result("lse", shape[:3], p.acc, lse), lse))
    short, long = decode.split(p)
    if long is not None:
        t = call.tiling("forward", forward.memory)
        tiles = call.tiles(t.rows)
        grid = tiles * p.kv_heads * len(long.sequences)
        if grid > driver.MAX_GRID:
            raise ValueError(
                f"mask has {len(long.sequences)} sequences, the longest of {int(p.sequences[:, 2].max())} queries, and "
                f"k {p.kv_heads} heads: {grid} tiles are more than the {driver.MAX_GRID} of a launch; split the "
                "sequences by length"
            )
    if int(p.sequences[:, 2].sum()) < p.batch * p.q_len:
        _fill(call)
    if long is not None:
        call.take(long)
        call.numbers["tiles"] = tiles
        f = replace(call.features, aligned=call.aligned(("q", "k", "v", "out")))
        call.run(forward.build, t, f, grid, t.threads, forward.memory(t)["size"])
    if short is not None:
        call.take(short)
        _decode(call)
    for result, target in results:
        call.fetch(result, target)
    call.finish()
    return Prepared(call) if lasting else None


def _decode(call: Call) -> None:
    """Few queries: the keys in parts, then the parts joined."""
    p, rows, size = call.problem, decode.rows_of(call.problem), SIZE[call.acc]
    t = decode.with_rows(call.tiling("decode", forward.memory), rows)
    places, items = decode.workspace(p)
    states = len(items) * p.kv_heads * rows
    bytes_of_o = states * decode.row_bytes(t)
    call.workspace(bytes_of_o + states * 2 * size, parts=0, part_stats=bytes_of_o)
    call.numbers |= {
        "tiles": 1,
        "part_places": call.small(places),
        "part_items": call.small(items),
        "part_rows": rows,
    }
    f = replace(call.features, aligned=call.aligned(("q", "k", "v")), extra=decode.EXTRA)
    grid, shared = len(items) * p.kv_heads, forward.memory(t)["size"]
    call.run(forward.build, t, f, grid, t.threads, shared, decode.KEYS)
    call.numbers["tiles"] = tiles = max(1, -(-p.v_dim // decode.COLUMNS))
    grid, shared = tiles * rows * p.kv_heads * len(p.sequences), decode.memory_merge(t)["size"]
    call.run(decode.build_merge, t, Features(extra=decode.EXTRA), grid, decode.THREADS, shared)


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
    stream: int = 0,
    on_device: bool = False,
    device: Any = None,
    tf32: bool = False,
    lasting: bool = False,
) -> tuple[Any, Any, tuple[Any, ...], Any, Prepared | None]:
    """Write dq, dk and dv; return dbias, dslopes, daux and dsinks, None for what is not there, and with `lasting` what
    `attention` returns.

    on_device: as for `attention`; dq, dk and dv are shadows of arrays without gaps. What is returned are Results in
        these shapes and in the argument's dtype, acc or float64.
    """
    p, device = problem, driver.current() if device is None else device
    call = Call(p, device, stream, on_device, derivatives=True, tf32=tf32, lasting=lasting)
    for name, x in (("out", out), ("lse", lse), ("dout", dout), ("dlse", dlse)):
        if x is not None:
            call.place(name, x)
    q_shape = (p.batch, p.q_heads, p.q_len)
    kv_shape = (p.batch, p.kv_heads, p.kv_len)
    results = [
        (call.result("dq", (*q_shape, p.qk_dim), p.dtype, dq), dq),
        (call.result("dk", (*kv_shape, p.qk_dim), p.dtype, dk), dk),
        (call.result("dv", (*kv_shape, p.v_dim), p.dtype, dv), dv),
    ]
    sequences = p.sequences
    if int(sequences[:, 2].sum()) < p.batch * p.q_len or int(sequences[:, 4].sum()) < p.batch * p.kv_len:
        for result, target in results:
            call.clear(result, target)
    acc = np.dtype(p.acc)
    rows = int(np.prod(q_shape))
    call.workspace(2 * rows * acc.itemsize, log_sums=0, deltas=rows * acc.itemsize)
    call.numbers |= {
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
    dbias = dslopes = dsinks = None
    pairs = (*q_shape, p.kv_len)
    if dbias_shape == pairs:
        dbias = call.result("dbias", pairs, acc, None)
        for axis, stride in zip("bhij", (call.numbers[f"dbias_{x}"] for x in "bhsd"), strict=True):
            call.numbers[f"dbias_{axis}"] = stride
        device.fill(dbias[0], 0, stream)
        more += backward.DBIAS
    if dslopes_shape is not None:
        device.fill(call.result("dslopes", q_shape, acc, None)[0], 0, stream)
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

    if dbias_shape is not None and dbias is None:
        dbias = _bias_sums(call, f, dbias_shape)
    if dslopes_shape is not None:
        dslopes = _head_sums(call, "slopes", dslopes_shape)
    if p.sinks is not None:
        dsinks = _head_sums(call, "sinks", (1, p.q_heads))
    daux = _aux_sums(call, f, asked) if any(asked) else (None,) * len(p.aux)

    if on_device:
        call.finish()
        return dbias, dslopes, daux, dsinks, Prepared(call) if lasting else None
    for result, target in results:
        call.fetch(result, target)
    dbias, dslopes, dsinks, *daux = (call.fetched(x) for x in (dbias, dslopes, dsinks, *daux))
    call.finish()
    return dbias, dslopes, tuple(daux), dsinks, None


TOGETHER = 128  # the largest head size at which a thread has registers for dK and dV


# --- sums over pairs --------------------------------------------------------------------------------------------------

BLOCKS = 1024  # what a sum is dealt to at most: some waves of the largest device


def _bias_sums(call: Call, f: Features, shape: tuple[int, ...]) -> Result:
    """The gradient, in its dtype, of a bias of this shape that is broadcast along some axis. f: as for dQ."""
    p, n, bias = call.problem, call.numbers, call.problem.bias
    assert bias is not None
    t = call.tiling("sums", sums.memory_bias)
    sum_rows, sum_keys = shape[2] == 1, shape[3] == 1
    row_tiles, key_tiles = -(-p.q_len // t.rows), -(-p.kv_len // t.cols)
    own = shape[0], shape[1], 1 if sum_rows else row_tiles, 1 if sum_keys else key_tiles
    unit_b, unit_h = p.batch if shape[0] == 1 else 1, p.q_heads if shape[1] == 1 else 1
    unit_rows = row_tiles if sum_rows else 1
    units, blocks = unit_b * unit_h * unit_rows, math.prod(own)
    share = max(1, -(-units // max(1, BLOCKS // max(1, blocks))))  # of units to a part
    parts = max(1, -(-units // share))
    order = np.lexsort((p.sequences[:, 2], p.sequences[:, 1], p.sequences[:, 0]))
    ordered = p.sequences[order]
    if (ordered != p.sequences).any():
        n["sequences"] = call.small(ordered)
    result = call.empty(shape, bias.dtype)
    size = math.prod(shape)
    target = call.empty((parts, size), np.float64) if parts > 1 else result
    item = target[2].itemsize
    n |= {
        "dbias": target[0].address,
        "dbias_part": size * item,
        "parts": parts,
        "units": share,
        "batch_first": call.small(np.searchsorted(ordered[:, 0], np.arange(p.batch + 1))),
        "q_len": p.q_len,
        "kv_len": p.kv_len,
        "unit_b": unit_b,
        "unit_h": unit_h,
        "unit_rows": unit_rows,
    }
    n |= dict(zip(("own_b", "own_h", "own_rows", "own_keys"), own, strict=True))
    for axis, step, wanted in zip("bhij", _steps(shape, item), shape, strict=True):
        n[f"dbias_{axis}"] = step if wanted > 1 else 0
    storage = STORAGE[target[2].name]
    f = replace(f, extra=sums.BIAS)
    shared = sums.memory_bias(t)["size"]
    call.run(sums.build_bias, t, f, blocks * parts, t.threads, shared, sum_rows, sum_keys, storage)
    if parts > 1:
        n |= {"terms": target[0].address, "size": size, "total": result[0].address}
        f, grid = Features(extra=sums.TOTAL), -(-size // 32)
        call.run(sums.build_total, None, f, grid, sums.THREADS, sums.TOTAL_BYTES, STORAGE[bias.dtype.name])
    return result


def _head_sums(call: Call, what: str, shape: tuple[int, ...]) -> Result:
    """The gradients of "slopes", from what the kernel of dQ has left, or of "sinks", float64 of this shape (B or 1,
    Hq)."""
    p, result = call.problem, call.empty(shape, np.float64)
    call.numbers |= {"q_len": p.q_len, "unit_b": p.batch if shape[0] == 1 else 1, "total": result[0].address}
    f = Features(extra=sums.HEADS)
    call.run(sums.build_heads, None, f, math.prod(shape), sums.THREADS, sums.TOTAL_BYTES, what, call.acc, "f64")
    return result


def _aux_sums(call: Call, f: Features, asked: tuple[bool, ...]) -> tuple[Result | None, ...]:
    """The gradients of the arrays of aux that are asked for, in float64. f: as for dQ.

    Raises
    ------
    TypeError, ValueError
        As derivatives.aux_functions; and if score_mod reads what it must not, which only the kernel can tell.
    """
    p, n = call.problem, call.numbers
    functions = derivatives.aux_functions(p.score_mod, call.acc, p.aux, asked)
    limb = derivatives.limb_bits(int((p.sequences[:, 2] * p.sequences[:, 4]).sum()) * p.q_heads)
    which = [m for m, wanted in enumerate(asked) if wanted]
    buffers = [call.empty((derivatives.buffer_size(p.aux[m].size),), np.int64) for m in which]
    for x, (memory, _, _) in enumerate(buffers):
        call.device.fill(memory, 0, call.stream)
        n[f"aux_sums{x}"] = memory.address
    t = call.tiling("sums", sums.memory_aux)
    n |= {"tiles": call.tiles(t.rows), "aux_limb": limb, "limb": limb}
    mod = sums.with_score(modifiers.mod_function(_plain(p.score_mod), call.acc, p.aux))
    f = replace(f, score_mod=mod, extra=sums.aux_fields(len(which)))
    grid = n["tiles"] * p.kv_heads * len(p.sequences)
    for stage in range(2):
        n["aux_stage"] = stage
        call.run(sums.build_aux, t, f, grid, t.threads, sums.memory_aux(t)["size"], functions)
    found: list[Result | None] = [None] * len(asked)
    for m, (memory, _, _) in zip(which, buffers, strict=True):
        found[m] = result = call.empty(p.aux[m].shape, np.float64)
        n |= {"terms": memory.address, "size": p.aux[m].size, "total": result[0].address}
        f, grid = Features(extra=sums.AUX_TOTAL), -(-p.aux[m].size // sums.THREADS)
        call.run(sums.build_aux_total, None, f, grid, sums.THREADS, 0, call.acc, "f64")
    for m, (memory, _, _) in zip(which, buffers, strict=True):
        status = np.empty(1, np.int64)
        call.device.download(memory.address + 8, status, call.stream)
        if status[0] >= derivatives.INSIDE:
            raise ValueError(f"score_mod reads outside aux[{m}]")
        if status[0] == derivatives.ONE_ELEMENT:
            raise ValueError(
                f"score_mod reads not exactly one element of aux[{m}], whose gradient its own grad is to give; "
                "leave grad out, and the function itself is differentiated"
            )
    return tuple(found)
