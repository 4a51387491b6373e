"""Samples follow the law that was asked for and depend on seed and sample number alone."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core import rows, sample
from core.config import ImageCodecConfig
from core.errors import UserError
from core.law import draw, sampling_law, uniforms
from core.likelihood import score
from core.rows import lay_out
from core.sample import SampleConfig, Sampler, generate
from tests.model_cases import CASES, CONTEXT, build


def naive_law(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """The filters by their definitions, one byte at a time."""
    if temperature == 0:
        best = max(range(256), key=lambda b: (logits[b], -b))
        return [float(b == best) for b in range(256)]
    weights = [np.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(256), key=lambda b: (-weights[b], b))[: top_k or 256]
    total, kept, mass = sum(weights[b] for b in order), [], 0.0
    for b in order:
        kept.append(b)
        mass += weights[b] / total
        if mass >= top_p:
            break
    total = sum(weights[b] for b in kept)
    return [weights[b] / total if b in kept else 0.0 for b in range(256)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 2, 40, 256]),
    top_p=st.sampled_from([1.0, 0.99, 0.5, 0.1, 1e-6]),
)
def test_filters_equal_their_definitions(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(scale=3, size=256).astype(np.float32)
    law = sampling_law(logits, SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(law, naive_law(logits.tolist(), temperature, top_k, top_p), atol=1e-6)


def test_ties_go_to_the_lower_byte():
    logits = np.zeros(256, dtype=np.float32)
    assert sampling_law(logits, SampleConfig(temperature=0)).argmax() == 0
    assert sampling_law(logits, SampleConfig(top_k=3)).nonzero()[0].tolist() == [0, 1, 2]


def test_a_million_draws_follow_the_law():
    law = sampling_law(np.random.default_rng(0).normal(size=256).astype(np.float32), SampleConfig(top_k=50, temperature=0.7))
    cumulated = law.cumsum()
    drawn = np.searchsorted(cumulated, uniforms(1, 0).random(1_000_000) * cumulated[-1], side="right")
    counts = np.bincount(drawn, minlength=256)
    assert counts[law == 0].sum() == 0
    expected = 1_000_000 * law[law > 0]
    chi_square = ((counts[law > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 85.35  # p > 0.001 at 49 degrees of freedom
    noise = uniforms(1, 0).random(100)
    assert [draw(law, u) for u in noise] == drawn[:100].tolist()


def test_a_temperature_next_to_0_takes_the_likeliest_byte_without_a_warning():
    logits = np.random.default_rng(0).normal(size=256).astype(np.float32)
    for temperature in (1e-3, 1e-300, 5e-324):
        assert sampling_law(logits, SampleConfig(temperature=temperature)).argmax() == logits.argmax()


def test_no_two_pairs_of_seed_and_sample_share_their_random_numbers():
    pairs = [(seed, number) for seed in (0, 5, 7, 5 + 7 * 2**32, 2**63 - 1) for number in (0, 1, 5, 7)]
    assert len({uniforms(*pair).random() for pair in pairs}) == len(pairs)


def test_the_largest_uniform_draws_a_possible_byte():
    law = np.zeros(256)
    law[[3, 9]] = 0.1, 0.2
    assert draw(law, np.nextafter(1.0, 0.0)) == 9
    assert draw(law, 0.0) == 3


def test_same_seed_same_bytes_whatever_else_is_sampled():
    model = build(CASES["all_rotary"])
    alone = generate(model, b"abc", 25, seed=7)[0]
    assert np.array_equal(alone, generate(model, b"abc", 25, seed=7, num_samples=4)[0])
    beside = generate(model, [b"a longer prompt", b"abc", b""], 10, seed=7)
    assert np.array_equal(alone[:10], beside[1])
    assert not np.array_equal(alone, generate(model, b"abc", 25, seed=8)[0])


def test_samples_of_one_seed_differ_and_do_not_depend_on_their_number():
    model = build(CASES["exact"])
    three, two = generate(model, b"x", 20, num_samples=3), generate(model, b"x", 20, num_samples=2)
    assert len({sample.tobytes() for sample in three}) == 3
    assert all(np.array_equal(a, b) for a, b in zip(three, two, strict=False))


def test_interleaved_streams_do_not_disturb_each_other():
    sampler = Sampler(build(CASES["cross_patch"]), b"abcde", 20, SampleConfig(seed=3))
    chunks = [[], []]
    for first, second in zip(sampler.stream(0), sampler.stream(1), strict=True):
        chunks[0].append(first.byte_values)
        chunks[1].append(second.byte_values)
    for number, mine in enumerate(chunks):
        expected = np.concatenate([chunk.byte_values for chunk in sampler.stream(number)])
        assert np.array_equal(np.concatenate(mine), expected)


@pytest.mark.parametrize("name", ["exact", "all_rotary", "flat", "three_levels"])
@pytest.mark.parametrize("prefix", [b"", b"a", b"abcd", b"abcdefghijk"])
def test_reported_bits_are_the_score_of_the_sampled_bytes(name, prefix):
    model = build(CASES[name])
    chunks = list(Sampler(model, prefix, 17, SampleConfig(temperature=0.8, top_k=60)).stream())
    made = np.concatenate([chunk.byte_values for chunk in chunks])
    whole = np.concatenate((np.frombuffer(prefix, dtype=np.uint8), made))
    bits = np.concatenate([chunk.bits for chunk in chunks])
    np.testing.assert_allclose(bits, score(model, whole).bits[len(prefix) :], atol=1e-3)


def test_chunks_end_with_the_model_s_patches():
    chunks = list(Sampler(build(CASES["exact"]), b"ab", 27, SampleConfig()).stream())
    assert [len(chunk.byte_values) for chunk in chunks] == [14, 13]


def test_chunks_grow_while_they_are_quick_and_shrink_when_they_are_slow(monkeypatch):
    model, config = build(replace(CASES["exact"], max_seq_len=512)), SampleConfig(seed=1)
    expected = generate(model, b"abcde", 251, seed=1)[0]
    now, seconds, draw_chunk = [0.0], iter((0.01, 0.01, 0.03, 0.05, 0.05, 0.05, 0.05, 0.05)), rows.TorchRow.draw

    def draw_slowly(draws: list) -> list:
        now[0] += next(seconds)
        return draw_chunk(draws)

    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(rows.TorchRow, "draw", draw_slowly)
    chunks = [chunk.byte_values for chunk in Sampler(model, b"abcde", 251, config).stream()]
    assert [len(chunk) for chunk in chunks] == [15, 32, 64, 64, 32, 16, 16, 12]
    np.testing.assert_array_equal(np.concatenate(chunks), expected)


def test_a_full_context_goes_on_from_its_last_half():
    model = build(CASES["exact"])
    config = SampleConfig(temperature=0)
    long = np.concatenate([c.byte_values for c in Sampler(model, b"start", 40, config).stream()])
    history = np.concatenate((np.frombuffer(b"start", dtype=np.uint8), long))
    again = generate(model, history[CONTEXT // 2 : CONTEXT], 10, temperature=0)[0]
    assert np.array_equal(history[CONTEXT : CONTEXT + 10], again)


def test_a_prompt_longer_than_the_context_starts_from_its_last_half():
    model = build(CASES["exact"])
    prompt = np.arange(100, dtype=np.uint8)
    assert np.array_equal(
        generate(model, prompt, 8, temperature=0)[0], generate(model, prompt[-CONTEXT // 2 :], 8, temperature=0)[0]
    )


def test_a_picture_model_does_not_go_beyond_its_picture():
    model = build(CASES["exact"])
    model.codec_config = ImageCodecConfig(side=4)
    assert len(generate(model, b"abc", CONTEXT - 3)[0]) == CONTEXT - 3
    with pytest.raises(UserError, match="ask for at most 29"):
        generate(model, b"abc", CONTEXT - 2)


def test_closing_a_stream_leaves_no_mode_behind():
    stream = Sampler(build(CASES["exact"]), b"", 30, SampleConfig()).stream()
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_k": 257},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_settings_out_of_range_are_refused_with_the_range(options):
    with pytest.raises(UserError, match=f"{next(iter(options))}=.* must lie"):
        SampleConfig(**options)


@pytest.mark.parametrize("prefix", [np.array([300, 1]), np.zeros((2, 2), np.uint8), "text", [1, 2]])
def test_a_prefix_that_is_no_bytes_is_refused(prefix):
    with pytest.raises(UserError, match="must be bytes or a one-dimensional uint8 array"):
        generate(build(CASES["exact"]), prefix, 3)


def test_nothing_to_make_is_refused():
    model = build(CASES["exact"])
    for options in ({"num_bytes": 0}, {"num_bytes": -5}, {"num_bytes": 3, "num_samples": 0}):
        with pytest.raises(UserError, match=r"must lie in 1\.\."):
            generate(model, b"", **options)


def test_laying_out_the_weights_changes_none_of_them():
    model = build(CASES["recipe_all"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate(model, b"", 3)
    lay_out(model)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    lay_out(model)
    assert places == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.levels[0].transformer.blocks[0].ffn_in.weight.mul_(2)
    assert torch.equal(
        model.levels[0].transformer.blocks[0].ffn_in.weight, 2 * before["levels.0.transformer.blocks.0.ffn_in.weight"]
    )


def test_samples_side_by_side_wait_until_their_prefix_is_read(monkeypatch):
    sampler = Sampler(build(CASES["exact"]), b"abcd", 8, SampleConfig())
    alone = [np.concatenate([chunk.byte_values for chunk in sampler.stream(number)]) for number in range(2)]
    slow = Sampler(sampler.model, b"abcd", 8, SampleConfig())
    maker_of_rows = sample._maker_of_rows

    def slow_row(new_row, *arguments):
        row = new_row(*arguments)
        read = row.read
        row.read = lambda history: (time.sleep(0.05), read(history))
        return row

    monkeypatch.setattr(sample, "_maker_of_rows", lambda *made_of: partial(slow_row, maker_of_rows(*made_of)))
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(lambda n=n: [chunk.byte_values for chunk in slow.stream(n)]) for n in range(2)]
    for stream, expected in zip(streams, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(stream.result()), expected)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_the_number_of_threads_is_afterwards_what_it_was(monkeypatch):
    monkeypatch.setenv("MEGABYTE_ENGINE", "torch")
    model = build(CASES["exact"])
    generate(model, b"ab", 5)
    assert torch.get_num_threads() == 3

    # Two rows at once, of which the second begins while the first is at work.
    step, is_first_inside, is_second_inside = model.step, threading.Event(), threading.Event()

    def wait_for_the_other(*arguments):
        is_second_inside.set() if is_first_inside.is_set() else is_first_inside.set()
        assert is_second_inside.wait(10)
        return step(*arguments)

    def made_in_a_thread() -> int:
        generate(model, b"abcd", 3)  # whole patches, so the first step is that of a draw
        return torch.get_num_threads()

    monkeypatch.setattr(model, "step", wait_for_the_other)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(made_in_a_thread)
        assert is_first_inside.wait(10)
        second = pool.submit(made_in_a_thread)
        assert (first.result(), second.result()) == (3, 3)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


def test_a_forked_process_draws_without_the_threads_of_its_parent(monkeypatch):
    monkeypatch.setenv("MEGABYTE_ENGINE", "torch")
    generate(build(CASES["exact"]), b"ab", 1)  # begins a thread, which the child will lack
    child = multiprocessing.get_context("fork").Process(target=_draw_nothing, daemon=True)
    child.start()
    child.join(10)
    assert child.exitcode == 0


def _draw_nothing() -> None:
    with rows._one_thread():
        pass


@pytest.mark.usefixtures("three_threads")
def test_a_thread_that_begins_while_a_row_is_drawn_has_the_usual_number_of_threads(monkeypatch):
    monkeypatch.setenv("MEGABYTE_ENGINE", "torch")
    model, found = build(CASES["exact"]), []
    step = model.step
    with ThreadPoolExecutor(1) as pool:

        def step_beside_a_new_thread(*arguments):
            found.append((torch.get_num_threads(), pool.submit(torch.get_num_threads).result()))
            return step(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(model, "step", step_beside_a_new_thread)
            generate(model, b"abcd", 3)
        assert set(found) == {(1, 3)}
        pool.submit(generate, model, b"ab", 5).result()
        assert pool.submit(torch.get_num_threads).result() == 3
    assert torch.get_num_threads() == 3
