"""What a call with arrays on a GPU refuses: arrays here and there, what does not fit, and the limits of the kernels."""

# ruff: noqa: E501  # a row of a table is one line

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from device_arrays import HKV, HQ, SK, SQ, B, D, at, bent, on, qkv, random
from emulator import DlpackArray, EmulatedDevice, InterfaceArray
from libraries import library

import numba_attn as na
from numba_attn.cuda.host import driver

pytest.importorskip("numba_cuda")

from numba_attn.cuda.host.call import check

# ---------------------------------------------------------------- arguments


def test_mixed_places(device):
    q, k, v = qkv()
    dq, dk, dv = on(device, (q, k, v))
    bias, lse = random(SQ, SK), random(B, HQ, SQ)
    take = [
        (r"^q, k and v are on a GPU and bias is in host memory; .*move it", lambda: na.attention(dq, dk, dv, bias=bias)),
        (r"^q and v are on a GPU and k is in host memory", lambda: na.attention(dq, k, dv)),
        (r"^v is on a GPU and q and k are in host memory", lambda: na.attention(q, k, dv)),
        (r"and mask is in host memory", lambda: na.attention(dq, dk, dv, mask=bias > 0)),
        (r"and sinks is in host memory", lambda: na.attention(dq, dk, dv, sinks=[0.0] * HQ)),
        (r"and aux\[1\] is in host", lambda: na.attention(dq, dk, dv, score_mod=bent, aux=(dq, bias, dk))),
        (r"and dout is in host memory", lambda: na.attention_backward(q, dq, dk, dv, dq, DlpackArray(device, lse))),
        (r"and lse and dlse are in host", lambda: na.attention_backward(dq, dq, dk, dv, dq, lse, dlse=lse)),
        (r"and dout is in host memory", lambda: na.attention_vjp(dq, dk, dv)[1](q)),
        (r"^mask is Mask\(causal\(\) & <bool array \(19, 21\)>\), which holds a bool array in host memory.*alone, on the",
         lambda: na.attention(dq, dk, dv, mask=na.causal() & (bias > 0))),
        # Where the call is one of NumPy's, what is on the device is what is wrong.
        (r"^bias is a .*DlpackArray", lambda: na.attention(q, k, v, bias=DlpackArray(device, bias))),
        (r"^dout is a .*DlpackArray", lambda: na.attention_vjp(q, k, v)[1](dq)),
        (r"^out is a .*DlpackArray", lambda: na.attention(q, k, v, out=dq)),
    ]  # fmt: skip
    for message, call in take:
        with pytest.raises(TypeError, match=message):
            call()


def test_settings_stay_on_the_host(device):
    ints = InterfaceArray(device, np.arange(B))
    for make in (
        lambda: na.lengths(ints),
        lambda: na.lengths([1, 1], ints),
        lambda: na.varlen(ints, ints),
        lambda: na.segments(ints, ints),
        lambda: na.prefix(ints),
        lambda: na.intervals(ints, ints),
        lambda: na.causal(align=ints),
        lambda: na.attention(*on(device, qkv()), causal=True, align=ints),
        lambda: na.mask_mod(lambda b, h, i, j, t: t[b] > 0, aux=(ints,)),
    ):
        with pytest.raises(
            TypeError, match=r"is a .*InterfaceArray, an array on a GPU; it takes a NumPy array.*host mem"
        ):
            make()


def test_on_the_cpu(device):
    q, k, v = on(device, qkv(), InterfaceArray)
    message = r"^backend is 'cpu', and q is a .*InterfaceArray, an array on a GPU; .*q\.get\(\).*'auto' computes where"
    for call in (na.attention, na.attention_vjp):
        with pytest.raises(TypeError, match=message):
            call(q, k, v, backend="cpu")
    with pytest.raises(TypeError, match=message):
        na.attention_backward(q, q, k, v, q, q, backend="cpu")
    with pytest.raises(TypeError, match=r"^q is a .*InterfaceArray, an array on a GPU; it takes a NumPy array"):
        na.attention_jvp(q, k, v, q, k, v)
    with pytest.raises(ValueError, match=r"^backend is 'gpu'"):
        na.attention(q, k, v, backend="gpu")
    with pytest.raises(ValueError, match=r"^backend is 'gpu'"):
        na.attention_vjp(*qkv(), backend="gpu")


def test_two_devices(device):
    class Elsewhere(DlpackArray):
        def __dlpack_device__(self):
            return 2, 1

    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"^q is on CUDA device 0 and v on 1; all arrays of a call take one device"):
        na.attention(*on(device, (q, k)), Elsewhere(device, v))


OTHER = [
    ("k's dtype", {"k": random(B, HKV, SK, D, dtype=np.float16)}, TypeError, r"^q, k and v have dtypes float32, float16"),
    ("integers", {"q": np.ones((B, HQ, SQ, D), np.int32)}, TypeError, r"^q has dtype int32; it takes float64"),
    ("complex", {"v": np.ones((B, HKV, SK, D), np.complex64)}, TypeError, r"^q, k and v|^v has dtype complex64"),
    ("shape", {"v": random(B, HKV, SK - 1, D)}, ValueError, r"k has 21 keys and v 20"),
    ("bias shape", {"bias": random(SQ, SK + 1)}, ValueError, r"^bias has shape \(19, 22\); it takes"),
    ("bias bool", {"bias": np.ones((SQ, SK), bool)}, TypeError, r"^bias has dtype bool"),
    ("mask int", {"mask": np.ones((SQ, SK), np.uint8)}, TypeError, r"^mask has dtype uint8; it takes bool"),
    ("mask float", {"mask": random(SQ, SK)}, TypeError, r"^mask has dtype float32.*bias="),
    ("sinks int", {"sinks": np.ones(HQ, np.int64)}, TypeError, r"^sinks has dtype int64"),
    ("sinks shape", {"sinks": random(HQ + 1)[::-1]}, ValueError, r"^sinks has shape \(5,\)"),
    ("slopes shape", {"alibi_slopes": random(1, HQ, dtype=np.float16), "align": 0}, ValueError, r"^alibi_slopes has shape"),
    ("aux alone", {"aux": (random(3, dtype=np.float16),)}, ValueError, r"^aux is given, but score_mod is not"),
    ("aux array", {"aux": random(3), "score_mod": bent}, TypeError, r"^aux is a DlpackArray; it takes a tuple"),
    ("aux complex", {"aux": (np.ones(3, np.complex64),), "score_mod": lambda s, b, h, i, j, t: s}, TypeError, r"^aux\[0\] has"),
    ("aux None", {"aux": (None,), "score_mod": lambda s, b, h, i, j, t: s}, TypeError, r"^aux\[0\] is None"),
    ("q None", {"q": None}, TypeError, r"^q is None; it takes"),
    ("text", {"bias": "alibi"}, TypeError, r"^bias is a str"),
    ("mask number", {"mask": True}, TypeError, r"^mask is True; it takes a bool array"),
    ("mask function", {"mask": bent}, TypeError, r"^mask is a function; wrap it"),
    ("sinks number", {"sinks": np.float32(1)}, TypeError, r"^sinks is a numpy\.float32"),
    ("causal", {"causal": 1}, TypeError, r"^causal is 1"),
    ("return_lse", {"return_lse": 1}, TypeError, r"^return_lse is 1"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", [row[1:] for row in OTHER], ids=[row[0] for row in OTHER])
def test_bad_input(device, changes, error, message):
    given = dict(zip("qkv", qkv(), strict=True)) | changes
    with pytest.raises(error, match=message):
        na.attention(**on(device, given))


def test_bad_backward(device):
    q, k, v, lse = *qkv(), random(B, HQ, SQ)
    good = {"dout": q, "q": q, "k": k, "v": v, "out": q, "lse": lse}
    for changes, error, message in (
        ({"out": q.astype(np.float64)}, TypeError, r"^out has dtype float64"),
        ({"lse": lse[..., 1:]}, ValueError, r"^lse has shape"),
        ({"dout": q[..., 1:]}, ValueError, r"^dout has shape"),
        ({"dout": None}, TypeError, r"^dout is None"),
        ({"dlse": lse.astype(np.int32)}, TypeError, r"^dlse has dtype int32"),
        ({"aux_grad": (0,)}, ValueError, r"^aux_grad names position 0; aux has 0 arrays"),
        ({"backend": "gpu"}, ValueError, r"^backend is 'gpu'"),
    ):
        with pytest.raises(error, match=message):
            na.attention_backward(**on(device, good | changes))
    with pytest.raises(ValueError, match=r"^aux_grad names position 0"):
        na.attention_vjp(*on(device, (q, k, v)), aux_grad=(0,))


def test_odd_addresses(device):
    """An element across two words cannot be loaded."""
    q, k, v = qkv()
    raw = np.zeros(q.nbytes + 2, np.uint8)
    odd = at(device, InterfaceArray(device, raw), q)
    odd.dtype = q.dtype
    odd.address += 2
    with pytest.raises(
        ValueError, match=r"^q is at address 0x.*2 with strides .*multiples of 4, the size of an element"
    ):
        na.attention(odd, *on(device, (k, v)))
    records = np.zeros(q.shape, np.dtype([("x", "f4"), ("y", "u1")]))["x"]
    with pytest.raises(ValueError, match=r"^q is at address 0x.*strides .*multiples of 4"):
        na.attention(InterfaceArray(device, records), *on(device, (k, v)))


def test_no_device(device, monkeypatch):
    given = on(device, qkv(), InterfaceArray)
    monkeypatch.setattr(driver, "_replacement", None)
    monkeypatch.setattr(driver, "_driver", None)
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delattr("numba_attn.cuda.host.launch", raising=False)
    monkeypatch.setitem(sys.modules, "numba_attn.cuda.host.launch", None)
    q, k, v = given
    lse = InterfaceArray(device, random(B, HQ, SQ))
    for call in (na.attention, na.attention_vjp, lambda *_: na.attention_backward(q, q, k, v, q, lse)):
        with pytest.raises(RuntimeError, match=r"^numba-cuda is not installed: pip install numba-attn\[cuda13\]"):
            call(*given)


def test_numpy_needs_nothing_of_this():
    """Neither the import nor a call of NumPy arrays imports the CUDA side or asks for numba-cuda."""
    code = """if True:
        import sys
        sys.modules["numba_cuda"] = sys.modules["cuda"] = None
        import numpy as np, numba_attn as na
        q = np.ones((1, 1, 2, 2))
        na.attention(q, q, q, causal=True)
        print([name for name in sys.modules if name.startswith("numba_attn.cuda")])
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "[]", found.stderr


def test_bad_out(device, monkeypatch):
    q, k, v = qkv()
    given = on(device, (q, k, v))
    room = np.zeros((2 * B, HQ, SQ, D), np.float32)
    base = DlpackArray(device, room)

    def refused(out, error, message):
        with pytest.raises(error, match=message):
            na.attention(*given, out=out)
        assert not base.numpy().any()

    refused(
        DlpackArray(device, room[:B].astype(np.float64)), TypeError, r"^out has dtype float64; it takes q's, float32"
    )
    refused(at(device, base, room), ValueError, r"^out has shape \(4, 4, 19, 8\); it takes \(2, 4, 19, 8\)")
    refused(DlpackArray(device, room[:B], read_only=True), ValueError, r"^out is read-only")
    refused(library(monkeypatch, "jax")(device, room[:B]), ValueError, r"^out is read-only")
    refused(at(device, base, np.broadcast_to(room[:1], q.shape)), ValueError, r"^out has strides \(0, .*share memory")
    refused(room[:B], TypeError, r"^q, k and v are on a GPU and out is in host memory")
    refused(given[0], ValueError, r"^out shares memory with q")
    bias = DlpackArray(device, random(SQ, SK))
    with pytest.raises(ValueError, match=r"^out shares memory with bias"):
        shared = at(device, bias, np.zeros((B, HQ, SQ, D), np.float32))
        na.attention(*given, bias=bias, out=shared)


# ---------------------------------------------------------------- limits


def test_head_sizes_have_a_limit(device):
    for dims in ((257, 8), (8, 257)):
        q, k, v = random(1, 1, 3, dims[0]), random(1, 1, 5, dims[0]), random(1, 1, 5, dims[1])
        with pytest.raises(
            ValueError, match=rf"q has head size {dims[0]} and v {dims[1]}; .* up to 256: backend='cpu'"
        ):
            na.attention(*(on(device, x) for x in (q, k, v)))
        with pytest.raises(ValueError, match=r"up to 256: backend='cpu'"):
            na.attention(q, k, v, backend="cuda")


def test_old_devices(monkeypatch):
    old = EmulatedDevice()
    old.cc = (7, 5)
    with (
        driver.use(old),
        pytest.raises(ValueError, match=r"compute capability 7.5; .* 8.0 \(Ampere\) or later: backend='cpu'"),
    ):
        na.attention(*qkv(), backend="cuda")


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((1, 1, 2**30 + 1, 5), r"q has 1073741825 positions and k 5; .* 2\*\*30: backend='cpu'"),
        ((1, 1, 5, 2**30 + 1), r"q has 5 positions and k 1073741825"),
        ((4, 2**10, 2**20, 5), r"q has 4 x 1024 x 1048576 queries; .* 2\*\*32 - 1: split the batch"),
    ],
)
def test_numbers_of_32_bits(sizes, message):
    fields = dict(zip(("batch", "q_heads", "q_len", "kv_len"), sizes, strict=True))
    problem = SimpleNamespace(qk_dim=8, v_dim=8, **fields)
    with pytest.raises(ValueError, match=message):
        check(problem, EmulatedDevice())
    check(SimpleNamespace(qk_dim=8, v_dim=8, batch=1, q_heads=1, q_len=2**30, kv_len=2**30), EmulatedDevice())


def test_too_many_tiles(device, monkeypatch):
    """Said before anything is written."""
    monkeypatch.setattr(driver, "MAX_GRID", 3)
    q, k, v = qkv("shd")[0][:18], *(x[:18] for x in qkv("shd")[1:])
    out = on(device, np.full((18, HQ, D), 7, np.float32))
    mask = na.varlen([0, 9, 18], [0, 9, 18])
    arrays_there = [on(device, x) for x in (q, k, v)]
    with pytest.raises(
        ValueError, match=r"mask has 2 sequences, the longest of 9 queries, and k 2 heads: 4 tiles are more"
    ):
        na.attention(*arrays_there, mask=mask, layout="shd", out=out)
    assert (out.numpy() == 7).all()


def test_a_captured_stream(device, monkeypatch):
    """Asked before there is a result, or a copy."""

    def refuse(stream):
        raise RuntimeError("captured")

    there = [on(device, x) for x in qkv()]
    made = len(device.buffers)
    monkeypatch.setattr(device, "refuse_capture", refuse)
    with pytest.raises(RuntimeError, match=r"^captured$"):
        na.attention(*there)
    assert len(device.buffers) == made
    with pytest.raises(RuntimeError, match=r"^captured$"):
        na.attention(*qkv(), backend="cuda")
