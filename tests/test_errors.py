"""Every bad input that we could think of, with the message it gets.

A message names the argument, says what was given and what is accepted, and where there is one, the line that the caller
probably meant. A row of the table is (what is wrong, arguments that replace the good ones, exception, pattern).
"""

# ruff: noqa: E501  # a row of a table is one line

import re

import numpy as np
import pytest
import seeds

import numba_attn
from numba_attn import mask as masks
from numba_attn import plan, reference

F4 = np.float32


def ones(*shape, dtype=F4):
    return np.ones(shape, dtype)


GOOD = {"q": ones(2, 4, 5, 3), "k": ones(2, 2, 7, 3), "v": ones(2, 2, 7, 6)}  # B 2, Hq 4, Hkv 2, Sq 5, Sk 7, Dk 3, Dv 6


def call(arguments, out=None):
    """attention(...), or as much of it as there is."""
    arguments = GOOD | arguments
    q, k, v = (arguments.pop(name) for name in "qkv")
    attention = getattr(numba_attn, "attention", None)
    if attention is not None:
        return attention(q, k, v, out=out, **arguments)
    problem = plan.resolve(q, k, v, **arguments)
    return None if out is None else plan.check_out(problem, out)


class OnGpu:
    """What CuPy's and Numba's device arrays look like from here. Reading the attribute would wait for a device."""

    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("no device")


class Labelled:
    """An array with something around it, as xarray and pandas have."""

    def __array__(self, dtype=None, copy=None):
        return np.zeros((2, 4, 5, 3))


class Units(np.ndarray):
    """A subclass whose meaning is more than its numbers."""


def quiet_matrix():
    return np.matrix([[1.0, 2.0]])


def fake_torch(device):
    tensor = type(
        "Tensor",
        (),
        {"__module__": "torch", "device": type("device", (), {"type": device, "__str__": lambda s: device})()},
    )
    return tensor()


def closes_over_an_array():
    table = np.zeros(3)
    return lambda s, b, h, i, j: s + table[j]


def holds_an_array_by_default(b, h, i, j, f=np.ones(2)):  # noqa: B008  # what the test is about
    return f[i]


causal, window, prefix, lengths = masks.causal, masks.window, masks.prefix, masks.lengths
ALIGN = r"'bottom_right'.*'top_left'.*int"
BAD_ALIGN = {"causal": True}

TABLE = [
    # --- what is no array
    ("list", {"q": [[1.0, 2.0]]}, TypeError, r"^q is a list.*NumPy array.*np\.asarray\(q"),
    ("tuple", {"k": ((1.0,),)}, TypeError, r"^k is a tuple.*np\.asarray\(k"),
    ("none", {"v": None}, TypeError, r"^v is None.*NumPy array"),
    ("number", {"q": 1.0}, TypeError, r"^q is a float; .*NumPy array"),
    ("numpy scalar", {"q": np.float32(1)}, TypeError, r"^q is a numpy\.float32; .*NumPy array"),
    ("text", {"q": "query"}, TypeError, r"^q is a str; .*NumPy array"),
    ("masked array", {"q": np.ma.masked_array(GOOD["q"])}, TypeError, r"^q is a masked array.*q\.data.*mask="),
    ("matrix", {"q": quiet_matrix}, TypeError, r"^q is a numpy\.matrix.*np\.asarray\(q\)"),
    ("subclass", {"k": GOOD["k"].view(Units)}, TypeError, r"^k is a .*Units.*subclass.*np\.asarray\(k\)"),
    ("GPU array", {"q": OnGpu()}, TypeError, r"^q is (a .*OnGpu.*GPU.*host memory.*q\.get\(\).*q\.copy_to_host\(\)|on a GPU and k and v are in host memory.*move them)"),
    ("labelled array", {"v": Labelled()}, TypeError, r"^v is a .*Labelled.*np\.asarray\(v\)"),
    ("torch tensor", {"q": fake_torch("cpu")}, TypeError, r"^q is a torch tensor on cpu.*q\.detach\(\)\.numpy\(\)"),
    ("torch tensor on a GPU", {"k": fake_torch("cuda")}, TypeError, r"^k is a torch tensor on cuda.*k\.detach\(\)\.cpu\(\)\.numpy\(\)"),
    # --- dtypes
    ("integer", {"q": ones(2, 4, 5, 3, dtype=np.int64)}, TypeError, r"^q has dtype int64.*float64, float32, float16 or bfloat16.*q\.astype"),
    ("bool", {"q": ones(2, 4, 5, 3, dtype=bool)}, TypeError, r"^q has dtype bool.*float32"),
    ("complex", {"q": ones(2, 4, 5, 3, dtype=np.complex64)}, TypeError, r"^q has dtype complex64.*float64.*q\.real"),
    ("big-endian", {"q": ones(2, 4, 5, 3, dtype=">f4")}, TypeError, r"^q has dtype >f4.*byte.*newbyteorder\('='\)"),
    ("big-endian value", {"v": ones(2, 2, 7, 6, dtype=">f4")}, TypeError, r"^v has dtype >f4.*byte"),
    ("long double", {"q": ones(2, 4, 5, 3, dtype=np.longdouble)}, TypeError, r"^q has dtype .*(128|longdouble|float96).*q\.astype\(np\.float64\)"),
    ("object", {"q": ones(2, 4, 5, 3, dtype=object)}, TypeError, r"^q has dtype object.*float64"),
    ("text dtype", {"q": ones(2, 4, 5, 3).astype("U3")}, TypeError, r"^q has dtype <U3.*float64"),
    ("record", {"q": np.zeros((2, 4, 5, 3), [("x", "f4")])}, TypeError, r"^q has dtype .*x.*float64"),
    ("k's dtype", {"k": ones(2, 2, 7, 3, dtype=np.float64)}, TypeError, r"^q, k and v have dtypes float32, float64 and float32.*one.*k\.astype\(q\.dtype\)"),
    ("v's dtype", {"v": ones(2, 2, 7, 6, dtype=np.float16)}, TypeError, r"^q, k and v have dtypes float32, float32 and float16.*v\.astype"),
    ("k integer", {"k": ones(2, 2, 7, 3, dtype=np.int32)}, TypeError, r"^k has dtype int32.*float64"),
    # --- ranks and layout
    ("rank 3", {"q": ones(4, 5, 3)}, ValueError, r"^q has shape \(4, 5, 3\).*'bhsd' takes 4 axes \(batch, heads, sequence, head size\).*'hsd' or 'shd'"),
    ("rank 2", {"k": ones(7, 3)}, ValueError, r"^k has shape \(7, 3\).*4 axes.*'sd'"),
    ("rank 5", {"v": ones(1, 2, 2, 7, 6)}, ValueError, r"^v has shape \(1, 2, 2, 7, 6\).*4 axes"),
    ("rank 0", {"q": np.array(1.0, F4)}, ValueError, r"^q has shape \(\).*4 axes"),
    ("rank 4 as hsd", {"layout": "hsd"}, ValueError, r"^q has shape \(2, 4, 5, 3\).*'hsd' takes 3 axes.*'bhsd' or 'bshd'"),
    ("rank 4 as sd", {"layout": "sd"}, ValueError, r"^q has shape .*'sd' takes 2 axes \(sequence, head size\)"),
    ("layout", {"layout": "bhds"}, ValueError, r"^layout is 'bhds'.*'bhsd', 'bshd', 'hsd', 'shd', 'sd'"),
    ("layout in capitals", {"layout": "BHSD"}, ValueError, r"^layout is 'BHSD'.*'bhsd'"),
    ("layout none", {"layout": None}, TypeError, r"^layout is None.*'bhsd'"),
    ("layout list", {"layout": ["b", "h", "s", "d"]}, TypeError, r"^layout is \['b'.*'bhsd'"),
    # --- sizes
    ("batch", {"k": ones(1, 2, 7, 3), "v": ones(1, 2, 7, 6)}, ValueError, r"q has shape \(2, 4, 5, 3\), k \(1, 2, 7, 3\) and v \(1, 2, 7, 6\).*one batch size.*broadcast_to"),
    ("v's batch", {"v": ones(3, 2, 7, 6)}, ValueError, r"v \(3, 2, 7, 6\).*one batch size"),
    ("heads", {"k": ones(2, 3, 7, 3), "v": ones(2, 3, 7, 6)}, ValueError, r"q has 4 heads and k 3; q takes a multiple"),
    ("more kv heads", {"k": ones(2, 8, 7, 3), "v": ones(2, 8, 7, 6)}, ValueError, r"q has 4 heads and k 8; q takes a multiple"),
    ("axes swapped", {"q": ones(2, 5, 4, 3), "k": ones(2, 7, 2, 3), "v": ones(2, 7, 2, 6)}, ValueError, r"q has 5 heads and k 7.*layout='bshd'"),
    ("heads of v", {"v": ones(2, 4, 7, 6)}, ValueError, r"k has 2 heads and v 4.*same number"),
    ("no kv head", {"k": ones(2, 0, 7, 3), "v": ones(2, 0, 7, 6)}, ValueError, r"at least one head"),
    ("no head", {"q": ones(2, 0, 5, 3)}, ValueError, r"at least one head"),
    ("keys", {"v": ones(2, 2, 8, 6)}, ValueError, r"k has 7 keys and v 8.*same number"),
    ("head size", {"k": ones(2, 2, 7, 4)}, ValueError, r"q has head size 3 and k 4.*same Dk"),
    ("Dk 0", {"q": ones(2, 4, 5, 0), "k": ones(2, 2, 7, 0)}, ValueError, r"head size of q and k, Dk, is 0.*at least 1"),
    ("told in the layout", {"layout": "bshd"}, ValueError, r"q has shape \(2, 4, 5, 3\), k \(2, 2, 7, 3\).*'bshd': q has 5 heads and k 7"),
    # --- scale and softcap
    ("scale NaN", {"scale": np.nan}, ValueError, r"^scale is nan.*finite float"),
    ("scale infinite", {"scale": -np.inf}, ValueError, r"^scale is -inf.*finite float"),
    ("scale infinite in float32", {"scale": 1e39}, ValueError, r"^scale is 1e\+39.*float32.*finite"),
    ("scale huge", {"scale": 10**400}, ValueError, r"^scale is too large.*finite float"),
    ("scale text", {"scale": "auto"}, TypeError, r"^scale is 'auto'.*finite float"),
    ("scale bool", {"scale": True}, TypeError, r"^scale is True.*finite float"),
    ("scale complex", {"scale": 1j}, TypeError, r"^scale is 1j.*finite float"),
    ("scale array", {"scale": ones(4)}, TypeError, r"^scale is array.*finite float"),
    ("softcap 0", {"softcap": 0.0}, ValueError, r"^softcap is 0\.0.*> 0, or None"),
    ("softcap negative", {"softcap": -1}, ValueError, r"^softcap is -1\.0.*> 0, or None"),
    ("softcap NaN", {"softcap": np.nan}, ValueError, r"^softcap is nan.*> 0"),
    ("softcap infinite", {"softcap": np.inf}, ValueError, r"^softcap is inf.*> 0, or None"),
    ("softcap 0 in float32", {"softcap": 1e-60}, ValueError, r"^softcap is 1e-60.*> 0"),
    ("softcap text", {"softcap": "30"}, TypeError, r"^softcap is '30'.*> 0"),
    # --- causal and window
    ("causal text", {"causal": "top_left"}, TypeError, r"^causal is 'top_left'.*bool.*align="),
    ("causal int", {"causal": 1}, TypeError, r"^causal is 1.*bool"),
    ("causal none", {"causal": None}, TypeError, r"^causal is None.*bool"),
    ("causal mask", {"causal": causal()}, TypeError, r"^causal is .*bool.*mask="),
    ("window int", {"window": 128}, TypeError, r"^window is 128.*\(left, right\).*sliding_window=128.*\(128 - 1, 0\)"),
    ("window bool", {"window": True}, TypeError, r"^window is True.*\(left, right\)"),
    ("window of one", {"window": (3,)}, ValueError, r"^window is \(3,\).*\(left, right\)"),
    ("window of three", {"window": (3, 0, 1)}, ValueError, r"^window is \(3, 0, 1\).*\(left, right\)"),
    ("window -1", {"window": (-1, 0)}, ValueError, r"^window's left is -1.*>= 0, or None.*-1 is not open"),
    ("window right -1", {"window": (0, -1)}, ValueError, r"^window's right is -1.*None"),
    ("window float", {"window": (2.0, 0)}, TypeError, r"^window's left is 2\.0.*int >= 0, or None"),
    ("window of bool", {"window": (2, True)}, TypeError, r"^window's right is True.*int >= 0"),
    ("window array", {"window": np.array([2, 0])}, TypeError, r"^window is array.*\(left, right\)"),
    ("window mask", {"window": window(2, 0)}, TypeError, r"^window is a Mask.*mask="),
    # --- align
    ("align missing", {"causal": True}, ValueError, r"(?s)^align is None, but causal .*5 queries and 7 keys.*'bottom_right'.*offset 2.*KV cache.*'top_left'.*prefill.*int"),
    ("align missing, window", {"window": (2, 0)}, ValueError, r"(?s)^align is None, but window .*'bottom_right'.*'top_left'"),
    ("align missing, ALiBi", {"alibi_slopes": ones(4)}, ValueError, r"(?s)^align is None, but alibi_slopes .*'bottom_right'.*'top_left'"),
    ("align missing, decoding", {"causal": True, "q": ones(2, 4, 1, 3)}, ValueError, r"(?s)^align is None.*1 queries and 7 keys"),
    ("align missing, part", {"mask": causal()}, ValueError, r"(?s)^align is None, but causal\(\) .*'bottom_right'"),
    ("align missing, prefix", {"mask": prefix(2)}, ValueError, r"(?s)^align is None, but prefix\(2\)"),
    ("align missing, second part", {"mask": causal(1) & window(1, 1)}, ValueError, r"(?s)^align is None, but window\(1, 1\)"),
    ("align missing in a row", {"mask": lengths([5, 6]), "causal": True}, ValueError, r"(?s)^align is None.*5 queries and 6 keys"),
    ("align unused", {"align": "top_left"}, ValueError, r"^align is given, but nothing uses it.*causal, window, prefix or alibi_slopes"),
    ("align unused, int", {"align": 0}, ValueError, r"^align is given, but nothing uses it"),
    ("align unused by lengths", {"align": 0, "mask": lengths([5, 5])}, ValueError, r"^align is given, but nothing uses it"),
    ("align unused by a bool mask", {"align": 0, "mask": ones(5, 7, dtype=bool)}, ValueError, r"^align is given, but nothing uses it"),
    ("align name", BAD_ALIGN | {"align": "left"}, ValueError, rf"^align is 'left'.*{ALIGN}"),
    ("align float", BAD_ALIGN | {"align": 2.0}, TypeError, rf"^align is 2\.0.*{ALIGN}"),
    ("align bool", BAD_ALIGN | {"align": True}, TypeError, rf"^align is True.*{ALIGN}"),
    ("align float array", BAD_ALIGN | {"align": ones(2)}, TypeError, rf"^align has dtype float32.*{ALIGN}"),
    ("align shape", BAD_ALIGN | {"align": np.array([1, 2, 3])}, ValueError, r"^align has shape \(3,\).*\(B,\) = \(2,\)"),
    ("align rank", BAD_ALIGN | {"align": np.zeros((2, 1), int)}, ValueError, rf"^align has shape \(2, 1\).*{ALIGN}"),
    ("align far", BAD_ALIGN | {"align": 2**61}, ValueError, rf"^align holds an offset beyond.*{ALIGN}"),
    ("align too large", BAD_ALIGN | {"align": 2**70}, (TypeError, ValueError), r"^align .*int64"),
    ("align differs", {"mask": causal("top_left"), "causal": True, "align": "bottom_right"}, ValueError, r"^align differs: 'bottom_right' for causal.*'top_left' for causal"),
    ("align differs from unused", {"mask": causal("top_left"), "align": "bottom_right"}, ValueError, r"^align differs"),
    ("align of a part", {"mask": causal(np.array([1, 2, 3]))}, ValueError, r"^align of causal.* has shape \(3,\).*\(B,\) = \(2,\)"),
    # --- mask
    ("mask int", {"mask": ones(5, 7, dtype=np.int64)}, TypeError, r"^mask has dtype int64.*bool, True = attend.*mask\.astype\(bool\).*mask == 0"),
    ("mask uint8", {"mask": ones(5, 7, dtype=np.uint8)}, TypeError, r"^mask has dtype uint8.*bool"),
    ("mask float", {"mask": ones(5, 7)}, TypeError, r"^mask has dtype float32.*bool.*bias="),
    ("mask list", {"mask": [[True]]}, TypeError, r"^mask is a list.*NumPy array"),
    ("mask True", {"mask": True}, TypeError, r"^mask is True.*bool array.*Mask.*None"),
    ("mask masked", {"mask": np.ma.masked_array(ones(5, 7, dtype=bool))}, TypeError, r"^mask is a masked array"),
    ("mask GPU", {"mask": OnGpu()}, TypeError, r"^mask is a .*GPU"),
    ("mask function", {"mask": lambda b, h, i, j: j <= i}, TypeError, r"^mask is a function.*mask_mod\(fn\)"),
    ("mask text", {"mask": "causal"}, TypeError, r"^mask is a str"),
    ("mask of padding", {"mask": ones(2, 7, dtype=bool)}, ValueError, r"^mask has shape \(2, 7\).*\(B, Hq, Sq, Sk\) = \(2, 4, 5, 7\).*mask\[:, None, None, :\].*lengths"),
    ("mask (B, Sq, Sk)", {"mask": ones(2, 5, 7, dtype=bool)}, ValueError, r"^mask has shape \(2, 5, 7\).*mask\[:, None\]"),
    ("mask of kv heads", {"mask": ones(2, 2, 5, 7, dtype=bool)}, ValueError, r"^mask has shape \(2, 2, 5, 7\).*\(2, 4, 5, 7\)"),
    ("mask transposed", {"mask": ones(7, 5, dtype=bool)}, ValueError, r"^mask has shape \(7, 5\).*\(2, 4, 5, 7\)"),
    ("mask of queries", {"mask": ones(5, dtype=bool)}, ValueError, r"^mask has shape \(5,\).*\(2, 4, 5, 7\)"),
    ("mask rank 5", {"mask": ones(1, 2, 4, 5, 7, dtype=bool)}, ValueError, r"^mask has shape \(1, 2, 4, 5, 7\)"),
    ("mask with a batch axis", {"mask": ones(1, 1, 5, 7, dtype=bool), "layout": "hsd", "q": ones(4, 5, 3), "k": ones(2, 7, 3), "v": ones(2, 7, 6)}, ValueError, r"^mask has shape \(1, 1, 5, 7\).*\(Hq, Sq, Sk\) = \(4, 5, 7\).*no batch axis"),
    ("mask with a head axis", {"mask": ones(1, 5, 7, dtype=bool), "layout": "sd", "q": ones(5, 3), "k": ones(7, 3), "v": ones(7, 6)}, ValueError, r"^mask has shape \(1, 5, 7\).*\(Sq, Sk\) = \(5, 7\).*no batch and no head axis"),
    ("mask array in a Mask", {"mask": lengths([1, 1]) & ones(5, 5, dtype=bool)}, ValueError, r"^mask has shape \(5, 5\).*\(2, 4, 5, 7\)"),
    # --- mask parts against the arrays
    ("lengths shape", {"mask": lengths([3])}, ValueError, r"^kv_lengths has shape \(1,\).*\(B,\) = \(2,\)"),
    ("lengths range", {"mask": lengths([3, 8])}, ValueError, r"^kv_lengths holds 8.*\[0, Sk\] = \[0, 7\]"),
    ("q_lengths range", {"mask": lengths([3, 4], [6, 1])}, ValueError, r"^q_lengths holds 6.*\[0, Sq\] = \[0, 5\]"),
    ("q_lengths shape", {"mask": lengths([3, 4], [1, 1, 1])}, ValueError, r"^q_lengths has shape \(3,\).*\(2,\)"),
    ("cu_q past the end", {"mask": masks.varlen([0, 6], [0, 7])}, ValueError, r"^cu_q ends at 6.*Sq = 5"),
    ("cu_k past the end", {"mask": masks.varlen([0, 5], [0, 9])}, ValueError, r"^cu_k ends at 9.*Sk = 7"),
    ("segments length", {"mask": masks.segments(np.zeros(5, int), np.zeros(6, int))}, ValueError, r"^kv_ids of segments has shape \(6,\).*\(Sk,\) = \(7,\) or \(B, Sk\) = \(2, 7\)"),
    ("segments batch", {"mask": masks.segments(np.zeros((3, 5), int), np.zeros(7, int))}, ValueError, r"^q_ids of segments has shape \(3, 5\).*\(2, 5\)"),
    ("prefix batch", {"mask": prefix([1, 2, 3]), "align": 0}, ValueError, r"^n of prefix has shape \(3,\).*\(B,\) = \(2,\)"),
    ("intervals length", {"mask": masks.intervals(np.zeros(7, int), np.zeros(5, int))}, ValueError, r"^start of intervals has shape \(7,\).*\(Sq,\) = \(5,\).*\(B, Hq, Sq\) = \(2, 4, 5\)"),
    ("intervals heads", {"mask": masks.intervals(np.zeros(5, int), np.zeros((2, 2, 5), int))}, ValueError, r"^end of intervals has shape \(2, 2, 5\)"),
    ("intervals end", {"mask": masks.intervals(np.zeros(5, int), np.full(5, 8))}, ValueError, r"^end of intervals goes up to 8.*\[0, Sk\] = \[0, 7\]"),
    ("intervals start", {"mask": masks.intervals(np.full(5, 8), np.full(5, 7))}, ValueError, r"^start of intervals goes up to 8"),
    # --- bias
    ("bias bool", {"bias": ones(5, 7, dtype=bool)}, TypeError, r"^bias has dtype bool.*mask="),
    ("bias int", {"bias": ones(5, 7, dtype=np.int32)}, TypeError, r"^bias has dtype int32.*float64"),
    ("bias list", {"bias": [0.0]}, TypeError, r"^bias is a list"),
    ("bias number", {"bias": 1.0}, TypeError, r"^bias is a float; .*NumPy array"),
    ("bias big-endian", {"bias": ones(5, 7, dtype=">f8")}, TypeError, r"^bias has dtype >f8.*byte"),
    ("bias shape", {"bias": ones(7, 5)}, ValueError, r"^bias has shape \(7, 5\).*\(B, Hq, Sq, Sk\) = \(2, 4, 5, 7\)"),
    ("bias of padding", {"bias": ones(2, 7)}, ValueError, r"^bias has shape \(2, 7\).*bias\[:, None, None, :\]"),
    # --- slopes and sinks
    ("slopes shape", {"alibi_slopes": ones(2), "align": 0}, ValueError, r"^alibi_slopes has shape \(2,\).*\(Hq,\) = \(4,\) or \(B, Hq\) = \(2, 4\)"),
    ("slopes number", {"alibi_slopes": 0.5, "align": 0}, TypeError, r"^alibi_slopes is a float; .*NumPy array"),
    ("slopes int", {"alibi_slopes": ones(4, dtype=int), "align": 0}, TypeError, r"^alibi_slopes has dtype int64.*float64"),
    ("sinks shape", {"sinks": ones(2)}, ValueError, r"^sinks has shape \(2,\).*\(Hq,\) = \(4,\)"),
    ("sinks rank", {"sinks": ones(2, 4)}, ValueError, r"^sinks has shape \(2, 4\).*\(4,\)"),
    ("sinks list", {"sinks": [0.0] * 4}, TypeError, r"^sinks is a list"),
    ("sinks int", {"sinks": ones(4, dtype=int)}, TypeError, r"^sinks has dtype int64"),
    # --- dropout
    ("dropout without seed", {"dropout_p": 0.5}, ValueError, r"^seed is None, but dropout_p is 0\.5.*int in \[0, 2\*\*64\)"),
    ("dropout 1", {"dropout_p": 1.0, "seed": 1}, ValueError, r"^dropout_p is 1\.0.*\[0, 1\)"),
    ("dropout negative", {"dropout_p": -0.1, "seed": 1}, ValueError, r"^dropout_p is -0\.1.*\[0, 1\)"),
    ("dropout NaN", {"dropout_p": np.nan, "seed": 1}, ValueError, r"^dropout_p is nan.*\[0, 1\)"),
    ("dropout text", {"dropout_p": "0.1", "seed": 1}, TypeError, r"^dropout_p is '0\.1'.*\[0, 1\)"),
    ("dropout bool", {"dropout_p": False}, TypeError, r"^dropout_p is False.*\[0, 1\)"),
    ("dropout none", {"dropout_p": None}, TypeError, r"^dropout_p is None.*\[0, 1\)"),
    ("dropout array", {"dropout_p": ones(2)}, TypeError, r"^dropout_p is array.*\[0, 1\)"),
    ("seed float", {"dropout_p": 0.5, "seed": 1.0}, TypeError, r"^seed is 1\.0.*int"),
    ("seed negative", {"dropout_p": 0.5, "seed": -1}, ValueError, r"^seed is -1.*\[0, 2\*\*64\)"),
    ("seed too large", {"dropout_p": 0.5, "seed": 2**64}, ValueError, r"^seed is 18446744073709551616.*\[0, 2\*\*64\)"),
    ("seed generator", {"dropout_p": 0.5, "seed": np.random.default_rng}, TypeError, r"^seed is .*int"),
    ("seed bool", {"dropout_p": 0.5, "seed": True}, TypeError, r"^seed is True.*int"),
    # --- user functions
    ("score_mod no function", {"score_mod": 3.0}, TypeError, r"score_mod.*float.*function"),
    ("score_mod Mask", {"score_mod": causal()}, TypeError, r"^score_mod is a Mask.*mask="),
    ("score_mod arguments", {"score_mod": lambda s, i, j: s}, TypeError, r"score_mod.*score, b, h, i, j"),
    ("score_mod without its aux", {"score_mod": lambda s, b, h, i, j, t: s}, TypeError, r"score_mod.*score, b, h, i, j.*'t'"),
    ("score_mod with too much aux", {"score_mod": lambda s, b, h, i, j: s, "aux": (ones(2),)}, TypeError, r"score_mod.*aux"),
    ("score_mod over an array", {"score_mod": closes_over_an_array()}, TypeError, r"score_mod.*'table'.*aux"),
    ("score_mod builtin", {"score_mod": max}, TypeError, r"score_mod.*function"),
    ("aux alone", {"aux": (ones(2),)}, ValueError, r"^aux is given, but score_mod is not.*mask_mod"),
    ("aux array", {"score_mod": lambda s, b, h, i, j, t: s, "aux": ones(2)}, TypeError, r"^aux is a ndarray.*tuple of arrays.*\(aux,\)"),
    ("aux array alone", {"aux": ones(2)}, TypeError, r"^aux is a ndarray.*tuple of arrays"),
    ("aux none", {"aux": None}, TypeError, r"^aux is a NoneType.*tuple of arrays"),
    ("aux number", {"score_mod": lambda s, b, h, i, j, t: s, "aux": (3.0,)}, TypeError, r"^aux\[0\] is a float; .*NumPy array"),
    ("aux list", {"score_mod": lambda s, b, h, i, j, t: s, "aux": ([1.0],)}, TypeError, r"^aux\[0\] is a list"),
    ("aux complex", {"score_mod": lambda s, b, h, i, j, t: s, "aux": (ones(2, dtype=complex),)}, TypeError, r"^aux\[0\] has dtype complex128.*float64.*int or bool"),
    ("aux big-endian", {"score_mod": lambda s, b, h, i, j, t: s, "aux": (ones(2, dtype=">i4"),)}, TypeError, r"^aux\[0\] has dtype >i4.*byte order"),
    ("aux object", {"score_mod": lambda s, b, h, i, j, t: s, "aux": (ones(2, dtype=object),)}, TypeError, r"^aux\[0\] has dtype object"),
]  # fmt: skip


def made(arguments):
    """np.matrix warns where it is made, so the table has the maker."""
    return {name: x() if x is quiet_matrix else x for name, x in arguments.items()}


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("arguments, error, pattern", [pytest.param(*row[1:], id=row[0]) for row in TABLE])
def test_bad_input(arguments, error, pattern):
    with pytest.raises(error) as caught:
        call(made(arguments))
    assert re.search(pattern, str(caught.value)), f"the message is: {caught.value}"


FLOAT32_ONLY = {"k's dtype", "v's dtype", "scale infinite in float32", "softcap 0 in float32"}


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize(
    "arguments, error, pattern", [pytest.param(*row[1:], id=row[0]) for row in TABLE if row[0] not in FLOAT32_ONLY]
)
def test_the_reference_refuses_the_same(arguments, error, pattern):
    with pytest.raises(error, match=pattern):
        reference.attention(**(GOOD | made(arguments)))


CONSTRUCTORS = [
    ("causal align", lambda: causal("up"), ValueError, rf"^align of causal is 'up'.*{ALIGN}"),
    ("causal align float", lambda: causal(1.5), TypeError, rf"^align of causal is 1\.5.*{ALIGN}"),
    ("window -1", lambda: window(-1, 0), ValueError, r"^window's left is -1.*None"),
    ("window float", lambda: window(1, 2.5), TypeError, r"^window's right is 2\.5"),
    ("window align", lambda: window(1, 2, True), TypeError, rf"^align of window is True.*{ALIGN}"),
    ("prefix negative", lambda: prefix(-1), ValueError, r"^n of prefix holds -1.*>= 0"),
    ("prefix float", lambda: prefix(2.0), TypeError, r"^n of prefix is 2\.0.*int >= 0 or \(B,\)"),
    ("prefix none", lambda: prefix(None), TypeError, r"^n of prefix is None"),
    ("prefix rank", lambda: prefix([[1]]), ValueError, r"^n of prefix has shape \(1, 1\)"),
    ("lengths negative", lambda: lengths([3, -1]), ValueError, r"^kv_lengths holds -1.*>= 0"),
    ("lengths float", lambda: lengths(np.array([3.0])), TypeError, r"^kv_lengths has dtype float64.*int"),
    ("lengths number", lambda: lengths(3), ValueError, r"^kv_lengths has shape \(\).*\(B,\)"),
    ("lengths none", lambda: lengths(None), TypeError, r"^kv_lengths is None"),
    ("lengths bool", lambda: lengths(np.array([True])), TypeError, r"^kv_lengths has dtype bool"),
    ("lengths ragged", lambda: lengths([[1], [1, 2]]), ValueError, r"^kv_lengths is \[\[1\], \[1, 2\]\]"),
    ("lengths strings", lambda: lengths(["3"]), TypeError, r"^kv_lengths has dtype"),
    ("lengths too large", lambda: lengths([2**63]), ValueError, r"^kv_lengths holds 9223372036854775808.*int64"),
    ("lengths far too large", lambda: lengths([2**80]), TypeError, r"^kv_lengths .*int64"),
    ("q_lengths negative", lambda: lengths([3], [-2]), ValueError, r"^q_lengths holds -2"),
    ("cu_q start", lambda: masks.varlen([1, 2], [0, 2]), ValueError, r"^cu_q starts at 1.*starts at 0"),
    ("cu_k falls", lambda: masks.varlen([0, 2, 3], [0, 4, 3]), ValueError, r"^cu_k falls from 4 to 3 at 2"),
    ("cu empty", lambda: masks.varlen([], [0]), ValueError, r"^cu_q has shape \(0,\).*\(n \+ 1,\)"),
    ("cu sizes", lambda: masks.varlen([0, 2], [0, 1, 2]), ValueError, r"^cu_q has 2 entries and cu_k 3"),
    ("cu rank", lambda: masks.varlen([[0, 2]], [0, 1]), ValueError, r"^cu_q has shape \(1, 2\)"),
    ("cu float", lambda: masks.varlen(np.array([0.0, 1.0]), [0, 1]), TypeError, r"^cu_q has dtype float64"),
    ("segments float", lambda: masks.segments(np.zeros(3), np.zeros(3, int)), TypeError, r"^q_ids of segments has dtype float64"),
    ("segments rank", lambda: masks.segments(np.zeros(3, int), np.zeros((1, 1, 3), int)), ValueError, r"^kv_ids of segments has shape \(1, 1, 3\)"),
    ("segments none", lambda: masks.segments(np.zeros(3, int), None), TypeError, r"^kv_ids of segments is None"),
    ("intervals negative", lambda: masks.intervals([-1, 0], [1, 1]), ValueError, r"^start of intervals holds -1.*>= 0"),
    ("intervals float", lambda: masks.intervals([0, 0], [1.0, 2.0]), TypeError, r"^end of intervals has dtype float64"),
    ("intervals rank", lambda: masks.intervals(0, [1, 2]), ValueError, r"^start of intervals has shape \(\)"),
    ("mask_mod no function", lambda: masks.mask_mod(3), TypeError, r"^fn of mask_mod is 3.*fn\(b, h, i, j, \*aux\)"),
    ("mask_mod Mask", lambda: masks.mask_mod(causal()), TypeError, r"^fn of mask_mod is Mask"),
    ("mask_mod arguments", lambda: masks.mask_mod(lambda i, j: True), TypeError, r"mask_mod.*b, h, i, j"),
    ("mask_mod over an array", lambda: masks.mask_mod(holds_an_array_by_default), TypeError, r"mask_mod.*'f'.*aux"),
    ("mask_mod aux", lambda: masks.mask_mod(lambda b, h, i, j, t: True, aux=ones(2)), TypeError, r"^aux of mask_mod is a ndarray"),
    ("mask_mod aux item", lambda: masks.mask_mod(lambda b, h, i, j, t: True, aux=([1],)), TypeError, r"^aux of mask_mod\[0\] is a list"),
    ("and with a number", lambda: causal() & 1, TypeError, r"unsupported operand"),
    ("or", lambda: causal() | causal(), TypeError, r"unsupported operand"),
    ("not", lambda: ~causal(), TypeError, r"bad operand"),
    ("`and`", lambda: causal() and causal(), TypeError, r"&"),
    ("dense align", lambda: causal().dense(2, 3), ValueError, r"(?s)^align is None, but causal\(\)"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, pattern", [pytest.param(*row[1:], id=row[0]) for row in CONSTRUCTORS])
def test_bad_mask(make, error, pattern):
    with pytest.raises(error) as caught:
        make()
    assert re.search(pattern, str(caught.value)), f"the message is: {caught.value}"


# ---- out ----


def frozen(x):
    x.flags.writeable = False
    return x


SHAPE = (2, 4, 5, 6)

OUT = [
    ("dtype", lambda a: ones(*SHAPE, dtype=np.float64), TypeError, r"^out has dtype float64.*q's, float32"),
    ("shape", lambda a: ones(2, 4, 5, 3), ValueError, r"^out has shape \(2, 4, 5, 3\).*\(2, 4, 5, 6\)"),
    ("rank", lambda a: ones(1, *SHAPE), ValueError, r"^out has shape \(1, 2, 4, 5, 6\).*\(2, 4, 5, 6\)"),
    ("list", lambda a: [0.0], TypeError, r"^out is a list"),
    ("read-only", lambda a: frozen(ones(*SHAPE)), ValueError, r"^out is read-only"),
    ("zero strides", lambda a: np.lib.stride_tricks.as_strided(ones(4, 5, 6), SHAPE, (0, 120, 24, 4)), ValueError, r"^out has strides \(0, 120, 24, 4\).*share memory"),
    ("sliding", lambda a: np.lib.stride_tricks.as_strided(ones(2000), SHAPE, (800, 200, 20, 4)), ValueError, r"^out has strides \(800, 200, 20, 4\).*share memory"),
    ("in q", lambda a: a["q"].reshape(-1)[:240].reshape(SHAPE), ValueError, r"^out shares memory with q.*memory of its own"),
    ("in v", lambda a: a["v"], ValueError, r"^out shares memory with v"),
    ("in k by one element", lambda a: np.lib.stride_tricks.as_strided(a["k"][-1, -1, -1, -1:], SHAPE, (480, 120, 24, 4)), ValueError, r"^out shares memory with k"),
    ("in bias", lambda a: a["bias"], ValueError, r"^out shares memory with bias"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, pattern", [pytest.param(*row[1:], id=row[0]) for row in OUT])
def test_bad_out(make, error, pattern):
    # Sizes that make each input large enough to hold the result.
    memory = {name: np.zeros(4096, F4) for name in ("q", "k", "v", "bias")}
    arguments = {
        "q": memory["q"][:480].reshape(2, 4, 5, 12),
        "k": memory["k"][:576].reshape(2, 4, 6, 12),
        "v": memory["v"][:288].reshape(2, 4, 6, 6),
        "bias": memory["bias"][:240].reshape(2, 4, 5, 6),
    }
    if "in v" in pattern or make(arguments) is arguments["v"]:
        arguments |= {"k": memory["k"][:480].reshape(2, 4, 5, 12), "v": memory["v"][:240].reshape(SHAPE)}
        arguments["bias"] = memory["bias"][:25].reshape(5, 5)
    with pytest.raises(error) as caught:
        call(arguments, out=make(arguments))
    assert re.search(pattern, str(caught.value)), f"the message is: {caught.value}"


def test_out_that_only_looks_shared_is_taken():
    """Bounds that overlap say nothing: interleaved columns of one buffer, and negative strides, are fine."""
    buffer = np.zeros((2, 4, 5, 12), F4)
    buffer[..., 0::2] = 1.0
    q = buffer[..., 0::2]
    for out in (buffer[..., 1::2], buffer[:, ::-1, :, 11::-2], buffer.swapaxes(1, 2).copy().swapaxes(1, 2)[..., :6]):
        call({"q": q, "k": np.ones((2, 4, 5, 6), F4), "v": np.ones((2, 4, 5, 6), F4)}, out=out)


def test_internal_overlap_is_exact():
    """Every stride pattern of a small array, against counting the addresses."""
    rng = seeds.generator(0)
    base = np.zeros(400, np.int16)
    found = set()
    for _ in range(2000):
        shape = tuple(rng.integers(1, 5, 3))
        strides = tuple(2 * int(s) for s in rng.integers(-12, 13, 3))
        x = np.lib.stride_tricks.as_strided(base[200:], shape, strides)
        cells = [sum(i * s for i, s in zip(at, strides, strict=True)) for at in np.ndindex(shape)]
        want = len(set(cells)) < len(cells)
        assert plan._overlaps_itself(x) == want, (shape, strides)
        found.add(want)
    assert found == {True, False}


# ---- good input that looks odd ----


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": 0}, {"scale": -2}, {"scale": np.float16(0.5)}, {"scale": np.array(0.5)}, {"softcap": 30},
        {"window": [None, None]}, {"window": (None, None), "align": "top_left"}, {"window": (np.int8(3), None), "align": 0},
        {"window": (2**80, 0), "align": -7}, {"causal": True, "align": np.array([3, 2], np.uint8)}, {"causal": np.True_, "align": np.int16(2)},
        {"dropout_p": 0, "seed": 3}, {"dropout_p": 0.0, "seed": 2**64 - 1}, {"dropout_p": np.float32(0.5), "seed": np.uint64(2**64 - 1)},
        {"aux": []}, {"sinks": np.ones(4)}, {"alibi_slopes": np.ones((2, 4), np.float16), "align": "bottom_right"},
        {"bias": np.array(0.0)}, {"bias": np.zeros((2, 1, 5, 1), np.float16)}, {"mask": np.array(True)}, {"mask": masks.Mask()},
        {"mask": np.ones((5, 7), bool, order="F")}, {"q": np.ones((2, 4, 5, 6), F4)[..., ::-2]}, {"q": np.broadcast_to(np.ones(3, F4), (2, 4, 5, 3))},
    ],
    ids=lambda arguments: ", ".join(f"{name}" for name in arguments),
)  # fmt: skip
def test_good_input(arguments):
    call(arguments)


def test_memmap_is_read_in_place(tmp_path):
    q = np.memmap(tmp_path / "q", F4, "w+", shape=(2, 4, 5, 3))
    problem = plan.resolve(q, GOOD["k"], GOOD["v"])
    assert type(problem.q) is np.ndarray
    assert np.shares_memory(problem.q, q)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "hsd", "shd", "sd"])
def test_nothing_is_copied(layout):
    shape = {"b": 1, "h": 1, "s": 5, "d": 3}
    x = np.ones([2 * shape[axis] for axis in layout], F4)[tuple(slice(0, None, 2) for _ in layout)]
    problem = plan.resolve(x, x, x, layout=layout)
    assert problem.q.shape == (1, 1, 5, 3)
    assert all(np.shares_memory(x, y) for y in (problem.q, problem.k, problem.v))
    assert plan.output_shape(problem) == x.shape
    assert plan.lse_shape(problem) == x.shape[:-1]
    out = np.empty_like(x)
    view = plan.check_out(problem, out)
    assert view.shape == (1, 1, 5, 3)
    assert np.shares_memory(view, out)
    assert plan.in_layout(view, layout).shape == x.shape


@pytest.mark.skipif(not hasattr(numba_attn, "attention"), reason="needs attention itself")
def test_settings_that_print_alike_are_told_apart():
    """NumPy prints 8 digits, and the ends of a long array: what is remembered between calls must not go by that."""
    rng = seeds.generator(0)
    q, k = rng.standard_normal((1200, 1, 4, 8)), rng.standard_normal((1200, 1, 9, 8))
    early, late = np.zeros(1200, int), np.zeros(1200, int)
    late[600] = 5
    for options in (
        {"causal": True, "align": early},
        {"causal": True, "align": late},
        {"scale": np.array(0.123456789)},
        {"scale": np.array(0.12345678)},
    ):
        got, want = numba_attn.attention(q, k, k, **options), reference.attention(q, k, k, **options)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_numpy_bools_are_told_apart():
    """np.bool_ is a causal= that checks accept and the call cache must not mistake."""
    q, k, v = seeds.generator(0).standard_normal((3, 1, 1, 9, 4))
    for causal in (np.True_, np.False_, True, np.False_, np.True_):
        got = numba_attn.attention(q, k, v, causal=causal)
        np.testing.assert_allclose(got, numba_attn.reference.attention(q, k, v, causal=bool(causal)), atol=1e-13)
