"""The step that every kernel calls: scores are modified, then hidden. The counterpart of cpu/step.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..online import LOG2E
from ..philox import build as build_philox
from . import code, scalar, tile
from .compile import inline, libdevice
from .queries import ROW_BYTES
from .record import Features
from .scalar import add, choose, inside, load_byte, load_i64, load_row, mul, multiply_add
from .tile import Registers


class Given(NamedTuple):
    """What the functions of a pair receive beside its place in the tile."""

    call: Any
    reals: Any
    batch: Any
    k_start: Any
    shift: Any  # what to add to a query's array index for its position
    stage: Any  # where the table lies from `table` on: in a kernel with two stages 0 or a stage's bytes


def exact_functions(acc: str) -> SimpleNamespace:
    """exp2, log2 and tanh of one scalar."""
    if acc == "f32":
        one, minus_two, two, small = np.float32(1), np.float32(-2), np.float32(2 * LOG2E), np.float32(0.35)
        fast_exp2, fma = scalar.fast_exp2, multiply_add
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
    exp2, log2e, number = functions.exp2, functions.number(LOG2E), functions.number
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
    given is a Given.

    With features.derivatives they return (score, derivative of score_mod, derivative of softcap), those that there are:
    `results` numbers.
    """
    f = features
    functions = exact_functions(acc)
    number, tanh = functions.number, functions.tanh
    at = {name: n for n, name in enumerate(f.fields)}
    hidden, one = number(-np.inf), number(1)
    seen, changed = _seen(f, at), _changed(f, at, acc)
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
        x, cap = scaled(x, given.reals)
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
    word = build_philox(inline)
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

    def always(call, b, h, i, j):
        return True

    def with_mask(before, n):
        def seen(call, b, h, i, j):
            to = call[n] + b * call[n + 1] + h * call[n + 2] + i * call[n + 3] + j * call[n + 4]
            return before(call, b, h, i, j) and load_byte(to) != 0

        return seen

    def with_segments(before, n):
        def seen(call, b, h, i, j):
            own = load_i64(call[n] + b * call[n + 1] + i * 8)
            return before(call, b, h, i, j) and own == load_i64(call[n + 2] + b * call[n + 3] + j * 8)

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
    hidden, one, derivatives = number(-np.inf), number(1), f.derivatives

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
