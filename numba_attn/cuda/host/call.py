"""One problem on one device: the numbers that CUDA kernels take, its arrays there, and the launch of a kernel."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...arrays import Array, batch_step
from ...mask.shape import OPEN, Q_LEN, count_tiles
from ...online import LOG2E
from ...userfn import accepted
from .. import modifiers
from ..code import SIZE, VECTOR
from ..record import REALS, Features
from ..tiling import LARGEST, Tiling, choose
from .loading import bounds, loaded

if TYPE_CHECKING:
    from ...plan import Problem

STORAGE = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
OLDEST = (8, 0)  # asynchronous copies and the tensor-core instructions begin here
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


class On(NamedTuple):
    """Where a call runs, and how."""

    device: Any
    stream: int = 0
    on_device: bool = False  # the problem's arrays are shadows, NumPy views of device memory that nobody may read here
    tf32: bool = False  # float32 by tensor cores
    lasting: bool = False  # for a Prepared: the call's `steps` are kept


class Call:
    """One problem on one device: its arrays there, the features that it needs and the numbers that kernels take.

    steps: what was launched: function, grid, threads, bytes of shared memory, parameters and their names.
    """

    def __init__(self, problem: Problem, on: On, derivatives: bool = False):
        self.problem = problem
        self.device, self.stream, self.on_device, self.tf32, self.lasting = on
        self.steps: list[tuple[Any, int, int, int, bytes, tuple[str, ...]]] = []
        check(problem, self.device)
        if self.tf32 and problem.dtype != np.float32:
            raise ValueError(
                f"precision is 'tf32' and q has dtype {problem.dtype}; tf32 is a way to compute with float32 arrays"
            )
        if not self.on_device:  # else asked before there were results
            self.device.refuse_capture(self.stream)
        self.storage = STORAGE[problem.dtype.name]
        self.acc = "f64" if self.storage == "f64" else "f32"
        self.keep: list[Any] = []
        self.scratch: tuple[Any, dict[str, int]] | None = None  # see workspace
        self.numbers: dict[str, int] = {}
        for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v)):
            self.place(name, x)
        self.numbers |= {"sequences": self.small(problem.sequences), **_sizes(problem)}
        self.reals = _reals(problem)
        self._place_options()
        self.features = self._features(derivatives)

    def _place_options(self) -> None:
        """The arrays that a call may have besides q, k and v, but for those of users' functions."""
        p, n = self.problem, self.numbers
        if p.start is not None and p.end is not None:
            n |= {"start": self.small(p.start), "end": self.small(p.end)}
            for axis, size, stride in zip("bhs", p.start.shape, p.start.strides, strict=True):
                n[f"bounds_{axis}"] = stride if size > 1 else 0
        if p.slopes is not None:
            n["slopes"] = self.given(p.slopes)
            n["slopes_b"] = batch_step(p.slopes)
        if p.sinks is not None:
            n["sinks"] = self.given(p.sinks)
        if p.bias is not None:
            self.place_pairs("bias", p.bias)
        for m, mask in enumerate(p.masks):
            self.place_pairs(f"mask{m}", mask)
        for m, (q_ids, k_ids) in enumerate(p.segments):
            n |= {f"q_ids{m}": self.small(q_ids), f"k_ids{m}": self.small(k_ids)}
            n[f"q_ids{m}_b"] = batch_step(q_ids)
            n[f"k_ids{m}_b"] = batch_step(k_ids)

    def _features(self, derivatives: bool) -> Features:
        """What decides the code; places the arrays that users' functions read."""
        p = self.problem
        tables = [self._place_table(f"mask_mod{n}", aux, False) for n, (_, aux) in enumerate(p.mask_mods)]
        mod, size = None, 0
        if p.score_mod is not None:
            size = self._place_table("score_mod", p.aux, self.on_device)
            make = modifiers.slope_function if derivatives else modifiers.mod_function
            mod = make(p.score_mod if derivatives else function_of(p.score_mod), self.acc, p.aux)
        return Features(
            softcap=p.softcap != 0.0,
            bias="" if p.bias is None else STORAGE[p.bias.dtype.name],
            slopes=p.slopes is not None,
            masks=len(p.masks),
            segments=len(p.segments),
            mask_mods=tuple(modifiers.mask_function(fn, self.acc, aux) for fn, aux in p.mask_mods),
            mask_tables=tuple(tables),
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

    def _place_table(self, name: str, aux: tuple[Array, ...], on_device: bool) -> int:
        """The arrays that a user's function reads, as fields of the call: how many fields."""
        rows = []
        for a in aux:
            if on_device:
                rows.append((int(a.ctypes.data), a.shape, a.strides))
            else:
                base = np.asarray(a, order="C")  # ascontiguousarray gives an array of no axis one
                rows.append((self.small(base), base.shape, base.strides))
        table = modifiers.aux_numbers(rows)
        self.numbers |= {f"{name}_{x}": number for x, number in enumerate(table)}
        return len(table)

    def result(self, name: str, shape: tuple[int, ...], dtype: Any, target: Array | None) -> Any:
        """Memory for a result: the caller's own, where that is on the device. Returns what `fetch` takes."""
        if self.on_device and target is not None:
            self.place(name, target)
            return None
        found = self.empty(shape, dtype)
        self.numbers[name] = found[0].address
        for axis, stride in zip("bhsd", c_strides(shape, found[2].itemsize), strict=False):
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
        function = loaded(self.device, build, t, f, bounds(build, t, threads, more), more)
        fields = [self.numbers.get(name, 0) for name in f.fields]
        reals = [self.reals[name] for name in REALS]
        params = struct.pack(f"<{len(fields)}q{len(reals)}d", *fields, *reals)
        self.device.launch(function, grid, threads, shared, params, self.stream)
        if self.lasting:
            self.steps.append((function, grid, threads, shared, params, f.fields))

    def tiles(self, rows: int) -> int:
        """Tiles of the queries of one key head, in the longest sequence."""
        p = self.problem
        return int(count_tiles(p.sequences[:, Q_LEN], rows, p.q_heads // p.kv_heads).max(initial=0))

    def tiling(self, kernel: str, memory: Callable[[Tiling], dict[str, int]]) -> Tiling:
        p = self.problem
        t = choose(
            kernel,
            self.storage,
            (p.qk_dim, p.v_dim),
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


def _sizes(p: Problem) -> dict[str, int]:
    """The numbers of a problem that are no addresses or strides."""
    return {
        "kv_heads": p.kv_heads,
        "group": p.q_heads // p.kv_heads,
        "qk_dim": p.qk_dim,
        "v_dim": p.v_dim,
        "left": -1 if p.left >= OPEN else p.left,
        "right": -1 if p.right >= OPEN else p.right,
        "has_prefix": int(p.has_prefix),
        "seed": p.seed - 2**64 if p.seed >= 2**63 else p.seed,
        "drop_below": round(p.dropout_p * 2**32),
    }


def _reals(p: Problem) -> dict[str, float]:
    """The numbers of record.REALS."""
    # Scores are in log2 units as soon as nothing comes behind that is in natural ones (Features.natural).
    late = p.bias is not None or p.slopes is not None or p.score_mod is not None
    unit = 1.0 if late else LOG2E
    return {
        "scale": p.scale / p.softcap if p.softcap else p.scale * unit,
        "softcap": p.softcap * unit,
        "drop_scale": 1.0 / (1.0 - p.dropout_p),
        "grad_scale": p.scale,
    }


class _Span(NamedTuple):
    """Device memory that is not ours to free."""

    address: int
    nbytes: int


def c_strides(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Strides in bytes of an array in C order."""
    steps = [itemsize]
    for n in shape[:0:-1]:
        steps.insert(0, steps[0] * n)
    return steps


def _strides(x: Array) -> tuple[int, ...]:
    """Strides in bytes, 0 along axes of length 1."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.strides, strict=True))


def function_of(mod: Any) -> Any:
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
