"""The kernel of the gradient of a bias that is broadcast along some axis: see sums.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from . import code, scalar, tile
from .backward import EXTRA
from .code import FLOATS, SIZE
from .compile import inline, intrinsic, types
from .dscores import build_load_stats, build_step
from .queries import HIGH, LOW, keys_of, read_sequence, table_bytes
from .record import Features
from .rows import Copies, rows_of
from .scalar import (
    add,
    block,
    commit,
    load_i64,
    load_word,
    mul,
    narrow,
    shared_max,
    shared_min,
    store_row,
    store_word,
    sync,
    thread,
    udiv,
    urem,
    wait_all,
)
from .step import Given
from .tile import Registers
from .tiling import Tiling, placed, products

# A block's own tile is one of own_b * own_h * own_rows * own_keys, and the units that go into it one of unit_b * unit_h
# * unit_rows, `units` to a part: of own and unit one is the size of an axis (in tiles), the other 1. Sequences are in
# order of their batch and first query; those of batch b start at number batch_first[b].
BIAS = (
    *EXTRA, "dbias", "dbias_b", "dbias_h", "dbias_i", "dbias_j", "dbias_part", "parts", "units", "batch_first",
    "q_len", "kv_len", "own_b", "own_h", "own_rows", "own_keys", "unit_b", "unit_h", "unit_rows",
)  # fmt: skip


def _lanes(t: Tiling) -> int:
    """Threads that share the rows of their scores."""
    return t.across or 4


def memory_bias(t: Tiling) -> dict[str, int]:
    """Shared memory of the kernel of a bias: at the end sums of columns lie where rows were."""
    places = placed(
        {
            "table": table_bytes(t.rows),
            "stats": t.rows * 2 * SIZE[t.acc],
            "q": t.rows * t.stride(t.qk_dim),
            "dout": t.rows * t.stride(t.v_dim),
            "k": t.cols * t.stride(t.qk_dim),
            "v": t.cols * t.stride(t.v_dim),
        }
    )
    sums = places["q"] + t.threads // _lanes(t) * t.cols * 8
    return {**places, "size": max(places["size"], sums)}


def kept(regs: Registers, sum_rows: bool, sum_keys: bool) -> Registers:
    """What a thread keeps of a tile that is summed over its rows, its columns or both."""
    return Registers("f64", (0,) if sum_rows else regs.rows, (0,) if sum_keys else regs.cols, regs.partners)


def adder(regs: Registers, sum_rows: bool, sum_keys: bool) -> Any:
    """(high, low, tile) -> (high, low) with the tile added, to each number those of its elements that belong to it.

    low holds what high has lost to rounding (Knuth's two-sum): long sums of float32 are as good as in float64, which is
    slow on many devices.
    """
    n_cols = len(regs.cols)
    groups: dict[tuple[int, int], list[int]] = {}
    for e, a, c in regs:
        groups.setdefault((0 if sum_rows else a, 0 if sum_keys else c), []).append(e)
    assert n_cols * len(regs.rows) == sum(map(len, groups.values()))
    kind = types.UniTuple(FLOATS[regs.acc][1], len(groups))

    @intrinsic
    def add_tile(typingctx, high, low, x):
        def codegen(context, builder, sig, args):
            high, low = (code.unpack(builder, x, len(groups)) for x in args[:2])
            elements = code.unpack(builder, args[2], regs.size)
            for n, members in enumerate(groups.values()):
                x = _tree(builder, [elements[e] for e in members])
                total = builder.fadd(high[n], x)
                other = builder.fsub(total, high[n])
                lost = builder.fadd(builder.fsub(high[n], builder.fsub(total, other)), builder.fsub(x, other))
                high[n], low[n] = total, builder.fadd(low[n], lost)
            pair = [context.make_tuple(builder, kind, x) for x in (high, low)]
            return context.make_tuple(builder, sig.return_type, pair)

        return types.UniTuple(kind, 2)(high, low, x), codegen

    return add_tile


def _tree(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        pairs = [builder.fadd(x, y) for x, y in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(parts) & ~1 :]
    return parts[0]


def finisher(regs: Registers, of: Registers, sum_keys: bool) -> Any:
    """(high, low) -> the sums in float64, of the lanes that share a row if keys are summed."""
    kind = FLOATS[regs.acc][0]

    @intrinsic
    def finish(typingctx, high, low):
        def codegen(context, builder, sig, args):
            sums = []
            for high, low in zip(*(code.unpack(builder, x, of.size) for x in args), strict=True):
                # inf - inf: what is lost of an infinite sum is nothing
                finite = builder.fcmp_ordered("==", builder.fsub(high, high), ir.Constant(kind, 0.0))
                rest = builder.select(finite, low, ir.Constant(kind, 0.0))
                high, rest = (x if kind == code.DOUBLE else builder.fpext(x, code.DOUBLE) for x in (high, rest))
                sums.append(builder.fadd(high, rest))
            if sum_keys:
                for lanes in of.partners:
                    sums = [builder.fadd(x, code.shuffle_xor(builder, x, lanes)) for x in sums]
            return context.make_tuple(builder, sig.return_type, sums)

        return of.type(high, low), codegen

    return finish


def build_locate_rows(rows: int) -> Callable[..., Any]:
    """locate(call, tid, table, sequence, head, i0): as queries.build_locate, for a head's queries from i0 on in the
    arrays, whatever sequence they are in; those of others are idle. Only LOW and HIGH are set."""
    bounds = rows * 16

    @inline
    def locate(call, tid, table, sequence, head, i0):
        at = add(table, bounds)
        if tid == 0:
            store_word(add(at, LOW), sequence.k_len)
            store_word(add(at, HIGH), 0)
        sync()
        if tid < rows:
            row = i0 + tid - sequence.q_start
            first, end = np.int64(0), np.int64(0)
            if row >= 0 and row < sequence.q_len:
                first, end = keys_of(call, sequence, head, row)
            if first < end:
                shared_min(add(at, LOW), first)
                shared_max(add(at, HIGH), end)
            else:
                first = end = np.int64(0)
            store_row(add(table, mul(tid, 16)), i0 + tid, head, first, end)
        sync()

    return locate


@inline
def _first_sequence(call, b, i0):
    """The first sequence of a batch that ends behind query i0, and the end of the batch's."""
    at = call.batch_first + b * 8
    low, high = narrow(load_i64(at)), narrow(load_i64(at + 8))
    stop = high
    while low < high:
        middle = udiv(add(low, high), 2)
        at = call.sequences + middle * 56
        if load_i64(at + 8) + load_i64(at + 16) > i0:
            high = middle
        else:
            low = add(middle, 1)
    return low, stop


class Own(NamedTuple):
    """What a block of the kernel of a bias sums up: its part of what goes into a tile of the result, and that tile."""

    part: Any
    b: Any
    h: Any
    rows: Any  # the number of its tile of queries
    j0: Any  # its first key


def _own(cols: int) -> Any:
    """(call) -> the block's Own."""

    @inline
    def own(call):
        rest, part = udiv(block(), call.parts), urem(block(), call.parts)
        rest, j0 = udiv(rest, call.own_keys), mul(urem(rest, call.own_keys), cols)
        rest, rows = udiv(rest, call.own_rows), urem(rest, call.own_rows)
        return Own(part, udiv(rest, call.own_h), urem(rest, call.own_h), rows, j0)

    return own


def build_bias(t: Tiling, f: Features, sum_rows: bool, sum_keys: bool, storage: str) -> Any:
    """bias(call, reals): the gradient of a bias that is broadcast over queries (sum_rows) or keys or batches or heads,
    or parts of it. Fields: BIAS."""
    places = memory_bias(t)
    TABLE, STATS, Q, DOUT, K, V = (places[n] for n in ("table", "stats", "q", "dout", "k", "v"))
    ROWS, COLS, SUM_KEYS = t.rows, t.cols, sum_keys
    of = kept(t.scores, sum_rows, sum_keys)
    step, corner = build_step(t, f, TABLE, STATS, False), products(t).corner
    start, add_tile = tile.filled(t.acc, of.size, 0.0), adder(t.scores, sum_rows, sum_keys)
    locate, first_sequence, own_of = build_locate_rows(ROWS), _first_sequence, _own(COLS)
    load_rows, load_keys, seen = (
        _load_rows(t, f, places),
        _load_keys(t, f, places, sum_keys),
        _seen_keys(t, TABLE, sum_keys),
    )
    leave = _leave_bias(t, Q, (sum_rows, sum_keys), storage)

    def bias(call, reals):
        # Numbers that live through the loops are of 32 bits: two registers each would be too many.
        tid = thread()
        row, col = corner(tid)
        own = own_of(call)
        first_unit = mul(own.part, call.units)
        last_unit = min(add(first_unit, call.units), mul(mul(call.unit_b, call.unit_h), call.unit_rows))

        high, low = start(), start()
        loaded = narrow(-1)  # whose keys are there
        for unit in range(first_unit, last_unit):
            outer = udiv(unit, call.unit_rows)
            i0 = mul(add(own.rows, urem(unit, call.unit_rows)), ROWS)
            h = add(own.h, urem(outer, call.unit_h))
            b = add(own.b, udiv(outer, call.unit_h))
            n, stop = first_sequence(call, b, i0)
            while n < stop:
                sequence = read_sequence(call, n)
                k_start = sequence.k_start
                n = add(n, 1)
                if sequence.q_start >= i0 + ROWS:
                    n = stop
                elif SUM_KEYS or (k_start < own.j0 + COLS and k_start + sequence.k_len > own.j0):
                    sync()  # the table and the tiles before were read
                    locate(call, tid, TABLE, sequence, h, i0)
                    first, last = seen(k_start, own.j0)
                    if first < last:
                        load_rows(call, tid, b, h, i0)
                    k_first, shift = narrow(k_start), sequence.offset - sequence.q_start
                    given = Given(call, reals, b, k_first, shift, 0)
                    j = first
                    while j < last:
                        loaded = load_keys(call, tid, b, h, add(k_first, j), loaded)
                        commit()
                        wait_all()
                        sync()
                        _, ds, _, _ = step(tid, True, row, add(j, col), given, (Q, K, DOUT, V))
                        high, low = add_tile(high, low, ds)
                        sync()  # the tiles were read
                        j = add(j, COLS) if SUM_KEYS else last
        leave(call, tid, own, high, low)

    return bias


def _seen_keys(t: Tiling, table: int, sum_keys: bool) -> Any:
    """(k_start, j0) -> (first, last): the keys of a sequence that the tile's queries see, in whole tiles; of a tile of
    keys that the block owns its first key alone, or none."""
    COLS, BOUNDS, SUM_KEYS = t.cols, table + t.rows * 16, sum_keys

    @inline
    def seen(k_start, j0):
        first, last = mul(udiv(load_word(BOUNDS + LOW), COLS), COLS), load_word(BOUNDS + HIGH)
        if not SUM_KEYS:
            first = narrow(j0 - k_start)
            some = load_word(BOUNDS + LOW) < first + COLS and last > first
            last = add(first, 1) if some else first
        return first, last

    return seen


def _load_rows(t: Tiling, f: Features, places: dict[str, int]) -> Any:
    """(call, tid, b, h, i0): q, dout, L and delta of the queries from i0 on, on their way to shared memory."""
    Q, DOUT, copies = places["q"], places["dout"], Copies(t, f.aligned)
    load_q, load_dout = copies.load(t.qk_dim, t.rows), copies.load(t.v_dim, t.rows)
    q_of, dout_of = rows_of(f, "q", "qk_dim"), rows_of(f, "dout", "v_dim")
    load_stats = build_load_stats(t, t.rows, places["table"], places["stats"])

    @inline
    def load(call, tid, b, h, i0):
        count = call.q_len - i0
        load_stats(call, tid, b, count, 0)
        q, dout = q_of(call, b, h, i0), dout_of(call, b, h, i0)
        load_q(tid, Q, q.base, q, count)
        load_dout(tid, DOUT, dout.base, dout, count)

    return load


def _load_keys(t: Tiling, f: Features, places: dict[str, int], always: bool) -> Any:
    """(call, tid, b, h, key, loaded) -> the number of a batch's key head: its K and V from this key on, on their way to
    shared memory, unless (not always) they are those that were loaded before."""
    K, V, copies = places["k"], places["v"], Copies(t, f.aligned)
    load_k, load_v = copies.load(t.qk_dim, t.cols), copies.load(t.v_dim, t.cols)
    k_of, v_of = rows_of(f, "k", "qk_dim"), rows_of(f, "v", "v_dim")

    @inline
    def load(call, tid, b, h, key, loaded):
        kv_head = udiv(h, call.group)
        whose = add(mul(b, call.kv_heads), kv_head)
        if always or whose != loaded:
            k, v = k_of(call, b, kv_head, key), v_of(call, b, kv_head, key)
            load_k(tid, K, k.base, k, call.kv_len - key)
            load_v(tid, V, v.base, v, call.kv_len - key)
        return whose

    return load


def _leave_bias(t: Tiling, at: int, summed: tuple[bool, bool], storage: str) -> Any:
    """(call, tid, own, high, low): the sums to the result; over rows those of all warps, through shared memory at
    `at`."""
    SUM_ROWS, SUM_KEYS = summed
    LANES, GROUPS, THREADS, WIDTH = _lanes(t), t.threads // _lanes(t), t.threads, 1 if SUM_KEYS else t.cols
    ROWS, of, corner = t.rows, kept(t.scores, *summed), products(t).corner
    finish, writer = finisher(t.scores, of, SUM_KEYS), _bias_writer(storage, *summed)
    write, write_one, put = tile.mapped(writer, of), inline(writer), tile.mapped(_sums_writer(at, WIDTH), of)
    load_sum = scalar.load_shared("f64", "f64")

    @inline
    def leave(call, tid, own, high, low):
        row, col = corner(tid)
        sums, given = finish(high, low), (call, own.part, own.b, own.h)
        if SUM_ROWS:
            sync()
            if not SUM_KEYS or col == 0:
                put(sums, udiv(tid, LANES), 0 if SUM_KEYS else col, 0)
            sync()
            for c in range(tid, WIDTH, THREADS):
                total = 0.0
                for g in range(GROUPS):
                    total += load_sum(add(at, mul(add(mul(g, WIDTH), c), 8)))
                write_one(total, 0, own.j0 + c, given)
        elif not SUM_KEYS or col == 0:
            write(sums, add(mul(own.rows, ROWS), row), 0 if SUM_KEYS else add(own.j0, col), given)

    return leave


def _bias_writer(storage: str, sum_rows: bool, sum_keys: bool) -> Callable[..., Any]:
    """Writes a sum to where it belongs."""
    store = scalar.store_global(storage)

    def write(x, i, j, given):
        call, part, b, h = given
        if (sum_rows or i < call.q_len) and (sum_keys or j < call.kv_len):
            to = call.dbias + part * call.dbias_part + b * call.dbias_b + h * call.dbias_h
            store(to + i * call.dbias_i + j * call.dbias_j, x)
        return x

    return write


def _sums_writer(at: int, width: int) -> Callable[..., Any]:
    """A thread's sums to shared memory: a row for each group of lanes."""
    store = scalar.store_shared("f64")

    def put(x, group, col, given):
        store(add(at, mul(add(mul(group, width), col), 8)), x)
        return x

    return put
