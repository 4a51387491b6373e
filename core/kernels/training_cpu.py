"""Training on a CPU that multiplies bf16: products by oneDNN, and between them as few passes over the memory as there can be.

OneDNN adds the bias and takes the ReLU on the way; torch's product adds itself to the bias, which it has written before, and
takes a tenth longer. The gradients of a weight and its bias are one product, added up and written in float32; a sum and the norm
of it are one pass, and so are their gradients.
"""

# Shapes: N elements, D width, F inner width of the feed-forward layer.

from collections.abc import Sequence
from ctypes import CDLL, c_float, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from core.kernels import has_onednn, load_library, multiplies_bf16

_SLOPE = 1e-30  # of a ReLU for what is negative: oneDNN's own makes 0 of what is not a number
_OUTPUTS, _INPUTS = 128, 256  # of the part of a weight whose gradient a thread makes
_PART = 256  # rows of which a thread sums up what a norm's weight and bias get


def can_take(x: Tensor) -> bool:
    """Whether the kernels take what goes through a model: bf16 in whole vectors."""
    return x.dtype == torch.bfloat16 and x.shape[-1] % 16 == 0 and not torch.compiler.is_compiling()


def can_multiply(layer: nn.Linear) -> bool:
    """Whether the outputs of the layer fill whole vectors."""
    return layer.out_features % 16 == 0


def can_measure(logits_NV: Tensor) -> bool:
    """Whether `nll` takes them: those of 256 values that are learned from on a CPU that has the kernels."""
    has_form = logits_NV.is_cpu and logits_NV.dtype == torch.float32 and logits_NV.shape[1] == 256
    return has_form and logits_NV.requires_grad and not torch.compiler.is_compiling() and library() is not None


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """x W^T + b under autocast."""
    return _Linear.apply(x, layer.weight, layer.bias)


def feed_forward(x: Tensor, ffn_in: nn.Linear, ffn_out: nn.Linear, squares: bool) -> Tensor:
    """ffn_out(relu(ffn_in(x))), or with the square of the ReLU, under autocast."""
    return _FeedForward.apply(x, ffn_in.weight, ffn_in.bias, ffn_out.weight, ffn_out.bias, squares)


def add_normalized(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    return _AddNormalized.apply(x, y, norm.weight, norm.bias, norm.eps)


def normalized(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The norm of x."""
    return _AddNormalized.apply(x, None, norm.weight, norm.bias, norm.eps)[1]


def dropped(x: Tensor, probability: float) -> Tensor:
    """Dropout, by a seed from torch's generator: to draw each number from it takes a sixth of the time of a whole step."""
    return _Dropped.apply(x, probability, int(torch.randint(1 << 62, ())))


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32, whose gradients are products of bf16."""
    return _Logits.apply(x, weight)


def nll(logits_NV: Tensor, byte_ids_N: Tensor) -> Tensor:
    """-ln p `(N,)` of byte values from their float32 logits."""
    return _Nll.apply(logits_NV, byte_ids_N)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, weight = _rows(x), weight.bfloat16()
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        rows = _rows(grad)
        return (rows @ weight).view(*grad.shape[:-1], -1), *grads_of_weight(rows, x)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, squares: bool
    ) -> Tensor:
        rows, in_weight, out_weight = _rows(x), in_weight.bfloat16(), out_weight.bfloat16()
        hidden = _product(rows, in_weight, in_bias, "leaky_relu", [_SLOPE])
        if squares:
            hidden.square_()
        ctx.save_for_backward(rows, in_weight, hidden, out_weight)
        ctx.squares = squares
        return _product(hidden, out_weight, out_bias).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, in_weight, hidden, out_weight = ctx.saved_tensors
        rows = _rows(grad)
        grad_hidden = rows @ out_weight
        pointers = grad_hidden.data_ptr(), hidden.data_ptr()
        library().differentiate_relu(*pointers, ctx.squares, hidden.numel(), torch.get_num_threads())
        grad_x = (grad_hidden @ in_weight).view(grad.shape)
        return grad_x, *grads_of_weight(grad_hidden, x), *grads_of_weight(rows, hidden), None


class _AddNormalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor | None, Tensor]:
        rows, others = _rows(x), None if y is None else _rows(y)
        summed, normed = None if y is None else torch.empty_like(rows), torch.empty_like(rows)
        means, scales = torch.empty(2, len(rows))
        weight, bias = weight.float(), bias.float()
        inputs = (_pointer(tensor) for tensor in (rows, others, weight, bias))
        found = (_pointer(tensor) for tensor in (summed, means, scales, normed))
        library().normalize(*inputs, epsilon, *rows.shape, *found, torch.get_num_threads())
        ctx.save_for_backward(rows if summed is None else summed, means, scales, weight)
        ctx.set_materialize_grads(False)
        return None if summed is None else summed.view(x.shape), normed.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, means, scales, weight = ctx.saved_tensors
        rows, others = _rows(grad), None if grad_sum is None else _rows(grad_sum)
        found, (of_weight, of_bias) = torch.empty_like(x), torch.empty(2, _num_parts(x), x.shape[1])
        inputs = (_pointer(tensor) for tensor in (rows, others, x, means, scales, weight))
        outputs = (_pointer(tensor) for tensor in (found, of_weight, of_bias))
        library().differentiate_norm(*inputs, *x.shape, _PART, *outputs, torch.get_num_threads())
        found = found.view(grad.shape)
        return found, found if ctx.needs_input_grad[1] else None, of_weight.sum(0), of_bias.sum(0), None


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, probability: float, seed: int) -> Tensor:
        ctx.arguments = seed, min(int(probability * 2**32), 2**32 - 1), 1 / (1 - probability)
        return _drop(x, *ctx.arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _drop(grad, *ctx.arguments), None, None


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        rows = _rows(x)
        ctx.save_for_backward(rows, weight)
        return torch.ops.mkldnn._linear_pointwise(rows.float(), weight, None, "none", [], "").view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        rows = _rows(grad)
        return (rows @ weight.bfloat16()).view(*grad.shape[:-1], -1), rows.t() @ x


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, byte_ids_N: Tensor) -> Tensor:
        logits_NV, byte_ids_N = logits_NV.contiguous(), byte_ids_N.contiguous()
        logs_N, nll_N = (torch.empty(len(logits_NV)) for _ in range(2))
        sizes = len(logits_NV), torch.get_num_threads()
        library().nll(*(x.data_ptr() for x in (logits_NV, byte_ids_N, logs_N, nll_N)), *sizes)
        ctx.save_for_backward(logits_NV, byte_ids_N, logs_N)
        return nll_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, byte_ids_N, logs_N = ctx.saved_tensors
        grad_N, found_NV = grad_N.contiguous(), torch.empty_like(logits_NV)
        sizes = len(grad_N), torch.get_num_threads()
        library().differentiate_nll(*(x.data_ptr() for x in (logits_NV, byte_ids_N, logs_N, grad_N, found_NV)), *sizes)
        return found_NV, None


def _rows(x: Tensor) -> Tensor:
    """(N, D) in bf16."""
    return x.flatten(0, -2).bfloat16().contiguous()


def _product(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none", settings: Sequence[float] = ()) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias.bfloat16(), activation, settings, "")


def grads_of_weight(grad_NO: Tensor, x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weight `(O, I)` and its bias: grad^T x and the sums of grad over the rows."""
    (num_rows, outputs), inputs, num_threads = grad_NO.shape, x_NI.shape[1], torch.get_num_threads()
    # Ours does both at once, and rounds nothing to bf16, but has a thread for each whole part of a weight.
    if outputs % 16 or inputs % 64 or (outputs / _OUTPUTS) * (inputs / _INPUTS) < num_threads:
        return grad_NO.t() @ x_NI, grad_NO.sum(0, dtype=torch.float32)
    of_weight, of_bias = torch.empty(outputs, inputs), torch.empty(outputs)
    pointers = (tensor.data_ptr() for tensor in (of_weight, of_bias))
    sizes = num_rows, outputs, inputs
    library().differentiate_weight(grad_NO.data_ptr(), x_NI.data_ptr(), *sizes, *pointers, num_threads)
    return of_weight, of_bias


def _drop(x: Tensor, seed: int, threshold: int, scale: float) -> Tensor:
    x = x.bfloat16().contiguous()
    y = torch.empty_like(x)
    library().drop(x.data_ptr(), seed, threshold, scale, x.numel(), y.data_ptr(), torch.get_num_threads())
    return y


def _num_parts(rows: Tensor) -> int:
    return -(-len(rows) // _PART)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def library() -> CDLL | None:
    """The built kernels; None where the processor, oneDNN or a compiler is missing. Looked for once per process."""
    is_possible = multiplies_bf16() and has_onednn()
    found = load_library(Path(__file__).with_name("training_cpu.cpp"), "-fopenmp") if is_possible else None
    if found is None or not found.training_is_supported():
        return None
    found.differentiate_relu.argtypes = (c_void_p, c_void_p, *3 * [c_int64])
    found.differentiate_weight.argtypes = (c_void_p, c_void_p, *3 * [c_int64], c_void_p, c_void_p, c_int64)
    found.nll.argtypes = (*4 * [c_void_p], c_int64, c_int64)
    found.differentiate_nll.argtypes = (*5 * [c_void_p], c_int64, c_int64)
    found.normalize.argtypes = (*4 * [c_void_p], c_float, c_int64, c_int64, *4 * [c_void_p], c_int64)
    found.differentiate_norm.argtypes = (*6 * [c_void_p], *3 * [c_int64], *3 * [c_void_p], c_int64)
    found.drop.argtypes = (c_void_p, c_uint64, c_uint32, c_float, c_int64, c_void_p, c_int64)
    gradients = found.differentiate_relu, found.differentiate_weight, found.differentiate_norm, found.differentiate_nll
    for kernel in (found.drop, found.nll, found.normalize, *gradients):
        kernel.restype = None
    return found
