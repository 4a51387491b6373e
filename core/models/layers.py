"""The Transformer that every level is made of: pre-norm, causal inside a row, with an optional look at the row before.

All elements of a level are laid out as rows: level 0 has one row, the whole sequence; a deeper level has one row per
element of its parent. Attention is causal inside a row. With cross-patch attention (arXiv 2305.07185, section 2.3)
a row also attends to the last r elements of the row before it.
"""

# Shapes: B batch, K rows, L elements of a row, D width, H heads, C channels per head, S = r + L slots, r memory.

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint

from core.cache import LevelCache
from core.config import LevelConfig, MegaByteConfig
from core.kernels import attention as kernel
from core.kernels import training_cpu

QK_EPSILON = 1e-6  # of the norm of queries and keys

# Up to this row length, plain matrix products beat the fused attention kernels wherever those waste a tile on a row.
_SHORT_ROW = 128
_TINY_ROW = 8
_SMALL_TABLE_BYTES = 1 << 24

# What the thread that runs a forward pass calls before each layer; if it raises, the pass ends. A pass can take seconds.
before_layer: ContextVar[Callable[[], None] | None] = ContextVar("before_layer", default=None)


@dataclass(frozen=True)
class Slots:
    """Where one decoding step writes and what it may read.

    Attributes:
        positions: the slot of the new element: one for all rows, or `(B, 1, 1)`, broadcastable to heads.
        write: the index of that slot in `(B, H, S)`.
        read: the slots attended to; those before `read.start` are filled in no row.
        mask_BS: True (or 0) where a row may attend, False (or minus infinity) elsewhere, over the slots of `read`; None
            if every row may attend to all.
    """

    positions: int | Tensor
    write: tuple
    read: slice
    mask_BS: Tensor | None = None

    @classmethod
    def same(cls, slot: int, first: int = 0, mask_BS: Tensor | None = None) -> "Slots":
        """All rows write `slot` and read from `first` on."""
        return cls(slot, (slice(None), slice(None), slot), slice(first, slot + 1), mask_BS)

    @classmethod
    def per_row(cls, slots_B: Tensor) -> "Slots":
        """Each row writes its own slot and reads all up to it."""
        num_slots = int(slots_B.max()) + 1
        mask_BS = torch.arange(num_slots, device=slots_B.device) <= slots_B[:, None]
        rows = torch.arange(len(slots_B), device=slots_B.device)
        return cls(slots_B[:, None, None], (rows, slice(None), slots_B), slice(0, num_slots), mask_BS)


class Rotary(nn.Module):
    """Rotary position embedding (arXiv 2104.09864) by slot: the tables that `rotate` takes.

    Large ones are made at their first use: a configuration that only claims a long context takes no memory.
    """

    def __init__(self, head_dim: int, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0, head_dim), persistent=False)
        if self.num_bytes <= _SMALL_TABLE_BYTES and not self.cos.is_meta:
            self._fill()

    @property
    def num_bytes(self) -> int:
        """Memory of both tables once they are made."""
        return 2 * self.num_slots * self.cos.shape[1] * self.cos.element_size()

    def empty(self, device: torch.device | str) -> None:
        """Forgets the tables, which are made again at their next use, on this device."""
        self.cos, self.sin = (table.new_empty(0, table.shape[1], device=device) for table in (self.cos, self.sin))

    def tables(self) -> "Rotation":
        """Cosines and signed sines of all slots, `(S, C)`."""
        if len(self.cos) < self.num_slots:
            self._fill()
        return self.cos, self.sin

    def forward(self, slots: slice | int | Tensor) -> "Rotation":
        cos, sin = self.tables()
        return cos[slots], sin[slots]

    def back(self, distance: int) -> "Rotation":
        """Moves keys that are already rotated `distance` slots towards the beginning; rotations add up."""
        cos, sin = self(distance)
        return cos, -sin

    @torch.inference_mode(False)  # a first use that only predicts must not spoil a later one that learns
    def _fill(self) -> None:
        head_dim, device = self.cos.shape[1], self.cos.device
        # float64: at a million positions a float32 angle is wrong by more than 0.01 radian.
        frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(self.num_slots, dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos().float(), angle.sin().float()
        self.sin = torch.cat((-sin, sin), dim=-1).to(device)
        self.cos = torch.cat((cos, cos), dim=-1).to(device)  # last: another thread may look at its length


Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, both broadcastable to (..., C)


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """`x` `(..., C)` with its two halves turned against each other; unchanged without a rotation."""
    if rotation is None:
        return x
    cos, sin = rotation
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of `(N, H, L, C)` queries; without a mask, causal."""
    if mask is None and q.shape == k.shape and kernel.can_attend(q):
        return kernel.attend_causally(q, k, v)
    short_row = q.shape[-2] <= _SHORT_ROW
    # In bf16 torch's CPU kernel takes 1.2 to 3 times as long on short rows as matrix products do, backward 3 to 6 times.
    if short_row and (q.is_cuda or q.dtype == torch.bfloat16):
        if mask is None:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        q = q * q.shape[-1] ** -0.5
        # Matrices of a few rows waste a GPU's matrix units; compiled, sums of products are one pass over the memory.
        is_tiny = q.shape[-2] <= _TINY_ROW and torch.compiler.is_compiling()
        scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) if is_tiny else q @ k.transpose(-1, -2)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(v.dtype)
        return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2) if is_tiny else weights @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def attend_to_slots(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Attention of one bfloat16 query `(B, H, 1, C)` to S slots on a CPU; a mask is boolean, or holds 0 and minus infinity.

    Torch's fused kernel packs all keys and values anew for its one query, and takes 4 to 5 times as long as products. These
    and this softmax add up the slots in their order, so masked slots at the end change no bit.
    """
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()
    if attn_mask is not None:
        scores = scores + attn_mask if attn_mask.is_floating_point() else scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _placed(x_BKHLC: Tensor, norm: nn.Module, rotation: Rotation | None) -> Tensor:
    """Queries or keys as they are compared: normalised, then turned by the angles of their L slots."""
    has_norm = isinstance(norm, nn.RMSNorm)
    if (has_norm or rotation is not None) and not x_BKHLC.requires_grad and kernel.can_place(x_BKHLC):
        return kernel.place(x_BKHLC.flatten(0, 1), rotation, norm.eps if has_norm else 0.0).view(x_BKHLC.shape)
    if x_BKHLC.is_cuda and x_BKHLC.shape[3] > _SHORT_ROW:
        # In memory elements stay before heads, and so do attention's: the product after it needs nothing moved.
        by_element = rotation and tuple(table[:, None] for table in rotation)
        return rotate(norm(x_BKHLC.transpose(2, 3)), by_element).transpose(2, 3)
    return rotate(norm(x_BKHLC), rotation)


def _training_kernels(module: nn.Module, x: Tensor) -> ModuleType | None:
    """What multiplies and is differentiated in this pass, if it is not the layers themselves."""
    if not (module.has_kernels and torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type)):
        return None
    if x.is_cuda:
        from core.kernels import training  # needs Triton

        return training
    return training_cpu if training_cpu.can_take(x) else None


class Attention(nn.Module):
    """Multi-head attention inside rows and to the last `memory` elements of the row before."""

    has_kernels = False  # whether kernels for training may multiply where autocast and gradients are on

    def __init__(self, config: LevelConfig, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.memory = config.cross_patch
        self.has_qk_norm = qk_norm
        self.qk_norm = nn.RMSNorm(config.head_dim, eps=QK_EPSILON, elementwise_affine=False) if qk_norm else nn.Identity()
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_BKLD: Tensor, rotation: Rotation | None, cache: LevelCache | None = None, layer: int = 0) -> Tensor:
        """Attends within and across rows; `rotation` covers the S slots of memory and row."""
        num_rows, length = x_BKLD.shape[1:3]
        is_crossing = self.memory > 0 and num_rows > 1
        own_rotation = rotation and tuple(table[self.memory :] for table in rotation)
        if cache is None and not is_crossing and (kernels := self._placing_kernels(x_BKLD, rotation)):
            qkv = kernels.projected(x_BKLD.flatten(0, 1), self.qkv, self.num_heads, QK_EPSILON, own_rotation)
            out = attend(*(part.transpose(1, 2) for part in qkv), None)
            return self._product(rearrange(out, "(b k) h l c -> b k l (h c)", k=num_rows), self.out)
        qkv = rearrange(self._product(x_BKLD, self.qkv), "b k l (three h c) -> b k l three h c", three=3, h=self.num_heads)
        # One operation, so that their gradients are gathered in one, too; heads before elements without moving any.
        q, k, v = (part.transpose(2, 3) for part in qkv.unbind(3))
        if cache is None and not is_crossing and kernel.can_attend(q):
            out = kernel.attend_to_placed(qkv.flatten(0, 1), own_rotation, QK_EPSILON if self.has_qk_norm else 0.0)
            return self._product(rearrange(out, "(b k) h l c -> b k l (h c)", k=num_rows), self.out)
        mask = None
        q = _placed(q, self.qk_norm, own_rotation)
        if cache is not None or not is_crossing:
            own_k = _placed(k, self.qk_norm, own_rotation)
        if cache is not None:
            cache.store(layer, own_k, v)
        if is_crossing:
            k, v = _placed(self._with_row_before(k), self.qk_norm, rotation), self._with_row_before(v)
            mask = self._mask(num_rows, length, x_BKLD.device).expand(len(x_BKLD), -1, -1, -1, -1).flatten(0, 1)
        else:
            k = own_k
        out = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask)
        return self._product(rearrange(out, "(b k) h l c -> b k l (h c)", k=num_rows), self.out)

    def step(self, x_BD: Tensor, rotation: Rotation | None, keys: Tensor, values: Tensor, slots: Slots) -> Tensor:
        """One more element of every row; `keys` and `values` are this layer's, `(B, H, S, C)`."""
        # view, not rearrange: this runs for every byte of every layer.
        qkv = self.qkv.forward(x_BD).view(len(x_BD), 3, self.num_heads, -1)
        if rotation is not None or self.has_qk_norm:
            q, k = rotate(self.qk_norm(qkv[:, :2]), rotation).unbind(1)
            v = qkv[:, 2]
        else:
            q, k, v = qkv.unbind(1)
        keys[slots.write] = k
        values[slots.write] = v
        mask = None if slots.mask_BS is None else slots.mask_BS[:, None, None]
        attend_once = attend_to_slots if q.device.type == "cpu" and q.dtype == torch.bfloat16 else F.scaled_dot_product_attention
        out = attend_once(q.unsqueeze(2), keys[:, :, slots.read], values[:, :, slots.read], attn_mask=mask)
        return self.out.forward(out.flatten(1))

    def _product(self, x: Tensor, layer: nn.Linear) -> Tensor:
        kernels = _training_kernels(self, x)
        return layer(x) if kernels is None else kernels.linear(x, layer)

    def _placing_kernels(self, x_BKLD: Tensor, rotation: Rotation | None) -> ModuleType | None:
        """What makes queries, keys and values of long rows in this pass, if it is not the layers themselves."""
        if not x_BKLD.is_cuda or rotation is None or not self.has_qk_norm or x_BKLD.shape[2] <= _SHORT_ROW:
            return None
        kernels = _training_kernels(self, x_BKLD)
        return kernels if kernels is not None and kernels.can_place(self.qkv.in_features // self.num_heads) else None

    def _with_row_before(self, x_BKHLC: Tensor) -> Tensor:
        """Each row preceded by the last r elements of the row before it; row 0 by zeros, which the mask hides."""
        last = x_BKHLC[:, :-1, :, x_BKHLC.shape[3] - self.memory :]
        return torch.cat((F.pad(last, (0, 0, 0, 0, 0, 0, 1, 0)), x_BKHLC), dim=3)

    def _mask(self, num_rows: int, length: int, device: torch.device) -> Tensor:
        """(1, K, 1, L, S): causal inside the row, all of the memory, none of it for row 0."""
        mask = torch.ones(num_rows, 1, length, self.memory + length, dtype=torch.bool, device=device).tril(self.memory)
        mask[0, ..., : self.memory] = False
        return mask[None]


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), with ReLU as in the paper's appendix A.1 or its square."""

    has_kernels = False  # as attention's

    def __init__(self, config: LevelConfig, model: MegaByteConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = Attention(config, model.qk_norm)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.squares = model.activation == "relu2"
        self.dropout = nn.Dropout(model.dropout)

    def forward(
        self,
        x_BKLD: Tensor,
        rest_BKLD: Tensor | None,
        rotation: Rotation | None,
        cache: LevelCache | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Reads x, or x + rest, and gives its output as such a sum where a kernel that reads it next adds it up on the way."""
        x_BKLD, normed_BKLD = _sum_and_norm(self, x_BKLD, rest_BKLD, self.attention_norm)
        attended_BKLD = self._dropped(self.attention(normed_BKLD, rotation, cache, layer))
        x_BKLD, normed_BKLD = _sum_and_norm(self, x_BKLD, attended_BKLD, self.ffn_norm)
        rest_BKLD = self._dropped(self._feed_forward(normed_BKLD))
        return (x_BKLD + rest_BKLD, None) if _norm_kernels(self, x_BKLD) is None else (x_BKLD, rest_BKLD)

    def step(self, x_BD: Tensor, rotation: Rotation | None, keys: Tensor, values: Tensor, slots: Slots) -> Tensor:
        # `forward` of a module instead of a call, here and in `Attention.step`: together the calls take a tenth of a step.
        x_BD = x_BD + self.attention.step(_normalized(self.attention_norm, x_BD), rotation, keys, values, slots)
        hidden = F.relu_(self.ffn_in.forward(_normalized(self.ffn_norm, x_BD)))
        return x_BD + self.ffn_out.forward(hidden.square() if self.squares else hidden)

    def _dropped(self, x: Tensor) -> Tensor:
        kernels = cpu_kernels(self, x) if self.training and 0 < self.dropout.p < 1 else None
        return self.dropout(x) if kernels is None else kernels.dropped(x, self.dropout.p)

    def _feed_forward(self, x: Tensor) -> Tensor:
        kernels = _training_kernels(self, x)
        if kernels is not None and kernels.can_multiply(self.ffn_in):
            return kernels.feed_forward(x, self.ffn_in, self.ffn_out, self.squares)
        # As one matrix of rows: products of more dimensions are views, and what is done to those in place is copied to be undone.
        hidden = linear_relu(x.flatten(0, -2), self.ffn_in)
        return self.ffn_out(hidden.square() if self.squares else hidden).view(x.shape)


def linear_relu(x: Tensor, layer: nn.Module) -> Tensor:
    """The ReLU of what a linear layer makes of x, which a mode may take over as it may torch's own functions."""
    if has_torch_function_unary(x):
        return handle_torch_function(linear_relu, (x,), x, layer)
    return F.relu_(layer(x))  # in place: the product keeps its inputs alone


def cpu_kernels(module: nn.Module, x: Tensor) -> ModuleType | None:
    """What makes sums, norms, dropout and logits in this pass, if it is not torch, and what a level reads.

    On a GPU a compiler joins those better.
    """
    return None if x.is_cuda else _training_kernels(module, x)


def _norm_kernels(module: nn.Module, x: Tensor) -> ModuleType | None:
    """What makes sums and norms in this pass; in bf16 on a CPU kernels, whatever `has_kernels` says, where nothing is learned."""
    if torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
        return cpu_kernels(module, x)
    return training_cpu if training_cpu.can_take(x) else None


def _sum_and_norm(module: nn.Module, x: Tensor, rest: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + rest, or x, and the norm of it."""
    kernels = _norm_kernels(module, x)
    if kernels is not None:
        return (x, kernels.normalized(x, norm)) if rest is None else kernels.add_normalized(x, rest, norm)
    x = x if rest is None else x + rest
    return x, norm(x)


def _normalized(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """What the norm makes of `x`, without the calls that lie between it and this one."""
    parameters = norm._parameters
    return torch.layer_norm(x, norm.normalized_shape, parameters["weight"], parameters["bias"], norm.eps)


class Transformer(nn.Module):
    """The layers of one level and the norm after them."""

    has_kernels = False  # as attention's

    def __init__(self, config: LevelConfig, row_length: int, model: MegaByteConfig) -> None:
        super().__init__()
        self.memory = config.cross_patch
        self.row_length = row_length
        self.rotary = Rotary(config.head_dim, self.memory + row_length) if model.is_rotary else None
        self.blocks = nn.ModuleList(Block(config, model) for _ in range(config.num_layers))
        # For each layer what it reads: a times the layer before, b times the input of them all.
        has_scalars = model.residual_scalars and config.num_layers > 0  # an empty parameter would never get a gradient
        self.residual_scalars = nn.Parameter(torch.empty(config.num_layers, 2)) if has_scalars else None
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x_BKLD: Tensor, cache: LevelCache | None = None, recompute: bool = False) -> Tensor:
        """Rows to rows; a cache keeps what the elements after the last row may attend to.

        With `recompute` only what goes into each layer is kept for the backward pass, which runs the layer again.
        """
        device = x_BKLD.device.type
        if torch.is_autocast_enabled(device):
            # What is added up from layer to layer as narrow as what is added: half the memory traffic between the products.
            x_BKLD = x_BKLD.to(torch.get_autocast_dtype(device))
        rotation = self.rotary and self.rotary(slice(0, self.memory + x_BKLD.shape[2]))
        input_BKLD, rest_BKLD = x_BKLD, None
        look_up = None if torch.compiler.is_compiling() else before_layer.get()
        for layer, block in enumerate(self.blocks):
            if look_up is not None:
                look_up()
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            if rest_BKLD is not None and (recompute or self.residual_scalars is not None):
                x_BKLD, rest_BKLD = x_BKLD + rest_BKLD, None  # one tensor to keep, or to scale
            x_BKLD = self._mixed(x_BKLD, input_BKLD, layer)
            x_BKLD, rest_BKLD = run(x_BKLD, rest_BKLD, rotation, cache, layer)
        return _sum_and_norm(self, x_BKLD, rest_BKLD, self.norm)[1]

    def step(self, x_BD: Tensor, cache: LevelCache, slots: Slots) -> Tensor:
        """One more element of every row."""
        rotation = self.rotary and self.rotary(slots.positions)
        input_BD = x_BD
        for layer, (block, keys, values) in enumerate(zip(self.blocks, cache.keys.unbind(), cache.values.unbind(), strict=True)):
            x_BD = block.step(self._mixed(x_BD, input_BD, layer), rotation, keys, values, slots)
        return self.norm(x_BD)

    def _mixed(self, x: Tensor, level_input: Tensor, layer: int) -> Tensor:
        if self.residual_scalars is None:
            return x
        a, b = self.residual_scalars[layer]
        return a * x + b * level_input

    def begin_row(self, cache: LevelCache) -> None:
        """Moves the last r elements of the finished row into the memory slots."""
        if self.memory == 0:
            return
        last = slice(self.row_length, self.row_length + self.memory)
        back = self.rotary and self.rotary.back(self.row_length)
        cache.keys[..., : self.memory, :] = rotate(cache.keys[..., last, :], back)
        cache.values[..., : self.memory, :] = cache.values[..., last, :]


class CausalConv(nn.Module):
    """A residual causal convolution over byte embeddings; with its tail it goes on where it stopped."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel)

    @property
    def tail_length(self) -> int:
        return self.conv.kernel_size[0] - 1

    def forward(self, x_BTD: Tensor, tail: Tensor | None = None) -> Tensor:
        """The convolved sequence. `tail` holds the kernel - 1 inputs before it (zeros if None) and is moved on."""
        if x_BTD.shape[1] == 0:
            return x_BTD
        if tail is None:
            extended = F.pad(x_BTD, (0, 0, self.tail_length, 0))
        else:
            extended = torch.cat((tail, x_BTD), dim=1)
            tail.copy_(extended[:, -self.tail_length :])
        convolved = self.conv(extended.transpose(1, 2)).transpose(1, 2)
        return x_BTD + F.relu(convolved)


def init_matrices(model: nn.Module, std: float) -> None:
    """N(0, std) truncated at two sigma for every matrix, zero for biases; norms keep 1 and 0 (arXiv 2305.07185, A.1)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
            truncated_normal(module.weight, std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


def truncated_normal(parameter: Tensor, std: float) -> None:
    if parameter.is_meta:
        return
    nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
