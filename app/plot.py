"""Curves on logarithmic axes as a PNG, drawn with Pillow."""

from collections.abc import Sequence
from math import ceil, floor, log10
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_SIZE = (960, 640)
_FRAME = (90, 50, 760, 570)  # left, top, right, bottom of the axes
_COLOURS = ("#444444", "#d55e00", "#e69f00", "#009e73", "#0072b2", "#cc79a7", "#56b4e9")  # told apart by the colour-blind too
_INK, _GRID = "#222222", "#dddddd"


def draw_log_log(series: dict[str, Sequence[tuple[float, float]]], path: Path, *, title: str, x_label: str, y_label: str) -> None:
    """Writes a picture of some series of (x, y), all above 0; x is marked in powers of two, y in powers of ten."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    low, high = floor(log10(min(ys))), max(ceil(log10(max(ys))), floor(log10(min(ys))) + 1)
    left, top, right, bottom = _FRAME
    x_span = max(log10(max(xs) / min(xs)), 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (right - left) * log10(x / min(xs)) / x_span
        return across, bottom - (bottom - top) * (log10(y) - low) / (high - low)

    image = Image.new("RGB", _SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    draw.text((left, 14), title, _INK, font)
    for power in range(low, high + 1):
        _, y = place(min(xs), 10.0**power)
        draw.line((left, y, right, y), _GRID)
        draw.text((left - 8, y), f"{10.0**power:g}", _INK, font, anchor="rm")
    for x_value in sorted(set(xs)):
        x, _ = place(x_value, 10.0**low)
        draw.line((x, top, x, bottom), _GRID)
        draw.text((x, bottom + 8), _power_of_two(x_value), _INK, font, anchor="ma")
    draw.rectangle(_FRAME, outline=_INK)
    draw.text(((left + right) / 2, bottom + 32), x_label, _INK, font, anchor="ma")
    draw.text((14, 32), y_label, _INK, font)
    for index, (name, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        places = [place(x, y) for x, y in points]
        draw.line(places, colour, width=3)
        for x, y in places:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        draw.line((right + 16, top + 12 + 26 * index, right + 44, top + 12 + 26 * index), colour, width=3)
        draw.text((right + 52, top + 12 + 26 * index), name, _INK, font, anchor="lm")
    image.save(path)


def _power_of_two(value: float) -> str:
    exponent = int(value).bit_length() - 1
    return f"2^{exponent}" if value == 1 << exponent else f"{value:g}"
