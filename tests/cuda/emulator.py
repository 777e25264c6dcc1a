"""A CUDA device for machines without one: driver.Device's methods, with PTX run by our emulator (tests/ptx), which
checks what it runs.

    with driver.use(EmulatedDevice((8, 0))) as device:
        ...  # the package's own host code, from arguments to results

Memory is NumPy's. Allocation number n has the address (n + 1) << 36, so addresses plus offsets work in kernel
parameters, and an access outside an allocation of exactly as many bytes as were asked for, or inside a freed one,
raises. New memory is full of NaN.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ptx as emulated
from ptx.codes import ALLOCATION_BITS
from ptx.lowering import lower
from ptx.parser import SIZE

from numba_attn.cuda.host import arrays, driver

# Opt-in shared memory per block, in bytes, by compute capability.
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
SHARED = {cc: kilobytes * 1024 for cc, kilobytes in SHARED.items()}


@dataclass
class _Loaded:
    """A parsed kernel, and the memory of its global variables."""

    kernel: emulated.Kernel
    symbols: dict[str, driver.Memory]


@dataclass
class Launched:
    """One launch, as recorded in EmulatedDevice.launches."""

    name: str
    grid: int
    threads: int
    shared: int
    stream: int
    accesses: list[emulated.Access] = field(default_factory=list)  # with profile=True


class EmulatedDevice:
    """See the top of the file.

    Parameters
    ----------
    cc : tuple of int
    collect : bool
        Add what the race and synchronisation checks find to `findings` instead of raising AssertionError.
    options
        ptx.Options: schedule, seed, async_late, approx_noise, profile, batch.

    Attributes
    ----------
    launches : list of Launched
    findings : Counter
    calls : list of tuple
        What was asked for that means nothing here: ("wait", stream, other), ("hold", stream), ("synchronize", stream),
        ("after", stream, event), ... An event is a stream and how many launches there had been on the device.
    """

    total_memory = 1 << 30
    ordered = True
    own = 0xA11

    def __init__(
        self,
        cc: tuple[int, int] = (8, 0),
        *,
        index: int = 0,
        multiprocessors: int = 4,
        collect: bool = False,
        **options: Any,
    ) -> None:
        self.index, self.cc, self.multiprocessors = index, cc, multiprocessors
        self.name = f"emulated sm_{cc[0]}{cc[1]}"
        self.shared_limit = SHARED[cc]
        self.collect, self.options = collect, options
        self.buffers: list[np.ndarray | None] = []
        self.frozen: set[int] = set()  # allocations that kernels must not write to
        self.launches: list[Launched] = []
        self.findings: Counter[Any] = Counter()
        self.calls: list[tuple[Any, ...]] = []
        self._kernels: dict[tuple[str, str], driver.Function] = {}
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        yield

    # -------------------------------------------------- kernels

    def load(self, ptx: str, name: str | None = None) -> driver.Function:
        name = driver.kernel_name(ptx, name)
        with self._lock:
            found = self._kernels.get((ptx, name))
            if found is None:
                try:
                    kernel = _parse(ptx, name)
                    self._refuse(kernel)
                    program = lower(kernel)
                except emulated.PTXError as error:
                    raise RuntimeError(f"assembling {name} for {self.name} failed: {error}") from error
                symbols = {n: self.upload(emulated.initial(kernel, n), 0) for n in program.globals}
                loaded, static = _Loaded(kernel, symbols), program.shared_bytes
                found = driver.Function(kernel.name, loaded, static, max(driver.DEFAULT_SHARED - static, 0))
                self._kernels[ptx, name] = found
        return found

    def _refuse(self, kernel: emulated.Kernel) -> None:
        """RuntimeError for another device's kernel, and for parameters that driver.py does not pass."""
        target = int(kernel.target.removeprefix("sm_").rstrip("af"))
        if target > 10 * self.cc[0] + self.cc[1]:
            raise RuntimeError(f"assembling {kernel.name} failed: it is for {kernel.target}, not {self.name}")
        wide = [p for p, kind, size in kernel.params if size or SIZE[kind] != 8]
        if wide:
            raise RuntimeError(f"{kernel.name} has parameters that do not take 8 bytes: {', '.join(wide)}")

    def launch(
        self, function: driver.Function, grid: int, threads: int, shared: int, params: bytes, stream: int
    ) -> None:
        driver.check_launch(self, function, grid, threads, shared)
        loaded: _Loaded = function.handle
        bound = loaded.kernel.maxntid
        if bound and threads > int(np.prod(bound)):
            raise RuntimeError(f"launching {function.name} failed: {threads} threads, compiled for {list(bound)}")
        if len(params) != 8 * len(loaded.kernel.params):
            raise RuntimeError(
                f"launching {function.name} failed: {len(params)} bytes for {len(loaded.kernel.params)} parameters of 8"
            )
        values = struct.unpack(f"={len(params) // 8}Q", params)
        with self._lock:
            run = emulated.launch(
                loaded.kernel, grid, threads, values, dynamic=shared, buffers=self.buffers, frozen=self.frozen,
                symbols={name: memory.address for name, memory in loaded.symbols.items()}, **self.options,
            )  # fmt: skip
            self.launches.append(Launched(function.name, grid, threads, shared, int(stream), run.accesses))
            self.findings.update(run.findings)
        if run.findings and not self.collect:
            raise AssertionError(f"{function.name}, {grid} blocks of {threads} threads:\n{run.report()}")

    def kernels(self) -> list[str]:
        """The PTX of what was loaded."""
        return [ptx for ptx, _ in self._kernels]

    # -------------------------------------------------- memory

    def empty(self, nbytes: int, stream: int) -> driver.Memory:
        with self._lock:
            self.buffers.append(np.full(nbytes, 0xFF, np.uint8))
            return driver.Memory(self, len(self.buffers) << ALLOCATION_BITS, nbytes, stream)

    def free(self, memory: driver.Memory) -> None:
        with self._lock:
            self.buffers[_number(memory.address)] = None

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        """Memory as a uint8 array that shares it. IndexError for bytes that are in no live allocation."""
        number, offset = _number(address), address & ((1 << ALLOCATION_BITS) - 1)
        buffer = self.buffers[number] if 0 <= number < len(self.buffers) else None
        if buffer is None or offset + nbytes > buffer.size:
            raise IndexError(f"{nbytes} bytes at 0x{address:x} are in no allocation")
        return buffer[offset : offset + nbytes]

    def upload(self, array: np.ndarray, stream: int) -> driver.Memory:
        memory = self.empty(array.nbytes, stream)
        self.bytes_at(memory.address, array.nbytes)[:] = np.frombuffer(array.tobytes(), np.uint8)
        return memory

    def download(self, source: driver.Memory | int, out: np.ndarray, stream: int) -> None:
        address = source if isinstance(source, int) else source.address
        if out.nbytes:
            out[...] = self.bytes_at(address, out.nbytes).view(out.dtype).reshape(out.shape)

    def fill(self, memory: driver.Memory, value: int, stream: int) -> None:
        self.bytes_at(memory.address, memory.nbytes)[:] = value

    def ordinal(self, address: int) -> int:
        self.bytes_at(address, 0)
        return self.index

    # -------------------------------------------------- order: everything happens at once

    def synchronize(self, stream: int) -> None:
        self.calls.append(("synchronize", int(stream)))

    def wait(self, stream: int, other: int) -> None:
        self.calls.append(("wait", int(stream), int(other)))

    def mark(self, stream: int) -> driver.Mark:
        return driver.Mark(self, (int(stream), len(self.launches)))

    def record(self, mark: driver.Mark, stream: int) -> None:
        mark.event = (int(stream), len(self.launches))

    def after(self, stream: int, mark: driver.Mark) -> None:
        self.calls.append(("after", int(stream), mark.event))

    def passed(self, mark: driver.Mark) -> bool:
        return True

    def forget(self, mark: driver.Mark) -> None:
        self.calls.append(("forget", mark.event))

    def event(self, stream: int) -> float:
        return time.perf_counter()

    def elapsed(self, first: float, last: float) -> float:
        return last - first

    def hold(self, thing: Any, stream: int) -> None:
        self.calls.append(("hold", int(stream)))

    def refuse_capture(self, stream: int) -> None:
        self.calls.append(("refuse_capture", int(stream)))


def _number(address: int) -> int:
    """Of the allocation."""
    return (address >> ALLOCATION_BITS) - 1


_parsed: dict[tuple[str, str], emulated.Kernel] = {}


def _parse(ptx: str, name: str) -> emulated.Kernel:
    """Every test has a device of its own, and many load the same kernels."""
    if (ptx, name) not in _parsed:
        _parsed[ptx, name] = emulated.parse(ptx, name)
    return _parsed[ptx, name]


# ---------------------------------------------------------------- other libraries' arrays


class _Fake:
    """A NumPy array's numbers in a device's memory, with the same strides, in an allocation from its first byte to its
    last: what lies before, behind, and in a freed array's place raises.

    Kernels that write to a read-only one raise.
    """

    def __init__(self, device: EmulatedDevice, x: np.ndarray, read_only: bool = False) -> None:
        low, high = np.lib.array_utils.byte_bounds(x) if x.size else (0, 0)
        self.shape, self.strides, self.dtype, self.read_only = x.shape, x.strides, x.dtype, read_only
        self.memory = device.empty(high - low, 0)
        self.address = self.memory.address + (x.ctypes.data - low if x.size else 0)
        if x.size:
            self._view()[...] = x  # the bytes between the elements stay NaN
        if read_only:
            device.frozen.add(_number(self.memory.address))

    def _view(self) -> np.ndarray:
        device, memory = self.memory.device, self.memory
        span = device.bytes_at(memory.address, memory.nbytes)
        offset = self.address - memory.address
        return np.ndarray(self.shape, self.dtype, span, offset, self.strides)

    def numpy(self) -> np.ndarray:
        """What is in it now."""
        return self._view().copy() if self.memory.nbytes else np.empty(self.shape, self.dtype)


class InterfaceArray(_Fake):
    """Like Numba's arrays: __cuda_array_interface__ and nothing else."""

    producer: int | None = None  # the stream that it was written on
    version = 3

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        told = {
            "shape": self.shape,
            "typestr": self.dtype.str if self.dtype.kind != "V" else "<V2",
            "data": (self.address, self.read_only),
            "strides": self.strides,
            "version": self.version,
        }
        return told | {"stream": self.producer} if self.version >= 3 else told


class DlpackArray(_Fake):
    """Like CuPy's, torch's and JAX's arrays: DLPack, with versions or without."""

    versioned = True

    def __init__(self, device: EmulatedDevice, x: np.ndarray, read_only: bool = False) -> None:
        super().__init__(device, x, read_only)
        self.streams: list[int | None] = []  # what __dlpack__ was called with

    def __dlpack_device__(self) -> tuple[int, int]:
        return arrays.CUDA, self.memory.device.index

    def __dlpack__(self, *, stream: int | None = None, **rest: Any) -> Any:
        if not self.versioned and rest:
            raise TypeError(f"__dlpack__() got an unexpected keyword argument {next(iter(rest))!r}")
        self.streams.append(stream)
        return arrays.make_capsule(self, "max_version" in rest)
