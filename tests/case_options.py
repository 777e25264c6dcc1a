"""How the options of a case are drawn: masks, biases, modifiers, and the users' functions among them.

A builder, `Options`, gives the keyword arguments of a case from a generator of random numbers and the case's shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

import numba_attn as na

if TYPE_CHECKING:
    from cases import Case

Options = Callable[[np.random.Generator, "Case"], dict[str, Any]]
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def nothing(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    return {}


# ---- user functions: module-level, so that they are recognised from call to call ----


def cap_30(s, b, h, i, j):
    return 30.0 * math.tanh(s / 30.0)


def alibi_by_hand(s, b, h, i, j):
    return s - 0.125 * (h + 1) * abs(i - j)


def table_by_distance(s, b, h, i, j, table):
    return s + table[h, abs(i - j)]


def two_tables(s, b, h, i, j, row, column):
    return s * row[b, i] + column[j]


def hides_odd_keys(s, b, h, i, j):
    return na.where(j % 2 == 1, -math.inf, s)


def hides_the_future(s, b, h, i, j):
    return s if j <= i else -math.inf


def hides_all(s, b, h, i, j):
    return -math.inf


def many_functions(s, b, h, i, j):
    x = abs(s) + 1.0
    return math.log(x) * math.sin(s) + math.sqrt(x) * math.cos(s) - math.exp(-x) + math.log1p(x) + math.pow(x, 0.75)


def limits(s, b, h, i, j):
    return max(min(s, 0.5), -0.5)


def checkerboard(b, h, i, j):
    return (i + j) % 2 == 0


def dilated_causal(b, h, i, j):
    return j <= i and (i - j) % (h + 2) == 0


def dilated(b, h, i, j):
    return (i - j) % (h + 2) == 0


def same_document(b, h, i, j, q_doc, kv_doc):
    return q_doc[i] == kv_doc[j]


def block_table(b, h, i, j, table):
    return table[h, i // 16, j // 16]


def first_batch_row_only(b, h, i, j):
    return b == 0


def nothing_visible(b, h, i, j):
    return j < 0


# ---- drawing options ----


def bool_mask(*axes: int, density: float = 0.5) -> Options:
    """A random mask over the given axes of (B, H, Sq, Sk) written from the right, e.g. (0, 3) is (B, 1, 1, Sk)."""

    def options(rng: np.random.Generator, case: Case) -> dict[str, Any]:
        shape = [n if axis in axes else 1 for axis, n in enumerate(case.mask_shape)]
        return {"mask": rng.random(shape[4 - len_from(axes, case) :]) < density}

    return options


def len_from(axes: tuple[int, ...], case: Case) -> int:
    """How many axes to spell out: from the first one used to the last of all."""
    return max(4 - min(axes, default=3), 1)


def bias(*axes: int, dtype: str = "float32", hidden: float = 0.0, size: float = 1.0) -> Options:
    def options(rng: np.random.Generator, case: Case) -> dict[str, Any]:
        shape = [n if axis in axes else 1 for axis, n in enumerate(case.mask_shape)]
        shape = shape[4 - len_from(axes, case) :]
        x = size * rng.standard_normal(shape)
        x[rng.random(shape) < hidden] = -np.inf
        return {"bias": x.astype(DTYPES[dtype])}

    return options


def lengths(kv: list[int], q: list[int] | None = None, **more: Any) -> Options:
    return lambda rng, case: {"mask": na.lengths(np.array(kv), None if q is None else np.array(q)), **more}


def varlen(cu_q: list[int], cu_k: list[int], **more: Any) -> Options:
    return lambda rng, case: {"mask": na.varlen(np.array(cu_q), np.array(cu_k)), **more}


def given(**options: Any) -> Options:
    return lambda rng, case: dict(options)


def slopes(heads: int) -> np.ndarray:
    """The slopes of the ALiBi paper (Press et al. 2022) for a power of two, the same formula between."""
    return (2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)).astype(np.float32)


def random_intervals(*axes: int, dtype: type = np.int64) -> Options:
    def options(rng: np.random.Generator, case: Case) -> dict[str, Any]:
        shape = tuple(case.mask_shape[axis] for axis in axes)
        start, end = rng.integers(0, case.kv_len + 1, shape), rng.integers(0, case.kv_len + 1, shape)
        swap = rng.random(shape) < 0.3  # the others may be empty, start >= end
        start, end = np.where(swap, np.minimum(start, end), start), np.where(swap, np.maximum(start, end), end)
        return {"mask": na.intervals(start.astype(dtype), end.astype(dtype))}

    return options


def sorted_segments(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    q_ids, kv_ids = np.sort(rng.integers(0, 6, case.q_len)), np.sort(rng.integers(0, 6, case.kv_len))
    return {"mask": na.segments(q_ids, kv_ids)}


def shuffled_segments(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    q_ids = rng.integers(-3, 3, (case.batch, case.q_len))
    return {"mask": na.segments(q_ids, rng.integers(-3, 3, (case.batch, case.kv_len)))}


def segments_half_sorted(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    q_ids, kv_ids = rng.integers(0, 4, case.q_len), np.sort(rng.integers(0, 4, (case.batch, case.kv_len)), axis=1)
    return {"mask": na.segments(q_ids, kv_ids)}


def banded_mask(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """Whole tiles full, whole tiles empty, and edges that cut tiles: what a tile-skipping loop has to tell apart."""
    i, j = np.ogrid[: case.q_len, : case.kv_len]
    return {"mask": ((i // 100) == (j // 150)) | (j < 3)}


def everything(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """Every option at once: their order is part of the definition."""
    _, h, sq, sk = case.mask_shape
    return {
        "causal": True,
        "window": (150, None),
        "align": "bottom_right",
        "mask": na.lengths(np.array([sk, sk - 17]), np.array([sq, sq - 5])) & na.mask_mod(dilated),
        "bias": np.where(rng.random((h, 1, sk)) < 0.1, -np.inf, rng.standard_normal((h, 1, sk))).astype(np.float32),
        "softcap": 4.0,
        "alibi_slopes": slopes(h),
        "sinks": rng.standard_normal(h).astype(np.float32),
        "score_mod": table_by_distance,
        "aux": (rng.standard_normal((h, max(sq, sk))).astype(np.float32),),
        "dropout_p": 0.25,
        "seed": 11,
        "scale": -0.2,
    }


def with_aux(fn: Callable, *shapes: str, option: str = "score_mod", dtype: str = "float32") -> Options:
    """`fn` with one normal-distributed table for each shape, spelt in the letters b, h, i, j and d = max(Sq, Sk)."""

    def options(rng: np.random.Generator, case: Case) -> dict[str, Any]:
        sizes = dict(zip("bhij", case.mask_shape, strict=True), d=max(case.q_len, case.kv_len))
        tables = tuple(rng.standard_normal([sizes[c] for c in shape]).astype(DTYPES[dtype]) for shape in shapes)
        return {option: fn, "aux": tables}

    return options


def documents(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    aux = (rng.integers(0, 3, case.q_len).astype(np.int32), rng.integers(0, 3, case.kv_len).astype(np.int32))
    return {"mask": na.mask_mod(same_document, aux=aux)}


def blocks(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    shape = (case.heads[0], case.q_len // 16 + 1, case.kv_len // 16 + 1)
    return {"mask": na.mask_mod(block_table, aux=(rng.random(shape) < 0.4,))}


def sinks(dtype: str = "float32", **more: Any) -> Options:
    def options(rng: np.random.Generator, case: Case) -> dict[str, Any]:
        return {"sinks": rng.standard_normal(case.heads[0]).astype(DTYPES[dtype]), **more}

    return options


def both(*builders: Options) -> Options:
    """Several builders on one call; masks meet in `&`."""

    def options(rng: np.random.Generator, case: Case) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for builder in builders:
            one = builder(rng, case)
            if "mask" in one and "mask" in merged:
                one["mask"] = merged["mask"] & one["mask"]
            merged.update(one)
        return merged

    return options
