"""A Problem -> one call of the forward kernel: chooses tiles and threads, allocates nothing the size of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba.core import types

from .. import threads
from ..call import SEQUENCE
from ..compile import array_type, compile_cfunc, compile_entry
from ..forward import FLUSH, MAX_QUERIES, MAX_QUERIES_COPY, build, key_block, layout
from ..simd import call_address
from .record import (
    CALL_EXTRA,
    INDEX,
    N_FIELDS,
    SERIAL_FLOPS,
    Record,
    count_tiles,
    describe,
    elem_of,
    is_half,
    longest_first,
    rows_in_place,
    tile_width,
)

if TYPE_CHECKING:
    from ...plan import Problem


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a call's work is cut: what sizes alone decide."""

    sequences: np.ndarray
    first_item: np.ndarray  # the first work item of each sequence, and their number
    fields: dict[str, int]  # of the CALL record
    flops: float
    fill: bool  # some query is in no sequence


@dataclass(slots=True)
class Launch:
    """A call without its q, k, v, out and lse: reusable as long as nothing else of it is call data."""

    elem: str
    halves: bool  # float16 and bfloat16 enter the kernel as uint16
    kernel: Any  # the entry kernel for the dtype
    drain: int  # the address of the worker
    schedule: Schedule
    record: Record


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


def prepare(problem: Problem, want_lse: bool) -> Launch:
    """The record of a call, but for the arrays that `run` adds."""
    elem = elem_of(problem.dtype)
    halves = is_half(problem.dtype)
    # Only a matter of speed: a launch is used again for arrays with other strides.
    copies = halves or not (rows_in_place(problem.k) and rows_in_place(problem.v))
    schedule = _schedule(
        _Sizes(elem, copies, tile_width(elem, problem.left, problem.right), problem.q.shape, problem.k.shape),
        problem.v_dim,
        (problem.left, problem.right),
        problem.bias is not None,
        problem.sequences.tobytes(),
    )
    record = describe(problem, elem, schedule.sequences)
    for name, number in schedule.fields.items():
        record[name] = number
    record.points_to("first_item", schedule.first_item)
    record["lse"] = want_lse
    return Launch(
        elem=elem,
        halves=halves,
        kernel=entry(np.dtype(np.uint16) if halves else problem.dtype),
        drain=drain_address(elem),
        schedule=schedule,
        record=record,
    )


class _Sizes(NamedTuple):
    """The sizes of a call that decide its tiles."""

    elem: str
    copies: bool  # blocks of k and v are copied before they are read
    rows: int  # queries of a tile
    q: tuple[int, ...]
    k: tuple[int, ...]


@lru_cache(512)
def _schedule(sizes: _Sizes, v_dim: int, window: tuple[int, int], bias: bool, table: bytes) -> Schedule:
    """Work items, tiles and scratch memory; `table` holds the problem's sequences."""
    batch, q_heads, q_len, qk_dim = sizes.q
    _, kv_heads, kv_len, _ = sizes.k
    sequences = longest_first(np.frombuffer(table, np.int64).reshape(-1, SEQUENCE))
    q_lens, k_lens = sequences[:, 2], sequences[:, 4]
    tiles = count_tiles(q_lens, sizes.rows, q_heads // kv_heads)
    n_threads = threads.numba.config.NUMBA_NUM_THREADS
    most = (MAX_QUERIES_COPY if sizes.copies else MAX_QUERIES) // sizes.rows
    share = min(most, max(1, int(tiles.sum()) * kv_heads // (8 * n_threads)))
    fine = 2 * n_threads if n_threads > 1 else 0
    items = (np.minimum(tiles, fine) + -(-np.maximum(tiles - fine, 0) // share)) * kv_heads
    first_item = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum(items, out=first_item[1:])

    span = min(window[0], kv_len) + min(window[1], kv_len) + 1
    pairs = float((q_lens * np.minimum(k_lens, span)).sum()) * q_heads
    fields = {"tile_rows": sizes.rows, "block": key_block(sizes.elem, qk_dim), "tiles": share, "fine": fine}
    fields |= layout(sizes.elem, share, qk_dim, v_dim, kv_len > FLUSH, bias)
    return Schedule(
        sequences=sequences,
        first_item=first_item,
        fields=fields | {"n_items": int(first_item[-1])},
        flops=2.0 * pairs * (qk_dim + v_dim),
        fill=int(q_lens.sum()) < batch * q_len,
    )


_NO_LSE = {elem: np.empty((0, 0, 0), dtype) for elem, dtype in (("f32", np.float32), ("f64", np.float64))}


def run(launch: Launch, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, lse: np.ndarray | None) -> None:
    """Run the forward kernel on (B, H, S, D) views; writes out, and lse if the launch was prepared for one."""
    schedule, n_items = launch.schedule, launch.schedule.fields["n_items"]
    if schedule.fill:
        out[...] = 0
        if lse is not None:
            lse[...] = -np.inf
    if launch.halves:
        q, k, v, out = q.view(np.uint16), k.view(np.uint16), v.view(np.uint16), out.view(np.uint16)
    if lse is None:
        lse = _NO_LSE[launch.elem]
    n = 1
    if schedule.flops > SERIAL_FLOPS and n_items > 1:
        n = min(threads.usable(), n_items)
    template = launch.record.numbers
    call = np.empty(N_FIELDS + CALL_EXTRA + n * schedule.fields["scratch"] // 8, np.int64)
    if n == 1:
        launch.kernel(q, k, v, out, lse, template, call, launch.drain)
    else:
        threads.run(launch.kernel(q, k, v, out, lse, template, call, 0), launch.drain, n)
