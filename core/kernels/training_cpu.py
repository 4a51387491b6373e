"""Training on a CPU that multiplies bf16: products by oneDNN, and between them as few passes over the memory as there can be.

OneDNN adds the bias and takes the ReLU on the way; torch's product adds itself to the bias, which it has written before, and
takes a tenth longer. The gradients of a weight and its bias are one product, added up and written in float32. A sum and the norm
of it are one pass, so are their gradients, and so is all that a level below the first reads.
Scores in bf16 take the sums and norms alone.
"""

# Shapes: B sequences, N elements, L elements of a row, D width, V values of a byte; I inputs and O outputs of a layer.

from collections.abc import Sequence
from ctypes import CDLL, c_float, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from core.kernels import RELU_SLOPE, has_onednn, load_tiled_library, multiplies_tiles

_MANY_ROWS = 2048  # in a product, for which tiles of a weight are worth laying out first; for 1024 they are not
_PART = 256  # rows of which a thread sums up what biases, norms, pads and positions get


def can_take(x: Tensor) -> bool:
    """Whether the kernels take what goes through a model, bf16 in whole vectors, and this machine has them."""
    has_form = x.is_cpu and x.dtype == torch.bfloat16 and x.shape[-1] % 16 == 0
    return has_form and not torch.compiler.is_compiling() and library() is not None


def can_multiply(layer: nn.Linear) -> bool:
    """Whether the outputs of the layer fill whole vectors."""
    return layer.out_features % 16 == 0


def can_measure(logits_NV: Tensor, byte_ids_N: Tensor) -> bool:
    """Whether `nll` takes them: float32 logits of 256 values that are learned from under autocast, and as many int64."""
    has_form = logits_NV.is_cpu and logits_NV.dtype == torch.float32 and logits_NV.shape == (len(byte_ids_N), 256)
    is_learning = logits_NV.requires_grad and torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return has_form and byte_ids_N.dtype == torch.int64 and is_learning and library() is not None


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """x W^T + b under autocast."""
    return _Linear.apply(x, layer.weight, layer.bias)


def feed_forward(x: Tensor, ffn_in: nn.Linear, ffn_out: nn.Linear, squares: bool) -> Tensor:
    """ffn_out(relu(ffn_in(x))), or with the square of the ReLU, under autocast."""
    return _FeedForward.apply(x, ffn_in.weight, ffn_in.bias, ffn_out.weight, ffn_out.bias, squares)


def embedded(
    byte_ids: Tensor, embedding: Tensor, pad: Tensor, positions: Tensor | None, from_parents: Tensor, row_length: int
) -> Tensor:
    """What elements `(B, N, D)` of rows read, in bf16: a byte's embedding, their slot's position, and what their parents say.

    Args:
        byte_ids: `(B, N)`, int64: bytes, or -1 for the pad. Nothing else is looked for.
        embedding: `(256, D)`.
        pad: `(D,)`.
        positions: `(L, D)`, if slots have any.
        from_parents: `(B, N, D)`, bf16.
        row_length: L, which N is a multiple of.
    """
    assert byte_ids.shape == from_parents.shape[:-1]
    assert byte_ids.dtype == torch.int64
    assert len(embedding) == 256
    return _Embedded.apply(byte_ids, embedding, pad, positions, from_parents, row_length)


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
    """-ln p `(N,)` of byte values from their float32 logits; not a number for what is no byte."""
    return _Nll.apply(logits_NV, byte_ids_N)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, weight = _rows(x), weight.bfloat16()
        ctx.save_for_backward(rows, weight)
        return _shaped(_product(rows, weight, bias), x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        rows = _rows(grad)
        return (rows @ weight).view(*grad.shape[:-1], x.shape[1]), *grads_of_weight(rows, x)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, squares: bool
    ) -> Tensor:
        rows, in_weight, out_weight = _rows(x), in_weight.bfloat16(), out_weight.bfloat16()
        hidden = _product(rows, in_weight, in_bias, "leaky_relu", [RELU_SLOPE])
        if squares:
            hidden.square_()
        ctx.save_for_backward(rows, in_weight, hidden, out_weight)
        ctx.squares = squares
        return _shaped(_product(hidden, out_weight, out_bias), x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, in_weight, hidden, out_weight = ctx.saved_tensors
        rows = _rows(grad)
        grad_hidden = rows @ out_weight
        _run("differentiate_relu", grad_hidden, hidden, ctx.squares, hidden.numel())
        grad_x = (grad_hidden @ in_weight).view(grad.shape)
        return grad_x, *grads_of_weight(grad_hidden, x), *grads_of_weight(rows, hidden), None


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, byte_ids: Tensor, embedding: Tensor, pad: Tensor, positions: Tensor | None, from_parents: Tensor, row_length: int
    ) -> Tensor:
        rows, byte_ids, out = _rows(from_parents), byte_ids.contiguous(), _room(from_parents)
        parameters = [None if parameter is None else parameter.float().contiguous() for parameter in (embedding, pad, positions)]
        _run("embed", byte_ids, *parameters, rows, len(rows), row_length, rows.shape[1], out)
        ctx.save_for_backward(byte_ids)
        ctx.shapes = [None if parameter is None else parameter.shape for parameter in parameters]
        ctx.row_length = row_length
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (byte_ids,) = ctx.saved_tensors
        rows = _rows(grad)
        found = [None if shape is None else torch.empty(shape, dtype=torch.float32) for shape in ctx.shapes]
        _run("differentiate_embedding", rows, byte_ids, len(rows), ctx.row_length, rows.shape[1], _PART, *found)
        return None, *found, rows.view(grad.shape), None


class _AddNormalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor | None, Tensor]:
        rows, others = _rows(x), None if y is None else _rows(y)
        weight, bias = (parameter.float().contiguous() for parameter in (weight, bias))
        summed, normed = None if y is None else _room(x), _room(x)
        means, scales = torch.empty(2, len(rows), dtype=torch.float32)
        _run("normalize", rows, others, weight, bias, epsilon, *rows.shape, summed, means, scales, normed)
        ctx.save_for_backward(rows if summed is None else summed, means, scales, weight)
        ctx.set_materialize_grads(False)
        return summed, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, means, scales, weight = ctx.saved_tensors
        if grad is None:  # nothing came of the norm
            return grad_sum, grad_sum, None, None, None
        rows, others = _rows(grad), None if grad_sum is None else _rows(grad_sum)
        num_parts = -(-len(rows) // _PART)
        grad_x, (of_weight, of_bias) = _room(grad), torch.empty(2, num_parts, rows.shape[1], dtype=torch.float32)
        _run("differentiate_norm", rows, others, x, means, scales, weight, *rows.shape, _PART, grad_x, of_weight, of_bias)
        return grad_x, grad_x if ctx.needs_input_grad[1] else None, of_weight.sum(0), of_bias.sum(0), None


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
        found = torch.ops.mkldnn._linear_pointwise(rows.float(), weight, None, "none", [], "")
        return found.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        rows = _rows(grad)
        return (rows @ weight.bfloat16()).view(*grad.shape[:-1], x.shape[1]), rows.t() @ x


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, byte_ids_N: Tensor) -> Tensor:
        logits_NV, byte_ids_N = logits_NV.contiguous(), byte_ids_N.contiguous()
        tops_N, logs_N, nll_N = torch.empty(3, len(logits_NV), dtype=torch.float32)
        _run("nll", logits_NV, byte_ids_N, tops_N, logs_N, nll_N, len(logits_NV))
        ctx.save_for_backward(logits_NV, byte_ids_N, tops_N, logs_N)
        return nll_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, byte_ids_N, tops_N, logs_N = ctx.saved_tensors
        grad_logits_NV = torch.empty_like(logits_NV)
        _run("differentiate_nll", logits_NV, byte_ids_N, tops_N, logs_N, grad_N.contiguous(), grad_logits_NV, len(logits_NV))
        return grad_logits_NV, None


def _rows(x: Tensor) -> Tensor:
    """(N, D) in bf16."""
    return x.flatten(0, -2).bfloat16().contiguous()


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """(..., D), which is no view: FSDP warns of a layer that returns one."""
    return torch.ops.aten._unsafe_view(rows, (*shape[:-1], rows.shape[1]))


def _room(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bfloat16)


def _product(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none", settings: Sequence[float] = ()) -> Tensor:
    if len(x) >= _MANY_ROWS and multiplies_tiles():
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias.bfloat16(), activation, settings, "")


def grads_of_weight(grad_NO: Tensor, x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weight `(O, I)` and its bias: grad^T x, rounded to bf16 where torch multiplies, and the sums of grad over the rows."""
    (num_rows, outputs), inputs = grad_NO.shape, x_NI.shape[1]
    # Ours does both at once and rounds nothing to bf16.
    is_slower = multiplies_tiles() and not library().uses_tiles()
    if num_rows == 0 or outputs % 16 or inputs % 64 or is_slower:
        return grad_NO.t() @ x_NI, _sum_rows(grad_NO)
    of_weight, of_bias = (torch.empty(size, dtype=torch.float32) for size in ((outputs, inputs), outputs))
    room = torch.empty(library().room_for_weight(outputs, inputs), dtype=torch.uint8)
    _run("differentiate_weight", grad_NO, x_NI, num_rows, outputs, inputs, of_weight, of_bias, room)
    return of_weight, of_bias


def _sum_rows(x_NO: Tensor) -> Tensor:
    """The sum of the rows, float32 `(O,)`. Torch makes a float32 copy of them all first: 4.7 ms for 8192 x 1024 on two cores."""
    if x_NO.shape[1] % 16:
        return x_NO.sum(0, dtype=torch.float32)
    sums = torch.empty(-(-len(x_NO) // _PART), x_NO.shape[1], dtype=torch.float32)
    _run("sum_rows", x_NO, *x_NO.shape, _PART, sums)
    return sums.sum(0)


def _drop(x: Tensor, seed: int, threshold: int, scale: float) -> Tensor:
    x = x.bfloat16().contiguous()
    y = torch.empty_like(x)
    _run("drop", x, seed, threshold, scale, x.numel(), y)
    return y


def _run(kernel: str, *arguments: Tensor | float | None) -> None:
    """A kernel on the memory of contiguous tensors, which are held for so long."""
    values = (argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
    getattr(library(), kernel)(*values, torch.get_num_threads())


@cache
def library() -> CDLL | None:
    """The built kernels; None where the processor, oneDNN or a compiler is missing. Looked for once per process."""
    found = load_tiled_library(Path(__file__).with_name("training_cpu.cpp")) if has_onednn() else None
    if found is None:
        return None
    pointer, count = c_void_p, c_int64
    signatures = {
        "drop": (pointer, c_uint64, c_uint32, c_float, count, pointer),
        "differentiate_relu": (*2 * [pointer], count, count),
        "differentiate_weight": (*2 * [pointer], *3 * [count], *3 * [pointer]),
        "embed": (*5 * [pointer], *3 * [count], pointer),
        "differentiate_embedding": (*2 * [pointer], *4 * [count], *3 * [pointer]),
        "sum_rows": (pointer, *3 * [count], pointer),
        "normalize": (*4 * [pointer], c_float, count, count, *4 * [pointer]),
        "differentiate_norm": (*6 * [pointer], *3 * [count], *3 * [pointer]),
        "nll": (*5 * [pointer], count),
        "differentiate_nll": (*6 * [pointer], count),
    }
    for name, arguments in signatures.items():
        kernel = getattr(found, name)
        kernel.argtypes, kernel.restype = (*arguments, count), None
    found.room_for_weight.argtypes, found.room_for_weight.restype = (count, count), count
    return found
