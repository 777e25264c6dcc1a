"""Memory that faults at its edges: arrays that end right at, or start right after, a page that may not be touched.

A kernel that reads or writes one element too far dies of a segmentation fault, so what uses these arrays runs in a
child process (child.py).
"""

import ctypes
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
PROT_NONE = 0


def libc() -> ctypes.CDLL:
    lib = ctypes.CDLL(None, use_errno=True)
    lib.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lib


def guarded_bytes(n: int, edge: str, before: int = 0) -> np.ndarray:
    """n writable bytes between two forbidden pages: they end at the second ("end") or start after the first ("start").

    `before` shifts the start: a row of an odd stride may begin in the middle of a page.
    """
    pages = max(1, -(-(n + before) // PAGE))
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    buffer = np.frombuffer(memory, np.uint8)  # keeps the mapping alive as the base of every view
    address = buffer.ctypes.data
    for page in (0, pages + 1):
        if libc().mprotect(address + page * PAGE, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    first = PAGE + before if edge == "start" else (pages + 1) * PAGE - n
    return buffer[first : first + n]


def guarded(x: np.ndarray, edge: str) -> np.ndarray:
    """A C-contiguous copy of x against a forbidden page at its start or at its end."""
    if x.size == 0:
        return x.copy()
    copy = guarded_bytes(x.nbytes, edge).view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def guarded_rows(x: np.ndarray, edge: str, slack: int = 3) -> np.ndarray:
    """A copy of x whose rows lie `slack` elements apart, so that only its first or its last element is at the edge."""
    if x.size == 0:
        return x.copy()
    d = x.shape[-1]
    rows = x.size // d
    n = (rows * (d + slack) - slack) * x.itemsize
    flat = guarded_bytes(n, edge).view(x.dtype)
    flat[...] = np.array(np.nan if x.dtype.kind in "fV" else 1).astype(x.dtype)
    view = np.lib.stride_tricks.as_strided(flat, (rows, d), ((d + slack) * x.itemsize, x.itemsize))
    view[...] = x.reshape(rows, d)
    strides = [x.itemsize]
    step = (d + slack) * x.itemsize
    for size in x.shape[-2::-1]:
        strides.insert(0, step)
        step *= size
    return np.lib.stride_tricks.as_strided(flat, x.shape, strides)
