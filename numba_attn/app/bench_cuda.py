"""`numba-attn bench --backend cuda`: times on this machine's GPU, beside torch where it is installed, as one block of
text to paste into an issue.

Kernels are timed by the device's own events, so that the host's time is not included. That has a line of its own.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .bench import TOLERANCE, Case, checked_rows, error_of_rows
from .terminal import table

# Typical shapes, and shapes that show where a kernel is weak.
CASES = (
    Case(batch=4, heads=16, kv_heads=16, q_len=2048, kv_len=2048, dim=64, dtype="float16"),
    Case(batch=4, heads=16, kv_heads=16, q_len=2048, kv_len=2048, dim=64, dtype="float16", causal=True),
    Case(batch=2, heads=16, kv_heads=16, q_len=4096, kv_len=4096, dim=128, dtype="bfloat16", causal=True),
    Case(batch=1, heads=32, kv_heads=8, q_len=4096, kv_len=4096, dim=128, dtype="bfloat16", causal=True),
    Case(batch=1, heads=8, kv_heads=8, q_len=4096, kv_len=4096, dim=256, dtype="bfloat16", causal=True),
    Case(batch=1, heads=16, kv_heads=16, q_len=8192, kv_len=8192, dim=128, dtype="bfloat16", window=512),
    Case(batch=8, heads=32, kv_heads=8, q_len=1, kv_len=16384, dim=128, dtype="bfloat16"),
    Case(batch=2, heads=16, kv_heads=16, q_len=2048, kv_len=2048, dim=64),
    Case(batch=2, heads=16, kv_heads=16, q_len=2048, kv_len=2048, dim=128),
    Case(batch=1, heads=16, kv_heads=16, q_len=2048, kv_len=2048, dim=64, dtype="float64"),
    Case(batch=4, heads=16, kv_heads=16, q_len=2048, kv_len=2048, dim=64, dtype="float16", backward=True),
    Case(
        batch=2, heads=16, kv_heads=16, q_len=4096, kv_len=4096, dim=128, dtype="bfloat16", causal=True, backward=True
    ),
    Case(batch=2, heads=16, kv_heads=16, q_len=2048, kv_len=2048, dim=64, backward=True),
    Case(batch=1, heads=16, kv_heads=16, q_len=2048, kv_len=2048, dim=64, dtype="float64", backward=True),
)


def _inputs(case: Case) -> list[np.ndarray]:
    """q, k, v and dout, in the case's dtype."""
    arrays = [*case.inputs(), *([case.cotangent()] if case.backward else [])]
    if case.dtype == "bfloat16":
        import ml_dtypes

        arrays = [x.astype(ml_dtypes.bfloat16) for x in arrays]
    return arrays


def ours(case: Case, device: Any) -> Callable[[], Any]:
    """A call of numba_attn on arrays that are on the device; its result is out, or dq."""
    import numba_attn as na

    from ..cuda.host.arrays import DeviceArray

    q, k, v, *rest = (DeviceArray(x.shape, x.dtype, device.upload(x, 0)) for x in _inputs(case))
    if not rest:
        return lambda: na.attention(q, k, v, **case.options)

    def gradients() -> Any:
        _, pullback = na.attention_vjp(q, k, v, **case.options)
        return pullback(rest[0]).dq

    return gradients


def torch_call(case: Case) -> Callable[[], Any]:
    """The same by torch's scaled_dot_product_attention on the same device."""
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("no CUDA in this build of torch")
    if case.window or (case.causal and case.offset):
        raise NotImplementedError("no such mask without a dense array")
    kind = getattr(torch, case.dtype)
    q, k, v, *rest = (torch.from_numpy(x.astype(np.float64)).to("cuda", kind) for x in _inputs(case))
    options = {"enable_gqa": case.heads != case.kv_heads, "is_causal": case.causal}
    attention = torch.nn.functional.scaled_dot_product_attention
    if not rest:

        def run() -> Any:
            with torch.no_grad():
                return attention(q, k, v, **options)

        return run
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attention(*leaves, **options), leaves, rest[0])[0]


def _host(result: Any) -> np.ndarray:
    if hasattr(result, "copy_to_host"):
        return np.asarray(result.copy_to_host()).astype(np.float64)
    return np.asarray(result.detach().double().cpu().numpy())


FILL, MOST_FILLS = 2**26, 400  # bytes that the device is busy with while the host prepares a call


def timed(call: Callable[[], Any], device: Any, seconds: float) -> tuple[float, float]:
    """(seconds on the device, seconds of the host until the call returns), medians; the call was made before.

    The device first gets other work, which takes longer than the host needs. An idle device would wait for the host,
    and that would count as the kernels' time.
    """
    on_device: list[float] = []
    on_host: list[float] = []
    memory = device.empty(FILL, 0)
    device.fill(memory, 0, 0)
    first = device.event(0)
    device.fill(memory, 0, 0)
    fill = device.elapsed(first, device.event(0))
    start = time.perf_counter()
    call()
    fills = min(MOST_FILLS, 1 + int(3 * (time.perf_counter() - start) / fill))
    deadline = time.perf_counter() + seconds
    while len(on_device) < 5 or time.perf_counter() < deadline:
        device.synchronize(0)
        for _ in range(fills):
            device.fill(memory, 0, 0)
        first = device.event(0)
        start = time.perf_counter()
        call()
        on_host.append(time.perf_counter() - start)
        last = device.event(0)
        on_device.append(device.elapsed(first, last))
    return statistics.median(on_device), statistics.median(on_host)


def row(case: Case, device: Any, seconds: float) -> list[str]:
    """One line of the table. A result that is wrong has no time."""
    cells = [str(case)]
    times: dict[str, float] = {}
    makers: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("numba_attn", lambda: ours(case, device)),
        ("torch", lambda: torch_call(case)),
    )
    for name, make in makers:
        try:
            call = make()
            error = error_of_rows(case, _host(call())[:, :, checked_rows(case)].ravel().tolist())
            if not error <= TOLERANCE[case.dtype]:
                cells.append(f"wrong: error {error:.1e}")
                continue
            spent, host = timed(call, device, seconds)
        except (NotImplementedError, ImportError) as why:
            cells.append(f"- ({why})")
            continue
        except Exception as why:  # a shape that fails is one line, and the others still run
            cells.append(f"failed: {type(why).__name__}: {why}"[:120])
            continue
        times[name] = spent
        told = f"{spent * 1e3:.3f} ms {case.flops() / spent / 1e12:.1f} TFLOP/s error {error:.0e}"
        cells.append(told + (f" host {host * 1e6:.0f} us" if name == "numba_attn" else ""))
    ratio = times["torch"] / times["numba_attn"] if len(times) == 2 else None
    return [*cells, "" if ratio is None else f"{ratio:.2f}"]


def _versions() -> str:
    found = []
    for name in ("numba-attn", "numba", "numba-cuda", "cuda-bindings", "numpy", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def report(device: Any, cases: Sequence[Case] = CASES, seconds: float = 1.0) -> str:
    """The block: the device, versions, a line for each case."""
    cc = f"{device.cc[0]}.{device.cc[1]}"
    lines = [
        "```",
        f"{device.name}, compute capability {cc}, {device.multiprocessors} multiprocessors, "
        f"{device.total_memory / 2**30:.0f} GiB, {device.shared_limit // 1024} KB shared memory a block",
        f"{_versions()}, python {sys.version.split()[0]}",
        "",
        table(["", "numba_attn", "torch", "times faster"], [row(case, device, seconds) for case in cases]),
        "```",
    ]
    return "\n".join(lines)
