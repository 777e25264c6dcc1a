"""From a Problem and its tangents to a call of the tangent kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba.core import types

from ...arrays import batch_step
from ...mask.shape import K_LEN, Q_LEN, count_tiles
from ...online import LN2
from .. import threads
from ..compile import compile_cfunc
from ..jvp import build, key_block, layout
from ..modifiers import tile_function
from ..target import aux_table
from .record import (
    SERIAL_FLOPS,
    Fields,
    Record,
    Sizes,
    describe,
    elem_of,
    is_half,
    kept,
    longest_first,
    run_drain,
    sized,
    sizes_of,
    storage_of,
    tile_width,
)

if TYPE_CHECKING:
    from ...gradients import Tangents
    from ...plan import Problem

TILES = 4  # a work item


@cache
def drain_address(elem: str) -> int:
    return compile_cfunc(build(elem), types.void(types.intp), f"jvp-{elem}")


@lru_cache(256)
def _buffers(*sizes: Any) -> Fields:
    return Fields(layout(*sizes))


class Results(NamedTuple):
    """What the kernel writes: (B, H, S, D) and (B, H, S) views."""

    out: np.ndarray
    lse: np.ndarray
    out_dot: np.ndarray
    lse_dot: np.ndarray


@dataclass(frozen=True, slots=True)
class _Schedule:
    """The part of a call that its sizes alone decide."""

    record: Record
    n_items: int
    flops: float
    fill: bool  # some query is in no sequence


@kept
def _schedule(sequences: np.ndarray, sizes: Sizes) -> _Schedule:
    sequences, elem = longest_first(sequences), elem_of(sizes.dtype)
    q_lens, (batch, q_heads, q_len, qk) = sequences[:, Q_LEN], sizes.q
    record, rows = sized(sequences, sizes), tile_width(elem, sizes.left, sizes.right)
    record["tile_rows"], record["block"], record["tiles"] = rows, key_block(elem, qk), TILES
    first_item = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum(-(-count_tiles(q_lens, rows, sizes.group) // TILES) * sizes.k[1], out=first_item[1:])
    record.points_to("first_item", first_item)
    return _Schedule(
        record=record,
        n_items=int(first_item[-1]),
        flops=6.0 * float((q_lens * sequences[:, K_LEN]).sum()) * q_heads * (qk + sizes.v_dim),
        fill=int(q_lens.sum()) < batch * q_len,
    )


def jvp(problem: Problem, dots: Tangents, results: Results) -> None:
    """Run the tangent kernel on (B, H, S, D) views.

    dots.bias : (B, Hq, Sq, Sk), zero strides where broadcast, any of the four float dtypes
    dots.sinks, dots.slopes : (Hq,), (1 or B, Hq), C, of the accumulation type
    dots.aux : for each array of aux an array of the accumulation type and its shape, or None
    """
    schedule, elem = _schedule(problem.sequences, sizes_of(problem)), elem_of(problem.dtype)
    record = describe(problem, schedule.record, "score_grad")
    record["scale"] = problem.scale
    natural = problem.softcap != 0.0 or problem.score_mod is not None
    record["dot_unit"] = 1.0 if natural else LN2  # K. Q' is in the units of Q', and S. in natural ones
    record.put(_buffers(elem, problem.qk_dim, problem.v_dim, problem.bias is not None, natural, problem.dropout_p > 0))
    _add_arrays(record, problem, dots, results)
    _add_tangents(record, problem, dots, elem)
    if schedule.fill:
        for array in results:
            array[...] = 0
        results.lse[...] = -np.inf
    n_threads = 1 if schedule.flops <= SERIAL_FLOPS else threads.usable()
    run_drain(record, drain_address(elem), schedule.n_items, n_threads)


def _add_arrays(record: Record, problem: Problem, dots: Tangents, results: Results) -> None:
    """The arrays with rows of head size, and lse."""
    halves = is_half(problem.dtype)
    arrays = {"q": problem.q, "k": problem.k, "v": problem.v, "q_dot": dots.q, "k_dot": dots.k, "v_dot": dots.v}
    for name, array in (arrays | {"out": results.out, "out_dot": results.out_dot}).items():
        if array is not None:
            record.set_array(name, array.view(np.uint16) if halves else array)
    record.set_array("lse", results.lse)
    record.set_array("lse_dot", results.lse_dot)


def _add_tangents(record: Record, problem: Problem, dots: Tangents, elem: str) -> None:
    """The tangents of bias, sinks, slopes and aux."""
    if dots.bias is not None:
        record.set_array("bias_dot", dots.bias)
        record["bias_dot_storage"] = storage_of(dots.bias.dtype)
    if dots.slopes is not None:
        record.points_to("slopes_dot", dots.slopes)
        record["slopes_dot_b"] = batch_step(dots.slopes)
    if dots.sinks is not None:
        record.points_to("sinks_dot", dots.sinks)
    if problem.score_mod is not None:
        asked = tuple(a is not None for a in dots.aux) or (False,) * len(problem.aux)
        record["score_jvp"] = tile_function(problem.score_mod, "score_jvp", elem, problem.aux, asked=asked)
        record.points_to("aux_dot", aux_table(tuple(a for a in dots.aux if a is not None)))
