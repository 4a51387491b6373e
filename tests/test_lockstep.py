"""Rows in lockstep: the model's own steps, the sampler's own bytes, and no trace of the neighbours."""

import gc

import numpy as np
import pytest
import torch

from core import lockstep, native
from core.config import LevelConfig, MegaByteConfig
from core.law import SampleConfig, draw, sampling_law, surprisal, uniforms
from core.likelihood import score
from core.lockstep import Job, Lockstep, bf16_copy
from core.models import MegaByte
from core.sample import Request, Sampler, generate, stream_batch
from tests.forced_rows import logits_in_rows
from tests.model_cases import CASES, CONTEXT, build, random_bytes

SETTINGS = [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.9}]


def job(prefix: bytes, num_bytes: int, number: int = 0, **settings) -> Job:
    config = SampleConfig(seed=4, **settings)
    return Job(np.frombuffer(prefix, dtype=np.uint8), num_bytes, config, uniforms(config.seed, number))


def made_by(batch: Lockstep, jobs: list[Job]) -> list[tuple[np.ndarray, np.ndarray]]:
    chunks: list[list] = [[] for _ in jobs]
    for index, chunk in batch.run(jobs):
        chunks[index].append(chunk)
    return [tuple(np.concatenate([getattr(c, name) for c in mine]) for name in ("byte_values", "bits")) for mine in chunks]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_model_s_steps_in_rows_of_unequal_length(name, tolerance):
    torch.testing.assert_close(*logits_in_rows(build(CASES[name]), random_bytes(3, CONTEXT)), **tolerance[torch.float32])


@pytest.mark.parametrize("name", ["exact", "recipe_all", "three_levels", "flat"])
def test_bytes_are_those_of_the_sampler(name, monkeypatch):
    monkeypatch.setenv("MEGABYTE_ENGINE", "torch")
    model = build(CASES[name])
    prefixes = [b"", b"a", b"abcd", b"abcdefghijk", bytes(range(60))]
    # More jobs than rows, of unequal length, some longer than the context.
    jobs = [job(prefix, 5 + 9 * i, number=i, **SETTINGS[i]) for i, prefix in enumerate(prefixes)]
    for (byte_values, bits), each, prefix in zip(made_by(Lockstep(model, 2, CONTEXT), jobs), jobs, prefixes, strict=True):
        number = prefixes.index(prefix)
        chunks = list(Sampler(model, prefix, each.num_bytes, each.config).stream(number))
        assert np.array_equal(byte_values, np.concatenate([chunk.byte_values for chunk in chunks]))
        np.testing.assert_allclose(bits, np.concatenate([chunk.bits for chunk in chunks]), atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("natively", [False, True])
def test_the_drawn_byte_is_that_of_the_python_law(settings, natively):
    config = SampleConfig(**settings)
    batch = Lockstep(build(CASES["exact"]), 64, CONTEXT)
    if natively and not batch.draws_natively:
        pytest.skip("there is no C++ compiler")
    batch.draws_natively = natively
    logits_BV = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 3
    logits_BV[:8] = logits_BV[:8].round()  # with many equal values
    noise = uniforms(2, 0).random(64)
    jobs = [(row, row, Job(np.zeros(0, np.uint8), 1, config, uniforms(0, 0)), 0) for row in range(64)]
    batch._load([0] * 64, np.full((64, batch.round_size), -1), jobs, 1)
    given_B1 = torch.full((64, 1), -1)
    given_B1[5] = 77
    drawn_B1, bits_B1 = batch._choose(logits_BV, torch.from_numpy(noise)[:, None], given_B1)
    expected = [draw(sampling_law(logits_V.numpy(), config), uniform) for logits_V, uniform in zip(logits_BV, noise, strict=True)]
    expected[5] = 77
    assert drawn_B1[:, 0].tolist() == expected
    expected = [surprisal(logits_BV[row].numpy(), int(drawn_B1[row])) for row in range(64)]
    np.testing.assert_allclose(bits_B1[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["recipe_all", "three_levels_both"])
def test_a_row_does_not_depend_on_its_neighbours(name):
    model = bf16_copy(build(CASES[name]))
    wanted = job(b"abcdef", 20, number=1, top_p=0.95)
    alone = made_by(Lockstep(model, 16, CONTEXT), [wanted])[0]
    for neighbours in ([job(b"x" * 27, 70, number=3)], [job(b"", 5, number=i, temperature=0.5) for i in range(40)]):
        jobs = [*neighbours, job(b"abcdef", 20, number=1, top_p=0.95)]
        beside = made_by(Lockstep(model, 16, CONTEXT), jobs)[-1]
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(alone, beside, strict=True))


def test_the_sort_for_filters_changes_no_bit_of_those_without(monkeypatch):
    model = build(CASES["recipe_all"])
    monkeypatch.setattr(native, "can_draw", lambda: False)
    plain, sorting = (made_by(Lockstep(model, 2, CONTEXT, has_filters=has), [job(b"ab", 25)])[0] for has in (False, True))
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(plain, sorting, strict=True))


def test_slots_that_only_longer_neighbours_need_change_no_bit():
    config = CASES["exact"]
    long = type(config)(levels=config.levels, max_seq_len=2048, init_std=0.2)
    model = bf16_copy(build(long))
    alone = made_by(Lockstep(model, 4, 2048), [job(b"abcd", 40)])[0]
    beside = made_by(Lockstep(model, 4, 2048), [job(bytes(1500), 80, number=1), job(b"abcd", 40)])[1]
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(alone, beside, strict=True))


@pytest.mark.parametrize("cache_len", [24, 60, 100, 400, 1000])
def test_the_room_for_longer_samples_changes_no_bit(cache_len):
    config = CASES["exact"]
    model = bf16_copy(build(type(config)(levels=config.levels, max_seq_len=2048, init_std=0.2)))
    wanted, found = (made_by(Lockstep(model, 4, room), [job(b"abcd", 20)])[0] for room in (2048, cache_len))
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(wanted, found, strict=True))


def test_bf16_rows_follow_nearly_the_float32_law():
    model = build(CASES["recipe_all"])
    made = made_by(Lockstep(bf16_copy(model), 16, CONTEXT), [job(b"", CONTEXT, number=i) for i in range(16)])
    bits = np.concatenate([bits for _, bits in made])
    exact = np.concatenate([score(model, byte_values).bits for byte_values, _ in made])
    assert bits.mean() == pytest.approx(exact.mean(), rel=0.01)


def test_the_engine_of_the_environment_makes_the_batch(monkeypatch):
    monkeypatch.setenv("MEGABYTE_ENGINE", "torch-bf16")
    model = build(CASES["recipe_all"])
    sampler = Sampler(model, b"abc", 20, SampleConfig(seed=7))
    assert sampler.engine == "torch-bf16"
    alone = np.concatenate([chunk.byte_values for chunk in sampler.stream(2)])
    assert np.array_equal(alone, generate(model, [b"other", b"abc"], 20, seed=7, num_samples=3)[5])
    requests = [Request(b"abc", 20, SampleConfig(seed=7), 2), Request(b"", 90, SampleConfig(temperature=0.3))]
    first = [chunk.byte_values for index, chunk in stream_batch(model, requests) if index == 0]
    assert np.array_equal(alone, np.concatenate(first))


def test_closing_ends_the_work_and_leaves_no_mode_behind():
    chunks = Lockstep(build(CASES["exact"]), 2, CONTEXT).run([job(b"", 30), job(b"ab", 30)])
    next(chunks)
    assert not torch.is_inference_mode_enabled()
    chunks.close()
    assert list(chunks) == []


@pytest.mark.parametrize("num_bytes", [100, 417])
def test_a_long_neighbour_changes_no_bit(num_bytes, monkeypatch):
    """Its cache is longer, and so are the sums of attention over masked slots."""
    monkeypatch.setenv("MEGABYTE_ENGINE", "torch-bf16")
    levels = (LevelConfig(dim=256, num_layers=2, num_heads=4, patch_size=4), LevelConfig(dim=128, num_layers=1, num_heads=2))
    model = build(MegaByteConfig(levels=levels, max_seq_len=8192, positions="rotary", init_std=0.1))
    noise = np.random.default_rng(0)

    def request(length: int, number: int) -> Request:
        return Request(noise.integers(0, 256, length, dtype=np.uint8), 40, SampleConfig(seed=3), number)

    def bits_of_first(requests: list[Request]) -> np.ndarray:
        return np.concatenate([chunk.bits for index, chunk in stream_batch(model, requests) if index == 0])

    own = request(num_bytes, 0)
    alone = bits_of_first([own])
    for length in (700, 3001):
        assert np.array_equal(bits_of_first([own, request(length, 1)]), alone)


@pytest.fixture
def counted(monkeypatch):
    """How often prefixes are read and engines made."""
    counts = {"read": 0, "made": 0}

    def counting(name, function):
        def run(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        return run

    monkeypatch.setenv("MEGABYTE_ENGINE", "torch-bf16")
    monkeypatch.setattr(MegaByte, "read_patches", counting("read", MegaByte.read_patches))
    monkeypatch.setattr(Lockstep, "__init__", counting("made", Lockstep.__init__))
    return counts


def test_a_shared_prefix_is_read_once(counted):
    model = build(CASES["recipe_all"])
    prefixes = [b"abcdefgh", b"ijklmnop"] * 20  # more than rows, and not one after another
    made = generate(model, prefixes, 5, seed=1)
    assert counted == {"read": 2, "made": 1}
    assert np.array_equal(made[0], made[38])


@pytest.mark.parametrize("natively", [False, True])
def test_an_engine_serves_one_completion_after_another(counted, natively, monkeypatch):
    if natively and not native.can_draw():
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(native, "can_draw", lambda: natively)
    model, num_made = build(CASES["recipe_all"]), 1 if natively else 2  # torch sorts for filters alone
    first = generate(model, b"abcdefgh", 5, seed=1)[0]
    assert np.array_equal(first, generate(model, b"abcdefgh", 5, seed=1)[0])
    assert counted == {"read": 1, "made": 1}
    generate(model, b"abcdefgh", 5, top_k=3)
    assert counted["made"] == num_made
    with torch.no_grad():
        model.levels[0].pad.add_(1)
    generate(model, b"abcdefgh", 5, top_k=3)
    assert counted == {"read": num_made + 1, "made": num_made + 1}


def test_completions_at_the_same_time_have_engines_of_their_own(counted):
    model = build(CASES["recipe_all"])
    config = SampleConfig(seed=1)
    alone = [np.concatenate([c.byte_values for c in Sampler(model, b"ab", 60, config).stream(n)]) for n in (0, 1)]
    streams = [Sampler(model, b"ab", 60, config).stream(n) for n in (0, 1)]
    parts = [[chunk.byte_values for chunk in pair] for pair in zip(*streams, strict=True)]
    assert counted["made"] == 2
    assert all(np.array_equal(alone[n], np.concatenate([pair[n] for pair in parts])) for n in (0, 1))


@pytest.mark.parametrize(("lengths", "num_bytes"), [([5, 3], 8), ([5, 21], 24), ([5, 21, 9], 24), ([30, 5, 9, 9], 32)])
def test_a_round_ends_where_a_row_is_free_or_all_are_done(lengths, num_bytes, monkeypatch):
    batch, phases = Lockstep(build(CASES["exact"]), 2, CONTEXT), []
    monkeypatch.setattr(batch, "make_byte", phases.append)
    assert batch.patch_size == 4
    for _ in batch.run([job(b"", length) for length in lengths]):
        pass
    assert len(phases) == num_bytes


def test_a_job_of_no_bytes_takes_none_from_its_neighbours():
    jobs = [job(b"abcdef", 9), job(b"abcd", 0), job(b"xy", 5)]
    batch = Lockstep(build(CASES["exact"]), 2, CONTEXT)
    assert [len(byte_values) for byte_values, _ in made_by(batch, jobs)] == [9, 0, 5]


def test_rounds_grow_while_they_are_short_and_begin_again_with_a_job(monkeypatch):
    monkeypatch.setitem(lockstep._ROUND_BYTES, "cpu", (4, 16))
    monkeypatch.setattr(lockstep, "_ROUND_S", 1e9)
    batch = Lockstep(build(CASES["exact"]), 1, CONTEXT)
    sizes = [(index, len(chunk.byte_values)) for index, chunk in batch.run([job(b"", 28), job(b"", 6)])]
    assert sizes == [(0, 4), (0, 8), (0, 16), (1, 4), (1, 2)]
    monkeypatch.setattr(lockstep, "_ROUND_S", 0.0)
    assert [len(chunk.byte_values) for _, chunk in batch.run([job(b"", 12)])] == [4, 4, 4]


def test_a_copy_shares_what_is_bfloat16_already():
    model = build(CASES["exact"])
    assert {p.dtype for p in bf16_copy(model).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.bfloat16()
    mine = dict(model.named_parameters())
    assert all(p.data_ptr() == mine[name].data_ptr() for name, p in bf16_copy(model).named_parameters())


def test_an_engine_goes_with_its_model(counted):
    model = build(CASES["recipe_all"])
    generate(model, b"ab", 3)
    gc.collect()
    kept = len(lockstep._idle)
    del model
    gc.collect()
    assert len(lockstep._idle) == kept - 1
