"""Which pairs a tile sees, and the one step scores -> modified -> hidden that every kernel calls.

The counterpart of cpu/scores.py: a tile's rows are a table in shared memory of (query, head, first key, end key), keys
counted from the sequence's start; everything that a call asks for is compiled in, and nothing else.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..online import LOG2E
from ..philox import build as build_philox
from . import code, scalar, tile
from .compile import inline, libdevice, types
from .tile import Registers

# What every kernel takes: addresses, strides in bytes, sizes. All 8 bytes.
CALL = (
    "q", "q_b", "q_h", "q_s", "q_d", "k", "k_b", "k_h", "k_s", "k_d", "v", "v_b", "v_h", "v_s", "v_d",
    "out", "out_b", "out_h", "out_s", "out_d", "lse", "lse_b", "lse_h", "lse_s",
    "tiles", "kv_heads", "group", "qk_dim", "v_dim", "sequences", "left", "right", "has_prefix",
    "start", "end", "bounds_b", "bounds_h", "bounds_s", "slopes", "slopes_b", "sinks", "seed", "drop_below",
)  # fmt: skip
# scale is that of tanh's argument where there is a softcap; it or the softcap makes log2 units where nothing follows.
REALS = ("scale", "softcap", "drop_scale", "grad_scale")
STRIDES = ("b", "h", "i", "j")


@dataclass(frozen=True)
class Features:
    """What of a call decides the code."""

    aligned: bool = True  # rows of q, k, v and the results can be read 16 bytes at a time
    softcap: bool = False
    bias: str = ""  # its storage type
    slopes: bool = False
    masks: int = 0
    segments: int = 0
    mask_mods: tuple[Callable[..., Any], ...] = ()  # compiled as cuda/modifiers.py says; a table each
    mask_tables: tuple[int, ...] = ()  # numbers in each table
    score_mod: Callable[..., Any] | None = None
    score_table: int = 0
    dropout: bool = False
    derivatives: bool = False  # score_mod returns (score, derivative)
    positive: bool = True  # the scale is a positive number: the largest product is the largest score
    extra: tuple[str, ...] = ()  # more fields: see CALL

    @property
    def every_pair(self) -> bool:
        """Whether every pair is asked something, so that no tile is plain."""
        return bool(self.bias or self.slopes or self.masks or self.segments or self.mask_mods or self.score_mod)

    @property
    def options(self) -> bool:
        """Whether more is done with a score than scaling and hiding it by its position."""
        return self.every_pair or self.softcap or self.dropout

    @property
    def natural(self) -> bool:
        """Whether scores are in natural units, not in log2 units: `build_exponent` tells them apart."""
        return bool(self.bias or self.slopes or self.score_mod)

    @property
    def raw(self) -> bool:
        """Whether scores stay products, and the scale joins the difference from the maximum in one FMA."""
        return self.positive and not self.softcap and not self.natural

    @property
    def call_type(self) -> Any:
        return call_type(self.fields)

    @property
    def fields(self) -> tuple[str, ...]:
        names = list(CALL)
        if self.bias:
            names += ["bias", *(f"bias_{s}" for s in STRIDES)]
        for n in range(self.masks):
            names += [f"mask{n}", *(f"mask{n}_{s}" for s in STRIDES)]
        for n in range(self.segments):
            names += [f"q_ids{n}", f"q_ids{n}_b", f"k_ids{n}", f"k_ids{n}_b"]
        for n, size in enumerate(self.mask_tables):
            names += [f"mask_mod{n}_{x}" for x in range(size)]
        names += [f"score_mod_{x}" for x in range(self.score_table)]
        return (*names, *self.extra)


@cache
def call_type(fields: tuple[str, ...]) -> Any:
    return namedtuple("Call", fields)


Reals = namedtuple("Reals", REALS)


def signature(fields: tuple[str, ...]) -> tuple[Any, Any]:
    """The types of (call, reals)."""
    return (
        types.NamedUniTuple(types.int64, len(fields), call_type(fields)),
        types.NamedUniTuple(types.float64, len(REALS), Reals),
    )


ROW_BYTES = 16  # an entry of the table
LOW, HIGH, INNER_LOW, INNER_HIGH, FLAG = 0, 4, 8, 12, 16  # words behind the table; three of FLAG
TABLE_WORDS = 32


def table_bytes(rows: int) -> int:
    return rows * ROW_BYTES + TABLE_WORDS


def build_find(rows: int) -> Any:
    """find(call, q_len, index) -> (head, row, count) of tile `index` of a (sequence, key head): its first row in its
    head of the group, and how many queries it holds; 0 behind the last tile. A short sequence's heads lie side by side:
    head is then 0 and row counts through all of them."""
    udiv, counted = scalar.udiv, build_counted(rows)

    @inline
    def find(call, q_len, index):
        if q_len < rows:
            return np.int64(0), index * rows, counted(call, q_len, np.int64(0), index * rows)
        tiles = np.int64(udiv(q_len + (rows - 1), rows))
        head = np.int64(udiv(index, tiles))
        row = (index - head * tiles) * rows
        return head, row, counted(call, q_len, head, row)

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
def common_keys(call, sequence, row):
    """The keys from first to end, counted from the sequence's start, that what all heads share (causal, window, prefix)
    leaves to a query of the sequence; both grow with row."""
    _, _, _, _, k_len, offset, prefix = sequence
    i = row + offset
    first, end = 0, k_len
    if call.left >= 0:
        first = max(first, i - call.left)
    if call.has_prefix:
        end = min(end, max(prefix, i + 1))
    if call.right >= 0:
        end = min(end, i + call.right + 1)
    return first, end


@inline
def keys_of(call, sequence, head, row):
    """The same with the bounds of each query's own, where there are any."""
    b, q_start, _, k_start, _, _, _ = sequence
    first, end = common_keys(call, sequence, row)
    if call.start != 0:
        to = b * call.bounds_b + head * call.bounds_h + (q_start + row) * call.bounds_s
        first = max(first, scalar.load_i64(call.start + to) - k_start)
        end = min(end, scalar.load_i64(call.end + to) - k_start)
    return first, end


def build_bounds(rows: int) -> Any:
    """(call, sequence, row, count) -> (low, high, inner low, inner high) of a tile: keys that some row sees are from
    low to high, those from inner low to inner high every row sees. Of a call without bounds of each query's own."""

    @inline
    def bounds(call, sequence, row, count):
        q_len, k_len = sequence[2], sequence[4]
        last = row + count - 1
        if q_len < rows:
            row, last = np.int64(0), q_len - 1
        low, inner_high = common_keys(call, sequence, row)
        inner_low, high = common_keys(call, sequence, last)
        if low >= inner_high or inner_low >= high:  # the first or the last row sees nothing: neither is a whole tile
            inner_low, inner_high = k_len, np.int64(0)
        return min(low, k_len), max(high, 0), inner_low, inner_high

    return bounds


def build_locate(rows: int, ordered: bool = True) -> Callable[..., Any]:
    """locate(call, tid, table, sequence, kv_head, head, row, count): fills the table for the tile of queries that
    `find` has found. The caller makes sure that nobody reads the old one any more.

    Ends with a barrier; not ordered: only where queries have bounds of their own, else the caller's next one serves.
    """
    store_row, store_word, add, mul = scalar.store_row, scalar.store_word, scalar.add, scalar.mul
    shared_min, shared_max, sync, udiv = scalar.shared_min, scalar.shared_max, scalar.sync, scalar.udiv
    at_bounds, bounds, ORDERED = rows * ROW_BYTES, build_bounds(rows), ordered

    @inline
    def locate(call, tid, table, sequence, kv_head, head, row, count):
        _, q_start, q_len, _, k_len, _, _ = sequence
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
            i, h, there = row + tid, head, tid < count
            if q_len < rows:  # short: the queries of a group's heads lie side by side
                i = min(i, call.group * q_len - 1)
                h = np.int64(udiv(i, q_len))
                i -= h * q_len
            i = min(i, q_len - 1)
            h += kv_head * call.group
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
            store_row(add(table, mul(tid, ROW_BYTES)), q_start + i, h, first, end)
        if ORDERED or own:
            sync()

    return locate


@inline
def read_sequence(call, n):
    """(batch, q_start, q_len, k_start, k_len, offset, prefix)"""
    at = call.sequences + n * 56
    return (
        scalar.load_i64(at),
        scalar.load_i64(at + 8),
        scalar.load_i64(at + 16),
        scalar.load_i64(at + 24),
        scalar.load_i64(at + 32),
        scalar.load_i64(at + 40),
        scalar.load_i64(at + 48),
    )


@inline
def read_narrow(call, n):
    """The same, of 32 bits but for offset and prefix, which may be of any size: for a loop that has no register to
    spare."""
    narrow = scalar.narrow
    b, q_start, q_len, k_start, k_len, offset, prefix = read_sequence(call, n)
    return narrow(b), narrow(q_start), narrow(q_len), narrow(k_start), narrow(k_len), offset, prefix


def exact_functions(acc: str) -> SimpleNamespace:
    """exp2, log2 and tanh of one scalar."""
    if acc == "f32":
        one, minus_two, two, small = np.float32(1), np.float32(-2), np.float32(2 * LOG2E), np.float32(0.35)
        fast_exp2, choose, fma = scalar.fast_exp2, scalar.choose, scalar.multiply_add
        reciprocal, with_sign_of = scalar.fast_reciprocal, scalar.with_sign_of
        c1, c2, c3, c4, c5 = (np.float32(c) for c in (-1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925))

        @inline
        def tanh(x):
            """1 - 2 / (1 + e**2|x|), and near 0, where that cancels, the series."""
            a = abs(x)
            far = fma(minus_two, reciprocal(one + fast_exp2(a * two)), one)
            z = x * x
            near = fma(fma(fma(fma(fma(c5, z, c4), z, c3), z, c2), z, c1) * z, a, a)
            return with_sign_of(choose(a < small, near, far), x)

        return SimpleNamespace(number=np.float32, exp2=fast_exp2, log2=scalar.fast_log2, tanh=tanh)

    @inline
    def exp2(x):
        return libdevice.exp2(x)

    @inline
    def log2(x):
        return math.log2(x)

    @inline
    def exact_tanh(x):
        return math.tanh(x)

    return SimpleNamespace(number=np.float64, exp2=exp2, log2=log2, tanh=exact_tanh)


def build_exponent(features: Features, acc: str) -> SimpleNamespace:
    """weight(score, m, reals) = 2**(score - m) and largest(score, reals): scores as `build_modify` gives them, m and
    largest in log2 units.

    A product that is rounded with the difference is as exact as a difference of natural scores would be: what m is off
    by is the same for a row's weights and their sum.
    """
    functions = exact_functions(acc)
    exp2, log2e, multiply_add, number = functions.exp2, functions.number(LOG2E), scalar.multiply_add, functions.number
    if features.raw:
        return SimpleNamespace(
            weight=inline(lambda x, m, reals: exp2(multiply_add(x, number(reals.scale), -m))),
            largest=inline(lambda x, reals: x * number(reals.scale)),
        )
    if features.natural:
        return SimpleNamespace(
            weight=inline(lambda x, m, reals: exp2(multiply_add(x, log2e, -m))),
            largest=inline(lambda x, reals: x * log2e),
        )
    return SimpleNamespace(weight=inline(lambda x, m, reals: exp2(x - m)), largest=inline(lambda x, reals: x))


def build_modify(features: Features, acc: str, table: int, swapped: bool = False) -> SimpleNamespace:
    """whole(x, row, col, given) and partial(x, row, col, given): a product's element -> its score, -inf for exactly
    the hidden pairs; whole is for tiles of which every pair is seen. Where features.raw a score is the product, and
    whole leaves it as it is: an infinite one is the caller's to find (`tile.suspect`).

    row is the query's place in the tile, col the key counted from the sequence's start; swapped: the other way round.
    given: (call, reals, batch, k_start, what to add to a query's array index for its position, where the table lies
    from `table` on: in a kernel with two stages 0 or a stage's bytes).

    With features.derivatives they return (score, derivative of score_mod, derivative of softcap), those that there are:
    `results` numbers.
    """
    f = features
    functions = exact_functions(acc)
    number, tanh = functions.number, functions.tanh
    at = {name: n for n, name in enumerate(f.fields)}
    hidden, one = number(-np.inf), number(1)
    load_row, add, mul, inside, choose = scalar.load_row, scalar.add, scalar.mul, scalar.inside, scalar.choose
    seen, changed = _seen(f, at), _changed(f, at, acc)
    multiply_add = scalar.multiply_add
    softcap, every, raw = f.softcap, f.every_pair, f.raw
    mod_slope, cap_slope = f.derivatives and f.score_mod is not None, f.derivatives and f.softcap

    @inline
    def scaled(x, reals):
        """(score, derivative of softcap)"""
        # x - x is 0, or NaN: an infinite feature has no finite answer, and -inf must not pass for a hidden pair.
        if raw:
            return x + (x - x), one
        x = multiply_add(x, number(reals.scale), x - x)
        if softcap:
            t = tanh(x)
            return number(reals.softcap) * t, one - t * t
        return x, one

    @inline
    def returned(x, mod, cap):
        if mod_slope and cap_slope:
            return x, mod, cap
        if mod_slope:
            return x, mod
        if cap_slope:
            return x, cap
        return x

    @inline
    def whole_pair(x, q, j, given):
        if raw:
            return returned(x, one, one)
        x, cap = scaled(x, given[1])
        return returned(x, one, cap)

    @inline
    def partial_pair(x, q, j, given):
        call, reals, b, k_start, shift, stage = given
        i, h, first, end = load_row(add(stage, add(table, mul(q, ROW_BYTES))))
        there = inside(j, first, end)
        x, cap = scaled(x, reals)
        if not every:
            return returned(choose(there, x, hidden), one, cap)
        y, mod = hidden, one
        if there:
            key = k_start + j
            if seen(call, b, h, i, key):
                y, mod = changed(x, call, b, h, i, key, i + shift - j)
        return returned(y, mod, cap)

    if swapped:

        def whole(x, row, col, given):
            return whole_pair(x, col, row, given)

        def partial(x, row, col, given):
            return partial_pair(x, col, row, given)

    else:

        def whole(x, row, col, given):
            return whole_pair(x, row, col, given)

        def partial(x, row, col, given):
            return partial_pair(x, row, col, given)

    return SimpleNamespace(whole=whole, partial=partial, results=1 + mod_slope + cap_slope)


def build_dropout(regs: Registers, element: Callable[..., Any], table: int, swapped: bool) -> Callable[..., Any]:
    """dropped(row, col, given) -> a bit for each of a thread's pairs that dropout drops: (row, col) is its corner, and
    the other arguments are as in `build_modify`.

    A loop, not code for every element: ten rounds of 64-bit products, side by side, would take all registers.
    """
    load_row, add, mul, word = scalar.load_row, scalar.add, scalar.mul, build_philox(inline)
    n, no_bits, set_bit = regs.size, tile.no_bits(regs.size), tile.set_bit(regs.size)
    low = np.uint64(0xFFFFFFFF)

    @inline
    def dropped(row, col, given):
        call, _, b, k_start, _, stage = given
        k0, k1 = np.uint64(call.seed) & low, np.uint64(call.seed) >> np.uint64(32)
        bits = no_bits()
        for e in range(n):
            r, c = element(e)
            q, j = add(row, r), add(col, c)
            if swapped:
                q, j = j, q
            i, h, _, _ = load_row(add(stage, add(table, mul(q, ROW_BYTES))))
            key = np.uint64(k_start + j)
            x = word(np.uint64(i), key >> np.uint64(2), np.uint64(h), np.uint64(b), k0, k1, key & np.uint64(3))
            bits = set_bit(bits, e, x < np.uint64(call.drop_below))
        return bits

    return dropped


def _seen(f: Features, at: dict[str, int]) -> Callable[..., Any]:
    """(call, b, h, i, j) -> whether the masks show the pair."""
    load_byte, load = scalar.load_byte, scalar.load_i64

    def always(call, b, h, i, j):
        return True

    def with_mask(before, n):
        def seen(call, b, h, i, j):
            to = call[n] + b * call[n + 1] + h * call[n + 2] + i * call[n + 3] + j * call[n + 4]
            return before(call, b, h, i, j) and load_byte(to) != 0

        return seen

    def with_segments(before, n):
        def seen(call, b, h, i, j):
            own = load(call[n] + b * call[n + 1] + i * 8)
            return before(call, b, h, i, j) and own == load(call[n + 2] + b * call[n + 3] + j * 8)

        return seen

    def with_function(before, mod, first, size):
        table = _table(first, size)

        def seen(call, b, h, i, j):
            return before(call, b, h, i, j) and mod(np.int32(b), np.int32(h), np.int32(i), np.int32(j), table(call))

        return seen

    seen = inline(always)
    for n in range(f.masks):
        seen = inline(with_mask(seen, at[f"mask{n}"]))
    for n in range(f.segments):
        seen = inline(with_segments(seen, at[f"q_ids{n}"]))
    for n, (mod, size) in enumerate(zip(f.mask_mods, f.mask_tables, strict=True)):
        seen = inline(with_function(seen, inline(mod), at.get(f"mask_mod{n}_0", 0), size))
    return seen


def _table(first: int, size: int) -> Callable[..., Any]:
    """call -> its numbers first : first + size, as a tuple."""
    if size == 0:
        return inline(lambda call: (0,))
    stop = first + size

    @inline
    def table(call):
        return call[first:stop]

    return table


def _changed(f: Features, at: dict[str, int], acc: str) -> Callable[..., Any]:
    """(x, call, b, h, i, j, distance) -> x with bias, ALiBi and score_mod, -inf where the bias is; and the derivative
    of score_mod. distance is the query's position less the key's."""
    number = np.float32 if acc == "f32" else np.float64
    choose, hidden, one, derivatives = scalar.choose, number(-np.inf), number(1), f.derivatives

    def plain(x, call, b, h, i, j, distance):
        return x, True

    def with_bias(n):
        load = scalar.load_global(f.bias, acc)

        def changed(x, call, b, h, i, j, distance):
            to = call[n] + b * call[n + 1] + h * call[n + 2] + i * call[n + 3] + j * call[n + 4]
            added = load(to)
            return x + added, added != hidden  # the bias hides, whatever the score is and becomes

        return changed

    def with_slopes(before):
        load, size = scalar.load_global(acc, acc), code.SIZE[acc]

        def changed(x, call, b, h, i, j, distance):
            slope = load(call.slopes + b * call.slopes_b + h * size)
            y, shown = before(x, call, b, h, i, j, distance)
            return y - slope * abs(number(distance)), shown

        return changed

    before = inline(with_bias(at["bias"]) if f.bias else plain)
    if f.slopes:
        before = inline(with_slopes(before))
    if f.score_mod is None:

        @inline
        def final(x, call, b, h, i, j, distance):
            y, shown = before(x, call, b, h, i, j, distance)
            return choose(shown, y, hidden), one

    else:
        mod, table = inline(f.score_mod), _table(at.get("score_mod_0", 0), f.score_table)

        @inline
        def final(x, call, b, h, i, j, distance):
            x, shown = before(x, call, b, h, i, j, distance)
            y = mod(x, np.int32(b), np.int32(h), np.int32(i), np.int32(j), table(call))
            if derivatives:
                return choose(shown, y[0], hidden), y[1]
            return choose(shown, y, hidden), one

    return final
