"""The commands: what they print, and that a bad argument ends with a sentence and exit status 2."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from child import IMPORTED_FROM, importing

from numba_attn.app import bench, cli, demo
from numba_attn.app.terminal import Progress, bytes_text, seconds_text, table
from numba_attn.cuda.host import driver

TINY = ["--heads", "2", "--kv-heads", "1", "--q-len", "33", "--dim", "16", "--rounds", "1", "--seconds", "0.01"]


def test_info_tells_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("numba_attn", "python", "numpy", "numba", "llvmlite", "isa", "threads", "AMX", "CUDA", "environment"):
        assert any(line.startswith(name) for line in printed.splitlines()), f"{name} is missing in\n{printed}"


def test_module_is_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "numba_attn", "--help"],
        env=importing(IMPORTED_FROM),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: numba-attn")


@pytest.mark.processes
@pytest.mark.parametrize("arguments", ["info", "--version", "bench --libraries numba_attn " + " ".join(TINY)])
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("output", ["full", "pipe", "closed"])
def test_an_output_that_cannot_be_written_is_one_line(output: str, unbuffered: str, arguments: str) -> None:
    """A full disk, `| head`, `>&-`: no traceback, and none of Python's own last words about standard output."""
    if output == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    if output == "closed" and os.name != "posix":
        pytest.skip("no file descriptors here")
    start = "import os, sys\n"  # the command takes this process's place, with standard output closed or as it is
    start += "os.close(1)\n" if output == "closed" else ""
    start += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    if output == "full":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", start, "-m", "numba_attn", *arguments.split()],
            env={**importing(IMPORTED_FROM), "PYTHONUNBUFFERED": unbuffered},
            stdout=target,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(target)
    says = {
        "full": "cannot be written to: No space left on device",
        "pipe": "cannot be written to: ",
        "closed": "is closed",
    }[output]
    assert done.returncode == 1
    assert done.stderr.startswith(f"numba-attn: standard output {says}") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize(
    ("setting", "status", "says"),
    [
        ({"NUMBA_ATTN_CACHE_DIR": os.path.join(__file__, "cache")}, 1, "no writable cache folder"),
        ({"NUMBA_DISABLE_JIT": "1"}, 2, "NUMBA_DISABLE_JIT is set"),
    ],
)
def test_compile_says_what_keeps_it_from_filling_the_cache(setting: dict[str, str], status: int, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "numba_attn", "compile", "forward", "--dtype", "float32"],
        env={**importing(IMPORTED_FROM), **setting},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status and says in done.stderr.splitlines()[-1] and not done.stdout


def test_digits_are_recognised() -> None:
    digits = demo.classify_digits()
    assert digits.out.shape == (450, 10) and digits.out.dtype == np.float32
    assert digits.accuracy > 0.96
    assert digits.error < 1e-5
    np.testing.assert_allclose(digits.weights.sum(), 1, rtol=1e-4)
    np.testing.assert_allclose(digits.out.sum(axis=1), 1, rtol=1e-5)


def test_bundled_digits_are_the_original_size() -> None:
    data = Path(demo.__file__).parent / "data"
    with gzip.open(data / "digits.csv.gz", "rt") as lines:
        assert sum(1 for _ in lines) == 1797
    assert "CC BY 4.0" in (data / "LICENSE-digits.txt").read_text(encoding="utf-8")


def test_demo_runs_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    has_matplotlib = bool(importlib.util.find_spec("matplotlib"))
    picture = tmp_path / "digits.png"
    assert cli.main(["demo", "--quick", *(["--plot", str(picture)] if has_matplotlib else [])]) == 0
    printed = capsys.readouterr().out
    for text in ("accuracy 96", "query, a 3", "2,048", "dense NumPy", "max error"):
        assert text in printed, printed
    if has_matplotlib:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_times_a_shape_beside_numpy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *TINY, "--libraries", "numba_attn,numpy", "--causal"]) == 0
    printed = capsys.readouterr().out
    assert "times as fast as the fastest peer" in printed, printed
    assert cli.main(["bench", *TINY, "--libraries", "numba_attn,numpy", "--window", "5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["seconds"]) == {"numba_attn", "numpy"} and not answer["missing"]
    assert max(answer["error"].values()) < 1e-5


def test_bench_tells_the_fraction_of_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *TINY, "--peak", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    # FLOP/s: 2e8 on an emulated CPU.
    assert 0 < answer["fraction"] < 1.1 and answer["peak"] > 1e7


def test_info_survives_a_device_that_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("opening a context on CUDA device 0 failed")

    monkeypatch.setattr(driver, "missing", lambda: None)
    monkeypatch.setattr(driver, "current", broken)
    assert cli._cuda().endswith("; opening a context on CUDA device 0 failed")


@pytest.mark.parametrize(
    ("case", "pairs"),
    [
        (bench.Case(1, 1, 3, 5, 1), 15),
        (bench.Case(1, 1, 3, 5, 1, causal=True), 3 + 4 + 5),
        (bench.Case(1, 1, 5, 3, 1, causal=True), 0 + 0 + 1 + 2 + 3),
        (bench.Case(1, 1, 4, 4, 1, window=2), 1 + 2 + 2 + 2),
    ],
)
def test_only_visible_pairs_count_as_flops(case: bench.Case, pairs: int) -> None:
    assert case.flops() == 4 * pairs
    if case.causal or case.window:
        assert case.visible().sum() == pairs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["dance"], "dance"),
        (["compile", "sideways"], "takes forward, backward, jvp, not 'sideways'"),
        (["compile", "--dtype", "int8"], "takes float32, float64, float16, bfloat16, not 'int8'"),
        (["bench", "--q-len", "0"], "--q-len: takes a whole number of at least 1, not '0'"),
        (["bench", "--dim", "x"], "--dim: takes a whole number of at least 1, not 'x'"),
        (["bench", "--heads", "3", "--kv-heads", "2"], "--kv-heads must divide --heads"),
        (["bench", "--dtype", "int8"], "--dtype: invalid choice"),
        (["bench", "--seconds", "nan"], "--seconds: takes a number of seconds"),
        (["bench", "--threads", "100000"], "--threads takes at most"),
        (["bench", "--libraries", "numpy,abacus"], "'abacus' is not among those found here"),
        (
            ["bench", "--backend", "cuda", "--rounds", "3"],
            "takes no --peak, --json, --libraries, --threads or --rounds",
        ),
        (
            ["bench", "--backend", "cuda", "--rounds", "5"],
            "takes no --peak, --json, --libraries, --threads or --rounds",
        ),
        (["bench", "--backend", "cuda", "--dim", "128"], "takes a shape together with --q-len"),
        (["bench", "--backend", "cuda", "--dim", "64"], "takes a shape together with --q-len"),
        (["bench", "--backend", "cuda", "--causal"], "takes a shape together with --q-len"),
        (["bench", "--peak", "--libraries", "numpy"], "--peak times this library alone"),
        (["demo", "--plot", "picture.txt"], "--plot takes a file that ends in .png"),
        (["demo", "--plot", "no/such/folder/x.png"], "--plot cannot write into the folder"),
    ],
)
def test_bad_arguments_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_terminal_text() -> None:
    assert [seconds_text(s) for s in (1.234e-5, 4.56e-3, 0.0999, 7.891, 123.4)] == [
        "12.3 us", "4.56 ms", "99.9 ms", "7.89 s", "123 s",
    ]  # fmt: skip
    assert [bytes_text(b) for b in (1.5e6, 8.6e9)] == ["1.50 MB", "8.60 GB"]
    assert table(["", "x"], [["a", "1"], ["bb", "22"]]).splitlines() == ["     x", "--  --", "a    1", "bb  22"]


def test_progress_is_silent_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1) as progress:
        progress.step("one")
    assert capsys.readouterr() == ("", "")
