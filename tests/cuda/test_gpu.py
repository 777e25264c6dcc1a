"""What a machine with a GPU runs: `pytest -m gpu`. The same rules as on the CPU, on every row of the table of cases
(with --ladder in every dtype), then what an emulator cannot show: the driver's own path, large shapes, other libraries'
arrays, streams. The first run compiles some hundred kernels, which takes longer than all the rest.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import seeds

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

import ladder
import test_attention
import test_backward
from cases import BY_NAME, CASES, DTYPES, Case, build
from child import run_python
from defaults import cuda_by_default

import numba_attn as na
from numba_attn.app import bench_cuda as bench
from numba_attn.cuda.host import arrays, driver, loading, on_device

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
    rng = seeds.generator(0)
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
    rng = seeds.generator(0)
    k = np.zeros((1, 1, rows, 64), np.float16)
    k[:, :, -64:] = rng.standard_normal((1, 1, 64, 64))
    q = rng.standard_normal((1, 1, 64, 64)).astype(np.float16)
    out = na.attention(q, k, k, window=(0, 0), align="bottom_right")
    np.testing.assert_array_equal(out, k[:, :, -64:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_beyond_32_bits_of_bytes(dtype: str, cuda: Any) -> None:
    """The last of many heads, 4 GiB behind the first, as it is alone."""
    itemsize = DTYPES[dtype].itemsize
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    if min(cuda.total_memory, host) < 48 * 2**30:
        pytest.skip("takes 48 GiB, here and there")
    heads = 2**32 // (256 * 64 * itemsize) + 1
    rng = seeds.generator(0)
    one, dout = (rng.standard_normal((1, 1, 256, 64)).astype(DTYPES[dtype]) for _ in range(2))
    many = np.zeros((1, heads, 256, 64), DTYPES[dtype])
    many[:, -1:] = one
    cotangent = np.zeros_like(many)
    cotangent[:, -1:] = dout
    out, pullback = na.attention_vjp(many, many, many, causal=True)
    grads = pullback(cotangent)
    alone, pullback = na.attention_vjp(one, one, one, causal=True)
    for got, want in zip((out, *grads[:3]), (alone, *pullback(dout)[:3]), strict=True):
        np.testing.assert_array_equal(got[:, -1:], want)
        assert not got[:, :-1].any()


def test_tf32(cuda: Any) -> None:
    rng = seeds.generator(0)
    q, k, v, dout = (rng.standard_normal((2, 3, 300, 64)).astype(np.float32) for _ in range(4))
    out, pullback = na.attention_vjp(q, k, v, causal=True, precision="tf32")
    want = na.reference.attention(q, k, v, causal=True)
    assert 1e-6 < np.abs(out - want).max() < 5e-3
    grads, wanted = pullback(dout), na.reference.attention_backward(dout, q, k, v, causal=True)
    for got, want in zip(grads[:3], wanted[:3], strict=True):
        assert np.abs(got - want).max() < 5e-3 * np.abs(want).max()


def libraries() -> dict[str, Callable[[], tuple[Any, Any, Any]]]:
    """name -> () -> (NumPy array -> theirs on the device, theirs -> NumPy, a stream of theirs besides the default)."""

    def ours() -> Any:
        device = driver.current()
        there = lambda x: arrays.DeviceArray(x.shape, x.dtype, device.upload(x, 0))  # noqa: E731
        return there, lambda x: x.copy_to_host(), None

    def numba_cuda() -> Any:
        from numba import cuda as numba

        return numba.to_device, lambda x: x.copy_to_host(), numba.stream()

    def torch() -> Any:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("torch has no CUDA")
        return lambda x: torch.from_numpy(x).cuda(), lambda x: x.cpu().numpy(), torch.cuda.Stream()

    def cupy() -> Any:
        cupy = pytest.importorskip("cupy")
        return cupy.asarray, cupy.asnumpy, cupy.cuda.Stream(non_blocking=True)

    def jax() -> Any:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes three quarters of the memory
        jax = pytest.importorskip("jax")
        if jax.default_backend() != "gpu":
            pytest.skip("JAX has no GPU")
        return jax.device_put, np.asarray, None

    return {"ours": ours, "numba": numba_cuda, "torch": torch, "cupy": cupy, "jax": jax}


def by_distance(s: float, b: int, h: int, i: int, j: int, table: np.ndarray) -> float:
    return s + table[h, min(abs(i - j), 31)]


@pytest.mark.parametrize("library", libraries())
def test_device_arrays(library: str, cuda: Any) -> None:
    """What a call with NumPy arrays gives, on a stream that is not the default one; halves beside them are converted on
    the device. Many times, so that memory is used again while kernels run."""
    there, back, stream = libraries()[library]()
    rng = seeds.generator(0)
    q, dout = (rng.standard_normal((2, 4, 130, 64)).astype(np.float16) for _ in range(2))
    k, v = (rng.standard_normal((2, 2, 130, 64)).astype(np.float16) for _ in range(2))
    beside = {
        "bias": rng.standard_normal((4, 1, 130)).astype(np.float16),
        "sinks": rng.standard_normal(4).astype(np.float16),
        "alibi_slopes": np.linspace(0.1, 0.4, 4).astype(np.float16),
    }
    table = rng.standard_normal((4, 32)).astype(np.float16)
    common = {"causal": True, "score_mod": by_distance, "aux_grad": (0,)}
    wanted_out, pullback = na.attention_vjp(q, k, v, **common, **beside, aux=(table,))
    wanted = pullback(dout)
    theirs = [there(x) for x in (q, k, v, dout)]
    options = common | {name: there(x) for name, x in beside.items()} | {"aux": (there(table),)}
    cuda.synchronize(0)
    for _ in range(20 if type(cuda) is driver.Device else 1):
        out, pullback = na.attention_vjp(*theirs[:3], **options, stream=stream)
        grads = pullback(theirs[3], stream=stream)
        assert type(out) is type(theirs[0])
    if stream is not None:
        stream.synchronize()
    np.testing.assert_array_equal(back(out), wanted_out)
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(back(getattr(grads, name)), getattr(wanted, name), err_msg=name)
    for name in ("dbias", "dsinks", "dalibi_slopes"):
        np.testing.assert_allclose(back(getattr(grads, name)), getattr(wanted, name), rtol=2e-3, err_msg=name)
    np.testing.assert_allclose(back(grads.daux[0]), wanted.daux[0], rtol=2e-3)


def test_calls_like_one_before_on_many_streams(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many threads, a stream each, some of which are gone as soon as they are done; what one prepares serves the
    others, and goes while their kernels run."""
    monkeypatch.setattr(on_device, "_MOST_PLAIN", 2)
    monkeypatch.setattr(on_device, "_PLAIN", {})
    real = type(cuda) is driver.Device
    rng = seeds.generator(0)
    q, k, v = (rng.standard_normal((2, h, n, 64)).astype(np.float32) for h, n in ((4, 3), (2, 700), (2, 700)))
    dout = rng.standard_normal(q.shape).astype(np.float32)
    scales = [0.1, 0.2, 0.3]
    wanted = {}
    for scale in scales:
        out, pullback = na.attention_vjp(q, k, v, scale=scale)
        wanted[scale] = (out, *pullback(dout)[:3])
    there = [arrays.DeviceArray(x.shape, x.dtype, cuda.upload(x, 0)) for x in (q, k, v, dout)]
    cuda.synchronize(0)
    failed: list[Any] = []

    def calls(number: int, handle: int) -> None:
        stream = handle if number % 2 else SimpleNamespace(cuda_stream=handle)
        found = []
        for n in range(60 if real else 1):
            scale = scales[(n + number) % len(scales)]
            out, pullback = na.attention_vjp(*there[:3], scale=scale, stream=stream)
            found.append((scale, out, *pullback(there[3], stream=stream)[:3]))
        cuda.synchronize(handle)
        for scale, *results in found:
            for got, want in zip(results, wanted[scale], strict=True):
                np.testing.assert_array_equal(got.copy_to_host(), want)

    def work(number: int) -> None:
        try:
            if not real:
                return calls(number, 5 + number)
            from cuda.bindings import driver as cu

            with cuda.active():
                error, handle = cu.cuStreamCreate(1)
                assert error == 0
                calls(number, int(handle))
                if number % 2:  # else it belongs to an object that lives
                    assert cu.cuStreamDestroy(handle)[0] == 0
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8 if real else 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


LISTEN = """
import sys
sys.path[:0] = sys.argv[1:3]
import emulator, numpy as np, numba_attn as na
from numba_attn.cuda.host import driver

class Listens(emulator.EmulatedDevice):
    def load(self, ptx, name=None):
        print(ptx, flush=True)
        return driver.Function(driver.kernel_name(ptx), None, 0, 0)

    def launch(self, *arguments):
        pass

device = Listens()
device.cc, device.shared_limit = eval(sys.argv[3]), int(sys.argv[4])
with driver.use(device):
    x = np.zeros((1, 1, 40, 64), np.float16)
    na.attention_vjp(x, x, x, causal=True, backend="cuda")[1](x)
"""


def test_the_kernels_are_those_that_were_verified(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sees no GPU writes the same PTX."""
    loaded: list[str] = []
    load = type(cuda).load
    monkeypatch.setattr(loading, "functions", {})
    monkeypatch.setattr(type(cuda), "load", lambda self, ptx, name=None: loaded.append(ptx) or load(self, ptx, name))
    x = np.zeros((1, 1, 40, 64), np.float16)
    na.attention_vjp(x, x, x, causal=True)[1](x)
    here = os.path.dirname(os.path.abspath(__file__))
    hidden = {"CUDA_VISIBLE_DEVICES": "", "NUMBA_ATTN_CACHE_DIR": os.devnull}  # compiled there, not read
    done = run_python(LISTEN, os.path.dirname(here), here, repr(cuda.cc), str(cuda.shared_limit), env=hidden)
    written = "".join(ladder.without_names(ptx) + "\n" for ptx in loaded)
    assert len(loaded) == 4 and ladder.without_names(done.stdout) == written.rstrip("\n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_beside_torch(dtype: str, cuda: Any) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    q, k, v, dout = (torch.randn(2, 4, 300, 64, device="cuda", dtype=getattr(torch, dtype)) for _ in range(4))
    out, pullback = na.attention_vjp(q, k, v, causal=True, backend="auto")
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    wanted = torch.autograd.grad(want, leaves, dout.double())
    bound = 1e-5 if dtype == "float32" else 2e-2
    for x, y in zip((out, *pullback(dout)[:3]), (want, *wanted), strict=True):
        assert (x.double() - y).abs().max() < bound * y.abs().max()


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
