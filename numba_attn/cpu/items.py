"""Work items of the kernels that take tiles of queries: the forward pass and its tangent."""

from .call import call_record, own_scratch, sequence_record, tiles_of
from .compile import inner
from .queries import Task
from .simd import POINTER, fetch_add, i64_ptr


@inner
def sequence_of(call, item):
    """The sequence that has this work item. call.first_item increases."""
    first_item = i64_ptr(call.first_item)
    low, high = 0, call.n_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if first_item[middle] <= item:
            low = middle
        else:
            high = middle
    return low


@inner
def tiles_of_item(call, n_tiles, local):
    """Key head, first tile and number of tiles of work item `local` of a sequence with n_tiles tiles a head.

    Head after head, so that its keys and values stay in the second-level cache. Within a head the first `fine` tiles
    are items of their own, then come items of call.tiles. Late queries are taken first, since with a causal mask they
    have most work. So the last items to be taken are small.
    """
    fine = min(call.fine, n_tiles)
    chunks = fine + (n_tiles - fine + call.tiles - 1) // call.tiles
    kv_head, chunk = local // chunks, chunks - 1 - local % chunks
    # The first tiles, which are taken last, are items of their own.
    if chunk < fine:
        return kv_head, chunk, 1
    first_tile = fine + (chunk - fine) * call.tiles
    return kv_head, first_tile, min(call.tiles, n_tiles - first_tile)


def work_items(attend, elem: str):
    """drain(call_address): attend(task, first_tile, n_tiles) for every work item; elem: "f32" or "f64"."""
    pointer = POINTER[elem]

    def drain(call_at):
        """Take work items from the shared counter until none is left. Items are independent, so bits do not depend on
        which thread takes which."""
        call = call_record(call_at, 0)
        scratch = pointer(own_scratch(call))
        first_item, counter = i64_ptr(call.first_item), i64_ptr(call.counter)
        while True:
            item = fetch_add(counter, 1)
            if item >= call.n_items:
                break
            n = sequence_of(call, item)
            sequence = sequence_record(call.sequences, n)
            n_tiles = tiles_of(call, sequence.q_len)
            kv_head, first_tile, count = tiles_of_item(call, n_tiles, item - first_item[n])
            attend(Task(call, scratch, sequence, kv_head), first_tile, count)

    return drain
