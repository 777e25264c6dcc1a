"""test_gpu.py on an emulated device, a few of each kind: what fails here would fail on a GPU at the first try."""

import os

import pytest
from child import run_python

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")
pytestmark = [
    pytest.mark.processes,
]

CHOSEN = [
    "test_case[plain-3x203]",
    "test_case[head-40-float16]",
    "test_case[plain-1x1-as-bfloat16]",
    "test_calls_like_one_before_on_many_streams",
    "test_the_benchmark_prints_a_block",
    "test_the_kernels_are_those_that_were_verified",
]

RUN = """
import sys
sys.path[:0] = sys.argv[1:3]
import emulator, pytest
from numba_attn.app import bench_cuda as bench
from numba_attn.cuda.host import driver
bench.FILL = 2**20
with driver.use(emulator.EmulatedDevice()):
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "gpu", "--ladder", *sys.argv[3:]]))
"""


def test_a_few_of_each_kind() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    module = os.path.join(here, "test_gpu.py")
    names = [f"{module}::{name}" for name in CHOSEN]
    env: dict[str, str | None] = {"PYTEST_ADDOPTS": None}  # -n 2 of the run around it
    done = run_python(RUN, os.path.dirname(here), here, *names, env=env, timeout=900)
    assert f"{len(CHOSEN)} passed" in done.stdout, done.stdout
