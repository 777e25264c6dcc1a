"""Bugs put into our own kernels' PTX on purpose (mutations.py): small problems (replay.py) must notice every one, by
numbers, races, bounds, barriers or reads of what nobody wrote.

    python tests/cuda/test_cuda_mutants.py forward float16 5 8     # 8 mutants of seed 5, and what is left of them
    python tests/cuda/test_cuda_mutants.py                         # all that are drawn here, as docs/cuda.md has them

The draws are seeded, and go on until so many mutants were noticed or left other bits in memory. One whose code no
problem runs (a copy of an unrolled loop for turns that the tile never has), or that leaves the same bits, is no bug
that a result could show; the program above shows them for a person to judge. A few run always, all with --ladder.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 1, 2)]

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

import mutations
import replay
import seeds

# (kernel, dtype, seed, mutants)
DRAWS = [
    ("forward", "float16", 1, 8),
    ("forward", "float32", 2, 6),
    ("queries", "float16", 3, 5),
    ("queries", "float32", 4, 5),
    ("keys", "float16", 5, 6),
    ("keys", "float32", 6, 5),
    ("rows", "float32", 7, 3),
    ("decode", "float16", 8, 4),
    ("decode", "float32", 9, 4),
    ("merge", "float32", 10, 5),
    ("fill", "float32", 13, 3),
    ("bias", "float16", 14, 4),
    ("bias", "float32", 15, 4),
    ("total", "float32", 16, 3),
    ("slopes", "float32", 17, 3),
    ("sinks", "float32", 18, 3),
    ("aux", "float32", 19, 5),
    ("aux_total", "float32", 20, 3),
    ("convert", "float32", 21, 3),
]

# Always: of the kinds that a kernel of tiles can get wrong most easily, on the problems that notice most.
QUICK = [("forward", "float16", 11, 6), ("keys", "float16", 12, 6)]
QUICK_KINDS = ("barrier", "async", "fragment", "matrix", "rescale", "store")
QUICK_PROBLEMS = ("causal", "nan", "nan-dout", "steep")

IDLE = 3  # for each mutant that changes something, at most so many are drawn


def judged(what: str, dtype: str, seed: int, count: int, problems: Any = None, kinds: Any = None) -> mutations.Report:
    """Mutants as they are drawn, until `count` of them were noticed or left other bits in memory."""
    ptx, runs = replay.runs_of(what, dtype, problems)
    told: list[mutations.Outcome] = []

    def mutants() -> Iterator[mutations.Mutation]:
        more = (kinds,) if kinds else ()
        for mutation in mutations.draw(ptx, seeds.generator(seed), IDLE * count, *more):
            if len(told) == count:
                return
            yield mutation

    def tell(outcome: mutations.Outcome) -> None:
        if outcome.fate not in ("unreached", "same"):
            told.append(outcome)

    report = mutations.survivors(runs, ptx, mutants(), progress=tell)
    print(report)
    assert len(told) == count, f"{len(report.outcomes)} mutants were not enough"
    return report


def check(report: mutations.Report) -> None:
    assert not report.invalid, [str(o.mutation) for o in report.invalid]
    unnoticed = [o for o in report.survived if o.fate == "survived"]
    assert not unnoticed, "\n".join(map(str, unnoticed))


@pytest.mark.parametrize(("what", "dtype", "seed", "count"), QUICK, ids=lambda x: str(x))
def test_a_few_bugs_are_noticed(what: str, dtype: str, seed: int, count: int) -> None:
    check(judged(what, dtype, seed, count, QUICK_PROBLEMS, QUICK_KINDS))


@pytest.mark.ladder
@pytest.mark.parametrize(("what", "dtype", "seed", "count"), DRAWS, ids=lambda x: str(x))
def test_every_bug_is_noticed(what: str, dtype: str, seed: int, count: int) -> None:
    check(judged(what, dtype, seed, count))


def judge(what: str, dtype: str, seed: int, count: int) -> None:
    """Print each mutant's fate, and the survivors with the code around them."""
    ptx, runs = replay.runs_of(what, dtype)
    drawn = mutations.draw(ptx, seeds.generator(seed), count)
    report = mutations.survivors(runs, ptx, drawn, progress=lambda o: print(f"{o.fate}: {o}", flush=True))
    print(report, f"\nnoticed by the checks alone, with the right numbers: {len(report.silent)}")
    for o in report.survived:
        print("----", o.fate, o.mutation)
        print(mutations.context(ptx, o.mutation, 8))


TOGETHER = (
    ("forward",), ("decode",), ("merge",), ("queries",), ("keys",), ("rows", "fill"), ("bias", "total"),
    ("slopes", "sinks"), ("aux", "aux_total"), ("convert",),
)  # fmt: skip


def tell_all() -> None:
    """A table: kernels by fate."""
    fates: dict[str, Counter[str]] = {}
    for draw in (*DRAWS, *((*quick, QUICK_PROBLEMS, QUICK_KINDS) for quick in QUICK)):
        fates.setdefault(draw[0], Counter()).update(o.fate for o in judged(*draw).outcomes)
    rows = [(", ".join(names), sum((fates[name] for name in names), Counter())) for names in TOGETHER]
    rows.append(("all", sum((row for _, row in rows), Counter())))
    told = [fate for fate in mutations.FATES if rows[-1][1][fate]]
    print(f"| kernel | {' | '.join(told)} |\n|{'---|' * (1 + len(told))}")
    for name, row in rows:
        print(f"| {name} | {' | '.join(str(row[fate] or '-') for fate in told)} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        judge(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        tell_all()
