"""What a type checker sees of the public functions. `mypy` reads this file in CI; nothing runs it."""

from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import numba_attn as na

Floats = npt.NDArray[np.float32]


def forward(q: Floats, k: Floats, v: Floats, flag: bool) -> None:
    assert_type(na.attention(q, k, v), Floats)
    assert_type(na.attention(q, k, v, causal=True, align="top_left"), Floats)
    assert_type(na.attention(q, k, v, return_lse=True), tuple[Floats, Floats])
    assert_type(na.attention(q, k, v, return_lse=flag), Floats | tuple[Floats, Floats])
    na.attention(q, k, v, layout="bdsh")  # type: ignore[call-overload]
    na.attention(q, k, v, causla=True)  # type: ignore[call-overload]
    na.attention(q, k, v, precision="half")  # type: ignore[call-overload]


def gradients(q: Floats, k: Floats, v: Floats) -> None:
    out, pullback = na.attention_vjp(q, k, v, mask=na.causal() & na.lengths([3]), aux_grad=(0,))
    assert_type(out, Floats)
    assert_type(pullback, na.Pullback[Floats])
    grads = pullback(out)
    assert_type(grads, na.Gradients[Floats])
    assert_type(grads.dq, Floats)
    assert_type(grads.dbias, Floats | None)
    (out, lse), _ = na.attention_vjp(q, k, v, return_lse=True)
    assert_type(na.attention_backward(out, q, k, v, out, lse, softcap=3.0), na.Gradients[Floats])


def tangents(q: Floats, k: Floats, v: Floats) -> None:
    assert_type(na.attention_jvp(q, k, v, q, None, None), tuple[Floats, Floats])
    both = na.attention_jvp(q, k, v, q, None, None, return_lse=True)
    assert_type(both, tuple[tuple[Floats, Floats], tuple[Floats, Floats]])


def other_libraries(q: Any) -> None:
    """An array of any library with a shape and a dtype, on a GPU."""

    class Tensor:
        shape: tuple[int, ...] = ()
        dtype: str = ""

    tensor = Tensor()
    assert_type(na.attention(tensor, tensor, tensor, backend="auto"), Tensor)
