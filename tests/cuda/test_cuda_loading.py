"""A kernel on a device without one: PTX is assembled and loaded, its parameters are bytes, and launches are checked.
The driver is a stand-in that records the calls."""

import gc
import re
import subprocess
import threading

import numpy as np
import ptxas
import pytest
from fake_bindings import FakeBindings, fake_device
from small_kernels import INCREMENT, line_ptx, packed

from numba_attn.cuda.host import driver


@pytest.fixture
def no_nvjitlink(monkeypatch):
    monkeypatch.setattr(driver, "assemble", lambda ptx, cc: (None, "nvJitLink: not here"))


# ---------------------------------------------------------------- loading


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


# ---------------------------------------------------------------- parameters


def test_records_are_flat():
    """Two records of 3 and 2 fields are five parameters of 8 bytes, in order."""
    ptx = line_ptx()
    head = ptx[ptx.index(".entry") :].split(")")[0]
    assert re.findall(r"\.param \.(\w+) \S+_param_(\d)", head) == [
        ("u64", "0"),
        ("u64", "1"),
        ("u64", "2"),
        ("f64", "3"),
        ("f64", "4"),
    ]


def test_records_are_flat_in_the_machine_code(tmp_path):
    """ptxas puts them 8 bytes apart, from 0: what a packed buffer means."""
    if not ptxas.tools("cuobjdump"):
        pytest.skip("no cuobjdump")
    for cc in ((8, 0), (9, 0), (12, 0)):
        cubin, log = driver.assemble(line_ptx(), cc)
        if cubin is None:
            pytest.skip(log)
        (tmp_path / "line.cubin").write_bytes(cubin)
        tool = [ptxas.tools("cuobjdump")[0], "-elf", str(tmp_path / "line.cubin")]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)\s+Size\s+: 0x(\w+)", text)
        assert sorted(tuple(int(n, 16) for n in row) for row in found) == [(n, 8 * n, 8) for n in range(5)]


# ---------------------------------------------------------------- launches


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
