"""Every feature against the float64 reference, by one rule: finite first, then each number no further off than its own
roundings can throw it (bounds.py).

The rule is `check`. It is used on the table of cases, on every kind of stride, on the lengths and numbers that expose a
running sum, and on problems that hypothesis draws.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import bounds
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import seeds
from bounds import within
from case_options import dilated
from cases import (
    BY_NAME,
    CASES,
    DTYPES,
    Case,
    alibi_by_hand,
    build,
    cap_30,
    checkerboard,
    dilated_causal,
    draw,
    from_layout,
    hides_odd_keys,
    limits,
    variant,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import attention as naive
from naive import resolve, truth

import numba_attn as na

settings.register_profile("numba_attn", seeds.hypothesis_profile(200))
settings.load_profile("numba_attn")


def poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


def check(
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray], options: dict[str, Any], out: np.ndarray | None = None
) -> None:
    """The library's (out, lse) for these arguments, held to the reference; `out`, poisoned, is where it writes."""
    q, _, v = arrays
    layout = options.get("layout", "bhsd")
    if out is None:
        out = poisoned((*q.shape[:-1], v.shape[-1]), q.dtype)
    else:
        out[...] = np.nan
    got, lse = na.attention(*arrays, **options, out=out, return_lse=True)
    assert got is out
    assert lse.shape == q.shape[:-1]
    assert lse.dtype == (np.float64 if q.dtype == np.float64 else np.float32)

    problem = resolve(*arrays, **options)
    bound = bounds.forward(problem)
    size, lse_size = (bounds.Size(*(from_bhsd(x, layout) for x in y)) for y in (bound.out, bound.lse))
    want, want_lse = na.reference.attention(*arrays, **options, return_lse=True)
    if q.dtype == np.float64:  # the reference is no better than the kernel: both are held to long double
        exact, exact_lse = (from_bhsd(x, layout) for x in truth(*arrays, **options))
        within(want, exact, size, "the reference's out", problem.acc)
        within(want_lse, exact_lse, lse_size, "the reference's lse", problem.acc)
        want, want_lse = exact, exact_lse
    within(out, want, size, "out", problem.acc)
    within(lse, want_lse, lse_size, "lse", problem.acc)


def from_bhsd(x: np.ndarray, layout: str) -> np.ndarray:
    """(B, H, S[, D]) -> the layout. `resolve` gives batch and head axes to every layout."""
    if layout in ("bshd", "shd"):
        x = x.swapaxes(1, 2)
    return x[(0,) * (4 - len(layout))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    check(*build(case))


@pytest.mark.parametrize("name", ["plain-63x203", "head-59-bfloat16", "layout-shd", "everything", "empty-q", "empty-k"])
def test_out_and_lse_are_only_places_to_write(name: str) -> None:
    """With out= and return_lse= or without, the numbers are the same to the last bit."""
    (q, k, v), options = build(BY_NAME[name])
    plain = na.attention(q, k, v, **options)
    assert plain.dtype == q.dtype
    assert plain.flags.c_contiguous
    both, _ = na.attention(q, k, v, **options, return_lse=True)
    given_out = poisoned(plain.shape, plain.dtype)
    assert na.attention(q, k, v, **options, out=given_out) is given_out
    assert plain.tobytes() == both.tobytes() == given_out.tobytes()


# ---- strides ----


def every_other_row(x: np.ndarray) -> np.ndarray:
    big = poisoned((*x.shape[:2], 2 * x.shape[2], x.shape[3]), x.dtype)
    big[:, :, ::2] = x
    return big[:, :, ::2]


def every_other_column(x: np.ndarray) -> np.ndarray:
    big = poisoned((*x.shape[:3], 2 * x.shape[3]), x.dtype)
    big[..., ::2] = x
    return big[..., ::2]


def reversed_everywhere(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1]


def reversed_rows(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]


def fortran(x: np.ndarray) -> np.ndarray:
    return np.asfortranarray(x)


def rows_apart(x: np.ndarray) -> np.ndarray:
    big = poisoned((*x.shape[:3], x.shape[3] + 5), x.dtype)
    big[..., 2:-3] = x
    return big[..., 2:-3]


def heads_inside(x: np.ndarray) -> np.ndarray:
    """What a reshaped projection gives: (B, S, H, D) memory seen as (B, H, S, D)."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def misaligned(x: np.ndarray) -> np.ndarray:
    """A field of a packed record: every element lies at an odd address."""
    packed = np.zeros(x.shape, np.dtype([("flag", "u1"), ("x", x.dtype)]))
    packed["x"] = x
    assert not packed["x"].flags.aligned
    return packed["x"]


def odd_address(x: np.ndarray) -> np.ndarray:
    """Contiguous, but starting at an odd byte."""
    buffer = np.zeros(x.nbytes + 1, np.uint8)
    view = np.ndarray(x.shape, x.dtype, buffer, 1)
    view[...] = x
    return view


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


FORMS = [
    every_other_row,
    every_other_column,
    reversed_everywhere,
    reversed_rows,
    fortran,
    rows_apart,
    heads_inside,
    misaligned,
    odd_address,
    read_only,
]
STRIDED = variant("gqa-4", name="strided", q_len=63, kv_len=203, dims=(40, 33), options=BY_NAME["align-int"].options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_strides_of_inputs(form: Any, dtype: str) -> None:
    (q, k, v), options = build(replace(STRIDED, dtype=dtype))
    contiguous, contiguous_lse = na.attention(q, k, v, **options, return_lse=True)
    arrays = (form(q), form(k), form(v))
    before = [x.tobytes() for x in arrays]
    check(arrays, options)
    out, lse = na.attention(*arrays, **options, return_lse=True)
    assert out.tobytes() == contiguous.tobytes() and lse.tobytes() == contiguous_lse.tobytes()
    assert [x.tobytes() for x in arrays] == before
    # each argument alone: a kernel may take another way for K than for V
    for n in range(3):
        mixed = [x if m != n else arrays[m] for m, x in enumerate((q, k, v))]
        assert na.attention(*mixed, **options).tobytes() == contiguous.tobytes(), "qkv"[n]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_broadcast_inputs(dtype: str) -> None:
    """Zero strides: one q for every head, one k for every batch row, one v row for every key."""
    rng = seeds.generator(3)
    q = np.broadcast_to(draw(rng, (2, 1, 63, 40), "normal", DTYPES[dtype]), (2, 4, 63, 40))
    k = np.broadcast_to(draw(rng, (1, 2, 203, 40), "normal", DTYPES[dtype]), (2, 2, 203, 40))
    v = np.broadcast_to(draw(rng, (2, 2, 1, 33), "normal", DTYPES[dtype]), (2, 2, 203, 33))
    check((q, k, v), {"causal": True, "align": "top_left"})
    one = np.broadcast_to(draw(rng, (1, 1, 1, 1), "normal", DTYPES[dtype]), (2, 2, 63, 40))
    check((one, one, one), {})


@pytest.mark.parametrize(
    "form",
    [
        every_other_row,
        every_other_column,
        reversed_everywhere,
        fortran,
        rows_apart,
        heads_inside,
        misaligned,
        odd_address,
    ],
)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_strides_of_out(form: Any, dtype: str) -> None:
    arrays, options = build(replace(STRIDED, dtype=dtype))
    want = na.attention(*arrays, **options)
    out = form(poisoned(want.shape, want.dtype))
    base = out
    while isinstance(base.base, np.ndarray):
        base = base.base
    check(arrays, options, out=out)
    assert out.tobytes() == want.tobytes()
    if form in (every_other_row, rows_apart):  # the memory between the rows is not ours
        out[...] = np.nan
        assert np.isnan(base.astype(np.float32)).all()


@pytest.mark.parametrize(
    "form", [every_other_row, every_other_column, reversed_everywhere, fortran, rows_apart, odd_address, read_only]
)
@pytest.mark.parametrize("name", ["mask-full", "bias-full"])
def test_strides_of_mask_and_bias(form: Any, name: str) -> None:
    arrays, options = build(BY_NAME[name])
    want, lse = na.attention(*arrays, **options, return_lse=True)
    (key,) = options
    filled = np.ones if key == "mask" else poisoned  # a wrong True or a NaN shows if read
    x = options[key]
    if form in (every_other_row, every_other_column, rows_apart):
        holder = form(np.zeros(x.shape, np.float32))
        base = filled(holder.base.shape, x.dtype)
        view = np.lib.stride_tricks.as_strided(base, x.shape, tuple(s // 4 * x.itemsize for s in holder.strides))
        offset = (holder.ctypes.data - holder.base.ctypes.data) // 4
        view = np.lib.stride_tricks.as_strided(base.reshape(-1)[offset:], view.shape, view.strides)
        view[...] = x
    else:
        view = form(x)
    out, strided_lse = na.attention(*arrays, **{key: view}, return_lse=True)
    assert out.tobytes() == want.tobytes() and strided_lse.tobytes() == lse.tobytes()


def test_mask_and_bias_broadcast_by_the_caller() -> None:
    """np.broadcast_to gives zero strides where the size is not 1."""
    arrays, options = build(BY_NAME["mask-padding"])
    full = np.broadcast_to(options["mask"], (2, 4, 63, 203))
    assert na.attention(*arrays, mask=full).tobytes() == na.attention(*arrays, mask=options["mask"]).tobytes()
    arrays, options = build(BY_NAME["bias-heads"])
    full = np.broadcast_to(options["bias"], (2, 4, 63, 203))
    assert na.attention(*arrays, bias=full).tobytes() == na.attention(*arrays, **options).tobytes()


def test_options_in_strided_memory() -> None:
    """sinks, slopes, aux and interval arrays with a stride, read-only and misaligned."""
    arrays, options = build(BY_NAME["everything"])
    want = na.attention(*arrays, **options)
    h = options["sinks"].size
    (table,) = options["aux"]
    for form in (lambda x: np.repeat(x, 3)[::3], lambda x: x[::-1].copy()[::-1], misaligned, read_only):
        again = options | {"sinks": form(options["sinks"]), "alibi_slopes": form(options["alibi_slopes"])}
        assert again["sinks"].shape == (h,)
        assert na.attention(*arrays, **again).tobytes() == want.tobytes()
    for form in (np.asfortranarray, misaligned, odd_address, read_only, lambda x: x[::-1, ::-1].copy()[::-1, ::-1]):
        assert na.attention(*arrays, **(options | {"aux": (form(table),)})).tobytes() == want.tobytes()
    arrays, options = build(BY_NAME["intervals-heads"])
    want = na.attention(*arrays, **options)
    rng = seeds.generator(0)
    start, end = rng.integers(0, 204, (2, 2, 4, 239))
    want = na.attention(*arrays, mask=na.intervals(start, end))
    for form in (
        np.asfortranarray,
        misaligned,
        lambda x: x[::-1].copy()[::-1],
        lambda x: x.astype(np.int32),
        lambda x: x.astype(np.uint16),
    ):
        assert na.attention(*arrays, mask=na.intervals(form(start), form(end))).tobytes() == want.tobytes()


def test_memmap(tmp_path: Path) -> None:
    (q, k, v), options = build(STRIDED)
    maps = []
    for name, x in zip("qkv", (q, k, v), strict=True):
        x.tofile(tmp_path / name)
        maps.append(np.memmap(tmp_path / name, x.dtype, "r", shape=x.shape))
    want = na.attention(q, k, v, **options)
    got = na.attention(*maps, **options)
    assert type(got) is np.ndarray
    assert got.tobytes() == want.tobytes()
    out = np.memmap(tmp_path / "out", want.dtype, "w+", shape=want.shape)
    assert na.attention(*maps, **options, out=out) is out
    out.flush()
    assert (tmp_path / "out").read_bytes() == want.tobytes()


# ---- lengths and numbers that expose a running sum ----


@pytest.mark.parametrize("draw_from", ["normal", "uniform"])
@pytest.mark.parametrize("kv_len", [7680, 8192, 16384])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_many_keys(draw_from: str, kv_len: int, dtype: str) -> None:
    """One running sum over the keys is 13 times less accurate than NumPy's pairwise one; block sums must not be."""
    case = Case(
        f"keys-{kv_len}-{draw_from}-{dtype}",
        "",
        heads=(1, 1),
        batch=1,
        q_len=33,
        kv_len=kv_len,
        dims=(64, 64),
        draw=draw_from,
        dtype=dtype,
    )
    check(*build(case))


@pytest.mark.parametrize("draw_from", ["normal", "uniform"])
def test_many_keys_causal(draw_from: str) -> None:
    """The last rows of a long causal problem, beside the first ones of a shorter one."""
    case = Case(
        f"causal-8192-{draw_from}", "", heads=(1, 1), batch=1, q_len=200, kv_len=8192, dims=(64, 64), draw=draw_from
    )
    arrays, _ = build(case)
    check(arrays, {"causal": True, "align": "bottom_right"})
    check(arrays, {"window": (4096, 0), "align": "bottom_right"})


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("factor", [1e-3, 50.0, 1e4])
def test_logits_of_any_size(factor: float, dtype: str) -> None:
    """The maximum is found a block at a time: it rises late, early, and far."""
    rng = seeds.generator(5)
    q, k, v = (
        draw(rng, shape, "normal", DTYPES[dtype]) for shape in ((1, 1, 63, 64), (1, 1, 799, 64), (1, 1, 799, 64))
    )
    if dtype != "float16":
        q = (q.astype(np.float32) * factor).astype(q.dtype)
    order = np.argsort((k.astype(np.float32) @ q[0, 0, 0].astype(np.float32))[0, 0])
    for keys in (order, order[::-1]):  # rising and falling scores for row 0
        check((q, k[:, :, keys], v[:, :, keys]), {"scale": factor / 8} if dtype == "float16" else {})


def check_every_half_number(dtype: str) -> None:
    """All 65,536 bit patterns as values, each averaged with its neighbour: exact in float32, so out is the mean of the
    two in float32, rounded once, ties to even, through subnormals and the largest numbers to infinity and NaN."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    v = np.stack([patterns.reshape(-1, 64), (patterns ^ 1).reshape(-1, 64)], axis=1)[None].view(DTYPES[dtype])
    q = np.zeros((1, 1024, 1, 8), v.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = v.astype(np.float32).sum(axis=2, keepdims=True) * np.float32(0.5)
        want = mean.astype(v.dtype).astype(np.float32)
    # float32 itself overflows in the sum of the two largest bfloat16 numbers; their mean is not asked for
    asked = np.isfinite(mean) | ~np.isfinite(v.astype(np.float32)).all(axis=2, keepdims=True)
    assert asked.mean() > 0.99
    k = np.zeros((1, 1024, 2, 8), v.dtype)
    got = na.attention(q, k, v).astype(np.float32)
    np.testing.assert_array_equal(np.where(asked, got, 0), np.where(asked, want, 0))
    got = na.attention(q, k[:, :, :1], v[:, :, :1]).astype(np.float32)  # one key: the value itself
    np.testing.assert_array_equal(got, v[:, :, :1].astype(np.float32))
    # and as queries and keys: a product with 1 in one dimension is the number itself
    # (scores are kept in log2 units, so those within log2(e) of float32's largest number overflow)
    sane = np.where(np.abs(v[:, :, :1].astype(np.float32)) < 1e38, v[:, :, :1], 0)
    sane = sane.reshape(1, -1, 1, 1)
    one = np.ones(sane.shape, v.dtype)
    for q, k in ((sane, one), (one, sane)):
        _, lse = na.attention(q, k, one, scale=1.0, return_lse=True)
        np.testing.assert_allclose(lse, sane[..., 0].astype(np.float32), rtol=3e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_number(dtype: str) -> None:
    check_every_half_number(dtype)


def test_a_true_that_is_not_1() -> None:
    """A bool array made by a view may hold any byte; NumPy takes all but 0 as True."""
    arrays, _ = build(BY_NAME["plain-63x203"])
    bytes_ = seeds.generator(0).integers(0, 4, (63, 203)).astype(np.uint8) * 64
    mask = bytes_.view(bool)
    want = na.attention(*arrays, mask=bytes_ > 0)
    assert na.attention(*arrays, mask=mask).tobytes() == want.tobytes()
    assert (
        na.attention(*arrays, mask=na.window(9, 90, align=0) & mask).tobytes()
        == na.attention(*arrays, mask=bytes_ > 0, window=(9, 90), align=0).tobytes()
    )
    row = (np.arange(203) % 3 * 100).astype(np.uint8)
    assert na.attention(*arrays, mask=row.view(bool)).tobytes() == na.attention(*arrays, mask=row > 0).tobytes()


# ---- problems that hypothesis draws ----

SIZES = st.sampled_from(
    [1, 2, 3, 5, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 95, 97, 111, 127, 128, 129, 191, 203, 257]
)


@st.composite
def problems(draw_: st.DrawFn) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """Shapes, strides, masks, offsets and options together: the corners that the table does not name."""
    group, kv_heads, batch = draw_(st.integers(1, 4)), draw_(st.integers(1, 2)), draw_(st.integers(1, 3))
    heads, sq, sk = group * kv_heads, draw_(SIZES), draw_(SIZES)
    dk, dv = draw_(st.sampled_from([1, 3, 8, 16, 40, 59, 64, 65, 80])), draw_(st.sampled_from([1, 2, 8, 17, 64, 70]))
    dtype = DTYPES[draw_(st.sampled_from(list(DTYPES)))]
    rng = seeds.generator(draw_(st.integers(0, 2**32 - 1)))
    forms = st.sampled_from([lambda x: x, *FORMS])
    q, k, v = (
        draw_(forms)(draw(rng, shape, "normal", dtype))
        for shape in ((batch, heads, sq, dk), (batch, kv_heads, sk, dk), (batch, kv_heads, sk, dv))
    )
    options: dict[str, Any] = {}
    positional = False
    if draw_(st.booleans()):
        options["causal"], positional = True, True
    bound = st.one_of(st.none(), st.integers(0, 40), st.integers(0, 2**50))
    if draw_(st.integers(0, 2)) == 0:
        options["window"], positional = (draw_(bound), draw_(bound)), True
    parts = []
    if draw_(st.integers(0, 3)) == 0:
        parts.append(
            na.lengths(rng.integers(0, sk + 1, batch), rng.integers(0, sq + 1, batch) if draw_(st.booleans()) else None)
        )
    elif draw_(st.integers(0, 3)) == 0:
        n = draw_(st.integers(1, 5))
        cu_q, cu_k = (np.concatenate([[0], np.sort(rng.integers(0, s + 1, n - 1)), [s]]) for s in (sq, sk))
        parts.append(na.varlen(cu_q, cu_k))
    if draw_(st.integers(0, 3)) == 0:
        shape = ((sq,), (batch, sq), (batch, heads, sq))[draw_(st.integers(0, 2))]
        parts.append(na.intervals(*rng.integers(0, sk + 1, (2, *shape))))
    if draw_(st.integers(0, 3)) == 0:
        ids = rng.integers(0, 3, sq), rng.integers(0, 3, sk)
        parts.append(na.segments(*(np.sort(x) for x in ids)) if draw_(st.booleans()) else na.segments(*ids))
    if draw_(st.integers(0, 3)) == 0:
        parts.append(na.prefix(draw_(st.integers(0, sk))))
        positional = True
    if parts:
        options["mask"] = parts[0]
        for part in parts[1:]:
            options["mask"] &= part
    elif draw_(st.booleans()):
        shape = draw_(hnp.broadcastable_shapes((batch, heads, sq, sk), min_dims=1, max_dims=4, max_side=300).filter(
            lambda shape: np.broadcast_shapes(shape, (batch, heads, sq, sk)) == (batch, heads, sq, sk)))  # fmt: skip
        if padding_shape_raises(shape, batch, sq, sk):
            shape = (batch, 1, 1, sk)
        options["mask"] = rng.random(shape) < draw_(st.sampled_from([0.02, 0.5, 0.98]))
    if draw_(st.integers(0, 2)) == 0:
        x = rng.standard_normal((heads, 1, sk) if draw_(st.booleans()) else (batch, heads, sq, sk))
        x[rng.random(x.shape) < draw_(st.sampled_from([0.0, 0.3, 0.97]))] = -np.inf
        options["bias"] = x.astype(DTYPES[draw_(st.sampled_from(list(DTYPES)))])
    if draw_(st.integers(0, 3)) == 0:
        options["softcap"] = draw_(st.floats(0.25, 100))
    if draw_(st.integers(0, 3)) == 0:
        options["alibi_slopes"], positional = rng.random((batch, heads) if draw_(st.booleans()) else heads), True
    if draw_(st.integers(0, 3)) == 0:
        options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    if draw_(st.integers(0, 3)) == 0:
        options["scale"] = draw_(st.floats(-2, 2))
    if draw_(st.integers(0, 5)) == 0:
        options["dropout_p"], options["seed"] = draw_(st.floats(0, 0.95)), draw_(st.integers(0, 2**31))
    if batch * heads * sq * sk < 40_000:  # the reference calls them from Python, a pair at a time
        if draw_(st.integers(0, 3)) == 0:
            part = na.mask_mod(draw_(st.sampled_from([checkerboard, dilated, dilated_causal])))
            options["mask"] = options["mask"] & part if "mask" in options else part
        if draw_(st.integers(0, 3)) == 0:
            options["score_mod"] = draw_(st.sampled_from([cap_30, limits, alibi_by_hand, hides_odd_keys]))
    if draw_(st.integers(0, 3)) == 0:
        options["layout"] = "bshd"
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if positional:
        options["align"] = draw_(st.one_of(st.sampled_from(["top_left", "bottom_right"]), st.integers(-300, 300)))
    return (q, k, v), options


def padding_shape_raises(shape: tuple[int, ...], batch: int, sq: int, sk: int) -> bool:
    return shape == (batch, sk) and (batch, sk) != (sq, sk)


@given(problems())
def test_drawn_problem(problem: tuple[tuple[np.ndarray, ...], dict[str, Any]]) -> None:
    (q, k, v), options = problem
    check((q, k, v), options)


@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 150, 333]), st.integers(1, 6))
@settings(max_examples=12)
def test_drawn_sequences_cover_every_row_once(seed: int, length: int, parts: int) -> None:
    """Packed self-attention written four ways gives the same visible pairs, hence numbers that agree."""
    rng = seeds.generator(seed)
    cu = np.concatenate([[0], np.sort(rng.integers(0, length + 1, parts - 1)), [length]])
    ids = np.repeat(np.arange(parts), np.diff(cu))
    q, k, v = (rng.standard_normal((1, 2, length, 24)).astype(np.float32) for _ in range(3))
    ways = [
        na.varlen(cu, cu),
        na.segments(ids, ids),
        na.intervals(cu[ids], cu[ids + 1]),
        (ids[:, None] == ids[None, :]),
    ]
    outs = [na.attention(q, k, v, mask=mask, causal=True) for mask in ways]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=0, atol=1e-6)


# ---- the rule itself ----


@pytest.mark.parametrize(
    "name",
    [
        "everything",
        "varlen-causal-br",
        "prefix-window",
        "segments-unsorted",
        "and-three-masks",
        "layout-shd",
        "sinks-padding",
    ],
)
def test_reference_and_dense_numpy_agree(name: str) -> None:
    """Two independent readings of section 2, one from the arguments and one from the resolved problem, in float64."""
    arrays, options = build(BY_NAME[name])
    layout = options.get("layout", "bhsd")
    for got, want in zip(
        naive(np.float64, *arrays, **options), na.reference.attention(*arrays, **options, return_lse=True), strict=True
    ):
        np.testing.assert_allclose(from_bhsd(got, layout), want, rtol=1e-12, atol=1e-13, err_msg=name)


def test_the_rule_can_fail() -> None:
    """The bound is tight: a result that is wrong by a few roundings, a forgotten row or a hidden NaN is refused."""
    arrays, options = build(BY_NAME["plain-63x203"])
    want = na.reference.attention(*arrays, **options)
    dense, _ = naive(np.float32, *arrays, **options)
    size = bounds.forward(resolve(*arrays, **options)).out
    within(dense, want, size, "out", np.float32)
    last = np.arange(63)[:, None] == 62
    noise = 3e-7 * seeds.generator(0).standard_normal(want.shape)
    for wrong in (want * (1 + 4e-6), np.where(last, np.nan, want), np.where(last, 0, want), want + 2e-6, want + noise):
        with pytest.raises(AssertionError, match="out: "):
            within(wrong.astype(np.float32), want, size, "out", np.float32)


def test_every_layout_of_one_problem_resolves_alike() -> None:
    arrays, options = build(BY_NAME["layout-bshd"])
    p = resolve(*arrays, **options)
    assert p.q.shape == (2, 4, 63, 40) and p.k.shape == (2, 2, 111, 40)
    assert from_layout(arrays[0], "bshd").shape == p.q.shape
