"""The training loop: what it learns, what it writes, how it stops and how it goes on."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.checkpoint import load_checkpoint, load_train_state, step_folder
from core.config import LevelConfig, MegaByteConfig, PerceiverArConfig, TrainConfig
from core.distributed import Ranks
from core.errors import UserError
from core.learner import Learner, MeanNll
from core.models import build_model
from core.optim import (
    FiniteGuard,
    Muon,
    average_decay,
    build_optimizers,
    learning_rate_fraction,
    orthogonalized,
    parameter_groups,
    set_learning_rate,
)
from core.run_folder import StopSignals, claim_run
from core.train import explain_out_of_memory, micro_batch_size, repeatable_kernels, train
from tests.tiny_run import SEQ_LEN, TINY_MODEL, digests, metrics, run_tiny, tiny_config, tiny_data

KILLED_CONFIG = tiny_config(num_steps=60, checkpoint_every=1, eval_every=3)
KILLED_PROGRAM = """
import sys
from pathlib import Path
from tests.test_train import KILLED_CONFIG, run_tiny

print("ready", flush=True)
out = Path(sys.argv[1]) / "killed"
run_tiny(out.parent, out.name, KILLED_CONFIG, resume=(out / "config.json").exists())
"""

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(tiny_config())


@pytest.fixture
def byte_ids():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, SEQ_LEN)))


# The schedule and the optimizer


@pytest.mark.parametrize(
    ("schedule", "at_60", "at_85"),
    [("constant", 1.0, 1.0), ("linear", 0.55, 0.325), ("cosine", 0.55, 0.2318), ("trapezoid", 1.0, 0.6625)],
)
def test_learning_rate_warms_up_and_then_follows_its_schedule(schedule, at_60, at_85):
    config = TrainConfig(num_steps=110, warmup_steps=10, schedule=schedule, decay_fraction=0.4, final_lr_fraction=0.1)
    assert [learning_rate_fraction(step, config) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate_fraction(60, config) == pytest.approx(at_60)
    assert learning_rate_fraction(85, config) == pytest.approx(at_85, abs=1e-4)
    assert learning_rate_fraction(110, config) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate_fraction(0, TrainConfig(warmup_steps=0)) == 1.0


def test_set_learning_rate_is_a_fraction_of_each_group_s_own(model):
    optimizers = build_optimizers(model, TrainConfig(optimizer="muon", lr=0.5, muon_lr=0.25))
    for optimizer in optimizers:
        set_learning_rate(optimizer, 0.1)
        set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [0.05, 0.05, 0.1, 0.1]


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 6), (2, 6, 24)])
def test_orthogonalized_matrices_have_singular_values_near_one_and_the_same_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    moved = left.mT @ orthogonalized(matrices) @ right.mT  # diagonal in the bases of the matrices themselves
    diagonal = torch.diagonal(moved, dim1=1, dim2=2)
    assert (diagonal - 1).abs().max() < 0.4
    assert (moved - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_muon_moves_the_layers_matrices_and_adamw_all_else(model):
    muon, adamw = build_optimizers(model, TrainConfig(optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for optimizer in (muon, adamw) for group in optimizer.param_groups]
    assert set().union(*groups) == set(names.values())
    assert sum(map(len, groups)) == len(names)
    assert all(name.endswith("qkv.weight") for name in groups[1])
    assert all(name.endswith(("out.weight", "ffn_in.weight", "project.weight")) for name in groups[0])
    assert any("embedding" in name for name in groups[3])


def test_muon_s_step_is_its_learning_rate_long_in_every_direction():
    weight = nn.Parameter(torch.zeros(9, 3))
    muon = Muon([{"params": [weight], "parts": 3}], lr=0.5, weight_decay=0.1)
    weight.grad = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    muon.step()
    assert torch.linalg.svdvals(weight.detach().view(3, 3, 3)).numpy() == pytest.approx(0.5, rel=0.35)
    before = weight.detach().clone()
    weight.grad = torch.zeros(9, 3)
    muon.state[weight]["mean"].zero_()
    muon.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.5 * 0.1))


def test_every_parameter_is_in_one_group_and_only_matrices_decay(model):
    decaying, staying = parameter_groups(model, weight_decay=0.1)
    assert (decaying["weight_decay"], staying["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying_names, staying_names = ({names[id(p)] for p in group["params"]} for group in (decaying, staying))
    assert decaying_names | staying_names == set(names.values())
    assert not decaying_names & staying_names
    assert all(
        name.endswith(("qkv.weight", "out.weight", "ffn_in.weight", "ffn_out.weight", "project.weight"))
        for name in decaying_names
    )
    assert any("embedding" in name for name in staying_names)


def test_average_is_the_weighted_sum_of_all_past_weights(model):
    learner = Learner(model, TrainConfig(ema_decay=0.9), ALONE)
    name, weight = next(iter(model.named_parameters()))
    expected = weight.detach().clone()
    for step in range(30):
        model.zero_grad()
        weight.grad = torch.ones_like(weight)
        learner.update(torch.tensor(0.0), 1.0)
        decay = average_decay(step, 0.9)
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(learner.average[name], expected)
    assert not torch.equal(learner.average[name], weight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_non_finite_gradient_changes_no_weight_and_its_step_is_known(model, byte_ids, optimizer):
    learner, guard = Learner(model, TrainConfig(optimizer=optimizer), ALONE), FiniteGuard(ALONE.device)
    objective = MeanNll(model, "fp32")
    history = []
    for step in range(4):
        loss = objective(byte_ids)
        loss.backward()
        if step == 2:
            next(model.parameters()).grad[0] = math.nan
        learner.update(guard.watch(step, loss.detach(), nn.utils.clip_grad_norm_(model.parameters(), 1.0)), 1.0)
        history.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
    assert guard.bad_step() == 2
    assert not torch.equal(history[0], history[1])
    assert torch.equal(history[1], history[2])
    assert torch.equal(history[1], history[3])
    assert all(torch.isfinite(tensor).all() for tensor in learner.capture().tensors.values())


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", EVERY_KIND)
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
        assert learner.evaluate(windows, batch_size, (windows.shape[1],)) == pytest.approx(expected.item(), abs=1e-6)


def test_micro_batches_add_up_to_the_whole_batch(tmp_path):
    model = MegaByteConfig(levels=TINY_MODEL.levels, max_seq_len=SEQ_LEN)
    for size in (1, 4):
        run_tiny(tmp_path, f"run{size}", tiny_config(model, micro_batch_size=size))
    for one, whole in zip(metrics(tmp_path / "run1"), metrics(tmp_path / "run4"), strict=True):
        assert one["loss_nats"] == pytest.approx(whole["loss_nats"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


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


def test_only_the_newest_checkpoints_stay(tmp_path):
    run_tiny(tmp_path, config=tiny_config(keep_checkpoints=2, checkpoint_every=3))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


def test_bf16_autocast_keeps_weights_and_moments_in_float32(tmp_path):
    run_tiny(tmp_path, config=tiny_config(precision="bf16"))
    step = step_folder(tmp_path / "run", 12)
    tensors = load_checkpoint(step).tensors | load_train_state(step).tensors
    assert {t.dtype for name, t in tensors.items() if not name.startswith("random.")} == {torch.float32}


# How it stops and goes on


def stop_when(step: int, action):
    """A log function that acts once, when the validation of `step` is reported."""

    def log(line: str) -> None:
        if line.startswith(f"step {step}:"):
            action()

    return log


def crash() -> None:
    raise OSError("pulled plug")


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_the_next_step_and_the_resumed_run_is_bit_identical(tmp_path, number, error):
    run_tiny(tmp_path, "unbroken")
    with pytest.raises(error) as caught:
        run_tiny(tmp_path, "stopped", log=stop_when(6, lambda: os.kill(os.getpid(), number)))
    if error is SystemExit:
        assert caught.value.code == 143
    assert step_folder(tmp_path / "stopped", 7).is_dir()
    run_tiny(tmp_path, "stopped", resume=True)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")
    assert digests(tmp_path / "stopped" / "export") == digests(tmp_path / "unbroken" / "export")
    last = "checkpoints/step-00000012"
    assert digests(tmp_path / "stopped" / last) == digests(tmp_path / "unbroken" / last)


def test_a_crash_between_checkpoints_loses_only_the_steps_since_the_last_one(tmp_path):
    run_tiny(tmp_path, "unbroken")
    with pytest.raises(OSError, match="pulled plug"):
        run_tiny(tmp_path, "crashed", log=stop_when(6, crash))
    lines = []
    run_tiny(tmp_path, "crashed", resume=True, log=lines.append)
    assert "step-00000004" in lines[0]
    assert metrics(tmp_path / "crashed") == metrics(tmp_path / "unbroken")
    last = "checkpoints/step-00000012"
    assert digests(tmp_path / "crashed" / last) == digests(tmp_path / "unbroken" / last)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    run_tiny(tmp_path, "unbroken")
    with pytest.raises(OSError, match="pulled plug"):
        run_tiny(tmp_path, "crashed", tiny_config(checkpoint_every=100), log=stop_when(6, crash))
    run_tiny(tmp_path, "crashed", resume=True)
    assert metrics(tmp_path / "crashed") == metrics(tmp_path / "unbroken")


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    """SIGKILL at moments that fall into training, evaluating, exporting and saving alike."""
    run_tiny(tmp_path, "unbroken", KILLED_CONFIG)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", KILLED_PROGRAM, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    delays = np.random.default_rng(0).uniform(0.0, 0.5, 8)
    num_kills = 0
    for delay in (*delays, None):
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE)
        process.stdout.readline()  # imports are done
        if delay is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            process.kill()
        exit_code = process.wait(60)
        process.stdout.close()
        assert exit_code in (0, -signal.SIGKILL)
        num_kills += exit_code == -signal.SIGKILL
    assert num_kills >= 3
    last = f"checkpoints/step-{KILLED_CONFIG.train.num_steps:08d}"
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "unbroken")
    assert digests(tmp_path / "killed" / last) == digests(tmp_path / "unbroken" / last)
    assert digests(tmp_path / "killed" / "export") == digests(tmp_path / "unbroken" / "export")
    assert not list((tmp_path / "killed").rglob(".*"))


def test_a_finished_run_resumes_to_the_same_result(tmp_path):
    assert run_tiny(tmp_path) == run_tiny(tmp_path, resume=True)


def test_after_the_first_signal_the_next_one_ends_the_process_as_usual():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_diverging_run_ends_with_the_step_named_and_no_bad_checkpoint(tmp_path):
    config = tiny_config(lr=1e30, warmup_steps=0, grad_clip=1e30, checkpoint_every=1, keep_checkpoints=100)
    with pytest.raises(UserError, match=r"not a finite number at step \d+"):
        run_tiny(tmp_path, config=config)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(path).tensors.values())


# What is refused


def test_a_folder_in_use_is_refused_with_the_process_named_and_a_stale_claim_is_taken_over(tmp_path):
    claim, process = claim_run(tmp_path / "run", resume=False), f"process {os.getpid()}"
    with claim, pytest.raises(UserError, match=process), claim_run(tmp_path / "run", resume=False):
        pass
    (tmp_path / "run" / "pid").write_text("1\n")
    with claim_run(tmp_path / "run", resume=False):
        assert (tmp_path / "run" / "pid").read_text() == f"{os.getpid()}\n"


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


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no training run to resume"):
        run_tiny(tmp_path, resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 8}, {"seq_len": 16}, {"ema_decay": 0.0}])
def test_resuming_with_other_data_order_or_average_is_refused(tmp_path, change):
    run_tiny(tmp_path)
    with pytest.raises(UserError, match=f"train.{next(iter(change))}="):
        run_tiny(tmp_path, config=tiny_config(**change), resume=True)


def test_resuming_another_model_is_refused(tmp_path):
    run_tiny(tmp_path)
    other = MegaByteConfig(levels=TINY_MODEL.levels[1:], max_seq_len=SEQ_LEN)
    with pytest.raises(UserError, match="another model"):
        run_tiny(tmp_path, config=tiny_config(other), resume=True)


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


def test_a_run_may_go_on_for_longer(tmp_path):
    run_tiny(tmp_path)
    result = run_tiny(tmp_path, config=tiny_config(num_steps=15), resume=True)
    assert result.steps == 15
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 16))


def test_batches_that_do_not_divide_are_refused():
    assert micro_batch_size(TrainConfig(batch_size=8), num_ranks=2) == 4
    with pytest.raises(UserError, match="batch_size=8 must be a multiple of micro_batch_size=3 times 2"):
        micro_batch_size(TrainConfig(batch_size=8, micro_batch_size=3), num_ranks=2)


def test_running_out_of_memory_names_the_batch_and_a_smaller_one():
    advice = "8 sequences of 32 bytes at once; try --set train.micro_batch_size=4"
    with pytest.raises(UserError, match=advice), explain_out_of_memory(8, 32):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="unrelated"), explain_out_of_memory(8, 32):
        raise RuntimeError("unrelated")


def test_checkpointed_activations_change_no_step(tmp_path):
    for name, settings in {"kept": {}, "recomputed": {"checkpoint_activations": True}}.items():
        run_tiny(tmp_path, name, tiny_config(num_steps=4, **settings))
    kept, recomputed = metrics(tmp_path / "kept"), metrics(tmp_path / "recomputed")
    assert [line["loss_nats"] for line in recomputed] == pytest.approx([line["loss_nats"] for line in kept], rel=1e-5)
    assert [line["grad_norm"] for line in recomputed] == pytest.approx([line["grad_norm"] for line in kept], rel=1e-4)
