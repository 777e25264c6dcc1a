"""What ptxas makes of every kernel, held to resources.json: no spill and no local memory, wide accesses, registers and
shared memory that let as many blocks live on a multiprocessor as before, and a main loop that is mostly products.

ladder.py makes the table. A few kernels are compiled anew always, all of them with --ladder.
"""

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

import ladder
import ptxas
from ladder import Kernel

needs_ptxas = pytest.mark.skipif(ptxas.missing() is not None, reason=str(ptxas.missing()))
TABLE = ladder.stored()
ROWS = [(target, name) for target, rows in TABLE.items() for name in rows]
TILES = ("forward", "decode", "queries", "keys", "bias", "aux")
QUICK = {
    ("forward f16 64", "keys f16 64", "forward f32 64"): ("sm_80", "sm_90"),
    ("keys f32 64",): ("sm_80", "sm_120"),
}

# The least part of products among the instructions of the main loop: half. In float64 a thread loads a number for each
# product where shared memory holds few rows: large heads, and the 99 KB of devices whose DFMAs take 30 times as long as
# everything else; and decode of small heads spends it on exp2.
SHARE, SHARE_F64 = 0.5, 0.42


def least_share(kernel: Kernel, cc: tuple[int, int]) -> float:
    large = kernel.dim > 128 or ladder.SHARED[cc] < 100 or kernel.what == "decode"
    return SHARE_F64 if kernel.dtype == "f64" and large else SHARE


def kernel_of(name: str) -> Kernel:
    return ladder.by_name(name)


def check(target: str, name: str, row: dict) -> None:  # type: ignore[type-arg]
    """What must be so of every kernel, whatever the table says."""
    kernel, cc = kernel_of(name), ladder.TARGET[target]
    assert row["spills"] == 0, f"{row['spills']} bytes spilled"
    assert row["stack"] == 0 and row["local"] == 0, f"stack {row['stack']}, {row['local']} local accesses"
    assert row["registers"] <= 255 and row["blocks"] >= 1
    assert row["bytes"] <= ladder.SHARED[cc] * 1024
    if not kernel.what.startswith(TILES):
        return
    if kernel.variant == "unaligned":
        return
    narrow = 0 if kernel.what in ("forward", "decode") else 2  # L and delta of a row
    assert row["LDGSTS128"] and row["LDGSTS32"] <= narrow, "tiles are not copied 16 bytes at a time"
    if kernel.what in ("forward", "queries", "keys", "keys-dk", "keys-dv"):
        assert row["STG128"], "results are not written 16 bytes at a time"
    if kernel.dtype in ladder.TENSOR:
        assert row["HMMA"] and row["LDSM"]
        assert row["useful"] == "HMMA"
    else:
        assert row["LDS128"] and not row["HMMA"] and not row["LDSM"]
        assert row["useful"] == ("DFMA" if kernel.dtype == "f64" else "FFMA")
        if not kernel.variant and kernel.what in ladder.PRODUCTS and kernel.what != "aux":
            assert row["share"] >= least_share(kernel, cc), f"{row['share']:.0%} of the main loop is products"
    if kernel.what in ladder.PRODUCTS and not kernel.variant and kernel.what != "aux":
        # besides the tile's own products only exp2 in float64 and rescaling count as useful
        most = 1.7 if kernel.dtype == "f64" else 1.3  # exp2 of float64 is DFMAs too, many beside a head size of 32
        assert 0.99 <= row["products"] <= most, f"{row['products']} of the products that the tile has: wrong trips"


def no_worse(row: dict, before: dict) -> None:  # type: ignore[type-arg]
    """Against the table's row."""
    assert row["registers"] <= before["registers"] + 8
    assert row["blocks"] >= before["blocks"]
    assert row["share"] >= before["share"] - 0.03
    for column in ("rows", "cols", "threads", "bytes"):
        assert row[column] == before[column], f"{column} was {before[column]}: ladder.py --write"


@pytest.mark.parametrize(("target", "name"), ROWS, ids=lambda x: x)
def test_the_table(target: str, name: str) -> None:
    check(target, name, TABLE[target][name])


@needs_ptxas
@pytest.mark.parametrize(("names", "targets"), QUICK.items(), ids=lambda x: "-".join(x))
def test_some_kernels_are_as_in_the_table(names: tuple[str, ...], targets: tuple[str, ...]) -> None:
    for target, rows in ladder.fresh(names, targets).items():
        for name, row in rows.items():
            check(target, name, row)
            no_worse(row, TABLE[target][name])


@needs_ptxas
@pytest.mark.ladder
@pytest.mark.parametrize("name", sorted({name for _, name in ROWS}))
def test_all_kernels_are_as_in_the_table(name: str) -> None:
    targets = tuple(target for target in TABLE if name in TABLE[target])
    for target, rows in ladder.fresh((name,), targets).items():
        check(target, name, rows[name])
        no_worse(rows[name], TABLE[target][name])


@pytest.mark.ladder
@pytest.mark.parametrize("name", ["forward f16 64", "queries f32 64"])
@pytest.mark.parametrize("cc", [(9, 0), (12, 0)], ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
def test_one_compilation_does_for_several_targets(name: str, cc: tuple[int, int]) -> None:
    """The table compiles a kernel once for all targets with the same tile: as if each were compiled by itself."""
    kernel = kernel_of(name)
    together = dict(ladder.ptx_for(kernel, [(8, 0), cc]))[cc]
    alone = dict(ladder.ptx_for(kernel, [cc]))[cc]
    assert ladder.without_names(together) == ladder.without_names(alone)


# --------------------------------------------------------------------------------------------------- bank conflicts

PROFILES = ladder.wavefronts()
PROFILED = [(target, str(kernel)) for target in ladder.PROFILED.values() for kernel in ladder.profiled()]
QUICK_PROFILES = [("sm_80", "forward f16 64"), ("sm_90", "forward f32 64")]
# What a loop may lose to conflicts: parts of its wavefronts.
LOST = 0.03


def lost(profile: dict) -> float:  # type: ignore[type-arg]
    """Part of a main loop's wavefronts that conflicts add."""
    took, ideal = (sum(numbers[n] for numbers in profile["loop"].values()) for n in range(2))
    return took / ideal - 1


@pytest.mark.parametrize(("target", "name"), PROFILED)
def test_main_loops_have_hardly_any_bank_conflicts(target: str, name: str) -> None:
    found = PROFILES[target][name]
    assert lost(found) <= LOST, found["loop"]
    for opcode, (took, ideal) in found["once"].items():
        assert took <= 2 * ideal + 0.01, f"{opcode} outside the loop: {took / ideal:.1f}-way"


@pytest.mark.parametrize(
    ("target", "name"),
    [pytest.param(*one, marks=() if one in QUICK_PROFILES else pytest.mark.ladder) for one in PROFILED],
)
def test_bank_conflicts_are_as_in_the_table(target: str, name: str) -> None:
    assert ladder.profile(kernel_of(name), target) == PROFILES[target][name]


def test_the_page_has_the_tables() -> None:
    """docs/cuda.md is what ladder.py --docs makes of itself."""
    text = ladder.DOCS.read_text()
    assert ladder.with_tables(text) == text
