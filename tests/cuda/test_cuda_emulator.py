"""The emulated device that other tests use in a GPU's place: memory, bounds, launches, threads, and the same interface
as driver.Device."""

import struct
import threading

import numpy as np
import pytest
from emulator import EmulatedDevice
from fake_bindings import fake_device
from ptx import PTXError
from small_kernels import INCREMENT, line_ptx, packed

from numba_attn.cuda.host import driver


@pytest.fixture
def device():
    with driver.use(EmulatedDevice()) as device:
        yield device


def test_end_to_end(device):
    """compile_ptx -> load -> launch -> download, records packed as bytes."""
    n = 100
    memory = device.empty(8 * n, 0)
    function = device.load(line_ptx())
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
