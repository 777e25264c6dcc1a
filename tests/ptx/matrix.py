"""Tensor cores: mma.m16n8k{4,8,16} with float32 sums, and ldmatrix.

A product is summed in float64, in order, and rounded once with the sum that comes in: how a GPU rounds inside is not
told by the manual.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import codes
from .arithmetic import LANES
from .codes import SHARED
from .memory import locate, note, tally
from .raw import as_float32, as_float64, bits_of_float32, read16, read32, read64, write32

F16, BF16, TF32 = range(len(codes.MATRICES))


@njit
def half(bits):  # type: ignore[no-untyped-def]
    """The number of a float16's bits."""
    sign, exponent, fraction = bits >> np.uint64(15), (bits >> np.uint64(10)) & np.uint64(31), bits & np.uint64(1023)
    if exponent == 0:
        value = np.float64(fraction) * 2.0**-24
        return -value if sign else value
    wide = np.uint64(2047) if exponent == 31 else exponent + np.uint64(1023 - 15)
    return as_float64((sign << np.uint64(63)) | (wide << np.uint64(52)) | (fraction << np.uint64(42)))


@njit
def element(kind, register, n):  # type: ignore[no-untyped-def]
    """Number n of a register of 32 bits. The low 13 bits of a tf32 are not looked at."""
    if kind == TF32:
        return np.float64(as_float32(np.uint32(register & np.uint64(0xFFFFE000))))
    bits = (register >> np.uint64(16 * n)) & np.uint64(0xFFFF)
    if kind == F16:
        return half(bits)
    return np.float64(as_float32(np.uint32(bits << np.uint64(16))))


@njit
def multiply(one, file, pool):  # type: ignore[no-untyped-def]
    """mma (section 9.7.14.5): lane 4g + q has rows g and g + 8 of A, column g of B, and of both the numbers that
    follow each other along k, in pairs of 16 bits or alone."""
    kind, depth = one.row, one.count
    each = 1 if kind == TF32 else 2  # numbers in a register
    step = 4 * each  # along k, from a register to the next
    registers = depth // step
    a, b = np.empty((16, depth)), np.empty((depth, 8))
    first = one.list + 8
    for lane in range(LANES):
        group, member = lane // 4, lane % 4
        for r in range(registers):
            for half_of_rows in range(2):
                place = pool[first + 2 * (2 * r + half_of_rows)]
                register = read32(file + place + 4 * lane)
                for n in range(each):
                    a[group + 8 * half_of_rows, step * r + each * member + n] = element(kind, register, n)
            place = pool[first + 4 * registers + 2 * r]
            register = read32(file + place + 4 * lane)
            for n in range(each):
                b[step * r + each * member + n, group] = element(kind, register, n)
    d = np.zeros((16, 8))
    for i in range(16):
        for k in range(depth):
            x = a[i, k]
            for j in range(8):
                d[i, j] += x * b[k, j]
    sums = first + 6 * registers
    for lane in range(LANES):
        for n in range(4):
            row, column = lane // 4 + 8 * (n // 2), 2 * (lane % 4) + n % 2
            c = as_float32(np.uint32(read32(file + pool[sums + 2 * n] + 4 * lane)))
            d[row, column] += np.float64(c)
    for lane in range(LANES):  # behind all reads: a result may be an operand
        for n in range(4):
            row, column = lane // 4 + 8 * (n // 2), 2 * (lane % 4) + n % 2
            place, width = pool[one.list + 2 * n], pool[one.list + 2 * n + 1]
            write32(file + place + width * lane, np.uint64(bits_of_float32(np.float32(d[row, column]))))


@njit
def load_matrix(one, file, lanes, thread, machine):  # type: ignore[no-untyped-def]
    """ldmatrix (section 9.7.14.5.15): lane 8m + r has the address of row r of matrix m. Lane l gets two neighbours of
    row l / 4, or with .trans of column l / 4."""
    offsets = np.empty(LANES, np.int64)
    where = np.zeros(LANES, np.int64)
    for lane in range(8 * one.count):
        address = np.int64(read64(file + one.a + 8 * lane)) + one.offset
        place = locate(machine.memory, one.space, address, 16, False, thread, lane, one.statement)
        _, _, offsets[lane], where[lane] = place
        if where[lane] == 0:
            return
        note(machine.shadow, False, place, 16, thread, lane, one.statement)
    tally(machine.trail.traffic, one.statement, False, SHARED, offsets, (np.int64(1) << (8 * one.count)) - 1, 16)
    pool = machine.code.pool
    for m in range(one.count):
        register, width = pool[one.list + 2 * m], pool[one.list + 2 * m + 1]
        for lane in range(LANES):
            if (lanes >> lane) & 1:
                row, column = lane // 4, 2 * (lane % 4)
                if one.trans:
                    low, high = where[8 * m + column] + 2 * row, where[8 * m + column + 1] + 2 * row
                else:
                    low, high = where[8 * m + row] + 2 * column, where[8 * m + row] + 2 * column + 2
                write32(file + register + width * lane, read16(low) | (read16(high) << np.uint64(16)))
