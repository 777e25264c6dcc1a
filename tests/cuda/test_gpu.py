"""What a machine with a GPU runs: `pytest -m gpu`. The same rules as on the CPU, on every row of the table of cases
(with --ladder in every dtype), then what an emulator cannot show: the driver's own path, large shapes, other libraries'
arrays, streams. The first run compiles some hundred kernels, which takes longer than all the rest.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

import test_attention
import test_backward
from cases import BY_NAME, CASES, DTYPES, Case, build
from defaults import cuda_by_default

import numba_attn as na
from numba_attn.cuda import bench, driver

if (why := driver.missing()) is not None:
    pytest.skip(f"no GPU: {why}", allow_module_level=True)
pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The device, and "cuda" for the backend of calls that name none."""
    cuda_by_default(monkeypatch)
    return driver.current()


def in_every_dtype() -> list[Any]:
    """The rows, then all rows in the other dtypes: most of them need kernels that nothing else does."""
    return CASES + [
        pytest.param(replace(case, name=f"{case.name}-as-{dtype}", dtype=dtype), marks=pytest.mark.ladder)
        for dtype in DTYPES
        for case in CASES
        if case.dtype != dtype
    ]


@pytest.mark.parametrize("case", in_every_dtype(), ids=lambda case: case.name)
def test_case(case: Case, cuda: Any) -> None:
    arrays, options = build(case)
    test_attention.check(arrays, options)
    test_backward.check(arrays, options)


@pytest.mark.parametrize("dim", [8, 32, 72, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(dtype: str, dim: int, cuda: Any) -> None:
    """Each needs another tile, and from 128 on more shared memory than a kernel has without asking."""
    arrays, options = build(replace(BY_NAME["plain-63x203"], dtype=dtype, dims=(dim, dim)))
    test_attention.check(arrays, options)
    test_backward.check(arrays, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(dtype: str, cuda: Any) -> None:
    """Whatever order the blocks run in, alone and in a batch."""
    case = replace(BY_NAME["plain-63x203"], dtype=dtype, batch=8, heads=(8, 2), q_len=500, kv_len=700, dims=(64, 64))
    (q, k, v), _ = build(case)
    rng = np.random.default_rng(0)
    dout = rng.standard_normal(q.shape).astype(q.dtype)
    seen = set()
    for _ in range(5):
        (out, lse), pullback = na.attention_vjp(q, k, v, causal=True, align="bottom_right", return_lse=True)
        grads = pullback(dout)
        seen.add(b"".join(x.tobytes() for x in (out, lse, grads.dq, grads.dk, grads.dv)))
    assert len(seen) == 1
    alone = na.attention(q[3:4], k[3:4], v[3:4], causal=True, align="bottom_right")
    assert alone.tobytes() == out[3:4].tobytes()


def test_more_than_two_to_the_31_elements(cuda: Any) -> None:
    """Addresses are 64 bits wide: the last rows of an array of 2**31 + 2**20 elements."""
    if cuda.total_memory < 16 * 2**30:
        pytest.skip("takes 16 GiB")
    rows = 2**31 // 64 + 2**14
    rng = np.random.default_rng(0)
    k = np.zeros((1, 1, rows, 64), np.float16)
    k[:, :, -64:] = rng.standard_normal((1, 1, 64, 64))
    q = rng.standard_normal((1, 1, 64, 64)).astype(np.float16)
    out = na.attention(q, k, k, window=(0, 0), align="bottom_right")
    np.testing.assert_array_equal(out, k[:, :, -64:])


def test_torch_arrays(cuda: Any) -> None:
    """In and out on the device, on torch's current stream, with no copy to the host."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    q, k, v = (torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = na.attention(q, k, v, causal=True, backend="auto")
    stream.synchronize()
    assert type(out) is torch.Tensor and out.device == q.device and out.dtype == q.dtype
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert (out.double() - want).abs().max() < 2e-2


def test_the_benchmark_prints_a_block(cuda: Any) -> None:
    case = replace(bench.CASES[0], batch=1, heads=2, kv_heads=2, q_len=200, kv_len=200)
    text = bench.report(cuda, [case, replace(case, backward=True)], seconds=0.05)
    assert text.startswith("```") and "TFLOP/s" in text and "wrong" not in text and "failed" not in text
