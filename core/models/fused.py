"""Decoding steps of few rows on a GPU in few kernels (Triton).

A step of a few rows reads every weight once and does next to nothing with it: what counts is how fast the weights stream
in, and how often the GPU stops to begin another kernel. Here a layer is five kernels, with the norm before a matrix product and
the activation, bias and residual sum after it in the product's own kernel, and attention in one. No matrix units: with one
row they would wait for the memory all the same.

Every row is computed by programs of its own in an order that its own position alone decides, so no neighbour changes a bit
of it. Sums are float32; what the plain layers round to the model's precision is rounded here as well.
"""

# Shapes: B rows, D width, N outputs, H heads, C channels per head, S slots, R bytes of a round, V = 256.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from core.cache import LevelCache
from core.config import NUM_BYTE_VALUES
from core.models.layers import Attention, Transformer

_NUM_PROGRAMS = 256  # that a product is split into at least: two for each multiprocessor of a large GPU
_TILE = 4096  # weights that a program looks at at a time
_SLOTS_AT_A_TIME = 32
_ACTIVATIONS = {"none": 0, "relu": 1, "relu2": 2}


def step(transformer: Transformer, activation: str, x_BD: Tensor, cache: LevelCache, own_B: Tensor, first_B: Tensor) -> Tensor:
    """`Transformer.step`, one more element of every row, with the place of each row on the device.

    Args:
        own_B: the slot of each row's new element, int64.
        first_B: the first slot that each row reads.
    """
    input_BD = x_BD
    for layer, block in enumerate(transformer.blocks):
        x_BD = transformer.mixed(x_BD, input_BD, layer)
        qkv = linear(x_BD, block.attention.qkv, norm=block.attention_norm)
        keys, values = cache.keys[layer], cache.values[layer]
        attended_BD = attend(qkv, block.attention, transformer.rotary, keys, values, own_B, first_B)
        x_BD = linear(attended_BD, block.attention.out, residual=x_BD)
        hidden = linear(x_BD, block.ffn_in, norm=block.ffn_norm, activation=activation)
        x_BD = linear(hidden, block.ffn_out, residual=x_BD)
    return transformer.norm(x_BD)


def linear(
    x_BD: Tensor,
    layer: nn.Linear | nn.Embedding,
    *,
    norm: nn.LayerNorm | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`(B, N)`: the layer's product with norm(x), its bias, activation, residual and softcap added, in `dtype` (that of x)."""
    num_rows, num_columns = x_BD.shape
    num_outputs = layer.weight.shape[0]
    bias = getattr(layer, "bias", None)
    out_BN = torch.empty(num_rows, num_outputs, dtype=dtype or x_BD.dtype, device=x_BD.device)
    outputs = min(16, max(2, 1 << int(math.log2(max(1, num_outputs // _NUM_PROGRAMS)))))
    _linear[(triton.cdiv(num_outputs, outputs), num_rows)](
        x_BD.contiguous(),
        layer.weight,
        x_BD if bias is None else bias,
        x_BD if norm is None else norm.weight,
        x_BD if norm is None else norm.bias,
        x_BD if residual is None else residual,
        out_BN,
        num_outputs,
        num_columns,
        0.0 if norm is None else norm.eps,
        softcap or 1.0,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_CAP=softcap > 0,
        ACTIVATION=_ACTIVATIONS[activation],
        OUTPUTS=outputs,
        COLUMNS=min(_TILE // outputs, triton.next_power_of_2(num_columns)),
        ALL_COLUMNS=triton.next_power_of_2(num_columns),
    )
    return out_BN


def attend(
    qkv: Tensor,
    attention: Attention,
    rotary: nn.Module | None,
    keys_BHSC: Tensor,
    values_BHSC: Tensor,
    own_B: Tensor,
    first_B: Tensor,
) -> Tensor:
    """Keeps the new keys and values of `qkv` `(B, 3 D)` in their slots and attends to all from the first on: `(B, D)`."""
    num_rows, num_heads, num_slots, head_dim = keys_BHSC.shape
    out_BD = torch.empty(num_rows, num_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    qk_norm = attention.qk_norm if isinstance(attention.qk_norm, nn.RMSNorm) else None
    _attend[(num_rows, num_heads)](
        qkv,
        keys_BHSC,
        values_BHSC,
        qkv if rotary is None else rotary.cos,
        qkv if rotary is None else rotary.sin,
        own_B,
        first_B,
        out_BD,
        num_heads,
        num_slots,
        head_dim**-0.5,
        0.0 if qk_norm is None else qk_norm.eps,
        HAS_ROTARY=rotary is not None,
        HAS_NORM=qk_norm is not None,
        CHANNELS=head_dim,
        PADDED=triton.next_power_of_2(head_dim),
        SLOTS=_SLOTS_AT_A_TIME,
    )
    return out_BD


def draw(
    logits_BV: Tensor,
    uniforms_BR: Tensor,
    given_BR: Tensor,
    temperature_B1: Tensor,
    place_1: Tensor,
    bytes_BR: Tensor,
    bits_BR: Tensor,
) -> None:
    """Writes the byte of each row at `place_1` of the round, the given one or one drawn at its temperature, and its surprisal."""
    num_rows, round_size = bytes_BR.shape
    _draw[(num_rows,)](
        logits_BV, uniforms_BR, given_BR, temperature_B1, place_1, bytes_BR, bits_BR, round_size, VALUES=NUM_BYTE_VALUES
    )  # fmt: skip


@triton.jit
def _linear(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, out_ptr,
    num_outputs, num_columns, epsilon, cap,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_CAP: tl.constexpr, ACTIVATION: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, ALL_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < num_outputs
    x_ptr += row * num_columns
    mean, scale = 0.0, 1.0
    if HAS_NORM:
        every = tl.arange(0, ALL_COLUMNS)
        whole = tl.load(x_ptr + every, mask=every < num_columns, other=0.0).to(tl.float32)
        mean = tl.sum(whole, axis=0) / num_columns
        centred = tl.where(every < num_columns, whole - mean, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / num_columns + epsilon)
    sums = tl.zeros((OUTPUTS, COLUMNS), dtype=tl.float32)
    for start in range(0, num_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < num_columns
        x = tl.load(x_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        if HAS_NORM:
            gain = tl.load(norm_weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
            x = ((x - mean) * scale * gain + shift).to(x_ptr.dtype.element_ty).to(tl.float32)
        place = output[:, None] * num_columns + column[None, :]
        weight = tl.load(weight_ptr + place, mask=is_output[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        sums += weight * x[None, :]
    y = tl.sum(sums, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    if ACTIVATION > 0:
        y = tl.maximum(y, 0.0)
    if ACTIVATION == 2:
        y = y * y
    if HAS_CAP:
        y = cap * (1.0 - 2.0 / (tl.exp(2.0 * y / cap) + 1.0))  # the hyperbolic tangent of y / cap
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row * num_outputs + output, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * num_outputs + output, y.to(out_ptr.dtype.element_ty), mask=is_output)


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
    qkv_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, own_ptr, first_ptr, out_ptr, num_heads, num_slots, softmax_scale, epsilon,
    HAS_ROTARY: tl.constexpr, HAS_NORM: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
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
    kept = (row * num_heads + head) * num_slots.to(tl.int64) * CHANNELS
    tl.store(keys_ptr + kept + own * CHANNELS + channel, key.to(keys_ptr.dtype.element_ty), mask=is_channel)
    tl.store(values_ptr + kept + own * CHANNELS + channel, value, mask=is_channel)
    # The own slot first, from registers; then the others by blocks, with a running maximum.
    highest = tl.sum(query * key, axis=0)
    mass = highest * 0.0 + 1.0
    mean = value.to(tl.float32)
    for start in range(tl.load(first_ptr + row), own, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        is_read = slot < own
        place = kept + slot[:, None] * CHANNELS + channel[None, :]
        is_there = is_read[:, None] & is_channel[None, :]
        keys = tl.load(keys_ptr + place, mask=is_there, other=0.0).to(tl.float32)
        scores = tl.where(is_read, tl.sum(keys * query[None, :], axis=1), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        weights = tl.exp(scores - higher)
        values = tl.load(values_ptr + place, mask=is_there, other=0.0).to(tl.float32)
        fading = tl.exp(highest - higher)
        mass = mass * fading + tl.sum(weights, axis=0)
        mean = mean * fading + tl.sum(weights[:, None] * values, axis=0)
        highest = higher
    tl.store(out_ptr + row * width + head * CHANNELS + channel, (mean / mass).to(out_ptr.dtype.element_ty), mask=is_channel)


@triton.jit
def _draw(
    logits_ptr, uniforms_ptr, given_ptr, temperature_ptr, place_ptr, bytes_ptr, bits_ptr, round_size, VALUES: tl.constexpr
):  # fmt: skip
    """`core.law.sampling_law` without filters and `core.law.draw`, in float64 as there."""
    row = tl.program_id(0)
    place = row * round_size + tl.load(place_ptr)
    value = tl.arange(0, VALUES)
    logits = tl.load(logits_ptr + row * VALUES + value).to(tl.float64)
    highest = tl.max(logits, axis=0)
    temperature = tl.load(temperature_ptr + row)
    weights = tl.exp((logits - highest) / tl.where(temperature == 0, 1.0, temperature))
    cumulated = tl.cumsum(weights, axis=0)
    bound = tl.load(uniforms_ptr + place) * tl.max(cumulated, axis=0)
    drawn = tl.sum((cumulated <= bound).to(tl.int32), axis=0)
    drawn = tl.minimum(drawn, tl.max(tl.where(weights > 0, value, 0), axis=0))
    likeliest = tl.min(tl.where(logits == highest, value, VALUES), axis=0)
    drawn = tl.where(temperature == 0, likeliest, drawn).to(tl.int64)
    given = tl.load(given_ptr + place)
    chosen = tl.where(given >= 0, given, drawn)
    nats = tl.log(tl.sum(tl.exp(logits - highest), axis=0)) + highest - tl.sum(tl.where(value == chosen, logits, 0.0), axis=0)
    tl.store(bytes_ptr + place, chosen)
    tl.store(bits_ptr + place, (nats * 1.4426950408889634).to(tl.float32))
