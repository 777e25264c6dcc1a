"""Streams of other libraries, as handles, and how long they live."""

import ctypes
import gc
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from emulator import EmulatedDevice

from numba_attn.cuda.host import arrays, streams


def test_streams():
    assert streams.resolve_stream(5) == 5 and streams.resolve_stream(0) == 0
    for name, handle in (
        ("cuda_stream", 5),
        ("ptr", 5),
        ("handle", 5),
        ("handle", ctypes.c_void_p(5)),
        ("__cuda_stream__", lambda: (0, 5)),
        ("__cuda_stream__", (0, 5)),
    ):
        owner = SimpleNamespace(**{name: handle})
        found = streams.resolve_stream(owner)
        assert found == 5 and found.owner is owner
    assert streams.resolve_stream(SimpleNamespace(handle=ctypes.c_void_p(None))) == 0
    both = SimpleNamespace(__cuda_stream__=lambda: (0, 6), handle=object())
    assert streams.resolve_stream(both) == 6


@pytest.mark.parametrize("stream", ["0", 1.0, True, np.zeros(3), object()])
def test_no_stream(stream):
    with pytest.raises(
        TypeError, match=r"^stream is .*; it takes None, a stream of torch, CuPy, Numba or cuda\.core, or a"
    ):
        streams.resolve_stream(stream)


def test_negative_stream():
    with pytest.raises(ValueError, match=r"^stream is -1; it takes None"):
        streams.resolve_stream(-1)


def test_current_stream(monkeypatch):
    asked = []
    library = ModuleType("torch")
    library.cuda = SimpleNamespace(
        current_stream=lambda device: asked.append(device) or SimpleNamespace(cuda_stream=21)
    )
    monkeypatch.setitem(sys.modules, "torch", library)
    library = ModuleType("cupy")
    library.cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=22))
    monkeypatch.setitem(sys.modules, "cupy", library)
    assert streams.resolve_stream(None, "torch", 3) == 21 and asked == [3]
    assert streams.resolve_stream(None, "cupy", 3) == 22
    assert streams.resolve_stream(None, "jax", 0) == streams.resolve_stream(None) == 0
    assert streams.resolve_stream(4, "torch", 3) == 4
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert streams.resolve_stream(None, "cupy", 3) == 0


def test_stream_lives_with_the_memory():
    """It is freed in the order of its stream, which must exist then."""
    device = EmulatedDevice()
    gone = []

    class Mine:
        ptr = 12

        def __del__(self):
            gone.append(1)

    result = arrays.empty((3,), np.dtype("f4"), device, streams.resolve_stream(Mine()))
    gc.collect()
    assert not gone
    del result
    assert gone
