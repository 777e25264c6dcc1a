"""What surrounds the kernels: Python threads, forks, thread layers, other CPUs, and the kernel cache.

Most of it is decided when Numba is imported, so each test is a process of its own. None may die, hang, or give other
numbers.
"""

import compileall
import os
import platform
import shutil
import stat
import sys
import zipfile
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest
import seeds
from cases import SIMD_CASES
from child import IMPORTED_FROM, run_python

pytestmark = pytest.mark.processes
UNCHECKED = PycInvalidationMode.UNCHECKED_HASH
X86 = platform.machine().lower() in ("x86_64", "amd64")
POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

# A call that takes the parallel path and one that does not, and what they must give, from the reference.
CALLS = """
import os, sys, warnings
import numpy as np
import numba_attn as na
import seeds
rng = seeds.generator(0)
BIG = [rng.standard_normal((2, 4, 700, 64), dtype=np.float32) for _ in range(3)]
SMALL = [rng.standard_normal((1, 1, 17, 40)) for _ in range(3)]
BIG_WANT, SMALL_WANT = na.reference.attention(*BIG, causal=True), na.reference.attention(*SMALL)
def right():
    big, small = na.attention(*BIG, causal=True), na.attention(*SMALL)
    return bool(np.abs(big - BIG_WANT).max() < 1e-5 and np.abs(small - SMALL_WANT).max() < 1e-13)
"""

FORK = """
import signal
def in_a_fork():
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)  # a child that hangs is a failure, too
        os._exit(0 if right() and right() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert right()
assert in_a_fork() == 0, "a fork after a call"
assert right(), "the parent, after its child"
import numba
if numba.get_num_threads() > 1:
    numba.set_num_threads(1)
    assert right() and in_a_fork() == 0
"""

EIGHT_THREADS = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
start = Barrier(8)
def work(n):
    start.wait()  # the first calls of the process, all at once
    return all(right() for _ in range(6))
with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(work, range(8))) == [True] * 8
"""

LAYERS = ["default", "omp", "workqueue", "tbb"]


def layer_env(layer: str, **more: str) -> dict[str, str | None]:
    env: dict[str, str | None] = {
        "NUMBA_NUM_THREADS": "4",
        "NUMBA_THREADING_LAYER": None,
        "NUMBA_THREADING_LAYER_PRIORITY": None,
        **more,
    }
    if layer != "default":
        env["NUMBA_THREADING_LAYER"] = layer
    return env


def run_with_layer(code: str, layer: str, **more: str) -> str:
    done = run_python(CALLS + code + "\nprint('fine')", env=layer_env(layer, **more), check=False, timeout=600)
    if layer != "default" and "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"Numba has no {layer} layer here")
    assert done.returncode == 0 and done.stdout.strip().endswith("fine"), (
        f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    )
    return done.stdout


@pytest.mark.parametrize("layer", LAYERS)
def test_thread_layer(layer: str) -> None:
    """A layer that the user names is used; without a name the one that survives forks and threads, if it exists."""
    out = run_with_layer("import numba\nassert right()\nprint(numba.threading_layer())", layer)
    used = out.split()[0]
    if layer != "default":
        assert used == layer
    elif X86 and sys.platform == "linux":
        assert used == "tbb"


@pytest.mark.parametrize("layer", LAYERS)
def test_eight_python_threads_at_once(layer: str) -> None:
    run_with_layer(EIGHT_THREADS, layer)


def test_eight_python_threads_compile_a_score_mod() -> None:
    """A function that is new to the process, from eight threads, while others call plain attention."""
    run_with_layer(
        """
import math
from concurrent.futures import ThreadPoolExecutor
def capped(s, b, h, i, j):
    return 3.0 * math.tanh(s / 3.0)
def near(b, h, i, j):
    return abs(i - j) < 9
want = na.reference.attention(*SMALL, score_mod=capped, mask=na.mask_mod(near))
def work(n):
    if n % 2:
        return right()
    return bool(np.abs(na.attention(*SMALL, score_mod=capped, mask=na.mask_mod(near)) - want).max() < 1e-13)
with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(work, range(32)))
""",
        "default",
    )


@POSIX
@pytest.mark.parametrize("layer", LAYERS)
def test_fork_after_a_call(layer: str) -> None:
    run_with_layer(FORK, layer)


@POSIX
@pytest.mark.parametrize("first", ["main", "worker"])
def test_fork_under_tbb_of_the_thread_that_called_first_and_of_another(first: str) -> None:
    """Numba's tbb layer prints a line at the fork of another thread, which README tells how to avoid."""
    code = """
import threading
worker = threading.Thread(target=right)
if sys.argv[1] == "main":
    assert right()
worker.start()
worker.join()
"""
    fork = FORK.replace('assert right()\nassert in_a_fork() == 0, "a fork after a call"', "assert in_a_fork() == 0")
    assert fork != FORK
    done = run_python(CALLS + code + fork, first, env=layer_env("tbb"), check=False, timeout=600)
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip("Numba has no tbb layer here")
    assert done.returncode == 0, done.stderr
    assert ("Attempted to fork from a non-main thread" in done.stderr) == (first == "worker")


@POSIX
def test_fork_after_the_users_own_parallel_function() -> None:
    """The user's code has started a layer of Numba's choice before we are imported."""
    first = """
import numba, numpy as np
@numba.njit(parallel=True)
def total(x):
    t = 0.0
    for i in numba.prange(x.size):
        t += x[i]
    return t
assert total(np.ones(1000)) == 1000
"""
    done = run_python(
        first + CALLS + FORK + "\nassert total(np.ones(1000)) == 1000\nprint('fine')",
        env=layer_env("default"),
        check=False,
        timeout=600,
    )
    assert done.returncode == 0 and "fine" in done.stdout, f"{done.returncode}\n{done.stderr[-6000:]}"


@POSIX
@pytest.mark.parametrize("layer", ["default", "omp"])
def test_multiprocessing_fork_pool(layer: str) -> None:
    run_with_layer(
        """
import multiprocessing
assert right()
context = multiprocessing.get_context("fork")
with context.Pool(2) as pool:
    results = [pool.apply_async(right) for _ in range(6)]
    assert all(result.get(timeout=120) for result in results)
assert right()
""",
        layer,
    )


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_joblib(backend: str) -> None:
    """Arrays above 1 MB reach the workers as read-only memory maps."""
    pytest.importorskip("joblib")
    run_with_layer(
        f"""
from functools import partial
from joblib import Parallel, delayed
if __name__ == "__main__":
    assert right()
    q, k, v = (x.repeat(2, axis=1) for x in BIG)
    assert q.nbytes > 1 << 20
    want = na.attention(q, k, v, causal=True)
    got = Parallel(n_jobs=2, backend="{backend}")(
        delayed(partial(na.attention, causal=True))(q, k, v) for _ in range(4))
    assert all(x.tobytes() == want.tobytes() for x in got)
    assert right()
""",
        "default",
    )


def test_one_thread() -> None:
    run_with_layer(
        "import numba\nassert numba.get_num_threads() == 1 and right()\n" + EIGHT_THREADS,
        "default",
        NUMBA_NUM_THREADS="1",
    )


def test_the_callers_thread_count_stays() -> None:
    run_with_layer(
        """
import numba
for n in (1, 3, 2, 4):
    numba.set_num_threads(n)
    assert right() and numba.get_num_threads() == n
""",
        "default",
    )


def test_disabled_jit() -> None:
    """NUMBA_DISABLE_JIT works, or says that it does not."""
    done = run_python(CALLS + "print(right())", env={"NUMBA_DISABLE_JIT": "1"}, check=False)
    if done.returncode == 0:
        assert done.stdout.split()[-1] == "True"
    else:
        assert done.returncode > 0 and "NUMBA_DISABLE_JIT" in done.stderr.strip().splitlines()[-1], done.stderr[-4000:]


@POSIX
@pytest.mark.parametrize("cache", ["empty", "filled"])
def test_a_working_folder_that_was_deleted(cache: str, warm: tuple[Path, str], tmp_path: Path) -> None:
    """A service whose folder an upgrade took away: Numba asks for the path of it as it compiles."""
    code = """
import os, tempfile
folder = tempfile.mkdtemp()
os.chdir(folder)
os.rmdir(folder)
import numpy as np
import numba_attn as na
import seeds
q, k, v = seeds.generator(0).standard_normal((3, 1, 2, 33, 16), dtype=np.float32)
def damped(score, b, h, i, j):
    return score * 0.5
def near(b, h, i, j):
    return abs(i - j) < 9
for options in ({}, {"score_mod": damped}, {"mask": na.mask_mod(near)}):
    want = na.reference.attention(q, k, v, **options)
    out, pullback = na.attention_vjp(q, k, v, **options)
    assert np.abs(out - want).max() < 1e-5 and np.isfinite(pullback(out).dq).all()
try:
    os.getcwd()
except FileNotFoundError:
    print("still gone")
"""
    folder = warm[0] if cache == "filled" else tmp_path
    done = run_python(code, env={"NUMBA_ATTN_CACHE_DIR": str(folder)})
    assert done.stdout == "still gone\n" and not done.stderr


# ---- other CPUs ----

SWEEP = """
import sys
from cases import SIMD_CASES, build
from test_attention import check, check_every_half_number
from test_backward import check as check_gradients
from test_jvp import test_case as check_tangents
from numba_attn.cpu.simd import ROW
print(ROW.name, flush=True)
failed = []
for dtype in ("float16", "bfloat16"):
    check_every_half_number(dtype)
for case in SIMD_CASES[:: int((sys.argv + [1])[1])]:
    print("at", case.name, flush=True)
    try:
        check(*build(case))
        check_gradients(*build(case))
        check_tangents(case)
    except AssertionError as error:
        failed.append(f"{case.name}: {error}")
print("\\n".join(failed) or "fine")
"""


@pytest.mark.parametrize(("cpu", "row"), [("haswell", "avx2"), ("generic", "sse2")])
@pytest.mark.skipif(not X86, reason="x86-64 only")
def test_other_cpus(cpu: str, row: str) -> None:
    """Code for AVX2 and for plain x86-64, which has neither FMA nor F16C, chosen as Numba's users choose it."""
    done = run_python(
        SWEEP, env={"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "NUMBA_ATTN_SIMD": None}, check=False, timeout=1800
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "fine", (
        f"{done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    assert lines[0] == row
    assert len(lines) == len(SIMD_CASES) + 2


@pytest.mark.skipif(not X86, reason="x86-64 only")
def test_narrower_row_by_our_own_variable() -> None:
    lines = run_python(SWEEP, "6", env={"NUMBA_ATTN_SIMD": "sse2"}, timeout=1800).stdout.splitlines()
    assert lines[0] == "sse2" and lines[-1] == "fine", lines


def test_an_unknown_row_is_refused() -> None:
    done = run_python("import numba_attn as na, numpy as np\nx = np.ones((2, 4))\nna.attention(x, x, x, layout='sd')",
                      env={"NUMBA_ATTN_SIMD": "sse9"}, check=False)  # fmt: skip
    assert done.returncode == 1 and "NUMBA_ATTN_SIMD" in done.stderr.strip().splitlines()[-1]


# ---- the kernel cache ----

ONE_CALL = """
import sys, warnings
import numpy as np
import seeds
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numba_attn as na
    from numba_attn.cpu.compile import LOG
    q, k, v = seeds.generator(0).standard_normal((3, 1, 2, 33, 16), dtype=np.float32)
    out = na.attention(q, k, v)
    na.attention(q[:, :, :20], k, v)
    if "--right" in sys.argv:
        assert np.abs(out - na.reference.attention(q, k, v)).max() < 1e-5
how = {how for _, _, how in LOG}
assert LOG and how <= {"compiled", "loaded"}
print(" ".join(sorted(how)))
print(len([w for w in caught if issubclass(w.category, RuntimeWarning)]))
print("\\n".join(str(w.message) for w in caught), file=sys.stderr)
print(out.tobytes().hex())
"""


def one_call(*args: str, package: Path = IMPORTED_FROM, **env: str | Path | None) -> tuple[str, int, str]:
    """(how its kernels came, the number of warnings, the result's bytes) of a fresh process."""
    clean: dict[str, str | None] = {
        name: None for name in ("NUMBA_ATTN_CACHE_DIR", "NUMBA_CACHE_DIR", "NUMBA_CACHE_LOCATOR_CLASSES")
    }
    clean |= {name: None if value is None else str(value) for name, value in env.items()}
    how, count, result = run_python(ONE_CALL, *args, env=clean, package=package).stdout.splitlines()
    return how, int(count), result


@pytest.mark.parametrize("variable", ["NUMBA_ATTN_CACHE_DIR", "NUMBA_CACHE_DIR"])
def test_second_process_loads_what_the_first_compiled(variable: str, tmp_path: Path) -> None:
    """Fails, with the warning beside it, when a new Numba changes the private cache classes that ours builds on."""
    first = one_call("--right", **{variable: tmp_path / "cache"})
    assert first[:2] == ("compiled", 0)
    assert any(path.suffix == ".nbc" for path in (tmp_path / "cache").rglob("*"))
    assert one_call(**{variable: tmp_path / "cache"}) == ("loaded", 0, first[2])


def copied_package(folder: Path) -> Path:
    source = IMPORTED_FROM / "numba_attn"
    shutil.copytree(source, folder / "numba_attn", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_an_edit_of_any_source_file_makes_new_kernels(tmp_path: Path) -> None:
    """Numba's own key would miss a constant in another file, and give the old number."""
    package, cache = copied_package(tmp_path), tmp_path / "cache"
    before = one_call("--right", package=package, NUMBA_ATTN_CACHE_DIR=cache)
    assert before[0] == "compiled"
    assert one_call(package=package, NUMBA_ATTN_CACHE_DIR=cache)[0] == "loaded"
    edited = package / "numba_attn" / "online.py"
    source = edited.read_text()
    assert "LOG2E = 1.44269" in source
    stamp = edited.stat()
    edited.write_text(source.replace("LOG2E = 1.44269", "LOG2E = 1.54269"))
    os.utime(edited, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time: only the contents differ
    after = one_call(
        package=package, NUMBA_ATTN_CACHE_DIR=cache, PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX=tmp_path / "pyc"
    )
    assert after[0] == "compiled"
    assert after[2] != before[2]


def zipped(folder: Path, file: Path) -> Path:
    """A zip of what is in the folder, with no times in it: two zips differ where the files differ."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.writestr(zipfile.ZipInfo(path.relative_to(folder).as_posix()), path.read_bytes())
    return file


def without_sources(folder: Path) -> None:
    """Every .py file becomes a .pyc in its place."""
    assert compileall.compile_dir(folder, quiet=2, legacy=True, force=True, invalidation_mode=UNCHECKED)
    for source in folder.rglob("*.py"):
        source.unlink()


@pytest.mark.parametrize("form", ["zip", "pyc", "zip of pyc"])
def test_an_edit_counts_wherever_the_package_lies(form: str, tmp_path: Path) -> None:
    """A zipapp, Spark's --py-files, an install without sources: as much as in a folder."""

    def packed(name: str, constant: str) -> Path:
        folder = copied_package(tmp_path / name)
        edited = folder / "numba_attn" / "online.py"
        source = edited.read_text()
        assert "LOG2E = 1.44269" in source
        edited.write_text(source.replace("LOG2E = 1.44269", constant))
        if "pyc" in form:
            without_sources(folder)
        return zipped(folder, tmp_path / f"{name}.zip") if "zip" in form else folder

    cache = {"NUMBA_ATTN_CACHE_DIR": tmp_path / "cache", "PYTHONDONTWRITEBYTECODE": "1"}
    before, after = packed("before", "LOG2E = 1.44269"), packed("after", "LOG2E = 1.54269")
    first = one_call("--right", package=before, **cache)
    assert first[:2] == ("compiled", 0)
    assert one_call(package=before, **cache) == ("loaded", 0, first[2])
    how, warned, result = one_call(package=after, **cache)
    assert (how, warned) == ("compiled", 0) and result != first[2]
    code = """
from numba_attn import cache
from numba_attn.app import demo
assert len(demo.load_digits()[0]) == 1797
print(cache.PACKAGE, cache.fingerprint("cpu"), cache.fingerprint("cuda"))
"""
    answers = [run_python(code, package=package).stdout.split() for package in (before, after)]
    assert [Path(answer[0]).parent for answer in answers] == [before, after]
    assert not set(answers[0]) & set(answers[1]), "the PTX of the GPU's kernels is kept under the other fingerprint"


def test_a_newer_numba_costs_only_the_cache(tmp_path: Path) -> None:
    """One that nobody has run the tests with: it is warned of once, and its private cache classes are left alone."""
    newer = """
import sys
from numba_attn.cpu import compile
compile.NEWEST_TESTED = (0, 1)
sys.modules["numba_attn.cpu.disk"] = None  # whoever imports it now fails
"""
    env: dict[str, str | None] = {"NUMBA_ATTN_CACHE_DIR": str(tmp_path)}
    done = run_python(newer + ONE_CALL, "--right", env=env)
    how, warned, _ = done.stdout.splitlines()
    assert (how, warned) == ("compiled", "1") and "is newer than 0.1, the newest that" in done.stderr
    assert not any(path.suffix in (".nbi", ".nbc") for path in tmp_path.rglob("*"))


def test_no_writable_folder_costs_only_the_cache(tmp_path: Path) -> None:
    """A file stands where each folder would be, which stops root, too."""
    package = copied_package(tmp_path)
    (package / "numba_attn" / "__pycache__").write_text("not a folder")
    (package / "numba_attn" / "cpu" / "__pycache__").write_text("not a folder")
    wall = tmp_path / "wall"
    wall.write_text("not a folder")
    nowhere = dict(
        HOME=wall / "home", XDG_CACHE_HOME=wall / "cache", LOCALAPPDATA=wall / "local", USERPROFILE=wall / "user"
    )
    expected = one_call("--right")[2]
    for env in (nowhere, {"NUMBA_ATTN_CACHE_DIR": wall / "cache"}):
        how, warned, result = one_call("--right", package=package, PYTHONDONTWRITEBYTECODE="1", **env)
        assert (how, result) == ("compiled", expected)
        assert warned <= 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_costs_only_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = one_call(NUMBA_ATTN_CACHE_DIR=cache)
    for folder in [cache, *(path for path in cache.rglob("*") if path.is_dir())]:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    _, warned, result = one_call("--right", NUMBA_ATTN_CACHE_DIR=cache)
    assert result == first[2] and warned <= 1
    cache.chmod(stat.S_IRWXU)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache folder that holds the kernels of ONE_CALL, and its result."""
    folder = tmp_path_factory.mktemp("warm")
    return folder, one_call("--right", NUMBA_ATTN_CACHE_DIR=folder)[2]


@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_damaged_cache_costs_only_the_cache(suffix: str, damage: str, warm: tuple[Path, str], tmp_path: Path) -> None:
    """A full disk or a killed copy leaves such files."""
    folder, expected = tmp_path / "cache", warm[1]
    shutil.copytree(warm[0], folder)
    files = [path for path in folder.rglob("*") if path.suffix == suffix]
    assert files
    for path in files:
        whole = path.read_bytes()
        noise = seeds.generator(0).bytes(len(whole))
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "noise": noise}[damage])
    how, warned, result = one_call("--right", NUMBA_ATTN_CACHE_DIR=folder)
    assert how == "compiled" and result == expected and warned <= 1


@pytest.mark.slow
def test_processes_that_fill_an_empty_cache_at_once(tmp_path: Path) -> None:
    run_python(
        """
import subprocess, sys, test_process
from child import TESTS
command = [sys.executable, "-c", test_process.ONE_CALL, "--right"]
started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
outputs = [process.communicate(timeout=600)[0].splitlines() for process in started]
assert all(process.returncode == 0 for process in started)
assert len({lines[2] for lines in outputs}) == 1
""",
        env={"NUMBA_ATTN_CACHE_DIR": str(tmp_path)},
    )
    assert one_call("--right", NUMBA_ATTN_CACHE_DIR=tmp_path)[0] == "loaded"


@pytest.mark.slow
def test_a_cache_filled_ahead_of_time_by_processes_at_once(tmp_path: Path) -> None:
    """What a Dockerfile does, and a cluster whose nodes all start it. Then no call compiles, also where a user may only
    read the folder."""
    env: dict[str, str | None] = {"NUMBA_ATTN_CACHE_DIR": str(tmp_path)}
    run_python(
        """
import subprocess, sys
command = [sys.executable, "-m", "numba_attn", "compile", "--dtype", "float32", "float16"]
started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
assert [process.wait(timeout=900) for process in started] == [0, 0, 0]
""",
        env=env,
    )
    read_only = """
import tempfile
def refuse(*args, **kwargs):
    raise PermissionError("read-only")
tempfile.TemporaryFile = refuse
"""
    calls = """
import warnings
import numpy as np
import numba_attn as na
import seeds
from numba_attn.cpu.compile import LOG
warnings.simplefilter("error")
for dtype in ("float32", "float16"):
    q, k, v = seeds.generator(0).standard_normal((3, 1, 8, 512, 64)).astype(dtype)
    out, pullback = na.attention_vjp(q, k, v, causal=True)
    pullback(out)
    na.attention_jvp(q, k, v, q, None, None, softcap=2.0)
assert len(LOG) == 7 and {how for _, _, how in LOG} == {"loaded"}, LOG
"""
    for code in (calls, read_only + calls):
        run_python(code, env={**env, "NUMBA_NUM_THREADS": "2"})


def test_kernels_compiled_in_two_processes_load_into_one(tmp_path: Path) -> None:
    """Numba's symbol names are unique in one process only: float64's kernel once called float32's inner functions."""
    code = """
import sys
import numpy as np
import numba_attn as na
import seeds
for dtype in sys.argv[1:]:
    q, k, v = seeds.generator(0).standard_normal((3, 1, 2, 100, 16)).astype(dtype)
    assert np.abs(na.attention(q, k, v) - na.reference.attention(q, k, v)).max() < 1e-5
from numba_attn.cpu.compile import LOG
print({how for _, _, how in LOG})
"""
    env = {"NUMBA_ATTN_CACHE_DIR": str(tmp_path)}
    assert "compiled" in run_python(code, "float32", env=env).stdout
    assert "compiled" in run_python(code, "float64", env=env).stdout
    assert run_python(code, "float32", "float64", env=env).stdout.strip() == "{'loaded'}"
    assert run_python(code, "float64", "float32", env=env).stdout.strip() == "{'loaded'}"
