"""delta = rowsum(dout out) - dlse of every query, and its log sum in log2 units: the numbers of a row that the backward
kernel reads."""

import numpy as np

from ..online import LOG2E
from .call import call_record, own_scratch
from .compile import inner
from .simd import POINTER, at_byte, fetch_add, full_width, i64_ptr, lanes, pointer_like, scalar
from .storage import Strided, read_rows
from .vectors import MINUS_INF, load, multiply_add, select, splat, store


@inner
def read_head(call, scratch, array, first, w, dst):
    """Rows first:first + w of one head of dout or out, transposed; rows past its end repeat the last one."""
    table, rows = i64_ptr(at_byte(scratch, call.at_table)), at_byte(scratch, call.at_rows)
    for r in range(w):
        table[r] = array.address + min(first + r, call.rows - 1) * array.s
    read_rows(table, array.d, array.storage, rows, dst, w, call.v_dim)


@inner
def dot_lanes(x, y, sums, w, n):
    """sums[lane] = sum_d x[d, lane] y[d, lane], 0 where y is 0 throughout.

    y is a row of out. It is 0 throughout where the row sees no key, and its dout may then hold anything.
    """
    zero, one = splat(x, 0), splat(x, 1)
    for c in range(0, w, lanes(x)):
        # Two chains of additions, so that one need not wait for the other.
        even, odd, used = zero, zero, zero
        for d in range(0, n - 1, 2):
            at = d * w + c
            y0, y1 = load(y + at), load(y + (at + w))
            even = multiply_add(load(x + at), y0, even)
            odd = multiply_add(load(x + (at + w)), y1, odd)
            used = select(y0 == zero, select(y1 == zero, used, one), one)  # NaN counts as not 0
        if n & 1:
            at = (n - 1) * w + c
            y0 = load(y + at)
            even = multiply_add(load(x + at), y0, even)
            used = select(y0 == zero, used, one)
        store(sums + c, select(used == zero, zero, even + odd))


@inner
def delta(call, scratch, b, h, first):
    """A tile of queries of one head."""
    count, n, vector = min(full_width(scratch), call.rows - first), call.v_dim, lanes(scratch)
    w = (count + vector - 1) // vector * vector
    x, sums = at_byte(scratch, call.at_o), at_byte(scratch, call.at_state)
    y = x + n * full_width(scratch)
    # Both transposed, so that a lane sums its own row.
    dout_at, out_at = call.dout + b * call.dout_b + h * call.dout_h, call.out + b * call.out_b + h * call.out_h
    read_head(call, scratch, Strided(dout_at, 0, call.dout_s, call.dout_d, call.storage), first, w, x)
    read_head(call, scratch, Strided(out_at, 0, call.out_s, call.out_d, call.storage), first, w, y)
    dot_lanes(x, y, sums, w, n)
    to = (b * call.heads + h) * call.rows + first
    log_sums, deltas = pointer_like(x, call.log_sums) + to, pointer_like(x, call.deltas) + to
    # The log sum of an empty row is never used; 0 prevents -inf - -inf in the weights.
    for r in range(count):
        lse = pointer_like(x, call.lse + b * call.lse_b + h * call.lse_h + (first + r) * call.lse_s)[0]
        log_sums[r] = scalar(x, 0) if lse == MINUS_INF else scalar(x, np.float64(lse) * LOG2E)
        deltas[r] = sums[r]
    if call.dlse:
        for r in range(count):
            at = call.dlse + b * call.dlse_b + h * call.dlse_h + (first + r) * call.dlse_s
            deltas[r] = deltas[r] - pointer_like(x, at)[0]


def build_delta(elem: str):
    """drain(call_address): log sums in log2 units and delta of every query."""
    pointer = POINTER[elem]

    def drain(call_at):
        """Take tiles from the shared counter until none is left."""
        call = call_record(call_at, 0)
        scratch, counter = pointer(own_scratch(call)), i64_ptr(call.counter)
        w = full_width(scratch)
        in_head = (call.rows + w - 1) // w
        while True:
            item = fetch_add(counter, 1)
            if item >= call.n_items:
                break
            head, tile = item // in_head, item % in_head
            delta(call, scratch, head // call.heads, head % call.heads, tile * w)

    return drain
