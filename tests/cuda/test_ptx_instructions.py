"""The emulator's instructions, one by one, against NumPy and Python's whole numbers, with the numbers at which they are
most easily wrong. Bit for bit, but for NaN, whose bits the manual does not fix.
"""

from fractions import Fraction
from math import copysign, inf, nan
from typing import Any

import numpy as np
import pytest
import seeds
from ptx import PTXError, launch, parse
from ptx.arithmetic import TABLE
from ptx.lowering import lower
from ptx.parser import SIZE

F32 = [
    0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 3.5, 1e-45, -1e-40, 1.1754944e-38, 3.4e38, -3.4e38, inf, -inf, nan, 65504.0,
    65520.0, 6e-8, 2.9802322e-08, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**31, -(2.0**31), 2.0**32, 1e10, 2.0**63, -0.49,
]  # fmt: skip
EDGES = {bits: [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 255, (1 << bits) - 1, (1 << bits) - 2, 1 << (bits - 1),
                (1 << (bits - 1)) - 1, (1 << (bits - 1)) + 1] for bits in (16, 32, 64)}  # fmt: skip
NUMPY = {
    "s8": "i1", "u8": "u1", "b8": "u1", "s16": "i2", "u16": "u2", "b16": "u2", "s32": "i4", "u32": "u4", "b32": "u4",
    "s64": "i8", "u64": "u8", "b64": "u8", "f16": "f2", "f32": "f4", "f64": "f8",
}  # fmt: skip
REGISTER = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}  # there is none of 8 bits


def numbers(type_: str, n: int, seed: int) -> np.ndarray:
    """Edge numbers and random ones, in random order."""
    rng = seeds.generator(seed)
    kind = np.dtype(NUMPY[type_])
    if kind.kind == "f":
        with np.errstate(over="ignore"):
            edges = np.array(F32, kind)
        drawn = rng.standard_normal(n) * 10.0 ** rng.integers(-8, 9, n)
        out = np.concatenate([edges, drawn.astype(kind)])[rng.integers(0, len(edges) + n, n)]
    else:
        bits = 8 * kind.itemsize
        edges = np.array([e % (1 << bits) for e in EDGES[max(bits, 16)]], np.uint64).astype(f"u{kind.itemsize}")
        drawn = rng.integers(0, 1 << bits, n, np.uint64, endpoint=False) if bits < 64 else rng.bytes(8 * n)
        drawn = np.frombuffer(drawn, np.uint64) if isinstance(drawn, bytes) else drawn
        mixed = np.concatenate([edges, drawn.astype(edges.dtype)])
        out = mixed[rng.integers(0, len(mixed), n)].view(kind)
    return out


def run(name: str, result: str, *operands: np.ndarray | str, n: int = 256) -> np.ndarray:
    """The instruction's results for n threads. A string among the operands is a constant."""
    declared, loads, listed = [], [], []
    arrays = [x for x in operands if not isinstance(x, str)]
    for k, x in enumerate(operands):
        if isinstance(x, str):
            listed.append(x)
            continue
        size = x.dtype.itemsize
        declared.append(f".reg .{REGISTER[size] if x.dtype.kind != 'f' or size == 2 else f'f{8 * size}'} %x{k};")
        at = next(n for n, a in enumerate(arrays) if a is x)
        loads.append(f"ld.param.u64 %rd2, [p{at}]; mad.wide.u32 %rd3, %r1, {size}, %rd2; "
                     f"ld.global.b{8 * size} %x{k}, [%rd3];")  # fmt: skip
        listed.append(f"%x{k}")
    out = np.zeros(n, NUMPY[result] if result != "pred" else np.uint32)
    size = out.dtype.itemsize
    register = "pred" if result == "pred" else REGISTER[size] if out.dtype.kind != "f" or size == 2 else f"f{8 * size}"
    parameters = ", ".join(f".param .u64 p{k}" for k in range(len(arrays) + 1))
    text = f""".version 8.0
.target sm_80
.address_size 64
.visible .entry one({parameters})
{{
    .reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .{register} %d; {" ".join(declared)}
    mov.u32 %r1, %tid.x;
    {" ".join(loads)}
    {name} %d, {", ".join(listed)};
    ld.param.u64 %rd2, [p{len(arrays)}]; mad.wide.u32 %rd3, %r1, {size}, %rd2;
    {"selp.u32 %r2, 1, 0, %d; st.global.u32 [%rd3], %r2;" if result == "pred" else f"st.global.b{8 * size} [%rd3], %d;"}
    ret;
}}"""
    ran = launch(text, 1, n, [*(x.copy() for x in arrays), out])
    assert not ran.findings
    return out


def same(got: np.ndarray, want: np.ndarray) -> None:
    want = np.asarray(want).astype(got.dtype)
    if got.dtype.kind == "f":
        either = np.isnan(got) & np.isnan(want)
        unsigned = f"u{got.dtype.itemsize}"
        np.testing.assert_array_equal(np.where(either, 0, got.view(unsigned)), np.where(either, 0, want.view(unsigned)))
    else:
        np.testing.assert_array_equal(got, want)


def of_integers(function: Any, result: str, *operands: np.ndarray) -> np.ndarray:
    """Python's whole numbers, cut to the result's bits."""
    bits = 8 * SIZE[result]
    found = [function(*(int(v) for v in row)) % (1 << bits) for row in zip(*operands, strict=True)]
    return np.array(found, np.uint64).astype(f"u{bits // 8}").view(NUMPY[result])


def quotient(x: int, y: int) -> int:
    """Cut towards 0; of a division by 0 all ones."""
    return -1 if y == 0 else abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def bits_of(type_: str) -> int:
    return 8 * SIZE[type_]


BINARY = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul.lo": lambda x, y: x * y,
    "div": quotient, "rem": lambda x, y: x if y == 0 else x - quotient(x, y) * y, "min": min, "max": max,
}  # fmt: skip
INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")


@pytest.mark.parametrize("type_", INTEGERS)
@pytest.mark.parametrize("name", BINARY)
def test_integers(name: str, type_: str) -> None:
    x, y = numbers(type_, 256, 1), numbers(type_, 256, 2)
    same(run(f"{name}.{type_}", type_, x, y), of_integers(BINARY[name], type_, x, y))


@pytest.mark.parametrize("type_", INTEGERS)
def test_products(type_: str) -> None:
    """High halves, wide ones and sums of them."""
    x, y, z = (numbers(type_, 256, seed) for seed in (3, 4, 5))
    bits = bits_of(type_)
    same(run(f"mul.hi.{type_}", type_, x, y), of_integers(lambda a, b: (a * b) >> bits, type_, x, y))
    same(run(f"mad.hi.{type_}", type_, x, y, z), of_integers(lambda a, b, c: ((a * b) >> bits) + c, type_, x, y, z))
    same(run(f"mad.lo.{type_}", type_, x, y, z), of_integers(lambda a, b, c: a * b + c, type_, x, y, z))
    if bits < 64:
        wide = f"{type_[0]}{2 * bits}"
        z = numbers(wide, 256, 6)
        same(run(f"mul.wide.{type_}", wide, x, y), of_integers(lambda a, b: a * b, wide, x, y))
        same(run(f"mad.wide.{type_}", wide, x, y, z), of_integers(lambda a, b, c: a * b + c, wide, x, y, z))


@pytest.mark.parametrize("type_", ("b16", "b32", "b64"))
def test_bits(type_: str) -> None:
    x, y = numbers(type_, 256, 7), numbers(type_, 256, 8)
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        same(run(f"{name}.{type_}", type_, x, y), function(x, y))
    same(run(f"not.{type_}", type_, x), ~x)
    same(run(f"cnot.{type_}", type_, x), x == 0)
    signed = x.view(NUMPY["s" + type_[1:]])
    same(run(f"neg.s{type_[1:]}", type_, x), -x)
    with np.errstate(over="ignore"):
        same(run(f"abs.s{type_[1:]}", type_, x), np.abs(signed).view(x.dtype))
    if type_ != "b16":
        bits = bits_of(type_)
        same(run(f"popc.{type_}", "u32", x), [int(v).bit_count() for v in x])
        same(run(f"clz.{type_}", "u32", x), [bits - int(v).bit_length() for v in x])
        same(run(f"brev.{type_}", type_, x), of_integers(lambda v: int(f"{v:0{bits}b}"[::-1], 2), type_, x))


@pytest.mark.parametrize("type_", ("b16", "b32", "b64"))
def test_shifts_past_the_width(type_: str) -> None:
    bits = bits_of(type_)
    x = numbers(type_, 256, 9)
    by = np.resize(np.array([0, 1, bits - 1, bits, bits + 1, 255, 2**31, 2**32 - 1], np.uint32), 256)
    same(run(f"shl.{type_}", type_, x, by), of_integers(lambda v, n: v << min(n, bits), type_, x, by))
    same(run(f"shr.u{bits}", type_, x, by), of_integers(lambda v, n: v >> min(n, bits), type_, x, by))
    same(run(f"shr.{type_}", type_, x, by), of_integers(lambda v, n: v >> min(n, bits), type_, x, by))
    signed = x.view(NUMPY[f"s{bits}"])
    same(
        run(f"shr.s{bits}", f"s{bits}", signed, by), of_integers(lambda v, n: v >> min(n, bits), f"s{bits}", signed, by)
    )


def test_funnel_shifts() -> None:
    low, high = numbers("b32", 256, 10), numbers("b32", 256, 11)
    by = np.resize(np.array([0, 1, 31, 32, 33, 40, 64, 2**32 - 1], np.uint32), 256)
    for mode, amount in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        left = of_integers(lambda a, b, n, amount=amount: ((b << 32 | a) << amount(n)) >> 32, "b32", low, high, by)
        right = of_integers(lambda a, b, n, amount=amount: (b << 32 | a) >> amount(n), "b32", low, high, by)
        same(run(f"shf.l.{mode}.b32", "b32", low, high, by), left)
        same(run(f"shf.r.{mode}.b32", "b32", low, high, by), right)


def field(signed: bool, bits: int) -> Any:
    """The manual's own loop for bfe."""

    def extract(x: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        x %= 1 << bits
        most = bits - 1
        sign = 0 if not signed or length == 0 else (x >> min(start + length - 1, most)) & 1
        out = 0
        for n in range(bits):
            bit = (x >> (start + n)) & 1 if n < length and start + n <= most else sign
            out |= bit << n
        return out

    return extract


@pytest.mark.parametrize("type_", ("s32", "u32", "s64", "u64"))
def test_bit_fields(type_: str) -> None:
    bits = bits_of(type_)
    x, y = numbers(type_, 256, 12), numbers(type_, 256, 13)
    rng = seeds.generator(14)
    start, length = (rng.choice([0, 1, 5, 16, 31, 32, 33, 63, 64, 255, 256], 256).astype(np.uint32) for _ in range(2))
    got = run(f"bfe.{type_}", type_, x, start, length)
    same(got, of_integers(field(type_[0] == "s", bits), type_, x, start, length))

    def insert(a: int, b: int, at: int, width: int) -> int:
        at, width = at & 255, width & 255
        for n in range(min(width, max(bits - at, 0))):
            b = b & ~(1 << (at + n)) | ((a >> n) & 1) << (at + n)
        return b

    got = run(f"bfi.b{bits}", type_, x, y, start, length)
    same(got, of_integers(insert, type_, x, y, start, length))


def test_lop3_and_prmt() -> None:
    x, y, z = (numbers("b32", 256, seed) for seed in (15, 16, 17))
    for table in (0, 0x80, 0x96, 0xE8, 0xCA, 0xFF, 0x1B):
        want = np.zeros_like(x)
        for n in range(8):
            if table >> n & 1:
                want |= (x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z)
        same(run("lop3.b32", "b32", x, y, z, str(table)), want)

    def permute(a: int, b: int, selection: int) -> int:
        both, out = b << 32 | a, 0
        for n in range(4):
            nibble = selection >> 4 * n & 15
            byte = both >> 8 * (nibble & 7) & 255
            out |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * n
        return out

    same(run("prmt.b32", "b32", x, y, z), of_integers(permute, "b32", x, y, z))


ORDER = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("type_", (*INTEGERS, "f32", "f64"))
def test_comparisons(type_: str) -> None:
    x, y = numbers(type_, 256, 18), numbers(type_, 256, 19)
    y[::3] = x[::3]
    unordered = np.isnan(x) | np.isnan(y) if type_[0] == "f" else np.zeros(256, bool)
    for name, function in ORDER.items():
        want = function(x, y) & ~unordered
        same(run(f"setp.{name}.{type_}", "pred", x, y), want)
        if type_[0] == "f":
            same(run(f"setp.{name}u.{type_}", "pred", x, y), want | unordered)
    if type_[0] == "f":
        same(run(f"setp.num.{type_}", "pred", x, y), ~unordered)
        same(run(f"setp.nan.{type_}", "pred", x, y), unordered)
    if type_[0] == "u":
        for name, function in (("lo", np.less), ("ls", np.less_equal), ("hi", np.greater), ("hs", np.greater_equal)):
            same(run(f"setp.{name}.{type_}", "pred", x, y), function(x, y))
    same(run(f"set.lt.u32.{type_}", "u32", x, y), np.where((x < y) & ~unordered, 2**32 - 1, 0))


@pytest.mark.parametrize("type_", ("f32", "f64"))
def test_floats(type_: str) -> None:
    x, y = numbers(type_, 256, 20), numbers(type_, 256, 21)
    with np.errstate(all="ignore"):
        for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            same(run(f"{name}.{type_}", type_, x, y), function(x, y))
            same(run(f"{name}.rn.{type_}", type_, x, y), function(x, y))
        same(run(f"div.rn.{type_}", type_, x, y), x / y)
        same(run(f"rcp.rn.{type_}", type_, x), 1 / x)
        same(run(f"sqrt.rn.{type_}", type_, x), np.sqrt(x))
        same(run(f"neg.{type_}", type_, x), -x)
        same(run(f"abs.{type_}", type_, x), np.abs(x))
        same(run(f"copysign.{type_}", type_, y, x), np.copysign(x, y))
        for name, function in (("infinite", np.isinf), ("finite", np.isfinite), ("notanumber", np.isnan)):
            same(run(f"testp.{name}.{type_}", "pred", x), function(x))
        same(run(f"testp.number.{type_}", "pred", x), ~np.isnan(x))


def extremum(x: float, y: float, largest: bool) -> float:
    """-0 is less than +0, and NaN loses."""
    if x != x or y != y:
        return y if x != x else x
    if x == y:
        sign = (max if largest else min)(copysign(1, x), copysign(1, y))
        return copysign(x, sign) if x == 0 else x
    return (max if largest else min)(x, y)


@pytest.mark.parametrize("type_", ("f32", "f64"))
def test_extrema(type_: str) -> None:
    x, y = numbers(type_, 256, 22), numbers(type_, 256, 23)
    for name in ("min", "max"):
        want = np.array([extremum(float(a), float(b), name == "max") for a, b in zip(x, y, strict=True)], x.dtype)
        same(run(f"{name}.{type_}", type_, x, y), want)
        same(run(f"{name}.NaN.{type_}", type_, x, y), np.where(np.isnan(x) | np.isnan(y), np.nan, want))


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def test_flush_to_zero() -> None:
    x, y = numbers("f32", 256, 24), numbers("f32", 256, 25)
    x[::4] = np.float32(1e-40)
    y[::8] = np.float32(1e30)
    with np.errstate(all="ignore"):
        same(run("mul.ftz.f32", "f32", x, y), flushed(flushed(x) * flushed(y)))
        same(run("add.ftz.f32", "f32", x, y), flushed(flushed(x) + flushed(y)))
        same(run("setp.eq.ftz.f32", "pred", x, x * 0), flushed(x) == x * 0)
        same(run("mul.sat.f32", "f32", x, y), np.nan_to_num(np.clip(x * y, 0, 1), nan=0.0) + 0.0)


def rounded_once(x: float, y: float, z: float, kind: type) -> float:
    """x * y + z of finite numbers, from fractions."""
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if kind is np.float64:
        return float(exact)
    near = np.float32(float(exact))
    # float() has rounded already: of the neighbours, the nearest to the exact value, and of two the even one.
    around = [near, np.nextafter(near, np.float32(-inf)), np.nextafter(near, np.float32(inf))]
    return float(min(around, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.uint32)) & 1)))


@pytest.mark.parametrize("kind", (np.float32, np.float64))
def test_fma_is_rounded_once(kind: type) -> None:
    """Where the product nearly cancels, and where its low half decides a tie."""
    rng, type_ = seeds.generator(0), "f32" if kind is np.float32 else "f64"
    ulp = float(np.finfo(kind).eps)
    a, b = 1 + rng.random((2, 256)).astype(kind)
    for scale in (1.0, ulp, ulp**1.5):
        c = (-a.astype(float) * b * (1 + scale * rng.random(256))).astype(kind)
        want = [rounded_once(*map(float, row), kind) for row in zip(a, b, c, strict=True)]
        same(run(f"fma.rn.{type_}", type_, a, b, c), np.array(want, kind))
    ties = np.array([1, 2.0**-30, -(2.0**-30), 2.0**30], kind)[rng.integers(0, 4, 256)]
    one = kind(1 + ulp)
    want = [rounded_once(float(one), float(one), float(t), kind) for t in ties]
    same(run(f"fma.rn.{type_}", type_, np.full(256, one), np.full(256, one), ties), np.array(want, kind))
    got = run(f"fma.rn.{type_}", type_, np.full(256, kind(inf)), np.zeros(256, kind), np.ones(256, kind))
    assert np.isnan(got).all()


def test_selections() -> None:
    for type_ in ("b16", "b32", "b64", "f32", "f64"):
        source = type_ if type_[0] == "f" else "u" + type_[1:]
        x, y, z = numbers(source, 256, 26), numbers(source, 256, 27), numbers("s32", 256, 28)
        if type_ != "b16":
            same(run(f"slct.{type_}.s32", source, x, y, z), np.where(z >= 0, x, y))
            f = numbers("f32", 256, 29)
            same(run(f"slct.{type_}.f32", source, x, y, f), np.where(f >= 0, x, y))
        same(run(f"selp.{type_}", source, x, y, "1"), x)
        same(run(f"selp.{type_}", source, x, y, "0"), y)
        same(run(f"mov.{type_}", source, x), x)


@pytest.mark.parametrize("source", ("s8", "u8", *INTEGERS))
def test_conversions_of_integers(source: str) -> None:
    x = numbers(source, 256, 30)
    for target in INTEGERS:
        same(run(f"cvt.{target}.{source}", target, x), x.astype(NUMPY[target]))
        limits = np.iinfo(NUMPY[target])
        clamped = [min(max(int(v), limits.min), limits.max) for v in x]
        same(run(f"cvt.sat.{target}.{source}", target, x), np.array(clamped, NUMPY[target]))
    for target in ("f32", "f64"):
        same(run(f"cvt.rn.{target}.{source}", target, x), x.astype(NUMPY[target]))


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@pytest.mark.parametrize("source", ("f32", "f64"))
@pytest.mark.parametrize("mode", ROUND)
def test_conversions_to_integers(mode: str, source: str) -> None:
    """NaN is 0, what is too large the largest."""
    x = numbers(source, 256, 31)
    for target in INTEGERS:
        limits = np.iinfo(NUMPY[target])
        whole = ROUND[mode](x.astype(np.float64))
        want = [
            0 if v != v else limits.max if v > limits.max else limits.min if v < limits.min else int(v) for v in whole
        ]
        same(run(f"cvt.{mode}.{target}.{source}", target, x), np.array(want, NUMPY[target]))
    same(run(f"cvt.{mode}.{source}.{source}", source, x), ROUND[mode](x))


def test_conversions_of_floats() -> None:
    single, double = numbers("f32", 256, 32), numbers("f64", 256, 33)
    with np.errstate(all="ignore"):
        same(run("cvt.f64.f32", "f64", single), single.astype(np.float64))
        same(run("cvt.rn.f32.f64", "f32", double), double.astype(np.float32))
        same(run("cvt.rn.ftz.f32.f64", "f32", double), flushed(double.astype(np.float32)))
        same(
            run("cvt.sat.f32.f32", "f32", single), np.where(np.isnan(single), 0, np.clip(single, 0, 1)) + np.float32(0)
        )


def test_conversions_of_halves() -> None:
    """Every float16 and bfloat16, and the float32 between two of them."""
    every = np.arange(65536, dtype=np.uint16)
    for n in range(0, 65536, 1024):
        halves = every[n : n + 1024]
        wide = run("cvt.f32.f16", "f32", halves, n=1024)
        same(wide, halves.view(np.float16).astype(np.float32))
        brain = (halves.astype(np.uint32) << 16).view(np.float32)
        same(run("cvt.f32.bf16", "f32", halves, n=1024), brain)
    near = every.view(np.float16).astype(np.float32)
    near = near[np.isfinite(near)][::31][:2016]
    for factor in (1, 1 + 2.0**-11, 1 + 2.0**-12, 1 - 2.0**-12, 1.5):
        for x in np.split(near * np.float32(factor), 3):
            with np.errstate(over="ignore"):
                same(run("cvt.rn.f16.f32", "f16", x, n=672), x.astype(np.float16))
    x = numbers("f32", 1024, 34)
    bits = x.view(np.uint32)
    brain = np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    same(run("cvt.rn.bf16.f32", "b16", x, n=1024), brain)
    with np.errstate(over="ignore"):
        high, low = x.astype(np.float16).view(np.uint16), x[::-1].astype(np.float16).view(np.uint16)
    not_nan = ~np.isnan(x) & ~np.isnan(x[::-1])
    got = run("cvt.rn.f16x2.f32", "b32", x, x[::-1].copy(), n=1024)
    same(got[not_nan], (high.astype(np.uint32) << 16 | low)[not_nan])
    tf32 = run("cvt.rna.tf32.f32", "b32", x, n=1024)
    finite = np.isfinite(x)
    same(tf32[finite], ((bits + 0x1000) & 0xFFFFE000)[finite])
    assert np.isnan(tf32.view(np.float32)[np.isnan(x)]).all()


def test_vectors_of_parts() -> None:
    """mov between a register and a vector, also onto itself."""
    x = numbers("b32", 64, 35)
    out = np.zeros(64, np.uint32)
    text = """.version 8.0
.target sm_80
.address_size 64
.visible .entry swap(.param .u64 a, .param .u64 b)
{
    .reg .b16 %h<4>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
    mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [a]; mad.wide.u32 %rd1, %r1, 4, %rd1; ld.global.b32 %r2, [%rd1];
    mov.b32 {%h1, %h2}, %r2; mov.b32 %r3, {%h2, %h1};
    mov.b64 %rd2, {%r3, %r2}; mov.b64 {_, %r2}, %rd2; mov.b64 {%r3, _}, %rd2;
    xor.b32 %r2, %r2, %r3;
    ld.param.u64 %rd1, [b]; mad.wide.u32 %rd1, %r1, 4, %rd1; st.global.b32 [%rd1], %r2;
    ret;
}"""
    launch(text, 1, 64, [x, out])
    same(out, x ^ (x << 16 | x >> 16))


def test_every_opcode_is_tried() -> None:
    """A new row of the table needs a test above."""
    assert {name.partition(".")[0] for name in TABLE} == {
        "abs", "add", "and", "bfe", "bfi", "brev", "clz", "cnot", "copysign", "cut", "cvt", "div", "extend", "fma",
        "join", "lop3", "mad", "max", "min", "mov", "mul", "neg", "not", "or", "part", "popc", "prmt", "rcp", "rem",
        "selp", "setp", "shf", "shl", "shr", "slct", "sqrt", "sub", "testp", "xor",
    }  # fmt: skip


@pytest.mark.parametrize("statement", ("fma.rz.f32 %f1, %f1, %f1, %f1", "addc.u32 %r1, %r1, %r1", "wgmma.fence",
                                       "call.uni f", "add.f16x2 %r1, %r1, %r1", "cvt.rz.f32.f64 %f1, %fd1",
                                       "atom.global.add.noftz.f16 %h1, [%rd1], %h1"))  # fmt: skip
def test_what_is_not_covered_is_refused(statement: str) -> None:
    """Rather than run wrong."""
    text = f""".version 8.0
.target sm_80
.visible .entry none() {{ .reg .f32 %f<2>; .reg .f64 %fd<2>; .reg .b32 %r<2>; .reg .b16 %h<2>; .reg .b64 %rd<2>;
{statement}; ret; }}"""
    with pytest.raises(PTXError, match="`"):
        lower(parse(text))
