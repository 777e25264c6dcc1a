"""Numbers at addresses of this process, for compiled code."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def _accessors(bits: int) -> tuple[Any, Any]:
    element = ir.IntType(bits)

    @intrinsic
    def read(typingctx, address):  # type: ignore[no-untyped-def]
        """An unsigned number of so many bits, as 64."""

        def codegen(context, b, signature, arguments):  # type: ignore[no-untyped-def]
            value = b.load(b.inttoptr(arguments[0], element.as_pointer()), align=1)
            return value if bits == 64 else b.zext(value, ir.IntType(64))

        return types.uint64(types.int64), codegen

    @intrinsic
    def write(typingctx, address, value):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, arguments):  # type: ignore[no-untyped-def]
            address, value = arguments
            value = value if bits == 64 else b.trunc(value, element)
            b.store(value, b.inttoptr(address, element.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.uint64), codegen

    return read, write


read8, write8 = _accessors(8)
read16, write16 = _accessors(16)
read32, write32 = _accessors(32)
read64, write64 = _accessors(64)


def _reinterpreted(source: Any, target: Any, kind: ir.Type) -> Any:
    """The same bits as a number of another type."""

    @intrinsic
    def view(typingctx, value):  # type: ignore[no-untyped-def]
        return target(source), lambda context, b, signature, arguments: b.bitcast(arguments[0], kind)

    return view


as_float32 = _reinterpreted(types.uint32, types.float32, ir.FloatType())
as_float64 = _reinterpreted(types.uint64, types.float64, ir.DoubleType())
bits_of_float32 = _reinterpreted(types.float32, types.uint32, ir.IntType(32))
bits_of_float64 = _reinterpreted(types.float64, types.uint64, ir.IntType(64))


@njit
def read(address, size):  # type: ignore[no-untyped-def]
    if size == 4:
        return read32(address)
    if size == 8:
        return read64(address)
    if size == 2:
        return read16(address)
    return read8(address)


@njit
def write(address, value, size):  # type: ignore[no-untyped-def]
    if size == 4:
        write32(address, value)
    elif size == 8:
        write64(address, value)
    elif size == 2:
        write16(address, value)
    else:
        write8(address, value)


@njit
def extended(value, size):  # type: ignore[no-untyped-def]
    """The bits of a signed number of `size` bytes, as 64."""
    if size == 8:
        return value
    sign = np.uint64(1) << np.uint64(8 * size - 1)
    return (value ^ sign) - sign
