"""What a completion fills: where new bytes go in a stream or a picture, and what the model reads before it makes them.

A canvas belongs to one sample. Its bytes are made in stretches, each in one go of the model after the prefix that the canvas
gives for it. Sound and text are one stretch. So is a picture of the model's size; a larger one is made in tiles, row by row of
tiles, each below rows that are there already:

    kept rows      + - - - - + - - - - +     Up to half of a tile is context, the rows above the new ones;
                   | context | context |     the other half is made. Its bottom rows are the context of the
    new rows       |   new   |   new   |     next row of tiles. Tiles do not see their neighbours at the sides.
                   + - - - - + - - - - +
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core.codecs import AudioCodec, Codec, ImageCodec, Media, Picture, Sound

NOT_MADE = 128  # what stands in a picture where no byte was made: middle grey


class Canvas(Protocol):
    """One sample as far as it is made."""

    stretches: tuple[int, ...]  # bytes of each stretch

    def prefix(self, index: int) -> np.ndarray:
        """What the model reads before it makes a stretch, uint8; the stretches before it must be made."""

    def put(self, index: int, start: int, byte_values: np.ndarray) -> None:
        """Takes bytes of a stretch, from its byte `start` on."""

    def media(self) -> Media:
        """The kept part and what is made so far."""

    def numbers(self) -> np.ndarray:
        """The number of the new byte that stands in each place of the media, -1 for the kept ones.

        Shape (N,) for sounds and bytes, where a sample of two bytes has the number of its first, and (H, W, 3) for pictures.
        """


class StreamCanvas:
    """A sound or bytes of any meaning, made from the cut onwards."""

    def __init__(self, codec: Codec, media: Media, num_kept: int, num_bytes: int) -> None:
        self._codec = codec
        self._media = media
        stream, self._layout = codec.encode(media)
        self._num_kept = num_kept
        self._num_made = 0
        self._stream = np.concatenate((stream[:num_kept], np.zeros(num_bytes, np.uint8)))
        self.stretches = (num_bytes,)

    def prefix(self, index: int) -> np.ndarray:
        return self._stream[: self._num_kept]

    def put(self, index: int, start: int, byte_values: np.ndarray) -> None:
        end = start + len(byte_values)
        self._stream[self._num_kept + start : self._num_kept + end] = byte_values
        self._num_made = end  # last, because others look at any time

    def media(self) -> Media:
        made = self._stream[: self._num_kept + self._num_made].copy()  # a view would keep the room for all that was asked for
        if not isinstance(self._media, Sound):
            return self._codec.decode(made, self._layout)
        # mu-law has only approximated the samples before the cut.
        num_samples = self._num_kept // self._codec.config.bytes_per_sample
        decoded = self._codec.decode(made[: self._codec.round_prefix(len(made))], self._layout)
        return self._codec.splice(self._media, num_samples, decoded)

    def numbers(self) -> np.ndarray:
        unit = self._codec.config.bytes_per_sample if isinstance(self._codec, AudioCodec) else 1
        numbers = np.arange(0, self._stream.size, unit) - self._num_kept
        return np.where(numbers < 0, -1, numbers)


@dataclass(frozen=True)
class _Tile:
    top: int  # row of the picture
    left: int
    context_rows: int
    new_rows: int
    first_new_column: int  # of the picture: where the last tile of a row begins further left, its neighbour comes first


class PictureCanvas:
    """A picture of at least the model's size, made below its first rows, or above its last ones when read upside down."""

    def __init__(self, codec: ImageCodec, picture: Picture, num_rows: int, *, upside_down: bool = False) -> None:
        """Keeps `num_rows` rows, counted from the bottom when it is read upside down."""
        self._codec = codec
        self._notes = picture.notes
        self._turn = slice(None, None, -1 if upside_down else 1)
        self._pixels = picture.pixels[self._turn].copy()
        self._pixels[num_rows:] = NOT_MADE
        self._known = np.zeros(self._pixels.shape[:2], bool)
        self._known[:num_rows] = True
        self._side = codec.config.side
        self._tiles = tuple(_tiles(self._pixels.shape, num_rows, self._side, codec.row_height))
        self._num_rows = num_rows
        # place[t] is where byte t of a tile's stream lies among the bytes of its rows.
        _, layout = codec.encode(Picture(np.zeros((self._side, self._side, 3), np.uint8)))
        self._place = np.argsort(codec.unscan(np.arange(codec.document_bytes), layout).reshape(-1))
        self.stretches = tuple(tile.new_rows * self._side * 3 for tile in self._tiles)

    @property
    def context_rows(self) -> int:
        """The most rows that a tile reads."""
        return max((tile.context_rows for tile in self._tiles), default=0)

    def prefix(self, index: int) -> np.ndarray:
        tile, side = self._tiles[index], self._side
        context = self._pixels[tile.top : tile.top + tile.context_rows, tile.left : tile.left + side].reshape(-1)
        return context[self._place[: context.size]]

    def put(self, index: int, start: int, byte_values: np.ndarray) -> None:
        rows, columns, channels, is_shown = self._places(index, start, len(byte_values))
        self._pixels[rows, columns, channels] = byte_values[is_shown]
        self._known[rows[channels == 2], columns[channels == 2]] = True  # blue is a pixel's last byte

    def media(self) -> Picture:
        known = None if self._known.all() else self._known[self._turn].copy()
        return Picture(self._pixels[self._turn].copy(), self._notes, known)

    def numbers(self) -> np.ndarray:
        numbers = np.full(self._pixels.shape, -1, np.int64)
        first = 0
        for index, num_bytes in enumerate(self.stretches):
            *places, is_shown = self._places(index, 0, num_bytes)
            numbers[tuple(places)] = first + np.flatnonzero(is_shown)
            first += num_bytes
        return numbers[self._turn]

    def _places(self, index: int, start: int, num_bytes: int) -> tuple[np.ndarray, ...]:
        """Row, column and channel of those bytes of a stretch that belong to the picture, and which they are, bool (n,)."""
        tile, side = self._tiles[index], self._side
        first = tile.context_rows * side * 3 + start
        row, rest = np.divmod(self._place[first : first + num_bytes], side * 3)
        rows, columns, channels = tile.top + row, tile.left + rest // 3, rest % 3
        is_shown = (rows < self._pixels.shape[0]) & (columns >= tile.first_new_column)
        return rows[is_shown], columns[is_shown], channels[is_shown], is_shown


def _tiles(shape: tuple[int, ...], num_rows: int, side: int, row_height: int) -> list[_Tile]:
    """The tiles that fill a picture below its first rows; the model makes whole rows of its patches, `row_height` pixels each."""
    height, width, _ = shape
    half = max(1, side // row_height // 2) * row_height
    lefts = [*range(0, width - side, side), width - side]
    tiles, row = [], num_rows
    while row < height:
        rest = -(-(height - row) // row_height) * row_height
        above = row - row % row_height
        new_rows = min(rest, side - min(above, half))
        context_rows = min(above, side - new_rows)
        free_column = 0
        for left in lefts:
            tiles.append(_Tile(row - context_rows, left, context_rows, new_rows, free_column))
            free_column = left + side
        row += new_rows
    return tiles
