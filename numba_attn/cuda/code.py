"""Pieces of LLVM code for the kernels' instructions: constants, conversions, inline PTX, addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from .compile import cgutils, types

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


def asm(builder: Any, result: Any, text: str, constraints: str, args: Sequence[Any], *, effect: bool = False) -> Any:
    """Inline PTX. effect: it reads or writes memory, or must stay where it stands."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=effect), args)


def warp_asm(builder: Any, result: Any, text: str, constraints: str, args: Sequence[Any], effect: bool) -> Any:
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
    return warp_asm(builder, I32, text, "=r,r", [bits], True)


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
