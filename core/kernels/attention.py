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

    `can_attend` says where it may be called. No output depends on the finite
    numbers behind it; others in the same block of 64 keys make it not a number.
    """
    return _CausalAttention.apply(q, k, v)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_readable(x, q.shape) for x in (q, k, v))
        out_NLHC, room = _empty_output(q), _room(q, 2)
        # Of no use without a backward pass, but a vector is made in no time.
        logs = torch.empty(*q.shape[:2], _num_blocks(q), _BLOCK)
        heads = _Heads(
            *(_Tensor.of(x) for x in (q, k, v)),
            out_NLHC.data_ptr(),
            logs.data_ptr(),
            room.data_ptr(),
            _Shape(*q.shape[:3]),
        )
        library().attend_causally(byref(heads), torch.get_num_threads())
        out = out_NLHC.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, logs)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, logs = ctx.saved_tensors
        grad, dots = _readable(grad, q.shape), torch.empty_like(logs)
        found, room = [_empty_output(q) for _ in range(3)], _room(q, 7)
        gradients = _Gradients(
            *(_Tensor.of(x) for x in (q, k, v, out, grad)),
            *(x.data_ptr() for x in (logs, dots, *found)),
            room.data_ptr(),
            _Shape(*q.shape[:3]),
        )
        library().differentiate_attention(byref(gradients), torch.get_num_threads())
        return tuple(x.transpose(1, 2) for x in found)


def _empty_output(q: Tensor) -> Tensor:
    num_sequences, num_heads, length, _ = q.shape
    return torch.empty(num_sequences, length, num_heads, _CHANNELS, dtype=torch.bfloat16)


def _room(q: Tensor, num_parts: int) -> Tensor:
    return torch.empty(num_parts, *q.shape[:2], _num_blocks(q), _BLOCK, _CHANNELS, dtype=torch.bfloat16)


def _num_blocks(q: Tensor) -> int:
    return -(-q.shape[2] // _BLOCK)


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
        _Tensor.of(x),
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
    for kernel in (found.attend_causally, found.differentiate_attention, found.place):
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

    @classmethod
    def of(cls, x: Tensor) -> "_Tensor":
        return cls(x.data_ptr(), *x.stride()[:3])


class _Shape(Structure):
    _fields_ = [(name, c_int64) for name in ("num_sequences", "num_heads", "length")]


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
        *((name, c_void_p) for name in ("out", "logs", "packed")),
        ("shape", _Shape),
    ]


class _Gradients(Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v", "out", "grad")),
        *((name, c_void_p) for name in ("logs", "dots", "dq", "dk", "dv", "packed")),
        ("shape", _Shape),
    ]
