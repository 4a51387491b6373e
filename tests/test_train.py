"""The training loop: what it learns, what it writes, what it refuses."""

import dataclasses
import io
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core import learner, report
from core.checkpoint import load_checkpoint, load_train_state, step_folder
from core.config import LevelConfig, MegaByteConfig, PerceiverArConfig, TrainConfig
from core.errors import UserError
from core.learner import Learner, MeanNll, learning_precision
from core.models import build_model
from core.optim import (
    learning_rate_fraction,
)
from core.train import _Run, micro_batch_size, repeatable_kernels, train
from tests.model_cases import CASES, CONTEXT, build, random_bytes
from tests.tiny_run import ALONE, SEQ_LEN, TINY_MODEL, metrics, run_tiny, tiny_config, tiny_data

# What is learned


def test_loss_is_the_mean_over_every_byte(model, byte_ids):
    model.eval()
    expected = F.cross_entropy(model(byte_ids).transpose(1, 2), byte_ids)
    torch.testing.assert_close(MeanNll(model, "fp32")(byte_ids), expected)


_WIDE = LevelConfig(dim=64, num_layers=1, num_heads=2)
EVERY_KIND = {
    "two_levels": MegaByteConfig(levels=(dataclasses.replace(_WIDE, patch_size=4), _WIDE), max_seq_len=SEQ_LEN),
    "flat": MegaByteConfig(levels=(_WIDE,), max_seq_len=SEQ_LEN),
    "perceiver_ar": PerceiverArConfig(dim=64, num_layers=1, num_heads=2, num_latents=16, max_seq_len=SEQ_LEN),
}


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        *((kind, "adamw") for kind in EVERY_KIND),
        ("two_levels", "muon"),
        pytest.param("flat", "muon", marks=pytest.mark.slow),
        pytest.param("perceiver_ar", "muon", marks=pytest.mark.slow),
    ],
)
def test_one_batch_is_overfitted_below_0_05_bits_per_byte(kind, optimizer, byte_ids):
    byte_ids = byte_ids[:2]  # which row it is cannot be foreseen: rows cost log2(2) / 32 = 0.031 bits a byte whatever is learned
    torch.manual_seed(0)
    model = build_model(tiny_config(EVERY_KIND[kind]))
    config = TrainConfig(num_steps=100, warmup_steps=10, lr=1e-2, weight_decay=0.0, optimizer=optimizer)
    learner, objective = Learner(model, config, ALONE), MeanNll(model, "fp32")
    for step in range(config.num_steps):
        loss = objective(byte_ids)
        loss.backward()
        learner.update(torch.tensor(0.0), learning_rate_fraction(step, config))
    assert loss.item() / math.log(2) < 0.05


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_random_bytes_stay_at_8_bits_on_fresh_data(kind, tmp_path):
    """The leak alarm: below 8 bits a model of uniform noise has seen what it predicts."""
    once = {"num_steps": 80, "eval_every": 80, "checkpoint_every": 80, "log_every": 80}
    config = tiny_config(EVERY_KIND[kind], **once, eval_sequences=62, lr=1e-2)
    result = run_tiny(tmp_path, config=config)
    assert 8.0 - 0.01 < result.bits_per_byte < 9.5


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_run_learns_what_is_there_to_learn(kind, tmp_path):
    config = tiny_config(EVERY_KIND[kind], num_steps=80, eval_every=80, checkpoint_every=80, log_every=80, lr=1e-2)
    result = run_tiny(tmp_path, config=config, num_values=4)
    assert 2.0 - 0.05 < result.bits_per_byte < 2.2


def test_gradients_are_clipped(tmp_path):
    # Far below the optimizer's epsilon, a clipped gradient moves nothing.
    config = tiny_config(grad_clip=1e-15, weight_decay=0.0, ema_decay=0.0)
    run_tiny(tmp_path, config=config)
    first, last = (load_checkpoint(step_folder(tmp_path / "run", step)).tensors for step in (8, 12))
    assert all(torch.allclose(first[name], tensor, rtol=0, atol=1e-6) for name, tensor in last.items())
    assert all(line["grad_norm"] > 1e-3 for line in metrics(tmp_path / "run"))


def test_validation_is_the_global_sum_over_the_global_count(model):
    windows = np.random.default_rng(1).integers(0, 256, (7, SEQ_LEN), dtype=np.uint8)
    learner = Learner(model, TrainConfig(precision="fp32"), ALONE)
    with torch.no_grad():
        log_p = model.eval()(torch.from_numpy(windows).long()).double().log_softmax(-1)
    expected = -log_p.gather(-1, torch.from_numpy(windows).long()[..., None]).mean() / math.log(2)
    for batch_size in (1, 3, 7, 100):
        assert learner.evaluate(windows, batch_size, (windows.shape[1],)) == pytest.approx(expected.item(), rel=1e-6)


def test_micro_batches_add_up_to_the_whole_batch(tmp_path):
    model = MegaByteConfig(levels=TINY_MODEL.levels, max_seq_len=SEQ_LEN)
    for size in (1, 4):
        run_tiny(tmp_path, f"run{size}", tiny_config(model, micro_batch_size=size))
    for one, whole in zip(metrics(tmp_path / "run1"), metrics(tmp_path / "run4"), strict=True):
        assert one["loss_nats"] == pytest.approx(whole["loss_nats"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_a_forward_pass_on_a_cpu_is_short_enough_to_be_waited_for_by_a_signal(tmp_path, monkeypatch):
    sizes, forward = [], MeanNll.forward
    monkeypatch.setattr(MeanNll, "forward", lambda self, byte_ids: sizes.append(byte_ids.numel()) or forward(self, byte_ids))
    run_tiny(tmp_path, config=tiny_config(num_steps=1, batch_size=1024, micro_batch_size=0))
    assert sizes == [16384, 16384]


# What is written


def test_metrics_have_a_line_for_every_logged_step(tmp_path):
    config = tiny_config(log_every=4)
    result = run_tiny(tmp_path, config=config)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [4, 6, 8, 12]
    assert [line["valid_bits_per_byte"] is not None for line in lines] == [False, True, False, True]
    assert lines[-1]["bytes_seen"] == result.bytes_seen == 12 * 4 * SEQ_LEN
    for line in lines:
        assert line["bits_per_byte"] == pytest.approx(line["loss_nats"] / math.log(2))
        assert line["lr"] == config.train.lr * learning_rate_fraction(line["step"] - 1, config.train)


def test_metrics_say_everything_under_the_promised_keys(tmp_path):
    run_tiny(tmp_path)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {
            *("step", "loss_nats", "bits_per_byte", "valid_bits_per_byte", "lr", "grad_norm"),
            *("bytes_seen", "bytes_per_s", "seconds"),
        }


def test_a_terminal_shows_the_bytes_the_time_left_and_the_speed(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    run_tiny(tmp_path)
    last = sys.stderr.getvalue().rpartition("\r")[2]
    assert re.search(r"1\.54k/1\.54k \[\d\d:\d\d<\d\d:\d\d, .*B/s, \d\.\d\d\d bits/byte\]", last)


def test_the_export_holds_the_averaged_weights_and_says_what_they_score(tmp_path):
    result = run_tiny(tmp_path, num_values=4)
    step = step_folder(tmp_path / "run", 12)
    average = load_train_state(step).tensors
    export, weights = load_checkpoint(result.export), load_checkpoint(step).tensors
    for name, tensor in export.tensors.items():
        assert torch.equal(tensor, average[f"average.{name}"].bfloat16())
        assert not torch.equal(average[f"average.{name}"], weights[name])
    assert export.card["bits_per_byte"]["valid"]["value"] == result.bits_per_byte
    assert (export.card["num_steps"], export.card["bytes_seen"]) == (12, result.bytes_seen)


@pytest.mark.parametrize("level", [0, 1])
def test_a_level_without_layers_is_trained_saved_and_goes_on(level, tmp_path):
    levels = list(TINY_MODEL.levels)
    levels[level] = dataclasses.replace(levels[level], num_layers=0)
    model = dataclasses.replace(TINY_MODEL, levels=tuple(levels), residual_scalars=True)
    run_tiny(tmp_path, config=tiny_config(model, num_steps=4))
    assert run_tiny(tmp_path, config=tiny_config(model), resume=True).steps == 12


def test_only_the_newest_checkpoints_stay(tmp_path):
    run_tiny(tmp_path, config=tiny_config(keep_checkpoints=2, checkpoint_every=3))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


def test_bf16_autocast_keeps_weights_and_moments_in_float32(tmp_path):
    run_tiny(tmp_path, config=tiny_config(precision="bf16"))
    step = step_folder(tmp_path / "run", 12)
    tensors = load_checkpoint(step).tensors | load_train_state(step).tensors
    assert {t.dtype for name, t in tensors.items() if not name.startswith("random.")} == {torch.float32}


# What is refused


def test_layers_add_up_in_bf16_where_the_run_multiplies_in_it(monkeypatch):
    monkeypatch.setattr(learner, "multiplies_bf16", lambda: True)
    model, byte_ids = build(CASES["recipe"]), random_bytes(2, CONTEXT)
    seen, losses = [], {}
    for block in (block for level in model.levels for block in level.transformer.blocks):
        block.register_forward_hook(lambda _, inputs, output: seen.extend(x.dtype for x in (inputs[0], *output) if x is not None))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        loss = MeanNll(model, precision)(byte_ids)
        assert set(seen) == {dtype}
        assert loss.dtype == torch.float32
        losses[precision] = loss.item()
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_cpu_that_cannot_multiply_bf16_trains_in_fp32_and_the_card_says_so(multiplies, tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "multiplies_bf16", lambda: multiplies)
    asked = run_tiny(tmp_path, "asked", tiny_config(precision="bf16"))
    run_tiny(tmp_path, "fp32", tiny_config(precision="fp32"))
    assert (metrics(tmp_path / "asked") == metrics(tmp_path / "fp32")) is not multiplies
    assert load_checkpoint(asked.export).card["engine"] == ("torch-bf16" if multiplies else "torch-fp32")


def test_validating_and_saving_are_no_seconds_of_training(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def taking(seconds, do):
        def timed(*arguments):
            now[0] += seconds
            return do(*arguments)

        return timed

    for name, seconds in (("accumulate_gradients", 1.0), ("evaluate", 100.0), ("save", 10.0)):
        monkeypatch.setattr(_Run, name, taking(seconds, getattr(_Run, name)))
    run_tiny(tmp_path, config=tiny_config(num_steps=4, eval_every=2, checkpoint_every=3))
    result = run_tiny(tmp_path, config=tiny_config(num_steps=12, eval_every=2, checkpoint_every=3), resume=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == list(range(1, 13))
    assert {line["bytes_per_s"] for line in lines} == {4 * SEQ_LEN}
    assert load_checkpoint(result.export).card["train_seconds"] in range(1, 13)


def test_training_works_in_any_thread(tmp_path):
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(run_tiny, tmp_path).result().steps == 12


def test_a_new_run_never_mixes_with_what_is_there(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not empty; resume its run with --resume"):
        run_tiny(tmp_path.parent, out=tmp_path.name)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_a_run_whose_data_was_refused_may_be_started_again(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="one sequence needs 32"):
        run_tiny(tmp_path)
    (tmp_path / "train.bin").unlink()
    run_tiny(tmp_path)


@pytest.mark.parametrize(
    ("device", "precision", "inside"), [("cuda", "bf16", "high"), ("cuda", "fp32", "highest"), ("cpu", "bf16", "highest")]
)
def test_float32_products_of_a_bf16_run_on_a_gpu_are_rounded_while_it_learns(device, precision, inside):
    with learning_precision(torch.device(device), precision):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("wanted", [True, False])
def test_repeatable_kernels_are_a_setting_that_ends_with_the_run(wanted):
    before = torch.are_deterministic_algorithms_enabled()
    with repeatable_kernels(wanted):
        assert torch.are_deterministic_algorithms_enabled() is wanted
    assert torch.are_deterministic_algorithms_enabled() is before


def test_validating_on_the_training_data_is_said(tmp_path):
    lines = []
    path, _ = tiny_data(tmp_path)
    train(tiny_config(), [path], [path], tmp_path / "run", log=lines.append)
    assert f"{path} is validated on and trained on" in lines[0]


def test_batches_that_do_not_divide_are_refused():
    assert [micro_batch_size(TrainConfig(batch_size=12), 2, most) for most in (1, 4, 5, 100)] == [1, 3, 3, 6]
    with pytest.raises(UserError, match="batch_size=8 must be a multiple of micro_batch_size=3 times 2"):
        micro_batch_size(TrainConfig(batch_size=8, micro_batch_size=3), num_ranks=2, most=8)


def test_checkpointed_activations_change_no_step(tmp_path):
    for name, settings in {"kept": {}, "recomputed": {"checkpoint_activations": True}}.items():
        run_tiny(tmp_path, name, tiny_config(num_steps=4, **settings))
    kept, recomputed = metrics(tmp_path / "kept"), metrics(tmp_path / "recomputed")
    assert [line["loss_nats"] for line in recomputed] == pytest.approx([line["loss_nats"] for line in kept], rel=1e-5)
    assert [line["grad_norm"] for line in recomputed] == pytest.approx([line["grad_norm"] for line in kept], rel=1e-4)
