"""Batches: a kill and a second call give what one call gives, a bad item stops no other, nothing is made twice."""

import errno
import hashlib
import json
import logging
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.batch import Batch
from app.completion import CompletionJob, run_together
from app.console import LogHandler
from app.ledger import LEDGER_NAME, open_ledger
from app.messages import OUR_FAULT
from app.recipe import parse_recipe
from app.service import Service
from app.sources import find_files
from tests.forked_app import ForkedApp

ROOT = Path(__file__).parents[1]


def write_recipe(folder: Path, num_jobs: int, num_bad: int, num_bytes: int = 200) -> Path:
    """A recipe of many small jobs of all kinds with their files; the bad ones are spread among them."""
    generator = np.random.default_rng(0)
    lines = [f"[defaults]\nnum_bytes = {num_bytes}"]
    bad = set(np.linspace(0, num_jobs - 1, num_bad).astype(int))
    for number in range(num_jobs):
        name, settings = f"in/{number:04}", f"seed = {number}"
        if number in bad:
            kind = sorted(bad).index(number) % 5
            content = [None, b"%PDF-1.7 no picture", b"", b"\x89PNG\r\n\x1a\n cut", b"some text"][kind]
            settings = "temperature = -1" if kind == 4 else settings
            name += ".bad"
            if content is not None:
                put(folder / name, content)
        elif number % 7 == 0:
            name += ".png"
            (folder / "in").mkdir(exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name)
            settings += "\nkeep = 0.5\nnum_bytes = 96"
        else:
            name += ".txt"
            put(folder / name, bytes(generator.integers(97, 123, 40, dtype=np.uint8)))
        lines.append(f'[[jobs]]\nfiles = "{name}"\n{settings}')
    recipe = folder / "jobs.toml"
    recipe.write_text("\n".join(lines))
    return recipe


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def outputs(folder: Path) -> dict[str, str]:
    """SHA-256 of every result, without the settings that lie beside texts."""
    files = [path for path in folder.iterdir() if path.name != LEDGER_NAME and path.suffix != ".json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ready(items, service, out, **options) -> Batch:
    batch = Batch(service, items, out, **options)
    for _ in batch.run():
        pass
    return batch


@pytest.mark.parametrize(
    ("num_jobs", "num_bad", "num_bytes", "num_kills"),
    [(20, 5, 200, 1), pytest.param(1000, 10, 200, 5, marks=pytest.mark.slow)],
)
def test_a_killed_batch_goes_on_to_what_an_unbroken_one_gives(tiny_models, tmp_path, num_jobs, num_bad, num_bytes, num_kills):
    recipe = write_recipe(tmp_path, num_jobs, num_bad, num_bytes)
    call = ("generate", "--recipe", recipe, "--json", "--out")
    whole, broken, said = tmp_path / "whole", tmp_path / "broken", tmp_path / "said"
    num_good = num_jobs - num_bad
    before: list[Path] = []
    with ForkedApp(*call, whole, weights=tiny_models, stdout=os.devnull, stderr=os.devnull) as unbroken:  # beside the other
        for kill in range(num_kills):
            wanted = num_good * (kill + 1) // (num_kills + 1)
            # What it says goes to a file: nobody reads a pipe meanwhile, and a full one would stop it.
            options = {"weights": tiny_models, "stdout": os.devnull, "stderr": said}
            with ForkedApp(*call, broken, *(["--resume"] if kill else []), **options) as killed:
                deadline = time.monotonic() + 300
                while not broken.exists() or len(list(broken.glob("*-s*[!n]"))) < wanted:
                    assert killed.poll() is None, said.read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                os.kill(killed.pid, signal.SIGKILL)
            before = list(broken.glob("*-s*[!n]"))
            assert wanted <= len(before) < num_good
    assert unbroken.returncode == 1
    assert len(outputs(whole)) == num_good

    with ForkedApp(*call, broken, "--resume", weights=tiny_models) as resumed:
        out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 1
    assert outputs(broken) == outputs(whole)
    sidecars = {path.name: path.read_bytes() for path in whole.glob("*.txt.json")}
    assert {path.name: path.read_bytes() for path in broken.glob("*.txt.json")} == sidecars != {}
    assert not list(broken.glob(".*"))
    lines = [json.loads(line) for line in out.splitlines()]
    summary = lines[-1]["summary"]
    assert summary["failed"] == num_bad == len([line for line in lines if line.get("state") == "failed"])
    assert summary["done"] + summary["skipped"] == num_good
    assert summary["skipped"] >= len(before) - 1
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == num_bad


def test_finished_results_are_not_touched_again(service, make_text, tmp_path):
    make_text("a.txt")
    out = tmp_path / "out"

    def run(**options) -> Batch:
        items = parse_recipe('[[jobs]]\nfiles = "a.txt"\nsamples = 3\nnum_bytes = 20', lambda p: find_files(p, tmp_path))
        return ready(items, service, out, **options)

    assert run().summary.done == 1
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("a-*.txt")}
    assert len(stamps) == 3
    again = run(resume=True)
    assert (again.summary.skipped, again.summary.num_samples) == (1, 3)
    assert {path: path.stat().st_mtime_ns for path in out.glob("a-*.txt")} == stamps


@pytest.mark.parametrize("change", ["setting", "input"])
def test_results_of_other_settings_or_inputs_are_neither_taken_nor_overwritten(service, make_text, tmp_path, change):
    path, out = make_text("a.txt"), tmp_path / "out"
    first = parse_recipe('[[jobs]]\nfiles = "a.txt"\nnum_bytes = 20', lambda p: find_files(p, tmp_path))
    ready(first, service, out)
    made = outputs(out)
    if change == "input":
        path.write_bytes(b"Something else.")
    temperature = 0.5 if change == "setting" else 1.0
    text = f'[[jobs]]\nfiles = "a.txt"\nnum_bytes = 20\ntemperature = {temperature}'
    second = parse_recipe(text, lambda p: find_files(p, tmp_path))
    [row] = ready(second, service, out, resume=True).rows
    assert row.state == "failed"
    assert "other settings" in row.says
    assert outputs(out) == made
    assert ready(second, service, out, resume=True, force=True).summary.done == 1
    assert outputs(out) != made


def test_a_damaged_result_is_made_again(service, make_text, tmp_path):
    make_text("a.txt")
    items = parse_recipe('[[jobs]]\nfiles = "a.txt"\nnum_bytes = 20', lambda p: find_files(p, tmp_path))
    out = tmp_path / "out"
    ready(items, service, out)
    made = outputs(out)
    (out / "a-s0-1.txt").write_bytes(b"cut")
    assert ready(items, service, out, resume=True).summary.done == 1
    assert outputs(out) == made


def test_a_cut_last_line_of_the_ledger_costs_one_result_at_most(service, make_text, tmp_path):
    for name in ("a.txt", "b.txt"):
        make_text(name)
    items = parse_recipe('[[jobs]]\nfiles = "*.txt"\nnum_bytes = 20', lambda p: find_files(p, tmp_path))
    out = tmp_path / "out"
    ready(items, service, out)
    ledger = out / LEDGER_NAME
    ledger.write_bytes(ledger.read_bytes()[:-30])
    summary = ready(items, service, out, resume=True).summary
    assert (summary.skipped, summary.done) == (1, 1)
    assert ready(items, service, out, resume=True).summary.skipped == 2


FACTS = {"bits_per_byte": 1.3969, "made_by": ["a", "b"]}


def a_ledger(folder: Path) -> Path:
    """A ledger of one result, of the key "k"."""
    (folder / "a").write_bytes(b"made")
    with open_ledger(folder, resume=False, force=True) as ledger:
        ledger.claim("a", "k", [folder / "a"])
        ledger.finish("a", "k", [folder / "a"], FACTS)
    return folder / LEDGER_NAME


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b"1.3969", b"5.3969"),
        lambda line: line.replace(b"made_by", b"made_bz"),
        lambda line: line.replace(b'"facts"', b'"fact5"'),
        lambda line: line.replace(b"1.3969", b"1e9999"),
        lambda line: line[:-40],
        lambda line: line[line.index(b'"name"') :].replace(b'"name"', b'{"name"'),  # as older ledgers have them
        lambda line: b"[" * 200_000,
        lambda line: b"[1]",
    ],
)
def test_a_line_of_the_ledger_that_is_not_as_it_was_written_is_not_believed(tmp_path, damage):
    ledger = a_ledger(tmp_path)
    with open_ledger(tmp_path, resume=True, force=False) as opened:
        assert opened.finished("a", "k") == FACTS
    first, second, _ = ledger.read_bytes().split(b"\n")
    ledger.write_bytes(b"\n".join((first, damage(second), b"")))
    with open_ledger(tmp_path, resume=True, force=False) as opened:
        assert opened.finished("a", "k") is None
        opened.claim("a", "k", [tmp_path / "a"])  # the first line says that it may be made again


@pytest.mark.parametrize("content", [b'{"my":"own notes"}\n', b'{"name": "Bob"}', b"\0" * 50])
@pytest.mark.parametrize("force", [False, True])
def test_a_file_of_somebody_else_is_not_written_to_as_a_ledger(cli, make_text, tmp_path, content, force):
    (tmp_path / "out").mkdir()
    other = tmp_path / "out" / LEDGER_NAME
    other.write_bytes(content)
    for verb, files in (("generate", [make_text()]), ("score", [make_text()]), ("score", [other])):
        exit_code, out, err = cli(verb, *files, "--out", tmp_path / "out", *(["--force"] if force else []))
        assert (exit_code, len(out), len(err)) == (1, 0, 1)
        assert "choose another folder" in err[0]
    assert other.read_bytes() == content


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_the_ledger_is_not_one_of_the_files_given(cli, tmp_path, verb):
    before = a_ledger(tmp_path).read_bytes()
    exit_code, _, [said] = cli(verb, tmp_path / LEDGER_NAME, "--out", tmp_path)
    assert (exit_code, "is one of the files given" in said) == (1, True)
    assert (tmp_path / LEDGER_NAME).read_bytes() == before


def test_a_ledger_of_no_reasonable_size_is_not_read(tmp_path):
    (tmp_path / LEDGER_NAME).touch()
    os.truncate(tmp_path / LEDGER_NAME, 1 << 42)
    with pytest.raises(ValueError, match="choose another folder"), open_ledger(tmp_path, resume=True, force=False):
        pass


def test_a_folder_belongs_to_one_ledger_and_what_blocks_within_is_not_taken_for_another(tmp_path):
    held, wanted = (open_ledger(tmp_path, resume=True, force=False) for _ in range(2))
    with held, pytest.raises(ValueError, match="another process writes"), wanted:
        pass
    with pytest.raises(BlockingIOError), open_ledger(tmp_path, resume=True, force=False):
        raise BlockingIOError  # as of a full pipe that results are printed to


def test_a_pipe_is_no_ledger(cli, make_text, tmp_path):
    os.mkfifo(tmp_path / LEDGER_NAME)
    exit_code, _, [said] = cli("score", make_text(), "--out", tmp_path)
    assert (exit_code, f"{LEDGER_NAME} is a device or a pipe" in said) == (1, True)


@pytest.mark.parametrize("num_left", [0, 30])
def test_a_line_that_the_disk_takes_a_part_of_is_taken_back(tmp_path, monkeypatch, num_left):
    before, write, left = a_ledger(tmp_path).read_bytes(), os.write, [num_left]

    def write_a_part(descriptor, content):
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[: left.pop()])

    with open_ledger(tmp_path, resume=True, force=False) as ledger:
        monkeypatch.setattr(os, "write", write_a_part)
        with pytest.raises(ValueError, match=r"could not be written \(No space left on device\); make room"):
            ledger.claim("b", "k", [tmp_path / "b"])
        assert (tmp_path / LEDGER_NAME).read_bytes() == before
        left[:] = [10_000, 7]  # slow, but there is room
        ledger.claim("b", "k", [tmp_path / "b"])
    lines = (tmp_path / LEDGER_NAME).read_bytes().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["a", "a", "b"]


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    with (
        open_ledger(tmp_path, resume=False, force=False),
        pytest.raises(ValueError, match="another process"),
        open_ledger(tmp_path, resume=True, force=False),
    ):
        pass


def test_a_dry_run_tells_the_cost_and_writes_nothing(cli, tmp_path):
    recipe = write_recipe(tmp_path, 10, 2)
    exit_code, out, err = cli("generate", "--recipe", recipe, "--out", tmp_path / "out", "--dry-run")
    assert (exit_code, len(out), len(err)) == (1, 11, 2)
    assert "8 items" in out[-1]
    assert "2 cannot be done" in out[-1]
    assert "makes 200 bytes with text" in out[1]
    assert not (tmp_path / "out").exists()
    _, out, _ = cli("generate", "--recipe", recipe, "--out", tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(out[-1])["plan"]
    assert (plan["num_items"], plan["num_failed"]) == (8, 2)
    assert plan["estimate_seconds"] > 0


def test_the_table_at_the_end_names_every_item(cli, tmp_path):
    recipe = write_recipe(tmp_path, 6, 1)
    exit_code, out, _ = cli("generate", "--recipe", recipe, "--out", tmp_path / "out")
    table = out[-8:-1]
    assert exit_code == 1
    assert table[0].split() == ["job", "source", "state", "bytes", "results", "or", "reason"]
    assert [line.split()[0] for line in table[1:]] == list("123456")
    assert "does not exist" in table[1]
    assert table[2].endswith("001-s1-1.txt")
    assert out[-1].startswith("5 done, 0 made before, 1 failed")


@pytest.mark.parametrize("extra", [["a.txt"], ["--seed", 1], ["--model", "text"]])
def test_a_recipe_and_settings_of_the_command_line_exclude_each_other(cli, tmp_path, extra):
    exit_code, _, _ = cli("generate", "--recipe", write_recipe(tmp_path, 1, 0), "--out", tmp_path / "out", *extra)
    assert exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_recipe_makes_the_bytes_of_the_service(service, make_png, tmp_path):
    path = make_png("a.png")
    items = parse_recipe('[[jobs]]\nfiles = "a.png"\nseed = 5\nsamples = 2', lambda p: find_files(p, tmp_path))
    ready(items, service, tmp_path / "out")
    job = service.complete(path, seed=5, samples=2)
    list(job.run())
    expected = [service.write_completion(result, tmp_path).read_bytes() for result in job.results]
    assert [(tmp_path / "out" / f"a-s5-{n}.png").read_bytes() for n in (1, 2)] == expected


@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
def test_samples_made_together_are_those_made_alone(service, request, make):
    path = request.getfixturevalue(make)()
    jobs = [service.complete(path, num_bytes=96, seed=seed, samples=3, keep=keep) for seed, keep in ((1, 0.5), (2, 0.25))]
    expected = {}
    for number, job in enumerate(jobs):
        for progress in job.run():
            if progress.completion is not None:
                expected[number, progress.sample] = progress.completion.made.tobytes()
    tasks = [(job, sample) for sample in (2, 0, 1) for job in jobs]
    together = {
        (jobs.index(progress.job), progress.sample): progress.completion.made.tobytes()
        for progress in run_together(tasks)
        if progress.completion is not None
    }
    assert together == expected
    assert not jobs[0].loaded.lock.locked()


def test_tiles_of_pictures_made_together_are_those_made_alone(service, make_png):
    jobs = [service.complete(make_png(f"{n}.png", width=16, height=16, seed=n), keep=0.25) for n in range(2)]
    expected = []
    for job in jobs:
        *_, last = job.run()
        expected.append(last.completion.made.tobytes())
    made = {id(p.job): p.completion.made.tobytes() for p in run_together([(job, 0) for job in jobs]) if p.completion}
    assert [made[id(job)] for job in jobs] == expected


def refuse_to_write(monkeypatch, name: str, error: Exception) -> None:
    """Lets no result of the source `name` be written."""
    write = Service.write_completion

    def write_or_fail(completion, *args, **options):
        if completion.source is not None and completion.source.name == name:
            raise error
        return write(completion, *args, **options)

    monkeypatch.setattr(Service, "write_completion", staticmethod(write_or_fail))


def count_made(monkeypatch) -> list[tuple[str, int]]:
    """The source and number of each sample that is made to its end."""
    made, finish = [], CompletionJob._completion

    def note(job, sample, *args):
        made.append((job.source.name, sample))
        return finish(job, sample, *args)

    monkeypatch.setattr(CompletionJob, "_completion", note)
    return made


def test_a_failed_item_is_reported_once_and_not_gone_on_with(cli, make_text, tmp_path, monkeypatch):
    refuse_to_write(monkeypatch, "a.txt", OSError(errno.ENOSPC, "No space left on device"))
    made = count_made(monkeypatch)
    paths = [make_text("a.txt"), make_text("b.txt")]
    code, out, err = cli("generate", *paths, "--samples", 40, "--num-bytes", 20, "--out", tmp_path / "out")
    assert code == 1
    assert [line for line in err if "error" in line] == [f"error: {paths[0]}: No space left on device"]
    assert len([line for line in out if "b-s0-" in line]) == len(out) == 40
    assert len([name for name, _ in made if name == "a.txt"]) == 1
    assert sorted(sample for name, sample in made if name == "b.txt") == list(range(40))


def test_an_item_that_fails_among_others_costs_them_nothing(service, make_text, tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt", "c.txt"):
        make_text(name)
    items = parse_recipe('[[jobs]]\nfiles = "*.txt"\nsamples = 5\nnum_bytes = 40', lambda p: find_files(p, tmp_path))
    ready(items, service, tmp_path / "whole")
    refuse_to_write(monkeypatch, "b.txt", OSError(errno.ENOSPC, "No space left on device"))
    batch = ready(items, service, tmp_path / "out")
    assert [(row.state, row.done_bytes) for row in batch.rows[::2]] == [("done", 200)] * 2
    assert batch.rows[1].state == "failed"
    whole = outputs(tmp_path / "whole").items()
    assert outputs(tmp_path / "out") == {name: digest for name, digest in whole if not name.startswith("b-")}


def test_many_samples_are_made_in_groups(service, make_text, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr("app.batch.run_together", lambda tasks: sizes.append(len(tasks)) or run_together(tasks))
    make_text("a.txt")
    items = parse_recipe('[[jobs]]\nfiles = "a.txt"\nsamples = 70\nnum_bytes = 4', lambda p: find_files(p, tmp_path))
    assert ready(items, service, tmp_path / "out").summary.num_samples == 70
    assert sizes == [32, 32, 6]


@pytest.mark.parametrize("place", ["making", "writing", "planning"])
def test_a_fault_of_the_program_spoils_its_own_item_only(service, make_text, tmp_path, monkeypatch, caplog, place):
    names = ["a.txt", "b.txt", "c.txt"]
    for name in names:
        make_text(name)

    def break_at_b(method):
        def broken(job, *args, **options):
            if job.source.name == "b.txt":
                raise KeyError("oops")
            return method(job, *args, **options)

        return broken

    if place == "making":
        monkeypatch.setattr(CompletionJob, "_completion", break_at_b(CompletionJob._completion))
    elif place == "writing":
        refuse_to_write(monkeypatch, "b.txt", KeyError("oops"))
    else:
        monkeypatch.setattr("app.batch._what_it_depends_on", lambda item, job: break_at_b(lambda job: {})(job))
    items = parse_recipe('[[jobs]]\nfiles = "*.txt"\nnum_bytes = 40', lambda p: find_files(p, tmp_path))
    batch = ready(items, service, tmp_path / "out")
    assert [row.state for row in batch.rows] == ["done", "failed", "done"]
    assert [row.done_bytes for row in batch.rows if row.state == "done"] == [40, 40]
    assert batch.rows[1].says == OUR_FAULT
    assert "oops" in caplog.text
    assert not service.model("text").lock.locked()


def test_the_traceback_of_a_fault_is_on_the_terminal(capsys):
    try:
        raise KeyError("oops")
    except KeyError as error:
        LogHandler().handle(logging.makeLogRecord({"msg": "an item failed", "exc_info": (KeyError, error, error.__traceback__)}))
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.endswith("an item failed")
    assert last == "KeyError: 'oops'"


class TestScoreFolder:
    def test_a_second_call_takes_what_the_first_has_made(self, cli, make_text, tmp_path):
        files, out = [make_text("d/a.txt"), make_text("d/b.txt", b"%PDF-1.7"), make_text("d/c.txt")], tmp_path / "out"
        call = ("score", tmp_path / "d", "--out", out, "--json")
        first_code, first, _ = cli(*call)
        stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}
        second_code, second, err = cli(*call, "--resume")
        assert (first_code, second_code, len(err)) == (1, 1, 1)
        assert second[:2] == first[:2]
        totals = [json.loads(lines[-1])["total"] | {"seconds": 0} for lines in (first, second)]
        assert totals[0] == totals[1]
        assert {path: path.stat().st_mtime_ns for path in out.glob("*.npz")} == stamps
        assert len(files) == 3

    def test_other_options_are_scored_anew_only_if_that_may_overwrite(self, cli, make_text, tmp_path):
        call = ("score", make_text("a.txt"), "--out", tmp_path / "out", "--hop", "64")
        cli(*call[:4])
        exit_code, _, err = cli(*call, "--resume")
        assert exit_code == 1
        assert "other settings" in err[0]
        assert cli(*call, "--resume", "--force")[0] == 0

    def test_resume_needs_a_folder(self, cli, make_text):
        exit_code, out, _ = cli("score", make_text("a.txt"), "--resume")
        assert (exit_code, out) == (2, [])
