"""A Problem and its cotangents -> the calls of the two backward kernels, and the sums of what they leave."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba.core import types

from .. import threads
from ..backward import RANGES, build, build_delta, key_block, layout, range_keys
from ..call import tile_rows
from ..compile import compile_cfunc
from ..modifiers import tile_function
from .record import (
    SERIAL_FLOPS,
    Record,
    count_tiles,
    describe,
    elem_of,
    is_half,
    longest_first,
    rows_in_place,
    run_drain,
    tile_width,
)

if TYPE_CHECKING:
    from ...plan import Problem

# Bytes for sums of reduced gradients (bias, aux), a copy for each range of keys of each head. Larger ones have a copy
# for each head, and the largest one in all: then a single thread takes all heads.
MOST_SUMS = 2**28
HEAD_WORK = 5e4  # what a head costs besides its products, in floating-point operations: about a microsecond


@cache
def delta_address(elem: str) -> int:
    return compile_cfunc(build_delta(elem), types.void(types.intp), f"delta-{elem}")


@cache
def drain_address(elem: str) -> int:
    return compile_cfunc(build(elem), types.void(types.intp), f"backward-{elem}")


_layout = lru_cache(256)(layout)


@dataclass(frozen=True)
class _Call:
    """What a problem alone decides."""

    record: Record
    elem: str
    heads: int  # sequences times key heads
    head_size: int  # numbers in the longest head's dQ'
    longest: int  # keys of the longest sequence
    queries: int
    keys: int
    work: float  # floating-point operations, and a share for each head


_CALLS: dict[Any, _Call] = {}
_MOST_CALLS = 256


def _prepared(problem: Problem) -> _Call:
    """The call of a problem; remembered where nothing of it is call data."""
    key = None
    if (
        problem.start is problem.bias is problem.slopes is problem.sinks is problem.score_mod is None
        and not problem.masks
        and not problem.segments
        and not problem.mask_mods
        and problem.dropout_p == 0.0
    ):
        key = (
            problem.dtype, problem.q.shape, problem.k.shape, problem.v.shape, problem.scale, problem.softcap,
            problem.left, problem.right, problem.has_prefix, problem.sequences.tobytes(),
        )  # fmt: skip
        if (known := _CALLS.get(key)) is not None:
            return known
    elem = elem_of(problem.dtype)
    sequences = longest_first(problem.sequences)
    record = describe(problem, elem, sequences, "score_grad")
    _, q_heads, q_len, qk = problem.q.shape
    rows = tile_width(elem, problem.left, problem.right)
    record["tile_rows"], record["block"] = rows, key_block(elem, max(qk, problem.v_dim))
    record["scale"], record["rows"], record["heads"] = problem.scale, q_len, q_heads
    q_lens, k_lens = sequences[:, 2], sequences[:, 4]
    tiles = count_tiles(q_lens, rows, q_heads // problem.kv_heads)
    heads = len(sequences) * problem.kv_heads
    record["head_size"] = head_size = int(tiles.max(initial=0)) * qk * tile_rows(elem)
    call = _Call(
        record=record,
        elem=elem,
        heads=heads,
        head_size=head_size,
        longest=int(k_lens.max(initial=0)),
        queries=int(q_lens.sum()),
        keys=int(k_lens.sum()),
        work=5.0 * float((q_lens * k_lens).sum()) * q_heads * (qk + problem.v_dim) + HEAD_WORK * heads,
    )
    if key is not None:
        if len(_CALLS) >= _MOST_CALLS:
            _CALLS.clear()
        _CALLS[key] = call
    return call


class _Sums:
    """Sums over pairs that several work items add to: each unit of items has a copy, and the copies are added in
    order."""

    def __init__(self, sizes: list[int], heads: int):
        """sizes: numbers of each array that is summed."""
        total = 8 * sum(sizes)
        if total * heads * RANGES <= MOST_SUMS:
            self.per_head, self.per_range, self.units = RANGES, 1, heads * RANGES
        elif total * heads <= MOST_SUMS:
            self.per_head, self.per_range, self.units = 1, 0, heads
        else:
            self.per_head, self.per_range, self.units = 0, 0, 1

    def zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros((self.units, *shape))


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Strides of a C array in elements, 0 along axes of length 1."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step if n > 1 else 0)
        step *= n
    return strides[::-1]


def backward(
    problem: Problem,
    out: np.ndarray,
    lse: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    dbias_shape: tuple[int, ...] | None,
    dslopes_shape: tuple[int, ...] | None,
    asked: tuple[bool, ...],
) -> tuple[np.ndarray | None, np.ndarray | None, tuple[np.ndarray | None, ...], np.ndarray]:
    """Run the backward kernels on (B, H, S, D) and (B, H, S) views; writes dq, dk and dv.

    dbias_shape : (B or 1, Hq or 1, Sq or 1, Sk or 1) or None
    dslopes_shape : (B or 1, Hq) or None
    asked : which arrays of aux get a gradient

    Returns
    -------
    dbias, dslopes, daux : arrays of float64 or of the accumulation type
    deltas : (B, Hq, Sq), rowsum(dout out) - dlse
    """
    call = _prepared(problem)
    elem, acc, heads = call.elem, problem.acc, call.heads
    record = Record(call.record.numbers, tuple(call.record.keep))
    batch, q_heads, q_len, qk = problem.q.shape
    kv_len, dv_dim = problem.kv_len, problem.v_dim
    halves = is_half(problem.dtype)
    arrays = {"q": problem.q, "k": problem.k, "v": problem.v, "out": out, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
    for name, array in arrays.items():
        record.set_array(name, array.view(np.uint16) if halves else array)
    record.set_array("lse", lse)
    if dlse is not None:
        record.set_array("dlse", dlse)
    stats = np.empty((2, batch, q_heads, q_len), acc)
    record["log_sums"] = at = stats.ctypes.data
    record["deltas"] = at + stats.strides[0]
    n_threads = 1 if call.work <= SERIAL_FLOPS else threads.usable()

    aux_shapes = [a.shape for a, wanted in zip(problem.aux, asked, strict=False) if wanted]
    whole_bias = dbias_shape == (batch, q_heads, q_len, kv_len)
    shapes = [*aux_shapes] + [dslopes_shape] * (dslopes_shape is not None)
    shapes += [dbias_shape] * (dbias_shape is not None and not whole_bias)
    sums = _Sums([int(np.prod(shape)) for shape in shapes if shape is not None], heads)
    record["unit_of_head"], record["unit_of_range"] = sums.per_head, sums.per_range
    dbias: np.ndarray | None = None
    dslopes: np.ndarray | None = None
    if dbias_shape is not None and whole_bias:
        dbias = np.zeros(dbias_shape, acc)
        record["dbias_whole"] = 1
        record.set_array("dbias", dbias)
    elif dbias_shape is not None:
        dbias = sums.zeros(dbias_shape)
        record["dbias"], record["dbias_unit"] = dbias.ctypes.data, dbias.strides[0]
        for axis, stride in zip("bhij", _strides(dbias_shape), strict=True):
            record[f"dbias_{axis}"] = stride
    if dslopes_shape is not None:
        dslopes = sums.zeros(dslopes_shape)
        record["dslopes"], record["dslopes_unit"] = dslopes.ctypes.data, dslopes.strides[0]
        record["dslopes_b"] = _strides(dslopes_shape)[0]
    daux: list[np.ndarray | None] = [None] * len(problem.aux)
    if any(asked):
        table = np.zeros((sums.units, 1 + len(problem.aux)), np.int64)
        for n, wanted in enumerate(asked):
            if wanted:
                daux[n] = array = sums.zeros(problem.aux[n].shape)
                table[:, 1 + n] = array.ctypes.data + np.arange(sums.units) * array.strides[0]
        record["aux_grad"] = tile_function(problem.score_mod, "aux_grad", elem, problem.aux, asked=asked)
        record["aux_sums"], record["aux_sums_unit"] = table.ctypes.data, table.strides[0]

    if shapes and sums.units == 1:
        n_threads = 1
    one_by_one = 0 if n_threads == 1 or (shapes and sums.units == heads) else min(n_threads, heads)
    if heads >= n_threads:  # each thread has a head anyway: dealing out the last ones must not take much memory
        one_by_one = min(one_by_one, MOST_SUMS // (RANGES * call.head_size * np.dtype(acc).itemsize + 1))
    partial: np.ndarray = np.empty((one_by_one * RANGES, call.head_size), acc)
    done = np.zeros(one_by_one, np.int64)
    record["whole"], record["partial"], record["done"] = heads - one_by_one, partial.ctypes.data, done.ctypes.data
    copies = halves or not (rows_in_place(problem.k) and rows_in_place(problem.v))
    offsets = _layout(
        elem,
        qk,
        dv_dim,
        range_keys(elem, max(qk, dv_dim), call.longest),
        call.head_size if one_by_one < heads else 0,
        copies,
        problem.bias is not None,
        problem.score_mod is not None or problem.softcap != 0.0,
        problem.dropout_p > 0,
    )
    for name, offset in offsets.items():
        record[name] = offset

    if call.queries < batch * q_len:
        dq[...] = 0
    if call.keys < batch * kv_len:
        dk[...] = 0
        dv[...] = 0
    run_drain(record, delta_address(elem), batch * q_heads * -(-q_len // tile_rows(elem)), n_threads)
    run_drain(record, drain_address(elem), heads - one_by_one + one_by_one * RANGES, n_threads)

    if any(asked) and table[:, 0].any():
        status = int(table[table[:, 0] != 0, 0][0])
        if status < 0:
            raise ValueError(f"score_mod reads outside aux[{-1 - status}]")
        raise ValueError(
            f"score_mod reads not exactly one element of aux[{status - 1}], whose gradient its own grad is to give; "
            "leave grad out, and the function itself is differentiated"
        )
    return (
        dbias if dbias is None or whole_bias else dbias.sum(axis=0),
        None if dslopes is None else dslopes.sum(axis=0),
        tuple(None if a is None else np.asarray(a.sum(axis=0)) for a in daux),
        stats[1],
    )
