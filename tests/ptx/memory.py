"""State spaces: where an address is, what may not be accessed, loads, stores, atomics and asynchronous copies.

Global memory is the process's own: allocation n has the addresses from (n + 1) << 36, so an access before or behind
it, or in one that was freed, is seen. Every access is checked for its alignment and bounds; the first that fails stops
the launch. Races are written down (races.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from . import codes, races, traffic
from .arithmetic import LANES
from .codes import ALLOCATION_BITS, GENERIC, GLOBAL, LOCAL, LOCAL_WINDOW, SHARED, SHARED_WINDOW
from .raw import (
    as_float32,
    as_float64,
    bits_of_float32,
    bits_of_float64,
    extended,
    read,
    read32,
    read64,
    write,
    write64,
)


class Memory(NamedTuple):
    """Addresses of this process. shared, local: of the first block's and thread's, `..._stride` apart. bases, sizes,
    frozen: of each allocation of global memory; a freed one has no base. fault: what stopped the launch: kind,
    statement, warp, lane, space, number of the allocation, offset or address, bytes."""

    shared: int
    shared_bytes: int
    shared_stride: int
    local: int
    local_bytes: int
    local_stride: int
    bases: np.ndarray
    sizes: np.ndarray
    frozen: np.ndarray
    fault: np.ndarray


class Thread(NamedTuple):
    """Who accesses: place of the warp among those that are resident, of its block, of its first thread in the block
    and in the grid; the block's threads; barriers so far."""

    warp: int
    block: int
    first: int
    first_in_grid: int
    block_threads: int
    warp_barriers: int
    block_barriers: int


@njit
def fail(memory, kind, statement, warp, lane, access=(0, 0, 0, 0)):  # type: ignore[no-untyped-def]
    """access: space, number of the allocation, offset, bytes."""
    fault = memory.fault
    if fault[0] == codes.FINE:
        fault[0], fault[1], fault[2], fault[3] = kind, statement, warp, lane
        fault[4], fault[5], fault[6], fault[7] = access


@njit
def locate(memory, space, address, nbytes, writes, thread, lane, statement):  # type: ignore[no-untyped-def]
    """Space, number of the allocation, offset, and where the bytes are in this process: 0 if they may not be used."""
    if space == GENERIC:
        if address >= SHARED_WINDOW:
            space, address = SHARED, address - SHARED_WINDOW
        elif address >= LOCAL_WINDOW:
            space, address = LOCAL, address - LOCAL_WINDOW
        else:
            space = GLOBAL
    number, offset, size, base = 0, address, memory.shared_bytes, memory.shared + thread.block * memory.shared_stride
    if space == LOCAL:
        size = memory.local_bytes
        base = memory.local + (LANES * thread.warp + lane) * memory.local_stride
    elif space == GLOBAL:
        number, offset = (address >> ALLOCATION_BITS) - 1, address & ((1 << ALLOCATION_BITS) - 1)
    kind = codes.FINE
    if offset & (nbytes - 1):
        kind = codes.MISALIGNED
    elif space == GLOBAL:
        if number < 0 or number >= memory.sizes.size:
            kind, offset = codes.WILD, address
        else:
            size, base = memory.sizes[number], memory.bases[number]
            if base == 0:
                kind = codes.FREED
            elif writes and memory.frozen[number]:
                kind = codes.READ_ONLY
    if kind == codes.FINE and (offset < 0 or offset + nbytes > size):
        kind = codes.OUTSIDE
    if kind != codes.FINE:
        fail(memory, kind, statement, thread.warp, lane, (space, number, offset, nbytes))
        return space, number, offset, np.int64(0)
    return space, number, offset, np.int64(base + offset)


@njit
def clock(thread, lane):  # type: ignore[no-untyped-def]
    """The word that races.py keeps of an access of shared memory."""
    return races.now(thread.first + lane, thread.warp_barriers, thread.block_barriers)


@njit
def note(shadow, writes, place, nbytes, thread, lane, statement):  # type: ignore[no-untyped-def]
    """A plain access, for races.py. place: what locate found."""
    space, number, offset, _ = place
    if space == SHARED:
        me = clock(thread, lane)
        if writes:
            races.note_write(shadow, thread.block, offset, nbytes, me, statement)
        else:
            races.note_read(shadow, thread.block, offset, nbytes, me, statement)
    elif space == GLOBAL:
        me = thread.first_in_grid + lane
        if writes:
            shadow.stored[number] = True
            races.note_global_write(shadow, number, offset, nbytes, me, thread.block_barriers, statement)
        elif shadow.stored[number]:
            races.note_global_read(
                shadow, number, offset, nbytes, me, thread.block_threads, thread.block_barriers, statement
            )


@njit
def tally(rows, statement, writes, space, offsets, lanes, nbytes):  # type: ignore[no-untyped-def]
    """For the profile, where there is one."""
    if rows.size:
        row = rows[statement, np.int64(writes)]
        if space == SHARED:
            traffic.tally_shared(row, offsets, lanes, nbytes)
        elif space == GLOBAL:
            traffic.tally_global(row, offsets, lanes, nbytes)


@njit
def load(one, file, lanes, thread, machine):  # type: ignore[no-untyped-def]
    """ld. one: a record of codes.OPERATION. file: the address of the warp's registers. machine: execution.Machine."""
    size, nbytes, pool = one.size, one.size * one.count, machine.code.pool
    offsets = np.empty(LANES, np.int64)
    last = GLOBAL
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            address = np.int64(read64(file + one.a + 8 * lane)) + one.offset
            place = locate(machine.memory, one.space, address, nbytes, False, thread, lane, one.statement)
            last, _, offsets[lane], where = place
            if where == 0:
                return
            note(machine.shadow, False, place, nbytes, thread, lane, one.statement)
            for n in range(one.count):
                value = read(where + n * size, size)
                if one.signed:
                    value = extended(value, size)
                register, width = pool[one.list + 2 * n], pool[one.list + 2 * n + 1]
                write(file + register + width * lane, value, width)
    tally(machine.trail.traffic, one.statement, False, last, offsets, lanes, nbytes)


@njit
def store(one, file, lanes, thread, machine):  # type: ignore[no-untyped-def]
    size, nbytes, pool = one.size, one.size * one.count, machine.code.pool
    offsets = np.empty(LANES, np.int64)
    last = GLOBAL
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            address = np.int64(read64(file + one.a + 8 * lane)) + one.offset
            place = locate(machine.memory, one.space, address, nbytes, True, thread, lane, one.statement)
            last, _, offsets[lane], where = place
            if where == 0:
                return
            note(machine.shadow, True, place, nbytes, thread, lane, one.statement)
            for n in range(one.count):
                register, width = pool[one.list + 2 * n], pool[one.list + 2 * n + 1]
                write(where + n * size, read(file + register + width * lane, width), size)
    tally(machine.trail.traffic, one.statement, True, last, offsets, lanes, nbytes)


# ------------------------------------------------------------------------------------------------------------- atomics

ADD, MAX, MIN, EXCHANGE, COMPARE, AND, OR, XOR, INCREMENT, DECREMENT = range(len(codes.ATOMICS))
FLOAT = 2  # one.signed of an atomic operation: 0 unsigned, 1 signed, 2 floating point


@njit(error_model="numpy")
def combined(which, kind, size, old, b, c):  # type: ignore[no-untyped-def]
    """What an atomic operation leaves (section 9.7.13.5), as bits."""
    if which == EXCHANGE:
        return b
    if which == COMPARE:
        return c if old == b else old
    if which == AND:
        return old & b
    if which == OR:
        return old | b
    if which == XOR:
        return old ^ b
    if which == INCREMENT:
        return np.uint64(0) if old >= b else old + np.uint64(1)
    if which == DECREMENT:
        return b if old == 0 or old > b else old - np.uint64(1)
    if kind == FLOAT:
        if size == 4:
            x, y = as_float32(np.uint32(old)), as_float32(np.uint32(b))
            return np.uint64(bits_of_float32(x + y))
        return bits_of_float64(as_float64(old) + as_float64(b))
    if which == ADD:
        return old + b
    if kind:
        less = np.int64(extended(old, size)) < np.int64(extended(b, size))
    else:
        less = old < b
    return (old if less else b) if which == MIN else (b if less else old)


@njit
def atomic(one, file, lanes, thread, machine):  # type: ignore[no-untyped-def]
    """Lane after lane."""
    size = one.size
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            address = np.int64(read64(file + one.a + 8 * lane)) + one.offset
            space, _, offset, where = locate(
                machine.memory, one.space, address, size, True, thread, lane, one.statement
            )
            if where == 0:
                return
            if space == SHARED:
                races.note_atomic(machine.shadow, thread.block, offset, size, clock(thread, lane), one.statement)
            old = read(where, size)
            b, c = read(file + one.b + size * lane, size), read(file + one.c + size * lane, size)
            write(where, combined(one.row, one.signed, size, old, b, c), size)
            write(file + one.d + size * lane, old, size)


# -------------------------------------------------------------------------------------------------- asynchronous copies


class Copies(NamedTuple):
    """cp.async on its way (section 9.7.9.25), by warp: entries are statement, lane, group, offset in shared memory,
    bytes; data their bytes. closed: the groups that each lane has committed."""

    entries: np.ndarray
    data: np.ndarray
    length: np.ndarray
    closed: np.ndarray


@njit
def source_of(one, file, thread, lane, given, machine):  # type: ignore[no-untyped-def]
    """Where the bytes come from that a copy reads, as locate has it; all of them may be read, or none."""
    address = np.int64(read64(file + one.a + 8 * lane)) + one.offset
    whole = one.size * one.count
    nbytes = whole if given == whole else 1
    place = locate(machine.memory, GLOBAL, address, nbytes, False, thread, lane, one.statement)
    if nbytes < given:
        end = locate(machine.memory, GLOBAL, address + given - 1, 1, False, thread, lane, one.statement)
        if end[3] == 0:
            return end
    return place


@njit
def start_copy(one, file, lanes, thread, machine):  # type: ignore[no-untyped-def]
    """cp.async: what it reads is read now. It is written to shared memory now, or when it is waited for."""
    memory, shadow, copies = machine.memory, machine.shadow, machine.copies
    nbytes, w = one.size * one.count, thread.warp
    offsets, sources = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    read_by = np.int64(0)
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            target = np.int64(read64(file + one.d + 8 * lane))
            _, _, offsets[lane], where = locate(memory, SHARED, target, nbytes, True, thread, lane, one.statement)
            if where == 0:
                return
            given = np.int64(read32(file + one.b + 4 * lane))
            if given > nbytes:
                fail(memory, codes.PARTIAL_COPY, one.statement, w, lane, (SHARED, 0, offsets[lane], given))
                return
            n = copies.length[w]
            entry, data = copies.entries[w, n], copies.data[w, n]
            data[0] = data[1] = 0
            if given:
                place = source_of(one, file, thread, lane, given, machine)
                _, _, sources[lane], source = place
                if source == 0:
                    return
                note(shadow, False, place, given, thread, lane, one.statement)
                read_by |= np.int64(1) << lane
                for k in range(given):
                    data[k // 8] |= read(source + k, 1) << np.uint64(8 * (k % 8))
            entry[0], entry[1], entry[2] = one.statement, lane, copies.closed[w, lane]
            entry[3], entry[4] = offsets[lane], nbytes
            if machine.settings.late:
                copies.length[w] = n + 1
            else:
                land(entry, data, thread, memory, shadow)
    if read_by:
        tally(machine.trail.traffic, one.statement, False, GLOBAL, sources, read_by, nbytes)
    tally(machine.trail.traffic, one.statement, True, SHARED, offsets, lanes, nbytes)


@njit
def land(entry, data, thread, memory, shadow):  # type: ignore[no-untyped-def]
    """The bytes arrive in shared memory: a write of the thread that asked for them."""
    statement, lane, offset, nbytes = entry[0], entry[1], entry[3], entry[4]
    where = memory.shared + thread.block * memory.shared_stride + offset
    races.note_write(shadow, thread.block, offset, nbytes, clock(thread, lane), statement)
    if nbytes == 4:
        write(where, data[0], 4)
    else:
        write64(where, data[0])
        if nbytes == 16:
            write64(where + 8, data[1])


@njit
def commit(lanes, thread, copies):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        copies.closed[thread.warp, lane] += (lanes >> lane) & 1


@njit
def wait(lanes, pending, thread, machine):  # type: ignore[no-untyped-def]
    """Until at most so many of a lane's latest groups are on their way; -1: nothing at all."""
    copies, kept = machine.copies, 0
    entries, data = copies.entries[thread.warp], copies.data[thread.warp]
    for n in range(copies.length[thread.warp]):
        lane = entries[n, 1]
        done = (lanes >> lane) & 1 and (pending < 0 or entries[n, 2] < copies.closed[thread.warp, lane] - pending)
        if done:
            land(entries[n], data[n], thread, machine.memory, machine.shadow)
        else:
            entries[kept], data[kept] = entries[n], data[n]
            kept += 1
    copies.length[thread.warp] = kept
