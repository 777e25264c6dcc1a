"""What sass.py, ptxas.py and multiprocessor.py say of kernels small enough to count by hand."""

import shutil

import multiprocessor
import ptxas
import pytest
import sass
from small_kernels import kernel, product_ptx

needs_ptxas = pytest.mark.skipif(ptxas.missing() is not None, reason=str(ptxas.missing()))
every_target = pytest.mark.parametrize("cc", ptxas.TARGETS, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")

# Per thread and step: two 128-bit loads from shared memory and the 16 products of their numbers, m of them in each of n
# rounds with a barrier.
PRODUCT = kernel(
    """
    .reg .pred %p<4>; .reg .b32 %r<12>; .reg .b64 %rd<8>; .reg .f32 %f<40>;
    .shared .align 16 .b8 tile[4096];
    ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u32 %r1, [n]; ld.param.u32 %r2, [m];
    cvta.to.global.u64 %rd1, %rd1; cvta.to.global.u64 %rd2, %rd2;
    mov.u32 %r3, %tid.x; mul.wide.u32 %rd3, %r3, 16; add.s64 %rd4, %rd1, %rd3;
    mov.u32 %r4, tile; shl.b32 %r5, %r3, 4; add.u32 %r6, %r4, %r5;
    """
    + "\n".join(f"mov.f32 %f{n}, 0f00000000;" for n in range(16))
    + """
    OUTER:
    ld.global.v4.f32 {%f30, %f31, %f32, %f33}, [%rd4];
    st.shared.v4.f32 [%r6], {%f30, %f31, %f32, %f33};
    bar.sync 0;
    mov.u32 %r7, %r4; mov.u32 %r8, %r2;
    INNER:
    ld.shared.v4.f32 {%f16, %f17, %f18, %f19}, [%r7];
    ld.shared.v4.f32 {%f20, %f21, %f22, %f23}, [%r7+2048];
    """
    + "\n".join(f"fma.rn.f32 %f{4 * i + j}, %f{16 + i}, %f{20 + j}, %f{4 * i + j};" for i in range(4) for j in range(4))
    + """
    add.u32 %r7, %r7, 16; sub.u32 %r8, %r8, 1; setp.ne.u32 %p1, %r8, 0; @%p1 bra INNER;
    bar.sync 0;
    add.s64 %rd4, %rd4, 4096; sub.u32 %r1, %r1, 1; setp.ne.u32 %p2, %r1, 0; @%p2 bra OUTER;
    add.s64 %rd5, %rd2, %rd3;
    """
    + "\n".join(
        f"st.global.v4.f32 [%rd5+{16 * i}], {{%f{4 * i}, %f{4 * i + 1}, %f{4 * i + 2}, %f{4 * i + 3}}};"
        for i in range(4)
    )
    + "\nret;",
    ".param .u64 a, .param .u64 b, .param .u32 n, .param .u32 m",
)


@needs_ptxas
@every_target
def test_counts_of_a_tiled_product(cc):
    row = ptxas.summary(PRODUCT, cc)
    assert (row["FFMA"], row["LDS128"], row["STS128"], row["LDG128"], row["STG128"]) == (16, 2, 1, 1, 4)
    assert row["BAR"] == 2 and row["barriers"] == 1 and row["shared"] == 4096
    assert row["spill_stores"] == row["spill_loads"] == row["stack"] == row["LDL"] == row["STL"] == 0
    assert 20 < row["registers"] < 64


@needs_ptxas
@every_target
def test_loops_of_a_tiled_product(cc):
    r = ptxas.assemble(PRODUCT, cc)
    outer, inner = sass.loops(r.program)
    assert (outer.depth, inner.depth, inner.parent, outer.children) == (1, 2, outer, [inner])
    assert sass.amount(inner.static, "FFMA") == 16 and sass.amount(outer.own, "FFMA") == 0
    # 16 products, 2 loads, and at most an addition, a subtraction, a comparison and a branch.
    assert 19 <= sum(inner.static.values()) <= 22
    assert 16 / 22 <= inner.share() <= 16 / 19
    assert sass.main_loop(r.program) is inner

    counts = outer.counts(trips=100)
    assert sass.amount(counts, "FFMA") == 1600 and sass.amount(counts, "LDS") == 200
    assert sass.amount(counts, "BAR") == 2 and sass.amount(counts, "STS") == 1
    assert sass.amount(outer.counts(trips=lambda loop: 5), "FFMA") == 80
    assert sass.amount(outer.counts(trips=sass.trips_for(4096)), "FFMA") == 4096
    assert inner.share() > outer.share(trips=100) > outer.share(trips=1)


@needs_ptxas
def test_the_main_loop_holds_both_products():
    """Two loops over the head size in one over the keys, in one over the queries: the one over the keys."""
    product = "".join(f"fma.rn.f32 %f{n}, %f{n}, %f{n}, 0f40000000;\n" for n in range(8))
    text = kernel(
        f"""
        .reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<4>; .reg .f32 %f<9>;
        ld.param.u64 %rd1, [a]; ld.param.u32 %r1, [n];
        {"".join(f"ld.global.f32 %f{n}, [%rd1+{4 * n}];" for n in range(8))}
        mov.u32 %r2, %r1;
        QUERIES:
        mov.u32 %r3, %r1;
        KEYS:
        mov.u32 %r4, %r1;
        FIRST: {product} sub.u32 %r4, %r4, 1; setp.ne.u32 %p1, %r4, 0; @%p1 bra FIRST;
        bar.sync 0;
        mov.u32 %r5, %r1;
        SECOND: {product} sub.u32 %r5, %r5, 1; setp.ne.u32 %p1, %r5, 0; @%p1 bra SECOND;
        bar.sync 0;
        sub.u32 %r3, %r3, 1; setp.ne.u32 %p2, %r3, 0; @%p2 bra KEYS;
        sub.u32 %r2, %r2, 1; setp.ne.u32 %p3, %r2, 0; @%p3 bra QUERIES;
        {"".join(f"st.global.f32 [%rd1+{4 * n}], %f{n};" for n in range(8))}
        ret;"""
    )
    program = ptxas.assemble(text, (8, 0)).program
    queries, keys, first, second = sass.loops(program)
    assert [loop.depth for loop in (queries, keys, first, second)] == [1, 2, 3, 3]
    assert sass.main_loop(program) is keys
    assert sass.amount(keys.counts(trips=10), "FFMA") == 160


@needs_ptxas
@every_target
def test_the_way_through_a_loop(cc):
    """The arm with the products and without the extra work: an edge tile's arm is not what a loop costs."""
    text = kernel(
        f"""
        .reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<4>; .reg .f32 %f<9>;
        ld.param.u64 %rd1, [a]; ld.param.u32 %r1, [n];
        mov.f32 %f1, 0f00000000;
        LOOP:
        ld.global.f32 %f2, [%rd1];
        setp.gt.f32 %p1, %f2, 0f00000000;
        @%p1 bra INNER;
        {"ld.global.f32 %f3, [%rd1+4]; ex2.approx.f32 %f4, %f3; bar.sync 0; add.f32 %f1, %f1, %f4;" * 8}
        bra JOIN;
        INNER:
        fma.rn.f32 %f1, %f2, %f1, %f2; fma.rn.f32 %f1, %f2, %f1, %f2;
        JOIN:
        sub.u32 %r1, %r1, 1; setp.ne.u32 %p2, %r1, 0; @%p2 bra LOOP;
        st.global.f32 [%rd1+4], %f1;
        ret;"""
    )
    (loop,) = sass.loops(ptxas.assemble(text, cc).program)
    assert sass.amount(loop.static, "BAR") == 8
    counts = loop.counts()
    assert sass.amount(counts, "FFMA") == 2 and sass.amount(counts, "BAR") == 0 and sass.amount(counts, "MUFU") == 0


LOCAL = kernel(
    """
    .local .align 4 .b8 array[256];
    .reg .b32 %r<8>; .reg .b64 %rd<12>; .reg .f32 %f<4>;
    ld.param.u64 %rd1, [a]; ld.param.u32 %r1, [n];
    mov.u32 %r2, %tid.x; and.b32 %r3, %r2, 63; mul.wide.u32 %rd2, %r3, 4; mul.wide.u32 %rd3, %r1, 4;
    mov.u64 %rd4, array; add.s64 %rd5, %rd4, %rd2; add.s64 %rd6, %rd4, %rd3;
    ld.global.f32 %f1, [%rd1]; st.local.f32 [%rd5], %f1; ld.local.f32 %f2, [%rd6];
    st.global.f32 [%rd1], %f2;
    ret;"""
)


@needs_ptxas
@every_target
def test_a_local_array_is_seen(cc):
    row = ptxas.summary(LOCAL, cc)
    assert row["stack"] == 256 and row["LDL"] == 1 and row["STL"] == 1
    assert sass.main_loop(ptxas.assemble(LOCAL, cc).program) is None and row["main_share"] == 0


@needs_ptxas
def test_spills_are_seen():
    many = range(64)
    text = kernel(
        ".reg .b64 %rd<4>; .reg .f32 %f<70>; ld.param.u64 %rd1, [a];\n"
        + "".join(f"ld.volatile.global.f32 %f{n}, [%rd1+{4 * n}];\n" for n in many)
        + "".join(f"st.volatile.global.f32 [%rd1+{4 * n}], %f{n};\n" for n in reversed(many))
        + "ret;"
    ).replace(")\n.pragma", ")\n.maxnreg 32\n.pragma")
    r = ptxas.assemble(text, (8, 0))
    assert r.registers <= 32 and r.spill_stores > 0 and r.spill_loads > 0 and r.stack > 0


@needs_ptxas
def test_doubles_and_wide_registers():
    text = kernel(
        """
        .reg .b64 %rd<4>; .reg .f64 %d<4>;
        ld.param.u64 %rd1, [a]; ld.global.v2.f64 {%d1, %d2}, [%rd1]; fma.rn.f64 %d3, %d1, %d2, %d1;
        st.global.f64 [%rd1], %d3; ret;"""
    )
    r = ptxas.assemble(text, (9, 0))
    row = ptxas.summary(text, (9, 0))
    assert r.program.useful == "DFMA" and (row["DFMA"], row["LDG128"], row["STG64"]) == (1, 1, 1)


@needs_ptxas
def test_bad_ptx_is_refused():
    with pytest.raises(ValueError, match="rejects"):
        ptxas.assemble(kernel(".reg .f32 %f<2>; add.f32 %f1, %f1; ret;"), (8, 0))
    with pytest.raises(ptxas.ToolError, match="reads this PTX"):
        ptxas.assemble(kernel("ret;").replace(".version 7.8", ".version 99.0"), (8, 0))


def test_absent_tools_are_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(ptxas.importlib.util, "find_spec", lambda name: None)
    ptxas.tools.cache_clear()
    try:
        assert "no ptxas" in ptxas.missing()
        with pytest.raises(ptxas.ToolError, match="no ptxas"):
            ptxas.assemble(kernel("nop; ret;"), (8, 0))
    finally:
        ptxas.tools.cache_clear()


def test_parse():
    """The forms of nvdisasm's lines that a small kernel need not have."""
    program = sass.parse(
        "\n".join(
            [
                '\t.section\t.text.other,"ax"',
                "        /*0000*/                   EXIT ;",
                '\t.section\t.text.mine,"ax"',
                "mine:",
                ".text.mine:",
                "        /*0000*/              @!PT LDS RZ, [RZ] ;",
                "        /*0010*/                   LDGSTS.E.BYPASS.128 [R9+0x10], desc[UR8][R2.64], !PT ;",
                ".L_x_1:",
                "        /*0020*/              @!P0 HMMA.16816.F32 R4, R4, R8.reuse, RZ ;",
                "        /*0030*/                   UIADD3 UR5, UPT, UPT, UR4, 0x300, URZ ;",
                "        /*0040*/               @P1 CALL.REL.NOINC `(.L_x_3) ;",  # a jump, by another name
                "        /*0050*/                   BRA.U !UP0, `(.L_x_1) ;",
                "        /*0060*/                   CALL.REL.NOINC `($__internal_0_$__div) ;",
                "        /*0070*/                   EXIT ;",
                ".L_x_3:",
                "        /*0080*/                   BRA `(.L_x_1);",
                ".L_x_2:",
                "        /*0090*/                   BRA `(.L_x_2);",
                "        /*00a0*/                   NOP;",
            ]
        ),
        "mine",
    )
    lds, copy, hmma, uniform, leave, branch, call, *_ = program.instructions
    assert not lds.executed and copy.operands == ("[R9+0x10]", "desc[UR8][R2.64]", "!PT")
    assert sass.width(copy.name) == 128 and sass.width("LDG.E.U16") == 16 and sass.width("STS") == 32
    assert (hmma.predicate, hmma.predicated, hmma.opcode) == ("!P0", True, "HMMA")
    assert uniform.uniform and not hmma.uniform and branch.target == 0x20
    assert leave.jumps and leave.target == 0x80 and not call.jumps
    # The loop of padding at the end is no loop of the kernel.
    (loop,) = program.loops
    assert loop.static == {"HMMA.16816.F32": 1, "UIADD3": 1, "CALL.REL.NOINC": 1, "BRA.U": 1, "BRA": 1}
    assert loop.counts() == {"HMMA.16816.F32": 1, "UIADD3": 1, "CALL.REL.NOINC": 1, "BRA": 1}
    assert program.useful == "HMMA" and program.count()["LDS"] == 0


# By the rules of the programming guide, worked out by hand.
@pytest.mark.parametrize(
    ("registers", "threads", "shared", "cc", "blocks", "limit"),
    [
        (32, 256, 0, (8, 0), 8, "warps"),  # 64 warps / 8
        (64, 256, 0, (8, 0), 4, "registers"),  # 65536 / (64 x 32 x 8)
        (65, 128, 0, (8, 0), 7, "registers"),  # 72 x 32 = 2304 a warp; 16384 // 2304 = 7 a quarter, 28 warps
        (128, 128, 48 * 1024, (8, 0), 3, "shared"),  # 164 // 49
        (128, 128, 48 * 1024, (8, 6), 2, "shared"),  # 100 // 49
        (128, 128, 48 * 1024, (9, 0), 4, "registers"),  # 228 // 49 = 4 too
        (32, 32, 0, (8, 6), 16, "blocks"),
        (32, 32, 0, (8, 9), 24, "blocks"),
        (32, 32, 0, (12, 0), 24, "blocks"),
        (32, 32, 0, (10, 0), 32, "blocks"),
        (255, 128, 0, (8, 0), 2, "registers"),  # 8192 a warp, 2 a quarter
        (32, 256, 163 * 1024, (8, 0), 1, "shared"),
        (32, 256, 163 * 1024 + 1, (8, 0), 0, "shared"),
        (32, 256, 99 * 1024 + 1, (12, 0), 0, "shared"),
        (32, 256, 227 * 1024, (9, 0), 1, "shared"),
        (128, 1024, 0, (8, 0), 0, "registers"),  # 4096 x 32 > 65536
        (64, 100, 0, (8, 0), 8, "registers"),  # 4 warps of 2048: 8 a quarter
        (32, 256, 1, (8, 6), 6, "warps"),
    ],
)
def test_occupancy(registers, threads, shared, cc, blocks, limit):
    got = multiprocessor.occupancy(registers, threads, shared, cc)
    assert (got.blocks, got.limit) == (blocks, limit)
    assert got.warps == blocks * -(-threads // 32) and got.fraction == got.warps / multiprocessor.CHIPS[cc].warps


def test_occupancy_refuses():
    with pytest.raises(ValueError, match="1025 threads"):
        multiprocessor.occupancy(32, 1025, 0, (8, 0))
    with pytest.raises(ValueError, match="256 registers"):
        multiprocessor.occupancy(256, 32, 0, (8, 0))


def test_issue_bound():
    """An 8 x 8 register tile: 64 products and 4 loads of 128 bits a step."""
    step = {"FFMA": 64, "LDS.128": 4}
    a100, ada = multiprocessor.issue_bound(step, (8, 0)), multiprocessor.issue_bound(step, (8, 9))
    assert a100.cycles["fp32"] == 128 and a100.cycles["shared"] == 64 and a100.cycles["issue"] == 68
    assert (a100.limit, a100.fraction) == ("fp32", 1.0)
    # With twice the lanes the scheduler is what stops it: 64 of 68 slots.
    assert (ada.limit, ada.fraction) == ("issue", 64 / 68) and ada.cycles["fp32"] == 64
    slow = multiprocessor.issue_bound({"FFMA": 16, "LDS": 32}, (8, 0))
    assert (slow.limit, slow.fraction) == ("shared", 32 / 128)
    assert multiprocessor.issue_bound({"FFMA": 16, "LDS": 32}, (8, 0), shared_wavefronts=4).fraction == 32 / 48
    assert "of peak" in str(slow)
    # One warp alone: the products, then the loads.
    assert a100.alone == 128 / 192
    # Half of the FFMA are the tile's products.
    assert multiprocessor.issue_bound({"FFMA": 64}, (8, 0), products=32).fraction == 0.5

    tensor = multiprocessor.issue_bound({"HMMA.16816.F32": 64, "LDSM.16.M88.4": 32, "MUFU.EX2": 16}, (8, 0))
    assert tensor.cycles["tensor"] == 512 and tensor.cycles["shared"] == 512 and tensor.cycles["xu"] == 128
    assert tensor.fraction == 1.0
    assert multiprocessor.issue_bound({"DFMA": 10, "DADD": 10}, (8, 9)).cycles["fp64"] == 20 * 64
    assert multiprocessor.issue_bound({"DFMA": 10, "DADD": 10}, (9, 0)).fraction == 0.5
    # IMAD goes through one half of the pipe only, where there are two.
    assert multiprocessor.issue_bound({"IMAD": 10, "FFMA": 2}, (9, 0)).cycles["imad"] == 20
    assert multiprocessor.issue_bound({"FFMA2": 10}, (10, 0)).fraction == 1.0
    copy = multiprocessor.issue_bound({"LDGSTS.E.BYPASS.128": 1, "FFMA": 1}, (8, 9))
    assert copy.cycles["l2"] == 512 * 4 / 64 and copy.cycles["shared"] == 16


@needs_ptxas
def test_a_compiled_kernel():
    compiled = product_ptx()
    program = ptxas.assemble(compiled, (8, 0)).program
    loop = sass.main_loop(program)
    # The loop over tiles, or where the inner one was not unrolled, that one.
    assert 16 <= sass.amount(loop.counts(trips=16), "FFMA") <= 256 and program.useful == "FFMA"
    row = ptxas.summary(compiled, (8, 0))
    assert row["BAR"] == 2 and row["shared"] == 2048 and row["LDL"] == row["STL"] == 0
