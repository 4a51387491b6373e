"""Causal attention in bf16 on a CPU that multiplies bf16: two to three times as fast as torch's own kernel there."""

from ctypes import CDLL, Structure, byref, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from core.kernels import load_library

_CHANNELS = 64  # of a head, which the kernel is made for


def can_attend(q: Tensor) -> bool:
    """Whether `attend_causally` takes queries `(N, H, L, C)` such as these, and this machine has it."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-1] == _CHANNELS and library() is not None


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of `(N, H, L, C)`, each query seeing the keys up to its own; bf16 with float32 sums.

    Without a backward pass. `can_attend` says where it may be called. No output depends on what comes behind it.
    """
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    num_sequences, num_heads, length, _ = q.shape
    out_NLHC = torch.empty(num_sequences, length, num_heads, _CHANNELS, dtype=torch.bfloat16)
    heads = _Heads(
        *(_Tensor(x.data_ptr(), *x.stride()[:3]) for x in tensors), out_NLHC.data_ptr(), num_sequences, num_heads, length
    )
    library().attend_causally(byref(heads), torch.get_num_threads())
    return out_NLHC.transpose(1, 2)


@cache
def library() -> CDLL | None:
    """The built kernel; None where the processor or a compiler is missing. Looked for once per process."""
    found = load_library(Path(__file__).with_name("attention.cpp"))
    if found is None or not found.attention_is_supported():
        return None
    found.attend_causally.argtypes = (c_void_p, c_int64)
    found.attend_causally.restype = None
    return found


# The structures of attention.cpp, field by field.


class _Tensor(Structure):
    _fields_ = [("data", c_void_p), *((name, c_int64) for name in ("sequence", "head", "row"))]


class _Heads(Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v")),
        ("out", c_void_p),
        *((name, c_int64) for name in ("num_sequences", "num_heads", "length")),
    ]
