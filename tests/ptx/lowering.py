"""Statements -> operations on numbers (codes.py), for the interpreter.

Every operand becomes a place in the registers of a warp: constants, parameters and special registers have places as
well, which are filled before a block starts. A value that is read from a wider register is cut by an operation of its
own, and one that is written to a wider register is extended by another (tables 27 and 28 of the manual).
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import codes
from .arithmetic import LANES, NUMBER
from .errors import PTXError
from .parser import SIZE, Kernel, Statement

# Instructions that all living lanes of a warp execute together.
TOGETHER = ("bar", "barrier", "shfl", "vote", "mma", "ldmatrix")
# What changes nothing here: memory is ordered, caches are not modelled.
NOTHING = ("membar", "fence", "prefetch", "prefetchu", "griddepcontrol", "nanosleep", "createpolicy", "discard",
           "applypriority")  # fmt: skip
_ADDRESS = re.compile(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_INTEGER = re.compile(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?")
_BITS = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")


@dataclass
class Program:
    """A kernel for the interpreter. places: name -> where it is in a warp's registers."""

    operations: np.ndarray
    blocks: np.ndarray
    pool: np.ndarray
    file_bytes: int
    constants: list[tuple[int, int, int]]  # place, bytes, bits
    parameters: dict[str, tuple[int, int]]  # name -> place, bytes
    globals: dict[str, int]  # variable -> the place of its address
    special: dict[str, int]
    launch: dict[str, int]
    shared_bytes: int  # static
    local_bytes: int
    statements: list[Statement]


def lower(kernel: Kernel) -> Program:
    """Kept with the kernel."""
    if kernel.lowered is None:
        kernel.lowered = _Lowering(kernel).program()
    program: Program = kernel.lowered
    return program


def kind_of(type_: str) -> str:
    """The kind of arithmetic.TABLE's operands that holds a type."""
    if type_ in ("pred", "f32", "f64"):
        return type_
    if type_ not in SIZE or SIZE[type_] > 8:
        raise PTXError(f"type .{type_}")
    return f"b{8 * SIZE[type_]}"


def _bytes(kind: str) -> int:
    return 4 if kind == "pred" else SIZE[kind] * LANES


@dataclass
class _Lowering:
    kernel: Kernel
    places: dict[str, int] = field(default_factory=dict)
    size: int = 0
    operations: list[dict[str, int]] = field(default_factory=list)
    pool: list[int] = field(default_factory=list)
    constants: dict[tuple[int, int], int] = field(default_factory=dict)
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    globals: dict[str, int] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    launch: dict[str, int] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)  # of shared and local variables
    shared_bytes: int = 0
    local_bytes: int = 0
    spare: dict[str, list[int]] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    statement: int = 0
    guard: tuple[int, int] = (-1, 0)

    # ------------------------------------------------------------------------------------------------------- places

    def _room(self, nbytes: int) -> int:
        place = self.size
        self.size += nbytes
        return place

    def _layout(self) -> None:
        """Registers in order of their size, so that each is aligned. Variables as they were declared."""
        for wanted in (8, 4, 2, 1):
            for name, type_ in self.kernel.registers.items():
                if SIZE[type_] == wanted:
                    self.places[name] = self._room(_bytes(kind_of(type_)))
        self.size += -self.size % 256
        shared = [(n, v) for n, v in self.kernel.variables.items() if v.space == "shared"]
        for name, variable in sorted(shared, key=lambda item: item[1].size == 0):
            # Dynamic shared memory lies behind all that is static.
            self.shared_bytes += -self.shared_bytes % variable.align
            self.addresses[name] = self.shared_bytes
            self.shared_bytes += variable.size
        for name, variable in self.kernel.variables.items():
            if variable.space == "local":
                self.local_bytes += -self.local_bytes % variable.align
                self.addresses[name] = self.local_bytes
                self.local_bytes += variable.size
            elif variable.space in ("global", "const"):
                self.globals[name] = self._room(8 * LANES)
        for name, type_, array in self.kernel.params:
            self.parameters[name] = self._room(8 * LANES), array or SIZE[type_]

    def temporary(self, kind: str) -> int:
        """A place that nothing else in this statement has."""
        places = self.spare.setdefault(kind, [])
        n = self.taken.get(kind, 0)
        self.taken[kind] = n + 1
        if n == len(places):
            places.append(self._room(max(_bytes(kind), 64)))
        return places[n]

    def constant(self, bits: int, kind: str) -> int:
        size = _bytes(kind)
        bits &= (1 << (32 if kind == "pred" else 8 * SIZE[kind])) - 1
        if (bits, size) not in self.constants:
            self.constants[bits, size] = self._room(max(size, 64))
        return self.constants[bits, size]

    # ------------------------------------------------------------------------------------------------------- operands

    def read(self, text: str, kind: str) -> int:
        """Where an operand is, as a number of this kind."""
        if kind == "pred":
            return self._read_predicate(text)
        if text in self.kernel.registers:
            have = kind_of(self.kernel.registers[text])
            if SIZE[have] == SIZE[kind]:
                return self.places[text]
            if SIZE[have] < SIZE[kind] or have == "pred":
                raise PTXError(f"{text} has fewer bits than are read from it")
            place = self.temporary(kind)
            self.compute(f"cut.b{8 * SIZE[have]}.b{8 * SIZE[kind]}", place, self.places[text], always=True)
            return place
        if text.startswith("%"):
            return self._read_special(text, kind)
        if text in self.addresses:
            return self.constant(self.addresses[text], kind)
        if text in self.globals:
            return self.globals[text]
        if (found := _BITS.fullmatch(text)) is not None:
            return self.constant(int(found[1] or found[2], 16), kind)
        if (found := _INTEGER.fullmatch(text)) is not None:
            number = int(found[1], 0)
            if kind in ("f32", "f64"):
                form = "<f" if kind == "f32" else "<d"
                number = int.from_bytes(struct.pack(form, number), "little")
            return self.constant(number, kind)
        raise PTXError(f"operand {text}")

    def _read_predicate(self, text: str) -> int:
        if text.startswith("!"):
            place = self.temporary("pred")
            self.compute("not.pred", place, self._read_predicate(text[1:]), always=True)
            return place
        if self.kernel.registers.get(text) == "pred":
            return self.places[text]
        if text in ("0", "1", "-1"):  # a constant: of all lanes
            return self.constant(0 if text == "0" else -1, "pred")
        raise PTXError(f"predicate {text}")

    def _read_special(self, text: str, kind: str) -> int:
        if text in codes.SPECIAL:
            known = self.special
        elif text in codes.LAUNCH:
            known = self.launch
        else:
            raise PTXError(f"special register {text}")
        if text not in known:
            known[text] = self._room(8 * LANES)
        if SIZE[kind] == 8 and text in codes.SPECIAL:
            raise PTXError(f"{text} has 32 bits")
        return known[text]

    def write(self, text: str, kind: str, signed: bool = False) -> tuple[int, Callable[[], None]]:
        """Where a result goes, and what is to be done once it is there."""
        if text == "_":
            return self.temporary(kind), lambda: None
        type_ = self.kernel.registers.get(text)
        if type_ is None:
            raise PTXError(f"{text} is no register")
        have = kind_of(type_)
        if have == kind or (SIZE[have] == SIZE[kind] and "pred" not in (have, kind)):
            return self.places[text], lambda: None
        if SIZE[have] < SIZE[kind] or "pred" in (have, kind):
            raise PTXError(f"{text} has fewer bits than are written to it")
        place = self.temporary(kind)
        name = f"extend.{'s' if signed else 'u'}{8 * SIZE[kind]}.b{8 * SIZE[have]}"
        return place, lambda: self.compute(name, self.places[text], place)

    def address(self, text: str) -> tuple[int, int]:
        """Of [base+offset]: where the base is, as 64 bits, and the offset."""
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise PTXError(f"address {text}")
        base, offset = found[1], int(found[2] or "0", 0)
        if base in self.kernel.registers and SIZE[self.kernel.registers[base]] == 4:
            place = self.temporary("b64")
            self.compute("extend.u32.b64", place, self.places[base], always=True)
            return place, offset
        return self.read(base, "b64"), offset

    def vector(self, text: str) -> list[str]:
        return [part.strip() for part in text.strip("{}").split(",")]

    def listed(self, names: list[str], kind: str, pad: bool = False) -> int:
        """The registers of a vector, in the pool: place and bytes of each."""
        pairs = []
        for name in names:
            if pad and name == "_":
                pairs.append((self.temporary("b64"), 8))
            elif name in self.kernel.registers:
                pairs.append((self.places[name], SIZE[self.kernel.registers[name]]))
            else:
                pairs.append((self.read(name, kind), SIZE[kind]))
        first = len(self.pool)
        for pair in pairs:
            self.pool += pair
        return first

    # ------------------------------------------------------------------------------------------------------ operations

    def emit(self, op: int, always: bool = False, **fields: int) -> None:
        """always: lanes whose guard is false too; only where nothing is seen of it."""
        guard, negate = (-1, 0) if always else self.guard
        self.operations.append({"op": op, "guard": guard, "negate": negate, "statement": self.statement, **fields})

    def compute(self, name: str, result: int, *operands: int, always: bool = False) -> None:
        if name not in NUMBER:
            raise PTXError(f"{name} is not covered")
        fields = dict(zip("abce", operands, strict=False))
        self.emit(codes.COMPUTE, always, row=NUMBER[name], d=result, **fields)

    # --------------------------------------------------------------------------------------------------- all statements

    def program(self) -> Program:
        from .translation import translate  # the statements' own file, which needs this class

        self._layout()
        statements = self.kernel.statements
        starts = []
        for self.statement, s in enumerate(statements):
            starts.append(len(self.operations))
            self.taken.clear()
            try:
                self.guard = self._guard(s)
                if s.opcode not in ("bra", "ret", "exit", "trap", "bar", "barrier", *NOTHING):
                    translate(self, s)
            except PTXError as error:
                raise PTXError(f"{error}: `{s.written()}`") from None
        starts.append(len(self.operations))
        blocks = self._blocks(starts)
        operations = np.zeros(len(self.operations), codes.OPERATION)
        for name in codes.OPERATION.names or ():
            operations[name] = [one.get(name, 0) for one in self.operations]
        for block in blocks:
            mine = operations["op"][block["first"] : block["last"]]
            block["copies"] = np.count_nonzero(mine == codes.COPY)
        return Program(
            operations, blocks, np.array([*self.pool, 0], np.int64), self.size + -self.size % 256,
            [(place, size, bits) for (bits, size), place in self.constants.items()],
            self.parameters, self.globals, self.special, self.launch,
            self.shared_bytes, self.local_bytes, statements,
        )  # fmt: skip

    def _guard(self, s: Statement) -> tuple[int, int]:
        if not s.guard:
            return -1, 0
        return self._read_predicate(s.guard.lstrip("@!")), int(s.guard.startswith("@!"))

    def _blocks(self, starts: list[int]) -> np.ndarray:
        """Basic blocks begin at labels, behind jumps, and around what a warp does together."""
        statements, labels = self.kernel.statements, self.kernel.labels
        leaders = {0, len(statements), *labels.values()}
        for n, s in enumerate(statements):
            if s.opcode in ("bra", "ret", "exit", "trap"):
                leaders.add(n + 1)
            elif s.opcode in TOGETHER:
                leaders |= {n, n + 1}
        order = sorted(leaders)
        number = {leader: n for n, leader in enumerate(order)}
        blocks = np.zeros(len(order) - 1, codes.BLOCK)
        for n, (first, last) in enumerate(itertools.pairwise(order)):
            self.statement = last - 1
            s = statements[last - 1]
            try:
                guard, negate = self._guard(s)
                end, target = self._end(s, number)
            except PTXError as error:
                raise PTXError(f"{error}: `{s.written()}`") from None
            blocks[n] = (starts[first], starts[last], end, guard, negate, target, last - 1, s.opcode in TOGETHER, 0)
            if end == codes.BARRIER:
                blocks[n]["together"] = 0
        return blocks

    def _end(self, s: Statement, number: dict[int, int]) -> tuple[int, int]:
        if s.opcode == "bra":
            if s.operands[0] not in self.kernel.labels:
                raise PTXError("no such label")
            return codes.JUMP, number[self.kernel.labels[s.operands[0]]]
        if s.opcode in ("ret", "exit"):
            return codes.RETURN, 0
        if s.opcode == "trap":
            return codes.TRAP, 0
        if s.opcode in ("bar", "barrier"):
            if "warp" in s.mods:
                return codes.WARP_BARRIER, 0
            if "sync" not in s.mods or len(s.operands) > 1:
                raise PTXError("only barriers of the whole block are covered")
            return codes.BARRIER, 0
        return codes.FALL, 0
