"""What ptxas makes of a kernel's PTX: registers, spills, the instructions (SASS) and their loops, the blocks that live
on a multiprocessor, and a bound on the speed. Read off the machine code: no GPU is needed, and nothing is a timing.

    from sass import assemble, issue_bound, main_loop, occupancy, summary
    r = assemble(ptx, (8, 0))                          # Resources; ToolError where no ptxas can read this PTX
    loop = main_loop(r.program)                        # the key loop of an attention kernel
    issue_bound(loop.counts(trips=16), (8, 0))         # nested loops (over the head size) weighted by 16

Sources of the numbers: the CUDA programming guide (GUIDE: tables of its appendix on compute capabilities, and the table
"Throughput of native arithmetic instructions"), cuda_occupancy.h of the CUDA toolkit, NVIDIA's white papers on A100 and
H100, and Nsight Compute's description of the pipes. What is not published is marked as assumed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path

CC = tuple[int, int]
TARGETS: tuple[CC, ...] = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


class ToolError(RuntimeError):
    """No ptxas or nvdisasm at hand, or none that reads this PTX."""


# ------------------------------------------------------------------------------------------------------------ the tools


@cache
def tools(name: str) -> tuple[str, ...]:
    """Paths of a CUDA command-line tool: those in this environment's nvidia packages, newest first, then the one on
    PATH."""
    found = []
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        found += [str(path) for path in Path(place).glob(f"*/bin/{name}")]
    found.sort(key=_version, reverse=True)
    on_path = shutil.which(name)
    return (*found, *([on_path] if on_path and on_path not in found else []))


def _version(tool: str) -> tuple[int, ...]:
    text = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"V(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else (0,)


def missing() -> str | None:
    """Why nothing can be assembled here, for pytest.skip; None where it can."""
    lack = [name for name in ("ptxas", "nvdisasm") if not tools(name)]
    return f"no {' and no '.join(lack)}: install nvidia-cuda-nvcc and nvidia-cuda-nvdisasm" if lack else None


# ---------------------------------------------------------------------------------------------------------- the program


@dataclass(frozen=True)
class Instruction:
    """One line of SASS. name is the opcode with its modifiers, LDG.E.128; predicate is without the @, !P0."""

    address: int
    predicate: str
    name: str
    operands: tuple[str, ...] = ()
    target: int | None = None  # the address that a branch, a call or a BSSY names

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def executed(self) -> bool:
        """False for padding, and for the `@!PT LDS RZ, [RZ]` that ptxas puts before cp.async to keep pipes in step."""
        return self.opcode != "NOP" and self.predicate != "!PT"

    @property
    def predicated(self) -> bool:
        return self.predicate not in ("", "PT", "!PT", "UPT")

    @property
    def jumps(self) -> bool:
        """BRA, and the CALL to a label inside the kernel by which ptxas leaves a loop with a barrier of the warp."""
        return self.opcode in ("BRA", "JMP") or (self.opcode == "CALL" and self.operands[-1].startswith("`(.L_"))

    @property
    def ends_block(self) -> bool:
        return self.jumps or self.opcode in _ENDS

    @property
    def uniform(self) -> bool:
        """Runs once for the warp, in the uniform datapath."""
        return is_uniform(self.name)


def is_uniform(name: str) -> bool:
    return name.startswith("U") or name.partition(".")[0] in ("R2UR", "S2UR", "LDCU", "REDUX")


def width(name: str) -> int:
    """Bits of a load or store for each lane: 32 where no modifier says otherwise."""
    parts = name.split(".")
    for part in parts[1:]:
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32


_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_LABEL = re.compile(r"(\.L_\w+|[$\w.]+):\s*$")


def parse(text: str, entry: str | None = None) -> Program:
    """The output of `nvdisasm -c`, for one kernel (the first, where entry is None)."""
    rows: list[tuple[int, str, str, tuple[str, ...]]] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    inside = False
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+(\.text\.[^\s,]+)", line):
            if rows:
                break
            inside = entry is None or section[1] == f".text.{entry}"
        elif not inside:
            continue
        elif match := _LINE.match(line):
            address = int(match[1], 16)
            for label in pending:
                labels[label] = address
            pending = []
            rows.append((address, match[2] or "", match[3], _split(match[4])))
        elif label := _LABEL.match(line):
            pending.append(label[1])
    if not rows:
        raise ValueError("no instructions in this disassembly")

    def target(operands: tuple[str, ...]) -> int | None:
        for operand in operands:
            if operand.startswith("`("):
                return labels.get(operand[2:-1])
        return None

    return Program([Instruction(*row, target(row[3])) for row in rows])


def _split(text: str) -> tuple[str, ...]:
    """Operands, at the commas outside brackets."""
    out, depth, last = [], 0, 0
    for n, sign in enumerate(text):
        depth += (sign in "[(") - (sign in "])")
        if sign == "," and not depth:
            out.append(text[last:n].strip())
            last = n + 1
    return (*out, text[last:].strip()) if text else ()


@dataclass(eq=False)
class Loop:
    """A natural loop: the blocks that can come back to its header without leaving it."""

    program: Program
    header: int  # the block
    blocks: frozenset[int]
    tails: frozenset[int]  # the blocks that jump back
    parent: Loop | None = None
    children: list[Loop] = field(default_factory=list)

    @property
    def depth(self) -> int:
        return 1 + (self.parent.depth if self.parent else 0)

    @property
    def address(self) -> int:
        return self.program.instructions[self.program.blocks[self.header].start].address

    @property
    def static(self) -> Counter[str]:
        """Instructions by name, each once, nested loops and every branch included."""
        return self.program.count(self.blocks)

    @property
    def own(self) -> Counter[str]:
        """The same without the nested loops."""
        return self.program.count(self.blocks.difference(*(child.blocks for child in self.children)))

    def counts(self, trips: Trips = 1) -> Counter[str]:
        """Instructions that a warp executes in one trip, on the way through the loop that a tile in the middle takes:
        the useful operations count for it, the others against it, so it has the products, and neither the mask of an
        edge nor the slow path of a division. A nested loop counts by the trips given for it (a number, or a function of
        the Loop)."""
        return _way(self, trips)

    def share(self, trips: Trips = 1) -> float:
        """Part of the issued instructions of a trip that are useful ones: FFMA, DFMA or HMMA."""
        counts = self.counts(trips)
        return amount(counts, self.program.useful) / max(sum(counts.values()), 1)

    def __repr__(self) -> str:
        static = self.static
        return (
            f"<loop at {self.address:#x}, depth {self.depth}: {sum(static.values())} instructions, "
            f"{amount(static, self.program.useful):g} {self.program.useful}, {len(self.children)} loops inside>"
        )


Trips = float | Callable[[Loop], float]
_ENDS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL")  # what ends a basic block


@dataclass(eq=False)
class Program:
    """The instructions of a kernel with its control flow."""

    instructions: list[Instruction]

    @cached_property
    def blocks(self) -> list[range]:
        """Basic blocks, as ranges of instruction numbers."""
        code, at = self.instructions, self._number
        leaders = {0}
        for n, ins in enumerate(code):
            if ins.ends_block:
                leaders.add(n + 1)
                if ins.target is not None:
                    leaders.add(at[ins.target])
        cuts = sorted(n for n in leaders if n < len(code))
        return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(code)], strict=True)]

    @cached_property
    def _number(self) -> dict[int, int]:
        return {ins.address: n for n, ins in enumerate(self.instructions)}

    @cached_property
    def follows(self) -> list[list[int]]:
        """Blocks that may run after each block. A call returns to the next line, and BSYNC goes on with it."""
        block_of = {block.start: n for n, block in enumerate(self.blocks)}
        out = []
        for block in self.blocks:
            last = self.instructions[block[-1]]
            # `BRA !P1, x`, `BRA.U UP0, x` and `BRA.DIV UR4, x` carry a condition among the operands.
            conditional = last.predicated or (last.opcode == "BRA" and len(last.operands) > 1)
            after = []
            if last.jumps and last.target is not None:
                after.append(block_of[self._number[last.target]])
            if (conditional or not last.ends_block) and block[-1] + 1 in block_of:
                after.append(block_of[block[-1] + 1])
            out.append(after)
        return out

    @cached_property
    def reachable(self) -> frozenset[int]:
        """Blocks that run from the entry, which leaves out padding and subroutines."""
        seen, stack = {0}, [0]
        while stack:
            for n in self.follows[stack.pop()]:
                if n not in seen:
                    seen.add(n)
                    stack.append(n)
        return frozenset(seen)

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops by address, outer before inner."""
        before: dict[int, set[int]] = {n: set() for n in self.reachable}
        for n in self.reachable:
            for m in self.follows[n]:
                before[m].add(n)
        dominators = {n: set(self.reachable) for n in self.reachable}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for n in sorted(self.reachable - {0}):
                new = {n} | set.intersection(*(dominators[m] for m in before[n]))
                if new != dominators[n]:
                    dominators[n], changed = new, True
        tails: dict[int, set[int]] = {}
        for n in self.reachable:
            for m in self.follows[n]:
                if m in dominators[n]:
                    tails.setdefault(m, set()).add(n)
        found = []
        for header, ends in tails.items():
            body, stack = {header}, list(ends)
            while stack:
                n = stack.pop()
                if n not in body:
                    body.add(n)
                    stack.extend(before[n])
            found.append(Loop(self, header, frozenset(body), frozenset(ends)))
        found.sort(key=lambda loop: (-len(loop.blocks), loop.header))
        for n, loop in enumerate(found):
            outer = [other for other in found[:n] if loop.blocks < other.blocks]
            if outer:
                loop.parent = min(outer, key=lambda other: len(other.blocks))
                loop.parent.children.append(loop)
        return sorted(found, key=lambda loop: (loop.address, loop.depth))

    def count(self, blocks: frozenset[int] | None = None) -> Counter[str]:
        """Executed instructions by name, in these blocks or everywhere."""
        chosen = range(len(self.blocks)) if blocks is None else blocks
        code = (self.instructions[n] for b in chosen for n in self.blocks[b])
        return Counter(ins.name for ins in code if ins.executed)

    @cached_property
    def useful(self) -> str:
        """The operation that the kernel is for: HMMA where it has any, else DFMA or FFMA, whichever is more."""
        total = self.count()
        if amount(total, "HMMA"):
            return "HMMA"
        return "DFMA" if amount(total, "DFMA") > amount(total, "FFMA") else "FFMA"


def amount(counts: Mapping[str, float], opcode: str) -> float:
    """How many of an opcode, whatever its modifiers; a packed FFMA2 is two FFMA."""
    total = sum(n for name, n in counts.items() if name.partition(".")[0] == opcode)
    return total + 2 * amount(counts, "FFMA2") if opcode == "FFMA" else total


def _scaled(counts: Mapping[str, float], by: float) -> Counter[str]:
    return Counter({name: n * by for name, n in counts.items()})


# What a useful operation is worth in other instructions, where Loop.counts chooses between two ways.
_WORTH = {"HMMA": 64, "FFMA": 4, "DFMA": 4}


def _way(loop: Loop, trips: Trips) -> Counter[str]:
    """Loop.counts: the best path from the header back to it, over blocks and whole nested loops."""
    program = loop.program
    inside = {b: child for child in loop.children for b in child.blocks}

    def node(block: int) -> int:
        return inside[block].header if block in inside else block

    cost: dict[int, Counter[str]] = {}
    after: dict[int, set[int]] = {}
    for b in loop.blocks:
        at = node(b)
        if at not in cost:
            child = inside.get(b)
            if child is None:
                cost[at] = program.count(frozenset([b]))
            else:
                cost[at] = _scaled(_way(child, trips), trips(child) if callable(trips) else trips)
            after[at] = set()
        after[at] |= {node(m) for m in program.follows[b] if m in loop.blocks and m != loop.header} - {at}
    ends = {node(b) for b in loop.tails}
    # The blocks without the edges back form no cycle: order them so that what follows comes first.
    order: list[int] = []
    seen: set[int] = set()

    def visit(start: int) -> None:
        stack: list[tuple[int, Iterator[int]]] = [(start, iter(after[start]))]
        seen.add(start)
        while stack:
            at, rest = stack[-1]
            for m in rest:
                if m not in seen:
                    seen.add(m)
                    stack.append((m, iter(after[m])))
                    break
            else:
                order.append(at)
                stack.pop()

    start = node(loop.header)
    visit(start)
    best: dict[int, tuple[float, int]] = {}  # of the rest of the way, and the block that comes next
    for at in order:
        gain = _WORTH[program.useful] * amount(cost[at], program.useful) - sum(cost[at].values())
        ahead = [(best[m][0], m) for m in after[at] if m in best] + [(0.0, -1)] * (at in ends)
        if ahead:
            value, then = max(ahead)
            best[at] = (value + gain, then)
    total: Counter[str] = Counter()
    while start != -1:
        total.update(cost[start])
        start = best[start][1]
    return total


def loops(program: Program) -> list[Loop]:
    return program.loops


def busy(program: Program) -> list[Loop]:
    """The loops with many useful operations of their own: an eighth of the most that any has."""
    own = {loop: amount(loop.own, program.useful) for loop in program.loops}
    most = max(own.values(), default=0)
    return [loop for loop, n in own.items() if n and n >= most / 8]


def main_loop(program: Program) -> Loop | None:
    """The smallest loop around all busy ones: the key loop of an attention kernel, not one of its loops over the head
    size, nor a loop over tiles around it. Of two key loops side by side, one with a mask, the one with more."""
    families: dict[Loop, list[Loop]] = {}
    for loop in busy(program):
        outermost = loop
        while outermost.parent:
            outermost = outermost.parent
        families.setdefault(outermost, []).append(loop)
    if not families:
        return None
    chosen = max(families.values(), key=lambda family: sum(amount(loop.own, program.useful) for loop in family))
    around = [loop for loop in program.loops if all(one.blocks <= loop.blocks for one in chosen)]
    return max(around, key=lambda loop: loop.depth)


def trips_for(products: float) -> Callable[[Loop], float]:
    """For Loop.counts: as many trips of each busy loop as make `products` useful operations, so that two products of
    the same size count the same however far each was unrolled; one trip of any other. A tile of rows x cols has
    rows x cols x head size / threads of them (for HMMA, over 64: 2,048 a warp)."""

    def trips(loop: Loop) -> float:
        own = amount(loop.own, loop.program.useful)
        return products / own if loop in busy(loop.program) else 1

    return trips


# ------------------------------------------------------------------------------------------------------------- assembly


@dataclass(frozen=True, eq=False)
class Resources:
    """What ptxas says of a kernel, in registers a thread and bytes, with its instructions."""

    cc: CC
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int  # static only
    barriers: int
    program: Program
    text: str  # the disassembly


# A ptxas older than the PTX, or than the target: the next one may know them.
_TOO_OLD = re.compile(r"Unsupported \.version|is not defined for option|Unsupported gpu|SM version")


@lru_cache(maxsize=64)
def assemble(ptx: str, cc: CC, entry: str | None = None) -> Resources:
    """ptxas -v and nvdisasm on PTX text. ToolError where no tool can, with what the last one said."""
    if (lack := missing()) is not None:
        raise ToolError(lack)
    entry = entry or next(iter(re.findall(r"\.entry\s+([\w$]+)", ptx)), None)
    if entry is None:
        raise ValueError("no .entry in this PTX")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        said = ""
        for ptxas in tools("ptxas"):
            command = [ptxas, "-v", f"-arch=sm_{cc[0]}{cc[1]}", f"--entry={entry}", str(source), "-o", str(cubin)]
            done = subprocess.run(command, capture_output=True, text=True)
            said = done.stdout + done.stderr
            if done.returncode == 0:
                break
            if not _TOO_OLD.search(said):
                raise ValueError(f"ptxas rejects this PTX: {said.strip()[:2000]}")
        else:
            raise ToolError(f"no ptxas here reads this PTX: {said.strip()[:500]}")
        text = ""
        beside = str(Path(ptxas).with_name("nvdisasm"))
        for nvdisasm in dict.fromkeys([*([beside] if beside in tools("nvdisasm") else []), *tools("nvdisasm")]):
            done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
            if done.returncode == 0:
                text = done.stdout
                break
        else:
            raise ToolError(f"no nvdisasm here reads sm_{cc[0]}{cc[1]}: {done.stderr.strip()[:500]}")

    def number(pattern: str) -> int:
        return max((int(n) for n in re.findall(pattern, said)), default=0)

    return Resources(
        cc=cc,
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
        shared=number(r"(\d+) bytes smem"),
        barriers=number(r"used (\d+) barriers"),
        program=parse(text, entry),
        text=text,
    )


_MEMORY = ("LDG", "STG", "LDS", "STS", "LDGSTS")
_OTHER_MEMORY = ("LDL", "STL", "LD", "ST", "LDSM", "STSM", "LDC", "RED", "ATOMG", "ATOMS")
_MATH = ("HMMA", "FFMA", "FMUL", "FADD", "DFMA", "DMUL", "DADD", "MUFU", "IMAD", "SHFL", "BAR", "WARPSYNC", "CALL")


def summary(ptx: str, cc: CC, *, trips: Trips = 8, entry: str | None = None) -> dict[str, float]:
    """One flat row of figures for a table: static counts over the whole kernel, then the part of the instructions of
    the main loop that are useful, with the loops in it weighted by trips (see trips_for). LDG128 is a global load of
    128 bits a lane; LDL and STL (a local array, or a spill) should be 0, and so should LD and ST (an address whose
    space the compiler lost)."""
    r = assemble(ptx, cc, entry)
    total = r.program.count()
    row: dict[str, float] = {
        "registers": r.registers,
        "spill_stores": r.spill_stores,
        "spill_loads": r.spill_loads,
        "stack": r.stack,
        "shared": r.shared,
        "barriers": r.barriers,
        "instructions": sum(total.values()),
        "predicated": sum(ins.executed and ins.predicated for ins in r.program.instructions),
        "uniform": sum(n for name, n in total.items() if is_uniform(name)),
    }
    for opcode in _MEMORY:
        for bits in (128, 64, 32):
            row[f"{opcode}{bits}"] = sum(
                n for name, n in total.items() if name.partition(".")[0] == opcode and max(width(name), 32) == bits
            )
    for opcode in _OTHER_MEMORY + _MATH:
        row[opcode] = amount(total, opcode)
    row["CALL"] = sum(ins.opcode == "CALL" and not ins.jumps for ins in r.program.instructions)
    loop = main_loop(r.program)
    row["loops"] = len(r.program.loops)
    row["main_static"] = sum(loop.static.values()) if loop else 0
    row["main_share"] = loop.share(trips) if loop else 0.0
    return row


# ------------------------------------------------------------------------------------- what a multiprocessor can hold


@dataclass(frozen=True)
class Chip:
    """A multiprocessor (SM) of one compute capability. It has four sub-partitions, each with its own scheduler, a
    quarter of the registers and of the lanes."""

    warps: int  # resident at most
    blocks: int
    shared: int  # KB in all; a block may have 1 KB less, and 1 KB of each block is the system's
    fp32: int  # results a clock
    fp64: int
    tensor: int  # float16 products with float32 sums a clock, by mma.sync
    l2: float  # bytes a clock from L2


# GUIDE, "Compute capabilities", Technical specifications; cuda_occupancy.h has the same: 65,536 registers, 4
# sub-partitions, registers in units of 256 a warp and shared memory in units of 128 bytes on all of these. fp32 and
# fp64: GUIDE, "Throughput of native arithmetic instructions", results a clock a multiprocessor.
# tensor: 1,024 dense float16 FMA a clock for A100 (white paper: 312 TFLOP/s = 108 SM x 1.41 GHz x 2 x 1,024); 512 for
# professional 8.6, 8.9 and 12.0 chips (A40, L40S, RTX PRO 6000), whose GeForce siblings have half with float32 sums.
# H100 does 2,048 by wgmma, and by mma.sync about 0.63 of it in microbenchmarks (arXiv 2402.13499): assumed 1,288.
# sm_100 reaches its peak by tcgen05 only, and nothing is published about its mma.sync: assumed as A100.
# l2: 5,120 bytes a clock over 108 SM for A100 (white paper); assumed the same 5,120 over 132 and 148 SM for H100 and
# B200, and the 64 bytes of an SM's port elsewhere.
CHIPS: dict[CC, Chip] = {
    (8, 0): Chip(warps=64, blocks=32, shared=164, fp32=64, fp64=32, tensor=1024, l2=5120 / 108),
    (8, 6): Chip(warps=48, blocks=16, shared=100, fp32=128, fp64=2, tensor=512, l2=64),
    (8, 9): Chip(warps=48, blocks=24, shared=100, fp32=128, fp64=2, tensor=512, l2=64),
    (9, 0): Chip(warps=64, blocks=32, shared=228, fp32=128, fp64=64, tensor=1288, l2=5120 / 132),
    (10, 0): Chip(warps=64, blocks=32, shared=228, fp32=128, fp64=64, tensor=1024, l2=5120 / 148),
    (12, 0): Chip(warps=48, blocks=24, shared=100, fp32=128, fp64=2, tensor=512, l2=64),
}
REGISTERS = 65536
PARTITIONS = 4


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that live on a multiprocessor at once; limit names what stops the next block."""

    blocks: int
    warps: int
    limit: str
    fraction: float  # of the warps that could


def occupancy(registers: int, threads: int, shared_bytes: int, cc: CC) -> Occupancy:
    """How many blocks of `threads` threads a multiprocessor holds, with registers a thread and bytes of shared memory a
    block (static and dynamic together). The rules are cuda_occupancy.h's: registers are given to a warp in units of 256
    and lie in the warp's sub-partition, shared memory in units of 128 bytes, 1 KB of it a block to the system.

    >>> occupancy(128, 128, 48 * 1024, (8, 0))
    Occupancy(blocks=3, warps=12, limit='shared', fraction=0.1875)
    """
    chip = CHIPS[cc]
    if not 0 < threads <= 1024 or registers > 255:
        raise ValueError(f"a block of {threads} threads with {registers} registers cannot be launched")
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    shared = -(-(shared_bytes + 1024) // 128) * 128
    room = {
        "warps": chip.warps // warps,
        "registers": REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps,
        "shared": 0 if shared_bytes > (chip.shared - 1) * 1024 else chip.shared * 1024 // shared,
        "blocks": chip.blocks,
    }
    # A launch is refused as if each sub-partition had the same number of the block's warps.
    if per_warp * -(-warps // PARTITIONS) * PARTITIONS > REGISTERS:
        room["registers"] = 0
    limit = min(room, key=lambda name: room[name])
    blocks = room[limit]
    return Occupancy(blocks, blocks * warps, limit, blocks * warps / chip.warps)


# ------------------------------------------------------------------------------------------------------ a bound on time

_FP32 = ("FFMA", "FMUL", "FADD", "FSWZADD", "HFMA2", "HADD2", "HMUL2")
_IMAD = ("IMAD", "IDP")
_FP64 = ("DFMA", "DMUL", "DADD", "DSETP", "DMNMX")
_XU = ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV")
_CONTROL = (*_ENDS, "CALL", "BSSY", "BSYNC", "BREAK", "BAR", "WARPSYNC", "YIELD", "NANOSLEEP")
_WAITS = ("DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "CCTL", "FENCE", "ARRIVES", "SYNCS")
_LOADS = ("LDG", "STG", "LDL", "STL", "LD", "ST", "LDGSTS", "RED", "ATOMG", "ATOM")
_SHARED = ("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDGSTS", "SHFL")
_CONSTANT = ("LDC", "LDCU", "S2R", "S2UR", "CS2R", "R2UR", "B2R", "R2B", "VOTE", "VOTEU", "MATCH", "REDUX")


@dataclass(frozen=True)
class Bound:
    """Clocks that a sub-partition needs for each resource for one warp's trip; the slowest of them, and the part of it
    in which the useful pipe works. An upper bound: no latency, no wait at a barrier, no bank conflict is in it, and
    other warps fill every gap. With one warp a sub-partition the pipes follow one another rather: `alone` is the part
    of their sum. What a device reaches lies between, nearer to `alone` the fewer warps there are."""

    cycles: dict[str, float]
    useful: float
    limit: str
    fraction: float
    alone: float

    def __str__(self) -> str:
        rest = "  ".join(f"{name} {n:.0f}" for name, n in sorted(self.cycles.items(), key=lambda kv: -kv[1]) if n)
        return f"{self.alone:.0%} to {self.fraction:.0%} of peak, limited by {self.limit} ({rest})"


def hmma_products(name: str) -> int:
    """Products of a warp's matrix instruction: HMMA.16816 is 16 x 8 x 16."""
    shape = next((part for part in name.split(".") if part.isdigit()), "16816")
    return {"16816": 2048, "1688": 1024, "1684": 512, "884": 256}.get(shape, 2048)


def wavefronts(name: str) -> float:
    """Clocks of the shared memory (128 bytes each) for one warp's access without conflicts, with every lane at an
    address of its own. Lanes that read one address may need fewer: then this is too many."""
    opcode = name.partition(".")[0]
    if opcode in ("LDSM", "STSM"):
        return 4 if name.endswith(".4") else 2 if name.endswith(".2") else 1
    if opcode == "SHFL":
        return 1  # 32 lanes a clock an SM (GUIDE, throughput table), through the same unit
    return max(width(name) // 32, 1)


def issue_bound(
    counts: Mapping[str, float],
    cc: CC,
    *,
    shared_wavefronts: float | None = None,
    global_bytes: float | None = None,
    useful: str | None = None,
    products: float | None = None,
) -> Bound:
    """The bound that each resource of a multiprocessor sets on one trip of a loop, from the instructions of one warp
    (Loop.counts). Four warps run at once, one in each sub-partition, so what all four share counts four times.

    shared_wavefronts: of the trip, counted by the emulator, instead of wavefronts(name) for each access.
    global_bytes: what one warp brings in from L2, instead of the widths of its loads (a hit in L1 costs none).
    useful: FFMA, DFMA or HMMA; the one that takes most of its pipe if left out. fraction is its pipe's share.
    products: how many of them are the tile's own products, where exp2 or an index needs some too.

    The pipes, after Nsight Compute's list and NVIDIA's forum (topic 302018): 8.0 has one fp32 pipe of 16 lanes a
    sub-partition that also does IMAD; from 8.6 on there are two halves of 16 lanes, and IMAD goes through one of them
    only (imad). Logic, compares, additions, selects and moves are the alu's, 16 lanes (GUIDE: 64 results a clock an
    SM). MUFU and conversions are the xu's: 4 lanes (GUIDE: 16). A uniform instruction takes an issue slot only.
    """
    chip = CHIPS[cc]
    lanes = 32 * PARTITIONS  # a warp instruction on a pipe of n results a clock an SM takes lanes / n clocks
    cycles = dict.fromkeys(("issue", "fp32", "imad", "alu", "fp64", "xu", "tensor", "shared", "l2"), 0.0)
    spent: Counter[str] = Counter()
    done: Counter[str] = Counter()
    for name, n in counts.items():
        opcode = name.partition(".")[0]
        cycles["issue"] += n
        if is_uniform(name) or opcode in _CONTROL or opcode in _WAITS or opcode in _CONSTANT:
            continue
        if opcode in _LOADS or opcode in _SHARED:
            if opcode in _SHARED:
                cycles["shared"] += n * wavefronts(name) * PARTITIONS
            if opcode in _LOADS:
                cycles["l2"] += n * max(width(name) // 8, 1) * 32 * PARTITIONS / chip.l2
            continue
        if opcode in _FP32 or opcode == "FFMA2" or opcode in _IMAD:
            pipe, cost = "fp32", lanes / chip.fp32 * (2 if opcode == "FFMA2" else 1)
            if opcode in _IMAD:
                cycles["imad"] += n * lanes / 64
        elif opcode in _FP64:
            pipe, cost = "fp64", lanes / chip.fp64
        elif opcode in _XU:
            pipe, cost = "xu", lanes / 16
        elif opcode == "HMMA":
            # tf32 runs at half the rate of float16 (white papers).
            pipe, cost = "tensor", hmma_products(name) * (2 if "TF32" in name else 1) / (chip.tensor / PARTITIONS)
        else:
            pipe, cost = "alu", lanes / 64
        cycles[pipe] += n * cost
        if opcode in ("FFMA", "FFMA2", "DFMA", "HMMA"):
            spent["FFMA" if opcode == "FFMA2" else opcode] += n * cost
            done["FFMA" if opcode == "FFMA2" else opcode] += n * (2 if opcode == "FFMA2" else 1)
    if shared_wavefronts is not None:
        cycles["shared"] = shared_wavefronts * PARTITIONS
    if global_bytes is not None:
        cycles["l2"] = global_bytes * PARTITIONS / chip.l2
    limit = max(cycles, key=lambda name: cycles[name])
    kind = useful or max(spent, key=lambda name: spent[name], default="FFMA")
    work = spent[kind] * (products / done[kind] if products is not None and done[kind] else 1)
    # The issue slots are the other pipes' own, and imad is part of fp32 or slower than it.
    pipes = {name: n for name, n in cycles.items() if name not in ("issue", "fp32", "imad")}
    total = sum(pipes.values()) + max(cycles["fp32"], cycles["imad"])
    return Bound(cycles, work, limit, work / max(cycles[limit], 1e-9), work / max(total, 1e-9))
