"""The quick tests with each minor version of Numba that pyproject.toml admits, a fresh virtual environment each.

    python tests/versions.py                 each minor, all quick tests of the CPU: the whole matrix
    python tests/versions.py --ends --part sample --jobs 2      what .ci/run does: the oldest and the newest, a sample
    python tests/versions.py --numba 0.62,0.66 --part kernels --jobs 2

The oldest Numba runs with the oldest NumPy, and so does the newest once more; the others run with the newest NumPy that
they accept. Needs pip and an index; nothing but the standard library besides. Exit status 1 if anything fails.

Cost of a row, environment included, on two cores shared with other work (AMD EPYC): "sample" two to three minutes,
"kernels" from seven to twenty-five, "quick" from twenty to twenty-six (Zen 3, two rows at once).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_NUMPY = "2.0"

# What pytest is given. The sample has processes that compile and load, since the disk cache builds on private classes.
PARTS = {
    "quick": ["--quick", "tests", "--ignore=tests/cuda"],
    "kernels": ["--quick", *(f"tests/test_{name}.py" for name in ("attention", "simd", "modifiers", "jvp", "dual"))],
    "sample": [
        *(f"tests/test_{name}.py" for name in ("attention", "simd", "modifiers", "process")),
        *("-m", "not slow", "-k", "simd or modifiers or everything or second_process"),
    ],
}


def requirements() -> list[str]:
    """What the package and its tests need, as pyproject.toml has it. The package itself is run where it lies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + project["optional-dependencies"]["test"]


def admitted_minors() -> list[str]:
    """The minor versions of Numba on the index, from the lower bound of pyproject.toml to the newest, as "0.61"."""
    (bound,) = (m[1] for d in requirements() if (m := re.fullmatch(r"numba>=([\d.]+)", d)))
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "numba"], capture_output=True, text=True, check=True
    ).stdout
    (line,) = re.findall(r"^Available versions: (.*)$", listing, re.MULTILINE)
    found = {number(version) for version in line.split(", ")}
    return [f"{major}.{minor}" for major, minor in sorted(found) if (major, minor) >= number(bound)]


def number(version: str) -> tuple[int, int]:
    """ "0.61.2" -> (0, 61)."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def matrix(minors: list[str]) -> list[tuple[str, str | None]]:
    """(Numba, NumPy or None for the newest that it accepts) of each row."""
    rows: list[tuple[str, str | None]] = [(minor, None) for minor in minors]
    rows[0] = (minors[0], OLDEST_NUMPY)
    if len(minors) > 1:
        rows.append((minors[-1], OLDEST_NUMPY))
    return rows


def run(numba: str, numpy: str | None, part: str, folder: Path) -> dict[str, str]:
    """One row of the table: the environment made in `folder`, and the tests run in it."""
    start = time.perf_counter()
    row = {"numba": numba, "numpy": numpy or "newest", "passed": "", "failed": "", "skipped": "", "seconds": ""}
    venv.create(folder)
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    wanted = [f"numba=={numba}.*", *([f"numpy=={numpy}.*"] if numpy else []), *requirements()]
    install = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", *wanted],
        capture_output=True,
        text=True,
    )
    if install.returncode:
        print(install.stderr, flush=True)
        return row | {"failed": "does not install", "seconds": f"{time.perf_counter() - start:.0f}"}
    ask = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('numba', 'numpy')}))"
    row |= json.loads(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout)
    tests = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PARTS[part]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_ATTN_CACHE_DIR": str(folder / "kernels")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = tests.stdout.rstrip().rpartition("\n")[2]
    counts = {word: count for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    failed = int(counts.get("failed", 0)) + int(counts.get("error", 0))
    if tests.returncode:
        print(tests.stdout, flush=True)
        failed = failed or f"exit status {tests.returncode}"
    row |= {"passed": counts.get("passed", "0"), "failed": str(failed), "skipped": counts.get("skipped", "0")}
    return row | {"seconds": f"{time.perf_counter() - start:.0f}"}


def run_row(numba: str, numpy: str | None, part: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="numba-attn-") as folder:
        return run(numba, numpy, part, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="quick", help="which tests (default: quick)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--ends", action="store_true", help="the oldest and the newest Numba alone")
    chosen.add_argument("--numba", metavar="0.61,0.68", help="these minor versions alone")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once (default: %(default)s)")
    args = parser.parse_args()
    minors = admitted_minors()
    if args.numba:
        asked = args.numba.split(",")
        if unknown := [minor for minor in asked if minor not in minors]:
            parser.error(f"--numba: {unknown[0]!r} is none of {', '.join(minors)}")
        minors = [minor for minor in minors if minor in asked]
    if args.ends:
        rows = [(minors[0], OLDEST_NUMPY), (minors[-1], None)]
    else:
        rows = matrix(minors)
    print(f"Python {sys.version.split()[0]}, tests: {args.part}", flush=True)
    line = "{numba:<10}{numpy:<10}{passed:>8}{failed:>18}{skipped:>9}{seconds:>9}"
    print(line.format_map({name: name for name in re.findall(r"\w+(?=:)", line)}), flush=True)
    failed = False
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda versions: run_row(*versions, args.part), rows):
            print(line.format_map(row), flush=True)
            failed |= row["failed"] != "0"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
