"""Rows of q, k, v and the results on their way between global and shared memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from . import scalar, tile
from .code import VECTOR
from .compile import inline
from .tiling import Tiling, products


def bitmap_words(dim: int) -> int:
    """32-bit words with a bit for each number of a row."""
    return -(-dim // 32)


def repairer(t: Tiling, dim: int, bad: int) -> SimpleNamespace:
    """Keeps what hidden pairs point to out of a product: 0 times NaN is NaN.

    Numbers of B that are not finite become 0 in shared memory, and every row of the product that sees such a number has
    its place marked in a bitmap at `bad`; `spoil` makes NaN of the marked places, once, at the end. So one product does
    for all tiles, and the rare case costs the common one no registers.
    """
    rows, cols, threads, stride = t.rows, t.cols, t.threads, t.stride(dim)
    words, units, per = bitmap_words(dim), dim * t.size // VECTOR, VECTOR // t.size
    row_map, col_map, n = bad, bad + rows * words * 4, t.scores.size
    add, mul, udiv, sub, urem = scalar.add, scalar.mul, scalar.udiv, scalar.sub, scalar.urem
    store_word, load_word, shared_or, sync = scalar.store_word, scalar.load_word, scalar.shared_or, scalar.sync
    bit, repair_vector, shift_left = tile.bit(n), scalar.repair_vector(t.storage), scalar.shift_left
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


def loaders(t: Tiling, aligned: bool) -> SimpleNamespace:
    """Copies of rows between global and shared memory by all threads of a block."""
    size, threads, per = t.size, t.threads, VECTOR // t.size
    add, mul, udiv, sub = scalar.add, scalar.mul, scalar.udiv, scalar.sub
    step, numbers = (VECTOR, per) if aligned else (size, 1)  # of a unit: what is copied at a time
    load_row, copy_in = scalar.load_row, scalar.copy_async(VECTOR) if aligned else scalar.copy_element(size)
    copy_out, finite_vector = scalar.copy_out(step), scalar.finite_vector(t.storage)

    @inline
    def in_order(row, where):
        base, stride_s = where
        return base + row * stride_s

    @inline
    def by_table(row, where):
        base, stride_h, stride_s, table = where
        i, h, _, _ = load_row(add(table, mul(row, 16)))
        return base + h * stride_h + i * stride_s

    def each_unit(dim: int, rows: int, begin: Any, out: bool) -> Any:
        """(tid, at, where, stride_d, valid, real): rows 0 : valid of `real` numbers between shared and global memory, a
        unit at a time; the others become zeros in shared memory. begin(row, where): the address of a row."""
        stride, units = t.stride(dim), dim // numbers

        @inline
        def units_of(tid, at, where, stride_d, valid, real):
            for n in range(tid, rows * units, threads):
                row = udiv(n, units)
                unit = sub(n, mul(row, units))
                if not out or (row < valid and unit * numbers < real):
                    address = begin(row, where)
                    address += unit * VECTOR if aligned else unit * stride_d
                    here = add(at, add(mul(row, stride), mul(unit, step)))
                    if out:
                        copy_out(address, here)
                    else:
                        copy_in(here, address, row < valid and unit * numbers < real)

        return units_of

    def load(dim: int, rows: int) -> Any:
        """(tid, to, base, stride_s, stride_d, valid, real): rows 0 : valid of `real` numbers, the rest zeros."""
        stride = t.stride(dim)
        if aligned:
            units = dim // per
            width = min(units, threads)  # units of a row that the threads take at a time
            per_pass, parts = threads // width, -(-units // width)
            copy = scalar.copy_rows(rows, per_pass, stride)

            @inline
            def rows_in(tid, to, base, stride_s, stride_d, valid, real):
                row = udiv(tid, width)
                for part in range(parts):
                    unit = add(sub(tid, mul(row, width)), part * width)
                    limit = min(valid, rows) if unit * per < real else 0
                    if tid < per_pass * width and unit < units:
                        copy(
                            add(to, add(mul(row, stride), mul(unit, VECTOR))),
                            base + row * stride_s + unit * VECTOR,
                            per_pass * stride_s,
                            row,
                            limit,
                        )

        else:
            elements = each_unit(dim, rows, in_order, False)

            @inline
            def rows_in(tid, to, base, stride_s, stride_d, valid, real):
                elements(tid, to, (base, stride_s), stride_d, valid, real)

        return rows_in

    def load_queries(dim: int, rows: int) -> Any:
        """(tid, to, base, stride_h, stride_s, stride_d, table, where, real): the rows of a tile of queries. where:
        (queries of the sequence, first query, its head, queries of the tile); those of a short sequence are where the
        table says, others lie one after the other."""
        straight, scattered = load(dim, rows), each_unit(dim, rows, by_table, False)

        @inline
        def queries_in(tid, to, base, stride_h, stride_s, stride_d, table, where, real):
            q_len, query, head, count = where
            if q_len < rows:
                scattered(tid, to, (base, stride_h, stride_s, table), stride_d, count, real)
            else:
                straight(tid, to, base + head * stride_h + query * stride_s, stride_s, stride_d, count, real)

        return queries_in

    def store(dim: int, rows: int) -> Any:
        """(tid, at, base, stride_s, stride_d, valid, real): rows 0 : valid of shared memory to base."""
        units = each_unit(dim, rows, in_order, True)

        @inline
        def rows_out(tid, at, base, stride_s, stride_d, valid, real):
            units(tid, at, (base, stride_s), stride_d, valid, real)

        return rows_out

    def store_queries(dim: int, rows: int) -> Any:
        """(tid, at, base, stride_h, stride_s, stride_d, table, valid, real): rows of shared memory to where the table
        says."""
        units = each_unit(dim, rows, by_table, True)

        @inline
        def queries_out(tid, at, base, stride_h, stride_s, stride_d, table, valid, real):
            units(tid, at, (base, stride_h, stride_s, table), stride_d, valid, real)

        return queries_out

    def finite(dim: int, rows: int) -> Any:
        """(tid, at) -> whether the thread's share of the rows is finite."""
        stride, units = t.stride(dim), dim // per

        @inline
        def all_finite(tid, at):
            ok = True
            for n in range(tid, rows * units, threads):
                row = udiv(n, units)
                unit = sub(n, mul(row, units))
                ok = ok and finite_vector(add(at, add(mul(row, stride), mul(unit, VECTOR))))
            return ok

        return all_finite

    return SimpleNamespace(
        load=load, load_queries=load_queries, store=store, store_queries=store_queries, finite=finite
    )
