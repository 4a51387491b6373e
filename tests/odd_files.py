"""A collection of odd pictures, sounds and texts, each made here with what is to become of it; and files that only claim to be.

`python tests/odd_files.py PATH...` opens files in a process of its own, damaged ones once more as far as they
reach, and prints what became of each, with its time and memory.
"""

import contextlib
import io
import json
import os
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

ROOT = Path(__file__).parents[1]
RATE = 8000
UNWANTED_EVENTS = (
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "pty.",
    "socket.",
    "os.remove",
    "os.rename",
)
ENOUGH = 1 << 16  # a header may claim more; a decoder may try


@dataclass(frozen=True)
class OddFile:
    """A file, and what it must turn into: pixels, samples or bytes; or the words of its refusal."""

    content: bytes
    expected: np.ndarray | bytes | str
    tolerance: int = 1  # steps of 255, or of 65,536 for a sound
    notes: str = ""  # words that must be among the notes


def pixels(height: int = 8, width: int = 8) -> np.ndarray:
    """A colourful picture, smooth enough for lossy formats."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([20 * rows, 20 * columns, 10 * (rows + columns)], axis=-1).clip(0, 255).astype(np.uint8)


def samples(num_samples: int = 400, num_channels: int = 1) -> np.ndarray:
    tones = np.outer(np.arange(num_samples), 0.05 + 0.02 * np.arange(num_channels))
    return np.rint(8000 * np.sin(tones)).astype(np.int16).squeeze()


def picture(image: Image.Image | np.ndarray, format_name: str = "PNG", **options) -> bytes:
    target = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(target, format_name, **options)
    return target.getvalue()


def sound(data: np.ndarray, rate: int = RATE, **options) -> bytes:
    target = io.BytesIO()
    soundfile.write(target, data, rate, **{"format": "WAV"} | options)
    content = target.getvalue()
    # What depends on the time: a chunk of peaks has a date, an Ogg stream a random number.
    if (place := content.find(b"PEAK")) >= 0:
        content = content[: place + 12] + bytes(4) + content[place + 16 :]
    return with_ogg_sums(content, b"ours") if content.startswith(b"OggS") else content


@cache
def _ogg_table() -> list[int]:
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


def with_ogg_sums(content: bytes, serial: bytes | None = None) -> bytes:
    """Ogg pages with the checksums of what they hold, and perhaps another serial number."""
    pages, table = content.split(b"OggS"), _ogg_table()
    for number, page in enumerate(pages[1:], 1):
        if len(page) < 23:
            continue
        page = b"OggS" + page[:10] + (serial or page[10:14]) + page[14:18] + bytes(4) + page[22:]
        total = 0
        for value in page:
            total = (total << 8 & 0xFFFFFFFF) ^ table[total >> 24 ^ value]
        pages[number] = page[4:22] + struct.pack("<I", total) + page[26:]
    return b"OggS".join(pages)


def png_chunk(tag: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + tag + content + struct.pack(">I", zlib.crc32(tag + content))


def png(rows: bytes, width: int, height: int, depth: int, colour: int, *chunks: bytes, interlace: int = 0) -> bytes:
    """A PNG of any depth; `rows` are filtered already, each with its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    parts = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a value, (H, W, channels)."""
    height, width, num_channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(rows, width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[num_channels])


def adam7(values: np.ndarray) -> bytes:
    """An interlaced PNG of an 8x8 RGB picture."""
    steps = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = [values[top::down, left::right] for top, left, down, right in steps]
    return png(b"".join(b"\0" + row.tobytes() for each in passes for row in each), 8, 8, 8, 2, interlace=1)


def bmp(body: bytes, bits: int, compression: int = 0, height: int = 8, extra: bytes = b"", width: int = 8) -> bytes:
    start = 54 + len(extra)
    size = 40 + (12 if compression == 3 else 0)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, 0, 0)
    assert size <= 40 + len(extra)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + extra + body


def wav(data: bytes, *, code: int = 1, channels: int = 1, rate: int = RATE, bits: int = 16, claimed: int | None = None) -> bytes:
    block = channels * bits // 8 & 0xFFFF
    form = struct.pack("<HHIIHH", code, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    size = len(data) if claimed is None else claimed
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(body) & 0xFFFFFFFF) + body


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.rint(255 + (colour.astype(float) - 255) * alpha[..., None] / 255).astype(np.uint8)


@cache
def pictures() -> dict[str, OddFile]:
    """Pictures of odd kinds that are read, with the pixels they must have."""
    rgb = pixels()
    grey, alpha = rgb[..., 0], 255 - rgb[..., 1]
    as_grey = np.repeat(grey[..., None], 3, axis=2)
    deep_alpha = alpha.astype(np.uint16) * 257
    deep = rgb.astype(np.uint16) * 257 + 100  # not a multiple: rounding counts
    palette = Image.fromarray(rgb).quantize(16)
    from_palette = np.asarray(palette.convert("RGB"))
    clear = palette.copy()
    clear_pixels = np.where(np.asarray(palette)[..., None] == 3, 255, from_palette).astype(np.uint8)
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    first = np.full((8, 8, 3), 10, np.uint8)
    smooth = pixels(16, 16)
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    bits = (grey > 60).astype(np.uint8)
    black_and_white = np.repeat(255 * bits[..., None], 3, axis=2)
    packed = np.packbits(bits, axis=1)
    bottom_up = rgb[::-1, :, ::-1]
    five_six_five = ((rgb[..., 0] >> 3).astype("<u2") << 11) | ((rgb[..., 1] >> 2).astype("<u2") << 5) | (rgb[..., 2] >> 3)
    runs = b"".join(bytes((8, row)) + b"\0\0" for row in range(8)) + b"\0\1"
    greys = b"".join(bytes((10 * value, 10 * value, 10 * value, 0)) for value in range(8)) + bytes(4 * 248)
    from_runs = np.repeat(np.repeat(np.arange(70, -1, -10, dtype=np.uint8)[:, None], 8, axis=1)[..., None], 3, axis=2)
    lossless = {"lossless": True, "exact": True}
    return {
        "grey-16.png": OddFile(png16(deep[..., :1]), as_grey, notes="16 bits"),
        "rgb-16.png": OddFile(png16(deep), rgb, notes="16 bits"),
        "rgba-16.png": OddFile(png16(np.dstack([deep, deep_alpha])), on_white(rgb, alpha), 2, "alpha"),
        "grey-alpha-16.png": OddFile(png16(np.dstack([deep[..., 0], deep_alpha])), on_white(as_grey, alpha), 2, "alpha"),
        "one-bit.png": OddFile(picture(Image.fromarray(255 * bits).convert("1")), black_and_white),
        "two-bit-grey.png": OddFile(png((b"\0" + b"\x1b\xe4") * 8, 8, 8, 2, 0),
                                    np.tile(np.array([0, 85, 170, 255, 255, 170, 85, 0], np.uint8)[None, :, None], (8, 1, 3))),
        "palette.png": OddFile(picture(palette), from_palette),
        "palette-clear.png": OddFile(picture(clear, transparency=3), clear_pixels, notes="alpha"),
        "grey-alpha.png": OddFile(picture(np.dstack([grey, alpha])), on_white(as_grey, alpha), notes="alpha"),
        "rgba.png": OddFile(picture(np.dstack([rgb, alpha])), on_white(rgb, alpha), notes="alpha"),
        "animated.png": OddFile(picture(frames[0], save_all=True, append_images=frames[1:]), first, notes="first frame"),
        "interlaced.png": OddFile(adam7(rgb), rgb),
        "exif.png": OddFile(picture(np.rot90(rgb), exif=exif(6)), rgb, notes="EXIF"),
        "colour-profile.png": OddFile(picture(rgb, icc_profile=b"no profile"), rgb),
        "comment-bomb.png": OddFile(
            png(b"".join(b"\0" + row.tobytes() for row in rgb), 8, 8, 8, 2,
                png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(32 << 20), 1))), "damaged"),
        "text-name.txt": OddFile(picture(rgb), rgb),
        "sound-name.wav": OddFile(picture(rgb), rgb),
        "one-pixel.png": OddFile(picture(rgb[:1, :1]), rgb[:1, :1]),
        "long-row.png": OddFile(picture(np.zeros((1, 16384, 3), np.uint8)), np.zeros((1, 16384, 3), np.uint8)),
        "exif.jpg": OddFile(picture(np.rot90(smooth), "JPEG", quality=95, subsampling=0, exif=exif(6)), smooth, 8, "EXIF"),
        "mirrored.jpg": OddFile(picture(smooth[:, ::-1], "JPEG", quality=95, subsampling=0, exif=exif(2)), smooth, 8, "EXIF"),
        "wrong-exif.jpg": OddFile(picture(smooth, "JPEG", quality=95, subsampling=0, exif=exif(99)), smooth, 8),
        "grey.jpg": OddFile(picture(smooth[..., 0], "JPEG", quality=95), np.repeat(smooth[..., :1], 3, axis=2), 8),
        "cmyk.jpg": OddFile(picture(cmyk, "JPEG", quality=95), np.tile(np.array([0, 255, 255], np.uint8), (16, 16, 1)), 8),
        "progressive.jpg": OddFile(picture(smooth, "JPEG", quality=95, subsampling=0, progressive=True), smooth, 8),
        "surplus.jpg": OddFile(picture(smooth, "JPEG", quality=95, subsampling=0) + bytes(1000), smooth, 8),
        "animated.gif": OddFile(picture(frames[0], "GIF", save_all=True, append_images=frames[1:]), first, 1, "first frame"),
        "clear.gif": OddFile(picture(clear, "GIF", transparency=3), clear_pixels, notes="alpha"),
        "alpha.webp": OddFile(picture(np.dstack([rgb, alpha]), "WEBP", **lossless), on_white(rgb, alpha), notes="alpha"),
        "animated.webp": OddFile(
            picture(frames[0], "WEBP", save_all=True, append_images=frames[1:], **lossless), first, notes="first frame"),
        "one-bit.bmp": OddFile(
            bmp(b"".join(bytes((row,)) + bytes(3) for row in packed[::-1, 0]), 1, extra=b"\0\0\0\0\xff\xff\xff\0"),
            black_and_white),
        "top-down.bmp": OddFile(bmp(rgb[..., ::-1].tobytes(), 24, height=-8), rgb),
        "32-bit.bmp": OddFile(bmp(np.dstack([bottom_up, bottom_up[..., 0]]).tobytes(), 32), rgb),
        "565.bmp": OddFile(
            bmp(five_six_five[::-1].tobytes(), 16, 3, extra=struct.pack("<III", 0xF800, 0x07E0, 0x001F)), rgb, 8),
        "runs.bmp": OddFile(bmp(runs, 8, 1, extra=greys), from_runs),
        "comment.ppm": OddFile(b"P6\n# made by hand\n8 8\n255\n" + rgb.tobytes(), rgb),
        "16-bit.ppm": OddFile(b"P6 8 8 65535\n" + deep.astype(">u2").tobytes(), rgb),
        "hundred-greys.ppm": OddFile(b"P5 8 8 100\n" + np.full((8, 8), 50, np.uint8).tobytes(),
                                     np.full((8, 8, 3), 128, np.uint8)),
    }  # fmt: skip


@cache
def damaged_pictures() -> dict[str, OddFile]:
    """Picture files that only claim to be, with the words of their refusal."""
    rgb = pixels(32, 32)
    whole, jpeg = picture(rgb), picture(rgb, "JPEG")
    gif, webp, plain = picture(rgb, "GIF"), picture(rgb, "WEBP"), picture(rgb, "BMP")
    place = whole.index(b"IDAT")
    bad_sum = bytearray(whole)
    bad_sum[place + 6] ^= 1
    rows = zlib.compress(bytes(1 << 20))

    def claiming(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
        return png(bytes(ENOUGH), width, height, depth, colour)

    frame = bytearray(jpeg)
    start = frame.index(b"\xff\xc0")
    frame[start + 5 : start + 9] = struct.pack(">HH", 65500, 65500)
    large_gif = bytearray(gif)
    large_gif[6:10] = struct.pack("<HH", 65535, 65535)
    large_frame = bytearray(gif)
    first_frame = large_frame.index(b",", 13 + 3 * 2 ** ((large_frame[10] & 7) + 1))
    large_frame[first_frame + 5 : first_frame + 9] = struct.pack("<HH", 65535, 65535)
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + 2 * (16382).to_bytes(3, "little")
    canvas += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return {
        "only-a-signature.png": OddFile(whole[:8], "damaged"),
        "cut-header.png": OddFile(whole[:20], "damaged"),
        "cut.png": OddFile(whole[: len(whole) // 2], "cut short or damaged"),
        "no-end.png": OddFile(whole[:-30], "damaged"),
        "wrong-sum.png": OddFile(bytes(bad_sum), "damaged"),
        "no-width.png": OddFile(claiming(0, 8), "damaged"),
        "impossible-depth.png": OddFile(claiming(8, 8, 7), "damaged"),
        "no-data.png": OddFile(png(b"", 8, 8, 8, 2), "damaged"),
        "not-deflated.png": OddFile(whole[:place] + b"IDAT" + bytes(len(whole) - place - 4), "damaged"),
        "bomb-16384.png": OddFile(claiming(16384, 16384), "pixels"),
        "bomb-2-to-31.png": OddFile(claiming(2**31 - 1, 2**31 - 1), "pixels"),
        "too-long.png": OddFile(claiming(16385, 1), "16385x1 pixels"),
        "profile-bomb.png": OddFile(
            png(b"", 8, 8, 8, 2, png_chunk(b"iCCP", b"a\0\0" + rows + zlib.compress(bytes(32 << 20), 1))), "damaged"),
        "depth-bomb.png": OddFile(claiming(5000, 3000, 255, 6), "damaged"),
        "depth-bomb.bmp": OddFile(bmp(bytes(64), 8192, width=5000, height=3000), "damaged"),
        "mostly-missing.png": OddFile(claiming(5000, 3000, 16, 6), "damaged"),
        "mostly-missing.bmp": OddFile(bmp(bytes(64), 32, width=5000, height=3000), "damaged"),
        "mostly-missing.ppm": OddFile(b"P6 5000 3000 255\n" + bytes(100), "damaged"),
        "only-a-start.jpg": OddFile(b"\xff\xd8\xff\xe0", "damaged"),
        "cut.jpg": OddFile(jpeg[: len(jpeg) // 2], "cut short or damaged"),
        "bomb.jpg": OddFile(bytes(frame), "pixels"),
        "cut.gif": OddFile(gif[: len(gif) // 3], "damaged"),
        "no-frames.gif": OddFile(b"GIF89a\x08\0\x08\0\0\0\0;", "damaged"),
        "bomb.gif": OddFile(bytes(large_gif), "pixels"),
        "frame-bomb.gif": OddFile(bytes(large_frame), "pixels"),
        "cut.webp": OddFile(webp[: len(webp) // 2], "damaged"),
        "lying-length.webp": OddFile(b"RIFF\xff\xff\xff\x7fWEBP" + webp[12:], "damaged"),
        "bomb.webp": OddFile(b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas, "damaged|pixels"),
        "cut.bmp": OddFile(plain[: len(plain) // 2], "damaged"),
        "bomb.bmp": OddFile(bmp(bytes(64), 24, width=30000, height=30000), "pixels"),
        "no-colours.bmp": OddFile(bmp(bytes(64), 9), "damaged"),
        "cut.ppm": OddFile(b"P6 64 64 255\n" + bytes(100), "damaged"),
        "bomb.ppm": OddFile(b"P6 99999 99999 255\n" + bytes(100), "pixels"),
        "no-greys.ppm": OddFile(b"P5 8 8 0\n" + bytes(64), "damaged"),
        "float.tiff": OddFile(picture(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "a TIFF picture"),
        "drawing.eps": OddFile(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript document"),
        "document.pdf": OddFile(b"%PDF-1.7\n1 0 obj", "a PDF document"),
        "layers.psd": OddFile(b"8BPS\0\1" + bytes(40), "a Photoshop picture"),
        "icons.icns": OddFile(b"icns\0\0\1\0" + bytes(40), "not listed"),
        "texture.blp": OddFile(b"BLP2\1\0\0\0" + bytes(200), "not listed"),
        "texture.dds": OddFile(b"DDS |\0\0\0" + bytes(200), "not listed"),
        "photo.avif": OddFile(b"\0\0\0\x20ftypavif" + bytes(40), "an AVIF or HEIF picture"),
        "photo.heic": OddFile(b"\0\0\0\x20ftypheic" + bytes(40), "an AVIF or HEIF picture"),
        "photo.jp2": OddFile(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "a JPEG 2000 or JPEG XL picture"),
    }  # fmt: skip


@cache
def sounds() -> dict[str, OddFile]:
    """Sounds of odd kinds that are read, with the samples they must have."""
    mono = samples()
    data, fraction = mono.astype("<i2").tobytes(), mono / 32768
    wild = np.array([np.nan, np.inf, -np.inf, 2.0, -2.0, 0.5, *[0.0] * 394], np.float32)
    tame = np.array([0, 32767, -32768, 32767, -32768, 16384, *[0] * 394], np.int16)
    plain = wav(data)
    listed = plain[:12] + b"LIST\x05\0\0\0INFOx\0" + plain[12:]
    mixed = {number: samples(400, number) for number in (3, 5)}
    return {
        "8-bit.wav": OddFile(sound(fraction, subtype="PCM_U8"), mono, 256, "16-bit samples"),
        "24-bit.wav": OddFile(sound(fraction, subtype="PCM_24"), mono, notes="16-bit samples"),
        "32-bit.wav": OddFile(sound(fraction, subtype="PCM_32"), mono, notes="16-bit samples"),
        "float.wav": OddFile(sound(fraction, subtype="FLOAT"), mono, notes="16-bit samples"),
        "double.wav": OddFile(sound(fraction, subtype="DOUBLE"), mono, notes="16-bit samples"),
        "not-a-number.wav": OddFile(sound(wild, subtype="FLOAT"), tame, notes="full scale"),
        "big-endian.wav": OddFile(sound(mono, endian="BIG", subtype="PCM_16"), mono),
        "a-law.wav": OddFile(sound(fraction, subtype="ALAW"), mono, 512),
        "mu-law.wav": OddFile(sound(fraction, subtype="ULAW"), mono, 512),
        "adpcm.wav": OddFile(sound(samples(500) / 32768, subtype="MS_ADPCM"), samples(500), 2000),
        "extensible.wav": OddFile(sound(mono, format="WAVEX", subtype="PCM_16"), mono),
        "3-channels.wav": OddFile(sound(mixed[3]), np.rint(mixed[3].mean(axis=1)), 1, "3 channels"),
        "5-channels.wav": OddFile(sound(mixed[5]), np.rint(mixed[5].mean(axis=1)), 1, "5 channels"),
        "odd-chunk.wav": OddFile(listed, mono),
        "half-a-sample.wav": OddFile(wav(data + b"\1"), mono),
        "lying-header.wav": OddFile(wav(data, claimed=2**31), mono, notes="ends early"),
        "unknown-length.wav": OddFile(wav(data, claimed=2**32 - 1), mono),
        "never-finished.wav": OddFile(wav(data, claimed=0), mono),
        "samples-like-ogg.wav": OddFile(wav(b"OggS" + data), np.concatenate([np.frombuffer(b"OggS", "<i2"), mono])),
        "cut.wav": OddFile(plain[:-301], mono[:249], notes="ends early"),
        "slow.wav": OddFile(wav(data, rate=1), mono[:400]),
        "picture-name.png": OddFile(plain, mono),
        "24-bit.flac": OddFile(sound(fraction, format="FLAC", subtype="PCM_24"), mono),
        "surplus.flac": OddFile(sound(mono, format="FLAC", subtype="PCM_16") + b"TAG" + bytes(125), mono),
        "vorbis.ogg": OddFile(sound(fraction, format="OGG", subtype="VORBIS"), mono, 1500),
    }


@cache
def damaged_sounds() -> dict[str, OddFile]:
    """Sound files that cannot be read, with the words of their refusal."""
    data, flac = samples().astype("<i2").tobytes(), sound(samples(20_000), format="FLAC", subtype="PCM_16")
    lying = bytearray(flac[:42])
    lying[21:26] = b"\x0f\xff\xff\xff\xff"  # the low 36 bits: number of samples
    ogg = sound(samples(20_000) / 32768, format="OGG", subtype="VORBIS")
    return {
        "no-samples.wav": OddFile(wav(b""), "holds no sound"),
        "only-a-header.wav": OddFile(wav(data)[:30], "damaged"),
        "no-rate.wav": OddFile(wav(data, rate=0), "Hz|damaged"),
        "wild-rate.wav": OddFile(wav(data, rate=2**31 - 1), "Hz"),
        "9-channels.wav": OddFile(wav(data[:792], channels=9), "9 channels"),
        "65535-channels.wav": OddFile(wav(data, channels=65535), "channels|damaged"),
        "no-channels.wav": OddFile(wav(data, channels=0), "damaged"),
        "no-bits.wav": OddFile(wav(data, bits=0), "damaged"),
        "unknown-code.wav": OddFile(wav(data, code=0x7777), "damaged"),
        "no-data.wav": OddFile(wav(data)[:36], "damaged"),
        "only-a-header.flac": OddFile(flac[:42], "no sound|damaged"),
        "lying-header.flac": OddFile(bytes(lying), "no sound|damaged"),
        "cut-header.flac": OddFile(flac[:10], "damaged"),
        "cut-header.ogg": OddFile(ogg[:60], "damaged"),
        "only-a-page.ogg": OddFile(ogg[:28], "damaged"),
        "sound.aiff": OddFile(sound(samples(), format="AIFF"), "an AIFF sound"),
        "sound.au": OddFile(sound(samples(), format="AU"), "an AU sound"),
        "sound.mp3": OddFile(b"ID3\4\0\0\0\0\0\0" + bytes(100), "an MP3 file"),
        "empty.mp3": OddFile(b"\xff\xfb\x90\x00" + bytes(413), "an MP3 file"),
        "sound.m4a": OddFile(b"\0\0\0\x20ftypM4A " + bytes(100), "MP4"),
        "long.wav": OddFile(b"RF64\xff\xff\xff\xffWAVEds64" + bytes(100), "not listed"),
    }


@cache
def texts() -> dict[str, OddFile]:
    """Texts and other bytes that are read as they are."""
    contents = {
        "zeros.txt": b"before\0after\0\0",
        "byte-order-mark.txt": b"\xef\xbb\xbfwith a mark\n",
        "utf-16.txt": "two bytes a letter\r\n".encode("utf-16"),
        "carriage-returns.txt": b"old\rlines\r",
        "mixed-lines.txt": b"one\r\ntwo\rthree\nfour\n\r",
        "invalid-utf-8.txt": b"\x80\x81 caf\xe9 \xf0\x9f \xc0\xaf \xff",
        "surrogates.txt": b"\xed\xa0\x80\xed\xb0\x80",
        "escapes.txt": b"\x1b[31mred\x1b[2J\x07\x1b]0;title\x07",
        "right-to-left.txt": "abc\u202etxt.exe\u2066".encode(),
        "one-byte.txt": b"\n",
        "all-bytes.bin": bytes(range(256)),
        "one-long-line.txt": b"x" * 100_000,
        "text.png": b"This is no picture.\n",
        "broken-by-mail.png": picture(pixels()).replace(b"\r\n", b"\n"),
        "page.html": b"<script>alert(1)</script><img src=x onerror=alert(1)>",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        "magick.mvg": b"push graphic-context\nimage over 0,0 0,0 'ephemeral:/etc/passwd'\n",
        "pickle.bin": b"\x80\x04cos\nsystem\n(S'touch made'\ntR.",
        "almost.bmp": b"BMW builds cars.",
        "almost.ppm": b"P6 is a format.",
    }
    return {name: OddFile(content, content) for name, content in contents.items()}


@cache
def not_texts() -> dict[str, OddFile]:
    """Files that are refused for being empty, or a container whose bytes alone say little."""
    return {
        "empty.txt": OddFile(b"", "is empty"),
        "empty.png": OddFile(b"", "is empty"),
        "archive.zip": OddFile(b"PK\x03\x04" + bytes(40), "a ZIP archive"),
        "archive.txt": OddFile(b"\x1f\x8b\x08" + bytes(40), "a gzip file"),
        "archive.7z": OddFile(b"7z\xbc\xaf\x27\x1c" + bytes(40), "a 7-Zip archive"),
        "film.mkv": OddFile(b"\x1a\x45\xdf\xa3" + bytes(40), "a Matroska or WebM video"),
    }


def odd_files() -> dict[str, OddFile]:
    """All of them by their names."""
    groups = (pictures(), damaged_pictures(), sounds(), damaged_sounds(), texts(), not_texts())
    return {name: file for group in groups for name, file in group.items()}


def main(paths: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    from core.codecs import read_media, read_partial
    from core.codecs.image import DamagedPictureError
    from core.errors import UserError
    from core.limits import PeakMemory

    memory, events = PeakMemory(torch.device("cpu")), []

    def watch(event: str, arguments: tuple) -> None:
        is_writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_writing or event.startswith(UNWANTED_EVENTS):
            events.append(event)

    sys.addaudithook(watch)
    for path in paths:
        memory.start()
        events.clear()
        # Of the processor too: a busy machine takes longer for everything.
        started, began = time.thread_time(), time.perf_counter()
        try:
            kind, said = type(read_media(path)).__name__, ""
        except DamagedPictureError as error:
            kind, said = "UserError", str(error)
            with contextlib.suppress(UserError):
                read_partial(path)
        except Exception as error:
            kind, said = type(error).__name__, str(error)
        seconds, waited = time.thread_time() - started, time.perf_counter() - began
        peak_bytes, seen = memory.read()[1], list(events)
        facts = {"kind": kind, "said": said, "seconds": seconds, "waited": waited, "peak_bytes": peak_bytes, "events": seen}
        print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:])
