"""Pictures as bytes: safe reading, tiles, and the raster and patch scans as a permutation and its inverse."""

import contextlib
import itertools
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps

from core.codecs.comments import png_info
from core.codecs.files import FileKind, ImpatientReader, TooManyReadsError, atomic_file, require_size
from core.config import ImageCodecConfig
from core.errors import UserError

MAX_PIXELS = 40_000_000
# Their decoders hold 19 and 12 bytes a pixel at once, others 7: so no picture takes more than 300 MB.
MAX_WEBP_PIXELS = 14_000_000
MAX_PROGRESSIVE_PIXELS = 22_000_000
MAX_SIDE = 16_384
MAX_FILE_BYTES = 256 * 2**20  # more than MAX_PIXELS of three 16-bit values
MAX_WEBP_BYTES = 64 * 2**20  # read into memory as a whole, before its size is known
_MAX_READS = 1_000_000
_STRIP_PIXELS = 2**17  # pictures are converted in strips, so that only two copies of one are ever in memory
_ORIENTATION_TAG = 0x0112
OFFER = "score its raw bytes with --bytes file"

Rule = Literal["tile", "grid", "fit"]


@dataclass(frozen=True, eq=False)
class Picture:
    """An RGB picture, upright unless a note says otherwise.

    Attributes:
        pixels: uint8 (H, W, 3).
        notes: what was done to the file to get here, for a person.
        known: bool (H, W), False where a file cut short holds no pixel; None where all are there.
    """

    pixels: np.ndarray
    notes: tuple[str, ...] = ()
    known: np.ndarray | None = None

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """Where the tiles of a stream lie in a picture."""

    height: int  # pixels
    width: int  # pixels
    corners: tuple[tuple[int, int], ...]  # top and left pixel of each tile, in stream order
    document_bytes: int  # bytes of one tile
    counted: np.ndarray  # bool (T,), False where an earlier tile holds the same sub-pixel
    notes: tuple[str, ...] = ()

    @property
    def num_documents(self) -> int:
        return len(self.corners)


class DamagedPictureError(UserError):
    """A picture file that is cut short or damaged; `read_partial` may still see a part of it."""


def read_picture(file: BinaryIO, name: str, kind: FileKind) -> Picture:
    """The first frame of an open picture file as upright 8-bit RGB.

    Raises:
        DamagedPictureError: if the file is cut short or damaged.
        UserError: if the picture is too large.
    """
    require_size(file, name, MAX_WEBP_BYTES if kind.name == "webp" else MAX_FILE_BYTES)
    with opened_image(file, name, kind) as image:
        return Picture(*load_rgb(image, is_turned=True))


@contextlib.contextmanager
def opened_image(file: BinaryIO, name: str, kind: FileKind) -> Iterator[Image.Image]:
    """A picture file opened by the decoder of its kind; only its size is looked at, and its pixels come with `load`.

    Raises:
        DamagedPictureError: if the decoder finds damage, here or inside the block.
        UserError: if the picture is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(ImpatientReader(file, _MAX_READS), formats=[kind.name.upper()]) as image:
                require_pixels(*image.size, name, _max_pixels(image))
                yield image
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(_too_large(name, "far too many", MAX_PIXELS)) from None
    except TooManyReadsError:
        raise DamagedPictureError(
            f"{name} is damaged, or packed so finely that reading it takes too long; save it as PNG, or {OFFER}"
        ) from None
    # Decoders answer damage with whatever exception they ran into (OSError, SyntaxError, struct.error, IndexError ...).
    except Exception:
        raise DamagedPictureError(f"{name} is cut short or damaged, so no picture can be read from it; {OFFER}") from None


def require_pixels(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Refuses a picture by the size that its header claims, before anything of that size is made.

    Raises:
        UserError: if it has more than `max_pixels` pixels or more than MAX_SIDE on a side.
    """
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise UserError(_too_large(name, f"{width}x{height}", max_pixels))


def _max_pixels(image: Image.Image) -> int:
    if image.format == "WEBP":
        return MAX_WEBP_PIXELS
    # MPO is what Pillow calls a JPEG that holds several pictures; it has read on by then, so the scans cannot be told.
    if image.format == "MPO" or (image.format == "JPEG" and not _has_one_scan(image)):
        return MAX_PROGRESSIVE_PIXELS
    return MAX_PIXELS


def _has_one_scan(image: Image.Image) -> bool:
    """Whether the first scan of an opened JPEG, which has just been read past, holds all of the picture."""
    num_bytes, file = 6 + 2 * image.layers, image.fp
    file.seek(-num_bytes, os.SEEK_CUR)
    header = file.read(num_bytes)
    return "progressive" not in image.info and header.startswith(struct.pack(">HB", num_bytes, image.layers))


class ImageCodec:
    """RGB bytes of square tiles, the three bytes of a pixel side by side."""

    modality = "image"
    unit_bytes = 3
    suffix = ".png"

    def __init__(self, config: ImageCodecConfig) -> None:
        self.config = config
        # order[t] is the place of the stream's byte t in a tile's (side, side, 3) bytes; places is its inverse.
        self._order = _scan_order(config)
        self._places = np.argsort(self._order)

    @property
    def document_bytes(self) -> int:
        return self._order.size

    def encode(self, media: Picture, rule: Rule = "tile") -> tuple[np.ndarray, ImageLayout]:
        """The picture's tiles one after another, each in scan order.

        Args:
            media: The picture.
            rule: "tile": all of it at its own size; the last row and column of tiles shift inward, and what they overlap is
                counted once. "grid": whole tiles only, the rest at the right and the bottom is left out. "fit": one tile,
                scaled until it is covered.

        Returns:
            The stream, uint8 (T,), and its layout.

        Raises:
            UserError: if the picture is smaller than a tile and is not to be fitted.
        """
        side = self.config.side
        media = _FRAMINGS[rule](media, side)
        corners = tuple(itertools.product(_tile_starts(media.height, side), _tile_starts(media.width, side)))
        stream = self._scan(np.stack([_tile(media.pixels, corner, side) for corner in corners]))
        counted = self._scan(_counted_tiles(media.pixels.shape, corners, side))
        return stream, ImageLayout(media.height, media.width, corners, self.document_bytes, counted, media.notes)

    def fit(self, picture: Picture) -> Picture:
        """The picture scaled until it covers one tile, and cropped to it; of a cut one, `known` is what is there in full."""
        return _fit(picture, self.config.side)

    def decode(self, stream: np.ndarray, layout: ImageLayout) -> Picture:
        return Picture(self.unscan(stream, layout), layout.notes)

    def unscan(self, values: np.ndarray, layout: ImageLayout) -> np.ndarray:
        """Values of a stream, (T, ...), in picture shape, (H, W, 3, ...); where tiles overlap, the counted ones."""
        side, rest = self.config.side, values.shape[1:]
        tiles = values.reshape(layout.num_documents, self.document_bytes, *rest)[:, self._places]
        tiles = tiles.reshape(layout.num_documents, side, side, 3, *rest)
        picture = np.empty((layout.height, layout.width, 3, *rest), values.dtype)
        for corner, tile in zip(reversed(layout.corners), reversed(tiles), strict=True):
            _tile(picture, corner, side)[...] = tile
        return picture

    def round_prefix(self, num_bytes: int) -> int:
        """The bytes of the whole rows, of blocks or of pixels, that `num_bytes` bytes complete."""
        num_bytes = min(max(num_bytes, 0), self.document_bytes)
        return num_bytes - num_bytes % (self.row_height * self.config.side * 3)

    def prefix_says(self, num_bytes: int) -> str:
        rows = self.round_prefix(num_bytes) // (self.config.side * 3)
        return f"top {rows} of {self.config.side} rows"

    def augmented(self, stream: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """One tile, mirrored left to right half of the time; part of a tile cannot be and stays."""
        if stream.size != self.document_bytes or generator.random() < 0.5:
            return stream
        side = self.config.side
        mirrored = stream[self._places].reshape(side, side, 3)[:, ::-1]
        return mirrored.reshape(-1)[self._order]

    def write(self, media: Picture, path: Path, comment: str | None = None) -> None:
        with atomic_file(path) as file:
            info = None if comment is None else png_info(comment)
            Image.fromarray(media.pixels).save(file, format="PNG", pnginfo=info)

    @property
    def row_height(self) -> int:
        """Rows of pixels that the scan passes together."""
        return self.config.scan_patch if self.config.scan == "patch" else 1

    def _scan(self, tiles: np.ndarray) -> np.ndarray:
        return tiles.reshape(len(tiles), -1)[:, self._order].reshape(-1)


def _scan_order(config: ImageCodecConfig) -> np.ndarray:
    places = np.arange(3 * config.side**2)
    if config.scan == "raster":
        return places
    blocks, patch = config.side // config.scan_patch, config.scan_patch
    return places.reshape(blocks, patch, blocks, patch, 3).swapaxes(1, 2).reshape(-1)


def _tile(pixels: np.ndarray, corner: tuple[int, int], side: int) -> np.ndarray:
    top, left = corner
    return pixels[top : top + side, left : left + side]


def _tile_starts(length: int, side: int) -> list[int]:
    return [*range(0, length - side, side), length - side]


def _counted_tiles(shape: tuple[int, ...], corners: tuple[tuple[int, int], ...], side: int) -> np.ndarray:
    """For each tile, (num_tiles, side, side, 3), whether it is the first to hold a sub-pixel."""
    first_tile = np.empty(shape, np.int32)
    for index, corner in reversed(list(enumerate(corners))):
        _tile(first_tile, corner, side)[...] = index
    return np.stack([_tile(first_tile, corner, side) == index for index, corner in enumerate(corners)])


def _keep_all(picture: Picture, side: int) -> Picture:
    if min(picture.height, picture.width) < side:
        raise UserError(
            f"the picture has {picture.width}x{picture.height} pixels, fewer than the model's {side}x{side}; "
            f"--adapt enlarges it for scoring, or {OFFER}"
        )
    return picture


def _crop_to_whole_tiles(picture: Picture, side: int) -> Picture:
    _keep_all(picture, side)
    height, width = (length - length % side for length in (picture.height, picture.width))
    return replace(picture, pixels=picture.pixels[:height, :width])


def _fit(picture: Picture, side: int) -> Picture:
    pixels, known = picture.pixels, picture.known
    if known is not None:
        whole_rows = np.flatnonzero(known.all(axis=1))
        if whole_rows.size:  # or the grey of rows that are not there would shine through into those that are
            pixels = pixels[np.clip(np.arange(picture.height), whole_rows[0], whole_rows[-1])]
        shares = ImageOps.fit(Image.fromarray(known.astype(np.float32)), (side, side), Image.Resampling.BOX)
        known = np.asarray(shares) > 0.999
    fitted = ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.LANCZOS)
    return replace(_reframed(picture, np.asarray(fitted)), known=known)


def _reframed(picture: Picture, pixels: np.ndarray) -> Picture:
    height, width, _ = pixels.shape
    if (height, width) == (picture.height, picture.width):
        return replace(picture, pixels=pixels)
    note = f"scaled and cropped from {picture.width}x{picture.height} to {width}x{height} pixels"
    return Picture(np.ascontiguousarray(pixels), (*picture.notes, note))


_FRAMINGS: dict[Rule, Callable[[Picture, int], Picture]] = {
    "tile": _keep_all,
    "grid": _crop_to_whole_tiles,
    "fit": _fit,
}


def load_rgb(image: Image.Image, is_turned: bool = False) -> tuple[np.ndarray, tuple[str, ...]]:
    """The first frame of an opened picture, uint8 (H, W, 3), and notes on how it came to be.

    `is_turned` puts it upright if its EXIF tag says that it is not.
    """
    width, height = image.size
    is_16_bit = image.mode.startswith("I") or ";16" in str(image.tile)
    # Exactly one load: Pillow may report damage on the first load of a file only, and the EXIF tag of a PNG loads it too.
    image.load()
    orientation = read_orientation(image) if is_turned else 1
    turned = np.empty((width, height, 3) if orientation in _SIDEWAYS else (height, width, 3), np.uint8)
    pixels = _TURNS_BACK[orientation](turned) if orientation in _TURNS_BACK else turned
    is_opaque = True
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        target = pixels[top : top + rows]
        if strip.mode.startswith("I"):
            # Pillow's own conversion of 16-bit grey cuts values off at 255.
            target[...] = np.rint(np.asarray(strip).astype(np.float32) / 257)[..., None]
        elif strip.has_transparency_data:
            rgba = strip.convert("RGBA")
            alpha, ground = rgba.getchannel("A"), Image.new("RGB", strip.size, "white")
            ground.paste(rgba.convert("RGB"), mask=alpha)
            target[...] = np.asarray(ground)
            is_opaque = is_opaque and alpha.getextrema()[0] == 255
        else:
            target[...] = np.asarray(strip.convert("RGB"))
    notes = {
        "alpha laid on white": not is_opaque,
        "16 bits per value scaled to 8": is_16_bit,
        "first frame of several": getattr(image, "is_animated", False),
        "turned upright by its EXIF tag": orientation in _TURNS_BACK,
    }
    return turned, tuple(note for note, is_so in notes.items() if is_so)


def read_orientation(image: Image.Image) -> int:
    """How the picture lies by its EXIF tag; 1 is upright."""
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    # Damaged EXIF data says nothing about the pixels, so the picture stays as it lies.
    except Exception:
        return 1


# A picture upright -> the same memory as it lies in the file, by the value of the EXIF tag.
_TURNS_BACK: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: np.rot90,
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, -1),
}
_SIDEWAYS = (5, 6, 7, 8)


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return (
        f"{name} has {size} pixels; pictures of at most {max_pixels:,} pixels and {MAX_SIDE:,} on a side are read, "
        "so make it smaller"
    )
