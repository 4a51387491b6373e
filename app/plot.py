"""Curves as pictures, drawn with Pillow: on two logarithmic axes, and panels of bits per byte against training FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_SIZE = (960, 640)
_FRAME = (90, 50, 760, 570)  # left, top, right, bottom of the axes
_COLOURS = ("#444444", "#d55e00", "#e69f00", "#009e73", "#0072b2", "#cc79a7", "#56b4e9")  # told apart by the colour-blind too
_INK, _GRID = "#222222", "#dddddd"
_PANEL_WIDTH, _PANEL_HEIGHT = 520, 360  # pixels of the plot of a panel, without its labels
_LEFT, _TOP, _BOTTOM = 60, 34, 46
_LEGEND_LINE = 18
_NUM_TICKS = 6

Curve = list[tuple[float, float]]  # (FLOPs, bits per byte)


@dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    curves: dict[str, Curve]


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


def draw_panels(panels: list[Panel]) -> Image.Image:
    """The panels, two in a row."""
    images = [_draw(panel) for panel in panels]
    columns = min(2, len(images))
    width, height = images[0].width, max(image.height for image in images)
    whole = Image.new("RGB", (columns * width, ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        whole.paste(image, (index % columns * width, index // columns * height))
    return whole


def _draw(panel: Panel) -> Image.Image:
    curves = {name: curve for name, curve in panel.curves.items() if curve}
    legend_height = _LEGEND_LINE * (len(curves) + 1)
    image = Image.new("RGB", (_LEFT + _PANEL_WIDTH + 20, _TOP + _PANEL_HEIGHT + _BOTTOM + legend_height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    points = [point for curve in curves.values() for point in curve]
    lowest_x, highest_x = log10(min(x for x, _ in points)), log10(max(x for x, _ in points))
    lowest_y, highest_y = min(y for _, y in points), max(y for _, y in points)
    step = _round_step((highest_y - lowest_y) / _NUM_TICKS)
    lowest_y, highest_y = floor(lowest_y / step) * step, ceil(highest_y / step) * step or step

    def place(x: float, y: float) -> tuple[float, float]:
        across = (log10(x) - lowest_x) / (highest_x - lowest_x or 1.0)
        return _LEFT + across * _PANEL_WIDTH, _TOP + (highest_y - y) / (highest_y - lowest_y or 1.0) * _PANEL_HEIGHT

    draw.text((_LEFT, 8), f"{panel.title}: bits per byte (validation) against training FLOPs", fill=_INK, font=font)
    for number in range(round((highest_y - lowest_y) / step) + 1):
        y = lowest_y + number * step
        _, height = place(10**lowest_x, y)
        draw.line((_LEFT, height, _LEFT + _PANEL_WIDTH, height), fill=_GRID)
        draw.text((_LEFT - 6, height), f"{y:.3g}", fill=_INK, font=font, anchor="rm")
    for exponent in range(floor(lowest_x), ceil(highest_x) + 1):
        for digit in (1, 2, 5):
            x = digit * 10.0**exponent
            if lowest_x <= log10(x) <= highest_x:
                left, _ = place(x, lowest_y)
                draw.line((left, _TOP, left, _TOP + _PANEL_HEIGHT), fill=_GRID)
                draw.text((left, _TOP + _PANEL_HEIGHT + 6), f"{digit}e{exponent}", fill=_INK, font=font, anchor="ma")
    draw.rectangle((_LEFT, _TOP, _LEFT + _PANEL_WIDTH, _TOP + _PANEL_HEIGHT), outline=_INK)
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [place(x, y) for x, y in curve]
        draw.line(places, fill=colour, width=2)
        for left, top in places:
            draw.ellipse((left - 2, top - 2, left + 2, top + 2), fill=colour)
        below = _TOP + _PANEL_HEIGHT + _BOTTOM + number * _LEGEND_LINE
        draw.line((_LEFT, below, _LEFT + 24, below), fill=colour, width=3)
        draw.text((_LEFT + 32, below), f"{name}  {curve[-1][1]:.4f}", fill=_INK, font=font, anchor="lm")
    return image


def _round_step(rough: float) -> float:
    """The next larger of 1, 2 or 5 times a power of ten."""
    if rough <= 0:
        return 0.1
    power = 10.0 ** floor(log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
