"""Matrix products of training on a GPU, in the layouts it multiplies fastest, with what lies around them in one pass.

Between the products of a feed-forward layer lie its widest activations, which kernels of their own would read and write four
more times: here (Triton) the first product writes its squared ReLU at once, and the backward one its derivative and what the
bias gets of it.
"""

# Shapes: N elements, D width, F inner width of the feed-forward layer.

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

_COLUMNS = 64  # summed at a time
# Rows and outputs of a tile, warps, stages: the fastest on an H100.
_FORWARD_TILE = (256, 128, 8, 3)
_BACKWARD_TILE = (128, 128, 4, 4)


def try_out(device: torch.device) -> None:
    """Runs each kernel once, which fails where they cannot be built or find no room."""
    x, weight = torch.zeros(2, 8, 8, device=device, dtype=torch.bfloat16)
    hidden = activated(x, weight, weight[0], True)
    grad_of_activated(x, weight, hidden, True)


def can_multiply(layer: nn.Linear) -> bool:
    """Whether all rows of its matrix and of what goes in and out begin at multiples of 16 bytes, where tiles can be copied."""
    return layer.in_features % 8 == 0 and layer.out_features % 8 == 0


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """x W^T + b under autocast."""
    return _Linear.apply(*_narrow(x, layer.weight, layer.bias))


def feed_forward(x: Tensor, ffn_in: nn.Linear, ffn_out: nn.Linear, squares: bool) -> Tensor:
    """ffn_out(relu(ffn_in(x))), or with the square of the ReLU, under autocast."""
    return _FeedForward.apply(*_narrow(x, ffn_in.weight, ffn_in.bias, ffn_out.weight, ffn_out.bias), squares)


def _narrow(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [tensor.to(dtype) for tensor in tensors]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return _grad_of_input(grad, weight), _grad_of_weight(grad, x), grad.flatten(0, -2).sum(0)


class _FeedForward(torch.autograd.Function):
    """Keeps the activated values alone: the derivative is a function of them."""

    @staticmethod
    def forward(ctx, x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, squares: bool) -> Tensor:
        hidden_NF = activated(x.flatten(0, -2), w_in, b_in, squares)
        ctx.save_for_backward(x, hidden_NF, w_in, w_out)
        ctx.squares = squares
        return F.linear(hidden_NF, w_out, b_out).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden_NF, w_in, w_out = ctx.saved_tensors
        grad_ND = grad.flatten(0, -2)
        grad_NF, sums = grad_of_activated(grad_ND, w_out, hidden_NF, ctx.squares)
        return (
            _grad_of_input(grad_NF, w_in).view(x.shape),
            _grad_of_weight(grad_NF, x),
            sums.sum(0).to(grad.dtype),
            _grad_of_weight(grad_ND, hidden_NF),
            grad_ND.sum(0),
            None,
        )


def _grad_of_input(grad: Tensor, weight: Tensor) -> Tensor:
    # By a transposed copy of the small matrix: with both operands along the summed dimension it is twice as fast.
    return F.linear(grad, weight.t().contiguous())


def _grad_of_weight(grad: Tensor, x: Tensor) -> Tensor:
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


@torch.library.custom_op("megabyte::activated", mutates_args=())
def activated(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, squares: bool) -> Tensor:
    """relu(x W^T + b) `(N, F)`, or its square."""
    out_NF = x_ND.new_empty(len(x_ND), len(weight_FD))
    _launch(x_ND, weight_FD, bias_F, out_NF, out_NF, squares=squares, backward=False)
    return out_NF


@activated.register_fake
def _(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, squares: bool) -> Tensor:
    return x_ND.new_empty(len(x_ND), len(weight_FD))


@torch.library.custom_op("megabyte::grad_of_activated", mutates_args=())
def grad_of_activated(grad_ND: Tensor, weight_DF: Tensor, hidden_NF: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    """The gradient `(N, F)` before the ReLU whose values, or their squares, are `hidden_NF`; and its sums, float32 `(tiles, F)`.

    Args:
        grad_ND: of hidden W^T.
        weight_DF: that W.
    """
    out_NF, sums = _room_for_gradient(hidden_NF)
    _launch(grad_ND, weight_DF, sums, hidden_NF, out_NF, squares=squares, backward=True)
    return out_NF, sums


@grad_of_activated.register_fake
def _(grad_ND: Tensor, weight_DF: Tensor, hidden_NF: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    return _room_for_gradient(hidden_NF)


def _room_for_gradient(hidden_NF: Tensor) -> tuple[Tensor, Tensor]:
    num_tiles = -(-len(hidden_NF) // _BACKWARD_TILE[0])
    return torch.empty_like(hidden_NF), hidden_NF.new_empty(num_tiles, hidden_NF.shape[1], dtype=torch.float32)


def _launch(
    x_ND: Tensor, weight: Tensor, bias_or_sums: Tensor, hidden_NF: Tensor, out_NF: Tensor, *, squares: bool, backward: bool
) -> None:
    """`_product` into `out_NF`; tiles that reach beyond the end are filled with zeros and cut when they are written."""
    num_rows, num_outputs = out_NF.shape
    rows, outputs, num_warps, num_stages = _BACKWARD_TILE if backward else _FORWARD_TILE
    weight_tile = [_COLUMNS, outputs] if backward else [outputs, _COLUMNS]
    tiles = ((x_ND, [rows, _COLUMNS]), (weight, weight_tile), (hidden_NF, [rows, outputs]), (out_NF, [rows, outputs]))
    tiled = (TensorDescriptor.from_tensor(tensor.contiguous(), tile) for tensor, tile in tiles)
    num_programs = torch.cuda.get_device_properties(out_NF.device).multi_processor_count
    with torch.cuda.device(out_NF.device):  # Triton launches on the current one
        _product[(num_programs,)](
            *tiled, bias_or_sums, num_rows, num_outputs, x_ND.shape[1], num_programs,
            SQUARES=squares, BACKWARD=backward, ROWS=rows, OUTPUTS=outputs, COLUMNS=_COLUMNS,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip


@triton.jit
def _product(
    x, weight, hidden, out, bias_or_sums_ptr, num_rows, num_outputs, num_columns, num_programs,
    SQUARES: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_output_tiles = tl.cdiv(num_outputs, OUTPUTS)
    num_tiles = tl.cdiv(num_rows, ROWS) * num_output_tiles
    # As many programs as there are processors, a tile after another: one is written while the next one is read.
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=True):
        row_tile = tile // num_output_tiles
        first_row, first_output = row_tile * ROWS, tile % num_output_tiles * OUTPUTS
        sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
        for column in range(0, num_columns, COLUMNS):
            if BACKWARD:
                sums = tl.dot(x.load([first_row, column]), weight.load([column, first_output]), sums)
            else:
                sums = tl.dot(x.load([first_row, column]), weight.load([first_output, column]).T, sums)
        output = first_output + tl.arange(0, OUTPUTS)
        is_output = output < num_outputs
        if BACKWARD:
            values = hidden.load([first_row, first_output]).to(tl.float32)
            if SQUARES:
                y = sums * 2.0 * tl.sqrt(values)
            else:
                y = tl.where(values <= 0.0, 0.0, sums)
            tl.store(bias_or_sums_ptr + row_tile * num_outputs + output, tl.sum(y, axis=0), mask=is_output)
        else:
            y = sums + tl.load(bias_or_sums_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if SQUARES:
                y = y * y
        out.store([first_row, first_output], y.to(out.dtype))
