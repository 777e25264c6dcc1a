"""What is visible: each constructor against its formula written out as loops, and the bounds that kernels read against
both.

`expanded` is a dense picture of a `Problem`, made only from the fields that a kernel reads; it must equal the and of
the parts' own formulas for every combination of parts.
"""

import doctest
import itertools
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
import seeds
from cases import CASES, Case, build

import numba_attn
from numba_attn import mask as mask_module
from numba_attn.mask import Mask, causal, intervals, lengths, mask_mod, prefix, segments, varlen, window
from numba_attn.mask.lowering import unused_align
from numba_attn.mask.parts import Aligned, MaskMod, Part, dense
from numba_attn.mask.shape import Shape, check_align
from numba_attn.plan import OPEN, Problem, keyword_parts, resolve, window_part


def expanded(p: Problem) -> np.ndarray:
    """The pairs that a kernel that follows `p` computes: bool (B, Hq, Sq, Sk)."""
    size = (p.batch, p.q_heads, p.q_len, p.kv_len)
    seen = np.zeros(size, bool)
    for b, q_start, q_len, k_start, k_len, offset, n in p.sequences.tolist():
        for i in range(q_len):
            left, right = i + offset - p.left, i + offset + p.right
            if p.has_prefix:
                right = min(right, max(n - 1, i + offset))
            left, right = max(left, 0), min(right, k_len - 1)
            seen[b, :, q_start + i, k_start + left : k_start + max(right + 1, left)] = True
    if p.start is not None:
        j = np.arange(p.kv_len)
        seen &= (p.start[..., None] <= j) & (j < p.end[..., None])
    for q_ids, kv_ids in p.segments:
        seen &= (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
    for m in p.masks:
        assert m.shape == size
        seen &= m
    for fn, aux in p.mask_mods:
        for at in np.ndindex(*size):
            seen[at] &= bool(fn(*at, *aux))
    return seen


def problem(batch: int, heads: int, q_len: int, kv_len: int, **options) -> Problem:
    q, kv = np.zeros((batch, heads, q_len, 1)), np.zeros((batch, heads, kv_len, 1))
    return resolve(q, kv, kv, **options)


def check_bounds(p: Problem, want: np.ndarray, what: object) -> None:
    """The lowering of a mask is its formula, pair by pair."""
    different = np.argwhere(expanded(p) != want)
    first = dict(zip("bhij", different[0].tolist(), strict=True)) if len(different) else None
    assert first is None, (
        f"the lowering and the formula of {what} differ at {len(different)} of {want.size} pairs, first at {first}"
    )


def drawn(formula, q_len: int, kv_len: int) -> np.ndarray:
    return np.array([[bool(formula(i, j)) for j in range(kv_len)] for i in range(q_len)]).reshape(q_len, kv_len)


def offset_of(align, q_len: int, kv_len: int) -> int:
    return {"bottom_right": kv_len - q_len, "top_left": 0}.get(align, align)


SIZES = [(1, 1), (1, 7), (7, 1), (5, 5), (4, 9), (9, 4)]
ALIGNS = ["bottom_right", "top_left", 0, 2, -3, 100]


@pytest.mark.parametrize("q_len, kv_len", SIZES)
@pytest.mark.parametrize("align", ALIGNS)
def test_causal_window_prefix(q_len, kv_len, align):
    o = offset_of(align, q_len, kv_len)
    for made, formula in (
        (causal(align), lambda i, j: j <= i + o),
        (window(2, 1, align), lambda i, j: i + o - 2 <= j <= i + o + 1),
        (window(0, None, align), lambda i, j: j >= i + o),
        (window(None, 0, align), lambda i, j: j <= i + o),
        (window(None, None, align), lambda i, j: True),
        (window(2**70, 3, align), lambda i, j: j <= i + o + 3),
        (prefix(2, align), lambda i, j: j < 2 or j <= i + o),
        (prefix(0, align), lambda i, j: j <= i + o),
        (prefix(1000, align), lambda i, j: True),
        (prefix(3, align) & window(4, 1, align), lambda i, j: (j < 3 or j <= i + o) and i + o - 4 <= j <= i + o + 1),
        (prefix(3, align) & causal(align), lambda i, j: j <= i + o),
        (prefix(3, align) & prefix(1, align), lambda i, j: j < 1 or j <= i + o),
        (window(5, 3, align) & window(2, 4, align), lambda i, j: i + o - 2 <= j <= i + o + 3),
    ):
        want = drawn(formula, q_len, kv_len)
        assert np.array_equal(made.dense(q_len, kv_len)[0, 0], want), made
        assert np.array_equal(expanded(problem(1, 1, q_len, kv_len, mask=made))[0, 0], want), made


@pytest.mark.parametrize("q_len, kv_len", SIZES)
@pytest.mark.parametrize("align", ALIGNS)
def test_keywords_mean_the_parts(q_len, kv_len, align):
    for options, part in (
        ({"causal": True}, causal()),
        ({"causal": np.True_}, causal()),
        ({"window": (2, 1)}, window(2, 1)),
        ({"window": [None, np.int32(1)]}, window(None, 1)),
        ({"causal": True, "window": (2, 1)}, causal() & window(2, 1)),
        ({"causal": True, "window": (2, 1)}, window(2, 0)),
    ):
        want = part.dense(q_len, kv_len, align=align)
        short = problem(1, 1, q_len, kv_len, align=align, **options)
        long = problem(1, 1, q_len, kv_len, align=align, mask=part)
        assert np.array_equal(expanded(short), want)
        assert np.array_equal(expanded(long), want)
        assert np.array_equal(short.sequences, long.sequences)
        assert (short.left, short.right) == (long.left, long.right)


def test_parts_by_loops():
    rng = seeds.generator(0)
    batch, heads, q_len, kv_len = 3, 2, 6, 8
    kv_lengths, q_lengths = np.array([0, 8, 5]), np.array([6, 3, 0])
    q_ids, kv_ids = rng.integers(0, 3, (batch, q_len)), rng.integers(0, 3, (batch, kv_len))
    start, end = rng.integers(0, kv_len + 1, (2, batch, heads, q_len))
    cu_q, cu_k = [0, 2, 2, 5], [0, 3, 7, 8]
    run_q, run_k = [0, 0, 2, 2, 2, -1], [0, 0, 0, 1, 1, 1, 1, 2]
    for made, formula in (
        (lengths(kv_lengths), lambda b, h, i, j: j < kv_lengths[b]),
        (lengths(kv_lengths.astype(np.uint8), q_lengths), lambda b, h, i, j: j < kv_lengths[b] and i < q_lengths[b]),
        (varlen(cu_q, cu_k), lambda b, h, i, j: run_q[i] == run_k[j]),
        (segments(q_ids, kv_ids), lambda b, h, i, j: q_ids[b, i] == kv_ids[b, j]),
        (segments(q_ids[0], kv_ids), lambda b, h, i, j: q_ids[0, i] == kv_ids[b, j]),
        (segments(q_ids[0], kv_ids[1]), lambda b, h, i, j: q_ids[0, i] == kv_ids[1, j]),
        (intervals(start, end), lambda b, h, i, j: start[b, h, i] <= j < end[b, h, i]),
        (intervals(start[0, 0], end[:, 1]), lambda b, h, i, j: start[0, 0, i] <= j < end[b, 1, i]),
    ):
        want = np.zeros((batch, heads, q_len, kv_len), bool)
        for at in np.ndindex(*want.shape):
            want[at] = formula(*at)
        assert np.array_equal(made.dense(q_len, kv_len, batch=batch, q_heads=heads), want), made
        assert np.array_equal(expanded(problem(batch, heads, q_len, kv_len, mask=made)), want), made


@pytest.mark.parametrize("align", ["bottom_right", "top_left", 1, np.array([1, -1])])
def test_offsets_are_taken_per_sequence(align):
    """Two batch rows of lengths, and three packed sequences: positions and offsets start anew in each."""
    kv_lengths, q_lengths = [9, 4], [5, 6]
    made = lengths(kv_lengths, q_lengths) & causal(align) & window(4, None, align)
    want = np.zeros((2, 1, 7, 10), bool)
    for b in range(2):
        o = int(align[b]) if isinstance(align, np.ndarray) else offset_of(align, q_lengths[b], kv_lengths[b])
        for i, j in np.ndindex(q_lengths[b], kv_lengths[b]):
            want[b, 0, i, j] = i + o - 4 <= j <= i + o
    assert np.array_equal(made.dense(7, 10, batch=2), want)
    assert np.array_equal(expanded(problem(2, 1, 7, 10, mask=made)), want)

    cu_q, cu_k = [0, 3, 3, 7], [0, 2, 4, 10]
    made = varlen(cu_q, cu_k) & prefix([1, 2], align)
    want = np.zeros((2, 1, 8, 10), bool)
    for b, t in np.ndindex(2, 3):
        n_q, n_k = cu_q[t + 1] - cu_q[t], cu_k[t + 1] - cu_k[t]
        o = int(align[b]) if isinstance(align, np.ndarray) else offset_of(align, n_q, n_k)
        for i, j in np.ndindex(n_q, n_k):
            want[b, 0, cu_q[t] + i, cu_k[t] + j] = j < 1 + b or j <= i + o
    assert np.array_equal(made.dense(8, 10, batch=2), want)
    assert np.array_equal(expanded(problem(2, 1, 8, 10, mask=made)), want)


def some_parts(rng, batch, heads, q_len, kv_len):
    """One of each kind of part, of random content."""

    def cu(n, size):
        return np.concatenate(([0], np.sort(rng.integers(0, size + 1, n))))

    def bound():
        return None if rng.random() < 0.3 else int(rng.integers(0, 5))

    ids = np.sort if rng.random() < 0.5 else np.asarray
    shapes = [(q_len,), (batch, q_len), (batch, heads, q_len)]
    n = int(rng.integers(1, 4))
    return [
        causal(),
        window(bound(), bound()),
        prefix(int(rng.integers(0, 5))),
        prefix(rng.integers(0, 5, batch)),
        lengths(rng.integers(0, kv_len + 1, batch), rng.integers(0, q_len + 1, batch)),
        varlen(cu(n, q_len), cu(n, kv_len)),
        segments(ids(rng.integers(0, 3, (batch, q_len))), ids(rng.integers(0, 3, (batch, kv_len)))),
        intervals(rng.integers(0, kv_len + 1, shapes[n % 3]), rng.integers(0, kv_len + 1, shapes[(n + 1) % 3])),
        Mask() & (rng.random((batch, 1, 1, kv_len)) < 0.8),
    ]


def test_every_kind_of_part_is_combined():
    """some_parts() has each. MaskMod has a test of its own."""
    made = {type(part) for one in some_parts(seeds.generator(0), 2, 2, 5, 5) for part in one.parts}
    missing = set(get_args(Part)) - made - {MaskMod}
    assert not missing, f"add {missing} to some_parts() of this file"


def test_every_part_with_an_align_takes_the_calls():
    aligned = {part for part in get_args(Part) if "align" in {field.name for field in fields(part)}}
    assert aligned == set(get_args(Aligned)), "`Aligned` in mask/parts.py lists the parts that have an align"
    for part in aligned:
        name = part.__name__.lower()
        assert name in str(unused_align()), f"unused_align() in mask/lowering.py does not name {name}"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_bounds_equal_formulas_for_any_combination(count):
    rng = seeds.generator(count)
    for _ in range(150):
        size = tuple(int(n) for n in rng.integers((0, 1, 0, 0), (4, 3, 9, 9)))
        batch, heads, q_len, kv_len = size
        made = Mask()
        for at in rng.permutation(len(some_parts(rng, *size)))[:count]:
            made = made & some_parts(rng, *size)[at]
        align = ["bottom_right", "top_left", int(rng.integers(-4, 5)), rng.integers(-4, 5, batch)][rng.integers(4)]
        align = align if any(isinstance(p, Aligned) for p in made.parts) else None
        want = made.dense(q_len, kv_len, batch=batch, q_heads=heads, align=align)
        got = problem(*size, mask=made, align=align)
        check_bounds(got, want, f"{made} with align {align}")
        assert got.sequences.dtype == np.int64
        assert got.sequences.flags.c_contiguous


MASKED = [case for case in CASES if "mask" in build(case)[1] and not case.name.startswith("parallel")]


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_bounds_equal_formulas_in_the_table(case: Case) -> None:
    """Without numbers: a wrong lowering is seen as such, and not as a large error of a kernel."""
    (q, k, v), options = build(case)
    p = resolve(q, k, v, **options)
    parts = keyword_parts(options.get("causal", False), window_part(options), options.get("mask"))
    shape = Shape(p.batch, p.q_heads, p.q_len, p.kv_len, 4 - q.ndim)
    want = dense(parts, check_align(options.get("align"), "align"), shape)
    check_bounds(p, want, parts)


def test_two_sequence_parts_refine_each_other():
    """Positions count from the start of what is left of a sequence."""
    made = varlen([0, 4, 8], [0, 4, 8]) & lengths([6]) & causal("bottom_right")
    want = np.zeros((8, 8), bool)
    want[:4, :4] = np.tri(4)
    want[4:, 4:6] = np.tri(4, 2, 2 - 4)  # 4 queries, 2 keys: offset -2
    assert np.array_equal(made.dense(8, 8)[0, 0], want)
    assert np.array_equal(expanded(problem(1, 1, 8, 8, mask=made))[0, 0], want)


def test_bool_arrays_broadcast_as_numpy_does():
    rng = seeds.generator(1)
    size = (2, 3, 4, 5)
    for kept in itertools.product([False, True], repeat=4):
        shape = tuple(n if keep else 1 for n, keep in zip(size, kept, strict=True))
        m = rng.random(shape) < 0.5
        view = problem(*size, mask=m).masks[0]
        assert np.array_equal(view, np.broadcast_to(m, size))
        assert np.shares_memory(view, m)
    assert np.array_equal(problem(*size, mask=m[0, 0]).masks[0], np.broadcast_to(m[0, 0], size))
    for layout, missing in (("hsd", 1), ("shd", 1), ("sd", 2)):
        q = np.zeros({"hsd": (3, 4, 1), "shd": (4, 3, 1), "sd": (4, 1)}[layout])
        k = np.zeros({"hsd": (3, 5, 1), "shd": (5, 3, 1), "sd": (5, 1)}[layout])
        p = resolve(q, k, k, mask=m[0, 0], layout=layout)
        assert p.masks[0].shape == (1, (3, 3, 1)[missing], 4, 5)
        p = resolve(q, k, k, mask=Mask() & m[0, 0], layout=layout)
        assert p.masks[0].shape == (1, (3, 3, 1)[missing], 4, 5)


def test_a_square_padding_mask_is_a_pair_mask():
    """(B, Sk) that is also (Sq, Sk) means the latter; with B = 1 both mean the same."""
    m = np.tri(4, 4, dtype=bool)
    assert np.array_equal(expanded(problem(4, 1, 4, 4, mask=m))[2, 0], m)
    one = np.array([[True, False, True]])
    assert np.array_equal(expanded(problem(1, 1, 2, 3, mask=one))[0, 0], np.broadcast_to(one, (2, 3)))


def test_and_with_bool_arrays_on_either_side():
    m = np.array([[True, False], [True, True]])
    for made in (causal() & m, m & causal()):
        assert isinstance(made, Mask)
        assert made.dense(2, 2)[0, 0].tolist() == [[True, False], [True, True]]
    with pytest.raises(TypeError):
        causal() & 3
    with pytest.raises(TypeError, match=r"mask has dtype int64.*bool"):
        causal() & np.ones((2, 2), np.int64)


def test_mask_has_no_truth_value():
    with pytest.raises(TypeError, match=r"with &, not with"):
        bool(causal() and window(1, 1))


def test_repr_tells_the_parts():
    assert repr(causal("top_left") & window(3, None)) == "Mask(causal(align='top_left') & window(3, None))"
    assert repr(lengths([3, 4]) & prefix(2)) == "Mask(lengths(<int array (2,)>) & prefix(2))"
    assert repr(Mask()) == "Mask(everything)"


def test_a_mask_does_not_change_with_its_arguments():
    n = np.array([2, 3])
    made = lengths(n)
    n[:] = 0
    assert made.dense(1, 4, batch=2).sum() == 5


def test_segments_in_runs_lower_to_intervals():
    """Also where the ids are not sorted, as long as each comes in one run."""
    p = problem(1, 1, 4, 6, mask=segments([5, 5, 1, 9], [5, 5, 3, 1, 1, 1]))
    assert p.segments == ()
    assert p.start.tolist() == [[[0, 0, 3, 0]]]
    assert p.end.tolist() == [[[2, 2, 6, 0]]]
    assert p.start.dtype == p.end.dtype == np.int64
    p = problem(1, 1, 2, 3, mask=segments([5, 1], [5, 1, 5]))
    assert p.start is None
    assert p.segments[0][0].tolist() == [[5, 1]]


def test_what_kernels_read_of_plain_calls():
    p = problem(3, 2, 4, 6)
    assert (p.left, p.right, p.has_prefix, p.start, p.segments, p.masks, p.mask_mods) == (
        OPEN,
        OPEN,
        False,
        None,
        (),
        (),
        (),
    )
    assert p.sequences.tolist() == [[b, 0, 4, 0, 6, 0, 0] for b in range(3)]
    p = problem(1, 1, 4, 6, causal=True, align="bottom_right")
    assert (p.left, p.right, p.sequences[0, 5]) == (OPEN, 0, 2)
    p = problem(1, 1, 4, 6, mask=lengths([3]))
    assert p.sequences.tolist() == [[0, 0, 4, 0, 3, 0, 0]], "nothing uses an offset, so it is 0"
    p = problem(1, 1, 4, 6, mask=prefix(9), align=1)
    assert p.has_prefix
    assert p.sequences[0].tolist() == [0, 0, 4, 0, 6, 1, 6]
    p = problem(1, 1, 4, 6, mask=prefix(2), causal=True, align=1)
    assert (p.has_prefix, p.right) == (False, 0)


def test_mask_mod():

    def same(b, h, i, j, colour):
        return colour[b, i] == colour[b, j] and h == 1

    colour = np.array([[0, 1, 0], [2, 2, 3]])
    made = mask_mod(same, aux=(colour,)) & causal()
    dense = made.dense(3, 3, batch=2, q_heads=2)
    assert not dense[:, 0].any()
    assert dense[0, 1].tolist() == [[True, False, False], [False, True, False], [True, False, True]]
    p = problem(2, 2, 3, 3, mask=made)
    assert p.mask_mods[0][0] is same
    assert np.array_equal(expanded(p), dense)


ALIGN_NEEDED = [
    {"causal": True},
    {"window": (3, 1)},
    {"mask": causal()},
    {"mask": window(3, 1)},
    {"mask": prefix(2)},
    {"alibi_slopes": np.ones(1)},
    {"causal": True, "mask": lengths([4])},
    {"causal": True, "mask": varlen([0, 2, 4], [0, 2, 5])},
]


@pytest.mark.parametrize("options", ALIGN_NEEDED)
def test_align_may_not_be_left_out_where_it_matters(options):
    q_len = 5 if isinstance(options.get("mask"), Mask) and "lengths" in repr(options["mask"]) else 4
    with pytest.raises(ValueError, match=r"(?s)align is None.*'bottom_right'.*cache.*'top_left'.*prefill"):
        problem(1, 1, q_len, 5, **options)
    for align in ("bottom_right", "top_left", 3, [1]):
        problem(1, 1, q_len, 5, align=align, **options)


def test_align_may_be_left_out_where_both_names_agree():
    for options in (
        {"causal": True, "mask": lengths([3, 4], [3, 4])},
        {"causal": True, "mask": varlen([0, 2, 4], [0, 2, 4])},
        {"mask": causal() & lengths([0, 4], [4, 4])},  # nothing to align in the first row
        {"window": (None, None)},
        {"causal": True, "mask": lengths([5, 5], [0, 5])},
    ):
        p = problem(2, 1, 5, 5, **options)
        assert not p.sequences[:, 5].any()
    assert problem(1, 1, 0, 5, causal=True).q_len == 0
    assert problem(1, 1, 5, 0, causal=True).kv_len == 0
    assert problem(0, 1, 5, 3, causal=True).batch == 0


def test_parts_that_disagree_about_align_raise():
    for options in (
        {"mask": causal("top_left") & window(2, 2, "bottom_right")},
        {"mask": causal(1) & prefix(2, 2)},
        {"mask": causal("top_left"), "align": "bottom_right"},
        {"mask": causal("top_left"), "causal": True, "align": "bottom_right"},
        {"mask": causal(3), "alibi_slopes": np.ones(1), "align": 4},
    ):
        with pytest.raises(ValueError, match="align differs"):
            problem(1, 1, 4, 6, **options)
    with pytest.raises(ValueError, match="align differs"):  # by name, so that a square test case finds it
        problem(1, 1, 4, 4, mask=causal("top_left") & window(2, 2, "bottom_right"))
    p = problem(1, 1, 4, 6, mask=causal(2) & window(2, 2, "bottom_right"), align=2)
    assert p.sequences[0, 5] == 2


@pytest.mark.skipif(not hasattr(numba_attn, "causal"), reason="the package does not export its names yet")
def test_examples_in_docstrings():
    assert doctest.testmod(mask_module).failed == 0
