"""What the emulator must find in a kernel, and what it must not: races, bounds, alignment, uninitialised reads,
barriers that not all threads reach, copies that are waited for too late. Each kernel with its bug, and without.
"""

import numpy as np
import pytest
from ptx import Hang, PTXError, launch, parse, statements, watching

WAYS = [{}, {"async_late": False}, *({"schedule": "random", "seed": seed} for seed in range(6))]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())) or "lockstep")


def kernel(body: str, shared: int = 1024) -> str:
    """Registers, tid in %r1, the addresses of element tid of two arrays of 32-bit numbers in %rd1 and %rd2, and of
    element tid of shared memory in %r2."""
    return f""".version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 a, .param .u64 b)
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<24>; .reg .b64 %rd<16>; .reg .f32 %f<16>;
    .shared .align 16 .b8 tile[{shared}];
    mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 4;
    ld.param.u64 %rd8, [a]; add.s64 %rd1, %rd8, %rd3; ld.param.u64 %rd9, [b]; add.s64 %rd2, %rd9, %rd3;
    mov.u32 %r3, tile; shl.b32 %r4, %r1, 2; add.u32 %r2, %r3, %r4;
    {body}
    ret;
}}"""


def found(text: str, threads: int = 64, grid: int = 1, **way: object) -> set[str]:
    x, y = np.arange(1024, dtype=np.uint32), np.zeros(1024, np.uint32)
    return {what for what, _ in launch(text, grid, threads, [x, y], **way).findings}


# --------------------------------------------------------------------------------------------------------------- races

REVERSED = "ld.global.u32 %r5, [%rd1]; st.shared.u32 [%r2], %r5; {} sub.u32 %r6, 252, %r4; add.u32 %r6, %r6, %r3; "
RACES = {
    "read after write": (REVERSED + "ld.shared.u32 %r7, [%r6]; st.global.u32 [%rd2], %r7;", "bar.sync 0;",
                         {"RACE shared read-after-write"}),
    "write after write": ("st.shared.u32 [%r2], %r1; {} xor.b32 %r6, %r2, 128; st.shared.u32 [%r6], %r1;",
                          "bar.sync 0;", {"RACE shared write-after-write"}),
    "write after read": ("st.shared.u32 [%r2], 1; bar.sync 0; xor.b32 %r6, %r2, 128; ld.shared.u32 %r7, [%r6]; {} "
                         "st.shared.u32 [%r2], %r7;", "bar.sync 0;", {"RACE shared write-after-read"}),
    "within a warp": ("st.shared.u32 [%r2], 1; {} xor.b32 %r6, %r2, 4; ld.shared.u32 %r7, [%r6];",
                      "bar.warp.sync -1;", {"RACE shared read-after-write"}),
    "across warps": ("st.shared.u32 [%r2], 1; {} xor.b32 %r6, %r2, 128; ld.shared.u32 %r7, [%r6];",
                     "bar.sync 0;", {"RACE shared read-after-write"}),
    "half a word": ("shl.b32 %r6, %r1, 1; add.u32 %r6, %r6, %r3; st.shared.u16 [%r6], 1; {} and.b32 %r6, %r6, -4; "
                    "ld.shared.u32 %r7, [%r6];", "bar.sync 0;", {"RACE shared read-after-write"}),
    "atomic after write": ("setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%r3], 0; {} "
                           "atom.shared.add.u32 %r5, [%r3], 1;", "bar.sync 0;", {"RACE shared atomic-after-write"}),
    "read after atomic": ("setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%r3], 0; bar.sync 0; "
                          "atom.shared.add.u32 %r5, [%r3], 1; {} ld.shared.u32 %r5, [%r3];",
                          "bar.sync 0;", {"RACE shared read-after-write"}),
    "atomic after read": ("setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%r3], 0; bar.sync 0; ld.shared.u32 %r5, [%r3]; "
                          "{} atom.shared.add.u32 %r5, [%r3], 1;", "bar.sync 0;", {"RACE shared atomic-after-read"}),
    "global": ("st.global.u32 [%rd2], %r1; {} xor.b32 %r6, %r4, 128; cvt.u64.u32 %rd4, %r6; add.s64 %rd5, %rd9, %rd4; "
               "ld.global.u32 %r7, [%rd5];", "bar.sync 0;", {"RACE global read-after-write"}),
}  # fmt: skip


@every_way
@pytest.mark.parametrize("name", RACES)
def test_a_missing_barrier(name: str, way: dict[str, object]) -> None:
    """Found in any order, also where the numbers are right; with the barrier there is nothing to find."""
    body, barrier, wanted = RACES[name]
    assert found(kernel(body.format(barrier)), **way) == set()
    missed = found(kernel(body.format("")), **way)
    if not way:
        assert wanted <= missed
    # In other orders a race has the other name, a read may find nothing yet, and between blocks' warps the read may
    # come first, which leaves no trace in global memory.
    space = next(iter(wanted)).split()[1]
    assert all(f"RACE {space}" in what or "UNINITIALISED" in what for what in missed)
    assert any("RACE" in what for what in missed) or space == "global"


@every_way
def test_two_lanes_write_one_word(way: dict[str, object]) -> None:
    assert found(kernel("st.shared.u32 [%r3], %r1;"), 32, **way) == {"RACE shared write-after-write"}


@every_way
def test_a_warp_barrier_is_none_of_the_block(way: dict[str, object]) -> None:
    body = RACES["across warps"][0].format("bar.warp.sync -1;")
    assert found(kernel(body), **way) & {"RACE shared read-after-write", "RACE shared write-after-read"}


@every_way
def test_global_races_between_blocks(way: dict[str, object]) -> None:
    """Two blocks write the same numbers; or each its own."""
    assert found(kernel("st.global.u32 [%rd2], 7;"), grid=2, **way) == {"RACE global write-after-write"}
    own = "mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd4, %r5, 256; add.s64 %rd5, %rd2, %rd4; st.global.u32 [%rd5], 7;"
    assert found(kernel(own), grid=4, **way) == set()
    assert found(kernel("atom.global.add.u32 %r5, [%rd9], 1;"), grid=4, **way) == set()


def test_a_race_is_found_where_the_numbers_are_right() -> None:
    """Lanes run together, so a warp's own barrier is missed by no number."""
    x, y = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = RACES["read after write"][0].replace("252", "124").format("")
    ran = launch(kernel(body), 1, 32, [x, y])
    assert np.array_equal(y, x[::-1]) and {what for what, _ in ran.findings} == {"RACE shared read-after-write"}


# --------------------------------------------------------------------------------------------------- bounds, alignment


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r5, [%rd1+4096];", r"OUT-OF-BOUNDS global: 4 bytes at offset 4096 of 4096 of allocation 0"),
        ("ld.global.u32 %r5, [%rd8+-4];", "WILD global pointer"),
        ("ld.global.u32 %r5, [%rd9+-4];", "OUT-OF-BOUNDS global"),
        ("mov.u64 %rd4, 0; ld.global.u32 %r5, [%rd4];", "WILD global pointer"),
        ("st.global.u32 [%rd1+2], 1;", "MISALIGNED global: 4 bytes at offset 2"),
        ("ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd1];", "MISALIGNED global: 16 bytes at offset 4"),
        ("st.shared.u32 [%r3+1024], 1;", "OUT-OF-BOUNDS shared: 4 bytes at offset 1024 of 1024"),
        ("st.shared.u32 [%r3+-4], 1;", "OUT-OF-BOUNDS shared"),
        ("ld.shared.u64 %rd4, [%r3+4];", "MISALIGNED shared"),
        (".local .align 4 .b8 own[8]; mov.u64 %rd4, own; st.local.u32 [%rd4+8], 1;", "OUT-OF-BOUNDS local"),
        ("atom.global.add.u32 %r5, [%rd1+4096], 1;", "OUT-OF-BOUNDS global"),
        ("cp.async.cg.shared.global [%r3+8], [%rd8], 16;", "MISALIGNED shared"),
        ("cp.async.cg.shared.global [%r3+1024], [%rd8], 16;", "OUT-OF-BOUNDS shared"),
        ("cp.async.cg.shared.global [%r3], [%rd8+4096], 16;", "OUT-OF-BOUNDS global"),
        ("cp.async.ca.shared.global [%r3], [%rd8], 4, 8;", "OUT-OF-BOUNDS cp.async"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r3+8];", "MISALIGNED shared"),
        ("trap;", "trap"),
    ],
)  # fmt: skip
def test_what_stops_a_launch(body: str, message: str) -> None:
    x, y = np.zeros(1024, np.uint32), np.zeros(1024, np.uint32)
    with pytest.raises(PTXError, match=message):
        launch(kernel(body), 1, 32, [x, y])


def test_a_guard_keeps_an_access_from_being_made() -> None:
    body = """setp.lt.u32 %p1, %r1, 20; @%p1 ld.global.u32 %r5, [%rd1]; @!%p1 mov.u32 %r5, 5;
    @%p1 st.global.u32 [%rd2], %r5;"""
    x, y = np.arange(20, dtype=np.uint32), np.zeros(20, np.uint32)
    launch(kernel(body), 1, 32, [x, y])
    assert np.array_equal(x, y)


def test_memory_of_others() -> None:
    """Freed allocations, and those that may only be read."""
    text = kernel("ld.global.u32 %r5, [%rd1]; st.global.u32 [%rd2], %r5;")
    x, y = (np.zeros(128, np.uint8) for _ in range(2))
    addresses = [1 << 36, 2 << 36]
    launch(text, 1, 32, addresses, buffers=[x, y], frozen=[0])
    with pytest.raises(PTXError, match="WRITE to read-only global memory: allocation 1"):
        launch(text, 1, 32, addresses, buffers=[x, y], frozen=[1])
    with pytest.raises(PTXError, match="FREED global memory: allocation 0"):
        launch(text, 1, 32, addresses, buffers=[None, y])


def test_local_memory_is_each_thread_s_own() -> None:
    """Through its own addresses and through generic ones; so is shared memory the block's."""
    body = """.local .align 8 .b8 own[16]; mov.u64 %rd4, own; st.local.u32 [%rd4+4], %r1; cvta.local.u64 %rd5, %rd4;
    ld.u32 %r5, [%rd5+4]; st.u32 [%rd5+8], %r5; ld.local.u32 %r6, [own+8];
    cvt.u64.u32 %rd6, %r2; cvta.shared.u64 %rd7, %rd6; st.u32 [%rd7], %r6; ld.shared.u32 %r7, [%r2];
    st.global.u32 [%rd2], %r7;"""
    x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    assert not launch(kernel(body), 1, 64, [x, y]).findings
    assert np.array_equal(y, np.arange(64))


def test_uninitialised_reads() -> None:
    assert found(kernel("ld.shared.u32 %r5, [%r2];")) == {"UNINITIALISED shared read"}
    assert found(kernel("st.shared.u16 [%r2], 1; ld.shared.u32 %r5, [%r2];")) == {"UNINITIALISED shared read"}
    assert found(kernel("st.shared.u32 [%r2], 1; ld.shared.u16 %h1, [%r2+2];")) == set()
    assert found(kernel("atom.shared.add.u32 %r5, [%r2], 1;")) == {"UNINITIALISED shared atomic"}
    x, y = np.zeros(32, np.uint32), np.zeros(32, np.float32)
    launch(kernel("ld.shared.f32 %f1, [%r2]; st.global.f32 [%rd2], %f1;"), 1, 32, [x, y])
    assert np.isnan(y).all()  # and not 0, which many a sum would hide
    # Of the next block as well.
    assert found(kernel("ld.shared.u32 %r5, [%r2]; st.shared.u32 [%r2], 1;"), grid=3) == {"UNINITIALISED shared read"}


# ------------------------------------------------------------------------------------------------------------- barriers


@every_way
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra HERE; bar.sync 1; HERE: bar.sync 0;", "different barriers"),
        ("setp.lt.u32 %p1, %r1, 40; @%p1 bra HERE; bar.sync 1; HERE: bar.sync 0;", "different barriers"),
        ("setp.lt.u32 %p1, %r1, 40; @%p1 bra HERE; bar.sync 1; HERE: bar.warp.sync -1;", "deadlock"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 bra HERE; shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1; bra END; "
         "HERE: vote.sync.any.pred %p2, %p1, -1; END: bar.warp.sync -1;", "not all lanes of the warp"),
    ],
)  # fmt: skip
def test_barriers_apart(body: str, message: str, way: dict[str, object]) -> None:
    with pytest.raises(PTXError, match=f"SYNC: .*{message}"):
        found(kernel(body), **way)


@every_way
def test_a_barrier_with_exited_threads(way: dict[str, object]) -> None:
    body = "setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;"
    assert found(kernel(body), **way) == {"SYNC: bar.sync with exited threads"}


@every_way
def test_members_of_a_shuffle(way: dict[str, object]) -> None:
    """The mask names other lanes than those that live."""
    wanted = {"SYNC: membermask differs from the living lanes"}
    assert found(kernel("shfl.sync.bfly.b32 %r5, %r1, 1, 31, 65535;"), **way) == wanted
    gone = "setp.lt.u32 %p1, %r1, 8; @%p1 exit; shfl.sync.bfly.b32 %r5, %r1, 1, 31, {};"
    assert found(kernel(gone.format(-1)), 32, **way) == wanted
    assert found(kernel(gone.format(0xFFFFFF00)), 32, **way) == set()


@every_way
def test_branches_within_a_warp(way: dict[str, object]) -> None:
    """Lanes that loop for as often as their number meet again."""
    body = """mov.u32 %r5, 0; mov.u32 %r6, 0;
    AGAIN: setp.ge.u32 %p1, %r5, %r1; @%p1 bra DONE; add.u32 %r6, %r6, %r5; add.u32 %r5, %r5, 1; bra AGAIN;
    DONE: shfl.sync.idx.b32 %r7, %r6, 31, 31, -1; add.u32 %r6, %r6, %r7; st.global.u32 [%rd2], %r6;"""
    x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    assert not launch(kernel(body), 1, 64, [x, y], **way).findings
    n = np.arange(64)
    assert np.array_equal(y, n * (n - 1) // 2 + np.where(n < 32, 31 * 30 // 2, 63 * 62 // 2))


def test_a_loop_without_end() -> None:
    with pytest.raises(Hang, match="still running after"), watching(500):
        found(kernel("AGAIN: bra AGAIN;"))
    with watching(500) as trace:
        found(kernel(""))
        found(kernel("bra NEXT; mov.u32 %r5, 1; NEXT: mov.u32 %r5, 2;"))
    assert trace.steps == 6 and len(trace.results) == 2
    text = kernel("bra NEXT; mov.u32 %r5, 1; NEXT: mov.u32 %r5, 2;")
    lines = [s.written() for s in statements(text)]
    ran = {lines[n] for _, n in trace.reached}
    assert "mov.u32 %r5, 2;" in ran and "mov.u32 %r5, 1;" not in ran


# -------------------------------------------------------------------------------------------------- asynchronous copies

COPY = """mul.wide.u32 %rd4, %r1, 16; add.s64 %rd5, %rd8, %rd4; add.s64 %rd6, %rd9, %rd4; shl.b32 %r5, %r1, 4;
add.u32 %r5, %r5, %r3; add.s64 %rd7, %rd5, 1024;
cp.async.cg.shared.global [%r5], [%rd5], 16; cp.async.commit_group;
cp.async.cg.shared.global [%r5+1024], [%rd7], 16; cp.async.commit_group;
cp.async.wait_group {}; {}
ld.shared.v4.u32 {{%r8, %r9, %r10, %r11}}, [%r5]; st.global.v4.u32 [%rd6], {{%r8, %r9, %r10, %r11}};
cp.async.wait_all; {}"""


def copied(text: str, **way: object) -> tuple[set[str], bool]:
    x, y = np.arange(512, dtype=np.uint32), np.zeros(512, np.uint32)
    findings = {what for what, _ in launch(text, 1, 64, [x, y], **way).findings}
    return findings, bool(np.array_equal(y[:256], x[:256]))


def test_copies_arrive_as_late_as_they_may() -> None:
    """Of two groups the first is there when one is still on its way; when two are, nothing is."""
    for way in WAYS:
        assert copied(kernel(COPY.format(1, "", ""), 2048), **way) == (set(), True)
        assert copied(kernel(COPY.format(0, "", ""), 2048), **way) == (set(), True)
    late = kernel(COPY.format(2, "", ""), 2048)
    assert copied(late) == ({"UNINITIALISED shared read"}, False)
    assert copied(late, async_late=False) == (set(), True)


def test_copies_left_behind() -> None:
    text = kernel(COPY.format(1, "", "").replace("cp.async.wait_all;", ""), 2048)
    assert copied(text) == ({"SYNC: cp.async still pending at exit"}, True)


def test_a_copy_is_its_own_thread_s_until_a_barrier() -> None:
    """Another warp's numbers need a barrier of the block behind the wait."""
    other = COPY.replace("ld.shared.v4", "xor.b32 %r5, %r5, 512; ld.shared.v4")
    for way in WAYS:
        assert "RACE shared read-after-write" in copied(kernel(other.format(1, "", "bar.sync 0;"), 2048))[0]
        assert copied(kernel(other.format(1, "bar.sync 0;", ""), 2048), **way)[0] == set()


def test_what_a_copy_does_not_read_is_zero() -> None:
    body = """mul.wide.u32 %rd4, %r1, 16; add.s64 %rd5, %rd8, %rd4; add.s64 %rd6, %rd9, %rd4; shl.b32 %r5, %r1, 4;
    add.u32 %r5, %r5, %r3; and.b32 %r6, %r1, 3; shl.b32 %r6, %r6, 2; setp.eq.u32 %p1, %r6, 0; @%p1 mov.u64 %rd5, 0;
    cp.async.cg.shared.global [%r5], [%rd5], 16, %r6; cp.async.wait_all;
    ld.shared.v4.u32 {%r8, %r9, %r10, %r11}, [%r5]; st.global.v4.u32 [%rd6], {%r8, %r9, %r10, %r11};"""
    x, y = np.arange(1, 129, dtype=np.uint32), np.full(128, 99, np.uint32)
    for way in WAYS:
        assert not launch(kernel(body), 1, 32, [x, y], **way).findings
        rows = x.reshape(32, 4).copy()
        rows[np.arange(4) >= (np.arange(32) % 4)[:, None]] = 0
        assert np.array_equal(y.reshape(32, 4), rows)


# ---------------------------------------------------------------------------------------------------------- the profile


def test_bank_conflicts() -> None:
    """A column of a tile with rows of 32 words, and of 33."""
    x, y = np.zeros(2048, np.uint32), np.zeros(2048, np.uint32)
    for pitch, wavefronts in ((1, 1), (2, 2), (4, 4), (32, 32), (33, 1), (0, 1)):
        body = f"mul.lo.u32 %r5, %r1, {4 * pitch}; add.u32 %r5, %r5, %r3; ld.shared.u32 %r6, [%r5];"
        (access,) = launch(kernel(body, 8192), 1, 32, [x, y], profile=True).accesses
        assert (access.wavefronts, access.ideal, access.requests, access.stores) == (wavefronts, 1, 1, False)
    body = "shl.b32 %r5, %r1, 4; add.u32 %r5, %r5, %r3; st.shared.v4.u32 [%r5], {%r1, %r1, %r1, %r1};"
    (access,) = launch(kernel(body, 8192), 1, 64, [x, y], profile=True).accesses
    assert (access.wavefronts, access.ideal, access.requests, access.stores) == (8, 8, 2, True)


def test_sectors() -> None:
    x, y = np.zeros(2048, np.uint32), np.zeros(2048, np.uint32)
    for pitch, sectors in ((1, 4), (2, 8), (8, 32), (16, 32), (0, 1)):
        body = f"mul.wide.u32 %rd4, %r1, {4 * pitch}; add.s64 %rd5, %rd8, %rd4; ld.global.u32 %r6, [%rd5];"
        (access,) = launch(kernel(body), 1, 32, [x, y], profile=True).accesses
        assert (access.space, access.sectors, access.requests, access.nbytes) == ("global", sectors, 1, 128)


# ------------------------------------------------------------------------------------------------------------- the text


def test_the_parser() -> None:
    """Scopes of inline assembly, variables, parameters with attributes, several kernels."""
    text = """.version 8.0
.target sm_80
.address_size 64
.global .align 4 .u32 table[3] = {1, 0x10, -1};
.extern .shared .align 16 .b8 dynamic[];
.visible .entry first(.param .u64 .ptr .align 1 a, .param .align 8 .b8 b[24]) .maxntid 64, 2, 1 { ret; }
.visible .entry second(.param .u64 a)
{ // bar.sync 1;
    .reg .b32 %r<3>; .reg .b32 t; .shared .align 4 .b8 own[6];
    mov.b32 t, 1; { .reg .b16 t; .reg .b64 %r1; mov.b16 t, 2; LOOP: mov.b64 %r1, 3; } /* ret; */ mov.b32 %r1, t;
    ret;
}"""
    first, second = parse(text), parse(text, "second")
    assert first.params == [("a", "u64", 0), ("b", "b8", 24)] and first.maxntid == (64, 2, 1)
    assert second.variables["table"].initial == np.array([1, 16, -1], np.int32).tobytes()
    assert [(v.space, v.align, v.size) for v in second.variables.values()] == [
        ("global", 4, 12), ("shared", 16, 0), ("shared", 4, 6)
    ]  # fmt: skip
    assert second.registers["t"] == "b32" and second.registers["t@1"] == "b16" and second.registers["%r1@1"] == "b64"
    assert [s.operands[0] for s in second.statements[:-1]] == ["t", "t@1", "%r1@1", "%r1"]
    assert [s.operands[0] for s in statements(text, "second")[:-1]] == ["t", "t", "%r1", "%r1"]
    assert second.labels == {"LOOP": 2}
    for broken in ("", ".target sm_80", text.replace("ret; }", "")):
        with pytest.raises(PTXError):
            parse(broken, "first")


def test_dynamic_shared_memory_and_variables() -> None:
    body = """mov.u32 %r5, more; add.u32 %r5, %r5, %r4; st.shared.u32 [%r5], %r1; ld.shared.u32 %r6, [%r5];
        mov.u64 %rd4, table; ld.global.u32 %r7, [%rd4+4]; add.u32 %r6, %r6, %r7; mov.u32 %r8, %dynamic_smem_size;
        add.u32 %r6, %r6, %r8; st.global.u32 [%rd2], %r6;"""
    outside = ".global .u32 table[2] = {5, 7};\n.extern .shared .align 16 .b8 more[];\n.visible"
    text = kernel(body, 6).replace(".visible", outside)
    x, y = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    assert not launch(text, 1, 32, [x, y], dynamic=128).findings
    assert np.array_equal(y, np.arange(32) + 7 + 128)
    with pytest.raises(PTXError, match="OUT-OF-BOUNDS shared: 4 bytes at offset 140 of 140"):
        launch(text, 1, 32, [x, y], dynamic=124)
