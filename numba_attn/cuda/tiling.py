"""Which tile a kernel works on, and which part of it a thread holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import multiply, tile
from .code import SIZE, VECTOR
from .compile import inline
from .scalar import add, any_lane, mul, sync_warp, udiv, urem
from .tile import Registers


@dataclass(frozen=True)
class Tiling:
    """A tile of `rows` by `cols`: rows are queries and columns keys, or the other way round in the kernel of dK and dV.

    Head sizes are rounded up to what the products take in one step; the rest is zeros.
    """

    storage: str  # of q, k, v
    threads: int
    rows: int
    cols: int
    across: int  # threads across a row (simt), or 0: tensor cores
    qk_dim: int
    v_dim: int
    stages: int = 1  # tiles of queries in shared memory at a time, in the kernel of dK and dV

    @property
    def mma(self) -> bool:
        return self.across == 0

    @property
    def acc(self) -> str:
        return "f64" if self.storage == "f64" else "f32"

    @property
    def size(self) -> int:
        return SIZE[self.storage]

    @property
    def warp_rows(self) -> int:
        """Rows of a warp, where there are tensor cores."""
        return self.rows // (self.threads // 32)

    def stride(self, dim: int) -> int:
        """Bytes from one row to the next in shared memory: an odd number of 16-byte units, so that eight rows lie in
        different banks."""
        return dim * self.size + VECTOR

    @cached_property
    def scores(self) -> Registers:
        """The registers of a tile of scores."""
        return self._registers(self.cols, 1)

    def output(self, dim: int) -> Registers:
        """The registers of a tile with `dim` columns that the scores' rows are summed into."""
        return self._registers(dim, 1 if self.mma else VECTOR // self.size)

    def _registers(self, cols: int, vector: int) -> Registers:
        if self.mma:
            m_tiles = self.rows // (self.threads // 2)
            rows = tuple(16 * m + 8 * half for m in range(m_tiles) for half in range(2))
            return Registers(self.acc, rows, tuple(8 * n + k for n in range(cols // 8) for k in range(2)), (1, 2))
        down, across = self.threads // self.across, self.across
        partners = tuple(1 << n for n in range(across.bit_length() - 1))
        columns = tuple(c + k for c in range(0, cols, across * vector) for k in range(vector))
        return Registers(self.acc, tuple(range(0, self.rows, down)), columns, partners)

    @property
    def p_stride(self) -> int:
        """Bytes of a row of P in shared memory (simt): rows of one warp's stores fall into different banks."""
        return (self.cols + self.across) * self.size

    @property
    def p_bytes(self) -> int:
        return 0 if self.mma else self.rows * self.p_stride


CHUNK = 8  # columns of the output that a thread sums at a time (simt)


@dataclass(frozen=True)
class Products:
    """The products of a tiling, and where a thread's registers lie in them: functions for kernels to call."""

    t: Tiling
    corner: Any  # (tid) -> the thread's own row and column in the scores
    output_corner: Any  # (tid) -> the same in what the scores' rows are summed into
    element: Any  # (e) -> row and column, from the thread's corner, of element e of its scores

    def abt(self, dim: int) -> Any:
        """(tid, a, b) -> A B', rows of `dim` numbers."""
        return _mma_abt(self.t, dim) if self.t.mma else _simt_abt(self.t, dim, self.corner)

    def pb(self, dim: int, rescaled: bool = True) -> Any:
        """(tid, o, alpha, p, b, p_memory) -> alpha o + P B, rows of B of `dim` numbers. Not rescaled: alpha is 1."""
        return _mma_pb(self.t, dim, rescaled) if self.t.mma else _simt_pb(self.t, dim, self.corner)


def products(t: Tiling) -> Products:
    if t.mma:
        corner = output_corner = _mma_corner(t)
    else:
        corner, output_corner = _simt_corners(t)
    return Products(t, corner, output_corner, _element(t))


def _element(t: Tiling) -> Any:
    n_cols, across, down, t_mma = len(t.scores.cols), t.across, t.threads // max(t.across, 1), t.mma

    @inline
    def element(e):
        a, c = udiv(e, n_cols), urem(e, n_cols)
        if t_mma:
            return mul(a, 8), add(mul(udiv(c, 2), 8), urem(c, 2))
        return mul(a, down), mul(c, across)

    return element


# --- tensor cores -----------------------------------------------------------------------------------------------------


def _mma_corner(t: Tiling) -> Any:
    warp_rows = t.warp_rows

    @inline
    def corner(tid):
        lane = urem(tid, 32)
        return add(mul(udiv(tid, 32), warp_rows), udiv(lane, 4)), mul(urem(lane, 4), 2)

    return corner


def _mma_abt(t: Tiling, dim: int) -> Any:
    stride, warp_rows = t.stride(dim), t.warp_rows
    product = multiply.mma_abt(t.scores, t.storage, dim * t.size, stride, stride)

    @inline
    def abt(tid, a, b):
        lane = urem(tid, 32)
        row = add(mul(udiv(tid, 32), warp_rows), urem(lane, 16))
        at_a = add(add(a, mul(row, stride)), mul(udiv(lane, 16), 16))
        key = add(urem(lane, 8), mul(udiv(lane, 16), 8))
        at_b = add(add(b, mul(key, stride)), mul(urem(udiv(lane, 8), 2), 16))
        return product(at_a, at_b)

    return abt


def _mma_pb(t: Tiling, dim: int, rescaled: bool) -> Any:
    stride, regs = t.stride(dim), t.output(dim)
    times, changes = tile.with_row(_times, regs), tile.other_than_one(regs)

    @inline
    def scaled(o, alpha):
        if rescaled and any_lane(changes(alpha)):
            return times(o, alpha, 0)
        return o

    if t.storage == "f32":
        product = multiply.tf32_pb(regs, t.scores, stride)

        @inline
        def pb(tid, o, alpha, p, b, p_memory):
            lane = urem(tid, 32)
            at = add(add(b, mul(urem(lane, 4), 2 * stride)), mul(udiv(lane, 4), 4))
            return product(scaled(o, alpha), p, at)

    else:
        product = multiply.mma_pb(regs, t.scores, t.storage, stride)

        @inline
        def pb(tid, o, alpha, p, b, p_memory):
            lane = urem(tid, 32)
            at = add(add(b, mul(urem(lane, 16), stride)), mul(udiv(lane, 16), 16))
            return product(scaled(o, alpha), p, at)

    return pb


def _times(x, y, _):
    return x * y


# --- FMAs -------------------------------------------------------------------------------------------------------------


def _simt_corners(t: Tiling) -> tuple[Any, Any]:
    across, vector = t.across, VECTOR // t.size

    @inline
    def corner(tid):
        return udiv(tid, across), urem(tid, across)

    @inline
    def output_corner(tid):
        return udiv(tid, across), mul(urem(tid, across), vector)

    return corner, output_corner


def _simt_abt(t: Tiling, dim: int, corner: Any) -> Any:
    stride = t.stride(dim)
    product = multiply.simt_abt(t.scores, dim * t.size, stride, stride)

    @inline
    def abt(tid, a, b):
        row, col = corner(tid)
        return product(add(a, mul(row, stride)), add(b, mul(col, stride)))

    return abt


def _simt_pb(t: Tiling, dim: int, corner: Any) -> Any:
    p_stride, size = t.p_stride, t.size
    store = multiply.simt_store_p(t.scores, p_stride)
    product = multiply.simt_pb(t.output(dim), t.cols, p_stride, t.stride(dim), CHUNK)

    @inline
    def pb(tid, o, alpha, p, b, p_memory):
        row, col = corner(tid)
        at = add(p_memory, mul(row, p_stride))
        sync_warp()  # the row's threads are in one warp: nobody else reads or writes these rows of P
        store(p, add(at, mul(col, size)))
        sync_warp()
        return product(o, alpha, at, add(b, mul(col, VECTOR)))

    return pb


# --- which tile -------------------------------------------------------------------------------------------------------


def placed(sizes: dict[str, int]) -> dict[str, int]:
    """Where things of these sizes lie in shared memory, one behind the other, and the size of all."""
    at, places = 0, {}
    for name, size in sizes.items():
        places[name] = at
        at += -(-size // VECTOR) * VECTOR
    return {**places, "size": at}


# (largest head size, then threads, rows, cols, across, stages of the tilings to try in turn). Rows and columns are
# queries and keys; in "keys" keys and queries. docs/cuda.md has what each costs.
#
# Shared memory bounds the FMA kernels, and a large tile reads fewer of its bytes for a product. But a single warp in
# each quarter of a multiprocessor cannot hide its waits. So the choice is the first tiling of which WARPS warps fit
# into shared memory, or else the first that fits at all. Some 60 shapes were compiled, and these promise most. The
# measure is the smaller of U / slowest and warps a quarter x U / sum (docs/cuda.md). In float32 at head size 128 on an
# H100 it is 0.53 of the peak for forward (64 x 32: 0.43), 0.44 for queries (32 x 32: 0.38), 0.46 for keys (32 x 32:
# 0.40).
#
# In half precision seven or more tilings for each line were timed on an H200, all without spills, and these are the
# fastest: mostly warps of 32 rows, in blocks as small as 64 threads. docs/cuda.md has the times of the others.
_Shape = tuple[int, int, int, int, int]
_TABLES: dict[tuple[str, str], list[tuple[int, list[_Shape]]]] = {
    ("forward", "half"): [
        (64, [(128, 128, 96, 0, 1)]),
        (128, [(128, 128, 32, 0, 1)]),
        (256, [(128, 64, 32, 0, 1)]),
    ],
    ("decode", "half"): [
        (64, [(32, 16, 128, 0, 1)]),
        (128, [(32, 16, 64, 0, 1)]),
        (256, [(32, 16, 32, 0, 1)]),
    ],
    ("decode", "f32"): [
        (64, [(64, 16, 64, 16, 1)]),
        (128, [(64, 16, 32, 16, 1)]),
        (256, [(64, 16, 16, 16, 1)]),
    ],
    ("decode", "f64"): [
        (64, [(64, 16, 32, 16, 1)]),
        (128, [(64, 16, 16, 16, 1)]),
        (256, [(128, 16, 16, 16, 1), (128, 16, 8, 8, 1)]),
    ],
    ("queries", "half"): [
        (64, [(64, 64, 48, 0, 1)]),
        (128, [(64, 64, 32, 0, 1)]),
        (256, [(256, 128, 64, 0, 1), (128, 64, 32, 0, 1), (128, 64, 16, 0, 1)]),
    ],
    ("keys", "half"): [
        (64, [(256, 128, 128, 0, 2), (128, 64, 64, 0, 2)]),
        (128, [(128, 64, 64, 0, 2), (128, 64, 32, 0, 2)]),
        (256, [(128, 64, 32, 0, 1), (128, 64, 16, 0, 1)]),
    ],
    ("forward", "tf32"): [
        (64, [(128, 128, 64, 0, 1)]),
        (128, [(128, 64, 32, 0, 1)]),
        (256, [(64, 32, 16, 0, 1)]),
    ],
    ("queries", "tf32"): [
        (64, [(128, 64, 32, 0, 1)]),
        (128, [(128, 64, 16, 0, 1)]),
        (256, [(64, 32, 16, 0, 1), (32, 16, 16, 0, 1)]),
    ],
    ("keys", "tf32"): [
        (64, [(128, 64, 32, 0, 2)]),
        (128, [(128, 64, 16, 0, 2), (128, 64, 16, 0, 1)]),
        (256, [(64, 32, 16, 0, 1), (32, 16, 16, 0, 1)]),
    ],
    ("forward", "f32"): [
        (64, [(128, 128, 64, 8, 1), (128, 128, 32, 8, 1)]),
        (128, [(256, 128, 64, 16, 1), (128, 64, 32, 16, 1)]),
        (256, [(256, 64, 32, 16, 1), (128, 32, 16, 16, 1)]),
    ],
    ("queries", "f32"): [
        (64, [(128, 128, 32, 8, 1), (128, 64, 32, 16, 1)]),
        (128, [(256, 64, 64, 16, 1), (128, 32, 32, 16, 1)]),
        (256, [(256, 64, 32, 16, 1), (256, 32, 32, 16, 1), (128, 16, 16, 16, 1)]),
    ],
    ("keys", "f32"): [
        (64, [(128, 64, 64, 16, 1), (128, 64, 32, 16, 2), (128, 64, 32, 16, 1)]),
        (128, [(256, 64, 64, 16, 1), (128, 32, 32, 16, 2), (128, 32, 32, 16, 1)]),
        (256, [(256, 64, 32, 16, 1), (256, 32, 32, 16, 1), (128, 16, 16, 16, 2), (128, 16, 16, 16, 1)]),
    ],
    ("forward", "f64"): [
        (64, [(128, 64, 32, 8, 1)]),
        (128, [(256, 64, 32, 16, 1), (128, 32, 16, 16, 1)]),
        (256, [(128, 16, 16, 16, 1), (64, 8, 8, 8, 1)]),
    ],
    ("queries", "f64"): [
        (64, [(256, 64, 64, 16, 1), (128, 32, 32, 16, 1)]),
        (128, [(256, 64, 32, 16, 1), (256, 32, 32, 16, 1), (128, 16, 16, 16, 1)]),
        (256, [(128, 16, 16, 16, 1), (64, 8, 8, 8, 1)]),
    ],
    ("keys", "f64"): [
        (64, [(256, 64, 64, 16, 1), (128, 32, 32, 16, 2), (128, 32, 32, 16, 1)]),
        (128, [(256, 32, 32, 16, 1), (128, 16, 16, 16, 2), (128, 16, 16, 16, 1)]),
        (256, [(128, 16, 16, 16, 1), (64, 8, 8, 8, 2), (64, 8, 8, 8, 1)]),
    ],
}
# Tried first on compute capability 9, where ptxas finds enough registers for them. Elsewhere they spill 8 to 80 bytes.
_HOPPER: dict[tuple[str, str, int], list[_Shape]] = {
    ("forward", "half", 128): [(128, 128, 64, 0, 1)],
    ("queries", "half", 64): [(64, 64, 64, 0, 1)],
}
# Options (bias, masks, user functions) need registers too, and with the tiles above those would spill. These tiles
# leave some free.
_OPTIONS: dict[str, list[tuple[int, list[_Shape]]]] = {
    "forward": [
        (64, [(128, 128, 64, 0, 1)]),
        (128, [(128, 128, 32, 0, 1)]),
        (256, [(128, 64, 32, 0, 1)]),
    ],
    "queries": [
        (128, [(128, 64, 64, 0, 1)]),
        (256, [(128, 64, 32, 0, 1), (128, 64, 16, 0, 1)]),
    ],
    "keys": [
        (64, [(128, 64, 64, 0, 2)]),
        (128, [(128, 64, 32, 0, 2)]),
        (256, [(128, 64, 16, 0, 2), (128, 64, 16, 0, 1)]),
    ],
    "decode": _TABLES["decode", "half"],
}
_TABLES |= {(kernel, "half with options"): table for kernel, table in _OPTIONS.items()}
_TABLES |= {("sums", kind): _TABLES["queries", kind] for kind in ("f32", "f64", "tf32", "half with options")}
LARGEST = 256  # head size
WARPS = 8  # of a multiprocessor, two in each quarter: enough, if need be, for one to wait while the other works
RESERVED = 1024  # bytes of shared memory that the driver takes for each block


def padded(storage: str, across: int, qk_dim: int, v_dim: int) -> tuple[int, int]:
    """Head sizes as the products take them."""
    if across == 0:
        return -(-qk_dim // 16) * 16, -(-v_dim // 16) * 16
    unit = across * VECTOR // SIZE[storage]  # every thread has whole vectors of every product's columns
    return -(-qk_dim // unit) * unit, -(-v_dim // unit) * unit


def choose(
    kernel: str,
    storage: str,
    dims: tuple[int, int],
    memory: Callable[[Tiling], dict[str, int]],
    limit: int,
    *,
    tf32: bool = False,
    options: bool = False,
    cc: tuple[int, int] | None = None,
) -> Tiling | None:
    """The tiling of a kernel for head sizes (q's, v's), on a device that gives a block `limit` bytes of shared memory
    and a multiprocessor RESERVED more; None where there is none. tf32: tensor cores for float32; options:
    Features.options, which the kernels of sums always have; cc: the compute capability, None for any."""
    half = "half with options" if options or kernel == "sums" else "half"
    kind = "tf32" if tf32 and storage == "f32" else storage if storage in ("f32", "f64") else half
    for largest, shapes in _TABLES[kernel, kind]:
        fits = []
        if cc is not None and cc[0] == 9:
            shapes = _HOPPER.get((kernel, kind, largest), []) + shapes
        for threads, rows, cols, across, stages in shapes if max(dims) <= largest else ():
            t = Tiling(storage, threads, rows, cols, across, *padded(storage, across, *dims), stages)
            size = memory(t)["size"]
            if size <= limit:
                fits.append(t)
                if (limit + RESERVED) // (size + RESERVED) * threads >= 32 * WARPS:
                    return t
        if fits:
            return fits[0]
    return None
