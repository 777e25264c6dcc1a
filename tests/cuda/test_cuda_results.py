"""Results on the device, an array with DLPack and __cuda_array_interface__, and what other libraries make of one."""

import gc
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from emulator import EmulatedDevice
from libraries import jax, ml_dtypes, needs_ml_dtypes, needs_torch, torch

from numba_attn.cuda.host import arrays, driver, streams


@pytest.fixture
def device():
    with driver.use(EmulatedDevice()) as device:
        yield device


def test_device_array(device):
    result = arrays.empty((2, 3), np.dtype("f4"), device, 4)
    assert (result.shape, result.strides, result.dtype, result.nbytes) == ((2, 3), (12, 4), np.dtype("f4"), 24)
    assert result.address == result.memory.address and result.memory.nbytes == 24
    told = result.__cuda_array_interface__
    assert told == {"shape": (2, 3), "typestr": "<f4", "data": (result.address, False), "strides": None, "version": 3,
                    "stream": 4}  # fmt: skip
    assert arrays.empty((2,), np.dtype("f4"), device, 0).__cuda_array_interface__["stream"] == 1
    device.fill(result.memory, 0, 0)
    assert np.array_equal(result.copy_to_host(), np.zeros((2, 3), "f4"))
    assert repr(result) == "<DeviceArray (2, 3) float32 on CUDA device 0>"
    # What it exports, this package reads.
    for x in (result, arrays.empty((0, 3), np.dtype("f8"), device, 0)):
        found = arrays.describe(x, "q", 4)
        assert (found.address, found.shape, found.dtype, found.read_only) == (x.address, x.shape, x.dtype, False)


@needs_ml_dtypes
def test_device_array_of_bfloat16(device):
    result = arrays.empty((2, 3), np.dtype(ml_dtypes.bfloat16), device, 0)
    assert not hasattr(result, "__cuda_array_interface__")
    assert arrays.describe(result, "q", 0).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    "stream, waits", [(-1, []), (None, [("wait", 1, 4)]), (1, [("wait", 1, 4)]), (9, [("wait", 9, 4)])]
)
def test_taker_waits_for_the_result(device, stream, waits):
    result = arrays.empty((2, 3), np.dtype("f4"), device, 4)
    result.__dlpack__(stream=stream)
    assert device.calls == waits


def test_device_array_refuses(device):
    result = arrays.empty((2, 3), np.dtype("f4"), device, 4)
    result.__dlpack__(dl_device=(2, 0), copy=False, max_version=(1, 1), stream=-1)
    with pytest.raises(BufferError, match="another device"):
        result.__dlpack__(dl_device=(1, 0))
    with pytest.raises(BufferError, match="not copied"):
        result.__dlpack__(copy=True)


class HostArray(arrays.DeviceArray):
    """A result in host memory, so that libraries without a GPU can take it: all but the device is as it would be."""

    def __init__(self, x):
        self.freed = []
        memory = SimpleNamespace(x=x, address=x.ctypes.data, stream=0, device=SimpleNamespace(index=0))
        super().__init__(x.shape, x.dtype, memory)
        memory.watch = Watch(self.freed)

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, *, stream=None, max_version=None, **rest):
        return arrays.make_capsule(self, self.versioned and max_version is not None and max_version[0] >= 1)

    versioned = True


class Watch:
    def __init__(self, freed):
        self.freed = freed

    def __del__(self):
        self.freed.append(1)


def takers():
    yield "numpy", np.from_dlpack
    if torch is not None:
        yield "torch", torch.from_dlpack
    if jax is not None:
        yield "jax", jax.dlpack.from_dlpack


@pytest.mark.parametrize("name, take", list(takers()), ids=[name for name, _ in takers()])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("versioned", [True, False])
def test_real_takers(name, take, dtype, versioned):
    """The libraries read our capsules, share the memory and release it once, when they are done."""
    if dtype == "bfloat16" and (ml_dtypes is None or name == "numpy"):
        pytest.skip("no bfloat16")
    if dtype == "float64" and name == "jax":
        pytest.skip("JAX makes it float32")
    room = np.zeros(256, np.uint8)  # JAX copies what is not aligned to 64 bytes
    start = -room.ctypes.data % 64
    x = room[start : start + 12 * np.dtype(dtype).itemsize].view(dtype).reshape(3, 4)
    x[...] = np.arange(12).reshape(3, 4)
    given = HostArray(x)
    given.versioned = versioned
    freed = given.freed
    taken = take(given)
    del given
    gc.collect()
    assert not freed
    assert tuple(taken.shape) == (3, 4) and str(taken.dtype).removeprefix("torch.") == dtype
    if name == "jax":
        assert np.array_equal(np.asarray(taken), x)
    else:
        x[1, 2] = 99
        assert float(taken[1, 2]) == 99
    del taken
    gc.collect()
    assert freed == [1]


@pytest.mark.parametrize("name, take", list(takers()), ids=[name for name, _ in takers()])
def test_release_while_an_exception_passes(name, take):
    """What dies while an exception is on its way, here a half-built tuple, does not replace it. (A ctypes callback as
    the deleter makes a SystemError of it.)"""
    given = [HostArray(np.zeros(3, np.float32)) for _ in range(3)]
    freed = [x.freed for x in given]
    with pytest.raises(ZeroDivisionError):
        (take(given.pop()), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (given.pop().__dlpack__(), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (given.pop().__dlpack__(max_version=(1, 0)), 1 / 0)
    gc.collect()
    assert freed == [[1]] * 3


def test_hand_over(device, monkeypatch):
    result = arrays.empty((2, 3), np.dtype("f4"), device, 4)
    assert arrays.hand_over(result, "") is result
    for kind, stream in (("torch", 8), ("cupy", 9)):
        library = ModuleType(kind)
        library.from_dlpack = lambda x, kind=kind: (kind, x)
        library.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=8))
        library.cuda.get_current_stream = lambda: SimpleNamespace(ptr=9)
        monkeypatch.setitem(sys.modules, kind, library)
        assert arrays.hand_over(result, kind) == (kind, result)
        assert result.memory.stream == stream  # where the library will use it last
        assert not result.memory.settle
    library.cuda.get_current_stream = lambda: SimpleNamespace(ptr=streams.PER_THREAD)
    assert arrays.hand_over(result, "cupy") and result.memory.settle  # dropped in another thread, it is another stream
    result.memory.stream = 4
    library = ModuleType("jax.dlpack")
    library.from_dlpack = lambda x: ("jax", x)
    monkeypatch.setitem(sys.modules, "jax", ModuleType("jax"))
    monkeypatch.setitem(sys.modules, "jax.dlpack", library)
    assert arrays.hand_over(result, "jax") == ("jax", result)
    assert result.memory.settle
    library = ModuleType("numba.cuda")
    library.from_cuda_array_interface = lambda told, owner, sync: (told, owner, sync)
    monkeypatch.setitem(sys.modules, "numba.cuda", library)
    told, owner, sync = arrays.hand_over(result, "numba")
    assert owner is result and sync is False
    assert told == result.__cuda_array_interface__ | {"typestr": np.dtype("f4")}
    for stream in (0, 1, 2, 4):
        for kind in ("numba", ""):
            mine = arrays.empty((2,), np.dtype("f4"), device, stream)
            told = arrays.hand_over(mine, kind)
            assert mine.memory.settle == (stream > 1), "read on a stream that nobody told us of, and then dropped"
        assert (told is mine) == (kind == "")
    told, _, _ = arrays.hand_over(arrays.empty((2,), np.dtype("f4"), device, 0), "numba")
    assert told["stream"] is None  # the default stream of Numba too


@needs_torch
@pytest.mark.skipif(torch is not None and torch.cuda.is_available(), reason="for machines without a GPU")
def test_torch_asks_for_a_gpu(device):
    """As far as a torch without CUDA goes: it takes our device for a CUDA one."""
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA|cuda"):
        arrays.hand_over(arrays.empty((2, 3), np.dtype("f4"), device, 0), "torch")
