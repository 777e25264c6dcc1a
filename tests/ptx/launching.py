"""A launch from Python: arguments, the memory that it works on, what it found, errors in words."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import codes, computing, execution, traffic
from .arithmetic import LANES
from .errors import Hang, PTXError
from .execution import Code, Machine, Settings, Trail, Warps
from .lowering import Program, lower
from .memory import Copies, Memory
from .parser import Kernel, parse
from .races import Shadow

Buffers = Sequence["np.ndarray | None"]
RESIDENT = 8  # blocks that take turns where the schedule is random


class Access(NamedTuple):
    """What a statement's accesses cost in a launch: see traffic.py. requests: of a warp."""

    space: str
    stores: bool
    text: str
    requests: int
    wavefronts: int
    ideal: int
    sectors: int
    nbytes: int


@dataclass
class Trace:
    """What launches did: steps (a warp's run of a basic block), the statements that ran (kernel, number), and the
    bytes of all of global memory at the end of each launch."""

    limit: float = float("inf")
    steps: int = 0
    reached: set[tuple[str, int]] = field(default_factory=set)
    results: list[bytes] = field(default_factory=list)


_watching: ContextVar[Trace | None] = ContextVar("_watching", default=None)


@contextmanager
def watching(steps: float = float("inf")) -> Iterator[Trace]:
    """Traces the launches of the body, and stops them with Hang after so many steps altogether."""
    token = _watching.set(Trace(steps))
    try:
        yield _watching.get()  # type: ignore[misc]
    finally:
        _watching.reset(token)


@functools.cache
def _compiled() -> tuple[Any, int]:
    """execution.run, and the address of computing.compute."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    stamp = sources.hexdigest()
    return execution.compiled(stamp), computing.compiled(stamp).address


def launch(
    kernel: Kernel | str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    arguments: Iterable[Any],
    *,
    dynamic: int = 0,
    buffers: Buffers | None = None,
    symbols: dict[str, int] | None = None,
    frozen: Iterable[int] = (),
    **options: Any,
) -> Launch:
    """Run a kernel.

    Parameters
    ----------
    grid, block : int or tuple
        Blocks, and threads of a block, along x, y and z.
    arguments
        NumPy arrays, which stand for pointers to them, NumPy scalars, floats (float64), and integers.
    dynamic : int
        Bytes of dynamic shared memory.
    buffers, symbols, frozen
        Global memory that is there already: uint8 arrays by the allocations' numbers (None: freed), the addresses of
        the kernel's own variables in them, and the allocations that it must not write to. Arrays among the arguments
        are not allowed then.
    options
        See Options.

    Raises
    ------
    PTXError
        For what stops a kernel.
    Hang
        Where `watching` allows fewer steps.
    """
    if isinstance(kernel, str):
        kernel = parse(kernel)
    return Launch(kernel, lower(kernel), _three(grid), _three(block), Options(**options)).run(
        arguments, dynamic, buffers, symbols or {}, set(frozen)
    )


def _three(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*((size,) if isinstance(size, int) else size), 1, 1)[:3]
    return x, y, z


@dataclass(frozen=True)
class Options:
    """How a launch runs.

    schedule: "lockstep", or "random": warps take turns at random, as blocks do.
    seed: of all that is random.
    async_late: copies of cp.async arrive when they are waited for, the latest that they may; else at once.
    approx_noise: how wrong ex2 is, in ulp; the others accordingly (approximate.py). 0: as exact as can be.
    profile: count wavefronts and sectors.
    batch: blocks that take turns.
    """

    schedule: str = "lockstep"
    seed: int = 0
    async_late: bool = True
    approx_noise: int = 0
    profile: bool = False
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("lockstep", "random"):
            raise ValueError(f"schedule {self.schedule!r}")


class Launch:
    """A launch and what came of it.

    Attributes
    ----------
    findings : Counter
        How often a check found something: {(what, the statement's text): lanes}.
    accesses : list of Access
        With profile=True.
    steps : int
        Runs of a basic block by a warp.
    executed : numpy.ndarray
        How often a warp ran each statement.
    """

    def __init__(
        self,
        kernel: Kernel,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        options: Options,
    ) -> None:
        self.kernel, self.program, self.grid, self.block, self.options = kernel, program, grid, block, options
        self.findings: Counter[tuple[str, str]] = Counter()
        self.accesses: list[Access] = []
        self.steps = 0
        self.threads = int(np.prod(block))
        if self.threads % LANES or not self.threads:
            raise PTXError(f"{self.threads} threads: whole warps only")

    def run(
        self, arguments: Iterable[Any], dynamic: int, buffers: Buffers | None, symbols: dict[str, int], frozen: set[int]
    ) -> Launch:
        owned: list[np.ndarray | None] = []
        values = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                if buffers is not None or not argument.flags.c_contiguous:
                    raise ValueError("an array must be contiguous, and the only memory")
                owned.append(argument.reshape(-1).view(np.uint8))
                values.append(len(owned) << codes.ALLOCATION_BITS)
            else:
                values.append(_bits(argument))
        if buffers is None:
            for name in self.program.globals:
                owned.append(initial(self.kernel, name))
                symbols = symbols | {name: len(owned) << codes.ALLOCATION_BITS}
            buffers = owned
        if len(values) != len(self.kernel.params):
            raise PTXError(f"{len(values)} values for {len(self.kernel.params)} parameters")
        trace = _watching.get()
        left = trace.limit - trace.steps if trace is not None else float("inf")
        random = np.array([self.options.seed], np.uint64)
        order = np.arange(int(np.prod(self.grid)), dtype=np.int64)
        if self.options.schedule == "random":
            order = np.random.default_rng(self.options.seed).permutation(order)
        batch = self.options.batch or (RESIDENT if self.options.schedule == "random" else 1)
        room = max(min(batch, order.size), 1)
        n = len(self.program.statements)
        self.dynamic = dynamic
        shadow, memory, kept = self._memory(room, dynamic, buffers, frozen)
        rows = np.zeros((n, 2, traffic.COLUMNS) if self.options.profile else (0, 2, traffic.COLUMNS), np.int64)
        trail = Trail(np.zeros(self.program.blocks.size, np.int64), rows, random)
        settings = Settings(
            self.options.approx_noise, int(self.options.async_late), int(self.options.schedule == "random"),
            int(min(left, 1 << 60)), self.grid, self.block,
        )  # fmt: skip
        warps = self._warps(room)
        copies = Copies(
            np.empty((warps.live.size, 64, 5), np.int64), np.empty((warps.live.size, 64, 2), np.uint64),
            np.zeros(warps.live.size, np.int64), np.zeros((warps.live.size, LANES), np.int64),
        )  # fmt: skip
        code = self._code(values, symbols, dynamic)
        machine = Machine(code, warps, memory, shadow, copies, settings, trail, self.threads // LANES, self.threads)
        run, _ = _compiled()
        self.steps = int(run(machine, order))
        del kept
        self._tell(memory.fault, shadow.findings, trail, warps, trace, buffers)
        return self

    # ---------------------------------------------------------------------------------------- what compiled code needs

    def _code(self, values: list[int], symbols: dict[str, int], dynamic: int) -> Code:
        """Constants and parameters are registers that nobody writes to."""
        program = self.program
        template = np.zeros(program.file_bytes, np.uint8)

        def fill(place: int, nbytes: int, bits: int) -> None:
            """The same number in every lane; a predicate is 4 bytes, a bit for a lane."""
            count = LANES if nbytes > 4 else 1
            number = bits.to_bytes(nbytes // count, "little")
            template[place : place + nbytes] = np.frombuffer(number * count, np.uint8)

        for place, nbytes, bits in program.constants:
            fill(place, nbytes, bits)
        for (place, _), value in zip(program.parameters.values(), values, strict=True):
            fill(place, 8 * LANES, value)
        for name, place in program.globals.items():
            fill(place, 8 * LANES, symbols[name])
        (bx, by, bz), (gx, gy, gz) = self.block, self.grid
        known = {
            "%ntid.x": bx, "%ntid.y": by, "%ntid.z": bz, "%nctaid.x": gx, "%nctaid.y": gy, "%nctaid.z": gz,
            "%nwarpid": self.threads // LANES, "%dynamic_smem_size": dynamic,
            "%total_smem_size": program.shared_bytes + dynamic, "%nsmid": 1,
        }  # fmt: skip
        for name, place in program.launch.items():
            fill(place, 4 * LANES, known.get(name, 0))
        special = np.array([program.special.get(name, -1) for name in codes.SPECIAL], np.int64)
        return Code(program.operations, program.blocks, program.pool, template, special, _compiled()[1])

    def _warps(self, room: int) -> Warps:
        count = room * self.threads // LANES
        files = np.empty((count, self.program.file_bytes), np.uint8)
        numbers = (np.zeros(count, np.int64) for _ in range(5))
        return Warps(files, np.zeros((count, LANES), np.int64), *numbers, np.ones(room, np.int64),
                     np.zeros(room, np.int64))  # fmt: skip

    def _memory(
        self, room: int, dynamic: int, buffers: Buffers, frozen: set[int]
    ) -> tuple[Shadow, Memory, tuple[np.ndarray, np.ndarray]]:
        nbytes = self.program.shared_bytes + dynamic
        stride, local_stride = nbytes + -nbytes % 16 + 16, self.program.local_bytes + -self.program.local_bytes % 16
        shared = np.empty(room * stride, np.uint8)
        local = np.empty(room * self.threads * local_stride + 8, np.uint8)
        sizes = np.array([0 if x is None else x.nbytes for x in buffers], np.int64)
        bases = np.array([0 if x is None else x.ctypes.data for x in buffers], np.int64)
        self.sizes = sizes
        starts = np.cumsum([0, *((sizes + 1) // 2 + 1)])
        shadow = Shadow(
            *(np.empty((room, stride // 2), np.int64) for _ in range(3)),
            np.zeros(starts[-1], np.int64), starts[:-1].copy(), np.zeros(sizes.size, np.bool_),
            np.zeros((len(self.program.statements), len(codes.FINDINGS)), np.int64),
        )  # fmt: skip
        forbidden = np.array([n in frozen for n in range(sizes.size)], np.bool_)
        memory = Memory(
            shared.ctypes.data, nbytes, stride, local.ctypes.data, self.program.local_bytes, local_stride,
            bases, sizes, forbidden, np.zeros(8, np.int64),
        )  # fmt: skip
        return shadow, memory, (shared, local)

    # ------------------------------------------------------------------------------------------------------------ words

    def _text(self, statement: int) -> str:
        return self.program.statements[statement].written().rstrip(";")

    def _tell(
        self, fault: np.ndarray, found: np.ndarray, trail: Trail, warps: Warps, trace: Trace | None, buffers: Buffers
    ) -> None:
        for statement, kind in zip(*np.nonzero(found), strict=True):
            self.findings[codes.FINDINGS[kind], self._text(statement)] += int(found[statement, kind])
        self.executed = np.zeros(len(self.program.statements), np.int64)
        ends = [-1, *(int(block["statement"]) for block in self.program.blocks)]
        for first, last, count in zip(ends, ends[1:], trail.ran, strict=False):
            self.executed[first + 1 : last + 1] = count
        for statement, row in enumerate(trail.traffic):
            for stores, numbers in enumerate(row.tolist()):
                shared, wavefronts, ideal, requests, sectors, nbytes = numbers
                own = self._text(statement)
                if shared:
                    self.accesses.append(Access("shared", bool(stores), own, shared, wavefronts, ideal, 0, 0))
                if requests:
                    self.accesses.append(Access("global", bool(stores), own, requests, 0, 0, sectors, nbytes))
        if trace is not None:
            trace.steps += self.steps
            trace.reached |= {(self.kernel.name, int(n)) for n in np.nonzero(self.executed)[0]}
            if fault[0] == codes.FINE:
                digest = hashlib.blake2b()
                for x in buffers:
                    digest.update(b"" if x is None else x)
                trace.results.append(digest.digest())
        if fault[0] == codes.TOO_LONG:
            raise Hang(f"Hang: still running after {self.steps} steps")
        if fault[0] != codes.FINE:
            raise PTXError(self._fault(fault, warps))

    def _fault(self, fault: np.ndarray, warps: Warps) -> str:
        kind, statement, warp, lane, space, number, offset, nbytes = fault.tolist()
        width = self.threads // LANES
        name = {codes.GLOBAL: "global", codes.SHARED: "shared", codes.LOCAL: "local"}.get(space, "")
        size = {codes.SHARED: self.program.shared_bytes, codes.LOCAL: self.program.local_bytes}.get(space, 0)
        if kind == codes.OUTSIDE:
            what = f"OUT-OF-BOUNDS {name}: {nbytes} bytes at offset {offset} of {self._size(space, number, size)}"
        elif kind == codes.MISALIGNED:
            what = f"MISALIGNED {name}: {nbytes} bytes at offset {offset}"
        elif kind == codes.BARRIERS:
            what = f"SYNC: threads of a block wait at different barriers, one at `{self._text(offset)}`"
        else:
            what = {
                codes.WILD: f"WILD global pointer 0x{offset & (2**64 - 1):x}",
                codes.FREED: f"FREED global memory: allocation {number} is used after it was freed",
                codes.READ_ONLY: f"WRITE to read-only global memory: allocation {number}",
                codes.PARTIAL_COPY: f"OUT-OF-BOUNDS cp.async: {nbytes} bytes of fewer",
                codes.APART: "SYNC: not all lanes of the warp reach what they do together",
                codes.DEADLOCK: "SYNC: deadlock: some threads wait at a barrier, others do not come",
                codes.TRAPPED: "trap",
            }[kind]
        block, thread = int(warps.block_ids[warp // width]), LANES * (warp % width) + lane
        return f"{what}: `{self._text(statement)}`, block {block}, thread {thread}"

    def _size(self, space: int, number: int, static: int) -> str:
        if space == codes.GLOBAL:
            return f"{self.sizes[number]} of allocation {number}"
        return str(static + (self.dynamic if space == codes.SHARED else 0))

    def report(self) -> str:
        """The findings, a line each."""
        return "\n".join(f"  {what} x{n}: `{text}`" for (what, text), n in self.findings.most_common())


def initial(kernel: Kernel, name: str) -> np.ndarray:
    """The bytes of a variable in global memory as the module is loaded."""
    variable = kernel.variables[name]
    return np.frombuffer(variable.initial.ljust(variable.size, b"\0"), np.uint8).copy()


def _bits(value: Any) -> int:
    if isinstance(value, np.generic):
        return int.from_bytes(value.tobytes(), "little")
    if isinstance(value, float):
        return int.from_bytes(np.float64(value).tobytes(), "little")
    return int(value) & (2**64 - 1)
