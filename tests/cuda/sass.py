"""The machine code (SASS) of a kernel as nvdisasm prints it: instructions, their control flow, and loops, with how
often each instruction runs.

    loop = main_loop(ptxas.assemble(ptx, (8, 0)).program)  # the key loop of an attention kernel
    loop.counts(trips=16)                                  # nested loops (over the head size) weighted by 16
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

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
        return self.jumps or self.opcode in ENDS

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
ENDS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL")  # what ends a basic block


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
