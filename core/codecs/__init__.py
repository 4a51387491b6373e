"""Codecs turn media into a stream of bytes plus a small layout, and back; a file's content decides which one reads it."""

import os
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from core.codecs.audio import MAX_SECONDS, AudioCodec, AudioLayout, Sound, read_sound, resample
from core.codecs.comments import read_comment
from core.codecs.files import (
    LISTED_FORMATS,
    FileKind,
    atomic_file,
    open_regular,
    read_bytes,
    shown,
    sniff,
    sniff_open,
)
from core.codecs.image import ImageCodec, ImageLayout, Picture, read_picture
from core.codecs.partial import read_picture_part
from core.codecs.text import Raw, TextCodec, TextLayout, utf8_decoder
from core.config import AudioCodecConfig, CodecConfig, ImageCodecConfig, TextCodecConfig

__all__ = [
    "LISTED_FORMATS",
    "AudioCodec",
    "AudioLayout",
    "Codec",
    "FileKind",
    "ImageCodec",
    "ImageLayout",
    "Layout",
    "Media",
    "Picture",
    "Raw",
    "Sound",
    "TextCodec",
    "TextLayout",
    "atomic_file",
    "build_codec",
    "open_regular",
    "read_comment",
    "read_media",
    "read_open",
    "read_partial",
    "read_raw",
    "resample",
    "shown",
    "sniff",
    "sniff_open",
    "utf8_decoder",
]

Media = Picture | Sound | Raw
Layout = ImageLayout | AudioLayout | TextLayout


class Codec(Protocol):
    """One modality's way between media and streams.

    Every layout has `num_documents` documents of `document_bytes` bytes, the `notes` of its media, and `counted`: the bytes of
    the stream that count in a total, bool (T,), or None where all of them do.
    """

    config: Any
    modality: str
    unit_bytes: int  # of one character, pixel or sample: a sequence begins at whole ones
    suffix: str  # of the files that `write` makes

    def encode(self, media: Any) -> tuple[np.ndarray, Any]:
        """The stream, uint8 (T,), and its layout."""

    def decode(self, stream: np.ndarray, layout: Any) -> Any:
        """The media that `encode` made the stream from."""

    def unscan(self, values: np.ndarray, layout: Any) -> np.ndarray:
        """Values of each byte of a stream, (T, ...), back in the shape of the media."""

    def round_prefix(self, num_bytes: int) -> int:
        """The longest prefix of at most `num_bytes` bytes that a person can see: whole rows, whole samples."""

    def prefix_says(self, num_bytes: int) -> str:
        """What such a prefix is, in words."""

    def augmented(self, stream: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A training sequence changed at random into one that could as well have been recorded."""

    def write(self, media: Any, path: Path, comment: str | None = None) -> None:
        """Writes an exact file, whole or not at all.

        The ASCII text `comment` goes into the file where its format has a place for it, which text has not.
        """


def build_codec(config: CodecConfig) -> Codec:
    """The codec that a configuration describes."""
    match config:
        case ImageCodecConfig():
            return ImageCodec(config)
        case AudioCodecConfig():
            return AudioCodec(config)
        case TextCodecConfig():
            return TextCodec(config)


def read_media(path: str | os.PathLike[str]) -> Media:
    """What a file holds, opened as what its content says it is; a file of no known format is raw bytes.

    Raises:
        UserError: if it cannot be opened, is empty, too large or damaged, or is a known container that is not decoded here.
    """
    with open_regular(path) as file:
        return read_open(file, shown(path))


def read_partial(path: str | os.PathLike[str]) -> Media:
    """What a file holds as far as its bytes reach: unlike `read_media` it also opens a picture that is cut short.

    The picture's `known`, or the sound's `num_missing`, says what is not there, and its notes say it in words.

    Raises:
        UserError: as `read_media`, and if not even a part of a picture can be seen.
    """
    with open_regular(path) as file:
        name = shown(path)
        kind = sniff_open(file, name)
        return read_picture_part(file, name, kind) if kind.modality == "image" else read_open(file, name)


def read_open(file: BinaryIO, name: str, max_seconds: float = MAX_SECONDS) -> Media:
    """What an open file holds. `name` is what messages call it."""
    kind = sniff_open(file, name)
    if kind.modality == "image":
        return read_picture(file, name, kind)
    if kind.modality == "audio":
        return read_sound(file, name, kind, max_seconds)
    return _raw(file, name)


def read_raw(path: str | os.PathLike[str]) -> Raw:
    """The file's own bytes, whatever they mean.

    Raises:
        UserError: if it cannot be opened, is empty or is too large.
    """
    with open_regular(path) as file:
        return _raw(file, shown(path))


def _raw(file: BinaryIO, name: str) -> Raw:
    return Raw(np.frombuffer(read_bytes(file, name), np.uint8))
