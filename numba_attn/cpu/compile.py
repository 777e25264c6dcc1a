"""Compiling the entry kernels, or loading them from the cache (disk.py).

With no writable folder, or a Numba newer than those that were tested, kernels are compiled in every process and one
warning says so.
"""

import contextlib
import gc
import itertools
import os
import re
import time
import warnings
from functools import cache

import llvmlite.binding as llvm
import numba
from numba import njit
from numba.core import caching, types
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from ..cache import cache_folder, fingerprint
from .simd import ROW

# The newest minor version of Numba that tests/versions.py passed with. A newer one gets no disk cache.
NEWEST_TESTED = (0, 68)

# What was compiled or loaded in this process: (name, seconds, "compiled" | "loaded"). `numba-attn info` and the
# benchmarks print it.
LOG: list[tuple[str, float, str]] = []


@cache
def _tested() -> bool:
    """Whether this Numba is one whose private classes are known; a warning if not."""
    if numba.version_info.short <= NEWEST_TESTED:
        return True
    warnings.warn(
        f"numba_attn: Numba {numba.__version__} is newer than {'.'.join(map(str, NEWEST_TESTED))}, the newest that "
        "numba_attn was tested with, so kernels are not kept on disk but compiled anew in every process (some seconds)",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _cache_for(py_func, name):
    folder = cache_folder() if _tested() else None
    if folder is None:
        return caching.NullCache()
    from .disk import KernelCache  # imported here: an untested Numba may lack its base classes

    return KernelCache(py_func, name, folder)


# ---------------------------------------------------------------- inner functions
#
# Numba optimises every function that a kernel calls and writes machine code for it, although only the kernel that it is
# inlined into is ever run. That takes two thirds of the compile time. Inner functions here stop at LLVM IR, and the
# kernel's own pass optimises all.


class _InnerLibrary(JITCodeLibrary):
    """A library to link from. If the address of a function in it is needed after all, it is compiled then."""

    _added = False

    def add_ir_module(self, ir_module):
        # The attribute is set here and not in LLVM's module, where the llvmlite of Numba before 0.66 misplaces it.
        for fn in ir_module.functions:
            if not fn.is_declaration and any(name in fn.name for name in _OUTLINED):
                fn.attributes.add("noinline")
        super().add_ir_module(ir_module)

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        if not self._added:
            try:  # a look-up by name: every inner function comes here, and its module holds all that it calls
                self._final_module.get_function(name)
            except NameError:
                return 0
            self._added = True
            super()._finalize_final_module()
        return super().get_pointer_to_function(name)


# For the functions that a kernel is made of; they cannot be called from Python. (no_rewrites: nothing here is an array
# expression, and looking for one takes a twentieth of the compile time.)
inner = njit(error_model="numpy", boundscheck=False, no_cpython_wrapper=True, no_cfunc_wrapper=True, no_rewrites=True)

_OUTLINED: set[str] = set()


def outlined(py_func):
    """inner() for code that runs at most once for a tile or a block. LLVM does not inline it, which saves a tenth of
    the compile time and costs nothing at run time."""
    _OUTLINED.add(f"{len(py_func.__name__)}{py_func.__name__}B")  # as it stands in the mangled name
    return inner(py_func)


class _KernelLibrary(JITCodeLibrary):
    """A kernel's own library. Its inner functions are private to it. Their names are unique in one process only: two
    kernels from the cache, compiled in two processes, would otherwise call each other's."""

    def _optimize_final_module(self):
        for fn in self._final_module.functions:
            if not fn.is_declaration and fn.linkage == llvm.Linkage.linkonce_odr:
                fn.linkage = llvm.Linkage.internal
        super()._optimize_final_module()


@contextlib.contextmanager
def _inner_libraries(kernel: str):
    """While the kernel of this qualified name is compiled, every library but its own is an inner one."""
    codegen = cpu_target.target_context.codegen()
    own = type(codegen)._library_class

    def library_class(codegen, name):
        return (_KernelLibrary if name == kernel else _InnerLibrary)(codegen, name)

    library_class._unserialize = own._unserialize

    def set_env(name, env):
        # Without an address the function is in no engine, and nothing of ours reads its environment.
        if codegen._engine.get_global_value_address(name):
            type(codegen).set_env(codegen, name, env)

    with global_compiler_lock:
        collecting = gc.isenabled()
        gc.disable()  # a compilation leaves no garbage, and the search takes a tenth of its time
        codegen._library_class, codegen.set_env = library_class, set_env
        try:
            yield
        finally:
            del codegen._library_class, codegen.set_env
            if collecting:
                gc.enable()


@contextlib.contextmanager
def _working_folder():
    """Numba asks for the working folder while it compiles. If that was deleted, the root folder is the working folder
    until the kernel is compiled. Hold Numba's lock, so that no other thread changes the folder back meanwhile."""
    try:
        os.getcwd()
        lost = None
    except FileNotFoundError:
        try:
            lost = os.open(".", os.O_RDONLY)
        except OSError:
            raise RuntimeError(
                "numba_attn: the working folder was deleted, and Numba cannot compile without one: "
                "os.chdir to a folder that exists"
            ) from None
        os.chdir("/")
    try:
        yield
    finally:
        if lost is not None:
            os.fchdir(lost)
            os.close(lost)


# ---------------------------------------------------------------- entry kernels


def compile_cfunc(py_func, signature, name: str, cached: bool = True) -> int:
    """The address of py_func as a C function; compiled, or loaded from the cache."""
    start = time.perf_counter()
    args, ret = signature.args, signature.return_type
    # The symbol that the address is looked up by: no other kernel's, of this version or another, may be the same.
    unique = f"{fingerprint('cpu')[:16]}_{ROW.name}" if cached else str(next(_COUNTER))
    py_func.__name__ = py_func.__qualname__ = re.sub(r"\W", "_", f"{name}_{unique}")
    c = CFunc(py_func, (args, ret), locals={}, options={"nopython": True, "error_model": "numpy"})
    if cached:
        c._cache = _cache_for(py_func, name)
    with _inner_libraries(py_func.__qualname__), _working_folder():
        c.compile()
    _KEEP.append(c)
    LOG.append((name, time.perf_counter() - start, "loaded" if c.cache_hits else "compiled"))
    return c.address


_COUNTER = itertools.count()
_KEEP: list[CFunc] = []  # this object keeps the machine code alive


def compile_entry(py_func, signature, name: str, parallel: bool = False):
    """py_func as a dispatcher with one signature that releases the GIL; compiled, or loaded from the cache."""
    start = time.perf_counter()
    dispatcher = njit(nogil=True, parallel=parallel, error_model="numpy")(py_func)
    dispatcher._cache = _cache_for(py_func, name)
    with global_compiler_lock, _working_folder():
        dispatcher.compile(signature)
    dispatcher.disable_compile()
    hit = bool(sum(dispatcher.stats.cache_hits.values()))
    LOG.append((name, time.perf_counter() - start, "loaded" if hit else "compiled"))
    return dispatcher


def array_type(dtype, ndim: int, writable: bool = False):
    """Any strides, read-only unless written, aligned or not: one signature takes them all."""
    return types.Array(numba.from_dtype(dtype), ndim, "A", readonly=not writable, aligned=False)
