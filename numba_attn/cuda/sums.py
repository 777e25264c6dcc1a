"""Kernels of the gradients that are sums over pairs: of a bias that is broadcast, of slopes, sinks and arrays of aux.
That of the bias is in bias_sums.py.

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

from . import multiply, scalar, tile
from .backward import EXTRA
from .code import SIZE
from .compile import inline, libdevice
from .derivatives import CELLS, HEADER, AuxFunctions, total_function
from .dscores import build_load_queries, build_weights
from .queries import block_of, build_find, build_locate, build_seen, read_sequence, table_bytes
from .record import Features
from .rows import Copies, rows_of
from .scalar import add, block, commit, load_row, mul, sub, sync, thread, udiv, urem, wait_all
from .step import Given, build_dropout, build_modify
from .tiling import Tiling, placed, products

TOTAL = ("terms", "parts", "size", "total")
HEADS = (*EXTRA, "dslopes", "q_len", "unit_b", "total")
AUX_TOTAL = ("terms", "size", "limb", "total")


def aux_fields(arrays: int) -> tuple[str, ...]:
    """The fields of the kernel of `arrays` gradients of aux."""
    return (*EXTRA, "aux_stage", "aux_limb", *(f"aux_sums{n}" for n in range(arrays)))


# --- sums of what lies in memory --------------------------------------------------------------------------------------

THREADS = 256


def build_total(storage: str, f: Features) -> Any:
    """total(call, reals): the sum, in order, of `parts` arrays of `size` float64 one behind the other, as `storage`.

    A block has 32 neighbouring elements, and eight warps that take an eighth of the parts each. Fields: TOTAL.
    """
    load, store, size = scalar.load_global("f64", "f64"), scalar.store_global(storage), SIZE[storage]
    load_sum, store_sum = scalar.load_shared("f64", "f64"), scalar.store_shared("f64")
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
    TABLE, Q, DOUT, K, V = (places[n] for n in ("table", "q", "dout", "k", "v"))
    ROWS, COLS = t.rows, t.cols
    copies, corner, load_queries = Copies(t, f.aligned), products(t).corner, build_load_queries(t, f, ROWS, places)
    k_of, v_of = rows_of(f, "k", "qk_dim"), rows_of(f, "v", "v_dim")
    load_k, load_v = copies.load(t.qk_dim, COLS), copies.load(t.v_dim, COLS)
    locate, find, seen = build_locate(ROWS), build_find(ROWS), build_seen(ROWS, COLS)
    put_pairs, (start, add_pairs, flush) = _put_pairs(t, f, places), _pair_sums(t, f, places, functions)

    def aux(call, reals):
        tid = thread()
        of, kv_head, index = block_of(call)
        kv_head = np.int64(kv_head)
        sequence = read_sequence(call, of)
        b, k_start, k_len = sequence.batch, sequence.k_start, sequence.k_len
        queries = find(call, sequence.q_len, kv_head, index)
        if queries.count <= 0:
            return
        locate(call, tid, TABLE, sequence, queries)
        low, high, _, _ = seen(TABLE)
        first, last = np.int64(low), np.int64(high)
        if first >= last:
            return
        row, col = corner(tid)
        given = Given(call, reals, b, k_start, sequence.offset - sequence.q_start, 0)
        k, v = k_of(call, b, kv_head, k_start), v_of(call, b, kv_head, k_start)
        load_queries(call, tid, sequence, queries, 0)
        i, h, _, _ = load_row(add(TABLE, mul(urem(tid, ROWS), 16)))  # the row of this thread's pairs
        pending = start(call)
        for j0 in range(first, last, COLS):
            load_k(tid, K, k.base + j0 * k.stride_s, k, k_len - j0)
            load_v(tid, V, v.base + j0 * v.stride_s, v, k_len - j0)
            commit()
            wait_all()
            sync()
            put_pairs(tid, row, col, j0, given, (Q, K, DOUT, V))
            sync()  # K and V were read too
            pending = add_pairs(tid, i, h, j0, given, pending)
        flush(call, pending)

    return aux


def _put_pairs(t: Tiling, f: Features, places: dict[str, int]) -> Any:
    """(tid, row, col, j0, given, (a, b, c, d)): what score_mod is called with, and dS, of a tile's pairs to shared
    memory; scores are A B' and dP is C D'."""
    TABLE, SCORES, WEIGHTS = places["table"], places["scores"], places["weights"]
    STRIDE, DROPOUT, size, regs, parts = _pair_stride(t), f.dropout, SIZE[t.acc], t.scores, products(t)
    scores, dots = parts.abt(t.qk_dim), parts.abt(t.v_dim)
    modify, number = build_modify(f, t.acc, TABLE), np.float64 if t.acc == "f64" else np.float32
    modified = tile.mapped(modify.partial, regs, results=modify.results)
    weight, inner = build_weights(t, f, places["stats"], False)
    weights, inners = tile.mapped(weight, regs), tile.mapped(inner, regs, n_tiles=2)
    drop_bits, scaled_where = build_dropout(regs, parts.element, TABLE, False), tile.scaled_where(regs)
    cleared, hidden_bits, put = tile.cleared(regs), tile.hidden_bits(regs), multiply.simt_store_p(regs, STRIDE)

    @inline
    def put_pairs(tid, row, col, j0, given, operands):
        a, b, c, d = operands
        found = modified(scores(tid, a, b), row, add(j0, col), given)
        s = found[0]
        bits = hidden_bits(s)
        p = cleared(weights(s, row, add(j0, col), given), bits)
        dp = dots(tid, c, d)
        if DROPOUT:
            dp = scaled_where(dp, drop_bits(row, add(j0, col), given), number(given.reals.drop_scale))
        ds = cleared(inners(p, dp, row, add(j0, col), given), bits)
        place = add(mul(row, STRIDE), mul(col, size))
        put(found[1], add(SCORES, place))
        put(ds, add(WEIGHTS, place))

    return put_pairs


def _pair_sums(t: Tiling, f: Features, places: dict[str, int], functions: AuxFunctions) -> tuple[Any, Any, Any]:
    """start(call) -> pending, add(tid, i, h, j0, given, pending) -> pending with a thread's pairs of a tile, all of
    query i of head h, and flush(call, pending)."""
    SCORES, WEIGHTS, STRIDE = places["scores"], places["weights"], _pair_stride(t)
    ROWS, COLS, ALONG, size = t.rows, t.cols, t.threads // t.rows, SIZE[t.acc]  # ALONG: threads of a row
    start_sums, add_pair, flush_sums = inline(functions.start), inline(functions.add), inline(functions.flush)
    load, zero = scalar.load_shared(t.acc, t.acc), (np.float64 if t.acc == "f64" else np.float32)(0)
    at = {name: n for n, name in enumerate(f.fields)}
    FIRST, FIRST_SUM, LAST_SUM = at["score_mod_0"], at["aux_stage"], len(f.fields)
    LAST = FIRST + f.score_table

    @inline
    def start(call):
        return start_sums(call[FIRST_SUM:LAST_SUM])

    @inline
    def add_pairs(tid, i, h, j0, given, pending):
        call, own = given.call, urem(tid, ROWS)
        table, sums = call[FIRST:LAST], call[FIRST_SUM:LAST_SUM]
        for n in range(udiv(tid, ROWS), COLS, ALONG):
            c = urem(sub(n, own), COLS)
            place = add(mul(own, STRIDE), mul(c, size))
            x, w = load(add(SCORES, place)), load(add(WEIGHTS, place))
            if w != zero:  # hidden pairs have none
                pair = np.int32(given.batch), h, i, np.int32(given.k_start + j0 + c)
                pending = add_pair(x, pair, table, w, sums, pending)
        return pending

    @inline
    def flush(call, pending):
        flush_sums(call[FIRST_SUM:LAST_SUM], pending)

    return start, add_pairs, flush


def build_aux_total(acc: str, storage: str, f: Features) -> Any:
    """aux_total(call, reals): an array's gradient from its integers, as `storage`. Fields: AUX_TOTAL."""
    total, store, size = inline(total_function(acc)), scalar.store_global(storage), SIZE[storage]

    def aux_total(call, reals):
        n = np.int64(block()) * THREADS + np.int64(thread())
        if n < call.size:
            store(call.total + n * size, total(call.terms, n, call.limb))

    return aux_total


def aux_bytes(size: int) -> int:
    """Bytes of the integers of an array of so many elements."""
    return 8 * (HEADER + CELLS * size)
