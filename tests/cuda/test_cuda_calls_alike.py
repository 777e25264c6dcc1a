"""Calls like one before, which go straight to the kernels: what tells calls apart, what is kept, and the order of
streams that share what was prepared."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest
from device_arrays import HKV, HQ, SK, SQ, B, D, on, qkv, random
from emulator import DlpackArray, InterfaceArray

import numba_attn as na
from numba_attn.cuda.host import driver, streams

pytest.importorskip("numba_cuda")

from numba_attn.cuda.host import on_device


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
