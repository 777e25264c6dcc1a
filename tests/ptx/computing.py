"""The jump to a row of arithmetic.py's table: one function for all instructions that work lane by lane."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from .arithmetic import IR, TABLE, vector


def _load(b: Any, file: Any, at: Any, kind: str) -> Any:
    if kind == "pred":  # a bit for each lane
        bits = b.load(b.bitcast(b.gep(file, [at]), IR["b32"].as_pointer()), align=4)
        return b.bitcast(bits, vector(IR["pred"]))
    pointer = b.bitcast(b.gep(file, [at]), vector(IR[kind]).as_pointer())
    return b.load(pointer, align=4)


def _store(b: Any, file: Any, at: Any, kind: str, value: Any, lanes: Any) -> None:
    """The lanes that take part get the value, the others keep theirs."""
    old = _load(b, file, at, kind)
    value = b.select(lanes, value, old)
    pointer = b.gep(file, [at])
    if kind == "pred":
        b.store(b.bitcast(value, IR["b32"]), b.bitcast(pointer, IR["b32"].as_pointer()), align=4)
    else:
        b.store(value, b.bitcast(pointer, value.type.as_pointer()), align=4)


@intrinsic
def _jump(typingctx, row, file, places, lanes):  # type: ignore[no-untyped-def]
    def codegen(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        row, file, places, lanes = arguments
        result, *operands = (b.extract_value(places, n) for n in range(5))
        file = b.inttoptr(file, IR["b8"].as_pointer())
        taking_part = b.bitcast(b.trunc(lanes, IR["b32"]), vector(IR["pred"]))
        done = b.append_basic_block("done")
        switch = b.switch(row, done)
        for n, (name, one) in enumerate(TABLE.items()):
            block = b.append_basic_block(name)
            switch.add_case(ir.Constant(row.type, n), block)
            b.position_at_end(block)
            values = [_load(b, file, at, kind) for at, kind in zip(operands, one.operands, strict=False)]
            _store(b, file, result, one.result, one.build(b, *values), taking_part)
            b.branch(done)
        b.position_at_end(done)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, places, types.int64), codegen


def compiled(sources: str) -> CFunc:
    """`compute`, in Numba's cache on disk by the digest of all sources: it looks at this file alone. Its address is
    called, so that this much code is optimised once and not again in each function above it."""

    @cfunc("void(int64, int64, int64, int64, int64, int64, int64, int64)", cache=True)
    def compute(row, file, result, first, second, third, fourth, lanes):  # type: ignore[no-untyped-def]
        """A row of the table for a warp whose registers begin at the address `file`: operands and result are at these
        bytes of it, and the lanes are a bit each."""
        if len(sources):
            _jump(row, file, (result, first, second, third, fourth), lanes)

    return compute


@intrinsic
def compute(typingctx, address, row, file, places, lanes):  # type: ignore[no-untyped-def]
    """The compiled `compute` at an address. places: of the result and four operands."""

    def codegen(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        address, row, file, places, lanes = arguments
        rest = [row, file, *(b.extract_value(places, n) for n in range(5)), lanes]
        kind = ir.FunctionType(ir.VoidType(), [x.type for x in rest])
        b.call(b.inttoptr(address, kind.as_pointer()), rest)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, places, i64), codegen
