"""What the driver's C functions receive through cuda.bindings as it is installed, from a stand-in for libcuda that says
what it is called with (libcuda.c)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from child import run_python
from small_kernels import INCREMENT

from numba_attn.cuda.host import driver

LIBCUDA = Path(__file__).with_name("libcuda.c")

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


HEARD_OF_MEMORY = [
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
HEARD_OF_KERNELS = [
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


@pytest.mark.processes
def test_through_the_real_bindings(tmp_path):
    """What the driver's C functions receive, from cuda.bindings as it is installed."""
    if why := bindings_missing():
        pytest.skip(why)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(library), str(LIBCUDA), "-ldl"], check=True)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("LD_LIBRARY_PATH"))))
    done = run_python(THROUGH_BINDINGS, INCREMENT, env={"LD_LIBRARY_PATH": path})
    memory, kernels = done.stdout.split("kernels\n")
    assert memory.split("\n")[:-1] == HEARD_OF_MEMORY
    lines = kernels.split("\n")
    assert lines[:14] == HEARD_OF_KERNELS
    assert lines[14] == (
        "launching increment (7 blocks of 32 threads, 0 bytes of shared memory) on Stand-in failed: "
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: told by the driver"
    )
    assert lines[15] == f"text {len(INCREMENT) + 1} options 2: 5 6 16384"
    assert lines[16] == "assembling increment for Stand-in failed: CUDA_ERROR_INVALID_PTX: told by the driver"
    assert lines[17] == "line 1: bad text"
    assert "Not a name of any known instruction: 'badd'" in kernels
