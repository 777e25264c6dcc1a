"""What the kernels need of a mask. Wherever the parts allow it, that is one run of keys [start, end) for each query, so
that tiles outside are never read. Elsewhere each pair is tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from .parts import Aligned, Causal, Intervals, Lengths, MaskMod, Pairs, Part, Prefix, Segments, Varlen, Window
from .shape import (
    BATCH,
    K_LEN,
    K_START,
    N_PLACE,
    OFFSET,
    OPEN,
    PREFIX,
    Q_LEN,
    Q_START,
    SEQUENCE_FIELDS,
    Align,
    Shape,
    check_align_batch,
    over_pairs,
    show,
)


class Lowered(NamedTuple):
    """What the kernels need of a mask; the fields are `Problem`'s, where they are described."""

    left: int
    right: int
    has_prefix: bool
    sequences: Array
    start: Array | None
    end: Array | None
    segments: tuple[tuple[Array, Array], ...]
    masks: tuple[Array, ...]
    mask_mods: tuple[tuple[Callable[..., Any], tuple[Array, ...]], ...]


@lru_cache(maxsize=64)
def whole_rows(batch: int, q_len: int, kv_len: int, offset: int) -> Array:
    """One sequence a batch row: what a call without lengths or varlen has. Calls share the array: do not write to
    it."""
    rows = np.zeros((batch, len(SEQUENCE_FIELDS)), np.int64)
    rows[:, BATCH] = np.arange(batch)
    rows[:, Q_LEN] = q_len
    rows[:, K_LEN] = kv_len
    rows[:, OFFSET] = offset
    return rows


def ambiguous(what: str, q_length: int, kv_length: int) -> ValueError:
    """The error for an align that was left out where it matters."""
    return ValueError(
        f"align is None, but {what} needs it where a sequence has {q_length} queries and {kv_length} keys. It takes\n"
        f"  'bottom_right': the last query stands at the last key, offset {kv_length - q_length}: "
        "new tokens after a KV cache, chunked prefill, flash-attention;\n"
        "  'top_left': query 0 stands at key 0, offset 0: "
        "prefill from the start, whatever keys lie beyond the queries, torch's is_causal, JAX;\n"
        "  or the offset itself, an int or (B,) ints."
    )


def unused_align() -> ValueError:
    """The error for an align that would be ignored."""
    return ValueError(
        "align is given, but nothing uses it; it takes causal, window, prefix or alibi_slopes beside it, or None"
    )


def lower(parts: Sequence[Part], align: Align, shape: Shape, alibi: bool) -> Lowered:
    """The intersection of `parts` as bounds, sequences and tests of pairs. `align` is the call's own.

    Raises
    ------
    TypeError, ValueError
        If a part does not fit `shape`, align is missing where it matters, unused, or two parts disagree about it.
    """
    check_align_batch(align, "align", shape)
    for part in parts:
        part.check(shape)
    pieces = _pieces(parts, shape)
    rows = np.zeros((pieces.shape[0], len(SEQUENCE_FIELDS)), np.int64)
    rows[:, :N_PLACE] = pieces

    left = right = OPEN
    prefix_rows: Array | None = None
    start: Array | None = None
    end: Array | None = None
    users: list[tuple[str, Align]] = [("alibi_slopes", align)] if alibi else []
    indifferent = False  # an open window accepts an align and does not use it
    for part in parts:
        if isinstance(part, Aligned):
            if isinstance(part, Window) and part.left is None and part.right is None:
                indifferent = True
                continue
            users.append((repr(part), align if part.align is None else part.align))
        if isinstance(part, Causal):
            right = 0
        elif isinstance(part, Window):
            left = min(left, OPEN if part.left is None else part.left)
            right = min(right, OPEN if part.right is None else part.right)
        elif isinstance(part, Prefix):
            n = np.full(pieces.shape[0], part.n) if isinstance(part.n, int) else part.n[pieces[:, BATCH]]
            prefix_rows = n if prefix_rows is None else np.minimum(prefix_rows, n)
        elif isinstance(part, Intervals) or (isinstance(part, Segments) and part.runs is not None):
            first, last = part.bounds if isinstance(part, Intervals) else (x[:, None, :] for x in part.runs or ())
            start = first if start is None else np.maximum(start, first)
            end = last if end is None else np.minimum(end, last)
    if align is not None and not users and not indifferent:
        raise unused_align()
    if users:
        rows[:, OFFSET] = _offset(users, align, rows)
    if prefix_rows is not None:
        prefix_rows = np.minimum(prefix_rows, rows[:, K_LEN])
        if right == 0 or not prefix_rows.any():  # causal hides all that only the prefix shows
            right, prefix_rows = 0, None
        else:
            rows[:, PREFIX] = prefix_rows
    if start is not None and end is not None:
        common = np.broadcast_shapes(start.shape, end.shape)
        start, end = (np.ascontiguousarray(np.broadcast_to(x, common)) for x in (start, end))
    return Lowered(
        left=left,
        right=right,
        has_prefix=prefix_rows is not None,
        sequences=rows,
        start=start,
        end=end,
        segments=tuple((p.q_ids, p.kv_ids) for p in parts if isinstance(p, Segments) and p.runs is None),
        masks=tuple(over_pairs(p.mask, "mask", shape) for p in parts if isinstance(p, Pairs)),
        mask_mods=tuple((p.fn, p.aux) for p in parts if isinstance(p, MaskMod)),
    )


def _pieces(parts: Sequence[Part], shape: Shape) -> Array:
    """Where the sequences lie, (n, N_PLACE). Two parts that make sequences make their common
    refinement."""
    pieces: Array | None = None
    for part in parts:
        if isinstance(part, (Lengths, Varlen)):
            more = part.pieces(shape)
            pieces = more if pieces is None else _refined(pieces, more, shape.batch)
    return whole_rows(shape.batch, shape.q_len, shape.kv_len, 0)[:, :N_PLACE] if pieces is None else pieces


def _refined(first: Array, second: Array, batch: int) -> Array:
    """The common refinement of two lists of sequences."""
    none = np.zeros((0, N_PLACE), np.int64)
    return np.concatenate([none, *(_refined_row(first, second, b) for b in range(batch))])


def _refined_row(a: Array, c: Array, b: int) -> Array:
    """The intersections of two lists of sequences in batch row b, those with a query."""
    a, c = a[a[:, BATCH] == b][:, None, :], c[c[:, BATCH] == b][None, :, :]
    rows = np.zeros((a.shape[0], c.shape[1], N_PLACE), np.int64)
    rows[..., BATCH] = b
    for start, length in ((Q_START, Q_LEN), (K_START, K_LEN)):
        first = np.maximum(a[..., start], c[..., start])
        last = np.minimum(a[..., start] + a[..., length], c[..., start] + c[..., length])
        rows[..., start] = first
        rows[..., length] = np.maximum(last - first, 0)
    return rows[rows[..., Q_LEN] > 0]


def _offset(users: Sequence[tuple[str, Align]], align: Align, rows: Array) -> Array:
    """The offset of every sequence, on which all that use it must agree."""
    q_len, k_len = rows[:, Q_LEN], rows[:, K_LEN]
    has_pairs = (q_len > 0) & (k_len > 0)
    first: tuple[str, Align, Array] | None = None
    asked: list[tuple[str, Align]] = list(users)
    if align is not None and all(a is not align for _, a in users):
        asked.append(("the call", align))  # not used, but it must not differ
    for what, own in asked:
        if own is None:
            unlike = np.flatnonzero(has_pairs & (q_len != k_len))
            if unlike.size:
                raise ambiguous(what, int(q_len[unlike[0]]), int(k_len[unlike[0]]))
            offset = np.zeros_like(q_len)
        elif isinstance(own, str):
            offset = k_len - q_len if own == "bottom_right" else np.zeros_like(q_len)
        else:
            offset = np.full_like(q_len, own) if isinstance(own, int) else own[rows[:, BATCH]]
        if first is None:
            first = what, own, offset
            continue
        named = isinstance(own, str) and isinstance(first[1], str) and own != first[1]
        if named or (offset != first[2])[has_pairs].any():
            raise ValueError(
                f"align differs: {show(first[1])} for {first[0]} and {show(own)} for {what}; "
                "a call has one offset for each sequence, so give align once"
            )
        if first[1] is None:
            first = what, own, offset
    assert first is not None
    return first[2]
