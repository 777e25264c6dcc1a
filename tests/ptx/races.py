"""Who wrote and who read each two bytes of shared memory, and which barrier lies between: what finds races.

Two accesses by different threads to the same bytes, one of them a write, are ordered by a bar.sync of the block that
both passed in between, or within a warp by a bar.warp.sync. Whether they are is seen whatever order they came in here,
so a race is found even where its numbers are right. The last plain write, the last atomic operation and the last read
of each two bytes are kept, as a word each: thread, flags, and how many barriers of the warp and of the block there had
been. Reads by several threads since the block's last barrier are told by two flags. Atomic operations do not race with
each other.

Of global memory the last write of a launch is kept. Between blocks nothing orders two writes; a read of what another
block, or another warp with no bar.sync between, wrote is a race too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from . import codes

# thread | flag | flag | warp's barriers | block's barriers, which count from 1: 0 is "nobody".
MANY_BIT = 11  # several threads have read
OTHERS_BIT = 12  # of several warps
WARP_BIT = 13
BLOCK_BIT = 38
THREAD = (1 << MANY_BIT) - 1
WARP = (1 << (BLOCK_BIT - WARP_BIT)) - 1


class Shadow(NamedTuple):
    """written, atomic, read: of shared memory, [block, half-word]. touched: of global memory, with `starts` for each
    allocation; 0, or 1 + the thread's number | the block's barriers. stored: whether an allocation was written to.
    findings: how often, [statement, kind]."""

    written: np.ndarray
    atomic: np.ndarray
    read: np.ndarray
    touched: np.ndarray
    starts: np.ndarray
    stored: np.ndarray
    findings: np.ndarray


@njit
def now(thread, warp_barriers, block_barriers):  # type: ignore[no-untyped-def]
    return np.int64(thread) | (np.int64(warp_barriers) << WARP_BIT) | (np.int64(block_barriers) << BLOCK_BIT)


@njit
def unordered(then, me):  # type: ignore[no-untyped-def]
    """Whether an earlier access and this one, by another thread, have no barrier between them."""
    if (then ^ me) >> BLOCK_BIT:
        return False
    thread, mine = then & THREAD, me & THREAD
    if thread == mine:
        return False
    same_warp = thread >> 5 == mine >> 5
    return not (same_warp and (then >> WARP_BIT) & WARP < (me >> WARP_BIT) & WARP)


@njit
def note_read(shadow, block, offset, nbytes, me, statement):  # type: ignore[no-untyped-def]
    written, atomic, read = shadow.written[block], shadow.atomic[block], shadow.read[block]
    unset = raced = False
    for cell in range(offset >> 1, (offset + nbytes + 1) >> 1):
        unset |= written[cell] == 0 and atomic[cell] == 0
        raced |= unordered(written[cell], me) or unordered(atomic[cell], me)
        last = read[cell]
        flags = 0
        if (last ^ me) >> BLOCK_BIT == 0:
            flags = last & ((1 << MANY_BIT) | (1 << OTHERS_BIT))
            if (last ^ me) & THREAD:
                flags |= 1 << MANY_BIT
                if ((last ^ me) & THREAD) >> 5:
                    flags |= 1 << OTHERS_BIT
        read[cell] = me | flags
    if unset:
        shadow.findings[statement, codes.UNSET] += 1
    if raced:
        shadow.findings[statement, codes.READ_AFTER_WRITE] += 1


@njit
def read_unordered(last, me):  # type: ignore[no-untyped-def]
    """Whether any of the reads since the block's last barrier may come after this write."""
    if (last ^ me) >> BLOCK_BIT:
        return False
    if (last >> OTHERS_BIT) & 1:
        return True
    if (last ^ me) & THREAD == 0 and not (last >> MANY_BIT) & 1:
        return False
    same_warp = ((last ^ me) & THREAD) >> 5 == 0
    return not (same_warp and (last >> WARP_BIT) & WARP < (me >> WARP_BIT) & WARP)


@njit
def note_write(shadow, block, offset, nbytes, me, statement):  # type: ignore[no-untyped-def]
    written, atomic, read = shadow.written[block], shadow.atomic[block], shadow.read[block]
    after_write = after_read = False
    for cell in range(offset >> 1, (offset + nbytes + 1) >> 1):
        after_write |= unordered(written[cell], me) or unordered(atomic[cell], me)
        after_read |= read_unordered(read[cell], me)
        written[cell] = me
    if after_write:
        shadow.findings[statement, codes.WRITE_AFTER_WRITE] += 1
    if after_read:
        shadow.findings[statement, codes.WRITE_AFTER_READ] += 1


@njit
def note_atomic(shadow, block, offset, nbytes, me, statement):  # type: ignore[no-untyped-def]
    written, atomic, read = shadow.written[block], shadow.atomic[block], shadow.read[block]
    unset = after_write = after_read = False
    for cell in range(offset >> 1, (offset + nbytes + 1) >> 1):
        unset |= written[cell] == 0 and atomic[cell] == 0
        after_write |= unordered(written[cell], me)
        after_read |= read_unordered(read[cell], me)
        atomic[cell] = me
    if unset:
        shadow.findings[statement, codes.UNSET_ATOMIC] += 1
    if after_write:
        shadow.findings[statement, codes.ATOMIC_AFTER_WRITE] += 1
    if after_read:
        shadow.findings[statement, codes.ATOMIC_AFTER_READ] += 1


GLOBAL_BITS = 40  # of 1 + the number of a thread in the grid; the block's barriers above


@njit
def note_global_write(shadow, number, offset, nbytes, thread, barriers, statement):  # type: ignore[no-untyped-def]
    touched, start = shadow.touched, shadow.starts[number]
    me = np.int64(thread) + 1
    raced = False
    for cell in range(offset >> 1, (offset + nbytes + 1) >> 1):
        then = touched[start + cell] & ((1 << GLOBAL_BITS) - 1)
        raced |= then != 0 and then != me
        touched[start + cell] = me | (np.int64(barriers) << GLOBAL_BITS)
    if raced:
        shadow.findings[statement, codes.GLOBAL_WRITE_AFTER_WRITE] += 1


@njit
def note_global_read(shadow, number, offset, nbytes, thread, block_threads, barriers, statement):  # type: ignore[no-untyped-def]
    touched, start = shadow.touched, shadow.starts[number]
    raced = False
    for cell in range(offset >> 1, (offset + nbytes + 1) >> 1):
        then = touched[start + cell]
        if then:
            other = (then & ((1 << GLOBAL_BITS) - 1)) - 1
            if other // block_threads != thread // block_threads or (
                other >> 5 != thread >> 5 and then >> GLOBAL_BITS == barriers
            ):
                raced = True
    if raced:
        shadow.findings[statement, codes.GLOBAL_READ_AFTER_WRITE] += 1
