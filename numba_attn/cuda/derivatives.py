"""Gradients with respect to the arrays of aux on a GPU: the counterpart of cpu/derivatives.py.

A gradient of aux[n] is a sum of contributions, weight * d value / d element, over all pairs that read the element.
Threads add in any order, and a sum of floats depends on it; a sum of integers does not. So the kernel runs twice over
the same pairs, and the result has the same bits every time:

    stage 0   the largest |contribution| to any element of an array, as the bits of a float: a maximum of integers
    stage 1   each contribution times 2**k as two integers, high + low / 2**limb, added as integers

k is such that the largest contribution fills the `limb` bits of high: a sum keeps 2 limb bits below the largest
contribution, and it has 63 - limb bits of room above it. `limb_bits` gives as many as the number of pairs leaves: 54
bits and more up to 2**31 pairs. A contribution that is not finite is a flag of its element instead.

Each thread first adds up what goes to the same element, in registers, and adds it to memory when another element's turn
comes: there are no more writes than changes of element, and a number for each head costs one write a thread. A kernel

    calls pending = start(sums), pending = add(score, (b, h, i, j), table, weight, sums, pending) for every pair, and
    flush(sums, pending) at its end; `sums` and `pending` are UniTuples of int64, `aux_functions` says how long.

For each array that is asked for there is a buffer of int64, zeros at first:

    [0] the largest |contribution|    [1] the status, as cpu/derivatives.py has it: 1 a hand-written gradient meets a
    function that does not read one element, 2 a read outside the array    then for each element: high, low, flags
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from ..userfn import accepted
from ..userfn.aux_types import ARRAY, ELEMENT, OUTSIDE, READS, SEED, UNREAD
from ..userfn.scalar_types import FLOAT
from ..userfn.transcendental import F32, I32, I64
from .compile import cgutils, intrinsic, libdevice, types
from .modifiers import (
    AS_FLOAT,
    AUX,
    DUALS,
    NOT_COMPILED,
    NOT_DIFFERENTIATED,
    SCORES,
    arrays_of,
    aux_types_of,
    cached,
    check,
    device,
    position,
    user_function,
    wrapped_types,
)

HEADER, CELLS = 2, 3  # numbers of a buffer in front of its elements, and of an element
PENDING = 4  # numbers of an array that a thread carries along: element or -1, high, low, k
PLUS_INFINITY, MINUS_INFINITY, NOT_A_NUMBER = 1, 2, 4  # flags
ONE_ELEMENT, INSIDE = 1, 2  # what a status says is not so
MOST_LIMB, ROOM = 40, 4  # 2**ROOM reads of an element in a pair


def limb_bits(pairs: int) -> int:
    """The number `limb` for so many pairs: 2**ROOM contributions from each to one element do not overflow."""
    return min(MOST_LIMB, 62 - ROOM - max(0, pairs - 1).bit_length())


def sums_numbers(stage: int, limb: int, buffers: Sequence[int]) -> tuple[int, ...]:
    """What the kernel gets as `sums`, from the addresses of the buffers of the arrays that are asked for."""
    return (stage, limb, *buffers)


def buffer_size(size: int) -> int:
    """Numbers in the buffer of an array of so many elements."""
    return HEADER + CELLS * size


class AuxFunctions(NamedTuple):
    """Plain functions for a kernel, see above. sums has 2 + n numbers and pending PENDING * n, for n arrays."""

    start: Callable[..., Any]
    add: Callable[..., Any]
    flush: Callable[..., Any]


class Place(NamedTuple):
    """Where the contributions to an array go, in which stage."""

    stage: Any
    limb: Any
    address: Any  # of the array's buffer


class Pending(NamedTuple):
    """The contributions to an array that a thread has not yet added to memory: PENDING numbers."""

    element: Any  # which they are for, or -1
    high: Any
    low: Any
    k: Any


# --- memory -----------------------------------------------------------------------------------------------------------


def _global(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(I64, 1))


def _atomic(operation: str) -> Any:
    @intrinsic
    def atomic(typingctx, address, value):
        def codegen(context, builder, sig, args):
            builder.atomic_rmw(operation, _global(builder, args[0]), args[1], "monotonic")
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return atomic


atomic_add, atomic_max, atomic_or = _atomic("add"), _atomic("umax"), _atomic("or")


@intrinsic
def load(typingctx, address):
    def codegen(context, builder, sig, args):
        return builder.load(_global(builder, args[0]), align=8)

    return types.int64(types.int64), codegen


# --- a contribution as two integers -----------------------------------------------------------------------------------


@intrinsic
def magnitude(typingctx, x):
    """The bits of |x|, in the order of the numbers."""

    def codegen(context, builder, sig, args):
        narrow = args[0].type == F32
        bits = builder.bitcast(args[0], I32 if narrow else I64)
        bits = builder.and_(bits, bits.type(2 ** (bits.type.width - 1) - 1))
        return builder.zext(bits, I64) if narrow else bits

    return types.int64(x), codegen


def _exponent_of_two(elem: str) -> Any:
    @intrinsic
    def two_to(typingctx, k):
        """2**k as a float, for a k that is the exponent of a normal number."""

        def codegen(context, builder, sig, args):
            to, mantissa, bias = (I32, 23, 127) if elem == "f32" else (I64, 52, 1023)
            k = builder.trunc(args[0], to) if to is I32 else args[0]
            bits = builder.shl(builder.add(k, to(bias)), to(mantissa))
            return builder.bitcast(bits, F32 if elem == "f32" else ir.DoubleType())

        return SCORES.Score(elem).float(types.int64), codegen

    return two_to


TWO_TO = {elem: _exponent_of_two(elem) for elem in FLOAT}
ROUNDED = {"f32": device(lambda x: libdevice.rintf(x)), "f64": device(lambda x: libdevice.rint(x))}


@device
def _send(address, element, high, low):
    at = address + 8 * (HEADER + CELLS * element)
    atomic_add(at, high)
    atomic_add(at + 8, low)


def _noting(elem: str) -> Any:
    """(place, at, contribution, pending) -> pending with the contribution to element `at`."""
    two_to, rounded, zero, infinity = TWO_TO[elem], ROUNDED[elem], FLOAT[elem](0), FLOAT[elem](math.inf)

    @device
    def note(place, at, contribution, pending):
        element, high, low, k = pending
        finite = abs(contribution) < infinity
        if place.stage == 0:
            high = max(high, magnitude(contribution if finite else zero))
        elif not finite:
            flag = PLUS_INFINITY if contribution > zero else MINUS_INFINITY
            flag = flag if contribution == contribution else NOT_A_NUMBER
            atomic_or(place.address + 8 * (HEADER + CELLS * at + 2), flag)
        else:
            x = contribution * two_to(k >> 1) * two_to(k - (k >> 1))
            whole = rounded(x)
            part = rounded((x - whole) * two_to(place.limb))
            if at != element:
                if element >= 0:
                    _send(place.address, element, high, low)
                element, high, low = at, np.int64(0), np.int64(0)
            high += np.int64(whole)
            low += np.int64(part)
        return Pending(element, high, low, k)

    return note


NOTE = {elem: _noting(elem) for elem in FLOAT}


def _starting(elem: str) -> Any:
    shift, bias = (23, 127) if elem == "f32" else (52, 1023)

    def start(place):
        k = np.int64(0)
        if place.stage != 0:
            k = place.limb - 1 - (max(load(place.address) >> shift, np.int64(1)) - bias)
        return Pending(np.int64(-1), np.int64(0), np.int64(0), k)

    return start


def _flush(place, pending):
    if place.stage == 0:
        atomic_max(place.address, pending.high)
    elif pending.element >= 0:
        _send(place.address, pending.element, pending.high, pending.low)


# --- the contributions of a pair --------------------------------------------------------------------------------------


def _adding_duals(mod: Any, elem: str, aux: Sequence[np.ndarray], n: int) -> Callable[..., Any]:
    """What one pair gives to array n: an evaluation for each read, that read's tangent being 1."""
    call, kinds = user_function(mod), aux_types_of(aux)
    wrapped = wrapped_types(elem, "seed", kinds, tuple(m == n for m in range(len(kinds))))
    arguments = (DUALS.Dual(elem), *[SCORES.Index(elem, 31)] * 4, *wrapped)
    check(call, arguments, (DUALS.Dual, *SCORES.real), NOT_DIFFERENTIATED)
    arrays, wrap, cells = arrays_of(kinds), AUX.wrapped(wrapped), AUX.cells(4)
    at, dual, convert, tangent_of = SCORES.AS_SHORT_INDEX[elem], DUALS.dual, DUALS.AS_DUAL[elem], DUALS.tangent_of
    zero, note = FLOAT[elem](0), NOTE[elem]

    def add(score, pair, table, weight, place, pending):
        record = cells()
        arguments = wrap(arrays(table), (), record)
        b, h, i, j = pair
        s, b, h, i, j = dual(score, zero), at(position(b)), at(position(h)), at(position(i)), at(position(j))
        seed, reads = 0, 1 if weight != zero else 0
        while seed < reads:
            record[READS], record[SEED], record[ARRAY], record[ELEMENT] = 0, seed, 0, 0
            y = convert(call(s, b, h, i, j, *arguments))
            reads = record[READS]
            if seed < reads:
                if record[ELEMENT] < 0:
                    atomic_max(place.address + 8, INSIDE)
                else:
                    pending = note(place, record[ELEMENT], weight * tangent_of(y), pending)
            seed += 1
        return pending

    return add


def _adding_by_hand(mod: Any, elem: str, aux: Sequence[np.ndarray], n: int) -> Callable[..., Any]:
    """What one pair gives to array n by the user's own gradient, at the one element that the function reads."""
    call, grad, kinds = user_function(mod), user_function(mod.grad), aux_types_of(aux)
    plain = wrapped_types(elem, "number", kinds)
    traced = wrapped_types(elem, "trace", kinds, tuple(m == n for m in range(len(kinds))))
    leading = (SCORES.Score(elem), *[SCORES.Index(elem, 31)] * 4)
    check(call, (*leading, *traced), SCORES.real, NOT_COMPILED)
    returned = check(grad, (*leading, *plain), (types.BaseTuple, *SCORES.real), NOT_COMPILED)
    found = len(returned) if isinstance(returned, types.BaseTuple) else 1
    if found < n + 2:
        raise ValueError(
            f"score_mod: a gradient by aux[{n}] is asked for, but grad returns {found} number(s); it takes the tuple "
            f"(d/dscore, d/daux[0], ...), here of {n + 2} or more. Or leave grad out: na.score_mod(fn) is "
            "differentiated by the library"
        )
    arrays, wrap, wrap_plain, cells = arrays_of(kinds), AUX.wrapped(traced), AUX.wrapped(plain), AUX.cells(2 * n + 2)
    natural, at, as_float = SCORES.AS_SCORE[elem], SCORES.AS_SHORT_INDEX[elem], AS_FLOAT[elem]
    zero, note, entries, entry, cell = FLOAT[elem](0), NOTE[elem], DUALS.numbers(elem, n + 2), n + 1, 2 * n

    def add(score, pair, table, weight, place, pending):
        if weight != zero:
            b, h, i, j = pair
            record = cells()
            record[cell] = UNREAD
            arguments, plain = wrap(arrays(table), (), record), wrap_plain(arrays(table), (), 0)
            s, b, h, i, j = natural(score), at(position(b)), at(position(h)), at(position(i)), at(position(j))
            as_float(call(s, b, h, i, j, *arguments))
            slope = entries(grad(s, b, h, i, j, *plain))[entry]
            if record[cell] >= 0:
                pending = note(place, record[cell], weight * slope, pending)
            else:
                atomic_max(place.address + 8, INSIDE if record[cell] == OUTSIDE else ONE_ELEMENT)
        return pending

    return add


# --- all arrays -------------------------------------------------------------------------------------------------------

NUMBER = types.int64
PLACE = types.NamedUniTuple(NUMBER, len(Place._fields), Place)
CARRIED = types.NamedUniTuple(NUMBER, PENDING, Pending)


def aux_functions(mod: Any, elem: str, aux: Sequence[np.ndarray], asked: Sequence[bool]) -> AuxFunctions:
    """The functions that sum the gradients of the arrays of aux that are asked for, at least one.

    add skips pairs of weight 0; a weight is a float of the accumulation type, d loss / d modified score.

    Raises
    ------
    TypeError
        If the function cannot be differentiated, or its own gradient not be compiled.
    ValueError
        If its own gradient has no entry for an array that is asked for.
    """
    asked = tuple(map(bool, asked))
    return cached("aux", mod, elem, aux, asked, lambda: _aux_functions(mod, elem, aux, asked))


def _aux_functions(mod: Any, elem: str, aux: Sequence[np.ndarray], asked: tuple[bool, ...]) -> AuxFunctions:
    of = _adding_by_hand if isinstance(mod, accepted.ScoreMod) and mod.grad is not None else _adding_duals
    adding = [of(mod, elem, aux, n) for n, yes in enumerate(asked) if yes]
    starting, float_type = _starting(elem), SCORES.Score(elem).float
    length = PENDING * len(adding)

    def places(context, builder, sums, value):
        """A Place for each array."""
        stage, limb, *addresses = cgutils.unpack_tuple(builder, value, sums.count)
        return [context.make_tuple(builder, PLACE, [stage, limb, address]) for address in addresses]

    def carried(context, builder, value):
        """A Pending for each array."""
        numbers = cgutils.unpack_tuple(builder, value, length)
        each = [numbers[n : n + PENDING] for n in range(0, length, PENDING)]
        return [context.make_tuple(builder, CARRIED, four) for four in each]

    def joined(context, builder, result, each):
        numbers = [number for four in each for number in cgutils.unpack_tuple(builder, four, PENDING)]
        return context.make_tuple(builder, result, numbers)

    @intrinsic
    def start_all(typingctx, sums):
        def codegen(context, builder, sig, args):
            each = [
                context.compile_internal(builder, starting, CARRIED(PLACE), [place])
                for place in places(context, builder, sums, args[0])
            ]
            return joined(context, builder, sig.return_type, each)

        return types.UniTuple(NUMBER, length)(sums), codegen

    @intrinsic
    def add_all(typingctx, score, pair, table, weight, sums, pending):
        four = types.UniTuple(types.int32, 4)

        def codegen(context, builder, sig, args):
            one = CARRIED(float_type, four, table, float_type, PLACE, CARRIED)
            rest = zip(places(context, builder, sums, args[4]), carried(context, builder, args[5]), strict=True)
            each = [
                context.compile_internal(builder, add, one, [*args[:4], place, before])
                for add, (place, before) in zip(adding, rest, strict=True)
            ]
            return joined(context, builder, sig.return_type, each)

        return pending(float_type, four, table, float_type, sums, pending), codegen

    @intrinsic
    def flush_all(typingctx, sums, pending):
        def codegen(context, builder, sig, args):
            rest = zip(places(context, builder, sums, args[0]), carried(context, builder, args[1]), strict=True)
            for place, last in rest:
                context.compile_internal(builder, _flush, types.void(PLACE, CARRIED), [place, last])
            return context.get_dummy_value()

        return types.void(sums, pending), codegen

    def start(sums):
        return start_all(sums)

    def add(score, pair, table, weight, sums, pending):
        return add_all(score, pair, table, weight, sums, pending)

    def flush(sums, pending):
        flush_all(sums, pending)

    return AuxFunctions(start, add, flush)


# --- the sums as floats -----------------------------------------------------------------------------------------------


def total_function(elem: str) -> Callable[..., Any]:
    """The plain function (address of a buffer, element, limb) -> the sum of an element, float64.

    inf where contributions were inf, NaN where one was or where there were infinities of both signs.
    """
    shift, bias = (23, 127) if elem == "f32" else (52, 1023)
    two_to, infinity, nan = TWO_TO["f64"], np.float64(math.inf), np.float64(math.nan)

    def total(address, element, limb):
        at = address + 8 * (HEADER + CELLS * element)
        high, low, flags = load(at), load(at + 8), load(at + 16)
        k = limb - 1 - (max(load(address) >> shift, np.int64(1)) - bias)
        near = np.float64(high)  # rounded, where it has more than 53 bits
        rest = np.float64(high - np.int64(near)) + np.float64(low) * two_to(-limb)
        sum_ = (near + rest) * two_to(-(k >> 1)) * two_to((k >> 1) - k)
        if flags == PLUS_INFINITY:
            return infinity
        if flags == MINUS_INFINITY:
            return -infinity
        return sum_ if flags == 0 else nan

    return total


def totals(buffer: np.ndarray, elem: str, limb: int) -> np.ndarray:
    """The same in NumPy: the sums of all elements of an array, from its buffer."""
    shift, bias = (23, 127) if elem == "f32" else (52, 1023)
    high, low, flags = buffer[HEADER:].reshape(-1, CELLS).T
    k = limb - 1 - (max(int(buffer[0]) >> shift, 1) - bias)
    near = high.astype(np.float64)
    rest = (high - near.astype(np.int64)).astype(np.float64) + np.ldexp(low.astype(np.float64), -limb)
    sums = np.ldexp(near + rest, -k)
    special = np.array([0, np.inf, -np.inf, np.nan, np.nan, np.nan, np.nan, np.nan])
    return np.where(flags == 0, sums, special[flags])
