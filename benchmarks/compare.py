"""The project's comparison with other libraries: writes the README's table and docs/speed.png.

    python -m benchmarks.compare                     # every shape, every installed library, some minutes
    python -m benchmarks.compare --shapes "tiny 16 x 16" --rounds 1 --dry-run

Each library has a process of its own and they take turns; a time is the median over the rounds, and counts only when
the rows of the result that are checked agree with dense float64 (numba_attn/app/bench.py).
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import numba

import numba_attn
from numba_attn import cpu
from numba_attn.app import bench
from numba_attn.app.terminal import Progress, seconds_text

from .shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
PACKAGES = {name: module.replace("_", "-") for name, (module, _) in bench.LIBRARIES.items()}


def table(names: list[str], results: list[bench.Result], setting: str) -> str:
    """GitHub Markdown: our time, the fastest peer's and NumPy's, with how many times faster we are."""
    lines = ["| shape | numba_attn | fastest peer | times faster | NumPy | times faster |", "|---|--:|--:|--:|--:|--:|"]
    for name, r in zip(names, results, strict=True):
        ours = r.seconds.get("numba_attn")
        peers = {n: s for n, s in r.seconds.items() if n not in ("numba_attn", "numpy")}
        best = min(peers, key=peers.__getitem__, default=None)
        cells = [f"{name}", seconds_text(ours) if ours else "-"]
        for peer in (best, "numpy"):
            seconds = r.seconds.get(peer)
            label = "" if peer in (None, "numpy") else f" ({peer})"
            cells.append(seconds_text(seconds) + label if seconds else "-")
            cells.append(f"**{seconds / ours:.2f}**" if seconds and ours else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", setting])


def setting(libraries: list[str], threads: int, rounds: int) -> str:
    """One sentence on what was timed with what."""
    packages = sorted({PACKAGES[name] for name in libraries})
    own = {"numba-attn": numba_attn.__version__}  # a checkout on the path need not be installed
    versions = ", ".join(f"{p} {own.get(p) or importlib.metadata.version(p)}" for p in packages)
    return (
        f"{threads} threads, {cpu.describe()['isa']}; medians of {rounds} rounds in turns, a process each: {versions}. "
        "`python -m benchmarks.compare` (the shapes in numbers: benchmarks/shapes.py)."
    )


def picture(names: list[str], results: list[bench.Result], path: Path) -> None:
    """Horizontal bars: the speed of each library, the fastest peer's being 1."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    libraries = [n for n in bench.LIBRARIES if any(n in r.seconds for r in results)]
    colours = dict(
        zip(libraries, ("#d1495b", "#8d99ae", "#edae49", "#f4d58d", "#00798c", "#30638e", "#66a182"), strict=False)
    )
    figure = Figure(figsize=(9, 1.2 + 0.75 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, r in enumerate(results):
        peers = [s for n, s in r.seconds.items() if n != "numba_attn"]
        timed = [n for n in libraries if n in r.seconds]
        height = 0.8 / max(len(timed), 1)
        for place, name in enumerate(timed if peers else []):
            speed = min(peers) / r.seconds[name]
            y = row - 0.4 + height * (place + 0.5)
            axes.barh(y, speed, height, color=colours[name])
            if name == "numba_attn":
                axes.annotate(f"{speed:.2f}", (speed, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="speed, the fastest peer's being 1 (logarithmic)")
    slowest, fastest = axes.get_xlim()
    axes.set_xticks([x for x in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if slowest <= x <= fastest])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(len(names) - 0.5, -0.5)
    for name in libraries:
        axes.barh(0, 0, color=colours[name], label=name)
    figure.legend(loc="outside upper center", ncols=len(libraries), fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="comma-separated names from benchmarks/shapes.py (default: all)")
    parser.add_argument("--libraries", help="comma-separated (default: all that are installed)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--dry-run", action="store_true", help="print the table; leave README.md and docs/ alone")
    args = parser.parse_args()
    names = args.shapes.split(",") if args.shapes else list(SHAPES)
    if unknown := [n for n in names if n not in SHAPES]:
        parser.error(f"no shape is called {unknown[0]!r}; there are: {', '.join(SHAPES)}")
    libraries = args.libraries.split(",") if args.libraries else bench.installed()
    threads = numba.get_num_threads()

    with Progress(len(names) * args.rounds * len(libraries)) as progress:
        results = bench.compare(
            [SHAPES[n] for n in names],
            libraries,
            rounds=args.rounds,
            seconds=args.seconds,
            threads=threads,
            on_step=progress.step,
        )
    text = table(names, results, setting(libraries, threads, args.rounds))
    print(text)
    for r in results:
        for name, why in r.missing.items():
            print(f"{r.case}: {name} not timed, {why}", file=sys.stderr)
    if args.dry_run:
        return
    readme = ROOT / "README.md"
    head, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
    picture(names, results, ROOT / "docs" / "speed.png")


if __name__ == "__main__":
    main()
