"""Which pairs attend. A `Mask` is a record of parts that `&` combines: a pair is visible iff every part says so.

shape.py         sizes, positions, checks of single arguments
parts.py         a record and its textbook formula for each part
lowering.py      parts -> what the kernels need
constructors.py  `Mask`, and the functions that make one
"""

from .constructors import Mask, causal, intervals, lengths, mask_mod, prefix, segments, varlen, window

__all__ = ["Mask", "causal", "intervals", "lengths", "mask_mod", "prefix", "segments", "varlen", "window"]
