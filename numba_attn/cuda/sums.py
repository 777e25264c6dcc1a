"""Kernels of the gradients that are sums over pairs: of a bias that is broadcast, of slopes, sinks and arrays of aux.

The kernels of dQ and of dK and dV own rows and keys; here a block owns a tile of the result, and goes through
everything that is broadcast into it, in order: batches, heads, tiles of queries, tiles of keys. It computes scores and
dP anew and adds dS up in registers, so a sum needs no memory but its result's, and has the same bits whatever order the
blocks run in. Where the result has too few tiles to fill a device, what goes into one is dealt to several blocks, by
the problem's shape alone, and their sums are added in order by a second kernel.

    bias       (B or 1, Hq or 1, Sq or 1, Sk or 1)   dS, where at least one axis is broadcast
    slopes     (B or 1, Hq)                          rows' parts, which the kernel of dQ leaves
    sinks      (Hq,)                                 -exp(sink - lse) delta
    aux        any shape                             by derivatives.py's integers, which may be added in any order
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

from . import code, multiply, scalar, tile
from .backward import EXTRA, _stats_loader, _step, _weights
from .code import FLOATS, SIZE
from .compile import inline, intrinsic, libdevice, types
from .derivatives import CELLS, HEADER, AuxFunctions, total_function
from .rows import loaders
from .scores import (
    HIGH,
    LOW,
    Features,
    build_dropout,
    build_find,
    build_locate,
    build_modify,
    keys_of,
    read_sequence,
    table_bytes,
)
from .tile import Registers
from .tiling import Tiling, placed, products

# A block's own tile is one of own_b * own_h * own_rows * own_keys, and the units that go into it one of unit_b * unit_h
# * unit_rows, `units` to a part: of own and unit one is the size of an axis (in tiles), the other 1. Sequences are in
# order of their batch and first query; those of batch b start at number batch_first[b].
BIAS = (
    *EXTRA, "dbias", "dbias_b", "dbias_h", "dbias_i", "dbias_j", "dbias_part", "parts", "units", "batch_first",
    "q_len", "kv_len", "own_b", "own_h", "own_rows", "own_keys", "unit_b", "unit_h", "unit_rows",
)  # fmt: skip
TOTAL = ("terms", "parts", "size", "total")
HEADS = (*EXTRA, "dslopes", "q_len", "unit_b", "total")
AUX_TOTAL = ("terms", "size", "limb", "total")


def aux_fields(arrays: int) -> tuple[str, ...]:
    """The fields of the kernel of `arrays` gradients of aux."""
    return (*EXTRA, "aux_stage", "aux_limb", *(f"aux_sums{n}" for n in range(arrays)))


# --- bias -------------------------------------------------------------------------------------------------------------


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
    """locate(call, tid, table, sequence, head, i0): as scores.build_locate, for the queries i0, i0 + 1, ... of an array
    of a head, whatever sequence they are in; those of others are idle. Only LOW and HIGH are set."""
    store_row, store_word, add, mul = scalar.store_row, scalar.store_word, scalar.add, scalar.mul
    shared_min, shared_max, sync = scalar.shared_min, scalar.shared_max, scalar.sync
    bounds = rows * 16

    @inline
    def locate(call, tid, table, sequence, head, i0):
        _, q_start, q_len, _, k_len, _, _ = sequence
        at = add(table, bounds)
        if tid == 0:
            store_word(add(at, LOW), k_len)
            store_word(add(at, HIGH), 0)
        sync()
        if tid < rows:
            row = i0 + tid - q_start
            first, end = np.int64(0), np.int64(0)
            if row >= 0 and row < q_len:
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
    low, high = scalar.narrow(scalar.load_i64(at)), scalar.narrow(scalar.load_i64(at + 8))
    stop = high
    while low < high:
        middle = scalar.udiv(scalar.add(low, high), 2)
        at = call.sequences + middle * 56
        if scalar.load_i64(at + 8) + scalar.load_i64(at + 16) > i0:
            high = middle
        else:
            low = scalar.add(middle, 1)
    return low, stop


def build_bias(t: Tiling, f: Features, sum_rows: bool, sum_keys: bool, storage: str) -> Any:
    """bias(call, reals): the gradient of a bias that is broadcast over queries (sum_rows) or keys or batches or heads,
    or parts of it. Fields: BIAS."""
    places = memory_bias(t)
    TABLE, STATS, Q, DOUT, K, V = (places[n] for n in ("table", "stats", "q", "dout", "k", "v"))
    BOUNDS, ROWS, COLS, LANES = TABLE + t.rows * 16, t.rows, t.cols, _lanes(t)
    WIDTH, GROUPS, THREADS = 1 if sum_keys else t.cols, t.threads // _lanes(t), t.threads
    SUM_ROWS, SUM_KEYS = sum_rows, sum_keys
    regs, of = t.scores, kept(t.scores, sum_rows, sum_keys)
    step = _step(t, f, TABLE, STATS, False)
    corner = products(t).corner
    copies = loaders(t, f.aligned)
    load_q, load_dout = copies.load(t.qk_dim, ROWS), copies.load(t.v_dim, ROWS)
    load_k, load_v = copies.load(t.qk_dim, COLS), copies.load(t.v_dim, COLS)
    load_stats, locate = _stats_loader(t, ROWS, TABLE, STATS), build_locate_rows(ROWS)
    start, add_tile = tile.filled(t.acc, of.size, 0.0), adder(regs, sum_rows, sum_keys)
    finish = finisher(regs, of, sum_keys)
    writer = _bias_writer(storage, sum_rows, sum_keys)
    write, write_one, put = tile.mapped(writer, of), inline(writer), tile.mapped(_sums_writer(Q, WIDTH), of)
    load_sum = scalar.load_shared("f64", "f64")
    thread, block, udiv, urem, add, mul = scalar.thread, scalar.block, scalar.udiv, scalar.urem, scalar.add, scalar.mul
    commit, wait_all, sync, load_word, narrow = (
        scalar.commit,
        scalar.wait_all,
        scalar.sync,
        scalar.load_word,
        scalar.narrow,
    )
    first_sequence = _first_sequence

    def bias(call, reals):
        # Numbers that live through the loops are of 32 bits: two registers each would be too many.
        tid = thread()
        row, col = corner(tid)
        rest, part = udiv(block(), call.parts), urem(block(), call.parts)
        rest, j0 = udiv(rest, call.own_keys), mul(urem(rest, call.own_keys), COLS)
        rest, own_tile = udiv(rest, call.own_rows), urem(rest, call.own_rows)
        own_b, own_h = udiv(rest, call.own_h), urem(rest, call.own_h)
        first_unit = mul(part, call.units)
        last_unit = min(add(first_unit, call.units), mul(mul(call.unit_b, call.unit_h), call.unit_rows))

        high, low = start(), start()
        loaded = narrow(-1)  # whose keys are there
        for unit in range(first_unit, last_unit):
            outer = udiv(unit, call.unit_rows)
            i0 = mul(add(own_tile, urem(unit, call.unit_rows)), ROWS)
            h = add(own_h, urem(outer, call.unit_h))
            b = add(own_b, udiv(outer, call.unit_h))
            n, stop = first_sequence(call, b, i0)
            while n < stop:
                sequence = read_sequence(call, n)
                _, q_start, _, k_start, k_len, offset, _ = sequence
                n = add(n, 1)
                if q_start >= i0 + ROWS:
                    n = stop
                elif SUM_KEYS or (k_start < j0 + COLS and k_start + k_len > j0):
                    sync()  # the table and the tiles before were read
                    locate(call, tid, TABLE, sequence, h, i0)
                    first, last = mul(udiv(load_word(BOUNDS + LOW), COLS), COLS), load_word(BOUNDS + HIGH)
                    if not SUM_KEYS:
                        first = narrow(j0 - k_start)
                        seen = load_word(BOUNDS + LOW) < first + COLS and last > first
                        last = add(first, 1) if seen else first
                    if first < last:
                        count = call.q_len - i0
                        load_stats(call, tid, b, count, 0)
                        at = call.q + b * call.q_b + h * call.q_h + i0 * call.q_s
                        load_q(tid, Q, at, call.q_s, call.q_d, count, call.qk_dim)
                        at = call.dout + b * call.dout_b + h * call.dout_h + i0 * call.dout_s
                        load_dout(tid, DOUT, at, call.dout_s, call.dout_d, count, call.v_dim)
                    k_first, shift = narrow(k_start), offset - q_start
                    given = (call, reals, b, k_first, shift, 0)
                    j = first
                    while j < last:
                        key = add(k_first, j)
                        kv_head = udiv(h, call.group)
                        whose = add(mul(b, call.kv_heads), kv_head)
                        if SUM_KEYS or whose != loaded:
                            at = call.k + b * call.k_b + kv_head * call.k_h + key * call.k_s
                            load_k(tid, K, at, call.k_s, call.k_d, call.kv_len - key, call.qk_dim)
                            at = call.v + b * call.v_b + kv_head * call.v_h + key * call.v_s
                            load_v(tid, V, at, call.v_s, call.v_d, call.kv_len - key, call.v_dim)
                            loaded = whose
                        commit()
                        wait_all()
                        sync()
                        _, ds, _, _ = step(tid, True, row, add(j, col), given, Q, K, DOUT, V)
                        high, low = add_tile(high, low, ds)
                        sync()  # the tiles were read
                        j = add(j, COLS) if SUM_KEYS else last

        sums = finish(high, low)
        given = (call, part, own_b, own_h)
        if SUM_ROWS:
            sync()
            if not SUM_KEYS or col == 0:
                put(sums, udiv(tid, LANES), 0 if SUM_KEYS else col, 0)
            sync()
            for c in range(tid, WIDTH, THREADS):
                total = 0.0
                for g in range(GROUPS):
                    total += load_sum(add(Q, mul(add(mul(g, WIDTH), c), 8)))
                write_one(total, 0, j0 + c, given)
        elif not SUM_KEYS or col == 0:
            write(sums, add(mul(own_tile, ROWS), row), 0 if SUM_KEYS else add(j0, col), given)

    return bias


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
    store, add, mul = scalar.store_shared("f64"), scalar.add, scalar.mul

    def put(x, group, col, given):
        store(add(at, mul(add(mul(group, width), col), 8)), x)
        return x

    return put


# --- sums of what lies in memory --------------------------------------------------------------------------------------

THREADS = 256


def build_total(storage: str, f: Features) -> Any:
    """total(call, reals): the sum, in order, of `parts` arrays of `size` float64 one behind the other, as `storage`.

    A block has 32 neighbouring elements, and eight warps that take an eighth of the parts each. Fields: TOTAL.
    """
    load, store, size = scalar.load_global("f64", "f64"), scalar.store_global(storage), SIZE[storage]
    load_sum, store_sum = scalar.load_shared("f64", "f64"), scalar.store_shared("f64")
    thread, block, udiv, urem, add, mul, sync = (
        scalar.thread,
        scalar.block,
        scalar.udiv,
        scalar.urem,
        scalar.add,
        scalar.mul,
        scalar.sync,
    )
    WARPS = THREADS // 32

    def total(call, reals):
        tid = thread()
        warp = np.int64(udiv(tid, 32))
        n = np.int64(block()) * 32 + np.int64(urem(tid, 32))
        share = (call.parts + (WARPS - 1)) // WARPS
        x = 0.0
        if n < call.size:
            for part in range(warp * share, min(warp * share + share, call.parts)):
                x += load(call.terms + (part * call.size + n) * 8)
        store_sum(mul(tid, 8), x)
        sync()
        if tid < 32 and n < call.size:
            x = 0.0
            for w in range(WARPS):
                x += load_sum(mul(add(mul(w, 32), tid), 8))
            store(call.total + n * size, x)

    return total


TOTAL_BYTES = THREADS * 8  # shared memory of the kernels above and below


def build_heads(what: str, acc: str, storage: str, f: Features) -> Any:
    """heads(call, reals): the sum over queries, and over unit_b batches, of what each row gives to its head, as
    `storage`; a block a head. what: "slopes" or "sinks". Fields: HEADS."""
    load, store, size, acc_size = scalar.load_global(acc, acc), scalar.store_global(storage), SIZE[storage], SIZE[acc]
    load_sum, store_sum, warp_sum = scalar.load_shared("f64", "f64"), scalar.store_shared("f64"), scalar.warp_sum("f64")
    thread, block, udiv, urem, mul, sync = (
        scalar.thread,
        scalar.block,
        scalar.udiv,
        scalar.urem,
        scalar.mul,
        scalar.sync,
    )
    WARPS, minus_inf = THREADS // 32, np.float64(-np.inf)

    if what == "slopes":

        @inline
        def term(call, b, h, i):
            return np.float64(load(call.dslopes + b * call.stats_b + h * call.stats_h + i * acc_size))

    else:

        @inline
        def term(call, b, h, i):
            """minus exp(sink - lse) delta; lse is -inf where there is no sink, as at queries in no sequence"""
            lse = np.float64(load(call.lse + b * call.lse_b + h * call.lse_h + i * call.lse_s))
            weight = 0.0
            if lse != minus_inf:
                x = np.float64(load(call.deltas + b * call.stats_b + h * call.stats_h + i * acc_size))
                weight = 0.0 - libdevice.exp(np.float64(load(call.sinks + h * acc_size)) - lse) * x
            return weight

    def heads(call, reals):
        tid = thread()
        n_heads = call.kv_heads * call.group
        own_b, h = np.int64(udiv(block(), n_heads)), np.int64(urem(block(), n_heads))
        x = 0.0
        for b in range(own_b, own_b + call.unit_b):
            for i in range(tid, call.q_len, THREADS):
                x += term(call, b, h, i)
        x = warp_sum(x)
        if urem(tid, 32) == 0:
            store_sum(mul(udiv(tid, 32), 8), x)
        sync()
        if tid == 0:
            x = 0.0
            for w in range(WARPS):
                x += load_sum(mul(w, 8))
            store(call.total + np.int64(block()) * size, x)

    return heads


# --- aux --------------------------------------------------------------------------------------------------------------


def _pair_stride(t: Tiling) -> int:
    """Bytes from a row of pairs to the next: stores of a tile and loads along diagonals meet few bank conflicts."""
    return (t.cols + 8) * SIZE[t.acc]


def memory_aux(t: Tiling) -> dict[str, int]:
    """Shared memory of the kernel of aux."""
    return placed(
        {
            "table": table_bytes(t.rows),
            "stats": t.rows * 2 * SIZE[t.acc],
            "q": t.rows * t.stride(t.qk_dim),
            "dout": t.rows * t.stride(t.v_dim),
            "k": t.cols * t.stride(t.qk_dim),
            "v": t.cols * t.stride(t.v_dim),
            "scores": t.rows * _pair_stride(t),
            "weights": t.rows * _pair_stride(t),
        }
    )


@cache
def with_score(mod: Callable[..., Any]) -> Callable[..., Any]:
    """A score_mod -> the function that returns (modified score, score): what stands in the place of its derivative in
    Features, since the kernel of aux wants to know what score_mod was called with."""
    inner = inline(mod)

    def both(x, b, h, i, j, table):
        return inner(x, b, h, i, j, table), x

    return both


def build_aux(t: Tiling, f: Features, functions: AuxFunctions) -> Any:
    """aux(call, reals): adds what each pair gives to the arrays of aux, by the functions of derivatives.py. f.score_mod
    is one of `with_score`. Fields: aux_fields.

    Scores and dS go through shared memory: a function that may be long is then in a loop, and not once for every
    element of a tile. A thread goes along a row, and the threads of a warp are never in the same column or on the same
    diagonal: they do not add to one element of a table that is read by key or by distance at the same time.
    """
    places = memory_aux(t)
    TABLE, STATS, Q, DOUT, K, V = (places[n] for n in ("table", "stats", "q", "dout", "k", "v"))
    SCORES, WEIGHTS = places["scores"], places["weights"]
    BOUNDS, ROWS, COLS, size = TABLE + t.rows * 16, t.rows, t.cols, SIZE[t.acc]
    ALONG = t.threads // t.rows  # threads of a row
    regs, parts = t.scores, products(t)
    corner, scores, dots = parts.corner, parts.abt(t.qk_dim), parts.abt(t.v_dim)
    modify, DROPOUT = build_modify(f, t.acc, TABLE), f.dropout
    number = np.float64 if t.acc == "f64" else np.float32
    modified = tile.mapped(modify.partial, regs, results=modify.results)
    weight, inner = _weights(t, f, STATS, False)
    weights, inners = tile.mapped(weight, regs), tile.mapped(inner, regs, n_tiles=2)
    drop_bits, scaled_where = build_dropout(regs, products(t).element, TABLE, False), tile.scaled_where(regs)
    cleared, hidden_bits = tile.cleared(regs), tile.hidden_bits(regs)
    STRIDE = _pair_stride(t)
    put, load = multiply.simt_store_p(regs, STRIDE), scalar.load_shared(t.acc, t.acc)
    start, add_pair, flush = inline(functions.start), inline(functions.add), inline(functions.flush)
    at = {name: n for n, name in enumerate(f.fields)}
    FIRST, FIRST_SUM, LAST_SUM = at["score_mod_0"], at["aux_stage"], len(f.fields)
    LAST = FIRST + f.score_table
    copies = loaders(t, f.aligned)
    load_q, load_dout = copies.load_queries(t.qk_dim, ROWS), copies.load_queries(t.v_dim, ROWS)
    load_k, load_v = copies.load(t.qk_dim, COLS), copies.load(t.v_dim, COLS)
    load_stats, locate, find = _stats_loader(t, ROWS, TABLE, STATS), build_locate(ROWS), build_find(ROWS)
    thread, block, udiv, urem, add, mul, sub = (
        scalar.thread,
        scalar.block,
        scalar.udiv,
        scalar.urem,
        scalar.add,
        scalar.mul,
        scalar.sub,
    )
    commit, wait_all, sync, load_word, load_row = (
        scalar.commit,
        scalar.wait_all,
        scalar.sync,
        scalar.load_word,
        scalar.load_row,
    )
    zero = (np.float64 if t.acc == "f64" else np.float32)(0)

    def aux(call, reals):
        tid = thread()
        rest = udiv(block(), call.tiles)
        index = call.tiles - 1 - np.int64(urem(block(), call.tiles))
        kv_head = np.int64(urem(rest, call.kv_heads))
        sequence = read_sequence(call, np.int64(udiv(rest, call.kv_heads)))
        b, q_start, q_len, k_start, k_len, offset, _prefix = sequence
        head, first_row, count = find(call, q_len, index)
        if count <= 0:
            return
        locate(call, tid, TABLE, sequence, kv_head, head, first_row, count)
        first = np.int64(mul(udiv(load_word(BOUNDS + LOW), COLS), COLS))
        last = np.int64(load_word(BOUNDS + HIGH))
        if first >= last:
            return
        row, col = corner(tid)
        given = (call, reals, b, k_start, offset - q_start, 0)
        k_base = call.k + b * call.k_b + kv_head * call.k_h + k_start * call.k_s
        v_base = call.v + b * call.v_b + kv_head * call.v_h + k_start * call.v_s
        where = (q_len, q_start + first_row, kv_head * call.group + head, count)
        load_q(tid, Q, call.q + b * call.q_b, call.q_h, call.q_s, call.q_d, TABLE, where, call.qk_dim)
        dout = call.dout + b * call.dout_b
        load_dout(tid, DOUT, dout, call.dout_h, call.dout_s, call.dout_d, TABLE, where, call.v_dim)
        load_stats(call, tid, b, count, 0)

        own = urem(tid, ROWS)  # the row of this thread's pairs
        i, h, _, _ = load_row(add(TABLE, mul(own, 16)))
        table, sums = call[FIRST:LAST], call[FIRST_SUM:LAST_SUM]
        pending = start(sums)
        for j0 in range(first, last, COLS):
            load_k(tid, K, k_base + j0 * call.k_s, call.k_s, call.k_d, k_len - j0, call.qk_dim)
            load_v(tid, V, v_base + j0 * call.v_s, call.v_s, call.v_d, k_len - j0, call.v_dim)
            commit()
            wait_all()
            sync()
            found = modified(scores(tid, Q, K), row, add(j0, col), given)
            s = found[0]
            bits = hidden_bits(s)
            p = cleared(weights(s, row, add(j0, col), given), bits)
            dp = dots(tid, DOUT, V)
            if DROPOUT:
                dp = scaled_where(dp, drop_bits(row, add(j0, col), given), number(reals.drop_scale))
            ds = cleared(inners(p, dp, row, add(j0, col), given), bits)
            place = add(mul(row, STRIDE), mul(col, size))
            put(found[1], add(SCORES, place))
            put(ds, add(WEIGHTS, place))
            sync()  # K and V were read too
            for n in range(udiv(tid, ROWS), COLS, ALONG):
                c = urem(sub(n, own), COLS)
                place = add(mul(own, STRIDE), mul(c, size))
                x, w = load(add(SCORES, place)), load(add(WEIGHTS, place))
                if w != zero:  # hidden pairs have none
                    pending = add_pair(x, np.int32(b), h, i, np.int32(k_start + j0 + c), table, w, sums, pending)
        flush(sums, pending)

    return aux


def build_aux_total(acc: str, storage: str, f: Features) -> Any:
    """aux_total(call, reals): an array's gradient from its integers, as `storage`. Fields: AUX_TOTAL."""
    total, store, size = inline(total_function(acc)), scalar.store_global(storage), SIZE[storage]
    thread, block = scalar.thread, scalar.block

    def aux_total(call, reals):
        n = np.int64(block()) * THREADS + np.int64(thread())
        if n < call.size:
            store(call.total + n * size, total(call.terms, n, call.limb))

    return aux_total


def aux_bytes(size: int) -> int:
    """Bytes of the integers of an array of so many elements."""
    return 8 * (HEADER + CELLS * size)
