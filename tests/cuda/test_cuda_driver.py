"""driver.Device without a device: against a stand-in for cuda.bindings.driver, which shows the calls and lets them
fail; through the real cuda.bindings against a stand-in for libcuda, which shows what arrives in C; and the emulated
device that other tests use in its place. What a GPU does with these calls no test here can tell."""

import gc
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import weakref
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import sass
from child import run_python
from emulator import EmulatedDevice
from ptx import PTXError

from numba_attn.cuda.host import driver

try:
    from numba_attn.cuda import compile as cuda_compile
except ImportError:
    cuda_compile = None


# Adds 1 to n 32-bit numbers.
INCREMENT = """
.version 7.8
.target sm_80
.address_size 64
.visible .entry increment(.param .u64 x, .param .u64 n)
{
    .reg .pred %p<2>; .reg .b32 %r<8>; .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [n];
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r1, %r2, %r3; cvt.u64.u32 %rd3, %r4;
    setp.ge.u64 %p1, %rd3, %rd2;
    @%p1 bra END;
    shl.b64 %rd4, %rd3, 2; add.s64 %rd5, %rd1, %rd4;
    ld.global.u32 %r5, [%rd5]; add.u32 %r5, %r5, 1; st.global.u32 [%rd5], %r5;
    END:
    ret;
}
"""


def packed(*values):
    return struct.pack(f"={len(values)}q", *values)


# ---------------------------------------------------------------- a stand-in for cuda.bindings.driver


class Names:
    """An enum whose members are their own names."""

    def __getattr__(self, name):
        return name


OWN = 0xA0  # the handle of the device's own stream


class FakeBindings:
    """Records the calls; `fails` has the error that a function gives. Contexts are a stack, as in the driver."""

    CONTEXT, OTHER = 0xC0, 0xB0

    def __init__(self, pools=True, **fails):
        self.calls, self.fails, self.stack, self.freed = [], fails, [], []
        self.address, self.pools, self.devices, self.capturing = 1 << 20, pools, 2, "CU_STREAM_CAPTURE_STATUS_NONE"
        self.CUdevice_attribute = self.CUfunction_attribute = self.CUpointer_attribute = Names()
        self.CUmemPool_attribute = self.CUmemAllocationType = self.CUmemAllocationHandleType = Names()
        self.CUmemLocationType = self.CUstreamCaptureStatus = self.CUstreamCaptureMode = self.CUjit_option = Names()
        self.CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0, CU_EVENT_DISABLE_TIMING=2)
        self.CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
        self.cuuint64_t = int
        self.done = True  # of every event
        self.mode = self.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL

    def CUmemPoolProps(self):
        return SimpleNamespace(location=SimpleNamespace())

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)
        do = getattr(type(self), f"_{name}", lambda self, *arguments: (0,))

        def call(*arguments):
            self.calls.append((name, *arguments))
            if name in self.fails:
                return self.fails[name], None
            return do(self, *arguments)

        return call

    def names(self):
        """The calls made since the last time, without those that only ask which context is current."""
        asking = ("cuCtxGetCurrent", "cuEventQuery", "cuThreadExchangeStreamCaptureMode")
        names = [call[0] for call in self.calls if call[0] not in asking]
        self.calls.clear()
        return names

    def one(self, name):
        """The arguments of the only call of this name."""
        (found,) = [call[1:] for call in self.calls if call[0] == name]
        return found

    def _cuGetErrorName(self, error):
        return 0, {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY"}.get(error, b"CUDA_ERROR_OTHER")

    def _cuGetErrorString(self, error):
        return 0, b"the words of the driver"

    def _cuDeviceGetCount(self):
        return 0, self.devices

    def _cuDeviceGet(self, index):
        return 0, index

    def _cuDeviceGetName(self, size, device):
        return 0, b"Fake\0\0\0"

    def _cuDeviceGetAttribute(self, name, device):
        name = name.removeprefix("CU_DEVICE_ATTRIBUTE_")
        return 0, {
            "COMPUTE_CAPABILITY_MAJOR": 9,
            "COMPUTE_CAPABILITY_MINOR": 0,
            "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448,
            "MULTIPROCESSOR_COUNT": 132,
            "MEMORY_POOLS_SUPPORTED": int(self.pools),
        }[name]

    def _cuDeviceTotalMem(self, device):
        return 0, 80 << 30

    def _cuDevicePrimaryCtxRetain(self, device):
        return 0, self.CONTEXT + device

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        before, self.mode = self.mode, mode
        return 0, before

    def _cuCtxGetCurrent(self):
        return 0, self.stack[-1] if self.stack else 0

    def _cuCtxGetDevice(self):
        assert self.stack, "an error of the driver, which compute-sanitizer reports"
        return 0, self.stack[-1] - self.CONTEXT

    def _cuCtxPushCurrent(self, context):
        self.stack.append(context)
        return (0,)

    def _cuCtxPopCurrent(self):
        return 0, self.stack.pop()

    def _cuMemPoolCreate(self, props):
        return 0, "pool"

    def _cuMemAllocFromPoolAsync(self, size, pool, stream):
        self.address += 1 << 20
        return 0, self.address

    def _cuMemAlloc(self, size):
        return self._cuMemAllocFromPoolAsync(size, None, None)

    def _cuStreamIsCapturing(self, stream):
        return 0, self.capturing

    def _cuStreamCreate(self, flags):
        assert flags == 1, "a stream that waits for the legacy default one, and that one for it"
        return 0, OWN

    def _cuEventCreate(self, flags):
        return 0, f"event {len(self.calls)}"

    def _cuEventElapsedTime(self, first, last):
        return 0, 1500.0

    def _cuEventQuery(self, event):
        return (0,) if self.done else (600,)

    def _cuModuleLoadData(self, image):
        return 0, "module"

    _cuModuleLoadDataEx = lambda self, image, n, options, values: (0, "module")  # noqa: E731

    def _cuModuleGetFunction(self, module, name):
        return 0, "function"

    def _cuFuncGetAttribute(self, attribute, function):
        return 0, 1024

    def _cuPointerGetAttribute(self, attribute, address):
        return 0, 1


def fake_device(index=0, **options):
    cu = FakeBindings(**options)
    device = driver.Device(index, cu)
    cu.made, cu.calls = cu.calls, []
    return device, cu


@pytest.fixture
def no_nvjitlink(monkeypatch):
    monkeypatch.setattr(driver, "assemble", lambda ptx, cc: (None, "nvJitLink: not here"))


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
        "from test_cuda_driver import FakeBindings, driver\n"
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


# ---------------------------------------------------------------- kernels


def test_load_by_nvjitlink(monkeypatch):
    device, cu = fake_device()
    monkeypatch.setattr(driver, "assemble", lambda ptx, cc: (b"cubin for %d%d" % cc, ""))
    function = device.load(INCREMENT)
    assert cu.one("cuModuleLoadData") == (b"cubin for 90",)
    assert cu.one("cuModuleGetFunction") == ("module", b"increment")
    assert (function.name, function.handle, function.static, function.dynamic) == ("increment", "function", 1024, 48128)
    cu.fails["cuModuleLoadData"] = 1
    with pytest.raises(RuntimeError, match=r"^loading increment on Fake failed: CUDA_ERROR_INVALID_VALUE"):
        device.load(INCREMENT)
    assert not cu.stack


def test_load_by_the_driver(no_nvjitlink):
    device, cu = fake_device()
    device.load(INCREMENT)
    image, n, options, values = cu.one("cuModuleLoadDataEx")
    assert image == INCREMENT.encode() + b"\0" and n == len(options) == len(values) == 2
    assert values[1] == len(values[0])


def test_load_fails_with_both_logs(no_nvjitlink):
    class Refuses(FakeBindings):
        def _cuModuleLoadDataEx(self, image, n, options, values):
            values[0][:15] = b"line 7: bad op\0"
            return 218, None

    device = driver.Device(0, Refuses())
    with pytest.raises(RuntimeError) as error:
        device.load(INCREMENT)
    assert str(error.value).split("\n") == [
        "assembling increment for Fake failed: CUDA_ERROR_OTHER: the words of the driver",
        "line 7: bad op",
        "nvJitLink: not here",
    ]


def test_kernel_names(no_nvjitlink):
    two = INCREMENT + INCREMENT[INCREMENT.index(".visible") :].replace("increment", "twice$")
    device, cu = fake_device()
    assert device.load(two, "twice$").name == "twice$"
    with pytest.raises(ValueError, match=r"has 2 kernels; name the one to load: increment, twice\$"):
        device.load(two)
    with pytest.raises(ValueError, match=r"none is called other"):
        device.load(two, "other")
    cu.fails["cuModuleGetFunction"] = 500
    with pytest.raises(RuntimeError, match=r"^finding increment in its module failed"):
        device.load(INCREMENT)


def test_launch(no_nvjitlink):
    device, cu = fake_device()
    function = device.load(INCREMENT)
    cu.names()
    device.launch(function, 2**31 - 1, 256, 100, packed(1, 2), 9)
    *head, extra = cu.one("cuLaunchKernel")
    assert head == ["function", 2**31 - 1, 1, 1, 256, 1, 1, 100, 9, 0] and isinstance(extra, int)
    assert cu.names() == ["cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]
    cu.fails["cuLaunchKernel"] = 1
    with pytest.raises(
        RuntimeError, match=r"^launching increment \(3 blocks of 32 .* failed: CUDA_ERROR_INVALID_VALUE"
    ):
        device.launch(function, 3, 32, 0, packed(1, 2), 0)
    assert not cu.stack


@pytest.mark.parametrize(
    "grid, threads, shared, message",
    [
        (0, 32, 0, r"0 blocks of 32 threads; a launch takes 1 to 2147483647"),
        (2**31, 32, 0, r"2147483648 blocks"),
        (1, 0, 0, r"1 blocks of 0 threads"),
        (1, 1025, 0, r"1025 threads.*1 to 1024"),
        (1, 32, 232448 - 1023, r"232449 bytes of shared memory.*Fake has 232448"),
        (1, 32, -1, r"shared memory"),
    ],
)
def test_impossible_launch(no_nvjitlink, grid, threads, shared, message):
    """Refused before anything is launched or set."""
    device, cu = fake_device()
    function = device.load(INCREMENT)
    cu.names()
    with pytest.raises(ValueError, match=message):
        device.launch(function, grid, threads, shared, packed(1, 2), 0)
    assert not cu.names()


def test_limit_of_shared_memory(no_nvjitlink):
    """Raised once per function and size, counting what the kernel has anyway (1 KB here), and never lowered."""
    device, cu = fake_device()
    function = device.load(INCREMENT)
    seen = []
    for shared in (0, 47 * 1024, 47 * 1024 + 1, 48 * 1024, 60_000, 60_000, 50_000, 232448 - 1024, 60_000):
        cu.names()
        device.launch(function, 1, 32, shared, packed(1, 2), 0)
        seen += [call[1:] for call in cu.calls if call[0] == "cuFuncSetAttribute"]
    limit = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    assert seen == [("function", limit, n) for n in (47 * 1024 + 1, 48 * 1024, 60_000, 232448 - 1024)]
    other = device.load(INCREMENT)
    cu.fails["cuFuncSetAttribute"] = 1
    with pytest.raises(RuntimeError, match=r"^giving increment 60000 bytes of shared memory failed"):
        device.launch(other, 1, 32, 60_000, packed(1, 2), 0)
    assert other.dynamic == 47 * 1024 and not cu.stack


def test_threads(no_nvjitlink):
    """Many Python threads on one device: nothing lost, nothing freed twice."""
    device, cu = fake_device()
    cu._cuCtxGetCurrent = None
    local = threading.local()
    type(cu).stack = property(lambda self: local.__dict__.setdefault("stack", []))
    try:
        del cu.__dict__["stack"]
        function = device.load(INCREMENT)
        errors = []

        def work():
            try:
                for n in range(50):
                    memory = device.upload(np.zeros(3), n % 4)
                    device.launch(function, 1, 32, 60_000 + n, packed(memory.address, 3), n % 4)
                    device.download(memory, np.zeros(3), n % 4)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
    finally:
        del type(cu).stack
    assert not errors
    freed = [call[1] for call in cu.calls if call[0] == "cuMemFreeAsync"]
    assert len(freed) == 400
    sizes = [call[3] for call in cu.calls if call[0] == "cuFuncSetAttribute"]
    assert sizes == sorted(set(sizes)) and sizes[-1] == 60_049
    assert not device._held


# ---------------------------------------------------------------- the real bindings, to a stand-in for libcuda

LIBCUDA = r"""
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef void *H;
typedef unsigned long long P;
#define SAY(...) do { printf(__VA_ARGS__); printf("\n"); fflush(stdout); } while (0)
#define HOST(p) ((void *)(uintptr_t)(p))
static H stack[64];
static int depth;
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, "Stand-in"); return 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = (size_t)80 << 30; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) {
    *v = a == 75 ? 9 : a == 76 ? 0 : a == 97 ? 232448 : a == 16 ? 132 : a == 115 ? 1 : -1;
    return 0;
}
int cuDevicePrimaryCtxRetain(H *c, int d) { *c = (H)0xC0; return 0; }
int cuCtxGetCurrent(H *c) { *c = depth ? stack[depth - 1] : 0; return 0; }
int cuCtxPushCurrent_v2(H c) { stack[depth++] = c; return 0; }
int cuCtxPopCurrent_v2(H *c) { *c = stack[--depth]; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return depth ? 0 : 201; }
int cuCtxSynchronize(void) { SAY("context synchronize"); return 0; }
int cuMemPoolCreate(H *p, const int *props) {
    int rest = 0;
    for (int i = 4; i < 22; i++) rest |= props[i];
    SAY("pool type %d handles %d location %d %d rest %d", props[0], props[1], props[2], props[3], rest);
    *p = (H)0x90;
    return 0;
}
int cuMemPoolSetAttribute(H p, int a, P *v) { SAY("pool %p attribute %d = %llu", p, a, *v); return 0; }
int cuMemAllocFromPoolAsync(P *a, size_t n, H p, H s) {
    if (n > (size_t)1 << 40) return 2;
    *a = (P)(uintptr_t)aligned_alloc(256, (n + 255) / 256 * 256);
    SAY("alloc %zu pool %p stream %p", n, p, s);
    return 0;
}
int cuMemFreeAsync(P a, H s) { SAY("free stream %p", s); free(HOST(a)); return 0; }
int cuMemcpyHtoDAsync_v2(P d, const void *h, size_t n, H s) { memcpy(HOST(d), h, n); SAY("up %zu %p", n, s); return 0; }
int cuMemcpyDtoHAsync_v2(void *h, P d, size_t n, H s) { memcpy(h, HOST(d), n); SAY("down %zu %p", n, s); return 0; }
int cuMemsetD8Async(P d, unsigned char c, size_t n, H s) { memset(HOST(d), c, n); SAY("set %zu %p", n, s); return 0; }
int cuStreamSynchronize(H s) { SAY("synchronize %p", s); return 0; }
int cuStreamIsCapturing(H s, int *v) { *v = 0; return 0; }
int cuStreamCreate(H *s, unsigned f) { SAY("stream flags %u", f); *s = (H)0xA0; return 0; }
int cuEventCreate(H *e, unsigned f) { *e = (H)0xE0; SAY("event flags %u", f); return 0; }
int cuEventRecord(H e, H s) { SAY("record %p on %p", e, s); return 0; }
int cuStreamWaitEvent(H s, H e, unsigned f) { SAY("%p waits for %p, %u", s, e, f); return 0; }
int cuEventQuery(H e) { return 0; }
int cuEventSynchronize(H e) { SAY("wait for %p", e); return 0; }
int cuEventElapsedTime(float *ms, H a, H b) { SAY("from %p to %p", a, b); *ms = 1500; return 0; }
int cuEventElapsedTime_v2(float *ms, H a, H b) { return cuEventElapsedTime(ms, a, b); }
int cuThreadExchangeStreamCaptureMode(int *mode) { int before = *mode; *mode = 0; return before != 2 && before != 0; }
int cuEventDestroy_v2(H e) { SAY("destroy %p", e); return 0; }
int cuModuleLoadData(H *m, const char *image) { SAY("module of %.3s", image + 1); *m = (H)0x40; return 0; }
int cuModuleLoadDataEx(H *m, const char *image, unsigned n, int *o, void **v) {
    SAY("text %zu options %u: %d %d %zu", strlen(image), n, o[0], o[1], (size_t)v[1]);
    snprintf(v[0], (size_t)v[1], "line 1: bad text");
    return 218;
}
int cuModuleGetFunction(H *f, H m, const char *name) { SAY("function %s of %p", name, m); *f = (H)0xF0; return 0; }
int cuFuncGetAttribute(int *v, int a, H f) { SAY("%p attribute %d?", f, a); *v = 16; return 0; }
int cuFuncSetAttribute(H f, int a, int v) { SAY("%p attribute %d = %d", f, a, v); return 0; }
int cuPointerGetAttribute(int *v, int a, P p) { SAY("pointer %llu attribute %d?", p, a); *v = 0; return 0; }
int cuLaunchKernel(H f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   H s, void **params, void **extra) {
    SAY("launch %p grid %u %u %u block %u %u %u shared %u stream %p params %p", f, gx, gy, gz, bx, by, bz, shared, s,
        (void *)params);
    size_t size = *(size_t *)extra[3];
    SAY("extra %zu %zu end %p size %zu", (size_t)extra[0], (size_t)extra[2], extra[4], size);
    for (size_t i = 0; i < size / 8; i++) SAY("%016llx", ((P *)extra[1])[i]);
    return gx == 7 ? 701 : 0;
}
int cuGetErrorName(int e, const char **s) {
    *s = e == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : e == 218 ? "CUDA_ERROR_INVALID_PTX" : "CUDA_ERROR_OTHER";
    return 0;
}
int cuGetErrorString(int e, const char **s) { *s = "told by the driver"; return 0; }
int cuGetProcAddress_v2(const char *name, void **f, int version, P flags, int *status) {
    char newer[200];
    void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    snprintf(newer, sizeof newer, "%s_v2", name);
    *f = dlsym(self, newer);
    if (!*f) *f = dlsym(self, name);
    return *f ? 0 : 500;
}
int cuGetProcAddress(const char *name, void **f, int version, P flags) {
    return cuGetProcAddress_v2(name, f, version, flags, 0);
}
"""

THROUGH_BINDINGS = """
import struct, sys
import numpy as np
from numba_attn.cuda.host import driver

def say(*words):
    print(*words, flush=True)

assert driver.missing() is None, driver.missing()
device = driver.current()
say(device, device.cc, device.shared_limit, device.multiprocessors, device.total_memory)
x = np.arange(12, dtype="f4").reshape(3, 4).T[::-1]
memory, back = device.upload(x, 5), np.empty((8, 3), "f4")[::2]
device.download(memory, back, 5)
say("same", np.array_equal(x, back))
device.fill(memory, 255, 0)
device.download(memory.address, back, 0)
say("filled", np.isnan(back).all())
del memory
device.refuse_capture(5)
say("elapsed", device.elapsed(device.event(0), device.event(5)))
large = np.arange(200000.0)
memory, back = device.upload(large, 0), np.empty_like(large)
device.download(memory, back, 0)
say("same", np.array_equal(large, back))
memory.settle = True
del memory
device.wait(5, 0)
mark = device.mark(5)
say("passed", device.passed(mark))
device.record(mark, 7)
device.after(device.own, mark)
del mark
say(device.ordinal(123))
try:
    device.empty(1 << 41, 0)
except MemoryError as error:
    say("MemoryError")
say("kernels")
ptx = sys.argv[1]
function = device.load(ptx)
device.launch(function, 2**31 - 1, 128, 0, struct.pack("=qqd", 1, -2, 0.5), 0x77)
device.launch(function, 1, 1024, 232448 - 16, struct.pack("=q", 3), 0)
try:
    device.launch(function, 7, 32, 0, b"", 0)
except RuntimeError as error:
    say(error)
try:
    device.load(ptx.replace("add.u32", "badd.u32"))
except RuntimeError as error:
    say(error)
"""


def bindings_missing():
    if sys.platform != "linux" or shutil.which("cc") is None:
        return "no C compiler, or no Linux"
    try:
        import cuda.bindings.driver  # noqa: F401
    except ImportError:
        return "no cuda.bindings"
    return None if driver.assemble(INCREMENT, (9, 0))[0] else "no nvJitLink"


@pytest.mark.processes
def test_through_the_real_bindings(tmp_path):
    """What the driver's C functions receive, from cuda.bindings as it is installed."""
    if why := bindings_missing():
        pytest.skip(why)
    source, library = tmp_path / "libcuda.c", tmp_path / "libcuda.so.1"
    source.write_text(LIBCUDA)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(library), str(source), "-ldl"], check=True)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("LD_LIBRARY_PATH"))))
    done = run_python(THROUGH_BINDINGS, INCREMENT, env={"LD_LIBRARY_PATH": path})
    memory, kernels = done.stdout.split("kernels\n")
    assert memory.split("\n")[:-1] == [
        "stream flags 1",
        "pool type 1 handles 0 location 1 0 rest 0",
        f"pool 0x90 attribute 4 = {1 << 30}",
        f"<CUDA device 0: Stand-in> (9, 0) 232448 132 {80 << 30}",
        "alloc 48 pool 0x90 stream 0x5",
        "up 48 0x5",
        "event flags 2",
        "record 0xe0 on 0x5",
        "down 48 0x5",
        "synchronize 0x5",
        "destroy 0xe0",
        "same True",
        "set 48 (nil)",
        "down 48 (nil)",
        "synchronize (nil)",
        "filled True",
        "free stream 0x5",
        "event flags 0",
        "record 0xe0 on (nil)",
        "event flags 0",
        "record 0xe0 on 0x5",
        "wait for 0xe0",
        "from 0xe0 to 0xe0",
        "destroy 0xe0",
        "destroy 0xe0",
        "elapsed 1.5",
        "alloc 1600000 pool 0x90 stream (nil)",
        "up 1600000 (nil)",
        "synchronize (nil)",
        "down 1600000 (nil)",
        "synchronize (nil)",
        "same True",
        "context synchronize",
        "free stream (nil)",
        "event flags 2",
        "record 0xe0 on (nil)",
        "0x5 waits for 0xe0, 0",
        "destroy 0xe0",
        "event flags 2",
        "record 0xe0 on 0x5",
        "passed True",
        "record 0xe0 on 0x7",
        "0xa0 waits for 0xe0, 0",
        "destroy 0xe0",
        "pointer 123 attribute 9?",
        "0",
        "MemoryError",
    ]
    lines = kernels.split("\n")
    assert lines[:14] == [
        "module of ELF",
        "function increment of 0x40",
        "0xf0 attribute 1?",
        f"launch 0xf0 grid {2**31 - 1} 1 1 block 128 1 1 shared 0 stream 0x77 params (nil)",
        "extra 1 2 end (nil) size 24",
        f"{1:016x}",
        "fffffffffffffffe",
        "3fe0000000000000",
        "0xf0 attribute 8 = 232432",
        "launch 0xf0 grid 1 1 1 block 1024 1 1 shared 232432 stream (nil) params (nil)",
        "extra 1 2 end (nil) size 8",
        f"{3:016x}",
        "launch 0xf0 grid 7 1 1 block 32 1 1 shared 0 stream (nil) params (nil)",
        "extra 1 2 end (nil) size 0",
    ]
    assert lines[14] == (
        "launching increment (7 blocks of 32 threads, 0 bytes of shared memory) on Stand-in failed: "
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: told by the driver"
    )
    assert lines[15] == f"text {len(INCREMENT) + 1} options 2: 5 6 16384"
    assert lines[16] == "assembling increment for Stand-in failed: CUDA_ERROR_INVALID_PTX: told by the driver"
    assert lines[17] == "line 1: bad text"
    assert "Not a name of any known instruction: 'badd'" in kernels


# ---------------------------------------------------------------- the shape of a kernel's parameters

Ints = namedtuple("Ints", "x n step")
Reals = namedtuple("Reals", "scale shift")


def line_kernel():
    """x[i] = i * step * scale + shift in float64, as this package's kernels are: records of int64 and float64."""
    from llvmlite import ir

    types, cuda = cuda_compile.types, cuda_compile.cuda

    @cuda_compile.intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(ir.DoubleType(), 1)), align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.float64), codegen

    def line(ints, reals):
        i = cuda.grid(1)
        if i < ints.n:
            store(ints.x + 8 * i, i * ints.step * reals.scale + reals.shift)

    signature = types.NamedUniTuple(types.int64, 3, Ints), types.NamedUniTuple(types.float64, 2, Reals)
    return cuda.compile_ptx(line, signature, cc=(8, 0))[0]


@pytest.fixture(scope="module")
def line_ptx():
    if cuda_compile is None:
        pytest.skip("no numba-cuda")
    return line_kernel()


def test_records_are_flat(line_ptx):
    """Two records of 3 and 2 fields are five parameters of 8 bytes, in order."""
    head = line_ptx[line_ptx.index(".entry") :].split(")")[0]
    assert re.findall(r"\.param \.(\w+) \S+_param_(\d)", head) == [
        ("u64", "0"),
        ("u64", "1"),
        ("u64", "2"),
        ("f64", "3"),
        ("f64", "4"),
    ]


def test_records_are_flat_in_the_machine_code(line_ptx, tmp_path):
    """ptxas puts them 8 bytes apart, from 0: what a packed buffer means."""
    if not sass.tools("cuobjdump"):
        pytest.skip("no cuobjdump")
    for cc in ((8, 0), (9, 0), (12, 0)):
        cubin, log = driver.assemble(line_ptx, cc)
        if cubin is None:
            pytest.skip(log)
        (tmp_path / "line.cubin").write_bytes(cubin)
        tool = [sass.tools("cuobjdump")[0], "-elf", str(tmp_path / "line.cubin")]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)\s+Size\s+: 0x(\w+)", text)
        assert sorted(tuple(int(n, 16) for n in row) for row in found) == [(n, 8 * n, 8) for n in range(5)]


def test_nvjitlink_says_what_is_wrong():
    cubin, log = driver.assemble(INCREMENT, (8, 0))
    if cubin is None:
        pytest.skip(log)
    assert cubin[:4] == b"\x7fELF"
    assert driver.assemble(INCREMENT, (9, 0))[0]  # an older target on a newer device
    for ptx, cc, message in (
        (INCREMENT.replace("add.u32", "badd.u32"), (8, 0), "Not a name of any known instruction: 'badd'"),
        (INCREMENT.replace("sm_80", "sm_90"), (8, 0), "SM version"),
        (INCREMENT, (99, 0), "ARCH"),  # a device that the library does not know
    ):
        cubin, log = driver.assemble(ptx, cc)
        assert cubin is None and log.startswith("nvJitLink: ") and message in log


REFUSED = "ptxas application ptx input, line 2; fatal   : Unsupported .version {}; current version is '{}'"


def test_an_older_version_of_ptx_is_tried():
    """The compiler may be newer than the assembler: the version that it writes is then more than the code needs."""
    newer = INCREMENT.replace(".version 7.8", ".version 9.9")
    assert driver.older_version(newer, REFUSED.format("9.9", "9.0")) == INCREMENT.replace("7.8", "9.0")
    assert driver.older_version(newer, "ptxas: another error") is None
    assert driver.older_version(INCREMENT, REFUSED.format("7.8", "7.8")) is None, "the same again"
    cubin, log = driver.assemble(newer, (8, 0))
    if cubin is None and "nvJitLink: No module" in log:
        pytest.skip(log)
    assert cubin is not None, log


def test_the_driver_gets_an_older_version_too(no_nvjitlink):
    class Old(FakeBindings):
        def _cuModuleLoadDataEx(self, image, n, options, values):
            if b".version 8.4" in image:
                return 0, "module"
            words = REFUSED.format("9.5", "8.4").encode() + b"\0"
            values[0][: len(words)] = words
            return 222, None

    device = driver.Device(0, Old())
    assert device.load(INCREMENT.replace("7.8", "9.5")).handle == "function"
    images = [call[1] for call in device._cu.calls if call[0] == "cuModuleLoadDataEx"]
    assert [re.search(rb"version (\S+)", image)[1] for image in images] == [b"9.5", b"8.4"]


# ---------------------------------------------------------------- the emulated device


@pytest.fixture
def device():
    with driver.use(EmulatedDevice()) as device:
        yield device


def test_end_to_end(device, line_ptx):
    """compile_ptx -> load -> launch -> download, records packed as bytes."""
    n = 100
    memory = device.empty(8 * n, 0)
    function = device.load(line_ptx)
    params = packed(memory.address, n, -3) + struct.pack("=dd", 0.25, 7.0)
    device.launch(function, -(-n // 64), 64, 0, params, 0)
    out = np.empty(n)
    device.download(memory, out, 0)
    assert np.array_equal(out, np.arange(n) * -3 * 0.25 + 7.0)
    (launched,) = device.launches
    assert (launched.grid, launched.threads, launched.shared) == (2, 64, 0)


def test_emulated_memory(device):
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[::-1]
    memory = device.upload(x, 0)
    assert memory.address % (1 << 36) == 0 and memory.nbytes == 48
    back = np.zeros((8, 3), np.float32)[::2]
    device.download(memory, back, 0)
    assert np.array_equal(back, x)
    device.download(memory.address + 4, back[:1], 0)
    assert np.array_equal(back[0], x.ravel()[1:4])
    with pytest.raises(IndexError, match="no allocation"):
        device.download(memory.address + 4, np.zeros(12, np.float32), 0)
    device.fill(memory, 0, 0)
    device.download(memory, back, 0)
    assert not back.any()
    fresh = device.empty(4, 0)
    assert fresh.address > memory.address and np.isnan(device.bytes_at(fresh.address, 4).view(np.float32)).all()
    address = memory.address
    del memory
    with pytest.raises(IndexError, match="no allocation"):
        device.download(address, back, 0)
    assert device.ordinal(fresh.address) == 0
    with pytest.raises(IndexError):
        device.ordinal(0)


def test_emulated_bounds(device):
    """One element past the end, before the start, in freed and in read-only memory."""
    numbers = np.arange(100, dtype=np.uint32)
    first, memory = device.upload(numbers, 0), device.upload(numbers, 0)
    function = device.load(INCREMENT)

    def launch(address, n):
        device.launch(function, 4, 32, 0, packed(address, n), 0)

    launch(memory.address, 100)
    out = np.empty_like(numbers)
    device.download(memory, out, 0)
    assert np.array_equal(out, numbers + 1)
    with pytest.raises(PTXError, match=r"OUT-OF-BOUNDS global.*offset 400 of 400"):
        launch(memory.address, 101)
    with pytest.raises(PTXError, match="OUT-OF-BOUNDS global"):
        launch(memory.address - 4, 1)
    with pytest.raises(PTXError, match="WILD global pointer"):
        launch(0, 1)
    with pytest.raises(PTXError, match="MISALIGNED"):
        launch(memory.address + 2, 1)
    address = first.address
    del first
    with pytest.raises(PTXError, match="FREED global memory: allocation 0"):
        launch(address, 1)
    device.frozen.add((memory.address >> 36) - 1)
    with pytest.raises(PTXError, match="WRITE to read-only global memory"):
        launch(memory.address, 1)


def test_emulated_launch_refuses(device):
    function = device.load(INCREMENT)
    memory = device.empty(4, 0)
    good = packed(memory.address, 0)
    device.launch(function, 1, 32, 163 * 1024, good, 0)
    with pytest.raises(ValueError, match=r"166913 bytes of shared memory.*emulated sm_80 has 166912"):
        device.launch(function, 1, 32, 163 * 1024 + 1, good, 0)
    with pytest.raises(ValueError, match="0 blocks"):
        device.launch(function, 0, 32, 0, good, 0)
    with pytest.raises(RuntimeError, match="8 bytes for 2 parameters of 8"):
        device.launch(function, 1, 32, 0, good[:8], 0)
    bound = device.load(INCREMENT.replace("{\n", ".maxntid 64, 1, 1\n{\n", 1))
    device.launch(bound, 1, 64, 0, good, 0)
    with pytest.raises(RuntimeError, match="96 threads, compiled for"):
        device.launch(bound, 1, 96, 0, good, 0)
    with pytest.raises(RuntimeError, match="it is for sm_90"):
        device.load(INCREMENT.replace("sm_80", "sm_90"))
    with pytest.raises(RuntimeError, match="parameters that do not take 8 bytes: n"):
        device.load(INCREMENT.replace(".u64 n", ".u32 n"))
    with pytest.raises(ValueError, match="has 0 kernels"):
        device.load(".version 7.8\n.target sm_80\n")
    assert len(device.launches) == 2


@pytest.mark.parametrize("cc, kilobytes", [((8, 0), 163), ((8, 6), 99), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)])
def test_emulated_limits(cc, kilobytes):
    assert EmulatedDevice(cc).shared_limit == kilobytes * 1024


# Every thread writes to the same word.
RACE = INCREMENT.replace("shl.b64 %rd4, %rd3, 2", "mov.u64 %rd4, 0").replace("increment", "race")


def test_emulated_findings():
    device = EmulatedDevice()
    memory = device.upload(np.zeros(1, np.uint32), 0)
    with pytest.raises(AssertionError, match=r"race, 1 blocks of 32 threads:\n.*RACE global write-after-write"):
        device.launch(device.load(RACE), 1, 32, 0, packed(memory.address, 32), 0)
    device = EmulatedDevice(collect=True)
    memory = device.upload(np.zeros(1, np.uint32), 0)
    device.launch(device.load(RACE), 1, 32, 0, packed(memory.address, 32), 0)
    assert any("RACE" in kind for kind, _ in device.findings)


def test_emulated_profile():
    device = EmulatedDevice(profile=True)
    memory = device.upload(np.zeros(64, np.uint32), 0)
    for _ in range(2):
        device.launch(device.load(INCREMENT), 2, 32, 0, packed(memory.address, 64), 0)
    assert len(device.launches) == 2
    sectors = [access.sectors for access in device.launches[1].accesses if access.space == "global"]
    assert sectors == [8, 8]  # two warps read and write 128 bytes each


# A global variable counts the launches' threads.
COUNTER = """
.version 7.8
.target sm_80
.address_size 64
.global .align 4 .u32 total[1] = {5};
.visible .entry count(.param .u64 x)
{
    .reg .b32 %r<8>; .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [x];
    mov.u64 %rd2, total;
    atom.global.add.u32 %r1, [%rd2], 1;
    mov.u32 %r2, %tid.x; mul.wide.u32 %rd3, %r2, 4; add.s64 %rd4, %rd1, %rd3;
    st.global.u32 [%rd4], %r1;
    ret;
}
"""


def test_emulated_global_variables(device):
    """They live in the module, from launch to launch, and code kept from the first launch still finds them."""
    out, seen = np.empty(32, np.uint32), []
    for _ in range(2):
        memory = device.empty(out.nbytes, 0)
        device.launch(device.load(COUNTER), 1, 32, 0, packed(memory.address), 0)
        device.download(memory, out, 0)
        seen += sorted(out)
    assert seen == list(range(5, 69))


def test_emulated_threads(device):
    function = device.load(INCREMENT)
    errors = []

    def work(seed):
        try:
            numbers = np.arange(seed, seed + 50, dtype=np.uint32)
            for _ in range(5):
                memory, out = device.upload(numbers, 0), np.empty_like(numbers)
                device.launch(function, 2, 32, 0, packed(memory.address, 50), 0)
                device.download(memory, out, 0)
                assert np.array_equal(out, numbers + 1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(device.launches) == 20
    assert sum(buffer is not None for buffer in device.buffers) == 0


def test_same_interface():
    """What the package calls on a device, both have."""
    public = {name for name in vars(driver.Device) if not name.startswith("_")}
    assert public <= set(dir(EmulatedDevice))
    attributes = {"index", "name", "cc", "shared_limit", "multiprocessors", "total_memory"}
    device, _ = fake_device()
    assert attributes <= set(vars(device))
    assert all(hasattr(EmulatedDevice(), name) for name in attributes)
