"""Rows of a lockstep that read given bytes, and the logits that they show."""

import numpy as np
import torch
from torch import Tensor

from core.law import SampleConfig, uniforms
from core.lockstep import Job, Lockstep
from core.models import MegaByte


def logits_in_rows(model: MegaByte, byte_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits `(n, V)` of three rows of unequal length that read these bytes, `(3, T)`, and those of the whole pass."""
    patch_size, length = model.config.patch_size, byte_ids.shape[1]
    positions = [0, 2 * patch_size, 3 * patch_size]  # of the rows at first
    batch = Lockstep(model, 3, length)
    found, expected = [], []
    with torch.no_grad():
        whole = model(byte_ids)
        begin_rows(batch, byte_ids, positions)
        while max(positions) < length:
            found += read_patch(batch, byte_ids, positions)
            expected += [torch.stack([whole[row, p + offset] for row, p in enumerate(positions)]) for offset in range(patch_size)]
            positions = [p + patch_size for p in positions]
    return torch.cat(found), torch.cat(expected)


def begin_rows(batch: Lockstep, byte_ids: Tensor, positions: list[int]) -> None:
    """Has every row read so many of its bytes, whole patches."""
    given_BR = np.full((batch.num_rows, batch.round_size), -1)
    for row, position in enumerate(positions):
        batch._begin(row, Job(byte_ids[row, :position].numpy().astype(np.uint8), 1, SampleConfig(), uniforms(0, 0)), given_BR)


def read_patch(batch: Lockstep, byte_ids: Tensor, positions: list[int]) -> list[Tensor]:
    """Has every row read a patch of its bytes from its position on, byte by byte; the logits `(B, V)` of each."""
    given_BR = np.full((batch.num_rows, batch.round_size), -1)
    given_BR[:, : batch.patch_size] = np.stack(
        [byte_ids[row, p : p + batch.patch_size].numpy() for row, p in enumerate(positions)]
    )
    batch._load(positions, given_BR, [], batch.patch_size)
    found = []
    for phase in batch.phases(max(positions), batch.patch_size):
        batch.make_byte(phase)
        found.append(batch.logits_BV.clone())
    return found
