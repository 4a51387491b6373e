"""A text of ours inside a result file: a tEXt chunk of a PNG, or a comment in the INFO list of a WAV file.

Decoders of pictures and sounds pass over both, so the file stays what it is.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

from PIL.PngImagePlugin import PngInfo

from core.codecs.files import open_regular, sniff_open
from core.errors import shown

MAX_COMMENT_BYTES = 4 * 2**20
_KEYWORD = "megabyte"
_MAX_CHUNKS = 1000


def png_info(comment: str) -> PngInfo:
    """The chunk to write into a PNG; `comment` is ASCII."""
    info = PngInfo()
    info.add_text(_KEYWORD, comment)
    return info


def info_list(comment: str) -> bytes:
    """The chunk to put behind the samples of a WAV file; `comment` is ASCII."""
    text = comment.encode("ascii") + b"\0"
    text += bytes(len(text) % 2)  # chunks begin at even places
    items = b"INFO" + _riff_chunk(b"ISFT", _KEYWORD.encode() + b"\0\0") + _riff_chunk(b"ICMT", text)
    return _riff_chunk(b"LIST", items)


def read_comment(path: str | os.PathLike[str]) -> str | None:
    """The text that `write` of a codec has put into a PNG or WAV file; None if the file has none.

    Raises:
        UserError: if the file cannot be opened.
    """
    with open_regular(Path(path)) as file:
        kind = sniff_open(file, shown(path)).name
        content = {"png": _png_comment, "wav": _wav_comment}[kind](file) if kind in ("png", "wav") else None
    return None if content is None else content.decode("ascii", "replace")


def _png_comment(file: BinaryIO) -> bytes | None:
    prefix = _KEYWORD.encode() + b"\0"
    file.seek(8)
    for _ in range(_MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            return None
        length, tag = struct.unpack(">I4s", head)
        if tag == b"IDAT":
            return None
        if tag == b"tEXt" and length <= MAX_COMMENT_BYTES:
            content = file.read(length)
            if content.startswith(prefix):
                return content.removeprefix(prefix)
            length = 0
        file.seek(length + 4, os.SEEK_CUR)
    return None


def _wav_comment(file: BinaryIO) -> bytes | None:
    file.seek(12)
    for _ in range(_MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            return None
        tag, length = struct.unpack("<4sI", head)
        if tag == b"LIST" and length <= MAX_COMMENT_BYTES:
            return _comment_of_list(file.read(length))
        file.seek(length + length % 2, os.SEEK_CUR)
    return None


def _comment_of_list(items: bytes) -> bytes | None:
    place, found = 4, {}
    while place + 8 <= len(items):
        tag, length = struct.unpack_from("<4sI", items, place)
        found[tag] = items[place + 8 : place + 8 + length].rstrip(b"\0")
        place += 8 + length + length % 2
    return found.get(b"ICMT") if found.get(b"ISFT") == _KEYWORD.encode() else None


def _riff_chunk(tag: bytes, content: bytes) -> bytes:
    return tag + struct.pack("<I", len(content)) + content
