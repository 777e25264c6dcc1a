"""Which pairs attend. A `Mask` is a record of parts that `&` combines: a pair is visible iff every part says so.

Each part knows three things: what it accepts (`check`), its textbook formula as a dense bool array (`visible`, read by
the reference and by people who want to look), and what the kernels need of it (`lower`, below): one run of keys [start,
end) for each query wherever the part allows it, so that the tiles outside are never touched, and a test of each pair
only where it does not. The two ways share no arithmetic, so that the tests can hold one against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from .arrays import FLOAT_NAMES, Array, integer, integers, plain
from .score import check_function, plain_function

OPEN = 2**62  # an absent bound: larger than any index, and i + offset - OPEN still fits in int64
_FAR = 2**60  # the largest offset, for the same reason

Align = str | int | Array | None

_NAMES = ("bottom_right", "top_left")
_ALIGN_TAKES = (
    "'bottom_right' (offset = kv_length - q_length), 'top_left' (offset = 0), or the offset itself, an int or (B,) ints"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that masks are checked against. `missing` counts the leading axes that the caller's layout lacks."""

    batch: int
    q_heads: int
    q_len: int
    kv_len: int
    missing: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """Where queries and keys stand: the sequence that each is in (-1: none) and its index from that sequence's
    start."""

    shape: Shape
    q_sequence: Array  # (B, Sq)
    kv_sequence: Array  # (B, Sk)
    i: Array  # (B, Sq)
    j: Array  # (B, Sk)
    q_length: Array  # (B, Sq): the number of queries in the query's sequence
    kv_length: Array  # (B, Sq): the number of keys in the query's sequence

    def offset(self, align: Align) -> Array:
        """The position of its sequence's query 0 among the keys, for every query: (B, Sq). An `align` that was left out
        is 0."""
        if align is None or (isinstance(align, str) and align == "top_left"):
            return np.zeros_like(self.i)
        if isinstance(align, str):
            return np.asarray(self.kv_length - self.q_length)
        return np.broadcast_to(np.reshape(align, (-1, 1)), self.i.shape)


# --- the parts --------------------------------------------------------------------------------------------------------


def _show(x: Any) -> str:
    return f"<int array {x.shape}>" if isinstance(x, np.ndarray) else repr(x)


@dataclass(frozen=True, eq=False)
class Causal:
    """j <= i + offset."""

    align: Align = None

    def __repr__(self) -> str:
        return f"causal({_show_align(self.align, '')})"

    def check(self, shape: Shape) -> None:
        _check_align_batch(self.align, f"align of {self!r}", shape)

    def visible(self, at: Positions) -> Array:
        return at.j[:, None, None, :] <= (at.i + at.offset(self.align))[:, None, :, None]


@dataclass(frozen=True, eq=False)
class Window:
    """i + offset - left <= j <= i + offset + right."""

    left: int | None
    right: int | None
    align: Align = None

    def __repr__(self) -> str:
        return f"window({self.left}, {self.right}{_show_align(self.align)})"

    def check(self, shape: Shape) -> None:
        _check_align_batch(self.align, f"align of {self!r}", shape)

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
        return f"prefix({_show(self.n)}{_show_align(self.align)})"

    def check(self, shape: Shape) -> None:
        _check_align_batch(self.align, f"align of {self!r}", shape)
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
        return f"lengths({_show(self.kv_lengths)}" + (")" if self.q_lengths is None else f", {_show(self.q_lengths)})")

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
            _check_range(given, name, size, axis)

    def sequences_of(self, shape: Shape) -> tuple[Array, Array]:
        """The sequence of every query (B, Sq) and key (B, Sk): 0, or -1 past the lengths."""
        i, j = np.arange(shape.q_len), np.arange(shape.kv_len)
        q_lengths = np.full(shape.batch, shape.q_len) if self.q_lengths is None else self.q_lengths
        return np.where(i < q_lengths[:, None], 0, -1), np.where(j < self.kv_lengths[:, None], 0, -1)

    def visible(self, at: Positions) -> Array:
        q, k = self.sequences_of(at.shape)
        return _same_sequence(q, k)

    def pieces(self, shape: Shape) -> Array:
        """(B, 5): batch, q_start, q_len, k_start, k_len."""
        rows = np.zeros((shape.batch, 5), np.int64)
        rows[:, 0] = np.arange(shape.batch)
        rows[:, 2] = shape.q_len if self.q_lengths is None else self.q_lengths
        rows[:, 4] = self.kv_lengths
        return rows


@dataclass(frozen=True, eq=False)
class Varlen:
    """Query i and key j lie in the same run of cu_q and cu_k."""

    cu_q: Array
    cu_k: Array

    def __repr__(self) -> str:
        return f"varlen({_show(self.cu_q)}, {_show(self.cu_k)})"

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
        """(B * n, 5): batch, q_start, q_len, k_start, k_len."""
        n = self.cu_q.size - 1
        rows = np.zeros((shape.batch, n, 5), np.int64)
        rows[:, :, 0] = np.arange(shape.batch)[:, None]
        for column, cu in ((1, self.cu_q), (3, self.cu_k)):
            rows[:, :, column] = cu[:-1]
            rows[:, :, column + 1] = np.diff(cu)
        return rows.reshape(-1, 5)


@dataclass(frozen=True, eq=False)
class Segments:
    """q_ids[b, i] == kv_ids[b, j]."""

    q_ids: Array  # (1 or B, Sq)
    kv_ids: Array  # (1 or B, Sk)

    def __repr__(self) -> str:
        return f"segments({_show(self.q_ids)}, {_show(self.kv_ids)})"

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
        return f"intervals({_show(self.start)}, {_show(self.end)})"

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


Part = Causal | Window | Prefix | Lengths | Varlen | Segments | Intervals | Pairs | MaskMod


def widened(a: Array) -> Array:
    """`a` with its numbers in float64 or int64, so that a user's function run in Python does not round or wrap in a
    narrow type."""
    if a.dtype.kind == "i" or (a.dtype.kind == "u" and a.dtype.itemsize < 8):
        return a.astype(np.int64)
    return a if a.dtype.kind in "bu" else a.astype(np.float64)


# --- the record and its constructors ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mask:
    """Which query-key pairs attend: a record of parts, made by `causal`, `window`, `lengths`, `varlen`, `segments`,
    `prefix`, `intervals` and `mask_mod`, and combined with `&`. A pair is visible iff every part says so; none is ever
    ignored.

    A bool array (True = attend, broadcastable to (B, Hq, Sq, Sk)) may stand on either side of `&`.

    Attributes
    ----------
    parts : tuple
        The parts, in the order in which they were combined. They hold int64 copies of what was passed, except bool
        arrays and aux arrays, which are kept as they are.

    Examples
    --------
    >>> import numba_attn as na
    >>> na.window(3, 0) & na.lengths([5, 2])
    Mask(window(3, 0) & lengths(<int array (2,)>))
    """

    parts: tuple[Part, ...] = ()

    __array_ufunc__ = None  # so that `array & mask` comes here, too, and not to NumPy's loop over elements

    def __and__(self, other: Any) -> Mask:
        if isinstance(other, Mask):
            return Mask(self.parts + other.parts)
        if isinstance(other, np.ndarray):
            return Mask((*self.parts, Pairs(bool_pairs(other, "mask"))))
        return NotImplemented

    def __rand__(self, other: Any) -> Mask:
        if isinstance(other, np.ndarray):
            return Mask((Pairs(bool_pairs(other, "mask")), *self.parts))
        return NotImplemented

    def __bool__(self) -> bool:
        raise TypeError("a Mask has no truth value: combine two with &, not with `and`")

    def __repr__(self) -> str:
        return f"Mask({' & '.join(map(repr, self.parts)) or 'everything'})"

    def dense(self, q_len: int, kv_len: int, *, batch: int = 1, q_heads: int = 1, align: Align = None) -> Array:
        """The mask as a bool array, from each part's own formula: to look at, or to test against.

        Parameters
        ----------
        q_len, kv_len : int
            Sq and Sk.
        batch, q_heads : int
            B and Hq.
        align : None, str, int or (B,) int array
            As in `attention`.

        Returns
        -------
        ndarray of bool, (B, Hq, Sq, Sk)
            True where query i of head h in batch row b may read key j.

        Raises
        ------
        ValueError, TypeError
            As `attention` would for these sizes.

        Examples
        --------
        >>> import numba_attn as na
        >>> na.causal(align="bottom_right").dense(2, 4)[0, 0].astype(int)
        array([[1, 1, 1, 0],
               [1, 1, 1, 1]])
        """
        shape = Shape(batch, q_heads, q_len, kv_len)
        checked = check_align(align, "align")
        lower(self.parts, checked, shape, alibi=False)
        return np.array(dense(self.parts, checked, shape))


def causal(align: Any = None) -> Mask:
    """Key j is visible to query i iff j <= i + offset.

    Parameters
    ----------
    align : "bottom_right", "top_left", int or (B,) ints, optional
        What the offset is: kv_length - q_length, 0, or the number itself, for each sequence. Without it, the call's
        align; that may be left out, too, only where both names agree for every sequence.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        If `align` is none of these.

    Examples
    --------
    >>> import numba_attn as na
    >>> na.causal().dense(3, 3)[0, 0].astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """
    return Mask((Causal(check_align(align, "align of causal")),))


def window(left: int | None, right: int | None, align: Any = None) -> Mask:
    """Key j is visible to query i iff i + offset - left <= j <= i + offset + right. Both ends are inclusive.

    Parameters
    ----------
    left, right : int >= 0 or None
        How many keys before and after the diagonal; None leaves that side open. Hugging Face's ``sliding_window=w`` is
        ``window(w - 1, 0)``.
    align : "bottom_right", "top_left", int or (B,) ints, optional
        As in `causal`.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        If a bound is negative (-1 does not mean open: None does) or no int, or `align` is none of the above.

    Examples
    --------
    >>> import numba_attn as na
    >>> na.window(1, 0).dense(4, 4)[0, 0].astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 1, 1, 0],
           [0, 0, 1, 1]])
    """
    return Mask((Window(_bound(left, "left"), _bound(right, "right"), check_align(align, "align of window")),))


def lengths(kv_lengths: Any, q_lengths: Any = None) -> Mask:
    """Padding: in batch row b only the first kv_lengths[b] keys, and the first q_lengths[b] queries, are there.

    Queries past q_lengths[b] give out 0 and lse -inf (a sink does not apply to them). Causal, window and ALiBi with
    ``align="bottom_right"`` count from these lengths, not from the array's.

    Parameters
    ----------
    kv_lengths : (B,) ints in [0, Sk]
    q_lengths : (B,) ints in [0, Sq], optional
        All Sq queries if left out.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError
        If the lengths are no integers.
    ValueError
        If they have the wrong shape or lie outside the arrays (the upper end is checked by the call).

    Examples
    --------
    >>> import numba_attn as na
    >>> na.lengths([2, 3]).dense(1, 4, batch=2)[:, 0, 0].astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 1, 0]])
    """
    q_row = None if q_lengths is None else _one_each(q_lengths, "q_lengths")
    return Mask((Lengths(_one_each(kv_lengths, "kv_lengths"), q_row),))


def varlen(cu_q: Any, cu_k: Any) -> Mask:
    """Packed sequences: sequence t has queries cu_q[t] to cu_q[t + 1] - 1 and keys cu_k[t] to cu_k[t + 1] - 1, and sees
    only itself.

    Causal, window, prefix and ALiBi count from each sequence's start. Queries past cu_q[-1] are in no sequence: out 0,
    lse -inf.

    Parameters
    ----------
    cu_q, cu_k : (n + 1,) ints
        The running sums of the lengths: from 0, never decreasing, at most Sq and Sk. They hold for every batch row (B
        is usually 1).

    Returns
    -------
    Mask

    Raises
    ------
    TypeError
        If they are no integers.
    ValueError
        If they differ in length, do not start at 0, decrease, or go past the arrays (which the call checks).

    Examples
    --------
    >>> import numba_attn as na
    >>> (na.varlen([0, 2, 3], [0, 2, 3]) & na.causal()).dense(3, 3)[0, 0].astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 0, 1]])
    """
    checked = []
    for name, given in (("cu_q", cu_q), ("cu_k", cu_k)):
        cu = integers(given, name, "ints of shape (n + 1,), the running sum of n lengths from 0")
        if cu.ndim != 1 or cu.size == 0:
            raise ValueError(f"{name} has shape {cu.shape}; it takes (n + 1,), the running sum of n lengths from 0")
        if cu[0] != 0:
            raise ValueError(f"{name} starts at {cu[0]}; the running sum of the lengths starts at 0")
        if (cu[1:] < cu[:-1]).any():
            t = int(np.argmax(cu[1:] < cu[:-1]))
            raise ValueError(
                f"{name} falls from {cu[t]} to {cu[t + 1]} at {t + 1}; a running sum of lengths never does"
            )
        checked.append(cu)
    if checked[0].size != checked[1].size:
        raise ValueError(
            f"cu_q has {checked[0].size} entries and cu_k {checked[1].size}; "
            "both take one more than the number of sequences"
        )
    return Mask((Varlen(*checked),))


def segments(q_ids: Any, kv_ids: Any) -> Mask:
    """Positions with equal ids see each other.

    Positions are not counted anew in each segment (with causal that makes no difference where q_ids is kv_ids): for
    packed sequences of different query and key lengths use `varlen`. Runs of equal ids cost nothing: keys outside are
    never touched.

    Parameters
    ----------
    q_ids : (Sq,) or (B, Sq) ints
    kv_ids : (Sk,) or (B, Sk) ints

    Returns
    -------
    Mask

    Raises
    ------
    TypeError
        If the ids are no integers.
    ValueError
        If their shape fits neither (which the call checks).

    Examples
    --------
    >>> import numba_attn as na
    >>> na.segments([7, 7, 9], [7, 9, 9]).dense(3, 3)[0, 0].astype(int)
    array([[1, 0, 0],
           [1, 0, 0],
           [0, 1, 1]])
    """
    checked = []
    for name, axis, given in (("q_ids", "Sq", q_ids), ("kv_ids", "Sk", kv_ids)):
        ids = integers(given, f"{name} of segments", f"ints of shape ({axis},) or (B, {axis})")
        if ids.ndim not in (1, 2):
            raise ValueError(f"{name} of segments has shape {ids.shape}; it takes ({axis},) or (B, {axis})")
        checked.append(ids if ids.ndim == 2 else ids[None, :])
    return Mask((Segments(*checked),))


def prefix(n: Any, align: Any = None) -> Mask:
    """Causal with a prefix that everybody sees (prefix-LM): key j is visible to query i iff j < n or j <= i + offset.

    Together with `causal` the prefix has no effect: both must say yes.

    Parameters
    ----------
    n : int >= 0 or (B,) ints
        The length of the prefix, counted from each sequence's start.
    align : "bottom_right", "top_left", int or (B,) ints, optional
        As in `causal`.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        If `n` is negative or no int, or `align` is none of the above.

    Examples
    --------
    >>> import numba_attn as na
    >>> na.prefix(2).dense(3, 3)[0, 0].astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """
    takes = "an int >= 0 or (B,) ints"
    checked: int | Array = integers(n, "n of prefix", takes)
    assert isinstance(checked, np.ndarray)
    if checked.ndim > 1:
        raise ValueError(f"n of prefix has shape {checked.shape}; it takes {takes}")
    _check_not_negative(checked, "n of prefix")
    return Mask((Prefix(int(checked) if checked.ndim == 0 else checked, check_align(align, "align of prefix")),))


def intervals(start: Any, end: Any) -> Mask:
    """Query i sees the keys start[i] <= j < end[i], array indices of the keys. start >= end is an empty row.

    Parameters
    ----------
    start, end : (Sq,), (B, Sq) or (B, Hq, Sq) ints in [0, Sk]
        The two may differ in shape.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError
        If they are no integers.
    ValueError
        If they have another shape or lie outside [0, Sk] (the upper end and the sizes are checked by the call).

    Examples
    --------
    >>> import numba_attn as na
    >>> na.intervals([0, 1, 2], [2, 3, 2]).dense(3, 3)[0, 0].astype(int)
    array([[1, 1, 0],
           [0, 1, 1],
           [0, 0, 0]])
    """
    checked = []
    for name, given in (("start", start), ("end", end)):
        bound = integers(given, f"{name} of intervals", "ints of shape (Sq,), (B, Sq) or (B, Hq, Sq)")
        if bound.ndim not in (1, 2, 3):
            raise ValueError(f"{name} of intervals has shape {bound.shape}; it takes (Sq,), (B, Sq) or (B, Hq, Sq)")
        _check_not_negative(bound, f"{name} of intervals")
        checked.append(bound)
    return Mask((Intervals(*checked),))


def mask_mod(fn: Callable[..., Any], aux: Sequence[Any] = ()) -> Mask:
    """A pair is visible iff fn(b, h, i, j, *aux) says so. The function is compiled into the kernel.

    Parameters
    ----------
    fn : function or Numba @njit function
        Called with array indices (h is the query head, i has no offset), always inside the arrays; returns a bool.
    aux : sequence of arrays
        Arrays that fn reads, of float, int or bool dtype. Pass them here: a closure over an array raises, since Numba
        would freeze its values.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError
        If `fn` is no Python function, takes another number of arguments or reads an array from its closure, or if aux
        holds anything but arrays.

    Examples
    --------
    >>> import numpy as np
    >>> import numba_attn as na
    >>> def same_colour(b, h, i, j, colour):
    ...     return colour[i] == colour[j]
    >>> mask = na.mask_mod(same_colour, aux=(np.array([0, 1, 0]),))
    >>> mask.dense(3, 3)[0, 0].astype(int)
    array([[1, 0, 1],
           [0, 1, 0],
           [1, 0, 1]])
    """
    if isinstance(fn, Mask) or not callable(fn):
        raise TypeError(f"fn of mask_mod is {fn!r}; it takes a function fn(b, h, i, j, *aux) -> bool")
    arrays = aux_arrays(aux, "aux of mask_mod")
    check_function(fn, "mask_mod", 4, len(arrays))
    return Mask((MaskMod(fn, arrays),))


# --- checks -----------------------------------------------------------------------------------------------------------


def _unpadded(x: Array) -> tuple[int, ...]:
    return x.shape[1:] if x.shape[0] == 1 else x.shape


def _show_align(align: Align, before: str = ", ") -> str:
    return "" if align is None else f"{before}align={_show(align)}"


def check_align(align: Any, name: str) -> Align:
    """`align` as None, one of its two names, an int, or a (B,) int64 array."""
    if align is None:
        return None
    if isinstance(align, str):
        if align in _NAMES:
            return align
        raise ValueError(f"{name} is {align!r}; it takes {_ALIGN_TAKES}")
    offset = integers(align, name, _ALIGN_TAKES)
    if offset.ndim > 1:
        raise ValueError(f"{name} has shape {offset.shape}; it takes {_ALIGN_TAKES}")
    if offset.size and max(-int(offset.min()), int(offset.max())) > _FAR:
        raise ValueError(f"{name} holds an offset beyond +-2**60; it takes {_ALIGN_TAKES}")
    return int(offset) if offset.ndim == 0 else offset


def _check_align_batch(align: Align, name: str, shape: Shape) -> None:
    if isinstance(align, np.ndarray) and align.shape != (shape.batch,):
        raise ValueError(
            f"{name} has shape {align.shape}; it takes an int or one int for each batch row, (B,) = ({shape.batch},)"
        )


def _bound(x: Any, side: str) -> int | None:
    """One side of a window."""
    if x is None:
        return None
    bound = integer(x, f"window's {side}", "an int >= 0, or None for an open side")
    if bound < 0:
        raise ValueError(
            f"window's {side} is {bound}; it takes an int >= 0, or None for an open side (-1 is not open here)"
        )
    return bound


def check_window(window: Any) -> Window:
    """The keyword `window` as a part."""
    if isinstance(window, Mask):
        raise TypeError(f"window is a {window!r}; it takes (left, right), and a Mask goes to mask=")
    if not isinstance(window, (tuple, list)):
        one = isinstance(window, (int, np.integer)) and not isinstance(window, bool)
        meant = (
            f": Hugging Face's sliding_window={window}, the query's own key and those before it, is ({window} - 1, 0)"
            if one
            else ""
        )
        raise TypeError(f"window is {window!r}; it takes a pair (left, right), None leaving a side open{meant}")
    if len(window) != 2:
        raise ValueError(f"window is {window!r}; it takes a pair (left, right), None leaving a side open")
    return Window(_bound(window[0], "left"), _bound(window[1], "right"))


def _one_each(x: Any, name: str) -> Array:
    """The lengths of the batch rows."""
    row = integers(x, name, "one int for each batch row, (B,)")
    if row.ndim != 1:
        raise ValueError(f"{name} has shape {row.shape}; it takes one length for each batch row, (B,)")
    _check_not_negative(row, name)
    return row


def _check_not_negative(x: Array, name: str) -> None:
    if x.size and x.min() < 0:
        raise ValueError(f"{name} holds {x.min()}; it takes ints >= 0")


def _check_range(x: Array, name: str, size: int, axis: str) -> None:
    if x.size and x.max() > size:
        raise ValueError(f"{name} holds {x.max()}; it takes ints in [0, {axis}] = [0, {size}]")


def bool_pairs(mask: Any, name: str) -> Array:
    """`mask` as a base-class bool array. An integer one raises: 0 and 1, and 0 and -10000, have both been used for
    it."""
    if callable(mask) and not isinstance(mask, np.ndarray):
        raise TypeError(f"{name} is a function; wrap it: mask=numba_attn.mask_mod(fn)")
    if isinstance(mask, (bool, np.bool_, int)):
        raise TypeError(f"{name} is {mask!r}; it takes a bool array (True = attend), a Mask, or None")
    pairs = plain(mask, name)
    kind = pairs.dtype.kind
    if kind == "b":
        return pairs
    if kind in "iu":
        todo = f"where 1 means attend pass {name}.astype(bool), where 1 means hidden {name} == 0"
    elif kind in "fV" or pairs.dtype.name == "bfloat16":
        todo = "numbers to add to the scores go to bias="
    else:
        todo = "convert it"
    raise TypeError(f"{name} has dtype {pairs.dtype}; it takes bool, True = attend: {todo}")


def over_pairs(array: Array, name: str, shape: Shape) -> Array:
    """`array` as a view of shape (B, Hq, Sq, Sk), with zero strides where it is broadcast."""
    full = (shape.batch, shape.q_heads, shape.q_len, shape.kv_len)
    wanted = full[shape.missing :]
    try:
        view = np.broadcast_to(array, wanted)
    except ValueError:
        pass
    else:
        return view[(None,) * shape.missing] if shape.missing else view
    axes = ("B", "Hq", "Sq", "Sk")[shape.missing :]
    message = f"{name} has shape {array.shape}; it takes ({', '.join(axes)}) = {wanted}, or what NumPy broadcasts to it"
    if shape.missing == 0 and array.shape == (shape.batch, shape.kv_len):
        message += f": padding of the keys, (B, Sk), is {name}[:, None, None, :]"
        message += ", or mask=numba_attn.lengths(...)" if name == "mask" else ""
    elif shape.missing == 0 and array.shape == (shape.batch, shape.q_len, shape.kv_len):
        message += f": (B, Sq, Sk) is {name}[:, None]"
    elif array.ndim > len(wanted):
        message += (
            f": this layout has no {' and no '.join(('batch', 'head')[: shape.missing])} axis" if shape.missing else ""
        )
    raise ValueError(message)


def aux_arrays(aux: Any, name: str) -> tuple[Array, ...]:
    """The arrays for a user's function. float16 and bfloat16, which Numba cannot load, become float32 copies."""
    if isinstance(aux, np.ndarray) or not isinstance(aux, (tuple, list)):
        raise TypeError(f"{name} is a {type(aux).__name__}; it takes a tuple of arrays, ({name.split()[0]},) for one")
    arrays = []
    for n, given in enumerate(aux):
        a = plain(given, f"{name}[{n}]")
        half = a.dtype.char == "e" or a.dtype.name == "bfloat16"
        if not a.dtype.isnative or (not half and a.dtype.char not in "?bBhHiIlLqQfd"):
            raise TypeError(
                f"{name}[{n}] has dtype {a.dtype}; it takes {FLOAT_NAMES}, int or bool, in this machine's byte order"
            )
        arrays.append(a.astype(np.float32) if half else a)
    return tuple(arrays)


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
    """Every part's formula, and-ed: bool (B, Hq, Sq, Sk), a broadcast view where heads or rows agree."""
    at = positions(parts, shape)
    visible: Any = np.ones((1, 1, shape.q_len, shape.kv_len), np.bool_)
    for part in parts:
        visible = visible & with_align(part, align).visible(at)
    return np.broadcast_to(visible, (shape.batch, shape.q_heads, shape.q_len, shape.kv_len))


def with_align(part: Part, align: Align) -> Part:
    """`part` with the call's align where it has none of its own."""
    if isinstance(part, Causal) and part.align is None:
        return Causal(align)
    if isinstance(part, Window) and part.align is None:
        return Window(part.left, part.right, align)
    if isinstance(part, Prefix) and part.align is None:
        return Prefix(part.n, align)
    return part


# --- lowering ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
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
    """One sequence a batch row: what a call without lengths or varlen has. Shared between calls: read it, don't write
    it."""
    rows = np.zeros((batch, 7), np.int64)
    rows[:, 0] = np.arange(batch)
    rows[:, 2] = q_len
    rows[:, 4] = kv_len
    rows[:, 5] = offset
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
    _check_align_batch(align, "align", shape)
    for part in parts:
        part.check(shape)
    pieces = _pieces(parts, shape)
    rows = np.zeros((pieces.shape[0], 7), np.int64)
    rows[:, :5] = pieces

    left = right = OPEN
    prefix_rows: Array | None = None
    start: Array | None = None
    end: Array | None = None
    users: list[tuple[str, Align]] = [("alibi_slopes", align)] if alibi else []
    indifferent = False  # an open window takes an align and does nothing with it
    for part in parts:
        if isinstance(part, (Causal, Window, Prefix)):
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
            n = np.full(pieces.shape[0], part.n) if isinstance(part.n, int) else part.n[pieces[:, 0]]
            prefix_rows = n if prefix_rows is None else np.minimum(prefix_rows, n)
        elif isinstance(part, Intervals) or (isinstance(part, Segments) and part.runs is not None):
            first, last = part.bounds if isinstance(part, Intervals) else (x[:, None, :] for x in part.runs or ())
            start = first if start is None else np.maximum(start, first)
            end = last if end is None else np.minimum(end, last)
    if align is not None and not users and not indifferent:
        raise unused_align()
    if users:
        rows[:, 5] = _offset(users, align, rows)
    if prefix_rows is not None:
        prefix_rows = np.minimum(prefix_rows, rows[:, 4])
        if right == 0 or not prefix_rows.any():  # plain causal says no wherever the prefix would have said yes
            right, prefix_rows = 0, None
        else:
            rows[:, 6] = prefix_rows
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
    """The sequences, (n, 5): batch, q_start, q_len, k_start, k_len. Two parts that make sequences make their common
    refinement."""
    pieces: Array | None = None
    for part in parts:
        if isinstance(part, (Lengths, Varlen)):
            more = part.pieces(shape)
            pieces = more if pieces is None else _refined(pieces, more, shape.batch)
    return whole_rows(shape.batch, shape.q_len, shape.kv_len, 0)[:, :5] if pieces is None else pieces


def _refined(first: Array, second: Array, batch: int) -> Array:
    """The common refinement of two lists of sequences."""
    none = np.zeros((0, 5), np.int64)
    return np.concatenate([none, *(_refined_row(first, second, b) for b in range(batch))])


def _refined_row(a: Array, c: Array, b: int) -> Array:
    """The intersections of two lists of sequences in batch row b, those with a query."""
    a, c = a[a[:, 0] == b][:, None, :], c[c[:, 0] == b][None, :, :]
    rows = np.zeros((a.shape[0], c.shape[1], 5), np.int64)
    rows[..., 0] = b
    for column in (1, 3):
        first = np.maximum(a[..., column], c[..., column])
        last = np.minimum(a[..., column] + a[..., column + 1], c[..., column] + c[..., column + 1])
        rows[..., column] = first
        rows[..., column + 1] = np.maximum(last - first, 0)
    return rows[rows[..., 2] > 0]


def _offset(users: Sequence[tuple[str, Align]], align: Align, rows: Array) -> Array:
    """The offset of every sequence, on which all that use it must agree."""
    q_len, k_len = rows[:, 2], rows[:, 4]
    has_pairs = (q_len > 0) & (k_len > 0)
    first: tuple[str, Align, Array] | None = None
    asked: list[tuple[str, Align]] = list(users)
    if align is not None and all(a is not align for _, a in users):
        asked.append(("the call", align))  # unused, but a contradiction must not pass
    for what, own in asked:
        if own is None:
            unlike = np.flatnonzero(has_pairs & (q_len != k_len))
            if unlike.size:
                raise ambiguous(what, int(q_len[unlike[0]]), int(k_len[unlike[0]]))
            offset = np.zeros_like(q_len)
        elif isinstance(own, str):
            offset = k_len - q_len if own == "bottom_right" else np.zeros_like(q_len)
        else:
            offset = np.full_like(q_len, own) if isinstance(own, int) else own[rows[:, 0]]
        if first is None:
            first = what, own, offset
            continue
        named = isinstance(own, str) and isinstance(first[1], str) and own != first[1]
        if named or (offset != first[2])[has_pairs].any():
            raise ValueError(
                f"align differs: {_show(first[1])} for {first[0]} and {_show(own)} for {what}; "
                "a call has one offset for each sequence, so give align once"
            )
        if first[1] is None:
            first = what, own, offset
    assert first is not None
    return first[2]
