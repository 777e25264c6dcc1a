"""The demonstration behind `numba-attn demo`: attention whose result can be seen, and attention that does not fit into
memory with NumPy.

First, handwritten digits are classified by cross-attention alone, with nothing trained. Then a causal window with
grouped heads runs over a long sequence, beside dense NumPy at the largest size that fits in memory.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.resources
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import numba_attn
from numba_attn import reference
from numba_attn.app.bench import Case, dense_attention
from numba_attn.app.terminal import Progress, bytes_text, seconds_text, table

TRAINING = 1347  # three quarters; other people wrote the rest

# Images are scaled to length 1, so that a score is the cosine of two images. The scale is the inverse width of the
# kernel, chosen by leave-one-out on the training images (10: 94.9 %, 20: 97.0, 40: 98.1, 80: 99.1, 160: 99.2), never on
# the test images.
DIGITS_SCALE = 80.0

SHOWN_DIGIT = 285  # the test image whose attention is drawn: a difficult one, its largest weight is on another digit
SHOWN_KEYS = 5

HEADS, KV_HEADS, DIM, WINDOW = 8, 2, 64, 1024
TOKENS = 16_384
CHECKED_ROWS = 64  # of each head, the last ones: compared with dense float64


@dataclass
class Digits:
    """Cross-attention from test images to training images. `weights` is what each test image attends to."""

    queries: np.ndarray  # (450, 64), length 1
    keys: np.ndarray  # (1347, 64), length 1
    labels: np.ndarray  # (1347,), the keys' digits
    truth: np.ndarray  # (450,), the queries' digits
    out: np.ndarray  # (450, 10): a probability for each digit
    weights: np.ndarray  # (1347,): of the shown query
    seconds: float
    dense_seconds: float
    error: float

    @property
    def accuracy(self) -> float:
        return float((self.out.argmax(axis=1) == self.truth).mean())

    @property
    def nearest(self) -> np.ndarray:
        """The keys with the largest weights, the largest first."""
        return np.argsort(-self.weights)[:SHOWN_KEYS]


@dataclass
class Run:
    """One row of the table at the end."""

    name: str
    tokens: int
    seconds: float
    memory: int | None
    error: float

    def cells(self) -> list[str]:
        memory = "-" if self.memory is None else bytes_text(self.memory)
        return [self.name, f"{self.tokens:,}", seconds_text(self.seconds), memory, f"{self.error:.1e}"]


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 images (1797, 64) float32 of length 1, and their digits (1797,) int64."""
    file = importlib.resources.files("numba_attn.app") / "data" / "digits.csv.gz"
    with file.open("rb") as packed, gzip.open(packed, "rt") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    images = rows[:, :64]
    return images / np.linalg.norm(images, axis=1, keepdims=True), rows[:, 64].astype(np.int64)


def classify_digits() -> Digits:
    """Test images are the queries, training images the keys, their digits (one-hot) the values: out[i] is a vote."""
    images, digits = load_digits()
    keys, queries = images[:TRAINING], images[TRAINING:]
    values = np.eye(10, dtype=np.float32)[digits[:TRAINING]]
    start = time.perf_counter()
    out, lse = numba_attn.attention(queries, keys, values, scale=DIGITS_SCALE, layout="sd", return_lse=True)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    dense = reference.attention(queries, keys, values, scale=DIGITS_SCALE, layout="sd")
    dense_seconds = time.perf_counter() - start
    weights = np.exp(DIGITS_SCALE * (keys @ queries[SHOWN_DIGIT]) - lse[SHOWN_DIGIT])
    return Digits(
        queries=queries,
        keys=keys,
        labels=digits[:TRAINING],
        truth=digits[TRAINING:],
        out=out,
        weights=weights,
        seconds=seconds,
        dense_seconds=dense_seconds,
        error=float(np.abs(out - dense).max()),
    )


def draw_digits(d: Digits) -> str:
    """The shown query and the keys with the largest weights, side by side, in characters."""

    def lines(image: np.ndarray) -> list[str]:
        levels = np.minimum(image.reshape(8, 8) / image.max() * 9.999, 9).astype(int)
        return ["".join(" .:-=+*#%@"[x] * 2 for x in row) for row in levels]

    titles = [f"query, a {d.truth[SHOWN_DIGIT]}", *(f"a {d.labels[j]}: {100 * d.weights[j]:.1f} %" for j in d.nearest)]
    blocks = [lines(d.queries[SHOWN_DIGIT]), *(lines(d.keys[j]) for j in d.nearest)]
    rows = [" | ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]
    votes = np.argsort(-d.out[SHOWN_DIGIT])[:3]
    vote = ", ".join(f"{n} with {100 * d.out[SHOWN_DIGIT, n]:.0f} %" for n in votes)
    return "\n".join([*rows, " | ".join(f"{t:^16}" for t in titles).rstrip(), f"the vote over all keys: {vote}"])


def plot_digits(d: Digits, path: str) -> None:
    """The same as a picture, with the vote for each digit and the weight of every key. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    top, bottom = parts
    for n, axes in enumerate(top.subplots(1, 1 + SHOWN_KEYS)):
        j = d.nearest[n - 1]
        image, title = (
            (d.keys[j], f"a {d.labels[j]}: {100 * d.weights[j]:.1f} %")
            if n
            else (d.queries[SHOWN_DIGIT], f"query, a {d.truth[SHOWN_DIGIT]}")
        )
        axes.imshow(image.reshape(8, 8), cmap="gray_r" if n else "Blues")
        axes.set(title=title, xticks=[], yticks=[])
    votes, keys = bottom.subplots(1, 2, width_ratios=(1, 2))
    votes.bar(range(10), d.out[SHOWN_DIGIT])
    votes.set(title="vote", xlabel="digit", ylabel="probability", xticks=range(10))
    keys.scatter(np.arange(len(d.weights)), d.weights, c=d.labels, cmap="tab10", s=12)
    keys.set(title="what the query attends to; the colour is the digit", xlabel="training image", ylabel="weight")
    figure.savefig(path, dpi=120)


def long_sequence(tokens: int, dense_tokens: int, progress: Progress) -> list[Run]:
    """Grouped heads under a causal window, at `tokens` and, beside dense NumPy, at `dense_tokens`."""
    progress.step("a small call: compiles the kernel")
    _call(_inputs(256))
    runs = []
    for n in sorted({tokens, dense_tokens}, reverse=True):
        progress.step(f"numba_attn, {n:,} tokens")
        runs.append(_measure("numba_attn", n, _call))
    progress.step(f"dense NumPy, {dense_tokens:,} tokens")
    runs.append(_measure("dense NumPy", dense_tokens, _dense))
    return runs


def largest_dense(limit: int) -> int:
    """`limit` tokens, halved until dense NumPy needs no more than half the free memory."""
    free, tokens = free_memory(), limit
    # One float32 score a pair and head, and one byte of mask a pair; softmax runs in place.
    while tokens > 256 and tokens * tokens * (4 * HEADS + 1) > free / 2:
        tokens //= 2
    return tokens


def free_memory() -> int:
    """Bytes that a process can get now, as Linux reports them. On other systems 4 GB, a low estimate."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 4_000_000_000


def _inputs(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _case(tokens).inputs()


def _case(tokens: int) -> Case:
    return Case(HEADS, KV_HEADS, tokens, tokens, DIM, window=WINDOW)


def _call(arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    return numba_attn.attention(*arrays, causal=True, window=(WINDOW - 1, 0))


def _dense(arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    return dense_attention(*arrays, _case(arrays[0].shape[2]).visible())


def _measure(name: str, tokens: int, call: Callable[..., np.ndarray]) -> Run:
    q, k, v = _inputs(tokens)
    with peak_growth() as memory:
        start = time.perf_counter()
        out = call((q, k, v))
        seconds = time.perf_counter() - start
    rows = slice(-CHECKED_ROWS, None)
    want = reference.attention(q[:, :, rows], k, v, causal=True, window=(WINDOW - 1, 0), align="bottom_right")
    return Run(name, tokens, seconds, memory.bytes, float(np.abs(out[:, :, rows] - want).max()))


@dataclass
class Growth:
    """Bytes of resident memory at the peak beyond those at the start; None where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_growth() -> Iterator[Growth]:
    """Measure by how much the block raises the resident memory (on Linux, where the peak can be reset)."""
    growth = Growth()
    before = _resident("VmRSS") if _reset_high_water() else None
    yield growth
    after = _resident("VmHWM")
    if before is not None and after is not None:
        growth.bytes = max(after - before, 0)


def _reset_high_water() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
    except (OSError, StopIteration):
        return None


def run(plot: str | None, quick: bool) -> None:
    """Run both parts, print them, and draw the picture to `plot`. `quick` takes an eighth of the tokens."""
    with Progress(2) as progress:
        progress.step("digits, first call: compiles the kernel")
        start = time.perf_counter()
        classify_digits()
        first = time.perf_counter() - start
        progress.step("digits")
        digits = classify_digits()
        if plot:
            plot_digits(digits, plot)
    pairs = f"{len(digits.queries)} x {len(digits.keys):,}"
    print(f"Handwritten digits by cross-attention: test images attend training images, {pairs} (Dk 64, Dv 10).")
    print(f"accuracy {100 * digits.accuracy:.1f} %, nothing trained; scale {DIGITS_SCALE:g} on images of length 1\n")
    print(draw_digits(digits) + "\n")

    tokens = TOKENS // 8 if quick else TOKENS
    dense_tokens = largest_dense(tokens)
    heads = f"{HEADS} heads on {KV_HEADS}, size {DIM}, float32"
    print(f"Causal grouped-query attention with a window of {WINDOW:,} keys: {heads}.")
    if dense_tokens < tokens:
        need = bytes_text(tokens * tokens * 4 * HEADS)
        print(
            f"Dense NumPy stops at {dense_tokens:,} tokens: {tokens:,} make {need} of scores, too much for this memory."
        )
    print()
    with Progress(2 + len({tokens, dense_tokens})) as progress:
        runs = long_sequence(tokens, dense_tokens, progress)
    rows = [
        ["digits, numba_attn", pairs, seconds_text(digits.seconds), "-", f"{digits.error:.1e}"],
        ["digits, dense float64", pairs, seconds_text(digits.dense_seconds), "-", "0"],
        *(run.cells() for run in runs),
    ]
    print(table(["", "tokens", "time", "peak memory", "max error"], rows))
    at_same = {r.name: r for r in runs if r.tokens == dense_tokens}
    faster = at_same["dense NumPy"].seconds / at_same["numba_attn"].seconds
    print("\npeak memory: beyond the inputs, the output included; max error: the distance from dense NumPy in float64")
    print(f"{dense_tokens:,} tokens: {faster:.1f} times as fast as dense NumPy; very first call {seconds_text(first)}")
    if plot:
        print(f"picture: {plot}")


def check_plot(path: str) -> str | None:
    """Why `path` cannot be drawn to, or None. Called before the work starts."""
    folder = os.path.dirname(os.path.abspath(path))
    if not path.lower().endswith((".png", ".svg", ".pdf")):
        return f"--plot takes a file that ends in .png, .svg or .pdf, not {path!r}"
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        return f"--plot cannot write into the folder {folder!r}"
    if importlib.util.find_spec("matplotlib") is None:
        return f'--plot needs matplotlib: {sys.executable} -m pip install "numba-attn[plot]"'
    return None
