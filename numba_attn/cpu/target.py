"""The CPU as a target of users' functions: what scores, indices and transcendental functions are made of here.

Libm calls run lane by lane (tanh 0.13 G pairs/s where the products do 0.9). So exp, log, log1p, tanh, sin, cos and sqrt
of a score (scalar_types.py) are the branch-free functions of transcendental.py, which LLVM turns into vector code as
part of a loop over a row of the score tile.
"""

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin, lower_cast
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, overload, overload_attribute, register_model
from numba.np.arrayobj import load_item, populate_array

from ..userfn import scalar_types
from ..userfn.scalar_types import FLOAT
from ..userfn.transcendental import Math, names
from .compile import inner
from .simd import F32, I64, ROW, Ptr


def multiply_add(builder, a, b, c):
    """a * b + c of LLVM values, fused where the CPU can."""
    if not ROW.fma:
        return builder.fadd(builder.fmul(a, b), c)
    name = f"llvm.fma.f{32 if a.type == F32 else 64}"
    fn = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(fn, [a, b, c])


def _power(acc):
    @inner
    def power(x, y):
        return acc(np.float64(x) ** np.float64(y))

    return power


def libm(fn):
    """A function of the math module lane by lane, in the score's precision: right, but slow."""

    @inner
    def call(x):
        return fn(x)

    def of(elem):
        if elem == "f64":
            return call
        return inner(lambda x: np.float32(call(x)))

    return of


NAMES = names(inner, intrinsic, multiply_add)
MATH = {elem: Math(elem, NAMES, _power(acc), wide_sine=True) for elem, acc in FLOAT.items()}
TARGET = scalar_types.Target(
    register_model=register_model,
    models=models,
    infer_global=infer_global,
    AbstractTemplate=AbstractTemplate,
    signature=signature,
    lower_builtin=lower_builtin,
    lower_cast=lower_cast,
    intrinsic=intrinsic,
    overload=overload,
    overload_attribute=overload_attribute,
    populate_array=populate_array,
    load_item=load_item,
    record=Ptr("i64"),
    names=NAMES,
    math=MATH,
    libm=libm,
    multiply_add=multiply_add,
    negative=lambda builder, x: builder.fneg(x),
    guarded=False,
)
SCORES = scalar_types.build(TARGET)
AS_SCORE, AS_INDEX, as_float = SCORES.AS_SCORE, SCORES.AS_INDEX, SCORES.as_float


# ---------------------------------------------------------------- arrays of aux, as a kernel hands them on


@intrinsic
def aux_arrays(typingctx, table, kinds):
    """The arrays that a table of (address, shape, strides) describes; kinds: a tuple type of their array types."""
    kinds = kinds.instance_type

    def codegen(context, builder, sig, args):
        at, arrays = 0, []
        for kind in kinds:
            numbers = [builder.load(builder.gep(args[0], [ir.Constant(I64, at + n)])) for n in range(1 + 2 * kind.ndim)]
            at += len(numbers)
            array = context.make_array(kind)(context, builder)
            data = builder.inttoptr(numbers[0], array.data.type)
            itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
            populate_array(
                array,
                data=data,
                shape=numbers[1 : 1 + kind.ndim],
                strides=numbers[1 + kind.ndim :],
                itemsize=itemsize,
                meminfo=None,
            )
            arrays.append(array._getvalue())
        return context.make_tuple(builder, kinds, arrays)

    return kinds(table, types.TypeRef(kinds)), codegen


def aux_table(aux: tuple[np.ndarray, ...]) -> np.ndarray:
    """Address, shape and strides of each array, as `aux_arrays` reads them."""
    numbers: list[int] = []
    for a in aux:
        numbers += [a.ctypes.data, *a.shape, *a.strides]
    return np.array(numbers or [0], np.int64)
