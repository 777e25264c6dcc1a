"""From a Problem to launches of kernels on a device: the counterpart of cpu/launch/."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays import Array
from ...gradients import Backward, Wanted
from ...mask.shape import BATCH, K_LEN, Q_LEN, Q_START
from .. import backward, bias_sums, decode, derivatives, forward, modifiers, sums
from ..code import SIZE
from ..record import Features
from . import driver
from .call import STORAGE, Call, On, Result, c_strides, function_of
from .prepared import Prepared

if TYPE_CHECKING:
    from ...plan import Problem

# --- the calls --------------------------------------------------------------------------------------------------------


def attention(problem: Problem, out: Array, lse: Array | None, on: On) -> Prepared | None:
    """Write out, and lse if wanted, (B, H, S, D) and (B, H, S) views.

    on.on_device: they and the problem's arrays are shadows of device memory; the work is left on the stream.
    on.lasting: what later calls need that differ in addresses alone is returned, all of them on_device; the problem has
        no array but q, k and v.
    """
    call = Call(problem, on)
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
                f"mask has {len(long.sequences)} sequences, the longest of {int(p.sequences[:, Q_LEN].max())} queries, "
                f"and k {p.kv_heads} heads: {grid} tiles are more than the {driver.MAX_GRID} of a launch; split the "
                "sequences by length"
            )
    if int(p.sequences[:, Q_LEN].sum()) < p.batch * p.q_len:
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
    return Prepared(call) if on.lasting else None


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
    problem: Problem, given: Backward, wanted: Wanted, on: On
) -> tuple[Any, Any, tuple[Any, ...], Any, Prepared | None]:
    """Write dq, dk and dv; return dbias, dslopes, daux and dsinks, None for what is not there, and with on.lasting what
    `attention` returns.

    on.on_device: as for `attention`; dq, dk and dv are shadows of arrays without gaps. What is returned are Results in
        these shapes and in the argument's dtype, acc or float64.
    """
    p, call = problem, Call(problem, on, derivatives=True)
    for name, x in (("out", given.out), ("lse", given.lse), ("dout", given.dout), ("dlse", given.dlse)):
        if x is not None:
            call.place(name, x)
    results = _place_results(call, wanted)
    _row_stats(call)
    names = ("q", "k", "v", "dout", "dq", "dk", "dv")
    f = replace(call.features, aligned=call.aligned(names), extra=backward.EXTRA)
    dbias = _query_gradients(call, f, wanted)
    _key_gradients(call, f)

    dslopes = dsinks = None
    if wanted.bias_shape is not None and dbias is None:
        dbias = _bias_sums(call, f, wanted.bias_shape)
    if wanted.slopes_shape is not None:
        dslopes = _head_sums(call, "slopes", wanted.slopes_shape)
    if p.sinks is not None:
        dsinks = _head_sums(call, "sinks", (1, p.q_heads))
    daux = _aux_sums(call, f, given.asked) if any(given.asked) else (None,) * len(p.aux)

    if on.on_device:
        call.finish()
        return dbias, dslopes, daux, dsinks, Prepared(call) if on.lasting else None
    for result, target in results:
        call.fetch(result, target)
    fetched = [call.fetched(x) for x in (dbias, dslopes, dsinks, *daux)]
    call.finish()
    return fetched[0], fetched[1], tuple(fetched[3:]), fetched[2], None


def _place_results(call: Call, wanted: Wanted) -> list[tuple[Any, Array]]:
    """dq, dk and dv as `Call.fetch` takes them; zeros where rows are in no sequence."""
    p = call.problem
    q_shape, kv_shape = (p.batch, p.q_heads, p.q_len), (p.batch, p.kv_heads, p.kv_len)
    results = [
        (call.result("dq", (*q_shape, p.qk_dim), p.dtype, wanted.dq), wanted.dq),
        (call.result("dk", (*kv_shape, p.qk_dim), p.dtype, wanted.dk), wanted.dk),
        (call.result("dv", (*kv_shape, p.v_dim), p.dtype, wanted.dv), wanted.dv),
    ]
    if int(p.sequences[:, Q_LEN].sum()) < p.batch * p.q_len or int(p.sequences[:, K_LEN].sum()) < p.batch * p.kv_len:
        for result, target in results:
            call.clear(result, target)
    return results


def _row_stats(call: Call) -> None:
    """L and delta of every row, for the kernels that follow."""
    p, size = call.problem, SIZE[call.acc]
    rows = p.batch * p.q_heads * p.q_len
    call.workspace(2 * rows * size, log_sums=0, deltas=rows * size)
    call.numbers |= {
        "stats_b": p.q_heads * p.q_len * size,
        "stats_h": p.q_len * size,
        "out_rows": rows,
        "tiles": p.q_len,
    }
    grid = -(-rows // (backward.ROWS_THREADS // 32))
    f = Features(extra=backward.EXTRA)
    call.run(backward.build_rows, None, f, grid, backward.ROWS_THREADS, 0, call.storage, call.acc)


def _query_gradients(call: Call, f: Features, wanted: Wanted) -> Result | None:
    """dq, and rows' parts of the gradient of slopes; that of a bias of every pair is returned."""
    p, q_shape, dbias = call.problem, call.problem.q.shape[:3], None
    more: tuple[str, ...] = f.extra
    if wanted.bias_shape == (*q_shape, p.kv_len):
        dbias = call.result("dbias", wanted.bias_shape, p.acc, None)
        for axis, stride in zip("bhij", (call.numbers[f"dbias_{x}"] for x in "bhsd"), strict=True):
            call.numbers[f"dbias_{axis}"] = stride
        call.device.fill(dbias[0], 0, call.stream)
        more += backward.DBIAS
    if wanted.slopes_shape is not None:
        call.device.fill(call.result("dslopes", q_shape, p.acc, None)[0], 0, call.stream)
        more += backward.DSLOPES
    t = call.tiling("queries", backward.memory_queries)
    call.numbers["tiles"] = tiles = call.tiles(t.rows)
    grid, shared = tiles * p.kv_heads * len(p.sequences), backward.memory_queries(t)["size"]
    call.run(backward.build_queries, t, replace(f, extra=more), grid, t.threads, shared)
    return dbias


def _key_gradients(call: Call, f: Features) -> None:
    """dk and dv, by one kernel or two."""
    p, t = call.problem, call.tiling("keys", backward.memory_keys)
    call.numbers["tiles"] = call.tiles(t.cols)
    call.numbers["key_tiles"] = key_tiles = -(-int(p.sequences[:, K_LEN].max(initial=0)) // t.rows)
    grid, shared = key_tiles * p.kv_heads * len(p.sequences), backward.memory_keys(t)["size"]
    for which in ((True, True),) if max(p.qk_dim, p.v_dim) <= TOGETHER else ((True, False), (False, True)):
        call.run(backward.build_keys, t, f, grid, t.threads, shared, *which)


TOGETHER = 128  # the largest head size at which a thread has registers for dK and dV


# --- sums over pairs --------------------------------------------------------------------------------------------------

BLOCKS = 1024  # blocks that share a sum, at most: a few waves of the largest device


def _bias_sums(call: Call, f: Features, shape: tuple[int, ...]) -> Result:
    """The gradient, in its dtype, of a bias of this shape that is broadcast along some axis. f: as for dQ."""
    p, n, bias = call.problem, call.numbers, call.problem.bias
    assert bias is not None
    t = call.tiling("sums", bias_sums.memory_bias)
    sum_rows, sum_keys = shape[2] == 1, shape[3] == 1
    row_tiles, key_tiles = -(-p.q_len // t.rows), -(-p.kv_len // t.cols)
    own = shape[0], shape[1], 1 if sum_rows else row_tiles, 1 if sum_keys else key_tiles
    unit_b, unit_h = p.batch if shape[0] == 1 else 1, p.q_heads if shape[1] == 1 else 1
    unit_rows = row_tiles if sum_rows else 1
    units, blocks = unit_b * unit_h * unit_rows, math.prod(own)
    share = max(1, -(-units // max(1, BLOCKS // max(1, blocks))))  # of units to a part
    parts = max(1, -(-units // share))
    order = np.lexsort((p.sequences[:, Q_LEN], p.sequences[:, Q_START], p.sequences[:, BATCH]))
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
        "batch_first": call.small(np.searchsorted(ordered[:, BATCH], np.arange(p.batch + 1))),
        "q_len": p.q_len,
        "kv_len": p.kv_len,
        "unit_b": unit_b,
        "unit_h": unit_h,
        "unit_rows": unit_rows,
    }
    n |= dict(zip(("own_b", "own_h", "own_rows", "own_keys"), own, strict=True))
    for axis, step, wanted in zip("bhij", c_strides(shape, item), shape, strict=True):
        n[f"dbias_{axis}"] = step if wanted > 1 else 0
    storage = STORAGE[target[2].name]
    f = replace(f, extra=bias_sums.BIAS)
    shared = bias_sums.memory_bias(t)["size"]
    call.run(bias_sums.build_bias, t, f, blocks * parts, t.threads, shared, sum_rows, sum_keys, storage)
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
    limb = derivatives.limb_bits(int((p.sequences[:, Q_LEN] * p.sequences[:, K_LEN]).sum()) * p.q_heads)
    which = [m for m, wanted in enumerate(asked) if wanted]
    buffers = [call.empty((derivatives.buffer_size(p.aux[m].size),), np.int64) for m in which]
    for x, (memory, _, _) in enumerate(buffers):
        call.device.fill(memory, 0, call.stream)
        n[f"aux_sums{x}"] = memory.address
    t = call.tiling("sums", sums.memory_aux)
    n |= {"tiles": call.tiles(t.rows), "aux_limb": limb, "limb": limb}
    mod = sums.with_score(modifiers.mod_function(function_of(p.score_mod), call.acc, p.aux))
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
