"""What is hidden is never read into a result: NaN, infinities and stale numbers behind a mask change no bit.

And what is visible is never swept under the carpet: one NaN in a visible pair makes exactly the rows that see it non-
finite. The visible pairs come from the reference: the weights that it gives with uniform scores.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import seeds
from cases import BY_NAME, CASES, DTYPES, Case, build, cap_30, checkerboard, from_layout, hides_odd_keys, variant
from naive import resolve

import numba_attn as na

STALE = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 3e38, "mixed": None}


def visible_pairs(case: Case, arrays: tuple[np.ndarray, ...], options: dict[str, Any]) -> np.ndarray:
    """bool (B, Hq, Sq, Sk): who sees whom, by the reference: its weights with q = 0, read off one-hot values."""
    q, k, _ = (from_layout(x, case.layout) for x in arrays)
    keep = {name: options[name] for name in ("causal", "window", "align", "mask", "bias") if name in options}
    if "bias" in keep:
        keep["bias"] = np.where(np.isneginf(keep["bias"].astype(np.float64)), -np.inf, 0.0)
    if "align" in keep:
        keep.setdefault("window", (None, None))  # so that something takes the align
    one_hot = np.broadcast_to(np.eye(case.kv_len), (*k.shape[:3], case.kv_len))
    weights = na.reference.attention(np.zeros(q.shape), np.zeros(k.shape), one_hot, **keep)
    return weights > 0


def poison(x: np.ndarray, where: np.ndarray, what: str, rng: np.random.Generator) -> np.ndarray:
    """x with stale numbers where `where` says; huge ones saturate to the dtype's largest."""
    if STALE[what] is None:
        stale = rng.choice([np.nan, np.inf, -np.inf, 3e38, -3e38], x.shape)
    else:
        stale = np.full(x.shape, STALE[what])
    with np.errstate(over="ignore"):
        limit = {"float16": 6e4}.get(x.dtype.name, 3e38)
        stale = np.where(np.isfinite(stale), np.clip(stale, -limit, limit), stale).astype(x.dtype)
    return np.where(where, stale, x)


HIDING_NAMES = """causal-more window align-hides align-window align-int align-per lengths varlen segments prefix-br
    prefix-tl prefix-lengths intervals mask-mod mask-full mask-padding mask-matrix mask-column mask-keys mask-sparse
    mask-none mask-banded mask-causal mask-f mask-bf and- bias-hidden bias-all bias-mask bias-float bias-bfloat
    alibi-lengths sinks-padding sinks-empty layout causal-br-239x203 causal-tl-63x799 causal-tl-1x203"""
HIDING = [case for case in CASES if case.name.startswith(tuple(HIDING_NAMES.split()))]


@pytest.mark.parametrize("what", ["nan", "mixed"])
@pytest.mark.parametrize("case", HIDING, ids=lambda case: case.name)
def test_hidden_rows_change_no_bit(case: Case, what: str) -> None:
    """q rows that see nothing, k and v rows that no query sees, and every hidden finite pair of the bias."""
    rng = seeds.generator(1)
    arrays, options = build(case)
    seen = visible_pairs(case, arrays, options)
    q, k, v = (from_layout(x, case.layout) for x in arrays)
    group = case.heads[0] // case.heads[1]
    of_kv = seen.reshape(case.batch, case.heads[1], group, case.q_len, case.kv_len)
    lonely_q, unseen_k = ~seen.any(-1), ~of_kv.any((2, 3))
    stale = [poison(x, where[..., None], what, rng) for x, where in ((q, lonely_q), (k, unseen_k), (v, unseen_k))]
    again = dict(options)
    if "bias" in options:
        axes = tuple(n for n, size in enumerate((1,) * (4 - options["bias"].ndim) + options["bias"].shape) if size == 1)
        needless = ~seen.any(axis=axes, keepdims=True).reshape(options["bias"].shape)
        again["bias"] = poison(options["bias"], needless & ~np.isneginf(options["bias"].astype(np.float64)), what, rng)
    in_layout = tuple(to_layout(x, case.layout) for x in stale)
    out, lse = na.attention(*arrays, **options, return_lse=True)
    out_again, lse_again = na.attention(*in_layout, **again, return_lse=True)
    assert not np.isnan(out.astype(np.float32)).any()
    same(out, out_again, "out")
    same(lse, lse_again, "lse")


def test_hidden_rows_were_there() -> None:
    """The test above poisons nothing where everything is seen: most of its cases must hide rows, keys or bias."""
    hiding = 0
    for case in HIDING:
        arrays, options = build(case)
        seen = visible_pairs(case, arrays, options)
        hiding += bool((~seen.any(-1)).any() or (~seen.any((1, 2))).any())
    assert hiding > len(HIDING) // 3


def to_layout(x: np.ndarray, layout: str) -> np.ndarray:
    if layout in ("bshd", "shd"):
        x = x.swapaxes(1, 2)
    return x[(0,) * (4 - len(layout))]


def same(x: np.ndarray, y: np.ndarray, what: str) -> None:
    a, b = (np.ascontiguousarray(z).view(f"u{z.itemsize}") for z in (x, y))
    assert (a == b).all(), (
        f"{what}: {np.sum(a != b)} elements changed, first at {tuple(np.argwhere(a != b)[0].tolist())}"
    )


# A key that some rows see and others do not: the rows that do not are computed in the same tiles.
PARTIAL = {
    "causal": dict(causal=True),
    "window": dict(window=(7, 3)),
    "mask": dict(mask=seeds.generator(0).random((1, 1, 130, 130)) < 0.6),
    "mask-mod": dict(mask=na.mask_mod(checkerboard)),
    "bias": dict(bias=np.where(seeds.generator(0).random((130, 130)) < 0.4, -np.inf, 0.5)),
    "segments": dict(mask=na.segments(np.arange(130) % 3, np.arange(130) % 3)),
    "intervals": dict(mask=na.intervals(np.arange(130) // 2, 130 - np.arange(130) // 3)),
    "varlen": dict(mask=na.varlen([0, 50, 130], [0, 70, 130])),
    "lengths": dict(mask=na.lengths([100, 130], [90, 130])),
    "prefix": dict(mask=na.prefix(20)),
    "score-mod-cap": dict(causal=True, score_mod=cap_30),
    "softcap-alibi-sinks": dict(causal=True, softcap=3.0, alibi_slopes=np.ones(4), sinks=np.ones(4)),
    "dropout": dict(causal=True, dropout_p=0.3, seed=3),
    "plain": {},
}


def partial_problem(kind: str, dtype: str) -> tuple[tuple[np.ndarray, ...], dict[str, Any], np.ndarray]:
    case = Case(
        f"partial-{kind}",
        "",
        lambda rng, c: PARTIAL[kind],
        heads=(4, 2),
        q_len=130,
        kv_len=130,
        dims=(24, 19),
        dtype=dtype,
    )
    arrays, options = build(case)
    return arrays, options, visible_pairs(case, arrays, options)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", list(PARTIAL))
def test_a_visible_nan_reaches_exactly_its_rows(kind: str, dtype: str) -> None:
    """One element of k, of v, of q: rows that see it are non-finite, the rest keep their bits. lse never sees v."""
    arrays, options, seen = partial_problem(kind, dtype)
    out, lse = na.attention(*arrays, **options, return_lse=True)
    assert np.isfinite(out.astype(np.float32)).all()
    for argument in range(3):
        for b, h, row, column in ((0, 0, 0, 0), (1, 1, 61, 18), (0, 1, 99, 7), (1, 0, 129, 11)):
            spoilt = [x.copy() for x in arrays]
            spoilt[argument][b, h, row, column] = np.nan
            hit = np.zeros(lse.shape, bool)
            if argument == 0:
                hit[b, h, row] = seen[b, h, row].any()
            else:
                hit[b, 2 * h : 2 * h + 2] = seen[b, 2 * h : 2 * h + 2, :, row]
            again, lse_again = na.attention(*spoilt, **options, return_lse=True)
            place = f"{'qkv'[argument]}[{b}, {h}, {row}, {column}]"
            same(out[~hit], again[~hit], f"out beside {place}")
            same(lse[~hit], lse_again[~hit], f"lse beside {place}")
            broken = ~np.isfinite(again.astype(np.float32))
            if kind == "dropout" and argument == 2:  # a dropped weight is 0, and 0 * NaN may be left out or not
                continue
            if argument == 2:
                assert broken[hit][:, column].all(), f"rows that see {place} are finite"
                same(lse, lse_again, f"lse of {place}")
            else:
                assert broken[hit].all(), f"rows that see {place} are finite"
                assert not np.isfinite(lse_again[hit]).any(), f"lse of rows that see {place} is finite"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_visible_infinite_value_reaches_exactly_its_rows(value: float, dtype: str) -> None:
    for kind in ("causal", "mask", "plain"):
        arrays, options, seen = partial_problem(kind, dtype)
        out, lse = na.attention(*arrays, **options, return_lse=True)
        q, k, v = arrays
        v = v.copy()
        v[1, 1, 77, 5] = value
        again, lse_again = na.attention(q, k, v, **options, return_lse=True)
        hit = np.zeros(lse.shape, bool)
        hit[1, 2:4] = seen[1, 2:4, :, 77]
        assert not np.isfinite(again[hit][:, 5].astype(np.float32)).any()
        same(out[~hit], again[~hit], "out")
        same(lse, lse_again, "lse")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_visible_bias_that_is_not_finite(dtype: str, value: float) -> None:
    """+inf and NaN in the bias are numbers, not masks: the row is non-finite. -inf alone hides."""
    arrays, options, seen = partial_problem("mask", dtype)
    bias = np.zeros((130, 130), np.float32)
    out, lse = na.attention(*arrays, **options, bias=bias, return_lse=True)
    i, j = np.argwhere(seen[0, 0])[777]
    bias[i, j] = value
    again, lse_again = na.attention(*arrays, **options, bias=bias, return_lse=True)
    rows = np.arange(130) != i
    same(out[:, :, rows], again[:, :, rows], "out")
    same(lse[:, :, rows], lse_again[:, :, rows], "lse")
    assert not np.isfinite(again[:, :, i].astype(np.float32)).any()
    i, j = np.argwhere(~seen[0, 0])[777]
    bias[...] = 0
    bias[i, j] = value  # now behind the mask
    again, lse_again = na.attention(*arrays, **options, bias=bias, return_lse=True)
    same(out, again, "out")
    same(lse, lse_again, "lse")


@pytest.mark.parametrize("hide", ["score_mod", "bias"])
def test_nan_scores_behind_what_hides_by_minus_inf(hide: str) -> None:
    """A key full of NaN that the bias hides: the sum is NaN, but it is the bias that is tested."""
    rng = seeds.generator(2)
    q, k, v = (rng.standard_normal((1, 2, 111, 24)).astype(np.float32) for _ in range(3))
    if hide == "bias":
        options: dict[str, Any] = {"bias": np.where(np.arange(111) % 2 == 1, -np.inf, 0.25)}
    else:
        options = {"score_mod": hides_odd_keys}
    out, lse = na.attention(q, k, v, **options, return_lse=True)
    for stale in (np.nan, np.inf, 3e38):
        k[:, :, 1::2], v[:, :, 1::2] = stale, stale
        again, lse_again = na.attention(q, k, v, **options, return_lse=True)
        same(out, again, f"out, {stale}")
        same(lse, lse_again, f"lse, {stale}")


@pytest.mark.parametrize("edit", ["rows", "keys", "gaps"])
def test_stale_numbers_around_varlen_sequences(edit: str) -> None:
    """Rows behind the last sequence, and another sequence's rows, which share tiles with this one's."""
    case = variant("varlen-slack", name="stale", heads=(4, 2))
    arrays, options = build(case)
    out, lse = na.attention(*arrays, **options, return_lse=True)
    q, k, v = (x.copy() for x in arrays)
    if edit == "rows":
        q[:, :, 30:] = np.nan
        kept = np.ones(63, bool)
    elif edit == "keys":
        k[:, :, 90:], v[:, :, 90:] = np.nan, np.inf
        kept = np.ones(63, bool)
    else:
        q[:, :, 7:30], k[:, :, 40:90], v[:, :, 40:90] = np.nan, np.inf, np.nan
        kept = (np.arange(63) < 7) | (np.arange(63) >= 30)
    again, lse_again = na.attention(q, k, v, **options, return_lse=True)
    same(out[:, :, kept], again[:, :, kept], "out")
    same(lse[:, :, kept], lse_again[:, :, kept], "lse")
    assert (out[:, :, 30:] == 0).all() and np.isneginf(lse[:, :, 30:]).all()


def test_output_memory_is_never_read() -> None:
    """NaN, or what an earlier call left, in out= changes nothing; zero weights do not multiply it either."""
    arrays, options = build(variant("causal-more-queries-br", name="reused"))
    want = na.attention(*arrays, **options)
    for stale in (np.nan, np.inf, 1e30):
        out = np.full(want.shape, stale, want.dtype)
        na.attention(*arrays, **options, out=out)
        same(want, out, "out")


def test_resolved_problem_keeps_the_arguments() -> None:
    """The tests above poison what they pass: nothing may be cached from the call before by identity."""
    (q, k, v), _ = build(replace(BY_NAME["plain-63x203"], name="identity"))
    p = resolve(q, k, v)
    assert np.shares_memory(p.q, q) and np.shares_memory(p.k, k) and np.shares_memory(p.v, v)
    first = na.attention(q, k, v)
    q[...] = -q
    assert na.attention(q, k, v).tobytes() != first.tobytes()
    mask = np.ones((63, 203), bool)
    before = na.attention(q, k, v, mask=mask)
    mask[:, 100:] = False
    assert na.attention(q, k, v, mask=mask).tobytes() != before.tobytes()
