"""CPU kernels broken on purpose: the suite's own checks must notice each of them.

A mutant is a copy of the package with one line of one file changed. A few tests of the suite run on it in a process of
their own: they must fail by an assertion, and pass on a copy that is not changed.
"""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from child import IMPORTED_FROM, TESTS, run_python

pytestmark = [pytest.mark.slow, pytest.mark.processes]
PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


class Mutant(NamedTuple):
    file: str  # in numba_attn/cpu
    old: str  # stands there once
    new: str
    noticed_by: str  # the test, as pytest names it


MUTANTS = {
    # A block as long as the keys: its sum is one chain, and no second level is left.
    "one-level-sum": Mutant(
        "forward.py",
        "keys = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64",
        "keys = 8192",
        "test_attention.py::test_many_keys[float32-7680-uniform]",
    ),
    # 4 ulp too small at the lower end of the polynomial, still exact at 0.
    "exp2-4-ulp": Mutant(
        "vectors.py",
        "coefficients, lowest, mantissa = exp2_constants(x.elem)",
        "coefficients, lowest, mantissa = exp2_constants(x.elem); "
        "coefficients = (*coefficients[:-2], coefficients[-2] + 4 * 2.0**-mantissa, coefficients[-1])",
        "test_simd.py::test_exp2[f32]",
    ),
    "no-rescale": Mutant(
        "softmax.py",
        "store(alpha + c, rescale(old, new))",
        "store(alpha + c, splat(old, 1))",
        "test_attention.py::test_logits_of_any_size[50.0-float32]",
    ),
    # Large scores: lse is rounded to less than the largest, and its weight exceeds 1.
    "lse-rounded-below-the-maximum": Mutant(
        "backward.py",
        "exp2(select(y > zero, zero, y)))\n            ds = select(x == hidden, zero, p * (load(dp + at) - delta",
        "exp2(y))\n            ds = select(x == hidden, zero, p * (load(dp + at) - delta",
        "test_backward.py::test_weights_stay_weights[100000000.0]",
    ),
    "lse-in-float32": Mutant(
        "forward.py",
        "value = np.float64(m[r]) * LN2 + math.log(np.float64(l[r]))",
        "value = m[r] * scalar(m, LN2) + math.log(l[r])",
        "test_backward.py::test_saturated_rows_lose_no_more_than_the_rounding_of_lse",
    ),
    "log-sum-in-float32": Mutant(
        "delta.py",
        "scalar(x, np.float64(lse) * LOG2E)",
        "lse * scalar(x, LOG2E)",
        "test_backward.py::test_saturated_rows_lose_no_more_than_the_rounding_of_lse",
    ),
    "delta-without-dlse": Mutant(
        "delta.py", "if call.dlse:", "if call.dlse < 0:", "test_backward.py::test_dlse_of_any_dtype[float32]"
    ),
    "stale-tail-of-keys": Mutant(
        "softmax.py",
        "range(keys.last * w, last * w)",
        "range(last * w, last * w)",
        "test_attention.py::test_case[plain-63x799]",
    ),
    "window-one-short": Mutant(
        "queries.py",
        "max(0, i - call.left) if",
        "max(0, i - call.left + 1) if",
        "test_attention.py::test_many_keys_causal[normal]",
    ),
    "plain-fma-where-hidden": Mutant(
        "registers.py",
        "builder.select(seen[j], new, old) if seen else new",
        "new",
        "test_nan.py::test_a_visible_infinite_value_reaches_exactly_its_rows",
    ),
}


def run_on_copy(folder: Path, tests: list[str], mutant: Mutant | None = None) -> tuple[int, str]:
    """(exit status, report) of some tests on a copy of the package in `folder`."""
    package = folder / "numba_attn"
    shutil.copytree(IMPORTED_FROM / "numba_attn", package, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant:
        file = package / "cpu" / mutant.file
        source = file.read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, f"{mutant.file} has changed: write this mutant anew"
        file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    names = [str(TESTS / name) for name in tests]
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    done = run_python(
        PYTEST, *options, *names, env={"NUMBA_ATTN_CACHE_DIR": str(folder / "cache")}, check=False, package=folder
    )
    return done.returncode, done.stdout + done.stderr


def test_the_kernels_as_they_are_pass(tmp_path: Path) -> None:
    status, report = run_on_copy(tmp_path, sorted({mutant.noticed_by for mutant in MUTANTS.values()}))
    assert status == 0, report


@pytest.mark.parametrize("name", list(MUTANTS))
def test_mutant_is_noticed(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    status, report = run_on_copy(tmp_path, [mutant.noticed_by], mutant)
    assert status == 1, report
    assert re.search(r"^E +(AssertionError|assert )", report, re.M), report
    print(*re.findall(r"^E .*", report, re.M)[:3], sep="\n")
