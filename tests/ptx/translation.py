"""What each statement becomes: one function an opcode, or a row of arithmetic.TABLE."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import codes
from .arithmetic import NUMBER, TABLE
from .errors import PTXError
from .parser import SIZE, Statement

if TYPE_CHECKING:
    from .lowering import _Lowering

Rule = Callable[["_Lowering", Statement], None]
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")


def translate(at: _Lowering, s: Statement) -> None:
    rule = RULES.get(s.opcode, _arithmetic)
    if s.opcode in codes.FUNCTIONS and ("approx" in s.mods or "full" in s.mods):
        rule = _function
    rule(at, s)


# -------------------------------------------------------------------------------------------------- rows of the table


def _row_of(s: Statement) -> str:
    """The row's name: of the type itself, or of any type of as many bits. Rounding to nearest is not named."""
    left_out = ("rn", "full", "approx", "uni", "sync")
    mods = [m for m in s.mods[:-1] if m not in left_out]
    type_ = s.type
    if type_ not in SIZE:
        raise PTXError("not covered")
    others = [f"{type_[0] if type_[0] != 'b' else 'u'}{type_[1:]}", f"b{8 * SIZE[type_]}"]
    if type_[0] in "ft" or type_.startswith("bf"):  # only what moves bits is the same for floating point
        others = others[1:] if s.opcode in ("mov", "selp") else []
    for name in (type_, *others):
        found = ".".join([s.opcode, *mods, name])
        if found in NUMBER:
            return found
    raise PTXError("not covered")


def _arithmetic(at: _Lowering, s: Statement) -> None:
    """d = op(a, b, ...)"""
    name = _row_of(s)
    row = TABLE[name]
    if len(s.operands) != len(row.operands) + 1:
        if s.opcode in ("min", "max") and len(s.operands) == 4:  # of three numbers
            _of_three(at, s, name)
            return
        raise PTXError(f"{name} takes {len(row.operands)} operands")
    operands = [at.read(text, kind) for text, kind in zip(s.operands[1:], row.operands, strict=True)]
    place, after = at.write(s.operands[0], row.result, s.type[0] == "s")
    at.compute(name, place, *operands)
    after()


def _of_three(at: _Lowering, s: Statement, name: str) -> None:
    kind = TABLE[name].result
    first, second, third = (at.read(text, kind) for text in s.operands[1:])
    place, after = at.write(s.operands[0], kind)
    between = at.temporary(kind)
    at.compute(name, between, first, second)
    at.compute(name, place, between, third)
    after()


def _move(at: _Lowering, s: Statement) -> None:
    """mov of a register, of a variable's address, and between a register and a vector of its parts."""
    to, what = s.operands
    if to.startswith("{"):
        parts = at.vector(to)
        whole = 8 * SIZE[s.type]
        kind = f"b{whole // len(parts)}"
        source = at.read(what, f"b{whole}")
        # Through a temporary each: a part may be the register itself.
        done = []
        for n, part in enumerate(parts):
            if part != "_":
                between = at.temporary(kind)
                shift = at.constant(n * (whole // len(parts)), "b32")
                at.compute(f"part.{kind}.b{whole}", between, source, shift, always=True)
                done.append((part, between))
        for part, between in done:
            place, after = at.write(part, kind)
            at.compute(f"mov.{kind}", place, between)
            after()
    elif what.startswith("{"):
        parts = at.vector(what)
        whole = 8 * SIZE[s.type]
        kind = f"b{whole // len(parts)}"
        between = at.constant(0, f"b{whole}")
        for n, part in enumerate(parts):
            joined = at.temporary(f"b{whole}")
            shift = at.constant(n * (whole // len(parts)), "b32")
            at.compute(f"join.{kind}.b{whole}", joined, between, at.read(part, kind), shift, always=True)
            between = joined
        place, after = at.write(to, f"b{whole}")
        at.compute(f"mov.b{whole}", place, between)
        after()
    elif what in at.kernel.variables and s.type in ("u32", "b32", "s32") and what in at.globals:
        raise PTXError("an address of global memory has 64 bits")
    else:
        _arithmetic(at, s)


def _compare(at: _Lowering, s: Statement) -> None:
    """setp.lt{.and}{.ftz}.f32 p|q, a, b{, c}: p = (a < b) and c, q = not (a < b) and c."""
    order, *mods = s.mods[:-1]
    joins = [m for m in mods if m in ("and", "or", "xor")]
    kind = s.type if s.type[0] != "b" else "u" + s.type[1:]
    name = ".".join(["setp", order, *(m for m in mods if m == "ftz"), kind])
    if name not in TABLE:
        raise PTXError("not covered")
    operands = [at.read(text, k) for text, k in zip(s.operands[1:3], TABLE[name].operands, strict=True)]
    other = at.read(s.operands[3], "pred") if joins else -1
    results = [part.strip() for part in s.operands[0].split("|")]
    found = at.temporary("pred")
    at.compute(name, found, *operands, always=True)
    for n, result in enumerate(results):
        value = found
        if n:
            value = at.temporary("pred")
            at.compute("not.pred", value, found, always=True)
        place, _ = at.write(result, "pred")
        if joins:
            kept = at.temporary("pred")
            at.compute(f"{joins[0]}.pred", kept, value, other, always=True)
            value = kept
        at.compute("mov.pred", place, value)


def _set(at: _Lowering, s: Statement) -> None:
    """set.lt.u32.f32: all ones or 0; set.lt.f32.f32: 1 or 0."""
    order, *mods = s.mods[:-2]
    target, source = s.mods[-2:]
    if any(m in ("and", "or", "xor") for m in mods) or target not in ("u32", "s32", "b32", "f32"):
        raise PTXError("not covered")
    kind = source if source[0] != "b" else "u" + source[1:]
    name = ".".join(["setp", order, *(m for m in mods if m == "ftz"), kind])
    if name not in TABLE:
        raise PTXError("not covered")
    operands = [at.read(text, k) for text, k in zip(s.operands[1:], TABLE[name].operands, strict=True)]
    found = at.temporary("pred")
    at.compute(name, found, *operands, always=True)
    yes = at.constant(0x3F800000 if target == "f32" else -1, "b32")
    place, after = at.write(s.operands[0], "b32")
    at.compute("selp.b32", place, yes, at.constant(0, "b32"), found)
    after()


def _select_by_sign(at: _Lowering, s: Statement) -> None:
    """slct: the first where the third is 0 or more."""
    kind = f"b{8 * SIZE[s.mods[-2]]}"
    name = f"slct.f32.{kind}" if s.type == "f32" else f"slct.{kind}"
    if "ftz" in s.mods:
        raise PTXError("not covered")
    operands = [at.read(text, k) for text, k in zip(s.operands[1:], TABLE[name].operands, strict=True)]
    place, after = at.write(s.operands[0], kind)
    at.compute(name, place, *operands)
    after()


def _lop3(at: _Lowering, s: Statement) -> None:
    operands = [at.read(text, "b32") for text in s.operands[1:5]]
    place, after = at.write(s.operands[0], "b32")
    at.compute("lop3.b32", place, *operands)
    after()


def _shift(at: _Lowering, s: Statement) -> None:
    if s.opcode == "shf":
        way = f"{'l' if 'l' in s.mods else 'r'}.{'wrap' if 'wrap' in s.mods else 'clamp'}"
        operands = [at.read(text, "b32") for text in s.operands[1:]]
        place, after = at.write(s.operands[0], "b32")
        at.compute(f"shf.{way}.b32", place, *operands)
        after()
    else:
        _arithmetic(at, s)


def _convert(at: _Lowering, s: Statement) -> None:
    """cvt (section 9.7.9.21)."""
    types = [m for m in s.mods if m in SIZE]
    target, source = types
    mods = [m for m in s.mods if m not in types]
    floats = [t for t in types if t[0] in "fbt" and t[0:2] != "b8"]
    signed = target[0] == "s"
    if not floats and "sat" not in mods:
        have, want = SIZE[source], SIZE[target]
        bits, wanted = 8 * have, 8 * want
        operand = at.read(s.operands[1], f"b{bits}")
        place, after = at.write(s.operands[0], f"b{wanted}", signed)
        if have == want:
            name = f"mov.b{bits}" if bits > 8 else ""
        else:
            name = f"extend.{source}.b{wanted}" if want > have else f"cut.b{bits}.b{wanted}"
        at.compute(name, place, operand)
        after()
        return
    if "rn" in mods and target in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
        mods.remove("rn")  # the default, where it must be named
    if "sat" in mods and target[0] in "su" and source[0] == "f":
        mods.remove("sat")  # always so
    if "relu" in mods or any(m in ("rz", "rm", "rp") for m in mods):
        raise PTXError("not covered")
    flush = "ftz" in mods and "f32" in types
    mods = [m for m in mods if m != "ftz"]
    own = [target] if (target, source) in (("f32", "f32"), ("f64", "f64")) else [target, source]
    name = ".".join(["cvt", *mods, *(["ftz"] if flush and len(own) == 1 else []), *own])
    if name not in TABLE:
        raise PTXError("not covered")
    row = TABLE[name]
    operands = [at.read(text, kind) for text, kind in zip(s.operands[1:], row.operands, strict=True)]
    if flush and source == "f32" and len(own) == 2:
        flushed = at.temporary("f32")
        at.compute("cvt.ftz.f32", flushed, operands[0], always=True)
        operands = [flushed]
    place, after = at.write(s.operands[0], row.result, signed)
    at.compute(name, place, *operands)
    if flush and target == "f32" and len(own) == 2:
        at.compute("cvt.ftz.f32", place, place)
    after()


def _to_space(at: _Lowering, s: Statement) -> None:
    """cvta: between a space's own addresses and generic ones."""
    space = next((m.partition("::")[0] for m in s.mods if m.partition("::")[0] in codes.SPACES), "global")
    kind = f"b{8 * SIZE[s.type]}"
    operand = at.read(s.operands[1], kind)
    place, after = at.write(s.operands[0], kind)
    window = {"shared": codes.SHARED_WINDOW, "local": codes.LOCAL_WINDOW}.get(space, 0)
    if window:
        at.compute(f"{'sub' if 'to' in s.mods else 'add'}.{kind}", place, operand, at.constant(window, kind))
    else:
        at.compute(f"mov.{kind}", place, operand)
    after()


def _function(at: _Lowering, s: Statement) -> None:
    """approximate.py's."""
    if s.type not in ("f32", "f64"):
        raise PTXError("not covered")
    operands = [at.read(text, s.type) for text in s.operands[1:]]
    place, after = at.write(s.operands[0], s.type)
    at.emit(codes.APPROXIMATE, row=codes.FUNCTIONS.index(s.opcode), d=place, a=operands[0], b=operands[-1],
            size=SIZE[s.type], flush=int("ftz" in s.mods))  # fmt: skip
    after()


# ------------------------------------------------------------------------------------------------------------ memory


def _space(s: Statement) -> int:
    return next((codes.SPACES[m.partition("::")[0]] for m in s.mods if m.partition("::")[0] in codes.SPACES),
                codes.GENERIC)  # fmt: skip


def _load(at: _Lowering, s: Statement) -> None:
    if "param" in s.mods:
        name = s.operands[1].strip("[] ")
        if name not in at.parameters:
            raise PTXError("no such parameter, or a part of one")
        kind = f"b{8 * SIZE[s.type]}"
        source, size = at.parameters[name]
        if size < SIZE[s.type]:
            raise PTXError(f"the parameter has {size} bytes")
        place, after = at.write(s.operands[0], kind, s.type[0] == "s")
        # A parameter's place has 64 bits, of which these are the low ones.
        at.compute("mov.b64" if kind == "b64" else f"cut.b64.{kind}", place, source)
        after()
        return
    base, offset = at.address(s.operands[1])
    names = at.vector(s.operands[0])
    at.emit(codes.LOAD, a=base, offset=offset, space=_space(s), size=SIZE[s.type], count=len(names),
            signed=int(s.type[0] == "s"), list=at.listed(names, "b64", pad=True))  # fmt: skip


def _store(at: _Lowering, s: Statement) -> None:
    base, offset = at.address(s.operands[0])
    names = at.vector(s.operands[1])
    at.emit(codes.STORE, a=base, offset=offset, space=_space(s), size=SIZE[s.type], count=len(names),
            list=at.listed(names, f"b{8 * SIZE[s.type]}"))  # fmt: skip


def _atomic(at: _Lowering, s: Statement) -> None:
    """atom d, [a], b{, c} and red [a], b (sections 9.7.13.5 and 9.7.13.6)."""
    which = [m for m in s.mods if m in codes.ATOMICS]
    kind = f"b{8 * SIZE[s.type]}"
    if len(which) != 1 or kind not in ("b32", "b64"):
        raise PTXError("not covered")
    first = 1 if s.opcode == "atom" else 0
    base, offset = at.address(s.operands[first])
    b = at.read(s.operands[first + 1], kind)
    c = at.read(s.operands[first + 2], kind) if which[0] == "cas" else b
    place, after = at.write(s.operands[0], kind) if first else (at.temporary(kind), lambda: None)
    number = {"f32": 2, "f64": 2}.get(s.type, int(s.type[0] == "s"))
    at.emit(codes.ATOMIC, row=codes.ATOMICS.index(which[0]), d=place, a=base, b=b, c=c, offset=offset,
            space=_space(s), size=SIZE[s.type], signed=number)  # fmt: skip
    after()


def _copy(at: _Lowering, s: Statement) -> None:
    """cp.async (section 9.7.9.25). A source of fewer bytes than are copied is filled with zeros."""
    if "commit_group" in s.mods:
        at.emit(codes.COMMIT)
    elif "wait_group" in s.mods:
        at.emit(codes.WAIT, count=int(s.operands[0]))
    elif "wait_all" in s.mods:
        at.emit(codes.WAIT, count=-1)
    elif "async" in s.mods and "bulk" not in s.mods:
        to, to_offset = at.address(s.operands[0])
        source, offset = at.address(s.operands[1])
        if to_offset:
            moved = at.temporary("b64")
            at.compute("add.b64", moved, to, at.constant(to_offset, "b64"), always=True)
            to = moved
        size = int(s.operands[2])
        given = at.read(s.operands[3], "b32") if len(s.operands) > 3 else at.constant(size, "b32")
        at.emit(codes.COPY, d=to, a=source, offset=offset, b=given, size=4, count=size // 4)
    else:
        raise PTXError("not covered")


# -------------------------------------------------------------------------------------------------------------- warps


def _shuffle(at: _Lowering, s: Statement) -> None:
    """shfl.sync.bfly.b32 d|p, a, b, c, membermask (section 9.7.9.6)."""
    if "sync" not in s.mods:
        raise PTXError("not covered")
    a, b, c, members = (at.read(text, "b32") for text in s.operands[1:5])
    results = [part.strip() for part in s.operands[0].split("|")]
    place, after = at.write(results[0], "b32")
    inside, _ = at.write(results[1], "pred") if len(results) > 1 else (at.temporary("pred"), None)
    way = next(n for n, name in enumerate(codes.SHUFFLES) if name in s.mods)
    at.emit(codes.SHUFFLE, row=way, d=place, a=a, b=b, c=c, e=members, list=inside)
    after()


def _vote(at: _Lowering, s: Statement) -> None:
    """vote.sync.ballot.b32 d, p, membermask (section 9.7.13.9)."""
    if "sync" not in s.mods:
        raise PTXError("not covered")
    way = next((n for n, name in enumerate(codes.VOTES) if name in s.mods), -1)
    if way < 0:
        raise PTXError("not covered")
    a, members = at.read(s.operands[1], "pred"), at.read(s.operands[2], "b32")
    place, after = at.write(s.operands[0], "b32" if way == 0 else "pred")
    at.emit(codes.VOTE, row=way, d=place, a=a, e=members)
    after()


def _active(at: _Lowering, s: Statement) -> None:
    place, after = at.write(s.operands[0], "b32")
    at.emit(codes.VOTE, row=codes.VOTES.index("active"), d=place)
    after()


def _mma(at: _Lowering, s: Statement) -> None:
    """mma (section 9.7.14.5) with float32 sums."""
    shape = next(tuple(map(int, found.groups())) for m in s.mods if (found := _SHAPE.fullmatch(m)))
    kinds = [m for m in s.mods if m in SIZE]
    depths = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8)}
    if (
        kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] != kinds[2] or shape[:2] != (16, 8)
        or shape[2] not in depths.get(kinds[1], ()) or [m for m in s.mods if m in ("row", "col")] != ["row", "col"]
    ):  # fmt: skip
        raise PTXError("not covered")
    sets = [at.vector(operand) for operand in s.operands]
    registers = 4 * shape[2] // depths[kinds[1]][1]
    if [len(one) for one in sets] != [4, registers, registers // 2, 4]:
        raise PTXError("fragments of another shape")
    first = at.listed(sets[0], "b32", pad=True)
    for one in sets[1:]:
        at.listed(one, "b32")
    at.emit(codes.MMA, row=codes.MATRICES.index(kinds[1]), count=shape[2], list=first)


def _ldmatrix(at: _Lowering, s: Statement) -> None:
    """ldmatrix of one, two or four matrices of 8 x 8 numbers of 16 bits (section 9.7.14.5.15)."""
    names = at.vector(s.operands[0])
    count = next((int(m[1]) for m in s.mods if m in ("x1", "x2", "x4")), 0)
    if "m8n8" not in s.mods or s.type != "b16" or count != len(names):
        raise PTXError("not covered")
    base, offset = at.address(s.operands[1])
    at.emit(codes.LDMATRIX, a=base, offset=offset, count=count, space=_space(s), trans=int("trans" in s.mods),
            list=at.listed(names, "b32", pad=True))  # fmt: skip


RULES: dict[str, Rule] = {
    "mov": _move, "setp": _compare, "set": _set, "slct": _select_by_sign, "lop3": _lop3, "shf": _shift, "cvt": _convert,
    "cvta": _to_space, "ex2": _function, "lg2": _function, "sin": _function, "cos": _function, "tanh": _function,
    "rsqrt": _function, "ld": _load, "ldu": _load, "st": _store, "atom": _atomic, "red": _atomic, "cp": _copy,
    "shfl": _shuffle, "vote": _vote, "activemask": _active, "mma": _mma, "ldmatrix": _ldmatrix,
}  # fmt: skip
