"""Choosing bytes from logits: filters, one random stream per sample, and the sampler that streams a completion.

A sample is a function of the model, its prefix, its settings and (seed, sample number) alone: every row is decoded at
batch size 1, so no neighbour and no batch size can change a byte of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch

from core import native
from core.cache import Cache
from core.config import NUM_BYTE_VALUES, ImageCodecConfig
from core.errors import UserError
from core.likelihood import as_stream, engine_name, nats_to_bits
from core.models import ByteModel

_NUM_THREADS = torch.get_num_threads()  # of all other work; not asked later, when another sampler may have lowered it


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How bytes are chosen. Filters apply in this order: temperature, top-k, top-p.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest byte, the lower one of equals.
        top_k: only the k likeliest bytes; None for all.
        top_p: only the likeliest bytes that together reach this probability; 1.0 for all.
        seed: with the sample number it fixes every random choice.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise UserError(f"temperature={self.temperature} must lie in 0..100; 0 takes the likeliest byte, 1 the model's law")
        if self.top_k is not None and not 1 <= self.top_k <= NUM_BYTE_VALUES:
            raise UserError(f"top_k={self.top_k} must lie in 1..{NUM_BYTE_VALUES}; leave it out for all bytes")
        if not (isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise UserError(f"top_p={self.top_p} must lie above 0 and up to 1; 1 stands for all bytes")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must lie in 0..{2**63 - 1}")


@dataclass(frozen=True)
class Chunk:
    """Bytes drawn together, uint8 `(n,)`, and the bits of each under the model's own unfiltered law, float32 `(n,)`."""

    byte_values: np.ndarray
    bits: np.ndarray


def sampling_law(logits_V: np.ndarray, config: SampleConfig) -> np.ndarray:
    """The probabilities `(V,)`, float64, from which a byte is drawn."""
    logits_V = logits_V.astype(np.float64)
    if config.temperature == 0.0:
        law_V = np.zeros_like(logits_V)
        law_V[logits_V.argmax()] = 1.0
        return law_V
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the likeliest bytes alone
        law_V = np.exp((logits_V - logits_V.max()) / config.temperature)
    law_V /= law_V.sum()
    if config.top_k is None and config.top_p == 1.0:
        return law_V
    likeliest_first = np.argsort(-law_V, kind="stable")  # stable: of equal bytes the lower one comes first
    num_kept = config.top_k or NUM_BYTE_VALUES
    if config.top_p < 1.0:
        mass = law_V[likeliest_first[:num_kept]].cumsum()
        num_kept = min(num_kept, int(np.searchsorted(mass, config.top_p * mass[-1])) + 1)
    law_V[likeliest_first[num_kept:]] = 0.0
    return law_V / law_V.sum()


def draw(law_V: np.ndarray, uniform: float) -> int:
    """The byte at which the cumulated law first exceeds `uniform` in [0, 1)."""
    cumulated_V = law_V.cumsum()
    byte_value = int(np.searchsorted(cumulated_V, uniform * cumulated_V[-1], side="right"))
    return min(byte_value, int(law_V.nonzero()[0][-1]))


def surprisal(logits_V: np.ndarray, byte_value: int) -> float:
    """-log2 p of a byte under the unfiltered law, in bits."""
    logits_V = logits_V.astype(np.float64)
    highest = logits_V.max()
    return nats_to_bits(np.log(np.exp(logits_V - highest).sum()) + highest - logits_V[byte_value])


def uniforms(seed: int, sample_number: int) -> np.random.Generator:
    """The random stream of one sample; Philox gives the same numbers on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(sample_number,))))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps at batch 1 are too short to share: waking a second thread takes longer than its half of the work."""
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_NUM_THREADS)


class Sampler:
    """Completes one prefix, any number of times; the prefix is read once.

    When the context is full, its last half is read again as a new prefix and sampling goes on; a prefix longer than
    the context starts the same way.

    Args:
        model: a model; a picture model refuses to go beyond its one picture.
        prefix: bytes to continue, any number of them.
        num_bytes: bytes to make.
        config: how they are chosen.

    Raises:
        UserError: if the prefix is no bytes, num_bytes < 1, or both together exceed a picture model's picture.
    """

    def __init__(self, model: ByteModel, prefix: np.ndarray | bytes, num_bytes: int, config: SampleConfig) -> None:
        self.model = model
        self.prefix = as_stream(prefix)
        self.num_bytes = num_bytes
        self.config = config
        self.device = next(model.parameters()).device
        self._decoder = native.compile_model(model)
        self.engine = engine_name(self.device, autocast=False) if self._decoder is None else native.ENGINE_NAME
        context = model.config.max_seq_len
        if num_bytes < 1:
            raise UserError(f"num_bytes={num_bytes} must be at least 1")
        if isinstance(model.codec_config, ImageCodecConfig) and len(self.prefix) + num_bytes > context:
            raise UserError(
                f"{num_bytes} bytes after the first {len(self.prefix)} exceed the picture of {context} bytes; "
                f"ask for at most {max(context - len(self.prefix), 0)}"
            )
        self._cache_len = min(context, len(self.prefix) + num_bytes)
        self._after_prefix: tuple[Cache, np.ndarray] | None = None

    def stream(self, sample_number: int = 0) -> Iterator[Chunk]:
        """The new bytes of one sample, in chunks that end with the model's patches. Closing it ends the work."""
        noise = uniforms(self.config.seed, sample_number)
        history = np.concatenate((self.prefix, np.zeros(self.num_bytes, dtype=np.uint8)))
        done = len(self.prefix)
        cache, logits_V = self._start()
        step = self._stepper(cache)
        while done < len(history):
            # Neither mode must stay on while the caller has control, so they cover one patch at a time.
            with torch.inference_mode(), _one_thread():
                patch_size = self.model.config.patch_size
                end = min(done + patch_size - int(cache.positions_B[0]) % patch_size, len(history))
                bits = np.empty(end - done, dtype=np.float32)
                for t in range(done, end):
                    history[t] = draw(sampling_law(logits_V, self.config), noise.random())
                    bits[t - done] = surprisal(logits_V, history[t])
                    if t + 1 < len(history):
                        logits_V = self._append(history[: t + 1], cache, step)
            chunk = Chunk(history[done:end].copy(), bits)
            done = end
            yield chunk

    def _start(self) -> tuple[Cache, np.ndarray]:
        """A cache of one sample's own that has read the prefix, and the logits of the byte after it."""
        if self._after_prefix is None:
            cache = self.model.new_cache(1, self._cache_len)
            self._after_prefix = cache, self._read(self.prefix, cache)
        prefix_cache, logits_V = self._after_prefix
        cache = self.model.new_cache(1, self._cache_len)
        cache.copy_from(prefix_cache)
        return cache, logits_V

    def _append(self, history: np.ndarray, cache: Cache, step: Callable[[int], np.ndarray]) -> np.ndarray:
        if int(cache.positions_B[0]) + 1 >= cache.max_seq_len:
            return self._read(history, cache)
        return step(int(history[-1]))

    def _stepper(self, cache: Cache) -> Callable[[int], np.ndarray]:
        """A function that appends a byte to the cache and gives the logits of the next."""
        if self._decoder is not None:
            return self._decoder.sequence(cache).step
        return lambda byte_value: self._to_host(self.model.step(torch.tensor([byte_value], device=self.device), cache))

    def _read(self, history: np.ndarray, cache: Cache) -> np.ndarray:
        if len(history) >= cache.max_seq_len:
            patch_size = self.model.config.patch_size
            history = history[len(history) - cache.max_seq_len // 2 // patch_size * patch_size :]
        byte_ids_BT = torch.from_numpy(history.astype(np.int64))[None].to(self.device)
        return self._to_host(self.model.prefill(byte_ids_BT, cache))

    @staticmethod
    def _to_host(logits_BV: torch.Tensor) -> np.ndarray:
        return logits_BV[0].cpu().numpy()


def generate(
    model: ByteModel,
    prefix: np.ndarray | bytes | Sequence[np.ndarray | bytes],
    num_bytes: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
) -> list[np.ndarray]:
    """The new bytes, uint8 `(num_bytes,)`, of `num_samples` completions of a prefix, or of each of several prefixes.

    Raises:
        UserError: if a setting is out of range.
    """
    config = SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    prefixes = [prefix] if isinstance(prefix, (np.ndarray, bytes, bytearray, str)) else prefix
    if num_samples < 1:
        raise UserError(f"num_samples={num_samples} must be at least 1")
    samplers = [Sampler(model, each, num_bytes, config) for each in prefixes]
    return [
        np.concatenate([chunk.byte_values for chunk in sampler.stream(number)])
        for sampler in samplers
        for number in range(num_samples)
    ]
