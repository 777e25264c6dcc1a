"""driver.Device without a device, against a stand-in for cuda.bindings.driver: which one is found, its context, memory,
streams and events. What a GPU does with these calls no test here can tell."""

import os
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from child import run_python
from fake_bindings import OWN, FakeBindings, fake_device

from numba_attn.cuda.host import driver, handles

try:
    from numba_attn.cuda import compile as cuda_compile
except ImportError:
    cuda_compile = None


# ---------------------------------------------------------------- finding a device


@pytest.fixture
def fresh(monkeypatch):
    """The module as after an import."""
    for name, value in (("_driver", None), ("_devices", {}), ("_forked", False), ("_replacement", None)):
        monkeypatch.setattr(driver, name, value)
    return monkeypatch


def test_no_numba_cuda(fresh):
    fresh.setattr(driver.importlib.util, "find_spec", lambda name: None)
    assert not driver.available()
    with pytest.raises(RuntimeError, match=r"^numba-cuda is not installed: pip install numba-attn\[cuda13\]"):
        driver.current()


def test_no_bindings(fresh):
    def absent(name):
        raise ImportError("No module named 'cuda'")

    fresh.setattr(driver.importlib.util, "find_spec", lambda name: True)
    fresh.setattr(driver.importlib, "import_module", absent)
    with pytest.raises(RuntimeError, match=r"without cuda\.bindings \(No module named 'cuda'\).*cuda13"):
        driver.current()


@pytest.mark.parametrize(
    "fails, message",
    [
        ({"cuInit": 100}, r"^starting CUDA failed: CUDA_ERROR_OTHER: the words of the driver"),
        ({"cuInit": 3}, r"^starting CUDA failed: .*If it had been used before: .*fork"),
        ({"cuDeviceGetCount": 999}, r"^counting the CUDA devices failed: CUDA_ERROR_OTHER"),
        ({"cuDevicePrimaryCtxRetain": 1}, r"^opening a context on CUDA device 0 failed: CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_no_device(fresh, fails, message):
    fresh.setattr(driver, "_bindings", lambda: FakeBindings(**fails))
    with pytest.raises(RuntimeError, match=message):
        driver.current()


def test_no_devices(fresh):
    cu = FakeBindings()
    cu.devices = 0
    fresh.setattr(driver, "_bindings", lambda: cu)
    assert driver.missing() == "the CUDA driver sees no device"


def test_no_library(fresh):
    class Absent(FakeBindings):
        def _cuInit(self, flags):
            raise RuntimeError("libcuda.so.1: cannot open shared object file")

    fresh.setattr(driver, "_bindings", Absent)
    assert driver.missing() == ("no CUDA driver library was found: libcuda.so.1: cannot open shared object file")


def test_here(fresh):
    """On this machine, whatever it has: an answer, and one that says why."""
    why = driver.missing()
    assert driver.available() == (why is None)
    assert why is None or "numba-cuda" in why or "driver" in why or "CUDA" in why


def test_which_device(fresh):
    cu = FakeBindings()
    fresh.setattr(driver, "_bindings", lambda: cu)
    assert driver.current().index == 0  # no context is current
    cu.stack.append(cu.CONTEXT + 1)
    assert driver.current().index == 1
    assert driver.current(0) is driver.current(0) is not driver.current(1)
    assert len([call for call in cu.calls if call[0] == "cuDevicePrimaryCtxRetain"]) == 2
    for index in (2, -1):
        with pytest.raises(ValueError, match=rf"^there is no CUDA device {index}; the driver sees 2"):
            driver.current(index)


def test_use(fresh):
    one, two = SimpleNamespace(index=0), SimpleNamespace(index=3)
    with driver.use(one):
        assert driver.current() is one and driver.available()
        with driver.use(two):
            assert driver.current(3) is two
            with pytest.raises(ValueError, match="no CUDA device 0, only 3"):
                driver.current(0)
        assert driver.current(0) is one
    with pytest.raises(ZeroDivisionError), driver.use(one):
        1 / 0  # noqa: B018
    assert driver._replacement is None


def test_import_is_light():
    """The module imports, and says what is missing, where neither package is installed."""
    done = run_python(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('numba_cuda', 'cuda'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "import numba_attn.cuda.host.arrays, numba_attn.cuda.host.driver as driver\n"
        "driver.importlib.util.find_spec = lambda name: None\n"
        "print('cuda.bindings' in sys.modules, driver.missing())"
    )
    assert done.stdout.startswith("False numba-cuda is not installed")


@pytest.mark.processes
@pytest.mark.skipif(cuda_compile is None, reason="no numba-cuda")
def test_numbas_simulator_is_refused():
    """Its settings are the whole process's, and it has none of the instructions that the kernels are made of."""
    done = run_python(
        "import os, sys\n"
        "sys.path.insert(0, os.path.join(sys.argv[1], 'cuda'))\n"
        "import emulator, numpy as np, numba_attn as na\n"
        "from numba_attn.cuda.host import driver\n"
        "q = np.zeros((1, 1, 4, 8), np.float32)\n"
        "na.attention(q, q, q)\n"
        "try:\n"
        "    with driver.use(emulator.EmulatedDevice()): na.attention(q, q, q, backend='cuda')\n"
        "except RuntimeError as error: print(error)",
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        env={"NUMBA_ENABLE_CUDASIM": "1"},
    )
    assert done.stdout.startswith("NUMBA_ENABLE_CUDASIM is set, and the kernels")


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork():
    """The child says that it cannot go on, and frees nothing of its parent."""
    done = run_python(
        "import os, sys\n"
        "sys.path.insert(0, os.path.join(sys.argv[1], 'cuda'))\n"
        "from fake_bindings import FakeBindings, driver\n"
        "cu = FakeBindings(); driver._bindings = lambda: cu\n"
        "device = driver.current(); memory, mark = device.empty(8, 0), device.mark(0); calls = len(cu.calls)\n"
        "if os.fork() == 0:\n"
        "    del memory, mark\n"
        "    said = []\n"
        "    for call in (driver.current, lambda: device.empty(8, 0), lambda: device.synchronize(0)):\n"
        "        try: call()\n"
        "        except RuntimeError as error: said.append('forked' in str(error))\n"
        "    print(said, len(cu.calls) == calls, driver.available(), flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print(driver.available())",
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    assert done.stdout.split("\n")[:2] == ["[True, True, True] True False", "True"]


# ---------------------------------------------------------------- Device


def test_what_a_device_is():
    device, cu = fake_device()
    assert (device.index, device.name, device.cc) == (0, "Fake", (9, 0))
    assert (device.shared_limit, device.multiprocessors, device.total_memory) == (232448, 132, 80 << 30)
    made = [call[0] for call in cu.made]
    assert "cuMemPoolCreate" in made and not cu.stack
    assert ("cuMemPoolSetAttribute", "pool", "CU_MEMPOOL_ATTR_RELEASE_THRESHOLD", driver.POOL_KEEPS) in cu.made
    (props,) = [call[1] for call in cu.made if call[0] == "cuMemPoolCreate"]
    assert props.location.type == "CU_MEM_LOCATION_TYPE_DEVICE" and props.location.id == 0
    assert props.allocType == "CU_MEM_ALLOCATION_TYPE_PINNED" and props.handleTypes == "CU_MEM_HANDLE_TYPE_NONE"


def test_context_is_given_back():
    """Pushed where another one, or none, is current; left alone where it is current; popped after an error too."""
    device, cu = fake_device()
    for before, pushes in (([], 1), ([cu.OTHER], 1), ([cu.CONTEXT], 0), ([cu.CONTEXT, cu.OTHER], 1)):
        cu.stack[:] = before
        cu.names()
        device.synchronize(0)
        assert cu.stack == before
        names = cu.names()
        assert names.count("cuCtxPushCurrent") == names.count("cuCtxPopCurrent") == pushes
        assert "cuStreamSynchronize" in names
    cu.fails["cuStreamSynchronize"] = 1
    cu.stack[:] = [cu.OTHER]
    with pytest.raises(RuntimeError, match=r"^waiting for Fake failed: CUDA_ERROR_INVALID_VALUE: the words"):
        device.synchronize(0)
    assert cu.stack == [cu.OTHER]
    cu.fails["cuCtxPushCurrent"] = 1
    with pytest.raises(RuntimeError, match=r"^using CUDA device 0 failed"):
        device.synchronize(0)
    assert cu.stack == [cu.OTHER]


def test_active_block():
    device, cu = fake_device(index=1)
    cu.stack[:] = [cu.OTHER]
    with device.active():
        assert cu.stack[-1] == cu.CONTEXT + 1
        device.empty(1, 0)
        assert "cuCtxPushCurrent" not in cu.names()[1:]
    assert cu.stack == [cu.OTHER]


def test_memory_in_the_order_of_its_stream():
    device, cu = fake_device()
    memory = device.empty(100, 7)
    assert cu.one("cuMemAllocFromPoolAsync") == (100, "pool", 7)
    assert (memory.address, memory.nbytes) == (cu.address, 100) and memory.address % 256 == 0
    cu.names()
    del memory
    assert cu.one("cuMemFreeAsync") == (cu.address, 7)
    nothing = device.empty(0, 0)
    assert nothing.nbytes == 0
    assert [call[1] for call in cu.calls if call[0] == "cuMemAllocFromPoolAsync"] == [1]
    shared = device.empty(8, 7)
    shared.settle = True
    cu.names()
    del shared
    assert cu.one("cuMemFreeAsync") == (cu.address, 0)  # stream 7 may be gone
    names = cu.names()
    assert names.index("cuCtxSynchronize") < names.index("cuMemFreeAsync")


@pytest.mark.parametrize("options", [{"pools": False}, {"cuMemPoolCreate": 801}], ids=["no pools", "pool refused"])
def test_memory_without_pools(options):
    device, cu = fake_device(**options)
    memory = device.empty(100, 7)
    assert cu.one("cuMemAlloc") == (100,)
    cu.names()
    del memory
    assert cu.one("cuMemFree") == (cu.address,)
    names = cu.names()
    assert names.index("cuStreamSynchronize") < names.index("cuMemFree")


def test_errors_of_memory():
    device, cu = fake_device(cuMemAllocFromPoolAsync=2)
    with pytest.raises(MemoryError, match=rf"^Fake has no 12345 bytes left of its {80 << 30}"):
        device.empty(12345, 0)
    cu.fails["cuMemAllocFromPoolAsync"] = 1
    with pytest.raises(RuntimeError, match=r"^allocating 5 bytes on Fake failed: CUDA_ERROR_INVALID_VALUE"):
        device.empty(5, 0)
    assert not cu.stack
    cu.fails = {"cuMemFreeAsync": 1}
    device.empty(5, 0)  # dies at once, and nobody hears of the error
    assert "cuMemFreeAsync" in cu.names()


def test_what_dies_at_exit(monkeypatch):
    """When the names of its module are None already."""
    device, cu = fake_device()
    memory, mark = device.empty(8, 0), device.mark(0)
    monkeypatch.setattr(handles, "contextlib", None)
    cu.names()
    del memory, mark
    assert {"cuMemFreeAsync", "cuEventDestroy"} <= set(cu.names())


def test_upload():
    """A small array is copied, and its copy kept until an event says that it was read; a large one is waited for."""
    device, cu = fake_device()
    cu.done = False
    x = np.arange(12.0).reshape(3, 4).T[::-1]
    memory = device.upload(x, 5)
    address, host, nbytes, stream = cu.one("cuMemcpyHtoDAsync")
    ((mark, kept),) = device._held
    assert (address, nbytes, stream) == (memory.address, 96, 5) and host == kept.ctypes.data
    assert np.array_equal(kept, x) and kept.flags.c_contiguous and not np.shares_memory(kept, x)
    assert cu.one("cuEventRecord") == (mark.event, 5)
    del mark
    assert "cuStreamSynchronize" not in cu.names()
    device.upload(x, 5)
    assert len(device._held) == 2
    cu.done = True
    device.synchronize(5)
    assert not device._held and cu.names().count("cuEventDestroy") == 2
    middling = np.arange(driver.SMALL // 4 + 1.0)  # two pieces and 8 bytes
    memory = device.upload(middling, 5)
    copies = [call[1:] for call in cu.calls if call[0] == "cuMemcpyHtoDAsync"]
    assert [(to - memory.address, n) for to, _, n, _ in copies] == [
        (0, driver.SMALL), (driver.SMALL, driver.SMALL), (2 * driver.SMALL, 8),
    ]  # fmt: skip
    assert [source - copies[0][1] for _, source, _, _ in copies] == [0, driver.SMALL, 2 * driver.SMALL]
    assert copies[0][1] != middling.ctypes.data and "cuStreamSynchronize" not in cu.names()
    device.synchronize(5)
    cu.names()
    large = np.zeros(driver.PIECES * driver.SMALL // 8 + 1)
    memory = device.upload(large, 5)
    assert cu.one("cuMemcpyHtoDAsync") == (memory.address, large.ctypes.data, large.nbytes, 5)
    names = cu.names()
    assert names.index("cuMemcpyHtoDAsync") < names.index("cuStreamSynchronize") and not device._held
    device.upload(np.empty((0, 3)), 0)
    assert "cuMemcpyHtoDAsync" not in cu.names() and not cu.stack


def test_a_graph_is_refused():
    device, cu = fake_device()
    device.refuse_capture(5)
    assert cu.one("cuStreamIsCapturing") == (5,)
    cu.capturing = "CU_STREAM_CAPTURE_STATUS_ACTIVE"
    with pytest.raises(RuntimeError, match=r"^the stream is being captured into a CUDA graph.*outside the capture"):
        device.refuse_capture(5)
    assert not cu.stack


@pytest.mark.parametrize("error", [900, 906, 907])
def test_hold_while_another_thread_captures(error):
    """A query that is refused says nothing of the event; and none is made in a way that ends the capture."""
    device, cu = fake_device()

    class Thing:
        pass

    thing = Thing()
    alive = weakref.ref(thing)
    device.hold(thing, 0)
    del thing
    cu.fails["cuEventQuery"] = error
    device.synchronize(0)
    assert alive() is not None and cu.mode == "CU_STREAM_CAPTURE_MODE_GLOBAL"
    modes = [call[1] for call in cu.calls if call[0] == "cuThreadExchangeStreamCaptureMode"]
    assert modes[-2:] == ["CU_STREAM_CAPTURE_MODE_RELAXED", "CU_STREAM_CAPTURE_MODE_GLOBAL"]
    del cu.fails["cuEventQuery"]
    device.synchronize(0)
    assert alive() is None


def test_download():
    device, cu = fake_device()
    memory = device.empty(24, 0)
    out = np.zeros(3)
    device.download(memory, out, 6)
    assert cu.one("cuMemcpyDtoHAsync") == (out.ctypes.data, memory.address, 24, 6)
    names = cu.names()
    assert names.index("cuMemcpyDtoHAsync") < names.index("cuStreamSynchronize")
    device.download(memory.address + 8, np.zeros((4, 2))[::2, 0], 6)
    (_, address, nbytes, _) = cu.one("cuMemcpyDtoHAsync")
    assert (address, nbytes) == (memory.address + 8, 16)
    cu.names()
    device.download(memory, np.zeros((0, 3)), 0)
    assert not cu.names()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        device.download(memory, out, 0)


def test_fill_and_ordinal():
    device, cu = fake_device()
    memory = device.empty(10, 3)
    device.fill(memory, 255, 3)
    assert cu.one("cuMemsetD8Async") == (memory.address, 255, 10, 3)
    assert device.ordinal(77) == 1
    assert cu.one("cuPointerGetAttribute") == ("CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL", 77)


def test_order_of_streams():
    device, cu = fake_device()
    device.wait(5, 9)
    assert [c for c in cu.names() if "Ctx" not in c] == [
        "cuEventCreate",
        "cuEventRecord",
        "cuStreamWaitEvent",
        "cuEventDestroy",
    ]
    for same in ((5, 5), (0, 1), (1, 0)):
        device.wait(*same)
        assert not cu.names()
    device.wait(1, 2)
    assert cu.one("cuEventRecord")[1] == 2 and cu.one("cuStreamWaitEvent")[0] == 1


def test_marks():
    device, cu = fake_device()
    mark = device.mark(5)
    assert cu.one("cuEventRecord") == (mark.event, 5) and cu.one("cuEventCreate") == (2,)  # without times
    assert device.passed(mark)
    cu.done = False
    assert not device.passed(mark)
    cu.names()
    device.record(mark, 6)
    device.after(device.own, mark)
    assert cu.one("cuEventRecord") == (mark.event, 6) and cu.one("cuStreamWaitEvent") == (OWN, mark.event, 0)
    event = mark.event
    cu.names()
    del mark
    assert cu.calls == [("cuEventDestroy", event)] and not cu.stack
    cu.names()
    cu.fails["cuStreamWaitEvent"] = 1
    with pytest.raises(RuntimeError, match=r"^ordering two streams failed: CUDA_ERROR_INVALID_VALUE"):
        device.wait(5, 6)
    assert cu.names().count("cuEventDestroy") == 1 and not cu.stack


def test_times():
    device, cu = fake_device()
    first, last = device.event(5), device.event(6)
    assert [call[1:] for call in cu.calls if call[0] == "cuEventRecord"] == [(first, 5), (last, 6)]
    assert [call[1] for call in cu.calls if call[0] == "cuEventCreate"] == [0, 0]
    assert device.elapsed(first, last) == 1.5  # seconds
    assert cu.one("cuEventSynchronize") == (last,) and cu.one("cuEventElapsedTime") == (first, last)
    assert cu.names().count("cuEventDestroy") == 2 and not cu.stack


def test_hold():
    device, cu = fake_device()

    class Thing:
        alive = 0

        def __init__(self):
            Thing.alive += 1

        def __del__(self):
            Thing.alive -= 1

    cu.done = False
    for _ in range(3):
        device.hold(Thing(), 0)
    device.synchronize(0)
    assert Thing.alive == 3
    cu.done = True
    device.hold(Thing(), 0)
    assert Thing.alive == 1
    device.synchronize(0)
    assert Thing.alive == 0 and not cu.stack
