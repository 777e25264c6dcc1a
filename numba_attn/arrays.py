"""Which arrays are accepted. Kernels read base-class NumPy arrays in place. Everything else raises an error here, which
names the call that makes such an array of it."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

FLOAT_NAMES = "float64, float32, float16 or bfloat16 (ml_dtypes)"
_ACC: dict[Any, type] = {np.dtype("f8"): np.float64, np.dtype("f4"): np.float32, np.dtype("f2"): np.float32}


def plain(x: Any, name: str) -> Array:
    """`x` as a base-class ndarray that shares its memory (np.memmap included).

    Raises
    ------
    TypeError
        For anything that is not a NumPy array, and for the subclasses whose meaning would be lost.
    """
    kind = type(x)
    if kind is np.ndarray:
        return x
    if isinstance(x, np.memmap):
        return x.view(np.ndarray)
    raise TypeError(f"{name} is {advice(x, name)}")


def batch_step(x: Array) -> int:
    """Bytes from one batch row to the next, 0 where all share one."""
    return int(x.strides[0]) if len(x) > 1 else 0


def advice(x: Any, name: str) -> str:
    """What `x` is and how to make a NumPy array of it: the end of a TypeError."""
    kind = type(x)
    module = kind.__module__
    full = kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"
    if x is None:
        return "None; it takes a NumPy array"
    if isinstance(x, np.ma.MaskedArray):
        return f"a masked array; pass its data, {name}.data, and say which pairs may attend with mask="
    if isinstance(x, np.matrix):
        return f"a numpy.matrix; pass np.asarray({name})"
    if isinstance(x, np.ndarray):
        return f"a {full}, a subclass of numpy.ndarray that may carry more than numbers; pass np.asarray({name})"
    if isinstance(x, (list, tuple)):
        return f"a {kind.__name__}; it takes a NumPy array: np.asarray({name}, dtype=...)"
    if module == "torch" or module.startswith("torch."):
        device = getattr(x, "device", None)
        host = "" if getattr(device, "type", "cpu") == "cpu" else ".cpu()"
        return f"a torch tensor on {device}; it takes a NumPy array: {name}.detach(){host}.numpy()"
    if hasattr(kind, "__cuda_array_interface__"):
        # Looked up on the type: as an attribute of some arrays it raises, or waits for the device.
        jax = module.partition(".")[0] in ("jax", "jaxlib")
        copy = f"np.asarray({name})" if jax else f"{name}.get() in CuPy, {name}.copy_to_host() in Numba"
        return f"a {full}, an array on a GPU; it takes a NumPy array in host memory: {copy}"
    if hasattr(kind, "__array__") or hasattr(kind, "__dlpack__"):
        return f"a {full}; it takes a NumPy array: np.asarray({name})"
    return f"a {full}; it takes a NumPy array"


def accumulation(dtype: np.dtype[Any], name: str) -> type:
    """The type that numbers of `dtype` are added up in: np.float64 for float64, else np.float32.

    Raises
    ------
    TypeError
        For every dtype but the four that are computed with.
    """
    acc = _ACC.get(dtype)
    if acc is not None:
        return acc
    if dtype.name == "bfloat16" and dtype.itemsize == 2:  # by name: ml_dtypes is recognised, never imported
        _ACC[dtype] = np.float32
        return np.float32
    if dtype.kind in "iub":
        todo = f"convert it, for example {name}.astype(np.float32)"
    elif dtype.kind == "c":
        todo = f"complex attention has no single meaning: pass {name}.real, or the parts as separate features"
    elif not dtype.isnative:
        todo = f"its bytes are in the other order: pass {name}.astype({name}.dtype.newbyteorder('='))"
    else:
        todo = f"convert it, for example {name}.astype(np.float64)" if dtype.kind == "f" else "convert it"
    raise TypeError(f"{name} has dtype {dtype}; it takes {FLOAT_NAMES}: {todo}")


def integers(x: Any, name: str, takes: str) -> Array:
    """An int64 copy of `x`, read-only, so that it does not change after the check. Lists and ints are accepted too,
    since these are small settings.

    Raises
    ------
    TypeError
        If `x` does not hold integers. Bool is no integer here.
    ValueError
        If a number does not fit in int64.
    """
    if isinstance(x, (int, np.integer, list, tuple)) and not isinstance(x, (bool, np.bool_)):
        try:
            given = np.asarray(x)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name} is {x!r}; it takes {takes}") from error
        if given.size == 0:
            given = given.astype(np.int64)
    elif isinstance(x, (bool, np.bool_, float, complex, str, np.floating)):
        raise TypeError(f"{name} is {x!r}; it takes {takes}")
    else:
        given = plain(x, name)
    if given.dtype.kind not in "iu":
        if given.dtype.kind == "O":
            raise TypeError(f"{name} does not hold numbers that fit in int64; it takes {takes}")
        raise TypeError(f"{name} has dtype {given.dtype}; it takes {takes}")
    if given.dtype.kind == "u" and given.size and int(given.max()) >= 2**63:
        raise ValueError(f"{name} holds {given.max()}, which does not fit in int64; it takes {takes}")
    copy = np.array(given, dtype=np.int64, order="C")
    copy.flags.writeable = False
    return copy


def integer(x: Any, name: str, takes: str) -> int:
    """`x` as an int. Raises TypeError for bool, floats and the rest."""
    if type(x) is int:
        return x
    if not isinstance(x, (bool, np.bool_)):
        try:
            return operator.index(x)
        except TypeError:
            pass
    raise TypeError(f"{name} is {x!r}; it takes {takes}")


def real(x: Any, name: str, takes: str) -> float:
    """`x` as a float. Raises TypeError for bool, complex, strings and arrays with axes."""
    if type(x) is float:
        return x
    if isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool):
        try:
            return float(x)
        except OverflowError:
            raise ValueError(f"{name} is too large for float64; it takes {takes}") from None
    if isinstance(x, np.ndarray) and x.ndim == 0 and (x.dtype.kind in "iuf" or x.dtype.name == "bfloat16"):
        return float(x)
    if type(x).__name__ == "bfloat16":  # the scalar of ml_dtypes is no np.floating
        return float(x)
    raise TypeError(f"{name} is {x!r}; it takes {takes}")


def exact(key: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """key with settings and their types, since True == 1 == 1.0 while the checks tell them apart; None for one that is
    no plain value."""
    for x in settings:
        if type(x) is tuple:
            key = exact((*key, len(x)), x) or ()
            if not key:
                return None
        elif x is None or type(x) in (bool, int, float, str) or isinstance(x, (np.bool_, np.number)):
            key = (*key, type(x), x)
        else:
            return None
    return key
