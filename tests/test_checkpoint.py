"""Checkpoints: written whole or not at all, damage always found, nothing but tensors and JSON ever read."""

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import core
from core import checkpoint, folder
from core.checkpoint import (
    TrainState,
    export_model,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    load_train_state,
    model_tensors,
    resolve_model,
    save_checkpoint,
    shipped_models,
    step_folder,
)
from core.config import FORMAT_VERSION
from core.errors import UserError
from core.folder import MANIFEST_NAME, atomic_folder, clear_leftovers
from core.learner import Learner
from core.models import build_model
from tests.tiny_run import ALONE, SEQ_LEN, tiny_config

STEP_FILES = ("config.json", "manifest.json", "model.safetensors", "state.json", "state.safetensors")
CARD = {"name": "tiny", "modality": "text"}


def save_step(run: Path, step: int, value: float = 1.0) -> Path:
    target = step_folder(run, step)
    state = TrainState(
        step=step, bytes_seen=7, seconds=0.5, best_bits_per_byte=None, tensors={"optimizer.exp_avg.w": torch.full((3,), value)}
    )
    save_checkpoint(target, tiny_config(), {"w": torch.full((300,), value)}, state)
    return target


def reseal(target: Path) -> None:
    """Makes the manifest fit files that were changed on purpose."""
    manifest = target / MANIFEST_NAME
    manifest.unlink()
    folder.write_json(manifest, folder._make_manifest(target))


# What is saved is what is loaded


def test_an_exported_model_gives_the_logits_of_its_weights_rounded_to_bf16(tmp_path, model):
    export_model(tmp_path / "export", tiny_config(), model_tensors(model), CARD)
    loaded = load_model(tmp_path / "export")
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
        byte_ids = torch.randint(256, (2, SEQ_LEN))
        assert torch.equal(loaded(byte_ids), model(byte_ids))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert (loaded.name, loaded.codec_config, loaded.training) == ("tiny", tiny_config().codec, False)
    assert loaded.card == {"format_version": FORMAT_VERSION, **CARD}
    assert loaded.digest == folder._describe(tmp_path / "export" / "model.safetensors")["sha256"]


def test_weights_and_state_come_back_to_the_last_bit(tmp_path):
    target = save_step(tmp_path, 3, value=0.1)
    loaded, state = load_checkpoint(target), load_train_state(target)
    assert loaded.config == tiny_config()
    assert torch.equal(loaded.tensors["w"], torch.full((300,), 0.1))
    assert torch.equal(state.tensors["optimizer.exp_avg.w"], torch.full((3,), 0.1))
    assert (state.step, state.bytes_seen, state.seconds, state.best_bits_per_byte) == (3, 7, 0.5, None)


def test_tied_tensors_are_stored_once(model):
    model.alias = model.levels[0]
    names = model_tensors(model)
    assert not any(name.startswith("alias.") for name in names)
    assert sum(tensor.numel() for tensor in names.values()) == model.num_parameters()


def test_a_model_is_found_by_shipped_name_export_step_and_run(tmp_path, model, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS_FOLDER", tmp_path / "weights")
    run = tmp_path / "run"
    step = save_step(run, 1)
    assert resolve_model(run) == step
    assert resolve_model(step) == step
    export_model(run / "export", tiny_config(), model_tensors(model), CARD)
    assert resolve_model(run) == resolve_model(str(run / "export")) == run / "export"
    export_model(tmp_path / "weights" / "small", tiny_config(), model_tensors(model), CARD)
    assert shipped_models() == ["small"]
    assert resolve_model("small") == tmp_path / "weights" / "small"
    with pytest.raises(UserError, match=r"model smal is neither a shipped name \(small\) nor the folder"):
        resolve_model("smal")


def test_a_step_of_a_run_that_averages_is_loaded_as_its_export_would_be(tmp_path, model):
    weights = model_tensors(model)
    average = {f"average.{name}": tensor + 1 for name, tensor in weights.items()}
    for tensors, shift in ((average, 1), ({}, 0)):
        state = TrainState(step=1, bytes_seen=7, seconds=0.5, best_bits_per_byte=None, tensors=tensors)
        save_checkpoint(step_folder(tmp_path / "run", 1), tiny_config(), weights, state)
        for name, tensor in model_tensors(load_model(tmp_path / "run")).items():
            assert torch.equal(tensor, weights[name] + shift)


def test_a_state_that_the_manifest_does_not_list_is_not_looked_at(tmp_path, model):
    weights = model_tensors(model)
    average = {f"average.{name}": tensor + 1 for name, tensor in weights.items()}
    state = TrainState(step=1, bytes_seen=7, seconds=0.5, best_bits_per_byte=None, tensors=average)
    step = step_folder(tmp_path / "run", 1)
    save_checkpoint(step, tiny_config(), weights, state)
    digests = {name: folder._describe(step / name)["sha256"] for name in ("model.safetensors", "state.safetensors")}
    assert load_model(step).digest == digests["state.safetensors"]
    assert load_checkpoint(step).digest == digests["model.safetensors"]
    (tmp_path / "aside").mkdir()
    for name in ("state.json", "state.safetensors"):
        (step / name).rename(tmp_path / "aside" / name)
    reseal(step)
    for name in ("state.json", "state.safetensors"):
        (tmp_path / "aside" / name).rename(step / name)
    loaded = load_model(step)
    assert loaded.digest == digests["model.safetensors"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model_tensors(loaded).items())
    with pytest.raises(UserError, match="lists no state of a run to go on from"):
        Learner(build_model(tiny_config()), tiny_config().train, ALONE).restore(load_checkpoint(step))


def test_all_files_of_a_folder_may_be_read_by_those_who_may_read_new_files(tmp_path, model):
    (tmp_path / "ordinary").touch()
    export_model(tmp_path / "export", tiny_config(), model_tensors(model), CARD)
    for path in (*(tmp_path / "export").iterdir(), *save_step(tmp_path, 1).iterdir()):
        assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode, path.name


# Damage is found


@pytest.mark.parametrize("name", STEP_FILES)
def test_every_damaged_file_is_found_and_the_checkpoint_before_is_used_and_the_damage_named(tmp_path, name, caplog):
    older, newer = save_step(tmp_path, 1), save_step(tmp_path, 2)
    path = newer / name
    whole = path.read_bytes()
    damaged = [whole[:length] for length in (0, 1, len(whole) // 2, len(whole) - 1)] + [whole + b"\0", bytes(len(whole))]
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        caplog.clear()
        assert latest_checkpoint(tmp_path).folder == older
        assert str(newer) in caplog.text
    path.unlink()
    assert latest_checkpoint(tmp_path).folder == older
    path.write_bytes(whole)
    assert latest_checkpoint(tmp_path).folder == newer


def test_if_all_checkpoints_are_damaged_nothing_is_loaded(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 2):
        (save_step(tmp_path, step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        latest_checkpoint(tmp_path)


def test_no_tensor_is_read_before_every_file_is_verified(tmp_path, monkeypatch):
    target = save_step(tmp_path, 1)
    (target / "state.json").write_text("{}")
    monkeypatch.setattr(checkpoint, "load_file", lambda _: pytest.fail("read a tensor"))
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        load_checkpoint(target)


def test_special_files_are_refused_without_waiting(tmp_path):
    target = save_step(tmp_path, 1)
    (target / "model.safetensors").unlink()
    os.mkfifo(target / "model.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        load_checkpoint(target)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    target = save_step(tmp_path, 1)
    (target / MANIFEST_NAME).write_text(json.dumps({"format_version": FORMAT_VERSION, "files": {"../../secret": {}}}))
    with pytest.raises(UserError, match="not a plain file name"):
        load_checkpoint(target)


# The wrong model is refused


@pytest.mark.parametrize("name", ["config.json", "card.json"])
def test_a_newer_format_is_refused_with_the_file_named(tmp_path, model, name):
    target = tmp_path / "export"
    export_model(target, tiny_config(), model_tensors(model), CARD)
    content = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps(content | {"format_version": FORMAT_VERSION + 1}))
    reseal(target)
    with pytest.raises(ValueError, match=rf"{name}.*format_version={FORMAT_VERSION + 1}"):
        load_model(target)


def test_a_device_that_is_not_there_is_refused(tmp_path, model):
    export_model(tmp_path / "export", tiny_config(), model_tensors(model), CARD)
    with pytest.raises(UserError, match="--device quantum is not a device"):
        load_model(tmp_path / "export", device="quantum")


def test_no_source_file_can_read_a_pickle():
    for path in Path(core.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("import pickle", "torch.load", "torch.save", "allow_pickle=True")), path


# Writing is whole or not at all

SYSTEM_CALLS = [(os, "fsync"), (os, "open"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"), (checkpoint, "save_file")]


@pytest.mark.parametrize(("owner", "name"), SYSTEM_CALLS, ids=[name for _, name in SYSTEM_CALLS])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "killed"])
def test_a_fault_at_any_call_while_writing_leaves_a_whole_checkpoint_and_nothing_else(
    tmp_path, monkeypatch, owner, name, failure
):
    """The same step is written again, which is the hardest case: the old folder has to step aside."""
    save_step(tmp_path, 1, value=1.0)
    real = getattr(owner, name)
    for failing_call in range(20):
        calls = iter(range(100))

        def flawed(*arguments, failing_call=failing_call, calls=calls, **options):
            if next(calls) == failing_call:
                raise failure
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, flawed)
        monkeypatch.setattr(folder, "_exchange", lambda *_: False)
        finished = False
        with contextlib.suppress(UserError, KeyboardInterrupt):
            save_step(tmp_path, 1, value=2.0)
            finished = True
        monkeypatch.undo()
        clear_leftovers(tmp_path / "checkpoints", r"step-\d{8}")  # as the next start does
        assert load_checkpoint(step_folder(tmp_path, 1)).tensors["w"][0] in ((2.0,) if finished else (1.0, 2.0))
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
        if finished and next(calls) <= failing_call:
            return
    pytest.fail(f"{name} was called more often than expected")


def test_a_full_disk_is_one_sentence_that_names_the_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"step-00000001 could not be written \(No space left on device\); make room"):
        save_step(tmp_path, 1)


def test_what_a_kill_leaves_behind_is_cleared_and_a_folder_moved_aside_comes_back(tmp_path):
    target = save_step(tmp_path, 1)
    target.rename(target.with_name(f".{target.name}.replaced"))
    target.with_name(f".{target.name}.partial").mkdir()
    (target.parent / ".0123456789abcdef.partial").touch()
    clear_leftovers(target.parent, r"step-\d{8}")
    assert list(target.parent.iterdir()) == [target]
    load_checkpoint(target)


@pytest.mark.parametrize("folders", ["", "export", r"step-\d{8}"])
def test_what_only_looks_like_a_leftover_is_left_alone(tmp_path, folders):
    (tmp_path / "old").mkdir()
    for name in (".thesis.partial", ".old.replaced", ".fedcba9876543210.partial", ".step-1.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keep").touch()
    for name in (".holiday.mkv.partial", ".letter.replaced"):
        (tmp_path / name).touch()
    (tmp_path / ".0123456789abcdef.partial").symlink_to(tmp_path / "old")
    before = sorted(tmp_path.rglob("*"))
    clear_leftovers(tmp_path, folders)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_over_the_remains_of_a_killed_one_succeeds(tmp_path, model):
    target = tmp_path / "export"
    for remains in (".export.replaced", ".export.partial"):
        export_model(target, tiny_config(), model_tensors(model), CARD)
        shutil.copytree(target, tmp_path / remains)
        export_model(target, tiny_config(), model_tensors(model), CARD)
        assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_failed_export_touches_nothing_of_others(tmp_path, model, monkeypatch):
    (tmp_path / ".download.partial").write_bytes(b"not ours")
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        export_model(tmp_path / "export", tiny_config(), model_tensors(model), CARD)
    assert [path.name for path in tmp_path.iterdir()] == [".download.partial"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"export could not be written \(.*\); make room or choose another folder"),
        atomic_folder(tmp_path / "file" / "export"),
    ):
        pass


def test_a_copied_checkpoint_is_still_whole(tmp_path):
    target = save_step(tmp_path, 1)
    shutil.copytree(target, tmp_path / "copy")
    save_file({"w": torch.zeros(1)}, tmp_path / "copy" / "unrelated.safetensors")
    assert load_checkpoint(tmp_path / "copy").digest == load_checkpoint(target).digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_no_finite_number_is_found_at_every_place(dtype, tmp_path):
    tensor = torch.linspace(-1, 1, 37).to(dtype)
    checkpoint._save_tensors(tmp_path / "model.safetensors", {"weight": tensor})
    for place, bad in itertools.product(range(len(tensor)), (float("nan"), float("inf"), -float("inf"))):
        spoilt = tensor.clone()
        spoilt[place] = bad
        with pytest.raises(UserError, match="weight holds values that are no finite numbers"):
            checkpoint._save_tensors(tmp_path / "other.safetensors", {"weight": spoilt})
    assert not (tmp_path / "other.safetensors").exists()
