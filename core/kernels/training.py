"""Matrix products of training on a GPU, in the layouts it multiplies fastest, with what lies around them in one pass.

Between the products of a feed-forward layer lie its widest activations, which kernels of their own would read and write four
more times: here (Triton) the first product writes its squared ReLU at once, and the backward one its derivative and what the
bias gets of it. So do queries and keys lie between a product and attention: one pass normalises and turns them, and one makes
of the gradients of all three what the product's output and bias get.
"""

# Shapes: N = P M elements in P parts, D width, F inner width of the feed-forward layer, B rows of L elements, H heads,
# C channels per head, E = 3 H C.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor


class _Tile(NamedTuple):
    """How `_product` divides its work: tiles of rows and outputs, summed so many columns at a time, written in two halves."""

    rows: int
    outputs: int
    columns: int
    warps: int
    stages: int
    programs: int  # at once on a processor


# The fastest on an H100; two programs on a processor: one writes while the other one multiplies.
_FORWARD_TILE = _Tile(rows=256, outputs=128, columns=64, warps=8, stages=4, programs=1)
_BACKWARD_TILE = _Tile(rows=128, outputs=128, columns=32, warps=4, stages=5, programs=2)
_OUTPUTS_OF_A_GPU = 1 << 22  # of a product with a tile for each of its processors
_MOST_PARTS = 16
_PLACED_ROWS = 64  # of a program that places queries and keys


def try_out(device: torch.device) -> None:
    """Runs each kernel once, which fails where they cannot be built or find no room."""
    x, weight = torch.zeros(2, 8, 8, device=device, dtype=torch.bfloat16)
    hidden = activated(x, weight, weight[0], True)
    grad_of_activated(x, weight, hidden, True)
    qkv = torch.zeros(1, 3 * 16, device=device, dtype=torch.bfloat16)
    table = torch.zeros(1, 16, device=device)
    q, k = placed(qkv, table, table, 1, 1, 1e-6)
    grad_of_placed(q, k, k, qkv, table, table, 1, 1e-6)


def can_multiply(layer: nn.Linear) -> bool:
    """Whether all rows of its matrix and of what goes in and out begin at multiples of 16 bytes, where tiles can be copied."""
    return layer.in_features % 8 == 0 and layer.out_features % 8 == 0


def can_place(head_dim: int) -> bool:
    """Whether `projected` takes heads of this width."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


def projected(
    x: Tensor, layer: nn.Linear, num_heads: int, epsilon: float, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `(B, L, H, C)` of `x` `(B, L, D)` under autocast.

    Queries and keys are divided by their root mean square and turned by the cosines and signed sines `(L, C)` of their slots.
    """
    return _Projected.apply(*_narrow(x, layer.weight, layer.bias), *rotation, num_heads, epsilon)


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


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, num_heads: int, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv_NE = F.linear(x.flatten(0, -2), weight, bias)
        ctx.save_for_backward(x, weight, qkv_NE, cos, sin)
        ctx.settings = num_heads, x.shape[1], epsilon
        q, k = placed(qkv_NE, cos, sin, *ctx.settings)
        values = qkv_NE.view(len(x), x.shape[1], 3, num_heads, -1)[:, :, 2]
        return q.view(values.shape), k.view(values.shape), values

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, qkv_NE, cos, sin = ctx.saved_tensors
        # Views, if attention keeps the order of what it was given.
        grads = [grad.flatten(0, 1).contiguous() for grad in grads]
        grad_NE, sums = grad_of_placed(*grads, qkv_NE, cos, sin, *ctx.settings[1:])
        grad_bias = sums.sum(0).to(grad_NE.dtype)
        return _grad_of_input(grad_NE, weight).view(x.shape), _grad_of_weight(grad_NE, x), grad_bias, None, None, None, None


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
    """grad^T x. Where that is few outputs, of many parts of the elements at once: a matrix for each, which are added up."""
    grad_NF, x_ND = grad.flatten(0, -2), x.flatten(0, -2)
    num_parts = max(1, 2 ** round(math.log2(_OUTPUTS_OF_A_GPU / (grad_NF.shape[1] * x_ND.shape[1]))))
    num_parts = min(num_parts, _MOST_PARTS)
    if num_parts == 1 or len(x_ND) % num_parts:
        return grad_NF.t() @ x_ND
    grad_PFM, x_PMD = grad_NF.unflatten(0, (num_parts, -1)).transpose(1, 2), x_ND.unflatten(0, (num_parts, -1))
    return torch.bmm(grad_PFM, x_PMD, out_dtype=torch.float32).sum(0).to(grad.dtype)


@torch.library.custom_op("megabyte::placed", mutates_args=())
def placed(qkv_NE: Tensor, cos_LC: Tensor, sin_LC: Tensor, num_heads: int, length: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Queries and keys `(N, H, C)`, divided by their root mean square and turned; every `length` elements are a row.

    Args:
        qkv_NE: queries, keys and values.
        cos_LC: of the angles of a row's slots.
        sin_LC: those, the first half with the sign turned.
    """
    q, k = _room_for_placed(qkv_NE, num_heads)
    num_rows, num_channels = len(qkv_NE), q.shape[2]
    with torch.cuda.device(qkv_NE.device):
        _place[(triton.cdiv(num_rows, _PLACED_ROWS),)](
            qkv_NE, cos_LC, sin_LC, q, k, num_rows, length, epsilon, HEADS=num_heads, CHANNELS=num_channels, ROWS=_PLACED_ROWS
        )
    return q, k


@placed.register_fake
def _(qkv_NE: Tensor, cos_LC: Tensor, sin_LC: Tensor, num_heads: int, length: int, epsilon: float) -> tuple[Tensor, Tensor]:
    return _room_for_placed(qkv_NE, num_heads)


def _room_for_placed(qkv_NE: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    shape = len(qkv_NE), num_heads, qkv_NE.shape[1] // (3 * num_heads)
    return qkv_NE.new_empty(shape), qkv_NE.new_empty(shape)


@torch.library.custom_op("megabyte::grad_of_placed", mutates_args=())
def grad_of_placed(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv_NE: Tensor, cos_LC: Tensor, sin_LC: Tensor, length: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The gradient `(N, E)` of what `placed` took, and its sums, float32 `(tiles, E)`, from those of q, k and v `(N, H, C)`."""
    grad_NE, sums = _room_for_grad_of_placed(qkv_NE)
    num_rows, num_heads, num_channels = grad_q.shape
    with torch.cuda.device(qkv_NE.device):
        _place_back[(len(sums),)](
            grad_q, grad_k, grad_v, qkv_NE, cos_LC, sin_LC, grad_NE, sums, num_rows, length, epsilon,
            HEADS=num_heads, CHANNELS=num_channels, ROWS=_PLACED_ROWS,
        )  # fmt: skip
    return grad_NE, sums


@grad_of_placed.register_fake
def _(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv_NE: Tensor, cos_LC: Tensor, sin_LC: Tensor, length: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    return _room_for_grad_of_placed(qkv_NE)


def _room_for_grad_of_placed(qkv_NE: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, num_outputs = qkv_NE.shape
    num_tiles = -(-num_rows // _PLACED_ROWS)
    return torch.empty_like(qkv_NE), qkv_NE.new_empty(num_tiles, num_outputs, dtype=torch.float32)


@triton.jit
def _place(
    qkv, cos, sin, q, k, num_rows, length, epsilon, HEADS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    HALF: tl.constexpr = CHANNELS // 2
    row, channel, is_row, c, s = _slots(cos, sin, num_rows, length, CHANNELS, ROWS)
    for part in tl.static_range(2):
        for head in range(HEADS):
            x, y, _ = _unit_halves(qkv + ((row * 3 + part) * HEADS + head) * CHANNELS + channel, is_row, epsilon, HALF)
            outputs = (q if part == 0 else k) + (row * HEADS + head) * CHANNELS + channel
            tl.store(outputs, x * c - y * s, mask=is_row)
            tl.store(outputs + HALF, y * c + x * s, mask=is_row)


@triton.jit
def _place_back(
    grad_q, grad_k, grad_v, qkv, cos, sin, grad, sums, num_rows, length, epsilon,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = CHANNELS // 2
    row, channel, is_row, c, s = _slots(cos, sin, num_rows, length, CHANNELS, ROWS)
    for part in tl.static_range(3):
        given = grad_q if part == 0 else grad_k if part == 1 else grad_v
        for head in range(HEADS):
            own = given + (row * HEADS + head) * CHANNELS + channel
            dx = tl.load(own, mask=is_row, other=0.0).to(tl.float32)
            dy = tl.load(own + HALF, mask=is_row, other=0.0).to(tl.float32)
            place = ((row * 3 + part) * HEADS + head) * CHANNELS + channel
            if part < 2:
                dx, dy = dx * c + dy * s, dy * c - dx * s
                x, y, scale = _unit_halves(qkv + place, is_row, epsilon, HALF)
                mean = ((tl.sum(x * dx, axis=1) + tl.sum(y * dy, axis=1)) / CHANNELS)[:, None]
                dx, dy = (dx - x * mean) * scale, (dy - y * mean) * scale
            tl.store(grad + place, dx, mask=is_row)
            tl.store(grad + place + HALF, dy, mask=is_row)
            sums_of_head = sums + ((tl.program_id(0) * 3 + part) * HEADS + head) * CHANNELS + tl.arange(0, HALF)
            tl.store(sums_of_head, tl.sum(dx, axis=0))
            tl.store(sums_of_head + HALF, tl.sum(dy, axis=0))


@triton.jit
def _slots(cos, sin, num_rows, length, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows `(ROWS, 1)` and the first half of a head's channels; cosines and sines of the two."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, CHANNELS // 2)[None]
    second_half = row % length * CHANNELS + CHANNELS // 2 + channel  # where the sines have their own sign
    is_row = row < num_rows
    c = tl.load(cos + second_half, mask=is_row, other=0.0)
    return row, channel, is_row, c, tl.load(sin + second_half, mask=is_row, other=0.0)


@triton.jit
def _unit_halves(inputs, is_row, epsilon, HALF: tl.constexpr):
    """Both halves of a head, divided by its root mean square, and what they were multiplied by."""
    x = tl.load(inputs, mask=is_row, other=0.0).to(tl.float32)
    y = tl.load(inputs + HALF, mask=is_row, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / (2 * HALF) + epsilon)[:, None]
    return x * scale, y * scale, scale


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
    num_tiles = -(-len(hidden_NF) // _BACKWARD_TILE.rows)
    return torch.empty_like(hidden_NF), hidden_NF.new_empty(num_tiles, hidden_NF.shape[1], dtype=torch.float32)


def _launch(
    x_ND: Tensor, weight: Tensor, bias_or_sums: Tensor, hidden_NF: Tensor, out_NF: Tensor, *, squares: bool, backward: bool
) -> None:
    """`_product` into `out_NF`; tiles that reach beyond the end are filled with zeros and cut when they are written."""
    num_rows, num_outputs = out_NF.shape
    tile = _BACKWARD_TILE if backward else _FORWARD_TILE
    weight_tile = [tile.columns, tile.outputs] if backward else [tile.outputs, tile.columns]
    written_tile = [tile.rows, tile.outputs // 2]
    tiles = ((x_ND, [tile.rows, tile.columns]), (weight, weight_tile), (hidden_NF, written_tile), (out_NF, written_tile))
    tiled = (TensorDescriptor.from_tensor(tensor.contiguous(), shape) for tensor, shape in tiles)
    num_programs = tile.programs * torch.cuda.get_device_properties(out_NF.device).multi_processor_count
    with torch.cuda.device(out_NF.device):  # Triton launches on the current one
        _product[(num_programs,)](
            *tiled, bias_or_sums, num_rows, num_outputs, x_ND.shape[1], num_programs,
            SQUARES=squares, BACKWARD=backward, ROWS=tile.rows, OUTPUTS=tile.outputs, COLUMNS=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


@triton.jit
def _product(
    x, weight, hidden, out, bias_or_sums_ptr, num_rows, num_outputs, num_columns, num_programs, SQUARES: tl.constexpr,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_output_tiles = tl.cdiv(num_outputs, OUTPUTS)
    num_tiles = tl.cdiv(num_rows, ROWS) * num_output_tiles
    # As many programs as find room, a tile after another: one is written while the next one is read.
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=True):
        row_tile = tile // num_output_tiles
        first_row, first_output = row_tile * ROWS, tile % num_output_tiles * OUTPUTS
        sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
        for column in range(0, num_columns, COLUMNS):
            if BACKWARD:
                sums = tl.dot(x.load([first_row, column]), weight.load([column, first_output]), sums)
            else:
                sums = tl.dot(x.load([first_row, column]), weight.load([first_output, column]).T, sums)
        first, second = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, OUTPUTS // 2)), (0, 2, 1)))
        middle = first_output + OUTPUTS // 2
        _finish(first, hidden, out, bias_or_sums_ptr, row_tile, first_row, first_output, num_outputs, SQUARES, BACKWARD)
        _finish(second, hidden, out, bias_or_sums_ptr, row_tile, first_row, middle, num_outputs, SQUARES, BACKWARD)


@triton.jit
def _finish(
    sums, hidden, out, bias_or_sums_ptr, row_tile, first_row, first_output, num_outputs,
    SQUARES: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Makes the outputs of half a tile of its sums and writes them."""
    output = first_output + tl.arange(0, sums.shape[1])
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
