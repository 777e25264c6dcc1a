"""The asv suite: time, peak memory, start and overhead of numba_attn, commit by commit.

asv run -E existing            # this checkout, as installed
asv run v0.1.0..main           # every commit, in an environment of its own
"""

import os
import subprocess
import sys
import tempfile

import numpy as np

import numba_attn as na

from .shapes import SHAPES


class Time:
    """Milliseconds of every named shape."""

    params = [list(SHAPES)]  # noqa: RUF012 (asv's convention)
    param_names = ("shape",)

    def setup(self, shape):
        case = SHAPES[shape]
        self.arrays, self.options, self.dout = case.inputs(), case.options, case.cotangent()
        self.call = self.forward_and_backward if case.backward else self.forward
        self.call()

    def forward(self):
        na.attention(*self.arrays, **self.options)

    def forward_and_backward(self):
        na.attention_vjp(*self.arrays, **self.options)[1](self.dout)

    def time_attention(self, shape):
        self.call()


class Overhead:
    """16 queries on 16 keys, one head: what a call costs before any work."""

    def setup(self):
        rng = np.random.default_rng(0)
        self.arrays = [rng.standard_normal((1, 1, 16, 64), dtype=np.float32) for _ in range(3)]
        self.out = np.empty((1, 1, 16, 64), dtype=np.float32)
        na.attention(*self.arrays)

    def time_16x16(self):
        na.attention(*self.arrays)

    def time_16x16_causal(self):
        na.attention(*self.arrays, causal=True)

    def time_16x16_out(self):
        na.attention(*self.arrays, out=self.out)


class Memory:
    """One head, 65,536 tokens, causal, beside a process that only holds the arrays: the difference is the kernel's."""

    def setup(self):
        rng = np.random.default_rng(0)
        self.arrays = [rng.standard_normal((1, 1, 65_536, 64), dtype=np.float32) for _ in range(3)]
        self.out = np.ones((1, 1, 65_536, 64), dtype=np.float32)  # ones: its pages are there from the start
        small = [x[:, :, :256] for x in self.arrays]
        na.attention(*small, causal=True)  # loads the compiled kernel

    def peakmem_reference(self):
        return sum(float(x[0, 0, 0, 0]) for x in [*self.arrays, self.out])

    def peakmem_65536_causal(self):
        na.attention(*self.arrays, causal=True, out=self.out)


class TrainingMemory:
    """Forward and backward of one head of 32,768 tokens, causal, beside a process that holds inputs and gradients."""

    def setup(self):
        rng = np.random.default_rng(0)
        self.arrays = [rng.standard_normal((1, 1, 32_768, 64), dtype=np.float32) for _ in range(4)]
        self.gradients = [np.ones_like(x) for x in self.arrays[:3]]
        *small, dout = (x[:, :, :256] for x in self.arrays)
        na.attention_vjp(*small, causal=True)[1](dout)

    def peakmem_reference(self):
        return sum(float(x[0, 0, 0, 0]) for x in [*self.arrays, *self.gradients])

    def peakmem_32768_causal(self):
        self.gradients.clear()  # the call makes its own
        *inputs, dout = self.arrays
        return na.attention_vjp(*inputs, causal=True)[1](dout)


ONE_CALL = """
import numpy, numba_attn
x = numpy.ones((1, 1, 16, 64), dtype=numpy.float32)
numba_attn.attention(x, x, x)
"""


ONE_GRADIENT = (
    ONE_CALL
    + """
numba_attn.attention_vjp(x, x, x)[1](x)
"""
)


class Start:
    """Seconds of a fresh process. `cold` begins with an empty cache folder, so that every kernel is compiled."""

    timeout = 600
    number, rounds, repeat, warmup_time = 1, 1, 3, 0

    def setup(self):
        self.folder = tempfile.TemporaryDirectory()
        self.cold = {**os.environ, "NUMBA_CACHE_DIR": self.folder.name}
        self.run(ONE_GRADIENT)

    def teardown(self):
        self.folder.cleanup()

    def run(self, code, env=None):
        subprocess.run([sys.executable, "-c", code], env=env, check=True)

    def time_import(self):
        self.run("import numba_attn")

    def time_first_call_warm(self):
        self.run(ONE_CALL)

    def time_first_gradient_warm(self):
        self.run(ONE_GRADIENT)

    def time_first_call_cold(self):
        self.run(ONE_CALL, self.cold)

    def time_first_gradient_cold(self):
        self.run(ONE_GRADIENT, self.cold)

    time_first_call_cold.repeat = time_first_gradient_cold.repeat = 1
