"""Bytes of a few rows of a MegaByte in bf16 on a CPU that multiplies bf16, each as one call."""

from ctypes import CDLL, POINTER, Structure, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from core.kernels import load_library, multiplies_bf16

CHANNELS = 64  # of a head, which the kernel is made for
BLOCK = 64  # outputs and inputs of a block


def pack(weight_RC: Tensor, blocks: Tensor) -> None:
    """Writes a matrix, filled up with zeros, in the blocks of `tiles.h` into memory of `blocks_shape`."""
    num_outputs, num_inputs = weight_RC.shape
    num_panels, num_blocks = blocks.shape[:2]
    padded = F.pad(weight_RC, (0, num_blocks * BLOCK - num_inputs, 0, num_panels * BLOCK - num_outputs))
    blocks.copy_(padded.view(num_panels, BLOCK, num_blocks, BLOCK // 2, 2).permute(0, 2, 3, 1, 4))


def blocks_shape(weight_RC: Tensor) -> tuple[int, ...]:
    """(outputs / 64, inputs / 64, pairs of inputs, outputs, 2)."""
    num_outputs, num_inputs = weight_RC.shape
    return -(-num_outputs // BLOCK), -(-num_inputs // BLOCK), BLOCK // 2, BLOCK, 2


@cache
def library() -> CDLL | None:
    """The built kernel; None where the processor or a compiler is missing. Looked for once per process."""
    found = load_library(Path(__file__).with_name("step.cpp"), "-fopenmp") if multiplies_bf16() else None
    if found is None or not found.is_supported():
        return None
    found.step_rows.argtypes, found.step_rows.restype = (c_void_p, c_int64, c_int64), None
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


class Conv(Structure):
    _fields_ = [("windows", Linear), ("kernel", c_int64)]


class Level(Structure):
    _fields_ = [
        ("layers", POINTER(Layer)),
        ("norm", Norm),
        *((name, c_int64) for name in ("num_layers", "dim", "ffn_dim", "num_heads", "span", "row_length", "memory")),
        *((name, c_void_p) for name in ("cos", "sin", "embedding")),
        ("byte_dim", c_int64),
        *((name, c_void_p) for name in ("byte_positions", "pad", "positions")),
        ("convs", POINTER(Conv)),
        ("num_convs", c_int64),
        *((name, Linear) for name in ("project", "unembedder")),
        ("num_slices", c_int64),
    ]


class Model(Structure):
    _fields_ = [
        ("levels", POINTER(Level)),
        *((name, c_int64) for name in ("num_levels", "patch_size", "real_previous", "relu_squared")),
        *((name, c_double) for name in ("qk_epsilon", "logit_softcap")),
        ("head", Linear),
    ]


class LevelState(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values")),
        ("num_slots", c_int64),
        ("from_parent", c_void_p),
        ("conv_tails", POINTER(c_void_p)),
    ]


class Rows(Structure):
    _fields_ = [
        ("model", POINTER(Model)),
        ("levels", POINTER(LevelState)),
        *((name, c_int64) for name in ("num_rows", "round_size")),
        *((name, c_void_p) for name in ("positions", "patch_bytes", "started", "uniforms", "given")),
        *((name, c_void_p) for name in ("temperatures", "top_ks", "top_ps", "logits", "bytes", "bits")),
        *((name, c_void_p) for name in ("x", "input", "words", "windows", "normalized", "qkv", "attended", "hidden")),
        *((name, c_void_p) for name in ("convolved", "weights")),
        ("num_weights", c_int64),
    ]
