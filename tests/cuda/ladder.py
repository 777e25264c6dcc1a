"""The kernels' first rung: every CUDA kernel compiled for every target, and what ptxas made of it.

    python tests/cuda/ladder.py --write --profile    # resources.json anew; an hour on one core
    python tests/cuda/ladder.py --missing            # what it lacks
    python tests/cuda/ladder.py --docs               # the tables of docs/cuda.md, from resources.json, into that page
    python tests/cuda/ladder.py sm_80,sm_90 "forward f16 64"    # measure and print

A kernel has a name, "forward f16 64": what it computes, dtype, head size, then what else it was compiled with. It is
measured with the tile that a device with the target's shared memory gets. Nothing here is a timing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 1, 2)]

import sass
from multiprocessor import PARTITIONS, issue_bound, occupancy
from ptxas import CC, TARGETS, assemble, summary

STORED = Path(__file__).with_name("resources.json")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "cuda.md"
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}  # KB a block can have
DIMS = (64, 128, 256, 32, 96, 192)
PROFILED = {"a100": "sm_80", "h100": "sm_90"}
TARGET = {f"sm_{a}{b}": (a, b) for a, b in TARGETS}


# -------------------------------------------------------------------------------------------------------- the kernels


@dataclass(frozen=True)
class Kernel:
    """One kernel as it is launched. dtype: f16, bf16, f32, tf32 or f64. variant: of FEATURES."""

    what: str
    dtype: str
    dim: int = 0
    variant: str = ""

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.what, self.dtype, self.dim, self.variant) if part)


def t5(s, b, h, i, j, table):  # type: ignore[no-untyped-def]
    """A bias for each bucket of the distance, exact up to 4 and logarithmic beyond (Raffel et al. 2020)."""
    distance = i - j
    bucket = 8 if distance < 0 else 0
    distance = abs(distance)
    if distance < 4:
        bucket += distance
    else:
        bucket += min(4 + int(math.log((distance + 0.5) / 4) / math.log(4.0) * 4), 7)
    return s + table[bucket, h]


FEATURES: dict[str, dict[str, Any]] = {
    "": {},
    "+ bias mask segments": {"bias": "f32", "masks": 1, "segments": 1},
    "+ score_mod": {"score_mod": t5},
    "+ dropout": {"dropout": True},
    "+ softcap": {"softcap": True},
    "unaligned": {"aligned": False},
}
TENSOR = ("f16", "bf16", "tf32")


def kernels() -> list[Kernel]:
    """Every kernel of the table, the most telling ones first."""
    found = []
    for dim in DIMS:
        for dtype in ("f16", "f32", "f64", "tf32"):
            keys = ["keys"] if dim <= 128 else ["keys-dk", "keys-dv"]
            found += [Kernel(what, dtype, dim) for what in ("forward", "queries", *keys)]
            if dtype != "tf32":
                found.append(Kernel("decode", dtype, dim))
        if dim == 64:
            for dtype in ("f16", "f32"):
                found += [Kernel(w, dtype, 64, v) for v in FEATURES if v for w in ("forward", "queries", "keys")]
        if dim == 256:
            found += [Kernel(what, "bf16", 64) for what in ("forward", "queries", "keys", "decode")]
            found += [Kernel(what, dtype) for dtype in ("f16", "f32", "f64") for what in ("rows", "fill", "merge")]
            found += [Kernel(what, dtype) for dtype in ("f32", "f64") for what in ("slopes", "sinks", "total")]
            for dtype in ("f16", "f32", "f64"):
                found += [Kernel(f"bias-{of}", dtype, 64) for of in ("batch", "rows", "keys", "all")]
                found.append(Kernel("aux", dtype, 64))
    return found


def targets_of(kernel: Kernel) -> tuple[CC, ...]:
    """All of them for float16 and float32 at the usual head sizes; else one of each generation of NVVM and of each size
    of shared memory, or two where a row differs from another in little."""
    if kernel.variant or kernel.dtype == "bf16" or not kernel.dim or kernel.what.startswith(("bias-", "aux")):
        return (8, 0), (9, 0)
    if kernel.dtype in ("f16", "f32") and kernel.dim in (64, 128, 256):
        return TARGETS
    return (8, 0), (9, 0), (10, 0), (12, 0)


@dataclass(frozen=True)
class Built:
    """A kernel for one device: what makes it, its arguments' types, and its launch."""

    make: Callable[[], Any]
    arguments: tuple[Any, Any]
    threads: int
    shared: int
    t: Any = None
    bounds: Any = None  # as launch.py has them


def built(kernel: Kernel, cc: CC) -> Built | None:
    """The kernel as launch.py makes it on such a device; None where it has no tile there."""
    from numba_attn.cuda import backward, bias_sums, decode, derivatives, forward, modifiers, sums, tiling
    from numba_attn.cuda.host import loading
    from numba_attn.cuda.record import Features, signature

    storage = "f32" if kernel.dtype == "tf32" else kernel.dtype
    acc = "f64" if storage == "f64" else "f32"
    limit = SHARED[cc] * 1024

    def tiled(tiles: str, build: Any, memory: Any, f: Any, *more: Any) -> Built | None:
        """A kernel that works on tiles, of the table `tiles`."""
        t = tiling.choose(
            tiles,
            storage,
            (kernel.dim, kernel.dim),
            memory,
            limit,
            tf32=kernel.dtype == "tf32",
            options=f.options,
            cc=cc,
        )
        if t is None:
            return None
        bounds = loading.bounds(build, t, t.threads, more)
        return Built(lambda: build(t, f, *more), signature(f.fields), t.threads, memory(t)["size"], t, bounds)

    def untiled(make: Callable[[], Any], f: Any, threads: int, shared: int) -> Built:
        return Built(make, signature(f.fields), threads, shared, bounds=threads)

    options = dict(FEATURES[kernel.variant])
    backwards = kernel.what not in ("forward", "decode")
    if (mod := options.pop("score_mod", None)) is not None:
        aux = (np.zeros((16, 4), np.float32),)
        build = modifiers.slope_function if backwards else modifiers.mod_function
        table = modifiers.aux_numbers([(0, a.shape, a.strides) for a in aux])
        options |= {"score_mod": build(mod, acc, aux), "score_table": len(table)}
    f = Features(derivatives=backwards, **options)
    what = kernel.what
    if what == "forward":
        return tiled("forward", forward.build, forward.memory, f)
    if what == "decode":
        return tiled("decode", forward.build, forward.memory, replace(f, extra=decode.EXTRA), decode.KEYS)
    if what == "merge":
        t = tiling.choose("decode", storage, (64, 64), forward.memory, limit)
        f = Features(extra=decode.EXTRA)
        return untiled(lambda: decode.build_merge(t, f), f, decode.THREADS, decode.memory_merge(t)["size"])
    if what in ("rows", "fill"):
        f = Features(extra=backward.EXTRA if what == "rows" else ("out_rows",))
        build = backward.build_rows if what == "rows" else backward.build_fill
        return untiled(lambda: build(storage, acc, f), f, backward.ROWS_THREADS, 0)
    if what in ("slopes", "sinks"):
        f = Features(extra=sums.HEADS)
        return untiled(lambda: sums.build_heads(what, acc, "f64", f), f, sums.THREADS, sums.TOTAL_BYTES)
    if what == "total":
        f = Features(extra=sums.TOTAL)
        return untiled(lambda: sums.build_total(storage, f), f, sums.THREADS, sums.TOTAL_BYTES)
    if what == "queries":
        return tiled("queries", backward.build_queries, backward.memory_queries, replace(f, extra=backward.EXTRA))
    if what.startswith("keys"):
        f, which = replace(f, extra=backward.EXTRA), (what != "keys-dv", what != "keys-dk")
        return tiled("keys", backward.build_keys, backward.memory_keys, f, *which)
    if what.startswith("bias-"):
        f = replace(f, bias="f32", extra=bias_sums.BIAS)
        over = what in ("bias-rows", "bias-all"), what in ("bias-keys", "bias-all")
        return tiled("sums", bias_sums.build_bias, bias_sums.memory_bias, f, *over, "f64")
    if what == "aux":
        aux = (np.zeros((16, 4), np.float32),)
        mod = sums.with_score(modifiers.mod_function(t5, acc, aux))
        table = len(modifiers.aux_numbers([(0, a.shape, a.strides) for a in aux]))
        f = replace(f, score_mod=mod, score_table=table, extra=sums.aux_fields(1))
        return tiled("sums", sums.build_aux, sums.memory_aux, f, derivatives.aux_functions(t5, acc, aux, (True,)))
    raise ValueError(f"no kernel {kernel}")


# What a device runs is launch.py's; the table has each product of a tile once.
PRODUCTS = {"forward": 2, "decode": 2, "queries": 3, "keys": 4, "keys-dk": 3, "keys-dv": 2, "aux": 2}


def ptx_of(kernel: Kernel, cc: CC) -> str | None:
    """The PTX that launch.py would run, from its disk cache where it is there."""
    from numba_attn.cuda.compile import kernel_ptx

    b = built(kernel, cc)
    plain = "score_mod" not in FEATURES[kernel.variant] and kernel.what != "aux"
    key = f"ladder {kernel} {b.t}" if plain and b else None
    return kernel_ptx(b.make, b.arguments, cc, b.bounds, key) if b else None


def ptx_for(kernel: Kernel, targets: Iterable[CC]) -> Iterator[tuple[CC, str]]:
    """The same for several targets. What Numba makes of a kernel does not depend on the target, so that it is compiled
    once for each tile, and only NVVM's part is done for each (test_cuda_resources compares the two ways)."""
    from numba.cuda.codegen import nvvm  # of the library that compile_ptx keeps to itself

    from numba_attn.cuda.compile import kernel_ptx

    kept: dict[Any, tuple[Any, dict[str, Any]]] = {}
    for cc in targets:
        if (b := built(kernel, cc)) is None:
            continue
        if (same := kept.get((b.t, b.bounds))) is None:
            with _watched(nvvm) as seen:
                ptx = kernel_ptx(b.make, b.arguments, cc, b.bounds, None)
            kept[b.t, b.bounds] = seen[-1]
        else:
            code, options = same
            ptx = nvvm.compile_ir(code, **(options | {"arch": f"compute_{cc[0]}{cc[1]}"}))
            ptx = ptx.decode().strip("\x00").strip()
        yield cc, ptx


@contextmanager
def _watched(nvvm: Any) -> Iterator[list[Any]]:
    """What NVVM was given."""
    compile_ir, seen = nvvm.compile_ir, []

    def watched(code: Any, **options: Any) -> Any:
        seen.append((code, options))
        return compile_ir(code, **options)

    nvvm.compile_ir = watched
    try:
        yield seen
    finally:
        nvvm.compile_ir = compile_ir


# --------------------------------------------------------------------------------------------------------- the figures

CYCLES = ("issue", "fp32", "imad", "alu", "fp64", "xu", "tensor", "shared", "l2")
COLUMNS = (
    "rows", "cols", "threads", "bytes", "registers", "spills", "stack", "local", "blocks", "warps", "limit",
    "LDG128", "LDG64", "LDG32", "LDGSTS128", "LDGSTS32", "LDS128", "LDS64", "LDS32", "STS128", "STS64", "STS32",
    "STG128", "STG64", "STG32", "LDSM", "HMMA", "FFMA", "DFMA", "CALL", "useful", "share", "products", "clocks",
    *(f"{name}_clocks" for name in CYCLES),
)  # fmt: skip


def measure(kernel: Kernel, cc: CC, ptx: str) -> dict[str, Any]:
    """A row of the table: static counts over the kernel; of the main loop the share of useful instructions, products
    (useful operations counted, over those that the tile needs: 1, or the trips are wrong), and for one warp and trip
    the clocks of each resource (issue_bound) and those of the useful operations."""
    b, r, figures = built(kernel, cc), assemble(ptx, cc), summary(ptx, cc)
    assert b is not None
    room = occupancy(r.registers, b.threads, b.shared + r.shared, cc)
    row: dict[str, Any] = dict.fromkeys(COLUMNS, 0)
    row |= {name: int(figures[name]) for name in COLUMNS if name in figures}
    row |= {
        "rows": b.t.rows if b.t else 0,
        "cols": b.t.cols if b.t else 0,
        "threads": b.threads,
        "bytes": b.shared + r.shared,
        "spills": r.spill_loads + r.spill_stores,
        "local": int(figures["LDL"] + figures["STL"] + figures["LD"] + figures["ST"]),
        "blocks": room.blocks,
        "warps": room.warps,
        "limit": room.limit,
        "useful": "",
    }
    loop, n = sass.main_loop(r.program), PRODUCTS.get(kernel.what, 2 if kernel.what.startswith("bias-") else 0)
    if loop is None or b.t is None or not n:
        return row
    counts, one = trip(b.t, loop, n)
    useful = r.program.useful
    bound = issue_bound(counts, cc, useful=useful, products=n * one, global_bytes=tile_bytes(b.t) * 32 / b.threads)
    row |= {
        "useful": useful,
        "share": round(sass.amount(counts, useful) / sum(counts.values()), 3),
        "products": round(sass.amount(counts, useful) / (n * one), 3),
        "clocks": round(bound.useful, 1),
    }
    row |= {f"{name}_clocks": round(bound.cycles[name], 1) for name in CYCLES}
    return row


def tile_bytes(t: Any) -> int:
    """What a block brings in for each trip of its main loop: two tiles of `cols` rows."""
    return int(t.cols * (t.qk_dim + t.v_dim) * t.size)


def trip(t: Any, loop: Any, n: int) -> tuple[Counter[str], float]:
    """Instructions of a warp in one trip of the main loop on the way of an inner tile, with the copies of the next
    tile, which that way leaves out as they are behind a condition (their addresses stay out); and the useful operations
    that each of the tile's n products needs."""
    from numba_attn.cuda.tiling import CHUNK

    useful = loop.program.useful
    one = t.rows * t.cols * t.qk_dim / t.threads
    if useful == "HMMA":
        one *= 32 / (1024 if t.storage == "f32" else 2048)
    inner = [x for x in loop.program.loops if loop.blocks > x.blocks and not x.children]
    # sass.busy would leave out a loop that was unrolled much less than another.
    busy = [x for x in inner if sass.amount(x.own, useful) >= 2 and sass.amount(x.own, "LDS" if not t.mma else useful)]
    # A product of P with more columns than tiling.CHUNK is several loops, each a part of it, behind those of A B'.
    columns = 0 if t.mma else t.output(t.v_dim).size // len(t.scores.rows)
    parts = [min(CHUNK, columns - first) / columns for first in range(0, columns, CHUNK)] or [1.0]

    def shares(whole: int) -> list[float]:
        """Of a product, for each busy loop, if so many are whole products."""
        return [1.0 if m < whole else parts[(m - whole) % len(parts)] for m in range(len(busy))]

    outside = sass.amount(loop.counts(lambda x: 0 if x in busy else 1), useful)
    missing = [abs(outside + one * sum(shares(whole)) - n * one) for whole in range(len(busy) + 1)]
    whole = len(busy) if len(parts) == 1 else missing.index(min(missing))
    trips = {x: one * share / sass.amount(x.own, useful) for x, share in zip(busy, shares(whole), strict=True)}
    counts = loop.counts(lambda x: trips.get(x, 1))
    if (there := sass.amount(counts, "LDGSTS")) < (needed := tile_bytes(t) / 16 / t.threads):
        counts["LDGSTS.E.BYPASS.128"] += needed - there
    return counts, one


# ---------------------------------------------------------------------------------------------------------- the table


def stored() -> dict[str, dict[str, dict[str, Any]]]:
    """target -> kernel -> column -> figure."""
    table = json.loads(STORED.read_text())
    return {
        target: {name: dict(zip(table["columns"], row, strict=True)) for name, row in rows.items()}
        for target, rows in table["targets"].items()
    }


def wavefronts() -> dict[str, dict[str, dict[str, Any]]]:
    """target -> kernel -> what `profile` found."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(STORED.read_text())["shared"]
    return found


def write(targets: dict[str, dict[str, dict[str, Any]]], shared: dict[str, Any]) -> None:
    """A line for each kernel and target, so that a change shows as a line."""
    columns = {
        target: {name: [row[c] for c in COLUMNS] for name, row in rows.items()} for target, rows in targets.items()
    }

    def lines(tables: dict[str, dict[str, Any]]) -> str:
        parts = []
        for target, rows in tables.items():
            body = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
            parts.append(f'"{target}": {{\n{body}}}')
        return ",\n".join(parts)

    STORED.write_text(
        f'{{"columns": {json.dumps(COLUMNS)},\n"targets": {{\n{lines(columns)}}},\n"shared": {{\n{lines(shared)}}}}}\n'
    )


def measure_all(chosen: Iterable[Kernel], targets: Iterable[CC], show: Callable[[str], None] = print) -> Any:
    """The rows of these kernels: yields (target, kernel, row)."""
    for kernel in chosen:
        for cc, ptx in ptx_for(kernel, targets):
            row = measure(kernel, cc, ptx)
            show(f"sm_{cc[0]}{cc[1]} {kernel}: {row['registers']} registers, {row['spills']} spilled, stack "
                 f"{row['stack']}, local {row['local']}, {row['blocks']} blocks, share {row['share']}, "
                 f"products {row['products']}")  # fmt: skip
            yield f"sm_{cc[0]}{cc[1]}", str(kernel), row


@functools.cache
def by_name(name: str) -> Kernel:
    return next(kernel for kernel in kernels() if str(kernel) == name)


@functools.cache
def fresh(names: tuple[str, ...], targets: tuple[str, ...]) -> dict[str, dict[str, dict[str, Any]]]:
    """target -> kernel -> row, measured now in a process of its own: numba-cuda keeps device overloads by their
    argument types, so that what a test compiled before could be in them."""
    command = [sys.executable, str(Path(__file__).resolve()), "--json", ",".join(targets), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def without_names(ptx: str) -> str:
    """PTX with its mangled names, which count up in a process, all alike, and no comments."""
    lines = [re.sub(r"//.*|[\w$]*(?:numba|_ZN)[\w$]*", "", line) for line in ptx.splitlines()]
    return "\n".join(line for line in lines if not line.startswith((".extern", ".common")))


# --------------------------------------------------------------------------------------------------- the shared memory


def profile(kernel: Kernel, target: str) -> dict[str, Any]:
    """replay.profile of a kernel, with the tile that the target's devices get."""
    import replay

    dtype, tf32 = ("f32", True) if kernel.dtype == "tf32" else (kernel.dtype, False)
    found: dict[str, Any] = replay.profile(kernel.what, dtype, kernel.dim, tf32, TARGET[target])
    return found


@functools.cache
def plain_products() -> tuple[Kernel, ...]:
    """The kernels of products as they are without options."""
    return tuple(k for k in kernels() if k.what in PRODUCTS and k.what != "aux" and not k.variant)


def profiled() -> list[Kernel]:
    """The kernels of docs/cuda.md's tables, whose bank conflicts are counted for PROFILED's targets."""
    return [k for k in plain_products() if k.dtype != "bf16" and k.dim in (64, 128, 256)]


# ----------------------------------------------------------------------------------------------------------- the page


def bound(row: dict[str, Any], found: dict[str, Any]) -> tuple[float, float, str]:
    """What part of the peak the main loop could reach with one warp in each quarter of a multiprocessor, whose
    resources then take turns, and with so many that the slowest resource never waits; and that resource. found: of
    `profile`, which knows that lanes share an address, as the widths of the machine code's accesses do not; these know
    what ptxas left of the PTX's accesses."""
    clocks = {name: row[f"{name}_clocks"] for name in CYCLES}
    clocks["shared"] = PARTITIONS * wavefronts_of(row, found)
    limit = max(clocks, key=lambda name: clocks[name])
    apart = [n for name, n in clocks.items() if name not in ("issue", "fp32", "imad")]
    total = sum(apart) + max(clocks["fp32"], clocks["imad"])
    return row["clocks"] / total, row["clocks"] / clocks[limit], limit


def wavefronts_of(row: dict[str, Any], found: dict[str, Any]) -> float:
    """Of shared memory, for a warp and a tile of the main loop."""
    return float(min(row["shared_clocks"] / PARTITIONS, sum(took for took, _ in found["loop"].values())))


def traffic(kernel: Kernel, row: dict[str, Any], found: dict[str, Any]) -> str:
    """KB that a block takes from global memory for a tile of the main loop, and moves through shared memory."""
    size = {"f16": 2, "f64": 8}.get(kernel.dtype, 4)
    return f"{row['cols'] * 2 * kernel.dim * size / 1024:.0f}, " + (
        f"{wavefronts_of(row, found) * 128 * row['threads'] / 32 / 1024:.0f}"
    )


LIMITS = {
    "issue": "issue slots", "fp32": "fp32", "imad": "integer products", "alu": "integer units", "fp64": "fp64",
    "xu": "exp2", "tensor": "tensor cores", "shared": "shared memory", "l2": "L2",
}  # fmt: skip
OUTPUTS = {"forward": 1, "decode": 1, "queries": 1, "keys": 2, "keys-dk": 1, "keys-dv": 1}


def sums_of(kernel: Kernel, row: dict[str, Any]) -> int:
    """Registers of a thread that hold sums: scores, in the backward dP too, and the result's part."""
    scores = row["rows"] * row["cols"] * (1 if kernel.what in ("forward", "decode") else 2)
    result = row["rows"] * kernel.dim * OUTPUTS[kernel.what]
    return int((scores + result) / row["threads"] * (2 if kernel.dtype == "f64" else 1))


def tables() -> dict[str, str]:
    """The Markdown tables of docs/cuda.md, by name."""
    known, found = stored(), wavefronts()
    out = {}
    for title, target in PROFILED.items():
        lines = [
            "| kernel | tile, threads | registers (sums) | shared, KB | blocks (limit) | products | KB a tile "
            "| expected | limit |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for kernel in profiled():
            row = known[target][str(kernel)]
            low, high, limit = bound(row, found[target][str(kernel)])
            lines.append(
                f"| {kernel} | {row['rows']} x {row['cols']}, {row['threads']} | "
                f"{row['registers']} ({sums_of(kernel, row)}) | "
                f"{row['bytes'] / 1024:.0f} | {row['blocks']} ({row['limit']}) | {row['share']:.0%} | "
                f"{traffic(kernel, row, found[target][str(kernel)])} | {low:.0%} to {high:.0%} | {LIMITS[limit]} |"
            )
        out[title] = "\n".join(lines)
    spilled = [
        f"| {name} | {target} | {row['registers']} | {row['spills']} | {row['stack']} | {row['local']} |"
        for target, rows in known.items()
        for name, row in rows.items()
        if row["spills"] or row["stack"] or row["local"]
    ]
    head = "| kernel | target | registers | bytes spilled | stack | local accesses |\n|---|---|---|---|---|---|\n"
    count = sum(len(rows) for rows in known.values())
    out["spills"] = f"{count} rows; {len(spilled)} with local memory" + (
        ":\n\n" + head + "\n".join(spilled) if spilled else "."
    )
    few = [
        (name, target, row["share"])
        for target, rows in known.items()
        for name, row in rows.items()
        if by_name(name) in plain_products() and by_name(name).dtype not in TENSOR and row["share"] < 0.5
    ]
    out["shares"] = "\n".join(
        [
            "| kernel | target | products |",
            "|---|---|---|",
            *(f"| {name} | {t} | {share:.1%} |" for name, t, share in few),
        ]
    )
    worst, rows = 0.0, {}
    for target, profiles in found.items():
        for name, parts in profiles.items():
            total, fewest = (sum(numbers[n] for numbers in parts["loop"].values()) for n in range(2))
            worst = max(worst, total / fewest - 1)
            for part, numbers in parts.items():
                for opcode, (took, ideal) in numbers.items():
                    if took > ideal:
                        where = f"{took / total:.1%} of the loop's" if part == "loop" else "once"
                        row = f"| {name} | {where} | {opcode} | {took:g} | {ideal:g} |"
                        rows.setdefault(row, []).append(target)
    head = "| kernel | part | access | wavefronts | without conflicts | target |\n|---|---|---|---|---|---|\n"
    out["conflicts"] = (
        f"{sum(map(len, found.values()))} kernels and targets; the most that conflicts add to a main loop's wavefronts "
        f"is {worst:.1%}.\n\n"
        + head
        + "\n".join(f"{row} {', '.join(targets)} |" for row, targets in sorted(rows.items()))
    )
    return out


_TABLE = "<!-- {name}: from tests/cuda/ladder.py --docs -->\n"
_END = "\n<!-- end -->"


def with_tables(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in tables().items():
        head = _TABLE.format(name=name)
        before, found, rest = text.partition(head)
        old, end, after = rest.partition(_END)
        if not found or not end or "<!--" in old:
            raise ValueError(f"the page has no place for {name}: {head.strip()}, a line, and {_END.strip()}")
        text = before + head + table + _END + after
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="measure everything and write resources.json")
    parser.add_argument("--missing", action="store_true", help="write only what resources.json lacks")
    parser.add_argument("--only", default="", help="kernels with this in their name, with --write or --missing")
    parser.add_argument("--targets", default=",".join(TARGET), help="with --write or --missing: sm_80,sm_90")
    parser.add_argument("--profile", action="store_true", help="write the bank conflicts (in the emulator)")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/cuda.md")
    parser.add_argument("--json", action="store_true", help="print one line")
    parser.add_argument("show", nargs="*", help="targets, sm_80,sm_90, then kernels to measure and print")
    options = parser.parse_args()
    if options.show:
        targets, *names = options.show
        found: dict[str, Any] = {target: {} for target in targets.split(",")}
        for kernel in map(by_name, names):
            for target, name, row in measure_all([kernel], [TARGET[t] for t in found], lambda text: None):
                found[target][name] = row
        print(json.dumps(found, indent=None if options.json else 1))
    rows = {target: {} for target in TARGET} | (stored() if STORED.exists() else {})
    shared = {target: {} for target in PROFILED.values()} | (wavefronts() if STORED.exists() else {})
    if options.write or options.missing:
        if options.write and not options.only:
            rows = {target: {} for target in TARGET}
        for kernel in kernels():
            own = tuple(cc for cc in targets_of(kernel) if f"sm_{cc[0]}{cc[1]}" in options.targets.split(","))
            if options.missing:
                own = tuple(cc for cc in own if str(kernel) not in rows[f"sm_{cc[0]}{cc[1]}"])
            if options.only in str(kernel) and own:
                for target, name, row in measure_all([kernel], own, lambda text: print(text, flush=True)):
                    rows[target][name] = row
                write(rows, shared)
    if options.profile:
        for target, kernel in itertools.product(PROFILED.values(), profiled()):
            if options.only in str(kernel):
                shared[target][str(kernel)] = profile(kernel, target)
                print(target, kernel, shared[target][str(kernel)], flush=True)
                write(rows, shared)
    if options.docs:
        DOCS.write_text(with_tables(DOCS.read_text()))


if __name__ == "__main__":
    main()
