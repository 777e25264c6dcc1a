"""The project's other figures, each measured by one function: `python -m benchmarks.claims [name ...]`.

What competes with other libraries is timed by benchmarks/compare.py. Here: what a user's function costs beside the
plain call, what a call costs before any work, how long the first call takes, how causal work spreads over threads, how
much memory a long sequence takes, how fast the kernels for other CPUs are. Ratios are of medians of alternating calls
in one process.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

import numba_attn as na


def alternating(calls: dict[str, Callable[[], object]], seconds: float = 4.0) -> dict[str, float]:
    """Median seconds of each call, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[next(iter(times))]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(ts) for name, ts in times.items()}


def arrays(heads: int, length: int, dim: int, dtype: type = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, heads, length, dim)).astype(dtype) for _ in range(3)]


def score_mod() -> None:
    """A user's functions beside the plain call, 8 heads, 2,048 tokens, head size 64; and the time to compile one."""
    q, k, v = arrays(8, 2048, 64)
    calls = {
        "plain": lambda: na.attention(q, k, v),
        "30 * tanh(s / 30)": lambda: na.attention(q, k, v, score_mod=lambda s, b, h, i, j: 30 * math.tanh(s / 30)),
        "ALiBi by hand": lambda: na.attention(q, k, v, score_mod=lambda s, b, h, i, j: s - 0.5 ** (h + 1) * abs(i - j)),
        "softcap=30": lambda: na.attention(q, k, v, softcap=30.0),
        "alibi_slopes=": lambda: na.attention(q, k, v, alibi_slopes=0.5 ** np.arange(1, 9, dtype=np.float32)),
    }
    times = alternating(calls)
    for name, t in times.items():
        print(f"  {name:20s} {1e3 * t:8.2f} ms   {t / times['plain']:5.2f} times the plain call")
    news = []
    for n in range(5):
        start = time.perf_counter()
        na.attention(q[:, :, :16], k, v, score_mod=lambda s, b, h, i, j, n=n: s * (1.0 + n) - math.exp(-s * s))
        news.append(time.perf_counter() - start)
    print(f"  a new function       {max(news):8.3f} s at most of five")


def threads() -> None:
    """Causal work, which is uneven, on 1 and on 2 threads: one head of 4,096 tokens, and 8 of 2,048."""
    import numba

    for heads, length in ((1, 4096), (8, 2048)):
        q, k, v = arrays(heads, length, 64)

        def on(n: int, q: np.ndarray = q, k: np.ndarray = k, v: np.ndarray = v) -> None:
            numba.set_num_threads(n)
            na.attention(q, k, v, causal=True)

        times = alternating({"1": lambda on=on: on(1), "2": lambda on=on: on(2)})
        print(f"  {heads} x {length}: {times['1'] / times['2']:.2f} times as fast on 2 threads")
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def overhead() -> None:
    """A 16 x 16 call of 8 heads, split into Python, dispatch and kernel."""
    from numba_attn import dispatch
    from numba_attn.cpu.launch import forward

    q, k, v = arrays(8, 16, 64)
    na.attention(q, k, v, causal=True)
    launch, record = dispatch.bind(q, k, v, {"causal": True}, stacklevel=2).forward  # of this very call
    assert launch is not None and record is not None
    kernel, drain = launch.kernel, launch.drain
    out, call = np.empty_like(q), np.empty(forward.N_FIELDS + forward.CALL_EXTRA + launch.scratch // 8, np.int64)
    no_lse = forward._NO_LSE["f32"]

    def repeat(f: Callable[[], object]) -> None:
        for _ in range(100):
            f()

    calls = {
        "whole call": lambda: na.attention(q, k, v, causal=True),
        "dispatch and kernel": lambda: kernel(q, k, v, out, no_lse, record.numbers, call, drain),
        "dispatch": lambda: kernel(q, k, v, out, no_lse, record.numbers, call, 0),
    }
    times = alternating({name: lambda f=f: repeat(f) for name, f in calls.items()})
    us = {name: 1e4 * t for name, t in times.items()}
    inside = us["dispatch and kernel"]
    print(f"  whole call {us['whole call']:.1f} us = Python {us['whole call'] - inside:.1f} + dispatch ", end="")
    print(f"{us['dispatch']:.1f} + kernel {inside - us['dispatch']:.1f}")


_FIRST = """
import time
start = time.perf_counter()
import numpy as np
import numba_attn as na
q = np.ones((1, 8, 512, 64), np.float32)
na.attention(q, q, q, causal=True)
seconds = time.perf_counter() - start
from numba_attn.cpu.compile import LOG
print(f"{seconds:.2f} s:", ", ".join(f"{name} {how} in {s:.2f}" for name, s, how in LOG))
"""


def start() -> None:
    """The first call of a fresh process, imports included: with an empty cache, then with a warm one."""
    with tempfile.TemporaryDirectory() as folder:
        for what in ("first call ever", "warm cache", "warm cache again"):
            env = {**os.environ, "NUMBA_ATTN_CACHE_DIR": folder}
            done = subprocess.run([sys.executable, "-c", _FIRST], env=env, capture_output=True, text=True, check=True)
            print(f"  {what}: {done.stdout.strip()}")


_MEMORY = """
import resource
import numpy as np
import numba_attn as na
rng = np.random.default_rng(0)
small = rng.standard_normal((1, 1, 512, 64), dtype=np.float32)
na.attention(small, small, small, causal=True)
q, k, v = (rng.standard_normal((1, 1, 65536, 64), dtype=np.float32) for _ in range(3))
out = np.zeros_like(q)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
na.attention(q, k, v, causal=True, out=out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


_FIRST_GRADIENT = """
import time
start = time.perf_counter()
import numpy as np
import numba_attn as na
q = np.ones((1, 8, 512, 64), np.float32)
na.attention(q, q, q, causal=True)
forward = time.perf_counter() - start
na.attention_vjp(q, q, q, causal=True)[1](q)
gradient = time.perf_counter() - start - forward
na.attention_jvp(q, q, q, q, q, q, causal=True)
tangent = time.perf_counter() - start - forward - gradient
from numba_attn.cpu.compile import LOG
print(f"forward {forward:.2f} s, then gradients {gradient:.2f}, then a tangent {tangent:.2f}:",
      ", ".join(f"{name} {how} in {s:.2f}" for name, s, how in LOG))
"""


def start_gradient() -> None:
    """The first forward, backward and tangent of a fresh process: with an empty cache, then with a warm one."""
    with tempfile.TemporaryDirectory() as folder:
        for what in ("first ever", "warm cache"):
            env = {**os.environ, "NUMBA_ATTN_CACHE_DIR": folder}
            done = subprocess.run([sys.executable, "-c", _FIRST_GRADIENT], env=env, capture_output=True, text=True)
            print(f"  {what}: {done.stdout.strip() or done.stderr[-2000:]}")


_TRAINING_MEMORY = """
import resource
import numpy as np
import numba_attn as na
rng = np.random.default_rng(0)
small = rng.standard_normal((1, 1, 512, 64), dtype=np.float32)
na.attention_vjp(small, small, small, causal=True)[1](small)
q, k, v, dout = (rng.standard_normal((1, 1, 32768, 64), dtype=np.float32) for _ in range(4))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
out, pullback = na.attention_vjp(q, k, v, causal=True)
grads = pullback(dout)
print(peak() - before - 3 * q.nbytes / 2**20)
"""


def training_memory() -> None:
    """Peak growth of forward and backward beyond inputs and gradients: one head, 32,768 tokens, size 64, causal."""
    done = subprocess.run([sys.executable, "-c", _TRAINING_MEMORY], capture_output=True, text=True, check=True)
    print(f"  {float(done.stdout):.1f} MB")


def memory() -> None:
    """Peak growth beyond inputs and output: one head, 65,536 tokens, head size 64, causal."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    print(f"  {float(done.stdout):.1f} MB")


_SPEED = """
import sys
import numpy as np
from benchmarks.claims import alternating, arrays
import numba_attn as na
from numba_attn.cpu.peak import fma_peak
from numba_attn.cpu.simd import ROW
for dtype in (np.float32, np.float64):
    q, k, v = arrays(8, 1024, 64, dtype)
    peaks = []
    t = alternating({"kernel": lambda: na.attention(q, k, v), "peak": lambda: peaks.append(fma_peak(dtype, 0.01))}, 2.0)
    flops = 4 * 8 * 1024 * 1024 * 64 / t["kernel"]
    share = 100 * flops / np.median(peaks)
    print(f"  {ROW.name:7s} {dtype.__name__}: {flops / 1e9:6.1f} GFLOP/s, {share:.0f} % of its FMA loop")
"""


def cpus() -> None:
    """The kernels for other CPUs on this one: AVX-512 if it has it, AVX2, plain x86-64."""
    for name in (None, "haswell", "x86-64"):
        env = dict(os.environ) if name is None else {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""}
        done = subprocess.run([sys.executable, "-c", _SPEED], env=env, capture_output=True, text=True, check=True)
        print(done.stdout.rstrip())


CLAIMS = {f.__name__: f for f in (score_mod, threads, overhead, start, start_gradient, memory, training_memory, cpus)}


def main() -> None:
    names = sys.argv[1:] or list(CLAIMS)
    unknown = [n for n in names if n not in CLAIMS]
    if unknown:
        sys.exit(f"claims: no {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    for name in names:
        print(f"{name}: {(CLAIMS[name].__doc__ or '').strip()}")
        CLAIMS[name]()


if __name__ == "__main__":
    main()
