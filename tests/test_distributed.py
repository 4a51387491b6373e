"""Several processes that train together learn what one process learns."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint import load_checkpoint, step_folder
from core.config import MegaByteConfig
from core.distributed import Ranks, join_ranks
from core.errors import UserError
from core.learner import MeanNll
from core.models import build_model
from tests.tiny_run import SEQ_LEN, TINY_MODEL, metrics, run_tiny, tiny_config

WITHOUT_DROPOUT = MegaByteConfig(levels=TINY_MODEL.levels, max_seq_len=SEQ_LEN)
CONFIG = tiny_config(WITHOUT_DROPOUT, micro_batch_size=1)

RANK_PROGRAM = """
import sys
from pathlib import Path
import torch
from tests.test_distributed import CONFIG
from tests.tiny_run import run_tiny

torch.set_num_threads(1)
run_tiny(Path(sys.argv[1]), "two", CONFIG, resume="resume" in sys.argv)
"""


def torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


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


@pytest.mark.parametrize(
    ("device", "says"), [("quantum", "is not a device"), ("meta", "is not supported"), ("cuda:99", "is not there")]
)
def test_a_device_that_cannot_be_used_is_refused(device, says):
    with pytest.raises(UserError, match=says), join_ranks(device):
        pass


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns_and_resume(tmp_path):
    program = tmp_path / "rank.py"
    program.write_text(RANK_PROGRAM)
    run_tiny(tmp_path, "one", CONFIG)
    torchrun(str(program), str(tmp_path))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        valid_one, valid_two = one.pop("valid_bits_per_byte"), two.pop("valid_bits_per_byte")
        assert two == pytest.approx(one, rel=1e-4)
        assert valid_one is valid_two is None or valid_two == pytest.approx(valid_one, rel=1e-5)
    one, two = (load_checkpoint(step_folder(tmp_path / out, 12)).tensors for out in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-3)

    shutil.rmtree(step_folder(tmp_path / "two", 12))
    torchrun(str(program), str(tmp_path), "resume")
    resumed = load_checkpoint(step_folder(tmp_path / "two", 12)).tensors
    assert all(torch.equal(resumed[name], tensor) for name, tensor in two.items())
