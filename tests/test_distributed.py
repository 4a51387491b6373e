"""Several processes that train together learn what one process learns."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint import load_checkpoint, load_train_state, step_folder
from core.config import LevelConfig, MegaByteConfig
from core.distributed import Ranks, join_ranks, usable_device
from core.errors import UserError
from core.learner import Learner, MeanNll
from core.models import build_model
from tests.tiny_run import SEQ_LEN, TINY_MODEL, digests, metrics, run_tiny, tiny_config

WITHOUT_DROPOUT = MegaByteConfig(levels=TINY_MODEL.levels, max_seq_len=SEQ_LEN)
# With weights of 1 and of 3 rows, which two ranks cannot share equally.
UNEVEN = MegaByteConfig(
    levels=(
        LevelConfig(dim=30, num_layers=3, num_heads=3, ffn_dim=37, patch_size=4, byte_dim=7, conv_kernels=(3,)),
        LevelConfig(dim=18, num_layers=1, num_heads=3, cross_patch=2),
    ),
    max_seq_len=SEQ_LEN,
    positions="both",
    unembedder="full",
    residual_scalars=True,
)
WITHOUT_LAYERS = MegaByteConfig(
    levels=(TINY_MODEL.levels[0], LevelConfig(dim=16, num_layers=0, num_heads=2)), max_seq_len=SEQ_LEN, residual_scalars=True
)
CONFIGS = {
    "ddp": tiny_config(WITHOUT_DROPOUT, micro_batch_size=1),
    "ddp_without_layers": tiny_config(WITHOUT_LAYERS, micro_batch_size=1),
    "fsdp": tiny_config(UNEVEN, micro_batch_size=1, parallel="fsdp"),
    "fsdp_muon": tiny_config(WITHOUT_DROPOUT, micro_batch_size=1, parallel="fsdp", optimizer="muon", checkpoint_activations=True),
}

RANK_PROGRAM = """
import sys
from pathlib import Path
import torch
from core.models import loss
from tests.test_distributed import CONFIGS
from tests.tiny_run import SEQ_LEN, run_tiny

torch.set_num_threads(1)
for budgets in (loss._CHUNK_BYTES, loss._RECOMPUTED_CHUNK_BYTES):
    budgets["cpu"] = SEQ_LEN // 2  # the local model's layers run twice in a pass
run_tiny(Path(sys.argv[1]), "two", CONFIGS[sys.argv[2]], resume="resume" in sys.argv)
"""


def torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "UserWarning" not in result.stderr


def test_the_mean_of_the_ranks_gradients_is_the_gradient_of_the_whole_batch():
    byte_ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, SEQ_LEN)))
    torch.manual_seed(0)
    model = build_model(tiny_config(WITHOUT_DROPOUT))
    objective, parameters = MeanNll(model, "fp32"), list(model.parameters())
    whole = torch.autograd.grad(objective(byte_ids), parameters)
    halves = [torch.autograd.grad(objective(rows), parameters) for rows in byte_ids.split(2)]
    for expected, first, second in zip(whole, *halves, strict=True):
        torch.testing.assert_close((first + second) / 2, expected)


def test_one_process_is_a_rank_of_one_and_its_collectives_are_local():
    with join_ranks("cpu") as ranks:
        assert ranks == Ranks(0, 1, torch.device("cpu"))
        assert ranks.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert [tensor.tolist() for tensor in ranks.gather(torch.tensor([3]))] == [[3]]
        assert (ranks.any(True), ranks.any(False)) == (True, False)


def test_one_process_holds_all_weights_whatever_is_asked_of_several(tmp_path):
    for parallel in ("ddp", "fsdp"):
        run_tiny(tmp_path, parallel, tiny_config(parallel=parallel))
    assert digests(tmp_path / "fsdp") == digests(tmp_path / "ddp")


def test_ranks_validate_equally_many_windows_and_each_counts_once(monkeypatch):
    """Ranks that gather sharded weights for every pass would wait for ever for one that makes a pass less."""
    windows = np.random.default_rng(1).integers(0, 256, (7, SEQ_LEN), dtype=np.uint8)
    sums, batches = [], []
    monkeypatch.setattr(Ranks, "sum", lambda _, values: sums.append(values.clone()) or values)
    for rank, num_ranks in ((0, 1), (0, 3), (1, 3), (2, 3)):
        torch.manual_seed(0)
        learner = Learner(build_model(CONFIGS["ddp"]), CONFIGS["ddp"].train, Ranks(rank, num_ranks, torch.device("cpu")))
        measure = learner.model.measure
        monkeypatch.setattr(
            learner.model, "measure", lambda ids, *rest, rank=rank, do=measure: batches.append((rank, len(ids))) or do(ids, *rest)
        )
        learner.evaluate(windows, 2, (SEQ_LEN,))
    assert batches[4:] == [(rank, size) for rank in range(3) for size in (2, 1)]
    torch.testing.assert_close(sum(sums[1:]), sums[0])
    assert sums[0][1] == windows.size


def test_a_validation_of_the_averaged_weights_leaves_all_as_it_was():
    config = tiny_config()
    learner = Learner(build_model(config), config.train, Ranks(0, 1, torch.device("cpu")))
    for tensor in learner.average.values():
        tensor.mul_(1.5)
    tensors = [*learner.weights.values(), *learner.average.values()]
    before = [tensor.clone() for tensor in tensors]
    learner.evaluate(np.zeros((3, SEQ_LEN), dtype=np.uint8), 2, (SEQ_LEN,))
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize(("has_gpu", "kind"), [(False, "cpu"), (True, "cuda")])
def test_the_device_is_a_gpu_if_there_is_one(has_gpu, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert usable_device("auto").type == kind


@pytest.mark.parametrize(
    ("device", "says"), [("quantum", "is not a device"), ("meta", "is not supported"), ("cuda:99", "is not there")]
)
def test_a_device_that_cannot_be_used_is_refused(device, says):
    with pytest.raises(UserError, match=says), join_ranks(device):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
def test_two_ranks_learn_what_one_process_learns_and_resume(case, tmp_path):
    program = tmp_path / "rank.py"
    program.write_text(RANK_PROGRAM)
    run_tiny(tmp_path, "one", CONFIGS[case])
    torchrun(str(program), str(tmp_path), case)
    require_same_course(tmp_path / "one", tmp_path / "two")
    two = step_tensors(tmp_path / "two")

    shutil.rmtree(step_folder(tmp_path / "two", 12))
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    torchrun(str(program), str(tmp_path), case, "resume")
    resumed = step_tensors(tmp_path / "two")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in two.items())

    run_tiny(tmp_path, "alone", CONFIGS[case], resume=True)
    require_same_course(tmp_path / "one", tmp_path / "alone")


def step_tensors(out: Path) -> dict[str, torch.Tensor]:
    """All that the last step keeps, but for the generators, which each rank has of its own."""
    step = step_folder(out, 12)
    tensors = load_checkpoint(step).tensors | load_train_state(step).tensors
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}


def require_same_course(one: Path, other: Path) -> None:
    """The same metrics, weights, moments and averages but for what the order of float32 sums changes."""
    for expected, found in zip(metrics(one), metrics(other), strict=True):
        valid_expected, valid_found = expected.pop("valid_bits_per_byte"), found.pop("valid_bits_per_byte")
        assert found == pytest.approx(expected, rel=1e-4)
        assert valid_found is valid_expected is None or valid_found == pytest.approx(valid_expected, rel=1e-5)
    found = step_tensors(other)
    for name, tensor in step_tensors(one).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-3)
