"""Attention in bf16 on a CPU that multiplies bf16: two to three times as fast as torch's own kernels there."""

from ctypes import CDLL, Structure, byref, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from core.kernels import load_library

_CHANNELS = 64  # of a head, which the kernel is made for


def can_attend(q: Tensor) -> bool:
    """Whether the kernels take queries `(N, H, L, C)` such as these, and this machine has them."""
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


def attend_to_slots(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of one query `(B, H, 1, C)` and S slots `(B, H, S, C)` of a cache; no backward pass.

    Args:
        mask: bf16 `(B, 1, 1, S)`, 0 or minus infinity, or None. Masked slots are not read; each query has one that is not.
    """
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (q[:, :, 0], keys, values)]
    num_sequences, num_heads, num_slots, _ = keys.shape
    out_BHC = torch.empty(num_sequences, num_heads, _CHANNELS, dtype=torch.bfloat16)
    steps = _Steps(
        _Tensor(tensors[0].data_ptr(), *tensors[0].stride()[:2], 0),
        *(_Tensor(x.data_ptr(), *x.stride()[:3]) for x in tensors[1:]),
        None if mask is None else mask.data_ptr(),
        0 if mask is None else mask.stride(0),
        out_BHC.data_ptr(),
        num_sequences,
        num_heads,
        num_slots,
    )
    library().attend_to_slots(byref(steps), torch.get_num_threads())
    return out_BHC[:, :, None]


@cache
def library() -> CDLL | None:
    """The built kernels; None where the processor or a compiler is missing. Looked for once per process."""
    found = load_library(Path(__file__).with_name("attention.cpp"), "-fopenmp")
    if found is None or not found.attention_is_supported():
        return None
    for kernel in (found.attend_causally, found.attend_to_slots):
        kernel.argtypes, kernel.restype = (c_void_p, c_int64), None
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


class _Steps(Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("q", "keys", "values")),
        ("mask", c_void_p),
        ("mask_stride", c_int64),
        ("out", c_void_p),
        *((name, c_int64) for name in ("num_sequences", "num_heads", "num_slots")),
    ]
