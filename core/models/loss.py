"""The loss of a byte, and the pieces in which it is computed where all logits at once would not fit.

256 float32 logits a byte are a gigabyte for a million bytes, and what goes on inside a local model is more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from core.kernels import training_cpu

if TYPE_CHECKING:
    from core.models import ByteModel

Measure = Callable[[Tensor, Tensor], dict[str, Tensor]]  # of logits (B, L, 256) and the bytes (B, L) they predict

# Small on a CPU: what one layer writes should still be in its cache when the next one reads it. On a GPU large enough to fill
# it; with recomputation each chunk's activations are in memory together, up to 300 kB a byte in the paper's local models.
_CHUNK_BYTES = {"cpu": 1 << 12, "cuda": 1 << 18}
_RECOMPUTED_CHUNK_BYTES = {"cpu": 1 << 13, "cuda": 1 << 16}


@dataclass(frozen=True)
class Chunk:
    """Bytes `start` to `end` of some sequences; what they depend on below the coarse levels begins at byte `first`."""

    sequences: slice
    first: int
    start: int
    end: int


def nll(model: "ByteModel", byte_ids_BT: Tensor, recompute: bool = False) -> Tensor:
    """-ln p of the last S bytes `(B, S)` that the model predicts, float32; S = T for most models."""
    return model.measure(byte_ids_BT, _nll_of_logits, recompute)["nll"]


def nll_of_logits(logits_BSV: Tensor, byte_ids_BS: Tensor) -> Tensor:
    """-ln p of every byte `(B, S)`, float32, from its logits."""
    logits_NV, byte_ids_N = logits_BSV.flatten(0, 1).float(), byte_ids_BS.flatten()
    if training_cpu.can_measure(logits_NV, byte_ids_N):
        return training_cpu.nll(logits_NV, byte_ids_N).view_as(byte_ids_BS)
    return F.cross_entropy(logits_NV, byte_ids_N, reduction="none").view_as(byte_ids_BS)


def _nll_of_logits(logits_BSV: Tensor, byte_ids_BS: Tensor) -> dict[str, Tensor]:
    return {"nll": nll_of_logits(logits_BSV, byte_ids_BS)}


def chunk_bytes(device: torch.device, recompute: bool) -> int:
    """How many bytes one chunk should hold."""
    return (_RECOMPUTED_CHUNK_BYTES if recompute else _CHUNK_BYTES).get(device.type, 1 << 13)


def plan_chunks(num_sequences: int, num_bytes: int, row: int, past: int, budget: int) -> list[list[Chunk]]:
    """The chunks of each group of sequences, together every byte of every sequence once.

    Args:
        num_bytes: of each sequence, a multiple of `row`.
        row: bytes that must stay together.
        past: bytes before a chunk's own that it has to read, a multiple of `row`.
        budget: bytes of a chunk, over all its sequences; one row of one sequence is the least.
    """
    together = min(num_sequences, max(1, budget // num_bytes))
    length = max(row, budget // together // row * row)
    return [
        [
            Chunk(slice(sequence, sequence + together), max(0, start - past), start, min(start + length, num_bytes))
            for start in range(0, num_bytes, length)
        ]
        for sequence in range(0, num_sequences, together)
    ]
