"""Where compiled kernels are kept between processes, and what they are stamped with."""

import hashlib
import os
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import numba
from numba.core import config
from numba.misc.appdirs import AppDirs

PACKAGE = Path(__file__).resolve().parent


@cache
def fingerprint(kernels: str) -> str:
    """A digest of what decides the code of the kernels in folder `kernels`: the package's sources, but for the other
    device's, and Numba."""
    digest = hashlib.sha256(f"{numba.__version__} {sys.version_info} {config.OPT} {config.ENABLE_AVX}".encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0] not in {"cpu", "cuda"} - {kernels}:
            digest.update(str(name).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def cache_folder() -> str | None:
    """The first writable of: NUMBA_ATTN_CACHE_DIR, NUMBA_CACHE_DIR, __pycache__ of the package, the user's cache
    folder. None with a warning."""
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
            continue
    warnings.warn(
        "numba_attn: no writable cache folder, so kernels are compiled anew in every process (some seconds); "
        "set NUMBA_ATTN_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )
    return None
