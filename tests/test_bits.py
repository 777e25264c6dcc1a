"""A row's bits depend on its query, the keys that it may see and their index in its sequence: on nothing else.

So the same row comes out the same, to the last bit, alone or in a batch, packed or padded or separate, beside other
rows or not, in any layout, with 1, 2 or 4 threads. Few queries (Sq * group <= 16) may take a decode kernel with other
last bits, so calls that are compared stay on one side of that line.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import seeds
from cases import BY_NAME, CASES, DTYPES, Case, build, cap_30, checkerboard, from_layout, into_layout, slopes
from child import run_python

import numba_attn as na

DTYPE = pytest.mark.parametrize("dtype", list(DTYPES))


def drawn(dtype: str, *shapes: tuple[int, ...], seed: int = 0) -> Iterator[np.ndarray]:
    rng = seeds.generator(seed)
    return (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes)


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.itemsize}")


def same(got: Any, want: Any, what: str = "") -> None:
    for name, x, y in zip(("out", "lse"), got, want, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        different = bits(x) != bits(y)
        first = tuple(np.argwhere(different)[0].tolist()) if different.any() else ()
        assert not first, f"{what} {name}: {different.sum()} of {x.size} elements differ, first at {first}"


def both(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    out, lse = na.attention(q, k, v, **options, return_lse=True)
    assert np.abs(out.astype(np.float32)).max(initial=0) > 0 or out.size == 0  # bits of nothing prove nothing
    return out, lse


def rows(pair: tuple[np.ndarray, np.ndarray], where: Any) -> tuple[np.ndarray, np.ndarray]:
    return pair[0][where], pair[1][where]


# Options whose rows do not depend on b and h, for tests that take batch rows and heads apart.
EACH = {
    "plain": {},
    "causal": dict(causal=True, align="bottom_right"),
    "window": dict(window=(30, 5), align="bottom_right"),
    "softcap": dict(softcap=2.0),
    "mask-mod": dict(mask=na.mask_mod(checkerboard)),
    "score-mod": dict(score_mod=cap_30),
    "bias": dict(bias=seeds.generator(0).standard_normal((150, 333))),
    "mask": dict(mask=seeds.generator(0).random((150, 333)) < 0.5),
}
EACH_OPTION = pytest.mark.parametrize("name", list(EACH))


@DTYPE
@EACH_OPTION
def test_alone_or_in_a_batch(name: str, dtype: str) -> None:
    q, k, v = drawn(dtype, (3, 4, 150, 40), (3, 4, 333, 40), (3, 4, 333, 24))
    batch = both(q, k, v, **EACH[name])
    for b, h in ((0, 0), (1, 2), (2, 3)):
        one = np.s_[b : b + 1, h : h + 1]
        same(both(q[one], k[one], v[one], **EACH[name]), rows(batch, one), f"batch row {b}, head {h}")


@DTYPE
@EACH_OPTION
def test_other_batch_rows_and_heads_changed(name: str, dtype: str) -> None:
    q, k, v = drawn(dtype, (2, 2, 150, 40), (2, 2, 333, 40), (2, 2, 333, 24))
    before = rows(both(q, k, v, **EACH[name]), np.s_[1:, 1:])
    q[0], k[0], v[0] = 1e4, -3.0, np.nan
    q[1, 0], k[1, 0], v[1, 0] = np.nan, np.inf, 7.0
    same(rows(na.attention(q, k, v, **EACH[name], return_lse=True), np.s_[1:, 1:]), before)


@DTYPE
@EACH_OPTION
def test_other_queries_changed(name: str, dtype: str) -> None:
    """Rows share tiles: a maximum, a skipped rescale or a non-finite neighbour must not reach across."""
    q, k, v = drawn(dtype, (1, 2, 150, 40), (1, 2, 333, 40), (1, 2, 333, 24))
    want = both(q, k, v, **EACH[name])
    for kept in (slice(0, 1), slice(47, 49), slice(149, 150), slice(0, None, 7)):
        changed = np.full_like(q, 50.0)
        changed[:, :, ::2] = np.nan
        changed[:, :, kept] = q[:, :, kept]
        got = na.attention(changed, k, v, **EACH[name], return_lse=True)
        same(rows(got, np.s_[:, :, kept]), rows(want, np.s_[:, :, kept]), str(kept))


@DTYPE
def test_some_of_the_queries(dtype: str) -> None:
    """A slice of the queries lands in other lanes and other tiles."""
    q, k, v = drawn(dtype, (1, 2, 150, 59), (1, 2, 333, 59), (1, 2, 333, 59))
    full, causal = both(q, k, v), both(q, k, v, causal=True, align=20)
    for first, last in ((0, 17), (1, 150), (33, 100), (48, 96), (101, 150), (133, 150)):
        part = np.s_[:, :, first:last]
        same(both(q[part], k, v), rows(full, part), f"queries {first} to {last}")
        same(
            both(q[part], k, v, causal=True, align=20 + first), rows(causal, part), f"causal queries {first} to {last}"
        )
    order = seeds.generator(1).permutation(150)
    same(both(q[:, :, order], k, v), rows(full, np.s_[:, :, order]), "shuffled")


@DTYPE
def test_keys_that_nobody_sees_may_be_left_out(dtype: str) -> None:
    """Causal rows see a prefix of the keys: later keys, hidden, may exist or not."""
    q, k, v = drawn(dtype, (1, 2, 400, 40), (1, 2, 400, 40), (1, 2, 400, 40))
    want = both(q, k, v, causal=True)
    for n in (17, 64, 65, 100, 129, 256, 399):
        head = np.s_[:, :, :n]
        same(both(q[head], k[head], v[head], causal=True), rows(want, head), f"first {n}")
        padded = na.lengths([n], [n])
        got = both(q, k, v, causal=True, mask=padded, align="top_left")
        same(rows(got, head), rows(want, head), f"padded at {n}")


@DTYPE
@pytest.mark.parametrize("options", [
    {}, dict(causal=True), dict(window=(20, 4)), dict(causal=True, softcap=3.0, alibi_slopes=slopes(4)),
    dict(score_mod=cap_30),
], ids=["plain", "causal", "window", "softcap-alibi", "score-mod"])  # fmt: skip
def test_packed_padded_or_separate(options: dict[str, Any], dtype: str) -> None:
    sizes = [17, 100, 1 + 32, 129, 64, 250]
    cu = np.concatenate([[0], np.cumsum(sizes)])
    total = int(cu[-1])
    q, k, v = drawn(dtype, (1, 4, total, 40), (1, 2, total, 40), (1, 2, total, 33))
    packed = both(q, k, v, mask=na.varlen(cu, cu), **options)
    n = max(sizes)
    wide = [np.full((len(sizes), x.shape[1], n, x.shape[3]), np.nan, x.dtype) for x in (q, k, v)]
    for b, (start, end) in enumerate(pairwise(cu)):
        for x, y in zip(wide, (q, k, v), strict=True):
            x[b, :, : end - start] = y[0, :, start:end]
    padded = both(*wide, mask=na.lengths(sizes, sizes), **options)
    for b, (start, end) in enumerate(pairwise(cu)):
        part = np.s_[:, :, start:end]
        alone = both(q[part], k[part], v[part], **options)
        same(rows(packed, part), alone, f"packed, sequence of {end - start}")
        same(rows(padded, np.s_[b : b + 1, :, : end - start]), alone, f"padded, sequence of {end - start}")


@DTYPE
@pytest.mark.parametrize("group", [2, 3, 8])
@EACH_OPTION
def test_group_or_repeated_heads(name: str, group: int, dtype: str) -> None:
    q, k, v = drawn(dtype, (2, 2 * group, 150, 40), (2, 2, 333, 40), (2, 2, 333, 24))
    grouped = both(q, k, v, **EACH[name])
    same(both(q, np.repeat(k, group, 1), np.repeat(v, group, 1), **EACH[name]), grouped)


def test_group_of_few_queries() -> None:
    """Heads of one kv head share a tile when there are few queries."""
    for sq in (17, 20, 33, 47):
        q, k, v = drawn("float32", (2, 8, sq, 40), (2, 2, 333, 40), (2, 2, 333, 24))
        for options in (
            {},
            dict(causal=True, align="bottom_right"),
            dict(mask=seeds.generator(0).random((8, sq, 333)) < 0.5),
        ):
            same(both(q, np.repeat(k, 4, 1), np.repeat(v, 4, 1), **options), both(q, k, v, **options), f"{sq} queries")


@pytest.mark.parametrize(
    "name",
    ["layout-bhsd", "layout-bshd", "layout-hsd", "layout-shd", "layout-sd", "layout-bshd-f16", "layout-shd-bfloat16"],
)
def test_every_layout(name: str) -> None:
    case = BY_NAME[name]
    arrays, options = build(case)
    got = both(*arrays, **options)
    options.pop("layout", None)
    q, k, v = (np.ascontiguousarray(from_layout(x, case.layout)) for x in arrays)
    want = both(q, k, v, **options)
    same(tuple(from_layout(x, case.layout) for x in got), want)
    for layout in ("bhsd", "bshd"):
        again = both(*(into_layout(x, layout) for x in (q, k, v)), **options, layout=layout)
        same(tuple(from_layout(x, layout) for x in again), want, layout)


@DTYPE
def test_dropout_is_a_function_of_its_indices(dtype: str) -> None:
    """The same seed gives the same result; a group, a layout or the head count changes nothing; another seed does."""
    q, k, v = drawn(dtype, (2, 4, 150, 40), (2, 2, 333, 40), (2, 2, 333, 24))
    options = dict(dropout_p=0.3, seed=5)
    want = both(q, k, v, **options)
    same(both(q, k, v, **options), want)
    same(both(q, np.repeat(k, 2, 1), np.repeat(v, 2, 1), **options), want)
    same(both(q[:1, :2], k[:1, :1], v[:1, :1], **options), rows(want, np.s_[:1, :2]))
    same(both(q[:, :, :100], k, v, **options), rows(want, np.s_[:, :, :100]))
    swapped = both(*(x.swapaxes(1, 2) for x in (q, k, v)), **options, layout="bshd")
    same(tuple(x.swapaxes(1, 2) for x in swapped), want)
    assert (both(q, k, v, dropout_p=0.3, seed=6)[0] != want[0]).any()
    undropped = na.attention(q, k, v, return_lse=True)[1]
    assert undropped.tobytes() == want[1].tobytes()


@pytest.mark.parametrize(
    "name", ["parallel", "parallel-causal", "parallel-bfloat16", "parallel-everything", "plain-3x799", "everything"]
)
def test_again_and_again(name: str) -> None:
    """A race shows in repetition."""
    arrays, options = build(BY_NAME[name])
    want = both(*arrays, **options)
    for _ in range(8):
        same(both(*arrays, **options), want)


THREADED = [
    case
    for case in CASES
    if case.simd or case.name.startswith(("parallel", "many", "logits-50", "mask-banded", "varlen", "everything"))
] + [
    Case(
        "threads-causal",
        "",
        lambda rng, c: {"causal": True},
        batch=1,
        heads=(3, 1),
        q_len=1100,
        kv_len=1100,
        dims=(128, 128),
    ),
    Case(
        "threads-window",
        "",
        lambda rng, c: {"window": (200, 0)},
        batch=1,
        heads=(1, 1),
        q_len=3000,
        kv_len=3000,
        dims=(64, 64),
    ),
    Case(
        "threads-f64",
        "",
        lambda rng, c: {"causal": True},
        batch=2,
        heads=(3, 3),
        q_len=600,
        kv_len=600,
        dims=(64, 64),
        dtype="float64",
    ),
    Case("threads-many-heads", "", batch=8, heads=(16, 4), q_len=33, kv_len=203),
    Case("threads-one-row", "", batch=1, heads=(32, 32), q_len=1, kv_len=2000, dims=(64, 64)),
]


def threaded_digests() -> str:
    """One line a case: a digest of out and lse."""
    import hashlib

    lines = []
    for case in THREADED:
        arrays, options = build(case)
        out, lse = na.attention(*arrays, **options, return_lse=True)
        lines.append(f"{case.name} {hashlib.sha256(out.tobytes() + lse.tobytes()).hexdigest()}")
    return "\n".join(lines)


@pytest.mark.processes
def test_one_two_and_four_threads() -> None:
    code = """
import numba, test_bits
assert numba.config.NUMBA_NUM_THREADS == 4
for threads in (4, 1, 2, 4):
    numba.set_num_threads(threads)
    assert numba.get_num_threads() == threads
    print(test_bits.threaded_digests(), end="\\n---\\n")
"""
    runs = run_python(code, env={"NUMBA_NUM_THREADS": "4"}).stdout.split("\n---\n")[:4]
    assert len(runs) == 4 and len(runs[0].splitlines()) == len(THREADED)
    single = run_python(
        "import test_bits; print(test_bits.threaded_digests())", env={"NUMBA_NUM_THREADS": "1"}
    ).stdout.strip()
    for run in runs:
        assert run.splitlines() == single.splitlines()


def test_another_number_gives_other_bits() -> None:
    """Results cached by shape or by identity would pass every test above."""
    arrays, options = build(replace(BY_NAME["plain-3x799"], name="digest"))
    first = na.attention(*arrays, **options)
    arrays[1][0, 0, 5, 5] += 1
    assert na.attention(*arrays, **options).tobytes() != first.tobytes()


def test_alignments_that_print_alike() -> None:
    """An array of offsets prints without its middle: whatever a call is recognised by, it is not that."""
    q, k, v = drawn("float32", (9, 1, 20, 8), (9, 1, 64, 8), (9, 1, 64, 8))
    one, other = np.full(9, 30), np.full(9, 30)
    other[4] = 7
    with np.printoptions(threshold=2, edgeitems=1):
        first, second = (both(q, k, v, causal=True, align=align) for align in (one, other))
    assert (bits(first[0][4]) != bits(second[0][4])).any()
    same(rows(first, np.s_[:4]), rows(second, np.s_[:4]))


LIKE = [
    (dict(scale=0.25), dict(scale=0.250001)),
    (dict(scale=np.float32(0.1)), dict(scale=np.float32(0.1001))),
    (dict(softcap=2.0), dict(softcap=2.5)),
    (dict(causal=True, align=3), dict(causal=True, align=4)),
    (dict(window=(3, 4), align=0), dict(window=(4, 3), align=0)),
    (dict(dropout_p=0.5, seed=1), dict(dropout_p=0.5, seed=2)),
    (dict(dropout_p=0.5, seed=1), dict(dropout_p=0.25, seed=1)),
    ({}, dict(scale=0.0)),
    ({}, dict(alibi_slopes=np.array([0.0, 0.1]), align=0)),
]


@pytest.mark.parametrize(("one", "other"), LIKE)
def test_like_calls_are_told_apart(one: dict[str, Any], other: dict[str, Any]) -> None:
    """A plain call is recognised by its shapes and options: back and forth between two that differ in one number."""
    q, k, v = drawn("float32", (1, 2, 33, 16), (1, 2, 64, 16), (1, 2, 64, 16))
    wants = [na.reference.attention(q, k, v, **options) for options in (one, other)]
    assert np.abs(wants[0] - wants[1]).max() > 0
    results = [both(q, k, v, **options) for options in (one, other, one, other)]
    same(results[0], results[2])
    same(results[1], results[3])
    assert (bits(results[0][0]) != bits(results[1][0])).any()
    for got, want in zip(results, wants * 2, strict=True):
        assert np.abs(got[0] - want).max() < 2e-6
