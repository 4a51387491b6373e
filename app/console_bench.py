"""Speeds on the command line: a table for people or one JSON line, and the cost curve as a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.console import Report, emit

if TYPE_CHECKING:
    from core.curve import Point

_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda m: f"{m['preset']} ({m['shape']}, {m['num_parameters'] / 1e6:.1f} M parameters)",
    "engine": lambda m: f"{m['engine']} on {m['device']}",
    "work": lambda m: f"{m['batch_size']} x {m['length']} bytes",
    "bytes/s": lambda m: f"{m['bytes_per_s']:.0f} (spread {m['spread']:.0%})",
    "of the limit": lambda m: f"{m['fraction_of_limit']:.0%} ({m['limit']})",
    "FLOPs/byte": lambda m: f"{m['flops_per_byte'] / 1e6:.2f} M forward",
    "read/byte": lambda m: f"{m['bytes_read_per_byte'] / 1e6:.2f} MB" if m["bytes_read_per_byte"] else "-",
    "peak memory": lambda m: f"{m['peak_memory_bytes'] / 1e6:.0f} MB, {m['extra_peak_memory_bytes'] / 1e6:.0f} MB for the work",
}


def show_bench(facts: dict[str, Any], report: Report) -> None:
    """Prints what `core.bench.bench` found."""
    if report.as_json:
        report.result(facts, "")
        return
    columns = [facts, *([facts["against"]] if "against" in facts else [])]
    for name, cell in _ROWS.items():
        first, *others = [cell(column) for column in columns]
        emit(f"{name:<13} {first:<58} {'  '.join(others)}".rstrip())
    if "ratio" in facts:
        emit(f"{'ratio':<13} {facts['ratio']:.2f} times as fast")


def show_point(point: "Point", report: Report) -> None:
    """Prints one point of the cost curve."""
    name = series_name(point)
    line = f"{name:<8} {point.length:>8} bytes {point.seconds:9.3f} s {point.bytes_per_s:9.0f} bytes/s"
    facts = {
        "what": "curve",
        "patch_size": point.patch_size,
        "length": point.length,
        "seconds": point.seconds,
        "bytes_per_s": point.bytes_per_s,
        "extra_peak_memory_bytes": point.extra_peak_memory_bytes,
    }
    report.result(facts, f"{line} {point.extra_peak_memory_bytes / 1e6:7.0f} MB")


def show_curve(points: "list[Point]", picture: Path, report: Report) -> None:
    """Draws the curve and prints the exponents of its cost."""
    from app.plot import draw_log_log
    from core.curve import best_points, fitted_exponent

    series: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        series.setdefault(series_name(point), []).append((point.length, point.seconds))
    draw_log_log(series, picture, title="Scoring one sequence in one context", x_label="bytes", y_label="seconds")
    best, flat = fitted_exponent(best_points(points)), fitted_exponent([p for p in points if p.patch_size == 1])
    facts = {"what": "curve", "picture": str(picture), "exponent_best_patch": best, "exponent_flat": flat}
    shown = [f"{name} T^{value:.2f}" for name, value in (("best P", best), ("flat", flat)) if value is not None]
    report.result(facts, f"cost from 2^13 bytes on: {', '.join(shown) or 'too few lengths'}; picture in {picture}")


def series_name(point: "Point") -> str:
    return "flat" if point.patch_size == 1 else f"P = {point.patch_size}"
