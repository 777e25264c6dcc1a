"""What every launch is made of: the CALL record filled from a Problem, the width of a tile, and threads to drain the
record's work items."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from ...online import LOG2E
from .. import threads
from ..call import CALL, OPEN, STORAGE, tile_rows
from ..modifiers import tile_function
from ..simd import ROW
from ..target import aux_table

if TYPE_CHECKING:
    from ...plan import Problem

N_FIELDS = CALL.itemsize // 8
CALL_EXTRA = 10  # two counters behind the record, and what it takes to align the scratch memory behind them
INDEX = {name: n for n, name in enumerate(CALL.names or ())}
_FIRST_STRIDE = {name.removesuffix("_b"): n for name, n in INDEX.items() if name.endswith("_b")}

# Work below this many floating-point operations stays on the calling thread: about 20 us, ten times the cost of waking
# another.
SERIAL_FLOPS = 2e6


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
