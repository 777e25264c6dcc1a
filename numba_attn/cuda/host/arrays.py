"""Arrays of torch, CuPy, JAX and Numba that are on a GPU already: what the kernels need to know of them, and results as
arrays of the same library.

No array library is imported. An input is read through DLPack, which gives dtype, device and the order of work, or
through __cuda_array_interface__ if the object has no DLPack, as Numba's arrays. (An ordinary torch tensor is read
through its own attributes, which takes a small part of the time of its capsule.) A result is memory of this package.
The caller's library, which is found in sys.modules, wraps it through the same protocols.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import struct
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ...arrays import FLOAT_NAMES, Array
from . import driver
from .streams import full_name, lasts, resolve_stream

CUDA, CUDA_MANAGED = 2, 13  # DLDeviceType
_LIBRARIES = {"torch": "torch", "cupy": "cupy", "jax": "jax", "jaxlib": "jax", "numba": "numba", "numba_cuda": "numba"}
_NAMES = {"torch": "torch", "cupy": "CuPy", "jax": "JAX", "numba": "Numba"}


class Input(NamedTuple):
    """An array on a device, as a kernel sees it. The memory stays valid while the record lives."""

    address: int  # of the element with index 0 in every axis
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes; zero and negative ones too
    dtype: np.dtype[Any]
    read_only: bool  # also where what we see is a copy that the exporter made
    kind: str  # "torch", "cupy", "jax", "numba", or "" for any other library
    device: int  # the driver's ordinal
    stream: int  # the one that the memory is ready on
    keep: Any


# ---------------------------------------------------------------- what is what


def is_device_array(x: Any) -> bool:
    """Whether `x` is an array in the memory of a CUDA device."""
    kind = type(x)
    if kind is np.ndarray:
        return False
    if _is_tensor(x):
        return bool(x.is_cuda)
    where = getattr(kind, "__dlpack_device__", None)
    if where is not None:
        try:
            return int(where(x)[0]) in (CUDA, CUDA_MANAGED)
        except Exception:  # a device that DLPack does not name, or an array on several devices
            return False
    # Looked up on the type: as an attribute of some arrays it waits for the device.
    return hasattr(kind, "__cuda_array_interface__")


def kind_of(x: Any) -> str:
    """The library of an array, a class derived from one of its own included."""
    for base in type(x).__mro__:
        kind = _LIBRARIES.get(base.__module__.partition(".")[0])
        if kind:
            return kind
    return ""


def _is_tensor(x: Any) -> bool:
    """Whether x is of torch's own class of tensors, and no class derived from it."""
    return type(x) is getattr(sys.modules.get("torch"), "Tensor", None)


# ---------------------------------------------------------------- DLPack capsules

# Prototypes of our own: those of ctypes.pythonapi belong to everybody.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

# The structures of dlpack.h that a capsule points to.
# DLTensor: data, device type, device, axes, dtype (code, bits, lanes), shape, strides, byte offset.
_TENSOR = struct.Struct("=QiiiBBHQQQ")
_DEVICE_AT, _CODE_AT = 8, 20
# DLManagedTensor starts with the DLTensor; DLManagedTensorVersioned has major, minor, context, deleter and flags first.
_VERSIONED = struct.Struct("=IIQQQ")
_READ_ONLY, _IS_COPIED = 1, 2

_BFLOAT = 4
_DTYPES: dict[tuple[int, int, int], np.dtype[Any]] = {
    (code, 8 * dtype.itemsize, 1): dtype
    for code, names in ((0, "i1 i2 i4 i8"), (1, "u1 u2 u4 u8"), (2, "f2 f4 f8"), (5, "c8 c16"), (6, "?"))
    for dtype in map(np.dtype, names.split())
}


def bfloat16() -> np.dtype[Any]:
    """bfloat16 of ml_dtypes. A process that has torch alone may lack that package. Then it is a stand-in with the same
    name and size, which is all that this package needs. For NumPy it is two bytes without a meaning."""
    key = (_BFLOAT, 16, 1)
    if key not in _DTYPES:
        try:
            _DTYPES[key] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        except ImportError:
            # NumPy appends the bits to the class's name.
            _DTYPES[key] = np.dtype((type("bfloat", (np.void,), {}), 2))
    return _DTYPES[key]


class _Tensor(NamedTuple):
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    read_only: bool
    device_type: int
    device: int


def _read_capsule(capsule: Any, name: str) -> _Tensor:
    """What a capsule describes, valid while the capsule lives. The capsule is not renamed, so it still owns its memory.
    Its own destructor, which is code of the exporter, releases the memory exactly once."""
    read_only = False
    if _is_valid(capsule, b"dltensor_versioned"):
        at = _get_pointer(capsule, b"dltensor_versioned")
        major, minor, _, _, flags = _VERSIONED.unpack(ctypes.string_at(at, _VERSIONED.size))
        if major != 1:
            raise TypeError(f"{name} comes as DLPack {major}.{minor}; versions 0 and 1 are read here")
        read_only = bool(flags & (_READ_ONLY | _IS_COPIED))
        at += _VERSIONED.size
    elif _is_valid(capsule, b"dltensor"):
        at = _get_pointer(capsule, b"dltensor")
    else:
        raise TypeError(f"{name}.__dlpack__() gives {capsule!r}; it should be an unused DLPack capsule")
    data, device_type, device, ndim, code, bits, lanes, shape_at, strides_at, offset = _TENSOR.unpack(
        ctypes.string_at(at, _TENSOR.size)
    )
    dtype = _DTYPES.get((code, bits, lanes))
    if dtype is None:
        if (code, bits, lanes) != (_BFLOAT, 16, 1):
            told = f"{bits} bits" if lanes == 1 else f"{lanes} times {bits} bits"
            raise TypeError(f"{name} has a dtype that NumPy lacks (DLPack code {code}, {told}); it takes {FLOAT_NAMES}")
        dtype = bfloat16()
    many = ctypes.c_int64 * ndim
    shape = tuple(many.from_address(shape_at)) if ndim else ()
    if strides_at:
        strides = tuple(n * dtype.itemsize for n in many.from_address(strides_at))
    else:
        strides = _c_strides(shape, dtype.itemsize)
    return _Tensor(data + offset, shape, strides, dtype, read_only, device_type, device)


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    for n in reversed(shape):
        strides.append(itemsize)
        itemsize *= n
    return tuple(reversed(strides))


# ---------------------------------------------------------------- inputs


def describe(x: Any, name: str, stream: int, current: int | None = None) -> Input:
    """A device array as a record. Work on `stream` that comes after this call sees what the array's owner has written.
    current: torch's current stream, if it is known.

    Raises
    ------
    TypeError
        For what is no array on a CUDA device, cannot be shared, or has a dtype that no argument takes.
    """
    if type(x) is DeviceArray:  # as its capsule would say
        device = x.memory.device
        device.wait(int(stream) or 1, x.memory.stream)
        return Input(x.address, x.shape, x.strides, x.dtype, x.read_only, "", device.index, stream, x)
    if _is_tensor(x) and x.is_cuda:
        found = _from_tensor(x, stream, current)
        if found is not None:
            return found
    where = getattr(type(x), "__dlpack_device__", None)
    if where is not None:
        try:
            at = where(x)
        except Exception as error:
            raise TypeError(f"{name} is a {full_name(x)} that does not say where it is: {error}") from error
        if int(at[0]) not in (CUDA, CUDA_MANAGED):
            raise TypeError(_host_advice(x, name))
        return _from_dlpack(x, name, stream)
    if hasattr(type(x), "__cuda_array_interface__"):
        return _from_interface(x, name, stream)
    raise TypeError(_host_advice(x, name))


def _host_advice(x: Any, name: str) -> str:
    kind = kind_of(x)
    what = "a torch tensor" if kind == "torch" else f"a {full_name(x)}"
    host = f"{name}.detach().numpy()" if kind == "torch" else f"np.asarray({name})"
    there = {"torch": f"{name}.cuda()", "jax": f"jax.device_put({name}, jax.devices('gpu')[0])"}
    move = there.get(kind, f"cupy.asarray({name}) or torch.from_numpy({name}).cuda()")
    if isinstance(x, np.ndarray):
        return f"{name} is a NumPy array; here it takes an array on a GPU: {move}"
    if kind or hasattr(type(x), "__array__") or hasattr(type(x), "__dlpack__"):
        return f"{name} is {what} in host memory; it takes a NumPy array, {host}, or one on a GPU, {move}"
    return f"{name} is {what}; it takes an array on a GPU"


_TENSOR_DTYPES: dict[Any, np.dtype[Any]] = {}


def _from_tensor(x: Any, stream: int, current: int | None) -> Input | None:
    """What the capsule of a torch tensor would say, from the tensor's own attributes. None if that is not enough: it
    requires grad, is lazily conjugate or negative, has another layout, or has no memory (inside vmap)."""
    torch = sys.modules["torch"]
    if not _TENSOR_DTYPES:
        _TENSOR_DTYPES.update((getattr(torch, d.name), d) for d in _DTYPES.values() if hasattr(torch, d.name))
        _TENSOR_DTYPES[torch.bfloat16] = bfloat16()
    dtype = _TENSOR_DTYPES.get(x.dtype)
    try:
        if dtype is None or x.requires_grad or x.is_conj() or x.is_neg() or x.layout is not torch.strided:
            return None
        address, shape, strides = x.data_ptr(), tuple(x.shape), tuple(n * dtype.itemsize for n in x.stride())
    except RuntimeError:
        return None
    device = x.device.index
    if current is None:
        current = resolve_stream(None, "torch", device)
    if current != stream:
        driver.current(device).wait(stream, current)
        x = x.detach()  # the caller may give his another memory meanwhile
    return Input(address, shape, strides, dtype, False, "torch", device, stream, x)


def _from_dlpack(x: Any, name: str, stream: int) -> Input:
    # 1 is DLPack's word for the legacy default stream, 0 is forbidden; torch wants an int and nothing derived from it.
    told = int(stream) or 1
    try:
        try:
            capsule = x.__dlpack__(stream=told, max_version=(1, 0))
        except TypeError:  # an exporter from before versions
            capsule = x.__dlpack__(stream=told)
    except Exception as error:
        if getattr(x, "requires_grad", False) is True:
            raise TypeError(
                f"{name} is a torch tensor that requires grad, and torch's autograd does not see what happens here: "
                f"pass {name}.detach()"
            ) from error
        raise TypeError(f"{name} is a {full_name(x)} that does not share its memory: {error}") from error
    tensor = _read_capsule(capsule, name)
    if tensor.device_type not in (CUDA, CUDA_MANAGED):
        raise TypeError(
            f"{name} says that it is on a GPU, but its DLPack capsule says device type {tensor.device_type}"
        )
    kind = kind_of(x)
    read_only = tensor.read_only or kind == "jax"  # JAX arrays never change, but not every capsule says so
    return Input(
        tensor.address, tensor.shape, tensor.strides, tensor.dtype, read_only, kind, tensor.device, stream, capsule
    )


def _from_interface(x: Any, name: str, stream: int) -> Input:
    try:
        told = x.__cuda_array_interface__
    except Exception as error:
        raise TypeError(f"{name} is a {full_name(x)} that does not share its memory: {error}") from error
    version = told.get("version", 0)
    if version < 2:
        raise TypeError(f"{name} has version {version} of __cuda_array_interface__; versions 2 and 3 are read here")
    if told.get("mask") is not None:
        raise TypeError(f"{name} is a masked array; pass its data, and say which pairs may attend with mask=")
    dtype = _dtype_of(x, name, told["typestr"])
    shape = tuple(int(n) for n in told["shape"])
    strides = told.get("strides")
    strides = _c_strides(shape, dtype.itemsize) if strides is None else tuple(int(n) for n in strides)
    address, read_only = told["data"]
    address = int(address or 0)
    device = driver.current()
    ordinal = device.ordinal(address) if address else device.index
    producer = told.get("stream")
    if producer is not None:
        driver.current(ordinal).wait(stream, int(producer))
    return Input(address, shape, strides, dtype, bool(read_only), kind_of(x), ordinal, stream, (x, told))


def _dtype_of(x: Any, name: str, typestr: str) -> np.dtype[Any]:
    own = getattr(x, "dtype", None)
    if isinstance(own, np.dtype) and own.name == "bfloat16":  # Numba's arrays have no DLPack, but the dtype itself
        return own
    dtype = np.dtype(typestr)
    if not dtype.isnative:
        raise TypeError(
            f"{name} has dtype {dtype}; it takes {FLOAT_NAMES}: its bytes are in the other order, make it anew from an "
            f"array with dtype {dtype.newbyteorder('=')}"
        )
    if dtype.kind == "V" and dtype.itemsize == 2:
        raise TypeError(
            f"{name} has typestr {typestr!r}, which is how bfloat16 looks in __cuda_array_interface__, and also other "
            f"types of two bytes: pass an array with __dlpack__, which has a name for it"
        )
    if dtype not in _PLAIN:
        raise TypeError(f"{name} has dtype {dtype}; it takes {FLOAT_NAMES}: convert it")
    return dtype


_PLAIN = frozenset(_DTYPES.values())


def describe_all(given: Mapping[str, Any], stream: Any = None) -> dict[str, Input]:
    """The arguments of one call that are not None, by name, all on one device, ready on one stream.

    Parameters
    ----------
    given : mapping of str to array or None
    stream : None, int or object
        As the caller gave it; see `resolve_stream`.

    Raises
    ------
    TypeError
        If some are in host memory, naming which, and as `describe` does.
    ValueError
        If they are on different devices.
    """
    arrays = {name: x for name, x in given.items() if x is not None}
    here = [name for name, x in arrays.items() if is_device_array(x)]
    there = [name for name in arrays if name not in here]
    if there:
        if not here:
            raise TypeError(_host_advice(arrays[there[0]], there[0]))
        be, them = ("is", "it") if len(there) == 1 else ("are", "them")
        lead = arrays[here[0]]
        to = {"torch": f"torch.as_tensor({there[0]}, device={here[0]}.device)", "cupy": f"cupy.asarray({there[0]})"}
        to |= {"jax": f"jax.device_put({there[0]}, {here[0]}.device)", "numba": f"numba.cuda.to_device({there[0]})"}
        how = to.get(kind_of(lead), f"cupy.asarray({there[0]})")
        raise TypeError(
            f"{_and(here)} {'is' if len(here) == 1 else 'are'} on a GPU and {_and(there)} {be} in host memory; all "
            f"arrays of a call take one place: move {them}, for example {how}"
        )
    first = arrays[here[0]]
    index = _ordinal_of(first)
    with driver.current(index).active():  # torch exports only what is on its current device
        kind = kind_of(first)
        handle = resolve_stream(stream, kind, index)
        current = handle if stream is None and kind == "torch" else None
        found = {}
        for name, x in arrays.items():
            if name != here[0] and _ordinal_of(x) != index:
                raise ValueError(
                    f"{here[0]} is on CUDA device {index} and {name} on {_ordinal_of(x)}; all arrays of a call take "
                    f"one device"
                )
            found[name] = describe(x, name, handle, current)
    return found


def _ordinal_of(x: Any) -> int:
    if _is_tensor(x):
        return int(x.device.index)
    where = getattr(type(x), "__dlpack_device__", None)
    if where is not None:
        return int(where(x)[1])
    address = int(x.__cuda_array_interface__["data"][0] or 0)
    device = driver.current()
    return device.ordinal(address) if address else device.index


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def hold(inputs: Mapping[str, Input]) -> None:
    """Call it after the last launch that reads them. It keeps alive arrays whose memory the owner could reuse while the
    kernel still runs. torch and CuPy reuse memory in the order of their current stream, and this package frees its own
    in the order of its stream: if that is the call's stream, nothing is held. JAX and others do not know the stream."""
    if not inputs:
        return
    first = next(iter(inputs.values()))
    device, stream = driver.current(first.device), first.stream
    ordered = set()
    for kind in {x.kind for x in inputs.values()} & {"torch", "cupy"}:
        with device.active():
            if resolve_stream(None, kind, first.device) == stream:
                ordered.add(kind)
    rest = [x.keep for x in inputs.values() if x.kind not in ordered and not _is_freed_after(x.keep, stream)]
    if rest:
        device.hold(rest, stream)


def _is_freed_after(x: Any, stream: int) -> bool:
    """Whether x is an array of ours whose memory goes when what is on the stream is done, whichever thread drops it."""
    return type(x) is DeviceArray and (x.memory.settle or (x.memory.stream == stream and lasts(stream)))


# ---------------------------------------------------------------- results


class DeviceArray:
    """An array in C order in device memory of ours: a result on its way to the caller's library, and the result itself
    where that is unknown. It has DLPack and __cuda_array_interface__ for whoever takes it.

    Attributes
    ----------
    shape : tuple of int
    strides : tuple of int
        In bytes.
    dtype : np.dtype
    address : int
    memory : driver.Memory
    """

    read_only = False

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], memory: Any) -> None:
        self.shape, self.dtype, self.memory = shape, dtype, memory
        self.strides = _c_strides(shape, dtype.itemsize)

    @property
    def address(self) -> int:
        return self.memory.address

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"<DeviceArray {self.shape} {self.dtype.name} on CUDA device {self.memory.device.index}>"

    def copy_to_host(self) -> Array:
        """A NumPy array with the same numbers."""
        out = np.empty(self.shape, self.dtype)
        self.memory.device.download(self.memory, out, self.memory.stream)
        return out

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.kind == "V":
            raise AttributeError(f"{self.dtype.name} has no name in __cuda_array_interface__: take it by DLPack")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": int(self.memory.stream) or 1,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.memory.device.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__():
            raise BufferError("this array is not copied to another device")
        if copy:
            raise BufferError("this array is shared, not copied")
        if stream != -1:  # which says that the taker sees to the order itself
            self.memory.device.wait(1 if stream is None else int(stream), self.memory.stream)
        return make_capsule(self, max_version is not None and max_version[0] >= 1)


class _Pretend:
    """What NumPy needs to make an array over memory that it must never read or write."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.__array_interface__ = {
            "shape": array.shape,
            "strides": array.strides,
            "typestr": "<u2" if array.dtype.kind == "V" else array.dtype.str,  # bfloat16 is the only V here
            "data": (array.address, array.read_only),
            "version": 3,
        }


def shadow(array: Input | DeviceArray) -> Array:
    """A NumPy array with the address, shape, strides and dtype of an array on a device, which it keeps alive. To read
    an element of it crashes the process."""
    found = np.asarray(_Pretend(array))
    return found.view(array.dtype) if array.dtype.kind == "V" else found


def make_capsule(array: Any, versioned: bool) -> Any:
    """A DLPack capsule that keeps `array` alive: a DeviceArray, or what has its address, shape, strides, dtype,
    read_only and __dlpack_device__.

    NumPy makes it, as of an array in host memory, and the device is written over: a capsule is released by C code,
    maybe while an exception is on its way, when a callback into Python would lose that exception.
    """
    pretend = np.asarray(_Pretend(array))
    try:
        capsule = pretend.__dlpack__(max_version=(1, 0)) if versioned else pretend.__dlpack__()
    except TypeError:  # NumPy 2.0 has no versions
        capsule, versioned = pretend.__dlpack__(), False
    name = b"dltensor_versioned" if versioned else b"dltensor"
    at = _get_pointer(capsule, name) + (_VERSIONED.size if versioned else 0)
    (ctypes.c_int32 * 2).from_address(at + _DEVICE_AT)[:] = array.__dlpack_device__()
    if array.dtype.name == "bfloat16":
        ctypes.c_uint8.from_address(at + _CODE_AT).value = _BFLOAT
    return capsule


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], device: Any, stream: int) -> DeviceArray:
    """A result that a kernel on `stream` will fill, on a driver.Device."""
    dtype = np.dtype(dtype)
    return DeviceArray(shape, dtype, device.empty(math.prod(shape) * dtype.itemsize, stream))


def hand_over(array: DeviceArray, kind: str) -> Any:
    """`array` as an array of the caller's library, sharing the memory.

    To be called when the kernel that fills it has been launched: the library's current stream is made to wait for it,
    if that is another one, and JAX takes an array for complete as soon as it has it.
    """
    library = sys.modules.get("numba.cuda" if kind == "numba" else kind) if kind else None
    memory = array.memory
    # Memory is freed in the order of its stream. JAX does not show its streams. Nobody tells on which stream arrays of
    # Numba and of this package are used, and only the legacy default stream waits for all. A thread's default stream,
    # 2, is another stream in another thread.
    memory.settle = kind == "jax" or int(memory.stream) not in (0, 1)
    if library is None:
        return array
    with memory.device.active():
        if kind == "numba":
            return library.from_cuda_array_interface(_numba_interface(array), owner=array, sync=False)
        if kind == "jax":
            return importlib.import_module("jax.dlpack").from_dlpack(array)
        taken = library.from_dlpack(array)
        # What the library does with it, and the end of it, is in the order of this stream, which waits for ours.
        memory.stream = resolve_stream(None, kind, memory.device.index)
        memory.settle = not lasts(memory.stream)
    return taken


def _numba_interface(array: DeviceArray) -> dict[str, Any]:
    """As the property has it, with the dtype itself in place of its text: that names bfloat16 too."""
    stream = int(array.memory.stream) or None  # Numba's own default stream is 0, and it says None
    data = (array.address, False)
    return {"shape": array.shape, "typestr": array.dtype, "data": data, "strides": None, "version": 3, "stream": stream}
