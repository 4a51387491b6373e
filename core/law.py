"""The law from which a byte is drawn: temperature, top-k, top-p, and one random stream per sample.

Everything here is float64 and exact to its rounding; `core/native/law.h` and `core/lockstep.py` compute the same law.
"""

from dataclasses import dataclass
from math import isfinite

import numpy as np

from core.config import NUM_BYTE_VALUES
from core.errors import UserError
from core.likelihood import nats_to_bits


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
    wide_V = logits_V.astype(np.float64)
    if config.temperature == 0.0:
        law_V = np.zeros_like(wide_V)
        law_V[wide_V.argmax()] = 1.0
        return law_V
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the likeliest bytes alone
        law_V = np.exp((wide_V - wide_V.max()) / config.temperature)
    law_V /= law_V.sum()
    if config.top_k is None and config.top_p == 1.0:
        return law_V
    likeliest_first = np.argsort(-logits_V, kind="stable")  # stable: of equal bytes the lower one comes first
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
