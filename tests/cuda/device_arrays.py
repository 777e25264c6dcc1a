"""Arrays on an emulated device for the public calls, what their results are held to, and that device, which counts what
goes to the host."""

import contextlib

import numpy as np
import seeds
from emulator import DlpackArray, EmulatedDevice

import numba_attn as na
from numba_attn.cuda.host import arrays, driver

B, HQ, HKV, SQ, SK, D = 2, 4, 2, 19, 21, 8
SIZES = {"q": (HQ, SQ), "k": (HKV, SK), "v": (HKV, SK)}


class Watched(EmulatedDevice):
    """Counts the bytes that go to the host."""

    downloaded = 0

    def download(self, source, out, stream):
        self.downloaded += out.nbytes
        super().download(source, out, stream)

    @contextlib.contextmanager
    def used(self):
        """In the place of a GPU, with nothing counted yet."""
        self.calls.clear()
        self.launches.clear()
        self.downloaded = 0
        with driver.use(self):
            yield self


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


def at(device, base, x):
    """x, a view of the array whose numbers `base` has, as a view of base."""
    view = type(base).__new__(type(base))
    view.__dict__ |= base.__dict__ | {"shape": x.shape, "strides": x.strides, "streams": []}
    return view


def bent(score, b, h, i, j, table, ids, on):
    return score + table[h, i] * 0.5 + ids[j] * 0.25 + on[b]
