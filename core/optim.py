"""How weights move: parameter groups, the optimizers, the learning-rate schedule and the running average of the weights."""

import math
from collections import defaultdict

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from core.config import TrainConfig
from core.distributed import share_of, whole


def learning_rate_fraction(step: int, config: TrainConfig) -> float:
    """Part of the full learning rates for the update after `step` finished ones: linear warm-up, then the configured decay."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps))
    remaining = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "trapezoid": min(1.0, (1.0 - progress) / config.decay_fraction),
    }
    return config.final_lr_fraction + (1.0 - config.final_lr_fraction) * remaining[config.schedule]


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


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the matrices of linear layers and AdamW for the rest."""
    groups = parameter_groups(model, config.weight_decay)
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        decaying = groups[0]["params"]
        matrices = [parameter for parameter in decaying if parameter.ndim == 2]
        groups[0]["params"] = [parameter for parameter in decaying if parameter.ndim != 2]
        # Queries, keys and values lie in one matrix but are three.
        threes = {id(module.qkv.weight) for module in model.modules() if hasattr(module, "qkv")}
        muon_groups = [
            {"params": [p for p in matrices if id(p) not in threes], "parts": 1},
            {"params": [p for p in matrices if id(p) in threes], "parts": 3},
        ]
        optimizers.append(Muon(muon_groups, lr=config.muon_lr, weight_decay=config.weight_decay))
    # As one fused kernel: about three times as fast as the loop over tensors on a CPU.
    optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizer: torch.optim.Optimizer, fraction: float) -> None:
    """Sets every group's learning rate to a fraction of its full one."""
    for group in optimizer.param_groups:
        group["lr"] = fraction * group["full_lr"]


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: all directions of a matrix move equally far (Jordan et al., 2024).

    torch has one too; this one orthogonalises all matrices of one shape together, which on a GPU is what its time depends
    on, and it heeds `found_inf` like the fused AdamW. Of sharded matrices each rank orthogonalises the whole.

    Args:
        params: matrices; a group's `parts` says how many matrices are stacked in each of its parameters.
        lr: spectral norm of a step, times sqrt(rows / columns) for tall matrices.
        weight_decay: per step, times lr.
        momentum: of the running mean of gradients; the step looks one update ahead (Nesterov).
    """

    found_inf: torch.Tensor | None = None

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            means = [self._mean(p) for p in parameters]
            keep = 1.0
            if self.found_inf is not None:
                keep = 1.0 - self.found_inf
                gradients = [torch.where(self.found_inf > 0, 0.0, gradient) for gradient in gradients]
            for mean, gradient in zip(means, gradients, strict=True):
                mean.lerp_(gradient, (1.0 - group["momentum"]) * keep)
            torch._foreach_lerp_(gradients, means, group["momentum"])
            for same in _by_shape(parameters, gradients):
                self._move(*same, group, keep)

    def _mean(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(parameter)
        return state["mean"]

    @staticmethod
    def _move(parameters: list[Tensor], steps: list[Tensor], group: dict, keep: float | Tensor) -> None:
        stacked = rearrange(torch.stack([whole(step) for step in steps]), "n (m r) c -> (n m) r c", m=group["parts"])
        orthogonal = rearrange(orthogonalized(stacked), "(n m) r c -> n (m r) c", m=group["parts"]).to(steps[0].dtype)
        rows, columns = stacked.shape[1:]
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5 * keep
        for parameter, step in zip(parameters, orthogonal, strict=True):
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"] * keep).sub_(share_of(step * scale, parameter))


def orthogonalized(matrices_NRC: Tensor) -> Tensor:
    """Nearly the closest semi-orthogonal matrix to each: five steps of a Newton-Schulz iteration on the singular values.

    Its coefficients bring every singular value into about 0.7..1.2, which is as good for training as 1 and faster.
    """
    x = matrices_NRC
    if is_tall := x.shape[1] > x.shape[2]:
        x = x.mT
    if x.is_cuda:
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x


def _by_shape(parameters: list[Tensor], steps: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    groups: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for parameter, step in zip(parameters, steps, strict=True):
        of_shape = groups[parameter.shape]
        of_shape[0].append(parameter)
        of_shape[1].append(step)
    return list(groups.values())


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
