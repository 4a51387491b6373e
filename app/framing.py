"""What a completion starts from: the media in the form its model reads, how much of it can be kept, and what is missing."""

from dataclasses import dataclass, replace

import numpy as np

from app.media import fitted
from core.codecs import Codec, Media, Picture, Raw, Sound
from core.config import AudioCodecConfig, ImageCodecConfig

_DEFAULT_SOUND_S = 1.0  # of sound made from nothing


@dataclass(frozen=True, eq=False)
class Source:
    """Media in a model's form.

    Attributes:
        media: a picture at its own size or at the model's, a sound at the model's rate, bytes as they are.
        num_there: bytes that can be kept, in the order in which they are read.
        num_whole: bytes of the whole, with those that a file cut short has promised.
        unit: bytes that can only be kept together: rows of a picture, rows of patches if it has the model's size, samples.
        is_cut: whether there is something missing to be made.
        is_tiled: whether a picture is larger than the model's and made in tiles.
        upside_down: whether a picture is read from its bottom row up.
    """

    media: Media
    num_there: int
    num_whole: int
    unit: int
    is_cut: bool = False
    is_tiled: bool = False
    upside_down: bool = False

    def says(self, num_bytes: int, codec: Codec) -> str:
        """What the first `num_bytes` bytes are, in words."""
        if isinstance(self.media, Picture):
            end = "bottom" if self.upside_down else "top"
            return f"{end} {num_bytes // (3 * self.media.width)} of {self.media.height} rows"
        return codec.prefix_says(num_bytes)


def source_of(media: Media | None, codec: Codec, framing: str, upside_down: bool) -> Source:
    """The media as the model reads it; None is nothing, of the model's own size or rate.

    Raises:
        UserError: if the media does not fit the model.
    """
    if media is None:
        return _nothing(codec)
    if isinstance(media, Picture):
        return _picture(media, codec, framing, upside_down)
    media = fitted(media, codec)
    if isinstance(media, Raw):
        return Source(media, media.data.size, media.data.size, unit=1)
    unit = codec.config.bytes_per_sample
    num_there = unit * media.samples.size
    # An Ogg file that is cut short does not say by how much.
    unknown = _second(codec.config) if media.is_truncated and not media.num_missing else 0
    num_whole = num_there + unit * media.num_missing + unknown
    return Source(media, num_there, num_whole, unit, is_cut=media.is_truncated)


def _nothing(codec: Codec) -> Source:
    config = codec.config
    if isinstance(config, ImageCodecConfig):
        return replace(_picture(Picture(np.zeros((config.side, config.side, 3), np.uint8)), codec, "tiles", False), num_there=0)
    if isinstance(config, AudioCodecConfig):
        sound = Sound(np.zeros(0, np.int16), config.sample_rate)
        return Source(sound, 0, _second(config), config.bytes_per_sample)
    return Source(Raw(np.zeros(0, np.uint8)), 0, 0, unit=1)


def _second(config: AudioCodecConfig) -> int:
    return int(_DEFAULT_SOUND_S * config.sample_rate) * config.bytes_per_sample


def _picture(picture: Picture, codec: Codec, framing: str, upside_down: bool) -> Source:
    side = codec.config.side
    known = picture.known
    if known is not None and not known[0].any():  # what is there is the bottom, as in a BMP
        upside_down = True
    if framing == "fit" or min(picture.height, picture.width) < side:
        picture = fitted(picture, codec)
        known = picture.known
    in_order = None if known is None else known[::-1] if upside_down else known
    row_bytes = 3 * picture.width
    is_tiled = (picture.height, picture.width) != (side, side)
    num_rows = picture.height if in_order is None else _leading(in_order.all(axis=1))
    return Source(
        picture,
        num_there=num_rows * row_bytes,
        num_whole=picture.height * row_bytes,
        unit=row_bytes if is_tiled else row_bytes * codec.row_height,
        is_cut=known is not None,
        is_tiled=is_tiled,
        upside_down=upside_down,
    )


def _leading(flags: np.ndarray) -> int:
    return flags.size if flags.all() else int(flags.argmin())
