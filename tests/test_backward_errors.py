"""What attention_backward, attention_vjp and its pullback refuse, and what they leave as it was."""

import math
from typing import Any

import numpy as np
import pytest
from cases import (
    BY_NAME,
    build,
    two_tables,
)
from test_backward import cotangents, entries, same

import numba_attn as na

# ruff: noqa: E501  # a row of a table is one line

F4 = np.float32
GOOD_Q, GOOD_K, GOOD_V = (np.ones(shape, F4) for shape in ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 6)))
GOOD = {"dout": np.ones((2, 4, 5, 6), F4), "q": GOOD_Q, "k": GOOD_K, "v": GOOD_V}
GOOD |= {"out": np.ones((2, 4, 5, 6), F4), "lse": np.ones((2, 4, 5), F4), "dlse": np.ones((2, 4, 5), F4)}
TABLES = {"score_mod": two_tables, "aux": (np.ones((2, 5)), np.ones(7))}
MIXED = {"score_mod": two_tables, "aux": (np.ones((2, 5)), np.ones(7, int))}

BAD = [
    ("dout's dtype", {"dout": np.ones((2, 4, 5, 6))}, TypeError, r"^dout has dtype float64.*q's, float32.*astype"),
    ("dout half", {"dout": np.ones((2, 4, 5, 6), np.float16)}, TypeError, r"^dout has dtype float16.*q's, float32"),
    ("dout integer", {"dout": np.ones((2, 4, 5, 6), int)}, TypeError, r"^dout has dtype int64"),
    ("dout complex", {"dout": np.ones((2, 4, 5, 6), "c8")}, TypeError, r"^dout has dtype complex64"),
    ("dout big-endian", {"dout": np.ones((2, 4, 5, 6), ">f4")}, TypeError, r"^dout has dtype >f4.*byte"),
    ("dout list", {"dout": [[1.0]]}, TypeError, r"^dout is a list.*NumPy array"),
    ("dout none", {"dout": None}, TypeError, r"^dout is None.*NumPy array"),
    ("dout number", {"dout": 1.0}, TypeError, r"^dout is a float.*NumPy array"),
    ("dout masked", {"dout": np.ma.masked_array(GOOD["dout"])}, TypeError, r"^dout is a masked array"),
    ("dout's shape", {"dout": np.ones((2, 4, 5, 3), F4)}, ValueError, r"^dout has shape \(2, 4, 5, 3\).*\(2, 4, 5, 6\)"),
    ("dout to be broadcast", {"dout": np.ones((5, 6), F4)}, ValueError, r"^dout has shape \(5, 6\).*\(2, 4, 5, 6\)"),
    ("dout's layout", {"dout": np.ones((2, 5, 4, 6), F4)}, ValueError, r"^dout has shape .*layout='bhsd'"),
    ("dout is out and lse", {"dout": (GOOD["out"], GOOD["lse"])}, TypeError, r"^dout is a tuple.*NumPy array"),
    ("dlse's shape", {"dlse": np.ones((2, 4, 5, 1), F4)}, ValueError, r"^dlse has shape \(2, 4, 5, 1\).*\(2, 4, 5\)"),
    ("dlse's type", {"dlse": 0.0}, TypeError, r"^dlse is a float.*NumPy array"),
    ("dlse integer", {"dlse": np.ones((2, 4, 5), int)}, TypeError, r"^dlse has dtype int64"),
    ("dlse of axes", {"dlse": np.ones((2, 5, 4), F4)}, ValueError, r"^dlse has shape \(2, 5, 4\).*lse's in layout"),
    ("aux_grad int", TABLES | {"aux_grad": 0}, TypeError, r"^aux_grad is 0; .*tuple of positions in aux, \(0,\)"),
    ("aux_grad True", TABLES | {"aux_grad": True}, TypeError, r"^aux_grad is True.*tuple of positions"),
    ("aux_grad bools", TABLES | {"aux_grad": (True, False)}, TypeError, r"^aux_grad is \(True, False\).*positions"),
    ("aux_grad text", TABLES | {"aux_grad": "all"}, TypeError, r"^aux_grad is 'all'.*positions"),
    ("aux_grad array", TABLES | {"aux_grad": np.array([0])}, TypeError, r"^aux_grad is array.*positions"),
    ("aux_grad none", TABLES | {"aux_grad": None}, TypeError, r"^aux_grad is None.*positions"),
    ("aux_grad beyond", TABLES | {"aux_grad": (2,)}, ValueError, r"^aux_grad names position 2; aux has 2 arrays"),
    ("aux_grad negative", TABLES | {"aux_grad": (-1,)}, ValueError, r"^aux_grad names position -1; aux has 2"),
    ("aux_grad of integers", MIXED | {"aux_grad": (1,)}, TypeError, r"^aux_grad names position 1.*int64.*floats"),
    ("aux_grad without aux", {"aux_grad": (0,)}, ValueError, r"^aux_grad names position 0; aux has 0 arrays"),
    ("backend", {"backend": "gpu"}, ValueError, r"^backend is 'gpu'; it takes 'auto', 'cpu' or 'cuda'"),
    ("backend none", {"backend": None}, ValueError, r"^backend is None"),
    ("q", {"q": [1.0]}, TypeError, r"^q is a list.*NumPy array"),
    ("k's dtype", {"k": np.ones((2, 2, 7, 3))}, TypeError, r"^q, k and v have dtypes"),
    ("align", {"causal": True}, ValueError, r"(?s)^align is None, but causal.*'bottom_right'.*'top_left'"),
    ("mask", {"mask": np.ones((5, 7), int)}, TypeError, r"^mask has dtype int64.*bool"),
    ("scale", {"scale": math.nan}, ValueError, r"^scale is nan"),
    ("seed", {"dropout_p": 0.5}, ValueError, r"seed"),
    ("layout", {"layout": "bhds"}, ValueError, r"^layout is 'bhds'"),
]  # fmt: skip
BAD_RESULTS = [
    ("out's dtype", {"out": np.ones((2, 4, 5, 6))}, TypeError, r"^out has dtype float64; it takes float32.*return_lse=True"),
    ("out's shape", {"out": np.ones((2, 4, 5, 3), F4)}, ValueError, r"^out has shape \(2, 4, 5, 3\).*\(2, 4, 5, 6\)"),
    ("out list", {"out": [1.0]}, TypeError, r"^out is a list.*NumPy array"),
    ("out none", {"out": None}, TypeError, r"^out is None.*NumPy array"),
    ("lse's dtype", {"lse": np.ones((2, 4, 5))}, TypeError, r"^lse has dtype float64; it takes float32"),
    ("lse in q's dtype", {n: x.astype(np.float16) for n, x in GOOD.items()}, TypeError, r"^lse has dtype float16.*float32"),
    ("lse in float32", {n: x.astype(float) for n, x in GOOD.items() if n != "lse"}, TypeError, r"^lse .*float32.*float64"),
    ("lse's shape", {"lse": np.ones((2, 4, 5, 1), F4)}, ValueError, r"^lse has shape \(2, 4, 5, 1\).*\(2, 4, 5\)"),
    ("out and lse swapped", {"out": GOOD["lse"], "lse": GOOD["out"]}, ValueError, r"^out has shape \(2, 4, 5\)"),
]  # fmt: skip


def named(row: Any) -> Any:
    return pytest.param(*row[1:], id=row[0])


def refused(call: Any, arrays: list[Any], error: type[Exception], message: str) -> None:
    """The call raises, and every array is as it was."""
    arrays = [x for x in arrays if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in arrays]
    with pytest.raises(error, match=message):
        call()
    assert [x.tobytes() for x in arrays] == before


@pytest.mark.parametrize(("wrong", "error", "message"), [named(row) for row in BAD + BAD_RESULTS])
def test_attention_backward_refuses(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    given_ = GOOD | wrong
    positional = [given_.pop(name) for name in ("dout", "q", "k", "v", "out", "lse")]
    refused(lambda: na.attention_backward(*positional, **given_), [*positional, given_["dlse"]], error, message)


@pytest.mark.parametrize(("wrong", "error", "message"), [named(row) for row in BAD])
def test_attention_vjp_or_its_pullback_refuses(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    """What the forward pass can know is refused before it runs; the rest by the pullback."""
    given_ = GOOD | wrong
    dout, dlse, *arrays = (given_.pop(name) for name in ("dout", "dlse", "q", "k", "v"))
    for name in ("out", "lse"):
        del given_[name]
    if wrong.keys() <= {"dout", "dlse"}:
        _, pullback = na.attention_vjp(*arrays, **given_)
        refused(lambda: pullback(dout, dlse), [dout, dlse, *arrays], error, message)
        assert pullback(GOOD["dout"]).dq.shape == (2, 4, 5, 3)  # and goes on
    else:
        out = np.full((2, 4, 5, 6), 7, F4)
        refused(lambda: na.attention_vjp(*arrays, **given_, out=out), [*arrays, out], error, message)


def test_no_argument_is_written_to() -> None:
    """Read-only views of everything, and what they view is as it was."""
    arrays, options = build(BY_NAME["everything"])
    dout, dlse = cotangents(arrays[0], arrays[2])
    everything_given = [
        *arrays,
        dout,
        dlse,
        options["bias"],
        options["sinks"],
        options["alibi_slopes"],
        options["aux"][0],
    ]
    for x in everything_given:
        x.flags.writeable = False
    before = [x.tobytes() for x in everything_given]
    (out, lse), pullback = na.attention_vjp(*arrays, **options, aux_grad=(0,), return_lse=True)
    grads = pullback(dout, dlse)
    out.flags.writeable = lse.flags.writeable = False
    same(na.attention_backward(dout, *arrays, out, lse, dlse=dlse, **options, aux_grad=(0,)), grads)
    assert [x.tobytes() for x in everything_given] == before
    for name, x in entries(grads):
        assert not any(np.shares_memory(x, y) for y in everything_given), name


def test_the_pullback_keeps_its_own_out_and_lse() -> None:
    """What the caller does to the results in between changes nothing; and two pullbacks don't mix."""
    arrays, options = build(BY_NAME["layout-bshd"])
    dout, dlse = cotangents(arrays[0], arrays[2])
    want = na.attention_vjp(*arrays, **options)[1](dout, dlse)
    place = np.empty_like(dout)
    for out in (None, place):
        (got, lse), pullback = na.attention_vjp(*arrays, **options, out=out, return_lse=True)
        got += 1
        lse[...] = np.nan
        na.attention_vjp(*(2 * x for x in arrays), **options)[1](dout, dlse)
        first_ = pullback(dout, dlse)
        same(first_, want)
        first_.dq[...] = np.nan
        same(pullback(dout, dlse), want)
