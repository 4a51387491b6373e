"""Sequences being continued: the native decoder's on a CPU, or torch's for every model on every device.

No neighbour can change a byte of a row: torch decodes it at batch size 1, and the native decoder, which reads the weights once
for several rows, computes each as if it were alone.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from core.arena import Arena
from core.cache import Cache
from core.law import Chunk, SampleConfig, draw, sampling_law, surprisal
from core.models import ByteModel, MegaByte
from core.native import NativeDecoder, NativeSequence, Part, Team

_laid_out: WeakKeyDictionary[ByteModel, list[int]] = WeakKeyDictionary()  # where the matrices of laid out models are
_setting = threading.Lock()  # the number of threads of torch
_other_thread = ThreadPoolExecutor(1)


class Row(Protocol):
    """One sequence that has read some bytes."""

    def read(self, history: np.ndarray) -> None:
        """Starts again from these bytes, uint8, fewer than the row has room for."""

    def copy(self) -> "Row":
        """Another sequence that goes on from here."""


Draw = tuple[Row, np.ndarray, SampleConfig]  # a row, and one number, float64 in [0, 1), for each byte that is appended to it


class NativeRow:
    """A row of the native decoder."""

    def __init__(self, model: MegaByte, decoder: NativeDecoder, cache_len: int) -> None:
        self._made_of = model, decoder, cache_len
        self._cache = model.new_cache(1, cache_len)
        self._sequence = NativeSequence(decoder, self._cache)
        self._unread = np.zeros(0, dtype=np.uint8)  # the bytes after the last whole patch, which the kernel reads itself

    def read(self, history: np.ndarray) -> None:
        model = self._made_of[0]
        num_whole = len(history) - len(history) % model.config.patch_size
        model.read_patches(_byte_ids(history[:num_whole]), self._cache)
        self._unread = history[num_whole:]

    def copy(self) -> "NativeRow":
        other = NativeRow(*self._made_of)
        other._cache.copy_from(self._cache)
        other._unread = self._unread
        return other

    @staticmethod
    def draw(team: Team, draws: Sequence[Draw]) -> list[Chunk]:
        """Appends bytes to rows of one decoder, for which there must be room."""
        parts = [
            Part(row._sequence, row._unread, numbers, temperature=law.temperature, top_k=law.top_k, top_p=law.top_p)
            for row, numbers, law in draws
        ]
        chunks = []
        for (row, *_), (byte_values, bits) in zip(draws, team.draw(parts), strict=True):
            num_given, row._unread = len(row._unread), row._unread[:0]
            chunks.append(Chunk(byte_values[num_given:], bits[num_given:]))
        return chunks


class TorchRow:
    """A row stepped by torch."""

    def __init__(self, model: ByteModel, cache_len: int) -> None:
        self._model, self._cache_len = model, cache_len
        self._cache: Cache = model.new_cache(1, cache_len)
        self._byte_ids_B = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
        self.logits_V = np.zeros(0, dtype=np.float32)  # of the next byte, unless a drawn one is still to be appended
        self._drawn: int | None = None

    def read(self, history: np.ndarray) -> None:
        with torch.inference_mode():
            logits_BV = self._model.prefill(_byte_ids(history).to(self._byte_ids_B.device), self._cache)
        self.logits_V, self._drawn = logits_BV[0].cpu().numpy(), None

    def copy(self) -> "TorchRow":
        other = TorchRow(self._model, self._cache_len)
        other._cache.copy_from(self._cache)
        other.logits_V, other._drawn = self.logits_V, self._drawn
        return other

    @staticmethod
    def draw(draws: Sequence[Draw]) -> list[Chunk]:
        """Appends bytes to one row after another, for which there must be room."""
        return [row._draw(numbers, law) for row, numbers, law in draws]

    def _draw(self, uniforms: np.ndarray, config: SampleConfig) -> Chunk:
        byte_values, bits = np.empty(len(uniforms), dtype=np.uint8), np.empty(len(uniforms), dtype=np.float32)
        with torch.inference_mode(), _one_thread():
            for t, uniform in enumerate(uniforms):
                # Appended no sooner than another byte is asked for: the last one of a full cache has no place in it.
                if self._drawn is not None:
                    self.logits_V = self._model.step(self._byte_ids_B.fill_(self._drawn), self._cache)[0].cpu().numpy()
                self._drawn = draw(sampling_law(self.logits_V, config), uniform)
                byte_values[t], bits[t] = self._drawn, surprisal(self.logits_V, self._drawn)
        return Chunk(byte_values, bits)


def lay_out(model: ByteModel) -> None:
    """Moves the matrices, values unchanged, so that a product with one vector is one long walk through large pages.

    On a CPU; once for each model, and again if a matrix was replaced. No other thread may compute with the model meanwhile.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module.weight.device.type == "cpu"]
    if _laid_out.get(model) == [linear.weight.data_ptr() for linear in linears]:
        return
    arena = Arena(sum(linear.weight.nbytes for linear in linears))
    for linear in linears:
        weight_RC = linear.weight.data
        # The longer side becomes the inner one of the walk.
        by_rows = weight_RC.shape[0] <= weight_RC.shape[1]
        stored = arena.take(weight_RC.shape if by_rows else weight_RC.T.shape, weight_RC.dtype)
        linear.weight.data = (stored if by_rows else stored.T).copy_(weight_RC)
    _laid_out[model] = [linear.weight.data_ptr() for linear in linears]


def _byte_ids(stream: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(stream.astype(np.int64))[None]


@contextmanager
def _one_thread() -> Iterator[None]:
    """For steps at batch 1, too short to share: waking a second thread takes longer than its half of the work.

    `torch.set_num_threads` sets this thread's number and that with which new threads begin; the latter is put back at once,
    by a thread that is kept for it: to begin one for every chunk takes a fiftieth of the time of its bytes.
    """
    with _setting:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        _other_thread.submit(torch.set_num_threads, num_threads).result()
    try:
        yield
    finally:
        with _setting:
            torch.set_num_threads(num_threads)


def _renew_other_thread() -> None:
    """A forked process has none of its parent's threads, and its locks as they happened to be."""
    global _setting, _other_thread
    _setting, _other_thread = threading.Lock(), ThreadPoolExecutor(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_other_thread)
