"""Tiles and shared memory: for every kernel, dtype, head size and device there is one that fits, and its parts lie
side by side. No device and no emulator is needed."""

import itertools

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

from emulator import SHARED

from numba_attn.cuda import backward, bias_sums, decode, forward, sums, tiling
from numba_attn.cuda.code import VECTOR

KERNELS = {"forward": forward.memory, "queries": backward.memory_queries, "keys": backward.memory_keys}
# kernel -> whose tiles it has, and what it keeps in them
MEMORY = {name: (name, memory) for name, memory in KERNELS.items()} | {
    "decode": ("decode", forward.memory), "bias": ("sums", bias_sums.memory_bias), "aux": ("sums", sums.memory_aux),
}  # fmt: skip
HEAD_SIZES = range(1, tiling.LARGEST + 1)
PAIRS = list(itertools.product((1, 16, 59, 64, 100, 128, 192, 256), repeat=2))  # (Dk, Dv)
DTYPES = [("f16", False), ("bf16", False), ("f32", False), ("f32", True), ("f64", False)]


@pytest.mark.parametrize("cc", SHARED, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
@pytest.mark.parametrize("kernel", MEMORY)
@pytest.mark.parametrize("storage, tf32", DTYPES)
def test_a_tile_fits(kernel: str, storage: str, tf32: bool, cc: tuple[int, int]) -> None:
    """Every launch asks for what `memory` says: at most what a block of this device can have."""
    if tf32 and kernel == "decode":
        pytest.skip("decode has no tf32")
    tiles, memory = MEMORY[kernel]
    for (qk_dim, v_dim), options in itertools.product([(d, d) for d in HEAD_SIZES] + PAIRS, (False, True)):
        t = tiling.choose(tiles, storage, (qk_dim, v_dim), memory, SHARED[cc], tf32=tf32, options=options, cc=cc)
        assert t is not None
        places = memory(t)
        if kernel == "decode":  # the same kernel with fewer rows, and the one that joins its parts
            for rows in range(1, decode.ROWS + 1):
                assert forward.memory(decode.with_rows(t, rows))["size"] <= SHARED[cc]
            assert decode.memory_merge(t)["size"] <= SHARED[cc]
        if tiles == "sums":  # what build_aux takes
            assert t.rows % t.cols == 0 and t.threads % t.rows == 0 and t.cols & (t.cols - 1) == 0
        assert places["size"] <= SHARED[cc]
        assert t.qk_dim >= qk_dim and t.v_dim >= v_dim
        assert t.mma is (storage in ("f16", "bf16") or tf32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("storage, tf32", DTYPES)
def test_threads_share_a_tile_evenly(kernel: str, storage: str, tf32: bool) -> None:
    """Every element of the scores and of the outputs has one owner, and rows of shared memory are 16-byte units, an odd
    number of them: eight rows then lie in eight different groups of banks."""
    memory = KERNELS[kernel]
    for (qk_dim, v_dim), options, cc in itertools.product(PAIRS, (False, True), ((9, 0), (10, 0))):
        t = tiling.choose(kernel, storage, (qk_dim, v_dim), memory, SHARED[cc], tf32=tf32, options=options, cc=cc)
        assert t is not None
        for regs, cols in ((t.scores, t.cols), (t.output(t.qk_dim), t.qk_dim), (t.output(t.v_dim), t.v_dim)):
            assert regs.size * t.threads == t.rows * cols
            assert len(set(regs.rows)) == len(regs.rows) and len(set(regs.cols)) == len(regs.cols)
        for dim in (t.qk_dim, t.v_dim):
            assert t.stride(dim) % VECTOR == 0 and t.stride(dim) // VECTOR % 2 == 1
        places = memory(t)
        assert all(at % VECTOR == 0 for at in places.values())
        assert t.cols % 16 == 0 or not t.mma  # ldmatrix brings two fragments of 8 columns
        assert t.threads % 32 == 0
