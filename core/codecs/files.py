"""Opening files that nobody vouches for, telling what they are by their first bytes, and writing files that are whole."""

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from core.errors import UserError, shown

HEAD_BYTES = 512  # enough for every signature below
MAX_RAW_BYTES = 64 * 2**20

LISTED_FORMATS = "PNG, WebP, JPEG, BMP, GIF, PPM, WAV, FLAC and Ogg"


@dataclass(frozen=True)
class FileKind:
    """What a file is by its content; `raw` stands for bytes without a known signature."""

    name: str
    modality: Literal["image", "audio", "text"]


RAW = FileKind("raw", "text")

# Letters alone would claim ordinary text, so many kinds are known by a header field behind or before them as well.
_LISTED = {
    rb"\x89PNG\r\n\x1a\n": FileKind("png", "image"),
    rb"RIFF.{4}WEBP": FileKind("webp", "image"),
    rb"\xff\xd8\xff": FileKind("jpeg", "image"),
    rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00": FileKind("bmp", "image"),
    rb"GIF8[79]a": FileKind("gif", "image"),
    rb"P[56]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s+\d+\s": FileKind("ppm", "image"),
    rb"RIF[FX].{4}WAVE": FileKind("wav", "audio"),
    rb"fLaC": FileKind("flac", "audio"),
    rb"OggS\x00": FileKind("ogg", "audio"),
}

_NOT_LISTED = {
    rb"%PDF-": "a PDF document",
    rb"%!PS|\xc5\xd0\xd3\xc6": "a PostScript document",
    rb"PK(\x03\x04|\x05\x06|\x07\x08)": "a ZIP archive",
    rb"\x1f\x8b\x08": "a gzip file",
    rb"\xfd7zXZ\x00": "an xz file",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "a bzip2 file",
    rb"\x28\xb5\x2f\xfd": "a Zstandard file",
    rb"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    rb"Rar!\x1a\x07": "a RAR archive",
    rb"II\*\x00|MM\x00\*|II\+\x00|MM\x00\+": "a TIFF picture",
    rb"[\x00-\x08].{3}ftyp(avi[fs]|heic|heix|hevc|mif1|msf1)": "an AVIF or HEIF picture",
    rb"[\x00-\x08].{3}(ftyp|moov|mdat)": "an MP4 or QuickTime file",
    rb"\x00\x00\x00\x0c(jP  |JXL )|\xff\x4f\xff\x51|\xff\x0a": "a JPEG 2000 or JPEG XL picture",
    rb"8BPS\x00[\x01\x02]": "a Photoshop picture",
    rb"icns[\x00-\x08]|BLP[12][\x00\x01]\x00\x00\x00|DDS \x7c\x00\x00\x00|qoif\x00|\x76\x2f\x31\x01|#\?RADIANCE\s|"
    rb"gimp xcf (file|v\d{3})\x00": "a picture of a kind that is not listed",
    rb"(P1\s+(#[^\n]*\n\s*)*\d+\s+\d+\s+[01\s]+\Z|P[23]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s+\d+\s+[\d\s]+\Z|"
    rb"P4\s*\n(#[^\n]*\n\s*)*\d+\s+\d+\s|P7\n(#[^\n]*\n)*(WIDTH|HEIGHT|DEPTH|MAXVAL|TUPLTYPE) |P7 332\n)": (
        "a PNM picture of a kind that is not listed"
    ),
    rb"ID3[\x02-\x04]|\xff[\xfb\xfa\xf3\xf2]": "an MP3 file",
    rb"\xff[\xf1\xf9]": "an AAC file",
    rb"FORM.{4}(AIFF|AIFC)": "an AIFF sound",
    rb"\.snd\x00\x00|dns\..{2}\x00\x00": "an AU sound",
    rb"caff\x00\x01|#!AMR(-WB)?\n|MThd\x00|wvpk.{4}[\x02-\x10]\x04|RF64.{4}WAVE|riff\x2e\x91": (
        "a sound of a kind that is not listed"
    ),
    rb"\x1a\x45\xdf\xa3": "a Matroska or WebM video",
    rb"RIFF.{4}AVI |FLV\x01|\x30\x26\xb2\x75\x8e\x66|\x00\x00\x01\xba": "a video",
}


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """An ordinary, non-empty file, open for reading.

    Raises:
        UserError: if it is anything else, or if reading it fails inside the block.
    """
    if "\0" in os.fsdecode(path):
        raise UserError(f"{shown(path)} is not a file name, it holds a zero byte")
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for somebody to write into it.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
            _require_content(file, path)
            yield file
    except OSError as error:
        raise UserError(_explain(path, error)) from None


def sniff(path: str | os.PathLike[str]) -> FileKind:
    """What the file is, by its content alone.

    Raises:
        UserError: if it cannot be opened, is empty, or is a known container that is not decoded here.
    """
    with open_regular(path) as file:
        return sniff_open(file, shown(path))


def sniff_open(file: BinaryIO, name: str) -> FileKind:
    """What an open file is; it is left at its beginning. `name` is what messages call it."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    for signature, kind in _LISTED.items():
        if re.match(signature, head, re.DOTALL):
            return kind
    for signature, what in _NOT_LISTED.items():
        if re.match(signature, head, re.DOTALL):
            raise UserError(
                f"{name} is {what}, which is not decoded here; {LISTED_FORMATS} files are, "
                "and --bytes file scores the bytes of any file as they are"
            )
    return RAW


def read_bytes(file: BinaryIO, name: str) -> bytearray:
    """All bytes of an open file, refused beyond MAX_RAW_BYTES."""
    require_size(file, name, MAX_RAW_BYTES)
    content = bytearray(os.fstat(file.fileno()).st_size)
    del content[file.readinto(content) :]
    return content


def require_size(file: BinaryIO, name: str, max_bytes: int) -> None:
    """Refuses a large file without reading it.

    Raises:
        UserError: if the file has more than `max_bytes` bytes.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes > max_bytes:
        raise UserError(f"{name} has {num_bytes:,} bytes, at most {max_bytes:,} are read; cut it into parts")


class TooManyReadsError(OSError):
    """An `ImpatientReader` was read too often."""


class ImpatientReader:
    """An open file that raises TooManyReadsError after too many reads.

    Parsers that lost their way in a damaged file look for the next marker byte by byte, and some decoders read each pixel or
    run by itself: minutes in a large file.
    """

    def __init__(self, file: BinaryIO, max_reads: int) -> None:
        self.seek = file.seek
        self.tell = file.tell
        self._file = file
        self._reads_left = max_reads

    def read(self, size: int = -1) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise TooManyReadsError
        return self._file.read(size)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to fill; it takes the name `path` only if the block ends without an error.

    Raises:
        UserError: if the disk is full or does not take the file.
    """
    # A short name of its own: one made from `path` could be too long for the file system.
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{shown(path)} could not be written ({error.strerror or error}); choose another folder") from None
    finally:
        partial.unlink(missing_ok=True)


def _require_content(file: BinaryIO, path: str | os.PathLike[str]) -> None:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{shown(path)} is a device or a pipe, not an ordinary file; copy its content into a file first")
    if status.st_size == 0:
        raise UserError(f"{shown(path)} is empty; give a file with at least one byte")


def _explain(path: str | os.PathLike[str], error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        return f"{shown(path)} is a folder; give the files in it"
    if isinstance(error, FileNotFoundError):
        problem = "is a link to a file that is gone" if os.path.islink(path) else "does not exist"
        return f"{shown(path)} {problem}; check the name"
    if isinstance(error, PermissionError):
        return f"{shown(path)} may not be read; change its permissions or choose another file"
    return f"{shown(path)} could not be read ({error.strerror or error}); check the file and its disk"
