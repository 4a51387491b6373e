"""Models of bytes: what every one of them can do, and how one is built from its configuration."""

from typing import Protocol

from torch import Tensor

from core.cache import Cache
from core.config import CodecConfig, Config, ModelConfig, PerceiverArConfig
from core.models.loss import Measure
from core.models.megabyte import MegaByte
from core.models.perceiver_ar import PerceiverAr

__all__ = ["ByteModel", "MegaByte", "PerceiverAr", "build_model"]


class ByteModel(Protocol):
    """`logits[:, t]` is the law of byte t given the bytes before t; all 256 values are data."""

    config: ModelConfig
    codec_config: CodecConfig | None  # what the bytes mean; None if that was not said

    def forward(self, byte_ids_BT: Tensor) -> Tensor:
        """Logits `(B, S, 256)`, float32, of the last S = `config.num_predicted(T)` of int64 byte values `(B, T)`.

        S is T for most models; any T up to `config.max_seq_len`.
        """

    def measure(self, byte_ids_BT: Tensor, of_logits: Measure, recompute: bool = False) -> dict[str, Tensor]:
        """What `of_logits` says of `forward`'s logits, in memory that need not hold them all.

        With `recompute` the backward pass runs layers again instead of keeping what is inside them.
        """

    def new_cache(self, batch_size: int, max_seq_len: int) -> Cache:
        """Decoding buffers for `batch_size` sequences of up to `max_seq_len` bytes."""

    def prefill(self, byte_ids_BT: Tensor, cache: Cache) -> Tensor:
        """Starts the cache's sequences; logits `(B, 256)` of the byte after them. T may be 0."""

    def step(self, byte_ids_B: Tensor, cache: Cache) -> Tensor:
        """Appends one byte to each row; logits `(B, 256)` of the next."""


def build_model(config: Config) -> ByteModel:
    """A freshly initialised model that knows what its bytes mean, in evaluation mode."""
    kind = PerceiverAr if isinstance(config.model, PerceiverArConfig) else MegaByte
    model = kind(config.model).eval()
    model.codec_config = config.codec
    return model
