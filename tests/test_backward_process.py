"""The backward pass and what is around it: guard pages, peak memory, threads, forks, no compiler."""

import os
import sys
from typing import Any

import numpy as np
import pytest
from cases import build
from child import run_python, run_sweep
from test_backward import cotangents, float_aux, same

import numba_attn as na


def guarded_sweep(edge: str, form_name: str, first_one: int) -> None:
    """Run in a child: every problem from `first_one` on with all its arrays, results and scratch at a page's edge."""
    from types import SimpleNamespace

    from guard import guarded, guarded_rows
    from test_memory import guard_cases, shut_in

    from numba_attn import dispatch
    from numba_attn.cpu.launch import backward as launch_backward

    form = {"packed": guarded, "rows": guarded_rows}[form_name]

    def at_edge(make: Any, form: Any) -> Any:
        return lambda shape, dtype=np.float64: form(make(shape, dtype), edge)

    edged = SimpleNamespace(**vars(np) | {"empty": at_edge(np.empty, form)})
    packed = SimpleNamespace(**vars(np) | {"empty": at_edge(np.empty, guarded), "zeros": at_edge(np.zeros, guarded)})
    for n, case in enumerate(guard_cases()[first_one:], first_one):
        print("at", n, case.name, flush=True)
        arrays, options = build(case)
        out, lse = na.attention(*arrays, **options, return_lse=True)
        dout, dlse = cotangents(arrays[0], arrays[2])
        aux_grad = float_aux(options)
        want = na.attention_backward(dout, *arrays, out, lse, dlse=dlse, aux_grad=aux_grad, **options)
        fenced = {name: shut_in(value, form, edge) for name, value in options.items()}
        given_ = [form(x, edge) for x in (dout, *arrays, out)]
        rows = [form(x, edge) if x.ndim > 1 else guarded(x, edge) for x in (lse, dlse)]
        dispatch.np, launch_backward.np = edged, packed
        got = na.attention_backward(*given_, rows[0], dlse=rows[1], aux_grad=aux_grad, **fenced)
        dispatch.np = launch_backward.np = np
        try:
            same(got, want)
        except AssertionError as error:
            print("differs", case.name, error, flush=True)
    print("done", flush=True)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="mprotect")
@pytest.mark.parametrize(("edge", "form"), [("end", "packed"), ("start", "packed"), ("end", "rows"), ("start", "rows")])
def test_no_byte_outside_the_arrays(edge: str, form: str) -> None:
    from test_memory import guard_cases

    code = "import sys, test_backward_process as t; t.guarded_sweep(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    wrong = run_sweep(code, edge, form, len(guard_cases()))
    assert not wrong, f"arrays at a page edge ({edge}, {form}): {wrong}"


PEAK = """
import numpy as np, seeds, numba_attn as na
def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024
n = {n}
q, k, v, dout = (seeds.generator(i).standard_normal((1, {heads}, n, 64), dtype=np.float32) for i in range(4))
def call(n, **options):
    few = np.s_[:, :, :n]
    out, pullback = na.attention_vjp(q[few], k[few], v[few], **options)
    return pullback(dout[few])
call(300, {small})
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak starts again from here
before = status("VmRSS")
grads = call(n, {options})
grown = status("VmHWM") - before - sum(x.nbytes for x in grads if x is not None)
assert all(np.isfinite(x).all() for x in grads if x is not None)
print(grown)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(("n", "heads", "options", "small"), [
    (32_768, 1, "causal=True", "causal=True"),
    (32_768, 1, "window=(700, 300)", "window=(7, 3)"),
    (16_384, 2, "window=(2000, 0), bias=np.ones(n), alibi_slopes=np.ones(2), sinks=np.ones(2), softcap=9.0",
     "window=(20, 0), bias=np.ones(300), alibi_slopes=np.ones(2), sinks=np.ones(2), softcap=9.0"),
    (8_192, 1, "dropout_p=0.5, seed=1", "dropout_p=0.5, seed=1"),
], ids=["causal", "window", "reduced", "dropout"])  # fmt: skip
def test_peak_memory(n: int, heads: int, options: str, small: str) -> None:
    """Forward and backward of 32,768 tokens, beyond the arguments and the gradients. Dense scores alone are 4.3 GB."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pytest.skip("the peak of a process cannot be reset here")
    code = PEAK.format(n=n, heads=heads, options=options, small=small)
    grown = int(run_python(code, env={"NUMBA_NUM_THREADS": "2"}).stdout) / 1e6
    assert grown < 128, f"{grown:.0f} MB"


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_is_given_back() -> None:
    """Scratch and sums do not pile up from call to call, shape to shape."""
    done = run_python("""
import numpy as np, seeds, numba_attn as na
from cases import table_by_distance
rng = seeds.generator(0)
q, k, v, dout = (rng.standard_normal((1, 2, 400, 64), dtype=np.float32) for _ in range(4))
table = rng.standard_normal((2, 400))
def rss():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) * 1024
def call(n):
    options = dict(bias=table[:, None, n:], score_mod=table_by_distance, aux=(table,), aux_grad=(0,)) if n % 2 else {}
    na.attention_vjp(q, k[:, :, n:], v[:, :, n:], **options, scale=0.1 + n)[1](dout)
for n in range(40): call(n)
before = rss()
for n in range(300): call(n)
print(rss() - before)
""")
    assert int(done.stdout) < 16e6


CALLS = """
import os, sys, warnings
import numpy as np
import seeds
import numba_attn as na
rng = seeds.generator(0)
BIG = [rng.standard_normal((2, 4, 500, 64), dtype=np.float32) for _ in range(4)]
SMALL = [rng.standard_normal((1, 1, 17, 40)) for _ in range(4)]
def gradients(dout, q, k, v, **options):
    out, lse = na.attention(q, k, v, **options, return_lse=True)
    return na.attention_backward(dout, q, k, v, out, lse, **options)
def reference(dout, q, k, v, **options):
    return na.reference.attention_backward(dout, q, k, v, **options)
BIAS = rng.standard_normal((4, 1, 500)).astype(np.float32)
BIG_WANT, SMALL_WANT = reference(*BIG, causal=True, bias=BIAS), reference(*SMALL)
def right():
    big, small = gradients(*BIG, causal=True, bias=BIAS), gradients(*SMALL)
    ok = all(np.abs(x - y).max() < 1e-5 * np.abs(y).max() for x, y in zip(big[:4], BIG_WANT[:4]))
    return bool(ok and all(np.abs(x - y).max() < 1e-13 * np.abs(y).max() for x, y in zip(small[:3], SMALL_WANT[:3])))
"""
FOUR = {"NUMBA_NUM_THREADS": "4", "NUMBA_THREADING_LAYER": None, "NUMBA_THREADING_LAYER_PRIORITY": None}


@pytest.mark.processes
def test_eight_python_threads_at_once() -> None:
    """Eight threads whose first calls meet, and one pullback that they share."""
    from test_process import EIGHT_THREADS

    shared = """
dout, q, k, v = BIG
pullback = na.attention_vjp(q, k, v, causal=True)[1]
want = [x.tobytes() for x in pullback(dout)[:3]]
with ThreadPoolExecutor(8) as pool:
    for got in pool.map(pullback, [dout] * 16):
        assert [x.tobytes() for x in got[:3]] == want
"""
    run_python(CALLS + EIGHT_THREADS + shared, env=FOUR)


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("layer", [None, "omp"])
def test_forks_after_a_call(layer: str | None) -> None:
    """A bare fork, multiprocessing and joblib, in a process that has called before. GNU OpenMP does not survive it."""
    from test_process import FORK

    pools = """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(result.get(timeout=120) for result in [pool.apply_async(right) for _ in range(4)])
if __name__ == "__main__":
    from functools import partial
    from joblib import Parallel, delayed
    dout, q, k, v = (x.repeat(2, axis=1) for x in BIG)
    out, lse = na.attention(q, k, v, causal=True, return_lse=True)
    assert q.nbytes > 1 << 20  # so that it reaches the workers as a read-only memory map
    work = partial(na.attention_backward, causal=True)
    want = work(dout, q, k, v, out, lse)
    for backend in ("loky", "multiprocessing"):
        for got in Parallel(n_jobs=2, backend=backend)(delayed(work)(dout, q, k, v, out, lse) for _ in range(2)):
            assert all(x.tobytes() == y.tobytes() for x, y in zip(got[:3], want[:3]))
    assert right()
"""
    done = run_python(
        CALLS + FORK + (pools if layer is None else ""), env=FOUR | {"NUMBA_THREADING_LAYER": layer}, check=False
    )
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"Numba has no {layer} layer here")
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.mark.processes
def test_disabled_jit() -> None:
    """The reference does the work, says so, and its results come in the arguments' dtypes and layout."""
    code = """
import warnings
import numpy as np
import numba_attn as na
from cases import BY_NAME, build
from test_backward import argument, cotangents, entries, float_aux
for name in ("layout-shd", "everything", "head-59-float16", "empty-k-sinks"):
    arrays, options = build(BY_NAME[name])
    dout, dlse = cotangents(arrays[0], arrays[2])
    aux_grad = float_aux(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out, pullback = na.attention_vjp(*arrays, **options, aux_grad=aux_grad)
        before = len(caught)
        got = pullback(dout, dlse)
    assert [w.category for w in caught[before:]] == [RuntimeWarning], caught
    assert "NUMBA_DISABLE_JIT" in str(caught[-1].message)
    want = na.reference.attention_backward(dout, *arrays, dlse=dlse, **options, aux_grad=aux_grad)
    for (entry, x), (_, y) in zip(entries(got), entries(want), strict=True):
        of = argument(entry, arrays, options)
        assert x.shape == of.shape and x.dtype == of.dtype and (x == y.astype(of.dtype)).all(), entry
print("fine")
"""
    assert run_python(code, env={"NUMBA_DISABLE_JIT": "1"}).stdout.strip() == "fine"
