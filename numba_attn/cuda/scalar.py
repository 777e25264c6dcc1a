"""What a thread does alone: integers, copies between global and shared memory, conversions, barriers, atomics."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from .code import (
    DOUBLE,
    FLOAT,
    FLOATS,
    I1,
    I8,
    I16,
    I32,
    I64,
    SIZE,
    VECTOR,
    VOID,
    as_i32,
    as_i64,
    asm,
    call_llvm,
    fma,
    global_pointer,
    i32,
    shared,
    shared_address,
    shuffle_xor,
    unpack,
    vector_of,
    warp_asm,
)
from .compile import cgutils, intrinsic, types
from .multiply import pack_pair
from .tile import Registers


def _scalar(result: Any, code: Callable[..., Any], n: int) -> Any:
    """An intrinsic of n arguments of any types: code(builder, *args)."""

    def codegen(context, builder, sig, args):
        value = code(builder, *args)
        return context.get_dummy_value() if sig.return_type == types.void else value

    if n == 0:

        @intrinsic
        def scalar(typingctx):
            return result(), codegen

    elif n == 1:

        @intrinsic
        def scalar(typingctx, a):
            return result(a), codegen

    elif n == 2:

        @intrinsic
        def scalar(typingctx, a, b):
            return result(a, b), codegen

    else:

        @intrinsic
        def scalar(typingctx, a, b, c):
            return result(a, b, c), codegen

    return scalar


@cache
def warp_sum(acc: str) -> Any:
    """(x) -> the sum over the warp, in every lane."""

    def code(builder, x):
        for lanes in (16, 8, 4, 2, 1):
            x = builder.fadd(x, shuffle_xor(builder, x, lanes))
        return x

    return _scalar(FLOATS[acc][1], code, 1)


def _special(name: str) -> Any:
    return _scalar(types.int32, lambda builder: call_llvm(builder, f"llvm.nvvm.read.ptx.sreg.{name}", I32, []), 0)


def _ints(operation: str) -> Any:
    """An operation of 32-bit integers: Numba's own would make them 64 bits wide."""
    return _scalar(
        types.int32, lambda builder, a, b: getattr(builder, operation)(as_i32(builder, a), as_i32(builder, b)), 2
    )


thread, block = _special("tid.x"), _special("ctaid.x")
add, sub, mul, udiv, urem, bit_and, bit_or = map(_ints, ("add", "sub", "mul", "udiv", "urem", "and_", "or_"))
shift_left = _ints("shl")
narrow = _scalar(types.int32, lambda builder, a: as_i32(builder, a), 1)
# (x) -> x, of which LLVM knows nothing: what follows from it is computed where it stands, not before the loop, where it
# would take registers through all of it.
opaque = _scalar(
    types.int32,
    lambda builder, x: asm(builder, I32, "mov.b32 $0, $1;", "=r,r", [as_i32(builder, x)], effect=True),
    1,
)
inside = _scalar(  # low <= x < high, of 32-bit integers
    types.boolean,
    lambda builder, x, low, high: builder.and_(
        builder.icmp_signed(">=", as_i32(builder, x), as_i32(builder, low)),
        builder.icmp_signed("<", as_i32(builder, x), as_i32(builder, high)),
    ),
    3,
)
sync = _scalar(types.void, lambda builder: call_llvm(builder, "llvm.nvvm.barrier0", VOID, []), 0)
sync_warp = _scalar(types.void, lambda builder: warp_asm(builder, VOID, "bar.warp.sync -1;", "~{memory}", [], True), 0)
commit = _scalar(types.void, lambda b: asm(b, VOID, "cp.async.commit_group;", "~{memory}", [], effect=True), 0)
wait_all = _scalar(types.void, lambda b: asm(b, VOID, "cp.async.wait_group 0;", "~{memory}", [], effect=True), 0)


def _copy_async(builder, size, to, offset, address, there):
    """`size` bytes, 0 if they are not there; whole vectors past the first cache, where nobody would find them again."""
    text = f"cp.async.{'cg' if size == VECTOR else 'ca'}.shared.global [$0+{offset}], [$1], {size}, $2;"
    there = builder.select(there, i32(size), i32(0))
    asm(builder, VOID, text, "r,l,r,~{memory}", [to, address, there], effect=True)


@cache
def copy_rows(rows: int, per_pass: int, stride: int) -> Any:
    """(to, address, step, row, valid): 16 bytes of rows row, row + per_pass, ... below `rows`, from address, address +
    step, ... to shared memory at to, to + per_pass * stride, ...; 0 for rows from `valid` on. Asynchronous.

    Places in shared memory are immediates, and addresses a running sum: as loop invariants they would take a register
    or two each.
    """

    @intrinsic
    def copy_rows(typingctx, to, address, step, row, valid):
        def codegen(context, builder, sig, args):
            to = shared_address(builder, as_i32(builder, args[0]))
            address, step = as_i64(builder, args[1]), as_i64(builder, args[2])
            row, valid = as_i32(builder, args[3]), as_i32(builder, args[4])
            for n in range(0, rows, per_pass):
                there = builder.icmp_signed("<", builder.add(row, i32(n)), valid)
                if n + per_pass > rows:  # the last pass may be short
                    with builder.if_then(builder.icmp_signed("<", row, i32(rows - n))):
                        _copy_async(builder, VECTOR, to, n * stride, address, there)
                else:
                    _copy_async(builder, VECTOR, to, n * stride, address, there)
                address = builder.add(address, step)
            return context.get_dummy_value()

        return types.void(to, address, step, row, valid), codegen

    return copy_rows


@cache
def copy_async(size: int) -> Any:
    """(to, address, there): 4, 8 or 16 bytes from global to shared memory, 0 if they are not there. Asynchronous."""

    def code(builder, to, address, there):
        _copy_async(builder, size, shared_address(builder, as_i32(builder, to)), 0, address, there)

    return _scalar(types.void, code, 3)


def _any_lane(builder, flag):
    kind = ir.LiteralStructType([I32, I1])
    name = "llvm.nvvm.vote.sync"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [I32, I32, I1]), name)
    call = builder.call(function, [i32(-1), i32(1), flag], attrs=("convergent",))
    return builder.extract_value(call, 1)


any_lane = _scalar(types.boolean, _any_lane, 1)  # (flag) -> whether it is set in any lane of the warp: all of them ask


def _exp2(builder, x):
    return asm(builder, FLOAT, "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x])


fast_reciprocal = _scalar(  # off by a rounding at most; LLVM's division takes ten instructions and a branch
    types.float32, lambda builder, x: asm(builder, FLOAT, "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x]), 1
)
fast_exp2 = _scalar(types.float32, _exp2, 1)
fast_log2 = _scalar(types.float32, lambda builder, x: asm(builder, FLOAT, "lg2.approx.f32 $0, $1;", "=f,f", [x]), 1)


@intrinsic
def choose(typingctx, condition, yes, no):
    def codegen(context, builder, sig, args):
        return builder.select(*args)

    return yes(condition, yes, no), codegen


@intrinsic
def with_sign_of(typingctx, x, y):
    """|x| with the sign of y, float32: one instruction, where a comparison and a choice take two and a predicate."""

    def codegen(context, builder, sig, args):
        magnitude, sign = (builder.bitcast(a, I32) for a in args)
        bits = builder.or_(builder.and_(magnitude, i32(0x7FFFFFFF)), builder.and_(sign, i32(0x80000000)))
        return builder.bitcast(bits, FLOAT)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def multiply_add(typingctx, a, b, c):
    def codegen(context, builder, sig, args):
        return fma(builder, *args)

    return a(a, a, a), codegen


def _load_words(builder, offset):
    """Four int32 of shared memory, by one access."""
    vector = builder.load(shared(builder, offset, 0, ir.VectorType(I32, 4)), align=VECTOR)
    return [builder.extract_element(vector, i32(k)) for k in range(4)]


@intrinsic
def load_row(typingctx, offset):
    def codegen(context, builder, sig, args):
        return context.make_tuple(builder, sig.return_type, _load_words(builder, args[0]))

    return types.UniTuple(types.int32, 4)(offset), codegen


@intrinsic
def store_row(typingctx, offset, a, b, c, d):
    def codegen(context, builder, sig, args):
        words = [as_i32(builder, x) for x in args[1:]]
        pointer = shared(builder, args[0], 0, ir.VectorType(I32, 4))
        builder.store(vector_of(builder, words), pointer, align=VECTOR)
        return context.get_dummy_value()

    return types.void(offset, a, b, c, d), codegen


load_word = _scalar(types.int32, lambda builder, offset: builder.load(shared(builder, offset, 0, I32), align=4), 1)
store_word = _scalar(
    types.void,
    lambda builder, offset, x: builder.store(as_i32(builder, x), shared(builder, offset, 0, I32), align=4),
    2,
)


def _atomic(operation):
    return _scalar(
        types.void,
        lambda builder, offset, x: builder.atomic_rmw(
            operation, shared(builder, offset, 0, I32), as_i32(builder, x), "monotonic"
        ),
        2,
    )


shared_min, shared_max, shared_or = _atomic("min"), _atomic("max"), _atomic("or")
load_i64 = _scalar(types.int64, lambda builder, a: builder.load(global_pointer(builder, a, I64), align=8), 1)
load_byte = _scalar(
    types.int32, lambda builder, a: builder.zext(builder.load(global_pointer(builder, a, I8), align=1), I32), 1
)


def widen(builder: Any, storage: str, bits: Any) -> Any:
    """A half, as an integer, as float32."""
    if storage == "bf16":
        return builder.bitcast(builder.shl(builder.zext(bits, I32), i32(16)), FLOAT)
    return asm(builder, FLOAT, "cvt.f32.f16 $0, $1;", "=f,h", [bits])


def narrowed(builder: Any, storage: str, x: Any) -> Any:
    """A float32 as a half, as an integer."""
    return asm(builder, I16, f"cvt.rn.{storage}.f32 $0, $1;", "=h,f", [x])


def _to(builder: Any, x: Any, kind: Any) -> Any:
    if x.type == kind:
        return x
    return builder.fpext(x, kind) if kind == DOUBLE else builder.fptrunc(x, kind)


def _read(builder: Any, pointer_of: Callable[[Any], Any], storage: str, acc: str) -> Any:
    kind = FLOATS[acc][0]
    if storage in FLOATS:
        x = builder.load(pointer_of(FLOATS[storage][0]), align=SIZE[storage])
    else:
        x = widen(builder, storage, builder.load(pointer_of(I16), align=2))
    return _to(builder, x, kind)


def _write(builder: Any, pointer_of: Callable[[Any], Any], storage: str, x: Any) -> None:
    if storage in FLOATS:
        builder.store(_to(builder, x, FLOATS[storage][0]), pointer_of(FLOATS[storage][0]), align=SIZE[storage])
    else:
        builder.store(narrowed(builder, storage, _to(builder, x, FLOAT)), pointer_of(I16), align=2)


@cache
def load_global(storage: str, acc: str) -> Any:
    """(address) -> one number of type `storage` as `acc`."""

    def code(builder, address):
        return _read(builder, lambda kind: global_pointer(builder, address, kind), storage, acc)

    return _scalar(FLOATS[acc][1], code, 1)


@cache
def store_global(storage: str) -> Any:
    """(address, x)"""

    def code(builder, address, x):
        _write(builder, lambda kind: global_pointer(builder, address, kind), storage, x)

    return _scalar(types.void, code, 2)


@cache
def load_shared(storage: str, acc: str) -> Any:
    def code(builder, offset):
        return _read(builder, lambda kind: shared(builder, offset, 0, kind), storage, acc)

    return _scalar(FLOATS[acc][1], code, 1)


@cache
def store_shared(storage: str) -> Any:
    def code(builder, offset, x):
        _write(builder, lambda kind: shared(builder, offset, 0, kind), storage, x)

    return _scalar(types.void, code, 2)


@cache
def copy_element(size: int) -> Any:
    """(to, address, there): one element from global to shared memory, 0 if it is not there."""
    kind = {2: I16, 4: I32, 8: I64}[size]

    def code(builder, to, address, there):
        cell = cgutils.alloca_once_value(builder, ir.Constant(kind, 0))
        with builder.if_then(there):
            builder.store(builder.load(global_pointer(builder, address, kind), align=size), cell)
        builder.store(builder.load(cell), shared(builder, to, 0, kind), align=size)

    return _scalar(types.void, code, 3)


@cache
def copy_out(size: int) -> Any:
    """(address, offset): `size` bytes from shared to global memory."""
    kind = ir.VectorType(I32, 4) if size == VECTOR else {2: I16, 4: I32, 8: I64}[size]

    def code(builder, address, offset):
        x = builder.load(shared(builder, offset, 0, kind), align=size)
        builder.store(x, global_pointer(builder, address, kind), align=size)

    return _scalar(types.void, code, 2)


@cache
def finite_vector(storage: str) -> Any:
    """(offset) -> whether 16 bytes of shared memory hold finite numbers only."""
    exponent = {"f32": 0x7F800000, "f64": 0x7FF00000, "f16": 0x7C00, "bf16": 0x7F80}[storage]

    def code(builder, offset):
        words = _load_words(builder, offset)
        ok = ir.Constant(I1, 1)
        for word in words[1::2] if storage == "f64" else words:
            for shift in (0, 16) if SIZE[storage] == 2 else (0,):
                mask = i32(exponent << shift)
                ok = builder.and_(ok, builder.icmp_unsigned("!=", builder.and_(word, mask), mask))
        return ok

    return _scalar(types.boolean, code, 1)


@cache
def repair_vector(storage: str) -> Any:
    """(offset) -> a bit for each number in 16 bytes of shared memory that is not finite; it becomes 0 there."""
    exponent = {"f32": 0x7F800000, "f64": 0x7FF00000, "f16": 0x7C00, "bf16": 0x7F80}[storage]

    def code(builder, offset):
        words = _load_words(builder, offset)
        found = i32(0)
        for n in range(VECTOR // SIZE[storage]):
            low = n * SIZE[storage] // 4  # the number's first word
            shift, keep = (16 * (n % 2), 0xFFFF0000 >> 16 * (n % 2)) if SIZE[storage] == 2 else (0, 0)
            mask = i32(exponent << shift)
            top = words[low + (storage == "f64")]
            bad = builder.icmp_unsigned("==", builder.and_(top, mask), mask)
            found = builder.or_(found, builder.select(bad, i32(1 << n), i32(0)))
            for w in range(low, low + max(1, SIZE[storage] // 4)):
                words[w] = builder.select(bad, builder.and_(words[w], i32(keep)), words[w])
        builder.store(vector_of(builder, words), shared(builder, offset, 0, ir.VectorType(I32, 4)), align=VECTOR)
        return found

    return _scalar(types.int32, code, 1)


@cache
def store_tile(regs: Registers, storage: str, stride: int, vector: int) -> Any:
    """(tile, offset): the tile to shared memory, `vector` neighbouring columns by one access. offset: of the thread's
    corner."""
    size = SIZE[storage]

    @intrinsic
    def store_tile(typingctx, tile, offset):
        def codegen(context, builder, sig, args):
            tile = unpack(builder, args[0], regs.size)
            for a, row in enumerate(regs.rows):
                for c in range(0, len(regs.cols), vector):
                    at = row * stride + regs.cols[c] * size
                    part = tile[a * len(regs.cols) + c : a * len(regs.cols) + c + vector]
                    if storage in FLOATS:
                        x = vector_of(builder, part)
                    else:
                        x = pack_pair(builder, storage, *part)
                    builder.store(x, shared(builder, args[1], at, x.type), align=vector * size)
            return context.get_dummy_value()

        return types.void(tile, offset), codegen

    return store_tile
