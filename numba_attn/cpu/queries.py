"""A tile of queries: which queries it has, which keys they may see, and how their rows are read and written.

Queries of one key head's whole group share tiles. A tile is a TILE record (call.py) in the thread's memory; the block
of keys that it is combined with is `Keys`, and what a thread works on is its `Task`.
"""

from typing import Any, NamedTuple

from ..mask.shape import OPEN
from .call import tile_record
from .compile import inner, outlined
from .simd import address_of, at_byte, i64_ptr, itemsize, lanes, prefetch, scalar
from .storage import Strided, all_finite, read_rows, storage_of, write_rows


class Task(NamedTuple):
    """What a thread works on: the queries and keys of one key head of one sequence."""

    call: Any  # the CALL record
    scratch: Any  # the thread's memory, a pointer to the accumulation type; call.at_... are offsets into it
    sequence: Any  # a SEQUENCE record
    kv_head: int


class Keys(NamedTuple):
    """The keys first:last of a block, as a tile needs them. Key j of the block is j0 + j of the sequence."""

    j0: int
    key: int  # the block's first key in the caller's array
    first: int
    last: int


@inner
def queries_at(task, t):
    """The t-th of the tiles that the thread has in its memory."""
    return tile_record(address_of(task.scratch) + task.call.at_infos, t)


# ---------------------------------------------------------------- which queries, which keys


@inner
def place(task, index, queries):
    """Rows, counted from the sequence's start, and heads of the queries of tile `index`; how many they are."""
    q_len, group, size = task.sequence.q_len, task.call.group, task.call.tile_rows
    rows, heads = queries.rows, queries.heads
    if q_len < size:  # short: the queries of a group's heads lie side by side
        first = index * size
        count = min(size, group * q_len - first)
        head, row = first // q_len, first % q_len
        for r in range(count):
            heads[r], rows[r] = task.kv_head * group + head, row
            row += 1
            if row == q_len:
                head, row = head + 1, 0
    else:  # a tile lies in one head; the heads of a group take turns
        first = (index // group) * size
        count = min(size, q_len - first)
        for r in range(count):
            heads[r] = task.kv_head * group + index % group
            rows[r] = first + r
    return count


@inner
def visible_keys(task, head, row):
    """The first key that a query may see and the key after the last, both counted from the sequence's start."""
    call, sequence = task.call, task.sequence
    i = row + sequence.offset
    start = max(0, i - call.left) if call.left < OPEN else 0
    end = sequence.k_len
    if call.has_prefix:
        end = min(end, max(sequence.prefix, i + 1))
    if call.right < OPEN:
        end = min(end, i + call.right + 1)
    if call.start:  # the caller's own interval of each query
        at = sequence.batch * call.bounds_b + head * call.bounds_h + (sequence.q_start + row) * call.bounds_s
        start = max(start, i64_ptr(call.start + at)[0] - sequence.k_start)
        end = min(end, i64_ptr(call.end + at)[0] - sequence.k_start)
    return start, end


@outlined
def locate(task, index, queries):
    """Fill in which queries tile `index` of a task holds, and which keys they may see."""
    rows, heads, starts, ends = queries.rows, queries.heads, queries.starts, queries.ends
    sequence, vector, k_len = task.sequence, lanes(task.scratch), task.sequence.k_len
    count = place(task, index, queries)
    width = (count + vector - 1) // vector * vector
    # Union and intersection of the lanes' intervals. Blocks outside the union are skipped. Blocks inside the
    # intersection need no mask.
    low, high, inner_low, inner_high = k_len, 0, 0, k_len
    for r in range(count):
        start, end = visible_keys(task, heads[r], rows[r])
        if start >= end:
            start, end = k_len, k_len  # sees nothing
            inner_high = 0
        else:
            low, high = min(low, start), max(high, end)
            inner_low, inner_high = max(inner_low, start), min(inner_high, end)
        starts[r], ends[r] = start, end
        rows[r] += sequence.q_start
    # Idle lanes repeat the last query. Their results are not written.
    last = count - 1
    for r in range(count, width):
        rows[r], heads[r], starts[r], ends[r] = rows[last], heads[last], starts[last], ends[last]
    queries.batch, queries.offset = sequence.batch, sequence.offset - sequence.q_start
    queries.count, queries.width, queries.low, queries.high = count, width, low, high
    queries.inner_low, queries.inner_high = inner_low, inner_high


@inner
def key_range(queries, j0, keys):
    """The keys of the block at j0 that a tile needs, first on a multiple of 8."""
    # Multiples of 8 are multiples of the rows of every register tile.
    first, last = max(queries.low - j0, 0) & ~7, min(queries.high - j0, keys)
    return first, (min((last + 7) & ~7, keys) if first < last else first)


@inner
def same_head(heads, r, count):
    """The end of the run of lanes that share lane r's head: users' functions are called once for each run."""
    end = r + 1
    while end < count and heads[end] == heads[r]:
        end += 1
    return end


# ---------------------------------------------------------------- rows of the caller's arrays


@inner
def row_addresses(table, array, queries):
    """The address of each lane's row of an array; idle lanes have the last query's."""
    rows, heads, last = queries.rows, queries.heads, queries.count - 1
    for r in range(queries.width):
        x = min(r, last)
        table[r] = array.address + heads[x] * array.h + rows[x] * array.s


@outlined
def read_queries(task, queries, array, dst, n):
    """The tile's rows of an array, transposed: dst[c, lane]."""
    table, rows = i64_ptr(at_byte(task.scratch, task.call.at_table)), at_byte(task.scratch, task.call.at_rows)
    row_addresses(table, array, queries)
    read_rows(table, array.d, array.storage, rows, dst, queries.width, n)


@outlined
def write_queries(task, queries, array, src, factor, n):
    """src[c, lane] * factor[lane] to the tile's rows of an array."""
    table, rows = i64_ptr(at_byte(task.scratch, task.call.at_table)), at_byte(task.scratch, task.call.at_rows)
    row_addresses(table, array, queries)
    write_rows(src, factor, table, array, rows, queries, n)


@inner
def q_array(task):
    call = task.call
    return Strided(call.q + task.sequence.batch * call.q_b, call.q_h, call.q_s, call.q_d, call.storage)


@inner
def k_array(task, key):
    """The rows of K of the task's head, from a key of the caller's array on."""
    call = task.call
    at = call.k + task.sequence.batch * call.k_b + task.kv_head * call.k_h + key * call.k_s
    return Strided(at, call.k_h, call.k_s, call.k_d, call.storage)


@inner
def v_array(task, key):
    call = task.call
    at = call.v + task.sequence.batch * call.v_b + task.kv_head * call.v_h + key * call.v_s
    return Strided(at, call.v_h, call.v_s, call.v_d, call.storage)


@inner
def load_queries(task, queries, q):
    """A tile's queries, transposed and scaled: q[c, lane]."""
    call, size = task.call, task.call.qk_dim * queries.width
    read_queries(task, queries, q_array(task), q, call.qk_dim)
    # Scaled here, once, instead of every score.
    factor = scalar(q, call.q_scale)
    for x in range(size):
        q[x] = q[x] * factor
    queries.q_finite = all_finite(q, size)


@inner
def prefetch_queries(task, queries):
    """Prefetch a tile's rows of q before the transposes, which would wait for one cache line after another.

    This halves the time of `gather` where q comes from memory. The same for rows of out gave no gain.
    """
    array, rows, heads = q_array(task), queries.rows, queries.heads
    item = itemsize(task.scratch) if array.storage == storage_of(task.scratch) else 2
    for r in range(queries.count):
        at = array.address + heads[r] * array.h + rows[r] * array.s
        for x in range(0, task.call.qk_dim * item, 64):
            prefetch(at + x)
