"""What ptxemu spends most of its time on, compiled: the shadow of shared memory that finds races, and float64's FMA.

For every two bytes ptxemu keeps who wrote and who read them last, in which turn between the block's barriers and the
warp's. Its own NumPy is some thirty array operations for an access of one warp; the findings here are the same
(test_cuda_tools.py compares them), in an eighth of the time.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic


@numba.njit
def unordered(other, me, warps, block_then, block_at, warp_then, warp_at):  # type: ignore[no-untyped-def]
    """Whether another thread's access has no barrier between it and this one, of the block or of a warp of both."""
    return (
        other >= 0
        and other != me
        and block_then == block_at
        and not (warps[other] == warps[me] and warp_then < warp_at)
    )


@numba.njit
def reads(
    word, n, lanes, warps, block_now, warp_now,
    wrote, wrote_block, wrote_warp, read, read_block, read_warp, many, others,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Lanes that read what nobody wrote, and what another wrote with no barrier between; who reads is written down."""
    unset = racing = 0
    for i in range(lanes.size):
        me, warp = lanes[i], warps[lanes[i]]
        block_at, warp_at = block_now[i], warp_now[i]
        nobody = raced = False
        for w in range(word[i], word[i] + n):
            writer, reader = wrote[w], read[w]
            nobody |= writer < -1
            raced |= unordered(writer, me, warps, wrote_block[w], block_at, wrote_warp[w], warp_at)
            if read_block[w] != block_at:
                many[w] = others[w] = False
            elif reader >= 0 and reader != me:
                many[w] = True
                others[w] |= warps[reader] != warp
            read[w], read_block[w], read_warp[w] = me, block_at, warp_at
        unset += nobody
        racing += raced
    return unset, racing


@numba.njit
def writes(
    word, n, lanes, warps, block_now, warp_now,
    wrote, wrote_block, wrote_warp, read, read_block, read_warp, many, others,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Lanes that write what another wrote, and read, with no barrier between, and what another of them writes."""
    after_write = after_read = inside = 0
    for i in range(lanes.size):
        me, warp = lanes[i], warps[lanes[i]]
        block_at, warp_at = block_now[i], warp_now[i]
        raced = raced_read = False
        for w in range(word[i], word[i] + n):
            writer, reader = wrote[w], read[w]
            raced |= unordered(writer, me, warps, wrote_block[w], block_at, wrote_warp[w], warp_at)
            if reader >= 0 and read_block[w] == block_at and (reader != me or many[w]):
                raced_read |= not (warps[reader] == warp and not others[w] and read_warp[w] < warp_at)
        after_write += raced
        after_read += raced_read
    for i in range(lanes.size):
        for w in range(word[i], word[i] + n):
            wrote[w], wrote_block[w], wrote_warp[w] = lanes[i], block_now[i], warp_now[i]
    for i in range(lanes.size):
        lost = False
        for w in range(word[i], word[i] + n):
            lost |= wrote[w] != lanes[i]
        inside += lost
    return after_write, after_read, inside


def shadow(launch: Any, offset: np.ndarray, lanes: np.ndarray, nbytes: int) -> tuple[Any, ...]:
    """The arguments of both, of a ptxemu.Launch."""
    e = launch
    now = e.bep[e.lane_blk[lanes]], e.wep[e.lane_warp[lanes]]
    kept = e.s_wt, e.s_wb, e.s_ww, e.s_rt, e.s_rb, e.s_rw, e.s_rmulti, e.s_rmw
    return offset >> 1, max(nbytes // 2, 1), lanes, e.lane_warp, *now, *kept


def race_read(self: Any, instruction: Any, offset: np.ndarray, lanes: np.ndarray, nbytes: int) -> None:
    """For ptxemu.Launch._race_read."""
    unset, racing = reads(*shadow(self, offset, lanes, nbytes))
    if unset and instruction.op != "atom":
        self.hazard("UNINITIALISED shared read", instruction, unset)
    if racing:
        self.hazard("RACE shared read-after-write", instruction, racing)


def race_write(self: Any, instruction: Any, offset: np.ndarray, lanes: np.ndarray, nbytes: int) -> None:
    """For ptxemu.Launch._race_write, of what is not atomic."""
    after_write, after_read, inside = writes(*shadow(self, offset, lanes, nbytes))
    for found, what in (
        (after_write, "RACE shared write-after-write"),
        (after_read, "RACE shared write-after-read"),
        (inside, "RACE shared write-write inside one instruction"),
    ):
        if found:
            self.hazard(what, instruction, found)


@intrinsic
def _fma(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return types.float64(a, b, c), codegen


@numba.vectorize(["float64(float64, float64, float64)"])
def fma64(a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c, rounded once: ptxemu has no such function before Python 3.13, and rounds twice."""
    return _fma(a, b, c)
