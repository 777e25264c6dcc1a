"""The interpreter: the operations of a basic block for some lanes of a warp, and which warp goes on.

Compiled once for all kernels; only `run` is called from Python, and it runs a whole launch. A few blocks of the grid
are resident at a time. In lockstep, what has the lowest program counter goes on, all warps that are there one after the
other. In random order, a warp is drawn and runs for a while; where its lanes are apart, which of them is drawn too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from . import codes
from .approximate import approximate
from .arithmetic import LANES, compute
from .matrix import load_matrix, multiply
from .memory import Copies, Thread, atomic, commit, fail, load, start_copy, store, wait
from .randomness import below
from .raw import read32, write32
from .warp import shuffle, vote

NOWHERE = np.int64(1) << 40  # the program counter of a warp that cannot go on
ALL = np.int64(0xFFFFFFFF)


class Code(NamedTuple):
    """lowering.Program for compiled code. template: the registers of a warp before it starts. special: places of the
    special registers in the order of codes.SPECIAL, or -1. compute: the address of arithmetic.py's function."""

    operations: np.ndarray
    blocks: np.ndarray
    pool: np.ndarray
    template: np.ndarray
    special: np.ndarray
    compute: int


class Warps(NamedTuple):
    """The resident warps. files: their registers. pc: of each lane, a block's number. live, waiting: lanes as bits;
    waiting at a barrier of the block. next, ready: where a warp goes on, and with which lanes."""

    files: np.ndarray
    pc: np.ndarray
    live: np.ndarray
    waiting: np.ndarray
    next: np.ndarray
    ready: np.ndarray
    warp_barriers: np.ndarray
    block_barriers: np.ndarray
    block_ids: np.ndarray


class Settings(NamedTuple):
    """noise: approx_noise. late: async_late. shuffled: schedule="random". limit: of steps, runs of a basic block.
    grid, block: threads in x, y and z."""

    noise: int
    late: int
    shuffled: int
    limit: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


class Trail(NamedTuple):
    """What a launch leaves behind: how often each basic block ran, accesses for the profile, the random numbers'
    state."""

    ran: np.ndarray
    traffic: np.ndarray
    random: np.ndarray


# --------------------------------------------------------------------------------------------------------- operations


@njit
def guarded(lanes, guard, negate, file):  # type: ignore[no-untyped-def]
    """The lanes whose predicate holds."""
    if guard < 0:
        return lanes
    bits = np.int64(read32(file + guard))
    return lanes & ~bits if negate else lanes & bits


@njit
def operate(code, first, last, lanes, live, file, thread, memory, shadow, copies, settings, trail):  # type: ignore[no-untyped-def]
    """Operations first to last - 1."""
    operations, pool = code.operations, code.pool
    for n in range(first, last):
        one = operations[n]
        mine = lanes
        if one.guard >= 0:
            mine = guarded(lanes, one.guard, one.negate, file)
            if mine == 0:
                continue
        op = one.op
        if op == codes.COMPUTE:
            compute(code.compute, one.row, file, one.d, one.a, one.b, one.c, one.e, np.uint32(mine))
        elif op == codes.LOAD:
            load(one, file, mine, thread, memory, shadow, trail.traffic, pool)
        elif op == codes.STORE:
            store(one, file, mine, thread, memory, shadow, trail.traffic, pool)
        elif op == codes.APPROXIMATE:
            approximate(one.row, file, one.d, one.a, one.b, one.size, one.signed, mine, settings.noise, trail.random)
        elif op == codes.MMA:
            multiply(one, file, pool)
        elif op == codes.LDMATRIX:
            load_matrix(one, file, mine, thread, memory, shadow, trail.traffic, pool)
        elif op == codes.SHUFFLE:
            shuffle(one, file, mine, live, shadow)
        elif op == codes.VOTE:
            vote(one, file, mine, live, shadow)
        elif op == codes.COPY:
            start_copy(one, file, mine, thread, memory, shadow, trail.traffic, copies, settings.late)
        elif op == codes.COMMIT:
            commit(mine, thread, copies)
        elif op == codes.WAIT:
            wait(mine, one.count, thread, memory, shadow, copies)
        else:
            atomic(one, file, mine, thread, memory, shadow)
        if memory.fault[0] != codes.FINE:
            return


# ----------------------------------------------------------------------------------------------------------- one step


@njit
def move(pc, lanes, to):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            pc[lane] = to


@njit
def look(warps, blocks, w, shuffled, random):  # type: ignore[no-untyped-def]
    """Where warp w goes on: the lowest place that some lanes may leave, or any such place. What a warp does together
    waits until all its living lanes are there."""
    able = warps.live[w] & ~warps.waiting[w]
    warps.next[w], warps.ready[w] = NOWHERE, 0
    pc, seen, left = warps.pc[w], 0, able
    while left:
        lowest = NOWHERE
        for lane in range(LANES):
            if (left >> lane) & 1:
                lowest = min(lowest, np.int64(pc[lane]))
        here = np.int64(0)
        for lane in range(LANES):
            if (left >> lane) & 1 and pc[lane] == lowest:
                here |= np.int64(1) << lane
        left &= ~here
        if not blocks[lowest].together or here == warps.live[w]:
            seen += 1
            if not shuffled:
                left = np.int64(0)
            if seen == 1 or below(random, seen) == 0:
                warps.next[w], warps.ready[w] = lowest, here


@njit
def release(warps, blocks, b, width, threads, memory, shadow):  # type: ignore[no-untyped-def]
    """Where all living threads of block b wait at a barrier, they go on: whether they did."""
    place, first, living = NOWHERE, b * width, 0
    for w in range(first, first + width):
        if warps.waiting[w] != warps.live[w]:
            return False
        for lane in range(LANES):
            if (warps.live[w] >> lane) & 1:
                living += 1
                if place == NOWHERE:
                    place = np.int64(warps.pc[w, lane])
                elif warps.pc[w, lane] != place:
                    fail(memory, codes.BARRIERS, blocks[place].statement, w, lane, 0, 0,
                         blocks[warps.pc[w, lane]].statement, 0)  # fmt: skip
                    return False
    if not living:
        return False
    if living < threads:
        shadow.findings[blocks[place].statement, codes.EXITED] += 1
    warps.block_barriers[b] += 1
    for w in range(first, first + width):
        move(warps.pc[w], warps.waiting[w], place + 1)
        warps.waiting[w] = 0
    return True


@njit
def step(code, w, width, threads, warps, memory, shadow, copies, settings, trail):  # type: ignore[no-untyped-def]
    """Warp w runs the basic block where it is."""
    here, lanes = warps.next[w], warps.ready[w]
    block, b = code.blocks[here], w // width
    file = np.int64(warps.files[w].ctypes.data)
    trail.ran[here] += 1
    if block.last > block.first:
        first = LANES * (w - b * width)
        thread = Thread(w, b, first, warps.block_ids[b] * threads + first, threads,
                        warps.warp_barriers[w], warps.block_barriers[b])  # fmt: skip
        operate(
            code, block.first, block.last, lanes, warps.live[w], file, thread, memory, shadow, copies, settings, trail
        )
    taken = np.int64(0) if block.end == codes.FALL else guarded(lanes, block.guard, block.negate, file)
    pc = warps.pc[w]
    if block.end == codes.BARRIER:
        warps.waiting[w] |= taken
        move(pc, lanes & ~taken, here + 1)
    else:
        move(pc, lanes, here + 1)
        if block.end == codes.JUMP:
            move(pc, taken, np.int64(block.target))
        elif block.end == codes.WARP_BARRIER:
            warps.warp_barriers[w] += taken != 0
        elif block.end == codes.TRAP and taken:
            fail(memory, codes.TRAPPED, block.statement, w, 0, 0, 0, 0, 0)
    gone = taken if block.end == codes.RETURN else np.int64(0)
    if here + 1 == code.blocks.size:  # behind the last statement
        for lane in range(LANES):
            if (lanes >> lane) & 1 and pc[lane] == here + 1:
                gone |= np.int64(1) << lane
    warps.live[w] &= ~gone
    if (block.end == codes.BARRIER or gone) and release(warps, code.blocks, b, width, threads, memory, shadow):
        for other in range(b * width, (b + 1) * width):
            look(warps, code.blocks, other, settings.shuffled, trail.random)
    look(warps, code.blocks, w, settings.shuffled, trail.random)


# ------------------------------------------------------------------------------------------------------------- a launch


@njit
def begin(code, warps, copies, memory, shadow, count, width, threads, settings, trail):  # type: ignore[no-untyped-def]
    """The registers, memory and counters of `count` new blocks."""
    (gx, gy, _), (bx, by, _) = settings.grid, settings.block
    values = np.empty(len(code.special), np.int64)
    for w in range(count * width):
        warps.files[w] = code.template
        file = np.int64(warps.files[w].ctypes.data)
        number = warps.block_ids[w // width]
        warps.warp_barriers[w] = 0
        copies.length[w] = 0
        copies.closed[w] = 0
        warps.waiting[w], warps.live[w] = 0, ALL
        warps.pc[w] = 0
        for lane in range(LANES):
            t = LANES * (w % width) + lane
            values[0], values[1], values[2] = t % bx, t // bx % by, t // (bx * by)
            values[3], values[4], values[5] = number % gx, number // gx % gy, number // (gx * gy)
            values[6], values[7] = lane, w % width
            values[8], values[9], values[10] = 1 << lane, (1 << lane) - 1, (2 << lane) - 1
            values[11], values[12] = ALL & ~((1 << lane) - 1), ALL & ~((2 << lane) - 1)
            for n in range(len(code.special)):
                if code.special[n] >= 0:
                    write32(file + code.special[n] + 4 * lane, np.uint64(values[n]))
        look(warps, code.blocks, w, settings.shuffled, trail.random)
    warps.block_barriers[:] = 1
    shadow.written[:] = 0
    shadow.atomic[:] = 0
    shadow.read[:] = 0
    for address in range(memory.shared, memory.shared + count * memory.shared_stride, 8):
        poison(address)
    for address in range(memory.local, memory.local + count * threads * memory.local_stride, 8):
        poison(address)


@njit
def poison(address):  # type: ignore[no-untyped-def]
    """Memory that nobody wrote is full of NaN."""
    write32(address, np.uint64(0xFFFFFFFF))
    write32(address + 4, np.uint64(0xFFFFFFFF))


@njit
def roomier(copies, warps, room):  # type: ignore[no-untyped-def]
    """The same copies with room for twice as many."""
    entries = np.empty((warps, room, 5), np.int64)
    data = np.empty((warps, room, 2), np.uint64)
    entries[:, : copies.entries.shape[1]] = copies.entries
    data[:, : copies.data.shape[1]] = copies.data
    return Copies(entries, data, copies.length, copies.closed)


@njit
def stuck(code, warps, count, memory):  # type: ignore[no-untyped-def]
    """No warp can go on: all are done, or it is an error."""
    for w in range(count):
        if warps.live[w]:
            waits = False
            for other in range(count):
                waits |= warps.waiting[other] != 0
            for lane in range(LANES):
                if (warps.live[w] >> lane) & 1 and (waits or not (warps.waiting[w] >> lane) & 1):
                    kind = codes.DEADLOCK if waits else codes.APART
                    fail(memory, kind, code.blocks[warps.pc[w, lane]].statement, w, lane, 0, 0, 0, 0)
                    return


@njit
def resident(code, count, width, threads, warps, memory, shadow, copies, settings, trail, steps):  # type: ignore[no-untyped-def]
    """Run the blocks that are resident to their end; steps were made before."""
    total = count * width
    most = LANES * code.blocks["copies"].max() + 1  # that a step may start
    while memory.fault[0] == codes.FINE:
        lowest = NOWHERE
        if settings.shuffled:
            start = below(trail.random, total)
            for n in range(total):
                w = (start + n) % total
                if warps.next[w] < NOWHERE:
                    lowest = warps.next[w]
                    break
        else:
            for w in range(total):
                lowest = min(lowest, warps.next[w])
        if lowest == NOWHERE:
            stuck(code, warps, total, memory)
            break
        if copies.entries.shape[1] < copies.length.max() + most:
            copies = roomier(copies, total, 2 * copies.entries.shape[1])
            continue
        if settings.shuffled:
            # Short turns mix the warps, long ones let one run far ahead.
            for _ in range(1 << below(trail.random, 7)):
                if warps.next[w] == NOWHERE or memory.fault[0] != codes.FINE:
                    break
                if copies.entries.shape[1] < copies.length[w] + most:
                    break
                step(code, w, width, threads, warps, memory, shadow, copies, settings, trail)
                steps += 1
        else:
            for w in range(total):
                if warps.next[w] == lowest and memory.fault[0] == codes.FINE:
                    step(code, w, width, threads, warps, memory, shadow, copies, settings, trail)
                    steps += 1
        if steps > settings.limit:
            fail(memory, codes.TOO_LONG, 0, 0, 0, 0, 0, 0, 0)
    for w in range(total):
        for n in range(copies.length[w] if memory.fault[0] == codes.FINE else 0):
            shadow.findings[copies.entries[w, n, 0], codes.PENDING] += 1
    return copies, steps


def compiled(sources: str):  # type: ignore[no-untyped-def]
    """`run`, kept as arithmetic.compiled has it."""

    @njit(cache=True)
    def run(code, order, warps, memory, shadow, copies, settings, trail):  # type: ignore[no-untyped-def]
        """Every block of the grid, in this order, as many at a time as there is room for. Returns the steps."""
        if len(sources) == 0:
            return 0
        bx, by, bz = settings.block
        threads = bx * by * bz
        width = threads // LANES
        room = warps.block_ids.size
        steps = 0
        for first in range(0, order.size, room):
            count = min(room, order.size - first)
            warps.block_ids[:count] = order[first : first + count]
            begin(code, warps, copies, memory, shadow, count, width, threads, settings, trail)
            copies, steps = resident(code, count, width, threads, warps, memory, shadow, copies, settings, trail, steps)
            if memory.fault[0] != codes.FINE:
                break
        return steps

    return run
