"""What a multiprocessor of each compute capability holds and does: the blocks that live on one, and a bound on the
speed of a loop by the instructions in it. Nothing is a timing.

    occupancy(registers, threads, shared_bytes, (8, 0))
    issue_bound(loop.counts(trips=16), (8, 0))  # of a loop from sass.py

Sources of the numbers: the CUDA programming guide (GUIDE: tables of its appendix on compute capabilities, and the table
"Throughput of native arithmetic instructions"), cuda_occupancy.h of the CUDA toolkit, NVIDIA's white papers on A100 and
H100, and Nsight Compute's description of the pipes. What is not published is marked as assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ptxas import CC
from sass import ENDS, is_uniform, width

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
_CONTROL = (*ENDS, "CALL", "BSSY", "BSYNC", "BREAK", "BAR", "WARPSYNC", "YIELD", "NANOSLEEP")
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
