"""Where compiled kernels are kept between processes, and the digest of the sources that they are stored with."""

import hashlib
import os
import pkgutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Any

import numba
from numba.core import config
from numba.misc.appdirs import AppDirs

PACKAGE = Path(__file__).resolve().parent


@cache
def fingerprint(kernels: str) -> str:
    """A digest of all that decides the code of the kernels in folder `kernels`: Numba, and the package's sources
    without those of the other device."""
    digest = hashlib.sha256(f"{numba.__version__} {sys.version_info} {config.OPT} {config.ENABLE_AVX}".encode())
    package = find_spec(__package__)
    assert package is not None
    modules: list[tuple[str, Any]] = [(__package__, package.loader)]
    modules += _modules(__package__, package.submodule_search_locations or [])
    if len(modules) == 1:  # an importer that lists nothing: what is compiled serves this process alone
        digest.update(os.urandom(32))
    other = {"cpu": f"{__package__}.cuda", "cuda": f"{__package__}.cpu"}[kernels]
    for name, loader in modules:
        if name != other and not name.startswith(other + "."):
            source = loader.get_source(name)
            texts = _code(loader.get_code(name)) if source is None else [source.encode()]
            digest.update(b"\0".join([name.encode(), *texts, b""]))
    return digest.hexdigest()


def _modules(package: str, path: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Name and loader of every module under a package, imported or not, from a folder, a zip or .pyc files alone."""
    for info in sorted(pkgutil.iter_modules(path), key=lambda info: info.name):
        name, finder = f"{package}.{info.name}", info.module_finder
        yield name, finder.find_spec(name).loader  # type: ignore[call-arg, union-attr]
        if info.ispkg:
            yield from _modules(name, [os.path.join(folder, info.name) for folder in path])


def _code(code: CodeType) -> Iterator[bytes]:
    """What a code object does, without the names of files and the numbers of lines. Only where there is no source: it
    takes a tenth of a second for the whole package."""
    yield code.co_code + code.co_exceptiontable
    yield repr((code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)).encode()
    yield repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        elif isinstance(constant, frozenset):  # its order differs between processes
            yield repr(sorted(map(repr, constant))).encode()
        else:
            yield repr(constant).encode()


@cache
def cache_folder() -> str | None:
    """The first of NUMBA_ATTN_CACHE_DIR, NUMBA_CACHE_DIR, __pycache__ of the package and the user's cache folder that
    can be written or was filled ahead of time. None with a warning."""
    named = [os.path.join(d, "numba_attn") for d in (os.environ.get("NUMBA_ATTN_CACHE_DIR"), config.CACHE_DIR) if d]
    for folder in named or [
        str(PACKAGE / "__pycache__"),
        os.path.join(AppDirs(appname="numba_attn", appauthor=False).user_cache_dir),
    ]:
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
        except OSError:
            if os.path.exists(_mark(folder)):
                return folder
    warnings.warn(
        "numba_attn: no writable cache folder, so kernels are compiled anew in every process (some seconds); "
        "set NUMBA_ATTN_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _mark(folder: str) -> str:
    from numba.core.registry import cpu_target

    stamp = f"{fingerprint('cpu')} {cpu_target.target_context.codegen().magic_tuple()}"
    return os.path.join(folder, f"filled-{hashlib.sha256(stamp.encode()).hexdigest()[:32]}")


def mark_filled(folder: str) -> None:
    """Mark the folder as holding kernels of these sources for this CPU. A process that may only read it then uses
    it."""
    if not os.path.exists(_mark(folder)):
        Path(_mark(folder)).touch()
