"""Files with a few bytes changed at random, the same ones for the same number, and what may come of them.

`python tests/mutations.py LOADER FIRST COUNT` opens as many of them as there is time for.
"""

import re
import struct
import sys
import time
import zlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from odd_files import ROOT, odd_files, with_ogg_sums

LOADERS = ("png", "jpg", "gif", "webp", "bmp", "ppm", "wav", "flac", "ogg")
MAX_SECONDS = 5.0
_MAX_SEED_BYTES = 6000
_EDGES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)
_WORDS = (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@cache
def seeds(loader: str) -> list[bytes]:
    """The small files of the collection that are of this kind, damaged ones too."""
    files = odd_files()
    found = [file.content for name, file in files.items() if name.endswith(f".{loader}") and not re.search("bomb|mostly", name)]
    return [content for content in found if 0 < len(content) < _MAX_SEED_BYTES]


def mutated(loader: str, number: int) -> bytes:
    """One of the loader's files, with one to four changes."""
    generator = np.random.default_rng((LOADERS.index(loader), number))
    content = bytearray(seeds(loader)[generator.integers(len(seeds(loader)))])
    for _ in range(generator.integers(1, 5)):
        # Headers are short and decide most, so half of the changes are among the first bytes.
        place = int(generator.integers(min(len(content), 64) if generator.random() < 0.5 else len(content)) if content else 0)
        length = int(generator.integers(1, 33))
        match generator.integers(7):
            case 0:
                content[place : place + 1] = bytes(value ^ 1 << generator.integers(8) for value in content[place : place + 1])
            case 1:
                content[place : place + 1] = bytes([_EDGES[generator.integers(len(_EDGES))]])
            case 2:
                order = "<" if generator.random() < 0.5 else ">"
                content[place : place + 4] = struct.pack(f"{order}I", _WORDS[generator.integers(len(_WORDS))])
            case 3:
                content[place : place + length] = generator.bytes(length)
            case 4:
                del content[place : place + length]
            case 5:
                content[place:place] = content[place : place + length] or b"\0"
            case 6:
                del content[max(place, 16) :]
    # A wrong checksum hides every other change from the decoder.
    mend = {"png": _with_png_sums, "ogg": with_ogg_sums}.get(loader)
    return mend(bytes(content)) if mend and generator.random() < 0.7 else bytes(content)


def _with_png_sums(content: bytes) -> bytes:
    mended, place = bytearray(content), 8
    while place + 12 <= len(content):
        end = place + 8 + struct.unpack_from(">I", content, place)[0]
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(content[place + 4 : end]))[: max(0, len(content) - end)]
        place = end + 4
    return bytes(mended)


def open_mutated(loader: str, numbers: range, folder: Path) -> dict[str, int]:
    """How many of the files each reader could open; what must not happen is an `AssertionError` with the file's number."""
    from core.codecs import read_comment, read_media, read_partial
    from core.errors import UserError

    path = folder / "mutated"
    readers = [read_media]
    if loader in ("png", "wav"):
        readers.append(read_comment)
    if loader in ("png", "jpg", "bmp", "ppm"):
        readers.append(read_partial)
    num_opened = {reader.__name__: 0 for reader in readers}
    for number in numbers:
        path.write_bytes(mutated(loader, number))
        for reader in readers:
            started, which, said = time.monotonic(), (loader, number, reader.__name__), f"{path} is"
            try:
                reader(path)
                num_opened[reader.__name__] += 1
            except UserError as error:
                said = str(error)
            except Exception as error:
                raise AssertionError((*which, repr(error))) from error
            assert said.startswith(str(path)), which
            assert said.isprintable(), which
            assert time.monotonic() - started < MAX_SECONDS, which
    return num_opened


def main(loader: str, first: str, count: str) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    from core.limits import PeakMemory

    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        num_opened = open_mutated(loader, range(int(first), int(first) + int(count)), Path(folder))
    seconds, peak = time.monotonic() - started, memory.read()[1] / 1e6
    print(f"{loader}: {count} files from number {first} on, opened: {num_opened}, {seconds:.0f} s, {peak:.0f} MB more at most")


if __name__ == "__main__":
    main(*sys.argv[1:])
