"""A Problem -> one call of the forward kernel: chooses tiles and threads, allocates nothing the size of the inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba.core import types

from .. import threads
from ..compile import array_type, compile_cfunc, compile_entry
from ..forward import FLUSH, MAX_QUERIES, MAX_QUERIES_COPY, build, key_block, layout
from ..simd import call_address
from .record import (
    CALL_EXTRA,
    INDEX,
    N_FIELDS,
    SERIAL_FLOPS,
    count_tiles,
    describe,
    elem_of,
    rows_in_place,
    tile_width,
)

if TYPE_CHECKING:
    from ...plan import Problem


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
