"""Numbers that are not finite and memory that runs out end a run with a sentence; what was saved stays good."""

import math
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from core.checkpoint import (
    TrainState,
    export_model,
    latest_checkpoint,
    load_checkpoint,
    load_train_state,
    save_checkpoint,
    step_folder,
    step_folders,
)
from core.config import TrainConfig
from core.errors import UserError
from core.learner import Learner, MeanNll, Nll
from core.optim import FiniteGuard
from core.train import explain_out_of_memory
from tests.forked_run import PROCESSES
from tests.tiny_run import ALONE, digests, run_tiny, tiny_config


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


def test_a_diverging_run_ends_with_the_step_named_and_no_bad_checkpoint(tmp_path):
    config = tiny_config(lr=1e30, warmup_steps=0, grad_clip=1e30, checkpoint_every=1, keep_checkpoints=100)
    with pytest.raises(UserError, match=r"not a finite number at step \d+"):
        run_tiny(tmp_path, config=config)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(path).tensors.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_run_ends_at_the_first_bad_step_with_the_weights_before_it(tmp_path, monkeypatch, place, value):
    """Two forward passes a step: the second of step 6 is bad; reports come every 5 steps only."""
    passes, forward = iter(range(1, 1000)), Nll.forward

    def bad_forward(self, byte_ids):
        nats = forward(self, byte_ids)
        if next(passes) != 12:
            return nats
        if place == "loss":
            return nats * value
        nats.register_hook(lambda gradient: gradient * value)
        return nats

    run_tiny(tmp_path, "stopped", tiny_config(num_steps=5, checkpoint_every=5, eval_every=100, schedule="constant"))
    monkeypatch.setattr(Nll, "forward", bad_forward)
    settings = {"checkpoint_every": 1, "keep_checkpoints": 100, "log_every": 5, "eval_every": 100, "schedule": "constant"}
    with pytest.raises(UserError, match="not a finite number at step 6, so the weights were left as they were"):
        run_tiny(tmp_path, "run", tiny_config(**settings))
    steps = step_folders(tmp_path / "run")
    assert [step.name for step in steps] == [f"step-{step:08d}" for step in range(1, 6)]
    assert digests(steps[-1])["model.safetensors"] == digests(step_folder(tmp_path / "stopped", 5))["model.safetensors"]
    for step in steps:
        tensors = load_checkpoint(step).tensors | load_train_state(step).tensors
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_weights_too_large_to_validate_are_named_and_neither_saved_nor_exported(tmp_path):
    config = tiny_config(lr=1e30, warmup_steps=0, checkpoint_every=1, eval_every=1)
    with pytest.raises(UserError, match="the validation after step 1 gave no finite number"):
        run_tiny(tmp_path, config=config)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_what_is_not_finite_is_never_written(tmp_path):
    for tensors, state in (({"w": torch.tensor([1.0, math.inf])}, {}), ({}, {"average.w": torch.tensor([math.nan])})):
        counters = {"step": 1, "bytes_seen": 1, "seconds": 1.0, "best_bits_per_byte": None}
        with pytest.raises(UserError, match="w holds values that are no finite numbers"):
            save_checkpoint(step_folder(tmp_path, 1), tiny_config(), tensors, TrainState(**counters, tensors=state))
    with pytest.raises(UserError, match="no finite numbers"):
        export_model(tmp_path / "export", tiny_config(), {"w": torch.full((2,), 3.4e38)}, {})  # beyond bfloat16
    assert not list(tmp_path.rglob("*.safetensors"))


def run_beyond_memory(folder: Path) -> None:
    torch.set_num_threads(1)
    run_tiny(folder, config=tiny_config(num_steps=2, batch_size=4, checkpoint_every=1))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
    config = tiny_config(num_steps=3, batch_size=1 << 15, micro_batch_size=1 << 15)
    try:
        run_tiny(folder, "large", config)
    except ValueError as error:
        (folder / "said").write_text(str(error))


def test_a_step_beyond_the_memory_of_the_process_names_the_batch_and_leaves_the_checkpoint(tmp_path):
    process = PROCESSES.Process(target=run_beyond_memory, args=(tmp_path,))
    process.start()
    process.join()
    said = (tmp_path / "said").read_text()
    assert said == "out of memory with 32768 sequences of 32 bytes at once; try --set train.micro_batch_size=16384"
    assert latest_checkpoint(tmp_path / "run").folder.name == "step-00000002"


def test_running_out_of_memory_names_the_batch_and_a_smaller_one():
    advice = "8 sequences of 32 bytes at once; try --set train.micro_batch_size=4"
    with pytest.raises(UserError, match=advice), explain_out_of_memory(8, 32):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="unrelated"), explain_out_of_memory(8, 32):
        raise RuntimeError("unrelated")


@pytest.mark.slow  # imports the compiler
def test_running_out_of_memory_while_compiling_is_explained_as_well():
    def compile_graph(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="out of memory with 8 sequences"), explain_out_of_memory(8, 32):
        torch.compile(torch.neg, backend=compile_graph)(torch.zeros(1))
