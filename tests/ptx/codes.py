"""What lowering.py writes and execution.py reads: the records of operations and of basic blocks, and their numbers."""

from __future__ import annotations

import numpy as np

# Operations.
COMPUTE, APPROXIMATE, LOAD, STORE, ATOMIC, COPY, COMMIT, WAIT, SHUFFLE, VOTE, MMA, LDMATRIX = range(12)

# An operation. d, a, b, c, e: where the result and the operands are, in bytes from the start of the warp's registers.
OPERATION = np.dtype(
    [
        ("op", np.int64),
        ("row", np.int64),  # of arithmetic.TABLE, or which function, way of shuffling, ...
        ("guard", np.int64),  # the predicate's place, or -1
        ("negate", np.int64),
        ("statement", np.int64),
        ("d", np.int64),
        ("a", np.int64),
        ("b", np.int64),
        ("c", np.int64),
        ("e", np.int64),
        ("space", np.int64),
        ("size", np.int64),  # bytes of an element
        ("count", np.int64),  # elements of a vector
        ("signed", np.int64),
        ("flush", np.int64),  # .ftz
        ("trans", np.int64),  # of ldmatrix
        ("list", np.int64),  # where in the pool the registers of a vector are: place and bytes of each
        ("offset", np.int64),  # of an address
    ],
    align=True,
)

# How a basic block ends.
FALL, JUMP, RETURN, TRAP, BARRIER, WARP_BARRIER = range(6)

# A run of operations that has one way in and one way out. Its number serves as program counter.
BLOCK = np.dtype(
    [
        ("first", np.int64),
        ("last", np.int64),
        ("end", np.int64),
        ("guard", np.int64),  # of the jump, the return or the barrier
        ("negate", np.int64),
        ("target", np.int64),
        ("statement", np.int64),  # that ends it
        ("together", np.int64),  # all living lanes of a warp must be here
        ("copies", np.int64),  # cp.async in it
    ],
    align=True,
)

# State spaces (section 5.1) and where the windows of a generic address begin (section 5.1, cvta).
GENERIC, GLOBAL, SHARED, LOCAL = range(4)
SPACES = {"generic": GENERIC, "global": GLOBAL, "const": GLOBAL, "shared": SHARED, "local": LOCAL}
LOCAL_WINDOW, SHARED_WINDOW = 0x7E0000000000, 0x7F0000000000
# Allocation n of global memory begins at (n + 1) << ALLOCATION_BITS.
ALLOCATION_BITS = 36

# Special registers (section 10) that differ from thread to thread.
SPECIAL = (
    "%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%laneid", "%warpid",
    "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_ge", "%lanemask_gt",
)  # fmt: skip
# Those that a launch fixes.
LAUNCH = (
    "%ntid.x", "%ntid.y", "%ntid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%nwarpid",
    "%dynamic_smem_size", "%total_smem_size", "%clock", "%clock64", "%globaltimer", "%smid", "%nsmid",
)  # fmt: skip

FUNCTIONS = ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "div")
SHUFFLES = ("bfly", "idx", "up", "down")
VOTES = ("ballot", "any", "all", "uni", "active")
ATOMICS = ("add", "max", "min", "exch", "cas", "and", "or", "xor", "inc", "dec")
MATRICES = ("f16", "bf16", "tf32")

# What stops a launch.
(
    FINE, MISALIGNED, OUTSIDE, WILD, FREED, READ_ONLY, PARTIAL_COPY, APART, DEADLOCK, BARRIERS, TRAPPED, TOO_LONG,
) = range(12)  # fmt: skip

# What is only written down.
FINDINGS = (
    "UNINITIALISED shared read",
    "UNINITIALISED shared atomic",
    "RACE shared read-after-write",
    "RACE shared write-after-write",
    "RACE shared write-after-read",
    "RACE shared atomic-after-write",
    "RACE shared atomic-after-read",
    "RACE global write-after-write",
    "RACE global read-after-write",
    "SYNC: membermask differs from the living lanes",
    "SYNC: bar.sync with exited threads",
    "SYNC: cp.async still pending at exit",
)
(
    UNSET, UNSET_ATOMIC, READ_AFTER_WRITE, WRITE_AFTER_WRITE, WRITE_AFTER_READ, ATOMIC_AFTER_WRITE, ATOMIC_AFTER_READ,
    GLOBAL_WRITE_AFTER_WRITE, GLOBAL_READ_AFTER_WRITE, MEMBERS, EXITED, PENDING,
) = range(len(FINDINGS))  # fmt: skip
