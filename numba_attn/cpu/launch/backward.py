"""From a Problem and its cotangents to calls of the two backward kernels, and the sums of what these leave."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba.core import types

from ...mask.shape import K_LEN, Q_LEN, count_tiles
from .. import threads
from ..backward import RANGES, Needs, build, key_block, layout, range_keys
from ..call import tile_rows
from ..compile import compile_cfunc
from ..delta import build_delta
from ..modifiers import tile_function
from .record import (
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
    run_drain,
    sized,
    sizes_of,
    tile_width,
)

if TYPE_CHECKING:
    from ...gradients import Backward, Wanted
    from ...plan import Problem

# Bytes that the sums of reduced gradients (bias, aux) may take. Within them each range of keys of each head has its own
# copy of a sum. A larger sum has one copy for each head, and the largest have one copy in all: then a single thread
# computes all heads.
MOST_SUMS = 2**28
HEAD_WORK = 5e4  # cost of a head beside its products, in floating-point operations: about a microsecond


@cache
def delta_address(elem: str) -> int:
    return compile_cfunc(build_delta(elem), types.void(types.intp), f"delta-{elem}")


@cache
def drain_address(elem: str) -> int:
    return compile_cfunc(build(elem), types.void(types.intp), f"backward-{elem}")


@lru_cache(256)
def _layout(*sizes: Any) -> Fields:
    return Fields(layout(*sizes))


class Reduced(NamedTuple):
    """The gradients that are sums over pairs, in float64 or in the accumulation type, and deltas: (B, Hq, Sq),
    rowsum(dout out) - dlse."""

    dbias: np.ndarray | None
    dslopes: np.ndarray | None
    daux: tuple[np.ndarray | None, ...]
    deltas: np.ndarray


@dataclass(frozen=True, slots=True)
class _Schedule:
    """The part of a call that its sizes alone decide."""

    record: Record
    heads: int  # sequences times key heads
    head_size: int  # numbers in the longest head's dQ'
    longest: int  # keys of the longest sequence
    idle_queries: bool  # some query is in no sequence
    idle_keys: bool
    work: float  # floating-point operations, and a share for each head


@kept
def _schedule(sequences: np.ndarray, sizes: Sizes) -> _Schedule:
    sequences, elem = longest_first(sequences), elem_of(sizes.dtype)
    (batch, q_heads, q_len, qk), (_, kv_heads, kv_len, _) = sizes.q, sizes.k
    record, rows = sized(sequences, sizes), tile_width(elem, sizes.left, sizes.right)
    record["tile_rows"], record["block"] = rows, key_block(elem, max(qk, sizes.v_dim))
    record["rows"], record["heads"] = q_len, q_heads
    q_lens, k_lens = sequences[:, Q_LEN], sequences[:, K_LEN]
    heads = len(sequences) * kv_heads
    longest_head = int(count_tiles(q_lens, rows, sizes.group).max(initial=0))
    record["head_size"] = head_size = longest_head * qk * tile_rows(elem)
    return _Schedule(
        record=record,
        heads=heads,
        head_size=head_size,
        longest=int(k_lens.max(initial=0)),
        idle_queries=int(q_lens.sum()) < batch * q_len,
        idle_keys=int(k_lens.sum()) < batch * kv_len,
        work=5.0 * float((q_lens * k_lens).sum()) * q_heads * (qk + sizes.v_dim) + HEAD_WORK * heads,
    )


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Strides of a C array in elements, 0 along axes of length 1."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step if n > 1 else 0)
        step *= n
    return strides[::-1]


class _Sums:
    """The gradients that are sums over pairs. Several work items add to them, so each unit of items has a copy, and the
    copies are added in order."""

    def __init__(self, record: Record, problem: Problem, given: Backward, wanted: Wanted, heads: int) -> None:
        """Allocate zeros, and write their addresses into the record. heads: as in _Schedule."""
        self.asked, self.aux = given.asked, problem.aux
        self.whole_bias = wanted.bias_shape == (*problem.q.shape[:3], problem.kv_len)  # no sum: a number for each pair
        summed = [a.shape for a, asked in zip(problem.aux, self.asked, strict=False) if asked]
        summed += [wanted.slopes_shape] if wanted.slopes_shape is not None else []
        summed += [wanted.bias_shape] if wanted.bias_shape is not None and not self.whole_bias else []
        self.any = bool(summed)
        total = 8 * sum(int(np.prod(shape)) for shape in summed)
        if total * heads * RANGES <= MOST_SUMS:
            per_head, per_range, self.units = RANGES, 1, heads * RANGES
        elif total * heads <= MOST_SUMS:
            per_head, per_range, self.units = 1, 0, heads
        else:
            per_head, per_range, self.units = 0, 0, 1
        record["unit_of_head"], record["unit_of_range"] = per_head, per_range
        self.dbias = None if wanted.bias_shape is None else self._bias(record, wanted.bias_shape, problem.acc)
        self.dslopes = None if wanted.slopes_shape is None else self._slopes(record, wanted.slopes_shape)
        self.daux = self._aux(record, problem) if any(self.asked) else [None] * len(self.aux)

    def _zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros((self.units, *shape))

    def _bias(self, record: Record, shape: tuple[int, ...], acc: type) -> np.ndarray:
        if self.whole_bias:
            dbias: np.ndarray = np.zeros(shape, acc)
            record["dbias_whole"] = 1
            record.set_array("dbias", dbias)
            return dbias
        dbias = self._zeros(shape)
        record["dbias"], record["dbias_unit"] = dbias.ctypes.data, dbias.strides[0]
        for axis, stride in zip("bhij", _strides(shape), strict=True):
            record[f"dbias_{axis}"] = stride
        return dbias

    def _slopes(self, record: Record, shape: tuple[int, ...]) -> np.ndarray:
        dslopes = self._zeros(shape)
        record["dslopes"], record["dslopes_unit"] = dslopes.ctypes.data, dslopes.strides[0]
        record["dslopes_b"] = _strides(shape)[0]
        return dslopes

    def _aux(self, record: Record, problem: Problem) -> list[np.ndarray | None]:
        daux = [self._zeros(a.shape) if asked else None for a, asked in zip(self.aux, self.asked, strict=True)]
        self.table = np.zeros((self.units, 1 + len(daux)), np.int64)  # a status, and the address of each sum
        for n, array in enumerate(daux):
            if array is not None:
                self.table[:, 1 + n] = array.ctypes.data + np.arange(self.units) * array.strides[0]
        elem = elem_of(problem.dtype)
        record["aux_grad"] = tile_function(problem.score_mod, "aux_grad", elem, self.aux, asked=self.asked)
        record["aux_sums"], record["aux_sums_unit"] = self.table.ctypes.data, self.table.strides[0]
        return daux

    def check(self) -> None:
        """Raise ValueError where the kernel could not give a gradient of aux."""
        if not any(self.asked) or not (failed := self.table[self.table[:, 0] != 0, 0]).size:
            return
        status = int(failed[0])
        if status < 0:
            raise ValueError(f"score_mod reads outside aux[{-1 - status}]")
        raise ValueError(
            f"score_mod reads not exactly one element of aux[{status - 1}], whose gradient its own grad is to give; "
            "leave grad out, and the function itself is differentiated"
        )

    def reduced(self, deltas: np.ndarray) -> Reduced:
        """The copies added up."""
        return Reduced(
            self.dbias if self.dbias is None or self.whole_bias else self.dbias.sum(axis=0),
            None if self.dslopes is None else self.dslopes.sum(axis=0),
            tuple(None if a is None else np.asarray(a.sum(axis=0)) for a in self.daux),
            deltas,
        )


def backward(problem: Problem, given: Backward, wanted: Wanted) -> Reduced:
    """Run the backward kernels on (B, H, S, D) and (B, H, S) views; writes dq, dk and dv. given.dlse is of the
    accumulation type."""
    schedule, elem, acc = _schedule(problem.sequences, sizes_of(problem)), elem_of(problem.dtype), problem.acc
    batch, q_heads, q_len, _ = problem.q.shape
    record = describe(problem, schedule.record, "score_grad")
    record["scale"] = problem.scale
    _add_arrays(record, problem, given, wanted)
    stats = np.empty((2, batch, q_heads, q_len), acc)
    record["log_sums"] = at = stats.ctypes.data
    record["deltas"] = at + stats.strides[0]
    sums, heads = _Sums(record, problem, given, wanted, schedule.heads), schedule.heads

    n_threads = 1 if schedule.work <= SERIAL_FLOPS or (sums.any and sums.units == 1) else threads.usable()
    one_by_one = 0 if n_threads == 1 or (sums.any and sums.units == heads) else min(n_threads, heads)
    if heads >= n_threads:  # each thread has a whole head: to share the last heads must not take much memory
        one_by_one = min(one_by_one, MOST_SUMS // (RANGES * schedule.head_size * np.dtype(acc).itemsize + 1))
    partial: np.ndarray = np.empty((one_by_one * RANGES, schedule.head_size), acc)
    done = np.zeros(one_by_one, np.int64)
    record["whole"], record["partial"], record["done"] = heads - one_by_one, partial.ctypes.data, done.ctypes.data
    record.put(_buffers(problem, schedule, one_by_one < heads))

    if schedule.idle_queries:
        wanted.dq[...] = 0
    if schedule.idle_keys:
        wanted.dk[...] = 0
        wanted.dv[...] = 0
    run_drain(record, delta_address(elem), batch * q_heads * -(-q_len // tile_rows(elem)), n_threads)
    run_drain(record, drain_address(elem), heads - one_by_one + one_by_one * RANGES, n_threads)
    sums.check()
    return sums.reduced(stats[1])


def _add_arrays(record: Record, problem: Problem, given: Backward, wanted: Wanted) -> None:
    """The arrays with rows of head size, lse and dlse."""
    halves = is_half(problem.dtype)
    arrays = {"q": problem.q, "k": problem.k, "v": problem.v, "out": given.out, "dout": given.dout}
    for name, array in (arrays | {"dq": wanted.dq, "dk": wanted.dk, "dv": wanted.dv}).items():
        record.set_array(name, array.view(np.uint16) if halves else array)
    record.set_array("lse", given.lse)
    if given.dlse is not None:
        record.set_array("dlse", given.dlse)


def _buffers(problem: Problem, schedule: _Schedule, whole_heads: bool) -> Fields:
    """The layout of a thread's memory; whole_heads: some head is taken by one thread alone."""
    elem, head_dim = elem_of(problem.dtype), max(problem.qk_dim, problem.v_dim)
    copies = is_half(problem.dtype) or not (rows_in_place(problem.k) and rows_in_place(problem.v))
    return _layout(
        elem,
        problem.qk_dim,
        problem.v_dim,
        range_keys(elem, head_dim, schedule.longest),
        schedule.head_size if whole_heads else 0,
        Needs(
            copies=copies,
            bias=problem.bias is not None,
            modified=problem.score_mod is not None or problem.softcap != 0.0,
            drop=problem.dropout_p > 0,
        ),
    )
