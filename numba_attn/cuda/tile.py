"""Register tiles: what the kernels are made of.

A thread's part of a tile is a UniTuple of floats, which LLVM keeps in registers: no array is ever indexed by a number
that is not a constant, so nothing can land in local memory. Every operation is an @intrinsic that writes its unrolled
code; shared memory is addressed by 32-bit offsets from the block's dynamic shared memory, with the constant parts as
immediates of the instruction; global memory by 64-bit integers.

Two kinds of registers are known. `simt`: a thread has every RG-th row and every CG-th column (or vector of columns) and
multiplies with FMAs. `mma`: the accumulator fragments of mma.sync.m16n8k16. Both give the same two products, which are
all that attention needs:

    abt: s = A B', rows of A and of B in shared memory           (S = Q K', dP = dO V')
    pb:  o = alpha o + P B, P in registers, rows of B in shared  (O = P V, dQ = dS K, dV = P' dO, dK = dS' Q)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir

from .compile import cgutils, intrinsic, types

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
HALF, FLOAT, DOUBLE, VOID = ir.HalfType(), ir.FloatType(), ir.DoubleType(), ir.VoidType()

FLOATS = {"f32": (FLOAT, types.float32), "f64": (DOUBLE, types.float64)}
SIZE = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2}
VECTOR = 16  # bytes of a 128-bit access


def i32(n: int) -> ir.Constant:
    return ir.Constant(I32, n)


def i64(n: int) -> ir.Constant:
    return ir.Constant(I64, n)


# --- pieces of code ---------------------------------------------------------------------------------------------------


def unpack(builder: Any, value: Any, n: int) -> list[Any]:
    return [builder.extract_value(value, k) for k in range(n)]


def as_i32(builder: Any, value: Any) -> Any:
    """The low 32 bits of an integer."""
    width = value.type.width
    return value if width == 32 else builder.trunc(value, I32) if width > 32 else builder.zext(value, I32)


def as_i64(builder: Any, value: Any) -> Any:
    return value if value.type.width == 64 else builder.sext(value, I64)


def _asm(builder: Any, result: Any, text: str, constraints: str, args: Sequence[Any], *, effect: bool = False) -> Any:
    """Inline PTX; effect: it touches memory or must stay in its place."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=effect), args)


def _warp_asm(builder: Any, result: Any, text: str, constraints: str, args: Sequence[Any], effect: bool) -> Any:
    """Inline PTX that all lanes of a warp run together."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=effect), args, attrs=("convergent",))


def call_llvm(builder: Any, name: str, result: Any, args: Sequence[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_llvm(builder, f"llvm.fma.f{32 if a.type == FLOAT else 64}", a.type, [a, b, c])


def maximum(builder: Any, a: Any, b: Any) -> Any:
    """The larger, a number before NaN."""
    return call_llvm(builder, f"llvm.maxnum.f{32 if a.type == FLOAT else 64}", a.type, [a, b])


def shared(builder: Any, offset: Any, immediate: int, kind: Any) -> Any:
    """A pointer to the byte at offset + immediate of the block's shared memory."""
    name = "numba_attn_shared"
    base = builder.module.globals.get(name)
    if base is None:
        base = ir.GlobalVariable(builder.module, ir.ArrayType(I8, 0), name, addrspace=3)
        base.linkage, base.align = "external", VECTOR
    at = builder.gep(base, [i32(0), builder.zext(as_i32(builder, offset), I64)])
    if immediate:
        at = builder.gep(at, [i64(immediate)])
    return builder.bitcast(at, ir.PointerType(kind, 3))


def global_pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(as_i64(builder, address), ir.PointerType(kind, 1))


def load_vector(builder: Any, pointer: Any, immediate: int, kind: Any) -> list[Any]:
    """16 bytes of shared memory as floats, by one access. pointer: to bytes there."""
    n = VECTOR // (4 if kind == FLOAT else 8)
    at = builder.bitcast(builder.gep(pointer, [i64(immediate)]), ir.PointerType(ir.VectorType(kind, n), 3))
    vector = builder.load(at, align=VECTOR)
    return [builder.extract_element(vector, i32(k)) for k in range(n)]


def vector_of(builder: Any, values: Sequence[Any]) -> Any:
    vector = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for k, x in enumerate(values):
        vector = builder.insert_element(vector, x, i32(k))
    return vector


def shared_address(builder: Any, offset: Any) -> Any:
    """What inline PTX takes for a place in shared memory."""
    return builder.ptrtoint(shared(builder, offset, 0, I8), I32)


def shuffle_xor(builder: Any, x: Any, lanes: int) -> Any:
    if x.type == DOUBLE:
        bits = builder.bitcast(x, I64)
        halves = [builder.trunc(bits, I32), builder.trunc(builder.lshr(bits, i64(32)), I32)]
        low, high = (builder.zext(_shuffle(builder, h, lanes), I64) for h in halves)
        return builder.bitcast(builder.or_(low, builder.shl(high, i64(32))), DOUBLE)
    return builder.bitcast(_shuffle(builder, builder.bitcast(x, I32), lanes), x.type)


def _shuffle(builder: Any, bits: Any, lanes: int) -> Any:
    text = f"shfl.sync.bfly.b32 $0, $1, {lanes}, 31, -1;"
    return _warp_asm(builder, I32, text, "=r,r", [bits], True)


def looped(builder: Any, n: int, values: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """values = body(k, values) for k in range(n): the loop carries them in registers.

    Pointers into shared memory are carried too: as a sum of 32-bit offsets, each access of an unrolled loop would
    widen and add its own.
    """
    cells = [cgutils.alloca_once_value(builder, v) for v in values]
    with cgutils.for_range(builder, i32(n), intp=I32) as loop:
        new = body(loop.index, [builder.load(c) for c in cells])
        for c, v in zip(cells, new, strict=True):
            builder.store(v, c)
    return [builder.load(c) for c in cells]


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


# --- the two products -------------------------------------------------------------------------------------------------


@cache
def simt_abt(regs: Registers, bytes_wide: int, a_stride: int, b_stride: int) -> Any:
    """(a, b) -> A B': a and b are the offsets of the thread's own row of A and of B; rows are bytes_wide long."""
    kind, _ = FLOATS[regs.acc]

    @intrinsic
    def abt(typingctx, a, b):
        def codegen(context, builder, sig, args):
            rows = [shared(builder, x, 0, I8) for x in args]

            def step(k, carried):
                a, b, *acc = carried
                columns = [load_vector(builder, b, c * b_stride, kind) for c in regs.cols]
                for r, row in enumerate(regs.rows):
                    x = load_vector(builder, a, row * a_stride, kind)
                    for u in range(len(x)):
                        for c, y in enumerate(columns):
                            e = r * len(columns) + c
                            acc[e] = fma(builder, x[u], y[u], acc[e])
                return [*(builder.gep(x, [i64(VECTOR)]) for x in (a, b)), *acc]

            _, _, *acc = looped(builder, bytes_wide // VECTOR, rows + [ir.Constant(kind, 0.0)] * regs.size, step)
            return context.make_tuple(builder, sig.return_type, acc)

        return regs.type(a, b), codegen

    return abt


@cache
def simt_store_p(regs: Registers, stride: int) -> Any:
    """(p, offset): P to shared memory. offset: of the thread's corner."""
    size, kind = SIZE[regs.acc], FLOATS[regs.acc][0]

    @intrinsic
    def store_p(typingctx, p, offset):
        def codegen(context, builder, sig, args):
            p, at = unpack(builder, args[0], regs.size), as_i32(builder, args[1])
            for e, a, c in regs:
                pointer = shared(builder, at, regs.rows[a] * stride + regs.cols[c] * size, kind)
                builder.store(p[e], pointer, align=size)
            return context.get_dummy_value()

        return types.void(p, offset), codegen

    return store_p


@cache
def simt_pb(regs: Registers, keys: int, p_stride: int, b_stride: int, chunk: int) -> Any:
    """(o, alpha, p, b) -> alpha o + P B. p is the offset of the thread's first row of P, b that of its first vector in
    row 0 of B, which has `keys` rows; regs are those of o.

    The product is summed from zero and meets o once: a two-level sum is some ten times as accurate over thousands of
    keys. `chunk` columns at a time, so that this costs few registers.
    """
    kind, _ = FLOATS[regs.acc]
    vec = VECTOR // SIZE[regs.acc]

    @intrinsic
    def pb(typingctx, o, alpha, p, b):
        def codegen(context, builder, sig, args):
            o, alpha = unpack(builder, args[0], regs.size), unpack(builder, args[1], len(regs.rows))
            rows = [shared(builder, x, 0, I8) for x in args[2:]]
            for first in range(0, len(regs.cols), chunk):
                starts = regs.cols[first : first + chunk : vec]

                def step(k, carried, starts=starts):
                    p, b, *acc = carried
                    weights = [load_vector(builder, p, r * p_stride, kind) for r in regs.rows]
                    for u in range(vec):
                        for v, start in enumerate(starts):
                            values = load_vector(builder, b, u * b_stride + start * SIZE[regs.acc], kind)
                            for r, w in enumerate(weights):
                                for c, y in enumerate(values):
                                    e = (r * len(starts) + v) * vec + c
                                    acc[e] = fma(builder, w[u], y, acc[e])
                    return [builder.gep(p, [i64(VECTOR)]), builder.gep(b, [i64(vec * b_stride)]), *acc]

                n = len(regs.rows) * len(starts) * vec
                _, _, *acc = looped(builder, keys // vec, rows + [ir.Constant(kind, 0.0)] * n, step)
                for r in range(len(regs.rows)):
                    for c in range(len(starts) * vec):
                        e = r * len(regs.cols) + first + c
                        o[e] = fma(builder, o[e], alpha[r], acc[r * len(starts) * vec + c])
            return context.make_tuple(builder, sig.return_type, o)

        return regs.type(o, alpha, p, b), codegen

    return pb


def _ldmatrix(builder: Any, offset: Any, immediate: int, transposed: bool) -> list[Any]:
    """The immediate is part of the text: as a sum it would be moved out of the loop over keys, a register each."""
    trans = ".trans" if transposed else ""
    text = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0,$1,$2,$3}}, [$4+{immediate}];"
    four = ir.LiteralStructType([I32] * 4)
    at = shared_address(builder, offset)
    r = _warp_asm(builder, four, text, "=r,=r,=r,=r,r,~{memory}", [at], True)
    return unpack(builder, r, 4)


def _mma(builder: Any, storage: str, a: Sequence[Any], b: Sequence[Any], c: Sequence[Any]) -> list[Any]:
    """One product of fragments: 32 bytes of each row of A and B, 16 halves or 8 float32 rounded to tf32."""
    shape, kind = ("m16n8k8", "tf32") if storage == "f32" else ("m16n8k16", storage)
    text = (
        f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    four = ir.LiteralStructType([FLOAT] * 4)
    r = _warp_asm(builder, four, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [*a, *b, *c], False)
    return unpack(builder, r, 4)


def _rounded(builder: Any, storage: str, words: Sequence[Any]) -> list[Any]:
    """Words of a fragment as mma wants them: float32 rounded to nearest tf32, where it would cut the bits off."""
    if storage != "f32":
        return list(words)
    return [_asm(builder, I32, "cvt.rna.tf32.f32 $0, $1;", "=r,f", [builder.bitcast(w, FLOAT)]) for w in words]


def pack_pair(builder: Any, storage: str, low: Any, high: Any) -> Any:
    """Two float32 as halves in 32 bits."""
    return _asm(builder, I32, f"cvt.rn.{storage}x2.f32 $0, $2, $1;", "=r,f,f", [low, high])


def _fragment(regs: Registers, m: int, n: int) -> list[int]:
    """The elements of accumulator fragment (m, n), in mma's order."""
    wide = len(regs.cols)
    return [(2 * m + half) * wide + 2 * n + k for half in range(2) for k in range(2)]


@cache
def mma_abt(regs: Registers, storage: str, bytes_wide: int, a_stride: int, b_stride: int) -> Any:
    """(a, b) -> A B' with the tensor cores. a and b: where the lane's ldmatrix rows start (see `mma_corner`)."""
    m_tiles, n_tiles = len(regs.rows) // 2, len(regs.cols) // 2

    @intrinsic
    def abt(typingctx, a, b):
        def codegen(context, builder, sig, args):
            at_a, at_b = (as_i32(builder, x) for x in args)
            acc = [ir.Constant(FLOAT, 0.0)] * regs.size
            for k in range(bytes_wide // 32):
                fragments = [_ldmatrix(builder, at_a, 16 * m * a_stride + 32 * k, False) for m in range(m_tiles)]
                rows = [_rounded(builder, storage, f) for f in fragments]
                for n in range(0, n_tiles, 2):
                    pair = _rounded(builder, storage, _ldmatrix(builder, at_b, 8 * n * b_stride + 32 * k, False))
                    for m in range(m_tiles):
                        for half in range(2):
                            at = _fragment(regs, m, n + half)
                            new = _mma(builder, storage, rows[m], pair[2 * half : 2 * half + 2], [acc[e] for e in at])
                            for e, x in zip(at, new, strict=True):
                                acc[e] = x
            return context.make_tuple(builder, sig.return_type, acc)

        return regs.type(a, b), codegen

    return abt


@cache
def mma_pb(regs: Registers, p_regs: Registers, storage: str, b_stride: int) -> Any:
    """(o, p, b) -> o + P B with the tensor cores, P rounded to halves."""
    m_tiles, n_tiles, k_tiles = len(regs.rows) // 2, len(regs.cols) // 2, len(p_regs.cols) // 4

    @intrinsic
    def pb(typingctx, o, p, b):
        def codegen(context, builder, sig, args):
            o, p = unpack(builder, args[0], regs.size), unpack(builder, args[1], p_regs.size)
            at_b = as_i32(builder, args[2])
            for k in range(k_tiles):
                weights = []
                for m in range(m_tiles):  # two accumulator fragments side by side are one A fragment
                    low, high = _fragment(p_regs, m, 2 * k), _fragment(p_regs, m, 2 * k + 1)
                    pairs = [(f[h], f[h + 1]) for f in (low, high) for h in (0, 2)]
                    weights.append([pack_pair(builder, storage, p[x], p[y]) for x, y in pairs])
                for n in range(0, n_tiles, 2):
                    four = _ldmatrix(builder, at_b, 16 * k * b_stride + 16 * n, True)
                    for m in range(m_tiles):
                        for half in range(2):
                            at = _fragment(regs, m, n + half)
                            values = four[2 * half : 2 * half + 2]
                            new = _mma(builder, storage, weights[m], values, [o[e] for e in at])
                            for e, x in zip(at, new, strict=True):
                                o[e] = x
            return context.make_tuple(builder, sig.return_type, o)

        return regs.type(o, p, b), codegen

    return pb


@cache
def tf32_pb(regs: Registers, p_regs: Registers, b_stride: int) -> Any:
    """(o, p, b) -> o + P B with the tensor cores, float32 rounded to tf32. b: where the lane's first number lies.

    A lane holds columns 2q and 2q + 1 of P, where an A fragment wants q and q + 4: so the rows of B are taken in that
    order too, and the sum is the same.
    """
    m_tiles, n_tiles, k_tiles = len(regs.rows) // 2, len(regs.cols) // 2, len(p_regs.cols) // 2

    @intrinsic
    def pb(typingctx, o, p, b):
        def codegen(context, builder, sig, args):
            o, p = unpack(builder, args[0], regs.size), unpack(builder, args[1], p_regs.size)
            at_b = as_i32(builder, args[2])
            for k in range(k_tiles):
                weights = []
                for m in range(m_tiles):
                    low0, low1, high0, high1 = (builder.bitcast(p[e], I32) for e in _fragment(p_regs, m, k))
                    weights.append(_rounded(builder, "f32", [low0, high0, low1, high1]))
                for n in range(n_tiles):
                    places = [shared(builder, at_b, (8 * k + r) * b_stride + 32 * n, I32) for r in (0, 1)]
                    values = _rounded(builder, "f32", [builder.load(x, align=4) for x in places])
                    for m in range(m_tiles):
                        at = _fragment(regs, m, n)
                        new = _mma(builder, "f32", weights[m], values, [o[e] for e in at])
                        for e, x in zip(at, new, strict=True):
                            o[e] = x
            return context.make_tuple(builder, sig.return_type, o)

        return regs.type(o, p, b), codegen

    return pb


# --- scalars: what a thread does alone --------------------------------------------------------------------------------


def _scalar(result: Any, code: Callable[..., Any], n: int) -> Any:
    """An intrinsic of n arguments of any types: code(builder, *args)."""

    def codegen(context, builder, sig, args):
        value = code(builder, *args)
        return context.get_dummy_value() if sig.return_type == types.void else value

    if n == 0:

        @intrinsic
        def scalar(typingctx):
            return result(), codegen

    elif n == 1:

        @intrinsic
        def scalar(typingctx, a):
            return result(a), codegen

    elif n == 2:

        @intrinsic
        def scalar(typingctx, a, b):
            return result(a, b), codegen

    else:

        @intrinsic
        def scalar(typingctx, a, b, c):
            return result(a, b, c), codegen

    return scalar


@cache
def warp_sum(acc: str) -> Any:
    """(x) -> the sum over the warp, in every lane."""

    def code(builder, x):
        for lanes in (16, 8, 4, 2, 1):
            x = builder.fadd(x, shuffle_xor(builder, x, lanes))
        return x

    return _scalar(FLOATS[acc][1], code, 1)


def _special(name: str) -> Any:
    return _scalar(types.int32, lambda builder: call_llvm(builder, f"llvm.nvvm.read.ptx.sreg.{name}", I32, []), 0)


def _ints(operation: str) -> Any:
    """An operation of 32-bit integers: Numba's own would make them 64 bits wide."""
    return _scalar(
        types.int32, lambda builder, a, b: getattr(builder, operation)(as_i32(builder, a), as_i32(builder, b)), 2
    )


thread, block = _special("tid.x"), _special("ctaid.x")
add, sub, mul, udiv, urem, bit_and, bit_or = map(_ints, ("add", "sub", "mul", "udiv", "urem", "and_", "or_"))
shift_left = _ints("shl")
narrow = _scalar(types.int32, lambda builder, a: as_i32(builder, a), 1)
# (x) -> x, of which LLVM knows nothing: what follows from it is computed where it stands, not before the loop, where it
# would take registers through all of it.
opaque = _scalar(
    types.int32, lambda builder, x: _asm(builder, I32, "mov.b32 $0, $1;", "=r,r", [as_i32(builder, x)], effect=True), 1
)
inside = _scalar(  # low <= x < high, of 32-bit integers
    types.boolean,
    lambda builder, x, low, high: builder.and_(
        builder.icmp_signed(">=", as_i32(builder, x), as_i32(builder, low)),
        builder.icmp_signed("<", as_i32(builder, x), as_i32(builder, high)),
    ),
    3,
)
sync = _scalar(types.void, lambda builder: call_llvm(builder, "llvm.nvvm.barrier0", VOID, []), 0)
sync_warp = _scalar(types.void, lambda builder: _warp_asm(builder, VOID, "bar.warp.sync -1;", "~{memory}", [], True), 0)
commit = _scalar(types.void, lambda b: _asm(b, VOID, "cp.async.commit_group;", "~{memory}", [], effect=True), 0)
wait_all = _scalar(types.void, lambda b: _asm(b, VOID, "cp.async.wait_group 0;", "~{memory}", [], effect=True), 0)


def _copy_async(builder, size, to, offset, address, there):
    """`size` bytes, 0 if they are not there; whole vectors past the first cache, where nobody would find them again."""
    text = f"cp.async.{'cg' if size == VECTOR else 'ca'}.shared.global [$0+{offset}], [$1], {size}, $2;"
    there = builder.select(there, i32(size), i32(0))
    _asm(builder, VOID, text, "r,l,r,~{memory}", [to, address, there], effect=True)


@cache
def copy_rows(rows: int, per_pass: int, stride: int) -> Any:
    """(to, address, step, row, valid): 16 bytes of rows row, row + per_pass, ... below `rows`, from address, address +
    step, ... to shared memory at to, to + per_pass * stride, ...; 0 for rows from `valid` on. Asynchronous.

    Places in shared memory are immediates, and addresses a running sum: as loop invariants they would take a register
    or two each.
    """

    @intrinsic
    def copy_rows(typingctx, to, address, step, row, valid):
        def codegen(context, builder, sig, args):
            to = shared_address(builder, as_i32(builder, args[0]))
            address, step = as_i64(builder, args[1]), as_i64(builder, args[2])
            row, valid = as_i32(builder, args[3]), as_i32(builder, args[4])
            for n in range(0, rows, per_pass):
                there = builder.icmp_signed("<", builder.add(row, i32(n)), valid)
                if n + per_pass > rows:  # the last pass may be short
                    with builder.if_then(builder.icmp_signed("<", row, i32(rows - n))):
                        _copy_async(builder, VECTOR, to, n * stride, address, there)
                else:
                    _copy_async(builder, VECTOR, to, n * stride, address, there)
                address = builder.add(address, step)
            return context.get_dummy_value()

        return types.void(to, address, step, row, valid), codegen

    return copy_rows


@cache
def copy_async(size: int) -> Any:
    """(to, address, there): 4, 8 or 16 bytes from global to shared memory, 0 if they are not there. Asynchronous."""

    def code(builder, to, address, there):
        _copy_async(builder, size, shared_address(builder, as_i32(builder, to)), 0, address, there)

    return _scalar(types.void, code, 3)


def _any_lane(builder, flag):
    kind = ir.LiteralStructType([I32, I1])
    name = "llvm.nvvm.vote.sync"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [I32, I32, I1]), name)
    call = builder.call(function, [i32(-1), i32(1), flag], attrs=("convergent",))
    return builder.extract_value(call, 1)


any_lane = _scalar(types.boolean, _any_lane, 1)  # (flag) -> whether it is set in any lane of the warp: all of them ask


def _exp2(builder, x):
    return _asm(builder, FLOAT, "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x])


fast_reciprocal = _scalar(  # off by a rounding at most; LLVM's division takes ten instructions and a branch
    types.float32, lambda builder, x: _asm(builder, FLOAT, "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x]), 1
)
fast_exp2 = _scalar(types.float32, _exp2, 1)
fast_log2 = _scalar(types.float32, lambda builder, x: _asm(builder, FLOAT, "lg2.approx.f32 $0, $1;", "=f,f", [x]), 1)


@intrinsic
def choose(typingctx, condition, yes, no):
    def codegen(context, builder, sig, args):
        return builder.select(*args)

    return yes(condition, yes, no), codegen


@intrinsic
def with_sign_of(typingctx, x, y):
    """|x| with the sign of y, float32: one instruction, where a comparison and a choice take two and a predicate."""

    def codegen(context, builder, sig, args):
        magnitude, sign = (builder.bitcast(a, I32) for a in args)
        bits = builder.or_(builder.and_(magnitude, i32(0x7FFFFFFF)), builder.and_(sign, i32(0x80000000)))
        return builder.bitcast(bits, FLOAT)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def multiply_add(typingctx, a, b, c):
    def codegen(context, builder, sig, args):
        return fma(builder, *args)

    return a(a, a, a), codegen


def _load_words(builder, offset):
    """Four int32 of shared memory, by one access."""
    vector = builder.load(shared(builder, offset, 0, ir.VectorType(I32, 4)), align=VECTOR)
    return [builder.extract_element(vector, i32(k)) for k in range(4)]


@intrinsic
def load_row(typingctx, offset):
    def codegen(context, builder, sig, args):
        return context.make_tuple(builder, sig.return_type, _load_words(builder, args[0]))

    return types.UniTuple(types.int32, 4)(offset), codegen


@intrinsic
def store_row(typingctx, offset, a, b, c, d):
    def codegen(context, builder, sig, args):
        words = [as_i32(builder, x) for x in args[1:]]
        pointer = shared(builder, args[0], 0, ir.VectorType(I32, 4))
        builder.store(vector_of(builder, words), pointer, align=VECTOR)
        return context.get_dummy_value()

    return types.void(offset, a, b, c, d), codegen


load_word = _scalar(types.int32, lambda builder, offset: builder.load(shared(builder, offset, 0, I32), align=4), 1)
store_word = _scalar(
    types.void,
    lambda builder, offset, x: builder.store(as_i32(builder, x), shared(builder, offset, 0, I32), align=4),
    2,
)


def _atomic(operation):
    return _scalar(
        types.void,
        lambda builder, offset, x: builder.atomic_rmw(
            operation, shared(builder, offset, 0, I32), as_i32(builder, x), "monotonic"
        ),
        2,
    )


shared_min, shared_max, shared_or = _atomic("min"), _atomic("max"), _atomic("or")
load_i64 = _scalar(types.int64, lambda builder, a: builder.load(global_pointer(builder, a, I64), align=8), 1)
load_byte = _scalar(
    types.int32, lambda builder, a: builder.zext(builder.load(global_pointer(builder, a, I8), align=1), I32), 1
)


def widen(builder: Any, storage: str, bits: Any) -> Any:
    """A half, as an integer, as float32."""
    if storage == "bf16":
        return builder.bitcast(builder.shl(builder.zext(bits, I32), i32(16)), FLOAT)
    return _asm(builder, FLOAT, "cvt.f32.f16 $0, $1;", "=f,h", [bits])


def narrowed(builder: Any, storage: str, x: Any) -> Any:
    """A float32 as a half, as an integer."""
    return _asm(builder, I16, f"cvt.rn.{storage}.f32 $0, $1;", "=h,f", [x])


def _to(builder: Any, x: Any, kind: Any) -> Any:
    if x.type == kind:
        return x
    return builder.fpext(x, kind) if kind == DOUBLE else builder.fptrunc(x, kind)


def _read(builder: Any, pointer_of: Callable[[Any], Any], storage: str, acc: str) -> Any:
    kind = FLOATS[acc][0]
    if storage in FLOATS:
        x = builder.load(pointer_of(FLOATS[storage][0]), align=SIZE[storage])
    else:
        x = widen(builder, storage, builder.load(pointer_of(I16), align=2))
    return _to(builder, x, kind)


def _write(builder: Any, pointer_of: Callable[[Any], Any], storage: str, x: Any) -> None:
    if storage in FLOATS:
        builder.store(_to(builder, x, FLOATS[storage][0]), pointer_of(FLOATS[storage][0]), align=SIZE[storage])
    else:
        builder.store(narrowed(builder, storage, _to(builder, x, FLOAT)), pointer_of(I16), align=2)


@cache
def load_global(storage: str, acc: str) -> Any:
    """(address) -> one number of type `storage` as `acc`."""

    def code(builder, address):
        return _read(builder, lambda kind: global_pointer(builder, address, kind), storage, acc)

    return _scalar(FLOATS[acc][1], code, 1)


@cache
def store_global(storage: str) -> Any:
    """(address, x)"""

    def code(builder, address, x):
        _write(builder, lambda kind: global_pointer(builder, address, kind), storage, x)

    return _scalar(types.void, code, 2)


@cache
def load_shared(storage: str, acc: str) -> Any:
    def code(builder, offset):
        return _read(builder, lambda kind: shared(builder, offset, 0, kind), storage, acc)

    return _scalar(FLOATS[acc][1], code, 1)


@cache
def store_shared(storage: str) -> Any:
    def code(builder, offset, x):
        _write(builder, lambda kind: shared(builder, offset, 0, kind), storage, x)

    return _scalar(types.void, code, 2)


@cache
def copy_element(size: int) -> Any:
    """(to, address, there): one element from global to shared memory, 0 if it is not there."""
    kind = {2: I16, 4: I32, 8: I64}[size]

    def code(builder, to, address, there):
        cell = cgutils.alloca_once_value(builder, ir.Constant(kind, 0))
        with builder.if_then(there):
            builder.store(builder.load(global_pointer(builder, address, kind), align=size), cell)
        builder.store(builder.load(cell), shared(builder, to, 0, kind), align=size)

    return _scalar(types.void, code, 3)


@cache
def copy_out(size: int) -> Any:
    """(address, offset): `size` bytes from shared to global memory."""
    kind = ir.VectorType(I32, 4) if size == VECTOR else {2: I16, 4: I32, 8: I64}[size]

    def code(builder, address, offset):
        x = builder.load(shared(builder, offset, 0, kind), align=size)
        builder.store(x, global_pointer(builder, address, kind), align=size)

    return _scalar(types.void, code, 2)


@cache
def finite_vector(storage: str) -> Any:
    """(offset) -> whether 16 bytes of shared memory hold finite numbers only."""
    exponent = {"f32": 0x7F800000, "f64": 0x7FF00000, "f16": 0x7C00, "bf16": 0x7F80}[storage]

    def code(builder, offset):
        words = _load_words(builder, offset)
        ok = ir.Constant(I1, 1)
        for word in words[1::2] if storage == "f64" else words:
            for shift in (0, 16) if SIZE[storage] == 2 else (0,):
                mask = i32(exponent << shift)
                ok = builder.and_(ok, builder.icmp_unsigned("!=", builder.and_(word, mask), mask))
        return ok

    return _scalar(types.boolean, code, 1)


@cache
def repair_vector(storage: str) -> Any:
    """(offset) -> a bit for each number in 16 bytes of shared memory that is not finite; it becomes 0 there."""
    exponent = {"f32": 0x7F800000, "f64": 0x7FF00000, "f16": 0x7C00, "bf16": 0x7F80}[storage]

    def code(builder, offset):
        words = _load_words(builder, offset)
        found = i32(0)
        for n in range(VECTOR // SIZE[storage]):
            low = n * SIZE[storage] // 4  # the number's first word
            shift, keep = (16 * (n % 2), 0xFFFF0000 >> 16 * (n % 2)) if SIZE[storage] == 2 else (0, 0)
            mask = i32(exponent << shift)
            top = words[low + (storage == "f64")]
            bad = builder.icmp_unsigned("==", builder.and_(top, mask), mask)
            found = builder.or_(found, builder.select(bad, i32(1 << n), i32(0)))
            for w in range(low, low + max(1, SIZE[storage] // 4)):
                words[w] = builder.select(bad, builder.and_(words[w], i32(keep)), words[w])
        builder.store(vector_of(builder, words), shared(builder, offset, 0, ir.VectorType(I32, 4)), align=VECTOR)
        return found

    return _scalar(types.int32, code, 1)


@cache
def store_tile(regs: Registers, storage: str, stride: int, vector: int) -> Any:
    """(tile, offset): the tile to shared memory, `vector` neighbouring columns by one access. offset: of the thread's
    corner."""
    size = SIZE[storage]

    @intrinsic
    def store_tile(typingctx, tile, offset):
        def codegen(context, builder, sig, args):
            tile = unpack(builder, args[0], regs.size)
            for a, row in enumerate(regs.rows):
                for c in range(0, len(regs.cols), vector):
                    at = row * stride + regs.cols[c] * size
                    part = tile[a * len(regs.cols) + c : a * len(regs.cols) + c + vector]
                    if storage in FLOATS:
                        x = vector_of(builder, part)
                    else:
                        x = pack_pair(builder, storage, *part)
                    builder.store(x, shared(builder, args[1], at, x.type), align=vector * size)
            return context.get_dummy_value()

        return types.void(tile, offset), codegen

    return store_tile
