"""Times one attention shape in numba_attn, in NumPy and in whatever peers are installed: `numba-attn bench`.

Each library runs in a process of its own (their thread pools disturb one another) and the processes take turns, so that
a change of clock or of load affects all of them alike. The file is also the worker: it is started by its path and
imports this package only where that is the library under test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

DTYPES = ("float32", "float64", "float16", "bfloat16")

# A library whose rows are further from dense float64 has computed something else. Its time is not reported.
TOLERANCE = {"float64": 1e-8, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Case:
    """One shape: q (batch, heads, q_len, dim), k and v (batch, kv_heads, kv_len, dim). Causal is aligned bottom right.

    `window` is the number of keys that a query sees, itself included (0: all of them); it implies causal. `backward`:
    out and the gradients of q, k and v, instead of out alone.
    """

    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    batch: int = 1
    dtype: str = "float32"
    causal: bool = False
    window: int = 0
    backward: bool = False

    def __str__(self) -> str:
        mask = f" window {self.window}" if self.window else " causal" if self.causal else ""
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        shape = f"{self.dtype} batch {self.batch} heads {heads} {self.q_len} x {self.kv_len} dim {self.dim}{mask}"
        return shape + " forward + backward" * self.backward

    @property
    def offset(self) -> int:
        return self.kv_len - self.q_len

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of numba_attn.attention for this case."""
        if not (self.causal or self.window):
            return {}
        align = {} if self.offset == 0 else {"align": "bottom_right"}
        return {"causal": True, **align, **({"window": (self.window - 1, 0)} if self.window else {})}

    def flops(self) -> int:
        """4 dim for each visible pair, 14 dim with the backward pass (7 products): a hidden pair counts nothing."""
        pairs = self.q_len * self.kv_len
        if self.causal or self.window:
            seen = np.clip(np.arange(self.q_len) + self.offset + 1, 0, self.kv_len)
            pairs = int(np.minimum(seen, self.window).sum() if self.window else seen.sum())
        return (14 if self.backward else 4) * self.batch * self.heads * pairs * self.dim

    def visible(self) -> np.ndarray:
        """Bool, (q_len, kv_len)."""
        i, j = np.arange(self.q_len)[:, None] + self.offset, np.arange(self.kv_len)
        seen = j <= i
        return seen & (j > i - self.window) if self.window else seen

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Standard normal q, k and v; float32 where the dtype is bfloat16, which NumPy lacks."""
        rng = np.random.default_rng(0)
        dtype = np.dtype("float32" if self.dtype == "bfloat16" else self.dtype)
        sizes = ((self.heads, self.q_len), (self.kv_heads, self.kv_len), (self.kv_heads, self.kv_len))
        q, k, v = (rng.standard_normal((self.batch, *s, self.dim), dtype=np.float32).astype(dtype) for s in sizes)
        return q, k, v

    def cotangent(self) -> np.ndarray:
        """The gradient with respect to out that the backward pass starts from."""
        x = np.random.default_rng(1).standard_normal((self.batch, self.heads, self.q_len, self.dim), dtype=np.float32)
        return x.astype("float32" if self.dtype == "bfloat16" else self.dtype)


@dataclass
class Result:
    """By library: seconds a call (the median over the rounds) and the error against dense float64, or the reason why
    there is none."""

    case: Case
    seconds: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def ratio(self) -> float | None:
        """How many times faster numba_attn is than the fastest peer."""
        peers = [s for name, s in self.seconds.items() if name != "numba_attn"]
        return min(peers) / self.seconds["numba_attn"] if peers and "numba_attn" in self.seconds else None


# ---- the libraries: each takes a case and gives a call whose result is out, or dq for a backward case; either way
# (batch, heads, q_len, dim) ----


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray | None = None) -> np.ndarray:
    """Attention as one writes it in NumPy: every score in memory at once, in the dtype of q."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    s = (q * q.dtype.type(q.shape[-1] ** -0.5)) @ k.swapaxes(-1, -2)
    if visible is not None:
        np.copyto(s, -np.inf, where=~visible)
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    return s @ v


def dense_gradients(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, visible: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq, dk, dv as one writes them in NumPy, with the forward pass that they need."""
    group, scale = q.shape[1] // k.shape[1], q.dtype.type(q.shape[-1] ** -0.5)
    if group > 1:
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    p = (q * scale) @ k.swapaxes(-1, -2)
    if visible is not None:
        np.copyto(p, -np.inf, where=~visible)
    p -= p.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    out = p @ v
    dv = p.swapaxes(-1, -2) @ dout
    ds = dout @ v.swapaxes(-1, -2)
    ds -= (dout * out).sum(axis=-1, keepdims=True)
    ds *= p
    ds *= scale
    dq, dk = ds @ k, ds.swapaxes(-1, -2) @ q
    if group > 1:
        dk, dv = (x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(axis=2) for x in (dk, dv))
    return dq, dk, dv


def _numba_attn(case: Case, threads: int) -> Callable[[], np.ndarray]:
    import numba

    import numba_attn

    numba.set_num_threads(threads)
    q, k, v = case.inputs()
    if case.dtype == "bfloat16":
        import ml_dtypes

        q, k, v = (x.astype(ml_dtypes.bfloat16) for x in (q, k, v))
    if case.backward:
        dout = case.cotangent().astype(q.dtype)

        def gradients() -> np.ndarray:
            _, pullback = numba_attn.attention_vjp(q, k, v, **case.options)
            return pullback(dout).dq

        return gradients
    return lambda: numba_attn.attention(q, k, v, **case.options)


def _numpy(case: Case, threads: int) -> Callable[[], np.ndarray]:
    if case.dtype in ("float16", "bfloat16"):
        raise NotImplementedError(f"NumPy multiplies no {case.dtype} matrices at speed")
    q, k, v = case.inputs()
    visible = case.visible() if case.causal or case.window else None
    if case.backward:
        dout = case.cotangent()
        return lambda: dense_gradients(q, k, v, dout, visible)[0]
    return lambda: dense_attention(q, k, v, visible)


def _torch(case: Case, threads: int) -> Callable[[], object]:
    import torch

    torch.set_num_threads(threads)
    q, k, v = (torch.from_numpy(x).to(getattr(torch, case.dtype)) for x in case.inputs())
    options: dict[str, Any] = {"enable_gqa": case.heads != case.kv_heads}
    if case.window or (case.causal and case.offset):
        options["attn_mask"] = torch.from_numpy(case.visible())
    elif case.causal:
        options["is_causal"] = True
    attention = torch.nn.functional.scaled_dot_product_attention
    if case.backward:
        dout = torch.from_numpy(case.cotangent()).to(q.dtype)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return lambda: torch.autograd.grad(attention(*leaves, **options), leaves, dout)[0]

    def run() -> object:
        with torch.no_grad():
            return attention(q, k, v, **options)

    return run


def _torch_flex(case: Case, threads: int) -> Callable[[], object]:
    """torch.compile(flex_attention), torch's best on a window; it needs a C++ compiler and some 20 s."""
    if not case.window or case.backward:
        raise NotImplementedError("timed on windows only, forward")
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.set_num_threads(threads)
    q, k, v = (torch.from_numpy(x).to(getattr(torch, case.dtype)) for x in case.inputs())

    def seen(b: object, h: object, i: int, j: int) -> bool:
        return (j <= i + case.offset) & (j > i + case.offset - case.window)

    blocks = create_block_mask(seen, None, None, case.q_len, case.kv_len, device="cpu")
    flex = torch.compile(flex_attention, dynamic=False)

    def run() -> object:
        with torch.no_grad():
            return flex(q, k, v, block_mask=blocks, enable_gqa=case.heads != case.kv_heads)

    return run


def _onnxruntime(case: Case, threads: int) -> Callable[[], np.ndarray]:
    if case.backward:
        raise NotImplementedError("no gradients")
    if case.window or case.heads != case.kv_heads or case.dtype != "float32" or (case.causal and case.offset):
        raise NotImplementedError("MultiHeadAttention: float32, as many key heads as query heads, no window")
    import onnxruntime
    from onnx import TensorProto, helper

    width = case.heads * case.dim
    arrays = {
        name: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(case.batch, -1, width)
        for name, x in zip("qkv", case.inputs(), strict=True)
    }
    attributes = {"num_heads": case.heads, **({"unidirectional": 1} if case.causal else {})}
    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["o"], domain="com.microsoft", **attributes)
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in arrays.items()]
    output = helper.make_tensor_value_info("o", TensorProto.FLOAT, arrays["q"].shape)
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)],
        ir_version=9,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # Its own layout is (batch, length, heads * dim); the view back to ours costs nothing.
    shape = (case.batch, case.q_len, case.heads, case.dim)
    return lambda: session.run(None, arrays)[0].reshape(shape).transpose(0, 2, 1, 3)


def _openvino(case: Case, threads: int) -> Callable[[], np.ndarray]:
    if case.backward:
        raise NotImplementedError("no gradients")
    precision = {"float32": "f32", "bfloat16": "bf16"}.get(case.dtype)
    if case.window or case.heads != case.kv_heads or precision is None or (case.causal and case.offset):
        raise NotImplementedError("scaled_dot_product_attention: float32 or bfloat16, no window, no grouped heads")
    import openvino
    import openvino.opset13 as ops

    arrays = case.inputs()
    parameters = [ops.parameter(x.shape, openvino.Type.f32) for x in arrays]
    model = openvino.Model([ops.scaled_dot_product_attention(*parameters, causal=case.causal)], parameters)
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    return lambda: request.infer(list(arrays), share_inputs=True, share_outputs=True)[0]


def _jax(case: Case, threads: int) -> Callable[[], object]:
    if (case.causal or case.window) and case.offset:
        raise NotImplementedError("its causal mask is aligned top left")
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    q, k, v = (jnp.asarray(x.transpose(0, 2, 1, 3)).astype(case.dtype) for x in case.inputs())
    options: dict[str, Any] = {"is_causal": case.causal or bool(case.window)}
    if case.window:
        options["local_window_size"] = (case.window - 1, 0)
    if case.backward:
        dout = jnp.asarray(case.cotangent().transpose(0, 2, 1, 3)).astype(case.dtype)

        def gradients(q: object, k: object, v: object) -> tuple[object, ...]:
            _, pullback = jax.vjp(lambda *x: jax.nn.dot_product_attention(*x, **options), q, k, v)
            dq, dk, dv = pullback(dout)
            return dq.transpose(0, 2, 1, 3), dk, dv

        compiled = jax.jit(gradients)
        return lambda: jax.block_until_ready(compiled(q, k, v))[0]
    call = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options).transpose(0, 2, 1, 3))
    return lambda: call(q, k, v).block_until_ready()


LIBRARIES: dict[str, tuple[str, Callable[[Case, int], Callable[[], object]]]] = {
    "numba_attn": ("numba_attn", _numba_attn),
    "numpy": ("numpy", _numpy),
    "torch": ("torch", _torch),
    "torch-flex": ("torch", _torch_flex),
    "onnxruntime": ("onnxruntime", _onnxruntime),
    "openvino": ("openvino", _openvino),
    "jax": ("jax", _jax),
}


def installed() -> list[str]:
    """The libraries that can be timed here; onnxruntime also needs onnx, to write its model."""
    found = [name for name, (module, _) in LIBRARIES.items() if importlib.util.find_spec(module)]
    return [name for name in found if name != "onnxruntime" or importlib.util.find_spec("onnx")]


# ---- one process a library ----


def checked_rows(case: Case) -> list[int]:
    """The query rows whose results are compared with dense float64."""
    return sorted({0, case.q_len // 2, case.q_len - 1})


def _to_numpy(result: object) -> np.ndarray:
    if hasattr(result, "detach"):
        result = result.detach().double().numpy()
    return np.asarray(result).astype(np.float64)


def _serve(library: str) -> None:
    """Answer each case on stdin with the median seconds of a call, and with a few rows of the result."""
    build = LIBRARIES[library][1]
    ready: tuple[Case, Callable[[], object]] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        case = Case(**request["case"])
        try:
            if ready is None or ready[0] != case:
                ready = (case, build(case, request["threads"]))
            call = ready[1]
            result = call()  # wakes the threads, fills the caches, compiles the first time
            times: list[float] = []
            deadline = time.perf_counter() + request["seconds"]
            while len(times) < 3 or time.perf_counter() < deadline:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            rows = _to_numpy(result)[:, :, checked_rows(case)]
            answer = {"seconds": statistics.median(times), "rows": rows.ravel().tolist()}
        except NotImplementedError as why:
            answer = {"missing": str(why)}
        except Exception as why:  # a peer that fails is reported, and the others go on
            answer = {"missing": f"{type(why).__name__}: {why}"[:200]}
        print(json.dumps(answer), flush=True)


class _Worker:
    def __init__(self, library: str, threads: int) -> None:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        # A worker times this very package, also where it runs from a checkout that nobody installed.
        home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            # -P: the folder of this file does not become the first place where the libraries look for their imports.
            [sys.executable, "-P", __file__, library],
            env={**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.threads = threads

    def ask(self, case: Case, seconds: float) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            request = {"case": asdict(case), "seconds": seconds, "threads": self.threads}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline() or '{"missing": "the process died"}')
        except BrokenPipeError:
            return {"missing": "the process died"}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def compare(
    cases: Sequence[Case],
    libraries: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    threads: int,
    on_step: Callable[[str], None] = lambda label: None,
) -> list[Result]:
    """Time every case in every library, in turns: `rounds` times `seconds` each.

    `on_step` is called before each of the len(cases) * rounds * len(libraries) turns. A library that lacks a case, or
    whose rows are not those of dense float64, has no time in the result but a reason.
    """
    workers = {name: _Worker(name, threads) for name in libraries}
    results = []
    try:
        for case in cases:
            result = Result(case)
            times: dict[str, list[float]] = {name: [] for name in libraries}
            for r in range(rounds):
                for name in libraries if r % 2 == 0 else libraries[::-1]:
                    on_step(f"{name}, {case}")
                    if name in result.missing:
                        continue
                    answer = workers[name].ask(case, seconds)
                    if "missing" in answer:
                        result.missing[name] = answer["missing"]
                        continue
                    times[name].append(answer["seconds"])
                    if r == 0:
                        result.error[name] = error_of_rows(case, answer["rows"])
                        if not result.error[name] <= TOLERANCE[case.dtype]:
                            result.missing[name] = f"wrong by {result.error[name]:.1e}"
            result.seconds = {n: statistics.median(t) for n, t in times.items() if t and n not in result.missing}
            results.append(result)
    finally:
        for worker in workers.values():
            worker.close()
    return results


def error_of_rows(case: Case, rows: list[float]) -> float:
    """The largest distance of the checked rows from dense float64 attention on the inputs as the dtype rounds them."""
    from numba_attn import reference

    q, k, v = case.inputs()
    if case.dtype == "bfloat16":
        import ml_dtypes

        q, k, v = (x.astype(ml_dtypes.bfloat16) for x in (q, k, v))
    expected = []
    for i in checked_rows(case):
        options = {**case.options, "align": case.offset + i} if case.options else {}
        row = np.s_[:, :, i : i + 1]
        if case.backward:
            dout = case.cotangent().astype(q.dtype).astype(np.float64)
            arrays = (x.astype(np.float64) for x in (q[row], k, v))
            expected.append(reference.attention_backward(dout[row], *arrays, **options).dq)
        else:
            expected.append(reference.attention(q[row], k, v, **options))
    want = np.concatenate(expected, axis=2)
    return float(np.abs(np.reshape(rows, want.shape) - want).max())


# ---- the fraction of the FMA peak ----


@dataclass
class Peak:
    """Medians over the rounds, in flop/s; `fraction` is the median of the rounds' own fractions."""

    peak: float
    kernel: float
    fraction: float


def fraction_of_peak(
    case: Case, *, rounds: int, seconds: float, threads: int, on_step: Callable[[str], None] = lambda label: None
) -> Peak:
    """Run a loop of nothing but FMAs and the kernel in turns, in this process: the clock moves between the two."""
    from numba_attn.cpu.peak import fma_peak

    call = _numba_attn(case, threads)
    call()
    dtype = "float64" if case.dtype == "float64" else "float32"  # what the kernel multiplies in
    fma_peak(dtype, 0.01, threads)
    peaks, speeds = [], []
    for _ in range(rounds):
        on_step("FMA loop")
        peaks.append(fma_peak(dtype, seconds, threads))
        on_step(str(case))
        times: list[float] = []
        deadline = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < deadline:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        speeds.append(case.flops() / statistics.median(times))
    fractions = [s / p for s, p in zip(speeds, peaks, strict=True)]
    return Peak(statistics.median(peaks), statistics.median(speeds), statistics.median(fractions))


if __name__ == "__main__":
    _serve(sys.argv[1])
