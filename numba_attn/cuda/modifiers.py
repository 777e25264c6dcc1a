"""User functions and transcendental functions on a GPU: the counterpart of cpu/modifiers.py.

CUDA has no function pointers, so a user's function is compiled into the kernel: the functions here return plain Python
functions of scalars, which the kernel's code for a tile calls once an element (`context.compile_internal`). What a
score, an index or a dual number is, is shared with the CPU (scalar_types.py, dual_types.py, aux_types.py).

The plain functions take (score, b, h, i, j, table). The score is a float of the accumulation type in natural units; b,
h, i and j are array indices, int32, from 0 on and inside the arrays, which the kernel sees to. The table is a UniTuple
of int64, an argument of the kernel, that says where the arrays of aux are: `aux_numbers`.

Device functions of numba-cuda ask the driver for the current device when a call of one is compiled. Those here
(`device`, `overload`) do not, so that kernels with user functions compile on a machine without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numba
import numpy as np
from llvmlite import ir

from ..userfn import accepted, aux_types, dual_types, scalar_types
from ..userfn.scalar_types import FLOAT
from ..userfn.transcendental import I64, Math, names, power64
from .compile import (
    AbstractTemplate,
    ConfigStack,
    CUDADispatcher,
    cgutils,
    compile_cuda,
    core_models,
    infer,
    infer_getattr,
    infer_global,
    intrinsic,
    libdevice,
    load_item,
    lower_builtin,
    lower_cast,
    make_overload_attribute_template,
    make_overload_template,
    populate_array,
    register_model,
    signature,
    types,
)

# --- device functions that need no device -----------------------------------------------------------------------------


class _Device(CUDADispatcher):
    """A device function, always inlined. Its LLVM is the same for every compute capability."""

    def compile_device(self, args: Any, return_type: Any = None) -> Any:
        if args not in self.overloads:
            with self._compiling_counter:
                flags = ConfigStack.top_or_none()
                cc = flags.compute_capability if flags is not None and flags.is_set("compute_capability") else (8, 0)
                result = compile_cuda(self.py_func, return_type, args, forceinline=True, cc=cc)
                self.overloads[args] = result
                result.target_context.insert_user_function(result.entry_point, result.fndesc, [result.library])
        return self.overloads[args]


def device(fn: Callable[..., Any]) -> Any:
    """A plain function as one that compiled functions may call."""
    return _Device(fn, {"device": True})


def overload(fn: Any, prefer_literal: bool = False) -> Callable[..., Any]:
    """numba.cuda.extending.overload, by device functions of the kind above."""

    def decorate(resolve: Callable[..., Any]) -> Callable[..., Any]:
        template = make_overload_template(fn, resolve, {}, True, "never", prefer_literal, target="cuda")
        template._get_jit_decorator = lambda self: lambda **options: device
        infer(template)
        infer_global(fn, types.Function(template))
        return resolve

    return decorate


def overload_attribute(kind: Any, name: str) -> Callable[..., Any]:
    def decorate(resolve: Callable[..., Any]) -> Callable[..., Any]:
        infer_getattr(make_overload_attribute_template(kind, name, resolve, target="cuda"))
        return overload(resolve)(resolve)

    return decorate


# --- the maths and the types ------------------------------------------------------------------------------------------


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    name = f"llvm.fma.f{32 if a.type == ir.FloatType() else 64}"
    fn = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(fn, [a, b, c])


def negative(builder: Any, x: Any) -> Any:
    """-x: NVVM refuses fneg."""
    return builder.fsub(ir.Constant(x.type, -0.0), x)


def libm(fn: Callable[..., Any]) -> Callable[[str], Any]:
    """A function of the math module, from libdevice: elem -> function."""

    def calling(name: str) -> Any:
        call = getattr(libdevice, name)
        return device(lambda x: call(x))

    return {"f32": calling(fn.__name__ + "f"), "f64": calling(fn.__name__)}.__getitem__


NAMES = names(device, intrinsic, multiply_add)
# libdevice's pow of float64 is a true call, which no kernel should have
POWER = {"f32": device(lambda x, y: libdevice.powf(x, y)), "f64": power64(NAMES)}
MATH = {elem: Math(elem, NAMES, POWER[elem], wide_sine=False) for elem in FLOAT}
TARGET = scalar_types.Target(
    register_model=register_model,
    models=core_models,
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
    record=types.CPointer(types.int64),
    names=NAMES,
    math=MATH,
    libm=libm,
    multiply_add=multiply_add,
    negative=negative,
    guarded=True,  # an access outside of memory is the end of the process's work on the device
)


def _element(elem: str, dtype: Any) -> Any:
    """An element of an array of aux: what the score and the indices are, so that nothing is computed in float64."""
    if isinstance(dtype, types.Float):
        return SCORES.Score(elem)
    if isinstance(dtype, types.Boolean) or (not dtype.signed and dtype.bitwidth < 32):
        return SCORES.Index(elem, 31)
    return dtype if dtype == types.uint64 else SCORES.Index(elem)


SCORES = scalar_types.build(TARGET)
DUALS = dual_types.build(TARGET, SCORES)
AUX = aux_types.build(TARGET, SCORES, DUALS, _element)


# --- what a user's function is called with ----------------------------------------------------------------------------


@intrinsic
def position(typingctx, i):
    """An array index as an int64 that LLVM knows to be in [0, 2**31)."""

    def codegen(context, builder, sig, args):
        return builder.zext(builder.and_(args[0], ir.Constant(args[0].type, 2**31 - 1)), I64)

    return types.int64(types.int32), codegen


def aux_types_of(aux: Sequence[np.ndarray]) -> tuple[Any, ...]:
    return tuple(aux_types.array_type(numba.from_dtype(a.dtype), a.ndim, aligned=True) for a in aux)


def aux_numbers(aux: Iterable[tuple[int, Sequence[int], Sequence[int]]]) -> tuple[int, ...]:
    """What the kernel gets as `table`: address, shape and strides in bytes of each array of aux, on the device; at
    least one number."""
    return tuple(int(n) for address, shape, strides in aux for n in (address, *shape, *strides)) or (0,)


def arrays_of(kinds: tuple[Any, ...]) -> Any:
    """table -> the arrays that it describes, of these array types."""
    result = types.Tuple(kinds)

    @intrinsic
    def arrays(typingctx, table):
        def codegen(context, builder, sig, args):
            numbers, at, found = cgutils.unpack_tuple(builder, args[0], table.count), 0, []
            for kind in kinds:
                array = context.make_array(kind)(context, builder)
                pointer = array.data.type
                data = builder.inttoptr(numbers[at], ir.PointerType(pointer.pointee, 1))  # global memory
                populate_array(
                    array,
                    data=builder.addrspacecast(data, pointer),
                    shape=numbers[at + 1 : at + 1 + kind.ndim],
                    strides=numbers[at + 1 + kind.ndim : at + 1 + 2 * kind.ndim],
                    itemsize=I64(context.get_abi_sizeof(context.get_data_type(kind.dtype))),
                    meminfo=None,
                )
                found.append(array._getvalue())
                at += 1 + 2 * kind.ndim
            return context.make_tuple(builder, result, found)

        return result(table), codegen

    return arrays


def _as_float(elem: str) -> Any:
    kind = SCORES.Score(elem)

    @intrinsic
    def as_float(typingctx, x):
        """Whatever a user's function returns, as a float of the accumulation type."""

        def codegen(context, builder, sig, args):
            return context.cast(builder, args[0], x, kind)

        return (kind.float(x), codegen) if isinstance(x, SCORES.real) else None

    return as_float


AS_FLOAT = {elem: _as_float(elem) for elem in FLOAT}


def _foldable(name: str) -> Callable[..., Any]:
    """A function of the math module that LLVM computes where its argument is a constant: libdevice's are not."""
    fn, of_float = getattr(math, name), getattr(MATH["f64"], name)

    def named(x):
        raise NotImplementedError

    named.__name__ = name

    @overload(named)
    def resolve(x):
        if isinstance(x, types.Integer) or x == types.float64:
            return lambda x: of_float(np.float64(x))
        return lambda x: fn(x)

    return named


def _foldable_math() -> dict[int, Any]:
    """By the id of what they stand in for: math, and functions of it, inside a user's function."""
    names = ("exp", "log", "log1p", "tanh", "sin", "cos", "sqrt")
    functions = {name: _foldable(name) for name in names}
    module = ModuleType("math")
    vars(module).update(vars(math) | functions)
    return {id(math): module} | {id(getattr(math, name)): fn for name, fn in functions.items()}


FOLDABLE = _foldable_math()


def user_function(fn: Any) -> Any:
    """A user's function as a device function. So are the @njit functions that it calls, which would be device functions
    of numba-cuda."""
    return device(_rebuilt(accepted.plain_function(fn), {}))


def _rebuilt(fn: FunctionType, known: dict[int, Any]) -> FunctionType:
    def replaced(x: Any) -> Any:
        if id(x) in FOLDABLE:
            return FOLDABLE[id(x)]
        if not isinstance(getattr(x, "py_func", None), FunctionType):
            return x
        if id(x) not in known:
            known[id(x)] = x  # as it is where it calls itself, which CUDA does not do
            known[id(x)] = device(_rebuilt(x.py_func, known))
        return known[id(x)]

    used: set[str] = set()
    codes = [fn.__code__]
    while codes:
        code = codes.pop()
        used.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]  # functions inside it
    scope = fn.__globals__ | {name: replaced(fn.__globals__[name]) for name in used if name in fn.__globals__}
    cells = []
    for cell in fn.__closure__ or ():
        try:
            cells.append(CellType(replaced(cell.cell_contents)))
        except ValueError:  # not assigned yet
            cells.append(cell)
    new = FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, tuple(cells))
    new.__kwdefaults__, new.__module__, new.__qualname__ = fn.__kwdefaults__, fn.__module__, fn.__qualname__
    return new


def check(call: Any, arguments: tuple[Any, ...], allowed: tuple[Any, ...], message: str) -> Any:
    """Compile a device function for the types of its arguments, and return the type of its result; TypeError with the
    message where that cannot be done."""
    try:
        _, _, folded, _ = call.get_call_template(arguments, {})
        returned = call.overloads[tuple(folded)].signature.return_type
        if not isinstance(returned, allowed):
            raise TypeError(f"it returns {returned}")
    except Exception as error:
        raise TypeError(f"{message}: {error}") from error
    return returned


# --- the functions for a kernel ---------------------------------------------------------------------------------------

_FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def cached(kind: str, mod: Any, elem: str, aux: Sequence[np.ndarray], more: Any, build: Callable[[], Any]) -> Any:
    """One function object for all user functions that are the same, so that it can be a part of a kernel's key."""
    grad = mod.grad if isinstance(mod, accepted.ScoreMod) and kind not in ("score", "mask") else None
    functions = accepted.identity(accepted.plain_function(mod)), grad and accepted.identity(grad)
    key = (kind, elem, functions, tuple((a.dtype, a.ndim) for a in aux), more)
    if key not in _FUNCTIONS:
        _FUNCTIONS[key] = build()
    return _FUNCTIONS[key]


def mod_function(fn: Any, elem: str, aux: Sequence[np.ndarray]) -> Callable[..., Any]:
    """The plain function (score, b, h, i, j, table) -> modified score of a score_mod.

    elem : "f32" or "f64", the accumulation type
    aux : the arrays, or anything with their dtype and ndim; float32 or float64, integers or bools

    Raises
    ------
    TypeError
        If the function cannot be compiled.
    """
    return cached("score", fn, elem, aux, None, lambda: _mod_function(fn, elem, aux))


def wrapped_types(elem: str, how: str, kinds: tuple[Any, ...], asked: Sequence[bool] | None = None) -> tuple[Any, ...]:
    """The Aux types of arrays: of those that are not asked for the plain ones."""
    asked = (True,) * len(kinds) if asked is None else asked
    return tuple(
        AUX.Aux(elem, how if yes else "number", n, kind) for n, (kind, yes) in enumerate(zip(kinds, asked, strict=True))
    )


def _mod_function(fn: Any, elem: str, aux: Sequence[np.ndarray]) -> Callable[..., Any]:
    call, kinds = user_function(fn), aux_types_of(aux)
    wrapped = wrapped_types(elem, "number", kinds)
    index = SCORES.Index(elem, 31)
    arguments = (SCORES.Score(elem), *[index] * 4, *wrapped)
    check(call, arguments, SCORES.real, "score_mod: the function could not be compiled")
    arrays, wrap = arrays_of(kinds), AUX.wrapped(wrapped)
    natural, at, as_float = SCORES.AS_SCORE[elem], SCORES.AS_SHORT_INDEX[elem], AS_FLOAT[elem]

    def mod(score, b, h, i, j, table):
        arguments = wrap(arrays(table), (), 0)
        y = call(natural(score), at(position(b)), at(position(h)), at(position(i)), at(position(j)), *arguments)
        return as_float(y)

    return mod


def mask_function(fn: Any, elem: str, aux: Sequence[np.ndarray]) -> Callable[..., Any]:
    """The plain function (b, h, i, j, table) -> bool of a mask_mod; as mod_function, but for the numbers, which are
    Numba's own."""
    return cached("mask", fn, elem, aux, None, lambda: _mask_function(fn, aux))


def _mask_function(fn: Any, aux: Sequence[np.ndarray]) -> Callable[..., Any]:
    call, kinds = user_function(fn), aux_types_of(aux)
    allowed = (types.Number, types.Boolean)
    check(call, (*[types.int64] * 4, *kinds), allowed, "mask_mod: the function could not be compiled")
    arrays = arrays_of(kinds)

    def mask(b, h, i, j, table):
        return bool(call(position(b), position(h), position(i), position(j), *arrays(table)))

    return mask


def slope_function(mod: Any, elem: str, aux: Sequence[np.ndarray]) -> Callable[..., Any]:
    """The plain function (score, b, h, i, j, table) -> (value, d value / d score), by dual numbers or the user's own
    gradient; the slope is 0 where the value is -inf.

    Raises
    ------
    TypeError
        If the function cannot be differentiated, or its gradient not be compiled.
    """
    of = _slope_by_hand if isinstance(mod, accepted.ScoreMod) and mod.grad is not None else _slope_of_duals
    return cached("slope", mod, elem, aux, None, lambda: of(mod, elem, aux))


NOT_DIFFERENTIATED = (
    "score_mod: the function could not be differentiated; write its gradient and pass na.score_mod(fn, grad=...)"
)
NOT_COMPILED = "score_mod: the function and its grad could not be compiled"


def _slope_of_duals(mod: Any, elem: str, aux: Sequence[np.ndarray]) -> Callable[..., Any]:
    call, kinds = user_function(mod), aux_types_of(aux)
    wrapped = wrapped_types(elem, "number", kinds)
    arguments = (DUALS.Dual(elem), *[SCORES.Index(elem, 31)] * 4, *wrapped)
    check(call, arguments, (DUALS.Dual, *SCORES.real), NOT_DIFFERENTIATED)
    arrays, wrap = arrays_of(kinds), AUX.wrapped(wrapped)
    at, dual, convert, choose = SCORES.AS_SHORT_INDEX[elem], DUALS.dual, DUALS.AS_DUAL[elem], NAMES.choose
    value_of, tangent_of = DUALS.value_of, DUALS.tangent_of
    zero, one, hidden = FLOAT[elem](0), FLOAT[elem](1), FLOAT[elem](-math.inf)

    def slope(score, b, h, i, j, table):
        arguments = wrap(arrays(table), (), 0)
        s = dual(score, one)
        y = convert(call(s, at(position(b)), at(position(h)), at(position(i)), at(position(j)), *arguments))
        return value_of(y), choose(value_of(y) == hidden, zero, tangent_of(y))

    return slope


def _slope_by_hand(mod: Any, elem: str, aux: Sequence[np.ndarray]) -> Callable[..., Any]:
    call, grad, kinds = user_function(mod), user_function(mod.grad), aux_types_of(aux)
    wrapped = wrapped_types(elem, "number", kinds)
    arguments = (SCORES.Score(elem), *[SCORES.Index(elem, 31)] * 4, *wrapped)
    check(call, arguments, SCORES.real, NOT_COMPILED)
    check(grad, arguments, (types.BaseTuple, *SCORES.real), NOT_COMPILED)
    arrays, wrap, first = arrays_of(kinds), AUX.wrapped(wrapped), DUALS.numbers(elem, 1)
    natural, at, as_float, choose = SCORES.AS_SCORE[elem], SCORES.AS_SHORT_INDEX[elem], AS_FLOAT[elem], NAMES.choose
    zero, hidden = FLOAT[elem](0), FLOAT[elem](-math.inf)

    def slope(score, b, h, i, j, table):
        arguments = wrap(arrays(table), (), 0)
        s, b, h, i, j = natural(score), at(position(b)), at(position(h)), at(position(i)), at(position(j))
        y = as_float(call(s, b, h, i, j, *arguments))
        g = first(grad(s, b, h, i, j, *arguments))
        return y, choose(y == hidden, zero, g[0])

    return slope
