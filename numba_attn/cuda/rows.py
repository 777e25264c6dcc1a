"""Copies rows of q, k, v and the results between global and shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from . import scalar, tile
from .code import VECTOR
from .compile import inline
from .record import Features
from .scalar import add, load_row, load_word, mul, shared_or, shift_left, store_word, sub, sync, udiv, urem
from .tiling import Tiling, products


class Rows(NamedTuple):
    """Rows in global memory: the address of the first, strides in bytes, and how many numbers a row has."""

    base: Any
    stride_h: Any
    stride_s: Any
    stride_d: Any
    dim: Any


def rows_of(f: Features, name: str, dim: str) -> Any:
    """(call, b, head, row) -> the Rows of the call's (B, H, S, D) array `name` from there on, D in the field `dim`."""
    n, n_dim = f.fields.index(name), f.fields.index(dim)
    n_b, n_h, n_s, n_d = range(n + 1, n + 5)

    @inline
    def rows(call, b, head, row):
        base = call[n] + b * call[n_b] + head * call[n_h] + row * call[n_s]
        return Rows(base, call[n_h], call[n_s], call[n_d], call[n_dim])

    return rows


@inline
def _in_order(row, base, rows, table):
    return base + row * rows.stride_s


@inline
def _by_table(row, base, rows, table):
    i, h, _, _ = load_row(add(table, mul(row, 16)))
    return base + h * rows.stride_h + i * rows.stride_s


@dataclass(frozen=True)
class Copies:
    """Copies of rows between global and shared memory by all threads of a block.

    aligned: rows can be read 16 bytes at a time.
    """

    t: Tiling
    aligned: bool

    def load(self, dim: int, rows: int) -> Any:
        """(tid, to, base, source, count): `count` of the Rows from the one at address `base` on, the rest zeros."""
        return self._vectors_in(dim, rows) if self.aligned else self._elements_in(dim, rows)

    def load_queries(self, dim: int, rows: int) -> Any:
        """(tid, to, source, table, where): the rows of a tile of queries from the Rows of their batch. where: (queries
        of the sequence, first query, its head, queries of the tile); those of a short sequence are where the table
        says, others lie one after the other."""
        straight, scattered = self.load(dim, rows), self._units(dim, rows, _by_table, False)

        @inline
        def queries_in(tid, to, source, table, where):
            q_len, query, head, count = where
            if q_len < rows:
                scattered(tid, to, source.base, source, table, count)
            else:
                straight(tid, to, source.base + head * source.stride_h + query * source.stride_s, source, count)

        return queries_in

    def store(self, dim: int, rows: int) -> Any:
        """(tid, at, target, count): the first rows of shared memory to Rows."""
        units = self._units(dim, rows, _in_order, True)

        @inline
        def rows_out(tid, at, target, count):
            units(tid, at, target.base, target, 0, count)

        return rows_out

    def store_queries(self, dim: int, rows: int) -> Any:
        """(tid, at, base, target, table, count): rows of shared memory to where the table says in the Rows of their
        batch, which begin at `base`."""
        return self._units(dim, rows, _by_table, True)

    def finite(self, dim: int, rows: int) -> Any:
        """(tid, at) -> whether the thread's share of the rows is finite."""
        t, finite_vector = self.t, scalar.finite_vector(self.t.storage)
        threads, stride, units = t.threads, t.stride(dim), dim * t.size // VECTOR

        @inline
        def all_finite(tid, at):
            ok = True
            for n in range(tid, rows * units, threads):
                row = udiv(n, units)
                unit = sub(n, mul(row, units))
                ok = ok and finite_vector(add(at, add(mul(row, stride), mul(unit, VECTOR))))
            return ok

        return all_finite

    def _vectors_in(self, dim: int, rows: int) -> Any:
        t, per = self.t, VECTOR // self.t.size
        threads, stride, units = t.threads, t.stride(dim), dim // per
        width = min(units, threads)  # units of a row that the threads take at a time
        per_pass, parts = threads // width, -(-units // width)
        copy = scalar.copy_rows(rows, per_pass, stride)

        @inline
        def rows_in(tid, to, base, source, count):
            row = udiv(tid, width)
            for part in range(parts):
                unit = add(sub(tid, mul(row, width)), part * width)
                limit = min(count, rows) if unit * per < source.dim else 0
                if tid < per_pass * width and unit < units:
                    copy(
                        add(to, add(mul(row, stride), mul(unit, VECTOR))),
                        base + row * source.stride_s + unit * VECTOR,
                        per_pass * source.stride_s,
                        row,
                        limit,
                    )

        return rows_in

    def _elements_in(self, dim: int, rows: int) -> Any:
        units = self._units(dim, rows, _in_order, False)

        @inline
        def rows_in(tid, to, base, source, count):
            units(tid, to, base, source, 0, count)

        return rows_in

    def _units(self, dim: int, rows: int, begin: Any, out: bool) -> Any:
        """(tid, at, base, there, table, count): rows 0 : count between shared memory and Rows, a unit at a time; the
        others become zeros in shared memory. begin(row, base, there, table): the address of a row."""
        t, aligned = self.t, self.aligned
        # step: bytes of a unit, which is copied at a time; numbers: how many numbers those are
        step, numbers = (VECTOR, VECTOR // t.size) if aligned else (t.size, 1)
        copy_in = scalar.copy_async(VECTOR) if aligned else scalar.copy_element(t.size)
        copy_out = scalar.copy_out(step)
        threads, stride, units = t.threads, t.stride(dim), dim // numbers

        @inline
        def units_of(tid, at, base, there, table, count):
            for n in range(tid, rows * units, threads):
                row = udiv(n, units)
                unit = sub(n, mul(row, units))
                if not out or (row < count and unit * numbers < there.dim):
                    address = begin(row, base, there, table)
                    address += unit * VECTOR if aligned else unit * there.stride_d
                    here = add(at, add(mul(row, stride), mul(unit, step)))
                    if out:
                        copy_out(address, here)
                    else:
                        copy_in(here, address, row < count and unit * numbers < there.dim)

        return units_of


def bitmap_words(dim: int) -> int:
    """32-bit words with a bit for each number of a row."""
    return -(-dim // 32)


def repairer(t: Tiling, dim: int, bad: int) -> SimpleNamespace:
    """Keeps what hidden pairs point to out of a product: 0 times NaN is NaN.

    Numbers of B that are not finite become 0 in shared memory. For every row of the product that sees such a number its
    place is marked in a bitmap at `bad`. At the end `spoil` writes NaN to the marked places, once. So all tiles have
    the same product, and the rare case costs the common one no registers.
    """
    rows, cols, threads, stride = t.rows, t.cols, t.threads, t.stride(dim)
    words, units, per = bitmap_words(dim), dim * t.size // VECTOR, VECTOR // t.size
    row_map, col_map, n = bad, bad + rows * words * 4, t.scores.size
    bit, repair_vector = tile.bit(n), scalar.repair_vector(t.storage)
    element = products(t).element

    @inline
    def clear(tid):
        """Before the first tile; a barrier must follow."""
        for k in range(tid, rows * words, threads):
            store_word(add(row_map, mul(k, 4)), 0)

    @inline
    def clean(tid, b):
        """Only the zeros: for sums in which a row that sees such a number is spoilt anyway, through its scores."""
        for k in range(tid, cols * units, threads):
            row = udiv(k, units)
            unit = sub(k, mul(row, units))
            repair_vector(add(b, add(mul(row, stride), mul(unit, VECTOR))))
        sync()

    @inline
    def repair(tid, row0, col0, hidden, b):
        for k in range(tid, cols * words, threads):
            store_word(add(col_map, mul(k, 4)), 0)
        sync()
        for k in range(tid, cols * units, threads):
            row = udiv(k, units)
            unit = sub(k, mul(row, units))
            found = repair_vector(add(b, add(mul(row, stride), mul(unit, VECTOR))))
            if found != 0:
                first = mul(unit, per)
                word = add(mul(row, words), udiv(first, 32))
                shared_or(add(col_map, mul(word, 4)), shift_left(found, urem(first, 32)))
        sync()
        for e in range(n):
            if not bit(hidden, e):
                row, col = element(e)
                for w in range(words):
                    found = load_word(add(col_map, mul(add(mul(add(col0, col), words), w), 4)))
                    if found != 0:
                        shared_or(add(row_map, mul(add(mul(add(row0, row), words), w), 4)), found)
        sync()

    number = np.float64 if t.acc == "f64" else np.float32
    nan = number(np.nan)

    def spoiled(x, row, col, given):
        word = load_word(add(row_map, mul(add(mul(row, words), udiv(col, 32)), 4)))
        return nan if (word >> urem(col, 32)) & 1 else x

    return SimpleNamespace(clear=clear, clean=clean, repair=repair, spoil=tile.mapped(spoiled, t.output(dim)))
