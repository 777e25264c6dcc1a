"""The public calls with arrays on a GPU, in the emulated device, where an address is no address of the host: who reads
a device array on the host crashes here, as on a GPU. Calls like one before are in test_cuda_calls_alike.py."""

import gc
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import seeds
from device_arrays import HKV, HQ, SK, SQ, B, D, all_close, at, bent, close, host, on, qkv, random
from emulator import DlpackArray, InterfaceArray
from libraries import BFLOAT16, library, needs_ml_dtypes

import numba_attn as na
from numba_attn.cuda.host import arrays

pytest.importorskip("numba_cuda")

from numba_attn.cuda.host import on_device

# ---------------------------------------------------------------- kinds


@pytest.mark.parametrize("kind", ["torch", "a tensor", "cupy", "jax", "numba", ""])
def test_results_are_of_the_callers_kind(device, monkeypatch, kind):
    on_device._PLAIN.clear()
    plain, kind = kind == "a tensor", kind.replace("a tensor", "torch")
    make = library(monkeypatch, kind, plain=plain) if kind else InterfaceArray
    if plain:
        monkeypatch.setattr(make, "__dlpack__", None)
    stream = 7 if kind in ("torch", "cupy") else 0
    q, k, v = qkv()
    dout = random(*q.shape, seed=9)
    (out, lse), pullback = na.attention_vjp(*on(device, (q, k, v), make), causal=True, align=2, return_lse=True)
    found = pullback(make(device, dout))
    assert not device.downloaded and not [call for call in device.calls if call[0] == "synchronize"]
    assert {x.stream for x in device.launches} == {stream} and found.dk.memory.stream == stream
    assert {type(x) for x in (out, lse, *found[:3])} == {make if kind else arrays.DeviceArray}
    (want, want_lse), expected = na.attention_vjp(q, k, v, causal=True, align=2, return_lse=True)
    close(out, want)
    close(lse, want_lse)
    all_close(found, expected(dout))


def test_tensors_on_another_stream(device, monkeypatch):
    """It waits for torch's, and what is there stays there while kernels read it."""
    on_device._PLAIN.clear()
    make = library(monkeypatch, "torch", plain=True)
    want = host(na.attention(*on(device, qkv())))
    there = on(device, qkv(), make)
    for _ in range(2):
        device.calls.clear()
        out = na.attention(*there, stream=9)
        np.testing.assert_array_equal(out.numpy(), want)
        assert device.calls.count(("wait", 9, 7)) == 3 and ("hold", 9) in device.calls
    held = []
    monkeypatch.setattr(device, "hold", lambda things, stream: held.extend(things))
    na.attention(*there, stream=9)
    assert held == [x.detached for x in there]
    held.clear()
    na.attention(*there)
    assert not held


def test_mixed_libraries(device, monkeypatch):
    """out is of q's library, a gradient of its argument's."""
    torch, cupy = library(monkeypatch, "torch"), library(monkeypatch, "cupy")
    q, k, v = qkv()
    out, pullback = na.attention_vjp(torch(device, q), cupy(device, k), InterfaceArray(device, v))
    found = pullback(DlpackArray(device, np.ones_like(q)))
    assert [type(x) for x in (out, *found[:3])] == [torch, torch, cupy, arrays.DeviceArray]


# ---------------------------------------------------------------- layouts, strides, dtypes


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "hsd", "shd", "sd"])
@pytest.mark.parametrize("kind", [DlpackArray, InterfaceArray])
def test_layouts(device, layout, kind):
    q, k, v = qkv(layout)
    dout = random(*q.shape, seed=9)
    arguments = {"layout": layout, "window": (5, 3), "align": "bottom_right"}
    out, lse = na.attention(*on(device, (q, k, v), kind), **arguments, return_lse=True)
    want, want_lse = na.attention(q, k, v, **arguments, return_lse=True)
    close(out, want)
    close(lse, want_lse)
    if kind is DlpackArray:
        found = na.attention_backward(*on(device, (dout, q, k, v, want, want_lse), kind), **arguments)
        all_close(found, na.attention_backward(dout, q, k, v, want, want_lse, **arguments))


VIEWS = {
    "transposed": lambda x: np.ascontiguousarray(x.transpose(3, 2, 0, 1)).transpose(2, 3, 1, 0),
    "backwards": lambda x: x[::-1, :, ::-1, ::-1],
    "a row repeated": lambda x: np.broadcast_to(x[:1, :, :1], x.shape),
    "one number": lambda x: np.broadcast_to(x[:1, :1, :1, :1], x.shape),
    "gaps": lambda x: np.repeat(np.repeat(x, 2, 2), 3, 3)[:, :, ::2, 1::3],
    "odd address": lambda x: np.concatenate([np.zeros(3, x.dtype), x.ravel()])[3:].reshape(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", [DlpackArray, InterfaceArray])
def test_strides(device, view, kind):
    q, k, v = map(VIEWS[view], qkv())
    (out, lse), pullback = na.attention_vjp(*on(device, (q, k, v), kind), return_lse=True)
    (want, want_lse), expected = na.attention_vjp(q, k, v, return_lse=True)
    close(out, want)
    close(lse, want_lse)
    if kind is DlpackArray:
        dout = VIEWS[view](random(*q.shape, seed=9))
        dlse = VIEWS[view](random(*q.shape, seed=8))[..., 0]
        all_close(pullback(*on(device, (dout, dlse))), expected(dout, dlse))


@pytest.mark.parametrize("dtype", ["float64", "float16", pytest.param("bfloat16", marks=needs_ml_dtypes)])
def test_dtypes(device, dtype):
    q, k, v = qkv(dtype=np.dtype(dtype) if dtype != "bfloat16" else BFLOAT16)
    (out, lse), pullback = na.attention_vjp(*on(device, (q, k, v)), return_lse=True)
    (want, want_lse), expected = na.attention_vjp(q, k, v, return_lse=True)
    close(out, want, dtype)
    close(lse, want_lse, dtype)
    if dtype == "bfloat16":  # each takes seconds to compile
        dout, dlse = random(*q.shape, seed=9).astype(q.dtype), random(*q.shape[:3], seed=8).astype(q.dtype)
        all_close(pullback(*on(device, (dout, dlse))), expected(dout, dlse), dtype)


@needs_ml_dtypes
def test_bfloat16_without_ml_dtypes(device, monkeypatch):
    """A process that has only torch: the numbers have a dtype that NumPy knows nothing of."""
    q, k, v = on(device, qkv(dtype=BFLOAT16))
    want = host(na.attention(q, k, v)).view(np.uint16)
    monkeypatch.delitem(arrays._DTYPES, (4, 16, 1), raising=False)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    out = na.attention(q, k, v)
    assert out.dtype == arrays.bfloat16() != BFLOAT16
    assert np.array_equal(device.bytes_at(out.address, out.nbytes), want.view(np.uint8).ravel())
    monkeypatch.delitem(arrays._DTYPES, (4, 16, 1))


# ---------------------------------------------------------------- every option


def options(b=B):
    """Everything at once, each array of a type or with strides that plan would convert on the host."""
    seen = seeds.generator(5).random((1, 1, SQ, SK)) > 0.2
    return {
        "window": (None, 9),
        "align": 2,
        "mask": np.broadcast_to(seen, (b, HQ, SQ, SK)),
        "bias": random(1, HQ, 1, SK, seed=20, dtype=np.float16),
        "softcap": 5.0,
        "alibi_slopes": np.abs(random(HQ, b, seed=21, dtype=np.float64)).T,
        "sinks": random(2 * HQ, seed=22, dtype=np.float16)[::-2],
        "score_mod": bent,
        "aux": (
            random(SQ, HQ, seed=23, dtype=np.float16).T,
            np.arange(SK, dtype=np.int32)[::-1],
            np.array([True, False]),
        ),
        "dropout_p": 0.25,
        "seed": 7,
    }


def frozen(device, x):
    """A kernel that writes to it raises."""
    return DlpackArray(device, x, read_only=True)


def test_every_option(device):
    q, k, v = qkv()
    dout, dlse = random(*q.shape, seed=9), random(*q.shape[:3], seed=8, dtype=np.float16)
    (out, lse), pullback = na.attention_vjp(
        *on(device, (q, k, v), frozen), **on(device, options(), frozen), aux_grad=(0,), return_lse=True
    )
    assert not device.downloaded
    (want, want_lse), expected = na.attention_vjp(q, k, v, **options(), aux_grad=(0,), return_lse=True)
    close(out, want)
    close(lse, want_lse)
    device.downloaded = 0
    found = pullback(*on(device, (dout, dlse), frozen))
    assert device.downloaded <= 8  # whether score_mod reads what it must not
    wanted = expected(dout, dlse)
    for name in ("dbias", "dsinks", "daux"):
        x, y = getattr(found, name), getattr(wanted, name)
        x, y = (x[0], y[0]) if name == "daux" else (x, y)
        close(x, y, np.float16)
    all_close(found._replace(dbias=None, dsinks=None, daux=None), wanted._replace(dbias=None, dsinks=None, daux=None))
    assert found.daux[1:] == (None, None)


NAMES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": BFLOAT16 or np.float16,
}
SHAPES = {"bias": (SQ, SK), "alibi_slopes": (B, HQ), "sinks": (HQ,), "aux": (3, 4)}
LAYOUTS = {
    "plain": lambda x: x,
    "backwards": lambda x: x[::-1],
    "every other": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "one number": lambda x: np.broadcast_to(x.ravel()[0], x.shape),
}


@pytest.mark.parametrize("view", LAYOUTS)
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("q_dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", [DlpackArray, InterfaceArray])
def test_nothing_is_read_on_the_host(device, monkeypatch, name, dtype, view, q_dtype, kind):
    """What the kernels are launched with are arrays on the device, in the type that they take."""
    launch = pytest.importorskip("numba_attn.cuda.host.launch")
    given = LAYOUTS[view](random(*SHAPES[name]).astype(NAMES[dtype]))
    more = {"score_mod": lambda s, b, h, i, j, t: s + t[0, 0]} if name == "aux" else {}
    more |= {"align": 0} if name == "alibi_slopes" else {}
    x = kind(device, given)
    seen = []
    monkeypatch.setattr(launch, "attention", lambda problem, *rest: seen.append(problem))
    q, k, v = on(device, qkv(dtype=NAMES[q_dtype]), kind)
    na.attention(q, k, v, **more, **{name: (x,) if name == "aux" else x})
    (problem,) = seen
    array = {"bias": problem.bias, "alibi_slopes": problem.slopes, "sinks": problem.sinks, "aux": problem.aux}[name]
    array = array[0] if name == "aux" else array
    if name in ("alibi_slopes", "sinks"):
        assert array.dtype == problem.acc and array.flags.c_contiguous
    if name == "aux":
        assert array.dtype == (np.float32 if dtype in ("float16", "bfloat16") else given.dtype)
    low, high = np.lib.array_utils.byte_bounds(array)
    inside = DlpackArray.__new__(DlpackArray)
    inside.memory = SimpleNamespace(address=low, nbytes=high - low, device=device)
    inside.address, inside.dtype = array.ctypes.data, array.dtype
    inside.shape, inside.strides = array.shape, array.strides
    want = given.astype(array.dtype)
    assert np.array_equal(inside.numpy(), np.broadcast_to(want, array.shape) if name == "bias" else want)


def test_masks(device):
    """A Mask's settings are NumPy's, and are sent along; an array of pairs is on the device."""
    q, k, v = qkv()
    mask = na.lengths([19, 7]) & na.segments(np.arange(SQ) // 4, np.arange(SK) % 3) & na.intervals([1] * SQ, [SK] * SQ)
    close(na.attention(*on(device, (q, k, v)), mask=mask), na.attention(q, k, v, mask=mask))
    seen = seeds.generator(5).random((B, 1, SQ, 1)) > 0.3
    for x in (seen, seen[::-1], np.broadcast_to(seen, (B, HQ, SQ, SK))):
        close(na.attention(*on(device, (q, k, v)), mask=DlpackArray(device, x)), na.attention(q, k, v, mask=x))


def test_few_queries(device):
    """They have kernels of their own."""
    q, k, v = qkv()
    for x in (q[:, :, :1], q[:, :, 4:6]):
        (out, lse), (want, want_lse) = (
            na.attention(*arguments, causal=True, align="bottom_right", return_lse=True)
            for arguments in (on(device, (x, k, v)), (x, k, v))
        )
        close(out, want)
        close(lse, want_lse)


# ---------------------------------------------------------------- out=


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "view", ["as it comes", *[name for name in VIEWS if name not in ("a row repeated", "one number")]]
)
@pytest.mark.parametrize("kind", [DlpackArray, InterfaceArray])
def test_out(device, layout, view, kind):
    q, k, v = qkv(layout)
    room = np.zeros(q.shape, np.float32)
    out = kind(device, VIEWS[view](room) if view in VIEWS else room)
    assert na.attention(*on(device, (q, k, v), kind), layout=layout, out=out) is out
    close(out, na.attention(q, k, v, layout=layout))


def test_out_beside_an_input(device):
    """Two columns of one buffer."""
    q, k, v = qkv()
    both = np.zeros((B, HQ, SQ, 2 * D), np.float32)
    both[..., ::2] = q
    base = DlpackArray(device, both)
    left, right = at(device, base, both[..., ::2]), at(device, base, both[..., 1::2])
    right.address += 4
    na.attention(left, *on(device, (k, v)), out=right)
    close(right, na.attention(q, k, v))
    assert np.array_equal(left.numpy(), q)


# ---------------------------------------------------------------- nothing at all


@pytest.mark.parametrize("kind", [DlpackArray, InterfaceArray])
@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "Dv"])
def test_empty(device, kind, empty):
    b, sq, sk, dv = (0 if empty == name else n for name, n in (("batch", B), ("queries", SQ), ("keys", SK), ("Dv", D)))
    q, k, v = random(b, HQ, sq, D), random(b, HKV, sk, D), random(b, HKV, sk, dv)
    (out, lse), pullback = na.attention_vjp(*on(device, (q, k, v), kind), return_lse=True)
    (want, want_lse), expected = na.attention_vjp(q, k, v, return_lse=True)
    close(out, want)
    close(lse, want_lse)
    if empty != "Dv":  # kernels of its own, long to compile
        all_close(pullback(*on(device, (want, want_lse), kind)), expected(want, want_lse))


# ---------------------------------------------------------------- pullbacks


def test_pullback_keeps_what_it_needs(device):
    """It may be called again; out and lse may be written over, and the arguments be forgotten."""
    q, k, v = qkv()
    dout, dlse = random(*q.shape, seed=9), random(*q.shape[:3], seed=8)
    given = on(device, (q, k, v))
    room = DlpackArray(device, np.zeros_like(q))
    (out, lse), pullback = na.attention_vjp(*given, out=room, return_lse=True)
    assert out is room
    for x in (out.memory, lse.memory):
        device.fill(x, 0x7F, 0)
    del given, out, lse, room
    gc.collect()
    wanted = na.attention_vjp(q, k, v)[1](dout, dlse)
    all_close(pullback(*on(device, (dout, dlse))), wanted)
    out, pullback = na.attention_vjp(*on(device, (q, k, v)))
    device.fill(out.memory, 0x7F, 0)
    for _ in range(2):
        all_close(pullback(*on(device, (dout, dlse))), wanted)


def test_memory_is_given_back(device):
    def live():
        gc.collect()
        return sum(x is not None for x in device.buffers)

    def run():
        out, pullback = na.attention_vjp(*on(device, qkv()), sinks=DlpackArray(device, random(HQ, dtype=np.float16)))
        return out, pullback, pullback(DlpackArray(device, random(*out.shape)))

    run()
    before = live()
    results = run()
    assert live() > before
    del results
    assert live() == before


# ---------------------------------------------------------------- streams


def test_streams(device):
    """Exporters hear of the stream, producers are waited for, and the pullback may come on another."""
    q, k, v = on(device, qkv())
    k = InterfaceArray(device, qkv()[1])
    k.producer = 3
    out, pullback = na.attention_vjp(q, k, v, stream=5)
    assert q.streams == v.streams == [5] and ("wait", 5, 3) in device.calls
    assert {x.stream for x in device.launches} == {5} and out.memory.stream == 5
    device.calls.clear()
    device.launches.clear()
    dout = DlpackArray(device, random(*out.shape))
    found = pullback(dout, stream=SimpleNamespace(__cuda_stream__=lambda: (0, 6)))
    assert dout.streams == [6] and q.streams == [5, 6] and {x.stream for x in device.launches} == {6}
    assert device.calls.count(("wait", 6, 5)) == 2  # for our out and lse
    assert found.dq.memory.stream == 6 and ("hold", 6) in device.calls
    na.attention_backward(dout, q, k, v, out, DlpackArray(device, np.zeros(out.shape[:3], np.float32)), stream=9)
    assert {x.stream for x in device.launches} == {6, 9}
    with pytest.raises(TypeError, match=r"^stream is a builtins.object|^stream is a object; it takes None, a stream"):
        na.attention(q, k, v, stream=object())


def test_numpy_arrays_on_a_stream(device):
    """They are copied there and back, as without a stream."""
    q, k, v = qkv()
    out, pullback = na.attention_vjp(q, k, v, backend="cuda", stream=4)
    grads = pullback(out, stream=8)
    assert type(out) is type(grads.dq) is np.ndarray
    assert {x.stream for x in device.launches} == {4, 8} and ("synchronize", 4) in device.calls
    np.testing.assert_allclose(out, na.attention(q, k, v), atol=1e-5)
    for call in (
        lambda: na.attention(q, k, v, stream=4),
        lambda: na.attention(q, k, v, stream=0, backend="cpu"),
        lambda: na.attention_vjp(q, k, v, stream=4),
        lambda: na.attention_vjp(q, k, v)[1](out, stream=4),
        lambda: na.attention_backward(out, q, k, v, out, out[..., 0], stream=4),
    ):
        with pytest.raises(ValueError, match=r"^stream is given, but the arrays are in host memory"):
            call()


# ---------------------------------------------------------------- copies on the device


def test_converted(device):
    convert = pytest.importorskip("numba_attn.cuda.host.convert")
    x = random(3, 4, 5, 6, dtype=np.float64)
    dtypes = [np.dtype(name) for name in ("f8", "f4", "f2")] + ([BFLOAT16] if BFLOAT16 else [])
    for source in dtypes:
        base = x.astype(source)
        for y in (
            base,
            base.transpose(2, 0, 3, 1)[::-1, :, ::2],
            np.broadcast_to(base[:, :1], x.shape),
            base[:0],
            base[0, 0, 0, 1],
        ):
            y = np.asarray(y)
            given = arrays.describe(DlpackArray(device, y), "x", 0)
            for target in dtypes if y is base else dtypes[1:2]:
                found = convert.converted(arrays.shadow(given), target, device, 0)
                assert np.array_equal(found.copy_to_host(), y.astype(target)), (source, target, y.shape)
