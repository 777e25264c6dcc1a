"""The options are written once, in options.py: what Python shows of a function is made of that record."""

import inspect
import re

import numpy as np
import pytest
import seeds

import numba_attn as na
from numba_attn import options

Q = np.ones((1, 1, 2, 4))

FUNCTIONS = [
    (na.attention, options.ForwardOptions, ["q", "k", "v"], ["return_lse"]),
    (na.attention_vjp, options.ForwardOptions, ["q", "k", "v"], ["aux_grad", "return_lse"]),
    (
        na.attention_backward,
        options.CallOptions,
        ["dout", "q", "k", "v", "out", "lse"],
        ["dlse", "aux_grad"],
    ),
    (
        na.attention_jvp,
        options.HostOptions,
        ["q", "k", "v", "q_dot", "k_dot", "v_dot"],
        ["bias_dot", "sinks_dot", "alibi_slopes_dot", "aux_dot", "return_lse"],
    ),
    (na.reference.attention, options.Options, ["q", "k", "v"], ["return_lse"]),
    (na.reference.attention_backward, options.Options, ["dout", "q", "k", "v"], ["dlse", "aux_grad"]),
    (
        na.reference.attention_jvp,
        options.Options,
        ["q", "k", "v", "q_dot", "k_dot", "v_dot"],
        ["bias_dot", "sinks_dot", "alibi_slopes_dot", "aux_dot", "return_lse"],
    ),
]
IDS = [f"{fn.__module__}.{fn.__name__}" for fn, *_ in FUNCTIONS]


@pytest.mark.parametrize(("fn", "record", "positional", "own"), FUNCTIONS, ids=IDS)
def test_signature_lists_every_keyword(fn, record, positional, own) -> None:
    parameters = inspect.signature(fn).parameters
    known = options.options_of(record)
    assert [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == [*own, *known]
    for name, option in known.items():
        assert parameters[name].default == option.default
        assert parameters[name].annotation is not inspect.Parameter.empty


@pytest.mark.parametrize(("fn", "record", "positional", "own"), FUNCTIONS, ids=IDS)
def test_help_says_what_each_keyword_means(fn, record, positional, own) -> None:
    text = inspect.getdoc(fn)
    assert "{options}" not in text
    for name, option in options.options_of(record).items():
        assert f"\n{name} : {option.takes}\n    " in text
        assert " ".join(option.meaning.split()) in " ".join(text.split())
    for name in own:
        assert re.search(rf"(^|, ){name}\b.* : |{name}\b", text, re.MULTILINE)


def test_the_record_is_what_resolve_takes() -> None:
    assert list(options.DEFAULTS) == list(options.options_of(options.Options))
    assert options.DEFAULTS.keys() == options.NAMES


def call(fn, **more):
    """A call of any of the functions, with zeros."""
    arguments = {name: Q for name, p in inspect.signature(fn).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    if "lse" in arguments:
        arguments["lse"] = np.zeros((1, 1, 2))
    return fn(**arguments, **more)


@pytest.mark.parametrize(("fn", "record", "positional", "own"), FUNCTIONS, ids=IDS)
def test_unknown_keyword(fn, record, positional, own) -> None:
    with pytest.raises(TypeError, match=rf"{fn.__name__}\(\) got an unexpected keyword argument 'scael'.*'scale'\?"):
        call(fn, scael=1.0)
    missing = [
        n for n in options.options_of(options.ForwardOptions) if n not in {*options.options_of(record), *positional}
    ]
    for name in missing:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            call(fn, **{name: None})


def test_keywords_in_any_order_and_by_position() -> None:
    want = na.attention(Q, Q, Q, causal=True, scale=0.5)
    np.testing.assert_array_equal(na.attention(v=Q, q=Q, scale=0.5, causal=True, k=Q), want)
    with pytest.raises(TypeError, match="positional"):
        na.attention(Q, Q, Q, True)


def test_defaults_given_are_the_same_call() -> None:
    given = {name: o.default for name, o in options.options_of(options.ForwardOptions).items() if name != "tf32"}
    np.testing.assert_array_equal(na.attention(Q, Q, Q, **given), na.attention(Q, Q, Q))


def look_up(s, b, h, i, j, table):
    return s + table[j]


# A call that each option of attention changes. seed and aux have no effect alone.
SETTINGS = {
    "causal": {"causal": True},
    "window": {"window": (1, 0)},
    "align": {"causal": True, "align": -2},
    "mask": {"mask": np.tri(5, dtype=bool)},
    "bias": {"bias": np.arange(5.0)},
    "scale": {"scale": 2.0},
    "softcap": {"softcap": 0.5},
    "alibi_slopes": {"alibi_slopes": np.ones(1)},
    "sinks": {"sinks": np.ones(1)},
    "score_mod": {"score_mod": lambda s, b, h, i, j: s * s},
    "aux": {"score_mod": look_up, "aux": (np.arange(5.0),)},
    "dropout_p": {"dropout_p": 0.5, "seed": 1},
    "seed": {"dropout_p": 0.5, "seed": 2},
    "layout": {"layout": "bshd"},
}


def test_every_option_has_a_setting() -> None:
    assert SETTINGS.keys() == options.NAMES, "SETTINGS of this file needs a call for each option"


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_comes_from_an_earlier_call(name: str) -> None:
    """Launches are kept for calls that are alike: what makes two calls differ has to be part of the key."""
    rng = seeds.generator(5)
    q, k, v, dout = rng.standard_normal((4, 1, 1, 5, 4))
    if name == "layout":
        q, k, v, dout = rng.standard_normal((4, 1, 5, 5, 4))  # as many heads as positions: one shape in both layouts
    for setting in ({}, SETTINGS[name], {}):
        out, pullback = na.attention_vjp(q, k, v, **setting)
        grads, want = pullback(dout), na.reference.attention_backward(dout, q, k, v, **setting)
        np.testing.assert_allclose(na.attention(q, k, v, **setting), out, rtol=0, atol=1e-12)
        np.testing.assert_allclose(out, na.reference.attention(q, k, v, **setting), rtol=0, atol=1e-12)
        for gradient in ("dq", "dk", "dv"):
            np.testing.assert_allclose(
                getattr(grads, gradient), getattr(want, gradient), rtol=0, atol=1e-12, err_msg=gradient
            )


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"precision": "half"}, ValueError, "precision is 'half'; it takes 'ieee' or 'tf32'"),
        ({"precision": None}, TypeError, "precision is None; it takes 'ieee' or 'tf32'"),
        ({"precision": "tf32"}, ValueError, "precision is 'tf32', but the arrays are in host memory"),
        ({"tf32": 1}, TypeError, "tf32 is 1; it takes a bool"),
        ({"stream": 0}, ValueError, "stream is given, but the arrays are in host memory"),
    ],
)
@pytest.mark.parametrize("fn", [na.attention, na.attention_vjp, na.attention_backward], ids=lambda fn: fn.__name__)
def test_precision_errors(fn, more, error, message) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(fn, **more)


@pytest.mark.parametrize("fn", [na.attention, na.attention_vjp, na.attention_backward], ids=lambda fn: fn.__name__)
def test_tf32_is_deprecated(fn) -> None:
    for _ in range(2):  # at every call, and the caller's line is named
        with pytest.warns(DeprecationWarning, match="pass precision='tf32'") as said:
            call(fn, tf32=False)
        assert said[0].filename == __file__
    with (
        pytest.warns(DeprecationWarning, match="pass precision='tf32'"),
        pytest.raises(ValueError, match="precision is 'tf32', but the arrays are in host memory"),
    ):
        call(fn, tf32=True)
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(ValueError, match="precision is 'tf32' and tf32 is False; pass precision= alone"),
    ):
        call(fn, tf32=False, precision="tf32")
