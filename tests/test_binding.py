"""A call is bound once to the kinds of its arguments, and each call alike fills in its own addresses and numbers.

So no number of one call may be found in another's result, a bad number must be refused at every call, and what is kept
between calls may neither grow without end nor hold a caller's array.
"""

import gc
import inspect
import re
import tracemalloc
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import seeds
from cases import CASES, Case, build

import numba_attn as na
from numba_attn import dispatch, plan
from numba_attn.userfn.accepted import identity

B, H, SQ, SK, D = 2, 4, 9, 13, 8
F4 = np.float32


def arrays(seed: int = 0, dtype: Any = F4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = seeds.generator(seed)
    shapes = ((B, H, SQ, D), (B, 2, SK, D), (B, 2, SK, D))
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return q, k, v


def add_table(s, b, h, i, j, table):
    return s + table[h]


def far(b, h, i, j, table):
    return table[i] < j


def random_mask(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.random(shape) < 0.6


# Options of one kind each, with numbers of their own at every draw.
DRAWS: dict[str, Any] = {
    "scale": lambda rng: {"scale": rng.uniform(0.1, 1.0)},
    "scale-int": lambda rng: {"scale": int(rng.integers(-2, 3))},
    "softcap": lambda rng: {"softcap": rng.uniform(1.0, 9.0)},
    "mask": lambda rng: {"mask": random_mask(rng, SQ, SK)},
    "mask-4d": lambda rng: {"mask": random_mask(rng, B, H, SQ, SK)},
    "mask-causal": lambda rng: {"mask": random_mask(rng, B, 1, 1, SK), "causal": True, "align": "bottom_right"},
    "bias": lambda rng: {"bias": rng.standard_normal((H, SQ, SK)).astype(F4)},
    "bias-f64": lambda rng: {"bias": rng.standard_normal((B, H, SQ, SK))},
    "sinks": lambda rng: {"sinks": rng.standard_normal(H).astype(F4)},
    "sinks-f64": lambda rng: {"sinks": rng.standard_normal(H)},
    "slopes": lambda rng: {"alibi_slopes": rng.random(H).astype(F4), "align": "top_left"},
    "slopes-batch": lambda rng: {"alibi_slopes": rng.random((B, H)), "align": int(rng.integers(0, 9))},
    "aux": lambda rng: {"score_mod": add_table, "aux": (rng.standard_normal(H).astype(F4),)},
    "aux-half": lambda rng: {"score_mod": add_table, "aux": (rng.standard_normal(H).astype(np.float16),)},
    "captured": lambda rng: (lambda c: {"score_mod": lambda s, b, h, i, j: s * c})(float(rng.integers(1, 4))),
    "dropout": lambda rng: {"dropout_p": rng.uniform(0.0, 0.9), "seed": int(rng.integers(2**63))},
    "no-dropout": lambda rng: {"dropout_p": rng.choice([0.0, 0.5]).item(), "seed": 5},
    "align": lambda rng: {"causal": True, "align": int(rng.integers(-3, 9))},
    "align-rows": lambda rng: {"window": (3, 1), "align": rng.integers(-3, 9, B)},
    "lengths": lambda rng: {"mask": na.lengths(rng.integers(0, SK + 1, B))},
    "lengths-both": lambda rng: {"mask": na.lengths(rng.integers(0, SK + 1, B), rng.integers(0, SQ + 1, B))},
    "varlen": lambda rng: {"mask": na.varlen([0, (n := int(rng.integers(1, SQ))), SQ], [0, n + 1, SK])},
    "segments": lambda rng: {"mask": na.segments(rng.integers(0, 3, SQ), rng.integers(0, 3, SK))},
    "prefix": lambda rng: {"mask": na.prefix(int(rng.integers(0, SK))), "align": "top_left"},
    "intervals": lambda rng: {"mask": na.intervals(rng.integers(0, SK, SQ), rng.integers(0, SK + 1, SQ))},
    "mask-mod": lambda rng: {"mask": na.mask_mod(far, aux=(rng.integers(0, SK, SQ),))},
    "pairs": lambda rng: {"mask": na.causal("bottom_right") & random_mask(rng, SQ, SK)},
    "everything": lambda rng: {
        "mask": na.lengths(rng.integers(1, SK + 1, B)) & random_mask(rng, SQ, SK),
        "bias": rng.standard_normal((SQ, SK)).astype(F4),
        "sinks": rng.standard_normal(H).astype(F4),
        "scale": rng.uniform(0.1, 1.0),
        "softcap": rng.uniform(1.0, 9.0),
        "score_mod": add_table,
        "aux": (rng.standard_normal(H).astype(F4),),
        "dropout_p": 0.25,
        "seed": int(rng.integers(2**32)),
    },
}


def forget() -> None:
    """Have the next call bound anew."""
    dispatch._BOUND.clear()
    plan._LOWERED.clear()


def all_passes(q: Any, k: Any, v: Any, options: dict[str, Any], more: dict[str, Any] | None = None) -> list[bytes]:
    """The bits of out, lse, the gradients, and a tangent; more: of the forward call alone."""
    (out, lse), pullback = na.attention_vjp(q, k, v, **options, **(more or {}), return_lse=True)
    out = np.array(out)
    grads = [*pullback(out)[:6], *na.attention_backward(out, q, k, v, out, lse, **options)[:3]]
    tangents = na.attention_jvp(q, k, v, q, None, v, **options)
    alone = na.attention(q, k, v, **options, **(more or {}))
    return [x.tobytes() for x in (out, lse, *grads, *tangents, alone) if x is not None]


@pytest.mark.parametrize("name", DRAWS)
def test_calls_alike_differ_in_numbers_alone(name: str) -> None:
    """Calls that share a binding give the bits of calls that were bound for themselves, and what the reference says."""
    q, k, v = arrays()
    rng = seeds.generator(len(name))
    draws = [DRAWS[name](rng) for _ in range(4)]
    forget()
    together = [all_passes(q, k, v, options) for options in draws]
    assert len(dispatch._BOUND) == 1, "one binding for all of them"
    assert [all_passes(q, k, v, options) for options in draws] == together
    for options, got in zip(draws, together, strict=True):
        forget()
        assert all_passes(q, k, v, options) == got
        out, lse = na.reference.attention(q, k, v, **options, return_lse=True)
        grads = na.reference.attention_backward(out, q, k, v, **options)
        _, out_dot = na.reference.attention_jvp(q, k, v, q, None, v, **options)
        for bits, want in ((got[0], out), (got[1], lse), (got[2], grads.dq), (got[3], grads.dk), (got[-2], out_dot)):
            np.testing.assert_allclose(np.frombuffer(bits, F4).reshape(want.shape), want, rtol=1e-3, atol=1e-4)


def test_kinds_say_all_that_a_plan_holds() -> None:
    """Two calls with one key get plans that are equal field by field."""
    q, k, v = arrays()
    for name, draw in DRAWS.items():
        rng = seeds.generator(1)
        first, second = draw(rng), draw(rng)
        assert plan.kinds(q, k, v, first) == plan.kinds(q, k, v, second) is not None, name
        one, other = plan.bind(q, k, v, first), plan.bind(q, k, v, second)
        assert one.steps == other.steps and one[:5] == other[:5]
        for field, x in one.fields.items():
            y = other.fields[field]
            assert x is y or x == y, (name, field)
            assert not isinstance(x, np.ndarray) or not x.size or field == "sequences"


@pytest.mark.parametrize("case", [c for c in CASES if c.q_len * c.kv_len < 2e4 and not c.simd], ids=lambda c: c.name)
def test_a_second_call_has_the_bits_of_the_first(case: Case) -> None:
    inputs, options = build(case)
    forget()
    first = na.attention(*inputs, **options, return_lse=True)
    again = na.attention(*inputs, **options, return_lse=True)
    assert [x.tobytes() for x in first] == [x.tobytes() for x in again]


@pytest.mark.parametrize("name", ["mask", "mask-4d", "bias", "sinks", "slopes", "aux", "mask-mod", "pairs"])
def test_arrays_that_change_in_place(name: str) -> None:
    """Results follow the numbers that an array holds now."""
    inputs, rng = arrays(), seeds.generator(3)
    options, other = DRAWS[name](rng), DRAWS[name](rng)
    first = all_passes(*inputs, options)

    def array_of(options: dict[str, Any]) -> np.ndarray:
        held = next(options[n] for n in ("mask", "bias", "sinks", "alibi_slopes", "aux") if n in options)
        if isinstance(held, na.Mask):
            part = held.parts[-1]
            held = getattr(part, "mask", None) if hasattr(part, "mask") else part.aux
        return held[0] if isinstance(held, tuple) else held

    kept = array_of(options).copy()
    array_of(options)[...] = array_of(other)
    changed = all_passes(*inputs, options)
    assert changed == all_passes(*inputs, {**options, **other, **{n: options[n] for n in ("align",) if n in options}})
    assert changed != first
    array_of(options)[...] = kept
    assert all_passes(*inputs, options) == first


def strided(x: np.ndarray) -> np.ndarray:
    """The same numbers, every other element of a larger array."""
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def shifted(x: np.ndarray) -> np.ndarray:
    """The same numbers, a byte off their alignment."""
    data = np.zeros(x.nbytes + 1, np.uint8)
    view = data[1:].view(x.dtype) if x.dtype.itemsize == 1 else np.frombuffer(data.data, x.dtype, x.size, 1)
    view = view.reshape(x.shape)
    view[...] = x
    return view


FORMS: dict[str, Any] = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "strided": strided,
    "shifted": shifted,
    "reversed": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


def in_form(value: Any, form: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(in_form(x, form) for x in value)
    return form(value) if isinstance(value, np.ndarray) and value.ndim else value


@pytest.mark.parametrize("name", ["mask", "mask-4d", "bias", "bias-f64", "sinks", "slopes-batch", "aux", "aux-half"])
def test_other_strides_and_alignment(name: str) -> None:
    inputs, options = arrays(), DRAWS[name](seeds.generator(4))
    forget()
    first = all_passes(*inputs, options)
    for form in FORMS.values():
        assert all_passes(*inputs, {n: in_form(x, form) for n, x in options.items()}) == first
    for form in FORMS.values():
        assert all_passes(*(form(x) for x in inputs), options) == first
    assert len(dispatch._BOUND) == 1


@pytest.mark.parametrize("option", ["bias", "sinks", "alibi_slopes", "aux"])
def test_other_dtypes_of_one_shape(option: str) -> None:
    """The dtype of an option is read at every call."""
    import ml_dtypes

    inputs, rng = arrays(), seeds.generator(5)
    numbers = rng.integers(-8, 8, (H, SQ, SK) if option == "bias" else H) / 8  # the same in every dtype
    more = {"align": "top_left"} if option == "alibi_slopes" else {"score_mod": add_table} if option == "aux" else {}
    results = set()
    forget()
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.float32):
        x = numbers.astype(dtype)
        value: Any = (x,) if option == "aux" else x
        results.add(na.attention(*inputs, **{option: value}, **more).tobytes())
    assert len(results) == 1 and len(dispatch._BOUND) == 1


def test_other_shapes_of_a_mask_and_a_bias() -> None:
    inputs, rng = arrays(), seeds.generator(6)
    shapes = [(SQ, SK), (1, SK), (SK,), (B, 1, SQ, SK), (B, H, SQ, SK), (1, 1, 1, 1), ()]
    for name in ("mask", "bias"):
        forget()
        for shape in shapes * 2:
            given = random_mask(rng, *shape) if name == "mask" else rng.standard_normal(shape)
            given = np.asarray(given)
            full = np.ascontiguousarray(np.broadcast_to(given, (B, H, SQ, SK)))
            got, want = (na.attention(*inputs, **{name: x}) for x in (given, full))
            assert got.tobytes() == want.tobytes()
        assert len(dispatch._BOUND) == 1


def test_out_of_any_strides() -> None:
    inputs = arrays()
    want = na.attention(*inputs)
    for form in (np.ascontiguousarray, np.asfortranarray, strided, shifted) * 2:
        out = form(np.full(want.shape, np.nan, F4))
        assert na.attention(*inputs, out=out) is out
        np.testing.assert_array_equal(out, want)
    out = np.empty_like(want)
    for name, draw in DRAWS.items():
        options = draw(seeds.generator(7))
        want = na.attention(*inputs, **options)
        np.testing.assert_array_equal(na.attention(*inputs, **options, out=out), want, err_msg=name)


READ_ONLY = np.zeros((B, H, SQ, D), F4)
READ_ONLY.flags.writeable = False

# What is refused for its numbers, though a call of the same kinds was bound before: (good, bad, error, pattern).
BAD: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"scale": 0.5}, {"scale": float("nan")}, ValueError, "scale is nan"),
    ({"scale": 0.5}, {"scale": float("inf")}, ValueError, "scale is inf"),
    ({"scale": 0.5}, {"scale": 1e39}, ValueError, "infinite in float32"),
    ({"scale": np.array(0.5)}, {"scale": np.array([0.5])}, TypeError, "scale is array"),
    ({"softcap": 5.0}, {"softcap": 0.0}, ValueError, "softcap is 0.0"),
    ({"softcap": 5.0}, {"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ({"softcap": 2e38}, {"softcap": 3e38}, ValueError, "softcap is 3e+38"),
    ({"softcap": 5.0}, {"softcap": float("nan")}, ValueError, "softcap is nan"),
    ({"dropout_p": 0.5, "seed": 1}, {"dropout_p": 1.0, "seed": 1}, ValueError, "dropout_p is 1.0"),
    ({"dropout_p": 0.5, "seed": 1}, {"dropout_p": float("nan"), "seed": 1}, ValueError, "dropout_p is nan"),
    ({"dropout_p": 0.5, "seed": 1}, {"dropout_p": 0.5, "seed": -1}, ValueError, "seed is -1"),
    ({"dropout_p": 0.5, "seed": 1}, {"dropout_p": 0.5, "seed": 2**64}, ValueError, "seed is 18446744073709551616"),
    ({"dropout_p": 0.0}, {"dropout_p": 0.5}, ValueError, "seed is None"),
    ({"mask": np.ones((SQ, SK), bool)}, {"mask": np.ones((SQ, SK), np.int8)}, TypeError, "mask has dtype int8"),
    ({"mask": np.ones((SQ, SK), bool)}, {"mask": np.ones((SK, SQ), bool)}, ValueError, "mask has shape"),
    ({"bias": np.ones((SQ, SK))}, {"bias": np.ones((SQ, SK), bool)}, TypeError, "bias has dtype bool"),
    ({"bias": np.ones((SQ, SK))}, {"bias": np.ones((SQ, SK), int)}, TypeError, "bias has dtype int64"),
    ({"bias": np.ones((SQ, SK))}, {"bias": np.ones((SQ, SQ))}, ValueError, "bias has shape"),
    ({"sinks": np.ones(H)}, {"sinks": np.ones(H + 1)}, ValueError, "sinks has shape"),
    ({"sinks": np.ones(H)}, {"sinks": np.ones(H, int)}, TypeError, "sinks has dtype int64"),
    (
        {"alibi_slopes": np.ones(H), "align": 0},
        {"alibi_slopes": np.ones((H, B)), "align": 0},
        ValueError,
        "alibi_slopes has shape",
    ),
    (
        {"score_mod": add_table, "aux": (np.ones(H),)},
        {"score_mod": add_table, "aux": (np.ones(H, complex),)},
        TypeError,
        "aux[0] has dtype complex128",
    ),
    (
        {"score_mod": add_table, "aux": (np.ones(H),)},
        {"score_mod": add_table, "aux": ()},
        TypeError,
        "must take (score, b, h, i, j)",
    ),
    (
        {"score_mod": add_table, "aux": (np.ones(H),)},
        {"score_mod": far, "aux": (np.ones(H),)},
        TypeError,
        "the function must take",
    ),
    ({"aux": ()}, {"aux": (np.ones(H),)}, ValueError, "aux is given, but score_mod is not"),
    ({"causal": True, "align": 3}, {"causal": True, "align": 2**61}, ValueError, "beyond +-2**60"),
    (
        {"causal": True, "align": np.zeros(B, int)},
        {"causal": True, "align": np.zeros(B + 1, int)},
        ValueError,
        "align has shape",
    ),
    ({"mask": na.lengths([3, SK])}, {"mask": na.lengths([3, SK + 1])}, ValueError, "kv_lengths holds 14"),
    ({"mask": na.lengths([3, SK])}, {"mask": na.lengths([3])}, ValueError, "kv_lengths has shape"),
    ({"mask": na.varlen([0, SQ], [0, SK])}, {"mask": na.varlen([0, SQ + 1], [0, SK])}, ValueError, "cu_q ends at 10"),
    ({"mask": na.lengths([3, 4])}, {"mask": na.causal()}, ValueError, "align is None"),
    (
        {"mask": na.causal(), "align": "top_left"},
        {"mask": na.lengths([3, 4]), "align": "top_left"},
        ValueError,
        "nothing uses it",
    ),
    ({"out": np.zeros((B, H, SQ, D), F4)}, {"out": READ_ONLY}, ValueError, "out is read-only"),
    ({"out": np.zeros((B, H, SQ, D), F4)}, {"out": np.zeros((B, H, SQ, D))}, TypeError, "out has dtype float64"),
    ({"out": np.zeros((B, H, SQ, D), F4)}, {"out": np.zeros((B, H, SQ, D + 1), F4)}, ValueError, "out has shape"),
    (
        {"out": np.zeros((B, H, SQ, D), F4)},
        {"out": np.lib.stride_tricks.as_strided(np.zeros(D, F4), (B, H, SQ, D), (0, 0, 0, 4))},
        ValueError,
        "two of its elements share memory",
    ),
]


@pytest.mark.parametrize(("good", "bad", "error", "pattern"), BAD, ids=[f"{n}-{row[3]}" for n, row in enumerate(BAD)])
def test_a_bad_number_is_refused_at_every_call(good: Any, bad: Any, error: Any, pattern: str) -> None:
    inputs = arrays()
    assert plan.kinds(*inputs, good) == plan.kinds(*inputs, bad) is not None, "one binding serves both"
    forget()
    want = na.attention(*inputs, **good).tobytes()
    passes: list[Any] = [lambda **o: na.attention(*inputs, **o), lambda **o: na.attention_vjp(*inputs, **o)]
    if "out" not in good:
        passes.append(lambda **o: na.attention_jvp(*inputs, inputs[0], None, None, **o))
    for _ in range(2):
        for call in passes:
            with pytest.raises(error, match=re.escape(pattern)):
                call(**bad)
        assert na.attention(*inputs, **good).tobytes() == want
    forget()
    for call in passes:  # and as the first call of its kinds
        with pytest.raises(error, match=re.escape(pattern)):
            call(**bad)


def test_out_that_overlaps_an_input_is_refused_at_every_call() -> None:
    q, k, v = arrays()
    both = np.zeros((2, *q.shape), F4)
    both[0] = q
    bias, mask = np.zeros((B, H, SQ, SK), F4), np.ones((SQ, SK), bool)
    for options in ({}, {"bias": bias}, {"mask": mask}):
        for _ in range(2):
            na.attention(both[0], k, v, out=both[1], **options)
            with pytest.raises(ValueError, match="out shares memory with q"):
                na.attention(both[0], k, v, out=both[0], **options)
    shared = np.zeros((B, H, SQ, SK), F4)
    for _ in range(2):
        na.attention(q, k, v, bias=bias, out=np.empty_like(q))
        with pytest.raises(ValueError, match="out shares memory with bias"):
            na.attention(q, k, v, bias=shared, out=shared.reshape(-1)[: q.size].reshape(q.shape))


def test_settings_are_told_apart_by_type() -> None:
    """True == 1 == 1.0, but causal=1 is an error after causal=True, and a window of floats after one of ints."""
    q = arrays()[0]
    na.attention(q, q, q, causal=True)
    for causal in (1, 1.0, np.int64(1)):
        with pytest.raises(TypeError, match="causal"):
            na.attention(q, q, q, causal=causal)
    want = na.attention(q, q, q, window=(2, 0))
    with pytest.raises(TypeError, match="window"):
        na.attention(q, q, q, window=(2.0, 0))
    for window in ((np.int64(2), np.int8(0)), [2, 0]):
        assert na.attention(q, q, q, window=window).tobytes() == want.tobytes()
    assert na.attention(q, q, q, window=(np.int64(3), np.int8(0))).tobytes() != want.tobytes()


def test_a_captured_array_is_found_though_the_function_passed_before() -> None:
    """What a function captures is looked at in every call."""
    inputs = arrays()
    factor: Any = 2.0

    def scaled(s, b, h, i, j):
        return s * factor

    want = na.attention(*inputs, score_mod=scaled)
    factor = np.ones(3)
    for _ in range(2):
        with pytest.raises(TypeError, match="the function reads the array 'factor'"):
            na.attention(*inputs, score_mod=scaled)
    factor = 3.0
    assert na.attention(*inputs, score_mod=scaled).tobytes() != want.tobytes()
    factor = 2.0
    assert na.attention(*inputs, score_mod=scaled).tobytes() == want.tobytes()


settings = types.ModuleType("settings")
settings.inside = types.ModuleType("inside")  # type: ignore[attr-defined]


def test_numbers_of_a_module_are_looked_up_in_every_call() -> None:
    q, k, v = arrays(dtype=np.float64)
    inside = settings.inside

    def scaled(s, b, h, i, j):
        return s * settings.factor + settings.inside.shift

    def near(b, h, i, j):
        return i + inside.shift > j

    for settings.factor, inside.shift in ((1.0, 0), (2.0, 0), (2.0, 3), (2, 3), (1.0, 0)):  # type: ignore[attr-defined]
        for options in ({"score_mod": scaled}, {"mask": na.mask_mod(near)}):
            got, want = (fn(q, k, v, **options) for fn in (na.attention, na.reference.attention))
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_an_array_is_found_in_a_module_and_in_a_tuple() -> None:
    inputs = arrays()
    settings.table = np.ones(SK)  # type: ignore[attr-defined]
    pair = 1.0, (settings.table,)

    def of_module(s, b, h, i, j):
        return s + settings.table[j]

    def of_tuple(s, b, h, i, j):
        return s + pair[1][0][j]

    for fn, name in ((of_module, "settings.table"), (of_tuple, "pair[1][0]")):
        with pytest.raises(TypeError, match=re.escape(f"the function reads the array '{name}'")):
            na.attention(*inputs, score_mod=fn)


shape = np.ones(3)


def test_an_attribute_with_the_name_of_a_global_array() -> None:
    """It is not the global that the function reads."""
    q, k, v = arrays(dtype=np.float64)
    options: Any = {"score_mod": lambda s, b, h, i, j, table: s * table.shape[0], "aux": (np.ones(3),)}
    got, want = (fn(q, k, v, **options) for fn in (na.attention, na.reference.attention))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_equal_tuples_make_one_function() -> None:
    def scaled(numbers):
        return lambda s, b, h, i, j: s * numbers[0]

    one, same, other = (identity(scaled((x, 1))) for x in (2.0, 2.0, 3.0))
    assert one == same != other
    assert identity(scaled((True, 1))) != identity(scaled((1, 1))) != identity(scaled((1.0, 1)))


def test_an_array_in_a_gradient_of_the_users_is_found_in_every_call() -> None:
    inputs = arrays()
    slope: Any = 2.0

    def grad(s, b, h, i, j):
        return slope

    doubled = na.score_mod(lambda s, b, h, i, j: 2 * s, grad)
    na.attention_vjp(*inputs, score_mod=doubled)
    slope = np.full(3, 2.0)
    for _ in range(2):
        with pytest.raises(TypeError, match="grad: the function reads the array 'slope'"):
            na.attention_vjp(*inputs, score_mod=doubled)


@pytest.mark.parametrize(("name", "pattern"), [("sinks", "(Hq,)"), ("alibi_slopes", "(Hq,)")])
def test_an_array_without_axes_is_not_one_of_a_head(name: str, pattern: str) -> None:
    q = arrays()[0][:, :1]
    options: Any = {name: np.ones(1, F4)}
    na.attention(q, q, q, **options)
    with pytest.raises(ValueError, match=re.escape(f"{name} has shape (); it takes ") + ".*" + re.escape(pattern)):
        na.attention(q, q, q, **{name: np.array(1, F4)})


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and even(n - 1)


def test_functions_that_call_each_other_are_recognised() -> None:
    """The reference runs them in Python; a name for them must not recurse without end."""
    q, k, v = arrays(dtype=np.float64)
    mask = na.mask_mod(lambda b, h, i, j: even(j % 5))
    assert na.reference.attention(q, k, v, mask=mask).shape == q.shape


@pytest.mark.parametrize("layout", ["bshd", "shd", "sd"])
def test_layouts(layout: str) -> None:
    rng = seeds.generator(8)
    n = len(layout)
    q, k, v = (rng.standard_normal((1, SQ, 1, D)[-2:] if n == 2 else (1, SQ, H, D)[4 - n :]) for _ in range(3))
    if n == 2:
        q, k, v = (rng.standard_normal((SQ, D)) for _ in range(3))
    for _ in range(3):
        bias = rng.standard_normal((SQ, SQ))
        got = na.attention(q, k, v, bias=bias, layout=layout, return_lse=True)
        want = na.reference.attention(q, k, v, bias=bias, layout=layout, return_lse=True)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_a_length_that_grows_by_one() -> None:
    """Decoding: keys grow by their shape, by lengths in a buffer, and by the offset of the query."""
    rng = seeds.generator(9)
    q = rng.standard_normal((B, H, 1, D))
    k, v = rng.standard_normal((2, B, 2, SK, D))
    for n in (*range(1, SK + 1), *range(SK, 0, -1)):
        want = na.reference.attention(q, k[:, :, :n], v[:, :, :n])
        for got in (
            na.attention(q, k[:, :, :n], v[:, :, :n]),
            na.attention(q, k, v, mask=na.lengths(np.full(B, n))),
            na.attention(q, k, v, causal=True, align=n - 1),
        ):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_threads_with_calls_alike() -> None:
    """Eight threads share bindings, each with numbers of its own."""
    names = ["scale", "mask", "bias", "sinks", "aux", "dropout", "lengths", "align", "everything"]
    work = []
    for n in range(8):
        rng = seeds.generator((10, n))
        inputs = arrays(n)
        work.append([(inputs, options, all_passes(*inputs, options)) for options in (DRAWS[m](rng) for m in names)])
    forget()
    start = Barrier(8)

    def run(n: int) -> int:
        start.wait()
        wrong = 0
        for _ in range(5):
            for inputs, options, want in work[n]:
                wrong += all_passes(*inputs, options) != want
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(run, range(8))) == 0


def test_nothing_that_a_caller_gave_is_kept() -> None:
    """The arrays of a call die with the caller's references."""
    for name, draw in DRAWS.items():
        inputs, options = arrays(), draw(seeds.generator(11))
        all_passes(*inputs, options)
        held = [*inputs, *(x for x in options.values() if isinstance(x, (np.ndarray, na.Mask)))]
        held += [*options.get("aux", ())]
        watched = [weakref.ref(x) for x in held]
        del inputs, options, held
        gc.collect()
        assert not any(ref() is not None for ref in watched), name


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever new sizes, numbers, masks and settings leave no more behind than the caches may hold."""
    monkeypatch.setattr(dispatch, "_MOST_BOUND", 40)
    forget()

    def calls(first: int, n: int) -> None:
        for x in range(first, first + n):
            q = np.ones((1, 1, 1 + x % 50, 4), F4)
            k = np.ones((1, 1, 1 + x % 71, 4), F4)
            for options in (
                {"scale": 1.0 + x},
                {"causal": True, "align": x},
                {"causal": True, "align": "top_left"},
                {"window": (x, None), "align": x},
                {"mask": na.lengths([x % k.shape[2]])},
                {"dropout_p": 0.5, "seed": x},
                {"bias": np.zeros(k.shape[2], F4)},
            ):
                na.attention(q, k, k, **options)
                assert len(dispatch._BOUND) <= 40
        q = np.ones((1, 1, 3000, 4), F4)
        for x in range(first, first + n // 100):  # tables of many sequences are not kept
            cu = np.sort(np.r_[0, seeds.generator(x).integers(0, 3001, 2000), 3000])
            na.attention(q, q, q, mask=na.varlen(cu, cu))

    calls(0, 1200)  # fills what is bounded
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    calls(1200, 1200)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 3e6, f"{grown / 1e6:.1f} MB more after as many calls again"  # 512 schedules change places
    assert len(plan._LOWERED) == 0, "masks that are gone"


def test_a_mask_is_lowered_once_for_calls_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, count = arrays(), 0
    lower = plan.lower

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return lower(*args)

    monkeypatch.setattr(plan, "lower", counted)
    mask = na.lengths([3, 5])
    first = na.attention(*inputs, mask=mask)
    for _ in range(3):
        assert na.attention(*inputs, mask=mask).tobytes() == first.tobytes()
    assert count == 1
    # Another align, other settings, another shape: lowered anew, and right.
    for options in ({"causal": True, "align": 1}, {"causal": True, "align": 4}, {"window": (2, 0), "align": 4}, {}):
        got, want = (fn(*inputs, mask=mask, **options) for fn in (na.attention, na.reference.attention))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_no_pass_reads_the_options_beside_the_binding() -> None:
    """All public functions of arrays in host memory go through `dispatch.bind`."""
    from numba_attn import api

    for fn in (na.attention, na.attention_vjp, na.attention_backward, na.attention_jvp):
        assert "dispatch.bind(" in inspect.getsource(fn)
    assert "plan.resolve(" not in inspect.getsource(api)
