"""What ptxas makes of a kernel's PTX: registers, spills, shared memory, and the instructions as sass.py has them.
No GPU is needed, and nothing is a timing.

    r = assemble(ptx, (8, 0))  # Resources; ToolError where no ptxas can read this PTX
    summary(ptx, (8, 0))       # one row of figures
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from sass import Program, Trips, amount, is_uniform, main_loop, parse, width

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
