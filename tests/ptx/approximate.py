"""ex2, lg2, rcp and the others that a GPU approximates (section 9.7.3), as exact as can be, or as wrong as allowed.

Without noise a result is that of float64, rounded once. With approx_noise=n, results of float32 are wrong at random by
about what the manual allows: ex2 by n ulp, rcp by 1, lg2 by 2**-22 (absolute between 1/2 and 2, relative elsewhere),
sin and cos by 2**-20.9, tanh by 2**-11, rsqrt by 2**-22.9, sqrt by 2**-23, div by 2 ulp. Taken for exact, which the
manual does not promise but GPUs do: ex2 of whole numbers, rcp and lg2 of powers of two. With .ftz, and with noise
always, what is below 2**-126 is 0.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .arithmetic import LANES
from .codes import FUNCTIONS
from .randomness import symmetric
from .raw import as_float32, as_float64, bits_of_float32, bits_of_float64, read32, read64, write32, write64

EX2, LG2, RCP, SQRT, RSQRT, SIN, COS, TANH, DIV = range(len(FUNCTIONS))
TINY = 2.0**-126


@njit
def exact(function, x, y):  # type: ignore[no-untyped-def]
    """In float64; y is the divisor of div."""
    if function == EX2:
        return np.exp2(x)
    if function == LG2:
        if x == 0.0:
            return -np.inf
        return np.log2(x) if x > 0 else np.nan
    if function == RCP:
        return np.float64(1.0) / x
    if function == SQRT:
        return math.sqrt(x) if x >= 0 else np.nan
    if function == RSQRT:
        if x == 0.0:
            return math.copysign(np.inf, x)
        return 1.0 / math.sqrt(x) if x > 0 else np.nan
    if function == SIN:
        return math.sin(x) if abs(x) < np.inf else np.nan
    if function == COS:
        return math.cos(x) if abs(x) < np.inf else np.nan
    if function == TANH:
        return math.tanh(x)
    return x / y


@njit
def ulp(x):  # type: ignore[no-untyped-def]
    """The distance to the next float32."""
    bits = bits_of_float32(np.float32(abs(x)))
    return np.float64(as_float32(np.uint32(bits + np.uint32(1)))) - np.float64(as_float32(bits))


@njit
def error(function, x, true, noise):  # type: ignore[no-untyped-def]
    """The largest error of a finite result that is not 0."""
    if function == EX2:
        return 0.0 if x == np.round(x) else noise * ulp(true)
    if function in (RCP, LG2):
        if abs(math.frexp(x)[0]) == 0.5:  # a power of two
            return 0.0
        if function == RCP:
            return ulp(true)
        return 2.0**-22 if 0.5 < x < 2 else 2.0**-22 * abs(true)
    if function in (SIN, COS):
        return 2.0**-20.9
    if function == TANH:
        return 2.0**-11 * abs(true)
    if function == RSQRT:
        return 2.0**-22.9 * abs(true)
    if function == SQRT:
        return 2.0**-23 * abs(true)
    return 2 * ulp(true)


@njit
def flushed(x):  # type: ignore[no-untyped-def]
    return np.float32(math.copysign(0.0, x)) if abs(x) < TINY else x


@njit(error_model="numpy")
def single(function, x, y, flush, noise, random):  # type: ignore[no-untyped-def]
    """Of float32 numbers."""
    if flush:
        x, y = flushed(x), flushed(y)
    wide = np.float64(x)
    true = exact(function, wide, np.float64(y))
    near = np.float32(true)
    if noise and near != 0 and abs(near) < np.inf:
        near = np.float32(true + symmetric(random) * error(function, wide, true, noise))
    return flushed(near) if flush or noise else near


@njit(error_model="numpy")
def approximate(one, file, lanes, noise, random):  # type: ignore[no-untyped-def]
    """A function of numbers of 4 or 8 bytes, for the lanes of a warp. one: a record of codes.OPERATION."""
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            if one.size == 4:
                x = as_float32(np.uint32(read32(file + one.a + 4 * lane)))
                y = as_float32(np.uint32(read32(file + one.b + 4 * lane)))
                found = single(one.row, x, y, one.flush, noise, random)
                write32(file + one.d + 4 * lane, np.uint64(bits_of_float32(found)))
            else:
                x8 = as_float64(read64(file + one.a + 8 * lane))
                y8 = as_float64(read64(file + one.b + 8 * lane))
                write64(file + one.d + 8 * lane, bits_of_float64(exact(one.row, x8, y8)))
