"""A kernel on a device: its launch bounds, compiled once for each compute capability, loaded once for each device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .. import backward, bias_sums, forward, sums
from ..compile import kernel_ptx
from ..record import Features, signature
from ..tiling import Tiling


def bounds(
    build: Callable[..., Any], t: Tiling | None, threads: int, more: tuple[Any, ...] = ()
) -> int | tuple[int, int]:
    """The launch bounds of a kernel: the threads of a block, or these and the least number of blocks for which a
    multiprocessor must have registers. Without that number ptxas may save registers for more blocks than shared memory
    allows, and then it spills. It did so for dQ on sm_100 and sm_120, for forward in float64 on sm_120, for decode
    (forward with split keys, in `more`) in float64 on sm_80 and sm_90, for dK and dV in tf32 on sm_80, and for these
    sums."""
    if build in (bias_sums.build_bias, sums.build_aux):
        return threads, 1
    wide = build is forward.build and (more or (t is not None and t.size == 8))
    if wide or build in (backward.build_queries, backward.build_keys):
        return threads, REGISTERS // (256 * threads)
    return threads


REGISTERS = 65536  # of a multiprocessor; a thread has at most 255

functions: dict[Any, Any] = {}
_texts: dict[Any, str] = {}
_lock = threading.Lock()


def loaded(device: Any, build: Callable[..., Any], t: Tiling | None, f: Features, threads: Any, more: Any) -> Any:
    """The loaded kernel, compiled if this is its first use on a device of such compute capability."""
    key = (device, build, t, f, threads, more)
    found = functions.get(key)
    if found is None:
        with _lock:
            found = functions.get(key)
            if found is None:
                text = (device.cc, *key[1:])
                if text not in _texts:
                    make = (lambda: build(t, f, *more)) if t is not None else (lambda: build(*more, f))
                    plain = f.score_mod is None and not f.mask_mods  # users' functions have no name that lasts
                    name = f"{build.__module__}.{build.__name__} {t} {f} {more}" if plain else None
                    _texts[text] = kernel_ptx(make, signature(f.fields), device.cc, threads, name)
                found = functions[key] = device.load(_texts[text], None)
    return found
