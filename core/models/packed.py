"""Transformers whose weights lie in memory as steps of few rows read them.

From plain bfloat16 weights torch's product on a CPU reads, and lays out anew, all of them each time. Where our kernel can be
had a step is one call of it; elsewhere oneDNN multiplies by weights that are laid out once.
"""

import copy
import importlib

import torch
from torch import Tensor, nn

from core.arena import Arena
from core.cache import LevelCache
from core.errors import UserError
from core.kernels import step as kernel
from core.kernels.gpu import can_fuse
from core.models.layers import QK_EPSILON, Block, Slots, Transformer
from core.models.megabyte import MegaByte

_FEW_ROWS = 16  # that oneDNN's layout is chosen for; products of any other number are right as well


class _Sharing(Transformer):
    """A Transformer, to be used but not trained, that shares the parts of another.

    Its steps take slots of each row's own, with a mask.
    """

    def __init__(self, plain: Transformer) -> None:
        nn.Module.__init__(self)
        self.memory, self.row_length = plain.memory, plain.row_length
        self.rotary, self.blocks, self.norm = plain.rotary, plain.blocks, plain.norm
        self.residual_scalars = plain.residual_scalars
        self.training = plain.training


class FusedTransformer(_Sharing):
    """Steps on a GPU in few kernels. Its slots need a mask only where a row must not see all slots before its own."""

    def __init__(self, plain: Transformer) -> None:
        super().__init__(plain)
        self.kernels = importlib.import_module("core.kernels.fused")
        self.byte_kernels = importlib.import_module("core.kernels.fused_bytes")

    def step(self, x_BD: Tensor, cache: LevelCache, slots: Slots) -> Tensor:
        if len(x_BD) <= self.kernels.FEW_ROWS:
            return self.kernels.normalized(self._few_rows(x_BD, cache, slots), self.norm)
        return self._many_rows(x_BD, cache, slots)

    def logits(self, x_BD: Tensor, cache: LevelCache, slots: Slots, embedding: nn.Embedding) -> Tensor:
        """A step of the last level: summands of its logits before the cap, float32 `(parts, B, V)`."""
        if len(x_BD) <= self.kernels.FEW_ROWS:
            x_BD = self._few_rows(x_BD, cache, slots)
            return self.kernels.linear(x_BD, embedding, norm=self.norm, dtype=torch.float32)[None]
        return self.kernels.product(self._many_rows(x_BD, cache, slots), embedding, in_parts=True)

    def _few_rows(self, x_BD: Tensor, cache: LevelCache, slots: Slots) -> Tensor:
        """The layers without the norm after them."""
        kernels, input_BD = self.kernels, x_BD
        for layer, block in enumerate(self.blocks):
            x_BD = self._mixed(x_BD, input_BD, layer)
            qkv = kernels.linear(x_BD, block.attention.qkv, norm=block.attention_norm)
            x_BD = kernels.linear(self._attend(qkv, layer, cache, slots), block.attention.out, residual=x_BD)
            hidden = kernels.linear(x_BD, block.ffn_in, norm=block.ffn_norm, power=2 if block.squares else 1)
            x_BD = kernels.linear(hidden, block.ffn_out, residual=x_BD)
        return x_BD

    def _many_rows(self, x_BD: Tensor, cache: LevelCache, slots: Slots) -> Tensor:
        kernels, input_BD = self.kernels, x_BD
        norms = [*(block.attention_norm for block in self.blocks), self.norm]
        x_BD = self._mixed(x_BD, input_BD, 0) if self.blocks else x_BD
        h_BD = kernels.normalized(x_BD, norms[0])
        for layer, block in enumerate(self.blocks):
            if layer and self.residual_scalars is not None:
                x_BD = self._mixed(x_BD, input_BD, layer)
                h_BD = kernels.normalized(x_BD, norms[layer])
            qkv = kernels.product(h_BD, block.attention.qkv)
            parts = kernels.product(self._attend(qkv, layer, cache, slots), block.attention.out, in_parts=True)
            x_BD, h_BD = kernels.added(x_BD, parts, block.attention.out.bias, block.ffn_norm)
            hidden = kernels.product(h_BD, block.ffn_in, power=2 if block.squares else 1)
            parts = kernels.product(hidden, block.ffn_out, in_parts=True)
            x_BD, h_BD = kernels.added(x_BD, parts, block.ffn_out.bias, norms[layer + 1])
        return h_BD

    def _attend(self, qkv: Tensor, layer: int, cache: LevelCache, slots: Slots) -> Tensor:
        return self.kernels.attend(
            qkv,
            cache.keys[layer],
            cache.values[layer],
            self.rotary and self.rotary.tables(),
            QK_EPSILON if self.blocks[layer].attention.has_qk_norm else None,
            slots.positions.flatten(),
            slots.mask_BS,
            self.memory + self.row_length,
        )


class PackedTransformer(_Sharing):
    """A bfloat16 Transformer that steps on a CPU by our kernel.

    It holds the matrices twice: as they were for whole rows, and packed.
    """

    def __init__(self, plain: Transformer) -> None:
        super().__init__(plain)
        self._kept: list[Tensor] = []  # what the structures point into
        matrices = [parameter for block in plain.blocks for parameter in block.parameters() if parameter.ndim == 2]
        self._arena = Arena(sum(matrix.nbytes for matrix in matrices))
        scalars = plain.residual_scalars.tolist() if plain.residual_scalars is not None else [(1.0, 0.0)] * len(plain.blocks)
        layers = [self._layer(block, *pair) for block, pair in zip(plain.blocks, scalars, strict=True)]
        first = plain.blocks[0]
        cos, sin = plain.rotary.tables() if plain.rotary else (None, None)
        self._step = kernel.Step(
            layers=(kernel.Layer * len(layers))(*layers),
            norm=self._norm(plain.norm),
            num_layers=len(layers),
            dim=first.attention.out.in_features,
            ffn_dim=first.ffn_in.out_features,
            num_heads=first.attention.num_heads,
            relu_squared=first.squares,
            qk_epsilon=QK_EPSILON if first.attention.has_qk_norm else 0.0,
            cos=self._vector(cos),
            sin=self._vector(sin),
        )

    def step(self, x_BD: Tensor, cache: LevelCache, slots: Slots) -> Tensor:
        slots_B, mask_BS = slots.positions.flatten(), slots.mask_BS
        num_slots = cache.keys.shape[3]
        for kept in (cache.keys, cache.values):
            assert kept.shape == (self._step.num_layers, len(slots_B), self._step.num_heads, num_slots, kernel.CHANNELS)
            assert kept.dtype == torch.bfloat16
            assert kept.is_contiguous()
        assert slots_B.dtype == torch.int64
        assert slots_B.is_contiguous()
        assert mask_BS.dtype == torch.bfloat16
        assert mask_BS.is_contiguous()
        assert len(mask_BS) == len(slots_B)
        assert mask_BS.shape[1] <= num_slots
        step = kernel.Step.from_buffer_copy(self._step)  # other threads may step with other caches
        step.num_rows, step.num_slots, step.num_read = len(slots_B), num_slots, mask_BS.shape[1]
        step.keys, step.values = cache.keys.data_ptr(), cache.values.data_ptr()
        step.slots, step.mask = slots_B.data_ptr(), mask_BS.data_ptr()
        return kernel.run(step, x_BD)

    def _layer(self, block: Block, of_before: float, of_input: float) -> kernel.Layer:
        return kernel.Layer(
            attention_norm=self._norm(block.attention_norm),
            qkv=self._linear(block.attention.qkv),
            out=self._linear(block.attention.out),
            ffn_norm=self._norm(block.ffn_norm),
            ffn_in=self._linear(block.ffn_in),
            ffn_out=self._linear(block.ffn_out),
            of_before=of_before,
            of_input=of_input,
        )

    def _norm(self, norm: nn.LayerNorm) -> kernel.Norm:
        return kernel.Norm(self._vector(norm.weight), self._vector(norm.bias), norm.eps)

    def _linear(self, linear: nn.Linear) -> kernel.Linear:
        blocks = self._arena.take(kernel.blocks_shape(linear.weight), torch.bfloat16)
        kernel.pack(linear.weight.detach(), blocks)
        return kernel.Linear(blocks.data_ptr(), self._vector(linear.bias), linear.in_features, linear.out_features)

    def _vector(self, values: Tensor | None) -> int | None:
        if values is None:
            return None
        values = values.detach().float().contiguous()
        self._kept.append(values)
        return values.data_ptr()


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 by oneDNN, to be used but not trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        weight = linear.weight.detach()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, _FEW_ROWS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def fused(model: MegaByte) -> MegaByte:
    """A model that shares the parameters of this one and steps on its GPU in few kernels.

    Raises:
        UserError: if this machine cannot build the kernels.
    """
    if not can_fuse(next(model.parameters()).device):
        raise UserError("fused steps need Triton, a C compiler and Python's headers; install them, or choose another engine")
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for level in twin.levels:
        level.transformer = FusedTransformer(level.transformer)
    return twin


def packed(transformer: Transformer) -> Transformer:
    """A Transformer in bfloat16 that steps as fast as this machine can; the same one where it has no such products."""
    if _can_step(transformer):
        return PackedTransformer(transformer)
    has_onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if has_onednn and transformer.norm.weight.device.type == "cpu":
        for module in list(transformer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, PackedLinear(child))
    return transformer


def _can_step(transformer: Transformer) -> bool:
    """Whether the kernel takes a Transformer, and this machine has it."""
    matrices = [parameter for parameter in transformer.blocks.parameters() if parameter.ndim == 2]
    if not matrices or any(m.device.type != "cpu" or m.dtype != torch.bfloat16 for m in matrices):
        return False
    is_whole = all(size % kernel.BLOCK == 0 for matrix in matrices for size in matrix.shape)
    attention = transformer.blocks[0].attention
    has_heads = attention.out.in_features == kernel.CHANNELS * attention.num_heads
    return is_whole and has_heads and kernel.library() is not None
