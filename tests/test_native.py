"""The native engine: torch's logits, and torch itself wherever the engine cannot run."""

import contextlib
import functools
import gc
import os
import platform
import resource
import shutil
import stat
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from core import kernels, native, sample
from core.config import LevelConfig, MegaByteConfig
from core.errors import UserError
from core.law import draw, sampling_law, surprisal, uniforms
from core.likelihood import score
from core.models import MegaByte
from core.rows import NativeRow, lay_out
from core.sample import Request, SampleConfig, Sampler, generate, next_byte_law, num_at_once, stream_batch
from tests.model_cases import CASES, CONTEXT, RECIPE, build, random_bytes, two_level

# Sums in another order, and an exponential of its own.
LOGITS = {"rtol": 0.0, "atol": 1e-4}
MAX_KL = 1e-9  # nats
NOTHING = np.zeros(0, dtype=np.uint8)

SUPPORTED = {
    name: config
    for name, config in CASES.items()
    if len(config.levels) <= 2 and not any(level.conv_kernels for level in config.levels)
}
UNSUPPORTED = sorted(CASES.keys() - SUPPORTED.keys())
SUPPORTED["all_supported"] = two_level(global_byte_dim=5, local_cross_patch=3, unembedder="full", real_previous=True, **RECIPE)
# Widths and heads that fill neither a panel nor a vector, as image32's head of 288 / 4, and more rows than one panel.
SUPPORTED["uneven_widths"] = MegaByteConfig(
    levels=(
        LevelConfig(dim=144, num_layers=2, num_heads=2, patch_size=6),
        LevelConfig(dim=100, num_layers=1, num_heads=2, ffn_dim=131, cross_patch=5),
    ),
    max_seq_len=36,
    positions="both",
    real_previous=True,
    init_std=0.1,
)


@pytest.fixture(autouse=True)
def _default_engine(monkeypatch):
    monkeypatch.delenv("MEGABYTE_ENGINE", raising=False)


@pytest.fixture
def has_compiler():
    """Skips where there is none."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("there is no C++ compiler, so there is no native engine to test")


@pytest.fixture
def build_for(has_compiler, tmp_path_factory, monkeypatch):
    """Lets the engine be built for another x86 processor, until the end of the test."""

    def choose(processor: str) -> None:
        monkeypatch.setattr(kernels, "_FLAGS", [flag.replace("native", processor) for flag in kernels._FLAGS])
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "native"))
        native.library.cache_clear()

    if platform.machine() != "x86_64":
        pytest.skip("the processors with vectors of two widths are x86 ones")
    yield choose
    native.library.cache_clear()


@pytest.fixture(params=["this processor", pytest.param("AVX2", marks=pytest.mark.slow)])
def engine(request, has_compiler):
    """With vectors as wide as they are here, and of 32 bytes; skips where it cannot be built."""
    if platform.machine() == "x86_64" and "avx2" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this x86 processor has no AVX2, so torch makes the bytes")
    if request.param == "AVX2":
        request.getfixturevalue("build_for")("x86-64-v3")
        assert native.library().num_lanes() == 8
    assert native.library() is not None


@pytest.mark.slow
def test_an_x86_processor_without_avx2_leaves_the_work_to_torch(build_for):
    build_for("x86-64-v2")
    assert native.library() is None
    assert kernels.build_library(native._SOURCE).exists()


def rounded(config: MegaByteConfig, seed: int = 0) -> MegaByte:
    """A random model that bf16 holds exactly, biases and all, as an exported one."""
    model = build(config, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05 if parameter.ndim == 1 else 0)
            parameter.copy_(parameter.bfloat16())
    return model


def laws(logits_TV: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(logits_TV)).double().log_softmax(-1)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_equal_torch_s_after_any_prompt(name):
    model = rounded(SUPPORTED[name])
    decoder = native.compile_model(model)
    context, patch_size = model.config.max_seq_len, model.config.patch_size
    byte_ids = random_bytes(context)
    for num_prompt in range(3 * patch_size + 2):
        expected, got = [], []
        slow, fast = model.new_cache(1, context), model.new_cache(1, context)
        model.prefill(byte_ids[None, :num_prompt], slow)
        fast.copy_from(slow)
        sequence = native.NativeSequence(decoder, fast)
        end = context - 1 if num_prompt % patch_size == 1 else num_prompt + patch_size + 1
        for t in range(num_prompt, min(end, context - 1)):
            expected.append(model.step(byte_ids[t : t + 1], slow)[0].numpy())
            got.append(sequence.step(int(byte_ids[t])).copy())
        np.testing.assert_allclose(got, expected, **LOGITS)
        kl = (laws(expected).exp() * (laws(expected) - laws(got))).sum(-1)
        assert float(kl.max()) < MAX_KL


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("shift", [-3.0, -0.3, 0.0, 3.0])
def test_logits_equal_torch_s_however_many_hidden_values_are_zero(shift):
    model = rounded(SUPPORTED["uneven_widths"])
    with torch.no_grad():
        for level in model.levels:
            for block in level.transformer.blocks:
                block.ffn_in.bias.add_(shift).copy_(block.ffn_in.bias.bfloat16())
    byte_ids = random_bytes(model.config.max_seq_len)
    cache = model.new_cache(1, model.config.max_seq_len)
    model.prefill(byte_ids[None, :0], cache)
    sequence = native.NativeSequence(native.compile_model(model), cache)
    got = [sequence.step(byte).copy() for byte in byte_ids[:-1].tolist()]
    np.testing.assert_allclose(got, model(byte_ids[None])[0, 1:].detach().numpy(), **LOGITS)


@pytest.mark.usefixtures("engine")
def test_a_full_cache_takes_no_byte():
    model = rounded(SUPPORTED["exact"])
    cache = model.new_cache(1, CONTEXT)
    model.prefill(random_bytes(1, CONTEXT - 1), cache)
    with pytest.raises(ValueError, match=f"holds {CONTEXT} bytes"):
        native.NativeSequence(native.compile_model(model), cache).step(0)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", SUPPORTED)
def test_torch_may_take_any_step_of_a_native_sequence(name):
    model = rounded(SUPPORTED[name])
    context = model.config.max_seq_len
    byte_ids = random_bytes(context)
    expected = model(byte_ids[None])[0].detach().numpy()
    cache = model.new_cache(1, context)
    model.prefill(byte_ids[None, :0], cache)
    sequence = native.NativeSequence(native.compile_model(model), cache)
    for t in range(context - 1):
        by_torch = t % 3 == 1
        logits = model.step(byte_ids[t : t + 1], cache)[0].numpy() if by_torch else sequence.step(int(byte_ids[t]))
        np.testing.assert_allclose(logits, expected[t + 1], **LOGITS)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", ["uneven_widths", "all_supported", "flat"])
def test_sequences_stepped_in_parallel_give_the_same_bits_every_time(name):
    model = rounded(SUPPORTED[name])
    byte_ids = random_bytes(model.config.max_seq_len - 1).tolist()
    decoder = native.compile_model(model)

    def run(_) -> np.ndarray:
        cache = model.new_cache(1, model.config.max_seq_len)
        model.prefill(torch.zeros(1, 0, dtype=torch.int64), cache)
        sequence = native.NativeSequence(decoder, cache)
        return np.stack([sequence.step(byte).copy() for byte in byte_ids])

    alone = run(0)
    with ThreadPoolExecutor(4) as threads:
        assert all(np.array_equal(alone, other) for other in threads.map(run, range(20)))


@pytest.mark.usefixtures("engine")
def test_sequences_stepped_in_turn_do_not_disturb_each_other():
    model = rounded(SUPPORTED["all_supported"])
    byte_ids = random_bytes(2, 20).tolist()

    def sequence():
        cache = model.new_cache(1, CONTEXT)
        model.prefill(torch.zeros(1, 0, dtype=torch.int64), cache)
        return native.NativeSequence(native.compile_model(model), cache)

    first, second = sequence(), sequence()
    in_turn = [(first.step(a).copy(), second.step(b).copy()) for a, b in zip(*byte_ids, strict=True)]
    for number in (0, 1):
        alone = sequence()
        assert all(np.array_equal(alone.step(b), pair[number]) for b, pair in zip(byte_ids[number], in_turn, strict=True))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", ["exact", "all_supported", "flat"])
def test_samples_are_torch_s_also_after_a_full_context(name, monkeypatch):
    model = rounded(SUPPORTED[name])
    config = SampleConfig(seed=5)
    fast = Sampler(model, b"start", 3 * CONTEXT, config)
    assert fast.engine == "native-bf16"
    chunks, again = list(fast.stream(1)), list(fast.stream(1))
    monkeypatch.setenv("MEGABYTE_ENGINE", "torch")
    slow = Sampler(model, b"start", 3 * CONTEXT, config)
    assert slow.engine == "torch-fp32"
    for mine, same, expected in zip(chunks, again, slow.stream(1), strict=True):
        assert np.array_equal(mine.byte_values, same.byte_values)
        assert np.array_equal(mine.bits, same.bits)
        # These few draws lie on no border between two bytes that 1e-4 in a logit could move.
        assert np.array_equal(mine.byte_values, expected.byte_values)
        np.testing.assert_allclose(mine.bits, expected.bits, **LOGITS)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("prefix", [b"", b"a", b"abcd", b"abcdefghijk"])
def test_reported_bits_are_the_score_of_the_sampled_bytes(prefix):
    model = rounded(SUPPORTED["all_supported"])
    chunks = list(Sampler(model, prefix, 17, SampleConfig(temperature=0.8, top_k=60)).stream())
    made = np.concatenate([chunk.byte_values for chunk in chunks])
    whole = np.concatenate((np.frombuffer(prefix, dtype=np.uint8), made))
    bits = np.concatenate([chunk.bits for chunk in chunks])
    np.testing.assert_allclose(bits, score(model, whole).bits[len(prefix) :], **LOGITS)


@pytest.mark.usefixtures("engine")
def test_a_changed_weight_is_noticed():
    model = rounded(SUPPORTED["exact"])
    before = generate(model, b"", 20, temperature=0)[0]
    decoder = native.compile_model(model)
    assert native.compile_model(model) is decoder
    with torch.no_grad():
        model.levels[-1].embedder.embedding.weight.neg_()
    assert native.compile_model(model) is not decoder
    assert not np.array_equal(generate(model, b"", 20, temperature=0)[0], before)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_torch_s(name):
    model = rounded(CASES[name])
    assert native.compile_model(model) is None
    assert Sampler(model, b"", 1, SampleConfig()).engine == "torch-fp32"


@pytest.mark.usefixtures("engine")
def test_weights_that_bf16_would_change_are_torch_s():
    assert native.compile_model(build(CASES["exact"])) is None
    assert native.compile_model(rounded(CASES["exact"]).double()) is None


@pytest.mark.usefixtures("engine")
def test_weights_that_torch_has_laid_out_anew_are_still_taken():
    for model, is_taken in ((rounded(CASES["exact"]), True), (build(CASES["exact"]), False)):
        lay_out(model)
        assert not all(p.is_contiguous() for p in model.parameters())
        assert (native.compile_model(model) is not None) == is_taken


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", SUPPORTED)
def test_drawn_bytes_are_those_of_the_python_law(name):
    model = rounded(SUPPORTED[name])
    decoder, context = native.compile_model(model), model.config.max_seq_len
    prefix = random_bytes(model.config.patch_size)
    for settings in ({}, {"temperature": 0.0}, {"temperature": 0.6, "top_k": 9}, {"top_p": 0.7}, {"top_k": 30, "top_p": 0.9}):
        config = SampleConfig(**settings)
        noise = uniforms(1, 2).random(context - len(prefix))
        stepped, drawn = model.new_cache(1, context), model.new_cache(1, context)
        logits = model.prefill(prefix[None], stepped)[0].numpy()
        model.read_patches(prefix[None], drawn)
        sequence, step = native.NativeSequence(decoder, drawn), native.NativeSequence(decoder, stepped).step
        law = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        team = native.Team(has_helper=False)
        # In parts, none of which begins or ends with a patch, and the first byte of all given.
        parts = np.split(noise[1:], [2, 3, 10])
        made = team.draw([native.Part(sequence, np.array([7], dtype=np.uint8), parts[0], **law)])
        for part in parts[1:]:
            made += team.draw([native.Part(sequence, NOTHING, part, **law)])
        byte_values, bits = (np.concatenate(arrays) for arrays in zip(*made, strict=True))
        assert byte_values[0] == 7
        for t, byte_value in enumerate(byte_values.tolist()):
            if t:
                assert byte_value == draw(sampling_law(logits, config), noise[t])
            # The first logits are torch's, which the kernel's equal but for the order of summation.
            assert bits[t] == pytest.approx(surprisal(logits, byte_value), **({"abs": 1e-4} if t == 0 else {"rel": 1e-6}))
            if t + 1 < len(byte_values):
                logits = step(byte_value)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("stepped", [False, True], ids=["prefilled", "stepped"])
def test_bytes_may_be_drawn_where_one_was_predicted_already(name, stepped):
    """A finished patch that fills the whole memory must not be moved into it twice."""
    model = rounded(SUPPORTED[name])
    decoder, context, patch_size = native.compile_model(model), model.config.max_seq_len, model.config.patch_size
    prefix, noise = random_bytes(2 * patch_size), uniforms(1, 2).random(2 * patch_size)
    caches = [model.new_cache(1, context) for _ in range(2)]
    model.read_patches(prefix[None], caches[0])
    model.prefill(prefix[None, : len(prefix) - stepped], caches[1])
    sequences = [native.NativeSequence(decoder, cache) for cache in caches]
    if stepped:
        sequences[1].step(int(prefix[-1]))
    team = native.Team(has_helper=False)
    wanted, found = (team.draw([native.Part(sequence, NOTHING, noise)])[0] for sequence in sequences)
    assert np.array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], **LOGITS)


@pytest.mark.usefixtures("engine")
def test_a_second_thread_changes_no_bit():
    # Wide enough that every part of a step is shared; many rounds, so that the helper comes early, late and not at all.
    levels = (
        LevelConfig(dim=256, num_layers=2, num_heads=4, patch_size=4),
        LevelConfig(dim=192, num_layers=2, num_heads=3, cross_patch=4),
    )
    model = rounded(MegaByteConfig(levels=levels, max_seq_len=512, init_std=0.1, **RECIPE))
    decoder, noise = native.compile_model(model), uniforms(0, 0).random(512)

    def run(has_helper: bool) -> tuple[np.ndarray, np.ndarray]:
        cache = model.new_cache(1, 512)
        sequence, team = native.NativeSequence(decoder, cache), native.Team(has_helper)
        made = [team.draw([native.Part(sequence, NOTHING, part)])[0] for part in np.split(noise, 64)]
        return tuple(np.concatenate(arrays) for arrays in zip(*made, strict=True))

    expected = run(False)
    with ThreadPoolExecutor(3) as threads:
        for made in threads.map(run, [True] * 12):
            assert all(np.array_equal(mine, theirs) for mine, theirs in zip(made, expected, strict=True))


# What rows that step together have of their own: bytes read before, given ones, drawn ones for each of two calls, the law.
GROUP = [
    (0, 0, (9, 14), {}),
    (1, 3, (2, 1), {"temperature": 0.0}),
    (5, 0, (0, 3), {"temperature": 0.7, "top_k": 20}),
    (13, 1, (6, 0), {"top_p": 0.8}),
    (12, 0, (12, 2), {"temperature": 1.3, "top_k": 50, "top_p": 0.9}),
]


def drawn(decoder: native.NativeDecoder, model: MegaByte, members: list, team: native.Team, together: bool) -> list[np.ndarray]:
    """Bytes and surprisals of each member and call."""
    rows, made = [], [[] for _ in members]
    for number, (num_read, *_) in enumerate(members):
        cache = model.new_cache(1, model.config.max_seq_len)
        model.prefill(random_bytes(1, num_read, seed=number), cache)
        rows.append((native.NativeSequence(decoder, cache), uniforms(3, number)))
    for call in range(2):
        parts = []
        for number, ((sequence, noise), (_, num_given, num_drawn, law)) in enumerate(zip(rows, members, strict=True)):
            given = random_bytes(num_given, seed=100 * call + number).numpy().astype(np.uint8)
            parts.append(native.Part(sequence, given, noise.random(num_drawn[call]), **law))
        results = team.draw(parts) if together else [team.draw([part])[0] for part in parts]
        for each, result in zip(made, results, strict=True):
            each.extend(result)
    return [array for each in made for array in each]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("kind", [native.ENGINE_NAME, native.INT8_ENGINE_NAME])
@pytest.mark.parametrize("name", SUPPORTED)
def test_rows_that_step_together_have_the_bits_of_each_alone(name, kind):
    model = rounded(SUPPORTED[name])
    decoder, team = native.compile_model(model, kind), native.Team(has_helper=True)
    alone = drawn(decoder, model, GROUP, team, together=False)
    for members in (GROUP[:2], GROUP[:3], GROUP):
        for mine, theirs in zip(drawn(decoder, model, members, team, together=True), alone, strict=False):
            assert np.array_equal(mine, theirs)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("num_rows", [2, 3, 4, 7, 40])
def test_as_many_rows_as_there_are_step_together(num_rows):
    # Wide enough for several blocks of columns, and for every part of a step to be shared.
    levels = (
        LevelConfig(dim=260, num_layers=2, num_heads=5, patch_size=4),
        LevelConfig(dim=204, num_layers=1, num_heads=3, cross_patch=4),
    )
    model = rounded(MegaByteConfig(levels=levels, max_seq_len=64, init_std=0.1, positions="learned", activation="relu2"))
    # Some of the rows have fewer channels left than are worth walking past, others have more.
    with torch.no_grad():
        for level in model.levels:
            for block in level.transformer.blocks:
                block.ffn_in.bias.sub_(0.5).copy_(block.ffn_in.bias.bfloat16())
    decoder = native.compile_model(model)
    members = [(number % 7, 0, (5 + number % 3, 8), {}) for number in range(num_rows)]
    alone = drawn(decoder, model, members, native.Team(has_helper=False), together=False)
    together = drawn(decoder, model, members, native.Team(has_helper=True), together=True)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(together, alone, strict=True))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("cores", "rows_of_team"), [(1, 1), (1, 3), (2, 4), (5, 2), (8, 8)])
def test_samples_of_a_group_are_those_made_alone(cores, rows_of_team, monkeypatch):
    monkeypatch.setattr(native, "num_cores", lambda: cores)
    monkeypatch.setattr(sample, "_ROWS_OF_TEAM", rows_of_team)
    model = rounded(SUPPORTED["all_supported"])
    assert num_at_once(model) == cores * rows_of_team
    configs = [SampleConfig(seed=5), SampleConfig(seed=6, temperature=0.6, top_k=30)]
    kinds = [(b"", 2 * CONTEXT), (b"ab", 7), (b"abcdefghi", 30), (bytes(range(90)), 12)]
    requests = [
        Request(prefix, num_bytes, config, number) for number in range(3) for prefix, num_bytes in kinds for config in configs
    ]
    made = [[] for _ in requests]
    for index, chunk in stream_batch(model, requests):
        made[index].append(chunk)
    for request, chunks in zip(requests, made, strict=True):
        sampler = Sampler(model, request.prefix, request.num_bytes, request.config)
        expected = list(sampler.stream(request.sample_number))
        for name in ("byte_values", "bits"):
            assert np.array_equal(*(np.concatenate([getattr(chunk, name) for chunk in each]) for each in (chunks, expected)))


@pytest.mark.usefixtures("engine")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list the threads of a process")
@pytest.mark.parametrize(("cores", "num_samples"), [(2, 1), (2, 3), (2, 30), (6, 5)])
def test_closing_a_batch_ends_its_threads_and_frees_its_rows(cores, num_samples, monkeypatch):
    monkeypatch.setattr(native, "num_cores", lambda: cores)
    model = rounded(SUPPORTED["exact"])
    generate(model, bytes(CONTEXT), 1)  # torch begins threads for its reading, and keeps them
    tasks = Path("/proc/self/task")
    before, rows = set(tasks.iterdir()), []
    begin = NativeRow.__init__
    monkeypatch.setattr(NativeRow, "__init__", lambda row, *made_of: rows.append(weakref.ref(row)) or begin(row, *made_of))
    chunks = stream_batch(model, [Request(b"abc", 1000, SampleConfig(), number) for number in range(num_samples)])
    for _ in range(12):
        next(chunks)
    assert set(tasks.iterdir()) - before
    chunks.close()
    del chunks
    gc.collect()
    assert set(tasks.iterdir()) <= before  # a thread of an earlier test may have ended
    assert len(rows) >= min(num_samples, 2)
    assert not any(row() for row in rows)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("same_prefix", [False, True])
def test_rows_that_are_done_make_room_for_the_next(same_prefix, monkeypatch):
    monkeypatch.setattr(native, "num_cores", lambda: 1)
    monkeypatch.setattr(sample, "_ROWS_OF_TEAM", 2)
    rows, most = [], 0
    begin = NativeRow.__init__

    def count(row: NativeRow, *made_of) -> None:
        nonlocal most
        rows.append(weakref.ref(row))
        most = max(most, sum(row() is not None for row in rows))
        begin(row, *made_of)

    monkeypatch.setattr(NativeRow, "__init__", count)
    prefixes = [b"abc" if same_prefix else bytes([number]) for number in range(8)]
    requests = [Request(prefix, 40, SampleConfig(), number) for number, prefix in enumerate(prefixes)]
    for _ in stream_batch(rounded(SUPPORTED["exact"]), requests):
        pass
    assert most <= 3  # two, and the one that has read a prefix for the samples that are still to come


@pytest.mark.usefixtures("engine")
def test_samples_go_on_by_the_weights_with_which_they_were_begun(monkeypatch):
    monkeypatch.setattr(native, "num_cores", lambda: 1)
    monkeypatch.setattr(sample, "_ROWS_OF_TEAM", 2)
    model = rounded(SUPPORTED["exact"])
    requests = [Request(bytes([number]), 60, SampleConfig(), number) for number in range(5)]
    alone = [np.concatenate([chunk.byte_values for _, chunk in stream_batch(model, [request])]) for request in requests]
    made: list[list[np.ndarray]] = [[] for _ in requests]
    with contextlib.closing(stream_batch(model, requests)) as chunks:
        for index, chunk in chunks:
            made[index].append(chunk.byte_values)
            next_byte_law(model, b"ab")
            lay_out(model)  # as samples by torch do
    for found, expected in zip(made, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.usefixtures("engine")
def test_rows_that_are_full_are_not_all_read_again_before_the_next_chunk(monkeypatch):
    monkeypatch.setattr(native, "num_cores", lambda: 1)
    model = rounded(SUPPORTED["exact"])
    read, num_read = NativeRow.read, 0

    def read_slowly(row: NativeRow, history: np.ndarray) -> None:
        nonlocal num_read
        num_read += 1
        time.sleep(1.1 * sample._CHUNK_S)
        read(row, history)

    monkeypatch.setattr(NativeRow, "read", read_slowly)
    requests = [Request(b"abc", 3 * CONTEXT, SampleConfig(), number) for number in range(4)]
    seen, before = [], 0
    with contextlib.closing(stream_batch(model, requests)) as chunks:
        for _ in chunks:
            seen.append(num_read - before)
            before = num_read
    assert num_read > 8
    assert max(seen) == 1


@pytest.mark.usefixtures("engine")
def test_memory_of_a_group_is_bounded(monkeypatch):
    monkeypatch.setattr(native, "num_cores", lambda: 2)
    model = rounded(SUPPORTED["exact"])
    cache = model.new_cache(1, CONTEXT)
    num_bytes = sum(tensor.nbytes for level in cache.levels for tensor in (level.keys, level.values))
    monkeypatch.setattr(sample, "_BYTES_OF_TEAM", 3 * num_bytes)
    assert num_at_once(model) == 2 * 3
    monkeypatch.setattr(sample, "_BYTES_OF_TEAM", num_bytes - 1)
    assert num_at_once(model) == 2
    assert len(generate(model, b"ab", 9, num_samples=3)) == 3


@pytest.mark.usefixtures("engine")
def test_the_first_chunk_does_not_wait_for_every_prefix(monkeypatch):
    monkeypatch.setattr(native, "num_cores", lambda: 1)
    model = rounded(SUPPORTED["exact"])
    read = NativeRow.read
    num_read = []

    def read_slowly(row: NativeRow, history: np.ndarray) -> None:
        num_read.append(len(history))
        time.sleep(1.1 * sample._CHUNK_S)
        read(row, history)

    monkeypatch.setattr(NativeRow, "read", read_slowly)
    requests = [Request(bytes(range(length)), 60, SampleConfig()) for length in (1, 2, 3, 4)]
    with contextlib.closing(stream_batch(model, requests)) as chunks:
        assert next(chunks)[0] == 0
        assert num_read == [1]
        assert {next(chunks)[0] for _ in range(6)} >= {0, 1, 2}


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", SUPPORTED)
def test_int8_logits_are_torch_s_of_the_quantized_matrices(name):
    model = build(SUPPORTED[name])
    decoder = native.compile_model(model, "native-int8")
    with torch.no_grad():
        for linear in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
            whole_RC, scales_R = native.quantize(linear.weight)
            linear.weight.copy_(whole_RC * scales_R[:, None])
        # The output matrix is quantized, the embedding that it is tied to is not.
        whole_VD, scales_V = native.quantize(model.levels[-1].embedder.embedding.weight)
    model.to_logits = lambda h: softcapped(model, h @ (whole_VD * scales_V[:, None]).T)
    byte_ids = random_bytes(model.config.max_seq_len)
    cache = model.new_cache(1, model.config.max_seq_len)
    model.prefill(byte_ids[None, :0], cache)
    sequence = native.NativeSequence(decoder, cache)
    got = [sequence.step(byte).copy() for byte in byte_ids[:-1].tolist()]
    np.testing.assert_allclose(got, model(byte_ids[None])[0, 1:].detach().numpy(), **LOGITS)


def softcapped(model: MegaByte, logits: torch.Tensor) -> torch.Tensor:
    cap = model.config.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


@pytest.mark.usefixtures("engine")
def test_the_int8_engine_is_asked_for_by_name(monkeypatch):
    model = build(SUPPORTED["all_supported"])
    monkeypatch.setenv("MEGABYTE_ENGINE", "native-int8")
    sampler = Sampler(model, b"ab", 20, SampleConfig(seed=3))
    assert sampler.engine == "native-int8"
    alone = np.concatenate([chunk.byte_values for chunk in sampler.stream(1)])
    assert np.array_equal(alone, generate(model, [b"x", b"ab"], 20, seed=3, num_samples=2)[3])


def test_an_unknown_engine_is_refused(monkeypatch):
    monkeypatch.setenv("MEGABYTE_ENGINE", "fast")
    with pytest.raises(UserError, match="MEGABYTE_ENGINE=fast must be torch or torch-bf16 or native-bf16 or native-int8"):
        generate(rounded(CASES["exact"]), b"", 1)


# In a script that stands for a compiler: where what is built shall lie.
OUTPUT = 'while [ "$1" != -o ]; do shift; done; output=$2'


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Puts a script in the place of every compiler, and an empty folder in the place of the cache."""

    def install(script: str | None) -> Path:
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        if script is not None:
            fake = tools / "c++"
            fake.write_text(f"#!/bin/sh\n{script}\n")
            fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tools))
        return fake if script is not None else tools

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield install
    native.library.cache_clear()


@pytest.mark.parametrize("script", [None, "exit 1", "echo not a library"], ids=["missing", "failing", "writing nothing"])
def test_without_a_working_compiler_torch_decodes(compiler, script):
    compiler(script)
    model = rounded(CASES["exact"])
    sampler = Sampler(model, b"ab", 10, SampleConfig())
    assert sampler.engine == "torch-fp32"
    assert sum(len(chunk.bits) for chunk in sampler.stream()) == 10
    assert not [path for path in kernels.cache_folder().glob("*") if path.suffix == ".so"]


@pytest.mark.usefixtures("engine")
def test_a_damaged_library_is_not_used(compiler):
    path = os.environ["PATH"]
    compiler(f'PATH={path}; [ "$1" = --version ] && exec c++ "$@"; {OUTPUT}; echo damaged > "$output"')
    assert kernels.build_library(native._SOURCE).read_bytes() == b"damaged\n"
    assert Sampler(rounded(CASES["exact"]), b"", 1, SampleConfig()).engine == "torch-fp32"


@pytest.mark.usefixtures("engine")
def test_the_library_is_built_once_for_a_source_a_compiler_and_a_processor(compiler, tmp_path, monkeypatch):
    path, count = os.environ["PATH"], tmp_path / "count"
    compiler(f'PATH={path}; [ "$1" = --version ] || echo built >> {count}; exec c++ "$@"')
    source = tmp_path / "decode.cpp"
    source.write_text("int answer() { return 1; }\n")
    first = kernels.build_library(source)
    assert kernels.build_library(source) == first
    assert count.read_text().split() == ["built"]
    assert [entry.name for entry in kernels.cache_folder().iterdir()] == [first.name]
    source.write_text("int answer() { return 2; }\n")
    assert kernels.build_library(source) != first
    monkeypatch.setattr(kernels, "_processor", lambda: "another processor")
    assert kernels.build_library(source) != first
    assert len(count.read_text().split()) == 3


@pytest.fixture
def built(engine) -> Path:
    """The library that is there before a test puts another folder in the place of the cache."""
    return kernels.build_library(native._SOURCE)


def test_what_is_built_in_the_background_is_built_once(built, compiler, tmp_path, monkeypatch):
    path, count = os.environ["PATH"], tmp_path / "count"
    script = f'[ "$1" = --version ] && exec c++ "$@"; echo built >> {count}; sleep 0.1; {OUTPUT}; cp {built} "$output"'
    compiler(f"PATH={path}; {script}")
    for module in (native.attention, native.step):
        monkeypatch.setattr(module, "library", lambda: None)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: native.build(), range(2)))
    assert native.compile_model(rounded(SUPPORTED["exact"])) is not None
    assert count.read_text().split() == ["built"]


IN_LITTLE_MEMORY = """
import resource
from pathlib import Path

import numpy as np

from core import native
from tests.model_cases import random_bytes
from tests.test_native import SUPPORTED, rounded

model = rounded(SUPPORTED["flat"])
given = random_bytes(8).numpy().astype(np.uint8)


def bits(has_helper):
    cache = model.new_cache(1, 32)
    model.prefill(random_bytes(1, 0), cache)
    sequence = native.NativeSequence(native.compile_model(model), cache)
    return native.Team(has_helper).draw([native.Part(sequence, given, np.zeros(0))])[0][1]


expected = bits(False)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = taken + (1 << 22)  # a new thread's stack is larger
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
print(np.array_equal(bits(True), expected), len(list(Path("/proc/self/task").iterdir())))
native.compile_model(model).structure.levels[0].ffn_dim = 1 << 24
try:
    bits(False)
except MemoryError as error:
    print(error)
"""


@pytest.mark.usefixtures("engine")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how much memory a process has")
def test_without_memory_for_a_thread_it_works_alone_and_without_memory_at_all_it_says_so():
    stack = 1 << 23, resource.getrlimit(resource.RLIMIT_STACK)[1]
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_STACK, stack),
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["True 1", "out of memory for what a sequence is computed with; make fewer at once"], (
        done.stderr
    )


@pytest.mark.parametrize(
    ("groups", "files", "quotas"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, [2.5]),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, [1.5]),
        ("0::/not-there", {"cpu.max": "50000 100000"}, [0.5]),
        ("0::/", {"cpu.max": "max 100000"}, []),
        ("5:memory:/a\n4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, [3.0]),
        ("4:cpu:/docker/1", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, [2.0]),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        (None, {}, []),
    ],
)
def test_a_container_s_share_of_time_counts_as_cores(groups, files, quotas, tmp_path, monkeypatch):
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    if groups is not None:
        (tmp_path / "process").write_text(f"{groups}\n")
    found = list(native._quotas(tmp_path / "process", tmp_path / "groups"))
    assert found == quotas
    monkeypatch.setattr(native, "_quotas", lambda: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert native.num_cores() == (max(1, int(quotas[0])) if quotas else 8)
