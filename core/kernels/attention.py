"""Attention in bf16 on a CPU that multiplies bf16: two to three times as fast as torch's own kernels there."""

from ctypes import CDLL, Structure, byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from core.kernels import load_library, multiplies_bf16

_CHANNELS = 64  # of a head, which the kernel is made for
_BLOCK = 64  # keys that are packed together


def can_attend(q: Tensor) -> bool:
    """Whether the kernels take queries `(N, H, L, C)` such as these, and this machine has them."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-1] == _CHANNELS and library() is not None


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of `(N, H, L, C)`, each query seeing the keys up to its own; bf16 with float32 sums.

    Without a backward pass. `can_attend` says where it may be called. No output depends on the finite
    numbers behind it; others in the same block of 64 keys make it not a number.
    """
    num_sequences, num_heads, length, _ = q.shape
    tensors = [_readable(x, q.shape) for x in (q, k, v)]
    packed = torch.empty(2, num_sequences, num_heads, -(-length // _BLOCK), _BLOCK, _CHANNELS, dtype=torch.bfloat16)
    out_NLHC = torch.empty(num_sequences, length, num_heads, _CHANNELS, dtype=torch.bfloat16)
    heads = _Heads(
        *(_Tensor(x.data_ptr(), *x.stride()[:3]) for x in tensors),
        out_NLHC.data_ptr(),
        packed.data_ptr(),
        num_sequences,
        num_heads,
        length,
    )
    library().attend_causally(byref(heads), torch.get_num_threads())
    return out_NLHC.transpose(1, 2)


def place(x: Tensor, rotation: tuple[Tensor, Tensor] | None, epsilon: float) -> Tensor:
    """Queries or keys `(N, H, L, C)`, bf16, at unit root mean square and turned; one pass over them, rounded once.

    Without a backward pass. `can_attend` says where it may be called.

    Args:
        rotation: cosines and signed sines of the L slots, float32 `(L, C)`; None to turn nothing.
        epsilon: what is added to the mean square; 0 to leave the lengths as they are.
    """
    num_sequences, num_heads, length, _ = x.shape
    x = _readable(x, x.shape)
    y_NHLC = torch.empty(x.shape, dtype=torch.bfloat16)
    tables = [None, None] if rotation is None else [table.contiguous() for table in rotation]
    if rotation is not None and any(table.shape != x.shape[2:] or table.dtype != torch.float32 for table in tables):
        raise ValueError(f"tables of angles are float32 {tuple(x.shape[2:])}")
    places = _Places(
        _Tensor(x.data_ptr(), *x.stride()[:3]),
        y_NHLC.data_ptr(),
        *(table if table is None else table.data_ptr() for table in tables),
        num_sequences,
        num_heads,
        length,
        epsilon,
    )
    library().place(byref(places), torch.get_num_threads())
    return y_NHLC


@cache
def library() -> CDLL | None:
    """The built kernels; None where the processor or a compiler is missing. Looked for once per process."""
    found = load_library(Path(__file__).with_name("attention.cpp"), "-fopenmp") if multiplies_bf16() else None
    if found is None or not found.attention_is_supported():
        return None
    for kernel in (found.attend_causally, found.place):
        kernel.argtypes, kernel.restype = (c_void_p, c_int64), None
    return found


def _readable(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor as the kernels read it: bf16, its channels adjacent and in whole words.

    Raises:
        ValueError: if it is of another shape or type.
    """
    if x.shape != shape or shape[-1] != _CHANNELS or x.dtype != torch.bfloat16 or not x.is_cpu:
        raise ValueError(f"{x.dtype} {tuple(x.shape)} on {x.device}, not bfloat16 {tuple(shape[:-1])} + ({_CHANNELS},) on a CPU")
    sequence, head, row, channel = x.stride()
    is_readable = channel == 1 and not (sequence | head | row) % 2 and x.data_ptr() % 4 == 0
    return x if is_readable else x.clone(memory_format=torch.contiguous_format)


# The structures of attention.cpp, field by field.


class _Tensor(Structure):
    _fields_ = [("data", c_void_p), *((name, c_int64) for name in ("sequence", "head", "row"))]


class _Places(Structure):
    _fields_ = [
        ("x", _Tensor),
        *((name, c_void_p) for name in ("y", "cos", "sin")),
        *((name, c_int64) for name in ("num_sequences", "num_heads", "length")),
        ("epsilon", c_double),
    ]


class _Heads(Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v")),
        ("out", c_void_p),
        ("packed", c_void_p),
        *((name, c_int64) for name in ("num_sequences", "num_heads", "length")),
    ]
