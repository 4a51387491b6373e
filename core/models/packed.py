"""Linear layers whose weights lie in memory as oneDNN's products of few rows read them.

From plain bfloat16 weights the CPU's product reads, and lays out anew, all of them each time: 1.2 to 1.6 times as long.
"""

import torch
from torch import Tensor, nn

_FEW_ROWS = 16  # that the layout is chosen for; products of any other number are right as well


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 on a CPU, to be used but not trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        weight = linear.weight.detach()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, _FEW_ROWS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replaces the linear layers inside a model in bfloat16; it stays as it is where the machine has no such products."""
    if next(model.parameters()).device.type != "cpu" or not _is_available():
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))


def _is_available() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
