"""The sizes that a mask is checked against, where queries and keys stand in their sequences, and the checks of single
arguments that every part of a mask shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array, integers, plain

OPEN = 2**62  # an absent bound: larger than any index, and i + offset - OPEN still fits in int64
_FAR = 2**60  # the largest offset, for the same reason

# A sequence is a row of an int64 array: of the batch, its first query and how many, its first key and how many, its
# diagonal (query i meets key i + offset, both counted from its start), and the prefix that each query sees.
SEQUENCE_FIELDS = ("batch", "q_start", "q_len", "k_start", "k_len", "offset", "prefix")
BATCH, Q_START, Q_LEN, K_START, K_LEN, OFFSET, PREFIX = range(len(SEQUENCE_FIELDS))
N_PLACE = OFFSET  # the fields before it say where a sequence lies

Align = str | int | Array | None

_NAMES = ("bottom_right", "top_left")
_ALIGN_TAKES = (
    "'bottom_right' (offset = kv_length - q_length), 'top_left' (offset = 0), or the offset itself, an int or (B,) ints"
)


def count_tiles(q_lens: Array, rows: int, group: int) -> Array:
    """Tiles of the queries of one key head, for each sequence: as the kernels count them."""
    return np.where(q_lens < rows, (group * q_lens + rows - 1) // rows, group * ((q_lens + rows - 1) // rows))


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


def show(x: Any) -> str:
    return f"<int array {x.shape}>" if isinstance(x, np.ndarray) else repr(x)


def show_align(align: Align, before: str = ", ") -> str:
    return "" if align is None else f"{before}align={show(align)}"


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


def check_align_batch(align: Align, name: str, shape: Shape) -> None:
    if isinstance(align, np.ndarray) and align.shape != (shape.batch,):
        raise ValueError(
            f"{name} has shape {align.shape}; it takes an int or one int for each batch row, (B,) = ({shape.batch},)"
        )


def check_not_negative(x: Array, name: str) -> None:
    if x.size and x.min() < 0:
        raise ValueError(f"{name} holds {x.min()}; it takes ints >= 0")


def check_range(x: Array, name: str, size: int, axis: str) -> None:
    if x.size and x.max() > size:
        raise ValueError(f"{name} holds {x.max()}; it takes ints in [0, {axis}] = [0, {size}]")


def bool_pairs(mask: Any, name: str) -> Array:
    """`mask` as a base-class bool array. An integer array raises, since two conventions are in use for it, 0 and 1, and
    0 and -10000."""
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
    if array.shape == full:
        return array
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
