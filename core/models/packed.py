"""Linear layers whose weights lie in memory as products of few rows read them.

From plain bfloat16 weights torch's product on a CPU reads, and lays out anew, all of them each time: 1.2 to 1.6 times as
long as from packed ones, and those take two to three times as long as our kernel.
"""

import torch
from torch import Tensor, nn

from core.kernels import linear as kernel

_FEW_ROWS = 16  # that oneDNN's layout is chosen for; products of any other number are right as well


class BlockedLinear(nn.Module):
    """A linear layer in bfloat16 by our kernel, to be used but not trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", kernel.pack(linear.weight.detach()), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernel.apply_linear(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 by oneDNN, to be used but not trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        weight = linear.weight.detach()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, _FEW_ROWS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replaces the linear layers inside a model in bfloat16; they stay as they are where the machine has no such products."""
    if next(model.parameters()).device.type != "cpu":
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, _packed(child))


def _packed(linear: nn.Linear) -> nn.Module:
    if kernel.can_apply(linear.weight):
        return BlockedLinear(linear)
    has_onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return PackedLinear(linear) if has_onednn else linear
