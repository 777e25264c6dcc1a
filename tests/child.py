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


def importing(*folders: Path) -> dict[str, str]:
    """The environment of a process that imports from these folders, too."""
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_python(
    code: str, *args: str, env: dict[str, str | None] | None = None, timeout: float = 900, check: bool = True,
    package: Path = IMPORTED_FROM,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`code` in a fresh interpreter that can import the test modules and the package, which lies in `package`.

    None in env removes a variable. A run that fails is a failed test, unless check is False.
    """
    full = importing(package, TESTS)
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


def run_sweep(code: str, edge: str, form: str, total: int) -> list[str]:
    """What `code`, given edge, form and the first of `total` problems, finds wrong. It prints "at n name" before each
    problem, "differs ..." and at the end "done"; where it dies, the next child goes on behind."""
    wrong: list[str] = []
    first = 0
    while first < total and len(wrong) < 5:
        done = run_python(code, edge, form, str(first), check=False)
        lines = done.stdout.splitlines()
        wrong += [line for line in lines if line.startswith("differs")]
        if lines and lines[-1] == "done":
            break
        where = [line.split() for line in lines if line.startswith("at ")]
        assert where and done.returncode < 0, f"the sweep itself failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        wrong.append(f"signal {-done.returncode} at {where[-1][2]}")
        first = int(where[-1][1]) + 1
    return wrong
