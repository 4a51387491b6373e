"""Text, or any file of no known format: the stream is its bytes as they are."""

import codecs
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.codecs.files import atomic_file
from core.config import TextCodecConfig


@dataclass(frozen=True, eq=False)
class Raw:
    """The bytes of a text or of any file."""

    data: np.ndarray  # uint8 (N,)
    notes: tuple[str, ...] = ()  # what was done to the file to get here, for a person


@dataclass(frozen=True)
class TextLayout:
    """A stream of text has no shape beyond its length."""

    num_bytes: int
    notes: tuple[str, ...] = ()
    num_documents = 1
    counted = None

    @property
    def document_bytes(self) -> int:
        return self.num_bytes


class TextCodec:
    """Bytes as they are, both ways."""

    modality = "text"
    unit_bytes = 1
    suffix = ".txt"

    def __init__(self, config: TextCodecConfig) -> None:
        self.config = config

    def encode(self, media: Raw) -> tuple[np.ndarray, TextLayout]:
        return media.data, TextLayout(media.data.size, media.notes)

    def decode(self, stream: np.ndarray, layout: TextLayout) -> Raw:
        return Raw(stream, layout.notes)

    def unscan(self, values: np.ndarray, layout: TextLayout) -> np.ndarray:
        """The values, (T, ...), which are in the order of the text already."""
        return values

    def round_prefix(self, num_bytes: int) -> int:
        return num_bytes

    def prefix_says(self, num_bytes: int) -> str:
        return f"{num_bytes} bytes"

    def augmented(self, stream: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The text itself: no change of its bytes leaves it as likely."""
        return stream

    def write(self, media: Raw, path: Path, comment: str | None = None) -> None:
        with atomic_file(path) as file:
            file.write(media.data.tobytes())


def utf8_decoder() -> codecs.IncrementalDecoder:
    """A decoder for showing bytes that arrive in chunks: a character cut by a chunk waits for its rest."""
    return codecs.getincrementaldecoder("utf-8")("replace")
