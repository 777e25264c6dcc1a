"""A Problem and its tangents -> a call of the tangent kernel."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numba.core import types

from ...online import LN2
from .. import threads
from ..call import STORAGE
from ..compile import compile_cfunc
from ..jvp import build, key_block, layout
from ..modifiers import tile_function
from ..target import aux_table
from .record import SERIAL_FLOPS, count_tiles, describe, elem_of, is_half, longest_first, run_drain, tile_width

if TYPE_CHECKING:
    from ...plan import Problem

TILES = 4  # a work item


@cache
def drain_address(elem: str) -> int:
    return compile_cfunc(build(elem), types.void(types.intp), f"jvp-{elem}")


def jvp(
    problem: Problem,
    tangents: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None],
    bias_dot: np.ndarray | None,
    sinks_dot: np.ndarray | None,
    slopes_dot: np.ndarray | None,
    aux_dot: tuple[np.ndarray | None, ...],
    out: np.ndarray,
    lse: np.ndarray,
    out_dot: np.ndarray,
    lse_dot: np.ndarray,
) -> None:
    """Run the tangent kernel on (B, H, S, D) views; writes out, lse, out_dot, lse_dot.

    bias_dot : (B, Hq, Sq, Sk), zero strides where broadcast, any of the four float dtypes
    sinks_dot, slopes_dot : (Hq,), (1 or B, Hq), C, of the accumulation type
    aux_dot : for each array of aux an array of the accumulation type and its shape, or None
    """
    elem = elem_of(problem.dtype)
    sequences = longest_first(problem.sequences)
    record = describe(problem, elem, sequences, "score_grad")
    batch, q_heads, q_len, qk = problem.q.shape
    kv_heads, dv = problem.kv_heads, problem.v_dim
    rows = tile_width(elem, problem.left, problem.right)
    record["tile_rows"], record["block"], record["tiles"] = rows, key_block(elem, qk), TILES
    record["scale"] = problem.scale
    natural = problem.softcap != 0.0 or problem.score_mod is not None
    record["dot_unit"] = 1.0 if natural else LN2  # K. Q' is in the units of Q', and S. in natural ones
    halves = is_half(problem.dtype)
    arrays = dict(zip(("q_dot", "k_dot", "v_dot"), tangents, strict=True))
    arrays |= {"q": problem.q, "k": problem.k, "v": problem.v, "out": out, "out_dot": out_dot}
    for name, array in arrays.items():
        if array is not None:
            record.set_array(name, array.view(np.uint16) if halves else array)
    record.set_array("lse", lse)
    record.set_array("lse_dot", lse_dot)
    if bias_dot is not None:
        record.set_array("bias_dot", bias_dot)
        record["bias_dot_storage"] = STORAGE[bias_dot.dtype.name]
    if slopes_dot is not None:
        record["slopes_dot"] = slopes_dot.ctypes.data
        record["slopes_dot_b"] = slopes_dot.strides[0] if len(slopes_dot) > 1 else 0
    if sinks_dot is not None:
        record["sinks_dot"] = sinks_dot.ctypes.data
    if problem.score_mod is not None:
        asked = tuple(a is not None for a in aux_dot) or (False,) * len(problem.aux)
        table = aux_table(tuple(a for a in aux_dot if a is not None))
        record["score_jvp"] = tile_function(problem.score_mod, "score_jvp", elem, problem.aux, asked=asked)
        record["aux_dot"] = table.ctypes.data

    q_lens = sequences[:, 2]
    tiles = count_tiles(q_lens, rows, q_heads // kv_heads)
    first_item = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum(-(-tiles // TILES) * kv_heads, out=first_item[1:])
    record["first_item"] = first_item.ctypes.data
    for name, offset in layout(elem, qk, dv, problem.bias is not None, natural, problem.dropout_p > 0).items():
        record[name] = offset
    if int(q_lens.sum()) < batch * q_len:
        for array, empty in ((out, 0), (out_dot, 0), (lse, -np.inf), (lse_dot, 0)):
            array[...] = empty
    pairs = float((q_lens * sequences[:, 4]).sum()) * q_heads
    n_threads = 1 if 6 * pairs * (qk + dv) <= SERIAL_FLOPS else threads.usable()
    run_drain(record, drain_address(elem), int(first_item[-1]), n_threads)
