"""Training processes that are killed at any moment, also while they write a checkpoint, resume to the same bits."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint import latest_checkpoint
from tests.forked_run import start, steps_reported, wait_for
from tests.tiny_run import digests, metrics, tiny_config

INTERVAL = 5  # steps from one checkpoint to the next


def kill(process: multiprocessing.Process) -> None:
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed"


def half_written(run: Path) -> list[str]:
    """Checkpoints that are being written, or were when the process died."""
    folder = run / "checkpoints"
    return [name for name in os.listdir(folder) if name.endswith(".partial")] if folder.exists() else []


def require_one_interval_lost_at_most(run: Path) -> None:
    checkpoint = latest_checkpoint(run)
    saved = int(checkpoint.folder.name.removeprefix("step-")) if checkpoint else 0
    assert steps_reported(run) - saved <= INTERVAL


@pytest.mark.parametrize(("num_steps", "num_kills"), [(60, 2), pytest.param(200, 20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, num_steps, num_kills):
    """Every second kill is aimed at the writing of a checkpoint, the others fall anywhere."""
    config = tiny_config(num_steps=num_steps, checkpoint_every=INTERVAL, eval_every=20)
    unbroken, run = tmp_path / "unbroken", tmp_path / "killed"
    whole = start(unbroken, config)
    chance = np.random.default_rng(num_kills)
    num_while_saving = 0
    for number, step in enumerate(np.sort(chance.integers(1, num_steps * 3 // 4, num_kills)).tolist()):
        process = start(run, config)
        wait_for(lambda step=step: steps_reported(run) >= step, process)
        if number % 2:
            wait_for(lambda: bool(half_written(run)), process)
            kill(process)
            while not half_written(run):  # it was faster; the next checkpoint will do
                process = start(run, config)
                wait_for(lambda: bool(half_written(run)), process)
                kill(process)
        else:
            time.sleep(chance.uniform(0, 0.02))
            kill(process)
        num_while_saving += bool(half_written(run))
        require_one_interval_lost_at_most(run)
    assert num_while_saving >= num_kills // 2
    for process in (whole, start(run, config)):
        process.join()
        assert process.exitcode == 0
    assert metrics(run) == metrics(unbroken)
    for folder in (f"checkpoints/step-{num_steps:08d}", "export"):
        assert digests(run / folder)
        assert digests(run / folder) == digests(unbroken / folder)
    assert not list(run.rglob(".*"))
