"""One CUDA device, through NVIDIA's driver: loads PTX, launches kernels, has memory and copies.

Kernels are compiled to PTX elsewhere and loaded here, without numba-cuda's dispatcher. So the device runs the same PTX
that the tests ran in the emulator, and a launch costs microseconds. Everything that the package uses of cuda.bindings
is in this file. It is imported when a device is first asked for, so that this module can be imported anywhere.

All calls use the device's primary context. torch, CuPy, JAX and Numba use it too, so their arrays and streams are valid
here. The context that was current before a call is current after it. All functions may be called from many
threads. A stream is a CUstream handle as an int, 0 for the legacy default stream.

The tests have no device: `use` puts another object, with the methods of `Device`, in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...arrays import Array
from .. import INSTALL
from .handles import Function, Mark, Memory
from .ptx import assemble, kernel_name, older_version

FORKED = (
    "this process was forked from one that had already used CUDA, and CUDA does not work in such a child: start it "
    "with multiprocessing's 'spawn' or 'forkserver', or make the first CUDA call after the fork"
)

DEFAULT_SHARED = 48 * 1024  # bytes of shared memory per block, static and dynamic, that a kernel has without asking
MAX_GRID = 2**31 - 1
MAX_THREADS = 1024

# Bytes that our memory pool keeps for the next call. The rest goes back to the system at the next synchronisation.
POOL_KEEPS = 1 << 30

# Arrays of so many pieces of this size are copied on the host first, so that `upload` need not wait for the stream.
PIECES = 16
SMALL = 64 * 1024

_NOT_INITIALIZED, _OUT_OF_MEMORY, _NOT_READY = 3, 2, 600  # CUresult
_CAPTURE = range(900, 909)  # a call that the capture of a graph does not allow

_lock = threading.Lock()
_devices: dict[int, Device] = {}
_driver: Any = None  # cuda.bindings.driver, once cuInit has succeeded
_replacement: Any = None  # the tests' device
_forked = False


def _after_fork() -> None:
    global _forked, _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    _forked = _driver is not None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---------------------------------------------------------------- finding a device


def _bindings() -> Any:
    if importlib.util.find_spec("numba_cuda") is None:
        raise RuntimeError(f"numba-cuda is not installed: {INSTALL}")
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise RuntimeError(f"numba-cuda is installed without cuda.bindings ({error}): {INSTALL}") from error


def _start() -> Any:
    """cuda.bindings.driver, initialised. RuntimeError says what is missing."""
    global _driver
    if _forked:
        raise RuntimeError(FORKED)
    if _driver is None:
        cu = _bindings()
        try:
            result = cu.cuInit(0)
        except Exception as error:  # the package's own class where there is no libcuda; it changes between versions
            raise RuntimeError(f"no CUDA driver library was found: {error}") from error
        if result[0] == _NOT_INITIALIZED:  # by a library in the parent process: our own case is _forked
            raise RuntimeError(f"starting CUDA failed: {_explain(cu, result[0])}. If it had been used before: {FORKED}")
        _check(cu, result, "starting CUDA")
        if not _check(cu, cu.cuDeviceGetCount(), "counting the CUDA devices"):
            raise RuntimeError("the CUDA driver sees no device")
        _driver = cu
    return _driver


def missing() -> str | None:
    """What keeps this process from using a CUDA device, or None."""
    if _replacement is None:
        try:
            _start()
        except RuntimeError as error:
            return str(error)
    return None


def available() -> bool:
    return missing() is None


def current(index: int | None = None) -> Device:
    """The device with this ordinal; by default the one of the calling thread's current context, else device 0.

    Raises
    ------
    RuntimeError
        Where there is no usable device: the text says whether a package, the driver or the device is missing.
    ValueError
        If there is no device with this ordinal.
    """
    if _replacement is not None:
        if index is not None and index != _replacement.index:
            raise ValueError(f"there is no CUDA device {index}, only {_replacement.index}")
        return _replacement
    cu = _start()
    if index is None:
        index = 0
        error, context = cu.cuCtxGetCurrent()  # to ask for the device is an error where there is none
        if error == 0 and int(context):
            index = int(_check(cu, cu.cuCtxGetDevice(), "asking for the current device"))
    found = _devices.get(index)
    if found is None:
        with _lock:
            found = _devices.get(index)
            if found is None:
                count = _check(cu, cu.cuDeviceGetCount(), "counting the CUDA devices")
                if not 0 <= index < count:
                    raise ValueError(f"there is no CUDA device {index}; the driver sees {count}")
                found = _devices[index] = Device(index, cu)
    return found


@contextlib.contextmanager
def use(device: Any) -> Iterator[Any]:
    """For tests: `current` gives this object, which has the methods of `Device`, until the block ends. That is how the
    same host code runs kernels in the emulator (tests/cuda/emulator.py)."""
    global _replacement
    before, _replacement = _replacement, device
    try:
        yield device
    finally:
        _replacement = before


# ---------------------------------------------------------------- errors


def _explain(cu: Any, error: Any) -> str:
    words = []
    for ask in (cu.cuGetErrorName, cu.cuGetErrorString):
        with contextlib.suppress(Exception):  # an error that these bindings do not know
            result, text = ask(error)
            if result == 0 and text:
                words.append(text.decode())
    return ": ".join(words) or f"CUDA error {int(error)}"


def _check(cu: Any, result: tuple[Any, ...], doing: str) -> Any:
    """The value of a driver call, which returns (error,) or (error, value)."""
    if result[0] != 0:
        raise RuntimeError(f"{doing} failed: {_explain(cu, result[0])}")
    return result[1] if len(result) == 2 else None


class _Extra(ctypes.Structure):
    """What `extra` of cuLaunchKernel points to, a list of names and values; the size is behind it."""

    _fields_ = (
        ("pointer_name", ctypes.c_size_t),  # CU_LAUNCH_PARAM_BUFFER_POINTER
        ("pointer", ctypes.c_char_p),
        ("size_name", ctypes.c_size_t),  # CU_LAUNCH_PARAM_BUFFER_SIZE
        ("size_at", ctypes.c_size_t),
        ("end", ctypes.c_size_t),  # CU_LAUNCH_PARAM_END
        ("size", ctypes.c_size_t),
    )


_SIZE_AT = _Extra.size.offset


# ---------------------------------------------------------------- the device


class Device:
    """A CUDA device. Not made directly: `current` keeps one object for each.

    Attributes
    ----------
    index : int
        The driver's ordinal.
    name : str
    cc : tuple of int
        Compute capability, such as (8, 0).
    shared_limit : int
        Bytes of shared memory that a block can have at most.
    multiprocessors : int
    total_memory : int
        Bytes.
    ordered : bool
        Whether memory is freed in the order of its stream, so that it may be dropped while kernels use it.
    own : int
        A stream of this package, for which no other waits: memory that kernels of many streams read is freed on it.
    """

    def __init__(self, index: int, cu: Any) -> None:
        self._cu = cu
        self.index = index
        handle = _check(cu, cu.cuDeviceGet(index), f"opening CUDA device {index}")

        def attribute(name: str) -> int:
            which = getattr(cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(_check(cu, cu.cuDeviceGetAttribute(which, handle), f"asking CUDA device {index} for its {name}"))

        name = _check(cu, cu.cuDeviceGetName(256, handle), f"asking CUDA device {index} for its name")
        self.name = name.split(b"\0")[0].decode()
        self.cc = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
        self.shared_limit = attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self.multiprocessors = attribute("MULTIPROCESSOR_COUNT")
        self.total_memory = int(_check(cu, cu.cuDeviceTotalMem(handle), f"asking CUDA device {index} for its memory"))
        self._dynamic = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._static = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        # Never released: the arrays that we hand out may outlive everything else of the package.
        self._context = _check(cu, cu.cuDevicePrimaryCtxRetain(handle), f"opening a context on CUDA device {index}")
        self._context_address = int(self._context)
        self._lock = threading.Lock()
        self._held: deque[tuple[Mark, Any]] = deque()
        with self.active():
            flags = int(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)
            self.own = int(_check(cu, cu.cuStreamCreate(flags), f"making a stream on CUDA device {index}"))
            self._pool = self._make_pool() if attribute("MEMORY_POOLS_SUPPORTED") else None
        self.ordered = self._pool is not None

    def __repr__(self) -> str:
        return f"<CUDA device {self.index}: {self.name}>"

    # -------------------------------------------------- context

    def _enter(self) -> bool:
        """Make the context current; whether `_leave` must undo it."""
        if _forked:
            raise RuntimeError(FORKED)
        error, context = self._cu.cuCtxGetCurrent()
        if error == 0 and int(context) == self._context_address:
            return False  # as where torch or CuPy is in use: one call instead of two
        _check(self._cu, self._cu.cuCtxPushCurrent(self._context), f"using CUDA device {self.index}")
        return True

    def _leave(self, entered: bool) -> None:
        if entered:
            self._cu.cuCtxPopCurrent()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A block in which this device is every library's current one."""
        entered = self._enter()
        try:
            yield
        finally:
            self._leave(entered)

    def _call(self, doing: str, function: Any, *arguments: Any) -> Any:
        """A driver call in the device's context."""
        entered = self._enter()
        try:
            return _check(self._cu, function(*arguments), doing)
        finally:
            self._leave(entered)

    # -------------------------------------------------- kernels

    def load(self, ptx: str, name: str | None = None) -> Function:
        """The kernel of this name in the PTX, by default its only one.

        The PTX is assembled by nvJitLink where that is installed: it is as new as the compiler that wrote the PTX,
        while the driver may be older. Else by the driver.

        Raises
        ------
        RuntimeError
            If it cannot be assembled or loaded, with the assembler's log.
        """
        name = kernel_name(ptx, name)
        cu = self._cu
        cubin, log = assemble(ptx, self.cc)
        with self.active():
            if cubin is not None:
                module = _check(cu, cu.cuModuleLoadData(cubin), f"loading {name} on {self.name}")
            else:
                module = self._load_text(ptx, name, log)
            handle = _check(cu, cu.cuModuleGetFunction(module, name.encode()), f"finding {name} in its module")
            static = int(_check(cu, cu.cuFuncGetAttribute(self._static, handle), f"asking for {name}'s shared memory"))
        return Function(name, handle, static, max(DEFAULT_SHARED - static, 0))

    def _load_text(self, ptx: str, name: str, log: str) -> Any:
        """A module that the driver assembles; `log` says why nvJitLink did not."""
        cu = self._cu
        size = 1 << 14
        words = bytearray(size)
        options = [cu.CUjit_option.CU_JIT_ERROR_LOG_BUFFER, cu.CUjit_option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES]
        result = cu.cuModuleLoadDataEx(ptx.encode() + b"\0", len(options), options, [words, size])
        if result[0] != 0:
            said = words.split(b"\0")[0].decode(errors="replace").strip()
            if (older := older_version(ptx, said)) is not None:
                return self._load_text(older, name, log)
            told = [_explain(cu, result[0]), said, log]
            raise RuntimeError(f"assembling {name} for {self.name} failed: " + "\n".join(filter(None, told)))
        return result[1]

    def launch(self, function: Function, grid: int, threads: int, shared: int, params: bytes, stream: int) -> None:
        """Start `grid` blocks of `threads` threads with `shared` bytes of dynamic shared memory each.

        `params` are the kernel's parameters one after the other, 8 bytes each.

        Raises
        ------
        ValueError
            If grid, threads or shared memory are more than the device has; nothing is launched.
        RuntimeError
            If the driver refuses, or an earlier kernel failed.
        """
        check_launch(self, function, grid, threads, shared)
        if shared > function.dynamic:
            self._raise_limit(function, shared)
        extra = _Extra(1, params, 2, 0, 0, len(params))
        at = ctypes.addressof(extra)
        extra.size_at = at + _SIZE_AT
        cu = self._cu
        entered = self._enter()
        try:
            # A kernelParams of 0 is a null pointer: the parameters are in `extra`.
            result = cu.cuLaunchKernel(function.handle, grid, 1, 1, threads, 1, 1, shared, stream, 0, at)
        finally:
            self._leave(entered)
        if result[0] != 0:
            raise RuntimeError(
                f"launching {function.name} ({grid} blocks of {threads} threads, {shared} bytes of shared memory) on "
                f"{self.name} failed: {_explain(cu, result[0])}"
            )

    def _raise_limit(self, function: Function, shared: int) -> None:
        """Let `function` be launched with `shared` bytes: above 48 KB the driver wants to be told first."""
        with self._lock:
            if shared > function.dynamic:
                self._call(
                    f"giving {function.name} {shared} bytes of shared memory",
                    self._cu.cuFuncSetAttribute,
                    function.handle,
                    self._dynamic,
                    shared,
                )
                function.dynamic = shared

    # -------------------------------------------------- memory

    def _make_pool(self) -> Any:
        """A memory pool of our own. The device's default pool gives everything back whenever a stream is synchronised,
        which happens at the end of each call with NumPy arrays, and that setting belongs to all libraries. None if the
        driver refuses."""
        cu = self._cu
        props = cu.CUmemPoolProps()
        props.allocType = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        props.handleTypes = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE
        props.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        props.location.id = self.index
        result = cu.cuMemPoolCreate(props)
        if result[0] != 0:
            return None
        keeps = cu.cuuint64_t(POOL_KEEPS)
        cu.cuMemPoolSetAttribute(result[1], cu.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, keeps)
        return result[1]

    def empty(self, nbytes: int, stream: int) -> Memory:
        """Memory for what is put on `stream` from now on.

        Raises
        ------
        MemoryError
            If the device has too little.
        """
        cu = self._cu
        size = max(nbytes, 1)  # the driver refuses 0
        entered = self._enter()
        try:
            if self._pool is None:
                result = cu.cuMemAlloc(size)
            else:
                result = cu.cuMemAllocFromPoolAsync(size, self._pool, stream)
        finally:
            self._leave(entered)
        if result[0] == _OUT_OF_MEMORY:
            raise MemoryError(f"{self.name} has no {nbytes} bytes left of its {self.total_memory}")
        address = int(_check(cu, result, f"allocating {nbytes} bytes on {self.name}"))
        return Memory(self, address, nbytes, stream)

    def free(self, memory: Memory) -> None:
        """Called by Memory, once. Errors are of no use to anyone."""
        if _forked:
            return
        cu = self._cu
        entered = self._enter()
        try:
            stream = memory.stream
            if memory.settle:
                cu.cuCtxSynchronize()
                stream = 0
            if self._pool is None:
                cu.cuStreamSynchronize(stream)
                cu.cuMemFree(memory.address)
            else:
                cu.cuMemFreeAsync(memory.address, stream)
        finally:
            self._leave(entered)

    def upload(self, array: Array, stream: int) -> Memory:
        """A copy of a NumPy array in C order. The array may be changed as soon as this returns."""
        cu = self._cu
        with self.active():
            memory = self.empty(array.nbytes, stream)
            if array.nbytes == 0:
                return memory
            # The driver waits for the stream before it copies more than SMALL bytes from pageable memory, and may not
            # have read everything when it comes back: a call's own numbers go in pieces.
            small = array.nbytes <= PIECES * SMALL
            host = np.array(array, order="C", copy=True if small else None)
            piece = SMALL if small else host.nbytes
            for n in range(0, host.nbytes, piece):
                size = min(piece, host.nbytes - n)
                result = cu.cuMemcpyHtoDAsync(memory.address + n, host.ctypes.data + n, size, stream)
                _check(cu, result, f"copying {host.nbytes} bytes to {self.name}")
            if small:
                self.hold(host, stream)
            else:
                self.synchronize(stream)
        return memory

    def download(self, source: Memory | int, out: Array, stream: int) -> None:
        """Fill `out`, of any strides, from memory in C order; returns when it is there."""
        if not out.flags.writeable:
            raise ValueError("the array to copy into is read-only")
        if out.nbytes == 0:
            return
        host = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        self._call(
            f"copying {host.nbytes} bytes from {self.name}",
            self._cu.cuMemcpyDtoHAsync,
            host.ctypes.data,
            source if isinstance(source, int) else source.address,
            host.nbytes,
            stream,
        )
        self.synchronize(stream)
        if host is not out:
            out[...] = host

    def fill(self, memory: Memory, value: int, stream: int) -> None:
        """Set every byte to `value`."""
        if memory.nbytes:
            self._call("filling memory", self._cu.cuMemsetD8Async, memory.address, value, memory.nbytes, stream)

    def ordinal(self, address: int) -> int:
        """The device that an address belongs to, for arrays that do not tell."""
        which = self._cu.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        doing = f"asking whose memory 0x{address:x} is"
        return int(self._call(doing, self._cu.cuPointerGetAttribute, which, address))

    # -------------------------------------------------- order

    def synchronize(self, stream: int) -> None:
        """Wait until everything on the stream is done. An error of a kernel shows up here."""
        self._call(f"waiting for {self.name}", self._cu.cuStreamSynchronize, stream)
        self._let_go()

    def refuse_capture(self, stream: int) -> None:
        """Raise RuntimeError while the stream is captured into a graph. Every call copies a few numbers from host
        memory to the device, and that memory is gone when the graph is replayed."""
        cu = self._cu
        status = self._call("asking whether a stream is captured", cu.cuStreamIsCapturing, stream)
        if status != cu.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
            raise RuntimeError(
                "the stream is being captured into a CUDA graph, and calls of this package cannot be part of one: call "
                "it outside the capture"
            )

    def wait(self, stream: int, other: int) -> None:
        """What is put on `stream` from now on starts after what is on `other` now."""
        if (stream or 1) == (other or 1):  # 0 and 1 both name the legacy default stream
            return
        with self.active():
            self.after(stream, self.mark(other))

    def hold(self, thing: Any, stream: int) -> None:
        """Keep a reference until everything that is on the stream now is done, and a later call here notices it."""
        self._let_go()
        self._held.append((self.mark(stream), thing))

    def mark(self, stream: int) -> Mark:
        """What is on the stream now."""
        cu = self._cu
        with self.active():
            event = _check(cu, cu.cuEventCreate(int(cu.CUevent_flags.CU_EVENT_DISABLE_TIMING)), "making an event")
            mark = Mark(self, event)
            self.record(mark, stream)
        return mark

    def record(self, mark: Mark, stream: int) -> None:
        """What is on the stream now in place of what was marked before."""
        self._call("recording an event", self._cu.cuEventRecord, mark.event, stream)

    def after(self, stream: int, mark: Mark) -> None:
        """What is put on `stream` from now on starts after what is marked now."""
        self._call("ordering two streams", self._cu.cuStreamWaitEvent, stream, mark.event, 0)

    def passed(self, mark: Mark) -> bool:
        """Whether what is marked is done; False if that cannot be asked now.

        While another thread captures a graph (torch.cuda.graph), the query is an error, and it would break off that
        capture if this thread did not allow it before."""
        cu = self._cu
        error, mode = cu.cuThreadExchangeStreamCaptureMode(cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            found = int(cu.cuEventQuery(mark.event)[0])
        finally:
            if error == 0:
                cu.cuThreadExchangeStreamCaptureMode(mode)
        return found != _NOT_READY and found not in _CAPTURE

    def forget(self, mark: Mark) -> None:
        """Called by Mark, once. What waits for it still does."""
        if not _forked:
            self._cu.cuEventDestroy(mark.event)

    def event(self, stream: int) -> Any:
        """A mark on the stream, for `elapsed`."""
        cu = self._cu
        with self.active():
            event = _check(cu, cu.cuEventCreate(int(cu.CUevent_flags.CU_EVENT_DEFAULT)), "making an event")
            _check(cu, cu.cuEventRecord(event, stream), "recording an event")
        return event

    def elapsed(self, first: Any, last: Any) -> float:
        """Seconds between two marks, once the device has come to the last; it uses them up."""
        cu = self._cu
        with self.active():
            _check(cu, cu.cuEventSynchronize(last), f"waiting for {self.name}")
            milliseconds = _check(cu, cu.cuEventElapsedTime(first, last), "reading the time between two events")
            cu.cuEventDestroy(first)
            cu.cuEventDestroy(last)
        return float(milliseconds) / 1e3

    def _let_go(self) -> None:
        # The ends of a deque are safe to use from many threads, and from a finaliser that runs inside this very
        # function. A lock would not be.
        while self._held:
            try:
                mark, thing = self._held.popleft()
            except IndexError:  # another thread was faster
                return
            if not self.passed(mark):
                self._held.appendleft((mark, thing))
                return


def check_launch(device: Any, function: Function, grid: int, threads: int, shared: int) -> None:
    """ValueError for what no launch on the device can be."""
    if not (0 < grid <= MAX_GRID and 0 < threads <= MAX_THREADS):
        raise ValueError(
            f"{function.name} is launched with {grid} blocks of {threads} threads; a launch takes 1 to {MAX_GRID} "
            f"blocks of 1 to {MAX_THREADS}"
        )
    if shared < 0 or function.static + shared > device.shared_limit:
        raise ValueError(
            f"{function.name} is launched with {function.static + shared} bytes of shared memory per block; "
            f"{device.name} has {device.shared_limit}"
        )
