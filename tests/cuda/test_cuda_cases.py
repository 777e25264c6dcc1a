"""Every row of the table of cases through backend="cuda": the package's own host code, and its PTX in the emulator with
all checks on.

The rules are those of the CPU's tests (test_attention.check, test_backward.check), run with "cuda" as the backend that
is meant where none is named. A few small rows run always; all rows, and all rows in the other dtypes, with --ladder.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

import emulator
import test_attention
import test_backward
from cases import CASES, DTYPES, Case, build, given, seed_of
from defaults import cuda_by_default

from numba_attn.cuda.host import driver

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# Pairs times head sizes: about a second a million, forward and backward. The largest rows run in their own dtype only.
LARGEST = 50e6
SMALL = 0.3e6
# What nothing but the whole table would notice.
ALWAYS = ("varlen-tiles", "score-mod-bias", "align-large-hides-all", "align-large-window")


def work(case: Case) -> int:
    return case.batch * case.heads[0] * case.q_len * case.kv_len * sum(case.dims)


# Tiles depend on how much shared memory a block of the device can have: each dtype runs on two of the three sizes.
DEVICES = {"float32": (8, 0), "float64": (8, 6), "float16": (8, 0), "bfloat16": (9, 0)}
OTHERS = {"float32": (9, 0), "float64": (9, 0), "float16": (8, 6), "bfloat16": (8, 0)}
# How copies land, warps take turns, and exp2, its inverse and reciprocals are rounded.
WAYS: list[dict[str, Any]] = [
    {"approx_noise": 2},
    {"async_late": False},
    {"schedule": "random", "seed": 1},
    {"schedule": "random", "seed": 2, "async_late": False, "approx_noise": 2},
    {"schedule": "random", "seed": 3, "approx_noise": 2},
]


def way(case: Case, test: str) -> dict[str, Any]:
    return WAYS[seed_of(case.name + test) % len(WAYS)]


@contextlib.contextmanager
def emulated(case: Case, test: str) -> Iterator[emulator.EmulatedDevice]:
    """An emulated device, and "cuda" for the backend of calls that name none."""
    devices = OTHERS if "-as-" in case.name else DEVICES
    with pytest.MonkeyPatch.context() as patch:
        cuda_by_default(patch)
        with driver.use(emulator.EmulatedDevice(devices[case.dtype], **way(case, test))) as device:
            yield device


def rows(dtype: str | None) -> list[Case]:
    """All rows in their own dtype, or those of another dtype in this one."""
    if dtype is None:
        return list(CASES)
    found = [case for case in CASES if work(case) < LARGEST and case.dtype != dtype]
    return [replace(case, name=f"{case.name}-as-{dtype}", dtype=dtype) for case in found]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    cases = rows(None)
    if metafunc.config.getoption("--ladder"):
        cases += [case for dtype in DTYPES for case in rows(dtype)]
    else:
        small = [case for case in cases if work(case) < SMALL and case.name not in ALWAYS][::3]
        cases = [*small, *(case for case in cases if case.name in ALWAYS)]
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def test_case(case: Case) -> None:
    with emulated(case, "forward"):
        test_attention.check(*build(case))


def test_gradients(case: Case) -> None:
    with emulated(case, "gradients"):
        test_backward.check(*build(case))


def test_alibi_far_from_the_keys() -> None:
    """A distance beyond 32 bits. It moves lse alone, and rounding in the derivatives by slopes: no row of the table."""
    case = Case("alibi-large", "no overflow", given(alibi_slopes=np.full(2, 2.0**-40), align=2**40), dtype="float64")
    with emulated(case, "forward"):
        test_attention.check(*build(case))
