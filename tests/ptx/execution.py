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
from .arithmetic import LANES
from .computing import compute
from .matrix import load_matrix, multiply
from .memory import Copies, Memory, Thread, atomic, commit, fail, load, start_copy, store, wait
from .races import Shadow
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


class Machine(NamedTuple):
    """All of a launch. width, threads: warps and threads of a block."""

    code: Code
    warps: Warps
    memory: Memory
    shadow: Shadow
    copies: Copies
    settings: Settings
    trail: Trail
    width: int
    threads: int


# --------------------------------------------------------------------------------------------------------- operations


@njit
def guarded(lanes, guard, negate, file):  # type: ignore[no-untyped-def]
    """The lanes whose predicate holds."""
    if guard < 0:
        return lanes
    bits = np.int64(read32(file + guard))
    return lanes & ~bits if negate else lanes & bits


@njit
def operate(machine, first, last, lanes, file, thread):  # type: ignore[no-untyped-def]
    """Operations first to last - 1, for some lanes of a warp whose registers are at `file`."""
    operations, live = machine.code.operations, machine.warps.live[thread.warp]
    for n in range(first, last):
        one = operations[n]
        mine = lanes
        if one.guard >= 0:
            mine = guarded(lanes, one.guard, one.negate, file)
            if mine == 0:
                continue
        op = one.op
        if op == codes.COMPUTE:
            compute(machine.code.compute, one.row, file, (one.d, one.a, one.b, one.c, one.e), mine)
        elif op == codes.LOAD:
            load(one, file, mine, thread, machine)
        elif op == codes.STORE:
            store(one, file, mine, thread, machine)
        elif op == codes.APPROXIMATE:
            approximate(one, file, mine, machine.settings.noise, machine.trail.random)
        elif op == codes.MMA:
            multiply(one, file, machine.code.pool)
        elif op == codes.LDMATRIX:
            load_matrix(one, file, mine, thread, machine)
        elif op == codes.SHUFFLE:
            shuffle(one, file, mine, live, machine.shadow)
        elif op == codes.VOTE:
            vote(one, file, mine, live, machine.shadow)
        elif op == codes.COPY:
            start_copy(one, file, mine, thread, machine)
        elif op == codes.COMMIT:
            commit(mine, thread, machine.copies)
        elif op == codes.WAIT:
            wait(mine, one.count, thread, machine)
        else:
            atomic(one, file, mine, thread, machine)
        if machine.memory.fault[0] != codes.FINE:
            return


# ----------------------------------------------------------------------------------------------------------- one step


@njit
def move(pc, lanes, to):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            pc[lane] = to


@njit
def look(machine, w):  # type: ignore[no-untyped-def]
    """Where warp w goes on: the lowest place that some lanes may leave, or in random order any such place. What a warp
    does together waits until all its living lanes are there."""
    warps, blocks, shuffled = machine.warps, machine.code.blocks, machine.settings.shuffled
    warps.next[w], warps.ready[w] = NOWHERE, 0
    pc, seen, left = warps.pc[w], 0, warps.live[w] & ~warps.waiting[w]
    while left:
        lowest = NOWHERE
        for lane in range(LANES):
            if (left >> lane) & 1:
                lowest = min(lowest, pc[lane])
        here = np.int64(0)
        for lane in range(LANES):
            if (left >> lane) & 1 and pc[lane] == lowest:
                here |= np.int64(1) << lane
        left &= ~here
        if not blocks[lowest].together or here == warps.live[w]:
            seen += 1
            if not shuffled:
                left = np.int64(0)
            if seen == 1 or below(machine.trail.random, seen) == 0:
                warps.next[w], warps.ready[w] = lowest, here


@njit
def release(machine, b):  # type: ignore[no-untyped-def]
    """Where all living threads of block b wait at a barrier, they go on: whether they did."""
    warps, blocks = machine.warps, machine.code.blocks
    place, first, living = NOWHERE, b * machine.width, 0
    for w in range(first, first + machine.width):
        if warps.waiting[w] != warps.live[w]:
            return False
        for lane in range(LANES):
            if (warps.live[w] >> lane) & 1:
                living += 1
                if place == NOWHERE:
                    place = warps.pc[w, lane]
                elif warps.pc[w, lane] != place:
                    other = blocks[warps.pc[w, lane]].statement
                    fail(machine.memory, codes.BARRIERS, blocks[place].statement, w, lane, (0, 0, other, 0))
                    return False
    if not living:
        return False
    if living < machine.threads:
        machine.shadow.findings[blocks[place].statement, codes.EXITED] += 1
    warps.block_barriers[b] += 1
    for w in range(first, first + machine.width):
        move(warps.pc[w], warps.waiting[w], place + 1)
        warps.waiting[w] = 0
    return True


@njit
def step(machine, w):  # type: ignore[no-untyped-def]
    """Warp w runs the basic block where it is."""
    code, warps, width = machine.code, machine.warps, machine.width
    here, lanes = warps.next[w], warps.ready[w]
    block, b = code.blocks[here], w // width
    file = np.int64(warps.files[w].ctypes.data)
    machine.trail.ran[here] += 1
    if block.last > block.first:
        first = LANES * (w - b * width)
        thread = Thread(w, b, first, warps.block_ids[b] * machine.threads + first, machine.threads,
                        warps.warp_barriers[w], warps.block_barriers[b])  # fmt: skip
        operate(machine, block.first, block.last, lanes, file, thread)
    taken = np.int64(0) if block.end == codes.FALL else guarded(lanes, block.guard, block.negate, file)
    pc = warps.pc[w]
    if block.end == codes.BARRIER:
        warps.waiting[w] |= taken
        move(pc, lanes & ~taken, here + 1)
    else:
        move(pc, lanes, here + 1)
        if block.end == codes.JUMP:
            move(pc, taken, block.target)
        elif block.end == codes.WARP_BARRIER:
            warps.warp_barriers[w] += taken != 0
        elif block.end == codes.TRAP and taken:
            fail(machine.memory, codes.TRAPPED, block.statement, w, 0)
    gone = taken if block.end == codes.RETURN else np.int64(0)
    if here + 1 == code.blocks.size:  # behind the last statement
        for lane in range(LANES):
            if (lanes >> lane) & 1 and pc[lane] == here + 1:
                gone |= np.int64(1) << lane
    warps.live[w] &= ~gone
    if (block.end == codes.BARRIER or gone) and release(machine, b):
        for other in range(b * width, (b + 1) * width):
            look(machine, other)
    look(machine, w)


# ------------------------------------------------------------------------------------------------------------- a launch


@njit
def begin(machine, count):  # type: ignore[no-untyped-def]
    """The registers, memory and counters of `count` new blocks."""
    code, warps, memory, shadow = machine.code, machine.warps, machine.memory, machine.shadow
    (gx, gy, _), (bx, by, _) = machine.settings.grid, machine.settings.block
    values = np.empty(len(code.special), np.int64)
    for w in range(count * machine.width):
        warps.files[w] = code.template
        file = np.int64(warps.files[w].ctypes.data)
        number = warps.block_ids[w // machine.width]
        warps.warp_barriers[w] = 0
        machine.copies.length[w] = 0
        warps.waiting[w], warps.live[w] = 0, ALL
        for lane in range(LANES):
            warps.pc[w, lane] = machine.copies.closed[w, lane] = 0
            t = LANES * (w % machine.width) + lane
            values[0], values[1], values[2] = t % bx, t // bx % by, t // (bx * by)
            values[3], values[4], values[5] = number % gx, number // gx % gy, number // (gx * gy)
            values[6], values[7] = lane, w % machine.width
            values[8], values[9], values[10] = 1 << lane, (1 << lane) - 1, (2 << lane) - 1
            values[11], values[12] = ALL & ~((1 << lane) - 1), ALL & ~((2 << lane) - 1)
            for n in range(len(code.special)):
                if code.special[n] >= 0:
                    write32(file + code.special[n] + 4 * lane, np.uint64(values[n]))
        look(machine, w)
    for b in range(count):
        warps.block_barriers[b] = 1
        for cell in range(shadow.written.shape[1]):
            shadow.written[b, cell] = shadow.atomic[b, cell] = shadow.read[b, cell] = 0
    poison(memory.shared, count * memory.shared_stride)
    poison(memory.local, count * machine.threads * memory.local_stride)


@njit
def poison(address, nbytes):  # type: ignore[no-untyped-def]
    """Memory that nobody wrote is full of NaN."""
    for n in range(0, nbytes, 4):
        write32(address + n, np.uint64(0xFFFFFFFF))


@njit
def roomier(machine):  # type: ignore[no-untyped-def]
    """The same machine with room for twice as many copies."""
    old = machine.copies
    warps, room = old.entries.shape[0], 2 * old.entries.shape[1]
    entries, data = np.empty((warps, room, 5), np.int64), np.empty((warps, room, 2), np.uint64)
    for w in range(warps):
        for n in range(old.length[w]):
            for k in range(5):
                entries[w, n, k] = old.entries[w, n, k]
            for k in range(2):
                data[w, n, k] = old.data[w, n, k]
    return Machine(
        machine.code, machine.warps, machine.memory, machine.shadow, Copies(entries, data, old.length, old.closed),
        machine.settings, machine.trail, machine.width, machine.threads,
    )  # fmt: skip


@njit
def stuck(machine, total):  # type: ignore[no-untyped-def]
    """No warp can go on: all are done, or it is an error."""
    warps, waits = machine.warps, False
    for w in range(total):
        waits |= warps.waiting[w] != 0
    for w in range(total):
        for lane in range(LANES):
            if (warps.live[w] >> lane) & 1:
                kind = codes.DEADLOCK if waits else codes.APART
                fail(machine.memory, kind, machine.code.blocks[warps.pc[w, lane]].statement, w, lane)
                return


@njit
def turn(machine, total):  # type: ignore[no-untyped-def]
    """Which warp goes on, NOWHERE if none can, and for how many steps. In lockstep, the first one that is where the
    lowest program counter is, for one step."""
    warps, random = machine.warps, machine.trail.random
    if machine.settings.shuffled:
        start = below(random, total)
        for n in range(total):
            w = (start + n) % total
            if warps.next[w] < NOWHERE:
                # Short turns mix the warps, long ones let one run far ahead.
                return w, np.int64(1) << below(random, 7)
        return NOWHERE, np.int64(0)
    chosen, lowest = NOWHERE, NOWHERE
    for w in range(total):
        if warps.next[w] < lowest:
            chosen, lowest = np.int64(w), warps.next[w]
    return chosen, np.int64(1)


@njit
def resident(machine, count, steps):  # type: ignore[no-untyped-def]
    """Run the blocks that are resident to their end; steps were made before."""
    total, fault = count * machine.width, machine.memory.fault
    most = np.int64(1)  # copies that a step may start
    for block in machine.code.blocks:
        most = max(most, LANES * block.copies + 1)
    while fault[0] == codes.FINE:
        w, turns = turn(machine, total)
        if w == NOWHERE:
            stuck(machine, total)
            break
        while turns and fault[0] == codes.FINE and machine.warps.next[w] < NOWHERE:
            while machine.copies.entries.shape[1] < machine.copies.length[w] + most:
                machine = roomier(machine)
            step(machine, w)
            turns -= 1
            steps += 1
        if steps > machine.settings.limit:
            fail(machine.memory, codes.TOO_LONG, 0, 0, 0)
    for w in range(total):
        for n in range(machine.copies.length[w] if fault[0] == codes.FINE else 0):
            machine.shadow.findings[machine.copies.entries[w, n, 0], codes.PENDING] += 1
    return machine, steps


def compiled(sources: str):  # type: ignore[no-untyped-def]
    """`run`, kept as computing.compiled has it."""

    @njit(cache=True)
    def run(machine, order):  # type: ignore[no-untyped-def]
        """Every block of the grid, in this order, as many at a time as there is room for. Returns the steps."""
        room, steps = machine.warps.block_ids.size, np.int64(0)
        for first in range(0, order.size if len(sources) else 0, room):
            count = min(room, order.size - first)
            machine.warps.block_ids[:count] = order[first : first + count]
            begin(machine, count)
            machine, steps = resident(machine, count, steps)
            if machine.memory.fault[0] != codes.FINE:
                break
        return steps

    return run
