"""A CUDA device for machines without one: driver.Device's methods, with PTX run by ptxemu, which lies beside the
repository (../shared/gpu) and checks what it runs.

    with driver.use(EmulatedDevice((8, 0))) as device:
        ...  # the package's own host code, from arguments to results

Memory is NumPy's. Allocation number n has the address (n + 1) << 36, as ptxemu numbers buffers, so addresses plus
offsets work in kernel parameters, and an access outside an allocation of exactly as many bytes as were asked for, or
inside a freed one, raises. New memory is full of NaN.
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

import mutations
import numpy as np

from numba_attn.cuda.host import arrays, driver

ptxemu: Any = mutations.emulator()

# Opt-in shared memory per block, in bytes, by compute capability.
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
SHARED = {cc: kilobytes * 1024 for cc, kilobytes in SHARED.items()}

_SHIFT = 36
_SPARE = 32  # ptxemu reads buffers as words of up to 16 bytes


def missing() -> str | None:
    """Why there is no emulator here, for skipif."""
    return None if ptxemu is not None else "no ../shared/gpu/ptxemu.py"


@dataclass
class _Loaded:
    """A parsed kernel, with what can be kept from one launch to the next."""

    kernel: Any
    symbols: dict[str, driver.Memory]  # its global variables
    blocks: Any = None  # ptxemu's code for it
    used: Any = None


@dataclass
class Launched:
    """One launch, as recorded in EmulatedDevice.launches."""

    name: str
    grid: int
    threads: int
    shared: int
    stream: int
    stats: Counter[Any] = field(default_factory=Counter)  # with profile=True


class _Hosts(list):  # type: ignore[type-arg]
    """ptxemu asks these for the number of bytes of a buffer before every access."""

    def __getitem__(self, number: Any) -> Any:
        found = super().__getitem__(number)
        if found is None:
            raise ptxemu.PTXError(f"FREED global memory: allocation {number} is used after it was freed")
        return found


class _Later:
    """A parameter's value, of which ptxemu would write the number into the code that it makes: as an expression."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __and__(self, mask: int) -> str:
        return f"(S.values[{self.name!r}] & {mask})"


class _Run(ptxemu.Launch if ptxemu else object):  # type: ignore[misc]
    """One launch, on the device's memory instead of buffers of its own."""

    def __init__(self, device: EmulatedDevice, loaded: _Loaded, *arguments: Any, **options: Any) -> None:
        self.device, self.loaded = device, loaded
        super().__init__(loaded.kernel, *arguments, **options)

    def _add_buf(self, a: Any, name: str | None = None) -> int:
        return self.loaded.symbols[name or ""].address

    def compile(self) -> None:
        """Called when the arguments have been read and nothing has run."""
        self.bufs = list(self.device.buffers)
        self.host = _Hosts(self.device.hosts)
        self.frozen = frozenset(self.device.frozen)
        loaded = self.loaded
        self.values = {name: value for name, (value, _) in self.pvals.items()}
        if loaded.blocks is None:
            self.pvals = {name: (_Later(name), kind) for name, (_, kind) in self.pvals.items()}
            super().compile()
            loaded.blocks, loaded.used = self.blocks, self.used
            if not loaded.symbols:  # whose addresses are a device's own
                loaded.kernel.generated = self.blocks, self.used
        self.blocks, self.used = loaded.blocks, loaded.used

    def rd(self, a: str, ty: str) -> str:
        """An operand; ptxemu takes no constant for a predicate (`mov.pred %p1, 0`)."""
        return f"S.const({a != '0'}, np.bool_)" if ty == "pred" and a in ("0", "1", "-1") else super().rd(a, ty)

    def _locate(self, space: str, addr: Any, lanes: Any, nbytes: int, I: Any, write: bool) -> Any:
        found = super()._locate(space, addr, lanes, nbytes, I, write)
        if write and found[0][0] == "global" and found[1] is not None and found[0][1] in self.frozen:
            self.err("WRITE to read-only global memory", I, lanes, f"allocation {found[0][1]}")
        return found


class EmulatedDevice:
    """See the top of the file.

    Parameters
    ----------
    cc : tuple of int
    collect : bool
        Add what the race and synchronisation checks find to `findings` instead of raising AssertionError.
    options
        ptxemu.Launch's: schedule, seed, async_late, approx_noise, profile, batch, ...

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
        self.hosts: list[np.ndarray | None] = []  # the buffers less the spare bytes
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
        if ptxemu is None:  # memory, copies and arrays work without it
            raise RuntimeError(missing())
        name = driver.kernel_name(ptx, name)
        with self._lock:
            found = self._kernels.get((ptx, name))
            if found is None:
                try:
                    kernel = _parse(ptx, name)
                except ptxemu.PTXError as error:
                    raise RuntimeError(f"assembling {name} for {self.name} failed: {error}") from error
                target = int(kernel.target.removeprefix("sm_").rstrip("af"))
                if target > 10 * self.cc[0] + self.cc[1]:
                    raise RuntimeError(f"assembling {kernel.name} failed: it is for {kernel.target}, not {self.name}")
                wide = [p for p, kind, size in kernel.params if size or ptxemu.SIZE[kind] != 8]
                if wide:
                    raise RuntimeError(f"{kernel.name} has parameters that do not take 8 bytes: {', '.join(wide)}")
                symbols = {n: self.upload(values, 0) for n, values in kernel.globals.items()}
                static = kernel.shared_size
                loaded = _Loaded(kernel, symbols, *getattr(kernel, "generated", ()))
                found = driver.Function(kernel.name, loaded, static, max(driver.DEFAULT_SHARED - static, 0))
                self._kernels[ptx, name] = found
        return found

    def launch(
        self, function: driver.Function, grid: int, threads: int, shared: int, params: bytes, stream: int
    ) -> None:
        driver.check_launch(self, function, grid, threads, shared)
        loaded: _Loaded = function.handle
        bound = [int(n) for n in ",".join(loaded.kernel.maxntid).split(",") if n.strip()]
        if bound and threads > int(np.prod(bound)):
            raise RuntimeError(f"launching {function.name} failed: {threads} threads, compiled for {bound}")
        if len(params) != 8 * len(loaded.kernel.params):
            raise RuntimeError(
                f"launching {function.name} failed: {len(params)} bytes for {len(loaded.kernel.params)} parameters of 8"
            )
        values = struct.unpack(f"={len(params) // 8}Q", params)
        with self._lock:
            run = _Run(self, loaded, (grid,), (threads,), values, dynsmem=shared, **self.options)
            record = Launched(function.name, grid, threads, shared, int(stream))
            if self.options.get("profile"):
                record.stats = run.stats
            self.launches.append(record)
            self.findings.update(run.msgs)
        if run.msgs and not self.collect:
            raise AssertionError(f"{function.name}, {grid} blocks of {threads} threads:\n{run.report()}")

    def kernels(self) -> list[str]:
        """The PTX of what was loaded."""
        return [ptx for ptx, _ in self._kernels]

    # -------------------------------------------------- memory

    def empty(self, nbytes: int, stream: int) -> driver.Memory:
        buffer = np.full(nbytes + _SPARE - nbytes % 16, 0xFF, np.uint8)
        with self._lock:
            self.buffers.append(buffer)
            self.hosts.append(buffer[:nbytes])
            return driver.Memory(self, len(self.buffers) << _SHIFT, nbytes, stream)

    def free(self, memory: driver.Memory) -> None:
        number = (memory.address >> _SHIFT) - 1
        with self._lock:
            self.buffers[number] = self.hosts[number] = None

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        """Memory as a uint8 array that shares it. IndexError for bytes that are in no live allocation."""
        number, offset = (address >> _SHIFT) - 1, address & ((1 << _SHIFT) - 1)
        host = self.hosts[number] if 0 <= number < len(self.hosts) else None
        if host is None or offset + nbytes > host.size:
            raise IndexError(f"{nbytes} bytes at 0x{address:x} are in no allocation")
        return host[offset : offset + nbytes]

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


_parsed: dict[tuple[str, str], Any] = {}


def _parse(ptx: str, name: str) -> Any:
    """Parsing takes seconds for the larger kernels, and every test has a device of its own."""
    if (ptx, name) not in _parsed:
        _parsed[ptx, name] = ptxemu.Kernel(ptx, name)
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
            device.frozen.add((self.memory.address >> _SHIFT) - 1)

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
