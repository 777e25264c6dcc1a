"""What all launches share: filling the CALL record from a Problem, the width of a tile, and the threads that drain the
record's work items."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ...arrays import batch_step
from ...mask.shape import K_LEN, OPEN, Q_LEN, SEQUENCE_FIELDS
from ...online import LOG2E
from .. import threads
from ..call import CALL, STORAGE, tile_rows
from ..modifiers import tile_function
from ..simd import ROW
from ..target import aux_table

if TYPE_CHECKING:
    from ...plan import Problem

N_FIELDS = CALL.itemsize // 8
CALL_EXTRA = 10  # bytes behind the record: two counters, and padding that aligns the scratch memory behind them
INDEX = {name: n for n, name in enumerate(CALL.names or ())}
_FIRST_STRIDE = {name.removesuffix("_b"): n for name, n in INDEX.items() if name.endswith("_b")}
_SCRATCH = INDEX["scratch"]
_REALS = frozenset(name for name in INDEX if CALL[name] == np.float64)

# Work below this many floating-point operations stays on the calling thread: about 20 us, ten times the cost of waking
# another.
SERIAL_FLOPS = 2e6


class Fields:
    """Integer fields that are written together, which takes a tenth of the time of one by one."""

    __slots__ = ("at", "values")

    def __init__(self, fields: dict[str, int]) -> None:
        self.at = np.array([INDEX[name] for name in fields], np.intp)
        self.values = np.array(list(fields.values()), np.int64)


class Record:
    """The CALL record of one call, filled by the names of its fields, and what its addresses point to.

    It is one array seen as int64 and as float64. Writing a field of a NumPy record would take six times as long.
    """

    __slots__ = ("keep", "numbers", "reals")

    def __init__(self, template: Record | None = None) -> None:
        self.numbers: np.ndarray = np.zeros(N_FIELDS, np.int64) if template is None else template.numbers.copy()
        self.reals = self.numbers.view(np.float64)
        self.keep: list[Any] = [] if template is None else template.keep.copy()

    def __setitem__(self, name: str, value: Any) -> None:
        (self.reals if name in _REALS else self.numbers)[INDEX[name]] = value

    def put(self, fields: Fields) -> None:
        self.numbers[fields.at] = fields.values

    def points_to(self, name: str, array: np.ndarray) -> None:
        """The address of an array that the record keeps alive."""
        self.keep.append(array)
        self.numbers[INDEX[name]] = array.ctypes.data

    def set_array(self, name: str, array: np.ndarray) -> None:
        """The address of an array and its strides, whose fields lie side by side."""
        self.points_to(name, array)
        numbers = self.numbers
        for at, stride in enumerate(array.strides, _FIRST_STRIDE[name]):
            numbers[at] = stride


_SERIAL = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)  # ctypes releases the GIL while it calls


def run_drain(record: Record, drain: int, n_items: int, n_threads: int) -> None:
    """Have all work items of a record done. Releases the GIL."""
    n = max(1, min(n_threads, n_items))
    counters, memory = np.zeros(2, np.int64), np.empty(n * int(record.numbers[_SCRATCH]) + 64, np.uint8)
    record["counter"], record["memory"] = counters.ctypes.data, (memory.ctypes.data + 63) & ~63
    record["n_items"] = n_items
    if n > 1:
        threads.run(record.numbers.ctypes.data, drain, n)
    elif n_items:
        _SERIAL(drain)(record.numbers.ctypes.data)


def rows_in_place(x: np.ndarray) -> bool:
    """Whether the kernel reads a block of rows of x where it lies."""
    return x.strides[3] == x.itemsize and x.strides[2] == x.itemsize * x.shape[3]


# Speed of a tile of 1, 2 or 3 vectors of queries, the widest being 1 (Zen 4, D = 64).
WIDTH_SPEED = (0.88, 0.98, 1.0)


def tile_width(elem: str, left: int, right: int) -> int:
    """The number of queries of a tile. A tile of n queries computes window + n - 1 keys, rounded up to a multiple of 8,
    so narrow tiles are better for a short window. It depends on the window alone, since the bits of dk and dv depend on
    it; those of a row of out do not."""
    widest = tile_rows(elem)
    window = left + right + 1
    if window >= OPEN or ROW.nr != len(WIDTH_SPEED):
        return widest
    lanes = widest // ROW.nr
    cost = [(window + n * lanes + 7) / speed for n, speed in enumerate(WIDTH_SPEED, 1)]
    return lanes * (cost.index(min(cost)) + 1)


def elem_of(dtype: np.dtype[Any]) -> str:
    """The accumulation type of a dtype."""
    return "f64" if dtype.itemsize == 8 else "f32"


def longest_first(sequences: np.ndarray) -> np.ndarray:
    """The sequences in the order in which threads take them: those with most work first, if their sizes differ."""
    if len(sequences) > 1:
        q_lens, k_lens = sequences[:, Q_LEN], sequences[:, K_LEN]
        if (q_lens != q_lens[0]).any() or (k_lens != k_lens[0]).any():
            sequences = sequences[np.argsort(-q_lens * k_lens, kind="stable")]
    return np.ascontiguousarray(sequences)


@cache
def storage_of(dtype: np.dtype[Any]) -> int:
    """The code of a dtype in the record. (NumPy takes 4 us to tell a dtype's name.)"""
    return STORAGE[dtype.name]


def is_half(dtype: np.dtype[Any]) -> bool:
    """float16 and bfloat16 enter kernels as uint16."""
    return dtype.itemsize == 2


class Sizes(NamedTuple):
    """What decides, together with the sequences, how a call is cut into work items."""

    dtype: np.dtype[Any]
    q: tuple[int, ...]
    k: tuple[int, ...]
    v_dim: int
    left: int
    right: int

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.q[1] // self.k[1]


def sizes_of(problem: Problem) -> Sizes:
    return Sizes(
        problem.dtype, problem.q.shape, problem.k.shape, problem.v.shape[3], problem.left, problem.right
    )  # fmt: skip


_Made = TypeVar("_Made")
_MOST_BYTES = 2**13  # bytes of a key: larger ones fill the memory and take long to compare


def kept(make: Callable[..., _Made]) -> Callable[..., _Made]:
    """make(int64 array, *key), whose results are kept in a dictionary by the array's numbers and the key."""

    @lru_cache(512)
    def looked_up(numbers: bytes, shape: tuple[int, ...], *key: Any) -> _Made:
        return make(np.frombuffer(numbers, np.int64).reshape(shape), *key)

    @wraps(make)
    def call(numbers: np.ndarray, *key: Any) -> _Made:
        if numbers.nbytes > _MOST_BYTES:
            return make(numbers, *key)
        return looked_up(numbers.tobytes(), numbers.shape, *key)

    return call


def sized(sequences: np.ndarray, sizes: Sizes) -> Record:
    """A record with what sizes decide. The sequences stand in the order in which threads take them."""
    record = Record()
    assert sequences.shape[1] == len(SEQUENCE_FIELDS)
    record.points_to("sequences", sequences)
    record["n_sequences"] = len(sequences)
    record["storage"] = storage_of(sizes.dtype)
    record["group"], record["kv_heads"] = sizes.group, sizes.k[1]
    record["qk_dim"], record["v_dim"] = sizes.q[3], sizes.v_dim
    record["left"], record["right"] = min(sizes.left, OPEN), min(sizes.right, OPEN)
    return record


def describe(problem: Problem, sized: Record, score_kind: str = "score") -> Record:
    """A CALL record with what the problem says of scores and masks. It is the same for every kernel.

    sized: a record with what sizes alone decide. It is copied.
    """
    record, elem = Record(sized), elem_of(problem.dtype)
    record["has_prefix"] = problem.has_prefix
    _describe_scores(record, problem)
    _describe_masks(record, problem, elem)
    if problem.score_mod is not None:
        record["score_mod"] = tile_function(problem.score_mod, score_kind, elem, problem.aux)
        record.points_to("score_aux", aux_table(problem.aux))
        record.keep.append(problem.aux)
    return record


def _describe_scores(record: Record, problem: Problem) -> None:
    """The numbers and small arrays between the products and the user's function, and after it."""
    natural = problem.softcap != 0.0 or problem.score_mod is not None
    unit = 1.0 if problem.score_mod is not None else LOG2E
    record["q_scale"] = problem.scale * (1.0 if natural else LOG2E)
    record["unit"] = unit
    if problem.softcap:
        record["use_softcap"] = 1
        record["softcap_in"], record["softcap_out"] = 1.0 / problem.softcap, problem.softcap * unit
    if problem.bias is not None:
        record.set_array("bias", problem.bias)
        record["bias_storage"] = storage_of(problem.bias.dtype)
    if problem.slopes is not None:
        record.points_to("slopes", problem.slopes)
        record["slopes_b"] = batch_step(problem.slopes)
    if problem.sinks is not None:
        record.points_to("sinks", problem.sinks)
    if problem.dropout_p > 0:
        record["drop"], record["drop_below"] = 1, round(problem.dropout_p * 2**32)
        record["drop_scale"] = 1.0 / (1.0 - problem.dropout_p)
        record["seed"] = problem.seed - (problem.seed >> 63 << 64)  # the same 64 bits, signed


def _describe_masks(record: Record, problem: Problem, elem: str) -> None:
    """Bounds of each query, and the tests of single pairs."""
    if problem.start is not None:
        assert problem.end is not None
        record.points_to("start", problem.start)
        record.points_to("end", problem.end)
        for axis, n, stride in zip("bhs", problem.start.shape, problem.start.strides, strict=True):
            record[f"bounds_{axis}"] = stride if n > 1 else 0
    if problem.masks:
        table = np.array([[m.ctypes.data, *m.strides] for m in problem.masks], np.int64)
        record.points_to("masks", table)
        record["n_masks"] = len(table)
        record.keep.append(problem.masks)
    if problem.segments:
        rows = [[x for ids in pair for x in (ids.ctypes.data, batch_step(ids))] for pair in problem.segments]
        table = np.array(rows, np.int64)
        record.points_to("segments", table)
        record["n_segments"] = len(table)
        record.keep.append(problem.segments)
    if problem.mask_mods:
        spec = []
        for fn, aux in problem.mask_mods:
            numbers = aux_table(aux)
            record.keep += [numbers, aux]
            spec.append([tile_function(fn, "mask", elem, aux), numbers.ctypes.data])
        record.points_to("mask_mods", np.array(spec, np.int64))
        record["n_mask_mods"] = len(spec)
