"""Fills the kernel cache ahead of time with every kernel that calls of given passes and dtypes load. A user's own
functions are not among them: each process compiles those."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...cache import cache_folder, mark_filled
from .. import threads
from ..compile import LOG
from . import backward, forward, jvp
from .record import elem_of


def kernels(passes: Sequence[str], dtypes: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """For each kernel its name and a function that compiles or loads it. passes: any of forward, backward and jvp."""
    found: dict[str, Callable[[], Any]] = {"parallel": threads.compiled}
    for name in dtypes:
        storage = np.dtype(name if name in ("float32", "float64") else np.uint16)
        elem = elem_of(storage)
        if "forward" in passes or "backward" in passes:
            found[f"entry-{storage.name}"] = partial(forward.entry, storage)
            found[f"forward-{elem}"] = partial(forward.drain_address, elem)
        if "backward" in passes:
            found[f"delta-{elem}"] = partial(backward.delta_address, elem)
            found[f"backward-{elem}"] = partial(backward.drain_address, elem)
        if "jvp" in passes:
            found[f"jvp-{elem}"] = partial(jvp.drain_address, elem)
    return found


def fill(
    wanted: Mapping[str, Callable[[], Any]], on_step: Callable[[str], None]
) -> tuple[str, list[tuple[str, float, str]]]:
    """Fill the cache. Returns its folder, and for each kernel its name, seconds, and "compiled" or "loaded".

    Raises RuntimeWarning if kernels cannot be kept, of which a call would warn.
    """
    before = len(LOG)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "numba_attn: ", RuntimeWarning)
        for name, compile_kernel in wanted.items():
            on_step(name)
            compile_kernel()
        folder = cache_folder()
    assert folder is not None  # without a folder the warning above was raised
    mark_filled(folder)
    return folder, LOG[before:]
