"""The FMA peak of this CPU: a loop of FMAs over a register tile, which reads no memory.

The clock and other processes change it by a fifth from one second to the next. So a fraction of it has a meaning only
if loop and kernel run in turns in one process (`numba-attn bench --peak`).
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
from numba import prange
from numba.core import types

from . import threads
from .compile import compile_cfunc, compile_entry, inner
from .registers import outer, shape, store_tile, zeros
from .simd import POINTER, ROW, call_address, full_width

MR, NR = ROW.mr, ROW.nr


@inner
def repeat(p, n):
    t = zeros(p, shape(MR, NR))
    for _ in range(n):
        t = outer(t, p, 0, p)
    return t


def _build(elem: str):
    pointer = POINTER[elem]

    def fma_loop(address, n):
        p = pointer(address)
        store_tile(repeat(p, n), p, full_width(p))

    return fma_loop


@cache
def _loop(elem: str) -> int:
    return compile_cfunc(_build(elem), types.void(types.intp, types.intp), f"peak-{elem}")


def _on_threads(loop, address, step, n, count):
    for t in prange(count):
        call_address(loop, address + t * step, n)


@cache
def _spread() -> Any:
    threads.load_tbb()
    return compile_entry(_on_threads, types.void(*[types.intp] * 5), "peak-threads", parallel=True)


def fma_peak(dtype: Any = np.float32, seconds: float = 0.02, n_threads: int | None = None) -> float:
    """Floating-point operations a second of a loop of fused multiply-adds on n_threads threads (all if None), float32
    or float64."""
    elem = "f64" if np.dtype(dtype) == np.float64 else "f32"
    count = threads.numba.get_num_threads() if n_threads is None else n_threads
    size = 4 if elem == "f32" else 8
    step = ROW.mr * ROW.nr * ROW.lanes(elem) * size
    memory = np.zeros(count * step + 64, np.uint8)
    address = (memory.ctypes.data + 63) & ~63
    loop, spread = _loop(elem), _spread()
    n, per_turn = 1000, 2 * ROW.mr * ROW.nr * ROW.lanes(elem) * count
    while True:
        start = time.perf_counter()
        spread(loop, address, step, n, count)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds / 2:
            return per_turn * n / elapsed
        n = int(n * min(10.0, 1.2 * seconds / max(elapsed, 1e-9)))
