"""The two products of register tiles, by FMAs and by tensor cores: see tile.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import ir

from .code import (
    FLOAT,
    FLOATS,
    I8,
    I32,
    SIZE,
    VECTOR,
    as_i32,
    asm,
    fma,
    i64,
    load_vector,
    looped,
    shared,
    shared_address,
    unpack,
    warp_asm,
)
from .compile import intrinsic, types
from .tile import Registers


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
    r = warp_asm(builder, four, text, "=r,=r,=r,=r,r,~{memory}", [at], True)
    return unpack(builder, r, 4)


def _add_mma(builder: Any, storage: str, a: Sequence[Any], b: Sequence[Any], sums: list[Any], at: list[int]) -> None:
    """Add a product of fragments to the sums `at`: 32 bytes of each row of A and B, 16 halves or 8 float32 rounded to
    tf32."""
    shape, kind = ("m16n8k8", "tf32") if storage == "f32" else ("m16n8k16", storage)
    text = (
        f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    four = ir.LiteralStructType([FLOAT] * 4)
    r = warp_asm(builder, four, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [*a, *b, *(sums[e] for e in at)], False)
    for e, x in zip(at, unpack(builder, r, 4), strict=True):
        sums[e] = x


def _rounded(builder: Any, storage: str, words: Sequence[Any]) -> list[Any]:
    """Words of a fragment as mma wants them: float32 rounded to nearest tf32, where it would cut the bits off."""
    if storage != "f32":
        return list(words)
    return [asm(builder, I32, "cvt.rna.tf32.f32 $0, $1;", "=r,f", [builder.bitcast(w, FLOAT)]) for w in words]


def pack_pair(builder: Any, storage: str, low: Any, high: Any) -> Any:
    """Two float32 as halves in 32 bits."""
    return asm(builder, I32, f"cvt.rn.{storage}x2.f32 $0, $2, $1;", "=r,f,f", [low, high])


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
                            _add_mma(builder, storage, rows[m], pair[2 * half :][:2], acc, _fragment(regs, m, n + half))
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
                            _add_mma(
                                builder, storage, weights[m], four[2 * half :][:2], o, _fragment(regs, m, n + half)
                            )
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
                        _add_mma(builder, "f32", weights[m], values, o, _fragment(regs, m, n))
            return context.make_tuple(builder, sig.return_type, o)

        return regs.type(o, p, b), codegen

    return pb
