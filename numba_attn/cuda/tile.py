"""Register tiles, which the kernels compute with.

A thread's part of a tile is a UniTuple of floats. LLVM keeps it in registers: every index is a constant, so nothing can
land in local memory. Every operation is an @intrinsic that writes its unrolled
code; shared memory is addressed by 32-bit offsets from the block's dynamic shared memory, with the constant parts as
immediates of the instruction; global memory by 64-bit integers.

Two kinds of registers are known. `simt`: a thread has every RG-th row and every CG-th column (or vector of columns) and
multiplies with FMAs. `mma`: the accumulator fragments of mma.sync.m16n8k16. Both give the same two products, which are
all that attention needs:

    abt: s = A B', rows of A and of B in shared memory           (S = Q K', dP = dO V')
    pb:  o = alpha o + P B, P in registers, rows of B in shared  (O = P V, dQ = dS K, dV = P' dO, dK = dS' Q)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir

from .code import FLOATS, I1, I32, as_i32, fma, i32, maximum, shuffle_xor, unpack
from .compile import intrinsic, types

# --- registers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registers:
    """Which elements of a tile a thread holds: element a * len(cols) + c is at (row0 + rows[a], col0 + cols[c]), where
    (row0, col0) is the thread's own corner. The lanes that share a row differ in the bits of `partners`."""

    acc: str  # "f32" or "f64"
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    partners: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.rows) * len(self.cols)

    @property
    def type(self) -> Any:
        return types.UniTuple(FLOATS[self.acc][1], self.size)

    @property
    def row_type(self) -> Any:
        return types.UniTuple(FLOATS[self.acc][1], len(self.rows))

    def __iter__(self):
        """(element, a, c)"""
        n = len(self.cols)
        return ((a * n + c, a, c) for a in range(len(self.rows)) for c in range(n))


def words_of(n: int) -> Any:
    """The type of n bits."""
    return types.UniTuple(types.uint32, -(-n // 32))


@cache
def filled(acc: str, n: int, value: float) -> Any:
    """() -> a tuple of n times value."""
    kind, scalar = FLOATS[acc]

    @intrinsic
    def filled(typingctx):
        def codegen(context, builder, sig, args):
            return context.make_tuple(builder, sig.return_type, [ir.Constant(kind, value)] * n)

        return types.UniTuple(scalar, n)(), codegen

    return filled


@cache
def no_bits(n: int) -> Any:
    @intrinsic
    def no_bits(typingctx):
        def codegen(context, builder, sig, args):
            return context.make_tuple(builder, sig.return_type, [i32(0)] * -(-n // 32))

        return words_of(n)(), codegen

    return no_bits


@cache
def hidden_bits(regs: Registers) -> Any:
    """(s) -> a bit for each element that is -inf."""
    minus_inf = ir.Constant(FLOATS[regs.acc][0], float("-inf"))

    @intrinsic
    def hidden_bits(typingctx, s):
        def codegen(context, builder, sig, args):
            words = [i32(0)] * -(-regs.size // 32)
            for e, x in enumerate(unpack(builder, args[0], regs.size)):
                bit = builder.select(builder.fcmp_ordered("==", x, minus_inf), i32(1 << e % 32), i32(0))
                words[e // 32] = builder.or_(words[e // 32], bit)
            return context.make_tuple(builder, sig.return_type, words)

        return words_of(regs.size)(s), codegen

    return hidden_bits


@cache
def other_than_one(regs: Registers) -> Any:
    """(x) -> whether any of one number a row is not 1."""
    one = ir.Constant(FLOATS[regs.acc][0], 1.0)

    @intrinsic
    def other_than_one(typingctx, x):
        def codegen(context, builder, sig, args):
            found = ir.Constant(I1, 0)
            for value in unpack(builder, args[0], len(regs.rows)):
                found = builder.or_(found, builder.fcmp_unordered("!=", value, one))
            return found

        return types.boolean(regs.row_type), codegen

    return other_than_one


@cache
def suspect(regs: Registers) -> Any:
    """(tile) -> whether an element may be infinite or NaN, for half an instruction an element: the sum of products of
    neighbours is finite unless one of them is not, or they are of the order of the largest number's root."""
    kind, chains = FLOATS[regs.acc][0], 4

    @intrinsic
    def suspect(typingctx, x):
        def codegen(context, builder, sig, args):
            elements = unpack(builder, args[0], regs.size)
            one = ir.Constant(kind, 1.0)
            sums = [ir.Constant(kind, 0.0)] * chains
            for n, at in enumerate(range(0, regs.size, 2)):
                x, y = [*elements[at : at + 2], one][:2]
                sums[n % chains] = fma(builder, x, y, sums[n % chains])
            total = builder.fadd(builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3]))
            return builder.fcmp_unordered("!=", builder.fsub(total, total), ir.Constant(kind, 0.0))

        return types.boolean(regs.type), codegen

    return suspect


@cache
def bit(n: int) -> Any:
    """(words, k) -> bit k of n, k a run-time number."""

    @intrinsic
    def bit(typingctx, words, k):
        def codegen(context, builder, sig, args):
            words, k = unpack(builder, args[0], -(-n // 32)), as_i32(builder, args[1])
            chosen = words[0]
            for w, word in enumerate(words[1:], 1):
                chosen = builder.select(builder.icmp_unsigned(">=", k, i32(32 * w)), word, chosen)
            return builder.trunc(builder.lshr(chosen, builder.and_(k, i32(31))), I1)

        return types.boolean(words, k), codegen

    return bit


def mapped(fn: Callable[..., Any], regs: Registers, n_tiles: int = 1, results: int = 1) -> Any:
    """(tile, row0, col0, context) -> fn(x, row, col, context) for every element; with two tiles (tile, other, row0,
    col0, context) -> fn(x, y, row, col, context). Rows and columns are int32. With more than one result fn returns a
    tuple, and so does this: of tiles."""
    scalar = FLOATS[regs.acc][1]
    returned = scalar if results == 1 else types.UniTuple(scalar, results)
    result = regs.type if results == 1 else types.UniTuple(regs.type, results)

    def code(context, builder, sig, args):
        tiles = [unpack(builder, t, regs.size) for t in args[:n_tiles]]
        row0, col0 = (as_i32(builder, x) for x in args[n_tiles : n_tiles + 2])
        rows = [builder.add(row0, i32(r)) for r in regs.rows]
        cols = [builder.add(col0, i32(c)) for c in regs.cols]
        inner = returned(*[scalar] * n_tiles, types.int32, types.int32, sig.args[-1])
        new = [
            context.compile_internal(builder, fn, inner, [*(t[e] for t in tiles), rows[a], cols[c], args[-1]])
            for e, a, c in regs
        ]
        if results == 1:
            return context.make_tuple(builder, sig.return_type, new)
        parts = [[builder.extract_value(x, n) for x in new] for n in range(results)]
        return context.make_tuple(
            builder, sig.return_type, [context.make_tuple(builder, regs.type, part) for part in parts]
        )

    if n_tiles == 1:

        @intrinsic
        def mapped(typingctx, tile, row0, col0, given):
            return result(tile, row0, col0, given), code

    else:

        @intrinsic
        def mapped(typingctx, tile, other, row0, col0, given):
            return result(tile, other, row0, col0, given), code

    return mapped


@cache
def set_bit(n: int) -> Any:
    """(words, k, on) -> the n bits with bit k set if `on`, k a run-time number."""

    @intrinsic
    def set_bit(typingctx, words, k, on):
        def codegen(context, builder, sig, args):
            words, k = unpack(builder, args[0], -(-n // 32)), as_i32(builder, args[1])
            new = builder.shl(builder.zext(args[2], I32), builder.and_(k, i32(31)))
            for w, word in enumerate(words):
                here = builder.icmp_unsigned("==", builder.lshr(k, i32(5)), i32(w))
                words[w] = builder.or_(word, builder.select(here, new, i32(0)))
            return context.make_tuple(builder, sig.return_type, words)

        return words_of(n)(words, k, on), codegen

    return set_bit


@cache
def scaled_where(regs: Registers) -> Any:
    """(tile, bits, factor) -> the tile times factor, 0 where a bit is set."""
    zero = ir.Constant(FLOATS[regs.acc][0], 0.0)

    @intrinsic
    def scaled_where(typingctx, tile, bits, factor):
        def codegen(context, builder, sig, args):
            words = unpack(builder, args[1], -(-regs.size // 32))
            new = []
            for e, x in enumerate(unpack(builder, args[0], regs.size)):
                set_ = builder.icmp_unsigned("!=", builder.and_(words[e // 32], i32(1 << e % 32)), i32(0))
                new.append(builder.select(set_, zero, builder.fmul(x, args[2])))
            return context.make_tuple(builder, sig.return_type, new)

        return regs.type(tile, bits, factor), codegen

    return scaled_where


@cache
def cleared(regs: Registers) -> Any:
    """(tile, bits) -> the tile, 0 where a bit is set."""
    zero = ir.Constant(FLOATS[regs.acc][0], 0.0)

    @intrinsic
    def cleared(typingctx, tile, bits):
        def codegen(context, builder, sig, args):
            words = unpack(builder, args[1], -(-regs.size // 32))
            new = []
            for e, x in enumerate(unpack(builder, args[0], regs.size)):
                set_ = builder.icmp_unsigned("!=", builder.and_(words[e // 32], i32(1 << e % 32)), i32(0))
                new.append(builder.select(set_, zero, x))
            return context.make_tuple(builder, sig.return_type, new)

        return regs.type(tile, bits), codegen

    return cleared


def both(fn: Callable[..., Any], regs: Registers) -> Any:
    """(tile, other) -> fn(x, y) for every element."""
    scalar = FLOATS[regs.acc][1]

    @intrinsic
    def both(typingctx, tile, other):
        def codegen(context, builder, sig, args):
            pairs = zip(unpack(builder, args[0], regs.size), unpack(builder, args[1], regs.size), strict=True)
            new = [context.compile_internal(builder, fn, scalar(scalar, scalar), list(pair)) for pair in pairs]
            return context.make_tuple(builder, sig.return_type, new)

        return regs.type(tile, other), codegen

    return both


def each_row(fn: Callable[..., Any], regs: Registers) -> Any:
    """(x, y) -> fn(x, y) for tuples of one number a row."""
    scalar = FLOATS[regs.acc][1]

    @intrinsic
    def each_row(typingctx, x, y):
        def codegen(context, builder, sig, args):
            n = len(regs.rows)
            pairs = zip(unpack(builder, args[0], n), unpack(builder, args[1], n), strict=True)
            new = [context.compile_internal(builder, fn, scalar(scalar, scalar), list(pair)) for pair in pairs]
            return context.make_tuple(builder, sig.return_type, new)

        return regs.row_type(x, y), codegen

    return each_row


def row_mapped(fn: Callable[..., Any], regs: Registers) -> Any:
    """(x, row0, context) -> fn(x, row, context) for one number a row."""
    scalar = FLOATS[regs.acc][1]

    @intrinsic
    def row_mapped(typingctx, x, row0, given):
        def codegen(context, builder, sig, args):
            row0, inner = as_i32(builder, args[1]), scalar(scalar, types.int32, sig.args[2])
            values = zip(unpack(builder, args[0], len(regs.rows)), regs.rows, strict=True)
            new = [
                context.compile_internal(builder, fn, inner, [v, builder.add(row0, i32(r)), args[2]]) for v, r in values
            ]
            return context.make_tuple(builder, sig.return_type, new)

        return regs.row_type(x, row0, given), codegen

    return row_mapped


def with_row(fn: Callable[..., Any], regs: Registers) -> Any:
    """(tile, x, context) -> fn(element, x of its row, context)."""
    scalar = FLOATS[regs.acc][1]

    @intrinsic
    def with_row(typingctx, tile, x, given):
        def codegen(context, builder, sig, args):
            tile, x = unpack(builder, args[0], regs.size), unpack(builder, args[1], len(regs.rows))
            inner = scalar(scalar, scalar, sig.args[2])
            new = [context.compile_internal(builder, fn, inner, [tile[e], x[a], args[2]]) for e, a, _ in regs]
            return context.make_tuple(builder, sig.return_type, new)

        return regs.type(tile, x, given), codegen

    return with_row


def with_rows(fn: Callable[..., Any], regs: Registers) -> Any:
    """(tile, x, y) -> fn(element, x of its row, y of its row)."""
    scalar = FLOATS[regs.acc][1]

    @intrinsic
    def with_rows(typingctx, tile, x, y):
        def codegen(context, builder, sig, args):
            tile, x, y = (unpack(builder, a, n) for a, n in zip(args, (regs.size, *[len(regs.rows)] * 2), strict=True))
            inner = scalar(scalar, scalar, scalar)
            new = [context.compile_internal(builder, fn, inner, [tile[e], x[a], y[a]]) for e, a, _ in regs]
            return context.make_tuple(builder, sig.return_type, new)

        return regs.type(tile, x, y), codegen

    return with_rows


def _by_row(regs: Registers, combine: Callable[[Any, Any, Any], Any]) -> Any:
    @intrinsic
    def by_row(typingctx, tile):
        def codegen(context, builder, sig, args):
            tile, n = unpack(builder, args[0], regs.size), len(regs.cols)
            new = []
            for a in range(len(regs.rows)):
                parts = tile[a * n : (a + 1) * n]
                while len(parts) > 1:  # a tree: short chains, and always the same order
                    pairs = [combine(builder, x, y) for x, y in zip(parts[::2], parts[1::2], strict=False)]
                    parts = pairs + parts[len(parts) & ~1 :]
                new.append(parts[0])
            for lanes in regs.partners:
                new = [combine(builder, x, shuffle_xor(builder, x, lanes)) for x in new]
            return context.make_tuple(builder, sig.return_type, new)

        return regs.row_type(tile), codegen

    return by_row


@cache
def row_max(regs: Registers) -> Any:
    """(tile) -> the largest of each row, in every lane that has a part of it."""
    return _by_row(regs, maximum)


@cache
def row_sum(regs: Registers) -> Any:
    """(tile) -> the sum of each row."""
    return _by_row(regs, lambda builder, x, y: builder.fadd(x, y))
