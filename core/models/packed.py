"""Transformers whose weights lie in memory as steps of few rows read them.

From plain bfloat16 weights torch's product on a CPU reads, and lays out anew, all of them each time. Where our kernel can be
had a step is one call of it; elsewhere oneDNN multiplies by weights that are laid out once.
"""

import torch
from torch import Tensor, nn

from core.arena import Arena
from core.cache import LevelCache
from core.kernels import step as kernel
from core.models.layers import QK_EPSILON, Block, Slots, Transformer

_FEW_ROWS = 16  # that oneDNN's layout is chosen for; products of any other number are right as well


class PackedTransformer(Transformer):
    """A bfloat16 Transformer, to be used but not trained, that shares the parts of another and steps by our kernel.

    Its steps take slots of each row's own, with a mask. It holds the matrices twice: as they were for whole rows, and packed.
    """

    def __init__(self, plain: Transformer) -> None:
        nn.Module.__init__(self)
        self.memory, self.row_length = plain.memory, plain.row_length
        self.rotary, self.blocks, self.norm = plain.rotary, plain.blocks, plain.norm
        self.residual_scalars = plain.residual_scalars
        self.training = plain.training
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
