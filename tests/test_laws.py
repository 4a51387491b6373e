"""Laws that hold for every model and option: no look ahead, sums of one, no trace of padding, known entropies, free samples."""

import dataclasses
from math import log2

import numpy as np
import pytest
import torch
from torch import nn

from core.config import MegaByteConfig, PerceiverArConfig
from core.errors import UserError
from core.law import SampleConfig, sampling_law
from core.likelihood import score
from core.models import ByteModel, MegaByte, PerceiverAr
from core.sample import Sampler, generate
from tests.model_cases import CASES, CONTEXT, build, random_bytes
from tests.test_perceiver_ar import CASES as PERCEIVERS
from tests.test_perceiver_ar import build as build_perceiver

EVERY = {**CASES, **{f"perceiver_{name}": config for name, config in PERCEIVERS.items()}}
ENGINES = ["", "torch", "torch-bf16"]
IN_BFLOAT16 = ["exact", "all_rotary", "recipe_all", "flat", "three_levels_both"]  # between them, all that a cache keeps


def built(name: str) -> MegaByte | PerceiverAr:
    config = EVERY[name]
    return build_perceiver(config) if isinstance(config, PerceiverArConfig) else build(config)


def require_no_look_ahead(model: ByteModel, byte_ids: torch.Tensor, places: list[int]) -> None:
    """Changes one byte at a time: logits up to it are equal to the last bit, those after it are not."""
    num_bytes = byte_ids.shape[1]
    with torch.no_grad():
        before = model(byte_ids)[0]
        first = num_bytes - len(before)  # the first byte that is predicted
        for t in places:
            changed = byte_ids.clone()
            changed[0, t] = (changed[0, t] + 1) % 256
            difference = (model(changed)[0] - before).abs().amax(-1)
            num_unchanged = max(t + 1 - first, 0)
            assert (difference[:num_unchanged] == 0).all(), t
            assert (difference[num_unchanged:] > 0).all(), t


@pytest.mark.parametrize("name", EVERY)
def test_no_byte_changes_a_logit_up_to_its_own_and_every_byte_changes_all_later_ones(name):
    model = built(name)
    num_bytes = min(19, model.config.max_seq_len)
    require_no_look_ahead(model, random_bytes(1, num_bytes), list(range(num_bytes)))


@pytest.mark.parametrize("name", ["exact", "recipe_all", "three_levels_both", "flat"])
def test_no_look_ahead_in_a_long_context_from_any_place(name):
    """Seventeen places at a time, each in a row of its own: a row is compared with the same row of a batch of one shape."""
    model = build(dataclasses.replace(CASES[name], max_seq_len=256, init_std=0.1))
    byte_ids = random_bytes(1, 255).expand(17, -1)
    with torch.no_grad():
        before = model(byte_ids)
        for places in torch.arange(255).view(-1, 17):
            changed = byte_ids.clone()
            changed[range(17), places] = (changed[range(17), places] + 1) % 256
            for t, difference in zip(places.tolist(), (model(changed) - before).abs().amax(-1), strict=True):
                assert (difference[: t + 1] == 0).all(), t
                assert (difference[t + 1 :] > 0).float().mean() > 0.99 or t > 250, t


@pytest.mark.parametrize("name", EVERY)
def test_the_65536_strings_of_two_bytes_have_probability_one_together(name):
    first = torch.arange(256)
    with torch.no_grad():
        law = built(name)(torch.stack((first, first), dim=1)).double().softmax(-1)
    joint = law[0, 0][:, None] * law[:, 1]
    assert joint.numel() == 65536
    assert joint.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (law.sum(-1) - 1).abs().max() < 1e-6


# Every third length meets every place in a patch, whatever its size.
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        *(pytest.param(name, torch.bfloat16, marks=[] if name in IN_BFLOAT16 else pytest.mark.slow) for name in CASES),
    ],
)
def test_the_cache_gives_the_full_pass_at_the_lengths_of_the_context(name, dtype, every, tolerance):
    model, byte_ids = build(CASES[name]).to(dtype), random_bytes(2, CONTEXT)
    with torch.no_grad():
        full = model(byte_ids).float().log_softmax(-1)
        for length in range(0, CONTEXT, every):
            cache = model.new_cache(2, CONTEXT)
            logits = [model.prefill(byte_ids[:, :length], cache)]
            for t in range(length, min(length + model.config.patch_size + 1, CONTEXT - 1)):
                logits.append(model.step(byte_ids[:, t], cache))
            found = torch.stack(logits, 1).float().log_softmax(-1)
            torch.testing.assert_close(found, full[:, length : length + found.shape[1]], **tolerance[dtype])


@pytest.mark.parametrize("name", ["exact", "recipe_all", "three_levels", "flat", "perceiver_both"])
def test_padding_never_counts_at_any_length(name):
    model, stream = built(name), random_bytes(CONTEXT + 2).numpy().astype(np.uint8)
    streams = [stream[:length] for length in range(CONTEXT + 2)]
    for alone, together in zip(map(lambda each: score(model, each), streams), score(model, streams), strict=True):
        assert together.num_bytes == alone.num_bytes == len(together.bits)
        np.testing.assert_allclose(together.bits, alone.bits, rtol=0, atol=1e-5 * log2(np.e))


class TableModel(nn.Module):
    """A Markov chain over bytes as a model: its law of a byte depends on the byte before it alone, in its window."""

    codec_config = None

    def __init__(self, context: int) -> None:
        super().__init__()
        self.config = dataclasses.replace(CASES["flat"], max_seq_len=context)
        chance = np.random.default_rng(0)
        self.first_V = chance.dirichlet(np.ones(256))
        self.next_VV = chance.dirichlet(np.full(256, 0.1), size=256) * 0.99 + 0.01 / 256
        self.anchor = nn.Linear(1, 1)

    def measure(self, byte_ids_BT, of_logits, recompute=False):
        previous = torch.from_numpy(self.next_VV)[byte_ids_BT[:, :-1]]
        first = torch.from_numpy(self.first_V).expand(len(byte_ids_BT), 1, -1)
        return of_logits(torch.cat((first, previous), dim=1).log().float(), byte_ids_BT)

    def draw(self, num_bytes: int) -> np.ndarray:
        chance, stream = np.random.default_rng(1), np.empty(num_bytes, dtype=np.uint8)
        for t in range(num_bytes):
            stream[t] = chance.choice(256, p=self.next_VV[stream[t - 1]] if t else self.first_V)
        return stream


@pytest.mark.parametrize(("context", "hop"), [(2000, 0), (64, 0), (64, 7), (1, 1)])
def test_a_table_model_scores_its_own_bits_in_every_window(context, hop):
    model = TableModel(context)
    stream = model.draw(2000)
    result = score(model, stream, hop=hop)
    at_start = np.arange(2000) == 0 if hop not in (0, 1) else np.arange(2000) % context == 0
    p = np.where(at_start, model.first_V[stream], model.next_VV[np.roll(stream, 1), stream])
    assert result.bits_per_byte == pytest.approx(-np.log2(p).mean(), abs=1e-6)
    if context == 2000:  # and the chain's entropy is what it costs
        stationary = np.linalg.matrix_power(model.next_VV, 200)[0]
        entropy = -(stationary @ (model.next_VV * np.log2(model.next_VV)).sum(1))
        assert result.bits_per_byte == pytest.approx(entropy, rel=0.05)


def constant_model(logits_V: np.ndarray) -> MegaByte:
    """A model whose law is the same at every place: all it computes is a constant in front of its output matrix."""
    config = MegaByteConfig(levels=CASES["exact"].levels, max_seq_len=CONTEXT * 64)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        finest = model.levels[-1]
        finest.transformer.norm.bias[0] = 1.0
        finest.embedder.embedding.weight[:, 0] = torch.from_numpy(logits_V)
    return model


@pytest.mark.parametrize("num_bytes", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 50}, {"top_p": 0.9}], ids=["plain", "top_k", "top_p"])
def test_drawn_bytes_follow_the_computed_law(settings, num_bytes):
    """Pearson's test at p > 0.001 by the normal approximation of chi-square (Wilson and Hilferty)."""
    logits_V = torch.from_numpy(np.random.default_rng(0).normal(size=256)).bfloat16().float().numpy()
    config = SampleConfig(seed=1, **settings)
    made = [chunk.byte_values for chunk in Sampler(constant_model(logits_V), b"", num_bytes, config).stream()]
    counts = np.bincount(np.concatenate(made), minlength=256)
    law_V = sampling_law(logits_V, config)
    possible = law_V > 0
    assert counts.sum() == num_bytes
    assert counts[~possible].sum() == 0
    expected = num_bytes * law_V[possible]
    chi_square, freedom = ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1
    deviation = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert deviation < 3.09


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("num_samples", "num_bytes"), [(8, 32), pytest.param(64, 256, marks=pytest.mark.slow)])
def test_samples_do_not_depend_on_batch_size_and_neighbours(engine, num_samples, num_bytes, monkeypatch):
    monkeypatch.setenv("MEGABYTE_ENGINE", engine) if engine else monkeypatch.delenv("MEGABYTE_ENGINE", raising=False)
    model = build(dataclasses.replace(CASES["recipe_all"], max_seq_len=512))
    prefixes = [bytes(range(number % 11)) for number in range(num_samples)]
    settings = {"seed": 5, "temperature": 0.9, "top_p": 0.95}
    alone = [generate(model, prefix, num_bytes, **settings)[0] for prefix in prefixes]
    for batch_size in sorted({3, 8, min(32, num_samples)}):
        for first in range(0, num_samples, batch_size):
            some = prefixes[first : first + batch_size]
            beside = generate(model, [*some, b"a neighbour"], num_bytes, **settings)
            for mine, theirs in zip(alone[first : first + batch_size], beside, strict=False):
                assert np.array_equal(mine, theirs)


BAD = [
    *({"temperature": value} for value in (float("nan"), float("inf"), -float("inf"), -1.0, -1e-9, 100.1, 1e300)),
    *({"top_k": value} for value in (0, -1, 257, 1 << 40)),
    *({"top_p": value} for value in (0.0, -0.1, 1.0000001, float("nan"), float("inf"))),
    *({"seed": value} for value in (-1, 1 << 63, -(1 << 63))),
    *({"num_bytes": value} for value in (0, -1, -(10**9), 10**9, 1 << 63, 2.5, float("nan"))),
    *({"num_samples": value} for value in (0, -1, 10**9)),
    *({"prefix": value} for value in ("text", [1, 2], None, np.array([300]), np.array([0.5]), np.zeros((2, 2), np.uint8))),
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_settings_are_refused_before_anything_is_computed(options, monkeypatch):
    assert len(BAD) >= 30
    model = build(CASES["exact"])
    monkeypatch.setattr(MegaByte, "new_cache", lambda *_: pytest.fail("began to work"))
    with pytest.raises(UserError, match=r"must (lie|be)"):
        generate(model, **{"prefix": b"", "num_bytes": 4, **options})
