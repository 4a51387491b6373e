"""One long sequence in one context: scored, learned from and continued, in memory that does not hold it all at once."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from core.bench import random_model, random_stream
from core.config import LevelConfig, MegaByteConfig
from core.learner import MeanNll
from core.likelihood import score
from core.limits import PeakMemory
from core.presets import preset
from core.sample import SampleConfig, Sampler

CPU = torch.device("cpu")
NUM_NEW = 64


@dataclass(frozen=True)
class Long:
    """A model whose context is long, and the most memory, in bytes, that reading and learning all of it may take."""

    config: MegaByteConfig
    most_for_score: float
    most_for_step: float


def small() -> Long:
    levels = (
        LevelConfig(dim=64, num_layers=1, num_heads=1, patch_size=64),
        LevelConfig(dim=32, num_layers=1, num_heads=1, cross_patch=64),
    )
    return Long(MegaByteConfig(levels=levels, max_seq_len=1 << 15, positions="both"), 200e6, 400e6)


def million() -> Long:
    return Long(preset("bench-tiny-p64").model, 600e6, 1e9)  # 260 MB and 633 MB measured


def is_scored(long: Long) -> None:
    model, stream = random_model(long.config, CPU), random_stream(long.config.max_seq_len)
    memory = PeakMemory(CPU)
    memory.start()
    bits_per_byte = score(model, stream).bits_per_byte
    assert memory.read()[1] < long.most_for_score
    assert bits_per_byte == pytest.approx(8.0, abs=0.1)


def is_continued(long: Long) -> None:
    model, stream = random_model(long.config, CPU), random_stream(long.config.max_seq_len)
    made = list(Sampler(model, stream[:-NUM_NEW], NUM_NEW, SampleConfig()).stream())
    continued = np.concatenate([stream[:-NUM_NEW], *(chunk.byte_values for chunk in made)])
    bits = np.concatenate([chunk.bits for chunk in made])
    np.testing.assert_allclose(bits, score(model, continued).bits[-NUM_NEW:], atol=0.02)


def is_learned_from(long: Long) -> None:
    model, stream = random_model(long.config, CPU), random_stream(long.config.max_seq_len)
    bits_per_byte = score(model, stream).bits_per_byte
    memory = PeakMemory(CPU)
    memory.start()
    loss = MeanNll(model.train(), "bf16", recompute=True)(torch.from_numpy(stream).long()[None])
    loss.backward()
    taken = memory.read()[1]
    print(f"{taken / 1e6:.0f} MB")
    assert taken < long.most_for_step
    assert loss.item() / np.log(2) == pytest.approx(bits_per_byte, rel=1e-3)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


PARTS = (is_scored, is_continued, is_learned_from)


@pytest.mark.parametrize("part", PARTS)
def test_32768_bytes_in_one_context(part):
    part(small())


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_million_bytes_in_one_context(part):
    # In a process of its own, as a run is: what other tests have left of the heap is not this one's memory.
    lines = ["from core.allocator import return_freed_memory", f"from tests.test_long_context import million, {part.__name__}"]
    lines += ["return_freed_memory()"] if part is is_learned_from else []  # as `train` does where it runs layers again
    lines += [f"{part.__name__}(million())"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
