"""Few queries against many keys, as with a KV cache: each block takes a part of the keys, and a second kernel joins
the parts.

One block of the forward kernel takes KEYS keys of a (sequence, key head) for all queries of the head's group together,
so that K and V are read once, and leaves each row's state (o, m, l) in the accumulation type. `build_merge` joins a
row's states as online.py says. Parts begin at multiples of KEYS from the sequence's start, a row's sums run over the
parts in an order that their numbers decide, and parts in which it can see nothing are neither written nor read: its
bits do not depend on how many keys or rows there are besides. Where a head size fills its tile, the states of a call
take a sixteenth of the bytes of k and v at most, a thirty-second in float32 and float64, each sequence's keys counted
as whole parts.

The kernel is as fast as its loads, which must never stop. The memory gives a multiprocessor 13 bytes a clock on an A100
and 15 on an H100, and a load takes 1000 to 1200 clocks: so 13 to 18 KB must be in flight. A block has a tile of 16 KB
in flight: K while it computes P V, and V while it computes the scores. In float16 at head size 128 it needs about 2800
clocks for the 32 KB of a block of keys, and 2000 of them are work. So one block loads 11 bytes a clock. It has 41 KB of
shared memory, and a multiprocessor holds four such blocks on cc 8.0, two on 8.6 and five on 9.0. Therefore one warp a
block and one buffer each for K and V are enough, and the loop is the forward kernel's. These numbers are counts of
instructions, not timings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from ..mask.shape import K_LEN, OFFSET, Q_LEN
from ..online import LN2, LOG2E
from ..online import build as build_online
from . import scalar, tile
from .code import SIZE, VECTOR
from .compile import inline
from .queries import build_find, build_locate, read_sequence, table_bytes
from .record import Features
from .scalar import add, block, choose, load_i64, load_row, mul, sub, sync, thread, udiv, urem
from .step import exact_functions
from .tile import Registers
from .tiling import Tiling

if TYPE_CHECKING:
    from ..plan import Problem

KEYS = 256  # of a part: 8192 keys under 8 heads are 256 blocks, and a row's state is 6 % of the part's K and V, or less
ROWS = 16  # of a tile; so many queries of a key head, in all heads of its group, are few
FEW_ROWS = 4  # of the smaller tile without tensor cores, where idle rows cost time

# Fields besides record.CALL: int64 (first state, first part, parts) of each sequence and (sequence, part) of each
# block; the states' o and (m, l); how many rows a key head has in the longest sequence.
EXTRA = ("part_places", "part_items", "parts", "part_stats", "part_rows")

WARPS = 4  # of a block of build_merge
THREADS = 32 * WARPS
COLUMNS = 32  # of the result that such a block computes: a warp reads 128 bytes of a state's o at a time


def rows_of(problem: Problem) -> int:
    """Queries of a key head in the longest sequence. Up to ROWS, decoding is what is wanted."""
    return int(problem.sequences[:, Q_LEN].max(initial=0)) * (problem.q_heads // problem.kv_heads)


def split(problem: Problem) -> tuple[Problem | None, Problem | None]:
    """The problem with the sequences that have few queries, and with the others; None where there are none. A row's
    own sequence decides which kernel computes it, so that its bits do not depend on what it is packed with."""
    rows = problem.sequences[:, Q_LEN] * (problem.q_heads // problem.kv_heads)
    few = rows <= ROWS
    if few.all():
        return problem, None
    few &= rows > 0
    if not few.any():
        return None, problem
    return problem._replace(sequences=problem.sequences[few]), problem._replace(sequences=problem.sequences[~few])


def with_rows(t: Tiling, rows: int) -> Tiling:
    """The tiling, with fewer rows if they do: the same bits, since a row's columns lie in the same threads."""
    return t if t.mma or rows > FEW_ROWS else replace(t, rows=FEW_ROWS, threads=min(t.threads, FEW_ROWS * t.across))


def row_bytes(t: Tiling) -> int:
    """Bytes of a state's o."""
    return t.v_dim * SIZE[t.acc]


def workspace(problem: Problem) -> tuple[Array, Array]:
    """The arrays part_places and part_items: which parts of its keys a sequence's queries can see."""
    q_len, k_len, offset = problem.sequences[:, [Q_LEN, K_LEN, OFFSET]].T
    first, end = np.zeros_like(k_len), k_len
    if not problem.has_prefix:
        first = np.clip(offset - problem.left, 0, k_len)
        end = np.clip(offset + q_len + problem.right, 0, k_len)
    first, end = first // KEYS, -(-end // KEYS)
    count = np.where(q_len > 0, np.maximum(end - first, 0), 0)
    places = np.stack([np.cumsum(count) - count, first, count], axis=1)
    sequence = np.repeat(np.arange(len(count)), count)
    part = np.arange(len(sequence)) - places[sequence, 0] + first[sequence]
    return places, np.stack([sequence, part], axis=1)


@inline
def find_part(call, n):
    """(sequence, part) of block n of a key head."""
    at = call.part_items + n * 16
    return load_i64(at), load_i64(at + 8)


@inline
def find_states(call, number, kv_head):
    """(n, step): the state of row r and part s of sequence `number` has the number n + r * step + s."""
    at = call.part_places + number * 24
    start, first, count = load_i64(at), load_i64(at + 8), load_i64(at + 16)
    return (start * call.kv_heads + kv_head * count) * call.part_rows - first, count


def build_keep(t: Tiling) -> tuple[Any, Any]:
    """keep_stats(m, l, row, given) and keep_rows(tid, at, given): a block's states to the workspace, o from shared
    memory. given: (call, number of the first row's state, step, rows)."""
    regs, size, bytes_of_o, threads = t.scores, SIZE[t.acc], row_bytes(t), t.threads
    units, stride = bytes_of_o // VECTOR, bytes_of_o + VECTOR
    store, copy = scalar.store_global(t.acc), scalar.copy_out(VECTOR)

    def keep(x, row, given):
        call, n, step, count, to = given
        if row < count:
            store(call.part_stats + (n + row * step) * (2 * size) + to, x)
        return x

    keep_row = tile.row_mapped(keep, regs)

    @inline
    def keep_stats(m, l, row, given):
        call, n, step, count = given
        keep_row(m, row, (call, n, step, count, 0))
        keep_row(l, row, (call, n, step, count, size))

    @inline
    def keep_rows(tid, at, given):
        call, n, step, count = given
        for k in range(tid, count * units, threads):
            row = udiv(k, units)
            unit = sub(k, mul(row, units))
            to = call.parts + (n + row * step) * bytes_of_o + unit * VECTOR
            copy(to, add(at, add(mul(row, stride), mul(unit, VECTOR))))

    return keep_stats, keep_rows


def memory_merge(t: Tiling) -> dict[str, int]:
    """Where things lie in the shared memory of build_merge, and its size."""
    table = -(-table_bytes(t.rows) // VECTOR) * VECTOR
    return {"table": 0, "sums": table, "size": table + THREADS * SIZE[t.acc]}


def build_merge(t: Tiling, f: Features) -> Any:
    """merge(call, reals): COLUMNS columns of a row of the result, and its lse; `tiles`: blocks of a row."""
    places = memory_merge(t)
    TABLE, SUMS, size, bytes_of_o = places["table"], places["sums"], SIZE[t.acc], row_bytes(t)
    functions = exact_functions(t.acc)
    number, exp2, log2 = functions.number, functions.exp2, functions.log2
    zero, one, ln2, log2e, minus_inf = number(0), number(1), number(LN2), number(LOG2E), number(-np.inf)
    online = build_online(inline, exp2, choose, inline(lambda m: m == minus_inf), inline(lambda m: zero))
    safe, rescale = online.finite_or_zero, online.rescale
    warp_max = tile.row_max(Registers(t.acc, (0,), (0,), (1, 2, 4, 8, 16)))
    warp_sum, load, store = scalar.warp_sum(t.acc), scalar.load_global(t.acc, t.acc), scalar.store_global(t.acc)
    load_shared, store_shared = scalar.load_shared(t.acc, t.acc), scalar.store_shared(t.acc)
    store_o = scalar.store_global(t.storage)
    locate, find = build_locate(t.rows), build_find(t.rows)

    def merge(call, reals):
        tid = thread()
        lane, warp = np.int64(urem(tid, 32)), np.int64(udiv(tid, 32))
        chunk, rest = np.int64(urem(block(), call.tiles)), udiv(block(), call.tiles)
        row, rest = np.int64(urem(rest, call.part_rows)), udiv(rest, call.part_rows)
        kv_head, of = np.int64(urem(rest, call.kv_heads)), np.int64(udiv(rest, call.kv_heads))
        sequence = read_sequence(call, of)
        queries = find(call, sequence.q_len, kv_head, np.int64(0))
        if row >= queries.count:
            return
        locate(call, tid, TABLE, sequence, queries)
        i, h, first, end = load_row(add(TABLE, mul(row, 16)))
        low, high = np.int64(udiv(first, KEYS)), np.int64(udiv(add(end, KEYS - 1), KEYS))
        n, step = find_states(call, of, kv_head)
        n += row * step
        stats, parts = call.part_stats + n * (2 * size), call.parts + n * bytes_of_o

        m, l = minus_inf, zero
        start = low - low % 32 + lane  # whatever parts there are, part s is summed by lane s % 32
        start += 32 if start < low else 0
        for s in range(start, high, 32):
            m = max(m, load(stats + s * (2 * size)))
        m = warp_max((m,))[0]
        for s in range(start, high, 32):
            l += rescale(load(stats + s * (2 * size)), m) * load(stats + s * (2 * size) + size)
        l = warp_sum(l)

        column, o = chunk * COLUMNS + lane, zero
        start = low - low % WARPS + warp
        start += WARPS if start < low else 0
        if column < call.v_dim:
            for s in range(start, high, WARPS):
                o += rescale(load(stats + s * (2 * size)), m) * load(parts + s * bytes_of_o + column * size)
        store_shared(add(SUMS, mul(tid, size)), o)
        sync()
        if warp != 0:
            return
        for w in range(1, WARPS):
            o += load_shared(add(SUMS, mul(add(tid, 32 * w), size)))
        if call.sinks != 0:
            sink = load(call.sinks + h * size) * log2e
            top = max(m, sink)
            alpha = rescale(m, top)
            m = top
            l, o = l * alpha + exp2(sink - safe(m)), o * alpha
        b = sequence.batch
        if column < call.v_dim:
            to = call.out + b * call.out_b + h * call.out_h + i * call.out_s + column * call.out_d
            store_o(to, o * choose(l == zero, zero, one / l))
        if call.lse != 0 and chunk == 0 and lane == 0:
            to = call.lse + b * call.lse_b + h * call.lse_h + i * call.lse_s
            store(to, choose(l == zero, minus_inf, (safe(m) + log2(l)) * ln2))

    return merge
