"""Linear layers of a few rows in bf16 on a CPU that multiplies bf16: two to three times as fast as torch's there."""

from ctypes import CDLL, Structure, byref, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from core.kernels import load_library, multiplies_bf16

_BLOCK = 64  # outputs and inputs of a block


def can_apply(weight_RC: Tensor) -> bool:
    """Whether the kernel takes a bf16 matrix `(outputs, inputs)`, and this machine has it."""
    is_whole = all(size % _BLOCK == 0 for size in weight_RC.shape)
    return is_whole and weight_RC.device.type == "cpu" and weight_RC.dtype == torch.bfloat16 and library() is not None


def pack(weight_RC: Tensor) -> Tensor:
    """The matrix in the blocks of `tiles.h`: `(outputs / 64, inputs / 64, pairs of inputs, outputs, 2)`."""
    num_outputs, num_inputs = weight_RC.shape
    blocks = weight_RC.view(num_outputs // _BLOCK, _BLOCK, num_inputs // _BLOCK, _BLOCK // 2, 2)
    return blocks.permute(0, 2, 3, 1, 4).contiguous()


def apply_linear(x_BC: Tensor, packed: Tensor, bias_R: Tensor | None) -> Tensor:
    """x W^T + b `(B, R)`, bf16, of a packed matrix and a float32 bias. No row depends on another."""
    num_panels, num_blocks = packed.shape[:2]
    num_inputs, num_outputs = num_blocks * _BLOCK, num_panels * _BLOCK
    if x_BC.shape != (len(x_BC), num_inputs) or x_BC.dtype != torch.bfloat16 or x_BC.device.type != "cpu":
        raise ValueError(f"{x_BC.dtype} {tuple(x_BC.shape)} on {x_BC.device}, not bfloat16 (rows, {num_inputs}) on a CPU")
    assert packed.is_contiguous()
    assert packed.data_ptr() % 64 == 0  # as torch allocates; the kernel reads whole vectors
    assert bias_R is None or (bias_R.shape == (num_outputs,) and bias_R.dtype == torch.float32 and bias_R.is_contiguous())
    x_BC = x_BC.contiguous()
    if x_BC.data_ptr() % 4:  # pairs of inputs are read as words
        x_BC = x_BC.clone()
    y_BR = torch.empty(len(x_BC), num_outputs, dtype=torch.bfloat16)
    bias = None if bias_R is None else bias_R.data_ptr()
    linear = _Linear(x_BC.data_ptr(), packed.data_ptr(), bias, y_BR.data_ptr(), *x_BC.shape, num_outputs)
    library().apply_linear(byref(linear), torch.get_num_threads())
    return y_BR


@cache
def library() -> CDLL | None:
    """The built kernel; None where the processor or a compiler is missing. Looked for once per process."""
    found = load_library(Path(__file__).with_name("linear.cpp"), "-fopenmp") if multiplies_bf16() else None
    if found is None or not found.linear_is_supported():
        return None
    found.apply_linear.argtypes, found.apply_linear.restype = (c_void_p, c_int64), None
    return found


class _Linear(Structure):
    """Of linear.cpp, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "bias", "y")),
        *((name, c_int64) for name in ("num_rows", "num_inputs", "num_outputs")),
    ]
