"""The train command ends when it is asked to: with its state saved, in seconds, with the exit code of the signal."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from page_server import free_port

from app.__main__ import _leave
from core.checkpoint import latest_checkpoint
from core.config import load_config
from core.errors import UserError
from core.learner import Nll
from tests.forked_app import ForkedApp
from tests.forked_run import steps_reported
from tests.tiny_run import digests, metrics, run_tiny, tiny_data

ROOT = Path(__file__).parents[1]
LEVELS = (
    '[{"dim": 32, "num_layers": 1, "num_heads": 2, "patch_size": 4, "ffn_dim": 128, "byte_dim": 0},'
    ' {"dim": 16, "num_layers": 1, "num_heads": 2, "patch_size": 1, "ffn_dim": 64, "byte_dim": 0}]'
)


def train_arguments(folder: Path, run: Path, **changes: object) -> list[str]:
    """The command line that trains a tiny model, or goes on with it; `changes` are settings of its training."""
    train_path, valid_path = tiny_data(folder)
    settings = {"num_steps": 120, "checkpoint_every": 50, "eval_every": 30, "eval_sequences": 5, "log_every": 1}
    settings |= {"batch_size": 4, "micro_batch_size": 1, "precision": "fp32", "seq_len": 0} | changes
    overrides = [f"model.levels={LEVELS}", "model.max_seq_len=32", "model.dropout=0.1"]
    overrides += [f"train.{name}={value}" for name, value in settings.items()]
    arguments = ["train", "--preset", "text", "--data", train_path, "--valid", valid_path, "--out", run, "--set", *overrides]
    if (run / "config.json").exists():
        arguments.append("--resume")
    return list(map(str, arguments))


@contextlib.contextmanager
def started(folder: Path, run: Path, **changes: object) -> Iterator[ForkedApp]:
    """The command line with `train_arguments`."""
    with ForkedApp(*train_arguments(folder, run, **changes), stdout=os.devnull) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def started_rank(folder: Path, run: Path, place: dict[str, str], **changes: object) -> Iterator[subprocess.Popen]:
    """`python -m app` with `train_arguments`, and in its environment what torchrun says of its place."""
    command = [sys.executable, "-m", "app", *train_arguments(folder, run, **changes)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **place}, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_step(process: ForkedApp | subprocess.Popen, run: Path, step: int) -> None:
    def has_begun() -> bool:
        pid = run / "pid"
        return pid.exists() and pid.read_text() == f"{process.pid}\n"

    while process.poll() is None and not (steps_reported(run) >= step and has_begun()):
        time.sleep(0.001)
    assert process.poll() is None, process.stderr.read()


def stop(process: ForkedApp | subprocess.Popen, number: signal.Signals) -> None:
    """Sends a signal and requires an end in time, with its exit code and without an error."""
    process.send_signal(number)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert time.monotonic() - began < 10
    assert not [line for line in err.splitlines() if "rror" in line]


@pytest.mark.parametrize(("num_stops", "num_steps"), [(1, 40), pytest.param(20, 120, marks=pytest.mark.slow)])
def test_a_run_stopped_at_random_moments_loses_no_step_and_ends_with_the_same_bits(tmp_path, num_stops, num_steps):
    run, unbroken = tmp_path / "stopped", tmp_path / "unbroken"
    chance = np.random.default_rng(num_stops)
    moments = np.sort(chance.choice(np.arange(1, num_steps - 20), num_stops, replace=False)).tolist()
    for number, step in enumerate(moments):
        with started(tmp_path, run, num_steps=num_steps) as process:
            wait_for_step(process, run, step)
            if number == 0:
                with pytest.raises(UserError, match=rf"is being trained by process {process.pid}; stop it or"):
                    run_tiny(tmp_path, run.name, load_config(run / "config.json"), resume=True)
            time.sleep(chance.uniform(0, 0.02))
            stop(process, signal.SIGINT if number % 2 else signal.SIGTERM)
        saved = int(latest_checkpoint(run).folder.name.removeprefix("step-"))
        assert saved - steps_reported(run) in (0, 1)  # 1 if the signal came in its validation
    config = load_config(run / "config.json")
    for out, resume in ((run, True), (unbroken, False)):
        run_tiny(tmp_path, out.name, config, resume=resume)
    assert metrics(run) == metrics(unbroken)
    for folder in (f"checkpoints/step-{num_steps:08d}", "export"):
        assert digests(run / folder) == digests(unbroken / folder)


def test_a_step_that_would_take_minutes_is_given_up(tmp_path):
    run = tmp_path / "run"
    with started(tmp_path, run, batch_size=30_000) as process:
        while process.poll() is None and not (run / "metrics.jsonl").exists():  # made when training begins
            time.sleep(0.01)
        time.sleep(0.5)
        stop(process, signal.SIGINT)
    assert not (run / "pid").exists()


@contextlib.contextmanager
def two_ranks(folder: Path, run: Path, **changes: object) -> Iterator[list[subprocess.Popen]]:
    """Two processes that train together; all of them have begun the run's first steps."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        places = [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        yield [stack.enter_context(started_rank(folder, run, place, **changes)) for place in places]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("asked", [0, 1])
def test_two_ranks_save_and_leave_if_one_of_them_is_asked_to(tmp_path, number, asked):
    settings = {"num_steps": 40, "eval_every": 20, "micro_batch_size": 1}
    for run, is_stopped in ((tmp_path / "stopped", True), (tmp_path / "stopped", False), (tmp_path / "unbroken", False)):
        with two_ranks(tmp_path, run, **settings) as ranks:
            if is_stopped:
                wait_for_step(ranks[0], run, 7)
                stop(ranks[asked], number)
            errors = [rank.communicate(timeout=120)[1] for rank in ranks if rank.poll() is None or not is_stopped]
        codes = [rank.returncode for rank in ranks]
        assert codes == ([0, 0] if not is_stopped else [128 + number if rank == asked else 143 for rank in (0, 1)]), errors
        if is_stopped:
            assert int(latest_checkpoint(run).folder.name.removeprefix("step-")) - steps_reported(run) in (0, 1)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")
    for folder in ("checkpoints/step-00000040", "export"):
        assert digests(tmp_path / "stopped" / folder) == digests(tmp_path / "unbroken" / folder)


@pytest.mark.slow
def test_two_ranks_give_up_a_step_that_would_take_minutes(tmp_path):
    run = tmp_path / "run"
    with two_ranks(tmp_path, run, batch_size=60_000) as ranks:
        while all(rank.poll() is None for rank in ranks) and not (run / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(0.5)
        stop(ranks[1], signal.SIGTERM)
        assert ranks[0].wait(10) == 143
    assert not (run / "pid").exists()


def test_a_second_signal_leaves_at_once_and_what_was_saved_is_intact(tmp_path, monkeypatch):
    passes, forward = iter(range(1, 1000)), Nll.forward

    def endless_forward(self, byte_ids):
        if next(passes) == 12:  # in step 6; the last checkpoint is that of step 4
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the second signal did not end the pass")
        return forward(self, byte_ids)

    monkeypatch.setattr(Nll, "forward", endless_forward)
    before = signal.signal(signal.SIGTERM, _leave)  # as the program does
    try:
        with pytest.raises(SystemExit) as caught:
            run_tiny(tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143
    assert latest_checkpoint(tmp_path / "run").folder.name == "step-00000004"
