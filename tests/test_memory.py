"""What memory the kernels touch: never a byte outside the arrays they are given, and never more scratch than tiles.

The vector loads have no bounds check, so each array is put, in turn, against a page that may not be touched, at its
end and at its start, in odd shapes. A fault kills the process: the sweep runs in a child that says which problem it
is at.
"""

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeds
from cases import BY_NAME, DTYPES, Case, bias, bool_mask, both, build, given, sinks, slopes, table_by_distance, with_aux
from child import run_python, run_sweep
from guard import guarded, guarded_rows

import numba_attn as na

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mprotect and /proc are POSIX and Linux")

ODD = dict(batch=1, heads=(3, 3))


def guard_cases() -> list[Case]:
    """Odd shapes for every dtype and every array that a call may be given."""
    some: list[Case] = []
    for dtype in DTYPES:
        for sq, sk, dk, dv in (
            (1, 1, 1, 1),
            (3, 5, 7, 3),
            (17, 33, 59, 40),
            (63, 203, 40, 59),
            (49, 65, 111, 17),
            (239, 111, 64, 64),
        ):
            some.append(
                Case(f"{dtype}-{sq}x{sk}x{dk}x{dv}", "", q_len=sq, kv_len=sk, dims=(dk, dv), dtype=dtype, **ODD)
            )
        some.append(
            Case(f"{dtype}-causal", "", given(causal=True), q_len=111, kv_len=111, dims=(59, 59), dtype=dtype, **ODD)
        )
        some.append(
            Case(
                f"{dtype}-bias",
                "",
                bias(0, 1, 2, 3, dtype=dtype),
                q_len=37,
                kv_len=101,
                dims=(33, 33),
                dtype=dtype,
                **ODD,
            )
        )
        some.append(
            Case(f"{dtype}-mask", "", bool_mask(0, 1, 2, 3), q_len=37, kv_len=101, dims=(33, 33), dtype=dtype, **ODD)
        )
        some.append(
            Case(
                f"{dtype}-aux",
                "",
                with_aux(table_by_distance, "hd", dtype=dtype),
                q_len=37,
                kv_len=51,
                dtype=dtype,
                **ODD,
            )
        )
        alibi = given(alibi_slopes=slopes(3).astype(DTYPES[dtype]), align="top_left")
        some.append(Case(f"{dtype}-options", "", both(sinks(dtype), alibi), q_len=37, kv_len=51, dtype=dtype, **ODD))
    for axes in ((0, 3), (2,), (3,), (1, 3), (2, 3)):
        some.append(Case(f"mask-{axes}", "", bool_mask(*axes), q_len=37, kv_len=101, **ODD))
        some.append(Case(f"bias-{axes}", "", bias(*axes), q_len=37, kv_len=101, **ODD))
    more = """gqa-3-odd window-both lengths-both varlen-causal-br segments-unsorted segments-sorted intervals-heads
        mask-mod-documents mask-mod-blocks score-mod-two-tables layout-bshd layout-shd layout-sd everything
        dropout-float32"""
    return some + [BY_NAME[name] for name in more.split()]


def shut_in(value: Any, form: Any, edge: str) -> Any:
    if isinstance(value, np.ndarray):
        return form(value, edge)
    if isinstance(value, tuple) and value and all(isinstance(x, np.ndarray) for x in value):  # aux
        return tuple(form(x, edge) for x in value)
    if isinstance(value, na.Mask):
        parts = tuple(
            replace(part, **{f.name: shut_in(getattr(part, f.name), form, edge) for f in fields(part)})
            for part in value.parts
        )
        return na.Mask(parts)
    return value


def sweep_guarded(edge: str, form_name: str, first: int) -> None:
    """Run in a child: every problem from the `first` on with all its arrays at the edge, and its result checked."""
    form = {"packed": guarded, "rows": guarded_rows}[form_name]
    for n, case in enumerate(guard_cases()[first:], first):
        print("at", n, case.name, flush=True)
        arrays, options = build(case)
        want, want_lse = na.attention(*arrays, **options, return_lse=True)
        fenced = {name: shut_in(value, form, edge) for name, value in options.items()}
        out = form(np.full(want.shape, np.nan, want.dtype), edge)
        _, lse = na.attention(*(form(x, edge) for x in arrays), **fenced, out=out, return_lse=True)
        if out.tobytes() != want.tobytes() or lse.tobytes() != want_lse.tobytes():
            print("differs", case.name, flush=True)
    print("done", flush=True)


@pytest.mark.processes
@pytest.mark.parametrize("form", ["packed", "rows"])
@pytest.mark.parametrize("edge", ["end", "start"])
def test_no_byte_outside_the_arrays(edge: str, form: str) -> None:
    code = "import sys, test_memory as t; t.sweep_guarded(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    wrong = run_sweep(code, edge, form, len(guard_cases()))
    assert not wrong, f"arrays at a page edge ({edge}, {form}): {wrong}"


@pytest.mark.parametrize("edge", ["end", "start"])
def test_the_guard_bites(edge: str) -> None:
    """The sweep above means something only if one element too far is fatal."""
    done = run_python(
        "import sys, numpy as np\nfrom guard import guarded, guarded_rows\n"
        "for form in guarded, guarded_rows:\n"
        "    x = form(np.arange(15, dtype=np.float32).reshape(3, 5), sys.argv[1])\n"
        "    assert (x == np.arange(15).reshape(3, 5)).all()\n"
        "print('inside', flush=True)\n"
        "step = {'end': 15, 'start': -1}[sys.argv[1]]\n"
        "x = guarded(np.zeros(15, np.float32), sys.argv[1])\n"
        "np.lib.stride_tricks.as_strided(x[0:1], (2,), (4 * step,))[1]\n"
        "print('outside')", edge, check=False)  # fmt: skip
    assert done.stdout.strip() == "inside"
    assert done.returncode < 0


# ---- arrays beyond 2**31 elements ----


def sparse(path: Path, rows: int, far: int, dim: int, rng: np.random.Generator, dtype: type = np.float32) -> np.ndarray:
    """(1, 1, rows, dim) whose rows lie `far` elements apart in a file of holes: only the rows take space."""
    whole = np.memmap(path, dtype, "w+", shape=(rows, far))
    view = whole[:, :dim]
    view[...] = rng.standard_normal((rows, dim))
    return view[None, None]


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes")
def test_offsets_beyond_two_to_the_31(tmp_path: Path) -> None:
    """Rows 2**28 elements apart, 1 GB each in float32: every array is addressed past 2**31 elements."""
    rng = seeds.generator(0)
    q, k, v, bias, out = (sparse(tmp_path / name, 20, 1 << 28, 20, rng) for name in ("q", "k", "v", "bias", "out"))
    mask = sparse(tmp_path / "mask", 20, 1 << 28, 20, rng, np.uint8).view(bool)
    near = [np.array(x) for x in (q, k, v)]
    options = {"bias": np.array(bias), "mask": np.array(mask)}
    want, want_lse = na.attention(*near, **options, return_lse=True)
    got, lse = na.attention(q, k, v, bias=bias, mask=mask, out=out, return_lse=True)
    assert got.tobytes() == want.tobytes() and lse.tobytes() == want_lse.tobytes()
    swapped = na.attention(*(x.transpose(0, 2, 1, 3) for x in (q, k, v)))  # the far axis as heads, then as batch
    again = na.attention(*(np.array(x.transpose(0, 2, 1, 3)) for x in (q, k, v)))
    assert swapped.tobytes() == again.tobytes()
    assert na.attention(*(x.transpose(2, 0, 1, 3) for x in (q, k, v))).tobytes() == swapped.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes")
def test_key_indices_beyond_two_to_the_31(tmp_path: Path) -> None:
    """Queries at the end of 2**32 keys, which see the last 99: skipped tiles cost nothing, and no index wraps."""
    n, tail = 1 << 32, 300
    k = np.memmap(tmp_path / "k", np.float32, "w+", shape=(1, 1, n, 1))
    rng = seeds.generator(0)
    k[:, :, -tail:] = rng.standard_normal((1, 1, tail, 1))
    q = rng.standard_normal((1, 1, 40, 1)).astype(np.float32)
    end = np.array(k[:, :, -tail:])
    for options in ({}, {"alibi_slopes": np.full(1, 0.5)}, {"causal": True}):
        call = {"window": (98, 0), "align": "bottom_right", **options}
        got, lse = na.attention(q, k, k, **call, return_lse=True)
        want, want_lse = na.reference.attention(q, end, end, **call, return_lse=True)
        assert np.abs(got - want).max() < 1e-6 and np.abs(lse - want_lse).max() < 1e-6
    mask = na.intervals(np.arange(n - 60, n - 20), np.arange(n - 40, n))
    want = na.reference.attention(q, end, end, mask=na.intervals(np.arange(240, 280), np.arange(260, 300)))
    assert np.abs(na.attention(q, k, k, mask=mask) - want).max() < 1e-6
    assert np.abs(na.attention(q, k, k, mask=mask & na.lengths([n - 1])) - want)[:, :, :39].max() < 1e-6


# ---- peak memory ----

PEAK = """
import sys, numpy as np, numba_attn as na, ml_dtypes, seeds
def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024
{problem}
small()
out = np.full_like(out, np.nan)
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak starts again from here
before = status("VmRSS")
call()
grown = status("VmHWM") - before
assert np.isfinite(out.astype(np.float32)).all()
print(grown)
"""


def peak_growth(problem: str) -> float:
    """The bytes by which a call's peak exceeds what was there before, in MB; the output exists before."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pytest.skip("the peak of a process cannot be reset here")
    return int(run_python(PEAK.format(problem=problem)).stdout) / 1e6


TOKENS = """
n = {n}
q, k, v = (seeds.generator(i).standard_normal((1, 1, n, 64), dtype=np.float32) for i in range(3))
out = np.empty_like(q)
def small(): na.attention(q[:, :, :99], k[:, :, :99], v[:, :, :99], causal=True)
def call(): na.attention(q, k, v, causal=True, out=out)
"""


@pytest.mark.processes
def test_peak_memory_16384_tokens() -> None:
    """Dense scores alone would be 1,074 MB."""
    assert peak_growth(TOKENS.format(n=16_384)) < 64


@pytest.mark.slow
def test_peak_memory_65536_tokens() -> None:
    """Issue 2's figure: under 64 MB beyond inputs and output."""
    assert peak_growth(TOKENS.format(n=65_536)) < 64


# K and V of 256 MB in float32: a copy of the whole of one of them shows.
BIG = """
rng = seeds.generator(0)
n = 524_288
def fill(rows, dim, dtype):
    return np.resize(rng.standard_normal((1 << 16) + 7).astype(dtype), (1, 1, rows, dim))
q = fill(17, {dk}, "{dtype}")
k, v = ({view} for x in (fill(n, {dk}, "{dtype}"), fill(n, {dk}, "{dtype}")))
out = np.empty((1, 1, 17, v.shape[-1]), q.dtype)
def small(): na.attention(q, k[:, :, :99], v[:, :, :99])
def call(): na.attention(q, k, v, out=out)
"""


@pytest.mark.processes
@pytest.mark.parametrize(("view", "dtype", "dk"), [
    ("x", "float32", 128),
    ("x[..., ::2]", "float32", 128),
    ("x[:, :, ::-1]", "float32", 128),
    ("x.reshape(1, 1, 128, n).swapaxes(2, 3)", "float32", 128),
    ("x", "float16", 128),
    ("x", "bfloat16", 128),
], ids=["packed", "every-other-column", "reversed", "fortran", "float16", "bfloat16"])  # fmt: skip
def test_keys_are_read_in_place(view: str, dtype: str, dk: int) -> None:
    """No argument is copied whole, whatever its strides or dtype: a copy of K would be 64 to 268 MB."""
    problem = BIG.format(view=view, dtype=dtype, dk=dk)
    if view == "x[..., ::2]":
        problem = problem.replace('q = fill(17, 128, "float32")', 'q = fill(17, 64, "float32")')
    assert peak_growth(problem) < 48


BROADCAST = """
rng = seeds.generator(0)
q, k, v = (rng.standard_normal((1, 4, 1024, 64), dtype=np.float32) for _ in range(3))
k, v = (np.broadcast_to(np.tile(x[:, :1], (1, 1, 32, 1)), (1, 4, 32768, 64)) for x in (k, v))
out = np.empty_like(q)
options = dict({options})
small_options = dict({small})
def small(): na.attention(q[:, :, :99], k[:, :, :99], v[:, :, :99], **small_options)
def call(): na.attention(q, k, v, out=out, **options)
"""


@pytest.mark.processes
@pytest.mark.parametrize(("options", "small"), [
    ("mask=np.arange(32768) % 3 > 0", "mask=np.arange(99) % 3 > 0"),
    ("bias=rng.standard_normal((1, 1, 1, 32768))", "bias=rng.standard_normal((1, 1, 1, 99))"),
    ("bias=rng.standard_normal((4, 1024, 1))", "bias=rng.standard_normal((4, 99, 1))"),
    ("mask=na.lengths([32000]) & na.segments(np.arange(1024) % 2, np.arange(32768) % 2)",
     "mask=na.lengths([90]) & na.segments(np.arange(99) % 2, np.arange(99) % 2)"),
    ("dropout_p=0.5, seed=1", "dropout_p=0.5, seed=1"),
    ("alibi_slopes=np.ones(4), align=40000", "alibi_slopes=np.ones(4), align=400"),
], ids=["mask-keys", "bias-keys", "bias-rows", "segments", "dropout", "alibi"])  # fmt: skip
def test_options_are_never_dense(options: str, small: str) -> None:
    """4 x 1,024 x 32,768 pairs: 134 MB as bools, 537 MB as float32 scores."""
    assert peak_growth(BROADCAST.format(options=options, small=small)) < 64


@pytest.mark.processes
def test_memory_is_given_back() -> None:
    """Scratch does not pile up from call to call, shape to shape."""
    done = run_python("""
import resource, numpy as np, numba_attn as na, seeds
rng = seeds.generator(0)
q, k, v = (rng.standard_normal((1, 2, 700, 64), dtype=np.float32) for _ in range(3))
def rss():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) * 1024
for n in range(50): na.attention(q[:, :, n:], k, v, scale=0.1 + n)
before = rss()
for n in range(600): na.attention(q[:, :, n:], k[:, :, : 700 - n], v[:, :, : 700 - n], scale=1.0 + n)
print(rss() - before)
""")
    assert int(done.stdout) < 16e6
