"""The public calls with arrays on a GPU, in the emulated device, where an address is no address of the host: who reads a
device array on the host crashes here, as on a GPU."""

# ruff: noqa: E501  # a row of a table is one line

import copy
import gc
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import seeds
from emulator import DlpackArray, EmulatedDevice, InterfaceArray

import numba_attn as na
from numba_attn.cuda.host import arrays, driver, streams

pytest.importorskip("numba_cuda")

from numba_attn.cuda.host import on_device
from numba_attn.cuda.host.call import check

try:
    import ml_dtypes

    BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    BFLOAT16 = None

needs_bfloat16 = pytest.mark.skipif(BFLOAT16 is None, reason="no ml_dtypes")

B, HQ, HKV, SQ, SK, D = 2, 4, 2, 19, 21, 8
SIZES = {"q": (HQ, SQ), "k": (HKV, SK), "v": (HKV, SK)}


class Watched(EmulatedDevice):
    """Counts the bytes that go to the host."""

    downloaded = 0

    def download(self, source, out, stream):
        self.downloaded += out.nbytes
        super().download(source, out, stream)


@pytest.fixture(scope="module")
def shared():
    """One device for all tests: kernels with user functions are compiled once."""
    return Watched()


@pytest.fixture
def device(shared):
    shared.calls.clear()
    shared.launches.clear()
    shared.downloaded = 0
    with driver.use(shared):
        yield shared


def random(*shape, seed=0, dtype=np.float32):
    return seeds.generator([seed, *shape]).standard_normal(shape).astype(dtype)


def qkv(layout="bhsd", dtype=np.float32):
    made = []
    for n, (heads, length) in enumerate(SIZES.values()):
        sizes = {"b": B, "h": heads if layout != "sd" else 1, "s": length, "d": D}
        made.append(random(*(sizes[a] for a in layout), seed=n, dtype=dtype))
    return made


def on(device, x, kind=DlpackArray):
    """NumPy arrays, in whatever they are, on the device."""
    if isinstance(x, np.ndarray):
        return kind(device, x)
    if isinstance(x, (tuple, list)):
        return tuple(on(device, y, kind) for y in x)
    if isinstance(x, dict):
        return {name: on(device, y, kind) for name, y in x.items()}
    return x


def host(x):
    """A result as NumPy has it."""
    return x.copy_to_host() if isinstance(x, arrays.DeviceArray) else x.numpy()


def close(got, want, dtype=np.float32):
    got = host(got)
    assert got.shape == want.shape and got.dtype == want.dtype
    eps = {"float64": 1e-12, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[np.dtype(dtype).name]
    got, want = got.astype(np.float64), want.astype(np.float64)
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    seen = np.isfinite(want)
    assert np.array_equal(got[~seen], want[~seen])
    np.testing.assert_allclose(got[seen], want[seen], rtol=0, atol=eps * max(1.0, np.abs(want[seen]).max(initial=0)))


def all_close(got, want, dtype=np.float32):
    """Gradients."""
    for name in na.Gradients._fields:
        g, w = getattr(got, name), getattr(want, name)
        if isinstance(w, tuple):
            assert len(g) == len(w)
            pairs = zip(g, w, strict=True)
        else:
            pairs = [(g, w)]
        for x, y in pairs:
            assert (x is None) == (y is None), name
            if y is not None:
                close(x, y, dtype)


# ---------------------------------------------------------------- kinds


def library(monkeypatch, kind, current=7, plain=False):
    """A fake of a library, and the class of its arrays: a DLPack array, or of Numba an array with the interface.
    plain: torch's own class, which says what a capsule would."""
    base = InterfaceArray if kind == "numba" else DlpackArray
    module = {"cupy": "cupy._core.core", "jax": "jaxlib._jax", "numba": "numba.cuda.cudadrv.devicearray"}.get(
        kind, kind
    )
    name = {"jax": "jax.dlpack", "numba": "numba.cuda"}.get(kind, kind)

    def taken(x):
        assert isinstance(x, arrays.DeviceArray)
        result = array.__new__(array)
        result.__dict__ |= {"shape": x.shape, "strides": x.strides, "dtype": x.dtype, "address": x.address}
        result.__dict__ |= {"memory": x.memory, "read_only": False, "streams": [], "owner": x}
        return result

    array = type("Tensor", (base,), {"__module__": module})
    found = ModuleType(name)
    found.from_dlpack = taken
    found.from_cuda_array_interface = lambda told, owner, sync: taken(owner)
    found.cuda = SimpleNamespace(
        current_stream=lambda device: SimpleNamespace(cuda_stream=current),
        get_current_stream=lambda: SimpleNamespace(ptr=current),
    )
    if plain:
        found.Tensor, found.strided = array, object()
        for dtype in ("float64", "float32", "float16"):
            setattr(found, dtype, np.dtype(dtype))
        found.bfloat16 = BFLOAT16
        monkeypatch.setattr(arrays, "_TENSOR_DTYPES", {})
        array.is_cuda, array.device, array.layout = True, SimpleNamespace(index=0), found.strided
        array.requires_grad, array.is_conj, array.is_neg = False, lambda x: False, lambda x: False
        array.data_ptr = lambda x: x.address
        array.stride = lambda x: tuple(n // x.dtype.itemsize for n in x.strides)
        array.detach = lambda x: setattr(x, "detached", copy.copy(x)) or x.detached
    if kind == "numba":  # the rest of it compiles kernels, maybe in this very call
        monkeypatch.setattr(sys.modules[name], "from_cuda_array_interface", found.from_cuda_array_interface)
        return array
    monkeypatch.setitem(sys.modules, name, found)
    if name != kind and kind not in sys.modules:
        monkeypatch.setitem(sys.modules, kind, ModuleType(kind))
    return array


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


@pytest.mark.parametrize("dtype", ["float64", "float16", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_dtypes(device, dtype):
    q, k, v = qkv(dtype=np.dtype(dtype) if dtype != "bfloat16" else BFLOAT16)
    (out, lse), pullback = na.attention_vjp(*on(device, (q, k, v)), return_lse=True)
    (want, want_lse), expected = na.attention_vjp(q, k, v, return_lse=True)
    close(out, want, dtype)
    close(lse, want_lse, dtype)
    if dtype == "bfloat16":  # each takes seconds to compile
        dout, dlse = random(*q.shape, seed=9).astype(q.dtype), random(*q.shape[:3], seed=8).astype(q.dtype)
        all_close(pullback(*on(device, (dout, dlse))), expected(dout, dlse), dtype)


@needs_bfloat16
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


def bent(score, b, h, i, j, table, ids, on):
    return score + table[h, i] * 0.5 + ids[j] * 0.25 + on[b]


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


class Stopped(Exception):
    pass


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


def at(device, base, x):
    """x, a view of the array whose numbers `base` has, as a view of base."""
    view = type(base).__new__(type(base))
    view.__dict__ |= base.__dict__ | {"shape": x.shape, "strides": x.strides, "streams": []}
    return view


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


# ---------------------------------------------------------------- errors


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


def test_temporaries_where_memory_is_not_freed_in_order(device, monkeypatch):
    """They are kept until the stream has come to its end; from a pool they need not be."""
    on_device._PLAIN.clear()
    q, k, v = qkv()
    there = [on(device, x, InterfaceArray) for x in (q[:, :, :3], k, v)]
    held = []
    monkeypatch.setattr(device, "hold", lambda things, stream: held.extend(things))
    for _ in range(3):
        na.attention(*there)
    assert held and not any(isinstance(x, driver.Memory) for x in held)
    monkeypatch.setattr(device, "ordered", False)
    on_device._PLAIN.clear()
    for _ in range(3):
        held.clear()
        na.attention(*there)
        assert any(isinstance(x, driver.Memory) for x in held)


# ---------------------------------------------------------------- calls like one before


@pytest.mark.parametrize("kind", [DlpackArray, InterfaceArray])
@pytest.mark.parametrize("sq", [SQ, 3], ids=["forward", "decode"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_call_like_one_before(device, layout, sq, kind):
    """Goes straight to the kernels, with nothing copied to the device, and gives what the first gave."""
    on_device._PLAIN.clear()
    axis = layout.index("s")
    options = dict(causal=True, align="bottom_right", layout=layout, scale=0.3, return_lse=True)
    first = [random(B, *(n if layout == "bhsd" else n[::-1]), D, seed=9) for n in ((HQ, sq), (HKV, SK), (HKV, SK))]
    na.attention(*on(device, first, kind), **options)
    assert len(on_device._PLAIN) == 1
    device.launches.clear()
    q, k, v = (x[::-1].copy() + 1 for x in first)
    there = on(device, [q, k, v], kind)
    uploaded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "upload", lambda x, stream: uploaded.append(x))
        patch.setattr(device, "synchronize", None)
        out, lse = na.attention(*there, **options, stream=7)
    assert not uploaded and {x.stream for x in device.launches} == {7}
    assert len(device.launches) == (2 if sq == 3 else 1)
    want, want_lse = na.reference.attention(q, k, v, **options)
    assert out.shape == want.shape and lse.shape == want_lse.shape and want.shape[axis] == sq
    np.testing.assert_allclose(out.copy_to_host(), want, atol=1e-5)
    np.testing.assert_allclose(lse.copy_to_host(), want_lse, atol=1e-5)
    on_device._PLAIN.clear()
    again, again_lse = na.attention(*there, **options)
    np.testing.assert_array_equal(again.copy_to_host(), out.copy_to_host())
    np.testing.assert_array_equal(again_lse.copy_to_host(), lse.copy_to_host())


@pytest.mark.parametrize("kind", [DlpackArray, InterfaceArray])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradients_like_those_before(device, layout, with_lse, kind):
    """Straight to the kernels, both ways, and what the caller does to out in between changes nothing."""
    on_device._PLAIN.clear()
    shape = lambda h, s: (B, h, s, D) if layout == "bhsd" else (B, s, h, D)  # noqa: E731
    options = dict(causal=True, align="bottom_right", layout=layout, scale=0.3)
    first = [random(*shape(h, s), seed=9) for h, s in ((HQ, SQ), (HKV, SK), (HKV, SK), (HQ, SQ))]
    dlse = random(*shape(HQ, SQ)[:3], seed=4)
    for n, arrays_here in enumerate((first, [x[::-1].copy() + 0.1 for x in first])):
        q, k, v, dout = on(device, arrays_here, kind)
        rows = kind(device, dlse) if with_lse else None
        device.launches.clear()
        with pytest.MonkeyPatch.context() as patch:
            if n:
                patch.setattr(device, "upload", None)
                patch.setattr(device, "synchronize", None)
            out, pullback = na.attention_vjp(q, k, v, **options, return_lse=with_lse, stream=7)
            for x in out if with_lse else (out,):
                device.bytes_at(x.address, x.nbytes)[:] = 0
            grads = pullback(dout, rows, stream=8)
        assert len(on_device._PLAIN) == 2
        copies = 2 if with_lse else 1
        assert [x.stream for x in device.launches] == [7] * (1 + copies) + [8] * 3
        wanted = na.reference.attention_backward(
            arrays_here[3], *arrays_here[:3], dlse=dlse if with_lse else None, **options
        )
        for name in ("dq", "dk", "dv"):
            got, want = getattr(grads, name), getattr(wanted, name)
            assert got.shape == want.shape
            np.testing.assert_allclose(got.copy_to_host(), want, atol=2e-5, err_msg=name)
        assert grads[3:] == (None,) * 4


@pytest.mark.parametrize("with_lse", [False, True])
def test_a_pullback_may_outlive_its_stream(device, monkeypatch, with_lse):
    """Of which there was but a handle: what it keeps is not freed in the order of what may be gone."""
    on_device._PLAIN.clear()
    freed = []
    free = device.free
    monkeypatch.setattr(
        device, "free", lambda memory: freed.append((int(memory.stream), memory.settle)) or free(memory)
    )
    monkeypatch.setattr(device, "hold", lambda things, stream: None)
    there = on(device, qkv())
    dout = on(device, random(B, HQ, SQ, D))
    for stream, settle in ((5, True), (SimpleNamespace(ptr=6), False), (0, False)):
        for _ in range(2):
            _, pullback = na.attention_vjp(*there, return_lse=with_lse, stream=stream)
            pullback(dout, stream=9)
            gc.collect()
            freed.clear()
            del pullback, _
            gc.collect()
            results = 0 if stream != 0 and not settle else 2 if with_lse else 1  # with 0 as the rest, else settled
            assert freed.count((streams.resolve_stream(stream), settle)) == results + 2


def test_gradients_that_are_not_alike(device):
    """One more array, the same ones elsewhere, and a dlse that is converted first."""
    on_device._PLAIN.clear()
    q, k, v = on(device, qkv())
    dout, shifted = on(device, [random(B, HQ, SQ, D + 1)] * 2)
    dout.shape = shifted.shape = B, HQ, SQ, D
    shifted.address += 4
    rows = random(B, HQ, SQ)
    _, pullback = na.attention_vjp(q, k, v, causal=True, align=0)
    calls = [(dout,), (shifted,), (dout, on(device, rows))]
    for n, arguments in enumerate(calls):
        first, again = pullback(*arguments), pullback(*arguments)
        assert len(on_device._PLAIN) == n + 2
        for x, y in zip(first[:3], again[:3], strict=True):
            np.testing.assert_array_equal(x.copy_to_host(), y.copy_to_host())
    wide = on(device, rows.astype(np.float64))
    for _ in range(2):  # what it converts is not there for another
        grads = pullback(dout, wide)
        np.testing.assert_array_equal(grads.dq.copy_to_host(), first.dq.copy_to_host())
    assert len(on_device._PLAIN) == 1 + len(calls)
    with pytest.raises(TypeError, match="on a GPU and dout is in host memory"):
        pullback(random(B, HQ, SQ, D))
    with pytest.raises(ValueError, match=r"^dout has shape"):
        pullback(on(device, random(B, HQ, SQ, D + 1)))
    for options in ({"sinks": on(device, random(HQ))}, {"out": on(device, np.empty((B, HQ, SQ, D), np.float32))}):
        na.attention_vjp(q, k, v, **options)
    with pytest.raises(ValueError, match=r"^aux_grad"):
        na.attention_vjp(q, k, v, causal=True, align=0, aux_grad=(0,))
    assert len(on_device._PLAIN) == 1 + len(calls)


def test_calls_that_are_not_alike(device):
    """Whatever an answer depends on tells them apart: addresses that kernels cannot read as wide, types of numbers that
    print alike, and all that brings arrays of its own."""
    on_device._PLAIN.clear()
    there = on(device, qkv())
    k, v = there[1:]
    even, odd = on(device, [random(B, HQ, SQ, D + 1)] * 2)
    even.shape = odd.shape = B, HQ, SQ, D
    odd.address += 4
    calls = [
        (there, {}), (there, {"causal": True, "align": 0}), (there, {"causal": True, "align": 1}),
        (there, {"window": (2, 2), "align": 0}), (there, {"scale": 1.0}), (there, {"softcap": 2.0}),
        (there, {"return_lse": True}), (there, {"precision": "tf32"}),
        ((even, k, v), {}), ((odd, k, v), {}),
        ((on(device, qkv()[0].astype(np.float64)), *(on(device, x.astype(np.float64)) for x in qkv()[1:])), {}),
    ]  # fmt: skip
    for n, (arrays_there, options) in enumerate(calls):
        for _ in range(2):
            na.attention(*arrays_there, **options)
            assert len(on_device._PLAIN) == n + 1
    with pytest.raises(TypeError, match=r"^causal is 1"):
        na.attention(*there, causal=1)
    with pytest.raises(ValueError, match="precision is 'tf32' and q has dtype float64"):
        na.attention(*calls[-1][0], precision="tf32")
    with pytest.raises(ValueError, match=r"^scale is nan"):
        na.attention(*there, scale=float("nan"))
    for options in (
        {"mask": na.lengths([SK, 3])},
        {"bias": on(device, random(SQ, SK))},
        {"sinks": on(device, random(HQ))},
        {"score_mod": lambda s, b, h, i, j: 2.0 * s},
        {"dropout_p": 0.5, "seed": 1},
        {"out": on(device, np.empty((B, HQ, SQ, D), np.float32))},
    ):
        na.attention(*there, **options)
        assert len(on_device._PLAIN) == len(calls), f"{options} is not plain"


def test_what_is_kept_of_calls_is_bounded_and_given_back(device, monkeypatch):
    on_device._PLAIN.clear()
    gc.collect()
    there = on(device, qkv())
    dout = on(device, random(B, HQ, SQ, D))
    monkeypatch.setattr(on_device, "_MOST_PLAIN", 3)
    left = []
    for _ in range(2):  # the first loads kernels, which have memory of their own
        for n in range(8):
            na.attention(*there, scale=1.0 + n)
            na.attention_vjp(*there, scale=1.0 + n)[1](dout)
            assert len(on_device._PLAIN) == 3
        on_device._PLAIN.clear()
        gc.collect()
        left.append(sum(x is not None for x in device.buffers))
    assert left[0] == left[1]


def test_what_goes_is_what_was_not_used_for_longest(device, monkeypatch):
    on_device._PLAIN.clear()
    monkeypatch.setattr(on_device, "_MOST_PLAIN", 3)
    there = on(device, qkv())
    for scale in (1.0, 2.0, 3.0, 1.0, 4.0, 5.0):
        na.attention(*there, scale=scale)
    kept = [{x for x in key if type(x) is float} for key in on_device._PLAIN]
    assert [x & {1.0, 2.0, 3.0, 4.0, 5.0} for x in kept] == [{1.0}, {4.0}, {5.0}]


class Order:
    """What is known on the device of the order of streams: for each, the launches of which stream it comes after."""

    def __init__(self, device, patch):
        self.behind, self.freed, self.waits = {}, [], 0
        free = device.free

        def after(stream, mark):
            mine = self.behind.setdefault(stream, {})
            other, launches = mark.event
            mine[other] = max(mine.get(other, 0), launches)

        def freeing(memory):
            if not memory.settle:
                self.freed.append((memory.address, memory.stream, dict(self.behind.get(int(memory.stream), {}))))
            free(memory)

        def wait(stream, other):
            after(stream, device.mark(other))

        def waited(*_):
            self.waits += 1

        for name, do in (("after", after), ("free", freeing), ("wait", wait), ("synchronize", waited)):
            patch.setattr(device, name, do)
        patch.setattr(device, "passed", lambda mark: False)


@pytest.mark.parametrize("bare", [False, True], ids=["streams", "handles"])
@pytest.mark.parametrize("sq", [SQ, 3], ids=["forward", "decode"])
def test_streams_of_calls_like_one_before(device, monkeypatch, sq, bare):
    """Each comes after the copies of the first; what they read is freed after the last launch of every one of them; and
    the host never waits."""
    on_device._PLAIN.clear()
    gc.collect()
    q, k, v = qkv()
    there = on(device, [q[:, :, :sq], k, v])
    order = Order(device, monkeypatch)
    stream = lambda n: n if bare else SimpleNamespace(cuda_stream=n)  # noqa: E731
    na.attention(*there, stream=stream(5))
    (plain,) = on_device._PLAIN.values()
    numbers = {x.address for x in plain.prepared.keep}
    assert numbers and {x.stream for x in plain.prepared.keep} == {device.own}
    first = len(device.launches)
    last = {}
    for n in (7, 8, 0, 7, 5):
        na.attention(*there, stream=stream(n))
        assert n == 5 or order.behind[n][5] >= first, "its numbers may not be there yet"
        last[n] = len(device.launches)
    order.freed.clear()
    del plain
    on_device._PLAIN.clear()
    gc.collect()
    freed = [(where, behind) for address, where, behind in order.freed if address in numbers]
    assert len(freed) == len(numbers) and not order.waits
    for where, behind in freed:
        assert where == device.own and all(behind[n] >= last[n] for n in last), "a kernel may be reading it"


def test_a_thread_s_own_stream_is_marked_at_once(device, monkeypatch):
    """Its handle, 2, is another stream in another thread, where what was prepared may die."""
    on_device._PLAIN.clear()
    there = on(device, qkv())
    order = Order(device, monkeypatch)
    for stream in (streams.PER_THREAD, SimpleNamespace(ptr=streams.PER_THREAD)):
        for _ in range(2):
            na.attention(*there, stream=stream)
            assert order.behind[device.own][streams.PER_THREAD] == len(device.launches)
    (plain,) = on_device._PLAIN.values()
    assert not plain.prepared.used


def test_numbers_are_there_once(device, monkeypatch):
    """Whether they are is asked until they are, and no more."""
    on_device._PLAIN.clear()
    there = on(device, qkv())
    asked = []
    monkeypatch.setattr(device, "passed", lambda mark: asked.append(mark) or len(asked) == 2)
    for _ in range(4):
        na.attention(*there)
    assert len(asked) == 2 and asked[0] is asked[1]


def fail_after(device, monkeypatch, n):
    """Once there were so many launches on the device, the next one raises."""
    launch = device.launch

    def some(*arguments):
        if len(device.launches) == n:
            raise RuntimeError("launching failed")
        launch(*arguments)

    monkeypatch.setattr(device, "launch", some)


def test_a_launch_that_fails_leaves_the_order_known(device, monkeypatch):
    """Of two launches the second fails: the first may be reading."""
    on_device._PLAIN.clear()
    q, k, v = qkv()
    there = on(device, [q[:, :, :3], k, v])
    na.attention(*there)
    fail_after(device, monkeypatch, 3)
    with pytest.raises(RuntimeError, match=r"^launching failed"):
        na.attention(*there)
    (plain,) = on_device._PLAIN.values()
    assert plain.prepared.used[0].event == (0, 3)


def test_a_first_launch_that_fails_prepares_nothing(device, monkeypatch):
    on_device._PLAIN.clear()
    q, k, v = qkv()
    there = on(device, [q[:, :, :3], k, v])
    order = Order(device, monkeypatch)
    fail_after(device, monkeypatch, 1)
    with pytest.raises(RuntimeError, match=r"^launching failed"):
        na.attention(*there, stream=6)
    gc.collect()
    assert not on_device._PLAIN and {stream for _, stream, _ in order.freed} == {6}


def test_a_growing_cache_of_two_layers(device):
    """The second layer of every token goes straight to the kernels."""
    on_device._PLAIN.clear()
    for length in range(1, 5):
        for layer in range(2):
            there = on(device, [random(1, HQ, 1, D), random(1, HKV, length, D), random(1, HKV, length, D)])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(device, "synchronize", None)
                if layer:
                    patch.setattr(device, "upload", None)
                na.attention(*there)
