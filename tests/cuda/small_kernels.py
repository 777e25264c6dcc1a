"""Kernels small enough to count by hand, as PTX: written here, or compiled from a few lines by numba-cuda."""

import functools
import struct
from collections import namedtuple

import numpy as np
import pytest

HEAD = ".version 7.8\n.target sm_80\n.address_size 64\n"


def kernel(body: str, params: str = ".param .u64 a, .param .u64 b, .param .u32 n") -> str:
    # ptxas would unroll the loops that are counted.
    return f'{HEAD}.visible .entry kernel({params})\n.pragma "nounroll";\n{{\n{body}\n}}\n'


# Adds 1 to n 32-bit numbers.
INCREMENT = """
.version 7.8
.target sm_80
.address_size 64
.visible .entry increment(.param .u64 x, .param .u64 n)
{
    .reg .pred %p<2>; .reg .b32 %r<8>; .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [n];
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r1, %r2, %r3; cvt.u64.u32 %rd3, %r4;
    setp.ge.u64 %p1, %rd3, %rd2;
    @%p1 bra END;
    shl.b64 %rd4, %rd3, 2; add.s64 %rd5, %rd1, %rd4;
    ld.global.u32 %r5, [%rd5]; add.u32 %r5, %r5, 1; st.global.u32 [%rd5], %r5;
    END:
    ret;
}
"""


def packed(*values):
    """Parameters of 64 bits, as a launch takes them."""
    return struct.pack(f"={len(values)}q", *values)


Ints = namedtuple("Ints", "x n step")
Reals = namedtuple("Reals", "scale shift")


@functools.cache
def line_ptx():
    """x[i] = i * step * scale + shift in float64, as this package's kernels are: records of int64 and float64."""
    cuda_compile = pytest.importorskip("numba_attn.cuda.compile", reason="no numba-cuda", exc_type=ImportError)
    from llvmlite import ir

    types, cuda = cuda_compile.types, cuda_compile.cuda

    @cuda_compile.intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(ir.DoubleType(), 1)), align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.float64), codegen

    def line(ints, reals):
        i = cuda.grid(1)
        if i < ints.n:
            store(ints.x + 8 * i, i * ints.step * reals.scale + reals.shift)

    signature = types.NamedUniTuple(types.int64, 3, Ints), types.NamedUniTuple(types.float64, 2, Reals)
    return cuda.compile_ptx(line, signature, cc=(8, 0))[0]


@functools.cache
def product_ptx():
    """A tiled product as numba-cuda compiles it: 16 x 16 threads, tiles in shared memory."""
    cuda = pytest.importorskip("numba_attn.cuda.compile", exc_type=ImportError).cuda
    f32 = np.float32

    def product(a, b, c):
        sa, sb = cuda.shared.array((16, 16), "float32"), cuda.shared.array((16, 16), "float32")
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        row, col = cuda.blockIdx.y * 16 + y, cuda.blockIdx.x * 16 + x
        total = f32(0)
        for k0 in range(0, a.shape[1], 16):
            sa[y, x] = a[row, k0 + x] if row < a.shape[0] and k0 + x < a.shape[1] else f32(0)
            sb[y, x] = b[k0 + y, col] if k0 + y < a.shape[1] and col < b.shape[1] else f32(0)
            cuda.syncthreads()
            for k in range(16):
                total += sa[y, k] * sb[k, x]
            cuda.syncthreads()
        if row < c.shape[0] and col < c.shape[1]:
            c[row, col] = total

    return cuda.compile_ptx(product, "void(float32[:,::1], float32[:,::1], float32[:,::1])", cc=(8, 0))[0]
