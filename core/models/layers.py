"""The Transformer that every level is made of: pre-norm, causal inside a row, with an optional look at the row before.

All elements of a level are laid out as rows: level 0 has one row, the whole sequence; a deeper level has one row per
element of its parent. Attention is causal inside a row. With cross-patch attention (arXiv 2305.07185, section 2.3)
a row also attends to the last r elements of the row before it.
"""

# Shapes: B batch, K rows, L elements of a row, D width, H heads, C channels per head, S = r + L slots, r memory.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.cache import LevelCache
from core.config import LevelConfig

# Up to this row length, plain matrix products beat the fused attention kernels wherever those waste a tile on a row.
_SHORT_ROW = 128


@dataclass(frozen=True)
class Slots:
    """Where one decoding step writes and what it may read.

    Attributes:
        write: the slot of the new element, one for all rows (int) or one per row `(B,)`.
        read: the slots attended to; those before `read.start` are not filled in any row.
        mask_BS: True where a row may attend, over the slots of `read`; None if every row may attend to all.
    """

    write: int | Tensor
    read: slice
    mask_BS: Tensor | None = None


class Rotary(nn.Module):
    """Rotary position embedding (arXiv 2104.09864) of `(..., L, C)`, by slot."""

    def __init__(self, head_dim: int, num_slots: int) -> None:
        super().__init__()
        # float64: at a million positions a float32 angle is wrong by more than 0.01 radian.
        frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(num_slots, dtype=torch.float64)[:, None] * frequency
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor, slots: slice | int | Tensor) -> Tensor:
        return _rotate(x, self.cos[slots], self.sin[slots])

    def back(self, x: Tensor, distance: int) -> Tensor:
        """Moves rotated keys `distance` slots towards the beginning; rotations add up."""
        return _rotate(x, self.cos[distance], -self.sin[distance])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of `(N, H, L, C)` queries; without a mask, causal."""
    short_row = q.shape[-2] <= _SHORT_ROW
    # The CPU kernel's bf16 backward is 3 to 6 times slower than matrix products on short rows.
    if short_row and (q.is_cuda or (q.dtype == torch.bfloat16 and torch.is_grad_enabled())):
        if mask is None:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class Attention(nn.Module):
    """Multi-head attention inside rows and to the last `memory` elements of the row before."""

    def __init__(self, config: LevelConfig, row_length: int, rotary: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.memory = config.cross_patch
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.rotary = Rotary(config.head_dim, self.memory + row_length) if rotary else None

    def forward(self, x_BKLD: Tensor, cache: LevelCache | None = None, layer: int = 0) -> Tensor:
        num_rows, length = x_BKLD.shape[1:3]
        q, k, v = rearrange(self.qkv(x_BKLD), "b k l (three h c) -> three b k h l c", three=3, h=self.num_heads)
        own = slice(self.memory, self.memory + length)
        if self.memory and num_rows > 1:
            mask = self._mask(num_rows, length, x_BKLD.device)
            k_all, v_all = self._with_row_before(k), self._with_row_before(v)
            if self.rotary is not None:
                k_all = self.rotary(k_all, slice(0, own.stop))
                k = k_all[..., self.memory :, :]
                q = self.rotary(q, own)
            mask = mask.expand(x_BKLD.shape[0], -1, -1, -1, -1).flatten(0, 1)
        else:
            mask = None
            if self.rotary is not None:
                q, k = self.rotary(q, own), self.rotary(k, own)
            k_all, v_all = k, v
        if cache is not None:
            cache.store(layer, k, v)
        out = attend(q.flatten(0, 1), k_all.flatten(0, 1), v_all.flatten(0, 1), mask)
        return self.out(rearrange(out, "(b k) h l c -> b k l (h c)", k=num_rows))

    def step(self, x_BD: Tensor, cache: LevelCache, layer: int, slots: Slots) -> Tensor:
        q, k, v = rearrange(self.qkv(x_BD), "b (three h c) -> three b h c", three=3, h=self.num_heads)
        if self.rotary is not None:
            at = slots.write if isinstance(slots.write, int) else slots.write[:, None]
            q, k = self.rotary(q, at), self.rotary(k, at)
        keys, values = cache.keys[layer], cache.values[layer]
        if isinstance(slots.write, int):
            keys[:, :, slots.write] = k
            values[:, :, slots.write] = v
        else:
            row = torch.arange(len(x_BD), device=x_BD.device)
            keys[row, :, slots.write] = k
            values[row, :, slots.write] = v
        mask = None if slots.mask_BS is None else slots.mask_BS[:, None, None]
        out = F.scaled_dot_product_attention(q[:, :, None], keys[:, :, slots.read], values[:, :, slots.read], attn_mask=mask)
        return self.out(out.flatten(1))

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
    """x + attention(norm(x)), then x + feed-forward(norm(x)), with ReLU as in the paper's appendix A.1."""

    def __init__(self, config: LevelConfig, row_length: int, rotary: bool, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = Attention(config, row_length, rotary)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BKLD: Tensor, cache: LevelCache | None = None, layer: int = 0) -> Tensor:
        x_BKLD = x_BKLD + self.dropout(self.attention(self.attention_norm(x_BKLD), cache, layer))
        return x_BKLD + self.dropout(self._feed_forward(x_BKLD))

    def step(self, x_BD: Tensor, cache: LevelCache, layer: int, slots: Slots) -> Tensor:
        x_BD = x_BD + self.attention.step(self.attention_norm(x_BD), cache, layer, slots)
        return x_BD + self._feed_forward(x_BD)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn_out(F.relu(self.ffn_in(self.ffn_norm(x))))


class Transformer(nn.Module):
    """The layers of one level and the norm after them."""

    def __init__(self, config: LevelConfig, row_length: int, rotary: bool, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, row_length, rotary, dropout) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x_BKLD: Tensor, cache: LevelCache | None = None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x_BKLD = block(x_BKLD, cache, layer)
        return self.norm(x_BKLD)

    def step(self, x_BD: Tensor, cache: LevelCache, slots: Slots) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x_BD = block.step(x_BD, cache, layer, slots)
        return self.norm(x_BD)

    def begin_row(self, cache: LevelCache, row_length: int) -> None:
        """Moves the last r elements of the finished row into the memory slots."""
        if cache.memory == 0:
            return
        last = slice(row_length, row_length + cache.memory)
        keys = cache.keys[..., last, :]
        rotary = self.blocks[0].attention.rotary
        # The slots overlap when r > L / 2, so the source is copied before it is overwritten.
        cache.keys[..., : cache.memory, :] = keys.clone() if rotary is None else rotary.back(keys, row_length)
        cache.values[..., : cache.memory, :] = cache.values[..., last, :].clone()


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
