"""What the commands show in a terminal: a progress bar on stderr, tables and times as plain text."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, TextIO


class OutputFailed(Exception):
    """Standard output cannot be written: a full disk, a closed pipe. It is no OSError, which argparse would ignore."""


class Output:
    """Standard output for print and argparse. Its failures differ from the errors of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputFailed(error.strerror) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputFailed(error.strerror) from error


class Progress:
    """A bar of `total` steps on stderr: drawn on a terminal only, and only once a second has passed.

    A thread redraws it, so that a step of unknown length (a compilation, one large product) still shows its seconds.
    """

    def __init__(self, total: int) -> None:
        self.total, self.begun, self.label = total, 0, ""
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._redraw, daemon=True) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def step(self, label: str) -> None:
        """Begin the next step; the one before it is done."""
        self.begun += 1
        self.label = label

    def _redraw(self) -> None:
        drawn = False
        while not self._stop.wait(0.25):
            elapsed = time.perf_counter() - self._start
            if elapsed < 1:
                continue
            done = max(self.begun - 1, 0)
            bar = "#" * (24 * done // self.total)
            line = f"[{bar:.<24}] {done}/{self.total} {elapsed:4.0f} s  {self.label}"
            sys.stderr.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
            drawn = True
        if drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def seconds_text(seconds: float) -> str:
    """Three digits in the unit that fits: 12.3 us, 4.56 ms, 7.89 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} us"


def bytes_text(count: float) -> str:
    """Megabytes (10^6) up to 1,000 of them, then gigabytes."""
    return f"{_three_digits(count / 1e9)} GB" if count >= 1e9 else f"{_three_digits(count / 1e6)} MB"


def _three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"
