"""The one table of attention problems: every forward feature of the library, by name, with where the case comes from.

Each row says shapes, dtype, layout and how its options are drawn; `build` turns a row into arrays. The accuracy,
layout, thread, SIMD and NaN tests all walk this table, so a feature added here is tested everywhere. Nasty lengths on
purpose: 1, 3, 63, 111, 239 queries against 1, 203, 799 keys, and head sizes that no vector width divides.
"""

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import seeds
from case_options import (
    DTYPES,
    Options,
    alibi_by_hand,
    banded_mask,
    bias,
    blocks,
    bool_mask,
    both,
    cap_30,
    checkerboard,
    dilated_causal,
    documents,
    everything,
    first_batch_row_only,
    given,
    hides_all,
    hides_odd_keys,
    hides_the_future,
    lengths,
    limits,
    many_functions,
    nothing,
    nothing_visible,
    random_intervals,
    segments_half_sorted,
    shuffled_segments,
    sinks,
    slopes,
    sorted_segments,
    table_by_distance,
    two_tables,
    varlen,
    with_aux,
)

import numba_attn as na


@dataclass(frozen=True)
class Case:
    """One problem: `heads` is (query heads, kv heads), `dims` is (Dk, Dv)."""

    name: str
    origin: str
    options: Options = field(default=nothing, repr=False)
    batch: int = 2
    heads: tuple[int, int] = (2, 2)
    q_len: int = 63
    kv_len: int = 111
    dims: tuple[int, int] = (40, 40)
    dtype: str = "float32"
    layout: str = "bhsd"
    draw: str = "normal"  # or "uniform": [0, 1), where sums of one sign show a long running chain
    spread: float = 1.0  # factor on q: 50 makes the softmax nearly one-hot
    simd: bool = False  # also run for every SIMD row of the CPU table (tests/test_process.py)

    @property
    def mask_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads[0], self.q_len, self.kv_len)


def into_layout(x: np.ndarray, layout: str) -> np.ndarray:
    """(B, H, S, D) -> the layout, C-contiguous there. Also takes (B, H, S), as lse has it."""
    if layout in ("bshd", "shd"):
        x = x.swapaxes(1, 2)
    for _ in range(4 - len(layout)):
        assert x.shape[0] == 1, "a layout without an axis holds one of it"
        x = x[0]
    return np.ascontiguousarray(x)


def from_layout(x: np.ndarray, layout: str) -> np.ndarray:
    """The layout -> (B, H, S, D), or (B, H, S) for lse; a view."""
    x = x[(None,) * (4 - len(layout))]
    return x.swapaxes(1, 2) if layout in ("bshd", "shd") else x


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


def draw(rng: np.random.Generator, shape: tuple[int, ...], how: str, dtype: np.dtype) -> np.ndarray:
    x = rng.standard_normal(shape) if how == "normal" else rng.random(shape)
    return x.astype(dtype)


def build(case: Case) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]:
    """The case's (q, k, v) in its layout and its keyword arguments, the same at every call."""
    rng = seeds.generator(seed_of(case.name))
    (hq, hkv), (dk, dv), dtype = case.heads, case.dims, DTYPES[case.dtype]
    q = draw(rng, (case.batch, hq, case.q_len, dk), case.draw, np.dtype(np.float64)) * case.spread
    k = draw(rng, (case.batch, hkv, case.kv_len, dk), case.draw, dtype)
    v = draw(rng, (case.batch, hkv, case.kv_len, dv), case.draw, dtype)
    arrays = tuple(into_layout(x, case.layout) for x in (q.astype(dtype), k, v))
    options = dict(case.options(rng, case))
    if case.layout != "bhsd":
        options["layout"] = case.layout
    return arrays, options


CASES: list[Case] = []


def add(name: str, origin: str, options: Options = nothing, **shape: Any) -> None:
    CASES.append(Case(name, origin, options, **shape))


# Plain attention over every nasty pair of lengths, and every head size.
for _q in (1, 3, 63, 111, 239):
    for _k in (1, 203, 799):
        add(f"plain-{_q}x{_k}", "STYLE: nasty lengths", q_len=_q, kv_len=_k, batch=1, dims=(59, 59))
        add(f"causal-br-{_q}x{_k}", "KV cache, flash-attention", given(causal=True, align="bottom_right"),
            q_len=_q, kv_len=_k, batch=1, dims=(40, 40))  # fmt: skip
        add(f"causal-tl-{_q}x{_k}", "torch is_causal, JAX", given(causal=True, align="top_left"),
            q_len=_q, kv_len=_k, batch=1, dims=(40, 40))  # fmt: skip
for _d in (1, 7, 40, 59, 64, 80, 111, 128, 256):
    for _dtype in DTYPES:
        add(f"head-{_d}-{_dtype}", "STYLE: head sizes", dims=(_d, _d), dtype=_dtype, batch=1, kv_len=203,
            simd=_d in (59, 64))  # fmt: skip
        add(f"head-{_d}-causal-{_dtype}", "STYLE: head sizes", given(causal=True), dims=(_d, _d), dtype=_dtype, batch=1,
            q_len=111)  # fmt: skip
add("dv-smaller", "digits: one-hot labels as values", dims=(64, 10), q_len=111, kv_len=203)
add("dv-larger", "DESIGN: Dv != Dk", dims=(16, 96))
add("dv-192-128", "DeepSeek-V2 MLA prefill", given(causal=True, align="bottom_right"), dims=(192, 128), heads=(4, 4))
add("dv-one", "DESIGN: Dv != Dk", dims=(7, 1), dtype="float64")
for _dtype in DTYPES:
    add(f"dv-odd-{_dtype}", "DESIGN: Dv != Dk", dims=(33, 70), dtype=_dtype)

# Grouped queries.
add("gqa-4", "Llama-3 8B, group 4", given(causal=True), heads=(8, 2), q_len=111, dims=(64, 64), simd=True)
add("gqa-3-odd", "DESIGN: GQA", heads=(6, 2), q_len=5, kv_len=203)
add("gqa-7", "Qwen2 7B, group 7", given(causal=True, align="bottom_right"), heads=(7, 1), q_len=3, kv_len=203)
add("mqa", "PaLM", heads=(5, 1), q_len=63, kv_len=203, dtype="float64")
add("mqa-decode", "one token, multi-query", heads=(8, 1), q_len=1, kv_len=799, dtype="float16")
add("gqa-bfloat16", "DESIGN: GQA", given(causal=True, align="top_left"), heads=(6, 3), dtype="bfloat16")

# Windows and alignment.
add("window-both", "Longformer", given(window=(13, 7)), q_len=239, kv_len=239, simd=True)
add("window-left", "Mistral 7B, scaled", given(window=(63, 0)), q_len=239, kv_len=239)
add("window-causal", "Hugging Face sliding_window", given(causal=True, window=(31, None)), q_len=239, kv_len=239)
add("window-causal-clips", "causal and window intersect", given(causal=True, window=(31, 9)), q_len=111, kv_len=111)
add("window-open-left", "DESIGN: None is open", given(window=(None, 5)), q_len=111, kv_len=111)
add("window-open", "DESIGN: None is open", given(window=(None, None)), q_len=63, kv_len=63)
add("window-zero", "the diagonal alone", given(window=(0, 0)), q_len=111, kv_len=111)
add("window-right-only", "reverse causal", given(window=(0, None), align="top_left"), q_len=63, kv_len=203)
add("window-br", "chunked prefill", given(window=(20, 3), align="bottom_right"), q_len=63, kv_len=203)
add("window-tl", "JAX local_window_size", given(window=(20, 3), align="top_left"), q_len=203, kv_len=63)
add(
    "window-br-more-queries",
    "rows above the first key",
    given(window=(20, 0), align="bottom_right"),
    q_len=239,
    kv_len=63,
)
add("window-huge", "no overflow", given(window=(2**40, 2**40)), q_len=63, kv_len=63)
add("window-f16", "Longformer", given(window=(13, 7)), q_len=239, kv_len=239, dtype="float16")
add(
    "causal-more-queries-br",
    "first rows see nothing",
    given(causal=True, align="bottom_right"),
    q_len=239,
    kv_len=63,
    simd=True,
)
add("causal-more-queries-tl", "last rows see all", given(causal=True, align="top_left"), q_len=239, kv_len=63)
add("align-int", "DESIGN: an int is the offset", given(causal=True, align=17))
add("align-negative", "DESIGN: an int is the offset", given(causal=True, align=-17))
add("align-per-batch", "a (B,) cache position", given(causal=True, align=np.array([5, 60])))
add("align-hides-all", "offset far below", given(causal=True, align=-10_000))
add("align-shows-all", "offset far above", given(causal=True, align=10_000))
add("align-window-hides-all", "offset far above", given(window=(9, 9), align=10_000))
add("align-large-hides-all", "no overflow", given(causal=True, align=-(2**40)))
add("align-large-window", "no overflow", given(window=(5, None), align=2**40), dtype="float64")

# Mask records.
add("lengths", "padded batch", lengths([0, 1, 77, 111]), batch=4, simd=True)
add("lengths-both", "padded batch, padded queries", lengths([111, 40, 9, 0], [63, 1, 0, 63]), batch=4)
add(
    "lengths-causal-br",
    "KV cache of ragged lengths",
    lengths([111, 64, 9, 1], causal=True, align="bottom_right"),
    batch=4,
)
add(
    "lengths-causal-tl",
    "padded training batch",
    lengths([111, 64, 9, 0], [63, 63, 9, 5], causal=True, align="top_left"),
    batch=4,
)
add(
    "lengths-window-br",
    "ragged cache, sliding window",
    lengths([111, 64, 20, 1], [63, 30, 20, 1], window=(9, 0), align="bottom_right"),
    batch=4,
)
add("lengths-bfloat16", "padded batch", lengths([111, 50]), dtype="bfloat16")
_CU_Q, _CU_K = [0, 5, 5, 68, 69, 200, 239], [0, 9, 20, 20, 120, 121, 203]
add("varlen", "flash_attn_varlen_func", varlen(_CU_Q, _CU_K), batch=1, q_len=239, kv_len=203, simd=True)
add(
    "varlen-causal-br",
    "flash_attn_varlen_func causal",
    varlen(_CU_Q, _CU_K, causal=True, align="bottom_right"),
    batch=1,
    q_len=239,
    kv_len=203,
)
add(
    "varlen-causal-tl",
    "packed training",
    varlen(_CU_Q, _CU_K, causal=True, align="top_left"),
    batch=1,
    q_len=239,
    kv_len=203,
)
add(
    "varlen-self-causal",
    "packed training, no align needed",
    varlen(_CU_Q, _CU_Q, causal=True),
    batch=1,
    q_len=239,
    kv_len=239,
    heads=(4, 2),
)
add(
    "varlen-window",
    "packed, sliding window",
    varlen(_CU_Q, _CU_Q, window=(8, 3)),
    batch=1,
    q_len=239,
    kv_len=239,
    dtype="float64",
)
# Both sequences fill tiles of queries, one of them fewer than the other: its tile behind the last is nobody's.
add(
    "varlen-tiles",
    "flash_attn_varlen_func",
    varlen([0, 130, 390], [0, 9, 20]),
    batch=1,
    heads=(4, 2),
    q_len=390,
    kv_len=20,
    dims=(8, 8),
)
add("varlen-shd", "flash-attention's (total, H, D)", varlen(_CU_Q, _CU_K), batch=1, q_len=239, kv_len=203, layout="shd")
add(
    "varlen-alibi",
    "distances from each start",
    varlen(_CU_Q, _CU_Q, alibi_slopes=slopes(2)),
    batch=1,
    q_len=239,
    kv_len=239,
)
add("varlen-slack", "rows behind the last sequence", varlen([0, 7, 30], [0, 40, 90]), batch=1)
add("varlen-batch", "the same packing in every batch row", varlen([0, 7, 63], [0, 40, 111]), batch=3)
add("segments-sorted", "packed documents", sorted_segments, q_len=239, kv_len=203, simd=True)
add("segments-unsorted", "cluster attention", shuffled_segments, q_len=239, kv_len=203)
add("segments-half-sorted", "sorted keys, unsorted queries", segments_half_sorted, q_len=111, kv_len=203)
add("segments-causal", "packed documents", both(sorted_segments, given(causal=True)), q_len=203, kv_len=203)
add("prefix", "T5, PaliGemma prefix-LM", lambda rng, c: {"mask": na.prefix(40)}, q_len=111)
add(
    "prefix-br",
    "prefix-LM with a cache",
    lambda rng, c: {"mask": na.prefix(7, align="bottom_right")},
    q_len=63,
    kv_len=203,
)
add("prefix-tl", "prefix-LM", lambda rng, c: {"mask": na.prefix(7, align="top_left")}, q_len=203, kv_len=63)
add("prefix-align", "prefix-LM over a cache", both(given(align=50), lambda rng, c: {"mask": na.prefix(60)}), q_len=111)
add("prefix-zero", "a prefix of 0 is causal", lambda rng, c: {"mask": na.prefix(0)}, q_len=111)
add("prefix-all", "a prefix of Sk is full", lambda rng, c: {"mask": na.prefix(111)}, q_len=111)
add("prefix-window", "both apply", lambda rng, c: {"mask": na.prefix(30) & na.window(10, 2)}, q_len=111)
add("prefix-causal", "causal wins", lambda rng, c: {"mask": na.prefix(30), "causal": True}, q_len=111)
add(
    "prefix-lengths",
    "padded prefix-LM",
    both(given(align="top_left"), lambda rng, c: {"mask": na.prefix(20)}, lengths([111, 15])),
    q_len=111,
)
add("intervals", "any contiguous rows", random_intervals(2))
add("intervals-batch", "any contiguous rows", random_intervals(0, 2, dtype=np.int32), q_len=239, kv_len=203)
add("intervals-heads", "any contiguous rows", random_intervals(0, 1, 2), q_len=239, kv_len=203, heads=(4, 2), simd=True)
add("intervals-f16", "any contiguous rows", random_intervals(0, 1, 2), dtype="float16")
add("mask-mod", "FlexAttention mask_mod", lambda rng, c: {"mask": na.mask_mod(checkerboard)}, simd=True)
add("mask-mod-head", "dilation by head", lambda rng, c: {"mask": na.mask_mod(dilated_causal)}, q_len=111, heads=(4, 2))
add("mask-mod-documents", "FlexAttention document mask", documents, q_len=111, kv_len=203)
add("mask-mod-blocks", "BigBird blocks", blocks, q_len=239, kv_len=203)
add("mask-mod-batch", "first batch row only", lambda rng, c: {"mask": na.mask_mod(first_batch_row_only)})
add("mask-mod-nothing", "all hidden", lambda rng, c: {"mask": na.mask_mod(nothing_visible)})
add("mask-mod-f64", "FlexAttention mask_mod", lambda rng, c: {"mask": na.mask_mod(checkerboard)}, dtype="float64")
add("mask-mod-bfloat16", "FlexAttention mask_mod", lambda rng, c: {"mask": na.mask_mod(checkerboard)}, dtype="bfloat16")
add(
    "and-causal-lengths",
    "`&`",
    lambda rng, c: {"mask": na.causal() & na.lengths(np.array([111, 30])), "align": "top_left"},
    q_len=111,
)
add(
    "and-window-segments",
    "`&`",
    lambda rng, c: {"mask": na.window(20, 5) & sorted_segments(rng, c)["mask"]},
    q_len=203,
    kv_len=203,
)
add(
    "and-varlen-mod",
    "`&`",
    both(varlen(_CU_Q, _CU_K), lambda rng, c: {"mask": na.mask_mod(checkerboard)}),
    batch=1,
    q_len=239,
    kv_len=203,
)
add("and-three-masks", "`&`", both(random_intervals(2), lengths([111, 50]), shuffled_segments))
add("and-two-intervals", "`&`", both(random_intervals(2), random_intervals(0, 1, 2)), q_len=111)
add(
    "and-two-windows",
    "`&`",
    lambda rng, c: {"mask": na.window(20, None) & na.window(30, 4), "window": (None, 9)},
    q_len=111,
)
add("and-two-mods", "`&`", both(lambda rng, c: {"mask": na.mask_mod(checkerboard)}, blocks), q_len=111)
add("and-two-segments", "`&`", both(shuffled_segments, sorted_segments), q_len=111)
add(
    "and-bool",
    "a bool array in `&`",
    lambda rng, c: {
        "mask": na.window(30, 4) & (rng.random((c.q_len, 1)) < 0.8) & (rng.random((2, 1, 1, c.kv_len)) < 0.5)
    },
    q_len=111,
)
add("prefix-batch", "a prefix for each batch row", lambda rng, c: {"mask": na.prefix(np.array([90, 4]))}, q_len=111)
add(
    "and-varlen-lengths",
    "common refinement",
    both(varlen([0, 40, 111], [0, 30, 111]), lengths([111, 60], [100, 111]), given(causal=True, align="top_left")),
    q_len=111,
)
add(
    "and-own-align",
    "a part's own align",
    lambda rng, c: {"mask": na.causal(align="bottom_right") & na.lengths(np.array([111, 70]))},
)

# Bool masks: every broadcast shape.
BROADCASTS = {
    (0, 1, 2, 3): "full",
    (0, 2, 3): "batch",
    (1, 2, 3): "heads",
    (0, 1): "pairs",
    (0, 2): "rows",
    (0, 3): "padding",
    (1, 3): "heads-keys",
    (2, 3): "matrix",
    (1,): "heads-only",
    (2,): "column",
    (3,): "keys",
}
for _axes, _text in BROADCASTS.items():
    add(
        f"mask-{_text}",
        f"mask over axes {_axes}",
        bool_mask(*_axes),
        heads=(4, 2),
        q_len=63,
        kv_len=203,
        simd=_text == "full",
    )
add("mask-sparse", "mostly empty rows", bool_mask(0, 1, 2, 3, density=0.005), q_len=111, kv_len=203)
add("mask-none-visible", "all hidden", bool_mask(2, 3, density=0.0))
add("mask-all-visible", "all True", bool_mask(0, 1, 2, 3, density=1.1), q_len=111)
add("mask-banded", "full, empty and cut tiles", banded_mask, q_len=439, kv_len=799)
add("mask-causal", "causal and mask intersect", both(bool_mask(0, 3), given(causal=True)), q_len=111, heads=(4, 1))
add("mask-f64", "bool mask", bool_mask(0, 1, 2, 3), dtype="float64")
add("mask-f16", "bool mask", bool_mask(2, 3), dtype="float16")
add("mask-bfloat16", "bool mask", bool_mask(0, 3), dtype="bfloat16")

# Bias.
for _axes, _text in BROADCASTS.items():
    add(
        f"bias-{_text}",
        f"bias over axes {_axes}",
        bias(*_axes),
        heads=(4, 2),
        q_len=63,
        kv_len=203,
        simd=_text == "full",
    )
for _dtype in DTYPES:
    for _bias in DTYPES:
        add(f"bias-{_bias}-into-{_dtype}", "bias of any dtype", bias(0, 1, 2, 3, dtype=_bias, hidden=0.2), dtype=_dtype)
add("bias-hidden", "-inf hides, rows empty", bias(0, 1, 2, 3, hidden=0.99), q_len=111)
add("bias-all-hidden", "-inf everywhere", bias(2, 3, hidden=1.1))
add("bias-large", "bias far above the scores", bias(1, 2, 3, size=300.0))
add("bias-finite-minus", "finfo.min as some libraries do", lambda rng, c: {
    "bias": np.float32(np.finfo(np.float32).min) * (rng.random((c.q_len, c.kv_len)) < 0.3)})  # fmt: skip
add("bias-causal", "T5 decoder", both(bias(1, 2, 3), given(causal=True)), q_len=111)
add("bias-mask", "both", both(bias(0, 1, 2, 3, hidden=0.2), bool_mask(2, 3)), q_len=111)

# Score modifiers.
add("softcap", "Gemma-2, 50", given(softcap=50.0), simd=True)
add("softcap-tight", "tanh saturates", given(softcap=0.5, scale=2.0), q_len=111)
add("softcap-tiny-scores", "tanh near 0", given(softcap=1e4))
add("softcap-f64", "Gemma-2", given(softcap=3.0, causal=True, align="bottom_right"), dtype="float64")
add("softcap-f16", "Gemma-2", given(softcap=3.0), dtype="float16")
add("softcap-bias", "cap before bias", both(given(softcap=1.5), bias(1, 2, 3)))
add("alibi", "BLOOM", given(alibi_slopes=slopes(4), causal=True), heads=(4, 4), q_len=111, simd=True)
add("alibi-full", "symmetric, bottom right", given(alibi_slopes=slopes(2), align="bottom_right"))
add("alibi-tl", "symmetric, top left", given(alibi_slopes=slopes(2), align="top_left"), q_len=203, kv_len=63)
add("alibi-batch", "slopes (B, Hq)", lambda rng, c: {"alibi_slopes": rng.random((2, 4)), "align": 9}, heads=(4, 2))
add("alibi-f64", "BLOOM", given(alibi_slopes=slopes(2).astype(np.float64), causal=True), q_len=111, dtype="float64")
add(
    "alibi-bfloat16",
    "BLOOM",
    given(alibi_slopes=slopes(2).astype(ml_dtypes.bfloat16), causal=True),
    q_len=111,
    dtype="bfloat16",
)
add(
    "alibi-lengths",
    "distances within each length",
    both(lengths([111, 40], [63, 20]), given(alibi_slopes=slopes(2), align="bottom_right")),
)
add("sinks", "GPT-OSS", sinks(causal=True), heads=(4, 2), q_len=111, simd=True)
add("sinks-empty-rows", "lse is the sink", sinks(causal=True, align="bottom_right"), q_len=239, kv_len=63)
add("sinks-f64", "GPT-OSS", sinks("float64"), dtype="float64")
add("sinks-f16", "GPT-OSS", sinks("float16"), dtype="float16")
add("sinks-minus-inf", "a sink of -inf is none", given(sinks=np.array([-np.inf, 1.0], np.float32)))
add("sinks-large", "the sink takes nearly all", given(sinks=np.array([80.0, -80.0], np.float32), softcap=5.0))
add("sinks-padding", "no sink past q_length", both(lengths([111, 40], [63, 20]), sinks()))
for _dtype in DTYPES:
    add(
        f"dropout-{_dtype}",
        "Philox4x32-10",
        given(dropout_p=0.3, seed=1234),
        dtype=_dtype,
        heads=(4, 2),
        simd=_dtype == "float32",
    )
add("dropout-heavy", "Philox4x32-10", given(dropout_p=0.9, seed=0, causal=True), q_len=111)
add("dropout-sinks", "sinks are not dropped", sinks(dropout_p=0.5, seed=2**31 + 7))
add("score-mod-cap", "FlexAttention soft cap", given(score_mod=cap_30), q_len=111, kv_len=203, simd=True)
add("score-mod-alibi", "FlexAttention ALiBi", given(score_mod=alibi_by_hand, causal=True), q_len=111, heads=(4, 2))
add("score-mod-table", "learned relative positions", with_aux(table_by_distance, "hd"), q_len=111, kv_len=203)
add("score-mod-two-tables", "aux of both precisions", with_aux(two_tables, "bi", "j", dtype="float64"))
add("score-mod-f16-table", "aux of float16", with_aux(two_tables, "bi", "j", dtype="float16"), dtype="float16")
add("score-mod-hides", "-inf by na.where", given(score_mod=hides_odd_keys))
add("score-mod-hides-branch", "-inf by a branch, row 0 sees one key", given(score_mod=hides_the_future))
add("score-mod-hides-all", "every row empty", given(score_mod=hides_all))
add("score-mod-functions", "math.*", given(score_mod=many_functions, scale=1.0), q_len=111)
add("score-mod-functions-f64", "math.*", given(score_mod=many_functions, scale=1.0), dtype="float64")
add("score-mod-limits", "min, max", given(score_mod=limits))
add("score-mod-f64", "FlexAttention soft cap", given(score_mod=cap_30, scale=20.0), dtype="float64")
add("score-mod-bfloat16", "FlexAttention soft cap", given(score_mod=cap_30), dtype="bfloat16")
add("score-mod-bias", "score_mod sees the bias", both(bias(1, 2, 3, hidden=0.1), given(score_mod=cap_30)))
add("everything", "every option, the order of section 2", everything, q_len=111, kv_len=203, heads=(4, 2), simd=True)
add("everything-f64", "every option", everything, q_len=63, kv_len=203, heads=(4, 2), dtype="float64")

# Scale, sizes of the numbers.
add("scale-zero", "uniform over the visible", given(scale=0.0, causal=True), q_len=111)
add("scale-negative", "largest becomes smallest", given(scale=-0.4), q_len=111, kv_len=203)
add("scale-large", "nearly one-hot", given(scale=30.0), q_len=111, kv_len=203)
add("logits-50", "q * 50", spread=50.0, q_len=111, kv_len=203, dims=(64, 64))
add("logits-50-causal", "q * 50", given(causal=True), spread=50.0, q_len=239, kv_len=239, dims=(64, 64))
add("logits-50-f64", "q * 50", spread=50.0, dtype="float64")
add("logits-50-bfloat16", "q * 50", spread=50.0, dtype="bfloat16")
add("uniform", "inputs in [0, 1)", draw="uniform", q_len=111, kv_len=799)
add("uniform-f16", "inputs in [0, 1)", draw="uniform", q_len=63, kv_len=799, dtype="float16")

# Layouts.
for _layout in ("bhsd", "bshd"):
    add(
        f"layout-{_layout}",
        "layout",
        both(bool_mask(0, 1, 2, 3), given(causal=True, align="bottom_right")),
        heads=(4, 2),
        layout=_layout,
    )
    add(f"layout-{_layout}-f16", "layout", bias(0, 3), heads=(4, 2), layout=_layout, dtype="float16")
for _layout in ("hsd", "shd"):
    add(
        f"layout-{_layout}",
        "layout",
        both(bool_mask(1, 2, 3), bias(2, 3), sinks()),
        heads=(4, 2),
        batch=1,
        layout=_layout,
    )
    add(
        f"layout-{_layout}-bfloat16",
        "layout",
        given(causal=True, align="top_left"),
        heads=(4, 2),
        batch=1,
        layout=_layout,
        dtype="bfloat16",
    )
    add(f"layout-{_layout}-lengths", "layout", lengths([50], [40]), batch=1, layout=_layout)
add(
    "layout-sd",
    "one head",
    both(bool_mask(2, 3), bias(2, 3), sinks(alibi_slopes=slopes(1), align="top_left")),
    heads=(1, 1),
    batch=1,
    layout="sd",
)
add("layout-sd-causal", "one head", given(causal=True), heads=(1, 1), batch=1, q_len=111, layout="sd", dtype="float64")

# Empty sizes.
add("empty-dv", "Dv == 0", dims=(40, 0))
add("empty-q", "Sq == 0", q_len=0)
add("empty-k", "Sk == 0", kv_len=0)
add("empty-k-sinks", "Sk == 0 with a sink", sinks(), kv_len=0)
add("empty-k-causal", "Sk == 0", given(causal=True, align="bottom_right"), kv_len=0, dtype="float16")
add("empty-batch", "B == 0", batch=0)
add("empty-both", "Sq == Sk == 0", given(causal=True), q_len=0, kv_len=0, dtype="float64")
add("one-pair", "1 x 1 x 1", q_len=1, kv_len=1, dims=(1, 1), batch=1, heads=(1, 1))

# Large enough for several tiles, several sub-tiles and the parallel path.
add("parallel", "parallel path", q_len=777, kv_len=1003, dims=(64, 64), heads=(4, 2))
add("parallel-causal", "parallel path", given(causal=True), q_len=777, kv_len=777, dims=(64, 64), heads=(4, 2))
add(
    "parallel-bfloat16",
    "parallel path",
    given(causal=True),
    q_len=777,
    kv_len=777,
    dims=(64, 64),
    heads=(4, 2),
    dtype="bfloat16",
)
add("parallel-everything", "parallel path", everything, q_len=300, kv_len=500, dims=(64, 80), heads=(4, 2))

BY_NAME = {case.name: case for case in CASES}
SIMD_CASES = [case for case in CASES if case.simd]
assert len(BY_NAME) == len(CASES), "two cases share a name"


def variant(of: str, **changes: Any) -> Case:
    """A case of the table with some fields replaced (a smaller length, another dtype)."""
    return replace(BY_NAME[of], **changes)
