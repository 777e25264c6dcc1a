"""What a kernel call reads: one record of addresses, byte strides and sizes, and the buffers of a thread.

Everything that changes per call is a number in this record, so a call never compiles anything.
"""

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.imputils import lower_getattr_generic, lower_setattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, models, register_model
from numba.np import numpy_support

from ..mask.shape import SEQUENCE_FIELDS
from .compile import inner
from .simd import F64 as F64_IR
from .simd import I64, ROW, Ptr, fetch_add, i64_ptr

# Storage codes of q, k, v, out, bias and the gradients.
F32, F64, F16, BF16 = 0, 1, 2, 3
STORAGE = {"float32": F32, "float64": F64, "float16": F16, "bfloat16": BF16}


def _fields(prefix, names):
    return [(prefix + n, np.int64) for n in names.split()]


# 8-byte fields only. The "at_" fields are offsets in a thread's scratch memory (see `buffers`); a kernel has the
# buffers that its layout names, and never reads the other fields.
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

# One sequence: see mask/shape.py.
SEQUENCE = np.dtype([(name, np.int64) for name in SEQUENCE_FIELDS])

# The keys first:last of a block that a tile sees, the queries of the tile and its width in lanes.
PART = np.dtype(_fields("", "first last count width"))

# A bool mask: address and byte strides.
MASK = np.dtype(_fields("", "address b h i j"))

# Segment numbers of queries and of keys: address and byte stride of the batch axis.
SEGMENTS = np.dtype(_fields("", "q q_b k k_b"))

# A user's function as a loop over a tile, and the table of its arrays: addresses.
MODIFIER = np.dtype(_fields("", "fn aux"))


def tile_rows(elem: str) -> int:
    """Queries of a full tile."""
    return ROW.nr * ROW.lanes(elem)


_LANES = (np.int64, (tile_rows("f32"),))  # no tile is wider

# A tile of queries, see queries.py. As a whole: how many it holds, its width in lanes, the keys that some lane sees
# (low:high) and those that all lanes see (inner_low:inner_high), counted from the sequence's start, whether its rows of
# q and of dout hold neither NaN nor infinity, its row of the batch, and an offset: query i of the caller's array meets
# key i + offset of the sequence. Of each lane: its row in the caller's array, its head, the first key that it sees and
# the key after the last one. Lanes past the count, up to the width, repeat the last query.
TILE = np.dtype(
    _fields("", "count width low high inner_low inner_high q_finite dout_finite batch offset")
    + [(name, *_LANES) for name in ("rows", "heads", "starts", "ends")]
)


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


class Columns(types.Type):
    """A pointer to a record of 8-byte fields; record.name reads and writes a field, or is a pointer to an array of
    int64.

    (Numba's own records are pointers too, but cannot be returned in a tuple.)
    """

    def __init__(self, name: str, dtype: np.dtype):
        self.dtype = dtype
        super().__init__(name=f"Columns({name})")


@register_model(Columns)
class _ColumnsModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, I64.as_pointer())


@infer_getattr
class _ColumnsAttribute(AttributeTemplate):
    key = Columns

    def generic_resolve(self, record, name):
        if record.dtype.names and name in record.dtype.names:
            field = record.dtype[name]
            return Ptr("i64") if field.shape else numpy_support.from_dtype(field)


def _field(builder, kind, pointer, name):
    at = builder.gep(pointer, [ir.Constant(I64, kind.dtype.fields[name][1] // 8)])
    return builder.bitcast(at, (F64_IR if kind.dtype[name] == np.float64 else I64).as_pointer())


@lower_getattr_generic(Columns)
def _get_field(context, builder, kind, value, name):
    field = _field(builder, kind, value, name)
    return field if kind.dtype[name].shape else builder.load(field)


@lower_setattr_generic(Columns)
def _set_field(context, builder, sig, args, name):
    kind, value = sig.args
    number = context.cast(builder, args[1], value, numpy_support.from_dtype(kind.dtype[name]))
    builder.store(number, _field(builder, kind, args[0], name))


def _records(name: str, dtype: np.dtype):
    """A function that takes the address of a table of such records and an index."""
    record = Columns(name, dtype)

    @intrinsic
    def at(typingctx, address, index):
        def codegen(context, builder, sig, args):
            offset = builder.mul(args[1], ir.Constant(I64, dtype.itemsize))
            return builder.inttoptr(builder.add(args[0], offset), I64.as_pointer())

        return record(types.intp, types.intp), codegen

    at.__name__ = name
    return at


call_record, sequence_record, tile_record, part_record = (
    _records("call_record", CALL),
    _records("sequence_record", SEQUENCE),
    _records("tile_record", TILE),
    _records("part_record", PART),
)
mask_record, segments_record, modifier_record = (
    _records("mask_record", MASK),
    _records("segments_record", SEGMENTS),
    _records("modifier_record", MODIFIER),
)


@inner
def own_scratch(call):
    """The scratch memory of a thread that works on a call. A thread calls this once. The counters are two numbers, work
    items and threads."""
    return call.memory + call.scratch * fetch_add(i64_ptr(call.counter) + 1, 1)


@inner
def tiles_of(call, q_len):
    """Tiles of the q_len queries of one key head."""
    size, group = call.tile_rows, call.group
    return (group * q_len + size - 1) // size if q_len < size else group * ((q_len + size - 1) // size)
