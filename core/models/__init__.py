"""Models of bytes: what every one of them can do, and how one is built from its configuration."""

from typing import Protocol

from torch import Tensor

from core.cache import Cache
from core.config import CodecConfig, Config, MegaByteConfig
from core.models.megabyte import MegaByte

__all__ = ["ByteModel", "MegaByte", "build_model"]


class ByteModel(Protocol):
    """`logits[:, t]` is the law of byte t given the bytes before t; all 256 values are data."""

    config: MegaByteConfig
    codec_config: CodecConfig | None  # what the bytes mean; None if that was not said

    def forward(self, byte_ids_BT: Tensor) -> Tensor:
        """Logits `(B, T, 256)`, float32, of int64 byte values `(B, T)`, any T up to `config.max_seq_len`."""

    def new_cache(self, batch_size: int, max_seq_len: int) -> Cache:
        """Decoding buffers for `batch_size` sequences of up to `max_seq_len` bytes."""

    def prefill(self, byte_ids_BT: Tensor, cache: Cache) -> Tensor:
        """Starts the cache's sequences; logits `(B, 256)` of the byte after them. T may be 0."""

    def step(self, byte_ids_B: Tensor, cache: Cache) -> Tensor:
        """Appends one byte to each row; logits `(B, 256)` of the next."""


def build_model(config: Config) -> ByteModel:
    """A freshly initialised model that knows what its bytes mean, in evaluation mode."""
    model = MegaByte(config.model).eval()
    model.codec_config = config.codec
    return model
