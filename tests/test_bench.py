"""Speeds are measured on the work they name, and compared with a flat Transformer of equal FLOPs per byte."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.__main__ import main
from app.plot import draw_log_log
from core import bench as bench_module
from core import lockstep
from core.bench import bench, bytes_read_per_patch, flat_counterpart, generation, random_model, widened
from core.config import LevelConfig, MegaByteConfig
from core.curve import Point, best_points, cost_curve, fitted_exponent
from core.errors import UserError
from core.kernels import read
from core.limits import PeakMemory, matmul_rate, seconds_to_read
from core.models import MegaByte
from core.presets import preset

CPU = torch.device("cpu")
KEYS = {
    *("what", "preset", "device", "engine", "dtype", "batch_size", "length", "bytes_per_s", "bytes_read_per_byte"),
    *("fraction_of_limit", "peak_memory_bytes", "extra_peak_memory_bytes"),
}
TINY = MegaByteConfig(
    levels=(LevelConfig(dim=64, num_layers=2, num_heads=4, patch_size=8), LevelConfig(dim=64, num_layers=1, num_heads=4)),
    max_seq_len=64,
)


@pytest.fixture
def tiny_preset(monkeypatch):
    """`bench-tiny` at a size for tests, on a machine whose limits take no time to measure."""
    small = preset("bench-tiny").model
    config = MegaByteConfig(levels=TINY.levels, max_seq_len=small.max_seq_len)
    named = type(preset("bench-tiny"))(name="bench-tiny", model=config, codec=preset("bench-tiny").codec)
    monkeypatch.setattr(bench_module, "preset", lambda name: named)
    monkeypatch.setattr(bench_module, "matmul_rate", lambda *_: 1e11)
    monkeypatch.setattr(bench_module, "seconds_to_read", lambda parts, _: sum(size * times for size, times in parts) / 1e10)


@pytest.mark.parametrize("name", ["bench-tiny", "bench-tiny-p64", "text", "audio", "paper-text", "paper-generation"])
def test_the_flat_transformer_has_the_same_flops_per_byte_in_matrices(name):
    with torch.device("meta"):
        own, flat = MegaByte(preset(name).model), MegaByte(flat_counterpart(preset(name).model))
    assert len(flat.levels) == 1
    assert flat.flops_per_byte(1) == pytest.approx(own.flops_per_byte(1), rel=0.02)


def test_the_flat_counterpart_of_the_measured_shape_is_the_one_of_the_study():
    [level] = flat_counterpart(preset("bench-tiny").model).levels
    assert (level.dim, level.num_layers, level.head_dim) == (256, 6, 64)


def test_a_model_without_a_counterpart_is_refused():
    thin = LevelConfig(dim=64, num_layers=1, num_heads=1, ffn_dim=1)  # one layer with the usual 4 * 64 already costs more
    with pytest.raises(UserError, match="leave out --against flat"):
        flat_counterpart(MegaByteConfig(levels=(thin,), max_seq_len=8))


@pytest.mark.parametrize(("what", "length"), [("generate", 64), ("score", 100), ("train", 64)])
def test_bench_names_the_work_and_its_limit(what, length, tiny_preset):
    facts = bench(what, length=length, batch_size=2, rounds=2, against_flat=True)
    assert facts.keys() >= KEYS | {"against", "ratio"}
    assert facts["against"].keys() >= KEYS
    assert (facts["what"], facts["batch_size"], facts["length"]) == (what, 2, length)
    assert facts["ratio"] == pytest.approx(facts["bytes_per_s"] / facts["against"]["bytes_per_s"])
    assert facts["fraction_of_limit"] > 0
    assert (facts["bytes_read_per_byte"] is not None) == (what == "generate")
    json.dumps(facts)


def test_the_memory_that_a_sample_reads_is_counted_by_hand():
    model = random_model(TINY, CPU)
    case = generation("tiny", model, batch_size=3, length=64)
    size, kept = (2, 4) if case.engine == "native-bf16" else (4, 4)
    layer = 4 * 64 * 64 + 2 * 64 * 256
    by_hand = size * (2 * layer + 8 * 64) + kept * 3 * 2 * 2 * 64 * 8  # the global model once: 8 patches kept, two layers
    by_hand += 8 * (size * layer + kept * 3 * 2 * 64 * 4)  # the local model for each byte: 4 bytes kept on average
    by_hand += 8 * size * 256 * 64
    assert sum(num_bytes * times for num_bytes, times in bytes_read_per_patch(case)) == by_hand


def test_a_length_beyond_a_trained_model_s_context_is_refused(tiny_preset, tiny_models):
    with pytest.raises(UserError, match="exceeds the model's context of 128 bytes"):
        bench("score", model=tiny_models / "text", length=129)
    assert bench("score", model=tiny_models / "text", rounds=1)["length"] == 128


def test_presets_are_widened_to_the_length_asked_for():
    assert widened(TINY, 65).max_seq_len == 72
    assert widened(TINY, 8) == TINY


def test_the_limits_of_this_machine_are_positive_and_twice_the_memory_takes_longer():
    assert matmul_rate(CPU, torch.float32) > 1e8
    assert seconds_to_read([(1 << 26, 1)], CPU) < seconds_to_read([(1 << 26, 4)], CPU)


def test_every_word_is_read_as_often_as_asked():
    if read.library() is None:
        pytest.skip("there is no C++ compiler")
    words = torch.from_numpy(np.random.default_rng(0).integers(0, 2**62, 1003))
    expected = int(np.bitwise_xor.reduce(words.numpy()))
    assert [read.read(words[:0]), read.read(words), read.read(words, 3)] == [0, expected, expected]
    assert read.read(words[1:]) == int(np.bitwise_xor.reduce(words.numpy()[1:]))
    assert read.read(words, 2) == int(np.bitwise_xor.reduce(words.numpy()[960:]))  # the rest is read once


def test_peak_memory_sees_what_was_allocated():
    memory = PeakMemory(CPU)
    memory.start()
    torch.ones(1 << 26)
    peak, extra = memory.read()
    assert peak > extra
    assert extra == pytest.approx(1 << 28, rel=0.2)


def test_the_exponent_of_a_known_cost_is_found_with_the_best_patch_of_each_length():
    points = [Point(p, 2**n, 1e-9 * 2 ** (4 * n / 3) * (1 if p == 8 else 2), 0) for p in (8, 16) for n in range(10, 18)]
    points += [Point(1, 2**n, 4.0**n, 0) for n in range(10, 18)]
    assert {point.patch_size for point in best_points(points)} == {8}
    assert fitted_exponent(best_points(points)) == pytest.approx(4 / 3)
    assert fitted_exponent(points[:1]) is None


def test_the_cost_curve_leaves_out_what_would_take_too_long():
    said = []
    options = {"most_seconds": 1e-9, "device": "auto", "log_line": said.append}
    points = list(cost_curve(patch_sizes=(16,), lengths=(64, 128), **options))
    assert [(point.patch_size, point.length) for point in points] == [(1, 64), (16, 64)]
    assert len(said) == 2
    assert "would take over" in said[0]


def test_samples_in_rounds_as_long_as_a_gpu_s_are_timed(tiny_preset, monkeypatch):
    monkeypatch.setitem(lockstep._ROUND_BYTES, "cpu", lockstep._ROUND_BYTES["cuda"])
    assert bench("generate", length=512, engine="torch-bf16", rounds=1)["bytes_per_s"] > 0


def test_the_command_prints_one_json_line(tiny_preset, capsys):
    assert main(["bench", "score", "--length", "64", "--rounds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_per_s"] > 0


def test_the_command_prints_a_table_of_both_models(tiny_preset, capsys):
    assert main(["bench", "score", "--length", "64", "--rounds", "1", "--against", "flat"]) == 0
    table = capsys.readouterr().out
    assert "of the limit" in table
    assert "times as fast" in table


def test_the_curve_becomes_a_picture(tmp_path: Path):
    path = tmp_path / "curve.png"
    series = {"a": [(1024, 0.1), (2048, 0.3)], "b": [(1024, 0.2)]}
    draw_log_log(series, path, title="t", x_label="x", y_label="y")
    with Image.open(path) as image:
        colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(0x44, 0x44, 0x44), (0xD5, 0x5E, 0x00)} <= colours
