"""Steps of a few rows through a level on a GPU in few kernels (Triton).

A step of a few rows reads every weight once and does next to nothing with it: what counts is how fast the weights stream
in, and how long the GPU waits between two kernels. At up to four rows a layer is five kernels: the norm is part of the product
after it, and each program asks for its weights before it waits for the kernel before. At more rows it is seven: products use
the matrix units, and those into few outputs are split into parts, which the norm after them adds up.

No neighbour changes a bit of a row. Sums are float32; what the plain layers round to the model's precision is rounded here
as well.
"""

# Shapes: B rows, D width, N outputs, H heads, C channels per head, S slots.

import torch
import triton
import triton.language as tl
from torch import Tensor, empty, empty_like, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FEW_ROWS = 4  # whose products are sums without the matrix units
_NUM_PROGRAMS = 256  # that keep a large GPU busy: two for each multiprocessor
# Of `linear`: a program holds all weights of so many outputs in registers.
_MOST_OUTPUTS, _MOST_WEIGHTS = 8, 32768
# Of a tile of `product`.
_MOST_ROWS, _OUTPUTS, _COLUMNS = 64, 32, 128


def launch(device: torch.device) -> dict[str, bool]:
    """Where the GPU can do that, kernels begin before the one before them ends, and wait before they read what it wrote."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def linear(
    x_BD: Tensor, layer: nn.Linear | nn.Embedding, *, norm: nn.LayerNorm | None = None, power: int = 0,
    residual: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """residual + relu(norm(x) W^T + b)^power `(B, N)` of up to `FEW_ROWS` rows; without a power, no ReLU."""
    num_rows, num_columns = x_BD.shape
    num_outputs = len(layer.weight)
    out_BN = empty(num_rows, num_outputs, dtype=dtype or x_BD.dtype, device=x_BD.device)
    columns = triton.next_power_of_2(num_columns)
    outputs = max(1, min(_MOST_OUTPUTS, _MOST_WEIGHTS // columns))
    bias = getattr(layer, "bias", None)
    _linear[(triton.cdiv(num_outputs, outputs), num_rows)](
        x_BD,
        layer.weight,
        x_BD if bias is None else bias,
        x_BD if norm is None else norm.weight,
        x_BD if norm is None else norm.bias,
        x_BD if residual is None else residual,
        out_BN,
        num_outputs,
        num_columns,
        0.0 if norm is None else norm.eps,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        POWER=power,
        OUTPUTS=outputs,
        COLUMNS=columns,
        num_warps=4 if columns <= 2048 else 8,
        **launch(x_BD.device),
    )
    return out_BN


def product(x_BD: Tensor, layer: nn.Linear | nn.Embedding, *, power: int = 0, in_parts: bool = False) -> Tensor:
    """relu(x W^T + b)^power `(B, N)` of any number of rows; without a power, no ReLU.

    With `in_parts` float32 summands of x W^T, `(parts, B, N)`, for `added`: an output is then the work of several programs.
    """
    num_rows, num_columns = x_BD.shape
    num_outputs = len(layer.weight)
    tile = max(16, min(_MOST_ROWS, triton.next_power_of_2(num_rows)))
    grid = triton.cdiv(num_outputs, _OUTPUTS), triton.cdiv(num_rows, tile)
    num_parts = 1
    while in_parts and grid[0] * num_parts < _NUM_PROGRAMS and num_columns > 2 * _COLUMNS * num_parts:
        num_parts *= 2
    shape = (num_parts, num_rows, num_outputs) if in_parts else (num_rows, num_outputs)
    out_BN = empty(shape, dtype=torch.float32 if in_parts else x_BD.dtype, device=x_BD.device)
    _product[(*grid, num_parts)](
        x_BD,
        layer.weight,
        x_BD if in_parts else layer.bias,
        out_BN,
        num_rows,
        num_outputs,
        num_columns,
        triton.cdiv(triton.cdiv(num_columns, num_parts), _COLUMNS) * _COLUMNS,
        IN_PARTS=in_parts,
        POWER=power,
        ROWS=tile,
        OUTPUTS=_OUTPUTS,
        COLUMNS=_COLUMNS,
        num_stages=4,
        **launch(x_BD.device),
    )
    return out_BN


def normalized(x_BD: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x)."""
    return added(x_BD, None, None, norm)[1]


def added(x_BD: Tensor, parts: Tensor | None, bias: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """y = x + (the sum of the parts + bias), and norm(y)."""
    num_rows, num_columns = x_BD.shape
    out_BD, normalized_BD = (x_BD if parts is None else empty_like(x_BD)), empty_like(x_BD)
    _add[(num_rows,)](
        x_BD,
        x_BD if parts is None else parts,
        x_BD if bias is None else bias,
        norm.weight,
        norm.bias,
        out_BD,
        normalized_BD,
        num_rows,
        num_columns,
        norm.eps,
        NUM_PARTS=0 if parts is None else len(parts),
        ALL_COLUMNS=triton.next_power_of_2(num_columns),
        **launch(x_BD.device),
    )
    return out_BD, normalized_BD


def attend(
    qkv: Tensor, keys_BHSC: Tensor, values_BHSC: Tensor, rotation: tuple[Tensor, Tensor] | None, epsilon: float | None,
    own_B: Tensor, mask_BS: Tensor | None, most_slots: int,
) -> Tensor:  # fmt: skip
    """Keeps the new keys and values of `qkv` `(B, 3 D)` in their slots and attends to all up to them: `(B, D)`.

    Args:
        rotation: cosines and signed sines of all slots, `(S, C)`.
        epsilon: of the norm of queries and keys; None if they have none.
        own_B: the slot of each row's new element, int64.
        mask_BS: added to the scores; each row sees its own slot. None if it sees all before it.
        most_slots: that the model's rows can have, however many these have: the sums must not depend on the length.
    """
    num_rows, num_heads, num_slots, head_dim = keys_BHSC.shape
    out_BD = empty(num_rows, num_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    cos, sin = rotation or (qkv, qkv)
    is_few = num_rows * num_heads <= _NUM_PROGRAMS  # then each program should have much on its way
    _attend[(num_rows, num_heads)](
        qkv,
        keys_BHSC,
        values_BHSC,
        cos,
        sin,
        own_B,
        qkv if mask_BS is None else mask_BS,
        out_BD,
        num_heads,
        num_slots,
        0 if mask_BS is None else mask_BS.stride(0),
        head_dim**-0.5,
        epsilon or 0.0,
        HAS_ROTARY=rotation is not None,
        HAS_NORM=epsilon is not None,
        HAS_MASK=mask_BS is not None,
        CHANNELS=head_dim,
        PADDED=triton.next_power_of_2(head_dim),
        SLOTS=min(256, max(16, triton.next_power_of_2(most_slots))) if is_few else 32,
        num_warps=8 if is_few else 4,
        **launch(qkv.device),
    )
    return out_BD


@triton.jit
def _add(
    x_ptr, parts_ptr, bias_ptr, gain_ptr, shift_ptr, out_ptr, normalized_ptr, num_rows, num_columns, epsilon,
    NUM_PARTS: tl.constexpr, ALL_COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    column = tl.arange(0, ALL_COLUMNS)
    is_column = column < num_columns
    place = row * num_columns + column
    x = tl.load(x_ptr + place, mask=is_column, other=0.0).to(tl.float32)
    if NUM_PARTS > 0:
        y = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        for part in tl.static_range(NUM_PARTS):
            y += tl.load(parts_ptr + part * num_rows * num_columns + place, mask=is_column, other=0.0)
        x = (x + y.to(out_ptr.dtype.element_ty).to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, x, mask=is_column)
        x = x.to(tl.float32)
    mean = tl.sum(x, axis=0) / num_columns
    centred = tl.where(is_column, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / num_columns + epsilon)
    gain = tl.load(gain_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    y = centred * scale * gain + shift
    tl.store(normalized_ptr + place, y.to(normalized_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _activated(y, POWER: tl.constexpr):
    if POWER > 0:
        y = tl.maximum(y, 0.0)
    if POWER == 2:
        y = y * y
    return y


@triton.jit
def _both_sums(total, squares, other_total, other_squares):
    return total + other_total, squares + other_squares


@triton.jit
def _linear(
    x_ptr, weight_ptr, bias_ptr, gain_ptr, shift_ptr, residual_ptr, out_ptr, num_outputs, num_columns, epsilon,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, POWER: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, COLUMNS)
    is_output, is_column = output < num_outputs, column < num_columns
    if EARLY:
        gdc_launch_dependents()
    # The weights first: they come while the kernel before ends, and while x is normalised.
    weights = tl.load(
        weight_ptr + output[:, None] * num_columns + column[None, :], mask=is_output[:, None] & is_column[None, :], other=0.0
    )
    bias = tl.zeros((OUTPUTS,), dtype=tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)
    if HAS_NORM:
        gain = tl.load(gain_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    x = tl.load(x_ptr + row * num_columns + column, mask=is_column, other=0.0).to(tl.float32)
    if HAS_NORM:
        # Both sums at once: threads wait for each other half as often.
        total, squares = tl.reduce((x, x * x), 0, _both_sums)
        mean = total / num_columns
        scale = 1.0 / tl.sqrt(tl.maximum(squares / num_columns - mean * mean, 0.0) + epsilon)
        x = ((x - mean) * scale * gain + shift).to(x_ptr.dtype.element_ty).to(tl.float32)
    y = tl.sum(weights.to(tl.float32) * x[None, :], axis=1) + bias
    y = _activated(y.to(out_ptr.dtype.element_ty).to(tl.float32), POWER)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row * num_outputs + output, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * num_outputs + output, y.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit
def _product(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, num_outputs, num_columns, columns_of_part,
    IN_PARTS: tl.constexpr, POWER: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = row < num_rows, output < num_outputs
    part = tl.program_id(2)
    first = part * columns_of_part
    end = tl.minimum(first + columns_of_part, num_columns)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(first, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < end
        x = tl.load(x_ptr + row[:, None] * num_columns + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + output[None, :] * num_columns + column[:, None],
            mask=is_output[None, :] & is_column[:, None],
            other=0.0,
        )
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    place = row[:, None] * num_outputs + output[None, :]
    is_there = is_row[:, None] & is_output[None, :]
    if IN_PARTS:
        tl.store(out_ptr + part * num_rows * num_outputs + place, sums, mask=is_there)
    else:
        y = sums + tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
        y = _activated(y.to(out_ptr.dtype.element_ty).to(tl.float32), POWER)
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def _prepared(base_ptr, cos, sin, channel, epsilon, HAS_ROTARY: tl.constexpr, HAS_NORM: tl.constexpr, CHANNELS: tl.constexpr):
    """A query or key, normalised and rotated."""
    element = base_ptr.dtype.element_ty
    is_channel = channel < CHANNELS
    x = tl.load(base_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    other = tl.load(base_ptr + (channel + CHANNELS // 2) % CHANNELS, mask=is_channel, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / CHANNELS + epsilon)
        x = (x * scale).to(element).to(tl.float32)
        other = (other * scale).to(element).to(tl.float32)
    if HAS_ROTARY:
        x = x * cos + other * sin
    return x.to(element).to(tl.float32)


@triton.jit
def _attend(
    qkv_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, own_ptr, mask_ptr, out_ptr,
    num_heads, num_slots, mask_stride, softmax_scale, epsilon,
    HAS_ROTARY: tl.constexpr, HAS_NORM: tl.constexpr, HAS_MASK: tl.constexpr,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    is_channel = channel < CHANNELS
    own = tl.load(own_ptr + row)
    width = num_heads * CHANNELS
    base_ptr = qkv_ptr + row * 3 * width + head * CHANNELS
    cos, sin = 1.0, 0.0
    if HAS_ROTARY:
        cos = tl.load(cos_ptr + own * CHANNELS + channel, mask=is_channel, other=0.0)
        sin = tl.load(sin_ptr + own * CHANNELS + channel, mask=is_channel, other=0.0)
    query = _prepared(base_ptr, cos, sin, channel, epsilon, HAS_ROTARY, HAS_NORM, CHANNELS) * softmax_scale
    key = _prepared(base_ptr + width, cos, sin, channel, epsilon, HAS_ROTARY, HAS_NORM, CHANNELS)
    value = tl.load(base_ptr + 2 * width + channel, mask=is_channel, other=0.0)
    kept = (row * num_heads + head).to(tl.int64) * num_slots * CHANNELS
    tl.store(keys_ptr + kept + own * CHANNELS + channel, key.to(keys_ptr.dtype.element_ty), mask=is_channel)
    tl.store(values_ptr + kept + own * CHANNELS + channel, value, mask=is_channel)
    # The own slot first, from registers; then the others by blocks, with a running maximum.
    highest = tl.sum(query * key, axis=0)
    mass = highest * 0.0 + 1.0
    mean = value.to(tl.float32)
    for start in range(0, own, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        is_read = slot < own
        place = kept + slot[:, None] * CHANNELS + channel[None, :]
        is_there = is_read[:, None] & is_channel[None, :]
        keys = tl.load(keys_ptr + place, mask=is_there, other=0.0).to(tl.float32)
        scores = tl.where(is_read, tl.sum(keys * query[None, :], axis=1), float("-inf"))
        if HAS_MASK:
            scores += tl.load(mask_ptr + row * mask_stride + slot, mask=is_read, other=0.0).to(tl.float32)
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        weights = tl.exp(scores - higher)
        values = tl.load(values_ptr + place, mask=is_there, other=0.0).to(tl.float32)
        fading = tl.exp(highest - higher)
        mass = mass * fading + tl.sum(weights, axis=0)
        mean = mean * fading + tl.sum(weights[:, None] * values, axis=0)
        highest = higher
    tl.store(out_ptr + row * width + head * CHANNELS + channel, (mean / mass).to(out_ptr.dtype.element_ty), mask=is_channel)
