"""The reference against what can be said without it: numbers worked out by hand, identities of the softmax, formulas
written as loops over single pairs, SciPy's softmax, PyTorch's published definition of attention, and the vectors of the
Philox paper."""

import doctest
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import seeds

from numba_attn import reference
from numba_attn.mask import Mask, causal, lengths, varlen, window
from numba_attn.plan import resolve
from numba_attn.reference import attention, dropout_keep, philox4x32

INF = math.inf


def data(seed=0, batch=2, heads=(4, 2), q_len=5, kv_len=7, dims=(3, 6)):
    rng = seeds.generator(seed)
    q = rng.standard_normal((batch, heads[0], q_len, dims[0]))
    k = rng.standard_normal((batch, heads[1], kv_len, dims[0]))
    v = rng.standard_normal((batch, heads[1], kv_len, dims[1]))
    return q, k, v


@dataclass
class PairOptions:
    """Options of attention as the loops read them: a number, or an array with an element for each pair, head or row."""

    visible: np.ndarray  # (B, Hq, Sq, Sk)
    scale: float | None = None
    softcap: float | None = None
    bias: np.ndarray | None = None  # (B, Hq, Sq, Sk)
    slopes: np.ndarray | None = None  # (Hq,), of ALiBi
    offset: int = 0
    sinks: np.ndarray | None = None  # (Hq,)
    mod: Callable[..., float] | None = None


def by_loops(q, k, v, given):
    """One pair at a time, in exact sums of Python floats: no array, no matrix product, no maximum subtracted."""
    batch, heads, q_len, dk = q.shape
    kv_len, group = k.shape[2], heads // k.shape[1]
    out, lse = np.zeros((batch, heads, q_len, v.shape[3])), np.full((batch, heads, q_len), -INF)
    for b, h, i in np.ndindex(batch, heads, q_len):
        weight = {}
        for j in range(kv_len):
            if not given.visible[b, h, i, j]:
                continue
            s = math.fsum(float(x) * float(y) for x, y in zip(q[b, h, i], k[b, h // group, j], strict=True))
            s *= 1 / math.sqrt(dk) if given.scale is None else given.scale
            if given.softcap is not None:
                s = given.softcap * math.tanh(s / given.softcap)
            if given.bias is not None:
                s += float(given.bias[b, h, i, j])
            if given.slopes is not None:
                s -= float(given.slopes[h]) * abs(i + given.offset - j)
            if given.mod is not None:
                s = given.mod(s, b, h, i, j)
            weight[j] = math.exp(s)
        total = math.fsum([*weight.values(), math.exp(float(given.sinks[h])) if given.sinks is not None else 0.0])
        if total > 0:
            lse[b, h, i] = math.log(total)
        for j, w in weight.items():
            out[b, h, i] += w / total * v[b, h // group, j] if total > 0 else 0.0
    return out, lse


def close(got, want):
    for x, y in zip(got, want, strict=True):
        assert x.dtype == np.float64
        np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-13)


# ---- by hand ----


def test_two_keys_by_hand():
    """Scores log 3 and 0 give weights 3/4 and 1/4."""
    q = np.array([[math.log(3.0)]])
    k = np.array([[1.0], [0.0]])
    v = np.array([[4.0, 8.0], [0.0, 4.0]])
    out, lse = attention(q, k, v, layout="sd", return_lse=True)
    np.testing.assert_allclose(out, [[3.0, 7.0]], rtol=1e-15)
    np.testing.assert_allclose(lse, [math.log(4.0)], rtol=1e-15)


def test_a_sink_by_hand():
    """A sink of log 4 beside weights 3 and 1: the values keep half their weight, and lse is log 8."""
    q, k, v = np.array([[math.log(3.0)]]), np.array([[1.0], [0.0]]), np.array([[4.0], [0.0]])
    out, lse = attention(q, k, v, sinks=np.array([math.log(4.0)]), layout="sd", return_lse=True)
    np.testing.assert_allclose(out, [[1.5]], rtol=1e-15)
    np.testing.assert_allclose(lse, [math.log(8.0)], rtol=1e-15)


def test_scale_zero_is_the_mean_of_the_visible():
    q, k, v = data()
    out = attention(q, k, v, scale=0.0, mask=np.arange(7) < 3)
    np.testing.assert_allclose(out, np.broadcast_to(v[:, [0, 0, 1, 1], None, :3].mean(3), out.shape), rtol=1e-14)


def test_causal_first_query_returns_the_first_value():
    q, k, v = data(kv_len=5)
    np.testing.assert_array_equal(attention(q, k, v, causal=True)[:, :, 0], v[:, [0, 0, 1, 1], 0])


def test_a_large_score_takes_its_value_exactly():
    q, k, v = np.array([[800.0]]), np.array([[-1.0], [1.0]]), np.array([[np.pi], [2.5]])
    out, lse = attention(q, k, v, layout="sd", return_lse=True)
    assert out[0, 0] == 2.5
    assert lse[0] == 800.0


# ---- against other formulas ----


@pytest.mark.parametrize(
    "name",
    ["plain", "scale", "softcap", "bias", "alibi", "sinks", "mask", "causal", "window", "score_mod", "all"],
)
def test_against_loops(name):
    rng = seeds.generator(3)
    q, k, v = data(1)
    bias, sinks, slopes = rng.standard_normal((2, 4, 5, 7)), rng.standard_normal(4), rng.random(4)
    mask = rng.random((2, 1, 5, 7)) < 0.7
    mask[0, :, 2] = False
    i, j = np.ogrid[:5, :7]
    both = {
        "plain": ({}, {}),
        "scale": ({"scale": -0.7}, {"scale": -0.7}),
        "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
        "bias": ({"bias": bias[:, :1]}, {"bias": np.broadcast_to(bias[:, :1], bias.shape)}),
        "alibi": ({"alibi_slopes": slopes, "align": 3}, {"slopes": slopes, "offset": 3}),
        "sinks": ({"sinks": sinks}, {"sinks": sinks}),
        "mask": ({"mask": mask}, {"visible": mask}),
        "causal": ({"causal": True, "align": "bottom_right"}, {"visible": j <= i + 2}),
        "window": ({"window": (1, 2), "align": "top_left"}, {"visible": (i - 1 <= j) & (j <= i + 2)}),
    }
    options = {key: x for given, _ in both.values() for key, x in given.items()} | {"align": 3}
    loops = {key: x for _, given in both.values() for key, x in given.items()}
    both["all"] = options, loops | {"visible": mask & (j <= i + 3) & (i + 3 - 1 <= j)}
    if name in ("score_mod", "all"):

        def mod(s, b, h, i, j):
            return s * 0.5 - (b + h) * abs(i - j) * 0.25

        both["score_mod"] = {}, {}
        both[name][0]["score_mod"] = mod
        both[name][1]["mod"] = mod
    options, loops = both[name]
    visible = np.broadcast_to(loops.pop("visible", True), (2, 4, 5, 7))
    close(attention(q, k, v, **options, return_lse=True), by_loops(q, k, v, PairOptions(visible, **loops)))


def test_against_scipy():
    special = pytest.importorskip("scipy.special")
    q, k, v = data(2)
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    s = np.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(3)
    out, lse = attention(q, k, v, return_lse=True)
    close((out, lse), (special.softmax(s, axis=-1) @ v, special.logsumexp(s, axis=-1)))


def test_against_torch():
    """Top-left causal, a float mask and grouped heads, by another library's definition."""
    torch = pytest.importorskip("torch")
    q, k, v = data(4, q_len=6)
    t = [torch.from_numpy(x) for x in (q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1))]
    bias = seeds.generator(5).standard_normal((6, 7))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    close([attention(q, k, v)], [sdpa(*t).numpy()])
    close([attention(q, k, v, causal=True, align="top_left")], [sdpa(*t, is_causal=True).numpy()])
    close([attention(q, k, v, bias=bias)], [sdpa(*t, attn_mask=torch.from_numpy(bias)).numpy()])
    close([attention(q, k, v, mask=bias > -1)], [sdpa(*t, attn_mask=torch.from_numpy(bias > -1)).numpy()])


# ---- identities ----


def test_adding_a_constant_to_a_row_changes_only_lse():
    q, k, v = data()
    shift = seeds.generator(6).standard_normal((2, 4, 5, 1)) * 10
    out, lse = attention(q, k, v, return_lse=True)
    close(attention(q, k, v, bias=shift, return_lse=True), (out, lse + shift[..., 0]))


def test_permuting_keys_changes_nothing():
    q, k, v = data()
    order = seeds.generator(7).permutation(7)
    close(attention(q, k[:, :, order], v[:, :, order], return_lse=True), attention(q, k, v, return_lse=True))


def test_parts_of_the_keys_merge_through_lse():
    q, k, v = data()
    parts = [attention(q, k, v, mask=m, return_lse=True) for m in (np.arange(7) < 4, np.arange(7) >= 4)]
    lse = np.logaddexp(parts[0][1], parts[1][1])
    out = sum(o * np.exp(part - lse)[..., None] for o, part in parts)
    close((out, lse), attention(q, k, v, return_lse=True))


def test_a_huge_softcap_is_none_and_a_hidden_sink_is_none():
    q, k, v = data()
    plain = attention(q, k, v, return_lse=True)
    close(attention(q, k, v, softcap=1e9, return_lse=True), plain)
    close(attention(q, k, v, sinks=np.full(4, -INF), return_lse=True), plain)


def test_a_mask_is_a_bias_of_minus_infinity():
    q, k, v = data()
    m = seeds.generator(8).random((2, 4, 5, 7)) < 0.5
    m[1, 1, 1] = False
    want = attention(q, k, v, mask=m, return_lse=True)
    close(attention(q, k, v, bias=np.where(m, 0.0, -INF), return_lse=True), want)
    got = attention(q, k, v, score_mod=lambda s, b, h, i, j, m: s if m[b, h, i, j] else -INF, aux=(m,), return_lse=True)
    close(got, want)


def test_grouped_heads_are_repeated_heads():
    q, k, v = data()
    close([attention(q, k, v)], [attention(q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1))])


def test_packed_sequences_are_separate_calls():
    q, k, v = data(batch=1, q_len=9, kv_len=11)
    cu_q, cu_k = [0, 4, 4, 8], [0, 3, 5, 10]
    slopes = np.array([0.1, 0.2, 0.3, 0.4])
    options = {"causal": True, "align": "bottom_right", "alibi_slopes": slopes, "sinks": slopes}
    out, lse = attention(q, k, v, mask=varlen(cu_q, cu_k), **options, return_lse=True)
    for t in range(3):
        rows, keys = slice(cu_q[t], cu_q[t + 1]), slice(cu_k[t], cu_k[t + 1])
        alone = attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], **options, return_lse=True)
        close((out[:, :, rows], lse[:, :, rows]), alone)
    assert not out[:, :, 8].any()
    assert np.isneginf(lse[:, :, 8]).all(), "in no sequence: the sink does not apply"


def test_lengths_are_slices():
    q, k, v = data(batch=3)
    mask = lengths([7, 2, 0], [5, 3, 4]) & window(2, 0, "bottom_right")
    sinks = np.arange(4.0)
    out, lse = attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    for b, (kv_length, q_length) in enumerate([(7, 5), (2, 3), (0, 4)]):
        cut = q[b : b + 1, :, :q_length], k[b : b + 1, :, :kv_length], v[b : b + 1, :, :kv_length]
        alone = attention(*cut, window=(2, 0), align="bottom_right", sinks=sinks, return_lse=True)
        close((out[b : b + 1, :, :q_length], lse[b : b + 1, :, :q_length]), alone)
        assert not out[b, :, q_length:].any()
        assert np.isneginf(lse[b, :, q_length:]).all()
    np.testing.assert_array_equal(lse[2, :, :4], np.broadcast_to(sinks[:, None], (4, 4)))


@pytest.mark.parametrize("layout", ["bshd", "hsd", "shd", "sd"])
def test_layouts(layout):
    q, k, v = data(batch=2 if layout == "bshd" else 1, heads=(1, 1) if layout == "sd" else (4, 2))
    m = seeds.generator(9).random((5, 7)) < 0.6
    lead = (0,) * (4 - len(layout))

    def view(x):
        return (x.swapaxes(1, 2) if "sh" in layout else x)[lead]

    out, lse = attention(q, k, v, mask=m, causal=True, align=2, return_lse=True)
    got, got_lse = attention(*map(view, (q, k, v)), mask=m, causal=True, align=2, layout=layout, return_lse=True)
    np.testing.assert_array_equal(got, view(out))
    np.testing.assert_array_equal(got_lse, view(lse))


def test_every_dtype_is_computed_in_float64():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, k, v = data()
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        low = [x.astype(dtype) for x in (q, k, v)]
        close([attention(*low)], [attention(*(x.astype(np.float64) for x in low))])
    close([attention(q, low[1], v)], [attention(q, low[1].astype(np.float64), v)])


# ---- empty rows and numbers that are not finite ----


def test_empty_rows():
    q, k, v = data(batch=1, heads=(1, 1), q_len=2)
    for options in ({"mask": np.zeros((2, 7), bool)}, {"bias": np.full((2, 7), -INF)}, {"mask": lengths([0])}):
        out, lse = attention(q, k, v, **options, return_lse=True)
        assert not out.any()
        assert np.isneginf(lse).all()
        out, lse = attention(q, k, v, **options, sinks=np.array([1.5]), return_lse=True)
        assert not out.any()
        assert (lse == 1.5).all()


def test_empty_shapes():
    for q_len, kv_len, batch, dv in ((0, 3, 1, 2), (3, 0, 1, 2), (3, 3, 0, 2), (3, 3, 1, 0)):
        out, lse = attention(*data(batch=batch, q_len=q_len, kv_len=kv_len, dims=(2, dv)), return_lse=True)
        assert out.shape == (batch, 4, q_len, dv)
        assert lse.shape == (batch, 4, q_len)
        assert not out.any()


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
def test_nothing_leaks_from_behind_a_mask(bad):
    q, k, v = data(q_len=7)
    mask = np.tri(7, 7, dtype=bool) & (np.arange(7) != 2)
    want = attention(q, k, v, mask=mask, return_lse=True)
    k[:, :, 2], v[:, :, 2] = bad, bad
    bias = np.where(mask, 0.0, bad)
    for options in ({}, {"bias": bias}, {"softcap": 1e12}):
        got = attention(q, k, v, mask=mask, **options, return_lse=True)
        close(got, want)
    v[:, :, 5] = bad  # seen by the last two queries
    out = attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(out[:, :, :5], want[0][:, :, :5])
    assert not np.isfinite(out[:, :, 5:]).any()


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": np.zeros(4)}, {"scale": -1.0}])
@pytest.mark.parametrize("where", ["q", "k", "v", "bias"])
def test_a_number_that_is_not_finite_shows_in_its_rows_and_only_there(bad, options, where):
    q, k, v = data(q_len=7)
    bias = np.zeros((7, 7))
    want = attention(q, k, v, causal=True, **options)
    {"q": q, "k": k, "v": v}.get(where, bias[None, None])[..., 3, 0] = bad
    out = attention(q, k, v, causal=True, bias=bias, **options)
    if where == "bias" and bad == -INF:
        assert np.isfinite(out).all(), "-inf hides the pair"
        return
    touched = np.arange(7) == 3 if where in ("q", "bias") else np.arange(7) >= 3
    np.testing.assert_array_equal(out[:, :, ~touched], want[:, :, ~touched])
    assert not np.isfinite(out[:, :, touched]).all(axis=-1).any()


# ---- user functions ----


def test_score_mod_is_called_with_array_indices_and_only_for_what_is_seen():
    q, k, v = data(batch=1, heads=(2, 1), q_len=3, kv_len=4)
    calls = set()

    def mod(s, b, h, i, j):
        calls.add((b, h, i, j))
        return s

    close([attention(q, k, v, score_mod=mod, causal=True, align=1)], [attention(q, k, v, causal=True, align=1)])
    assert calls == {(0, h, i, j) for h in range(2) for i in range(3) for j in range(i + 2)}


def test_aux_of_narrow_types_is_computed_in_wide_ones():
    q, k, v = data(batch=1, heads=(1, 1))
    table = seeds.generator(1).standard_normal(7).astype(np.float32)
    got = attention(q, k, v, score_mod=lambda s, b, h, i, j, t: s + t[j] * 0.1, aux=(table,))
    close([got], [attention(q, k, v, bias=table.astype(np.float64) * 0.1)])


# ---- dropout ----


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, words):
    """kat_vectors of Random123, the paper's own code."""
    counter, key = ([int(x, 16) for x in s.split()] for s in (counter, key))
    assert " ".join(f"{int(word):08x}" for word in philox4x32(tuple(counter), tuple(key))) == words


def test_dropout_layout_of_the_counter():
    """Pair by pair: counter (i, j >> 2, h, b), word j & 3, key the two halves of the seed."""
    seed = 0x0123456789ABCDEF
    q, k, v = data(batch=2, heads=(2, 1), q_len=3, kv_len=6)
    keep = dropout_keep(resolve(q, k, v, dropout_p=0.3, seed=seed))
    assert keep.shape == (2, 2, 3, 6)
    for b, h, i, j in np.ndindex(2, 2, 3, 6):
        word = philox4x32((i, j >> 2, h, b), (0x89ABCDEF, 0x01234567))[j & 3]
        assert keep[b, h, i, j] == (int(word) >= round(0.3 * 2**32))


def test_dropout_drops_weights_and_scales_the_rest():
    q, k, v = data(q_len=64, kv_len=64)
    options = {"dropout_p": 0.25, "seed": 7}
    plain, plain_lse = attention(q, k, v, return_lse=True)
    out, lse = attention(q, k, v, **options, return_lse=True)
    np.testing.assert_array_equal(lse, plain_lse)
    eye = np.broadcast_to(np.eye(64), (2, 2, 64, 64))
    weights, dropped = attention(q, k, eye), attention(q, k, eye, **options)
    keep = dropout_keep(resolve(q, k, v, **options))
    np.testing.assert_allclose(dropped, np.where(keep, weights / 0.75, 0.0), rtol=1e-14)
    np.testing.assert_allclose(out, dropped @ np.repeat(v, 2, axis=1), rtol=1e-10, atol=1e-12)
    assert abs(keep.mean() - 0.75) < 0.01
    np.testing.assert_array_equal(attention(q, k, v, **options), out)
    assert not np.array_equal(attention(q, k, v, dropout_p=0.25, seed=8), out)
    np.testing.assert_array_equal(attention(q, k, v, dropout_p=0.0, seed=8), plain)


def test_dropout_of_packed_sequences_counts_array_indices():
    q, k, v = data(batch=1, q_len=8, kv_len=8)
    eye = np.broadcast_to(np.eye(8), (1, 2, 8, 8))
    options = {"dropout_p": 0.5, "seed": 3}
    packed = attention(q, k, eye, mask=varlen([0, 3, 8], [0, 3, 8]), **options)
    seen = (Mask() & np.ones((8, 8), bool) & varlen([0, 3, 8], [0, 3, 8])).dense(8, 8, q_heads=4)
    np.testing.assert_array_equal(packed != 0, dropout_keep(resolve(q, k, v, **options)) & seen)


def test_the_arguments_are_left_alone():
    q, k, v = data()
    before = [x.copy() for x in (q, k, v)]
    attention(q, k, v, mask=causal(), align=1, softcap=3.0)
    for x, y in zip((q, k, v), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_examples_in_docstrings():
    assert doctest.testmod(reference).failed == 0
