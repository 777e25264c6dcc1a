"""The SIMD table, and pointers, short vectors and register tiles as Numba types.

Numba has no vector type, and LLVM does not keep a matrix tile in registers when it is an array in a loop. So there are
four types:

    Ptr(elem)             a raw address with an element type; p + n moves by elements, p[i] reads and writes a scalar
    Vec(elem, lanes)      one SIMD register (or the few that a narrower CPU needs); + - * / and comparisons work lane by
                          lane (vectors.py)
    Bits(lanes)           the result of a comparison, one bit a lane
    Tile(elem, lanes, mr, nr)   mr x nr vectors: an LLVM array of vectors, which stays in registers (registers.py)

The kernels are plain functions of pointers. The element type travels with a pointer's type, and the number of lanes
follows from it and from the row of the table that this CPU runs: `lanes(p)` is a number when the kernel is compiled,
and Numba makes a function anew for each element type that it meets.
"""

import operator
import os
from dataclasses import dataclass

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
LLVM_TYPE = {"f32": F32, "f64": F64, "u8": I8, "u16": I16, "i32": I32, "i64": I64}
NUMBA_TYPE: dict[str, types.Type] = {
    "f32": types.float32,
    "f64": types.float64,
    "u8": types.uint8,
    "u16": types.uint16,
    "i32": types.int32,
    "i64": types.int64,
}
BYTES = {"f32": 4, "f64": 8, "u8": 1, "u16": 2, "i32": 4, "i64": 8}


# ---------------------------------------------------------------- which instructions this CPU has


@dataclass(frozen=True)
class Row:
    """One line of the SIMD table: vector length and register tile of each accumulation type."""

    name: str
    bits: int  # of a vector register
    mr: int  # rows of the register tile (keys, or head dimensions)
    nr: int  # vectors of the register tile (queries / lanes)
    fma: bool  # a fused multiply-add instruction exists; without one llvm.fma is a library call
    f16c: bool  # half <-> float conversion exists; without it LLVM calls a function that does not exist

    def lanes(self, elem: str) -> int:
        return self.bits // (8 * BYTES[elem])


# mr * nr accumulators + nr operands + 1 broadcast must fit the registers: 32 for AVX-512 and NEON, 16 elsewhere.
# With AVX-512 and two FMA units 8 x 3 is faster than 6 x 4, 14 x 2, 12 x 2, 4 x 6 and 16 x 1.
ROWS = {
    "avx512": Row("avx512", 512, 8, 3, True, True),
    "avx2": Row("avx2", 256, 4, 3, True, True),
    "sse2": Row("sse2", 128, 4, 3, False, False),
    "neon": Row("neon", 128, 8, 3, True, True),
}


def _compiled_isa() -> str:
    """The row that Numba's own target machine can run: found in the assembly that LLVM writes for it.

    llvmlite's get_host_cpu_features ignores NUMBA_CPU_NAME and NUMBA_CPU_FEATURES; the code generator does not.
    """
    from numba.core.registry import cpu_target

    if "x86" not in llvm.get_process_triple() and "amd64" not in llvm.get_process_triple():
        return "neon"
    machine = cpu_target.target_context.codegen()._tm
    probe = llvm.parse_assembly("""
        declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
        define <16 x float> @probe(<16 x float> %a) {
            %b = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %a, <16 x float> %a)
            ret <16 x float> %b
        }""")
    probe.triple = llvm.get_process_triple()
    text = machine.emit_assembly(probe)
    if "zmm" in text:
        return "avx512"
    return "avx2" if "vfmadd" in text else "sse2"


def choose_row() -> Row:
    """The SIMD row: NUMBA_ATTN_SIMD if set, else what Numba compiles for."""
    asked = os.environ.get("NUMBA_ATTN_SIMD", "")
    if asked and asked not in ROWS:
        raise ValueError(f"NUMBA_ATTN_SIMD={asked!r}: one of {', '.join(ROWS)}, or leave it unset")
    return ROWS[asked or _compiled_isa()]


ROW = choose_row()  # fixed for the process, like the CPU name that Numba compiles for


# ---------------------------------------------------------------- types


class Ptr(types.Type):
    def __init__(self, elem):
        self.elem = elem
        super().__init__(name=f"Ptr({elem})")


class Vec(types.Type):
    def __init__(self, elem, lanes):
        self.elem, self.lanes = elem, lanes
        self.ir = ir.VectorType(LLVM_TYPE[elem], lanes)
        super().__init__(name=f"Vec({elem},{lanes})")


class Bits(types.Type):
    def __init__(self, lanes):
        self.lanes = lanes
        self.ir = ir.VectorType(I1, lanes)
        super().__init__(name=f"Bits({lanes})")


class Tile(types.Type):
    def __init__(self, elem, lanes, mr, nr):
        self.elem, self.lanes, self.mr, self.nr = elem, lanes, mr, nr
        self.vec = Vec(elem, lanes)
        self.ir = ir.ArrayType(self.vec.ir, mr * nr)
        super().__init__(name=f"Tile({elem},{lanes},{mr},{nr})")


@register_model(Ptr)
class _PtrModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, LLVM_TYPE[fe_type.elem].as_pointer())


@register_model(Vec)
@register_model(Bits)
@register_model(Tile)
class _ValueModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir)


# ---------------------------------------------------------------- pointers


def _ptr_cast(name, elem):
    @intrinsic
    def cast(typingctx, address):
        """The address, an intp or another pointer, as a Ptr of this element type."""

        def codegen(context, builder, sig, args):
            to = LLVM_TYPE[elem].as_pointer()
            return builder.bitcast(args[0], to) if isinstance(sig.args[0], Ptr) else builder.inttoptr(args[0], to)

        return Ptr(elem)(address if isinstance(address, Ptr) else types.intp), codegen

    cast.__name__ = name
    return cast


f32_ptr, f64_ptr, u8_ptr, u16_ptr, i32_ptr, i64_ptr = (
    _ptr_cast(n + "_ptr", n) for n in ("f32", "f64", "u8", "u16", "i32", "i64")
)


POINTER = {"f32": f32_ptr, "f64": f64_ptr}  # by accumulation type


@intrinsic
def address_of(typingctx, p):
    def codegen(context, builder, sig, args):
        return builder.ptrtoint(args[0], I64)

    return types.intp(p), codegen


def lanes_of(kind: types.Type) -> int:
    """Lanes of the vectors of a pointer's element type on this CPU, or of a vector."""
    return kind.lanes if isinstance(kind, Vec) else ROW.lanes(kind.elem)


def _constant_of(name, value, doc):
    """A function of a pointer that is a number known when the kernel is compiled."""

    @intrinsic
    def constant(typingctx, p):
        number = value(p)

        def codegen(context, builder, sig, args):
            return ir.Constant(I64, number)

        return types.intp(p), codegen

    constant.__name__, constant.__doc__ = name, doc
    return constant


lanes = _constant_of("lanes", lanes_of, "How many elements of p's type a vector holds.")
itemsize = _constant_of("itemsize", lambda p: BYTES[p.elem], "Bytes of an element.")
full_width = _constant_of("full_width", lambda p: ROW.nr * lanes_of(p), "Queries of the widest tile.")


@intrinsic
def pointer_like(typingctx, p, address):
    """The address, an intp or another pointer, as a pointer to p's element type."""

    def codegen(context, builder, sig, args):
        to = LLVM_TYPE[p.elem].as_pointer()
        return builder.bitcast(args[1], to) if isinstance(sig.args[1], Ptr) else builder.inttoptr(args[1], to)

    return p(p, address if isinstance(address, Ptr) else types.intp), codegen


@intrinsic
def at_byte(typingctx, p, offset):
    """p moved by an offset in bytes: how a thread finds a buffer in its scratch memory."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(builder.add(builder.ptrtoint(args[0], I64), args[1]), args[0].type)

    return p(p, types.intp), codegen


@intrinsic
def scalar(typingctx, p, x):
    """x as a number of p's element type: what it is multiplied with must not become a float64."""
    number = NUMBA_TYPE[p.elem]

    def codegen(context, builder, sig, args):
        return args[1]

    return number(p, number), codegen


@infer_global(operator.add)
class _PtrAdd(AbstractTemplate):
    def generic(self, args, kws):
        if len(args) == 2 and isinstance(args[0], Ptr) and isinstance(args[1], types.Integer):
            return signature(args[0], args[0], types.intp)


@lower_builtin(operator.add, Ptr, types.Integer)
def _ptr_add(context, builder, sig, args):
    return builder.gep(args[0], [args[1]])


@infer_global(operator.getitem)
class _PtrGet(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], Ptr) and isinstance(args[1], types.Integer):
            return signature(NUMBA_TYPE[args[0].elem], args[0], types.intp)


@lower_builtin(operator.getitem, Ptr, types.Integer)
def _ptr_get(context, builder, sig, args):
    return builder.load(builder.gep(args[0], [args[1]]), align=1)


@infer_global(operator.setitem)
class _PtrSet(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], Ptr) and isinstance(args[1], types.Integer):
            return signature(types.none, args[0], types.intp, NUMBA_TYPE[args[0].elem])


@lower_builtin(operator.setitem, Ptr, types.Integer, types.Any)
def _ptr_set(context, builder, sig, args):
    builder.store(args[2], builder.gep(args[0], [args[1]]), align=1)
    return context.get_dummy_value()


# ---------------------------------------------------------------- operations on addresses


@intrinsic
def prefetch(typingctx, address):
    """Prefetch the cache line at an address, which may be any number."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fn, [pointer, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def fetch_add(typingctx, p, n):
    """The old value of *p, which n is added to atomically; what other threads wrote before their own is visible after
    it."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", args[0], args[1], "acq_rel")

    return types.int64(p, types.int64), codegen


@intrinsic
def call_address(typingctx, address, *args):
    """Call a C function (integers and pointers in, nothing out) that lies at an address.

    A user's function is compiled alone and called in this way. A kernel that contained it would be compiled anew for
    each function.
    """
    arg_types = args[0] if len(args) == 1 and isinstance(args[0], types.BaseTuple) else types.Tuple(args)

    def codegen(context, builder, sig, values):
        target, packed = values
        items = cgutils.unpack_tuple(builder, packed, len(arg_types))
        fn = ir.FunctionType(ir.VoidType(), [v.type for v in items])
        builder.call(builder.inttoptr(target, fn.as_pointer()), items)
        return context.get_dummy_value()

    return types.void(types.intp, arg_types), codegen
