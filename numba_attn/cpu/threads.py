"""Threads: which layer Numba gets, when a call may use it, and what a forked child may do.

GNU OpenMP, Numba's usual layer, kills a child that was forked after a parallel call; workqueue aborts when two Python
threads call at once. tbb is safe in both and as fast, but Numba does not find the tbb wheel's library unless it is
loaded first.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import threading

import numba
from numba import prange
from numba.core import types

from .compile import compile_entry
from .simd import call_address

_lock = threading.Lock()
_workqueue_lock = threading.Lock()
_parallel = None
_forked = False


def _after_fork_in_child() -> None:
    global _forked, _lock, _workqueue_lock
    _forked = True
    _lock, _workqueue_lock = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def load_tbb() -> bool:
    """Load the tbb wheel's library so that Numba finds it, unless the user has chosen another layer by environment
    variable.

    It moves the user's own parallel functions to tbb too, if none has run yet (README, "Threads").
    """
    chosen = os.environ.get("NUMBA_THREADING_LAYER") or os.environ.get("NUMBA_THREADING_LAYER_PRIORITY")
    if chosen and chosen != "tbb":
        return False
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    for file in files:
        if file.name in ("libtbb.so.12", "tbb12.dll"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
                return True
    return False


def layer() -> str | None:
    """Numba's threading layer, None before the first parallel call of the process."""
    try:
        return numba.threading_layer()
    except ValueError:
        return None


def _share(call, drain, n):
    for _ in prange(n):
        call_address(drain, call)


def compiled():
    """The kernel that starts the threads; compiled, or loaded from the cache."""
    global _parallel
    with _lock:
        if _parallel is None:
            load_tbb()
            _parallel = compile_entry(_share, types.void(types.intp, types.intp, types.intp), "parallel", parallel=True)
    return _parallel


def usable() -> int:
    """How many threads a call may use now: numba.get_num_threads(), or 1 in a forked child, which has no threads."""
    if numba.config.NUMBA_NUM_THREADS == 1 or (_forked and layer() == "omp"):
        return 1
    compiled()
    return numba.get_num_threads()


def run(call: int, drain: int, n: int) -> None:
    """n threads drain the work items of one call."""
    kernel = compiled()
    if layer() == "workqueue":
        with _workqueue_lock:
            kernel(call, drain, n)
    else:
        kernel(call, drain, n)
