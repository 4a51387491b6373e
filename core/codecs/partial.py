"""Pictures from files that are cut short: as much as their bytes still say, and which pixels that is.

Such a file is mended, not decoded by other rules: what it lacks is filled up, and the decoder of whole files reads it. In PNG,
BMP and PPM no pixel before the cut depends on anything behind it, so each of those pixels is exactly that of the whole file.
A JPEG is mended twice, with different fillings: the rows that come out the same are those that the cut has not touched.
"""

import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from core.codecs.files import FileKind, require_size
from core.codecs.image import (
    OFFER,
    DamagedPictureError,
    Picture,
    load_rgb,
    opened_image,
    read_orientation,
    read_picture,
    require_pixels,
)
from core.errors import UserError

MAX_CUT_PIXELS = 16_000_000  # a mended file and its picture are in memory at once, of a JPEG two pictures
_MAX_JPEG_BYTES = 32 << 20  # it is in memory several times; more than those pixels need, and the rest would be comments
_PIECE_BYTES = 1 << 16
_HEAD_BYTES = 1 << 14  # before the pixels of a BMP or PPM
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PPM_HEADER = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,6})" + rb"\s")
_DOUBTED_BYTES = 16
_END_OF_JPEG = b"\xff\xd9"
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})  # without a length behind them
_UNKNOWN = 128  # middle grey, for pixels that are not there


class _NothingThereError(Exception):
    """The file ends before its first pixel, or its pixels do not come row by row; the text says which."""


def read_picture_part(file: BinaryIO, name: str, kind: FileKind) -> Picture:
    """A picture, or of a file cut short as much as is there: `known` says which pixels, and the others are grey.

    Raises:
        UserError: if not even a part can be seen, or the picture is too large.
    """
    try:
        return read_picture(file, name, kind)
    except DamagedPictureError:
        if kind.name not in _MENDERS:
            raise
    file.seek(0)
    try:
        return _MENDERS[kind.name](file, name, kind)
    except _NothingThereError as error:
        raise UserError(f"{name} is cut short or damaged, {error}; {OFFER}") from None
    # Header fields of a damaged file lie anywhere and say anything.
    except (struct.error, ValueError, IndexError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is cut short or damaged, so no part of the picture can be read from it; {OFFER}") from None


def _read_png(file: BinaryIO, name: str, kind: FileKind) -> Picture:
    chunks = _png_chunks(file)
    tag, header = next(chunks, (b"", b""))
    if tag != b"IHDR" or len(header) != 13:
        raise _NothingThereError("and ends before it says its size")
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", header)
    require_pixels(width, height, name, MAX_CUT_PIXELS)
    if depth not in (1, 2, 4, 8, 16):
        raise ValueError("there is no such depth")
    if interlace:
        raise _NothingThereError("and interlaced, so its rows are not there one after another")
    bits = depth * _PNG_CHANNELS.get(colour, 0)
    row_bytes = 1 + (width * bits + 7) // 8  # the first says how the row is filtered
    rows = _Rows(height * row_bytes)
    kept = []
    for tag, content in chunks:
        if tag == b"IDAT":
            rows.add(content)
        elif tag in (b"PLTE", b"tRNS"):
            kept.append(_png_chunk(tag, content))
    num_rows, rest = divmod(rows.num_bytes, row_bytes)
    num_known = num_rows * width + min(width, max(0, rest - 1) * 8 // max(1, bits))
    known = _first_known(num_known, width, height)
    mended = [_PNG_SIGNATURE, _png_chunk(b"IHDR", header), *kept, _png_chunk(b"IDAT", rows.finish()), _png_chunk(b"IEND", b"")]
    return _decoded(b"".join(mended), name, kind, known)


class _Rows:
    """The rows of a PNG, as far as they can be inflated, deflated again with rows of zeros behind them."""

    def __init__(self, num_wanted: int) -> None:
        self.num_bytes = 0
        self._num_wanted = num_wanted
        self._inflater = zlib.decompressobj()
        self._deflater = zlib.compressobj(level=1)
        self._deflated: list[bytes] = []

    def add(self, content: bytes) -> None:
        # In small pieces: what a damaged piece would have given is lost.
        for start in range(0, len(content), 64):
            piece = content[start : start + 64]
            while piece and self.num_bytes < self._num_wanted:
                try:
                    inflated = self._inflater.decompress(piece, min(_PIECE_BYTES, self._num_wanted - self.num_bytes))
                except zlib.error:
                    return
                self._deflated.append(self._deflater.compress(inflated))
                self.num_bytes += len(inflated)
                piece = self._inflater.unconsumed_tail

    def finish(self) -> bytes:
        for start in range(self.num_bytes, self._num_wanted, _PIECE_BYTES):
            self._deflated.append(self._deflater.compress(bytes(min(_PIECE_BYTES, self._num_wanted - start))))
        return b"".join((*self._deflated, self._deflater.flush()))


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG up to the first damaged one; the last may be cut short."""
    file.seek(len(_PNG_SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, tag = struct.unpack(">I4s", head)
        content = file.read(length)
        checksum = file.read(4)
        if len(checksum) == 4 and checksum != struct.pack(">I", zlib.crc32(tag + content)):
            return
        if len(checksum) < 4 and tag != b"IDAT" and len(content) < length:
            return
        yield tag, content


def _png_chunk(tag: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + tag + content + struct.pack(">I", zlib.crc32(tag + content))


def _read_bmp(file: BinaryIO, name: str, kind: FileKind) -> Picture:
    head = file.read(_HEAD_BYTES)
    start, header_bytes = struct.unpack_from("<I", head, 10)[0], struct.unpack_from("<I", head, 14)[0]
    if header_bytes == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", head, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", head, 18)
    require_pixels(abs(width), abs(height), name, MAX_CUT_PIXELS)
    if bits not in (1, 4, 8, 16, 24, 32):
        raise ValueError("there is no such depth")
    if compression not in (0, 3, 6):
        raise _NothingThereError("and packed in runs, so its rows cannot be counted")
    row_bytes = (width * bits + 31) // 32 * 4
    known = _known_of_rows(_size(file) - start, row_bytes, bits, width, abs(height))
    mended = _filled(file, start, row_bytes * abs(height))
    # The bottom row comes first, unless the height is negative.
    return _decoded(mended, name, kind, known[::-1] if height > 0 else known)


def _read_ppm(file: BinaryIO, name: str, kind: FileKind) -> Picture:
    header = _PPM_HEADER.match(file.read(_HEAD_BYTES))
    if header is None:
        raise _NothingThereError("and ends before it says its size")
    width, height, largest = map(int, header.groups()[1:])
    require_pixels(width, height, name, MAX_CUT_PIXELS)
    bits = (8 if largest < 256 else 16) * (3 if header[1] == b"6" else 1)
    row_bytes = width * bits // 8
    known = _known_of_rows(_size(file) - header.end(), row_bytes, bits, width, height)
    return _decoded(_filled(file, header.end(), row_bytes * height), name, kind, known)


def _read_jpeg(file: BinaryIO, name: str, kind: FileKind) -> Picture:
    require_size(file, name, _MAX_JPEG_BYTES)
    content = file.read()
    width, height, sampling, is_coarse = _jpeg_frame(content)
    require_pixels(width, height, name, MAX_CUT_PIXELS)
    content = content.removesuffix(b"\xff")
    noise = bytes(np.random.default_rng(0).integers(1, 255, _PIECE_BYTES, dtype=np.uint8))
    mended = content + _END_OF_JPEG
    if is_coarse:
        known = np.ones((height, width), bool)
        note = "a progressive JPEG, so the whole picture is there but coarse"
    else:
        known = np.zeros((height, width), bool)
        # Blocks are 8 rows high, or 16 where colour is stored at half the height and then smoothed over one row more.
        reach, smoothed = 8 * sampling, int(sampling > 1)
        # The last bytes give way to noise as well: the few bits before a cut can mean the same with any filling.
        noisy = content[:-_DOUBTED_BYTES].removesuffix(b"\xff") + noise + _END_OF_JPEG
        num_equal = _num_equal_rows(mended, noisy, name, kind)
        known[: max(0, (num_equal + smoothed) // reach * reach - smoothed)] = True
        if not known.any():
            raise _NothingThereError("and ends before its first pixel")
        note = "a JPEG, so the last rows that are there are as good as could be made out"
    return _decoded(mended, name, kind, known, note)


def _jpeg_frame(content: bytes) -> tuple[int, int, int, bool]:
    """Width, height, block rows a step of the scan, and whether one whole scan is there, which later ones only refine."""
    place, size, sampling = 2, None, 1
    while True:
        place = content.index(b"\xff", place)
        marker = content[place + 1]
        if marker == 0xFF or marker in _BARE_MARKERS:
            place += 1 if marker == 0xFF else 2
            continue
        if marker == 0xDA:
            break
        if marker in _FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", content, place + 5)
            size = width, height
            factors = content[place + 11 : place + 10 + 3 * content[place + 9] : 3]  # horizontal, then vertical in 4 bits each
            sampling = max(factor & 15 for factor in factors) or 1
        place += 2 + struct.unpack_from(">H", content, place + 2)[0]
    if size is None or 0 in size:
        raise _NothingThereError("and ends before it says its size")
    # Within a scan a marker byte is followed by zero or is a restart; anything else ends it.
    is_coarse = re.search(rb"\xff[^\x00\xd0-\xd7\xff]", content[place + 2 :]) is not None
    return *size, sampling, is_coarse


def _num_equal_rows(first: bytes, second: bytes, name: str, kind: FileKind) -> int:
    with opened_image(io.BytesIO(first), name, kind) as one, opened_image(io.BytesIO(second), name, kind) as other:
        one.load()
        other.load()
        width, height = one.size
        for top in range(0, height, 64):
            box = (0, top, width, min(top + 64, height))
            differs = (np.asarray(one.crop(box)) != np.asarray(other.crop(box))).reshape(box[3] - top, -1).any(axis=1)
            if differs.any():
                return top + int(differs.argmax())
        return height


_MENDERS = {"png": _read_png, "bmp": _read_bmp, "ppm": _read_ppm, "jpeg": _read_jpeg}


def _decoded(mended: bytes | bytearray, name: str, kind: FileKind, known: np.ndarray, note: str | None = None) -> Picture:
    with opened_image(io.BytesIO(mended), name, kind) as image:
        pixels, notes = load_rgb(image)
        if read_orientation(image) != 1:
            notes = (*notes, "left as it is stored, not turned by its EXIF tag")
    np.copyto(pixels, np.uint8(_UNKNOWN), where=~known[..., None])
    notes = (*notes, _says_how_far(known), *([note] if note else []))
    return Picture(pixels, notes, None if known.all() else known)


def _says_how_far(known: np.ndarray) -> str:
    if known.all():
        return "the file is cut short or damaged, but every row is there"
    height, _ = known.shape
    num_rows = int(known.all(axis=1).sum())
    where = "top" if known[0].any() else "bottom"
    rest = int(known.sum()) - num_rows * known.shape[1]
    begun = f" and {rest} pixels of the next" if rest else ""
    return f"the file is cut short: the {where} {num_rows} of {height} rows{begun} are there"


def _first_known(num_known: int, width: int, height: int) -> np.ndarray:
    if num_known <= 0:
        raise _NothingThereError("and ends before its first pixel")
    known = np.zeros((height, width), bool)
    known.reshape(-1)[:num_known] = True
    return known


def _known_of_rows(num_bytes: int, row_bytes: int, bits: int, width: int, height: int) -> np.ndarray:
    """The pixels that the first bytes of an unpacked picture hold."""
    num_rows, rest = divmod(max(0, num_bytes), row_bytes)
    return _first_known(num_rows * width + min(width, rest * 8 // bits), width, height)


def _size(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _filled(file: BinaryIO, start: int, num_pixel_bytes: int) -> bytearray:
    """The file as long as it should be, with zeros for what it lacks."""
    if start > _HEAD_BYTES:
        raise _NothingThereError("and its pixels begin at no sensible place")
    content = bytearray(start + num_pixel_bytes)
    file.seek(0)
    file.readinto(content)
    return content
