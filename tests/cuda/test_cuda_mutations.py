"""What mutations.py puts into PTX and notices, on kernels small enough to know every mutant of."""

import mutations
import numpy as np
import ptxas
import pytest
import seeds
from ptx import Hang, PTXError, launch, watching
from small_kernels import kernel, product_ptx

# sum_j v[j] softmax(x[row])[j] for one row a block, online over tiles of 64 keys, with 2 warps.
SOFTMAX = kernel(
    """
    .reg .pred %p<8>; .reg .b32 %r<24>; .reg .b64 %rd<12>; .reg .f32 %f<32>;
    .shared .align 16 .b8 part[32];
    ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [v]; ld.param.u64 %rd3, [out]; ld.param.u32 %r3, [n];
    cvta.to.global.u64 %rd1, %rd1; cvta.to.global.u64 %rd2, %rd2; cvta.to.global.u64 %rd3, %rd3;
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mul.lo.u32 %r4, %r2, %r3;
    shr.u32 %r5, %r1, 5; and.b32 %r6, %r1, 31; shl.b32 %r7, %r5, 2; mov.u32 %r8, part; add.u32 %r9, %r8, %r7;
    mov.f32 %f1, 0fFF800000; mov.f32 %f2, 0f00000000; mov.f32 %f3, 0f00000000;
    mov.u32 %r10, %r1; mov.u32 %r12, 0;
    LOOP:
    mov.f32 %f4, 0fFF800000; mov.f32 %f5, 0f00000000;
    setp.ge.u32 %p1, %r10, %r3;
    @%p1 bra LOADED;
    add.u32 %r11, %r4, %r10; mul.wide.u32 %rd4, %r11, 4; add.s64 %rd5, %rd1, %rd4; ld.global.f32 %f4, [%rd5];
    mul.wide.u32 %rd6, %r10, 4; add.s64 %rd7, %rd2, %rd6; ld.global.f32 %f5, [%rd7];
    LOADED:
    mov.f32 %f6, %f4;
    """
    + "".join(
        f"mov.b32 %r13, %f6; shfl.sync.bfly.b32 %r14, %r13, {lane}, 31, -1;\n"
        f"mov.b32 %f7, %r14; max.f32 %f6, %f6, %f7;\n"
        for lane in (16, 8, 4, 2, 1)
    )
    + """
    setp.eq.u32 %p2, %r6, 0;
    @%p2 st.shared.f32 [%r9], %f6;
    bar.sync 0;
    ld.shared.v2.f32 {%f8, %f9}, [%r8];
    max.f32 %f10, %f8, %f9; max.f32 %f11, %f1, %f10;
    setp.eq.f32 %p3, %f11, 0fFF800000; selp.f32 %f12, 0f00000000, %f11, %p3;
    sub.f32 %f13, %f1, %f12; ex2.approx.ftz.f32 %f14, %f13;
    sub.f32 %f15, %f4, %f12; ex2.approx.ftz.f32 %f16, %f15;
    fma.rn.f32 %f2, %f2, %f14, %f16;
    mul.f32 %f3, %f3, %f14; fma.rn.f32 %f3, %f16, %f5, %f3;
    mov.f32 %f1, %f11;
    bar.sync 0;
    add.u32 %r10, %r10, 64; add.u32 %r12, %r12, 64; setp.lt.u32 %p4, %r12, %r3;
    @%p4 bra LOOP;
    """
    + "".join(
        f"mov.b32 %r13, %f{f}; shfl.sync.bfly.b32 %r14, %r13, {lane}, 31, -1; mov.b32 %f7, %r14;\n"
        f"add.f32 %f{f}, %f{f}, %f7;\n"
        for f in (2, 3)
        for lane in (16, 8, 4, 2, 1)
    )
    + """
    setp.eq.u32 %p2, %r6, 0; setp.eq.u32 %p6, %r1, 0; and.pred %p7, %p6, %p2;
    @%p2 st.shared.f32 [%r9+8], %f2;
    @%p2 st.shared.f32 [%r9+16], %f3;
    bar.sync 0;
    ld.shared.v2.f32 {%f20, %f21}, [%r8+8]; ld.shared.v2.f32 {%f22, %f23}, [%r8+16];
    add.f32 %f24, %f20, %f21; add.f32 %f25, %f22, %f23; div.rn.f32 %f26, %f25, %f24;
    @!%p7 bra DONE;
    mul.wide.u32 %rd8, %r2, 4; add.s64 %rd9, %rd3, %rd8; st.global.f32 [%rd9], %f26;
    DONE:
    ret;""",
    ".param .u64 x, .param .u64 v, .param .u64 out, .param .u32 n",
)

# D = A B for one warp: A 16 x k and B k x 8 in float16, in two buffers filled by cp.async, zeros where k ends.
STAGE = 768
COPY = """
    add.u32 %r24, {k0}, %r5; setp.lt.u32 %p2, %r24, %r2; selp.b32 %r25, 16, 0, %p2;
    add.u32 %r26, %r9, {at}; cp.async.cg.shared.global [%r26], [{a}], 16, %r25;
    add.u32 %r24, {k0}, %r1; setp.lt.u32 %p2, %r24, %r2; selp.b32 %r25, 16, 0, %p2;
    @%p1 cp.async.cg.shared.global [%r26+512], [{b}], 16, %r25;
"""
MATMUL = kernel(
    """
    .reg .pred %p<8>; .reg .b32 %r<40>; .reg .b64 %rd<20>; .reg .f32 %f<12>;
    .shared .align 16 .b8 tile[1536];
    ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u64 %rd3, [d]; ld.param.u32 %r2, [k];
    cvta.to.global.u64 %rd1, %rd1; cvta.to.global.u64 %rd2, %rd2; cvta.to.global.u64 %rd3, %rd3;
    mov.u32 %r1, %tid.x; shr.u32 %r3, %r1, 1; and.b32 %r4, %r1, 1; shl.b32 %r5, %r4, 3;
    mad.lo.u32 %r6, %r3, %r2, %r5; mul.wide.u32 %rd4, %r6, 2; add.s64 %rd5, %rd1, %rd4;
    mul.wide.u32 %rd6, %r1, 16; add.s64 %rd7, %rd2, %rd6; setp.lt.u32 %p1, %r1, 16;
    mov.u32 %r8, tile; shl.b32 %r7, %r1, 4; add.u32 %r9, %r8, %r7;
    and.b32 %r10, %r1, 15; shr.u32 %r11, %r1, 4; shl.b32 %r12, %r10, 5; shl.b32 %r13, %r11, 4;
    add.u32 %r14, %r12, %r13; add.u32 %r14, %r14, %r8; shl.b32 %r15, %r10, 4; add.u32 %r16, %r8, %r15;
    mov.f32 %f1, 0f00000000; mov.f32 %f2, 0f00000000; mov.f32 %f3, 0f00000000; mov.f32 %f4, 0f00000000;
    mov.u32 %r20, 0; mov.u32 %r21, 0;
    """
    + COPY.format(k0="%r20", at="%r21", a="%rd5", b="%rd7")
    + """
    cp.async.commit_group;
    LOOP:
    add.u32 %r22, %r20, 16; sub.u32 %r23, 768, %r21; add.s64 %rd5, %rd5, 32; add.s64 %rd7, %rd7, 256;
    setp.ge.u32 %p5, %r22, %r2;
    @%p5 bra COPIED;
    """
    + COPY.format(k0="%r22", at="%r23", a="%rd5", b="%rd7")
    + """
    COPIED:
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.warp.sync -1;
    add.u32 %r27, %r14, %r21; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r30, %r31, %r32, %r33}, [%r27];
    add.u32 %r28, %r16, %r21; ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r34, %r35}, [%r28+512];
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r30, %r31, %r32, %r33}, {%r34, %r35},
        {%f1, %f2, %f3, %f4};
    bar.warp.sync -1;
    mov.u32 %r20, %r22; mov.u32 %r21, %r23;
    setp.lt.u32 %p6, %r20, %r2;
    @%p6 bra LOOP;
    cp.async.wait_group 0;
    shr.u32 %r29, %r1, 2; shl.b32 %r29, %r29, 5; and.b32 %r36, %r1, 3; shl.b32 %r36, %r36, 3; add.u32 %r29, %r29, %r36;
    cvt.u64.u32 %rd8, %r29; add.s64 %rd9, %rd3, %rd8;
    st.global.v2.f32 [%rd9], {%f1, %f2}; st.global.v2.f32 [%rd9+256], {%f3, %f4};
    ret;""",
    ".param .u64 a, .param .u64 b, .param .u64 d, .param .u32 k",
)


def softmax_run(n, hidden=0, shift=0, **options):
    """A runner of SOFTMAX on 3 rows of n numbers around `shift`, the first `hidden` of the first row being -inf."""

    def run(ptx):
        rng = seeds.generator(n)
        x, v = rng.normal(size=(3, n)).astype(np.float32), rng.normal(size=n).astype(np.float32)
        x = x * (1 + abs(np.float32(shift))) + np.float32(shift)
        x[0, :hidden] = -np.inf
        out = np.full(3, np.nan, np.float32)
        ran = launch(ptx, 3, 64, [x, v, out, np.uint32(n)], **options)
        p = np.exp2(x - x.max(1, keepdims=True).astype(float))
        want = p @ v / p.sum(1)
        wrong = None if np.allclose(out, want, rtol=0, atol=1e-5) else f"{out} for {want}"
        return mutations.findings(ran, wrong)

    return run


def matmul_run(k, **options):
    def run(ptx):
        rng = seeds.generator(k)
        a, b = rng.normal(size=(16, k)).astype(np.float16), rng.normal(size=(k, 8)).astype(np.float16)
        d = np.full((16, 8), np.nan, np.float32)
        ran = launch(ptx, 1, 32, [a, b, d, np.uint32(k)], **options)
        error = np.abs(d - a.astype(float) @ b.astype(float)).max()
        return mutations.findings(ran, None if error < 1e-4 else f"error {error}")

    return run


# A maximum matters only where exp2 of the bare score overflows, or is 0 for a whole row.
SOFTMAX_RUNS = {
    "ragged": softmax_run(150, hidden=70),
    "short": softmax_run(3),
    "whole": softmax_run(128),
    "high": softmax_run(100, shift=500),
    "low": softmax_run(100, shift=-500),
}
# A copy that lands when it is waited for shows a wait left out, one that lands at once a barrier left out.
MATMUL_RUNS = {
    "ragged": matmul_run(40),
    "short": matmul_run(8),
    "whole": matmul_run(48),
    "early": matmul_run(48, async_late=False),
}
BOTH = {"softmax": (SOFTMAX, SOFTMAX_RUNS), "matmul": (MATMUL, MATMUL_RUNS)}


@pytest.fixture(scope="module")
def reports():
    """Every mutant of the two kernels, run: 15 s."""
    out = {}
    for name, (ptx, runs) in BOTH.items():
        mutants = mutations.draw(ptx, seeds.generator(0), 10**6)
        assert len(mutants) == sum(map(len, mutations.candidates(ptx).values())) > 200
        out[name] = mutations.survivors(runs, ptx, mutants)
    return out


def test_every_kind_applies_and_is_noticed(reports):
    noticed = {o.mutation.kind for report in reports.values() for o in report.outcomes if o.classes}
    assert noticed == set(mutations.KINDS)
    assert not any(report.invalid for report in reports.values())


def test_every_class_is_seen(reports):
    seen = {name for report in reports.values() for o in report.outcomes for name in o.classes}
    assert seen >= set(mutations.CLASSES) - {"sync"}  # a lone "sync" is below


def verdict(report, line):
    """What became of the mutants whose text begins so."""
    found = [o for o in report.outcomes if str(o.mutation).partition(": ")[2].startswith(line)]
    assert found, line
    return found


def test_bugs_that_leave_the_numbers_right(reports):
    """A barrier of a warp left out, a store without its guard: lanes run together, and the last one that writes has the
    right number, so only the race checks see them."""
    for kernel_name, line in (
        ("matmul", "bar.warp.sync -1;  ->  (removed)"),
        ("softmax", "@%p2 st.shared.f32 [%r9], %f6;  ->  st"),
    ):
        for o in verdict(reports[kernel_name], line):
            assert "race" in o.classes and o in reports[kernel_name].silent, str(o)
    for o in verdict(reports["softmax"], "bar.sync 0;  ->  (removed)"):
        assert "race" in o.classes, str(o)


def test_what_notices_what(reports):
    softmax, matmul = reports["softmax"], reports["matmul"]
    for report, line, name in (
        (softmax, "fma.rn.f32 %f2, %f2, %f14, %f16;  ->  add", "numbers"),
        (softmax, "mul.f32 %f3, %f3, %f14;  ->  mov.f32 %f3, %f3", "numbers"),
        (softmax, "max.f32 %f11, %f1, %f10;", "numbers"),
        (softmax, "setp.eq.f32 %p3, %f11, 0fFF800000;  ->  setp.eq.f32 %p3, %f11, 0f7F800000", "numbers"),
        (softmax, "setp.ge.u32 %p1, %r10, %r3;  ->  setp.gt", "bounds"),
        (softmax, "@%p4 bra LOOP;  ->  bra LOOP", "hang"),
        (matmul, "cp.async.wait_group 1;  ->  cp.async.wait_group 2", "numbers"),
        (matmul, "mma.sync", "numbers"),
        (matmul, "cp.async.cg.shared.global [%r26], [%rd5], 16, %r25;  ->  (removed)", "numbers"),
    ):
        assert all(name in o.classes for o in verdict(report, line)), (line, [str(o) for o in verdict(report, line)])


def test_survivors_are_explained(reports):
    """Known by hand to compute the same: the two halves of a pair that are then added, the last wait (nothing is under
    way), a clamp that leaves lane 0 alone, a first factor that alpha = 0 wipes out."""
    for report in reports.values():
        assert {o.fate for o in report.survived} <= {"same", "survived"}
    matmul = {str(o.mutation).partition(": ")[2] for o in reports["matmul"].survived}
    assert matmul == {
        "cp.async.wait_group 0;  ->  cp.async.wait_group 1;",
        "cp.async.wait_group 0;  ->  (removed)",
        "setp.ge.u32 %p5, %r22, %r2;  ->  setp.gt.u32 %p5, %r22, %r2;",
        "@%p5 bra COPIED;  ->  (removed)",
    }
    assert {o.fate for o in reports["matmul"].survived} == {"same"}
    assert len(reports["softmax"].survived) < 0.15 * len(reports["softmax"].outcomes)
    swapped = verdict(reports["softmax"], "ld.shared.v2.f32 {%f8, %f9}")
    assert {o.fate for o in swapped if o.mutation.kind == "fragment"} == {"same"}


def test_more_problems_notice_more():
    mutants = mutations.candidates(SOFTMAX)["extremum"][::2]
    one = mutations.survivors(SOFTMAX_RUNS["ragged"], SOFTMAX, mutants)
    all_of_them = mutations.survivors(SOFTMAX_RUNS, SOFTMAX, mutants)
    assert len(one.survived) > len(mutants) / 2 > 4 * len(all_of_them.survived)


def test_an_unreached_statement_is_named():
    """Where every length is a multiple of the tile, no problem takes the branch around the loads."""
    text = SOFTMAX.replace("LOADED:", "bra LOADED;\nOTHER:\nmul.f32 %f5, %f5, 0f40000000;\nbra LOADED;\nLOADED:")
    text = text.replace("@%p1 bra LOADED;", "@%p1 bra OTHER;")
    mutants = [m for m in mutations.candidates(text)["constant"] if m.before.startswith("mul.f32 %f5")]
    report = mutations.survivors(softmax_run(128), text, mutants)
    assert len(report.survived) == len(mutants) == 5
    assert not any(o.reached for o in report.survived) and "no problem runs it" in str(report.survived[0])


@pytest.mark.skipif(ptxas.missing() is not None, reason=str(ptxas.missing()))
@pytest.mark.parametrize("name", BOTH)
def test_mutants_assemble(name):
    ptx = BOTH[name][0]
    for mutation in mutations.draw(ptx, seeds.generator(1), 5):
        assert ptxas.assemble(mutation.apply(ptx), (8, 0)).registers, str(mutation)


def test_draw_is_seeded_and_spread():
    def first(seed, n=40):
        return mutations.draw(SOFTMAX, seeds.generator(seed), n)

    assert first(3) == first(3) != first(4)
    assert len(set(first(3, 200))) == 200
    assert len({m.kind for m in first(5)}) >= 10  # not only the 90 shuffles and 73 offsets
    assert {m.kind for m in mutations.draw(SOFTMAX, seeds.generator(0), 9, ["barrier", "store"])} == {
        "barrier",
        "store",
    }


def test_statements():
    """Comments, labels, scopes of inline assembly, vectors and several statements on one line."""
    text = kernel(
        """
        .reg .b32 %r<4>; // bar.sync 1;
        $L__BB0_1:
        /* ret; */ @!%p1 ld.global.v2.b32 {%r1,%r2}, [%rd1+8];  .loc 1 2 3
        { .reg .b16 t; mov.b16 t, 5; }
        bar.sync \t0;
        ret;"""
    )
    got = [(s.guard, s.name, s.operands) for s in mutations.statements(text)]
    assert got == [
        ("@!%p1", "ld.global.v2.b32", ("{%r1,%r2}", "[%rd1+8]")),
        ("", "mov.b16", ("t", "5")),
        ("", "bar.sync", ("0",)),
        ("", "ret", ()),
    ]
    (barrier,) = mutations.candidates(text)["barrier"]
    assert (
        "bar.sync" not in barrier.apply(text).replace("// bar.sync", "")
        and barrier.line == text[: barrier.start].count("\n") + 1
    )
    assert mutations.candidates(text)["guard"][1].after.startswith("@%p1 ld.global")


def test_a_deadlock_is_a_sync_finding_and_a_loop_is_stopped():
    ptx = kernel(
        """
        .reg .pred %p<3>; .reg .b32 %r<4>;
        mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 64;
        @%p1 bra HERE;
        bar.sync 1;
        HERE: bar.sync 0;
        ret;"""
    )

    def run(text):
        return mutations.findings(launch(text, 1, 64, [0, 0, 0]))

    negated = [m for m in mutations.candidates(ptx)["compare"] if "gt" in m.after or "le" in m.after]
    shifted = [m for m in mutations.candidates(ptx)["index"] if m.after.endswith("63;")]
    report = mutations.survivors(run, ptx, negated + shifted)
    assert {frozenset(o.classes) for o in report.outcomes} == {frozenset(), frozenset(["sync"])}
    assert report.outcomes[-1].classes == {"sync"} and report.outcomes[-1].stopped

    with pytest.raises(Hang), watching(1000):
        run(kernel("AGAIN: bra AGAIN; ret;"))
    assert run(ptx) is None  # the emulator is as it was


def test_verdicts_of_a_runner():
    mutants = mutations.candidates(MATMUL)["store"]

    def wrong(ptx):
        np.testing.assert_array_equal(int(ptx != MATMUL), 0)

    def broken(ptx):
        if ptx != MATMUL:
            raise KeyError("x")

    def unknown(ptx):
        if ptx != MATMUL:
            raise PTXError("x is not covered")

    def raced(ptx):
        assert ptx == MATMUL, "kernel, 1 blocks:\n  RACE shared read-after-write: x3"

    assert all(o.classes == {"numbers"} for o in mutations.survivors(wrong, MATMUL, mutants).outcomes)
    assert all(o.classes == {"race"} and o.stopped for o in mutations.survivors(raced, MATMUL, mutants).outcomes)
    for run in (broken, unknown):
        report = mutations.survivors(run, MATMUL, mutants)
        assert len(report.invalid) == len(mutants) and not report.survived
    with pytest.raises(ValueError, match="itself does not pass first: bad"):
        mutations.survivors({"first": lambda ptx: "bad"}, MATMUL, mutants)
    assert mutations.classify("RACE shared read-after-write x3: ld") == {"race"}
    assert mutations.classify("numbers: error 3\nUNINITIALISED shared read x1: ld") == {"numbers", "uninitialised"}
    assert mutations.classify("SYNC: membermask differs from the living lanes x2: shfl") == {"sync"}


ATOMIC = kernel(
    """
    .reg .pred %p<3>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
    .shared .align 4 .b8 most[4];
    mov.u32 %r1, %tid.x; mov.pred %p1, 0; setp.eq.or.u32 %p1, %r1, 0, %p1;
    @%p1 st.shared.u32 [most], 0;
    bar.sync 0;
    atom.shared.max.u32 %r2, [most], %r1;
    bar.sync 0;
    ld.param.u64 %rd1, [a]; ld.shared.u32 %r3, [most];
    @%p1 st.global.u32 [%rd1], %r3;
    ret;"""
)


def test_a_barrier_before_an_atomic_is_missed():

    def run(ptx):
        out = np.zeros(1, np.uint32)
        return mutations.findings(launch(ptx, 1, 64, [out, 0, 0]), None if out[0] == 63 else str(out))

    first, second = mutations.survivors(run, ATOMIC, mutations.candidates(ATOMIC)["barrier"]).outcomes
    assert first.classes == {"race"} and "atomic-after-write" in first.text
    assert "race" in second.classes and "read-after-write" in second.text
    stores = mutations.survivors(run, ATOMIC, mutations.candidates(ATOMIC)["store"]).outcomes
    assert "uninitialised" in stores[0].classes


def test_a_survivor_in_its_context(reports):
    o = next(o for o in reports["matmul"].survived if "setp" in o.mutation.before)
    shown = mutations.context(MATMUL, o.mutation)
    assert "setp.gt.u32" in shown and "%p5 is read on lines" in shown and "@%p5 bra COPIED" in shown
    table = str(reports["matmul"])
    assert table.splitlines()[0].split() == list(mutations.FATES)
    assert table.splitlines()[-1].split()[0] == "all"


def test_mutants_of_a_compiled_kernel():
    compiled = product_ptx()

    def run(ptx):
        rng = seeds.generator(0)
        a, b = rng.normal(size=(20, 37)).astype(np.float32), rng.normal(size=(37, 23)).astype(np.float32)
        c = np.full((20, 23), np.nan, np.float32)
        # An array takes two objects of Python's that are none here, the number of elements, bytes of one, the address,
        # shape and strides.
        arguments = [n for x in (a, b, c) for n in (0, 0, x.size, x.itemsize, x, *x.shape, *x.strides)]
        return mutations.findings(
            launch(ptx, (2, 2), (16, 16), arguments), None if np.allclose(c, a.astype(float) @ b, atol=1e-4) else "c"
        )

    barriers = mutations.survivors(run, compiled, mutations.candidates(compiled)["barrier"]).outcomes
    assert len(barriers) == 2 and all("race" in o.classes for o in barriers)
    report = mutations.survivors(run, compiled, mutations.draw(compiled, seeds.generator(0), 20))
    assert not report.invalid and len(report.survived) < 8, "\n".join(map(str, report.survived))
