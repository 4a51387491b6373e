"""Files cut short: exactly what their bytes say, at every length, and never an error that is not a sentence."""

import io
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.codecs import Picture, read_media, read_partial
from core.errors import UserError

WIDTH, HEIGHT = 11, 9
RNG_PIXELS = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
# Smooth ones, so that the encoder uses each of the row filters.
SMOOTH = np.stack([np.add.outer(7 * np.arange(HEIGHT), (3 + c) * np.arange(WIDTH)) for c in range(4)], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, suffix: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def rgb16_png() -> bytes:
    """Pillow writes no 16-bit RGB, so this one is put together here, with each of the row filters in turn."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    rows = b"".join(bytes([y % 5]) + np.random.default_rng(y).bytes(6 * WIDTH) for y in range(HEIGHT))
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + tag + content + struct.pack(">I", zlib.crc32(tag + content)) for tag, content in chunks
    )


IMAGES = {
    "noise": Image.fromarray(RNG_PIXELS[..., :3]),
    "smooth": Image.fromarray(SMOOTH[..., :3]),
    "alpha": Image.fromarray(RNG_PIXELS),
    "grey": Image.fromarray(SMOOTH[..., 0]),
    "grey alpha": Image.fromarray(RNG_PIXELS).convert("LA"),
    "palette": Image.fromarray(RNG_PIXELS[..., :3]).quantize(16),
    "bits": Image.fromarray(RNG_PIXELS[..., 0]).convert("1"),
    "16 bits": Image.fromarray(SMOOTH[..., 0].astype(np.uint16) * 257),
}
EXACT = {
    **{f"png {name}": encoded(image, "PNG") for name, image in IMAGES.items()},
    "png transparent colour": encoded(IMAGES["palette"], "PNG", transparency=3),
    "png 16-bit rgb": rgb16_png(),
    **{f"bmp {name}": encoded(IMAGES[name], "BMP") for name in ("noise", "alpha", "grey", "palette", "bits")},
    **{f"ppm {name}": encoded(IMAGES[name], "PPM") for name in ("noise", "grey")},
    "bmp top row first": b"",  # made below
}
BMP = EXACT["bmp noise"]
_ROW = (WIDTH * 24 + 31) // 32 * 4
EXACT["bmp top row first"] = (
    BMP[:22] + struct.pack("<i", -HEIGHT) + BMP[26:54] + b"".join(BMP[54 + y * _ROW :][:_ROW] for y in reversed(range(HEIGHT)))
)


def read_part(tmp_path: Path, content: bytes) -> Picture | None:
    """What there is to be seen, None if the file was refused in a sentence; files too short to be known are text."""
    path = tmp_path / "cut"
    path.write_bytes(content)
    try:
        media = read_partial(path)
    except UserError:
        return None
    return media if isinstance(media, Picture) else None


@pytest.mark.parametrize("name", EXACT)
def test_every_known_pixel_is_that_of_the_whole_file_at_every_length(tmp_path, name):
    content = EXACT[name]
    whole = read_part(tmp_path, content)
    assert whole.known is None
    counts = []
    for num_bytes in range(1, len(content)):
        part = read_part(tmp_path, content[:num_bytes])
        if part is None:
            assert not counts, "a longer part shows less"
            continue
        known = np.ones((HEIGHT, WIDTH), bool) if part.known is None else part.known
        assert (part.pixels[known] == whole.pixels[known]).all()
        assert (part.pixels[~known] == 128).all()
        in_file_order = known[::-1] if name.startswith("bmp") and "top" not in name else known
        assert (np.diff(in_file_order.ravel().astype(int)) <= 0).all(), "known pixels lie together at the file's beginning"
        counts.append(int(known.sum()))
    assert counts == sorted(counts)
    assert counts[0] <= WIDTH
    assert counts[-1] >= WIDTH * HEIGHT - 1


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"quality": 95, "restart_marker_rows": 1}])
def test_rows_of_a_cut_jpeg_are_those_of_the_whole_file(tmp_path, options):
    smooth = np.add.outer(np.arange(70), np.arange(50))
    pixels = (smooth[..., None] * (1, 2, 3) + np.random.default_rng(0).integers(0, 60, (70, 50, 3))).astype(np.uint8)
    content = encoded(Image.fromarray(pixels), "JPEG", **options)
    whole = read_part(tmp_path, content)
    counts = []
    for num_bytes in range(20, len(content) - 2, 11):
        part = read_part(tmp_path, content[:num_bytes])
        if part is None:
            continue
        known = np.ones((70, 50), bool) if part.known is None else part.known
        assert (part.pixels[known] == whole.pixels[known]).all()
        counts.append(int(known.all(axis=1).sum()))
        assert any("as good as could be made out" in note for note in part.notes)
    assert counts == sorted(counts)
    assert counts[0] <= 16
    assert counts[-1] >= 63


def test_a_cut_progressive_jpeg_is_said_to_be_coarse(tmp_path):
    content = encoded(Image.fromarray(np.tile(SMOOTH[..., :3], (9, 9, 1))), "JPEG", progressive=True)
    part = read_part(tmp_path, content[: len(content) * 3 // 4])
    assert part.known is None
    assert any("coarse" in note for note in part.notes)


def test_a_cut_jpeg_that_is_mostly_comments_costs_no_memory(tmp_path):
    content = encoded(IMAGES["noise"], "JPEG")
    path = tmp_path / "long.jpg"
    path.write_bytes(content[: len(content) // 2])
    os.truncate(path, (32 << 20) + 1)
    tracemalloc.start()
    with pytest.raises(UserError, match="at most 33,554,432 are read"):
        read_partial(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_how_far_the_file_reaches_is_said(tmp_path):
    assert read_part(tmp_path, BMP[: 54 + 4 * _ROW + 6]).notes[-1] == (
        f"the file is cut short: the bottom 4 of {HEIGHT} rows and 2 pixels of the next are there"
    )
    content = EXACT["ppm noise"]
    assert read_part(tmp_path, content[: len(content) - 3 * WIDTH]).notes[-1] == (
        f"the file is cut short: the top {HEIGHT - 1} of {HEIGHT} rows are there"
    )


def test_a_cut_picture_can_be_opened_but_not_read_as_a_whole(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(EXACT["png noise"][:200])
    assert read_partial(path).known.any()
    with pytest.raises(UserError, match="--bytes file"):
        read_media(path)


def test_an_interlaced_png_is_refused_with_the_reason(tmp_path):
    content = bytearray(EXACT["png noise"][:200])
    content[28] = 1
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "cut.png").write_bytes(content)
    with pytest.raises(UserError, match=r"interlaced.*--bytes file"):
        read_partial(tmp_path / "cut.png")


def test_of_a_damaged_png_the_rows_before_the_damage_are_there(tmp_path):
    whole = read_part(tmp_path, EXACT["png noise"])
    pieces = EXACT["png noise"].split(b"IDAT")
    rows = pieces[1][: struct.unpack(">I", pieces[0][-4:])[0]]
    chunks = [rows[:150], rows[150:300], rows[300:]]
    content = pieces[0][:-4]
    for i, chunk in enumerate(chunks):
        checksum = zlib.crc32(b"IDAT" + chunk)
        chunk = bytes(len(chunk)) if i == 1 else chunk
        content += struct.pack(">I", len(chunk)) + b"IDAT" + chunk + struct.pack(">I", checksum)
    part = read_part(tmp_path, content)
    assert 0 < part.known.sum() <= 50
    assert (part.pixels[part.known] == whole.pixels[part.known]).all()


@pytest.mark.parametrize("name", ["png noise", "png palette", "bmp grey", "bmp noise", "ppm noise", "jpeg", "progressive"])
def test_changed_bytes_end_in_a_picture_or_a_sentence(tmp_path, name):
    jpeg = encoded(IMAGES["noise"].resize((40, 40)), "JPEG", progressive=name == "progressive")
    content = EXACT.get(name, jpeg)
    chance = random.Random(5)
    for _ in range(150):
        changed = bytearray(content[: chance.randrange(20, len(content))])
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        part = read_part(tmp_path, bytes(changed))
        assert part is None or part.pixels.shape[2] == 3


@pytest.mark.parametrize("name", ["png noise", "bmp noise", "ppm noise"])
def test_a_header_that_claims_too_much_costs_no_memory(tmp_path, name):
    content = EXACT[name][:-20]
    if name.startswith("png"):
        changed = bytearray(content)
        changed[16:24] = struct.pack(">II", 15_000, 15_000)
        changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4, "big")
    elif name.startswith("bmp"):
        changed = content[:18] + struct.pack("<ii", 15_000, 15_000) + content[26:]
    else:
        changed = content.replace(b"11 9", b"15000 15000")
    (tmp_path / "bomb").write_bytes(changed)
    tracemalloc.start()
    with pytest.raises(UserError, match="40,000,000 pixels"):
        read_partial(tmp_path / "bomb")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
