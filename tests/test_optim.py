"""How weights move: schedule, optimizers, running average."""

import pytest
import torch
from torch import nn

from core.config import TrainConfig
from core.learner import Learner
from core.optim import (
    Muon,
    average_decay,
    build_optimizers,
    learning_rate_fraction,
    orthogonalized,
    parameter_groups,
    set_learning_rate,
)
from tests.tiny_run import ALONE


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
