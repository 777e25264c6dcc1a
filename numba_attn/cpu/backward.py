"""The backward kernel: dq, dk, dv and the reduced gradients in one pass over the pairs, from (q, k, v, out, lse, dout).

    delta = rowsum(dout out) - dlse                       a pass of its own: `build_delta`
    for a range of keys, with dK and dV in scratch:
        for a few tiles of queries: Q', dO' transposed, Q, dO as rows; dQ' = 0
            for a block of keys of the range, for each tile that sees it:
                S'  = K Q'          the forward's step: modified, -inf where hidden
                dP' = V dO'
                P'  = 2**(S' - lse)          dS' = P' (dP' - delta), then the chain rule through the modifiers
                dQ' += K' dS'
            dV += P' dO, dK += dS' Q         over all those tiles at once
        dK scale, dV go out; dQ' is added to the head's

With the forward's two these are seven products. For a hidden pair P and dS are 0, whatever its operands are. A product
starts from zero in every block and is added to the running sum once: two-level sums, dQ' three-level.

Key ranges are at most RANGES equal runs of whole blocks, a function of Sk alone. One thread takes all ranges of a head
in order, and adds their dQ' one after another. Of the last heads, one for each thread, each range is a work item. The
thread that finishes the last range of such a head adds the same sums in the same order. So no bit depends on threads,
and dQ' of a range is kept for a few heads only.
"""

from typing import Any, NamedTuple

from .call import TILE, buffers, call_record, own_scratch, part_record, sequence_record, tile_rows, tiles_of
from .compile import inner, outlined
from .products import MR, Matrix, Parts, Seen, Stack, row_products, score_products, value_products
from .queries import (
    Keys,
    Task,
    k_array,
    key_range,
    locate,
    q_array,
    queries_at,
    row_addresses,
    v_array,
    write_queries,
)
from .reduced import ones_of, through_modifiers
from .simd import (
    POINTER,
    ROW,
    address_of,
    at_byte,
    fetch_add,
    full_width,
    i64_ptr,
    itemsize,
    lanes,
    pointer_like,
    scalar,
    u8_ptr,
)
from .step import dropout, score_block_slopes
from .storage import KeyRows, Strided, all_finite, gather, key_rows, read_row, write_row
from .vectors import MINUS_INF, exp2, load, select, splat, store
from .visible import NONE, SOME, clear_hidden

RANGES = 8
TILES = 2  # of queries that share a pass over K and V, and one sum of dK and dV: 1 to 8 are within 2 %


def key_block(elem: str, head_dim: int) -> int:
    """Keys a block: a function of accumulation type and head size alone, since a row's bits depend on it.

    Beside 256, 128 keys are 2 to 4 % slower, 64 keys 3 to 5, 512 keys no faster. Nor is it faster to take all ranges of
    a head with the same tiles, which are then loaded once: K, V, dK and dV of a head leave the second-level cache (Zen
    4, D = 64 and 128).
    """
    keys = 256 if head_dim <= 128 else 128
    return keys if elem == "f32" else keys // 2


def range_keys(elem: str, head_dim: int, kv_len: int) -> int:
    """Keys of a range."""
    block = key_block(elem, head_dim)
    blocks = (kv_len + block - 1) // block
    return (blocks + RANGES - 1) // RANGES * block


def padded(elem: str, n: int) -> int:
    """n rounded up to whole vectors."""
    lanes = ROW.lanes(elem)
    return -(-n // lanes) * lanes


class Needs(NamedTuple):
    """What a call has that takes a buffer of its own."""

    copies: bool  # K and V are copied before the kernel reads them
    bias: bool
    modified: bool  # softcap or score_mod
    drop: bool


def layout(elem: str, qk_dim: int, v_dim: int, keys: int, head_size: int, needs: Needs) -> dict[str, int]:
    """The buffers of a thread: keys in the longest range, numbers in the longest head's dQ'."""
    w, size, block = tile_rows(elem), 4 if elem == "f32" else 8, key_block(elem, max(qk_dim, v_dim))
    tile = block * w * size
    return buffers(
        {
            "s": TILES * tile,
            "dp": TILES * tile,
            "q": TILES * qk_dim * w * size,
            "o": max(TILES, 2) * v_dim * w * size,  # `delta` puts dout and out of a tile there
            "q_rows": TILES * padded(elem, qk_dim) * w * size,
            "dout_rows": TILES * padded(elem, v_dim) * w * size,
            "dq_tile": TILES * qk_dim * w * size,
            "dq": head_size * size,
            "dk": (keys + ROW.mr) * padded(elem, qk_dim) * size,
            "dv": (keys + ROW.mr) * padded(elem, v_dim) * size,
            "state": (1 + 2 * TILES) * w * size,
            "infos": TILES * TILE.itemsize,
            "parts": TILES * 4 * 8,
            "bad": TILES * w * 8,
            "flags": (keys // block + 1) * 8,
            "table": 2 * w * 8,
            "bounds": 2 * w * 4,
            "lanes": 2 * w * size,
            "sums": w * 8,
            "visible": block * w,
            "seen": block * w,
            "bias": tile * needs.bias,
            "slope": tile * needs.modified,
            "curve": tile * needs.modified,
            "raw": tile * needs.modified,
            "keep": tile * needs.drop,
            "rows": max(qk_dim, v_dim, block) * w * size,
            "k": keys * qk_dim * size * needs.copies,
            "v": keys * v_dim * size * needs.copies,
        }
    )


# ---------------------------------------------------------------- a tile of queries and a range of keys


class Tile(NamedTuple):
    """A tile of queries with all that is kept of it during its pass over the blocks of a range."""

    queries: Any  # its TILE record
    q: Any  # scaled queries and dout, transposed: x[c, lane]
    dout: Any
    q_rows: Any  # the same as rows, padded with zeros to whole vectors, queries not scaled
    dout_rows: Any
    p: Any  # weights, and dS, of one block of keys: p[j, lane]
    ds: Any
    log_sums: Any  # of each lane, in log2 units
    deltas: Any
    dq: Any  # dq[c, lane], summed over the range
    bad: Any  # of each lane: 1 if its row of q is not finite, + 2 if its row of dout is not


class Span(NamedTuple):
    """A range of keys: low:high of a sequence, as accumulation type, and the sums of their gradients."""

    low: int  # counted from the sequence's start
    high: int
    unit: int  # which copy of the reduced gradients this range adds to
    k: Any  # its rows, one after another
    v: Any
    flags: Any  # for each block of keys: whether its K is finite
    dk: Matrix  # sums over all queries so far, not scaled
    dv: Matrix


@inner
def whole_vectors(p, n):
    """n rounded up to whole vectors."""
    vector = lanes(p)
    return (n + vector - 1) // vector * vector


@inner
def tile_at(task, t):
    """The t-th of the tiles that share a pass."""
    call, scratch, w = task.call, task.scratch, full_width(task.scratch)
    block, qk, dv = call.block * w, call.qk_dim * w, call.v_dim * w
    log_sums = at_byte(scratch, call.at_state) + (1 + 2 * t) * w
    return Tile(
        queries_at(task, t),
        at_byte(scratch, call.at_q) + t * qk,
        at_byte(scratch, call.at_o) + t * dv,
        at_byte(scratch, call.at_q_rows) + t * whole_vectors(scratch, call.qk_dim) * w,
        at_byte(scratch, call.at_dout_rows) + t * whole_vectors(scratch, call.v_dim) * w,
        at_byte(scratch, call.at_s) + t * block,
        at_byte(scratch, call.at_dp) + t * block,
        log_sums,
        log_sums + w,
        at_byte(scratch, call.at_dq_tile) + t * qk,
        i64_ptr(at_byte(scratch, call.at_bad)) + t * w,
    )


# ---------------------------------------------------------------- loading a tile


@outlined
def load_rows(task, queries, array, rows, n):
    """The tile's rows of an array as accumulation type, padded with zeros; their addresses are left in the table."""
    table, ld, count = i64_ptr(at_byte(task.scratch, task.call.at_table)), whole_vectors(rows, n), queries.count
    row_addresses(table, array, queries)
    # Padding takes part in products of whole vectors, so it must be 0.
    for r in range(count):
        to = rows + r * ld
        read_row(table[r], array.d, array.storage, to, n)
        for c in range(n, ld):
            to[c] = 0.0
    for r in range(queries.width):  # idle lanes read the last row
        table[r] = address_of(rows + min(r, count - 1) * ld)
    return table


@outlined
def mark_bad_rows(task, tile):
    """A row that is not finite becomes 0 among the rows, and is marked: see `add_bad_rows`."""
    call, q_rows, dout_rows, bad = task.call, tile.q_rows, tile.dout_rows, tile.bad
    qk, dv = call.qk_dim, call.v_dim
    ldq, ldo = whole_vectors(q_rows, qk), whole_vectors(q_rows, dv)
    for r in range(tile.queries.count):
        bad[r] = 0
        if not all_finite(q_rows + r * ldq, qk):
            bad[r] = 1
            for c in range(qk):
                q_rows[r * ldq + c] = 0.0
        if not all_finite(dout_rows + r * ldo, dv):
            bad[r] = bad[r] | 2
            for c in range(dv):
                dout_rows[r * ldo + c] = 0.0


@inner
def load_tile(task, tile):
    """Q' scaled and dO', Q and dO as rows, log sums, delta, dQ' = 0."""
    call, queries = task.call, tile.queries
    b, w = queries.batch, queries.width
    q, dout, dq = tile.q, tile.dout, tile.dq
    qk, dv = call.qk_dim, call.v_dim
    # As rows first, since dV and dK read rows; the transposes are made from those.
    gather(load_rows(task, queries, q_array(task), tile.q_rows, qk), q, w, qk, q)
    factor = scalar(q, call.q_scale)
    for x in range(qk * w):
        q[x] = q[x] * factor
    array = Strided(call.dout + b * call.dout_b, call.dout_h, call.dout_s, call.dout_d, call.storage)
    gather(load_rows(task, queries, array, tile.dout_rows, dv), dout, w, dv, dout)
    # A row that is not finite would make its products so. It is kept apart: see `add_bad_rows`.
    queries.q_finite, queries.dout_finite = all_finite(q, qk * w), all_finite(dout, dv * w)
    if not (queries.q_finite and queries.dout_finite):
        mark_bad_rows(task, tile)
    # What the delta kernel has computed for each row.
    log_sums, deltas = pointer_like(q, call.log_sums), pointer_like(q, call.deltas)
    for r in range(w):
        at = (b * call.heads + queries.heads[r]) * call.rows + queries.rows[r]
        tile.log_sums[r] = log_sums[at]
        tile.deltas[r] = deltas[at]
    for x in range(qk * w):
        dq[x] = 0.0


# ---------------------------------------------------------------- P and dS


@outlined
def weights(tile, keys, w):
    """p: scores in, weights out; ds: dP in, dS = p (dP - delta) out; both 0 for a hidden pair.

    A weight is at most 1, also where the log sum of large scores is rounded to less than the largest.
    """
    s, dp = tile.p, tile.ds
    hidden, zero = splat(s, MINUS_INF), splat(s, 0)
    for c in range(0, w, lanes(s)):
        log_sum, delta = load(tile.log_sums + c), load(tile.deltas + c)
        for j in range(keys.first, keys.last):
            at = j * w + c
            x = load(s + at)
            y = x - log_sum
            # Zeros of hidden pairs are selected, not multiplied: dP may be NaN there.
            p = select(x == hidden, zero, exp2(select(y > zero, zero, y)))
            ds = select(x == hidden, zero, p * (load(dp + at) - delta))
            store(s + at, p)
            store(dp + at, ds)


@outlined
def dropped_weights(tile, keep, keys, w):
    """weights() under dropout: keep holds 0 or 1 / (1 - dropout_p), and p goes out times it."""
    s, dp = tile.p, tile.ds
    hidden, zero = splat(s, MINUS_INF), splat(s, 0)
    for c in range(0, w, lanes(s)):
        log_sum, delta = load(tile.log_sums + c), load(tile.deltas + c)
        for j in range(keys.first, keys.last):
            at = j * w + c
            x, z = load(s + at), load(keep + at)
            y = x - log_sum
            p = select(x == hidden, zero, exp2(select(y > zero, zero, y)))
            ds = select(x == hidden, zero, p * (load(dp + at) * z - delta))
            store(s + at, p * z)
            store(dp + at, ds)


@inner
def kept(task, queries, keys):
    """What dropout multiplies each weight with: 0 or 1 / (1 - dropout_p)."""
    w, keep = queries.width, at_byte(task.scratch, task.call.at_keep)
    for x in range(keys.first * w, keys.last * w):
        keep[x] = 1.0
    dropout(task.call, keep, queries, keys)
    return keep


# ---------------------------------------------------------------- a block of keys


@inner
def pair_block(task, unit, tile, keys, k, v):
    """P' and dS' of a tile with a block of keys; dQ' += K' dS'."""
    call, scratch, queries = task.call, task.scratch, tile.queries
    w, qk, dv = queries.width, call.qk_dim, call.v_dim
    seen = score_block_slopes(task, queries, keys, k, tile.q, tile.p, not k.finite)
    if seen == NONE:
        return seen
    # dP' = V dO', in the buffer where dS' replaces it
    score_products(v, tile.dout, tile.ds, keys, w, dv)
    # A modifier's derivative at a hidden pair may be anything: 0 times it must be 0.
    if seen == SOME:
        if call.score_mod:
            clear_hidden(tile.p, at_byte(scratch, call.at_slope), w, keys)
        if call.use_softcap:
            clear_hidden(tile.p, at_byte(scratch, call.at_curve), w, keys)
    if call.drop:
        dropped_weights(tile, kept(task, queries, keys), keys, w)
    else:
        weights(tile, keys, w)
    through_modifiers(task, unit, queries, keys, tile.ds)
    # dQ' += K' dS': the values of this sum are the rows of K
    hidden = Seen(u8_ptr(at_byte(scratch, call.at_visible)), seen == SOME and not k.finite)
    value_products(k.at, tile.ds, hidden, tile.dq, ones_of(task), keys, w, qk)
    return seen


@outlined
def add_bad_rows(task, tile, part, dk, dv):
    """Add the products of marked rows. dS is not finite where such a row is visible, and 0 where it is hidden.

    The products leave these rows out: there, 0 times the NaN of a hidden pair would make the sums of all keys NaN.
    """
    w, n = tile.queries.width, task.call.v_dim
    bad, p, ds, dout = tile.bad, tile.p, tile.ds, tile.dout
    for r in range(tile.queries.count):
        for j in range(part.first, part.last):
            if bad[r] and ds[j * w + r] != 0.0:
                if bad[r] & 1:
                    row = dk.at + j * dk.ld
                    for c in range(task.call.qk_dim):
                        row[c] = row[c] + ds[j * w + r]
                if bad[r] & 2:
                    row = dv.at + j * dv.ld
                    for c in range(n):
                        row[c] = row[c] + p[j * w + r] * dout[c * w + r]


@inner
def add_keys(task, n, dk, dv, low, high):
    """dV += P' dO and dK += dS' Q over n tiles, for the keys low:high of a block that some tile sees."""
    call, w = task.call, full_width(task.scratch)
    tile, parts = tile_at(task, 0), address_of(task.scratch) + call.at_parts
    block = call.block * w
    # Rows past the tiles' own counts are not read: PART records say how many there are.
    p, ds = Stack(tile.p, block), Stack(tile.ds, block)
    q_rows, dout_rows = Stack(tile.q_rows, dk.ld * w), Stack(tile.dout_rows, dv.ld * w)
    row_products(p, dout_rows, Parts(parts, n), dv, ones_of(task), low, high)
    row_products(ds, q_rows, Parts(parts, n), dk, ones_of(task), low, high)
    for t in range(n):
        tile, part = tile_at(task, t), part_record(parts, t)
        queries = tile.queries
        if part.first < part.last and not (queries.q_finite and queries.dout_finite):
            add_bad_rows(task, tile, part, dk, dv)


@inner
def attend_block(task, span, n, j0):
    """n tiles of queries with the block of keys at j0 of a span."""
    call, at = task.call, j0 - span.low
    n_keys, key, parts = min(call.block, span.high - j0), task.sequence.k_start + j0, call.at_parts
    k = KeyRows(span.k + at * call.qk_dim, span.flags[at // call.block] != 0)
    v = span.v + at * call.v_dim
    # Tile by tile: weights, dS and the sum of dQ'. The keys of the block that each tile sees are noted.
    low, high = n_keys, 0
    for t in range(n):
        tile, part = tile_at(task, t), part_record(address_of(task.scratch) + parts, t)
        queries = tile.queries
        first, last = key_range(queries, j0, n_keys)
        if first < last:
            if pair_block(task, span.unit, tile, Keys(j0, key, first, last), k, v) == NONE:
                last = first
            else:
                low, high = min(low, first), max(high, last)
        part.first, part.last, part.count, part.width = first, last, queries.count, queries.width
    # All tiles at once: the sums of dK and dV. That takes fewer additions in memory, and sums in registers are longer.
    if low < high:
        dk, dv = span.dk, span.dv
        add_keys(task, n, Matrix(dk.at + at * dk.ld, dk.ld), Matrix(dv.at + at * dv.ld, dv.ld), low, high)


# ---------------------------------------------------------------- a range of keys


@outlined
def zeroed(p, rows, n):
    """Rows of zeros, as wide as whole vectors. The last register tile of a product may reach past the last one."""
    ld = whole_vectors(p, n)
    for x in range((rows + MR) * ld):
        p[x] = 0.0
    return Matrix(p, ld)


@inner
def open_span(task, low, high, unit):
    """K and V of the keys low:high as accumulation type, dK = dV = 0."""
    call, scratch, keys = task.call, task.scratch, high - low
    qk, dv, block, key = call.qk_dim, call.v_dim, call.block, task.sequence.k_start + low
    k = key_rows(k_array(task, key), at_byte(scratch, call.at_k), keys, qk)
    v = key_rows(v_array(task, key), at_byte(scratch, call.at_v), keys, dv)
    dk_sum, dv_sum = zeroed(at_byte(scratch, call.at_dk), keys, qk), zeroed(at_byte(scratch, call.at_dv), keys, dv)
    flags, ones = i64_ptr(at_byte(scratch, call.at_flags)), ones_of(task)
    for r in range(full_width(scratch)):
        ones[r] = 1.0
    # Only a block with a NaN or an infinity in K takes the slower product.
    for j0 in range(0, keys, block):
        flags[j0 // block] = all_finite(k + j0 * qk, min(block, keys - j0) * qk)
    return Span(low, high, unit, k, v, flags, dk_sum, dv_sum)


@inner
def load_tiles(task, span, first_tile, n):
    """n tiles of queries, as far as they see a key of the span; the keys of it that some of them sees."""
    from_key, to_key = span.high, span.low
    for t in range(n):
        tile = tile_at(task, t)
        queries = tile.queries
        locate(task, first_tile + t, queries)
        if queries.low < span.high and queries.high > span.low:
            load_tile(task, tile)
            from_key, to_key = min(from_key, queries.low), max(to_key, queries.high)
        else:
            queries.low, queries.high = span.high, 0  # so that it sees no key of any block
    return max(from_key - span.low, 0), min(to_key, span.high)


@outlined
def write_keys(array, src, factor, rows, n):
    """src * factor to rows of dk or dv, in the caller's storage; -0 becomes +0."""
    for j in range(rows):
        row = src.at + j * src.ld
        for c in range(n):
            row[c] = row[c] * factor + scalar(row, 0)
        write_row(row, array.address + j * array.s, array.d, array.storage, n)


@inner
def attend_range(task, low, high, unit, dq):
    """Keys low:high of one (sequence, key head) with all queries: writes their dk and dv, adds to dq."""
    call, sequence, scratch = task.call, task.sequence, task.scratch
    b, h, block, key, w = sequence.batch, task.kv_head, call.block, sequence.k_start + low, full_width(scratch)
    span = open_span(task, low, high, unit)
    n_tiles = tiles_of(call, sequence.q_len)
    for first_tile in range(0, n_tiles, TILES):
        n = min(TILES, n_tiles - first_tile)
        skipped, to_key = load_tiles(task, span, first_tile, n)
        j0 = low + skipped // block * block
        while j0 < to_key:
            attend_block(task, span, n, j0)
            j0 += block
        # Third level of the sums of dQ': a tile's sum over the span is added to that over the spans before.
        for t in range(n):
            tile = tile_at(task, t)
            queries = tile.queries
            if queries.low < queries.high:
                to = dq + (first_tile + t) * call.qk_dim * w
                for x in range(call.qk_dim * queries.width):
                    to[x] = to[x] + tile.dq[x]
    # The rows of Q in the sum of dK are not scaled: dK is scaled here.
    dk_at = call.dk + b * call.dk_b + h * call.dk_h + key * call.dk_s
    dv_at = call.dv + b * call.dv_b + h * call.dv_h + key * call.dv_s
    dk_array = Strided(dk_at, call.dk_h, call.dk_s, call.dk_d, call.storage)
    dv_array = Strided(dv_at, call.dv_h, call.dv_s, call.dv_d, call.storage)
    write_keys(dk_array, span.dk, scalar(scratch, call.scale), high - low, call.qk_dim)
    write_keys(dv_array, span.dv, scalar(scratch, 1), high - low, call.v_dim)


# ---------------------------------------------------------------- a head


@inner
def finish(task, dq):
    """dq = scale dQ', in the caller's array."""
    call, queries, factor = task.call, queries_at(task, 0), ones_of(task)
    size = call.qk_dim * full_width(factor)
    array = Strided(call.dq + task.sequence.batch * call.dq_b, call.dq_h, call.dq_s, call.dq_d, call.storage)
    for r in range(full_width(factor)):
        factor[r] = scalar(factor, call.scale)
    for t in range(tiles_of(call, task.sequence.q_len)):
        locate(task, t, queries)
        write_queries(task, queries, array, dq + t * size, factor, call.qk_dim)


@inner
def attend_ranges(task, head, first_range, end_range, dq):
    """Ranges of keys of a head, in order. dq is the sum of their dQ'."""
    call, k_len = task.call, task.sequence.k_len
    # Ranges of whole blocks, as equal as possible: a function of k_len alone.
    run = ((k_len + call.block - 1) // call.block + RANGES - 1) // RANGES * call.block  # as in range_keys()
    for x in range(dq_size(task)):
        dq[x] = 0.0
    for r in range(first_range, end_range):
        if r * run < k_len:
            unit = head * call.unit_of_head + r * call.unit_of_range
            attend_range(task, r * run, min((r + 1) * run, k_len), unit, dq)


@inner
def dq_size(task):
    """Numbers of a head's dQ'."""
    return tiles_of(task.call, task.sequence.q_len) * task.call.qk_dim * full_width(task.scratch)


@inner
def add_ranges(task, dq):
    """The dQ' of all ranges of a head, added in order to that of the first."""
    size = task.call.head_size
    for r in range(1, RANGES):
        more = dq + r * size
        for x in range(dq_size(task)):
            dq[x] = dq[x] + more[x]


@inner
def attend_item(call, scratch, item):
    """A whole head, or a range of one of the last heads."""
    fine = item - call.whole
    head = item if fine < 0 else call.whole + fine // RANGES
    sequence = sequence_record(call.sequences, head // call.kv_heads)
    task = Task(call, scratch, sequence, head % call.kv_heads)
    size = call.head_size * itemsize(scratch)
    # A whole head sums its dQ' in the thread's memory, a range in memory of its own until the others are done.
    dq, first_range, end_range = at_byte(scratch, call.at_dq), 0, RANGES
    if fine >= 0:
        dq, first_range = pointer_like(scratch, call.partial + fine * size), fine % RANGES
        end_range = first_range + 1
    attend_ranges(task, head, first_range, end_range, dq)
    whole = fine < 0
    if not whole and fetch_add(i64_ptr(call.done) + fine // RANGES, 1) == RANGES - 1:
        # The thread that finishes the last range of a head adds the sums of all ranges.
        dq = pointer_like(scratch, call.partial + fine // RANGES * RANGES * size)
        add_ranges(task, dq)
        whole = True
    if whole:
        finish(task, dq)


def build(elem: str):
    """drain(call_address): the worker for one accumulation type, "f32" or "f64"."""
    pointer = POINTER[elem]

    def drain(call_at):
        """Take work items from the shared counter until none is left: whole heads, then ranges of the last ones."""
        call = call_record(call_at, 0)
        scratch, counter = pointer(own_scratch(call)), i64_ptr(call.counter)
        while True:
            item = fetch_add(counter, 1)
            if item >= call.n_items:
                break
            attend_item(call, scratch, item)

    return drain
