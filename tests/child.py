"""Python code in a process of its own: for settings read at import, for crashes, and for peak memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import numba_attn

TESTS = Path(__file__).resolve().parent
IMPORTED_FROM = (
    Path(numba_attn.__file__).resolve().parent.parent
)  # the checkout, or site-packages where a wheel is tested


def run_python(
    code: str, *args: str, env: dict[str, str | None] | None = None, timeout: float = 900, check: bool = True,
    package: Path = IMPORTED_FROM,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`code` in a fresh interpreter that can import the test modules and the package, which lies in `package`.

    None in env removes a variable. A run that fails is a failed test, unless check is False.
    """
    full = dict(os.environ)
    paths = [str(package), str(TESTS), full.get("PYTHONPATH", "")]
    full["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    for name, value in (env or {}).items():
        if value is None:
            full.pop(name, None)
        else:
            full[name] = value
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *args], env=full, capture_output=True, text=True, timeout=timeout
    )
    if check and done.returncode:
        pytest.fail(
            f"exit status {done.returncode}\n--- stdout\n{done.stdout[-4000:]}\n--- stderr\n{done.stderr[-8000:]}"
        )
    return done
