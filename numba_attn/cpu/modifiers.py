"""User functions and transcendental functions on the CPU.

Libm calls run lane by lane (tanh 0.13 G pairs/s where the products do 0.9). So exp, log, log1p, tanh, sin, cos and sqrt
of a score (score_types.py) are the branch-free functions of functions.py, which LLVM turns into vector code as part of
a loop over a row of the score tile.

A user's function is compiled alone, as that loop, and the kernel calls it through its address: a new function costs a
tenth of a second, and no kernel is ever compiled for it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin, lower_cast
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, overload, overload_attribute, register_model
from numba.np.arrayobj import load_item, populate_array

from .. import score, score_types
from ..functions import Math, names
from ..online import LOG2E
from ..score_types import FLOAT
from .compile import array_type, compile_cfunc, inner
from .simd import F32, I64, ROW, Ptr, f32_ptr, f64_ptr, i64_ptr, u8_ptr


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
TARGET = score_types.Target(
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
SCORES = score_types.build(TARGET)
AS_SCORE, AS_INDEX, as_float = SCORES.AS_SCORE, SCORES.AS_INDEX, SCORES.as_float

# ---------------------------------------------------------------- compiling a user's function


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


_ADDRESSES: dict[Any, int] = {}


def tile_function(
    fn: Callable[..., Any] | score.ScoreMod,
    kind: str,
    elem: str,
    aux: tuple[np.ndarray, ...],
    *,
    asked: tuple[Any, ...] = (),
) -> int:
    """The address of fn as a loop over a tile; a kind of "score" or "mask", or one of the derivatives of a score.

    C signature of these two: (target, row stride, lanes, b, h, first i, first j, keys, aux table). A score function
    replaces target[j, lane] and ends in log2 units; a mask function clears the bytes of the pairs that it hides. For
    the derivatives, and for asked, see dual.py.
    """
    grad = None if kind in ("score", "mask") or not isinstance(fn, score.ScoreMod) else fn.grad
    functions = score.identity(score.plain_function(fn)), grad and score.identity(grad)
    key = (kind, elem, functions, tuple((a.dtype, a.ndim) for a in aux), asked)
    address = _ADDRESSES.get(key)
    if address is None:
        address = _ADDRESSES[key] = _compile(fn, kind, elem, aux, asked)
    return address


def _compile(fn, kind, elem, aux, asked):
    if kind not in ("score", "mask"):
        from .dual import compile_derivative  # a process that wants no gradient does not pay for its types

        return compile_derivative(fn, kind, elem, aux, asked)
    call = inner(score.plain_function(fn))
    kinds = types.Tuple([array_type(a.dtype, a.ndim) for a in aux])
    index = AS_INDEX[elem]
    acc, pointer, cast = (
        (np.float32, f32_ptr, AS_SCORE[elem]) if elem == "f32" else (np.float64, f64_ptr, AS_SCORE[elem])
    )
    log2e = acc(LOG2E)

    def score_tile(target, w, lanes, b, h, i, j, keys, table):
        arrays = aux_arrays(i64_ptr(table), kinds)
        for key in range(keys):
            row = pointer(target) + key * w
            for r in range(lanes):
                at_i, at_j = index(i + r), index(j + key)
                row[r] = acc(as_float(call(cast(row[r]), index(b), index(h), at_i, at_j, *arrays))) * log2e

    def mask_tile(target, w, lanes, b, h, i, j, keys, table):
        arrays = aux_arrays(i64_ptr(table), kinds)
        for key in range(keys):
            row = u8_ptr(target) + key * w
            for r in range(lanes):
                row[r] = row[r] if call(b, h, i + r, j + key, *arrays) else 0

    name = f"{kind}_mod {getattr(score.plain_function(fn), '__name__', '?')}"
    try:
        return compile_cfunc(
            score_tile if kind == "score" else mask_tile, types.void(*[types.intp] * 9), name, cached=False
        )
    except Exception as error:
        raise TypeError(f"{kind}_mod: the function could not be compiled: {error}") from error
