"""Bugs put into our own kernels' PTX on purpose (mutations.py): small problems (replay.py) must notice every one, by
numbers, races, bounds, barriers or reads of what nobody wrote.

    python tests/cuda/test_cuda_mutants.py forward float16 5 8     # 8 mutants of seed 5, and what is left of them

The draws are seeded. ACCEPTED names the mutants that nothing can notice, with the reason; a change of a kernel draws
others, and what is then left a person judges by the program above. A few run always, all of them with --ladder.
"""

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 1, 2)]

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

import emulator
import mutations
import numpy as np

if emulator.missing():
    pytest.skip(str(emulator.missing()), allow_module_level=True)

import replay

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
]

# Always: of the kinds that a kernel of tiles can get wrong most easily, on the problems that notice most.
QUICK = [("forward", "float16", 11, 6), ("keys", "float16", 12, 6)]
QUICK_KINDS = ("barrier", "async", "fragment", "matrix", "rescale", "store")
QUICK_PROBLEMS = ("causal", "nan", "nan-dout", "steep")

# A loop whose number of turns the tile decides, unrolled by a compiler that does not know it: one of the copies, or
# what is left over, never runs.
UNROLLED = "a copy of a loop's body for a number of turns that this tile never has"

# (kernel, dtype): {mutant: why no test can tell it from the kernel}
ACCEPTED: dict[tuple[str, str], dict[str, str]] = {
    ("queries", "float16"): {
        "compare: setp.ne.s32 %p444, %r1181, 2080374784; -> setp.eq.s32 %p444, %r1181, 2080374784;": UNROLLED,
    },
    ("keys", "float16"): {
        "store: st.shared.u32 [%rd394], %r100; -> (removed)": UNROLLED,
        "predicate: and.pred %p494, %p493, %p492; -> or.pred %p494, %p493, %p492;": (
            "the search of one thread for numbers that are not finite; another thread that finds one tells the block, "
            "and the problems have a NaN in every row of the tile"
        ),
    },
    ("decode", "float16"): {
        "predicate: xor.pred %p631, %p629, %p630; -> and.pred %p631, %p629, %p630;": UNROLLED,
    },
}


def named(mutation: mutations.Mutation) -> str:
    """A mutant without its line."""
    return f"{mutation.kind}: {mutation.before} -> {mutation.after or '(removed)'}"


def left(what: str, dtype: str, report: mutations.Report) -> list[mutations.Outcome]:
    known = ACCEPTED.get((what, dtype), {})
    return [o for o in report.survived if named(o.mutation) not in known]


@pytest.mark.parametrize(("what", "dtype", "seed", "count"), QUICK, ids=lambda x: str(x))
def test_a_few_bugs_are_noticed(what: str, dtype: str, seed: int, count: int) -> None:
    """Nothing changes the results unnoticed; some may change nothing."""
    ptx, runs = replay.runs_of(what, dtype, QUICK_PROBLEMS)
    mutants = mutations.draw(ptx, np.random.default_rng(seed), count, QUICK_KINDS)
    report = mutations.survivors(runs, ptx, mutants)
    print(report)
    unnoticed = left(what, dtype, report)
    assert not [str(o) for o in unnoticed if o.fate == "survived"]
    assert len(unnoticed) <= count // 3, [str(o) for o in unnoticed]


@pytest.mark.ladder
@pytest.mark.parametrize(("what", "dtype", "seed", "count"), DRAWS, ids=lambda x: str(x))
def test_every_bug_is_noticed(what: str, dtype: str, seed: int, count: int) -> None:
    ptx, runs = replay.runs_of(what, dtype)
    report = mutations.survivors(runs, ptx, mutations.draw(ptx, np.random.default_rng(seed), count))
    print(report)
    assert not report.invalid, [str(o.mutation) for o in report.invalid]
    assert not (unnoticed := left(what, dtype, report)), "\n".join(str(o) for o in unnoticed)


def test_accepted_mutants_have_a_reason() -> None:
    drawn = {(what, dtype) for what, dtype, *_ in DRAWS + QUICK}
    assert set(ACCEPTED) <= drawn
    assert all(len(reason) > 10 for known in ACCEPTED.values() for reason in known.values())


def judge(what: str, dtype: str, seed: int, count: int) -> None:
    """Print each mutant's fate, and the survivors with the code around them."""
    ptx, runs = replay.runs_of(what, dtype)
    drawn = mutations.draw(ptx, np.random.default_rng(seed), count)
    report = mutations.survivors(runs, ptx, drawn, progress=lambda o: print(f"{o.fate}: {o}", flush=True))
    print(report, f"\nnoticed by the checks alone, with the right numbers: {len(report.silent)}")
    for o in report.survived:
        print("----", o.fate, named(o.mutation))
        print(mutations.context(ptx, o.mutation, 8))


if __name__ == "__main__":
    judge(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
