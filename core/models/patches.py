"""From bytes to the elements of a level, and from an element to its children."""

# Shapes: B batch, T bytes, N elements of a level (T / span), P children, D width, E width of a byte's embedding.

import torch
from einops import rearrange
from torch import Tensor, nn

from core.config import NUM_BYTE_VALUES, LevelConfig
from core.models.layers import CausalConv


class PatchEmbedder(nn.Module):
    """Bytes to elements: embed each byte, add its position, convolve (optional), concatenate `span` of them (Eq. 1, 2)."""

    def __init__(self, config: LevelConfig, span: int, num_positions: int) -> None:
        super().__init__()
        byte_dim = config.byte_dim or config.dim // span
        self.span = span
        self.embedding = nn.Embedding(NUM_BYTE_VALUES, byte_dim)
        self.positions = nn.Embedding(num_positions, byte_dim) if num_positions else None
        self.convs = nn.ModuleList(CausalConv(byte_dim, kernel) for kernel in config.conv_kernels)
        self.project = nn.Linear(span * byte_dim, config.dim) if config.byte_dim and span > 1 else nn.Identity()

    def forward(self, byte_ids_BT: Tensor, start: int | Tensor = 0, conv_tails: list[Tensor] | None = None) -> Tensor:
        """Elements `(B, T / span, D)` of whole patches that begin at byte `start` (one for all rows, or one per row)."""
        h_BTE = self.embedding(byte_ids_BT)
        if self.positions is not None:
            h_BTE = h_BTE + self._positions(byte_ids_BT.shape[1], start)
        for conv, tail in zip(self.convs, conv_tails or [None] * len(self.convs), strict=True):
            h_BTE = conv(h_BTE, tail)
        if self.span == 1:
            return h_BTE
        return self.project(rearrange(h_BTE, "b (n s) e -> b n (s e)", s=self.span))

    def _positions(self, length: int, start: int | Tensor) -> Tensor:
        if isinstance(start, int):
            return self.positions.weight[start : start + length]
        return self.positions(start[:, None] + torch.arange(length, device=start.device))


class Unembedder(nn.Module):
    """What an element says to each of its children: one slice of it per child, projected (W_GL of Eq. 4), or all of it."""

    def __init__(self, config: LevelConfig, child_dim: int, kind: str) -> None:
        super().__init__()
        self.num_children = config.patch_size
        self.slices = kind == "slices"
        if self.slices:
            self.project = nn.Linear(config.dim // self.num_children, child_dim, bias=False)
        else:
            self.project = nn.Linear(config.dim, self.num_children * child_dim, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        """`(B, N, D)` to `(B, N * P, D_child)`."""
        if self.slices:
            return self.project(rearrange(x_BND, "b n (p e) -> b (n p) e", p=self.num_children))
        return rearrange(self.project(x_BND), "b n (p e) -> b (n p) e", p=self.num_children)
