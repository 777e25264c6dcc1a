"""Users' functions compiled for CUDA, run in an emulator of PTX: values against Python, derivatives against dual.py."""

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GPU = Path(__file__).resolve().parents[3] / "shared" / "gpu"
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)
if not (GPU / "ptxemu.py").exists():
    pytest.skip("the emulator of PTX is not there", allow_module_level=True)
sys.path.insert(0, str(GPU))

import numba
import ptxemu
from test_dual import ALL, CASES, LONG, SMALL
from test_modifiers import PER_HEAD, TABLE

import numba_attn as na
from numba_attn.cuda import modifiers
from numba_attn.cuda.compile import cuda, intrinsic, types
from numba_attn.dual import differentiated, differentiated_by_hand
from numba_attn.score import plain_function

KEYS, QUERIES, B, H = 7, 32, 1, 2  # a tile of keys and queries; one thread a query
FLOATS = {"f32": (np.float32, types.float32), "f64": (np.float64, types.float64)}


def addressed(aux: tuple[np.ndarray, ...], first: int) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """The memory of each array, and the table of the arrays once these are buffers number first, first + 1, ..."""
    buffers, where = [], []
    for n, a in enumerate(aux):
        memory = np.ascontiguousarray(a)
        if a.ndim > 1 and a.T.flags.c_contiguous:  # in place, so that strides are tested
            memory = np.ascontiguousarray(a.T)
            assert memory.strides == a.strides[::-1]
        else:
            a = memory
        buffers.append(memory.reshape(-1))
        where.append(((first + n) << 36, a.shape, a.strides))
    return buffers, modifiers.aux_numbers(where)


def called(fn: Callable[..., Any], result: Any, arguments: tuple[Any, ...]) -> Any:
    """fn as the kernel's step over a tile calls it."""

    @intrinsic
    def call(typingctx, given):
        def codegen(context, builder, sig, args):
            values = [builder.extract_value(args[0], n) for n in range(len(arguments))]
            return context.compile_internal(builder, fn, result(*arguments), values)

        return result(given), codegen

    return call


def compiled(fn: Any, kind: str, elem: str, aux: tuple[np.ndarray, ...]) -> str:
    """The PTX of a kernel that calls a function for every pair of a tile.

    kind "score": out = mod(score); "slope": out, slope = slope(score); "mask": out = mask()
    """
    real, count = FLOATS[elem][1], len(table_of(aux)[1])
    table = types.UniTuple(types.int64, count)
    indices = [types.int32] * 4
    zero = FLOATS[elem][0](0)
    if kind == "mask":
        mask = called(modifiers.mask_function(fn, elem, aux), types.boolean, (*indices, table))

        def of(s, b, h, i, j, table):
            return (FLOATS[elem][0](mask((b, h, i, j, table))), zero)
    elif kind == "score":
        mod = called(modifiers.mod_function(fn, elem, aux), real, (real, *indices, table))

        def of(s, b, h, i, j, table):
            return (mod((s, b, h, i, j, table)), zero)
    else:
        of_slope = modifiers.slope_function(fn, elem, aux)
        slope = called(of_slope, types.UniTuple(real, 2), (real, *indices, table))

        def of(s, b, h, i, j, table):
            return slope((s, b, h, i, j, table))
