"""The journal of long runs: what ended is not run again, what killed the process is known by name."""

import subprocess
import sys
from pathlib import Path

import journal
import pytest
from child import importing

TESTS = """
import os, pytest
def test_right(): pass
def test_wrong(): assert 1 == 2, "a reason"
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
def test_deadly(): os._exit(3)
def test_last(): pass
"""


@pytest.mark.processes
def test_a_broken_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    lines = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "journal", "-p", "no:cacheprovider", f"--journal={lines}", "-q"]

    def run() -> tuple[int, dict[str, str]]:
        environment = importing(Path(__file__).parent)
        environment.pop("PYTEST_ADDOPTS", None)  # -n 2 would make it two processes
        status = subprocess.run([*command, "test_it.py"], cwd=tmp_path, env=environment, capture_output=True).returncode
        found = journal.outcomes(lines)
        return status, {test.removeprefix("test_it.py::test_"): record["outcome"] for test, record in found.items()}

    first = {"right": "passed", "wrong": "failed", "skipped": "skipped", "deadly": "started"}
    assert run() == (3, first)
    records = journal.outcomes(lines)
    assert "a reason" in records["test_it.py::test_wrong"]["text"]
    assert records["test_it.py::test_skipped"]["text"] == "not here"
    journal.append(lines, test="test_it.py::test_deadly", outcome="crashed", text="exit status 3")
    assert run() == (0, first | {"deadly": "crashed", "last": "passed"})
    assert run()[0] == 5  # nothing left


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    journal.append(lines, test="a", outcome="passed")
    with lines.open("a", encoding="utf-8") as file:
        file.write('{"test": "b", "outc')
    assert list(journal.outcomes(lines)) == ["a"]
