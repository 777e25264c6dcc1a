"""The kernels' disk cache.

Numba's own disk cache keys a kernel by its bytecode: neither constants of other files nor the functions that it calls
take part, so an edit elsewhere in the package would leave a stale kernel. Here the stamp is a fingerprint of all the
package's sources, and the SIMD row is part of the file name.

The cache classes of Numba that this builds on are private: they are used in this file only, which an untested Numba
does not import, and tests/test_process.py fails when they change.
"""

import contextlib
import hashlib
import pickle
import sys
import warnings
from pathlib import Path

from numba.core import caching

from ..cache import fingerprint
from .simd import ROW


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
        """Only a kernel with this key and of these sources. Index and data are two files, and two processes may write
        one each."""
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


class KernelCache(caching.Cache):
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
        except Exception:  # a damaged file makes pickle raise anything: compile, and write the files again
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:  # a full disk, or a folder that was deleted, or filled ahead of time and is read-only
            warnings.warn(
                f"numba_attn: {self._cache_path} takes no kernel, so it is compiled anew in every process: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
