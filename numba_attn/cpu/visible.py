"""Which pairs of a tile of queries and a block of keys are visible, and -inf for the scores of the others.

Two forms: each lane's interval of keys, which costs a comparison, and a byte for each pair, 0 where it is hidden, where
masks, segments, mask functions, a bias or a score function hide pairs that no interval describes.
"""

from typing import NamedTuple

import numpy as np

from .call import mask_record, modifier_record, segments_record
from .compile import inner, outlined
from .queries import read_queries, row_addresses, same_head
from .simd import address_of, at_byte, call_address, i32_ptr, i64_ptr, lanes, u8_ptr
from .storage import Strided, gather
from .vectors import MINUS_INF, any_bit, load, load_bits, load_lanes, select, splat, store, store_bytes

NONE, ALL, SOME = 0, 1, 2  # visible pairs of a tile with a block of keys


class Pairs(NamedTuple):
    """What is known of the visible pairs."""

    seen: int  # NONE, ALL or SOME
    filled: bool  # the bytes at call.at_visible say which; else intervals do


# ---------------------------------------------------------------- intervals


@outlined
def lane_bounds(queries, j0, block, bounds):
    """Each lane's first and end key, counted from the block's start, as 32-bit numbers."""
    w, starts, ends = queries.width, queries.starts, queries.ends
    for r in range(w):
        bounds[r] = min(max(starts[r] - j0, 0), block)
        bounds[w + r] = min(max(ends[r] - j0, 0), block)


@outlined
def hide_outside(s, w, first, last, bounds):
    """-inf where a lane's interval does not hold the key: hide() without bytes."""
    for c in range(0, w, lanes(s)):
        low, high = load_lanes(bounds + c, s), load_lanes(bounds + (w + c), s)
        for j in range(first, last):
            at, row = splat(low, j), s + (j * w + c)
            store(row, select((low <= at) & (at < high), load(row), splat(s, MINUS_INF)))


@outlined
def interval_bytes(visible, w, keys, bounds, like):
    """visible[j, lane]: whether the lane's interval holds the key; like: a pointer of the accumulation type."""
    for c in range(0, w, lanes(like)):
        low, high = load_lanes(bounds + c, like), load_lanes(bounds + (w + c), like)
        for j in range(keys.first, keys.last):
            at = splat(low, j)
            store_bytes(visible + (j * w + c), (low <= at) & (at < high))


# ---------------------------------------------------------------- bytes


@outlined
def hide(s, visible, w, first, last):
    """-inf where the byte of visible is 0, whatever the score is."""
    for x in range(first * w, last * w, lanes(s)):
        store(s + x, select(load_bits(visible + x, s), load(s + x), splat(s, MINUS_INF)))


@outlined
def clear_hidden(s, x, w, keys):
    """0 in x for the pairs that s hides."""
    for n in range(keys.first * w, keys.last * w, lanes(s)):
        store(x + n, select(load(s + n) == splat(s, MINUS_INF), splat(s, 0), load(x + n)))


@outlined
def mask_bytes(task, queries, keys, n, visible):
    """visible &= the n-th bool array; visible begins at keys.first."""
    call, scratch = task.call, task.scratch
    w, n_keys = queries.width, keys.last - keys.first
    table, seen = i64_ptr(at_byte(scratch, call.at_table)), u8_ptr(at_byte(scratch, call.at_seen))
    mask = mask_record(call.masks, n)
    at = mask.address + queries.batch * mask.b + (keys.key + keys.first) * mask.j
    row_addresses(table, Strided(at, mask.h, mask.i, mask.j, 0), queries)
    # Keys side by side are transposed in squares like rows of floats.
    if mask.j == 1:
        gather(table, seen, w, n_keys, scratch)
    else:
        for r in range(w):
            for j in range(n_keys):
                seen[j * w + r] = u8_ptr(table[r] + j * mask.j)[0]
    for x in range(n_keys * w):
        visible[x] = visible[x] if seen[x] else 0


@outlined
def segment_bytes(task, queries, keys, n, visible):
    """visible &= query and key have the same number in the n-th pair of segment arrays."""
    w, last = queries.width, queries.count - 1
    segments = segments_record(task.call.segments, n)
    q_ids = i64_ptr(segments.q + queries.batch * segments.q_b)
    k_ids = i64_ptr(segments.k + queries.batch * segments.k_b) + (keys.key + keys.first)
    for r in range(w):
        own = q_ids[queries.rows[min(r, last)]]
        for j in range(keys.last - keys.first):
            if k_ids[j] != own:
                visible[j * w + r] = 0


@outlined
def mod_calls(fn, aux, target, queries, keys):
    """A user's function over the tile, one call for each run of lanes that share a head; target begins at
    keys.first."""
    rows, heads, w, count = queries.rows, queries.heads, queries.width, queries.count
    r = 0
    while r < count:
        end = same_head(heads, r, count)
        key, n = keys.key + keys.first, keys.last - keys.first
        call_address(fn, address_of(target + r), w, end - r, queries.batch, heads[r], rows[r], key, n, aux)
        r = end


@inner
def bias_bytes(task, queries, keys, visible):
    """The bias of the tile into its buffer; visible &= it is not -inf."""
    call, n_keys = task.call, keys.last - keys.first
    # A pair that a bias of -inf hides must be known before the products: its score may be NaN.
    tile = at_byte(task.scratch, call.at_bias) + keys.first * queries.width
    at = call.bias + queries.batch * call.bias_b + (keys.key + keys.first) * call.bias_j
    array = Strided(at, call.bias_h, call.bias_i, call.bias_j, call.bias_storage)
    read_queries(task, queries, array, tile, n_keys)
    for x in range(n_keys * queries.width):
        visible[x] = 0 if tile[x] == MINUS_INF else visible[x]


@inner
def pair_bytes(task, queries, keys, visible):
    """Clear the bytes of the pairs that some mask hides; how many pairs are left."""
    call, w, count = task.call, queries.width, queries.count
    for n in range(call.n_masks):
        mask_bytes(task, queries, keys, n, visible)
    for n in range(call.n_segments):
        segment_bytes(task, queries, keys, n, visible)
    for n in range(call.n_mask_mods):
        mod = modifier_record(call.mask_mods, n)
        mod_calls(mod.fn, mod.aux, visible, queries, keys)
    if call.bias:
        bias_bytes(task, queries, keys, visible)
    # Idle lanes repeat a query and are not counted.
    total = 0
    for j in range(keys.last - keys.first):
        for r in range(count):
            total += np.int64(visible[j * w + r] != 0)
    return total


# ---------------------------------------------------------------- the three steps of a block


@inner
def visible_pairs(task, queries, keys, bytes_wanted):
    """Before the products: which pairs intervals, masks and bias leave visible. Bytes only where some are needed."""
    call, scratch = task.call, task.scratch
    first, last, w = keys.first, keys.last, queries.width
    visible, bounds = u8_ptr(at_byte(scratch, call.at_visible)), i32_ptr(at_byte(scratch, call.at_bounds))
    # Intervals alone: a block inside the interval of every lane is visible as a whole, which is the usual case.
    partial = keys.j0 + first < queries.inner_low or keys.j0 + last > queries.inner_high
    pairwise = call.n_masks + call.n_segments + call.n_mask_mods > 0 or call.bias != 0
    filled = pairwise or (partial and bytes_wanted)
    if partial or filled:
        lane_bounds(queries, keys.j0, call.block, bounds)
    if filled:
        interval_bytes(visible, w, keys, bounds, scratch)
    # Pair by pair: the number of visible pairs tells whether a block can be skipped, or needs no mask.
    if pairwise:
        total = pair_bytes(task, queries, keys, visible + first * w)
        if total == 0:
            return Pairs(NONE, filled)
        partial = total < (last - first) * queries.count
    return Pairs(SOME if partial else ALL, filled)


@outlined
def hidden_by_score(task, queries, keys, s, pairs):
    """After score_mod: it hides a pair by returning -inf, whose byte is cleared here."""
    call, w = task.call, queries.width
    visible, bounds = u8_ptr(at_byte(task.scratch, call.at_visible)), i32_ptr(at_byte(task.scratch, call.at_bounds))
    # Search for -inf first: for a score function that hides no pair this is one pass over the tile.
    any_hidden = False
    for x in range(keys.first * w, keys.last * w, lanes(s)):
        any_hidden = any_hidden or any_bit(load(s + x) == splat(s, MINUS_INF))
    if not any_hidden:
        return pairs
    # Bytes for all that is hidden: what intervals hide, then what the function has hidden.
    if not pairs.filled:
        lane_bounds(queries, keys.j0, call.block, bounds)
        interval_bytes(visible, w, keys, bounds, s)
    for x in range(keys.first * w, keys.last * w):
        visible[x] = 0 if s[x] == MINUS_INF else visible[x]
    return Pairs(SOME, True)


@inner
def hide_pairs(task, queries, keys, s, pairs):
    """At the end: -inf for the hidden pairs."""
    if pairs.seen != SOME:
        return
    call, w, first, last = task.call, queries.width, keys.first, keys.last
    if pairs.filled:
        hide(s, u8_ptr(at_byte(task.scratch, call.at_visible)), w, first, last)
        return
    bounds = i32_ptr(at_byte(task.scratch, call.at_bounds))
    # Only keys before the last lane's first, or after the first lane's end, can be hidden: the rows between are not
    # touched.
    inner_low = min(max(queries.inner_low - keys.j0, first), last)
    inner_high = max(min(queries.inner_high - keys.j0, last), first)
    if inner_low < inner_high:
        hide_outside(s, w, first, inner_low, bounds)
        hide_outside(s, w, inner_high, last, bounds)
    else:
        hide_outside(s, w, first, last, bounds)
