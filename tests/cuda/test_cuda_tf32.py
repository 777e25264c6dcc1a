"""float32 by tensor cores, precision="tf32": no worse than dense arithmetic whose operands are rounded to tf32."""

import functools

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install numba-attn[cuda13]")

import emulator
import numpy as np
import seeds
import test_backward
from cases import BY_NAME, build

import numba_attn as na
from numba_attn.cuda.host import driver

NAMES = ["causal-br-63x203", "gqa-4", "varlen-tiles", "everything"]
QUICK = NAMES[:1]


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest tf32, ties away from zero, as cvt.rna does."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.mark.parametrize(
    ("name", "cc"),
    [pytest.param(n, cc, marks=[] if n in QUICK else pytest.mark.ladder) for n in NAMES for cc in ((8, 0), (8, 6))],
)
def test_case(name: str, cc: tuple[int, int]) -> None:
    """Out, lse and every gradient. The yardstick rounds what goes into the products, and no weights."""
    arrays, options = build(BY_NAME[name])
    dout, dlse = test_backward.cotangents(arrays[0], arrays[2])
    asked = {"aux_grad": test_backward.float_aux(options)}
    how = {"return_lse": True, "backend": "cuda", "precision": "tf32"}
    with driver.use(emulator.EmulatedDevice(cc)) as device:
        (out, lse), pullback = na.attention_vjp(*arrays, **options, **asked, **how)
        found = pullback(dout, dlse)
        texts = " ".join(device.kernels())
    assert "m16n8k8.row.col.f32.tf32" in texts
    coarse = tuple(map(rounded, arrays))
    gradients = functools.partial(na.reference.attention_backward, dlse=dlse, **options, **asked)
    forward = functools.partial(na.reference.attention, **options, return_lse=True)
    want = [*forward(*arrays), *(x for _, x in test_backward.entries(gradients(dout, *arrays)))]
    dense = [*forward(*coarse), *(x for _, x in test_backward.entries(gradients(rounded(dout), *coarse)))]
    got = [out, lse, *(x for _, x in test_backward.entries(found))]
    names = ["out", "lse", *(name for name, _ in test_backward.entries(found))]
    for what, x, y, z in zip(names, got, want, dense, strict=True):
        ok = np.isfinite(y)
        assert (np.isfinite(x) == ok).all(), what
        error, yardstick = (np.abs(a[ok] - y[ok]).max(initial=0.0) for a in (x, z))
        assert error <= 3 * yardstick + 2**-11 * np.abs(y[ok]).max(initial=0.0), f"{what}: {error:.2g}, {yardstick:.2g}"
        assert error > 0, f"{what} has no rounding: these were not tensor cores"


def test_few_queries_are_computed_in_float32() -> None:
    rng = seeds.generator(0)
    q, k, v = (rng.standard_normal((1, 2, n, 32)).astype(np.float32) for n in (3, 70, 70))
    with driver.use(emulator.EmulatedDevice()):
        same = [na.attention(q, k, v, backend="cuda", precision=how) for how in ("ieee", "tf32")]
    np.testing.assert_array_equal(*same)


def test_other_dtypes_are_refused() -> None:
    q = np.zeros((1, 1, 20, 16), np.float16)
    with (
        driver.use(emulator.EmulatedDevice()),
        pytest.raises(ValueError, match="precision is 'tf32' and q has dtype float16; tf32 is a way"),
    ):
        na.attention(q, q, q, backend="cuda", precision="tf32")
