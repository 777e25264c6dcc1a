"""The CPU backend: `launch.prepare` and `launch.run` are its two calls, `describe` says what it chose for this
machine."""

from __future__ import annotations

import os
from typing import Any

import numba

from . import compile, threads
from .call import tile_rows
from .forward import key_block
from .simd import ROW

__all__ = ["describe"]


def describe() -> dict[str, Any]:
    """What a bug report needs: SIMD row, tiles, threads, layer, cache folder, kernels compiled or loaded so far."""
    return {
        "isa": ROW.name,
        "vector bits": ROW.bits,
        "lanes": {e: ROW.lanes(e) for e in ("f32", "f64")},
        "MR": ROW.mr,
        "NR": ROW.nr,
        "queries a tile": {e: tile_rows(e) for e in ("f32", "f64")},
        "keys a block": {f"{e} D={d}": key_block(e, d) for e in ("f32", "f64") for d in (64, 128)},
        "threads": numba.config.NUMBA_NUM_THREADS,
        "layer": threads.layer(),
        "tbb found": threads.load_tbb(),
        "cache folder": compile.cache_folder(),
        "kernels": [{"name": n, "seconds": round(s, 3), "how": how} for n, s, how in compile.LOG],
        "environment": {n: v for n, v in os.environ.items() if n.startswith("NUMBA")},
    }
