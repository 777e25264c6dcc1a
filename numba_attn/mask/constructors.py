"""`Mask`, and the functions that make one: a pair is visible iff every part of the mask says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array, integer, integers
from ..userfn.accepted import aux_arrays, check_function
from .lowering import lower
from .parts import Causal, Intervals, Lengths, MaskMod, Pairs, Part, Prefix, Segments, Varlen, Window, dense
from .shape import Align, Shape, bool_pairs, check_align, check_not_negative


@dataclass(frozen=True, eq=False)
class Mask:
    """Which query-key pairs attend: a record of parts, made by `causal`, `window`, `lengths`, `varlen`, `segments`,
    `prefix`, `intervals` and `mask_mod`, and combined with `&`. A pair is visible iff every part says so. No part is
    ever ignored.

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
        The offset of each sequence: kv_length - q_length, 0, or the number itself. If left out, the align of the call
        is used. That may be left out too, where both names give the same offset for every sequence.

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
    """Padding: in batch row b only the first kv_lengths[b] keys, and the first q_lengths[b] queries, exist.

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

    Positions do not start at 0 in each segment. (With causal that makes no difference where q_ids is kv_ids.) For
    packed sequences of different query and key lengths use `varlen`. Where all keys with the same id lie side by side,
    keys outside a query's segment are never read.

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
    """Causal with a prefix that every query sees (prefix-LM): key j is visible to query i iff j < n or j <= i + offset.

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
    check_not_negative(checked, "n of prefix")
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
        check_not_negative(bound, f"{name} of intervals")
        checked.append(bound)
    return Mask((Intervals(*checked),))


def mask_mod(fn: Callable[..., Any], aux: Sequence[Any] = ()) -> Mask:
    """A pair is visible iff ``fn(b, h, i, j, *aux)`` says so. The function is compiled into the kernel.

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
    check_not_negative(row, name)
    return row
