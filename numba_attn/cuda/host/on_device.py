"""Calls whose arrays are on a GPU already. Nothing of their size is copied, nothing waits, and the results are arrays
of the caller's library.

`plan` reads dtype, shape, strides and address alone. So it receives shadows (arrays.shadow), whose elements nobody may
read. Arrays that `plan` would convert are converted on the device before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ... import plan
from ...arrays import Array, exact
from ...gradients import Backward, Gradients, Wanted, check_aux_grad, check_cotangents, check_results
from ...mask import Mask
from ...mask.parts import Pairs
from ...options import DEFAULTS, NAMES, precision_of
from . import arrays, driver, streams
from .arrays import DeviceArray, Input, shadow

HALVES = ("float16", "bfloat16")
FLOATS = ("float64", "float32", *HALVES)


@dataclass
class _Call:
    """The arguments of one call."""

    device: Any
    stream: int
    found: dict[str, Input]  # every array
    given: dict[str, Any]  # q, k, v, out, ...: shadows
    options: dict[str, Any]  # for plan.resolve: shadows too

    def resolve(self) -> plan.Problem:
        return plan.resolve(self.given["q"], self.given["k"], self.given["v"], **self.options)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        return arrays.empty(shape, np.dtype(dtype), self.device, self.stream)

    def copied(self, x: Array, dtype: Any) -> DeviceArray:
        """x in C order and this type. The copy is made before what is put on the stream later."""
        from .convert import converted

        return converted(x, dtype, self.device, self.stream)

    def hand_over(self, x: DeviceArray, name: str) -> Any:
        """A result, as an array of the library that this argument is of."""
        return arrays.hand_over(x, self.found[name].kind)

    def gradient(self, found: Any, name: str) -> Any:
        """What launch.attention_backward returns for an argument, in its shape, dtype and library; None for None."""
        if found is None:
            return None
        memory, _, dtype = found
        wanted = self.found[name]
        result = DeviceArray(wanted.shape, dtype, memory)
        if dtype != wanted.dtype:
            result = self.copied(shadow(result), wanted.dtype)
        return self.hand_over(result, name)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """A block that launches kernels: the caller's arrays live until they have run."""
        try:
            yield
        finally:
            arrays.hold(self.found)


def _enter(options: dict[str, Any], stream: Any, found: dict[str, Input] | None = None, **given: Any) -> _Call:
    """Arrays by name, and the options of `attention` beside them. found: if they were described before.

    Raises
    ------
    TypeError, ValueError
        If they are not all on one device, and as `arrays.describe` does.
    """
    options = dict(options)
    mask, aux = options["mask"], options["aux"]
    named = {name: x for name, x in given.items() if _is_array(x)}
    named |= {name: options[name] for name in ("bias", "alibi_slopes", "sinks") if _is_array(options[name])}
    if isinstance(mask, Mask) and any(isinstance(part, Pairs) for part in mask.parts):
        raise TypeError(
            f"mask is {mask!r}, which holds a bool array in host memory, and q, k or v is on a GPU; it takes a Mask "
            "without one, or the bool array alone, on the GPU"
        )
    if _is_array(mask):
        named["mask"] = mask
    if isinstance(aux, (tuple, list)):
        named |= {f"aux[{n}]": x for n, x in enumerate(aux) if _is_array(x)}

    if found is None:
        found = arrays.describe_all(named, stream)
    first = next(iter(found.values()))
    call = _Call(driver.current(first.device), first.stream, found, {}, options)
    call.device.refuse_capture(call.stream)
    views = {name: _aligned(shadow(x), name) for name, x in found.items()}
    call.given = given | views

    acc = np.dtype(np.float64 if views["q"].dtype == np.float64 else np.float32) if "q" in views else None
    for name in ("mask", "bias"):
        options[name] = views.get(name, options[name])
    for name in ("alibi_slopes", "sinks"):
        x = views.get(name)
        if x is not None:
            plain = x.dtype == acc and x.flags.c_contiguous
            options[name] = x if plain or x.dtype.name not in FLOATS else shadow(call.copied(x, acc))
    if isinstance(aux, (tuple, list)):
        options["aux"] = tuple(_of_function(call, views.get(f"aux[{n}]", x)) for n, x in enumerate(aux))
    return call


def _is_array(x: Any) -> bool:
    """Whether x is some library's array, or what NumPy would make one of: plan says what is wrong with the rest."""
    if isinstance(x, np.generic):
        return False
    return isinstance(x, (list, tuple)) or hasattr(type(x), "__array__") or arrays.is_device_array(x)


def _aligned(x: Array, name: str) -> Array:
    if not x.flags.aligned:
        raise ValueError(
            f"{name} is at address 0x{x.ctypes.data:x} with strides {x.strides}; on a GPU it takes an address and "
            f"strides that are multiples of {x.itemsize}, the size of an element: copy it"
        )
    return x


def _of_function(call: _Call, x: Any) -> Any:
    """An array of aux, where it is one of halves in float32."""
    return shadow(call.copied(x, np.float32)) if isinstance(x, np.ndarray) and x.dtype.name in HALVES else x


class _Settings(NamedTuple):
    """The keywords of a call, as this module passes them on."""

    options: dict[str, Any]  # of plan.resolve, all of them
    out: Any
    stream: Any
    tf32: bool


def _settings(options: Mapping[str, Any]) -> _Settings:
    own = DEFAULTS | {name: x for name, x in options.items() if name in NAMES}
    precision = precision_of(options, stacklevel=5)
    return _Settings(own, options.get("out"), options.get("stream"), precision == "tf32")


def attention(q: Any, k: Any, v: Any, given_options: Mapping[str, Any], return_lse: bool) -> tuple[Any, Any]:
    """api.attention with arrays on a GPU: out, and lse or None."""
    options, out, stream, tf32 = _settings(given_options)
    given = {"q": q, "k": k, "v": v}
    found, key, plain = _like_before(given, options, out is None, stream, return_lse, tf32)
    if plain is not None:
        made = _run(plain, found)
        return _results(found["q"].kind, out, made["out"], made.get("lse"))
    call = _enter(options, stream, found, **given, out=out)
    problem = call.resolve()
    with call.launching():
        result, lse = _forward(call, problem, return_lse, tf32, key)
    return _results(call.found["q"].kind, out, result, lse)


@dataclass
class _Plain:
    """What a call needs beside addresses, if it reads q, k and v alone (for gradients also out, lse, dout and dlse)."""

    prepared: Any
    results: list[tuple[str, tuple[int, ...], np.dtype[Any]]]  # names, shapes and dtypes


_PLAIN: dict[Any, _Plain] = {}  # the last one used is last
_MOST_PLAIN = 512
_lock = threading.Lock()
_ARRAYS = ("mask", "bias", "alibi_slopes", "sinks", "score_mod")
_NUMBERS = ("causal", "window", "align", "scale", "softcap", "seed", "layout")


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether q, k and v are all that there is to read."""
    if any(options[name] is not None for name in _ARRAYS):
        return False
    aux, dropout_p = options["aux"], options["dropout_p"]
    return type(aux) is tuple and not aux and type(dropout_p) is float and dropout_p == 0.0


def _like_before(
    given: dict[str, Any], options: dict[str, Any], plain: bool, stream: Any, *more: Any
) -> tuple[Any, Any, _Plain | None]:
    """The arrays as `arrays.describe_all` gives them, the key that calls like this one share, and what the first such
    call has prepared. The arrays are None if the call reads more arrays than these, and the key if no other can be
    alike."""
    if not plain or not _is_plain(options) or not all(map(arrays.is_device_array, given.values())):
        return None, None, None
    found = arrays.describe_all(given, stream)
    key = _key(found, options, *more)
    if key is None:
        return found, None, None
    with _lock:
        before = _PLAIN.pop(key, None)
        if before is not None:
            _PLAIN[key] = before
    return found, key, before


def _keep(key: Any, prepared: Any, **results: DeviceArray | None) -> None:
    """Keep it for calls like this one, in place of the ones that were not used for the longest time."""
    plain = _Plain(prepared, [(name, x.shape, x.dtype) for name, x in results.items() if x is not None])
    gone = []  # what dies does so outside of the lock
    with _lock:
        gone.append(_PLAIN.pop(key, None))
        while len(_PLAIN) >= _MOST_PLAIN:
            gone.append(_PLAIN.pop(next(iter(_PLAIN))))
        _PLAIN[key] = plain


def _key(found: dict[str, Input], options: dict[str, Any], *more: Any) -> Any:
    """A key that is equal for two calls that differ in addresses alone. None if a setting is no plain number."""
    from ..code import VECTOR  # when it is known that there is a device

    device = driver.current(found["q"].device)
    own = (device, *((x.shape, x.strides, x.dtype, x.address % VECTOR) for x in found.values()))
    return exact(own, (*(options[name] for name in _NUMBERS), *more))


def _run(plain: _Plain, found: dict[str, Input]) -> dict[str, DeviceArray]:
    """A call like one before: its results by name."""
    device, stream = plain.prepared.device, found["q"].stream
    device.refuse_capture(stream)
    results = {name: arrays.empty(shape, dtype, device, stream) for name, shape, dtype in plain.results}
    try:
        plain.prepared.run(stream, {name: x.address for name, x in (found | results).items()})
    finally:
        arrays.hold(found)
    return results


def attention_vjp(
    q: Any, k: Any, v: Any, given_options: Mapping[str, Any], aux_grad: Any, return_lse: bool
) -> tuple[Any, Any, tuple[DeviceArray, DeviceArray]]:
    """out, lse or None, and both once more for the pullback: arrays that nobody else writes to."""
    options, out, stream, tf32 = _settings(given_options)
    given = {"q": q, "k": k, "v": v}
    found, key, plain = _like_before(given, options, out is None and _is_empty(aux_grad), stream, True, tf32)
    if plain is not None:
        made = _run(plain, found)
        result, lse = made["out"], made["lse"]
        kept = _copies(shadow(result), lse, return_lse, plain.prepared.device, found["q"].stream)
    else:
        call = _enter(options, stream, found, **given, out=out)
        problem, found = call.resolve(), call.found
        check_aux_grad(aux_grad, problem.aux)
        with call.launching():
            result, lse = _forward(call, problem, True, tf32, key)
            written = call.given["out"] if result is None else shadow(result)
            kept = _copies(written, lse, return_lse, call.device, call.stream)
    return *_results(found["q"].kind, out, result, lse if return_lse else None), kept


def _is_empty(aux_grad: Any) -> bool:
    return isinstance(aux_grad, tuple) and not aux_grad


def _copies(out: Array, lse: Any, return_lse: bool, device: Any, stream: int) -> tuple[DeviceArray, DeviceArray]:
    """Copies of out and lse, since the caller may change his own. They live as long as the pullback. By then a stream
    may be gone of which only the handle is known."""
    from .convert import converted

    kept = (
        converted(out, out.dtype, device, stream),
        converted(shadow(lse), lse.dtype, device, stream) if return_lse else lse,
    )
    for x in kept:
        x.memory.settle = not streams.lasts(stream)
    return kept


def _forward(
    call: _Call, problem: plan.Problem, want_lse: bool, tf32: bool, key: Any
) -> tuple[DeviceArray | None, DeviceArray | None]:
    """out, None where the caller brought one, and lse. key: of calls like this one, for which it is prepared."""
    from . import launch
    from .call import On

    result = lse = lse_view = None
    if call.given["out"] is None:
        result = call.empty(plan.output_shape(problem), problem.dtype)
        view = plan.bhsd_view(shadow(result), problem.layout)
    else:
        view = plan.check_out(problem, call.given["out"])
    if want_lse:
        lse = call.empty(plan.lse_shape(problem), problem.acc)
        lse_view = plan.bhsd_view(shadow(lse), problem.layout)
    prepared = launch.attention(problem, view, lse_view, On(call.device, call.stream, True, tf32, key is not None))
    if key is not None:
        _keep(key, prepared, out=result, lse=lse)
    return result, lse


def _results(kind: str, out: Any, result: DeviceArray | None, lse: DeviceArray | None) -> tuple[Any, Any]:
    """As the caller's library has them."""
    return (
        out if result is None else arrays.hand_over(result, kind),
        None if lse is None else arrays.hand_over(lse, kind),
    )


def attention_backward(
    dout: Any, inputs: tuple[Any, Any, Any], results: tuple[Any, Any], dlse: Any, given_options: Any, aux_grad: Any
) -> Gradients[Any]:
    """api.attention_backward with arrays on a GPU. inputs: q, k and v; results: out and lse."""
    options, _, stream, tf32 = _settings(given_options)
    (q, k, v), (out, lse) = inputs, results
    named = {"q": q, "k": k, "v": v, "dout": dout, "out": out, "lse": lse} | ({} if dlse is None else {"dlse": dlse})
    found, key, plain = _like_before(named, options, _is_empty(aux_grad), stream, "backward", tf32)
    if plain is not None:
        ran = _run(plain, found)
        return Gradients(*(arrays.hand_over(ran[f"d{name}"], found[name].kind) for name in "qkv"))
    call = _enter(options, stream, found, **named)
    from . import launch  # when it is known that there is a device: it needs numba-cuda
    from .call import On

    problem = call.resolve()
    asked = check_aux_grad(aux_grad, problem.aux)
    given = call.given
    results = check_results(problem, given["out"], given["lse"])
    dout_view, dlse_view = check_cotangents(problem, given["dout"], given.get("dlse"))
    if dlse_view is not None and dlse_view.dtype != problem.acc:
        dlse_view, key = shadow(call.copied(dlse_view, problem.acc)), None  # which other calls would not have
    made = [call.empty(given[name].shape, problem.dtype) for name in "qkv"]
    dq_view, dk_view, dv_view = (plan.bhsd_view(shadow(x), problem.layout) for x in made)
    bias, slopes = call.found.get("bias"), call.found.get("alibi_slopes")
    bias_shape = None if bias is None else (1,) * (4 - len(bias.shape)) + bias.shape
    slopes_shape = None if slopes is None else (1,) * (2 - len(slopes.shape)) + slopes.shape
    with call.launching():
        dbias, dslopes, daux, dsinks, prepared = launch.attention_backward(
            problem,
            Backward(*results, dout_view, dlse_view, asked),
            Wanted(dq_view, dk_view, dv_view, bias_shape, slopes_shape),
            On(call.device, call.stream, True, tf32, key is not None),
        )
        if key is not None:
            _keep(key, prepared, dq=made[0], dk=made[1], dv=made[2])
        rest = [call.gradient(x, name) for x, name in ((dbias, "bias"), (dsinks, "sinks"), (dslopes, "alibi_slopes"))]
        tables = tuple(call.gradient(x, f"aux[{n}]") for n, x in enumerate(daux))
    dq, dk, dv = (call.hand_over(x, name) for x, name in zip(made, "qkv", strict=True))
    daux_given = problem.score_mod is not None and problem.aux
    return Gradients(dq, dk, dv, rest[0], rest[1], rest[2], tables if daux_given else None)
