"""Scores are the model's own law, in bits, whatever the windows."""

import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from app.service import Service
from core import likelihood
from core.config import AudioCodecConfig, ImageCodecConfig, LevelConfig, MegaByteConfig
from core.errors import UserError
from core.kernels import attention, has_onednn
from core.likelihood import context_sizes, score, split_windows
from core.models import build_model, loss
from core.models.packed import products_of
from tests.model_cases import CASES, CONTEXT, PATCH, build
from tests.tiny_run import tiny_config


def stream_of(num_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def naive_bits(model, stream: np.ndarray, start: int, t: int) -> float:
    """-log2 p(byte t | bytes start..t), by one forward pass of its own."""
    with torch.no_grad():
        logits = model(torch.from_numpy(stream[start : t + 1].astype(np.int64))[None])[0, -1].double()
    return -logits.log_softmax(-1)[int(stream[t])].item() / np.log(2)


def test_uniform_model_gives_eight_bits():
    model = build(CASES["exact"])
    torch.nn.init.zeros_(model.levels[-1].embedder.embedding.weight)
    result = score(model, stream_of(100))
    assert result.bits_per_byte == pytest.approx(8.0, abs=1e-6)
    assert (result.num_bytes, result.total_bits) == (100, pytest.approx(800.0, abs=1e-4))


@pytest.mark.parametrize(("window", "hop"), [(32, 32), (32, 8), (32, 5), (16, 16), (20, 3), (1, 1)])
def test_each_byte_is_scored_once_with_the_window_s_context(window, hop):
    model, stream = build(CASES["exact"]), stream_of(75)
    result = score(model, stream, window=window, hop=hop)
    for t in range(len(stream)):
        start = next(start for start in range(0, len(stream), hop) if t < start + window)
        assert result.bits[t] == pytest.approx(naive_bits(model, stream, start, t), abs=1e-4)
    assert result.total_bits == pytest.approx(float(result.bits.astype(np.float64).sum()), abs=1e-9)


@pytest.mark.parametrize("num_bytes", [0, 1, 31, 32, 33, 64, 75])
def test_windows_cover_every_byte_exactly_once(num_bytes):
    for window, hop in [(32, 32), (32, 7), (5, 5), (5, 1)]:
        windows = list(split_windows(num_bytes, window, hop))
        covered = [t for w in windows for t in range(w.first_scored, w.end)]
        assert covered == list(range(num_bytes))
        assert all(w.end - w.start <= window for w in windows)


def test_a_smaller_hop_never_takes_context_away():
    windows = list(split_windows(1000, 32, 8))
    assert all(w.first_scored - w.start >= 32 - 8 for w in windows[1:])


@pytest.mark.parametrize("name", ["exact", "all_rotary"])
@pytest.mark.parametrize("hop", [CONTEXT, 12])
def test_strided_takes_each_byte_from_the_pass_that_has_it_in_a_first_half(name, hop):
    model, stream = build(CASES[name]), stream_of(CONTEXT + 11)
    result = score(model, stream, strided=True, hop=hop)
    half = PATCH // 2
    for t in range(len(stream)):
        start = next(start for start in range(0, len(stream), hop) if t < start + CONTEXT)
        in_window = t - start
        from_second = in_window >= PATCH and in_window % PATCH >= half
        first_byte = start + half if from_second else start
        assert result.bits[t] == pytest.approx(naive_bits(model, stream, first_byte, t), abs=1e-4)


def test_strided_gives_more_than_half_a_patch_of_local_context_nowhere():
    model, stream = build(CASES["exact"]), stream_of(CONTEXT)
    basic, strided = score(model, stream), score(model, stream, strided=True)
    in_first_half = np.arange(CONTEXT) % PATCH < PATCH // 2
    np.testing.assert_allclose(basic.bits[in_first_half], strided.bits[in_first_half], atol=1e-5)
    assert (basic.bits[PATCH:][~in_first_half[PATCH:]] != strided.bits[PATCH:][~in_first_half[PATCH:]]).all()


def test_many_streams_together_score_as_each_alone():
    model = build(CASES["all_rotary"])
    streams = [stream_of(n, seed=n) for n in (0, 1, 3, 32, 33, 70, 5)]
    together = score(model, streams)
    for stream, result in zip(streams, together, strict=True):
        np.testing.assert_allclose(result.bits, score(model, stream).bits, atol=1e-5)
        assert result.num_bytes == len(stream)


def test_no_bytes_have_no_rate_and_one_byte_has_the_first_law():
    model = build(CASES["exact"])
    assert score(model, b"").bits_per_byte is None
    assert score(model, b"").total_bits == 0.0
    first = model.prefill(torch.zeros(1, 0, dtype=torch.int64), model.new_cache(1, 8))[0].double().log_softmax(-1)
    assert score(model, b"\x07").total_bits == pytest.approx(-first[7].item() / np.log(2), abs=1e-5)


def test_only_counted_bytes_enter_the_totals():
    model, stream = build(CASES["exact"]), stream_of(64)
    counted = np.arange(64) >= 20
    result = score(model, stream, counted=counted)
    assert result.num_bytes == 44
    assert result.total_bits == pytest.approx(float(result.bits[counted].astype(np.float64).sum()))
    assert len(result.bits) == 64


def test_progress_reports_every_byte():
    done = []
    score(build(CASES["exact"]), [stream_of(50), stream_of(7)], progress=done.append)
    assert sum(done) == 57


def test_progress_is_called_before_each_layer_and_can_end_a_window():
    model, steps = build(CASES["exact"]), []
    num_layers = sum(level.num_layers for level in model.config.levels)
    score(model, stream_of(CONTEXT), progress=steps.append)
    assert steps == [0] * num_layers + [CONTEXT]

    def stop(num_bytes: int) -> None:
        steps.append(num_bytes)
        raise InterruptedError

    steps.clear()
    with pytest.raises(InterruptedError):
        score(model, stream_of(CONTEXT), progress=stop)
    score(model, stream_of(CONTEXT))  # nothing of it is left
    assert steps == [0]


@pytest.mark.parametrize("stream", [np.array([300, 1]), np.array([0.5]), np.zeros((2, 2), np.uint8), "text", [1, 2]])
def test_a_stream_that_is_no_bytes_is_refused(stream):
    with pytest.raises(UserError, match="must be bytes or a one-dimensional uint8 array"):
        score(build(CASES["exact"]), stream)


def test_a_model_just_built_scores_without_dropout():
    config = tiny_config()
    assert config.model.dropout > 0
    model = build_model(config)
    assert score(model, stream_of(20)).total_bits == score(model, stream_of(20)).total_bits


def test_windows_that_do_not_fit_are_refused():
    model = build(CASES["exact"])
    for options, sentence in [
        ({"window": 33}, "window=33 bytes must lie in 1..32"),
        ({"window": 16, "hop": 17}, "hop=17 bytes must lie in 1..16"),
        ({"hop": -1}, "hop=-1"),
    ]:
        with pytest.raises(UserError, match=sentence):
            score(model, stream_of(10), **options)
    model.codec_config = ImageCodecConfig(side=4)
    with pytest.raises(UserError, match="whole pictures"):
        score(model, stream_of(32), hop=8)
    with pytest.raises(UserError, match="strided inference needs text or sound"):
        score(model, stream_of(32), strided=True)
    model.codec_config = AudioCodecConfig()
    assert score(model, stream_of(32), strided=True).strided


@pytest.mark.parametrize("options", [{}, {"hop": 12}, {"strided": True}])
def test_details_are_the_law_of_each_byte(options):
    model, stream = build(CASES["exact"]), stream_of(75)
    plain, detailed = score(model, stream, **options), score(model, stream, detailed=True, **options)
    assert plain.expected is None
    np.testing.assert_allclose(detailed.bits, plain.bits, atol=1e-4)
    expected = detailed.expected
    assert (expected.rank.dtype, expected.entropy.dtype) == (np.uint8, np.float16)
    if "strided" in options:  # each byte's law comes from the same pass as its bits
        own = (expected.likeliest == stream[:, None]).argmax(axis=1)[expected.rank < 5]
        bits = expected.likeliest_bits[expected.rank < 5, own]
        np.testing.assert_allclose(bits, detailed.bits[expected.rank < 5], atol=1e-2)
        return
    context = context_sizes(len(stream), CONTEXT, options.get("hop", CONTEXT))
    for t in (0, 1, CONTEXT - 1, CONTEXT, 74):
        with torch.no_grad():
            logits = model(torch.from_numpy(stream[t - context[t] : t + 1].astype(np.int64))[None])[0, -1].double()
        log_p = logits.log_softmax(-1).numpy() / np.log(2)
        assert expected.rank[t] == (log_p > log_p[stream[t]]).sum()
        assert expected.entropy[t] == pytest.approx(-(2.0**log_p * log_p).sum(), abs=5e-3)
        assert expected.likeliest[t].tolist() == np.argsort(-log_p)[:5].tolist()
        np.testing.assert_allclose(expected.likeliest_bits[t], np.sort(-log_p)[:5], atol=1e-2)


def test_a_byte_that_was_expected_most_has_rank_zero_and_is_the_likeliest():
    expected = score(build(CASES["exact"]), stream_of(600), detailed=True).expected
    stream = stream_of(600)
    assert ((expected.rank == 0) == (expected.likeliest[:, 0] == stream)).all()
    in_five = (expected.likeliest == stream[:, None]).any(axis=1)
    assert (in_five == (expected.rank < 5)).all()


@pytest.mark.parametrize(("window", "hop"), [(32, 32), (32, 8), (20, 3)])
def test_context_is_what_the_window_of_a_byte_held_before_it(window, hop):
    for t, size in enumerate(context_sizes(75, window, hop)):
        start = next(start for start in range(0, 75, hop) if t < start + window)
        assert size == t - start


_SLOW = [pytest.param(sample, marks=pytest.mark.slow) for sample in ("lake.png", "vowels.wav")]


@pytest.mark.parametrize("sample", ["lamp.txt", *_SLOW])
def test_bf16_moves_the_bits_of_the_shipped_models_by_less_than_a_thousandth(sample, monkeypatch):
    service, path = Service(), Path(__file__).parents[1] / "app/samples" / sample
    rates = {}
    for multiplies_bf16 in (False, True):
        # Any processor can multiply bf16, if slowly.
        monkeypatch.setattr(likelihood, "multiplies_bf16", lambda wanted=multiplies_bf16: wanted)
        result = service.score_file(path)
        rates[result.engine] = result.bits_per_byte
    assert rates.keys() == {"torch-fp32", "torch-bf16"}
    # On 776 bytes: 1 to 5 parts in 10,000, by the processor's order of summation.
    assert rates["torch-bf16"] == pytest.approx(rates["torch-fp32"], rel=1e-3)


def test_the_engine_follows_from_processor_width_and_setting(monkeypatch):
    narrow = build(CASES["exact"])
    wide = build(MegaByteConfig(levels=(LevelConfig(dim=64, num_layers=1, num_heads=1, ffn_dim=256),), max_seq_len=8))
    monkeypatch.delenv("MEGABYTE_ENGINE", raising=False)
    for multiplies_bf16, engine in ((True, "torch-bf16"), (False, "torch-fp32")):
        monkeypatch.setattr(likelihood, "multiplies_bf16", lambda wanted=multiplies_bf16: wanted)
        assert score(wide, b"ab").engine == engine
        assert score(narrow, b"ab").engine == "torch-fp32"
    monkeypatch.setattr(likelihood, "multiplies_bf16", lambda: True)
    monkeypatch.setenv("MEGABYTE_ENGINE", "torch")
    assert score(wide, b"ab").engine == "torch-fp32"


@pytest.mark.parametrize("multiplies_bf16", [False, True])
def test_a_long_score_lays_its_weights_out_once(multiplies_bf16, monkeypatch):
    if not has_onednn(torch.bfloat16 if multiplies_bf16 else torch.float32):
        pytest.skip("oneDNN has no such products on this processor")
    model = build(MegaByteConfig(levels=(LevelConfig(dim=64, num_layers=1, num_heads=1, ffn_dim=256),), max_seq_len=8))
    monkeypatch.delenv("MEGABYTE_ENGINE", raising=False)
    monkeypatch.setattr(likelihood, "multiplies_bf16", lambda: multiplies_bf16)
    made = []
    monkeypatch.setattr(likelihood, "products_of", lambda *args: made.append(products_of(*args)) or made[-1])
    packed = score(model, stream_of(10_000)).bits
    assert [len(products._packed) for products in made] == [5]
    score(model, stream_of(10_000))
    assert (made[0] is made[1]) == multiplies_bf16
    with torch.no_grad():
        model.levels[0].transformer.blocks[0].ffn_in.weight.mul_(-1)
    changed = score(model, stream_of(10_000)).bits
    assert made[2] is not made[1]
    with torch.no_grad():
        model.levels[0].transformer.blocks[0].ffn_in.weight.mul_(-1)
    assert not np.allclose(changed, packed, atol=1e-3)
    monkeypatch.setattr(likelihood, "products_of", lambda *_: nullcontext())
    np.testing.assert_allclose(score(model, stream_of(10_000)).bits, packed, atol=1e-3)


def test_a_score_that_waits_for_its_kernels_can_be_ended(monkeypatch):
    model = build(MegaByteConfig(levels=(LevelConfig(dim=64, num_layers=1, num_heads=1, ffn_dim=256),), max_seq_len=8))
    monkeypatch.delenv("MEGABYTE_ENGINE", raising=False)
    monkeypatch.setattr(likelihood, "multiplies_bf16", lambda: True)
    is_over = threading.Event()
    monkeypatch.setattr(attention, "library", lambda: is_over.wait(20) and None)

    def end(_: int) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        score(model, b"ab", progress=end)
    is_over.set()
    assert time.monotonic() - started < 10


def test_a_stream_of_many_chunks_scores_as_one_forward_pass(monkeypatch):
    monkeypatch.setitem(loss._CHUNK_BYTES, "cpu", 4)
    model, stream = build(CASES["all_rotary"]), stream_of(CONTEXT)
    byte_ids = torch.from_numpy(stream.astype(np.int64))[None]
    with torch.no_grad():
        expected = loss.nll_of_logits(model(byte_ids), byte_ids)[0].numpy() / np.log(2)
    np.testing.assert_allclose(score(model, stream).bits, expected, atol=1e-4)
    detailed = score(model, stream, detailed=True)
    np.testing.assert_allclose(detailed.bits, expected, atol=1e-4)
