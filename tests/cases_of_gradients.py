"""Small problems for the reference's gradients, by name: every option and layout, few enough pairs to move each one."""

import math
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import seeds

import numba_attn as na
from numba_attn.reference import attention

INF = math.inf
RNG = seeds.generator(12)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def cap(s, b, h, i, j):
    return 1.5 * math.tanh(s / 1.5) - 0.25 * (h + b) * abs(i - j)


def many_functions(s, b, h, i, j, t):
    x = math.exp(-s * s) + math.log1p(abs(s)) * t[h] + math.sqrt(s * s + 1) / (2 + math.sin(t[h]))
    return na.where(j > i, x, s * np.tanh(s)) + max(min(s, 0.5), -0.5) + (s % 0.75) ** 2


def hides_odd_keys(s, b, h, i, j, t):
    return -INF if (i + j) % 2 else s * t[i, j]


def t5_bucket(distance):
    """Raffel et al. 2020: exact up to 2, logarithmic beyond, 4 buckets to either side."""
    n = abs(distance)
    far = 2 + int(math.log(max(n, 1) / 2) / math.log(8 / 2) * 2)
    return (4 if distance > 0 else 0) + (n if n < 2 else min(far, 3))


def t5(s, b, h, i, j, table):
    return s + table[t5_bucket(j - i), h]


def by_distance(s, b, h, i, j, table, ids, factor):
    return s * factor[ids[h]] + table[h, i - j + 3] * table[h, i - j + 3]


scaled_by_table = na.score_mod(lambda s, b, h, i, j, t: s * t[h, j], lambda s, b, h, i, j, t: (t[h, j], s))
hides_by_hand = na.score_mod(
    lambda s, b, h, i, j, t: s + t[j] if j <= i + 1 else -INF, lambda s, b, h, i, j, t: (1.0, 1.0)
)
cubed = na.score_mod(numba.njit(lambda s, b, h, i, j: s**3), numba.njit(lambda s, b, h, i, j: 3 * s**2))


@numba.njit
def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2.0)))


@dataclass
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 2
    heads: tuple[int, int] = (4, 2)
    lengths: tuple[int, int] = (3, 4)
    dims: tuple[int, int] = (3, 2)
    aux_grad: tuple[int, ...] = ()

    def arrays(self) -> list[np.ndarray]:
        """q, k and v in the layout of the options."""
        rng = seeds.generator(1)
        layout = self.options.get("layout", "bhsd")
        out = []
        for heads, length, dim in zip(
            (self.heads[0], self.heads[1], self.heads[1]),
            (self.lengths[0], self.lengths[1], self.lengths[1]),
            (self.dims[0], *self.dims),
            strict=True,
        ):
            size = {"b": self.batch, "h": heads, "s": length, "d": dim}
            out.append(rng.standard_normal([size[axis] for axis in layout]))
        return out


def everything() -> dict[str, Any]:
    return {
        "causal": True, "window": (3, None), "align": 1, "mask": na.lengths([4, 3]), "bias": normal(3, 1),
        "scale": 0.8, "softcap": 1.25, "alibi_slopes": abs(normal(4)), "sinks": normal(4), "score_mod": many_functions,
        "aux": (normal(4),), "dropout_p": 0.25, "seed": 9,
    }  # fmt: skip


some_hidden = np.where(np.arange(12).reshape(3, 4) % 5 == 1, -INF, normal(3, 4))
empty_row = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], bool)
one_head = {"batch": 1, "heads": (1, 1)}

CASES = {
    "plain": Case(),
    "one query, Dv = 5": Case(lengths=(1, 4), dims=(2, 5)),
    "MQA": Case(heads=(3, 1)),
    "scale": Case({"scale": -0.7}),
    "scale 0": Case({"scale": 0.0}),
    "causal bottom right": Case({"causal": True, "align": "bottom_right"}),
    "causal top left": Case({"causal": True, "align": "top_left"}),
    "causal, first row empty": Case({"causal": True, "align": -1, "sinks": normal(4)}),
    "causal, an offset a row": Case({"causal": True, "align": np.array([0, 2])}),
    "window": Case({"window": (1, 0), "align": "bottom_right"}),
    "bool mask": Case({"mask": empty_row}),
    "bool mask of heads": Case({"mask": RNG.random((2, 4, 3, 4)) < 0.6}),
    "lengths": Case({"mask": na.lengths([4, 2], [3, 1]), "sinks": normal(4)}),
    "no keys in a row": Case({"mask": na.lengths([3, 0]), "sinks": normal(4)}),
    "varlen": Case({"mask": na.varlen([0, 1, 2], [0, 2, 3]), "sinks": normal(4), "alibi_slopes": abs(normal(4)),
                    "align": "bottom_right", "causal": True}),
    "segments": Case({"mask": na.segments([0, 1, 0], [0, 0, 1, 2])}),
    "prefix": Case({"mask": na.prefix(2), "align": "top_left"}),
    "intervals": Case({"mask": na.intervals([0, 1, 2], [2, 4, 2])}),
    "mask_mod": Case({"mask": na.mask_mod(lambda b, h, i, j, t: t[h] * i <= j, (np.arange(4),))}),
    "bias (B, Hq, Sq, Sk)": Case({"bias": normal(2, 4, 3, 4)}),
    "bias (B, 1, 1, Sk)": Case({"bias": normal(2, 1, 1, 4)}),
    "bias (Hq, 1, Sk)": Case({"bias": normal(4, 1, 4)}),
    "bias (Sq, 1)": Case({"bias": normal(3, 1), "sinks": normal(4)}),
    "bias (1,)": Case({"bias": normal(1), "sinks": normal(4)}),
    "bias ()": Case({"bias": np.array(0.3), "sinks": normal(4)}),
    "bias with -inf": Case({"bias": some_hidden}),
    "softcap": Case({"softcap": 0.7}),
    "ALiBi (Hq,)": Case({"alibi_slopes": abs(normal(4)), "align": "bottom_right"}),
    "ALiBi (B, Hq)": Case({"alibi_slopes": normal(2, 4), "align": 1}),
    "sinks": Case({"sinks": normal(4)}),
    "sinks, one of them none": Case({"sinks": np.array([0.5, -INF, 1.0, 0.0]), "mask": empty_row[[0, 0, 2]]}),
    "dropout": Case({"dropout_p": 0.4, "seed": 5}),
    "score_mod": Case({"score_mod": cap}),
    "score_mod, helpers": Case({"score_mod": lambda s, b, h, i, j: gelu(s) - gelu(-s) / 3}),
    "score_mod, table": Case({"score_mod": many_functions, "aux": (normal(4),)}, aux_grad=(0,)),
    "score_mod that hides": Case({"score_mod": hides_odd_keys, "aux": (normal(3, 4),)}, aux_grad=(0,)),
    "score_mod, three arrays": Case({"score_mod": by_distance,
                                     "aux": (normal(4, 7), np.array([1, 0, 0, 1]), normal(2))}, aux_grad=(0, 2)),
    "score_mod that ignores the score": Case({"score_mod": lambda s, b, h, i, j, t: t[j], "aux": (normal(4),)},
                                             aux_grad=(0,)),
    "score_mod of indices": Case({"score_mod": lambda s, b, h, i, j: j - i}),
    "T5": Case({"score_mod": t5, "aux": (normal(8, 4),)}, lengths=(6, 7), heads=(2, 1), aux_grad=(0,)),
    "grad by hand": Case({"score_mod": cubed}),
    "grad by hand, table": Case({"score_mod": scaled_by_table, "aux": (normal(4, 4).T,)}, aux_grad=(0,)),
    "grad by hand, hides": Case({"score_mod": hides_by_hand, "aux": (normal(4),)}, aux_grad=(0,)),
    "softcap, bias, causal, sinks": Case({"softcap": 1.1, "bias": normal(4, 1, 4), "causal": True, "sinks": normal(4),
                                          "align": "bottom_right"}),
    "dropout, GQA, lengths": Case({"dropout_p": 0.3, "seed": 1, "mask": na.lengths([2, 4]), "bias": some_hidden}),
    "everything": Case(everything(), aux_grad=(0,)),
    "bshd": Case({"layout": "bshd", "bias": normal(4, 3, 4), "sinks": normal(4)}),
    "hsd": Case({"layout": "hsd", "bias": normal(4, 1, 1), "mask": empty_row}, batch=1),
    "shd": Case({"layout": "shd", "bias": normal(3, 4), "alibi_slopes": normal(4), "align": 0}, batch=1),
    "sd": Case({"layout": "sd", "bias": normal(1, 4), "score_mod": cap}, **one_head),
}  # fmt: skip


def cotangents(case: Case) -> tuple[np.ndarray, np.ndarray]:
    rng = seeds.generator(2)
    out, lse = attention(*case.arrays(), **case.options, return_lse=True)
    return rng.standard_normal(out.shape), rng.standard_normal(lse.shape)


def arguments(case: Case) -> dict[str, np.ndarray]:
    """What has a gradient, by the name of its entry in Gradients."""
    q, k, v = case.arrays()
    named = {"dq": q, "dk": k, "dv": v}
    for name in ("bias", "sinks", "alibi_slopes"):
        if name in case.options:
            named[f"d{name}"] = case.options[name]
    return named | {f"daux {n}": case.options["aux"][n] for n in case.aux_grad}
