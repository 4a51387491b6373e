"""Perceiver AR sees no future, decodes step by step as it reads at once, and its scores and training count each byte once."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.checkpoint import load_model
from core.compare import flops_per_predicted_byte
from core.config import Config, ImageCodecConfig, PerceiverArConfig
from core.data import ByteData, Loader
from core.errors import UserError
from core.likelihood import Window, predicted_parts, score
from core.models import PerceiverAr, build_model
from core.models.loss import nll
from core.sample import generate
from core.train import lengths_read
from tests.model_cases import random_bytes
from tests.test_likelihood import stream_of
from tests.tiny_run import SEQ_LEN, TINY_MODEL, metrics, run_tiny, tiny_config

CONTEXT, LATENTS = 24, 8


def config_of(**options) -> PerceiverArConfig:
    defaults = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_latents": LATENTS, "max_seq_len": CONTEXT, "init_std": 0.2}
    return PerceiverArConfig(**defaults | options)


CASES = {"rotary": config_of(), "both": config_of(positions="both"), "dropout": config_of(dropout=0.1)}


def build(config: PerceiverArConfig) -> PerceiverAr:
    torch.manual_seed(0)
    return PerceiverAr(config).eval()


def dependence(model: PerceiverAr, num_bytes: int) -> torch.Tensor:
    """|d sum(logits[t]) / d embedding[s]| as a (t, s) table for the t that are predicted."""
    gates = torch.ones(num_bytes, 1, requires_grad=True)
    hook = model.embedding.register_forward_hook(lambda _module, _inputs, embedded: embedded * gates[: embedded.shape[1]])
    weights = torch.randn(256, generator=torch.Generator().manual_seed(3))
    logits_SV = model(random_bytes(1, num_bytes))[0]
    table = [torch.autograd.grad(logits @ weights, gates, retain_graph=True)[0][:, 0] for logits in logits_SV]
    hook.remove()
    return torch.stack(table).abs()


@pytest.mark.parametrize("num_bytes", [1, 5, LATENTS, LATENTS + 1, CONTEXT])
@pytest.mark.parametrize("name", CASES)
def test_gradient_sees_all_of_the_past_and_none_of_the_future(name, num_bytes):
    table = dependence(build(CASES[name]), num_bytes)
    num_predicted = min(num_bytes, LATENTS)
    assert table.shape == (num_predicted, num_bytes)
    past = torch.ones(num_bytes, num_bytes, dtype=torch.bool).tril(-1)[num_bytes - num_predicted :]
    assert (table[~past] == 0).all()
    assert (table[past] > 0).all()


def test_without_the_shift_the_causality_test_fails(monkeypatch):
    inputs = PerceiverAr._inputs
    monkeypatch.setattr(PerceiverAr, "_inputs", lambda self, past, first: inputs(self, past, first).roll(-1, 1))
    table = dependence(build(CASES["rotary"]), LATENTS)
    assert (table.triu() > 0).any()


@pytest.mark.parametrize("name", CASES)
def test_prefill_and_steps_equal_the_full_forward_with_the_same_latents_at_every_length(name, tolerance):
    model, byte_ids = build(CASES[name]), random_bytes(2, CONTEXT)
    with torch.no_grad():
        expected = []
        for t in range(CONTEXT):
            first = model.first_latent(t)
            assert t - LATENTS < first <= max(t - LATENTS // 2 + 1, 0)
            expected.append(model(byte_ids[:, : first + LATENTS])[:, t - first])
    expected = torch.stack(expected, dim=1)
    torch.testing.assert_close(expected[:, :LATENTS], model(byte_ids[:, :LATENTS]))
    for length in range(CONTEXT):
        cache = model.new_cache(2, CONTEXT)
        logits = [model.prefill(byte_ids[:, :length], cache)]
        logits += [model.step(byte_ids[:, t], cache) for t in range(length, CONTEXT - 1)]
        torch.testing.assert_close(torch.stack(logits, 1), expected[:, length:], **tolerance[torch.float32])


def test_rows_of_a_cache_are_prefilled_alone_and_step_together(tolerance):
    model, byte_ids = build(CASES["both"]), random_bytes(2, CONTEXT)
    together, apart = model.new_cache(2, CONTEXT), model.new_cache(2, CONTEXT)
    model.prefill(byte_ids[:, :10], together)
    for row in range(2):
        model.prefill(byte_ids[row : row + 1, :10], apart.rows(slice(row, row + 1)))
    for t in range(10, CONTEXT - 1):
        one, other = model.step(byte_ids[:, t], together), model.step(byte_ids[:, t], apart)
        torch.testing.assert_close(one, other, **tolerance[torch.float32])


def test_a_used_cache_starts_again_without_a_trace_and_a_copied_one_goes_on():
    model, byte_ids = build(CASES["rotary"]), random_bytes(1, 20)
    cache, copied = model.new_cache(1, CONTEXT), model.new_cache(1, CONTEXT)
    model.prefill(random_bytes(1, 23, seed=9), cache)
    assert torch.equal(model.prefill(byte_ids[:, :9], cache), model.prefill(byte_ids[:, :9], model.new_cache(1, CONTEXT)))
    copied.copy_from(cache)
    for t in range(9, 20):
        assert torch.equal(model.step(byte_ids[:, t], cache), model.step(byte_ids[:, t], copied))


@pytest.mark.parametrize("num_bytes", [5, LATENTS, CONTEXT])
def test_flop_count_equals_the_counted_ones(num_bytes):
    model, byte_ids = build(CASES["rotary"]), random_bytes(1, num_bytes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(byte_ids)
    # The counter knows nothing of the fused attention kernel.
    own, latents = model.config, min(num_bytes, LATENTS)
    keys = num_bytes - (latents - 1) / 2 + own.num_layers * (latents + 1) / 2
    attention = 4 * own.dim * keys * latents / num_bytes
    assert model.flops_per_byte(num_bytes) - attention == pytest.approx(counter.get_total_flops() / num_bytes, rel=1e-6)


def test_cache_bytes_and_parameters_are_those_that_are_there():
    model = build(CASES["both"])
    assert model.cache_bytes(3, 17) == model.new_cache(3, 17).num_bytes
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("window", "hop"), [(0, 0), (CONTEXT, CONTEXT), (CONTEXT, 5), (16, 16), (6, 6), (1, 1)])
def test_each_byte_is_scored_once_with_the_window_s_context(window, hop):
    model, stream = build(CASES["rotary"]), stream_of(60)
    result = score(model, stream, window=window, hop=hop)
    window, hop = window or CONTEXT, hop or LATENTS
    assert (result.window, result.hop) == (window, hop)
    done = 0
    for start in range(0, len(stream), hop):
        end = min(start + window, len(stream))
        while done < end:
            part_end = min(done + LATENTS, end)
            expected = full_bits(model, stream[start:part_end])[-(part_end - done) :]
            np.testing.assert_allclose(result.bits[done:part_end], expected, atol=1e-4)
            done = part_end
    assert done == len(stream)


def full_bits(model: PerceiverAr, stream: np.ndarray) -> np.ndarray:
    byte_ids = torch.from_numpy(stream.astype(np.int64))[None]
    with torch.no_grad():
        return nll(model, byte_ids)[0].numpy() / np.log(2)


@pytest.mark.parametrize("name", CASES)
def test_recomputation_gives_the_same_gradient(name):
    model, byte_ids = build(CASES[name]).train(), random_bytes(2, CONTEXT)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(nll(model, byte_ids, recompute).mean(), list(model.parameters())))
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-4, atol=1e-6)


def test_streams_of_unequal_length_together_score_as_each_alone():
    model = build(CASES["rotary"])
    streams = [stream_of(n, seed=n) for n in (0, 1, 3, 8, 9, 24, 33, 70)]
    for stream, result in zip(streams, score(model, streams), strict=True):
        np.testing.assert_allclose(result.bits, score(model, stream).bits, atol=1e-5)
        assert result.num_bytes == len(stream)


def test_strided_inference_is_refused():
    with pytest.raises(UserError, match="even patch size"):
        score(build(CASES["rotary"]), stream_of(8), strided=True)


def test_samples_go_on_past_the_context():
    model = build(CASES["rotary"])
    for prefix in (b"", b"abc", bytes(CONTEXT), bytes(3 * CONTEXT)):
        made = generate(model, prefix, 2 * CONTEXT, seed=1, num_samples=2)
        assert [len(sample) for sample in made] == [2 * CONTEXT] * 2
        assert (made[0] != made[1]).any()


def test_a_run_trains_saves_resumes_and_loads(tmp_path):
    config = tiny_config(config_of(max_seq_len=32, dropout=0.1))
    result = run_tiny(tmp_path, config=config, num_values=4)
    assert result.bytes_seen == 12 * 4 * LATENTS  # the bytes the loss was of
    assert result.bits_per_byte < 7.9
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["kind"] == "perceiver_ar"
    assert isinstance(load_model(tmp_path / "run"), PerceiverAr)
    again = run_tiny(tmp_path, config=config, num_values=4, resume=True)
    assert again.bits_per_byte == result.bits_per_byte
    assert metrics(tmp_path / "run")[-1]["bytes_seen"] == result.bytes_seen


def test_every_part_of_a_window_is_learned_and_validated_with_the_context_it_is_scored_with():
    model = config_of(max_seq_len=48, positions="both")
    picture = Config(name="picture", model=model, codec=ImageCodecConfig(side=4, scan_patch=2))
    text = tiny_config(config_of(max_seq_len=48))
    for config in (picture, text):
        parts = predicted_parts(Window(0, 0, 48, 0), build(config.model))
        assert lengths_read(config) == tuple(part.end for part in parts) == (8, 16, 24, 32, 40, 48)
    assert lengths_read(tiny_config(config_of(max_seq_len=48), seq_len=20)) == (8, 16, 20)
    assert lengths_read(tiny_config(TINY_MODEL)) == (SEQ_LEN,)


def test_the_flops_of_a_step_are_the_mean_over_the_lengths_read():
    config = tiny_config(config_of(max_seq_len=32))
    model = build(config.model)
    loader = Loader(
        ByteData(np.zeros(400, np.uint8), np.array([0, 400])), 32, 1, seed=0, aligned=False, lengths=lengths_read(config)
    )
    spent = []
    for step in range(2 * len(lengths_read(config))):
        byte_ids = torch.from_numpy(loader.batch(step)).long()
        with FlopCounterMode(display=False) as counter:
            predicted = model(byte_ids).shape[1]
        assert predicted == LATENTS
        spent.append(counter.get_total_flops())
    assert len(set(spent)) == 4
    assert np.mean(spent) == pytest.approx(flops_per_predicted_byte(model, config) * LATENTS, rel=0.2)


def test_a_model_without_a_kind_is_a_megabyte_and_every_kind_comes_back_from_its_json():
    old = json.loads(tiny_config().to_json())
    del old["model"]["kind"]
    assert Config.from_json(json.dumps(old)) == tiny_config()
    perceiver = tiny_config(config_of(max_seq_len=32))
    assert Config.from_json(perceiver.to_json()) == perceiver
    assert isinstance(build_model(perceiver), PerceiverAr)
    with pytest.raises(ValueError, match=r"config.model.kind='lstm' must be megabyte or perceiver_ar"):
        perceiver.with_overrides(["model.kind=lstm"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dim": 18}, "divisible by twice"),
        ({"num_latents": 3}, "num_latents=3 must be even"),
        ({"max_seq_len": 20}, "multiple of num_latents=8"),
        ({"dropout": 1.0}, "must lie in"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        config_of(**options)


def test_lengths_beyond_the_context_and_rows_at_unequal_places_are_refused():
    model = build(CASES["rotary"])
    assert model(random_bytes(2, 0)).shape == (2, 0, 256)
    with pytest.raises(ValueError, match="25 bytes exceed the model's context of 24"):
        model(random_bytes(1, 25))
    with pytest.raises(ValueError, match="24 bytes leave no room"):
        model.prefill(random_bytes(1, 24), model.new_cache(1, 24))
    with pytest.raises(ValueError, match=r"must lie in 1\.\.24"):
        model.new_cache(1, 25)
    cache = model.new_cache(2, CONTEXT)
    model.prefill(random_bytes(1, 1), cache.rows(slice(0, 1)))
    model.prefill(random_bytes(1, 2), cache.rows(slice(1, 2)))
    with pytest.raises(ValueError, match="not at one place"):
        model.step(random_bytes(2), cache)


@pytest.mark.parametrize("name", CASES)
def test_dropout_falls_on_the_branches_and_not_on_the_embeddings(name):
    model, byte_ids = build(dataclasses.replace(CASES[name], dropout=0.5)).train(), random_bytes(2, CONTEXT)
    assert not torch.equal(model(byte_ids), model(byte_ids))
    for block in [model.cross, *model.latent_transformer.blocks]:
        for linear in (block.out if block is model.cross else block.attention.out, block.ffn_out):
            torch.nn.init.zeros_(linear.weight)
    assert torch.equal(model(byte_ids), model(byte_ids))
