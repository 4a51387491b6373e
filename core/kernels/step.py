"""Steps of a few rows through a level in bf16 on a CPU that multiplies bf16, each as one call."""

from ctypes import CDLL, POINTER, Structure, byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from core.kernels import load_library, multiplies_bf16

CHANNELS = 64  # of a head, which the kernel is made for
BLOCK = 64  # outputs and inputs of a block


def run(step: "Step", x_BD: Tensor) -> Tensor:
    """What the layers make of one more element of every row, bf16 `(B, D)`; all of `step` but x, y and the room is filled in."""
    if x_BD.shape != (step.num_rows, step.dim) or x_BD.dtype != torch.bfloat16 or not x_BD.is_cpu:
        raise ValueError(f"{x_BD.dtype} {tuple(x_BD.shape)} on {x_BD.device}, not bfloat16 {(step.num_rows, step.dim)} on a CPU")
    x_BD, num_threads = x_BD.contiguous(), torch.get_num_threads()
    y_BD, room = torch.empty_like(x_BD), torch.empty(library().step_room(byref(step), num_threads))
    step.x, step.y, step.room = x_BD.data_ptr(), y_BD.data_ptr(), room.data_ptr()
    library().step_layers(byref(step), num_threads)
    return y_BD


def pack(weight_RC: Tensor, blocks: Tensor) -> None:
    """Writes a matrix in the blocks of `tiles.h` into memory of `blocks_shape`."""
    num_panels, num_blocks = blocks.shape[:2]
    blocks.copy_(weight_RC.view(num_panels, BLOCK, num_blocks, BLOCK // 2, 2).permute(0, 2, 3, 1, 4))


def blocks_shape(weight_RC: Tensor) -> tuple[int, ...]:
    """(outputs / 64, inputs / 64, pairs of inputs, outputs, 2)."""
    num_outputs, num_inputs = weight_RC.shape
    return num_outputs // BLOCK, num_inputs // BLOCK, BLOCK // 2, BLOCK, 2


@cache
def library() -> CDLL | None:
    """The built kernel; None where the processor or a compiler is missing. Looked for once per process."""
    found = load_library(Path(__file__).with_name("step.cpp"), "-fopenmp") if multiplies_bf16() else None
    if found is None or not found.step_is_supported():
        return None
    found.step_layers.argtypes, found.step_layers.restype = (c_void_p, c_int64), None
    found.step_room.argtypes, found.step_room.restype = (c_void_p, c_int64), c_int64
    return found


# The structures of step.cpp, field by field.


class Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("epsilon", c_double)]


class Linear(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("num_inputs", c_int64), ("num_outputs", c_int64)]


class Layer(Structure):
    _fields_ = [
        ("attention_norm", Norm),
        *((name, Linear) for name in ("qkv", "out")),
        ("ffn_norm", Norm),
        *((name, Linear) for name in ("ffn_in", "ffn_out")),
        *((name, c_double) for name in ("of_before", "of_input")),
    ]


class Step(Structure):
    _fields_ = [
        ("layers", POINTER(Layer)),
        ("norm", Norm),
        *((name, c_int64) for name in ("num_layers", "dim", "ffn_dim", "num_heads", "relu_squared")),
        ("qk_epsilon", c_double),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, c_int64) for name in ("num_rows", "num_slots")),
        *((name, c_void_p) for name in ("keys", "values", "slots", "mask")),
        ("num_read", c_int64),
        *((name, c_void_p) for name in ("x", "y", "room")),
    ]
