"""Bugs put into a kernel's PTX on purpose: what the tests do not notice, they do not check.

    mutants = draw(ptx, seeds.generator(0), 200)
    report = survivors({"ragged": run_ragged, "causal": run_causal}, ptx, mutants)
    print(report)                          # found by numbers, races, bounds, ... for each kind
    for outcome in report.survived:
        print(context(ptx, outcome.mutation))

A mutant is one small change that a person could have made: a barrier left out, < for <=, an offset one element off, a
rescale forgotten, two fragments swapped. They are drawn, not picked, so nobody chooses the ones that are easily seen.
Each runs in the emulator on one problem after the other until one notices. What is left is a gap in the tests, or a
mutant that computes the same (a bound never met, an instruction with equal operands): a person judges, from context().
Softmax hides bugs: its result is the same for any maximum, so that a wrong row maximum is noticed only where the scores
lie so far apart, or so far from 0, that exp2 overflows or loses the row: some 150 from one key to the next, in log2
units. Have such a problem among the runs, and tiles without a key, NaN behind a mask and in sight, random schedules,
copies that land early and late, and head sizes at which a thread does not read back what it wrote itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from ptx import Hang, Launch, PTXError, Statement, parse, statements, watching

# ---------------------------------------------------------------------------------------------------------- the mutants


@dataclass(frozen=True)
class Mutation:
    """One statement replaced by another text (empty: removed)."""

    kind: str
    line: int
    before: str
    after: str
    start: int
    end: int

    def apply(self, ptx: str) -> str:
        return ptx[: self.start] + self.after + ptx[self.end :]

    def __str__(self) -> str:
        return f"{self.kind}, line {self.line}: {self.before}  ->  {self.after or '(removed)'}"


INTEGERS = frozenset(f"{sign}{bits}" for sign in "sub" for bits in (8, 16, 32, 64))
FLOATS = frozenset(("f16", "f16x2", "bf16", "bf16x2", "f32", "f64"))
_LITERAL = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)$")
_FLOAT_LITERAL = re.compile(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$")

Rule = Callable[[Statement], Iterator[str]]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    def keep(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return keep


def _replaced(items: tuple[str, ...], n: int, by: str) -> tuple[str, ...]:
    return (*items[:n], by, *items[n + 1 :])


def _swapped(items: tuple[str, ...], n: int, m: int) -> tuple[str, ...]:
    out = list(items)
    out[n], out[m] = out[m], out[n]
    return tuple(out)


def _renamed(s: Statement, old: str, new: str) -> str:
    parts = s.name.split(".")
    return s.written(name=".".join(new if part == old else part for part in parts))


def _bits(type_: str) -> int:
    return int(re.sub(r"\D", "", type_.replace("x2", "")) or 0) * (2 if type_.endswith("x2") else 1)


@rule("barrier")
def _barrier(s: Statement) -> Iterator[str]:
    """A barrier of the block or the warp left out."""
    if s.opcode in ("bar", "barrier") and "arrive" not in s.mods:
        yield ""


@rule("guard")
def _guard(s: Statement) -> Iterator[str]:
    """A predicate dropped, or the wrong way round; a branch never taken."""
    if s.guard:
        yield s.written(guard="")
        yield s.written(guard="@" + s.guard[2:] if s.guard.startswith("@!") else "@!" + s.guard[1:])
        if s.opcode in ("bra", "ret", "exit"):
            yield ""


_NEXT = {
    "lt": ("le", "gt"), "le": ("lt", "ge"), "gt": ("ge", "lt"), "ge": ("gt", "le"), "eq": ("ne",), "ne": ("eq",),
    "lo": ("ls", "hi"), "ls": ("lo", "hs"), "hi": ("hs", "lo"), "hs": ("hi", "ls"),
    "ltu": ("leu", "lt"), "leu": ("ltu", "le"), "gtu": ("geu", "gt"), "geu": ("gtu", "ge"), "equ": ("neu", "eq"),
    "neu": ("equ", "ne"), "num": ("nan",), "nan": ("num",),
}  # fmt: skip


@rule("compare")
def _compare(s: Statement) -> Iterator[str]:
    """< for <=, < for >, an ordered comparison for one that lets NaN pass."""
    if s.opcode in ("setp", "set"):
        for new in _NEXT.get(s.mods[0], ()):
            yield _renamed(s, s.mods[0], new)


@rule("predicate")
def _predicate(s: Statement) -> Iterator[str]:
    """Two conditions joined by the other word, or a "not" forgotten."""
    if s.opcode in ("and", "or", "xor") and s.type == "pred":
        yield s.written(name=f"{'and' if s.opcode != 'and' else 'or'}.pred")
    elif s.opcode == "not" and s.type == "pred":
        yield s.written(name="mov.pred")
    elif s.opcode == "setp" and len(s.operands) == 4 and (word := next((m for m in s.mods if m in ("and", "or")), "")):
        yield _renamed(s, word, "or" if word == "and" else "and")


@rule("index")
def _index(s: Statement) -> Iterator[str]:
    """A number in an address, an index or a bound that is off by one, by an element or by a power of two."""
    for n, operand in enumerate(s.operands):
        if (address := _ADDRESS.match(operand)) and "param" not in s.mods:
            offset = int(address[2] or "0", 0)
            vector = next((int(m[1]) for m in s.mods if m in ("v2", "v4", "v8")), 1)
            size = max(_bits(s.type) // 8, 1) * vector if s.opcode in ("ld", "st") else 16
            steps = (4, -4, 16, -16, size, -size, offset)
            for new in sorted({offset + step for step in steps} - {offset}):
                yield s.written(operands=_replaced(s.operands, n, f"[{address[1]}+{new}]"))
    if s.type not in INTEGERS:
        return
    if s.opcode in ("add", "sub", "mul", "mad"):
        change: Callable[[int], Iterable[int]] = lambda v: (v + 4, v - 4, v + 16, v - 16, 2 * v)  # noqa: E731
    elif s.opcode in ("shl", "shr", "setp", "min", "max"):
        change = lambda v: (v + 1, v - 1)  # noqa: E731
    elif s.opcode in ("and", "mov", "selp"):
        change = lambda v: (v + 1, 2 * v, v // 2)  # noqa: E731
    else:
        return
    for n, operand in enumerate(s.operands[1:], 1):
        if _LITERAL.match(operand):
            value = int(operand, 0)
            most = 64 if s.opcode in ("shl", "shr") else 2**31
            for new in sorted(set(change(value)) - {value}):
                if -(2**31) <= new < most and (new >= 0 or s.type[0] == "s" or (value < 0 and s.type[0] == "b")):
                    yield s.written(operands=_replaced(s.operands, n, str(new)))


@rule("fragment")
def _fragment(s: Statement) -> Iterator[str]:
    """Two registers of a fragment or of a vector in each other's place, the halves of a pair swapped."""
    pairs = s.opcode in ("mma", "ldmatrix") or (s.opcode in ("ld", "st") and any(m in ("v2", "v4") for m in s.mods))
    if pairs or (s.opcode == "mov" and any("{" in operand for operand in s.operands)):
        for n, operand in enumerate(s.operands):
            if operand.startswith("{"):
                registers = tuple(part.strip() for part in operand.strip("{}").split(","))
                for a, b in combinations(range(len(registers)), 2):
                    if registers[a] != registers[b]:
                        swapped = "{" + ", ".join(_swapped(registers, a, b)) + "}"
                        yield s.written(operands=_replaced(s.operands, n, swapped))
    elif s.opcode == "cvt" and s.mods[-2:-1] in (["f16x2"], ["bf16x2"]) and s.operands[1] != s.operands[2]:
        yield s.written(operands=_swapped(s.operands, 1, 2))
    elif s.opcode == "prmt" and _LITERAL.match(s.operands[-1]):
        for new in (0x5410, 0x7632, 0x1054):
            if new != int(s.operands[-1], 0):
                yield s.written(operands=_replaced(s.operands, len(s.operands) - 1, f"0x{new:x}"))


@rule("operands")
def _swap(s: Statement) -> Iterator[str]:
    """Two operands exchanged where it matters."""
    which = None
    if s.opcode in ("sub", "div", "rem") and s.type in INTEGERS | FLOATS:
        which = (1, 2)
    elif (s.opcode == "fma" and s.type in FLOATS) or (s.opcode == "mad" and "lo" in s.mods):
        which = (2, 3)
    elif s.opcode == "selp":
        which = (1, 2)
    if which and s.operands[which[0]] != s.operands[which[1]]:
        yield s.written(operands=_swapped(s.operands, *which))


@rule("rescale")
def _rescale(s: Statement) -> Iterator[str]:
    """A factor forgotten: a * b becomes a, a * b + c becomes a + c."""
    if s.type not in FLOATS or s.opcode not in ("mul", "fma"):
        return
    for kept in dict.fromkeys(s.operands[1:3]):
        if s.opcode == "fma":
            flush = ".ftz" if "ftz" in s.mods else ""
            yield s.written(name=f"add{flush}.{s.type}", operands=(s.operands[0], kept, s.operands[3]))
        elif s.type in ("f32", "f64"):
            yield s.written(name=f"mov.{s.type}", operands=(s.operands[0], kept))


@rule("shuffle")
def _shuffle(s: Statement) -> Iterator[str]:
    """Another lane, a narrower segment, or no shuffle at all."""
    if s.opcode != "shfl":
        return
    if _LITERAL.match(s.operands[2]):
        lane = int(s.operands[2], 0)
        for new in (1, 2, 4, 8, 16) if "bfly" in s.mods else (lane + 1,):
            if new != lane:
                yield s.written(operands=_replaced(s.operands, 2, str(new)))
    if _LITERAL.match(s.operands[3]) and int(s.operands[3], 0) == 31:
        yield s.written(operands=_replaced(s.operands, 3, "15"))
    if "|" not in s.operands[0]:
        yield s.written(name="mov.b32", operands=s.operands[:2])


@rule("async")
def _async(s: Statement) -> Iterator[str]:
    """One copy more left in flight, a group never closed, hidden rows not filled with zeros, or never copied."""
    if s.opcode != "cp":
        return
    if "wait_group" in s.mods:
        yield s.written(operands=(str(int(s.operands[0]) + 1),))
        yield ""
    elif "wait_all" in s.mods or "commit_group" in s.mods:
        yield ""
    elif "shared" in ".".join(s.mods) and len(s.operands) >= 3:
        if len(s.operands) > 3:
            yield s.written(operands=s.operands[:3])
        yield s.written(operands=(*s.operands[:3], "0"))
        yield ""


@rule("matrix")
def _matrix(s: Statement) -> Iterator[str]:
    """ldmatrix with .trans lost or gained."""
    if s.opcode == "ldmatrix":
        if "trans" in s.mods:
            yield s.written(name=s.name.replace(".trans", ""))
        else:
            yield s.written(name=re.sub(r"(\.x[124])", r"\1.trans", s.name))


@rule("function")
def _function(s: Statement) -> Iterator[str]:
    """A function not called."""
    if s.opcode in ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "abs", "neg") and s.type in ("f32", "f64"):
        yield s.written(name=f"mov.{s.type}")


@rule("extremum")
def _extremum(s: Statement) -> Iterator[str]:
    """max for min."""
    if s.opcode in ("max", "min") and s.type in INTEGERS | FLOATS:
        other = "min" if s.opcode == "max" else "max"
        yield s.written(name=other + s.name[3:])
        if s.type in ("f32", "f64") and len(s.operands) == 3:
            for kept in s.operands[1:]:
                yield s.written(name=f"mov.{s.type}", operands=(s.operands[0], kept))


@rule("constant")
def _constant(s: Statement) -> Iterator[str]:
    """Another floating-point constant: 0, 1, an infinity, the double."""
    for n, operand in enumerate(s.operands[1:], 1):
        if _FLOAT_LITERAL.match(operand):
            double = operand[1] in "dD"
            kind, raw = (np.float64, np.uint64) if double else (np.float32, np.uint32)
            value = np.array([int(operand[2:], 16)], raw).view(kind)[0]
            with np.errstate(over="ignore"):
                others = np.array([0, 1, -np.inf, np.inf, 2 * value], kind)
            for bits in dict.fromkeys(int(v) for v in others.view(raw)):
                if bits != int(operand[2:], 16):
                    literal = f"0d{bits:016X}" if double else f"0f{bits:08X}"
                    yield s.written(operands=_replaced(s.operands, n, literal))


@rule("store")
def _store(s: Statement) -> Iterator[str]:
    """A result not written."""
    if s.opcode in ("st", "red"):
        yield ""


KINDS = tuple(RULES)


def candidates(ptx: str, kinds: Iterable[str] = KINDS) -> dict[str, list[Mutation]]:
    """Every mutation of each kind."""
    code = statements(ptx)
    out: dict[str, list[Mutation]] = {kind: [] for kind in kinds}
    for kind, found in out.items():
        for s in code:
            before = " ".join(ptx[s.start : s.end].split())
            for after in dict.fromkeys(RULES[kind](s)):
                if after != s.written():
                    found.append(Mutation(kind, s.line, before, after, s.start, s.end))
    return out


def draw(ptx: str, rng: np.random.Generator, n: int, kinds: Iterable[str] = KINDS) -> list[Mutation]:
    """n different mutations (fewer where there are not so many), each kind as likely as the others, then each mutation
    of the kind: else an unrolled kernel would have little but exchanged operands of fma. Every one can be parsed."""
    left = {kind: found for kind, found in candidates(ptx, kinds).items() if found}
    out: list[Mutation] = []
    while left and len(out) < n:
        kind = list(left)[int(rng.integers(len(left)))]
        found = left[kind]
        mutation = found.pop(int(rng.integers(len(found))))
        if not found:
            del left[kind]
        parse(mutation.apply(ptx))
        out.append(mutation)
    return out


# ---------------------------------------------------------------------------------------------------------- the verdict

CLASSES = ("numbers", "race", "bounds", "uninitialised", "sync", "hang")
# What the emulator says, by its own words.
_WORDS = {
    "race": re.compile(r"\bRACE\b"),
    "bounds": re.compile(r"OUT-OF-BOUNDS|MISALIGNED|WILD"),
    "uninitialised": re.compile(r"UNINITIALISED"),
    "sync": re.compile(r"\bSYNC\b"),
    "hang": re.compile(r"\bHang\b"),
}


def findings(launch: Launch, wrong: str | None = None) -> str | None:
    """What a run has to say, for a runner to return: `wrong` if the numbers are, and every message of the checks."""
    said = [f"{kind} x{count}: {text}" for (kind, text), count in launch.findings.items()]
    return "\n".join(([f"numbers: {wrong}"] if wrong else []) + said) or None


def classify(said: str) -> frozenset[str]:
    """The classes of a finding; numbers where no word of the emulator's is in it, or it begins so."""
    found = {name for name, words in _WORDS.items() if words.search(said)}
    if not found or said.startswith("numbers"):
        found.add("numbers")
    return frozenset(found)


@dataclass(frozen=True)
class Outcome:
    """classes is empty for a survivor; invalid says that the emulator could not run it, which proves nothing."""

    mutation: Mutation
    classes: frozenset[str]
    text: str
    shape: str  # the first problem that noticed
    invalid: bool = False
    stopped: bool = False  # by an error, before there were numbers to look at
    # Of a survivor: whether any problem runs the changed statement, and whether all results have the same bits.
    reached: bool = True
    same: bool = False

    @property
    def fate(self) -> str:
        """The first of FATES that fits."""
        if self.invalid:
            return "invalid"
        if self.classes:
            return next(name for name in CLASSES if name in self.classes)
        return "unreached" if not self.reached else "same" if self.same else "survived"

    @property
    def survived(self) -> bool:
        return not self.classes and not self.invalid

    def __str__(self) -> str:
        if not self.survived:
            return f"{self.mutation}\n    {self.shape}: {self.text.splitlines()[0][:200]}"
        why = {"unreached": "no problem runs it", "same": "the same bits", "survived": "other bits, not noticed"}
        return f"{self.mutation}\n    survived: {why[self.fate]}"


# Noticed by what; no evidence; and what is left: never run, run with the same results, run with others.
FATES = (*CLASSES, "invalid", "unreached", "same", "survived")


@dataclass(frozen=True)
class Report:
    outcomes: list[Outcome]

    @property
    def survived(self) -> list[Outcome]:
        """What nothing noticed, the worst first: other bits in the results, then what no problem runs (give it one),
        then the same bits (a problem that would tell is missing, or there is none)."""
        order = ("survived", "unreached", "same")
        return sorted((o for o in self.outcomes if o.survived), key=lambda o: order.index(o.fate))

    @property
    def invalid(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.invalid]

    @property
    def silent(self) -> list[Outcome]:
        """Noticed, but with the right numbers: only a check of the emulator's saw them."""
        return [o for o in self.outcomes if o.classes and "numbers" not in o.classes and not o.stopped]

    def __str__(self) -> str:
        """A table: kinds by fate."""
        rows: dict[str, Counter[str]] = {}
        for o in self.outcomes:
            rows.setdefault(o.mutation.kind, Counter())[o.fate] += 1
        total: Counter[str] = sum(rows.values(), Counter())
        lines = [f"{'':10}" + "".join(f"{fate:>14}" for fate in FATES)]
        for kind, row in [*sorted(rows.items()), ("all", total)]:
            lines.append(f"{kind:10}" + "".join(f"{row[fate] or '-':>14}" for fate in FATES))
        return "\n".join(lines)


Run = Callable[[str], str | None]


def survivors(
    run: Run | Mapping[str, Run],
    ptx: str,
    mutations: Iterable[Mutation],
    *,
    slack: float = 3,
    progress: Callable[[Outcome], None] | None = None,
) -> Report:
    """Run every mutant on one problem after the other, until one notices it.

    run takes PTX text and launches it in the emulator; it returns None where all is well, else what is wrong (findings
    makes such a text), or raises: an AssertionError without the emulator's words means wrong numbers. Several runs (a
    dict by name) are several problems, so that a bound that one shape never meets is met by another: put the quick and
    telling ones first.
    slack: a mutant that takes so many times the steps of the kernel itself hangs.
    """
    name, places = _places(ptx)
    runs: Mapping[str, Run] = run if isinstance(run, Mapping) else {"": run}
    traces = {}
    for shape, go in runs.items():
        with watching() as traces[shape]:
            said = go(ptx)
        if said is not None:
            raise ValueError(f"the kernel itself does not pass {shape or 'its problem'}: {said}")
    reached = {n for trace in traces.values() for kernel, n in trace.reached if kernel == name}
    outcomes = []
    for mutation in mutations:
        mutant = mutation.apply(ptx)
        same = True
        for shape, go in runs.items():
            outcome, results = _outcome(mutation, go, mutant, slack * traces[shape].steps + 1000, shape)
            same = same and results == traces[shape].results
            if not outcome.survived:
                break
        else:
            outcome = Outcome(mutation, frozenset(), "", "", reached=places[mutation.start] in reached, same=same)
        outcomes.append(outcome)
        if progress is not None:
            progress(outcome)
    return Report(outcomes)


def _places(ptx: str) -> tuple[str, dict[int, int]]:
    """The kernel's name, and the number that the emulator gives to the statement at each place of the text."""
    kernel = parse(ptx)
    return kernel.name, {s.start: n for n, s in enumerate(kernel.statements)}


def _outcome(mutation: Mutation, go: Run, mutant: str, limit: float, shape: str) -> tuple[Outcome, list[bytes]]:
    invalid = stopped = True
    classes: frozenset[str] = frozenset()
    with watching(limit) as trace:
        try:
            text = go(mutant) or ""
            classes, invalid, stopped = classify(text) if text else frozenset(), False, False
        except AssertionError as error:
            # Of a comparison of numbers, or of a device that raises what the checks found.
            classes, text, invalid = classify(str(error)), str(error), False
            stopped = "numbers" not in classes
        except Hang as error:
            classes, text, invalid = frozenset(["hang"]), str(error), False
        except PTXError as error:
            # What the checks raise has their words; anything else is code that the emulator cannot run.
            classes, text = classify(str(error)) - {"numbers"}, str(error)
            invalid = not classes
        except Exception as error:
            # The emulator's own fault, on code that no compiler emits: no evidence either way.
            text = f"{type(error).__name__}: {error}"
    return Outcome(mutation, classes, text, shape, invalid=invalid, stopped=stopped), trace.results


def context(ptx: str, mutation: Mutation, lines: int = 4, uses: int = 6) -> str:
    """The mutant with the lines around it, and where what it writes is read: for a person to judge a survivor."""
    rows = ptx.splitlines()
    out = [str(mutation)]
    for n in range(max(mutation.line - 1 - lines, 0), min(mutation.line + lines, len(rows))):
        out.append(f"{'>' if n == mutation.line - 1 else ' '} {n + 1:6d}  {' '.join(rows[n].split())[:110]}")
    changed = next((s for s in statements(ptx) if s.start == mutation.start), None)
    if changed is not None and changed.operands and changed.opcode not in ("st", "red", "bra", "bar"):
        for register in re.findall(r"%[\w$]+", changed.operands[0]):
            word = re.compile(re.escape(register) + r"(?![\w$])")
            reads = [
                s.line
                for s in statements(ptx)
                if word.search(s.guard) or any(word.search(o) for o in s.operands[s.opcode not in ("st", "red") :])
            ]
            out.append(f"  {register} is read on lines {', '.join(map(str, reads[:uses])) or '(none)'}"
                       f"{' ...' if len(reads) > uses else ''}")  # fmt: skip
    return "\n".join(out)
