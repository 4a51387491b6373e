"""Numbers that are not finite and memory that runs out end a run with a sentence; what was saved stays good."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from core.checkpoint import load_checkpoint
from core.config import TrainConfig
from core.errors import UserError
from core.learner import Learner, MeanNll
from core.models import build_model
from core.optim import FiniteGuard
from core.train import explain_out_of_memory
from tests.tiny_run import ALONE, SEQ_LEN, run_tiny, tiny_config


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(tiny_config())


@pytest.fixture
def byte_ids():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, SEQ_LEN)))


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


def test_running_out_of_memory_names_the_batch_and_a_smaller_one():
    advice = "8 sequences of 32 bytes at once; try --set train.micro_batch_size=4"
    with pytest.raises(UserError, match=advice), explain_out_of_memory(8, 32):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="unrelated"), explain_out_of_memory(8, 32):
        raise RuntimeError("unrelated")
