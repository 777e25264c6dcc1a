"""Turns the arguments of a call into a `Problem`, which kernels read. All checks and errors of a call are here.

A call is bound in two steps. `bind` reads the kinds of the arguments alone: the shapes and dtypes of q, k and v, the
settings, and the types of the other options. (`kinds` returns the same facts as a dictionary key.) `bind` returns a
`Plan`, and calls of the same kinds share one. Then `Plan.problem` checks the numbers of one call, at every call. So a
kept plan never holds a number that a caller may change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack
from weakref import WeakKeyDictionary

import numpy as np

from .arrays import Array, accumulation, exact, integer, plain, real
from .mask.constructors import Mask, check_window
from .mask.lowering import ambiguous, lower, unused_align, whole_rows
from .mask.parts import Aligned, Causal, Intervals, Lengths, Pairs, Part, Segments, Varlen, Window
from .mask.shape import OPEN, Align, Shape, bool_pairs, check_align, over_pairs
from .online import LOG2E
from .options import DEFAULTS, Options
from .userfn.accepted import ScoreMod, aux_arrays, check_function

__all__ = ["OPEN", "Plan", "Problem", "bind", "check_out", "in_layout", "kinds", "lse_shape", "output_shape", "resolve"]

# How an array in each layout becomes (B, H, S, D): its number of axes, the number of leading axes that it lacks, and
# whether S comes before H.
_LAYOUTS = {"bhsd": (4, 0, False), "bshd": (4, 0, True), "hsd": (3, 1, False), "shd": (3, 1, True), "sd": (2, 2, False)}
_AXES = {"b": "batch", "h": "heads", "s": "sequence", "d": "head size"}

_MAX_WORK = 10_000_000  # steps of np.shares_memory, about 0.1 s; ordinary strides need fewer than a hundred


class Problem(NamedTuple):
    """A checked call. Every array is a plain NumPy view of the caller's, in (B, H, S, D) order for every layout."""

    q: Array  # (B, Hq, Sq, Dk)
    k: Array  # (B, Hkv, Sk, Dk)
    v: Array  # (B, Hkv, Sk, Dv)
    layout: str
    dtype: np.dtype[Any]
    acc: type  # np.float64 or np.float32: what sums are kept in
    scale: float
    softcap: float  # 0.0 = none
    # Window in keys, counted with i and j from the sequence's start: i + offset - left <= j <= i + offset + right; OPEN
    # = no bound. Causal is right = 0. With has_prefix there is one more: j < prefix or j <= i + offset.
    left: int
    right: int
    has_prefix: bool
    # int64 C (n, 7), columns as mask/shape.py names them. A query that is in no sequence is an empty row.
    sequences: Array
    start: Array | None  # int64 C (1 or B, 1 or Hq, Sq), key array indices: start <= j < end, beside all other bounds
    end: Array | None
    segments: tuple[tuple[Array, Array], ...]  # int64 C (1 or B, Sq) and (1 or B, Sk): equal ids see each other
    masks: tuple[Array, ...]  # bool (B, Hq, Sq, Sk), zero strides where broadcast
    mask_mods: tuple[tuple[Callable[..., Any], tuple[Array, ...]], ...]
    bias: Array | None  # any of the four float dtypes, (B, Hq, Sq, Sk), zero strides where broadcast
    slopes: Array | None  # acc, C (1 or B, Hq)
    sinks: Array | None  # acc, C (Hq,)
    score_mod: Any
    aux: tuple[Array, ...]
    dropout_p: float
    seed: int

    @property
    def batch(self) -> int:
        return int(self.q.shape[0])

    @property
    def q_heads(self) -> int:
        return int(self.q.shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.k.shape[1])

    @property
    def q_len(self) -> int:
        return int(self.q.shape[2])

    @property
    def kv_len(self) -> int:
        return int(self.k.shape[2])

    @property
    def qk_dim(self) -> int:
        return int(self.q.shape[3])

    @property
    def v_dim(self) -> int:
        return int(self.v.shape[3])


_Step = Callable[["Plan", Mapping[str, Any]], dict[str, Any]]


class Plan(NamedTuple):
    """What the kinds of a call's arguments decide. It holds no array of a caller, and no number in which calls of the
    same kinds may differ."""

    shape: Shape
    qk_dim: int
    acc: type
    layout: str
    causal: bool
    window: Window | None
    fields: dict[str, Any]  # all fields of the Problem, in their order; None where each call fills them in
    steps: tuple[_Step, ...]  # each checks some of a call's options and gives fields of the Problem

    def problem(self, q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> Problem:
        """The problem of a call of these kinds.

        Raises
        ------
        TypeError, ValueError
            As `resolve` does, for everything that the kinds do not decide.
        """
        fields, layout = self.fields.copy(), self.layout
        q, k, v = plain(q, "q"), plain(k, "k"), plain(v, "v")
        if layout != "bhsd":
            q, k, v = bhsd_view(q, layout), bhsd_view(k, layout), bhsd_view(v, layout)
        fields["q"], fields["k"], fields["v"] = q, k, v
        for step in self.steps:
            fields.update(step(self, options))
        return Problem._make(fields.values())

    @property
    def decides_sequences(self) -> bool:
        """Whether the kinds alone decide the bounds of the mask."""
        return _bounds not in self.steps


def kinds(q: Array, k: Array, v: Array, options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """A dictionary key that is equal for two calls if one plan serves both. None if a setting cannot be a key."""
    key: tuple[Any, ...] = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype)
    for name, x in options.items():
        if name in _FILLED_IN or (name == "align" and type(x) is not str):
            key = (*key, name, type(x))
        else:
            longer = exact((*key, name), (x,))
            if longer is None:
                return None
            key = longer
    return key


def resolve(q: Any, k: Any, v: Any, **options: Unpack[Options]) -> Problem:
    """Check the arguments of `attention`, and return what they mean.

    Raises
    ------
    TypeError, ValueError
        For every argument that `attention` does not accept. The text names it, what was given and what is accepted.
    """
    return bind(q, k, v, options).problem(q, k, v, options)


def bind(q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> Plan:
    """Check what the kinds of a call decide, and return its plan. The numbers that each call fills in are not read.

    Raises
    ------
    TypeError, ValueError
        As `resolve` does, for everything that the kinds decide.
    """
    layout = options.get("layout", DEFAULTS["layout"])
    q, k, v, dtype, acc = _checked_arrays(q, k, v, layout)
    batch, q_heads, q_len, qk_dim = q.shape
    plan = Plan(
        shape=Shape(batch, q_heads, q_len, k.shape[2], _LAYOUTS[layout][1]),
        qk_dim=qk_dim,
        acc=acc,
        layout=layout,
        causal=_causal(options.get("causal", False)),
        window=window_part(options),
        fields=dict.fromkeys(Problem._fields),
        steps=(),
    )
    fields = plan.fields
    fields.update(
        layout=layout, dtype=dtype, acc=acc, scale=1.0 / math.sqrt(qk_dim), softcap=0.0, has_prefix=False, segments=(),
        masks=(), mask_mods=(), aux=(), dropout_p=0.0, seed=0,
    )  # fmt: skip
    steps: list[_Step] = []
    mask, align = options.get("mask"), options.get("align")
    if isinstance(mask, Mask) or not (align is None or type(align) is str):
        steps.append(_bounds)
    else:
        fields.update(_bounds(plan, options))
    if mask is not None and not isinstance(mask, Mask):
        steps.append(_bool_mask)
    steps += [step for names, step in _STEPS.items() if any(_is_given(name, options) for name in names)]
    return plan._replace(steps=tuple(steps))


def _is_given(name: str, options: Mapping[str, Any]) -> bool:
    """Whether an option was given a value. None counts as no value where it is the default."""
    return name in options and not (options[name] is None and DEFAULTS[name] is None)


# --- the steps: options of one call -> fields of its Problem ----------------------------------------------------------


def _bounds(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    """The bounds that causal, window, align and a Mask give together."""
    mask, align = options.get("mask"), check_align(options.get("align"), "align")
    alibi, shape = options.get("alibi_slopes") is not None, plan.shape
    if isinstance(mask, Mask):
        return _lowered(plan, mask, align, alibi)
    if isinstance(align, np.ndarray):
        return lower(keyword_parts(plan.causal, plan.window, None), align, shape, alibi)._asdict()
    left, right, offset = _band(plan, align, alibi)
    return {"left": left, "right": right, "sequences": whole_rows(shape.batch, shape.q_len, shape.kv_len, offset)}


# Parts that hold copies alone: no array of the caller and no function.
_OWN_NUMBERS = (Aligned, Lengths, Varlen, Segments, Intervals)

# The last result for each Mask: the plan, align, and fields of the Problem. The layers of a model share a Mask.
_LOWERED: WeakKeyDictionary[Mask, tuple[Plan, Align, dict[str, Any]]] = WeakKeyDictionary()


def _lowered(plan: Plan, mask: Mask, align: Align, alibi: bool) -> dict[str, Any]:
    """`lower` of a Mask. The result is kept if nobody can change what it came from: no array, no user's function."""
    own = not isinstance(align, np.ndarray) and all(isinstance(part, _OWN_NUMBERS) for part in mask.parts)
    last = _LOWERED.get(mask) if own else None
    if last is not None and last[0] is plan and last[1] == align:
        return last[2]
    parts = keyword_parts(plan.causal, plan.window, mask)
    fields = lower(parts, align, plan.shape, alibi)._asdict()
    if own:
        _LOWERED[mask] = plan, align, fields
    return fields


def _bool_mask(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"masks": (over_pairs(bool_pairs(options["mask"], "mask"), "mask", plan.shape),)}


def _scale(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    takes = "a finite float (1 / sqrt(Dk) if left out)"
    return {"scale": _finite(options["scale"], "scale", plan.acc, takes)}


def _softcap(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    takes = "a finite float > 0, or None for no softcap"
    softcap = _finite(options["softcap"], "softcap", plan.acc, takes)
    with np.errstate(over="ignore", under="ignore"):
        usable = plan.acc(softcap) > 0 and max(plan.acc(1.0 / softcap), plan.acc(softcap * LOG2E)) < math.inf
    if not usable:
        raise ValueError(f"softcap is {softcap}; it takes {takes}, whose inverse and log2(e) times it are finite too")
    return {"softcap": float(softcap)}


def _slopes(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    slopes, shape = _in_acc(options["alibi_slopes"], "alibi_slopes", plan.acc), plan.shape
    if slopes.shape == (shape.q_heads,):
        return {"slopes": slopes[None, :]}
    if slopes.shape == (shape.batch, shape.q_heads):
        return {"slopes": slopes}
    raise ValueError(
        f"alibi_slopes has shape {slopes.shape}; "
        f"it takes (Hq,) = ({shape.q_heads},) or (B, Hq) = ({shape.batch}, {shape.q_heads})"
    )


def _bias(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    bias = plain(options["bias"], "bias")
    if bias.dtype.kind == "b":
        raise TypeError("bias has dtype bool; it takes numbers to add to the scores, and a bool array goes to mask=")
    accumulation(bias.dtype, "bias")
    return {"bias": over_pairs(bias, "bias", plan.shape)}


def _sinks(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    sinks, q_heads = _in_acc(options["sinks"], "sinks", plan.acc), plan.shape.q_heads
    if sinks.shape != (q_heads,):
        raise ValueError(f"sinks has shape {sinks.shape}; it takes one logit for each query head, (Hq,) = ({q_heads},)")
    return {"sinks": sinks}


def _score_mod(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    score_mod, arrays = options.get("score_mod"), aux_arrays(options.get("aux", ()), "aux")
    if isinstance(score_mod, Mask):
        raise TypeError("score_mod is a Mask; a Mask goes to mask=")
    if score_mod is not None:
        check_function(score_mod.fn if isinstance(score_mod, ScoreMod) else score_mod, "score_mod", 5, len(arrays))
        if isinstance(score_mod, ScoreMod) and score_mod.grad is not None:
            check_function(score_mod.grad, "grad", 5, None)
    elif arrays:
        raise ValueError("aux is given, but score_mod is not; the arrays of a mask_mod go to mask_mod(fn, aux=...)")
    return {"score_mod": score_mod, "aux": arrays}


def _dropout(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    takes = "a float in [0, 1)"
    p, seed = real(options.get("dropout_p", 0.0), "dropout_p", takes), options.get("seed")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p is {p}; it takes {takes}")
    seed_takes = "an int in [0, 2**64)"
    if seed is None:
        if p > 0.0:
            raise ValueError(
                f"seed is None, but dropout_p is {p}; dropout takes {seed_takes}, the same seed giving the same mask"
            )
        return {"dropout_p": p}
    number = integer(seed, "seed", seed_takes)
    if not 0 <= number < 2**64:
        raise ValueError(f"seed is {number}; it takes {seed_takes}")
    return {"dropout_p": p, "seed": number}


# The options whose numbers or addresses may differ from call to call. Only their types belong to the kinds.
_STEPS: dict[tuple[str, ...], _Step] = {
    ("scale",): _scale,
    ("softcap",): _softcap,
    ("alibi_slopes",): _slopes,
    ("bias",): _bias,
    ("sinks",): _sinks,
    ("score_mod", "aux"): _score_mod,
    ("dropout_p", "seed"): _dropout,
}
_FILLED_IN = frozenset({"mask", "out"}.union(*_STEPS))  # and an align of numbers; the others are settings


# --- the checks of kinds ----------------------------------------------------------------------------------------------


def _checked_arrays(q: Any, k: Any, v: Any, layout: Any) -> tuple[Array, Array, Array, np.dtype[Any], type]:
    """q, k and v as (B, H, S, D) views, their dtype, and the dtype of sums. Raises where they do not fit together."""
    q, k, v = plain(q, "q"), plain(k, "k"), plain(v, "v")
    dtype = q.dtype
    acc = accumulation(dtype, "q")
    if k.dtype != dtype or v.dtype != dtype:
        raise _dtypes_differ(q, k, v)
    if type(layout) is not str or layout != "bhsd":
        q, k, v = _to_bhsd(q, layout, "q"), _to_bhsd(k, layout, "k"), _to_bhsd(v, layout, "v")
    elif not q.ndim == k.ndim == v.ndim == 4:
        for x, name in ((q, "q"), (k, "k"), (v, "v")):
            _to_bhsd(x, layout, name)
    batch, q_heads, _, qk_dim = q.shape
    k_batch, kv_heads, _, k_dim = k.shape
    if (
        k_batch != batch
        or k_dim != qk_dim
        or v.shape[:3] != k.shape[:3]
        or not kv_heads
        or q_heads % kv_heads
        or not q_heads
        or not qk_dim
    ):
        raise _sizes_differ(q, k, v, layout)
    return q, k, v, dtype, acc


def window_part(options: Mapping[str, Any]) -> Window | None:
    """The keyword window= as a part of a mask."""
    window = options.get("window")
    return None if window is None else check_window(window)


def _causal(causal: Any) -> bool:
    if causal is False or causal is True:
        return causal
    if not isinstance(causal, np.bool_):
        raise TypeError(
            f"causal is {causal!r}; it takes a bool (which way it is aligned goes to align=, a Mask to mask=)"
        )
    return bool(causal)


def _band(plan: Plan, align: str | int | None, alibi: bool) -> tuple[int, int, int]:
    """left, right and offset of a call without a Mask. `lower` gives the same and takes ten times as long."""
    left, right, shape, window = OPEN, 0 if plan.causal else OPEN, plan.shape, plan.window
    if window is not None:
        left = OPEN if window.left is None else min(window.left, OPEN)
        right = right if window.right is None else min(window.right, right)
    q_len, kv_len = shape.q_len, shape.kv_len
    used = alibi or left < OPEN or right < OPEN
    if align is None:
        if used and q_len != kv_len and q_len and kv_len and shape.batch:
            raise ambiguous("causal" if plan.causal else "alibi_slopes" if alibi else "window", q_len, kv_len)
        return left, right, 0
    if not used:
        if window is None:
            raise unused_align()
        return left, right, 0
    return left, right, kv_len - q_len if align == "bottom_right" else 0 if align == "top_left" else int(align)


def keyword_parts(causal: bool, window: Window | None, mask: Any) -> list[Part]:
    """causal=, window= and mask= as one list of parts, which all apply."""
    parts: list[Part] = [Causal()] if causal else []
    if window is not None:
        parts.append(window)
    if isinstance(mask, Mask):
        parts.extend(mask.parts)
    elif mask is not None:
        parts.append(Pairs(bool_pairs(mask, "mask")))
    return parts


# --- layouts and results ----------------------------------------------------------------------------------------------


def _to_bhsd(x: Array, layout: Any, name: str) -> Array:
    """`x` as a (B, H, S, D) view."""
    known = _LAYOUTS.get(layout) if isinstance(layout, str) else None
    if known is None:
        raise (ValueError if isinstance(layout, str) else TypeError)(
            f"layout is {layout!r}; it takes one of {', '.join(map(repr, _LAYOUTS))}"
        )
    ndim, missing, s_before_h = known
    if x.ndim != ndim:
        axes = ", ".join(_AXES[c] for c in layout)
        others = [f"'{other}'" for other, (n, _, _) in _LAYOUTS.items() if n == x.ndim]
        hint = f"; {x.ndim} axes go with layout={' or '.join(others)}" if others else ""
        raise ValueError(f"{name} has shape {x.shape}; layout='{layout}' takes {ndim} axes ({axes}){hint}")
    if missing:
        x = x[(None,) * missing]
    return x.swapaxes(1, 2) if s_before_h else x


def bhsd_view(x: Array, layout: str) -> Array:
    """A result or an lse in the caller's `layout` as a (B, H, S, D) or (B, H, S) view: the inverse of `in_layout`."""
    _, missing, s_before_h = _LAYOUTS[layout]
    if missing:
        x = x[(None,) * missing]
    return x.swapaxes(1, 2) if s_before_h else x


def in_layout(x: Array, layout: str) -> Array:
    """A (B, H, S) or (B, H, S, D) array as a view in the caller's `layout`."""
    _, missing, s_before_h = _LAYOUTS[layout]
    if s_before_h:
        x = x.swapaxes(1, 2)
    return x[(0,) * missing] if missing else x


def output_shape(problem: Problem) -> tuple[int, ...]:
    """The shape of the result in the caller's layout."""
    return (*lse_shape(problem), problem.v.shape[3])


def lse_shape(problem: Problem) -> tuple[int, ...]:
    """The shape of lse in the caller's layout: the result's without its last axis."""
    batch, heads, length = problem.q.shape[:3]
    _, missing, s_before_h = _LAYOUTS[problem.layout]
    return ((batch, length, heads) if s_before_h else (batch, heads, length))[missing:]


def check_out(problem: Problem, out: Any) -> Array:
    """`out` as a (B, Hq, Sq, Dv) view to write to.

    Raises
    ------
    TypeError
        If it is not a NumPy array of q's dtype.
    ValueError
        If it has another shape, is read-only, has two elements at one address, or shares memory with an input.
    """
    view = plain(out, "out")
    wanted = output_shape(problem)
    if view.dtype != problem.dtype:
        raise TypeError(f"out has dtype {view.dtype}; it takes q's, {problem.dtype}")
    if view.shape != wanted:
        raise ValueError(f"out has shape {view.shape}; it takes {wanted}, the result's in layout='{problem.layout}'")
    if not view.flags.writeable:
        raise ValueError("out is read-only; it takes an array that can be written to")
    if view.size and _overlaps_itself(view):
        raise ValueError(
            f"out has strides {view.strides} for shape {view.shape}, so two of its elements share memory "
            "(it is broadcast or a sliding view); it takes an array with a place for every element"
        )
    for name, array in _inputs(problem):
        if np.may_share_memory(view, array) and _share(view, array):
            raise ValueError(
                f"out shares memory with {name}, which is read while out is written; it takes memory of its own"
            )
    return _to_bhsd(view, problem.layout, "out")


def _inputs(problem: Problem) -> list[tuple[str, Array]]:
    """Every array that a kernel reads, with its argument's name."""
    named = [("q", problem.q), ("k", problem.k), ("v", problem.v)]
    named += [("mask", m) for m in problem.masks]
    named += [("aux of mask_mod", a) for _, arrays in problem.mask_mods for a in arrays]
    named += [("aux", a) for a in problem.aux]
    named += [
        (n, a)
        for n, a in (("bias", problem.bias), ("alibi_slopes", problem.slopes), ("sinks", problem.sinks))
        if a is not None
    ]
    return named


def _share(a: Array, b: Array) -> bool:
    """Whether some byte belongs to both arrays. The answer is exact: np.shares_memory solves a Diophantine equation.
    Bounds of addresses are not enough, since two interleaved columns overlap in them and share nothing."""
    try:
        return np.shares_memory(a, b, max_work=_MAX_WORK)  # type: ignore[arg-type]  # any int, says its documentation
    except np.exceptions.TooHardError:
        return True  # too hard to decide: refuse, which is always safe; ordinary strides never come here


def _overlaps_itself(x: Array) -> bool:
    """Whether two elements of `x` share a byte."""
    reach = x.itemsize
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(x.strides, x.shape, strict=True) if size > 1
    ):
        if stride < reach:
            break
        reach += stride * (size - 1)
    else:
        return False  # each axis steps over everything that the axes with smaller strides reach
    axis = int(np.argmax(x.shape))
    if x.shape[axis] == 1:
        return False
    # Cut the longest axis in two. Elements of different halves may share a byte, or elements of one half: the second
    # half is like the first, only shifted.
    x = x.swapaxes(0, axis)
    half = (x.shape[0] + 1) // 2
    return _share(x[:half], x[half:]) or _overlaps_itself(x[:half])


# --- the checks of single arguments -----------------------------------------------------------------------------------


def _dtypes_differ(q: Array, k: Array, v: Array) -> TypeError:
    accumulation(k.dtype, "k")
    accumulation(v.dtype, "v")
    name = "k" if k.dtype != q.dtype else "v"
    return TypeError(
        f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; "
        f"they take one: convert, for example {name}.astype(q.dtype) or q.astype({name}.dtype)"
    )


def _sizes_differ(q: Array, k: Array, v: Array, layout: str) -> ValueError:
    """The error for the first size of q, k and v that is wrong. The arrays are (B, H, S, D) views; the text gives
    shapes in the caller's layout."""
    batch, q_heads, _, qk_dim = q.shape
    kv_heads = k.shape[1]
    shapes = [in_layout(x, layout).shape for x in (q, k, v)]
    told = f"q has shape {shapes[0]}, k {shapes[1]} and v {shapes[2]} in layout='{layout}'"
    if not batch == k.shape[0] == v.shape[0]:
        return ValueError(
            f"{told}: they take one batch size; repeat the smaller with np.broadcast_to, which copies nothing"
        )
    if kv_heads != v.shape[1]:
        return ValueError(f"{told}: k has {kv_heads} heads and v {v.shape[1]}; they take the same number")
    if not q_heads or not kv_heads:
        return ValueError(f"{told}: they take at least one head")
    if q_heads % kv_heads:
        other = {"bhsd": "bshd", "bshd": "bhsd", "hsd": "shd", "shd": "hsd"}[layout]
        swapped = q.shape[2] % k.shape[2] == 0 if k.shape[2] else False
        hint = f"; if the axes come in another order pass layout='{other}'" if swapped else ""
        return ValueError(f"{told}: q has {q_heads} heads and k {kv_heads}; q takes a multiple of k's{hint}")
    if k.shape[2] != v.shape[2]:
        return ValueError(f"{told}: k has {k.shape[2]} keys and v {v.shape[2]}; they take the same number")
    if qk_dim != k.shape[3]:
        return ValueError(
            f"{told}: q has head size {qk_dim} and k {k.shape[3]}; they take the same Dk (only v's may differ)"
        )
    return ValueError(f"{told}: the head size of q and k, Dk, is 0; it takes at least 1")


def _finite(x: Any, name: str, acc: type, takes: str) -> float:
    number = real(x, name, takes)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}; it takes {takes}")
    if acc is np.float32 and abs(number) > 3.4028234e38:
        raise ValueError(
            f"{name} is {number}, which is infinite in float32, in which these dtypes are computed; it takes {takes}"
        )
    return number


def _in_acc(x: Any, name: str, acc: type) -> Array:
    """A small float array in the accumulation type, C-contiguous, of the same shape."""
    array = plain(x, name)
    accumulation(array.dtype, name)
    return np.asarray(array, dtype=acc, order="C")
