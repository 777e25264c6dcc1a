"""What a gradient's bits depend on, and what a NaN reaches.

A row of dq depends on its query and the keys that it sees; a row of dk and dv on its key and the queries that see it;
sums over pairs are added in an order that shapes fix. So the bits are the same for 1, 2 and 4 threads, alone or in a
batch, packed or separate, in any layout, whatever the other heads hold, call after call. Nothing of a hidden pair is
read: NaN behind a mask changes no bit; and one in a visible pair is never swept under the carpet.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import seeds
from cases import (
    BY_NAME,
    CASES,
    DTYPES,
    Case,
    alibi_by_hand,
    bias,
    both,
    build,
    from_layout,
    given,
    into_layout,
    slopes,
    table_by_distance,
    two_tables,
    with_aux,
)
from child import run_python
from test_backward import cotangents, entries, float_aux, same
from test_bits import DTYPE, EACH, EACH_OPTION, LIKE, drawn
from test_nan import HIDING, PARTIAL, poison, to_layout, visible_pairs

import numba_attn as na
from numba_attn.gradients import Gradients

Arrays = tuple[np.ndarray, ...]


def gradients(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, dlse: np.ndarray, **options: Any) -> Any:
    options.setdefault("aux_grad", float_aux(options))
    grads = na.attention_vjp(q, k, v, **options)[1](dout, dlse)
    assert np.abs(grads.dk.astype(np.float32)).max(initial=0) > 0 or grads.dk.size == 0  # bits of nothing prove nothing
    return grads


def of(grads: Gradients, queries: Any, keys: Any) -> Gradients:
    """The part of dq at `queries`, and of dk and dv at `keys`, without the rest."""
    return Gradients(grads.dq[queries], grads.dk[keys], grads.dv[keys])


def problem(
    dtype: str, b: int, heads: tuple[int, int], sq: int, sk: int, dk: int = 40, dv: int = 24
) -> list[np.ndarray]:
    """q, k, v, dout, dlse."""
    shapes = ((b, heads[0], sq, dk), (b, heads[1], sk, dk), (b, heads[1], sk, dv), (b, heads[0], sq, dv))
    *arrays, dlse = drawn(dtype, *shapes, (b, heads[0], sq))
    return [*arrays, dlse.astype(np.float64 if dtype == "float64" else np.float32)]


def part(arrays: list[np.ndarray], queries: Any, keys: Any) -> list[np.ndarray]:
    q, k, v, dout, dlse = arrays
    return [q[queries], k[keys], v[keys], dout[queries], dlse[queries]]


# ---- alone or together ----


@DTYPE
@EACH_OPTION
def test_alone_or_in_a_batch(name: str, dtype: str) -> None:
    """A key head with the two query heads that read it, cut out of three batch rows and two such groups."""
    arrays = problem(dtype, 3, (4, 2), 150, 333)
    batch = gradients(*arrays, **EACH[name])
    for b, h in ((0, 0), (1, 1), (2, 0)):
        queries, keys = np.s_[b : b + 1, 2 * h : 2 * h + 2], np.s_[b : b + 1, h : h + 1]
        alone = gradients(*part(arrays, queries, keys), **EACH[name])
        same(of(alone, np.s_[:], np.s_[:]), of(batch, queries, keys), f"batch row {b}, head {h}")


@DTYPE
@EACH_OPTION
def test_other_batch_rows_and_heads_changed(name: str, dtype: str) -> None:
    arrays = problem(dtype, 2, (4, 2), 150, 333)
    queries, keys = np.s_[1:, 2:], np.s_[1:, 1:]
    before = of(gradients(*arrays, **EACH[name]), queries, keys)
    for x in arrays:
        x[0] = np.nan
        x[1, : x.shape[1] // 2] = 1e4
    arrays[1][1, 0], arrays[3][1, 1] = np.inf, np.nan
    with np.errstate(all="ignore"):
        same(of(na.attention_vjp(*arrays[:3], **EACH[name])[1](*arrays[3:]), queries, keys), before)


@DTYPE
@EACH_OPTION
def test_a_row_of_dq_knows_its_own_query_alone(name: str, dtype: str) -> None:
    arrays = problem(dtype, 1, (2, 2), 150, 333)
    want = gradients(*arrays, **EACH[name])
    for kept in (slice(0, 1), slice(47, 49), slice(149, 150), slice(0, None, 7)):
        changed = list(arrays)
        for n in (0, 3, 4):
            changed[n] = np.full_like(arrays[n], 50.0)
            changed[n][:, :, ::2] = np.nan
            changed[n][:, :, kept] = arrays[n][:, :, kept]
        got = na.attention_vjp(*changed[:3], **EACH[name])[1](*changed[3:])
        assert got.dq[:, :, kept].tobytes() == want.dq[:, :, kept].tobytes(), kept


@DTYPE
@pytest.mark.parametrize("options", [
    {}, dict(causal=True), dict(window=(20, 4)), dict(causal=True, softcap=3.0, alibi_slopes=slopes(4)),
], ids=["plain", "causal", "window", "softcap-alibi"])  # fmt: skip
def test_packed_padded_or_separate(options: dict[str, Any], dtype: str) -> None:
    sizes = [17, 100, 1 + 32, 129, 64, 250]
    cu = np.concatenate([[0], np.cumsum(sizes)])
    total, n = int(cu[-1]), max(sizes)
    arrays = problem(dtype, 1, (4, 2), total, total)
    packed = gradients(*arrays, mask=na.varlen(cu, cu), **options)
    wide = [np.full((len(sizes), x.shape[1], n, *x.shape[3:]), np.nan, x.dtype) for x in arrays]
    for b, (start, end) in enumerate(pairwise(cu)):
        for x, y in zip(wide, arrays, strict=True):
            x[b, :, : end - start] = y[0, :, start:end]
    padded = gradients(*wide, mask=na.lengths(sizes, sizes), **options)
    for b, (start, end) in enumerate(pairwise(cu)):
        rows, padded_rows = np.s_[:, :, start:end], np.s_[b : b + 1, :, : end - start]
        alone = of(gradients(*part(arrays, rows, rows), **options), np.s_[:], np.s_[:])
        same(of(packed, rows, rows), alone, f"packed, sequence of {end - start}")
        same(of(padded, padded_rows, padded_rows), alone, f"padded, sequence of {end - start}")
        for name, x in entries(of(padded, np.s_[b, :, end - start :], np.s_[b, :, end - start :])):
            assert (x == 0).all(), f"{name} of padding"


@DTYPE
@pytest.mark.parametrize("group", [2, 3, 8])
def test_group_or_repeated_heads(group: int, dtype: str) -> None:
    """dq of grouped heads has the bits of repeated ones; dk and dv are their sums."""
    for sq in (20, 150):
        q, k, v, dout, dlse = problem(dtype, 2, (2 * group, 2), sq, 333)
        for options in ({}, dict(causal=True, align="bottom_right"), EACH["score-mod"]):
            grouped = gradients(q, k, v, dout, dlse, **options)
            repeated = gradients(q, np.repeat(k, group, 1), np.repeat(v, group, 1), dout, dlse, **options)
            assert grouped.dq.tobytes() == repeated.dq.tobytes()
            for x, y in ((grouped.dk, repeated.dk), (grouped.dv, repeated.dv)):
                total = y.astype(np.float64).reshape(2, 2, group, *y.shape[2:]).sum(2)
                rounding = {"float64": 1e-14, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
                assert np.abs(x.astype(np.float64) - total).max() <= rounding * np.abs(total).max()


@pytest.mark.parametrize(
    "name",
    ["layout-bhsd", "layout-bshd", "layout-hsd", "layout-shd", "layout-sd", "layout-bshd-f16", "layout-shd-bfloat16"],
)
def test_every_layout(name: str) -> None:
    case = BY_NAME[name]
    arrays, options = build(case)
    got = gradients(*arrays, *cotangents(arrays[0], arrays[2]), **options)
    dout, dlse = cotangents(arrays[0], arrays[2])
    options.pop("layout", None)
    q, k, v, dout, dlse = (np.ascontiguousarray(from_layout(x, case.layout)) for x in (*arrays, dout, dlse[..., None]))
    dlse = dlse[..., 0]
    want = gradients(q, k, v, dout, dlse, **options)
    for one in ("dq", "dk", "dv"):
        assert from_layout(getattr(got, one), case.layout).tobytes() == getattr(want, one).tobytes()
    same(got._replace(dq=want.dq, dk=want.dk, dv=want.dv), want)
    for layout in ("bhsd", "bshd"):
        there = [into_layout(x, layout) for x in (q, k, v, dout, dlse)]
        again = gradients(*there, **options, layout=layout)
        back = {one: from_layout(getattr(again, one), layout) for one in ("dq", "dk", "dv")}
        same(again._replace(**back), want, layout)


# ---- again, and with other numbers of threads ----

EVERY_BIAS = [case for case in CASES if case.name.startswith("bias-") and case.heads == (4, 2)]
MORE = [
    replace(BY_NAME["parallel"], name=f"threads-bias-{axes}", q_len=300, kv_len=700, options=bias(*axes))
    for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (3,), (2,), (1,))
] + [
    replace(BY_NAME["parallel"], name="threads-table", q_len=300, kv_len=700,
            options=with_aux(table_by_distance, "hd")),
    replace(BY_NAME["parallel"], name="threads-two-tables", q_len=300, kv_len=700, dtype="float64",
            options=with_aux(two_tables, "bi", "j", dtype="float64")),
    replace(BY_NAME["parallel"], name="threads-alibi-sinks", q_len=300, kv_len=700,
            options=given(alibi_slopes=slopes(4), align=0, sinks=np.ones(4, np.float32))),
    replace(BY_NAME["parallel"], name="threads-alibi-batch", q_len=300, kv_len=700,
            options=given(alibi_slopes=np.stack([slopes(4)] * 2), align=0, causal=True)),
    Case("threads-one-head", "", given(causal=True), batch=1, heads=(1, 1), q_len=2100, kv_len=2100, dims=(64, 64)),
    Case("threads-window", "", given(window=(200, 0)), batch=1, heads=(3, 1), q_len=1500, kv_len=1500, dims=(64, 64)),
    Case("threads-d128", "", given(causal=True), batch=1, heads=(3, 3), q_len=700, kv_len=700, dims=(128, 128)),
    Case("threads-f64", "", batch=2, heads=(3, 3), q_len=400, kv_len=600, dims=(64, 64), dtype="float64"),
    Case("threads-f16", "", batch=2, heads=(3, 3), q_len=400, kv_len=600, dims=(64, 64), dtype="float16"),
    Case("threads-many-heads", "", batch=8, heads=(16, 4), q_len=33, kv_len=203),
    Case("threads-one-row", "", batch=1, heads=(32, 32), q_len=1, kv_len=2000, dims=(64, 64)),
    Case("threads-varlen", "", both(given(mask=na.varlen([0, 500, 510, 900], [0, 500, 510, 900])), bias(1, 2, 3)),
         batch=1, heads=(2, 2), q_len=900, kv_len=900, dims=(64, 64)),
]  # fmt: skip
THREADED = MORE + [
    case for case in CASES if case.simd or case.name.startswith(("parallel", "mask-banded", "varlen", "everything"))
]


def digest(case: Case) -> str:
    import hashlib

    arrays, options = build(case)
    grads = gradients(*arrays, *cotangents(arrays[0], arrays[2]), **options)
    return " ".join(f"{name} {hashlib.sha256(x.tobytes()).hexdigest()[:16]}" for name, x in entries(grads))


def threaded_digests() -> str:
    """One line a case: digests of its gradients. Twice, with sums of pairs in as many copies as the kernels like, and
    in fewer."""
    from numba_attn.cpu.launch import backward as launch_backward

    lines = [f"{case.name}: {digest(case)}" for case in THREADED]
    most = launch_backward.MOST_SUMS
    for launch_backward.MOST_SUMS in (1 << 20, 0):
        lines += [f"{launch_backward.MOST_SUMS} {case.name}: {digest(case)}" for case in (*EVERY_BIAS, *MORE[:10])]
    launch_backward.MOST_SUMS = most
    return "\n".join(lines)


@pytest.mark.processes
def test_one_two_and_four_threads() -> None:
    code = """
import numba, test_backward_bits
assert numba.config.NUMBA_NUM_THREADS == 4
for threads in (4, 2):
    numba.set_num_threads(threads)
    print(test_backward_bits.threaded_digests(), end="\\n---\\n")
    assert numba.get_num_threads() == threads
"""
    runs = run_python(code, env={"NUMBA_NUM_THREADS": "4"}).stdout.split("\n---\n")[:2]
    assert len(runs[0].splitlines()) == len(THREADED) + 2 * (len(EVERY_BIAS) + 10)
    single = run_python(
        "import test_backward_bits as t; print(t.threaded_digests())", env={"NUMBA_NUM_THREADS": "1"}
    ).stdout.strip()
    for run in runs:
        different = [a for a, b in zip(run.splitlines(), single.splitlines(), strict=True) if a != b]
        assert not different


def test_fewer_copies_of_sums_are_right() -> None:
    """The three ways to add up a gradient that pairs share."""
    from test_backward import check

    from numba_attn.cpu.launch import backward as launch_backward

    most = launch_backward.MOST_SUMS
    try:
        for launch_backward.MOST_SUMS in (1 << 18, 0):
            for case in (*EVERY_BIAS, BY_NAME["alibi-batch"], BY_NAME["everything"], BY_NAME["score-mod-two-tables"]):
                check(*build(case))
    finally:
        launch_backward.MOST_SUMS = most


@pytest.mark.parametrize("name", ["parallel", "parallel-causal", "parallel-bfloat16", "plain-3x799", "everything"])
def test_again_and_again(name: str) -> None:
    """A race shows in repetition; and one pullback may be called twice."""
    arrays, options = build(BY_NAME[name])
    dout, dlse = cotangents(arrays[0], arrays[2])
    pullback = na.attention_vjp(*arrays, **options, aux_grad=float_aux(options))[1]
    want = pullback(dout, dlse)
    for _ in range(6):
        same(pullback(dout, dlse), want)
    other = pullback(dout + dout, dlse)  # 2 * dout is float32 in NumPy 2.0 where dout is bfloat16
    assert other.dv.tobytes() != want.dv.tobytes()
    same(pullback(dout, dlse), want)
    same(gradients(*arrays, dout, dlse, **options), want)


def test_dropout_is_a_function_of_its_indices() -> None:
    q, k, v, dout, dlse = problem("float32", 2, (4, 2), 150, 333)
    options = dict(dropout_p=0.3, seed=5)
    want = gradients(q, k, v, dout, dlse, **options)
    same(gradients(q, k, v, dout, dlse, **options), want)
    first = gradients(q[:1, :2], k[:1, :1], v[:1, :1], dout[:1, :2], dlse[:1, :2], **options)
    same(first, of(want, np.s_[:1, :2], np.s_[:1, :1]))
    assert gradients(q, k, v, dout, dlse, dropout_p=0.3, seed=6).dv.tobytes() != want.dv.tobytes()


@pytest.mark.parametrize(("one", "other"), LIKE)
def test_like_calls_are_told_apart(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Back and forth between two calls that differ in one number."""
    arrays = problem("float32", 1, (2, 2), 33, 64, 16, 16)
    pullbacks = [na.attention_vjp(*arrays[:3], **options)[1] for options in (one, other)]
    results = [pullbacks[n](*arrays[3:]) for n in (0, 1, 0, 1)]
    same(results[0], results[2])
    same(results[1], results[3])
    assert results[0].dv.tobytes() != results[1].dv.tobytes()
    for got, options in zip(results, (one, other), strict=False):
        want = na.reference.attention_backward(arrays[3], *arrays[:3], dlse=arrays[4], **options)
        for (name, x), (_, y) in zip(entries(got), entries(want), strict=True):
            assert np.abs(x - y).max() <= 4e-6 * max(np.abs(y).max(), 1), name


# ---- NaN ----


def score_mod_hides(case: Case) -> bool:
    return case.name.startswith("score-mod-hides")


@pytest.mark.parametrize("what", ["nan", "mixed"])
@pytest.mark.parametrize("case", HIDING, ids=lambda case: case.name)
def test_hidden_rows_change_no_bit(case: Case, what: str) -> None:
    """q, dout, out, lse and dlse of rows that see nothing, k and v rows that no query sees, and every hidden finite
    pair of the bias. Their own gradients are 0."""
    rng = seeds.generator(1)
    arrays, options = build(case)
    out, lse = na.attention(*arrays, **options, return_lse=True)
    dout, dlse = cotangents(arrays[0], arrays[2])
    seen = visible_pairs(case, arrays, options)
    q, k, v, *others = (from_layout(x, case.layout) for x in (*arrays, dout, out, lse[..., None], dlse[..., None]))
    group = case.heads[0] // case.heads[1]
    of_kv = seen.reshape(case.batch, case.heads[1], group, case.q_len, case.kv_len)
    lonely_q, unseen_k = ~seen.any(-1)[..., None], ~of_kv.any((2, 3))[..., None]
    stale = [poison(x, where, what, rng) for x, where in ((q, lonely_q), (k, unseen_k), (v, unseen_k))]
    stale += [poison(x, lonely_q, what, rng) for x in others]
    if "sinks" in options:  # the sink of a row that sees nothing has a gradient, from lse and dlse
        stale[4:] = others[1:]
    again = dict(options)
    if "bias" in options:
        axes = tuple(n for n, size in enumerate((1,) * (4 - options["bias"].ndim) + options["bias"].shape) if size == 1)
        needless = ~seen.any(axis=axes, keepdims=True).reshape(options["bias"].shape)
        again["bias"] = poison(options["bias"], needless & ~np.isneginf(options["bias"].astype(np.float64)), what, rng)
    q, k, v, dout_again, out_again, lse_again, dlse_again = (to_layout(x, case.layout) for x in stale)
    lse_again, dlse_again = lse_again[..., 0], dlse_again[..., 0]
    if case.layout == "sd":
        lse_again, dlse_again = lse_again.reshape(lse.shape), dlse_again.reshape(lse.shape)
    aux_grad = float_aux(options)
    want = na.attention_backward(dout, *arrays, out, lse, dlse=dlse, **options, aux_grad=aux_grad)
    got = na.attention_backward(dout_again, q, k, v, out_again, lse_again, dlse=dlse_again, **again, aux_grad=aux_grad)
    for name, x in entries(want):
        assert np.isfinite(x.astype(np.float32)).all(), name
    same(got, want)
    assert not from_layout(want.dq, case.layout)[lonely_q[..., 0]].any()
    assert not from_layout(want.dk, case.layout)[unseen_k[..., 0]].any()
    assert not from_layout(want.dv, case.layout)[unseen_k[..., 0]].any()
    if "bias" in options:
        assert not want.dbias[needless].any()


KINDS = PARTIAL | {
    "bias-full": dict(mask=PARTIAL["mask"]["mask"], bias=seeds.generator(4).standard_normal((2, 4, 130, 130))),
    "bias-shared": dict(causal=True, bias=seeds.generator(4).standard_normal((4, 130, 130))),
    "alibi-by-hand": dict(causal=True, score_mod=alibi_by_hand),
    "table": dict(window=(9, 40), score_mod=table_by_distance, aux=(seeds.generator(3).random((4, 130)),)),
    "softcap-mask": dict(mask=PARTIAL["mask"]["mask"], softcap=2.0),
    "dropout-mask": dict(mask=PARTIAL["mask"]["mask"], dropout_p=0.3, seed=3),
    "empty-rows": dict(mask=seeds.generator(0).random((130, 130)) < 0.02),
    "sinks-lengths": dict(mask=na.lengths([100, 130], [90, 130]), sinks=np.ones(4)),
}


def partial_problem(kind: str, dtype: str) -> tuple[list[np.ndarray], dict[str, Any], np.ndarray]:
    """[q, k, v, dout, dlse], the options, and who sees whom."""
    options = dict(KINDS[kind])
    case = Case(f"partial-{kind}", "", lambda rng, c: options, heads=(4, 2), q_len=130, kv_len=130, dims=(24, 19),
                dtype=dtype)  # fmt: skip
    arrays, _ = build(case)
    seen = visible_pairs(case, arrays, options)
    return [*arrays, *cotangents(arrays[0], arrays[2])], options, seen


def spoilt(arrays: list[np.ndarray], which: int, at: tuple[int, ...], value: float) -> list[np.ndarray]:
    changed = list(arrays)
    changed[which] = arrays[which].copy()
    changed[which][at] = value
    return changed


def places(seen: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """(b, kv head, row, column) of a few elements, of q and k alike: seen by some rows, by all, or by none."""
    yield from ((0, 0, 0, 0), (1, 1, 61, 18), (0, 1, 99, 7), (1, 0, 129, 11))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_visible_nan_reaches_what_its_rows_feed_and_no_more(kind: str, dtype: str) -> None:
    """One element of q, k, v, dout, dlse, out or lse: the query rows that it spoils, the keys that those see, and no
    bit beyond."""
    arrays, options, seen = partial_problem(kind, dtype)
    options["aux_grad"] = float_aux(options)
    forward = {name: x for name, x in options.items() if name != "aux_grad"}
    q, k, v, dout, dlse = arrays
    out, lse = na.attention(q, k, v, **forward, return_lse=True)
    whole = [*arrays, out, lse]
    want = na.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    for which, name in enumerate(("q", "k", "v", "dout", "dlse", "out", "lse")):
        for b, kv, row, column in places(seen):
            place = (b, 2 * kv if which not in (1, 2) else kv, row, column)[: 3 if which in (4, 6) else 4]
            changed = spoilt(whole, which, place, np.nan)
            if which < 3:
                changed[5:] = na.attention(*changed[:3], **forward, return_lse=True)
            q, k, v, dout, dlse, out, lse = changed
            with np.errstate(all="ignore"):
                got = na.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
            rows = np.zeros(seen.shape[:3], bool)  # of queries whose dS is NaN
            if which in (1, 2):
                rows[b, 2 * kv : 2 * kv + 2] = seen[b, 2 * kv : 2 * kv + 2, :, row]
            else:
                rows[b, 2 * kv, row] = seen[b, 2 * kv, row].any()
            keys = (seen & rows[..., None]).any(2).reshape(2, 2, 2, 130).any(2)
            what = f"NaN in {name}{list(place)}"
            unchanged(got.dq, want.dq, ~rows, f"dq, {what}")
            unchanged(got.dk, want.dk, ~keys, f"dk, {what}")
            unchanged(got.dv, want.dv, ~keys, f"dv, {what}")
            if got.dbias is not None and got.dbias.ndim == 4:
                unchanged(got.dbias, want.dbias, ~(seen & rows[..., None]), f"dbias, {what}")
                assert not got.dbias[~seen].any()
            if name in ("v", "dlse", "out"):  # P knows nothing of them
                unchanged(got.dv, want.dv, np.ones_like(keys), f"dv, {what}")
            if kind.startswith("dropout") and which in (2, 3):  # 0 * NaN of a dropped weight may be left out or not
                continue
            broken(got.dq[rows], f"dq, {what}")
            broken(got.dk[keys], f"dk, {what}")
            if name in ("q", "k", "lse"):
                broken(got.dv[keys], f"dv, {what}")
            if name == "dout":
                broken(got.dv[keys][:, column], f"dv, {what}")
                others = np.arange(19) != column
                assert np.isfinite(got.dv[keys][:, others].astype(np.float32)).all(), f"dv's other columns, {what}"
            if got.dbias is not None and got.dbias.ndim == 4:
                broken(got.dbias[seen & rows[..., None]], f"dbias, {what}")
            for entry, x in entries(got):
                if rows.any() and (entry in ("dalibi_slopes", "dsinks") or entry.startswith("daux")):
                    assert np.isnan(x.astype(np.float32)).any(), f"{entry}, {what}"


def unchanged(x: np.ndarray, y: np.ndarray, where: np.ndarray, what: str) -> None:
    a, b = (z[where] for z in (x, y))
    assert a.tobytes() == b.tobytes(), f"{what}: {np.sum(a != b)} elements changed that nothing should reach"


def broken(x: np.ndarray, what: str) -> None:
    fine = np.isfinite(x.astype(np.float32))
    assert not fine.any(), f"{what}: {fine.sum()} of {x.size} elements that it feeds are finite"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_visible_infinity(value: float, dtype: str) -> None:
    for kind in ("causal", "mask", "empty-rows", "plain"):
        arrays, options, seen = partial_problem(kind, dtype)
        want = na.attention_vjp(*arrays[:3], **options)[1](*arrays[3:])
        for which in (1, 2, 3):  # k, v, dout
            changed = spoilt(arrays, which, (1, 1 if which < 3 else 2, 77, 5), value)
            got = na.attention_vjp(*changed[:3], **options)[1](*changed[3:])
            rows = np.zeros(seen.shape[:3], bool)
            if which == 3:
                rows[1, 2, 77] = seen[1, 2, 77].any()
            else:
                rows[1, 2:4] = seen[1, 2:4, :, 77]
            keys = (seen & rows[..., None]).any(2).reshape(2, 2, 2, 130).any(2)
            what = f"{value} in {'qkvd'[which]}, {kind}"
            unchanged(got.dq, want.dq, ~rows, f"dq, {what}")
            unchanged(got.dk, want.dk, ~keys, f"dk, {what}")
            unchanged(got.dv, want.dv, ~keys, f"dv, {what}")
            for x, where in ((got.dq, rows), (got.dk, keys)):
                fine = np.isfinite(x.astype(np.float32))[where]
                assert not fine.all(axis=-1).any(), what


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_bias_that_is_not_finite(dtype: str, value: float) -> None:
    """In a visible pair its row is NaN, behind a mask it is nothing; dbias is 0 at every hidden pair either way."""
    arrays, options, seen = partial_problem("mask", dtype)
    added = seeds.generator(8).standard_normal((2, 4, 130, 130)).astype(np.float32)
    want = na.attention_vjp(*arrays[:3], **options, bias=added)[1](*arrays[3:])
    assert not want.dbias[~seen].any() and want.dbias[seen].all()
    hidden = np.where(seen, added, np.float32(value))
    same(na.attention_vjp(*arrays[:3], **options, bias=hidden)[1](*arrays[3:]), want)
    b, h, i, j = np.argwhere(seen)[7777]
    added[b, h, i, j] = value
    got = na.attention_vjp(*arrays[:3], **options, bias=added)[1](*arrays[3:])
    rows = np.zeros(seen.shape[:3], bool)
    rows[b, h, i] = True
    keys = (seen & rows[..., None]).any(2).reshape(2, 2, 2, 130).any(2)
    for x, y, hit in ((got.dq, want.dq, rows), (got.dk, want.dk, keys), (got.dv, want.dv, keys)):
        unchanged(x, y, ~hit, str(value))
        broken(x[hit], str(value))
    unchanged(got.dbias, want.dbias, ~(seen & rows[..., None]), "dbias")
    broken(got.dbias[seen & rows[..., None]], "dbias")


@pytest.mark.parametrize("stale", [np.nan, np.inf, 3e38])
def test_numbers_behind_what_hides_by_minus_inf(stale: float) -> None:
    """Keys and values full of NaN that a bias or a score_mod hides."""
    from cases import hides_odd_keys

    q, k, v, dout, dlse = problem("float32", 1, (2, 2), 111, 111)
    for options in ({"bias": np.where(np.arange(111) % 2 == 1, -np.inf, 0.25)}, {"score_mod": hides_odd_keys}):
        want = gradients(q, k, v, dout, dlse, **options)
        spoilt_k, spoilt_v = k.copy(), v.copy()
        spoilt_k[:, :, 1::2], spoilt_v[:, :, 1::2] = stale, stale
        got = gradients(q, spoilt_k, spoilt_v, dout, dlse, **options)
        same(got, want)
        assert not got.dk[:, :, 1::2].any() and not got.dv[:, :, 1::2].any()


def test_the_reference_says_the_same_of_nan() -> None:
    """Which elements are finite, entry by entry."""
    for kind in ("causal", "mask", "bias-full", "varlen", "sinks-lengths", "table"):
        arrays, options, _ = partial_problem(kind, "float64")
        options["aux_grad"] = float_aux(options)
        for which in range(5):
            place = (1, 1, 61, 18)[: arrays[which].ndim]
            q, k, v, dout, dlse = spoilt(arrays, which, place, np.nan)
            with np.errstate(all="ignore"):
                got = na.attention_vjp(q, k, v, **options)[1](dout, dlse)
                want = na.reference.attention_backward(dout, q, k, v, dlse=dlse, **options)
            for (name, x), (_, y) in zip(entries(got), entries(want), strict=True):
                np.testing.assert_array_equal(
                    np.isfinite(x), np.isfinite(y), err_msg=f"{kind}, {name}, {'qkvdl'[which]}"
                )


def test_rows_behind_the_last_sequence() -> None:
    """varlen: dq, dk, dv of rows in no sequence are 0, whatever is there, and sequences don't reach into each other."""
    case = replace(BY_NAME["varlen-slack"], name="stale", heads=(4, 2))
    arrays, options = build(case)
    dout, dlse = cotangents(arrays[0], arrays[2])
    want = gradients(*arrays, dout, dlse, **options)
    rows, keys = np.arange(63), np.arange(111)
    for first_q, last_q, first_k, last_k in ((30, 63, 90, 111), (7, 30, 40, 90)):
        q, k, v, do, dl = (x.copy() for x in (*arrays, dout, dlse))
        for x in (q, do, dl):
            x[:, :, first_q:last_q] = np.nan
        k[:, :, first_k:last_k], v[:, :, first_k:last_k] = np.nan, np.inf
        got = na.attention_vjp(q, k, v, **options)[1](do, dl)
        kept_q, kept_k = (rows < first_q) | (rows >= last_q), (keys < first_k) | (keys >= last_k)
        same(of(got, np.s_[:, :, kept_q], np.s_[:, :, kept_k]), of(want, np.s_[:, :, kept_q], np.s_[:, :, kept_k]))
        assert not got.dq[:, :, 30:].any() and not got.dk[:, :, 90:].any() and not got.dv[:, :, 90:].any()
