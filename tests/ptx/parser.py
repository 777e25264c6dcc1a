"""PTX text -> a Kernel: parameters, registers, variables, labels and statements, as written.

Statements keep their place in the text, so that a test can change one (tests/cuda/mutations.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import PTXError

# Bytes of a value of each type (section 5.2).
SIZE = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Statement:
    """One instruction of the kernel's body, with its place in the text (the semicolon included)."""

    start: int
    end: int
    line: int
    guard: str  # "", "@%p1" or "@!%p1"
    name: str  # the opcode with its modifiers
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def mods(self) -> list[str]:
        return self.name.split(".")[1:]

    @property
    def type(self) -> str:
        return self.mods[-1] if self.mods else ""

    def written(self, **changes: Any) -> str:
        """PTX text of it, with another guard, name or operands."""
        guard = changes.get("guard", self.guard)
        operands = ", ".join(changes.get("operands", self.operands))
        return f"{guard + ' ' if guard else ''}{changes.get('name', self.name)}{' ' + operands if operands else ''};"


@dataclass(frozen=True)
class Variable:
    """A variable of a state space (section 5.1), `size` bytes. size 0: shared memory whose size the launch tells."""

    space: str  # shared, local, global or const
    align: int
    size: int
    initial: bytes = b""


@dataclass
class Kernel:
    """An .entry. params: (name, type, bytes of an array or 0). registers: name -> type, where a name declared inside
    braces has the number of its scope behind it. labels: name -> the statement's number."""

    name: str
    target: str
    params: list[tuple[str, str, int]]
    maxntid: tuple[int, ...] = ()
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    lowered: Any = None  # what lowering.py made of it


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_SPACE = re.compile(r"\s+|\.(?:loc|file)\b[^\n]*")
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)")
_BODY = re.compile(r"(?:(@!?%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.(?:global|shared|local|const)\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(
    r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:(\[)(\d*)\])?\s*(?:=\s*(.*))?",
    re.S,
)
_REGISTERS = re.compile(r"(%?[\w$]+)(?:<(\d+)>)?")
_NAME = re.compile(r"(?<![\w$%.])%?[a-zA-Z_$][\w$]*")


def parse(ptx: str, name: str | None = None) -> Kernel:
    """One kernel of a module: the first, where name is None."""
    text = _without_comments(ptx)
    entry = _entry(text, name)
    close = text.index(")", entry.end())
    first, last = _body(text, close)
    target = re.search(r"\.target\s+(\w+)", text)
    if target is None:
        raise PTXError("no .target")
    bound = re.search(r"\.maxntid\s+([\d,\s]+)", text[close:first])
    kernel = Kernel(
        name=entry[1],
        target=target[1],
        params=[_param(part) for part in text[entry.end() : close].split(",") if part.strip()],
        maxntid=tuple(int(n) for n in bound[1].split(",") if n.strip()) if bound else (),
    )
    for outside in (text[: entry.start()], text[last:]):
        for part in outside.split(";"):
            if (at := re.search(r"\.(?:shared|global|const)\s", part)) is not None and ".entry" not in part:
                _declare(kernel, part[at.start() :])
    _read_body(kernel, text, first, last)
    return kernel


def statements(ptx: str, name: str | None = None) -> list[Statement]:
    """The instructions of one kernel as they are written, inline assembly included, calls left out."""
    text = _without_comments(ptx)
    first, last = _body(text, text.index(")", _entry(text, name).end()))
    return [part for kind, part in _parts(text, first, last) if kind == "statement" and part.opcode != "call"]


def _without_comments(ptx: str) -> str:
    """The same text, each place where it was."""
    return _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), ptx)


def _entry(text: str, name: str | None) -> re.Match[str]:
    for found in _ENTRY.finditer(text):
        if name in (None, found[1]):
            return found
    raise PTXError(f"no .entry {name or ''} in this PTX")


def _body(text: str, at: int) -> tuple[int, int]:
    """The places behind the opening brace of a function and of its closing one."""
    first = text.index("{", at) + 1
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, first):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return first, brace.start()
    raise PTXError("a brace is not closed")


def _param(text: str) -> tuple[str, str, int]:
    found = _PARAM.fullmatch(" ".join(text.split()))
    if found is None:
        raise PTXError(f"not a parameter: {text}")
    return found[2], found[1], int(found[3] or 0)


def _parts(text: str, at: int, end: int) -> Iterator[tuple[str, Any]]:
    """Braces, labels, directives and statements, one after the other."""
    while at < end:
        if found := _SPACE.match(text, at, end):
            at = found.end()
        elif text[at] in "{}":
            yield text[at], None
            at += 1
        elif found := _LABEL.match(text, at, end):
            yield "label", found[1]
            at = found.end()
        else:
            stop = text.find(";", at, end)
            if stop < 0:
                return
            part = text[at:stop].strip()
            if part.startswith("."):
                yield "directive", part
            elif found := _BODY.fullmatch(part):
                line = text.count("\n", 0, at) + 1
                yield "statement", Statement(at, stop + 1, line, found[1] or "", found[2], _operands(found[3]))
            elif part:
                raise PTXError(f"not a statement: {part}")
            at = stop + 1


def _operands(text: str) -> tuple[str, ...]:
    """What commas divide, vectors and addresses in one piece."""
    out, depth, last = [], 0, 0
    for n, sign in enumerate(text):
        depth += (sign in "{[(") - (sign in "}])")
        if sign == "," and not depth:
            out.append(" ".join(text[last:n].split()))
            last = n + 1
    tail = " ".join(text[last:].split())
    return (*out, tail) if tail else tuple(out)


def _read_body(kernel: Kernel, text: str, first: int, last: int) -> None:
    """Names that braces enclose, as inline assembly declares them, are others than the same names outside."""
    scopes: list[dict[str, str]] = []
    opened = 0
    for kind, part in _parts(text, first, last):
        if kind == "{":
            opened += 1
            scopes.append({"": f"@{opened}"})
        elif kind == "}":
            scopes.pop()
        elif kind == "label":
            kernel.labels[_renamed(part, scopes)] = len(kernel.statements)
        elif kind == "statement":
            own = part
            if any(len(scope) > 1 for scope in scopes):
                own = replace(part, guard=_renamed(part.guard, scopes),
                              operands=tuple(_renamed(operand, scopes) for operand in part.operands))  # fmt: skip
            kernel.statements.append(own)
        elif part.startswith(".reg"):
            _declare_registers(kernel, part, scopes)
        elif part.startswith((".local", ".shared")):
            _declare(kernel, part)


def _renamed(text: str, scopes: list[dict[str, str]]) -> str:
    def inner(found: re.Match[str]) -> str:
        return next((scope[found[0]] for scope in reversed(scopes) if found[0] in scope), found[0])

    return _NAME.sub(inner, text)


def _declare_registers(kernel: Kernel, text: str, scopes: list[dict[str, str]]) -> None:
    """.reg .b32 %r<4>, t;"""
    kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()  # type: ignore[union-attr]
    for part in names.split(","):
        found = _REGISTERS.fullmatch(part.strip())
        if found is None or kind not in SIZE:
            raise PTXError(f"not a register: {text}")
        for name in [found[1]] if found[2] is None else [f"{found[1]}{n}" for n in range(int(found[2]))]:
            own = name
            if scopes:
                own = scopes[-1][name] = name + scopes[-1][""]
            kernel.registers[own] = kind


def _declare(kernel: Kernel, text: str) -> None:
    """.shared .align 16 .b8 tile[4096]; .global .u32 table[2] = {1, 2};"""
    found = _VARIABLE.fullmatch(text.strip())
    if found is None:
        raise PTXError(f"not a variable: {text}")
    space, align, kind, name, array, count, values = found.groups()
    size = SIZE[kind]
    initial = b""
    if values is not None:
        numbers = [int(value, 0) for value in values.strip("{} \n").split(",") if value.strip()]
        initial = b"".join((n % (1 << (8 * size))).to_bytes(size, "little") for n in numbers)
    length = (int(count) if count else 0) if array else 1
    if length == 0 and space != "shared":
        length = len(initial) // size
    kernel.variables[name] = Variable(space, int(align or size), size * length, initial)
