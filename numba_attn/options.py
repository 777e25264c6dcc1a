"""The options of attention, written once: name, type, default and meaning.

The public functions take them as `**options: Unpack[...]`, so that an editor and a type checker know each keyword; the
decorator `documented` writes each into the signature and the docstring that `inspect`, `help` and a notebook show. The
reference and `plan.resolve` take the same record.
"""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypedDict, TypeVar, get_type_hints

import numpy as np

from .arrays import Array
from .mask import Mask
from .userfn.accepted import ScoreMod


class ArrayLike(Protocol):
    """An array of NumPy, or one on a GPU of any library with DLPack or __cuda_array_interface__."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=ArrayLike)

Layout = Literal["bhsd", "bshd", "hsd", "shd", "sd"]
Backend = Literal["auto", "cpu", "cuda"]
Precision = Literal["ieee", "tf32"]
Window = tuple[int | None, int | None]
Align = Literal["bottom_right", "top_left"] | int | Array
Function = Callable[..., Any]


class Option(NamedTuple):
    """The default of a keyword, its type in words, and its meaning."""

    default: Any
    takes: str  # the type, in words
    meaning: str


class Options(TypedDict, total=False):
    """What attention is: the keywords of every call, of the reference and of `plan.resolve`."""

    causal: Annotated[bool, Option(False, "bool", "Key j is visible to query i iff j <= i + offset (see align).")]
    window: Annotated[
        Window | None,
        Option(
            None,
            "(left, right) or None",
            "Visible iff i + offset - left <= j <= i + offset + right, inclusive; None on a side leaves it open. "
            "Hugging Face's sliding_window=w is (w - 1, 0).",
        ),
    ]
    align: Annotated[
        Align | None,
        Option(
            None,
            '"bottom_right", "top_left", int or (B,) ints',
            "offset, the position of query 0 among the keys: Sk - Sq (a KV cache), 0, or the number itself. It may be "
            "left out only where both names agree, Sq == Sk.",
        ),
    ]
    mask: Annotated[
        ArrayLike | Mask | None,
        Option(
            None,
            "bool ndarray or Mask",
            "True = attend, of shape (B, Hq, Sq, Sk) or broadcastable to it, never materialised; or a `Mask`: causal, "
            "window, lengths, varlen, segments, prefix, intervals, mask_mod, combined with `&`. causal, window and "
            "mask intersect. Cost follows the visible pairs.",
        ),
    ]
    bias: Annotated[
        ArrayLike | None,
        Option(
            None,
            "ndarray",
            "Added to the scaled score, shaped like mask, any of the float dtypes. -inf hides the pair.",
        ),
    ]
    scale: Annotated[float | None, Option(None, "float", "1 / sqrt(Dk) if left out; any finite number.")]
    softcap: Annotated[
        float | None, Option(None, "float > 0", "Scores become softcap * tanh(score / softcap), before bias.")
    ]
    alibi_slopes: Annotated[
        ArrayLike | None,
        Option(None, "(Hq,) or (B, Hq) float ndarray", "-slope * abs(i + offset - j) is added (Press et al. 2022)."),
    ]
    sinks: Annotated[
        ArrayLike | None,
        Option(
            None,
            "(Hq,) float ndarray",
            "One more logit a head that joins the softmax denominator without a value.",
        ),
    ]
    score_mod: Annotated[
        Function | ScoreMod | None,
        Option(
            None,
            "function",
            "``fn(score, b, h, i, j, *aux)`` -> score, of scalars: a plain Python function, compiled once and run "
            "inside the kernel; it may hide a pair by returning -inf. Indices are array indices. math.exp, tanh, ... "
            "and numba_attn.where are vectorised.",
        ),
    ]
    aux: Annotated[tuple[ArrayLike, ...], Option((), "tuple of ndarray", "Arrays that score_mod reads.")]
    dropout_p: Annotated[
        float,
        Option(
            0.0,
            "float in [0, 1)",
            "Dropout of the weights, Philox4x32-10 on (seed, b, h, i, j): the same for every thread count and tile "
            "size.",
        ),
    ]
    seed: Annotated[int | None, Option(None, "int in [0, 2**64)", "Of the dropout; required where dropout_p > 0.")]
    layout: Annotated[
        Layout,
        Option(
            "bhsd",
            '"bhsd", "bshd", "hsd", "shd" or "sd"',
            "Order of the axes batch, heads, sequence, head size.",
        ),
    ]


class HostOptions(Options, total=False):
    """The keywords of a call that only a CPU computes."""

    backend: Annotated[
        Backend,
        Option(
            "auto",
            '"auto", "cpu" or "cuda"',
            '"auto" computes where the arrays are; "cuda" copies NumPy arrays to the GPU and the results back.',
        ),
    ]


class CallOptions(HostOptions, total=False):
    """The keywords of a call that a CPU or a GPU computes."""

    stream: Annotated[
        object,
        Option(
            None,
            "None, int or stream",
            "For a GPU: the CUDA stream to compute on, a CUstream handle or an object of torch, CuPy, Numba or "
            "cuda.core; the current one of torch or CuPy for their arrays, else the default stream, if left out.",
        ),
    ]
    precision: Annotated[
        Precision,
        Option(
            "ieee",
            '"ieee" or "tf32"',
            'Of the products. "ieee": fused multiply-adds in the accumulation type; halves by tensor cores on a GPU. '
            '"tf32", on a GPU, for float32: tensor cores, which round their operands to 10 bits of mantissa, '
            "float16's, and keep float32's range and sums; the forward pass of few queries (Sq * Hq / Hkv <= 16) is "
            "computed in float32 all the same, since reading the keys is what takes time.",
        ),
    ]
    tf32: Annotated[bool | None, Option(None, "bool", 'Deprecated: True is precision="tf32".')]


class ForwardOptions(CallOptions, total=False):
    """The keywords of a call that makes out."""

    out: Annotated[
        ArrayLike | None,
        Option(
            None,
            "ndarray",
            "Where to write the result: q's dtype, the result's shape, any strides. Returned itself.",
        ),
    ]


def options_of(record: type) -> dict[str, Option]:
    """Each keyword of a record, in the order in which they are written."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(record, include_extras=True).items()}


DEFAULTS: dict[str, Any] = {name: option.default for name, option in options_of(Options).items()}
NAMES = frozenset(DEFAULTS)

Fn = TypeVar("Fn", bound=Callable[..., Any])


def documented(record: type) -> Callable[[Fn], Fn]:
    """A decorator for a function that takes `**options: Unpack[record]`: each keyword stands in its signature, and in
    its docstring in the place of a line "{options}"."""
    options = options_of(record)
    hints = get_type_hints(record)

    def decorate(fn: Fn) -> Fn:
        signature = inspect.signature(fn)
        parameters = list(signature.parameters.values())
        assert parameters.pop().kind is inspect.Parameter.VAR_KEYWORD
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[name])
            for name, option in options.items()
        ]
        fn.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        if fn.__doc__:  # python -OO has none
            lines = [line for name, option in options.items() for line in _paragraph(name, option)]
            fn.__doc__ = inspect.cleandoc(fn.__doc__).replace("{options}", "\n".join(lines))
        fn.__dict__["_keywords"] = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        return fn

    return decorate


def _paragraph(name: str, option: Option) -> list[str]:
    return [f"{name} : {option.takes}", *("    " + line for line in textwrap.wrap(option.meaning, 112))]


def check_names(options: Mapping[str, Any], fn: Any) -> None:
    """Raise TypeError, as Python does, for a keyword that a documented function does not take."""
    known = fn._keywords
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{fn.__name__}() got an unexpected keyword argument {name!r}.{hint}")


def precision_of(options: Mapping[str, Any], stacklevel: int) -> Precision:
    """The precision that a call asks for, by this name or by the deprecated tf32.

    Raises
    ------
    TypeError, ValueError
        For another value, and where the two names say different things.
    """
    precision = options.get("precision", "ieee")
    if not isinstance(precision, str) or precision not in ("ieee", "tf32"):
        raise (ValueError if isinstance(precision, str) else TypeError)(
            f"precision is {precision!r}; it takes 'ieee' or 'tf32'"
        )
    tf32 = options.get("tf32")
    if tf32 is None:
        return precision  # type: ignore[return-value]  # one of the two
    if not isinstance(tf32, (bool, np.bool_)):
        raise TypeError(f"tf32 is {tf32!r}; it takes a bool")
    warnings.warn("tf32= is deprecated: pass precision='tf32'", DeprecationWarning, stacklevel=stacklevel)
    if not tf32 and precision == "tf32":
        raise ValueError("precision is 'tf32' and tf32 is False; pass precision= alone")
    return "tf32" if tf32 else "ieee"
