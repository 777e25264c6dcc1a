"""The one module that imports numba-cuda: names for the others, and a plain function -> PTX."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numba_cuda

if numba.config.ENABLE_CUDASIM:
    raise RuntimeError(
        "NUMBA_ENABLE_CUDASIM is set, and the kernels here are made of instructions that Numba's simulator does not "
        "have: unset it for backend='cuda'"
    )

from numba import cuda
from numba.cuda import cgutils, libdevice, types
from numba.cuda.compiler import compile_cuda
from numba.cuda.core.targetconfig import ConfigStack
from numba.cuda.dispatcher import CUDADispatcher
from numba.cuda.extending import core_models, intrinsic, lower_builtin, lower_cast, overload, register_model
from numba.cuda.np.arrayobj import load_item, populate_array
from numba.cuda.typing.templates import (
    AbstractTemplate,
    infer,
    infer_getattr,
    infer_global,
    make_overload_attribute_template,
    make_overload_template,
    signature,
)

from ..cache import cache_folder, fingerprint
from . import INSTALL

__all__ = [
    "AbstractTemplate",
    "CUDADispatcher",
    "ConfigStack",
    "cgutils",
    "compile_cuda",
    "core_models",
    "cuda",
    "infer",
    "infer_getattr",
    "infer_global",
    "inline",
    "intrinsic",
    "kernel_ptx",
    "libdevice",
    "load_item",
    "lower_builtin",
    "lower_cast",
    "make_overload_attribute_template",
    "make_overload_template",
    "overload",
    "populate_array",
    "register_model",
    "signature",
    "types",
]

# A helper of kernels. Inlined into Numba's own code: compiling a call of any other device function asks the driver for
# the current device, so that nothing would compile on a machine without one.
inline = cuda.jit(device=True, inline="always")


@functools.cache
def _nvvm() -> str:
    """Which NVVM library compiles: CUDA 12's and 13's write versions of PTX that the other one's drivers may refuse."""
    try:
        path = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("nvvm").abs_path
    except Exception as error:
        raise RuntimeError(f"numba-cuda finds no NVVM library, which compiles kernels ({error}): {INSTALL}") from error
    return f"{os.path.basename(path)} {os.path.getsize(path)}" if path else ""


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch the garbage collector off. Compiling makes millions of objects that live until its end, and to search them
    took a quarter of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def kernel_ptx(
    kernel: Callable[[], Callable[..., None]],
    arguments: tuple[Any, ...],
    cc: tuple[int, int],
    bounds: int | tuple[int, int],
    key: str | None,
) -> str:
    """The PTX of the kernel that `kernel` makes, for a device of compute capability cc. bounds: threads of a block, or
    those and the blocks for which a multiprocessor must have registers.

    It is kept on disk under `key`, a text that with our sources says what the kernel is; None: it isn't.
    """
    nvvm = _nvvm()
    path = None
    if key is not None and (folder := cache_folder()) is not None:
        stamp = f"{fingerprint('cuda')} {numba_cuda.__version__} {nvvm} {cc} {bounds} {key}"
        path = Path(folder) / f"cuda-{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.ptx"
        with contextlib.suppress(OSError, ValueError):
            digest, _, ptx = path.read_text().partition("\n")
            if hashlib.sha256(ptx.encode()).hexdigest() == digest:  # a file that a crash cut short must not be run
                return ptx
    with _no_garbage_collection():
        ptx, _ = cuda.compile_ptx(kernel(), arguments, cc=cc, launch_bounds=bounds)
    if path is not None:
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "w") as file:
                file.write(f"{hashlib.sha256(ptx.encode()).hexdigest()}\n{ptx}")
            os.replace(name, path)
    return str(ptx)
