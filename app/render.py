"""Numbers to pictures: bits as colours on a fixed scale, over a picture, a waveform, a text or a hex dump, with a legend."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from app.palette import ABOVE, BELOW, DIVERGING, NO_VALUE, SEQUENTIAL
from app.service import FileScore
from core.errors import UserError, shown

Measure = Literal["bits", "rank", "entropy", "excess", "difference"]
MEASURES: tuple[str, ...] = get_args(Measure)
_SIGNED = ("excess", "difference")

MAX_BITS = 8.0  # uniform bytes
_TITLES: dict[Measure, str] = {
    "bits": "bits per byte (8 = a uniform guess)",
    "rank": "doublings of the rank (0 = the likeliest byte, 8 = the last)",
    "entropy": "entropy, the bits that the model expected to need",
    "excess": "bits beyond the entropy (0 = as expensive as expected)",
    "difference": "bits minus those of the other (grey where it has ended)",
}
_BACKGROUND, _INK, _FAINT = "white", "black", "#666666"
_MARGIN = 12  # pixels
_PANEL = 256  # a small picture is enlarged to about this side
_MAX_PANEL = 1024
_WAVE_WIDTH, _WAVE_HEIGHT = 1024, 256
_CELL_WIDTH, _CELL_HEIGHT = 9, 18
_TEXT_COLUMNS = 100
_HEX_COLUMNS = 16
_MAX_CHARACTERS = 10_000
_MAX_HEX_BYTES = 4096
_FONT_SIZE = 13
_LACKING = "\U0010ffff"  # a character that no font has


@dataclass(frozen=True, eq=False)
class Scale:
    """Which colour a value has: a table (256, 3) that runs from `low` to `high`, fixed so that two pictures can be compared."""

    table: np.ndarray
    low: float
    high: float
    title: str


def scale_of(measure: Measure, palette: str = "viridis") -> Scale:
    """The fixed scale of a measure; a signed one has its own colours unless they are grey."""
    is_signed = measure in _SIGNED
    table = DIVERGING if is_signed and palette != "grey" else SEQUENTIAL[palette]
    return Scale(table, -MAX_BITS if is_signed else 0.0, MAX_BITS, _TITLES[measure])


BITS = scale_of("bits")


def heat(values: np.ndarray, scale: Scale = BITS) -> np.ndarray:
    """Colours uint8 (..., 3) of values (...); those beyond the scale and NaN have colours of their own."""
    values = np.asarray(values, dtype=np.float32)
    shares = np.clip((values - scale.low) / (scale.high - scale.low), 0.0, 1.0)
    colours = scale.table[(np.nan_to_num(shares, nan=0.0) * 255).round().astype(np.uint8)]
    colours[values > scale.high] = ABOVE
    colours[values < scale.low] = BELOW
    colours[np.isnan(values)] = NO_VALUE
    return colours


def overlay(pixels: np.ndarray, colours: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Colours laid over a picture, both uint8 (H, W, 3)."""
    mixed = (1.0 - opacity) * pixels.astype(np.float32) + opacity * colours.astype(np.float32)
    return mixed.round().astype(np.uint8)


def heatmap(
    result: FileScore, measure: Measure = "bits", palette: str = "viridis", other: FileScore | None = None
) -> Image.Image:
    """A picture of a scored file: its content coloured by a measure, its figures and the legend.

    Rank, entropy and excess need a detailed score; the difference is that from the `other` score.

    Raises:
        UserError: if there is no other score for a difference, or its bytes do not lie on those of the file.
    """
    scale, values = scale_of(measure, palette), _media_values(result, measure, other)
    if result.kind == "image":
        panel = picture_heatmap(result.media.pixels, values, scale)
    elif result.kind == "audio":
        panel = waveform_heatmap(result.media.samples, values, result.media.sample_rate, scale)
    elif result.kind == "text":
        panel = text_heatmap(result.media.data, values, scale)
    else:
        panel = hex_heatmap(result.media.data, values, scale)
    return _stack([_caption(result, other if measure == "difference" else None), panel, legend(scale)])


def _media_values(result: FileScore, measure: Measure, other: FileScore | None) -> np.ndarray:
    """The measure in media shape; for a sound the mean over the bytes of each sample."""
    if measure == "difference":
        values = differences(result, other)
        if result.kind == "image":
            return values.reshape(result.media.pixels.shape)
    elif measure == "bits":
        values = result.bits
    elif measure == "rank":
        values = np.log2(result.expected.rank.astype(np.float32) + 1)
    else:
        entropy = result.expected.entropy.astype(np.float32)
        values = entropy if measure == "entropy" else result.bits - entropy
    values = result.codec.unscan(values, result.layout)
    return values / result.codec.config.bytes_per_sample if result.kind == "audio" else values


def differences(result: FileScore, other: FileScore | None) -> np.ndarray:
    """Bits minus those of the other score, byte on byte in the media's order, float32 (T,); NaN where the other has ended."""
    if other is None:
        raise UserError("there is nothing to take the difference from; choose a file to compare with")
    if result.kind != other.kind or (result.kind == "image" and result.media.width != other.media.width):
        raise UserError("these two files do not lie byte on byte; compare files of one kind, and pictures of one width")
    here, there = (each.media_bits.reshape(-1) if each.kind == "image" else each.bits for each in (result, other))
    both = min(len(here), len(there))
    values = np.full(len(here), np.nan, dtype=np.float32)
    values[:both] = here[:both] - there[:both]
    return values


def picture_heatmap(pixels: np.ndarray, bits: np.ndarray, scale: Scale = BITS) -> Image.Image:
    """The picture uint8 (H, W, 3), the mean bits of each pixel, and one laid over the other, side by side."""
    colours = heat(bits.mean(axis=2), scale)
    times = max(1, round(_PANEL / max(pixels.shape[:2])))
    panels = [_enlarge(panel, times) for panel in (pixels, colours, overlay(pixels, colours))]
    return _row(panels)


def waveform_heatmap(samples: np.ndarray, bits: np.ndarray, sample_rate: int, scale: Scale = BITS) -> Image.Image:
    """The waveform int16 (N,), each column from its lowest to its highest sample in the colour of its mean bits per byte.

    It is drawn as high as its peak, which is said below, so that a quiet sound can be seen too.
    """
    image = Image.new("RGB", (_WAVE_WIDTH, _WAVE_HEIGHT + _CELL_HEIGHT), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    peak = int(np.abs(samples.astype(np.int32)).max(initial=1))
    middle, height = _WAVE_HEIGHT / 2, (_WAVE_HEIGHT / 2 - 1) / peak
    num_columns = min(_WAVE_WIDTH, len(samples))
    for column, (lowest, highest, colour) in enumerate(_wave_columns(samples, bits, num_columns, scale)):
        left, right = (round(edge * _WAVE_WIDTH / num_columns) for edge in (column, column + 1))
        draw.rectangle((left, middle - highest * height, right - 1, middle - lowest * height), fill=colour)
    labels = ("0 s", f"peak {peak / 32768:.1%}", f"{len(samples) / sample_rate:.2f} s")
    for label, anchor, x in zip(labels, ("la", "ma", "ra"), (0, _WAVE_WIDTH // 2, _WAVE_WIDTH), strict=True):
        draw.text((x, _WAVE_HEIGHT), label, fill=_FAINT, font=_font(), anchor=anchor)
    return image


def text_heatmap(data: np.ndarray, bits: np.ndarray, scale: Scale = BITS) -> Image.Image:
    """UTF-8 text uint8 (N,) in the colours of its characters' mean bits per byte; long text is cut, and that is said."""
    rows = list(_text_rows(_characters(data, bits, scale)))
    return _cells(rows, _TEXT_COLUMNS, _cut_note(len(data), sum(c.num_bytes for row in rows for c in row)))


def hex_heatmap(data: np.ndarray, bits: np.ndarray, scale: Scale = BITS) -> Image.Image:
    """Bytes uint8 (N,) as a hex dump in the colours of their bits; a long one is cut, and that is said."""
    shown = data[:_MAX_HEX_BYTES]
    rows = [
        list(_hex_row(start, shown[start : start + _HEX_COLUMNS], heat(bits[start : start + _HEX_COLUMNS], scale)))
        for start in range(0, len(shown), _HEX_COLUMNS)
    ]
    return _cells(rows, 8 + 2 + 3 * _HEX_COLUMNS + 1 + _HEX_COLUMNS, _cut_note(len(data), len(shown)))


def legend(scale: Scale = BITS, width: int = 480) -> Image.Image:
    """The scale from its lower to its upper end and the colours of what exceeds it."""
    bar_height = 14
    image = Image.new("RGB", (width, bar_height + 2 * _CELL_HEIGHT), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    bar_width = width - 190
    bar = heat(np.linspace(scale.low, scale.high, bar_width), scale)[None].repeat(bar_height, axis=0)
    image.paste(Image.fromarray(bar), (8, 0))
    for tick in np.linspace(scale.low, scale.high, 5):
        x = 8 + (tick - scale.low) / (scale.high - scale.low) * (bar_width - 1)
        draw.line((x, bar_height, x, bar_height + 3), fill=_INK)
        draw.text((x, bar_height + 3), f"{tick:g}", fill=_INK, font=_font(), anchor="ma")
    chips = [(ABOVE, "above"), *([(BELOW, "below")] if scale.low < 0 else [])]
    for place, (colour, name) in enumerate(chips):
        left = bar_width + 20 + 85 * place
        draw.rectangle((left, 0, left + bar_height, bar_height - 1), fill=colour)
        draw.text((left + 20, bar_height // 2), name, fill=_INK, font=_font(), anchor="lm")
    draw.text((8, bar_height + _CELL_HEIGHT), scale.title, fill=_FAINT, font=_font())
    return image


@dataclass(frozen=True)
class _Cell:
    """One character on a coloured ground."""

    text: str
    colour: tuple[int, int, int] | None = None
    num_bytes: int = 0


def _wave_columns(
    samples: np.ndarray, bits: np.ndarray, width: int, scale: Scale
) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
    starts = np.linspace(0, len(samples), width, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(starts, len(samples)))
    colours = heat(np.add.reduceat(bits.astype(np.float64), starts) / sizes, scale)
    lowest, highest = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
    for low, high, colour in zip(lowest.tolist(), highest.tolist(), colours.tolist(), strict=True):
        yield low, high, tuple(colour)


def _characters(data: np.ndarray, bits: np.ndarray, scale: Scale = BITS) -> Iterator[_Cell]:
    """The first characters, each with the mean bits of its bytes; a byte that is no UTF-8 is one of its own."""
    text = data[: 4 * _MAX_CHARACTERS].tobytes().decode("utf-8", "surrogateescape")[:_MAX_CHARACTERS]
    sizes = [1 if "\udc80" <= char <= "\udcff" else len(char.encode("utf-8")) for char in text]
    if not sizes:
        return
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    means = np.add.reduceat(bits[: sum(sizes)].astype(np.float64), starts) / sizes
    for char, size, colour in zip(text, sizes, heat(means, scale).tolist(), strict=True):
        yield _Cell(char, tuple(colour), size)


def _text_rows(characters: Iterator[_Cell]) -> Iterator[list[_Cell]]:
    row: list[_Cell] = []
    for cell in characters:
        row.append(_Cell(_visible(cell.text), cell.colour, cell.num_bytes))
        if cell.text == "\n" or len(row) == _TEXT_COLUMNS:
            yield row
            row = []
    if row:
        yield row


def _visible(char: str) -> str:
    """What is drawn for a character: itself, nothing for the end of a line, a dot for one that the font has no shape for."""
    if char == "\n":
        return " "
    return char if char.isprintable() and _has_shape(char) else "."


@lru_cache(maxsize=4096)
def _has_shape(char: str) -> bool:
    """Whether the font draws anything but the box that stands for every character it lacks."""
    return char.isascii() or bytes(_font().getmask(char)) != bytes(_font().getmask(_LACKING))


def _hex_row(start: int, data: np.ndarray, colours: np.ndarray) -> Iterator[_Cell]:
    values = list(zip(data.tolist(), map(tuple, colours.tolist()), strict=True))
    yield from (_Cell(char) for char in f"{start:08x}  ")
    for value, colour in values:
        yield from (_Cell(char, colour) for char in f"{value:02x}")
        yield _Cell(" ")
    yield from (_Cell(" ") for _ in range(3 * (_HEX_COLUMNS - len(values)) + 1))
    for value, colour in values:
        yield _Cell(chr(value) if 32 <= value < 127 else ".", colour, 1)


def _cells(rows: list[list[_Cell]], num_columns: int, note: str) -> Image.Image:
    height = _CELL_HEIGHT * (len(rows) + bool(note))
    image = Image.new("RGB", (_CELL_WIDTH * num_columns, max(height, 1)), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for index, row in enumerate(rows):
        for column, cell in enumerate(row):
            _draw_cell(draw, column * _CELL_WIDTH, index * _CELL_HEIGHT, cell)
    if note:
        draw.text((0, height - _CELL_HEIGHT), note, fill=_FAINT, font=_font())
    return image


def _draw_cell(draw: ImageDraw.ImageDraw, x: int, y: int, cell: _Cell) -> None:
    if cell.colour is not None:
        draw.rectangle((x, y, x + _CELL_WIDTH - 1, y + _CELL_HEIGHT - 1), fill=cell.colour)
    if cell.text != " ":
        centre = (x + _CELL_WIDTH / 2, y + _CELL_HEIGHT - 5)
        draw.text(centre, cell.text, fill=_ink_on(cell.colour), font=_font(), anchor="ms")


def _ink_on(colour: tuple[int, int, int] | None) -> str:
    """Black or white, whichever reads better on a colour."""
    if colour is None:
        return _FAINT
    red, green, blue = colour
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else _BACKGROUND


def _cut_note(num_bytes: int, num_shown: int) -> str:
    return f"the first {num_shown:,} of {num_bytes:,} bytes" if num_shown < num_bytes else ""


def _caption(result: FileScore, other: FileScore | None = None) -> Image.Image:
    rate = "none" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    figures = f"{rate} bits/byte, {result.num_bytes:,} bytes, {result.total_bits / 8:,.0f} bytes of information"
    protocol = f"model {result.model}, window {result.window}, hop {result.hop}{', strided' if result.strided else ''}"
    lines = [figures, f"{protocol}, {result.engine}"]
    if other is not None:
        lines.append(f"compared with {shown(other.file.name)}, model {other.model}")
    image = Image.new("RGB", (640, len(lines) * _CELL_HEIGHT), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        draw.text((0, row * _CELL_HEIGHT), line, fill=_FAINT if row else _INK, font=_font())
    return image


def _enlarge(pixels: np.ndarray, scale: int) -> Image.Image:
    image = Image.fromarray(pixels)
    if scale > 1:
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((_MAX_PANEL, _MAX_PANEL))
    return image


def _row(images: list[Image.Image]) -> Image.Image:
    width = sum(image.width for image in images) + _MARGIN * (len(images) - 1)
    row = Image.new("RGB", (width, max(image.height for image in images)), _BACKGROUND)
    x = 0
    for image in images:
        row.paste(image, (x, 0))
        x += image.width + _MARGIN
    return row


def _stack(images: list[Image.Image]) -> Image.Image:
    width = max(image.width for image in images) + 2 * _MARGIN
    height = sum(image.height + _MARGIN for image in images) + _MARGIN
    stack = Image.new("RGB", (width, height), _BACKGROUND)
    y = _MARGIN
    for image in images:
        stack.paste(image, (_MARGIN, y))
        y += image.height + _MARGIN
    return stack


@lru_cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of even width where the system has one; the one inside Pillow knows little more than ASCII."""
    try:
        return ImageFont.truetype("DejaVuSansMono.ttf", _FONT_SIZE)
    except OSError:
        return ImageFont.load_default(_FONT_SIZE)
