"""The arrays of aux inside a user's function, as Numba types: one source for every target.

Where a read has to give more than the element's number, the function gets the array as an Aux. It is indexed by
integers, all of its axes or the first ones, and has shape, size, ndim and len.

Some targets and passes detect an index outside the array before the read. They then read the first element.
"""

# Typed by Numba, whose stubs lack most of what is used here.
# mypy: disable-error-code="attr-defined, name-defined, assignment, call-overload"

import math
import operator
from types import SimpleNamespace
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types

from .scalar_types import Target
from .transcendental import F32, F64, I64

# The record of a pass, 64-bit cells. "seed": how many reads there were, the number of the one that is asked for, its
# array, its element. "trace": for each array the element and the bits of its tangent in float64.
READS, SEED, ARRAY, ELEMENT = range(4)
UNREAD, SEVERAL, OUTSIDE = -1, -2, -3  # in place of an element: it was not read, or is not one


def array_type(dtype, ndim, aligned=False):
    return types.Array(dtype, ndim, "A", readonly=True, aligned=aligned)


def _item(context, builder, kind, array, indices):
    """The address of array[indices], which may be fewer than it has axes."""
    array = context.make_array(kind)(context, builder, value=array)
    strides = cgutils.unpack_tuple(builder, array.strides, kind.ndim)
    offset = I64(0)
    for i, stride in zip(indices, strides, strict=False):
        offset = builder.add(offset, builder.mul(i, stride))
    return cgutils.pointer_add(builder, array.data, offset)


def build(target: Target, t: SimpleNamespace, d: SimpleNamespace, element) -> SimpleNamespace:
    """Register Aux with a target that has the types of scalar_types.py and dual_types.py.

    element : (elem, dtype) -> the type that an element has where it is a plain number

    Returns
    -------
    Aux : the type, Aux(elem, how, n, array, dot)
    cells : count -> function of compiled code that returns a record of so many cells
    wrapped : kinds -> function (arrays, dots, record) -> arrays, each wrapped as kinds says: an Aux type, or None where
        it stays as it is
    """
    Aux = _type(d, element)
    _register_model(target, Aux)
    _register_index(target, t, d, Aux)
    _register_attributes(target, Aux)
    return SimpleNamespace(Aux=Aux, cells=_cells(target), wrapped=_wrapped(target))


# ---------------------------------------------------------------- the type


def _type(d, element):
    class Aux(types.Type):
        """An array of aux, or its rows behind the first indices.

        how "number": an element is a number
        how "seed": an element is a Dual, its tangent 1 if this read is the one that the record asks for, else 0
        how "trace": an element is a number; the record notes which one was read, and with a dot its tangent
        how "dot": an element is a Dual, its tangent the element of dot at the same place
        """

        def __init__(self, elem, how, n, array, dot=None):
            self.elem, self.how, self.n, self.array, self.dot, self.ndim = elem, how, n, array, dot, array.ndim
            super().__init__(name=f"Aux({elem},{how},{n},{array},{dot})")

        def element(self):
            return d.Dual(self.elem) if self.how in ("seed", "dot") else element(self.elem, self.array.dtype)

        def rows(self, given):
            """Its type after so many indices."""
            array, dot = (a and array_type(a.dtype, a.ndim - given, a.aligned) for a in (self.array, self.dot))
            return Aux(self.elem, self.how, self.n, array, dot)

    return Aux


def _checked(target, kind):
    """Whether the model has `first`: the first element of the rows, or OUTSIDE if an index was outside."""
    return kind.how != "number" or target.guarded


def _noted(kind):
    """Whether the model has the record."""
    return kind.how != "number"


def _register_model(target, Aux):
    @target.register_model(Aux)
    class AuxModel(target.models.StructModel):
        def __init__(self, dmm, fe_type):
            members = [("array", fe_type.array)]
            if _checked(target, fe_type):
                members.append(("first", types.intp))
            if _noted(fe_type):
                members.append(("record", target.record))
            super().__init__(dmm, fe_type, members + ([("dot", fe_type.dot)] if fe_type.dot else []))


# ---------------------------------------------------------------- aux[i], aux[i, j]


class _Place(NamedTuple):
    """Where an index leads, as LLVM values."""

    indices: list[Any]  # of the axes that it names, from 0 on; if it is checked and outside, 0
    flat: Any  # the element there, in C order, of those that are indexed; if it is checked and outside, OUTSIDE
    inside: Any


def _register_index(target, t, d, Aux):
    @target.infer_global(operator.getitem)
    class AuxAt(target.AbstractTemplate):
        def generic(self, args, kws):
            aux, at = args
            if not isinstance(aux, Aux):
                return None
            parts = tuple(at) if isinstance(at, types.BaseTuple) else (at,)
            if not min(1, aux.ndim) <= len(parts) <= aux.ndim or not all(
                isinstance(p, (t.Index, types.Integer)) for p in parts
            ):
                return None
            result = aux.element() if len(parts) == aux.ndim else aux.rows(len(parts))
            return target.signature(
                result, aux, types.UniTuple(types.intp, len(parts)) if parts != (at,) else types.intp
            )

    @target.lower_builtin(operator.getitem, Aux, types.Integer)
    @target.lower_builtin(operator.getitem, Aux, types.BaseTuple)
    def aux_at(context, builder, sig, args):
        kind, at = sig.args
        aux = cgutils.create_struct_proxy(kind)(context, builder, value=args[0])
        given = cgutils.unpack_tuple(builder, args[1], len(at)) if isinstance(at, types.BaseTuple) else [args[1]]
        place = _place(context, builder, kind, aux, given, _checked(target, kind))
        if len(given) < kind.ndim:
            return _rows(target, context, builder, (kind, sig.return_type), aux, place)
        return _element(target, t, d, context, builder, (kind, sig.return_type), aux, place)


def _place(context, builder, kind, aux, given, check):
    array = context.make_array(kind.array)(context, builder, value=aux.array)
    indices, flat, inside = [], aux.first if check else I64(0), ir.Constant(ir.IntType(1), 1)
    for i, n in zip(given, cgutils.unpack_tuple(builder, array.shape, kind.ndim), strict=False):
        i = builder.select(builder.icmp_signed("<", i, I64(0)), builder.add(i, n), i)
        within = builder.icmp_unsigned("<", i, n)
        inside = builder.and_(inside, within)
        flat = builder.add(builder.mul(flat, n), i)
        indices.append(builder.select(within, i, I64(0)) if check else i)
    if check:  # rows of an index outside are outside too
        inside = builder.and_(inside, builder.icmp_signed(">=", aux.first, I64(0)))
        flat = builder.select(inside, flat, I64(OUTSIDE))
    return _Place(indices, flat, inside)


def _rows(target, context, builder, kinds, aux, place):
    """The rows at a place. kinds: of the array and of the rows."""
    kind, to = kinds
    rows = cgutils.create_struct_proxy(to)(context, builder)
    rows.array = _array_rows(target, context, builder, (kind.array, to.array), aux.array, place.indices)
    if _checked(target, kind):
        rows.first = place.flat
    if _noted(kind):
        rows.record = aux.record
    if kind.dot:
        rows.dot = _array_rows(target, context, builder, (kind.dot, to.dot), aux.dot, place.indices)
    return rows._getvalue()


def _array_rows(target, context, builder, kinds, array, indices):
    """array[indices] as an array. kinds: of the array and of the rows."""
    kind, to = kinds
    data, given = _item(context, builder, kind, array, indices), len(indices)
    array = context.make_array(kind)(context, builder, value=array)
    rows = context.make_array(to)(context, builder)
    target.populate_array(
        rows,
        data=data,
        shape=cgutils.unpack_tuple(builder, array.shape, kind.ndim)[given:],
        strides=cgutils.unpack_tuple(builder, array.strides, kind.ndim)[given:],
        itemsize=array.itemsize,
        meminfo=None,
    )
    return rows._getvalue()


def _element(target, t, d, context, builder, kinds, aux, place):
    """The element at a place, and what the record wants to know of it. kinds: of the array and of the element."""
    kind, to = kinds
    value, dtype, tangent = _load(target, context, builder, kind.array, aux.array, place), kind.array.dtype, None
    if _checked(target, kind) and not _noted(kind):
        missing = math.nan if isinstance(dtype, types.Float) else 0
        value = builder.select(place.inside, value, ir.Constant(value.type, missing))
    if kind.dot:
        tangent = _load(target, context, builder, kind.dot, aux.dot, place)
    if kind.how == "seed":
        asked = _note_seed(builder, kind, aux.record, place.flat)
        tangent = builder.uitofp(asked, F32 if kind.elem == "f32" else F64)
    elif kind.how == "trace":
        wide = context.cast(builder, tangent, kind.dot.dtype, types.float64) if kind.dot else None
        _note_trace(builder, kind, aux.record, place.flat, wide)
    elif kind.how == "dot":
        tangent = context.cast(builder, tangent, kind.dot.dtype, t.Score(kind.elem))
    if kind.how in ("number", "trace"):
        return context.cast(builder, value, dtype, to)
    return d.pack(builder, context.cast(builder, value, dtype, t.Score(kind.elem)), tangent)


def _load(target, context, builder, kind, array, place):
    return target.load_item(context, builder, kind, _item(context, builder, kind, array, place.indices))


def _cell(builder, record, n):
    return builder.gep(record, [I64(n)])


def _note_seed(builder, kind, record, flat):
    """Count a read; whether it is the one that is asked for, of which array and element are noted."""
    reads = builder.load(_cell(builder, record, READS))
    asked = builder.icmp_signed("==", reads, builder.load(_cell(builder, record, SEED)))
    builder.store(builder.add(reads, I64(1)), _cell(builder, record, READS))
    for n, new in ((ARRAY, I64(kind.n)), (ELEMENT, flat)):
        builder.store(builder.select(asked, new, builder.load(_cell(builder, record, n))), _cell(builder, record, n))
    return asked


def _note_trace(builder, kind, record, flat, tangent):
    """Note which element of the array was read, SEVERAL if it was not one, and the tangent if there is one."""
    old = builder.load(_cell(builder, record, 2 * kind.n))
    same = builder.or_(builder.icmp_signed("==", old, I64(UNREAD)), builder.icmp_signed("==", old, flat))
    builder.store(builder.select(same, flat, I64(SEVERAL)), _cell(builder, record, 2 * kind.n))
    if tangent is not None:
        builder.store(builder.bitcast(tangent, I64), _cell(builder, record, 2 * kind.n + 1))


# ---------------------------------------------------------------- the rest


def _register_attributes(target, Aux):
    @target.intrinsic
    def array_of(typingctx, aux):
        def codegen(context, builder, sig, args):
            return cgutils.create_struct_proxy(aux)(context, builder, value=args[0]).array

        return (aux.array(aux), codegen) if isinstance(aux, Aux) else None

    target.overload_attribute(Aux, "shape")(lambda aux: lambda aux: array_of(aux).shape)
    target.overload_attribute(Aux, "size")(lambda aux: lambda aux: array_of(aux).size)
    target.overload_attribute(Aux, "ndim")(lambda aux: lambda aux: array_of(aux).ndim)

    @target.overload(len)
    def length(aux):
        if isinstance(aux, Aux):
            return lambda aux: len(array_of(aux))


def _cells(target):
    def cells(count):
        @target.intrinsic
        def cells(typingctx):
            def codegen(context, builder, sig, args):
                return builder.bitcast(cgutils.alloca_once(builder, ir.ArrayType(I64, count)), I64.as_pointer())

            return target.record(), codegen

        return cells

    return cells


def _wrapped(target):
    def one(context, builder, kind, array, record, dots):
        """An array as Aux; its dot, if it has one, is the next of dots."""
        aux = cgutils.create_struct_proxy(kind)(context, builder)
        aux.array = array
        if _checked(target, kind):
            aux.first = I64(0)
        if _noted(kind):
            aux.record = record
        if kind.dot:
            aux.dot = next(dots)
        return aux._getvalue()

    def wrapped(kinds):
        @target.intrinsic
        def wrap(typingctx, arrays, dots, record):
            to = types.Tuple([kind or array for kind, array in zip(kinds, arrays, strict=True)])

            def codegen(context, builder, sig, args):
                items = cgutils.unpack_tuple(builder, args[0], len(kinds))
                dot = iter(cgutils.unpack_tuple(builder, args[1], len(dots)))
                for n, kind in enumerate(kinds):
                    if kind is not None:
                        items[n] = one(context, builder, kind, items[n], args[2], dot)
                return context.make_tuple(builder, to, items)

            return to(arrays, dots, record), codegen

        return wrap

    return wrapped
