"""Every row of the table of cases through backend="cuda": the package's own host code, and its PTX in the emulator with
all checks on.

The rules are those of the CPU's tests (test_attention.check, test_backward.check), run with "cuda" as the backend that
is meant where none is named. A few small rows run always; all rows, and all rows in the other dtypes, with --ladder.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

import emulator
import test_attention
import test_backward
from cases import CASES, DTYPES, Case, build

import numba_attn as na
from numba_attn.cuda import driver

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# Pairs times head sizes that the emulator is asked for: about a second a million, forward and backward.
LARGEST = 50e6
SMALL = 0.3e6


def work(case: Case) -> int:
    return case.batch * case.heads[0] * case.q_len * case.kv_len * sum(case.dims)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[emulator.EmulatedDevice]:
    """An emulated device, and "cuda" for the backend of calls that name none."""
    for name in ("attention", "attention_vjp", "attention_backward"):
        monkeypatch.setattr(na, name, functools.partial(getattr(na, name), backend="cuda"))
    with driver.use(emulator.EmulatedDevice((8, 0))) as device:
        yield device


def rows(dtype: str | None) -> list[Case]:
    """All rows in their own dtype, or those of another dtype in this one."""
    found = [case for case in CASES if work(case) < LARGEST]
    if dtype is None:
        return found
    return [replace(case, name=f"{case.name}-as-{dtype}", dtype=dtype) for case in found if case.dtype != dtype]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = rows(None)
    if metafunc.config.getoption("--ladder"):
        cases += [case for dtype in DTYPES for case in rows(dtype)]
    else:
        cases = [case for case in cases if work(case) < SMALL][::3]
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def test_case(case: Case, cuda: emulator.EmulatedDevice) -> None:
    test_attention.check(*build(case))


def test_gradients(case: Case, cuda: emulator.EmulatedDevice) -> None:
    test_backward.check(*build(case))
