"""An emulator of PTX: it runs the text that numba-cuda compiles a kernel to, on a CPU, and checks what it runs.

    kernel = ptx.parse(text)
    ran = ptx.launch(kernel, grid, threads, [x, y, 3])          # NumPy arrays stand for pointers
    assert not ran.findings

parser.py       the text, as registers, variables, labels and statements
lowering.py     statements as operations on numbers (codes.py) for the interpreter; translation.py: each statement
arithmetic.py   the table of instructions that work lane by lane, as LLVM vectors of a warp
computing.py    the jump to a row of it
approximate.py  ex2, lg2, rcp and their errors; randomness.py
matrix.py       mma and ldmatrix
warp.py         shuffles and votes
memory.py       address spaces, loads, stores, atomics, cp.async
races.py        who wrote and read what, and which barrier lies between
traffic.py      bank conflicts and sectors
execution.py    the interpreter: one operation after the other for the lanes of a warp, which warp goes on, barriers
launching.py    a launch from Python: arguments, errors in words, findings

Sections are those of the PTX ISA manual, version 8.7. Not covered: calls, carry flags, wgmma, TMA, clusters, mbarrier,
textures, and the weak ordering of memory between threads: a store is seen by all at once.
"""

from .errors import Hang, PTXError
from .launching import Access, Launch, Options, Trace, initial, launch, watching
from .parser import Kernel, Statement, parse, statements

__all__ = [
    "Access",
    "Hang",
    "Kernel",
    "Launch",
    "Options",
    "PTXError",
    "Statement",
    "Trace",
    "initial",
    "launch",
    "parse",
    "statements",
    "watching",
]
