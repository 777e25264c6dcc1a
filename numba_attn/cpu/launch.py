"""A Problem -> one kernel call: fills the CALL record, chooses tiles and threads, allocates nothing the size of the
inputs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba.core import types

from ..mask import OPEN
from ..online import LOG2E
from . import threads
from .call import CALL, STORAGE, tile_rows
from .compile import array_type, compile_cfunc, compile_entry
from .forward import FLUSH, MAX_QUERIES, MAX_QUERIES_COPY, build, key_block, layout
from .modifiers import aux_table, tile_function
from .simd import ROW, call_address

if TYPE_CHECKING:
    from ..plan import Problem

N_FIELDS = CALL.itemsize // 8
CALL_EXTRA = 10  # two counters behind the record, and what it takes to align the scratch memory behind them
INDEX = {name: n for n, name in enumerate(CALL.names or ())}
_FIRST_STRIDE = {name.removesuffix("_b"): n for name, n in INDEX.items() if name.endswith("_b")}

# Work below this many floating-point operations stays on the calling thread: about 20 us, ten times the cost of waking
# another.
SERIAL_FLOPS = 2e6


@dataclass
class Launch:
    """A call without its q, k, v, out and lse: reusable as long as nothing else of it is call data."""

    elem: str
    halves: bool  # float16 and bfloat16 enter the kernel as uint16
    kernel: Any  # the entry kernel for the dtype
    drain: int  # the address of the worker
    template: np.ndarray
    flops: float
    n_items: int
    scratch: int  # bytes for each thread
    fill: bool  # some query is in no sequence
    keep: list[Any] = field(default_factory=list)  # what the addresses in the template point to


@cache
def drain_address(elem: str) -> int:
    return compile_cfunc(build(elem), types.void(types.intp), f"forward-{elem}")


_FIXED = {
    n: INDEX[n] for n in ("q", "k", "v", "out", "lse", "q_b", "k_b", "v_b", "out_b", "lse_b", "counter", "memory")
}
_Q, _K, _V, _OUT, _LSE, _QB, _KB, _VB, _OB, _LB, _COUNTER, _MEMORY = _FIXED.values()


def _entry(q, k, v, out, lse, template, call, drain):
    """Copy the template, add addresses and strides, and run the worker here if drain is not 0; the address of the
    record."""
    for x in range(N_FIELDS):
        call[x] = template[x]
    call[_Q], call[_K], call[_V], call[_OUT] = q.ctypes.data, k.ctypes.data, v.ctypes.data, out.ctypes.data
    for x in range(4):
        call[_QB + x], call[_KB + x], call[_VB + x], call[_OB + x] = (
            q.strides[x],
            k.strides[x],
            v.strides[x],
            out.strides[x],
        )
    if template[_LSE]:
        call[_LSE] = lse.ctypes.data
        for x in range(3):
            call[_LB + x] = lse.strides[x]
    at = call.ctypes.data
    call[N_FIELDS] = 0
    call[N_FIELDS + 1] = 0
    call[_COUNTER] = at + 8 * N_FIELDS
    call[_MEMORY] = (at + 8 * (N_FIELDS + 2) + 63) & ~63
    if drain:
        call_address(drain, at)
    return at


@cache
def entry(storage: np.dtype[Any]):
    lse = np.dtype(np.float64 if storage == np.float64 else np.float32)
    numbers = types.Array(types.int64, 1, "C")
    arrays = [array_type(storage, 4)] * 3 + [array_type(storage, 4, True), array_type(lse, 3, True)]
    return compile_entry(
        _entry,
        types.intp(*arrays, types.Array(types.int64, 1, "C", readonly=True), numbers, types.intp),
        f"entry-{storage.name}",
    )


def set_array(record_array: np.ndarray, name: str, array: np.ndarray) -> None:
    """The address of an array and its strides, whose fields lie side by side."""
    numbers = record_array.view(np.int64)
    numbers[INDEX[name]] = array.ctypes.data
    at = _FIRST_STRIDE[name]
    numbers[at : at + array.ndim] = array.strides


_SERIAL = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)  # a call through it releases the GIL


def run_drain(record_array: np.ndarray, drain: int, n_items: int, n_threads: int) -> None:
    """Have the work items of a whole record drained; releases the GIL."""
    record = record_array[0]
    n = max(1, min(n_threads, n_items))
    counters, memory = np.zeros(2, np.int64), np.empty(n * int(record["scratch"]) + 64, np.uint8)
    record["counter"], record["memory"] = counters.ctypes.data, (memory.ctypes.data + 63) & ~63
    record["n_items"] = n_items
    if n > 1:
        threads.run(record_array.ctypes.data, drain, n)
    elif n_items:
        _SERIAL(drain)(record_array.ctypes.data)


def rows_in_place(x: np.ndarray) -> bool:
    """Whether the kernel reads a block of rows of x where it lies."""
    return x.strides[3] == x.itemsize and x.strides[2] == x.itemsize * x.shape[3]


# Speed of a tile of 1, 2 or 3 vectors of queries, the widest being 1 (Zen 4, D = 64).
WIDTH_SPEED = (0.88, 0.98, 1.0)


def tile_width(elem: str, left: int, right: int) -> int:
    """Queries a tile. A tile of n queries computes window + n - 1 keys, rounded to eights, so a short window wants
    narrow tiles. A function of the window alone: the bits of dk and dv depend on it, those of a row of out do not."""
    widest = tile_rows(elem)
    window = left + right + 1
    if window >= OPEN or ROW.nr != len(WIDTH_SPEED):
        return widest
    lanes = widest // ROW.nr
    cost = [(window + n * lanes + 7) / speed for n, speed in enumerate(WIDTH_SPEED, 1)]
    return lanes * (cost.index(min(cost)) + 1)


def count_tiles(q_lens: np.ndarray, rows: int, group: int) -> np.ndarray:
    """Tiles of the queries of one key head, for each sequence: as the kernels count them."""
    return np.where(q_lens < rows, (group * q_lens + rows - 1) // rows, group * ((q_lens + rows - 1) // rows))


def elem_of(dtype: np.dtype[Any]) -> str:
    """The accumulation type of a dtype."""
    return "f64" if dtype == np.float64 else "f32"


def describe(problem: Problem, elem: str, score_kind: str = "score") -> tuple[np.ndarray, list[Any]]:
    """The CALL record with what the problem says of scores and masks, which is the same for every kernel; and what its
    addresses point to."""
    record_array = np.zeros(1, CALL)
    record = record_array[0]
    keep: list[Any] = []
    sequences = problem.sequences
    if len(sequences) > 1 and np.any(sequences[:, 2:5:2] != sequences[0, 2:5:2]):
        sequences = sequences[np.argsort(-sequences[:, 2] * sequences[:, 4], kind="stable")]  # the longest first
    sequences = np.ascontiguousarray(sequences)
    keep.append(sequences)
    record["sequences"], record["n_sequences"] = sequences.ctypes.data, len(sequences)
    group, kv_heads, qk, dv = problem.q_heads // problem.kv_heads, problem.kv_heads, problem.qk_dim, problem.v_dim
    name = problem.dtype.name
    natural = problem.softcap != 0.0 or problem.score_mod is not None
    unit = 1.0 if problem.score_mod is not None else LOG2E
    record["storage"] = STORAGE[name]
    record["group"], record["kv_heads"], record["qk_dim"], record["v_dim"] = group, kv_heads, qk, dv
    record["left"], record["right"], record["has_prefix"] = (
        min(problem.left, OPEN),
        min(problem.right, OPEN),
        problem.has_prefix,
    )
    record["q_scale"] = problem.scale * (1.0 if natural else LOG2E)
    record["unit"] = unit
    if problem.softcap:
        record["use_softcap"], record["softcap_in"], record["softcap_out"] = (
            1,
            1.0 / problem.softcap,
            problem.softcap * unit,
        )
    if problem.start is not None:
        assert problem.end is not None
        record["start"], record["end"] = problem.start.ctypes.data, problem.end.ctypes.data
        for axis, n, stride in zip("bhs", problem.start.shape, problem.start.strides, strict=True):
            record[f"bounds_{axis}"] = stride if n > 1 else 0
        keep += [problem.start, problem.end]
    if problem.bias is not None:
        set_array(record_array, "bias", problem.bias)
        record["bias_storage"] = STORAGE[problem.bias.dtype.name]
        keep.append(problem.bias)
    if problem.masks:
        table = np.array([[m.ctypes.data, *m.strides] for m in problem.masks], np.int64)
        record["masks"], record["n_masks"] = table.ctypes.data, len(table)
        keep += [table, problem.masks]
    if problem.segments:
        table = np.array(
            [
                [q.ctypes.data, q.strides[0] if len(q) > 1 else 0, k.ctypes.data, k.strides[0] if len(k) > 1 else 0]
                for q, k in problem.segments
            ],
            np.int64,
        )
        record["segments"], record["n_segments"] = table.ctypes.data, len(table)
        keep += [table, problem.segments]
    if problem.mask_mods:
        spec = []
        for fn, aux in problem.mask_mods:
            numbers = aux_table(aux)
            keep += [numbers, aux]
            spec.append([tile_function(fn, "mask", elem, aux), numbers.ctypes.data])
        table = np.array(spec, np.int64)
        record["mask_mods"], record["n_mask_mods"] = table.ctypes.data, len(table)
        keep.append(table)
    if problem.score_mod is not None:
        numbers = aux_table(problem.aux)
        record["score_mod"], record["score_aux"] = (
            tile_function(problem.score_mod, score_kind, elem, problem.aux),
            numbers.ctypes.data,
        )
        keep += [numbers, problem.aux]
    if problem.slopes is not None:
        record["slopes"] = problem.slopes.ctypes.data
        record["slopes_b"] = problem.slopes.strides[0] if len(problem.slopes) > 1 else 0
        keep.append(problem.slopes)
    if problem.sinks is not None:
        record["sinks"] = problem.sinks.ctypes.data
        keep.append(problem.sinks)
    if problem.dropout_p > 0:
        record["drop"], record["drop_below"] = 1, round(problem.dropout_p * 2**32)
        record["drop_scale"] = 1.0 / (1.0 - problem.dropout_p)
        record["seed"] = np.array(problem.seed, np.uint64).view(np.int64)
    return record_array, keep


def prepare(problem: Problem, want_lse: bool) -> Launch:
    """The record of a call, but for the arrays that `run` adds."""
    name = problem.dtype.name
    elem = elem_of(problem.dtype)
    record_array, keep = describe(problem, elem)
    record, sequences = record_array[0], keep[0]
    rows = tile_width(elem, problem.left, problem.right)
    group, kv_heads, qk, dv = problem.q_heads // problem.kv_heads, problem.kv_heads, problem.qk_dim, problem.v_dim
    q_lens = sequences[:, 2]
    tiles = count_tiles(q_lens, rows, group)
    total = int(tiles.sum()) * kv_heads
    n_threads = threads.numba.config.NUMBA_NUM_THREADS
    # Only a matter of speed: a launch is used again for arrays with other strides.
    copies = name not in ("float32", "float64") or not (rows_in_place(problem.k) and rows_in_place(problem.v))
    share = min((MAX_QUERIES_COPY if copies else MAX_QUERIES) // rows, max(1, total // (8 * n_threads)))
    fine = 2 * n_threads if n_threads > 1 else 0
    items = (np.minimum(tiles, fine) + -(-np.maximum(tiles - fine, 0) // share)) * kv_heads
    first_item = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum(items, out=first_item[1:])
    keep.append(first_item)

    span = min(problem.left, problem.kv_len) + min(problem.right, problem.kv_len) + 1
    pairs = float((q_lens * np.minimum(sequences[:, 4], span)).sum()) * problem.q_heads

    record["lse"] = want_lse
    record["tile_rows"], record["block"], record["tiles"], record["fine"] = rows, key_block(elem, qk), share, fine
    offsets = layout(elem, share, qk, dv, problem.kv_len > FLUSH, problem.bias is not None)
    for field_name, offset in offsets.items():
        record[field_name] = offset
    record["first_item"], record["n_items"] = first_item.ctypes.data, first_item[-1]
    halves = name not in ("float32", "float64")
    return Launch(
        elem=elem,
        halves=halves,
        kernel=entry(np.dtype(np.uint16) if halves else problem.dtype),
        drain=drain_address(elem),
        template=record_array.view(np.int64),
        flops=2.0 * pairs * (qk + dv),
        n_items=int(first_item[-1]),
        scratch=offsets["scratch"],
        fill=int(q_lens.sum()) < problem.batch * problem.q_len,
        keep=keep,
    )


_NO_LSE = {elem: np.empty((0, 0, 0), dtype) for elem, dtype in (("f32", np.float32), ("f64", np.float64))}


def run(launch: Launch, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, lse: np.ndarray | None) -> None:
    """Run the forward kernel on (B, H, S, D) views; writes out, and lse if the launch was prepared for one."""
    if launch.fill:
        out[...] = 0
        if lse is not None:
            lse[...] = -np.inf
    if launch.halves:
        q, k, v, out = q.view(np.uint16), k.view(np.uint16), v.view(np.uint16), out.view(np.uint16)
    if lse is None:
        lse = _NO_LSE[launch.elem]
    n = 1
    if launch.flops > SERIAL_FLOPS and launch.n_items > 1:
        n = min(threads.usable(), launch.n_items)
    call = np.empty(N_FIELDS + CALL_EXTRA + n * launch.scratch // 8, np.int64)
    if n == 1:
        launch.kernel(q, k, v, out, lse, launch.template, call, launch.drain)
    else:
        threads.run(launch.kernel(q, k, v, out, lse, launch.template, call, 0), launch.drain, n)
