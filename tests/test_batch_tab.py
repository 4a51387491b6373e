"""The Batch tab without a browser: its plan, its table and its zip file."""

import json
import time
import zipfile
from pathlib import Path

import gradio as gr
import pytest

from app.batch import Batch
from app.jobs import JobStore
from app.service import Service
from app.tabs import batch
from app.tabs.following import follower, greet


def submit(service: Service, store: JobStore, files: list[Path], recipe: str = batch.RECIPE) -> str:
    items = batch.read_form([str(file) for file in files], recipe)
    return store.submit("me", batch.KIND, "", batch.batch_work(service, items, recipe))


def test_the_plan_comes_first_with_its_cost_and_its_problems(service, make_png, make_text):
    files = [str(make_png()), str(make_text("b.txt", b"%PDF-1.7"))]
    *_, planned = batch.preview(service, files, batch.RECIPE)
    assert (planned["state"], planned["title"]) == ("plan", "1 item")
    assert planned["text"] == "96 bytes to make, about a second, 1 cannot be done"
    assert [(row["name"], row["state"]) for row in planned["rows"]] == [("picture.png", "planned"), ("b.txt", "failed")]
    assert "--" not in planned["rows"][1]["says"]
    assert json.dumps(planned)


def test_a_half_written_recipe_is_no_error_message(service, make_text):
    assert list(batch.preview(service, None, batch.RECIPE)) == [batch.EMPTY]
    [said] = batch.preview(service, [str(make_text())], "[[jobs]]\nfiles = ")
    assert "TOML" in said["text"]


def test_a_long_plan_can_be_let_go_between_its_items(service, monkeypatch):
    monkeypatch.setattr(batch, "GIVE_EVERY_S", 0.0)
    steps = batch.preview(service, None, '[[jobs]]\ntext = "Once"\n' * 5)
    assert [next(steps) for _ in range(5)] == [gr.skip()] * 5
    assert next(steps)["title"] == "5 items"


def test_too_much_for_a_page_is_refused(make_text):
    recipe = '[[jobs]]\nfiles = "*"\n' * (batch.MAX_ITEMS + 1)
    with pytest.raises(ValueError, match="command line"):
        batch.read_form([str(make_text())], recipe)
    with pytest.raises(ValueError, match="the page takes 100,000"):
        batch.read_form([], f"{batch.RECIPE}#{'a' * 100_000}")


def test_a_finished_job_shows_its_table_and_a_zip_of_the_results(service, store, make_png, make_text):
    job_id = submit(service, store, [make_png(), make_text(), make_text("c.txt", b"%PDF-1.7")])
    view = store.look("me", job_id, wait_s=30)
    value = batch.shown(view)
    assert (view.state, value["state"], value["title"]) == ("done", "done", "2 items done")
    assert [row["word"] for row in value["rows"]] == ["done", "done", "failed"]
    with zipfile.ZipFile(value["file"]["path"]) as archive:
        assert archive.namelist() == ["jobs.toml", "results.jsonl", "picture-s0-1.png", "text-s0-1.txt", "text-s0-1.txt.json"]
        assert archive.read("jobs.toml").decode() == batch.RECIPE


def test_a_stopped_job_keeps_what_is_there(service, store, make_text):
    recipe = '[[jobs]]\ntext = "Once"\nnum_bytes = 20\n[[jobs]]\nfiles = "*"\nnum_bytes = 1000000'
    job_id = submit(service, store, [make_text()], recipe)
    deadline = time.monotonic() + 20
    while (latest := store.look("me", job_id).latest) is None or latest.rows[0].state != "done" or not latest.rows[1].done_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store.stop("me", job_id)
    view = store.look("me", job_id, wait_s=10)
    value = batch.shown(view)
    assert (value["state"], value["title"]) == ("stopped", "Stopped after 1 of 2 items")
    with zipfile.ZipFile(value["file"]["path"]) as archive:
        assert archive.namelist()[2:] == ["new-s0-1.txt", "new-s0-1.txt.json"]


def test_a_batch_that_failed_shows_its_table_without_a_zip(service, store, make_text, monkeypatch):
    def no_zip(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch, "write_zip", no_zip)
    view = store.look("me", submit(service, store, [make_text()]), wait_s=30)
    value = batch.shown(view)
    assert (view.state, value["state"], "file" in value) == ("failed", "failed", False)
    assert "No space left" in value["text"]
    assert len(value["rows"]) == 1


def test_a_zip_that_could_not_be_finished_is_not_there(service, make_text, tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    items = batch.read_form([str(make_text())], batch.RECIPE)
    made = Batch(service, items, tmp_path / "out")
    list(made.run())
    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(ValueError, match="No space left"):
        batch.write_zip(made, batch.RECIPE, tmp_path / batch.ZIP_NAME)
    assert not (tmp_path / batch.ZIP_NAME).exists()


def test_following_shows_a_job_until_it_is_over_and_to_its_owner_alone(service, store, make_text):
    steps, page = follower(store, lambda: lambda view: view.state), gr.Request(session_hash="page")
    job_id = submit(service, store, [make_text()])
    first, *states = list(steps("me", job_id, page))
    assert first == gr.skip()
    assert states[-1] == "done"
    assert list(steps("you", job_id, page)) == [gr.skip()]
    assert list(steps("me", "", page)) == [gr.skip()]


def test_a_visitor_keeps_the_name_given_at_the_first_visit():
    first, second = greet(""), greet(None)
    assert len(first) >= 20
    assert first != second
    assert greet(first) == first
    for wrong in (5, [1], {"a": 1}, "\ud800", "x" * 1000):
        assert len(greet(wrong)) == len(first)
