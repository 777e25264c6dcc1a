"""dS by the final score -> dS by the product, and the gradients that are reduced on the way: of bias, of ALiBi slopes
and of the arrays of a score function."""

import numpy as np

from .compile import inner, outlined
from .queries import same_head, write_queries
from .simd import address_of, at_byte, call_address, f64_ptr, full_width, itemsize, scalar
from .storage import Strided, storage_of


@inner
def ones_of(task):
    """A full width of ones: the factor of the earlier sums, which are never rescaled here."""
    return at_byte(task.scratch, task.call.at_state)


@outlined
def chain(ds, slope, begin, end):
    for x in range(begin, end):
        ds[x] = ds[x] * slope[x]


@outlined
def add_daux(task, unit, queries, keys, ds):
    """The gradients of aux, one call for each run of lanes that share a head."""
    call, rows, heads = task.call, queries.rows, queries.heads
    w, count = queries.width, queries.count
    sums, skipped = call.aux_sums + unit * call.aux_sums_unit, keys.first * w
    raw = at_byte(task.scratch, call.at_raw) + skipped
    r = 0
    while r < count:
        end = same_head(heads, r, count)
        at, weight, b = address_of(raw + r), address_of(ds + (skipped + r)), queries.batch
        key, n, aux = keys.key + keys.first, keys.last - keys.first, call.score_aux
        call_address(call.aux_grad, at, weight, w, end - r, b, heads[r], rows[r], key, n, aux, sums)
        r = end


@outlined
def add_dbias(call, unit, queries, keys, ds):
    """dS into the sums of this unit, in float64; broadcast axes have stride 0."""
    rows, heads, w = queries.rows, queries.heads, queries.width
    sums = f64_ptr(call.dbias + unit * call.dbias_unit) + (queries.batch * call.dbias_b + keys.key * call.dbias_j)
    for j in range(keys.first, keys.last):
        for r in range(queries.count):
            at = heads[r] * call.dbias_h + rows[r] * call.dbias_i + j * call.dbias_j
            sums[at] = sums[at] + np.float64(ds[j * w + r])


@outlined
def write_dbias(task, queries, keys, ds):
    """dS to a bias that is nowhere broadcast: each pair has its own place."""
    call, item = task.call, itemsize(ds)
    at = call.dbias + queries.batch * call.dbias_b + (keys.key + keys.first) * item
    array = Strided(at, call.dbias_h, call.dbias_i, item, storage_of(ds))
    tile = ds + keys.first * queries.width
    write_queries(task, queries, array, tile, ones_of(task), keys.last - keys.first)


@outlined
def add_dslopes(task, unit, queries, keys, ds):
    """-dS |i + offset - j|, summed over the tile's pairs lane by lane, then by head."""
    call, scratch, w = task.call, task.scratch, queries.width
    sums, position = f64_ptr(at_byte(scratch, call.at_sums)), at_byte(scratch, call.at_lanes) + full_width(scratch)
    # Lane by lane in float64, whose order does not depend on how lanes share heads.
    for r in range(w):
        sums[r] = 0.0
    for j in range(keys.first, keys.last):
        for r in range(w):
            sums[r] = sums[r] - np.float64(ds[j * w + r] * abs(position[r] - scalar(ds, j)))
    dslopes = f64_ptr(call.dslopes + unit * call.dslopes_unit) + queries.batch * call.dslopes_b
    for r in range(queries.count):
        head = queries.heads[r]
        dslopes[head] = dslopes[head] + sums[r]


@inner
def through_modifiers(task, unit, queries, keys, ds):
    """dS by the final score -> dS by the product, from the last modifier to the first."""
    call, scratch, w = task.call, task.scratch, queries.width
    begin, end = keys.first * w, keys.last * w
    # score_mod came last: its arrays take dS as it is, the score before it takes dS times the slope.
    if call.aux_grad:
        add_daux(task, unit, queries, keys, ds)
    if call.score_mod:
        chain(ds, at_byte(scratch, call.at_slope), begin, end)
    # ALiBi and bias were added: dS passes them unchanged.
    if call.dslopes:
        add_dslopes(task, unit, queries, keys, ds)
    if call.dbias_whole:
        write_dbias(task, queries, keys, ds)
    elif call.dbias:
        add_dbias(call, unit, queries, keys, ds)
    # softcap came first.
    if call.use_softcap:
        chain(ds, at_byte(scratch, call.at_curve), begin, end)
