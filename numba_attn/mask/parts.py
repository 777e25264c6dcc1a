"""The parts of a mask. Each is a record of its arguments with the check of these (`check`) and its textbook formula as
a dense bool array (`visible`).

The reference and `Mask.dense` read the formulas. The kernels read what lowering.py makes of the records. lowering.py
shares no arithmetic with the formulas, so that the tests can compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..arrays import Array
from ..userfn.accepted import check_function, plain_function, widened
from .shape import (
    BATCH,
    K_LEN,
    K_START,
    N_PLACE,
    OPEN,
    Q_LEN,
    Q_START,
    Align,
    Positions,
    Shape,
    check_align_batch,
    check_range,
    over_pairs,
    show,
    show_align,
)


def _unpadded(x: Array) -> tuple[int, ...]:
    return x.shape[1:] if x.shape[0] == 1 else x.shape


@dataclass(frozen=True, eq=False)
class Causal:
    """j <= i + offset."""

    align: Align = None

    def __repr__(self) -> str:
        return f"causal({show_align(self.align, '')})"

    def check(self, shape: Shape) -> None:
        check_align_batch(self.align, f"align of {self!r}", shape)

    def visible(self, at: Positions) -> Array:
        return at.j[:, None, None, :] <= (at.i + at.offset(self.align))[:, None, :, None]


@dataclass(frozen=True, eq=False)
class Window:
    """i + offset - left <= j <= i + offset + right."""

    left: int | None
    right: int | None
    align: Align = None

    def __repr__(self) -> str:
        return f"window({self.left}, {self.right}{show_align(self.align)})"

    def check(self, shape: Shape) -> None:
        check_align_batch(self.align, f"align of {self!r}", shape)

    def visible(self, at: Positions) -> Array:
        diagonal = (at.i + at.offset(self.align))[:, None, :, None]
        j = at.j[:, None, None, :]
        after = True if self.left is None else j >= diagonal - min(self.left, OPEN)
        before = True if self.right is None else j <= diagonal + min(self.right, OPEN)
        return np.asarray(np.broadcast_to(np.logical_and(after, before), np.broadcast_shapes(diagonal.shape, j.shape)))


@dataclass(frozen=True, eq=False)
class Prefix:
    """j < n or j <= i + offset."""

    n: int | Array
    align: Align = None

    def __repr__(self) -> str:
        return f"prefix({show(self.n)}{show_align(self.align)})"

    def check(self, shape: Shape) -> None:
        check_align_batch(self.align, f"align of {self!r}", shape)
        if not isinstance(self.n, int) and self.n.shape != (shape.batch,):
            raise ValueError(
                f"n of prefix has shape {self.n.shape}; it takes an int or ints of shape (B,) = ({shape.batch},)"
            )

    def visible(self, at: Positions) -> Array:
        j = at.j[:, None, None, :]
        return (j < np.reshape(self.n, (-1, 1, 1, 1))) | Causal(self.align).visible(at)


@dataclass(frozen=True, eq=False)
class Lengths:
    """j < kv_lengths[b] and i < q_lengths[b]."""

    kv_lengths: Array
    q_lengths: Array | None = None

    def __repr__(self) -> str:
        return f"lengths({show(self.kv_lengths)}" + (")" if self.q_lengths is None else f", {show(self.q_lengths)})")

    def check(self, shape: Shape) -> None:
        for name, given, axis, size in (
            ("kv_lengths", self.kv_lengths, "Sk", shape.kv_len),
            ("q_lengths", self.q_lengths, "Sq", shape.q_len),
        ):
            if given is None:
                continue
            if given.shape != (shape.batch,):
                raise ValueError(
                    f"{name} has shape {given.shape}; it takes one length for each batch row: (B,) = ({shape.batch},)"
                )
            check_range(given, name, size, axis)

    def sequences_of(self, shape: Shape) -> tuple[Array, Array]:
        """The sequence of every query (B, Sq) and key (B, Sk): 0, or -1 past the lengths."""
        i, j = np.arange(shape.q_len), np.arange(shape.kv_len)
        q_lengths = np.full(shape.batch, shape.q_len) if self.q_lengths is None else self.q_lengths
        return np.where(i < q_lengths[:, None], 0, -1), np.where(j < self.kv_lengths[:, None], 0, -1)

    def visible(self, at: Positions) -> Array:
        q, k = self.sequences_of(at.shape)
        return _same_sequence(q, k)

    def pieces(self, shape: Shape) -> Array:
        """Where the sequences lie, (B, N_PLACE)."""
        rows = np.zeros((shape.batch, N_PLACE), np.int64)
        rows[:, BATCH] = np.arange(shape.batch)
        rows[:, Q_LEN] = shape.q_len if self.q_lengths is None else self.q_lengths
        rows[:, K_LEN] = self.kv_lengths
        return rows


@dataclass(frozen=True, eq=False)
class Varlen:
    """Query i and key j lie in the same run of cu_q and cu_k."""

    cu_q: Array
    cu_k: Array

    def __repr__(self) -> str:
        return f"varlen({show(self.cu_q)}, {show(self.cu_k)})"

    def check(self, shape: Shape) -> None:
        for name, given, axis, size in (
            ("cu_q", self.cu_q, "Sq", shape.q_len),
            ("cu_k", self.cu_k, "Sk", shape.kv_len),
        ):
            if given[-1] > size:
                raise ValueError(f"{name} ends at {given[-1]}; it may not go past {axis} = {size}")

    def sequences_of(self, shape: Shape) -> tuple[Array, Array]:
        """The sequence of every query (B, Sq) and key (B, Sk), -1 past the last."""

        def run(cu: Array, size: int) -> Array:
            index = np.arange(size)
            return np.where(index < cu[-1], np.searchsorted(cu, index, side="right") - 1, -1)

        q, k = run(self.cu_q, shape.q_len), run(self.cu_k, shape.kv_len)
        return np.broadcast_to(q, (shape.batch, q.size)), np.broadcast_to(k, (shape.batch, k.size))

    def visible(self, at: Positions) -> Array:
        q, k = self.sequences_of(at.shape)
        return _same_sequence(q, k)

    def pieces(self, shape: Shape) -> Array:
        """Where the sequences lie, (B * n, N_PLACE)."""
        n = self.cu_q.size - 1
        rows = np.zeros((shape.batch, n, N_PLACE), np.int64)
        rows[:, :, BATCH] = np.arange(shape.batch)[:, None]
        for start, length, cu in ((Q_START, Q_LEN, self.cu_q), (K_START, K_LEN, self.cu_k)):
            rows[:, :, start] = cu[:-1]
            rows[:, :, length] = np.diff(cu)
        return rows.reshape(-1, N_PLACE)


@dataclass(frozen=True, eq=False)
class Segments:
    """q_ids[b, i] == kv_ids[b, j]."""

    q_ids: Array  # (1 or B, Sq)
    kv_ids: Array  # (1 or B, Sk)

    def __repr__(self) -> str:
        return f"segments({show(self.q_ids)}, {show(self.kv_ids)})"

    def check(self, shape: Shape) -> None:
        for name, given, axis, size in (
            ("q_ids", self.q_ids, "Sq", shape.q_len),
            ("kv_ids", self.kv_ids, "Sk", shape.kv_len),
        ):
            if given.shape[1] != size or given.shape[0] not in (1, shape.batch):
                raise ValueError(
                    f"{name} of segments has shape {_unpadded(given)}; it takes one id for each position: "
                    f"({axis},) = ({size},) or (B, {axis}) = ({shape.batch}, {size})"
                )

    def visible(self, at: Positions) -> Array:
        return self.q_ids[:, None, :, None] == self.kv_ids[:, None, None, :]

    @cached_property
    def runs(self) -> tuple[Array, Array] | None:
        """start and end (1 or B, Sq) of the run of keys with each query's id; None where an id comes in more than one
        run."""
        batches = self.q_ids.shape[0], self.kv_ids.shape[0]
        batch = min(batches) and max(batches)
        start, end = np.zeros((2, batch, self.q_ids.shape[1]), np.int64)
        for b in range(batch):
            q, k = self.q_ids[b % self.q_ids.shape[0]], self.kv_ids[b % self.kv_ids.shape[0]]
            if k.size == 0:
                continue
            first = np.flatnonzero(np.concatenate(([True], k[1:] != k[:-1])))  # where each run of equal ids starts
            last = np.append(first[1:], k.size)
            order = np.argsort(k[first], kind="stable")
            ids = k[first][order]
            if (ids[1:] == ids[:-1]).any():
                return None
            at = np.minimum(np.searchsorted(ids, q), ids.size - 1)
            known = ids[at] == q
            start[b] = np.where(known, first[order][at], 0)
            end[b] = np.where(known, last[order][at], 0)
        return start, end


@dataclass(frozen=True, eq=False)
class Intervals:
    """start[b, h, i] <= j < end[b, h, i]."""

    start: Array
    end: Array

    def __repr__(self) -> str:
        return f"intervals({show(self.start)}, {show(self.end)})"

    @cached_property
    def highest(self) -> tuple[int, int]:
        """The largest start and end: the arrays may be as large as the queries, and are searched once, not at every
        call."""
        return int(self.start.max(initial=0)), int(self.end.max(initial=0))

    def check(self, shape: Shape) -> None:
        full = (shape.batch, shape.q_heads, shape.q_len)
        rows = (shape.batch, shape.q_len)
        for name, given, highest in (("start", self.start, self.highest[0]), ("end", self.end, self.highest[1])):
            if given.shape not in (rows[1:], rows, full):
                raise ValueError(
                    f"{name} of intervals has shape {given.shape}; "
                    f"it takes (Sq,) = {rows[1:]}, (B, Sq) = {rows} or (B, Hq, Sq) = {full}"
                )
            if highest > shape.kv_len:
                raise ValueError(
                    f"{name} of intervals goes up to {highest}; "
                    f"it takes ints in [0, Sk] = [0, {shape.kv_len}] (start >= end is an empty row)"
                )

    @cached_property
    def bounds(self) -> tuple[Array, Array]:
        """start and end as (1 or B, 1 or Hq, Sq)."""

        def with_axes(x: Array) -> Array:
            return x if x.ndim == 3 else x[:, None, :] if x.ndim == 2 else x[None, None, :]

        return with_axes(self.start), with_axes(self.end)

    def visible(self, at: Positions) -> Array:
        j = np.arange(at.shape.kv_len)
        start, end = self.bounds
        return (start[..., None] <= j) & (j < end[..., None])


@dataclass(frozen=True, eq=False)
class Pairs:
    """mask[b, h, i, j]: the bool array itself."""

    mask: Array

    def __repr__(self) -> str:
        return f"<bool array {self.mask.shape}>"

    def check(self, shape: Shape) -> None:
        over_pairs(self.mask, "mask", shape)

    def visible(self, at: Positions) -> Array:
        return over_pairs(self.mask, "mask", at.shape)


@dataclass(frozen=True, eq=False)
class MaskMod:
    """fn(b, h, i, j, *aux)."""

    fn: Callable[..., Any]
    aux: tuple[Array, ...] = ()

    def __repr__(self) -> str:
        return f"mask_mod({getattr(self.fn, '__name__', self.fn)})"

    def check(self, shape: Shape) -> None:
        check_function(self.fn, "mask_mod", 4, len(self.aux))

    def visible(self, at: Positions) -> Array:
        size = (at.shape.batch, at.shape.q_heads, at.shape.q_len, at.shape.kv_len)
        fn, aux = plain_function(self.fn), tuple(widened(a) for a in self.aux)
        out = np.zeros(size, np.bool_)
        for b, h, i, j in np.ndindex(*size):
            out[b, h, i, j] = bool(fn(b, h, i, j, *aux))
        return out


Aligned = Causal | Window | Prefix  # the parts that count from the diagonal, and so have an align
Part = Aligned | Lengths | Varlen | Segments | Intervals | Pairs | MaskMod


# --- the dense formulas, combined -------------------------------------------------------------------------------------


def _same_sequence(q: Array, k: Array) -> Array:
    return (q[:, None, :, None] == k[:, None, None, :]) & (q >= 0)[:, None, :, None]


def positions(parts: Sequence[Part], shape: Shape) -> Positions:
    """Number the queries and keys of every sequence. Two parts that make sequences make their common refinement."""
    q_sequence = np.zeros((shape.batch, shape.q_len), np.int64)
    kv_sequence = np.zeros((shape.batch, shape.kv_len), np.int64)
    for part in parts:
        if isinstance(part, (Lengths, Varlen)):
            q, k = part.sequences_of(shape)
            more = 1 + max(q.max(initial=0), k.max(initial=0))
            q_sequence = np.where((q < 0) | (q_sequence < 0), -1, q_sequence * more + q)
            kv_sequence = np.where((k < 0) | (kv_sequence < 0), -1, kv_sequence * more + k)
    i, j = np.zeros_like(q_sequence), np.zeros_like(kv_sequence)
    q_length, kv_length = np.zeros_like(q_sequence), np.zeros_like(q_sequence)
    for b in range(shape.batch):
        for row, index in ((q_sequence[b], i[b]), (kv_sequence[b], j[b])):
            for n in np.unique(row[row >= 0]):
                index[row == n] = np.arange(np.count_nonzero(row == n))
        for n in np.unique(q_sequence[b]):
            q_length[b, q_sequence[b] == n] = np.count_nonzero(q_sequence[b] == n)
            kv_length[b, q_sequence[b] == n] = np.count_nonzero(kv_sequence[b] == n)
    return Positions(shape, q_sequence, kv_sequence, i, j, q_length, kv_length)


def dense(parts: Sequence[Part], align: Align, shape: Shape) -> Array:
    """The logical and of all formulas: bool (B, Hq, Sq, Sk), a broadcast view where heads or rows agree."""
    at = positions(parts, shape)
    visible: Any = np.ones((1, 1, shape.q_len, shape.kv_len), np.bool_)
    for part in parts:
        visible = visible & with_align(part, align).visible(at)
    return np.broadcast_to(visible, (shape.batch, shape.q_heads, shape.q_len, shape.kv_len))


def with_align(part: Part, align: Align) -> Part:
    """`part`, with the call's align if it takes an align and has none."""
    return replace(part, align=align) if isinstance(part, Aligned) and part.align is None else part
