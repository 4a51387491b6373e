"""One long sequence in one context: scored, learned from and continued, in memory that does not hold it all at once."""

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
SMALL = MegaByteConfig(
    levels=(
        LevelConfig(dim=64, num_layers=1, num_heads=1, patch_size=64),
        LevelConfig(dim=32, num_layers=1, num_heads=1, cross_patch=64),
    ),
    max_seq_len=1 << 15,
    positions="both",
)
# Most of a step's memory is freed already, but small things that are kept of each chunk's graph hold it apart: a quarter of
# a million bytes take 1.0 GB, and 0.4 GB with MALLOC_MMAP_THRESHOLD_=4194304, which returns every larger tensor at once.
MODELS = [
    pytest.param(SMALL, 200e6, 400e6, id="32768 bytes"),
    pytest.param(preset("bench-tiny-p64").model, 600e6, 6e9, id="a million bytes", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("config", "most_for_score", "most_for_step"), MODELS)
def test_a_long_sequence_is_scored_learned_from_and_continued(config, most_for_score, most_for_step):
    model, stream = random_model(config, CPU), random_stream(config.max_seq_len)
    memory = PeakMemory(CPU)

    memory.start()
    whole = score(model, stream)
    assert memory.read()[1] < most_for_score
    assert whole.bits_per_byte == pytest.approx(8.0, abs=0.1)

    num_new = 64
    sampler = Sampler(model, stream[:-num_new], num_new, SampleConfig())
    made = list(sampler.stream())
    continued = np.concatenate([stream[:-num_new], *(chunk.byte_values for chunk in made)])
    bits = np.concatenate([chunk.bits for chunk in made])
    np.testing.assert_allclose(bits, score(model, continued).bits[-num_new:], atol=0.02)

    memory.start()
    loss = MeanNll(model.train(), "bf16", recompute=True)(torch.from_numpy(stream).long()[None])
    loss.backward()
    assert memory.read()[1] < most_for_step
    assert loss.item() / np.log(2) == pytest.approx(whole.bits_per_byte, rel=1e-3)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
