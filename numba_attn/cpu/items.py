"""Work items of the kernels that take tiles of queries: the forward pass and its tangent."""

from .call import SEQUENCE, call_record, own_scratch, tiles_of
from .simd import fetch_add, i64_ptr


def work_items(attend):
    """drain(call_address): attend(call, sequence, kv_head, first_tile, n_tiles, scratch) for every work item."""

    def drain(call_at):
        """Take work items off the shared counter until none is left; items are independent, so bits do not depend on
        who takes which."""
        call = call_record(call_at)
        scratch = own_scratch(call)
        first_item = i64_ptr(call.first_item)
        counter = i64_ptr(call.counter)
        while True:
            item = fetch_add(counter, 1)
            if item >= call.n_items:
                break
            low, high = 0, call.n_sequences  # the sequence whose items hold this one
            while high - low > 1:
                middle = (low + high) // 2
                if first_item[middle] <= item:
                    low = middle
                else:
                    high = middle
            sequence = i64_ptr(call.sequences) + SEQUENCE * low
            n_tiles = tiles_of(call, sequence[2])
            local = item - first_item[low]
            # Head after head, so that its keys and values stay in the second-level cache. Within a head the first
            # `fine` tiles are items of their own, then come items of call.tiles; late queries are taken first, as with
            # a causal mask they are the heavy ones: the last items to be taken are small.
            fine = min(call.fine, n_tiles)
            chunks = fine + (n_tiles - fine + call.tiles - 1) // call.tiles
            kv_head, chunk = local // chunks, chunks - 1 - local % chunks
            first_tile = chunk if chunk < fine else fine + (chunk - fine) * call.tiles
            count = 1 if chunk < fine else min(call.tiles, n_tiles - first_tile)
            attend(call, sequence, kv_head, first_tile, count, scratch)

    return drain
