"""A run that is stopped, killed or crashed goes on as if it had not been."""

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from core.checkpoint import latest_checkpoint, load_train_state, save_checkpoint, step_folder, step_folders
from core.config import MegaByteConfig
from core.errors import UserError
from core.learner import Learner, Nll
from core.models import build_model
from core.run_folder import StopSignals, claim_run
from tests.forked_run import PROCESSES
from tests.tiny_run import ALONE, SEQ_LEN, TINY_MODEL, digests, metrics, run_tiny, tiny_config


def stop_when(step: int, action):
    """A log function that acts once, when the validation of `step` is reported."""

    def log(line: str) -> None:
        if line.startswith(f"step {step}:"):
            action()

    return log


def crash() -> None:
    raise OSError("pulled plug")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Callable[..., Path]:
    """The folder of a whole run with these settings, made on the first call."""

    @cache
    def folder(**settings) -> Path:
        parent = tmp_path_factory.mktemp("unbroken")
        run_tiny(parent, config=tiny_config(**settings))
        return parent / "run"

    return folder


def require_same_end(run: Path, unbroken: Path) -> None:
    """Both finished with the same metrics, weights and state, to the last bit."""
    assert metrics(run) == metrics(unbroken)
    for folder in ("export", "checkpoints/step-00000012"):
        assert digests(run / folder) == digests(unbroken / folder)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_the_step_at_hand_and_the_resumed_run_is_bit_identical(tmp_path, unbroken, number, error):
    with pytest.raises(error) as caught:
        run_tiny(tmp_path, "stopped", log=stop_when(6, lambda: os.kill(os.getpid(), number)))
    if error is SystemExit:
        assert caught.value.code == 143
    assert step_folder(tmp_path / "stopped", 6).is_dir()
    run_tiny(tmp_path, "stopped", resume=True)
    require_same_end(tmp_path / "stopped", unbroken())


# Two forward passes a step, three a validation, which comes after steps 6 and 12.
@pytest.mark.parametrize(
    ("num_passes", "saved", "log_every"),
    [(1, None, 1), (2, 1, 5), (7, 3, 5), (8, 4, 1), (13, 6, 1), (14, 6, 1), (15, 6, 1), (16, 6, 1), (28, 12, 1)],
)
def test_a_signal_between_two_passes_gives_up_the_step_or_the_validation_and_nothing_is_lost(
    tmp_path, monkeypatch, unbroken, num_passes, saved, log_every
):
    config, expected = tiny_config(log_every=log_every), unbroken(log_every=log_every)
    passes, forward = iter(range(1, 1000)), Nll.forward

    def stopped_forward(self, byte_ids):
        if next(passes) == num_passes:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, byte_ids)

    monkeypatch.setattr(Nll, "forward", stopped_forward)
    with pytest.raises(SystemExit):
        run_tiny(tmp_path, "stopped", config)
    assert next(passes) == num_passes + 1  # no other pass was made
    found = step_folders(tmp_path / "stopped")
    assert [folder.name for folder in found[-1:]] == ([] if saved is None else [f"step-{saved:08d}"])
    for folder in found[-1:]:
        state = load_train_state(folder)
        assert state.bytes_seen == saved * config.train.batch_size * SEQ_LEN
        assert state.seconds > 0
    run_tiny(tmp_path, "stopped", config, resume=True)
    require_same_end(tmp_path / "stopped", expected)


def save_again(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        saved = latest_checkpoint(folder / name)
        learner = Learner(build_model(saved.config), saved.config.train, ALONE)
        learner.restore(saved)
        save_checkpoint(step_folder(folder / "again" / name, learner.step), saved.config, learner.weights, learner.capture())


def test_a_new_process_that_loads_a_checkpoint_saves_the_same_one(tmp_path):
    """Weights, moments, averages, counters, generators: every file has the same bytes."""
    optimizers = ("adamw", "muon")
    for optimizer in optimizers:
        run_tiny(tmp_path, optimizer, tiny_config(num_steps=7, checkpoint_every=7, eval_every=7, optimizer=optimizer))
    process = PROCESSES.Process(target=save_again, args=(tmp_path, optimizers))
    process.start()
    process.join()
    assert process.exitcode == 0
    for optimizer in optimizers:
        first, again = (
            {path.name: path.read_bytes() for path in step_folder(folder / optimizer, 7).iterdir()}
            for folder in (tmp_path, tmp_path / "again")
        )
        assert len(first) == 5
        assert again == first


def test_a_crash_between_checkpoints_loses_only_the_steps_since_the_last_one(tmp_path, unbroken):
    with pytest.raises(OSError, match="pulled plug"):
        run_tiny(tmp_path, "crashed", log=stop_when(6, crash))
    lines = []
    run_tiny(tmp_path, "crashed", resume=True, log=lines.append)
    assert "step-00000004" in lines[0]
    require_same_end(tmp_path / "crashed", unbroken())


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, unbroken):
    with pytest.raises(OSError, match="pulled plug"):
        run_tiny(tmp_path, "crashed", tiny_config(checkpoint_every=100), log=stop_when(6, crash))
    run_tiny(tmp_path, "crashed", resume=True)
    assert metrics(tmp_path / "crashed") == metrics(unbroken())


def test_a_finished_run_resumes_to_the_same_result(tmp_path):
    assert run_tiny(tmp_path) == run_tiny(tmp_path, resume=True)


def test_after_the_first_signal_the_next_one_ends_the_process_as_usual():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_folder_in_use_is_refused_with_the_process_named_and_a_stale_claim_is_taken_over(tmp_path):
    claim, process = claim_run(tmp_path / "run", resume=False), f"process {os.getpid()}"
    with claim, pytest.raises(UserError, match=process), claim_run(tmp_path / "run", resume=False):
        pass
    (tmp_path / "run" / "pid").write_text("1\n")
    with claim_run(tmp_path / "run", resume=False):
        assert (tmp_path / "run" / "pid").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(("name", "is_own"), [("table.csv", False), (f"{'0a' * 16}.bin", True), (f".{'0a' * 8}.partial", True)])
def test_a_new_run_begins_beside_the_data_of_a_killed_one_but_not_beside_those_of_others(tmp_path, name, is_own):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).touch()
    with contextlib.nullcontext() if is_own else pytest.raises(UserError, match="not empty"), claim_run(tmp_path, resume=False):
        pass


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
    other = MegaByteConfig(levels=TINY_MODEL.levels[1:], max_seq_len=SEQ_LEN, dropout=0.1)
    with pytest.raises(UserError, match=r"model.levels.0.dim=16, but the run was started with 32; resume it"):
        run_tiny(tmp_path, config=tiny_config(other), resume=True)


def test_a_run_may_go_on_for_longer(tmp_path):
    run_tiny(tmp_path)
    result = run_tiny(tmp_path, config=tiny_config(num_steps=15), resume=True)
    assert result.steps == 15
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 16))
