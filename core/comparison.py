"""What a comparison found: the figures of each model, their errors, and the tables and JSON that say them."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A model's score of the test items under one protocol.

    Attributes:
        item_bits: bits of each picture, sound or piece of text.
        window, hop: bytes; strided: whether a second pass was made.
    """

    item_bits: list[float]
    item_bytes: list[int]
    window: int
    hop: int
    strided: bool

    @property
    def bits_per_byte(self) -> float:
        return sum(self.item_bits) / sum(self.item_bytes)

    @property
    def standard_error(self) -> float:
        """Of bits_per_byte, from how much the items differ."""
        return ratio_error(np.array(self.item_bits), np.array(self.item_bytes))

    def minus(self, other: "Measurement") -> tuple[float, float]:
        """How many more bits per byte than `other` on the same items, and the standard error of that difference."""
        more = np.array(self.item_bits) - np.array(other.item_bits)
        return float(more.sum() / sum(self.item_bytes)), ratio_error(more, np.array(self.item_bytes))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One trained and scored model.

    Attributes:
        group: models of one group are compared with each other, on the same test items.
        flops_per_byte: forward FLOPs for each byte that is predicted.
        num_steps: optimizer steps.
        training_flops: spent, forward and backward.
        bytes_seen: bytes the loss was of.
        seconds: of training, on `device`.
        basic, sliding: the latter with windows that overlap by half and, where the model has patches, strided; None where
            the model does not allow it.
        num_words: of the test text; 0 if it is no text.
        curve: (training FLOPs, bits per byte of the validation data) along the training.
    """

    name: str
    group: str
    num_parameters: int
    flops_per_byte: float
    num_steps: int
    training_flops: float
    bytes_seen: int
    seconds: float
    device: str
    basic: Measurement
    sliding: Measurement | None
    num_words: int
    curve: list[tuple[float, float]]

    def word_perplexity(self, measurement: Measurement) -> float | None:
        """2^(total bits / words), as word-level language models are measured; None if there are no words."""
        return 2.0 ** (sum(measurement.item_bits) / self.num_words) if self.num_words else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; `from_dict` gives back an equal result."""
        derived = {}
        for name in ("basic", "sliding"):
            measurement = getattr(self, name)
            if measurement is not None:
                derived[name] = {
                    "bits_per_byte": measurement.bits_per_byte,
                    "standard_error": measurement.standard_error,
                    "word_perplexity": self.word_perplexity(measurement),
                }
        return {**asdict(self), "derived": derived}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Result":
        measurements = {name: raw[name] and Measurement(**raw[name]) for name in ("basic", "sliding")}
        curve = [tuple(point) for point in raw["curve"]]
        others = {name: value for name, value in raw.items() if name not in ("derived", "curve", *measurements)}
        return cls(**others, **measurements, curve=curve)


def ratio_error(numerators: np.ndarray, denominators: np.ndarray) -> float:
    """Standard error of sum(numerators) / sum(denominators) over items drawn at random; 0 if there is one item only."""
    num_items, total = len(numerators), denominators.sum()
    if num_items < 2:
        return 0.0
    residuals = numerators - denominators * (numerators.sum() / total)
    return float(np.sqrt(num_items / (num_items - 1) * (residuals**2).sum()) / total)


def groups_of(results: list[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def table(results: list[Result]) -> list[list[str]]:
    """Rows of cells, the header first. Differences are to the first model of each group."""
    has_words = any(result.num_words for result in results)
    header = [
        "data",
        "model",
        "parameters",
        "FLOPs/byte",
        "FLOPs",
        "steps",
        "bytes seen",
        "seconds",
        "bits/byte",
        "difference",
        "strided + sliding",
    ]
    rows = [[*header, *(["word perplexity", "the same, strided + sliding"] if has_words else [])]]
    for group, members in groups_of(results).items():
        for result in members:
            difference = "" if result is members[0] else "{:+.4f} ± {:.4f}".format(*result.basic.minus(members[0].basic))
            row = [
                group,
                result.name,
                f"{result.num_parameters / 1e6:.2f} M",
                f"{result.flops_per_byte / 1e6:.2f} M",
                f"{result.training_flops:.3g}",
                f"{result.num_steps}",
                f"{result.bytes_seen / 1e6:.1f} M",
                f"{result.seconds:.0f}",
                _rate(result.basic),
                difference,
                _rate(result.sliding),
            ]
            if has_words:
                row += [_perplexity(result, measurement) for measurement in (result.basic, result.sliding)]
            rows.append(row)
    return rows


def as_markdown(rows: list[list[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_text(rows: list[list[str]]) -> str:
    """Columns of even width, aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows)


def _rate(measurement: Measurement | None) -> str:
    return "-" if measurement is None else f"{measurement.bits_per_byte:.4f} ± {measurement.standard_error:.4f}"


def _perplexity(result: Result, measurement: Measurement | None) -> str:
    perplexity = measurement and result.word_perplexity(measurement)
    return "-" if perplexity is None else f"{perplexity:.4g}"
