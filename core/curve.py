"""What a byte costs at every length: MegaByte with several patch sizes and the flat Transformer, from 2^10 bytes to 2^20.

The sizes of the models stay while the patches grow, as in section 3.1 of arXiv 2305.07185: attention over patches and
inside them costs T^2 / P^2 + T P, least with P = T^(1/3), so the best P of each length gives T^(4/3).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import log

import numpy as np
import torch

from core.bench import flat_counterpart, random_model, random_stream
from core.config import MegaByteConfig
from core.distributed import usable_device
from core.likelihood import score
from core.limits import PeakMemory, timed
from core.presets import preset

PATCH_SIZES = (8, 16, 32, 64, 128)
LENGTHS = tuple(2**power for power in range(10, 21))
_FITTED_FROM = 2**13


@dataclass(frozen=True)
class Point:
    """One sequence of `length` bytes scored in one context. `patch_size` 1 is the flat Transformer."""

    patch_size: int
    length: int
    seconds: float
    extra_peak_memory_bytes: int

    @property
    def bytes_per_s(self) -> float:
        return self.length / self.seconds


def cost_curve(
    *,
    patch_sizes: Sequence[int] = PATCH_SIZES,
    lengths: Sequence[int] = LENGTHS,
    most_seconds: float = 60.0,
    device: torch.device | str = "cpu",
    log_line: Callable[[str], None] = lambda _: None,
) -> Iterator[Point]:
    """Measures shape `bench-tiny`, shortest sequences first.

    Args:
        most_seconds: a series ends before the length that would take longer if the cost grew with its square.
    """
    device = usable_device(str(device))
    base = preset("bench-tiny").model
    flat = flat_counterpart(base)
    for patch_size in (1, *patch_sizes):
        spent = 0.0
        for length in lengths:
            if spent * 4 > most_seconds:
                log_line(f"P = {patch_size}: {length} bytes and more would take over {most_seconds:.0f} s; left out")
                break
            config = flat if patch_size == 1 else _with_patch_size(base, patch_size)
            model = random_model(replace(config, max_seq_len=length), device)
            stream = random_stream(length)
            memory = PeakMemory(device)
            memory.start()
            runs = [timed(lambda m=model, s=stream: score(m, s), device)]
            _, extra = memory.read()
            # The first run of a process or shape is slower; long ones need no second.
            while sum(runs) < 2 and len(runs) < 4:
                runs.append(timed(lambda m=model, s=stream: score(m, s), device))
            spent = min(runs)
            yield Point(patch_size, length, spent, extra)


def best_points(points: Sequence[Point]) -> list[Point]:
    """The cheapest MegaByte of each length."""
    lengths = sorted({point.length for point in points})
    candidates = [[p for p in points if p.length == length and p.patch_size > 1] for length in lengths]
    return [min(some, key=lambda point: point.seconds) for some in candidates if some]


def fitted_exponent(points: Sequence[Point]) -> float | None:
    """The power of the length with which the cost grows, by least squares on logarithms, from 2^13 bytes on."""
    fitted = [point for point in points if point.length >= _FITTED_FROM]
    if len(fitted) < 2:
        return None
    slope, _ = np.polyfit([log(point.length) for point in fitted], [log(point.seconds) for point in fitted], 1)
    return float(slope)


def _with_patch_size(config: MegaByteConfig, patch_size: int) -> MegaByteConfig:
    coarse, fine = config.levels
    return replace(config, levels=(replace(coarse, patch_size=patch_size), fine), max_seq_len=patch_size)
