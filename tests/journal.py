"""A pytest plugin for a run of hours that may break: `-p journal --journal FILE` writes each test's outcome as it ends.

A line of the file is a JSON object: {"test": id, "outcome": ...}, where the outcome is "started", then "passed",
"skipped" or "failed" with seconds and a text. The next run with the same file leaves out the tests that have ended.
"""

import json
from pathlib import Path

import pytest


def outcomes(path: Path) -> dict[str, dict[str, str]]:
    """The last line of each test. A last line that was cut off by a crash is not read."""
    found: dict[str, dict[str, str]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                found[record["test"]] = record
    return found


def append(path: Path, **record: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcome, self.seconds, self.text = "passed", 0.0, ""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        ended = {test for test, record in outcomes(self.path).items() if record["outcome"] != "started"}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in ended])
        items[:] = [item for item in items if item.nodeid not in ended]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.seconds, self.text = "passed", 0.0, ""
        append(self.path, test=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for set-up, call and tear-down of a test; the worst of the three is its outcome."""
        self.seconds += report.duration
        if report.failed:
            self.outcome, self.text = "failed", str(report.longrepr)
        elif report.skipped and self.outcome == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            self.outcome, self.text = "skipped", str(reason).removeprefix("Skipped: ")
        if report.when == "teardown":
            seconds = f"{self.seconds:.1f}"
            append(self.path, test=report.nodeid, outcome=self.outcome, seconds=seconds, text=self.text)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", metavar="FILE", help="write each test's outcome, and leave out those written before")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--journal"):
        config.pluginmanager.register(Journal(Path(path)))
