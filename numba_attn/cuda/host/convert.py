"""Copies an array of any strides to C order on the device, and to another float type where needed.

NumPy does the same on the host. The copies are sinks and slopes in the accumulation type, arrays of aux in float32, and
results that the caller may write over.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from ...arrays import Array
from .. import code, scalar
from ..compile import inline
from ..record import REALS, Features
from .arrays import DeviceArray, empty
from .call import STORAGE
from .loading import loaded

THREADS = 256


def build(source: str, target: str, axes: int, f: Features) -> Any:
    """convert(call, reals): one thread an element. Fields: source, target, count, and of each axis, the innermost
    first, its size and step in bytes."""
    acc = "f64" if "f64" in (source, target) else "f32"
    load, store, width = scalar.load_global(source, acc), scalar.store_global(target), code.SIZE[target]
    offset, thread, block = _offset(0, axes, f.fields.index("size0")), scalar.thread, scalar.block

    def convert(call, reals):
        n = np.int64(block()) * THREADS + np.int64(thread())
        if n < call.count:
            store(call.target + n * width, load(call.source + offset(call, n)))

    return convert


def _offset(axis: int, axes: int, at: int) -> Any:
    """(call, n) -> where element n is, of the axes from this one on; `at` is the place of its size in the call."""
    size, step = at, at + 1
    if axis == axes - 1:

        @inline
        def offset(call, n):
            return n * call[step]

    else:
        others = _offset(axis + 1, axes, at + 2)

        @inline
        def offset(call, n):
            return n % call[size] * call[step] + others(call, n // call[size])

    return offset


def _axes(x: Array) -> list[tuple[int, int]]:
    """(size, stride in bytes) from the innermost axis out, those that follow on each other as one."""
    axes: list[tuple[int, int]] = []
    for size, step in zip(reversed(x.shape), reversed(x.strides), strict=True):
        if size == 1:
            continue
        if axes and axes[-1][0] * axes[-1][1] == step:
            axes[-1] = axes[-1][0] * size, axes[-1][1]
        else:
            axes.append((size, step))
    return axes or [(1, 0)]


def converted(x: Array, dtype: Any, device: Any, stream: int) -> DeviceArray:
    """A copy of a shadow's array, in C order and this float type."""
    result = empty(x.shape, np.dtype(dtype), device, stream)
    if x.size:
        axes = _axes(x)
        numbers = {"source": int(x.ctypes.data), "target": result.address, "count": x.size}
        for n, (size, step) in enumerate(axes):
            numbers |= {f"size{n}": size, f"step{n}": step}
        f = Features(extra=tuple(numbers))
        more = STORAGE[x.dtype.name], STORAGE[result.dtype.name], len(axes)
        function = loaded(device, build, None, f, THREADS, more)
        fields = [numbers.get(field, 0) for field in f.fields]
        params = struct.pack(f"<{len(fields)}q{len(REALS)}d", *fields, *(0.0,) * len(REALS))
        device.launch(function, -(-x.size // THREADS), THREADS, 0, params, stream)
    return result
