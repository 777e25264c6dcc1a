"""From a Problem to one call of the forward kernel. Chooses tiles and threads.

It allocates nothing of the size of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba.core import types

from ...mask.shape import K_LEN, Q_LEN, count_tiles
from .. import threads
from ..compile import array_type, compile_cfunc, compile_entry
from ..forward import FLUSH, MAX_QUERIES, MAX_QUERIES_COPY, build, key_block, layout
from ..simd import call_address
from .record import (
    CALL_EXTRA,
    INDEX,
    N_FIELDS,
    SERIAL_FLOPS,
    Fields,
    Record,
    Sizes,
    describe,
    elem_of,
    is_half,
    kept,
    longest_first,
    rows_in_place,
    sized,
    sizes_of,
    tile_width,
)

if TYPE_CHECKING:
    from ...plan import Problem


_NO_LSE = {elem: np.empty((0, 0, 0), dtype) for elem, dtype in (("f32", np.float32), ("f64", np.float64))}


@dataclass(frozen=True, slots=True)
class Tiling:
    """How queries are cut into work items."""

    first_item: np.ndarray  # the first work item of each sequence, and their number
    fields: dict[str, int]  # of the CALL record
    fill: bool  # some query is in no sequence


@dataclass(frozen=True, slots=True)
class Launch:
    """The part of a call that its sizes alone decide: how its work is cut, and the kernels and threads that do it."""

    elem: str
    halves: bool  # float16 and bfloat16 enter the kernel as uint16
    kernel: Any  # the entry kernel for the dtype
    drain: int  # the address of the worker
    sized: Record  # what sizes say of the CALL record
    n_items: int
    scratch: int  # bytes of a thread's memory
    flops: float
    fill: bool  # some query is in no sequence

    def filled_in(self, problem: Problem) -> Record:
        """The record of a problem, without the arrays that `run` adds."""
        return describe(problem, self.sized)

    def run(
        self, record: Record, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, lse: np.ndarray | None
    ) -> None:
        """Run the forward kernel on (B, H, S, D) views; writes out, and lse if there is one.

        record: the problem's, of `filled_in`.
        """
        if self.fill:
            out[...] = 0
            if lse is not None:
                lse[...] = -np.inf
        if self.halves:
            q, k, v, out = q.view(np.uint16), k.view(np.uint16), v.view(np.uint16), out.view(np.uint16)
        if lse is None:
            lse = _NO_LSE[self.elem]
        n = 1
        if self.flops > SERIAL_FLOPS and self.n_items > 1:
            n = min(threads.usable(), self.n_items)
        call = np.empty(N_FIELDS + CALL_EXTRA + n * self.scratch // 8, np.int64)
        if n == 1:
            self.kernel(q, k, v, out, lse, record.numbers, call, self.drain)
        else:
            threads.run(self.kernel(q, k, v, out, lse, record.numbers, call, 0), self.drain, n)


@cache
def drain_address(elem: str) -> int:
    return compile_cfunc(build(elem), types.void(types.intp), f"forward-{elem}")


_FIXED = {
    n: INDEX[n] for n in ("q", "k", "v", "out", "lse", "q_b", "k_b", "v_b", "out_b", "lse_b", "counter", "memory")
}
_Q, _K, _V, _OUT, _LSE, _QB, _KB, _VB, _OB, _LB, _COUNTER, _MEMORY = _FIXED.values()


def _entry(q, k, v, out, lse, template, call, drain):
    """Copy the template, add addresses and strides, and run the worker in this thread if drain is not 0. Returns the
    address of the record."""
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
    if lse.size:
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


def prepare(problem: Problem) -> Launch:
    """The launch of a problem: kept for others of its sizes."""
    # Only a matter of speed: a launch is used again for arrays with other strides.
    copies = is_half(problem.dtype) or not (rows_in_place(problem.k) and rows_in_place(problem.v))
    return _prepared(problem.sequences, sizes_of(problem), copies, problem.bias is not None)


@kept
def _prepared(sequences: np.ndarray, sizes: Sizes, copies: bool, bias: bool) -> Launch:
    """copies: blocks of k and v are copied before they are read."""
    sequences, elem, halves = longest_first(sequences), elem_of(sizes.dtype), is_half(sizes.dtype)
    q_lens, k_lens = sequences[:, Q_LEN], sequences[:, K_LEN]
    tiling = _tiling(q_lens, sizes, copies, bias)
    record = sized(sequences, sizes)
    record.put(Fields(tiling.fields))
    record.points_to("first_item", tiling.first_item)
    kv_len = sizes.k[2]
    span = min(sizes.left, kv_len) + min(sizes.right, kv_len) + 1
    pairs = float((q_lens * np.minimum(k_lens, span)).sum()) * sizes.q[1]
    return Launch(
        elem=elem,
        halves=halves,
        kernel=entry(np.dtype(np.uint16) if halves else sizes.dtype),
        drain=drain_address(elem),
        sized=record,
        n_items=tiling.fields["n_items"],
        scratch=tiling.fields["scratch"],
        flops=2.0 * pairs * (sizes.q[3] + sizes.v_dim),
        fill=tiling.fill,
    )


@kept
def _tiling(q_lens: np.ndarray, sizes: Sizes, copies: bool, bias: bool) -> Tiling:
    """The part of a launch that does not depend on the numbers of keys. Those grow from call to call while a model
    writes a text."""
    batch, _, q_len, qk_dim = sizes.q
    _, kv_heads, kv_len, _ = sizes.k
    elem, rows = elem_of(sizes.dtype), tile_width(elem_of(sizes.dtype), sizes.left, sizes.right)
    tiles = count_tiles(q_lens, rows, sizes.group)
    n_threads = threads.numba.config.NUMBA_NUM_THREADS
    most = (MAX_QUERIES_COPY if copies else MAX_QUERIES) // rows
    share = min(most, max(1, int(tiles.sum()) * kv_heads // (8 * n_threads)))
    fine = 2 * n_threads if n_threads > 1 else 0
    items = (np.minimum(tiles, fine) + -(-np.maximum(tiles - fine, 0) // share)) * kv_heads
    first_item = np.zeros(len(q_lens) + 1, np.int64)
    np.cumsum(items, out=first_item[1:])
    fields = {"tile_rows": rows, "block": key_block(elem, qk_dim), "tiles": share, "fine": fine}
    fields |= layout(elem, share, qk_dim, sizes.v_dim, kv_len > FLUSH, bias)
    return Tiling(
        first_item=first_item,
        fields=fields | {"n_items": int(first_item[-1])},
        fill=int(q_lens.sum()) < batch * q_len,
    )
