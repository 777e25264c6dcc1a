"""What the lanes of a warp do together in the emulator: shuffles, votes, atomics, matrix products and their fragments
against NumPy; and how wrong approximations are.
"""

from typing import Any

import numpy as np
import pytest
import seeds
from ptx import PTXError, launch, parse
from ptx.lowering import lower

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
LANE = np.arange(32)


def kernel(body: str, shared: int = 2048) -> str:
    """As in test_ptx_checks.py, for 16 bytes a thread: %rd1, %rd2, and %r2 in shared memory."""
    return f"""{HEAD}.visible .entry kernel(.param .u64 a, .param .u64 b)
{{
    .reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %rd<16>; .reg .f32 %f<16>; .reg .f64 %fd<4>;
    .shared .align 16 .b8 tile[{shared}];
    mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 16;
    ld.param.u64 %rd8, [a]; add.s64 %rd1, %rd8, %rd3; ld.param.u64 %rd9, [b]; add.s64 %rd2, %rd9, %rd3;
    mov.u32 %r3, tile; shl.b32 %r4, %r1, 4; add.u32 %r2, %r3, %r4;
    {body}
    ret;
}}"""


def run(body: str, x: np.ndarray, threads: int = 32, **options: Any) -> np.ndarray:
    """Four 32-bit numbers a thread."""
    out = np.zeros((threads, 4), np.uint32)
    ran = launch(kernel(body), 1, threads, [x, out], **options)
    assert not ran.findings, ran.report()
    return out


# --------------------------------------------------------------------------------------------------- shuffles and votes


def source_of(mode: str, b: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """The manual's own words for shfl (section 9.7.9.6)."""
    segment, clamp = c >> 8 & 31, c & 31
    most = (LANE & segment) | (clamp & ~segment)
    least = LANE & segment
    j = {"up": LANE - b, "down": LANE + b, "bfly": LANE ^ b, "idx": least | (b & ~segment)}[mode]
    inside = j >= most if mode == "up" else j <= most
    return np.where(inside, j, LANE), inside


@pytest.mark.parametrize("mode", ("up", "down", "bfly", "idx"))
def test_shuffles(mode: str) -> None:
    x = np.arange(128, dtype=np.uint32)
    for width in (32, 16, 8, 4):
        c = (32 - width) << 8 | (0 if mode == "up" else 31)
        for b in (0, 1, 3, 8, 31):
            body = f"""ld.global.u32 %r5, [%rd1]; shfl.sync.{mode}.b32 %r6|%p1, %r5, {b}, {c}, -1;
            selp.u32 %r7, 1, 0, %p1; st.global.v2.u32 [%rd2], {{%r6, %r7}};"""
            got = run(body, x)
            source, inside = source_of(mode, b, c)
            np.testing.assert_array_equal(got[:, 0], 4 * source)
            np.testing.assert_array_equal(got[:, 1], inside)


def test_votes() -> None:
    for wanted in (0, 0xFFFFFFFF, 0x0F0F1234):
        x = np.zeros((32, 4), np.uint32)
        x[:, 0] = wanted >> LANE & 1
        body = """ld.global.u32 %r5, [%rd1]; setp.ne.u32 %p1, %r5, 0; vote.sync.ballot.b32 %r6, %p1, -1;
        vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1; vote.sync.uni.pred %p4, %p1, -1;
        selp.u32 %r7, 1, 0, %p2; selp.u32 %r8, 1, 0, %p3; selp.u32 %r9, 1, 0, %p4;
        st.global.v4.u32 [%rd2], {%r6, %r7, %r8, %r9};"""
        got = run(body, x)
        expected = [wanted, wanted != 0, wanted == 0xFFFFFFFF, wanted in (0, 0xFFFFFFFF)]
        np.testing.assert_array_equal(got, np.tile(np.array(expected, np.uint32), (32, 1)))


def test_special_registers() -> None:
    out = np.zeros((4, 96, 4), np.uint32)
    body = """mov.u32 %r5, %tid.x; mov.u32 %r6, %tid.y; mov.u32 %r7, %laneid; mov.u32 %r8, %warpid;
    mov.u32 %r9, %ntid.x; mad.lo.u32 %r10, %r6, %r9, %r5; mov.u32 %r11, %ctaid.x; mov.u32 %r12, %ctaid.y;
    mov.u32 %r13, %nctaid.x; mad.lo.u32 %r11, %r12, %r13, %r11; mad.lo.u32 %r10, %r11, 96, %r10;
    mul.wide.u32 %rd4, %r10, 16; add.s64 %rd4, %rd9, %rd4; mov.u32 %r14, %lanemask_lt; mov.u32 %r15, %lanemask_ge;
    and.b32 %r16, %r14, %r15; mov.u32 %r17, %lanemask_le; xor.b32 %r17, %r17, %r14; or.b32 %r16, %r16, %r17;
    st.global.v4.u32 [%rd4], {%r10, %r7, %r8, %r16};"""
    assert not launch(kernel(body), (2, 2), (24, 4), [np.zeros(1, np.uint32), out]).findings
    n = np.arange(96)
    for block in range(4):
        want = np.stack([96 * block + n, n % 32, n // 32, 1 << n % 32], 1)
        np.testing.assert_array_equal(out[block], want)


# ------------------------------------------------------------------------------------------------------------- atomics


@pytest.mark.parametrize(
    ("name", "type_", "combine"),
    [
        ("add", "u32", lambda x, v: x + v), ("add", "u64", lambda x, v: x + v), ("add", "f32", lambda x, v: x + v),
        ("add", "f64", lambda x, v: x + v), ("max", "s32", max), ("min", "s32", min), ("max", "u32", max),
        ("min", "u64", min), ("and", "b32", lambda x, v: x & v), ("or", "b32", lambda x, v: x | v),
        ("xor", "b64", lambda x, v: x ^ v), ("exch", "b32", None), ("inc", "u32", lambda x, v: 0 if x >= v else x + 1),
        ("dec", "u32", lambda x, v: v if x == 0 or x > v else x - 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("space", ("global", "shared"))
def test_atomics(space: str, name: str, type_: str, combine: Any) -> None:
    """32 lanes on one number: what is left, and that each old value is a step on the way."""
    numpy_type = {"f": "f", "s": "i", "u": "u", "b": "u"}[type_[0]] + str(int(type_[1:]) // 8)
    rng = seeds.generator(0)
    values = rng.integers(-50 if type_[0] in "sf" else 1, 60, 32).astype(numpy_type)
    start = np.array([7], numpy_type)
    size = values.itemsize
    register = "%fd" if type_ == "f64" else "%f" if type_ == "f32" else "%rd1" if size == 8 else "%r1"
    old, new = register + "2", register + "3"
    where = "[%r3]" if space == "shared" else "[%rd9]"
    bits = f"b{8 * size}"
    setup = ""
    if space == "shared":
        setup = f"setp.eq.u32 %p1, %r1, 0; @%p1 ld.global.{bits} {old}, [%rd9]; @%p1 st.shared.{bits} [%r3], {old}; "
    body = f"""{setup} bar.sync 0; mul.wide.u32 %rd4, %r1, {size}; add.s64 %rd5, %rd8, %rd4;
    ld.global.{bits} {new}, [%rd5]; atom.{space}.{name}.{type_} {old}, {where}, {new}; bar.sync 0;
    st.global.{bits} [%rd5], {old};"""
    if space == "shared":
        body += f"@%p1 ld.shared.{bits} {old}, [%r3]; @%p1 st.global.{bits} [%rd9], {old};"
    olds = values.copy()
    assert not launch(kernel(body), 1, 32, [olds, start]).findings
    x, steps = np.array(7, numpy_type)[()], []
    for v in values:
        steps.append(x)
        x = np.array(v if combine is None else combine(x, v)).astype(numpy_type)[()]
    np.testing.assert_array_equal(olds, np.array(steps, numpy_type))
    assert start[0] == x
    reduced = np.array([7], numpy_type)
    if name not in ("exch",) and space == "global":
        text = body.replace(f"atom.{space}.{name}.{type_} {old}, {where}", f"red.{space}.{name}.{type_} {where}")
        launch(kernel(text), 1, 32, [values.copy(), reduced])
        assert reduced[0] == x


def test_compare_and_swap() -> None:
    """Of the lanes that want to be the next, each is once."""
    body = "add.u32 %r5, %r1, 1; atom.global.cas.b32 %r6, [%rd9], %r1, %r5; st.global.u32 [%rd1], %r6;"
    olds, count = np.zeros((32, 4), np.uint32), np.zeros(1, np.uint32)
    launch(kernel(body), 1, 32, [olds, count])
    assert count[0] == 32 and np.array_equal(olds[:, 0], LANE)


# ---------------------------------------------------------------------------------------------------- matrix products


def fragments(matrix: np.ndarray, operand: str) -> np.ndarray:
    """What each lane has of a matrix, as the manual's figures have it (section 9.7.14.5.8): [lane, element]."""
    group, member = LANE // 4, LANE % 4
    out = []
    if operand == "c":  # 16 x 8
        for n in range(4):
            out.append(matrix[group + 8 * (n // 2), 2 * member + n % 2])
    elif matrix.itemsize == 2:
        depth = matrix.shape[1] if operand == "a" else matrix.shape[0]
        for n in range((4 if operand == "a" else 2) * depth // 8):
            k = 2 * member + n % 2 + 8 * (n // (4 if operand == "a" else 2))
            out.append(matrix[group + 8 * (n // 2 % 2), k] if operand == "a" else matrix[k, group])
    else:  # tf32
        depth = matrix.shape[1] if operand == "a" else matrix.shape[0]
        for n in range((2 if operand == "a" else 1) * depth // 4):
            k = member + 4 * (n // (2 if operand == "a" else 1))
            out.append(matrix[group + 8 * (n % 2), k] if operand == "a" else matrix[k, group])
    return np.ascontiguousarray(np.stack(out, 1))


def as_half(x: np.ndarray, type_: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers as they are stored, and in float64."""
    if type_ == "f16":
        stored = x.astype(np.float16)
        return stored, stored.astype(float)
    bits = x.astype(np.float32).view(np.uint32)
    if type_ == "bf16":
        stored = (bits >> 16).astype(np.uint16)
        return stored, (stored.astype(np.uint32) << 16).view(np.float32).astype(float)
    return bits.view(np.float32), (bits & 0xFFFFE000).view(np.float32).astype(float)


@pytest.mark.parametrize(
    ("type_", "depth"), [("f16", 16), ("f16", 8), ("bf16", 16), ("bf16", 8), ("tf32", 8), ("tf32", 4)]
)
def test_products(type_: str, depth: int) -> None:
    """All of A and B, and one number of each at a time, so that no place is another's."""
    rng = seeds.generator(depth)
    registers = {"f16": 4 * depth // 16, "bf16": 4 * depth // 16, "tf32": 4 * depth // 8}[type_]
    regs = [f"%r{5 + n}" for n in range(registers)], [f"%r{9 + n}" for n in range(registers // 2)]
    loads = " ".join(f"ld.global.u32 {r}, [%rd4+{4 * n}];" for n, r in enumerate([*regs[0], *regs[1]]))
    a_list, b_list = ("{" + ", ".join(r) + "}" for r in regs)
    body = f"""mul.wide.u32 %rd4, %r1, 48; add.s64 %rd4, %rd8, %rd4; {loads}
    ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%rd4+32];
    mma.sync.aligned.m16n8k{depth}.row.col.f32.{type_}.{type_}.f32 {{%f1, %f2, %f3, %f4}}, {a_list}, {b_list},
        {{%f1, %f2, %f3, %f4}};
    st.global.v4.f32 [%rd2], {{%f1, %f2, %f3, %f4}};"""
    cases = [(rng.standard_normal((16, depth)), rng.standard_normal((depth, 8)))]
    for n in range(depth):
        a, b = np.zeros((16, depth)), np.zeros((depth, 8))
        a[n, n], b[n, n % 8] = 3, 5
        cases.append((a, b))
    for a, b in cases:
        (a, a64), (b, b64) = as_half(a, type_), as_half(b, type_)
        c = rng.standard_normal((16, 8)).astype(np.float32)
        given = np.zeros((32, 12), np.uint32)
        parts = fragments(a, "a").view(np.uint32), fragments(b, "b").view(np.uint32), fragments(c, "c").view(np.uint32)
        given[:, :registers], given[:, registers : registers + registers // 2], given[:, 8:] = parts
        got = run(body, given).view(np.float32)
        want = (a64 @ b64 + c).astype(np.float32)
        np.testing.assert_allclose(got, fragments(want, "c"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("trans", ("", ".trans"))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_ldmatrix(count: int, trans: str) -> None:
    """Rows in any order, matrices of 16-bit numbers."""
    x = seeds.generator(count).integers(0, 65536, (32, 8), np.uint16)
    rows = seeds.generator(1).permutation(32)
    registers = [f"%r{8 + n}" for n in range(count)]
    body = f"""ld.global.v4.u32 {{%r20, %r21, %r22, %r23}}, [%rd1]; st.shared.v4.u32 [%r2], {{%r20, %r21, %r22, %r23}};
    bar.warp.sync -1; mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd8, %rd4; ld.global.u32 %r5, [%rd4+512];
    shl.b32 %r5, %r5, 4; add.u32 %r5, %r5, %r3; mov.u32 %r9, 0; mov.u32 %r10, 0; mov.u32 %r11, 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{", ".join(registers)}}}, [%r5];
    st.global.v4.u32 [%rd2], {{%r8, %r9, %r10, %r11}};"""
    got = run(body, np.concatenate([x.view(np.uint32).ravel(), rows.astype(np.uint32)]))
    for m in range(count):
        matrix = x[rows[8 * m : 8 * m + 8]]
        matrix = np.ascontiguousarray(matrix.T) if trans else matrix
        np.testing.assert_array_equal(got[:, m], matrix.view(np.uint32).ravel())


def test_other_matrices_are_refused() -> None:
    for name in ("m16n8k16.row.col.f16.f16.f16.f16", "m8n8k4.row.col.f64.f64.f64.f64",
                 "m16n8k32.row.col.f32.f16.f16.f32", "m16n8k16.col.col.f32.f16.f16.f32"):  # fmt: skip
        vectors = "{%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, {%f1, %f2, %f3, %f4}"
        with pytest.raises(PTXError, match="not covered"):
            lower(parse(kernel(f"mma.sync.aligned.{name} {vectors};")))


# ------------------------------------------------------------------------------------------------------- approximations


def approximated(op: str, x: np.ndarray, noise: int, seed: int = 0) -> np.ndarray:
    text = f"""{HEAD}.visible .entry kernel(.param .u64 a, .param .u64 b)
{{
    .reg .b32 %r<4>; .reg .b64 %rd<8>; .reg .f32 %f<4>;
    ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b];
    mov.u32 %r1, %tid.x; mad.lo.u32 %r1, %ctaid.x, 128, %r1; mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
    ld.global.f32 %f1, [%rd4]; {op}.f32 %f2, %f1; st.global.f32 [%rd5], %f2;
    ret;
}}"""
    y = np.zeros_like(x)
    launch(text, x.size // 128, 128, [x, y], approx_noise=noise, seed=seed)
    return y


def ulps(y: np.ndarray, true: np.ndarray) -> np.ndarray:
    return np.abs(y - true) / np.spacing(np.abs(true.astype(np.float32)))


def test_approximations_are_as_wrong_as_on_a_gpu() -> None:
    """Within their bounds, all over them, exact where it matters, and as rounded as can be without noise."""
    rng = seeds.generator(0)
    x = rng.uniform(-20, 20, 1024).astype(np.float32)
    wide = x.astype(np.float64)
    true = np.exp2(wide)
    assert ulps(approximated("ex2.approx.ftz", x, 0), true).max() <= 0.5
    assert 1.5 < ulps(approximated("ex2.approx.ftz", x, 2), true).max() <= 2.5
    assert 0.5 < ulps(approximated("rcp.approx.ftz", x, 2), 1 / wide).max() <= 1.5
    near = rng.uniform(0.9, 1.1, 1024).astype(np.float32)
    error = np.abs(approximated("lg2.approx.ftz", near, 2) - np.log2(near.astype(np.float64)))
    assert 2.0**-23 < error.max() < 2.0**-21.9
    whole = np.tile(np.array([0, -1, 1, 7, -126, -127, -np.inf, -200], np.float32), 16)
    got = approximated("ex2.approx.ftz", whole, 2)[:8]
    np.testing.assert_array_equal(got, [1, 0.5, 2, 128, 2.0**-126, 0, 0, 0])
    powers = np.tile(np.array([1, 2, 0.25, np.inf], np.float32), 32)
    np.testing.assert_array_equal(approximated("rcp.approx.ftz", powers, 2)[:4], [1, 0.5, 4, 0])
    np.testing.assert_array_equal(approximated("lg2.approx.ftz", powers, 2)[:4], [0, 1, -2, np.inf])
    first, second = (approximated("ex2.approx.ftz", x, 2, seed) for seed in (1, 2))
    assert (first != second).any() and np.array_equal(first, approximated("ex2.approx.ftz", x, 2, 1))


@pytest.mark.parametrize(
    ("op", "function", "bound"),
    [
        ("sin.approx", np.sin, 2.0**-20.9), ("cos.approx", np.cos, 2.0**-20.9), ("tanh.approx", np.tanh, 2.0**-11),
        ("sqrt.approx", np.sqrt, 2.0**-22), ("rsqrt.approx", lambda x: 1 / np.sqrt(x), 2.0**-20),
    ],
)  # fmt: skip
def test_other_approximations(op: str, function: Any, bound: float) -> None:
    x = seeds.generator(0).uniform(-3, 3, 1024).astype(np.float32)
    x = np.abs(x) if "sqrt" in op else x
    true = function(x.astype(np.float64))
    exact, noisy = approximated(op, x, 0), approximated(op, x, 1)
    np.testing.assert_array_equal(exact, true.astype(np.float32))
    error = np.abs(noisy - true) / np.maximum(np.abs(true), 1)
    assert (noisy != exact).any() and error.max() < 1.1 * bound


def test_numbers_at_the_edges() -> None:
    """Of the functions, without noise."""
    x = np.tile(np.array([0, -0.0, np.inf, -np.inf, np.nan, -1, 1e-40, 4], np.float32), 16)
    wanted = {
        "ex2.approx": [1, 1, np.inf, 0, np.nan, 0.5, 1, 16],
        "lg2.approx": [-np.inf, -np.inf, np.inf, np.nan, np.nan, np.nan, np.log2(np.float64(np.float32(1e-40))), 2],
        "lg2.approx.ftz": [-np.inf, -np.inf, np.inf, np.nan, np.nan, np.nan, -np.inf, 2],
        "rcp.approx.ftz": [np.inf, -np.inf, 0, -0.0, np.nan, -1, np.inf, 0.25],
        "sqrt.approx.ftz": [0, -0.0, np.inf, np.nan, np.nan, np.nan, 0, 2],
        "rsqrt.approx.ftz": [np.inf, -np.inf, 0, np.nan, np.nan, np.nan, np.inf, 0.5],
        "tanh.approx": [0, -0.0, 1, -1, np.nan, np.tanh(-1.0), np.float32(1e-40), np.tanh(4.0)],
    }
    for op, values in wanted.items():
        got, want = approximated(op, x, 0)[:8], np.array(values, np.float32)
        np.testing.assert_array_equal(got, want, err_msg=op)
        zero = want == 0
        np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]), err_msg=op)
