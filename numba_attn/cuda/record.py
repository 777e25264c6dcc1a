"""What every kernel takes: the record of a call's numbers, and the features of a call that decide the code.

The counterpart of cpu/call.py. What a call needs is compiled in, and nothing else.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from .compile import types

# What every kernel takes: addresses, strides in bytes, sizes. All 8 bytes.
CALL = (
    "q", "q_b", "q_h", "q_s", "q_d", "k", "k_b", "k_h", "k_s", "k_d", "v", "v_b", "v_h", "v_s", "v_d",
    "out", "out_b", "out_h", "out_s", "out_d", "lse", "lse_b", "lse_h", "lse_s",
    "tiles", "kv_heads", "group", "qk_dim", "v_dim", "sequences", "left", "right", "has_prefix",
    "start", "end", "bounds_b", "bounds_h", "bounds_s", "slopes", "slopes_b", "sinks", "seed", "drop_below",
)  # fmt: skip
# scale is that of tanh's argument where there is a softcap; it or the softcap makes log2 units where nothing follows.
REALS = ("scale", "softcap", "drop_scale", "grad_scale")
STRIDES = ("b", "h", "i", "j")


@dataclass(frozen=True)
class Features:
    """The features of a call that decide the code of a kernel."""

    aligned: bool = True  # rows of q, k, v and the results can be read 16 bytes at a time
    softcap: bool = False
    bias: str = ""  # its storage type
    slopes: bool = False
    masks: int = 0
    segments: int = 0
    mask_mods: tuple[Callable[..., Any], ...] = ()  # compiled as cuda/modifiers.py says; a table each
    mask_tables: tuple[int, ...] = ()  # numbers in each table
    score_mod: Callable[..., Any] | None = None
    score_table: int = 0
    dropout: bool = False
    derivatives: bool = False  # score_mod returns (score, derivative)
    positive: bool = True  # the scale is a positive number: the largest product is the largest score
    extra: tuple[str, ...] = ()  # more fields: see CALL

    @property
    def every_pair(self) -> bool:
        """Whether every pair is asked something, so that no tile is plain."""
        return bool(self.bias or self.slopes or self.masks or self.segments or self.mask_mods or self.score_mod)

    @property
    def options(self) -> bool:
        """Whether more is done with a score than scaling and hiding it by its position."""
        return self.every_pair or self.softcap or self.dropout

    @property
    def natural(self) -> bool:
        """Whether scores are in natural units, not in log2 units: `build_exponent` tells them apart."""
        return bool(self.bias or self.slopes or self.score_mod)

    @property
    def raw(self) -> bool:
        """Whether scores stay products, and the scale joins the difference from the maximum in one FMA."""
        return self.positive and not self.softcap and not self.natural

    @property
    def call_type(self) -> Any:
        return call_type(self.fields)

    @property
    def fields(self) -> tuple[str, ...]:
        names = list(CALL)
        if self.bias:
            names += ["bias", *(f"bias_{s}" for s in STRIDES)]
        for n in range(self.masks):
            names += [f"mask{n}", *(f"mask{n}_{s}" for s in STRIDES)]
        for n in range(self.segments):
            names += [f"q_ids{n}", f"q_ids{n}_b", f"k_ids{n}", f"k_ids{n}_b"]
        for n, size in enumerate(self.mask_tables):
            names += [f"mask_mod{n}_{x}" for x in range(size)]
        names += [f"score_mod_{x}" for x in range(self.score_table)]
        return (*names, *self.extra)


@cache
def call_type(fields: tuple[str, ...]) -> Any:
    return namedtuple("Call", fields)


Reals = namedtuple("Reals", REALS)


def signature(fields: tuple[str, ...]) -> tuple[Any, Any]:
    """The types of (call, reals)."""
    return (
        types.NamedUniTuple(types.int64, len(fields), call_type(fields)),
        types.NamedUniTuple(types.float64, len(REALS), Reals),
    )
