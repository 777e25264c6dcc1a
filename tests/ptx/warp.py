"""Shuffles and votes: what the lanes of a warp tell each other."""

from __future__ import annotations

import numpy as np
from numba import njit

from . import codes
from .arithmetic import LANES
from .raw import read32, write32

BFLY, IDX, UP, DOWN = range(len(codes.SHUFFLES))
BALLOT, ANY, ALL, UNI, ACTIVE = range(len(codes.VOTES))


@njit
def check_members(place, file, lanes, live, shadow, statement):  # type: ignore[no-untyped-def]
    """The membermask names the lanes that are there."""
    for lane in range(LANES):
        if (lanes >> lane) & 1 and np.int64(read32(file + place + 4 * lane)) != live:
            shadow.findings[statement, codes.MEMBERS] += 1
            return


@njit
def shuffle(one, file, lanes, live, shadow):  # type: ignore[no-untyped-def]
    """shfl.sync (section 9.7.9.6): the lane that is read lies within a segment, or the lane keeps its own number."""
    check_members(one.e, file, lanes, live, shadow, one.statement)
    values = np.empty(LANES, np.uint64)
    for lane in range(LANES):
        values[lane] = read32(file + one.a + 4 * lane)
    inside = np.int64(read32(file + one.list))
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            b = np.int64(read32(file + one.b + 4 * lane)) & 31
            c = np.int64(read32(file + one.c + 4 * lane))
            clamp, segment = c & 31, (c >> 8) & 31
            least = lane & segment
            most = least | (clamp & ~segment)
            if one.row == BFLY:
                source = lane ^ b
            elif one.row == IDX:
                source = least | (b & ~segment)
            elif one.row == DOWN:
                source = lane + b
            else:
                source = lane - b
            found = source >= most if one.row == UP else source <= most
            write32(file + one.d + 4 * lane, values[source if found else lane])
            inside = (inside & ~(np.int64(1) << lane)) | (np.int64(found) << lane)
    write32(file + one.list, np.uint64(inside))


@njit
def vote(one, file, lanes, live, shadow):  # type: ignore[no-untyped-def]
    """vote.sync (section 9.7.13.9) and activemask."""
    if one.row == ACTIVE:
        bits = lanes
    else:
        check_members(one.e, file, lanes, live, shadow, one.statement)
        bits = np.int64(read32(file + one.a)) & lanes
    if one.row == BALLOT or one.row == ACTIVE:
        for lane in range(LANES):
            if (lanes >> lane) & 1:
                write32(file + one.d + 4 * lane, np.uint64(bits))
        return
    if one.row == ANY:
        answer = bits != 0
    elif one.row == ALL:
        answer = bits == lanes
    else:
        answer = bits == lanes or bits == 0
    before = np.int64(read32(file + one.d)) & ~lanes
    write32(file + one.d, np.uint64(before | lanes if answer else before))
