"""Attention in bf16 on a CPU that multiplies bf16: two to three times as fast as torch's own kernels there.

Where the processor multiplies tiles (AMX), these do so too.
"""

from collections.abc import Sequence
from ctypes import CDLL, Structure, byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from core.kernels import load_tiled_library, multiplies_tiles

_CHANNELS = 64  # of a head, which the kernel is made for
_BLOCK = 64  # keys that are packed together
_SHORT_ROW = 16  # up to which nothing is packed: `kShort` of attention.cpp
_TILED_ROW = {False: 128, True: 512}  # from which on torch's tiles are faster than none, without and with gradients

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines of the slots, float32 (L, C)


def can_attend(q: Tensor) -> bool:
    """Whether the kernels take queries `(..., H, L, C)` such as these, and this machine has them and they are faster there."""
    if not can_place(q):
        return False
    length, has_tiles = q.shape[-2], library().uses_tiles()
    # Half a block of padding costs little by tiles or without gradients; else torch's products are as fast up to twice a block.
    first = _BLOCK // 2 if has_tiles or not q.requires_grad else 2 * _BLOCK
    is_faster_by_torch = not has_tiles and multiplies_tiles() and length >= _TILED_ROW[q.requires_grad]
    return (length <= _SHORT_ROW or length > first) and not is_faster_by_torch


def can_place(q: Tensor) -> bool:
    """Whether the kernels take the heads of these queries or keys, and this machine has them."""
    has_form = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-1] == _CHANNELS
    # A compiler must not see the cached function.
    return has_form and not torch.compiler.is_compiling() and library() is not None


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of `(N, H, L, C)`, each query seeing the keys up to its own; bf16 with float32 sums.

    `can_attend` says where it may be called. No output depends on the finite
    numbers behind it; others in the same block of 64 keys make it not a number.
    """
    return _CausalAttention.apply(None, 0.0, q, k, v)


def attend_to_placed(qkv_NL3HC: Tensor, rotation: Rotation | None, epsilon: float) -> Tensor:
    """As `attend_causally`, after `place` of queries and keys: of the three in one tensor, as a layer's product makes them.

    So are their gradients.
    """
    return _CausalAttention.apply(rotation, epsilon, qkv_NL3HC)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rotation: Rotation | None, epsilon: float, *heads: Tensor) -> Tensor:
        q, k, v = heads if len(heads) == 3 else _parts(heads[0])
        q, k, v = (_readable(x, q.shape) for x in (q, k, v))
        placed_q, placed_k = (place(x, rotation, epsilon) for x in (q, k)) if rotation or epsilon else (q, k)
        is_short = q.shape[2] <= _SHORT_ROW
        out_NLHC, room = torch.empty(q.transpose(1, 2).shape, dtype=torch.bfloat16), _room(q, 0 if is_short else 2)
        # Of no use without a backward pass, but a vector is made in no time.
        logs = torch.empty(0 if is_short else q.shape[0], q.shape[1], _num_blocks(q), _BLOCK)
        arguments = _Heads(
            *(_Tensor.of(x) for x in (placed_q, placed_k, v)),
            out_NLHC.data_ptr(),
            logs.data_ptr(),
            room.data_ptr(),
            _Shape(*q.shape[:3]),
        )
        library().attend_causally(byref(arguments), torch.get_num_threads())
        out = out_NLHC.transpose(1, 2)
        ctx.save_for_backward(q, k, v, placed_q, placed_k, out, logs, *(rotation or ()))
        ctx.epsilon, ctx.is_joint = epsilon, len(heads) == 1
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, placed_q, placed_k, out, logs, *rotation = ctx.saved_tensors
        grad, dots = _readable(grad, q.shape), torch.empty_like(logs)
        found_NL3HC = torch.empty(len(q), q.shape[2], 3, q.shape[1], _CHANNELS, dtype=torch.bfloat16)
        room = _room(q, 0 if q.shape[2] <= _SHORT_ROW else 7)
        places, _tables = _places_of(rotation, ctx.epsilon, q.shape)
        arguments = _Gradients(
            *(_Tensor.of(x) for x in (placed_q, placed_k, v, out, grad)),
            *(x.data_ptr() for x in (logs, dots, found_NL3HC, room)),
            *(_Tensor.of(x) for x in (q, k)),
            places,
            _Shape(*q.shape[:3]),
        )
        library().differentiate_attention(byref(arguments), torch.get_num_threads())
        return None, None, *([found_NL3HC] if ctx.is_joint else _parts(found_NL3HC))


def _parts(qkv_NL3HC: Tensor) -> list[Tensor]:
    """Queries, keys and values `(N, H, L, C)`."""
    return [part.transpose(1, 2) for part in qkv_NL3HC.unbind(2)]


def _room(q: Tensor, num_parts: int) -> Tensor:
    return torch.empty(num_parts, *q.shape[:2], _num_blocks(q), _BLOCK, _CHANNELS, dtype=torch.bfloat16)


def _num_blocks(q: Tensor) -> int:
    return -(-q.shape[2] // _BLOCK)


def place(x: Tensor, rotation: Rotation | None, epsilon: float) -> Tensor:
    """Queries or keys `(N, H, L, C)`, bf16, at unit root mean square and turned; one pass over them, rounded once.

    Without a backward pass. `can_place` says where it may be called.

    Args:
        rotation: cosines and signed sines of the L slots, float32 `(L, C)`; None to turn nothing.
        epsilon: what is added to the mean square; 0 to leave the lengths as they are.
    """
    x, y_NHLC = _readable(x, x.shape), torch.empty(x.shape, dtype=torch.bfloat16)
    places, _tables = _places_of(rotation or (), epsilon, x.shape)
    arguments = _Tensor.of(x), places, _Shape(*x.shape[:3])
    tensor, places, shape = (byref(argument) for argument in arguments)
    library().place(tensor, y_NHLC.data_ptr(), places, shape, torch.get_num_threads())
    return y_NHLC


def _places_of(rotation: Sequence[Tensor], epsilon: float, shape: tuple[int, ...]) -> tuple["_Places", list[Tensor]]:
    """With the tables that it points to."""
    tables = [table.contiguous() for table in rotation]
    if any(table.shape != shape[2:] or table.dtype != torch.float32 for table in tables):
        raise ValueError(f"tables of angles are float32 {tuple(shape[2:])}")
    return _Places(*([table.data_ptr() for table in tables] or [None, None]), epsilon), tables


@cache
def library() -> CDLL | None:
    """The built kernels; None where the processor or a compiler is missing. Looked for once per process."""
    found = load_tiled_library(Path(__file__).with_name("attention.cpp"))
    if found is None:
        return None
    for kernel, num_pointers in ((found.attend_causally, 1), (found.differentiate_attention, 1), (found.place, 4)):
        kernel.argtypes, kernel.restype = (*num_pointers * [c_void_p], c_int64), None
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
    _fields_ = [("cos", c_void_p), ("sin", c_void_p), ("epsilon", c_double)]


class _Heads(Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v")),
        *((name, c_void_p) for name in ("out", "logs", "packed")),
        ("shape", _Shape),
    ]


class _Gradients(Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v", "out", "grad")),
        *((name, c_void_p) for name in ("logs", "dots", "found", "packed")),
        *((name, _Tensor) for name in ("unplaced_q", "unplaced_k")),
        ("places", _Places),
        ("shape", _Shape),
    ]
