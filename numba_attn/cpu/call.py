"""What a kernel call reads: one record of addresses, byte strides and sizes, and the buffers of a thread.

Everything that changes per call is a number in this record, so a call never compiles anything.
"""

import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numba.np import numpy_support

from .compile import inner
from .simd import ROW, fetch_add, i64_ptr

# Storage codes of q, k, v, out, bias and the gradients.
F32, F64, F16, BF16 = 0, 1, 2, 3
STORAGE = {"float32": F32, "float64": F64, "float16": F16, "bfloat16": BF16}

OPEN = 2**62  # an absent window bound, as in plan.py


def _fields(prefix, names):
    return [(prefix + n, np.int64) for n in names.split()]


# 8-byte fields only. The "at_" fields are offsets in a thread's scratch memory (see `buffers`); a kernel has those that
# it names in its layout, and never reads the others.
CALL = np.dtype(
    _fields("", "q k v out lse storage")
    + _fields("q_", "b h s d")
    + _fields("k_", "b h s d")
    + _fields("v_", "b h s d")
    + _fields("out_", "b h s d")
    + _fields("lse_", "b h s")
    + _fields(
        "", "group kv_heads qk_dim v_dim block tile_rows tiles fine sequences n_sequences first_item n_items counter"
    )
    + _fields("", "left right has_prefix start end bounds_b bounds_h bounds_s")
    + _fields("", "bias bias_storage")
    + _fields("bias_", "b h i j")
    + _fields(
        "",
        "masks n_masks segments n_segments mask_mods n_mask_mods score_mod score_aux slopes slopes_b sinks use_softcap",
    )
    + _fields("", "drop drop_below seed")
    + _fields("at_", "s q o state sums infos table bounds lanes visible seen bias rows k v")
    + _fields("", "scratch memory")
    # The backward kernels read these besides.
    + _fields("", "dout dq dk dv dlse log_sums deltas rows heads whole partial head_size done")
    + [field for array in ("dout", "dq", "dk", "dv") for field in _fields(array + "_", "b h s d")]
    + _fields("dlse_", "b h s")
    + _fields("", "dbias dbias_whole dslopes dslopes_b aux_grad aux_sums unit_of_head unit_of_range")
    + _fields("dbias_", "unit b h i j")
    + _fields("dslopes_", "unit")
    + _fields("aux_sums_", "unit")
    + _fields("at_", "dp slope curve raw keep q_rows dout_rows dq_tile dq dk dv flags parts bad")
    # And the tangent kernel these.
    + _fields("", "q_dot k_dot v_dot out_dot lse_dot bias_dot bias_dot_storage slopes_dot slopes_dot_b sinks_dot")
    + [field for array in ("q_dot", "k_dot", "v_dot", "out_dot") for field in _fields(array + "_", "b h s d")]
    + _fields("lse_dot_", "b h s")
    + _fields("bias_dot_", "b h i j")
    + _fields("", "score_jvp aux_dot")
    + _fields("at_", "s_dot more q_dot p_dot o_dot k_dot v_dot")
    + [("dot_unit", np.float64)]
    + [(n, np.float64) for n in ("scale", "q_scale", "softcap_in", "softcap_out", "unit", "drop_scale")]
)

SEQUENCE = 7  # columns of the sequence table: batch, q_start, q_len, k_start, k_len, offset, prefix


def tile_rows(elem: str) -> int:
    """Queries of a full tile."""
    return ROW.nr * ROW.lanes(elem)


def buffers(sizes: dict[str, int]) -> dict[str, int]:
    """Byte offset of each buffer in a thread's scratch memory, as "at_" + name, and the whole size as "scratch".

    Each starts on a 64-byte boundary: the largest single gain in speed (the QK loop reaches 92 % of peak with it, 80
    without).
    """
    layout, at = {}, 0
    for name, n in sizes.items():
        layout["at_" + name] = at
        at += n + 63 & ~63
    return layout | {"scratch": at}


@intrinsic
def call_record(typingctx, address):
    """The CALL record at an address."""
    record = numpy_support.from_dtype(CALL)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(record))

    return record(types.intp), codegen


@inner
def own_scratch(call):
    """The scratch memory of one of the threads that work on a call: each asks once. The counters are two numbers, work
    items and threads."""
    return call.memory + call.scratch * fetch_add(i64_ptr(call.counter) + 1, 1)


@inner
def tiles_of(call, q_len):
    """Tiles of the q_len queries of one key head."""
    size, group = call.tile_rows, call.group
    return (group * q_len + size - 1) // size if q_len < size else group * ((q_len + size - 1) // size)
