"""What accesses cost: wavefronts of shared memory (bank conflicts), sectors of global memory.

Shared memory has 32 banks of 4 bytes. A warp's access of 8 bytes a lane is made for half a warp at a time, one of 16
for a quarter, and takes as many wavefronts as the busiest bank has different words. Global memory moves 32 bytes at a
time, a sector.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .arithmetic import LANES

SHARED_REQUESTS, WAVEFRONTS, IDEAL, GLOBAL_REQUESTS, SECTORS, BYTES = range(6)
COLUMNS = 6  # for loads, and as many for stores


@njit
def tally_shared(row, offsets, lanes, nbytes):  # type: ignore[no-untyped-def]
    groups = max(nbytes // 4, 1)  # 1, 2 or 4
    width = LANES // min(groups, 4)
    words = max(nbytes // 4, 1)
    seen = np.empty(width * words, np.int64)
    row[SHARED_REQUESTS] += 1
    for first in range(0, LANES, width):
        busy = np.zeros(32, np.int64)
        count = 0
        for lane in range(first, first + width):
            if (lanes >> lane) & 1:
                for n in range(words):
                    word = (offsets[lane] >> 2) + n
                    known = False
                    for m in range(count):
                        known |= seen[m] == word
                    if not known:
                        seen[count] = word
                        count += 1
                        busy[word & 31] += 1
        if count:
            row[WAVEFRONTS] += busy.max()
            row[IDEAL] += 1


@njit
def tally_global(row, offsets, lanes, nbytes):  # type: ignore[no-untyped-def]
    seen = np.empty(LANES, np.int64)
    count = 0
    row[GLOBAL_REQUESTS] += 1
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            row[BYTES] += nbytes
            sector = offsets[lane] >> 5
            known = False
            for m in range(count):
                known |= seen[m] == sector
            if not known:
                seen[count] = sector
                count += 1
    row[SECTORS] += count
