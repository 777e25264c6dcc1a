"""Compiling and caching the entry kernels.

Numba's own disk cache keys a kernel by its bytecode: neither constants of other files nor the functions that it calls
take part, so an edit elsewhere in the package would leave a stale kernel. Here the stamp is a fingerprint of every
source file of the package, and the SIMD row is part of the file name. With no writable folder, kernels are compiled in
every process and one warning says so.

The cache classes of Numba that this builds on are private: they are used in this file only, and tests/test_process.py
fails when they change.
"""

import contextlib
import gc
import hashlib
import itertools
import pickle
import re
import sys
import time
import warnings
from pathlib import Path

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

# What was compiled or loaded in this process: (name, seconds, "compiled" | "loaded"). `numba-attn info` and the
# benchmarks print it.
LOG: list[tuple[str, float, str]] = []


class _Locator(caching._CacheLocator):
    def __init__(self, folder: str):
        self._folder = folder
        self._py_file = __file__

    def get_cache_path(self):
        return self._folder

    def get_source_stamp(self):
        return fingerprint("cpu")

    def get_disambiguator(self):
        return ROW.name


class _Impl(caching.CompileResultCacheImpl):
    def __init__(self, py_func, name: str, folder: str):
        self._locator = _Locator(folder)
        self._lineno = py_func.__code__.co_firstlineno
        self._filename_base = self.get_filename_base("numba_attn." + name, getattr(sys, "abiflags", ""))


class _File(caching.IndexDataCacheFile):
    """Machine code with a digest in front: a file that a crash cut short must not be run."""

    def save(self, key, data):
        super().save(key, (repr(key), self._source_stamp, data))

    def load(self, key):
        """Only what this very key and these very sources wrote: index and data are two files, which two processes may
        write in turns."""
        found = super().load(key)
        return found[2] if found is not None and found[:2] == (repr(key), self._source_stamp) else None

    def _save_data(self, name, data):
        data = self._dump(data)
        with self._open_for_write(self._data_path(name)) as f:
            f.write(hashlib.sha256(data).digest() + data)

    def _load_data(self, name):
        data = Path(self._data_path(name)).read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise ValueError("damaged")
        return pickle.loads(data[32:])


class _Cache(caching.Cache):
    def __init__(self, py_func, name: str, folder: str):
        self._name, self._py_func = name, py_func
        self._impl = _Impl(py_func, name, folder)
        self._cache_path = folder
        self._cache_file = _File(folder, self._impl.filename_base, fingerprint("cpu"))
        self.enable()

    def _index_key(self, sig, codegen):
        """Signature and target: the sources, closures included, are in the stamp."""
        return sig, codegen.magic_tuple()

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever a damaged file makes pickle raise: compile anew, and write the files anew
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        with contextlib.suppress(OSError):  # a full disk, or a folder that is gone by now
            super().save_overload(sig, data)


def _cache_for(py_func, name):
    folder = cache_folder()
    try:
        return _Cache(py_func, name, folder) if folder else caching.NullCache()
    except (AttributeError, TypeError) as error:  # Numba's private classes have changed
        warnings.warn(
            f"numba_attn: no kernel cache with Numba {numba.__version__} ({error})", RuntimeWarning, stacklevel=3
        )
        return caching.NullCache()


# ---------------------------------------------------------------- inner functions
#
# Numba optimises every function that a kernel calls and writes machine code for it, although only the kernel that it is
# inlined into is ever run: two thirds of the compile time. Inner functions here stop at LLVM IR, and the kernel's own
# pass optimises all.


class _InnerLibrary(JITCodeLibrary):
    """A library to link from. Should anyone ask for the address of a function in it after all, it is finished then."""

    _added = False

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        if not self._added:
            try:  # a look-up by name: this is asked of every inner function, whose module holds all that it calls
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
    """inner() for what runs once a tile or a block, or seldom: LLVM leaves it a function, which saves a tenth of the
    compile time and nothing at run time."""
    _OUTLINED.add(f"{len(py_func.__name__)}{py_func.__name__}B")  # as it stands in the mangled name
    return inner(py_func)


class _KernelLibrary(JITCodeLibrary):
    """A kernel's own library. What it is made of is private to it: the names of inner functions are unique in one
    process only, and two kernels out of the cache, compiled in two processes, would take each other's."""

    def _optimize_final_module(self):
        for fn in self._final_module.functions:
            if not fn.is_declaration and fn.linkage == llvm.Linkage.linkonce_odr:
                fn.linkage = llvm.Linkage.internal
                if any(name in fn.name for name in _OUTLINED):
                    fn.add_function_attribute("noinline")
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
        gc.disable()  # nothing to collect in a compilation, and looking takes a tenth of it
        codegen._library_class, codegen.set_env = library_class, set_env
        try:
            yield
        finally:
            del codegen._library_class, codegen.set_env
            if collecting:
                gc.enable()


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
    with _inner_libraries(py_func.__qualname__):
        c.compile()
    _KEEP.append(c)
    LOG.append((name, time.perf_counter() - start, "loaded" if c.cache_hits else "compiled"))
    return c.address


_COUNTER = itertools.count()
_KEEP: list[CFunc] = []  # a C function dies with its object


def compile_entry(py_func, signature, name: str, parallel: bool = False):
    """py_func as a dispatcher with one signature that releases the GIL; compiled, or loaded from the cache."""
    start = time.perf_counter()
    dispatcher = njit(nogil=True, parallel=parallel, error_model="numpy")(py_func)
    dispatcher._cache = _cache_for(py_func, name)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    hit = bool(sum(dispatcher.stats.cache_hits.values()))
    LOG.append((name, time.perf_counter() - start, "loaded" if hit else "compiled"))
    return dispatcher


def array_type(dtype, ndim: int, writable: bool = False):
    """Any strides, read-only unless written, aligned or not: one signature takes them all."""
    return types.Array(numba.from_dtype(dtype), ndim, "A", readonly=not writable, aligned=False)
