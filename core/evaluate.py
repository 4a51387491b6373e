"""Validation during training: bits per byte over fixed windows, summed over all ranks."""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from core.distributed import Ranks
from core.likelihood import nats_to_bits


def sum_nll(logits_BTV: Tensor, byte_ids_BT: Tensor) -> Tensor:
    """Negative log-likelihood in nats, summed over every byte."""
    # fp32: bf16 keeps 8 significant bits, too few for a sum over many bytes.
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), byte_ids_BT.flatten(), reduction="sum")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Matrix products in bf16 where the run asks for it; weights, norms and the loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def evaluate(
    model: nn.Module, weights: dict[str, Tensor], windows: np.ndarray, batch_size: int, precision: str, ranks: Ranks
) -> float:
    """Bits per byte of `model` with `weights` in place of its own.

    Args:
        windows: All ranks' windows, uint8 (n, seq_len); each rank takes its share of them.
        batch_size: Windows of one forward pass on one rank.
    """
    own = torch.from_numpy(windows[ranks.rank :: ranks.num_ranks])
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # nats and bytes
    was_training = model.training
    model.eval()
    for batch in own.split(batch_size):
        byte_ids = batch.to(ranks.device).long()
        with autocast(ranks.device, precision):
            logits = functional_call(model, weights, (byte_ids,))
        sums[0] += sum_nll(logits, byte_ids)
        sums[1] += byte_ids.numel()
    model.train(was_training)
    nats, num_bytes = ranks.sum(sums).tolist()
    return nats_to_bits(nats / num_bytes)
