"""How weights move: parameter groups, the optimizer, the learning-rate schedule and the running average of the weights."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from core.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of the update that follows `step` finished ones: linear warm-up, then the configured decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps))
    remaining = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * remaining[config.schedule])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two optimizer groups: matrices of linear and convolution layers decay, everything else does not.

    Embeddings, positions, pads, norms and biases are looked up or added, not multiplied: shrinking them only hides rare bytes.
    """
    matrix_layers = (nn.Linear, nn.Conv1d)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, matrix_layers)}
    matrices -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # a tied output matrix is an embedding
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as one fused kernel, about three times as fast as the loop over tensors on a CPU."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def average_decay(step: int, decay: float) -> float:
    """Decay of the running average after `step` updates; it starts low so that the random initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


def update_average(average: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """Moves every tensor of `average` in place by 1 - decay of the way to its namesake in `weights`."""
    get_ema_multi_avg_fn(decay)(list(average.values()), [weights[name] for name in average], None)


class FiniteGuard:
    """Stops all updates on the device from the first non-finite loss or gradient on, without the host waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if the update of `step` must not happen, else 0.0: what the fused optimizer takes as `found_inf`."""
        is_bad = ~torch.isfinite(loss + grad_norm)
        self._bad_step = torch.where((self._bad_step < 0) & is_bad, step, self._bad_step)
        return (self._bad_step >= 0).float()

    def bad_step(self) -> int | None:
        """The first step whose update was withheld; waits for the device."""
        step = int(self._bad_step)
        return None if step < 0 else step
