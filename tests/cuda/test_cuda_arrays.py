"""Device arrays of other libraries as arguments, with exporters that are known byte by byte: ours in the emulated
device, ctypes ones that count, and what NumPy, torch and JAX make of arrays in host memory, which differ from those on
a GPU by two numbers in a capsule."""

import ctypes
import gc
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from emulator import DlpackArray, EmulatedDevice, InterfaceArray
from libraries import jax, ml_dtypes, needs_jax, needs_ml_dtypes, needs_torch, of_library, torch

from numba_attn.cuda.host import arrays, driver, streams


@pytest.fixture
def device():
    with driver.use(EmulatedDevice()) as device:
        yield device


X = np.arange(2 * 5 * 6, dtype=np.float32).reshape(2, 5, 6)
VIEWS = {
    "contiguous": X,
    "transposed": X.transpose(2, 0, 1),
    "padded rows": X[:, :, 1:4],
    "every other": X[:, ::2],
    "negative": X[::-1, :, ::-1],
    "broadcast": np.broadcast_to(X[:, :1], (2, 7, 6)),
    "broadcast of a negative": np.broadcast_to(X[::-1, 2, None, :], (2, 3, 6)),
    "one number": X[0, 0, 3],
    "no axes": np.array(3.0, np.float32),
    "empty": X[:, :0],
}
DTYPES = ["f8", "f4", "f2", "?", "i1", "u1", "i4", "i8", "u2", "c8"]


# ---------------------------------------------------------------- what is a device array


def test_is_device_array(device):
    class Where:
        def __init__(self, *at):
            self.at = at

        def __dlpack_device__(self):
            if not self.at:
                raise BufferError("on many devices")
            return self.at

    for x in (DlpackArray(device, X), InterfaceArray(device, X), Where(2, 0), Where(13, 3)):
        assert arrays.is_device_array(x)
    for x in (X, X[0], np.float32(1), np.ma.masked_array(X), [1.0], None, 3, "cuda", Where(1, 0), Where(3, 0), Where()):
        assert not arrays.is_device_array(x)
    if torch is not None:
        assert not arrays.is_device_array(torch.ones(3))
        assert not arrays.is_device_array(torch.ones(3, device="meta"))
    if jax is not None and jax.default_backend() == "cpu":
        assert not arrays.is_device_array(jax.numpy.ones(3))


def test_kind_of():
    assert arrays.kind_of(of_library("cupy._core.core", object)()) == "cupy"
    assert arrays.kind_of(of_library("numba.cuda.cudadrv.devicearray", object)()) == "numba"
    assert arrays.kind_of(type("Mine", (of_library("torch.nn.parameter", object),), {})()) == "torch"
    assert arrays.kind_of(of_library("torchlike", object)()) == ""
    if torch is not None:
        assert arrays.kind_of(torch.nn.Parameter(torch.ones(2))) == "torch"
    if jax is not None:
        assert arrays.kind_of(jax.numpy.ones(2)) == "jax"


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("kind", [DlpackArray, InterfaceArray])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(device, kind, view):
    """Nothing is copied: the record points into the exporter's memory, element by element."""
    x = np.asarray(VIEWS[view])
    given = kind(device, x)
    found = arrays.describe(given, "q", 0)
    assert (found.shape, found.dtype, found.device, found.read_only) == (x.shape, x.dtype, 0, False)
    assert found.kind == "" and found.stream == 0
    # NumPy sets the strides of axes with one element, and of empty arrays, as it likes.
    for n, ours, theirs in zip(x.shape, found.strides, x.strides, strict=True):
        assert n == 1 or ours == theirs or x.size == 0
    for index in np.ndindex(x.shape):
        at = found.address + sum(i * s for i, s in zip(index, found.strides, strict=True))
        assert device.bytes_at(at, 4).view(np.float32)[0] == x[index]


@pytest.mark.parametrize("kind", [DlpackArray, InterfaceArray])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device, kind, dtype):
    found = arrays.describe(kind(device, np.zeros((2, 3), dtype)), "q", 0)
    assert found.dtype == np.dtype(dtype) and found.strides == (3 * found.dtype.itemsize, found.dtype.itemsize)


@needs_ml_dtypes
@pytest.mark.parametrize("versioned", [True, False])
def test_bfloat16(device, versioned):
    given = DlpackArray(device, X.astype(ml_dtypes.bfloat16)[:, ::-1])
    given.versioned = versioned
    found = arrays.describe(given, "q", 0)
    assert found.dtype == ml_dtypes.bfloat16 and found.strides == (60, -12, 2)

    # Through __cuda_array_interface__ only where the array has a NumPy dtype, as Numba's.
    given = InterfaceArray(device, X.astype(ml_dtypes.bfloat16))
    assert given.__cuda_array_interface__["typestr"] == "<V2"
    assert arrays.describe(given, "q", 0).dtype == ml_dtypes.bfloat16


def test_bfloat16_without_ml_dtypes(monkeypatch):
    """The stand-in has what the package asks of a dtype."""
    from numba_attn.arrays import accumulation

    monkeypatch.delitem(arrays._DTYPES, (4, 16, 1), raising=False)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    dtype = arrays.bfloat16()
    assert (dtype.name, dtype.itemsize, dtype.isnative) == ("bfloat16", 2, True)
    monkeypatch.setattr("numba_attn.arrays._ACC", {})
    assert accumulation(dtype, "q") is np.float32
    assert arrays.bfloat16() is dtype
    monkeypatch.delitem(arrays._DTYPES, (4, 16, 1))


@pytest.mark.parametrize("kind", [DlpackArray, InterfaceArray])
def test_read_only(device, kind):
    assert arrays.describe(kind(device, X, read_only=True), "q", 0).read_only
    jax_array = of_library("jaxlib._jax", kind)(device, X)
    assert arrays.describe(jax_array, "q", 0).read_only == (kind is DlpackArray)


def test_memory_lives_with_the_record(device):
    for kind in (DlpackArray, InterfaceArray):
        found = arrays.describe(kind(device, X), "q", 0)
        gc.collect()
        assert device.bytes_at(found.address, 4).view(np.float32)[0] == 0
        address = found.address
        del found
        gc.collect()
        with pytest.raises(IndexError):
            device.bytes_at(address, 4)


@pytest.mark.parametrize("stream, told", [(0, 1), (1, 1), (2, 2), (0x7000, 0x7000)])
def test_stream_is_told_to_the_exporter(device, stream, told):
    given = DlpackArray(device, X)
    handle = streams.Stream(stream)
    assert arrays.describe(given, "q", handle).stream == stream
    assert given.streams == [told] and type(given.streams[0]) is int  # torch refuses a class derived from int


@pytest.mark.parametrize(
    "producer, version, waits",
    [(None, 3, []), (1, 3, [("wait", 9, 1)]), (2, 3, [("wait", 9, 2)]), (77, 3, [("wait", 9, 77)]), (77, 2, [])],
)
def test_stream_of_the_producer(device, producer, version, waits):
    given = InterfaceArray(device, X)
    given.producer, given.version = producer, version
    arrays.describe(given, "q", 9)
    assert device.calls == waits


def test_exporter_without_versions(device):
    given = DlpackArray(device, X)
    given.versioned = False
    assert arrays.describe(given, "q", 5).shape == X.shape
    assert given.streams == [5]


# ---------------------------------------------------------------- capsules


class Exporter:
    """A capsule written field by field from dlpack.h, whose deleter counts. Like the C exporters, it is called by the
    capsule's destructor, unless a consumer has renamed the capsule."""

    def __init__(self, *, version=None, flags=0, strides=None, code=2, bits=32, lanes=1, offset=0, data=0x1000000000):
        shape = (2, 3)
        self.deleted = 0
        self.shape = (ctypes.c_int64 * 2)(*shape)
        self.strides = (ctypes.c_int64 * 2)(*strides) if strides else None
        head = version is not None
        self.buffer = ctypes.create_string_buffer(80)
        at = ctypes.addressof(self.buffer)

        def put(kind, where, value):
            kind.from_address(at + where).value = value

        tensor = 32 if head else 0
        context = 8 if head else 48
        self.delete = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(self.deleter)
        put(ctypes.c_void_p, context + 8, ctypes.cast(self.delete, ctypes.c_void_p).value)
        if head:
            put(ctypes.c_uint32, 0, version[0])
            put(ctypes.c_uint32, 4, version[1])
            put(ctypes.c_uint64, 24, flags)
        put(ctypes.c_void_p, tensor, data)
        put(ctypes.c_int32, tensor + 8, 2)
        put(ctypes.c_int32, tensor + 12, 0)
        put(ctypes.c_int32, tensor + 16, 2)
        put(ctypes.c_uint8, tensor + 20, code)
        put(ctypes.c_uint8, tensor + 21, bits)
        put(ctypes.c_uint16, tensor + 22, lanes)
        put(ctypes.c_void_p, tensor + 24, ctypes.addressof(self.shape))
        put(ctypes.c_void_p, tensor + 32, ctypes.addressof(self.strides) if strides else None)
        put(ctypes.c_uint64, tensor + 40, offset)
        self.name = b"dltensor_versioned" if head else b"dltensor"
        self.destroy = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(self.destructor)

    def capsule(self):
        new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
            ("PyCapsule_New", ctypes.pythonapi)
        )
        return new(ctypes.addressof(self.buffer), self.name, ctypes.cast(self.destroy, ctypes.c_void_p))

    def destructor(self, capsule):
        valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
            ("PyCapsule_IsValid", ctypes.pythonapi)
        )
        if valid(capsule, self.name):
            self.delete(ctypes.addressof(self.buffer))

    def deleter(self, managed):
        self.deleted += managed == ctypes.addressof(self.buffer)

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **keywords):
        return self.capsule()


@pytest.mark.parametrize("version", [None, (1, 0), (1, 3)])
def test_deleter_is_called_once(device, version):
    exporter = Exporter(version=version)
    found = arrays.describe(exporter, "q", 0)
    gc.collect()
    assert exporter.deleted == 0
    copy = tuple(found)
    del found
    assert exporter.deleted == 0
    del copy
    gc.collect()
    assert exporter.deleted == 1


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_fields_of_a_capsule(device, version):
    found = arrays.describe(Exporter(version=version, strides=(-4, 2), offset=40), "q", 0)
    assert (found.address, found.shape, found.strides) == (0x1000000028, (2, 3), (-16, 8))
    assert arrays.describe(Exporter(version=version), "q", 0).strides == (12, 4)  # none: C order


@pytest.mark.parametrize("flags, read_only", [(0, False), (1, True), (2, True), (3, True), (4, False)])
def test_flags(device, flags, read_only):
    assert arrays.describe(Exporter(version=(1, 0), flags=flags), "q", 0).read_only == read_only


@pytest.mark.parametrize(
    "options, message",
    [
        ({"version": (2, 0)}, r"^q comes as DLPack 2\.0; versions 0 and 1 are read"),
        (
            {"code": 10, "bits": 8},
            r"^q has a dtype that NumPy lacks \(DLPack code 10, 8 bits\); it takes float64, float32",
        ),
        ({"code": 2, "bits": 32, "lanes": 4}, r"^q has a dtype.*code 2, 4 times 32 bits"),
        ({"code": 3, "bits": 64}, r"^q has a dtype.*code 3"),
    ],
)
def test_bad_capsules(device, options, message):
    """Refused, and released."""
    exporter = Exporter(**options)
    with pytest.raises(TypeError, match=message):
        arrays.describe(exporter, "q", 0)
    gc.collect()
    assert exporter.deleted == 1


def test_used_capsule(device):
    exporter = DlpackArray(device, X)
    capsule = exporter.__dlpack__(stream=None)
    rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))
    used = b"used_dltensor"
    rename(capsule, used)
    exporter.__class__ = type("Used", (DlpackArray,), {"__dlpack__": lambda self, **keywords: capsule})
    with pytest.raises(TypeError, match=r"^q\.__dlpack__\(\) gives <capsule object \"used_dltensor\".*unused DLPack"):
        arrays.describe(exporter, "q", 0)
    rename(capsule, b"dltensor")


def read(x, **keywords):
    return arrays._read_capsule(x.__dlpack__(**keywords), "x")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("keywords", [{}, {"max_version": (1, 0)}], ids=["legacy", "versioned"])
def test_capsules_of_numpy(view, keywords):
    x = np.array(0) + VIEWS[view] if view == "broadcast" else np.asarray(VIEWS[view])
    found = read(x, **keywords) if x.flags.writeable or keywords else None
    if found is not None:
        assert (found.address, found.shape, found.dtype) == (x.ctypes.data, x.shape, x.dtype)
        assert found.device_type == 1 and (found.strides == x.strides or x.size < 2)
        assert found.read_only == (not x.flags.writeable)


@needs_torch
@pytest.mark.parametrize("keywords", [{}, {"max_version": (1, 0)}], ids=["legacy", "versioned"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "bool", "int64"])
def test_capsules_of_torch(dtype, keywords):
    base = torch.zeros(3, 4, 5, dtype=getattr(torch, dtype))
    for x in (base, base.transpose(0, 2)[1:, ::2], base[:, :1].expand(3, 9, 5)):
        found = read(x, **keywords)
        assert found.address == x.data_ptr() and found.shape == tuple(x.shape) and found.dtype.name == dtype
        ours = [s for n, s in zip(found.shape, found.strides, strict=True) if n > 1]
        assert ours == [s * x.element_size() for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]


@needs_torch
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "bool", "int64", "uint8", "complex64"])
def test_a_tensor_says_what_its_capsule_says(dtype):
    base = torch.zeros(3, 4, 5, dtype=getattr(torch, dtype))
    views = base, base.transpose(0, 2)[1:, ::2], base[:, :1].expand(3, 9, 5), base[:0], base[0, 0, 0], base[1:2]
    for x in views:
        found, told = arrays._from_tensor(x, 7, 7), read(x, max_version=(1, 0))
        assert (found.address, found.shape, found.dtype) == (told.address, told.shape, told.dtype)
        assert (found.read_only, found.kind, found.stream) == (told.read_only, "torch", 7) and found.keep is x
        ours, its = ([s for n, s in zip(y.shape, y.strides, strict=True) if n > 1] for y in (found, told))
        assert ours == its or not x.numel()


@needs_torch
def test_a_tensor_with_more_to_say():
    """Its capsule is asked for, which torch refuses, or makes a copy of."""
    x = torch.ones(3, dtype=torch.complex64)
    special = [
        torch.ones(3, requires_grad=True), x.conj(), x.conj().imag, torch.ones(3, 3).to_sparse(),
        torch.zeros(3, dtype=torch.float8_e5m2),
    ]  # fmt: skip
    assert special[2].is_neg()
    for y in special:
        assert arrays._from_tensor(y, 0, 0) is None
    seen = []
    torch.func.vmap(lambda y: seen.append(arrays._from_tensor(y, 0, 0)) or y)(torch.ones(2, 3))
    torch.func.grad(lambda y: seen.append(arrays._from_tensor(y, 0, 0)) or y.sum())(torch.ones(3))
    assert seen == [None, None]
    assert not arrays._is_tensor(torch.nn.Parameter(torch.ones(2))) and not arrays._is_tensor(X)


@needs_jax
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "bool", "int32"])
def test_capsules_of_jax(dtype):
    x = jax.numpy.zeros((3, 4), dtype)
    found = read(x, max_version=(1, 0))
    assert found.address == x.unsafe_buffer_pointer() and found.shape == (3, 4) and found.dtype.name == dtype


# ---------------------------------------------------------------- errors


class Requires(DlpackArray):
    requires_grad = True

    def __dlpack__(self, **keywords):
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")


class Refuses(DlpackArray):
    def __dlpack__(self, **keywords):
        raise BufferError("the conjugate bit is set")


class Lost(DlpackArray):
    def __dlpack_device__(self):
        raise BufferError("on many devices")


class Broken(InterfaceArray):
    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("not on a GPU")


class Liar:
    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **keywords):
        return X.__dlpack__()


def interface(device, **changes):
    return type(
        "Strange",
        (InterfaceArray,),
        {"__cuda_array_interface__": InterfaceArray(device, X).__cuda_array_interface__ | changes},
    )(device, X)


TABLE = [
    ("requires grad", lambda d: Requires(d, X), r"^q is a torch tensor that requires grad.*pass q\.detach\(\)"),
    ("conjugate", lambda d: Refuses(d, X), r"^q is a .*Refuses that does not share its memory: the conjugate bit"),
    ("many devices", lambda d: Lost(d, X), r"^q is a .*Lost that does not say where it is: on many devices"),
    ("broken interface", lambda d: Broken(d, X), r"^q is a .*Broken that does not share its memory: not on a GPU"),
    ("old interface", lambda d: interface(d, version=1), r"^q has version 1 of __cuda_array_interface__; versions 2"),
    ("masked", lambda d: interface(d, mask=object()), r"^q is a masked array.*mask="),
    ("two bytes", lambda d: interface(d, typestr="<V2"), r"^q has typestr '<V2'.*__dlpack__"),
    ("other order", lambda d: interface(d, typestr=">f4"), r"^q has dtype >f4; it takes float64.*other order.*float32"),
    ("text", lambda d: interface(d, typestr="<U3"), r"^q has dtype <U3; it takes float64, float32, float16 or"),
    ("record", lambda d: interface(d, typestr="|V8"), r"^q has dtype \|V8; it takes float64"),
    ("long double", lambda d: interface(d, typestr="<f16"), r"^q has dtype .*; it takes float64"),
    ("numpy", lambda d: X, r"^q is a NumPy array; here .* on a GPU: .*torch\.from_numpy\(q\)\.cuda\(\)"),
    ("list", lambda d: [1.0], r"^q is a list; it takes an array on a GPU"),
    ("liar", lambda d: Liar(), r"^q says that it is on a GPU, but its DLPack capsule says device type 1"),
]


@pytest.mark.parametrize("make, message", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_errors(device, make, message):
    with pytest.raises(TypeError, match=message):
        arrays.describe(make(device), "q", 0)


@needs_torch
def test_torch_in_host_memory(device):
    with pytest.raises(TypeError, match=r"^k is a torch tensor in host memory.*k\.detach\(\)\.numpy\(\).*k\.cuda\(\)"):
        arrays.describe(torch.ones(3), "k", 0)


@needs_jax
def test_jax_in_host_memory(device):
    with pytest.raises(TypeError, match=r"^v is a jax.* in host memory.*np\.asarray\(v\).*jax\.device_put\(v"):
        arrays.describe(jax.numpy.ones(3), "v", 0)


def test_describe_all(device):
    q, k = DlpackArray(device, X), InterfaceArray(device, X[:1])
    k.producer = 5
    found = arrays.describe_all({"q": q, "k": k, "mask": None}, stream=9)
    assert list(found) == ["q", "k"] and {x.stream for x in found.values()} == {9}
    assert q.streams == [9] and ("wait", 9, 5) in device.calls


def test_mixed_arguments(device):
    q, k = DlpackArray(device, X), of_library("torch", DlpackArray)(device, X)
    with pytest.raises(
        TypeError, match=r"^q and k are on a GPU and mask is in host memory; .*move it.*cupy\.asarray\(mask"
    ):
        arrays.describe_all({"q": q, "mask": X > 0, "k": k})
    with pytest.raises(
        TypeError, match=r"^k is on a GPU and q and v are in host memory.*torch\.as_tensor\(q, device=k\.dev"
    ):
        arrays.describe_all({"q": X, "k": k, "v": X})
    with pytest.raises(TypeError, match=r"^q is a NumPy array; here it takes an array on a GPU"):
        arrays.describe_all({"q": X, "k": X})


def test_two_devices(device):
    class Elsewhere(DlpackArray):
        def __dlpack_device__(self):
            return 2, 1

    with pytest.raises(ValueError, match=r"^q is on CUDA device 0 and v on 1; all arrays of a call take one device"):
        arrays.describe_all({"q": DlpackArray(device, X), "v": Elsewhere(device, X)})


def test_hold(device, monkeypatch):
    """Memory that its library reuses in the order of our stream need not be held."""
    library = ModuleType("torch")
    library.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setitem(sys.modules, "torch", library)
    mine = of_library("torch", DlpackArray)(device, X)
    arrays.hold(arrays.describe_all({"q": mine}))
    assert device.calls == []
    arrays.hold(arrays.describe_all({"q": mine}, stream=8))
    assert device.calls == [("hold", 8)]
    arrays.hold(arrays.describe_all({"q": mine, "k": of_library("jaxlib", DlpackArray)(device, X)}, stream=7))
    assert device.calls == [("hold", 8), ("hold", 7)]
    arrays.hold({})
    five, own = (streams.resolve_stream(SimpleNamespace(ptr=n)) for n in (5, streams.PER_THREAD))
    ours = arrays.empty((3,), np.dtype("f4"), device, 0)
    for freed_on, settle, stream, held in (
        (five, False, five, []), (five, False, 6, [("hold", 6)]), (five, True, 6, []), (0, False, 0, []),
        (own, False, own, [("hold", 2)]),  # in another thread, after that one's work
    ):  # fmt: skip
        device.calls.clear()
        ours.memory.stream, ours.memory.settle = freed_on, settle  # or when the whole device is done
        arrays.hold(arrays.describe_all({"q": ours}, stream=stream))
        assert [call for call in device.calls if call[0] == "hold"] == held
