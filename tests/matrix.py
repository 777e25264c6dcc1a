"""The accuracy tests with other numbers, other SIMD rows and other BLAS kernels: `python tests/matrix.py`.

    python tests/matrix.py                          20 seeds x 3 SIMD rows, the BLAS kernels taken in turns
    python tests/matrix.py --full                   every seed with every BLAS kernel
    python tests/matrix.py --share 5                each test with every fifth seed: a fifth of the time
    python tests/matrix.py --seeds 3 --tests tests/test_attention.py -- -k plain

A seed is NUMBA_ATTN_TEST_SEED (seeds.py), a row NUMBA_ATTN_SIMD, a BLAS kernel OPENBLAS_CORETYPE. A row or a kernel
that this CPU cannot execute is named as not run, and so is a kernel that NumPy's OpenBLAS does not take. Every run is
one pytest; behind `--`, `-n 2` makes it two processes. Exit status 1 if a run fails.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("attention", "backward", "central_differences", "jvp", "modifiers", "dual", "simd")
TESTS = [f"tests/test_{name}.py" for name in NAMES]

# What a kernel of OpenBLAS needs of the CPU, by the names of /proc/cpuinfo.
BLAS = {
    "Nehalem": {"sse4_2"},
    "Haswell": {"avx2", "fma"},
    "Zen": {"avx2", "fma"},
    "SkylakeX": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
ROWS = {"sse2": set(), "avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}

# Prints the name of the kernels that NumPy's OpenBLAS has chosen; nothing where NumPy has another BLAS.
CORE = """
import ctypes, pathlib, numpy
for path in (pathlib.Path(numpy.__file__).parent.parent / "numpy.libs").glob("*openblas*"):
    library = ctypes.CDLL(str(path))
    for name in ("scipy_openblas_get_corename64_", "openblas_get_corename64_", "openblas_get_corename"):
        if hasattr(library, name):
            function = getattr(library, name)
            function.restype = ctypes.c_char_p
            print(function().decode())
            raise SystemExit
"""


class Run(NamedTuple):
    """One cell of the matrix."""

    seed: int
    row: str
    blas: str


def flags() -> set[str]:
    """What the CPU has; empty where the system does not tell, so that only the plainest rows run."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return "unknown CPU"
    return found[1] if found else "unknown CPU"


def usable_blas(has: set[str]) -> tuple[list[str], list[str]]:
    """The kernels that run here, and in words those that do not."""
    runs, not_run = [], []
    for name, needs in BLAS.items():
        if not needs <= has:
            not_run.append(f"{name} (the CPU lacks {', '.join(sorted(needs - has))})")
            continue
        environment = os.environ | {"OPENBLAS_CORETYPE": name}
        core = subprocess.run([sys.executable, "-c", CORE], capture_output=True, text=True, env=environment).stdout
        if core.strip().lower() == name.lower():
            runs.append(name)
        else:
            not_run.append(f"{name} (NumPy's BLAS says {core.strip() or 'nothing'})")
    return runs, not_run


def cells(seeds: int, rows: list[str], blas: list[str], full: bool) -> list[Run]:
    kernels = blas or [""]
    if full:
        return [Run(seed, row, b) for seed in range(1, seeds + 1) for row in rows for b in kernels]
    return [
        Run(seed, row, kernels[(seed + n) % len(kernels)]) for seed in range(1, seeds + 1) for n, row in enumerate(rows)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--full", action="store_true", help="every seed with every BLAS kernel")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="each test with every N-th seed")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files of tests")
    parser.add_argument("pytest", nargs="*", help="what pytest is given besides, behind --")
    args = parser.parse_args()
    has = flags()
    rows = [row for row, needs in ROWS.items() if needs <= has]
    blas, not_run = usable_blas(has)
    print(f"{model()}: rows {', '.join(rows)}; BLAS kernels {', '.join(blas) or 'as they are'}")
    for name in [*(f"row {row}" for row in ROWS if row not in rows), *not_run]:
        print(f"not run: {name}")
    failed = 0
    for run in cells(args.seeds, rows, blas, args.full):
        environment = os.environ | {"NUMBA_ATTN_TEST_SEED": str(run.seed), "NUMBA_ATTN_SIMD": run.row}
        if run.blas:
            environment["OPENBLAS_CORETYPE"] = run.blas
        command = [sys.executable, "-m", "pytest", "-q", "--quick", f"--share={args.share}", *args.tests, *args.pytest]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
        seconds = time.perf_counter() - start
        print(f"seed {run.seed:3}  {run.row:7} {run.blas:9} {seconds:6.0f} s  {lines[-1]}", flush=True)
        if done.returncode:
            failed += 1
            print("\n".join("    " + line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))))
    print(f"{failed} runs failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
