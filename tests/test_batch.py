"""Batches: a kill and a second call give what one call gives, a bad item stops no other, nothing is made twice."""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.__main__ import main
from app.batch import Batch
from app.completion import run_together
from app.ledger import LEDGER_NAME, open_ledger
from app.recipe import parse_recipe
from app.service import Service
from app.sources import find_files

ROOT = Path(__file__).parents[1]
CALL = """
import sys
from pathlib import Path
import app.service as service
from functools import partial
weights = Path(sys.argv.pop(1))
service.Service = partial(service.Service, weights=weights, runs=weights / "no-runs")
from app.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def service(tiny_models):
    return Service(weights=tiny_models, runs=tiny_models / "no-runs")


@pytest.fixture
def cli(tiny_models, monkeypatch, capsys):
    """Runs one call on the tiny models; its exit code and what it printed."""
    monkeypatch.setattr("app.service.Service", functools.partial(Service, weights=tiny_models, runs=tiny_models / "no-runs"))

    def run(*arguments) -> tuple[int, list[str], list[str]]:
        exit_code = main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return exit_code, written.out.splitlines(), written.err.splitlines()

    return run


def write_recipe(folder: Path, num_jobs: int, num_bad: int, num_bytes: int = 200) -> Path:
    """A recipe of many small jobs of all kinds with their files; the bad ones are spread among them."""
    generator = np.random.default_rng(0)
    lines = [f"[defaults]\nnum_bytes = {num_bytes}"]
    bad = set(np.linspace(0, num_jobs - 1, num_bad).astype(int))
    for number in range(num_jobs):
        name, settings = f"in/{number:03}", f"seed = {number}"
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


def start(weights: Path, *arguments) -> subprocess.Popen:
    """A call in a process of its own."""
    command = [sys.executable, "-c", CALL, str(weights), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outputs(folder: Path) -> dict[str, str]:
    """SHA-256 of every result, without the settings that lie beside texts."""
    files = [path for path in folder.iterdir() if path.name != LEDGER_NAME and path.suffix != ".json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ready(items, service, out, **options) -> Batch:
    batch = Batch(service, items, out, **options)
    for _ in batch.run():
        pass
    return batch


@pytest.mark.parametrize(("num_jobs", "num_bad", "num_bytes"), [(20, 5, 200), pytest.param(200, 5, 400, marks=pytest.mark.slow)])
def test_a_killed_batch_goes_on_to_what_an_unbroken_one_gives(tiny_models, tmp_path, num_jobs, num_bad, num_bytes):
    recipe = write_recipe(tmp_path, num_jobs, num_bad, num_bytes)
    call = ("generate", "--recipe", recipe, "--json", "--out")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with start(tiny_models, *call, whole) as unbroken:
        unbroken.communicate(timeout=300)
    assert unbroken.returncode == 1
    assert len(outputs(whole)) == num_jobs - num_bad

    with start(tiny_models, *call, broken) as killed:
        deadline = time.monotonic() + 120
        while not broken.exists() or len(list(broken.glob("*-s*[!n]"))) < (num_jobs - num_bad) // 2:
            assert killed.poll() is None, killed.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
    before = [path.name for path in broken.glob("*-s*[!n]")]
    assert (num_jobs - num_bad) // 2 <= len(before) < num_jobs - num_bad

    with start(tiny_models, *call, broken, "--resume") as resumed:
        out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 1
    assert outputs(broken) == outputs(whole)
    sidecars = {path.name: path.read_bytes() for path in whole.glob("*.txt.json")}
    assert {path.name: path.read_bytes() for path in broken.glob("*.txt.json")} == sidecars != {}
    assert not list(broken.glob(".*"))
    lines = [json.loads(line) for line in out.splitlines()]
    summary = lines[-1]["summary"]
    assert summary["failed"] == num_bad == len([line for line in lines if line.get("state") == "failed"])
    assert summary["done"] + summary["skipped"] == num_jobs - num_bad
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
    with pytest.raises(SystemExit, match="2"):
        cli("generate", "--recipe", write_recipe(tmp_path, 1, 0), "--out", tmp_path / "out", *extra)


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
        with pytest.raises(SystemExit, match="2"):
            cli("score", make_text("a.txt"), "--resume")
