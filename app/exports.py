"""A scored file as files for other programs: bits and what was expected as NPZ or CSV, and its heatmap as PNG."""

import csv
import io
from pathlib import Path

import numpy as np

from app.render import Measure, heatmap
from app.service import FileScore
from core.codecs import atomic_file
from core.likelihood import context_sizes


def export_score(result: FileScore, bits_path: Path, heatmap_path: Path) -> None:
    """Writes the bits of a scored file (NPZ) and its heatmap (PNG)."""
    write_npz(result, bits_path)
    write_png(result, heatmap_path)


def write_npz(result: FileScore, path: Path) -> None:
    """`bits` in stream order, `media_bits` in media shape, and of a detailed score what was expected, in stream order.

    `counted` is False for the bytes of a picture's overlapping tiles that do not count a second time.
    """
    counted = np.ones(len(result.bits), dtype=bool) if result.layout.counted is None else result.layout.counted
    arrays = {"bits": result.bits, "media_bits": result.media_bits, "counted": counted}
    if result.expected is not None:
        arrays |= vars(result.expected)
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def write_csv(result: FileScore, path: Path) -> None:
    """A line for each byte of a detailed score, in stream order: what it is, what it cost, and what the model knew before it."""
    stream, _ = result.codec.encode(result.media)
    context = context_sizes(len(stream), result.window, result.hop)
    expected = result.expected
    columns = {
        "offset": range(len(stream)),
        "value": stream.tolist(),
        "bits": np.char.mod("%.4f", result.bits),
        "rank": (expected.rank.astype(int) + 1).tolist(),
        "entropy": np.char.mod("%.3f", expected.entropy.astype(np.float32)),
        "context": context.tolist(),
        "likeliest": expected.likeliest[:, 0].tolist(),
    }
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        text.detach()  # the file is closed by its owner


def write_png(
    result: FileScore, path: Path, measure: Measure = "bits", palette: str = "viridis", other: FileScore | None = None
) -> None:
    """The heatmap of a scored file, with its figures and the legend; the arguments are those of `heatmap`."""
    with atomic_file(path) as file:
        heatmap(result, measure, palette, other).save(file, "PNG")
