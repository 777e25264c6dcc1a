"""A tile of queries and the keys that it may see: the counterpart of cpu/queries.py.

A tile's rows are a table in shared memory of (query, head, first key, end key), keys counted from the sequence's start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .compile import inline
from .scalar import (
    add,
    block,
    load_i64,
    load_word,
    mul,
    narrow,
    shared_max,
    shared_min,
    store_row,
    store_word,
    sync,
    udiv,
    urem,
)


class Sequence(NamedTuple):
    """A sequence: its batch, and where its queries and keys are in the arrays. Query i is at the keys' position i +
    offset, and keys before `prefix` are seen whatever causal says."""

    batch: Any
    q_start: Any
    q_len: Any
    k_start: Any
    k_len: Any
    offset: Any
    prefix: Any


class Queries(NamedTuple):
    """A tile of queries of a key head: `count` queries from `row` on in head `head` of the group. A short sequence's
    heads lie side by side: head is then 0 and row counts through all of them."""

    kv_head: Any
    head: Any
    row: Any
    count: Any


class Seen(NamedTuple):
    """Keys of a tile: some row sees those from low to high, every row those from inner_low to inner_high."""

    low: Any
    high: Any
    inner_low: Any
    inner_high: Any


@inline
def block_of(call):
    """(sequence, key head, tile) that a block works on; the longest rows of a causal call come first."""
    rest = udiv(block(), call.tiles)
    index = call.tiles - 1 - np.int64(urem(block(), call.tiles))
    return np.int64(udiv(rest, call.kv_heads)), urem(rest, call.kv_heads), index


@inline
def read_sequence(call, n):
    at = call.sequences + n * 56
    return Sequence(
        load_i64(at),
        load_i64(at + 8),
        load_i64(at + 16),
        load_i64(at + 24),
        load_i64(at + 32),
        load_i64(at + 40),
        load_i64(at + 48),
    )


@inline
def read_narrow(call, n):
    """The same, of 32 bits but for offset and prefix, which may be of any size: for a loop that has no register to
    spare."""
    b, q_start, q_len, k_start, k_len, offset, prefix = read_sequence(call, n)
    return Sequence(narrow(b), narrow(q_start), narrow(q_len), narrow(k_start), narrow(k_len), offset, prefix)


# --- which queries ----------------------------------------------------------------------------------------------------


def build_find(rows: int) -> Any:
    """find(call, q_len, kv_head, index) -> the Queries of tile `index` of a (sequence, key head): none behind the last
    tile."""
    counted = build_counted(rows)

    @inline
    def find(call, q_len, kv_head, index):
        if q_len < rows:
            return Queries(kv_head, np.int64(0), index * rows, counted(call, q_len, np.int64(0), index * rows))
        tiles = np.int64(udiv(q_len + (rows - 1), rows))
        head = np.int64(udiv(index, tiles))
        row = (index - head * tiles) * rows
        return Queries(kv_head, head, row, counted(call, q_len, head, row))

    return find


def build_counted(rows: int) -> Any:
    """(call, q_len, head, row) -> the queries of the tile that begins there; none behind the last."""

    @inline
    def counted(call, q_len, head, row):
        if q_len < rows:
            return min(rows, call.group * q_len - row)
        if head >= call.group:  # a longer sequence has as many tiles
            return np.int64(0)
        return min(rows, q_len - row)

    return counted


@inline
def where_of(call, sequence, queries):
    """(queries of the sequence, first query, its head, queries of the tile), both as the arrays count them."""
    head = queries.kv_head * call.group + queries.head
    return sequence.q_len, sequence.q_start + queries.row, head, queries.count


# --- which keys -------------------------------------------------------------------------------------------------------


@inline
def common_keys(call, sequence, row):
    """The keys from first to end, counted from the sequence's start, that what all heads share (causal, window, prefix)
    leaves to a query of the sequence; both grow with row."""
    i = row + sequence.offset
    first, end = 0, sequence.k_len
    if call.left >= 0:
        first = max(first, i - call.left)
    if call.has_prefix:
        end = min(end, max(sequence.prefix, i + 1))
    if call.right >= 0:
        end = min(end, i + call.right + 1)
    return first, end


@inline
def keys_of(call, sequence, head, row):
    """The same with the bounds of each query's own, where there are any."""
    first, end = common_keys(call, sequence, row)
    if call.start != 0:
        i = sequence.q_start + row
        to = sequence.batch * call.bounds_b + head * call.bounds_h + i * call.bounds_s
        first = max(first, load_i64(call.start + to) - sequence.k_start)
        end = min(end, load_i64(call.end + to) - sequence.k_start)
    return first, end


def build_bounds(rows: int) -> Any:
    """(call, sequence, row, count) -> Seen of a tile, in a call without bounds of each query's own."""

    @inline
    def bounds(call, sequence, row, count):
        q_len, k_len = sequence.q_len, sequence.k_len
        last = row + count - 1
        if q_len < rows:
            row, last = np.int64(0), q_len - 1
        low, inner_high = common_keys(call, sequence, row)
        inner_low, high = common_keys(call, sequence, last)
        if low >= inner_high or inner_low >= high:  # the first or the last row sees nothing: neither is a whole tile
            inner_low, inner_high = k_len, np.int64(0)
        return Seen(min(low, k_len), max(high, 0), inner_low, inner_high)

    return bounds


# --- the table --------------------------------------------------------------------------------------------------------

ROW_BYTES = 16  # an entry of the table
LOW, HIGH, INNER_LOW, INNER_HIGH, FLAG = 0, 4, 8, 12, 16  # words behind the table; three of FLAG
TABLE_WORDS = 32


def table_bytes(rows: int) -> int:
    return rows * ROW_BYTES + TABLE_WORDS


def build_locate(rows: int, ordered: bool = True) -> Callable[..., Any]:
    """locate(call, tid, table, sequence, queries): fills the table for the tile of queries that `find` has found. The
    caller makes sure that nobody reads the old one any more.

    Ends with a barrier; not ordered: only where queries have bounds of their own, else the caller's next one serves.
    """
    at_bounds, bounds, ORDERED = rows * ROW_BYTES, build_bounds(rows), ordered

    @inline
    def locate(call, tid, table, sequence, queries):
        q_len, k_len = sequence.q_len, sequence.k_len
        row, count = queries.row, queries.count
        at = add(table, at_bounds)
        own = call.start != 0  # bounds of each query's own
        if tid == 0:
            low, high, inner_low, inner_high = k_len, np.int64(0), np.int64(0), k_len
            if not own:
                low, high, inner_low, inner_high = bounds(call, sequence, row, count)
            store_word(add(at, LOW), low)
            store_word(add(at, HIGH), high)
            store_word(add(at, INNER_LOW), inner_low)
            store_word(add(at, INNER_HIGH), inner_high)
        if own:
            sync()
        if tid < rows:
            i, h, there = row + tid, queries.head, tid < count
            if q_len < rows:  # short: the queries of a group's heads lie side by side
                i = min(i, call.group * q_len - 1)
                h = np.int64(udiv(i, q_len))
                i -= h * q_len
            i = min(i, q_len - 1)
            h += queries.kv_head * call.group
            first, end = keys_of(call, sequence, h, i)
            if not there:  # an idle row: it sees nothing, and asks for nothing
                first = end = 0
            elif first >= end:
                first = end = 0
                if own:
                    shared_min(add(at, INNER_HIGH), 0)
            elif own:
                shared_min(add(at, LOW), first)
                shared_max(add(at, HIGH), end)
                shared_max(add(at, INNER_LOW), first)
                shared_min(add(at, INNER_HIGH), end)
            store_row(add(table, mul(tid, ROW_BYTES)), sequence.q_start + i, h, first, end)
        if ORDERED or own:
            sync()

    return locate


def build_seen(rows: int, cols: int) -> Any:
    """(table) -> Seen of the tile that `locate` has filled the table for, low at a multiple of cols."""
    at_bounds = rows * ROW_BYTES

    @inline
    def seen(table):
        at = table + at_bounds
        first = mul(udiv(load_word(at + LOW), cols), cols)
        return Seen(first, load_word(at + HIGH), load_word(at + INNER_LOW), load_word(at + INNER_HIGH))

    return seen
