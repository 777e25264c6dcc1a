"""The libraries whose arrays this package takes: None where one is not installed, and fakes of them on the emulated
device."""

import copy
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from emulator import DlpackArray, InterfaceArray

from numba_attn.cuda.host import arrays

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None
try:
    import torch
except ImportError:
    torch = None
try:
    import jax.dlpack
    import jax.numpy
except ImportError:
    jax = None

needs_ml_dtypes = pytest.mark.skipif(ml_dtypes is None, reason="no ml_dtypes")
needs_torch = pytest.mark.skipif(torch is None, reason="no torch")
needs_jax = pytest.mark.skipif(jax is None, reason="no JAX")

BFLOAT16 = None if ml_dtypes is None else np.dtype(ml_dtypes.bfloat16)


def of_library(kind, base):
    """A class that says it comes from this library, as torch.Tensor does."""
    return type("Tensor", (base,), {"__module__": kind})


def library(monkeypatch, kind, current=7, plain=False):
    """A fake of a library, and the class of its arrays: a DLPack array, or of Numba an array with the interface.
    plain: torch's own class, which says what a capsule would."""
    base = InterfaceArray if kind == "numba" else DlpackArray
    module = {"cupy": "cupy._core.core", "jax": "jaxlib._jax", "numba": "numba.cuda.cudadrv.devicearray"}.get(
        kind, kind
    )
    name = {"jax": "jax.dlpack", "numba": "numba.cuda"}.get(kind, kind)

    def taken(x):
        assert isinstance(x, arrays.DeviceArray)
        result = array.__new__(array)
        result.__dict__ |= {"shape": x.shape, "strides": x.strides, "dtype": x.dtype, "address": x.address}
        result.__dict__ |= {"memory": x.memory, "read_only": False, "streams": [], "owner": x}
        return result

    array = type("Tensor", (base,), {"__module__": module})
    found = ModuleType(name)
    found.from_dlpack = taken
    found.from_cuda_array_interface = lambda told, owner, sync: taken(owner)
    found.cuda = SimpleNamespace(
        current_stream=lambda device: SimpleNamespace(cuda_stream=current),
        get_current_stream=lambda: SimpleNamespace(ptr=current),
    )
    if plain:
        found.Tensor, found.strided = array, object()
        for dtype in ("float64", "float32", "float16"):
            setattr(found, dtype, np.dtype(dtype))
        found.bfloat16 = BFLOAT16
        monkeypatch.setattr(arrays, "_TENSOR_DTYPES", {})
        array.is_cuda, array.device, array.layout = True, SimpleNamespace(index=0), found.strided
        array.requires_grad, array.is_conj, array.is_neg = False, lambda x: False, lambda x: False
        array.data_ptr = lambda x: x.address
        array.stride = lambda x: tuple(n // x.dtype.itemsize for n in x.strides)
        array.detach = lambda x: setattr(x, "detached", copy.copy(x)) or x.detached
    if kind == "numba":  # the rest of it compiles kernels, maybe in this very call
        monkeypatch.setattr(sys.modules[name], "from_cuda_array_interface", found.from_cuda_array_interface)
        return array
    monkeypatch.setitem(sys.modules, name, found)
    if name != kind and kind not in sys.modules:
        monkeypatch.setitem(sys.modules, kind, ModuleType(kind))
    return array
