"""The products of the kernels: three loops over `outer`, a multiply-add of one number with one row of vectors.

    score_products   s[j, :] = sum_c k[j, c] q[c, :]                 rows of K or V against transposed queries
    value_products   o[d, :] = o[d, :] alpha + sum_j v[j, d] p[j, :]     columns of V or K against weights
    row_products     c[j, :] += sum_r p[j, r] x[r, :]                weights against rows of queries, over several tiles

The last two start from zero and are added to the running sum once, at the store: two-level sums, whose error does not
grow with the number of keys before the block.

The letters, here and in the kernels: j counts keys, c the numbers of a feature, d those of a value, r the queries of a
tile (one a lane); w is the width of the tile, a multiple of the vector, and n a length that belongs to the argument
before it. A matrix of the tile is stored with its queries innermost: row j begins at j * w.
"""

from typing import Any, NamedTuple

from .call import part_record
from .compile import inner, outlined
from .registers import fold_tile, outer, outer_visible, shape, store_tile, width, zeros
from .simd import ROW, lanes

MR = ROW.mr  # keys, or dimensions, of a register tile


class Matrix(NamedTuple):
    """Rows of numbers, ld apart."""

    at: Any
    ld: int


class Seen(NamedTuple):
    """What a product over weights reads of hidden pairs, whose weight is 0."""

    visible: Any  # a byte for each pair, 0 where it is hidden
    masked: bool  # v holds a NaN or an infinity, and 0 times it is NaN


class Stack(NamedTuple):
    """One matrix for each of the tiles of queries that share a sum."""

    at: Any
    step: int  # numbers from one tile's matrix to the next


class Parts(NamedTuple):
    """Which keys of a block each of those tiles sees, and how wide it is: n PART records."""

    at: int
    n: int


# ---------------------------------------------------------------- one register tile, of any shape


@inner
def score_rows(k, q, s, n, size):
    """s[i, :] = sum_c k[i, c] q[c, :] for the keys i of a register tile."""
    t = zeros(k, size)
    w = width(t)
    # Four steps in one iteration, here and below: LLVM does not unroll a loop that carries a tile.
    for c in range(0, n - 3, 4):
        a, b = k + c, q + c * w
        t = outer(t, a, n, b)
        t = outer(t, a + 1, n, b + w)
        t = outer(t, a + 2, n, b + 2 * w)
        t = outer(t, a + 3, n, b + 3 * w)
    for c in range(n & ~3, n):
        t = outer(t, k + c, n, q + c * w)
    store_tile(t, s, w)


@inner
def value_rows(v, p, o, alpha, n, skip, size):
    """o[d, :] = o[d, :] alpha + sum_j v[j, d] p[j, :] over n keys, for the dimensions d >= skip of a register tile."""
    t = zeros(p, size)
    w, ld = width(t), v.ld
    for j in range(0, n - 3, 4):
        a, b = v.at + j * ld, p + j * w
        t = outer(t, a, 1, b)
        t = outer(t, a + ld, 1, b + w)
        t = outer(t, a + 2 * ld, 1, b + 2 * w)
        t = outer(t, a + 3 * ld, 1, b + 3 * w)
    for j in range(n & ~3, n):
        t = outer(t, v.at + j * ld, 1, p + j * w)
    fold_tile(t, o, w, alpha, skip)


@inner
def visible_value_rows(v, p, visible, o, alpha, n, skip, size):
    """value_rows() that leaves out the pairs whose byte is 0, whatever stands in v."""
    t = zeros(p, size)
    w, ld = width(t), v.ld
    for j in range(0, n - 1, 2):
        a, b, seen = v.at + j * ld, p + j * w, visible + j * w
        t = outer_visible(t, a, 1, b, seen)
        t = outer_visible(t, a + ld, 1, b + w, seen + w)
    if n & 1:
        t = outer_visible(t, v.at + (n - 1) * ld, 1, p + (n - 1) * w, visible + (n - 1) * w)
    fold_tile(t, o, w, alpha, skip)


@inner
def row_product(p, x, parts, j, c, ones, size):
    """c[i, :] += sum over tiles and their queries r of p[j + i, r] x[r, :], for the keys i of a register tile."""
    t = zeros(p.at, size)
    ld = c.ld
    # The sum goes on in registers from tile to tile; one that does not see key j adds nothing.
    for tile in range(parts.n):
        part = part_record(parts.at, tile)
        if part.first <= j and j < part.last:
            count, w = part.count, part.width
            a, b = p.at + (tile * p.step + j * w), x.at + tile * x.step
            for r in range(0, count - 3, 4):
                t = outer(t, a + r, w, b + r * ld)
                t = outer(t, a + (r + 1), w, b + (r + 1) * ld)
                t = outer(t, a + (r + 2), w, b + (r + 2) * ld)
                t = outer(t, a + (r + 3), w, b + (r + 3) * ld)
            for r in range(count & ~3, count):
                t = outer(t, a + r, w, b + r * ld)
    fold_tile(t, c.at, ld, ones, 0)


# ---------------------------------------------------------------- by the width of the tile of queries
#
# A tile is 1 to 3 vectors of queries wide. (A row of the SIMD table with more vectors would need more cases here.)


@inner
def score_rows_of_width(k, q, s, w, n):
    vector = lanes(k)
    if w == 3 * vector:
        score_rows(k, q, s, n, shape(MR, 3))
    elif w == 2 * vector:
        score_rows(k, q, s, n, shape(MR, 2))
    else:
        score_rows(k, q, s, n, shape(MR, 1))


@inner
def value_rows_of_width(v, p, o, w, alpha, n, skip):
    vector = lanes(p)
    if w == 3 * vector:
        value_rows(v, p, o, alpha, n, skip, shape(MR, 3))
    elif w == 2 * vector:
        value_rows(v, p, o, alpha, n, skip, shape(MR, 2))
    else:
        value_rows(v, p, o, alpha, n, skip, shape(MR, 1))


@inner
def visible_value_rows_of_width(v, p, visible, o, w, alpha, n, skip):
    vector = lanes(p)
    if w == 3 * vector:
        visible_value_rows(v, p, visible, o, alpha, n, skip, shape(MR, 3))
    elif w == 2 * vector:
        visible_value_rows(v, p, visible, o, alpha, n, skip, shape(MR, 2))
    else:
        visible_value_rows(v, p, visible, o, alpha, n, skip, shape(MR, 1))


@inner
def score_row(k, q, s, w, n):
    """One key alone: blocks of under MR keys."""
    for r in range(0, w, lanes(k)):
        t = zeros(k, shape(1, 1))
        for c in range(n):
            t = outer(t, k + c, 0, q + (c * w + r))
        store_tile(t, s + r, w)


@inner
def visible_value_row(v, p, visible, o, w, alpha, n):
    """One dimension alone: head sizes under MR."""
    for r in range(0, w, lanes(p)):
        t = zeros(p, shape(1, 1))
        for j in range(n):
            t = outer_visible(t, v.at + j * v.ld, 0, p + (j * w + r), visible + (j * w + r))
        fold_tile(t, o + r, w, alpha + r, 0)


# ---------------------------------------------------------------- a block of keys


@outlined
def score_products(k, q, s, keys, w, n):
    """s[first:last] over n numbers of a feature; keys.first is a multiple of MR."""
    first, last = keys.first, keys.last
    if last >= MR:
        for j in range(first, last, MR):
            at = min(j, last - MR)  # the last register tile overlaps rows that are done
            score_rows_of_width(k + at * n, q, s + at * w, w, n)
    else:
        for j in range(first, last):
            score_row(k + j * n, q, s + j * w, w, n)


@outlined
def value_products(v, p, seen, o, alpha, keys, w, n):
    """o over the keys of the block and n dimensions.

    Hidden pairs have p = 0, which changes nothing where v is finite; seen.masked is for a block with a NaN or infinity.
    """
    n_keys, skipped = keys.last - keys.first, keys.first * w
    v, p, visible = v + keys.first * n, p + skipped, seen.visible + skipped
    # Few dimensions: one by one, by the product that reads the bytes, which must then all be set.
    if n < MR:
        if not seen.masked:
            for x in range(n_keys * w):
                visible[x] = 255
        for d in range(n):
            visible_value_row(Matrix(v + d, n), p, visible, o + d * w, w, alpha, n_keys)
        return
    for d in range(0, n, MR):
        at = min(d, n - MR)
        # The last register tile overlaps dimensions that are folded already, and skips those.
        if seen.masked:
            visible_value_rows_of_width(Matrix(v + at, n), p, visible, o + at * w, w, alpha, n_keys, d - at)
        else:
            value_rows_of_width(Matrix(v + at, n), p, o + at * w, w, alpha, n_keys, d - at)


@outlined
def row_products(p, x, parts, c, ones, low, high):
    """c[j, :] += sum over tiles and their queries r of p[j, r] x[r, :] for keys low:high; low is a multiple of MR.

    Up to MR - 1 rows of c past high are written too. Rows of x are c.ld apart like those of c, a multiple of the
    vector; ones holds 3 vectors of ones. The keys are innermost: three columns of x, 18 KB for two tiles of 48 queries,
    stay in the first-level cache (1 to 4 % faster than the other order).
    """
    vector = lanes(ones)
    d = 0
    while d < c.ld:
        # Three columns at a time, and the last four as two and two: a single column has the fewest independent sums.
        left = (c.ld - d) // vector
        column = Stack(x.at + d, x.step)
        if left == 3 or left > 4:
            for j in range(low, high, MR):
                row_product(p, column, parts, j, Matrix(c.at + (j * c.ld + d), c.ld), ones, shape(MR, 3))
            d += 3 * vector
        elif left > 1:
            for j in range(low, high, MR):
                row_product(p, column, parts, j, Matrix(c.at + (j * c.ld + d), c.ld), ones, shape(MR, 2))
            d += 2 * vector
        else:
            for j in range(low, high, MR):
                row_product(p, column, parts, j, Matrix(c.at + (j * c.ld + d), c.ld), ones, shape(MR, 1))
            d += vector
