"""numba_attn: attention for people who work in NumPy. See `attention`, the mask constructors and `reference`."""

from . import reference
from .api import Pullback, attention, attention_backward, attention_jvp, attention_vjp
from .gradients import Gradients
from .mask import Mask, causal, intervals, lengths, mask_mod, prefix, segments, varlen, window
from .userfn.accepted import ScoreMod, score_mod, where

__version__ = "0.1.0"
__all__ = [
    "Gradients",
    "Mask",
    "Pullback",
    "ScoreMod",
    "attention",
    "attention_backward",
    "attention_jvp",
    "attention_vjp",
    "causal",
    "intervals",
    "lengths",
    "mask_mod",
    "prefix",
    "reference",
    "score_mod",
    "segments",
    "varlen",
    "where",
    "window",
]
