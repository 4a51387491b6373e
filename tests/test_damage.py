"""Damaged checkpoints are found before a tensor is read; full disks, refusals and kills leave the old one intact."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from core import checkpoint
from core import folder as folders
from core.checkpoint import latest_checkpoint, load_checkpoint, resolve_model, step_folder, step_folders
from core.folder import clear_leftovers
from tests.test_checkpoint import save_step
from tests.test_stops import train_arguments
from tests.tiny_run import run_tiny, tiny_config

ROOT = Path(__file__).parents[1]
PAGE = 4096


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("damage")
    run_tiny(folder, config=tiny_config(checkpoint_every=6))
    return folder / "run"


def damages(step: Path) -> list[tuple[Path, bytes | None]]:
    """200 flipped bits, 50 cuts and 20 zeroed pages, spread over all bytes of all files, and each file gone."""
    chance = np.random.default_rng(0)
    files = {path: path.read_bytes() for path in sorted(step.iterdir())}
    paths, sizes = list(files), [len(content) for content in files.values()]
    made: list[tuple[Path, bytes | None]] = [(path, None) for path in paths]

    def place() -> tuple[Path, int]:
        path = (
            paths[chance.integers(len(paths))]
            if len(made) % 2
            else paths[chance.choice(len(paths), p=np.divide(sizes, sum(sizes)))]
        )
        return path, int(chance.integers(len(files[path])))

    for _ in range(200):
        path, at = place()
        content = bytearray(files[path])
        content[at] ^= 1 << chance.integers(8)
        made.append((path, bytes(content)))
    for _ in range(50):
        path, at = place()
        made.append((path, files[path][:at]))
    while len(made) < len(paths) + 270:
        path, at = place()
        page = slice(at // PAGE * PAGE, at // PAGE * PAGE + PAGE)
        content = bytearray(files[path])
        content[page] = bytes(len(content[page]))
        if content != files[path]:
            made.append((path, bytes(content)))
    return made


def test_each_of_270_damages_is_found_before_a_tensor_is_read_and_the_checkpoint_before_is_named(
    trained, tmp_path, monkeypatch, caplog
):
    shutil.copytree(trained, tmp_path / "run")
    older, newer = step_folder(tmp_path / "run", 6), step_folder(tmp_path / "run", 12)
    read = []
    load_file = checkpoint.load_file
    monkeypatch.setattr(checkpoint, "load_file", lambda path: read.append(path) or load_file(path))
    made = damages(newer)
    assert len(made) >= 270
    for path, content in made:
        whole = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        read.clear()
        caplog.clear()
        assert latest_checkpoint(tmp_path / "run").folder == older
        assert read == [older / "model.safetensors"]
        assert str(newer) in caplog.text
        assert "the checkpoint before it is used" in caplog.text
        path.write_bytes(whole)
    assert latest_checkpoint(tmp_path / "run").folder == newer


def test_the_command_line_goes_on_from_the_checkpoint_before_or_starts_nothing_if_none_is_intact(
    tmp_path, cli, make_text, caplog
):
    run = tmp_path / "run"

    def trained() -> tuple[int, list[str]]:
        exit_code, _, err = cli(*train_arguments(tmp_path, run, num_steps=12, checkpoint_every=6, eval_every=12))
        return exit_code, [line for line in err if "checkpoints" in line]

    def damage(step: Path) -> None:
        (step / "model.safetensors").write_bytes(b"")
        shutil.rmtree(run / "export", ignore_errors=True)

    assert trained() == (0, [])
    older, newer = step_folders(run)
    damage(newer)
    assert trained() == (0, [f"going on from {older}"])
    assert str(newer) in caplog.text

    for step in step_folders(run):
        damage(step)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    sentence = f"error: {run}: all 2 checkpoints are damaged; start a new run in another folder"
    assert trained() == (1, [sentence])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert cli("score", make_text(), "--model", run) == (1, [], [sentence])


FAULTS = """
import os, resource, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from core.checkpoint import load_checkpoint, step_folder
from tests.test_checkpoint import save_step

def suffer(kind, folder):
    save_step(folder, 1)
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    if kind in ("read-only", "unreachable"):
        folder.chmod(0) if kind == "unreachable" else (folder / "checkpoints").chmod(0o555)
        os.setuid(65534) if os.getuid() == 0 else None
    if kind == "full":
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "ballast").write_bytes(bytes(free - 8192))
    try:
        save_step(folder, 2)
        print("saved", flush=True)
    except ValueError as error:
        print(error, flush=True)
    if kind == "full":  # nobody else sees that disk
        load_checkpoint(step_folder(folder, 1))
        print(*os.listdir(folder / "checkpoints"), "intact", flush=True)

for folder in map(Path, sys.argv[1:]):
    child = os.fork()  # what befalls one may not befall the next
    if child == 0:
        suffer(folder.name, folder)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user of this machine may enter. Those of pytest are closed again whenever another pytest starts."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


FULL = {
    "limit": "File too large",
    "read-only": "Permission denied",
    "unreachable": "Permission denied",
    "full": "No space left on device",
}
# A disk of 400 kB that exists for one process alone.
MOUNTED = 'mount -t tmpfs -o size=400k tmpfs "$1" && shift && exec "$@"'


def test_a_disk_that_takes_no_more_is_one_sentence_and_the_old_checkpoint_is_intact(open_folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        saving = []
        for kinds in (["limit", "read-only", "unreachable"], ["full"]):
            folders = [str(open_folder / kind) for kind in kinds]
            for folder in folders:
                Path(folder).mkdir()
            command = [sys.executable, "-c", FAULTS, *folders]
            if kinds == ["full"]:
                command = ["unshare", "-m", "sh", "-c", MOUNTED, "sh", *folders, *command]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            saving.append(stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=environment, **streams)))
        (others, others_err), full = (process.communicate(timeout=60) for process in saving)
    assert saving[0].returncode == 0, others_err
    said = dict(zip(FULL, [*((f"{line}\n", others_err) for line in others.splitlines()), full], strict=True))
    for kind, reason in FULL.items():
        out, err = said[kind]
        if "mount" in err or "unshare" in err:
            pytest.skip("this process may not mount a disk, so none was filled; the other faults were refused as they should be")
        step = step_folder(open_folder / kind, 2)
        sentence = f"{step} could not be written ({reason}); make room or choose another folder"
        assert (out.splitlines(), err) == ([sentence, "step-00000001 intact"] if kind == "full" else [sentence], ""), kind
        if kind != "full":
            (open_folder / kind).chmod(0o755)
            assert [path.name for path in (open_folder / kind / "checkpoints").iterdir()] == ["step-00000001"]
            load_checkpoint(step_folder(open_folder / kind, 1))


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "aside"])
def test_a_kill_before_any_call_while_writing_leaves_a_whole_checkpoint_and_nothing_else_after_the_next_start(
    exchanges, tmp_path, monkeypatch
):
    """The same step is written again, so that the old folder has to make place. The process dies before its k-th call."""
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    watched = re.compile(r"open|os\.(rename|mkdir|remove|rmdir|chmod|listdir|scandir)|shutil\..*")
    save_step(tmp_path, 1, value=1.0)
    fsync = os.fsync
    for fatal in range(1000):
        child = os.fork()
        if child == 0:
            calls = iter(range(fatal + 1))

            def watch(event, _arguments, calls=calls):
                if watched.fullmatch(event) and next(calls, None) is None:
                    os._exit(9)

            os.fsync = lambda descriptor, watch=watch: (watch("open", ()), fsync(descriptor))
            sys.addaudithook(watch)
            save_step(tmp_path, 1, value=2.0)
            os._exit(0)
        was_killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert exchanges <= step_folder(tmp_path, 1).exists()
        assert load_checkpoint(resolve_model(step_folder(tmp_path, 1))).config == tiny_config()  # a reader before that start
        clear_leftovers(tmp_path / "checkpoints", r"step-\d{8}")  # as the next start does
        assert load_checkpoint(step_folder(tmp_path, 1)).tensors["w"][0] in ((1.0, 2.0) if was_killed else (2.0,))
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
        if not was_killed:
            break
        save_step(tmp_path, 1, value=1.0)
    assert fatal > 20
