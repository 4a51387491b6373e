"""The named endpoints, through the client that scripts use: the checks, the answers and the bytes of the command line."""

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gradio.context import LocalContext
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from own_process import command_line
from page_client import client_of
from page_server import free_port, wait_for_page
from waiting import wait_until

from app.batch import Batch, Row
from app.calls import Calls, owner_of
from app.endpoints import _add_completions, _scored, completion_form
from app.exports import write_csv, write_png
from app.jobs import STOPPED, Job
from app.tabs.refusals import ENDPOINT_WORDS
from core.codecs import read_media

ROOT = Path(__file__).parents[1]
RECIPE = '[[jobs]]\nfiles = "*"\nkeep = 0.5\nnum_bytes = 48\nseed = 5\nsamples = 2'
MEDIA = {"make_png": "pixels", "make_wav": "samples"}
NOTHING_SAID = dict.fromkeys(
    ["model", "num_bytes", "samples", "temperature", "top_k", "top_p", "seed", "framing", "upside_down", "first_bytes"]
)


@pytest.fixture(scope="module")
def client(page_url: str) -> Client:
    return client_of(page_url)


def zipped(archive: str) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as files:
        return {name: files.read(name) for name in files.namelist()}


def test_score_answers_the_object_of_the_service(client, service, make_png):
    path = make_png()
    answer = client.predict(handle_file(path), "", api_name="/score")
    assert answer == json.loads(json.dumps(service.score_file(path).to_dict() | {"file": path.name}))


def test_score_adapts_or_reads_the_stored_file_when_asked(client, make_png):
    path = make_png(width=3)
    with pytest.raises(AppError) as refusal:
        client.predict(handle_file(path), "", api_name="/score")
    assert all(words in str(refusal.value) for words in ENDPOINT_WORDS.values())
    assert client.predict(handle_file(path), "", adapt=True, api_name="/score")["num_bytes"] == 192
    assert client.predict(handle_file(path), "", scored_as="file", api_name="/score")["num_bytes"] == path.stat().st_size


def test_a_batch_plan_tells_every_item_and_makes_nothing(client, make_png, make_text):
    files = [handle_file(path) for path in (make_png(), make_text())]
    recipe = f'{RECIPE}\n[[jobs]]\nfiles = "*.flac"\n[[jobs]]\ntext = "Once"\ntop_k = 300'
    picture, text, nothing, wrong = client.predict(files, recipe, api_name="/batch_plan")["items"]
    assert (picture["source"], picture["num_bytes"], text["num_bytes"]) == ("picture.png", 96, 96)
    assert picture["plan"].startswith("keeps top 4 of 8 rows")
    assert picture["estimate_seconds"] > 0
    assert "none of the 2 files fits *.flac" in nothing["error"]
    assert "top_k=300 must lie in 1..256" in wrong["error"]


def test_a_bad_item_stops_no_other(client, make_text):
    files = [handle_file(path) for path in (make_text("a.txt"), make_text("b.txt", b"%PDF-1.7"))]
    archive, facts = client.predict(files, RECIPE, api_name="/batch")
    assert [each.get("output") for each in facts] == ["a-s5-1.txt", "a-s5-2.txt", None]
    assert "PDF" in facts[2]["error"]
    assert "a-s5-2.txt" in zipped(archive)


@pytest.mark.parametrize("pattern", ["/etc/passwd", "../*", "/etc/*", "**/*.py", "app/samples/lamp.txt"])
def test_a_recipe_on_the_page_reaches_no_file_of_this_machine(client, make_text, pattern):
    recipe = f'[[jobs]]\nfiles = "{pattern}"'
    [item] = client.predict([handle_file(make_text())], recipe, api_name="/batch_plan")["items"]
    assert "none of the 1 files fits" in item["error"]


def test_no_endpoint_tells_a_path_of_this_machine(client, make_text):
    wrong = handle_file(make_text("b.txt", b"%PDF-1.7"))
    for endpoint, arguments in {"/generate": [wrong, ""], "/repeat": [wrong], "/score": [wrong, ""]}.items():
        with pytest.raises(AppError, match=r"the file (is|holds)") as refusal:
            client.predict(*arguments, api_name=endpoint)
        assert "/" not in str(refusal.value)
    files = [handle_file(make_text("a.txt")), handle_file(make_text("b.txt", b"%PDF-1.7"))]
    plan = client.predict(files, RECIPE, api_name="/batch_plan")
    archive, facts = client.predict(files, RECIPE, api_name="/batch")
    for told in (json.dumps(plan), json.dumps(facts), zipped(archive)["results.jsonl"].decode()):
        assert "/" not in told.replace("bits/byte", "")


def test_a_short_call_does_not_wait_for_long_ones_and_a_cancelled_one_ends(page_url, client):
    callers = [client_of(page_url) for _ in range(5)]
    settings = {"keep": 1.0, "samples": 1, "api_name": "/generate"}
    long_calls = [caller.submit(None, "Once", "", num_bytes=1_000_000, **settings) for caller in callers]

    def states() -> list[str]:
        return [job["state"] for caller in callers for job in caller.predict(api_name="/jobs")]

    wait_until(lambda: states() == ["running"] * 5, every_s=0.05)
    client.predict(None, "Once", "", num_bytes=50, **settings)
    assert states() == ["running"] * 5
    for call in long_calls:
        call.cancel()
    wait_until(lambda: states() == ["stopped"] * 5, every_s=0.05)


def say_cancelled(page_url: str, caller: Client, call: Any, route: str) -> None:
    """What a client sends that gives up a call of /generate."""
    number = caller._infer_fn_index("/generate", None)
    event = {"event_id": call.communicator.event_id, "session_hash": caller.session_hash, "fn_index": number}
    address, kind = f"{page_url}gradio_api/{route}", {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(address, json.dumps(event).encode(), kind)).close()


@pytest.mark.parametrize("route", ["cancel", "reset"])  # a client that gives up before it knows the event tells the second only
def test_a_cancelled_call_ends_alone(page_url, route):
    caller = client_of(page_url)
    settings = {"keep": 1.0, "api_name": "/generate"}
    long_call = caller.submit(None, "Once", "", num_bytes=1_000_000, **settings)
    other = caller.submit(None, "Once", "", num_bytes=500, **settings)

    def states() -> list[str]:
        return [job["state"] for job in caller.predict(api_name="/jobs")]

    wait_until(lambda: len(states()) == 2, every_s=0.02)
    say_cancelled(page_url, caller, long_call, route)
    _, [facts] = other.result(timeout=20)
    assert facts["num_bytes_generated"] == 500
    with pytest.raises(AppError, match="stopped"):
        long_call.result(timeout=20)
    assert sorted(states()) == ["done", "stopped"]


def test_to_cancel_a_call_that_is_over_ends_no_other(page_url):
    caller = client_of(page_url)
    settings = {"keep": 1.0, "api_name": "/generate"}
    short_call = caller.submit(None, "Once", "", num_bytes=8, **settings)
    short_call.result(timeout=20)
    other = caller.submit(None, "Once", "", num_bytes=30_000, **settings)
    wait_until(lambda: "running" in [job["state"] for job in caller.predict(api_name="/jobs")], every_s=0.02)
    say_cancelled(page_url, caller, short_call, "cancel")
    _, [facts] = other.result(timeout=60)
    assert facts["num_bytes_generated"] == 30_000


def forever(job: Job) -> None:
    while True:
        job.report(None)
        time.sleep(0.001)


def test_a_call_may_be_cancelled_before_it_begins(store):
    calls, request = Calls(store), SimpleNamespace(session_hash="mine")

    def call() -> None:
        LocalContext.event_id.set("event")
        for _ in itertools.islice(calls.finished(request, "kind", "title", forever), 3):
            pass

    assert not calls.cancel("event", None)
    with pytest.raises(ValueError, match=STOPPED):
        copy_context().run(call)


def test_a_caller_who_goes_away_ends_the_job(store, monkeypatch):
    monkeypatch.setattr("app.calls._LOOK_EVERY_S", 0.01)
    answers = Calls(store).finished(SimpleNamespace(session_hash="mine"), "kind", "title", forever)
    next(answers)
    assert [job.state for job in store.list("mine")] == ["running"]
    answers.close()
    wait_until(lambda: [job.state for job in store.list("mine")] == ["stopped"])


def test_a_batch_plan_that_nobody_waits_for_ends(service, store, monkeypatch):
    def slow_plan(batch: Batch) -> Iterator[Row]:
        for row in itertools.islice(itertools.cycle(batch.rows), 2000):
            time.sleep(0.001)
            yield row

    monkeypatch.setattr(Batch, "plan", slow_plan)
    monkeypatch.setattr("app.calls._LOOK_EVERY_S", 0.01)
    endpoints, calls = {}, Calls(store)
    monkeypatch.setattr(calls, "add_endpoint", lambda name, answer, *_: endpoints.update({name: answer}))
    _add_completions(service, calls)
    answers = endpoints["batch_plan"](None, RECIPE.replace("files", "text"), SimpleNamespace(session_hash="mine"))
    next(answers)
    assert [job.state for job in store.list("mine")] == ["running"]
    answers.close()
    wait_until(lambda: [job.state for job in store.list("mine")] == ["stopped"], limit_s=1.0)


def test_a_score_that_a_script_asked_for_can_be_stopped(service, store, make_text):
    path, lock = str(make_text()), service.model("text").lock
    with lock:
        job_id = store.submit("mine", "score", "", lambda job: _scored(service, job, path, None, None, None))
        wait_until(lambda: lock.is_wanted)
        store.stop("mine", job_id)
        assert store.look("mine", job_id, wait_s=5).state == "stopped"


def test_sigterm_ends_a_busy_page_cleanly(tiny_models, tmp_path, make_text):
    port, temporary = free_port(), tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = command_line(tiny_models, "ui", "--no-browser", "--port", port)
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as page:
        wait_for_page(f"http://127.0.0.1:{port}/", page)
        callers = [client_of(f"http://127.0.0.1:{port}/") for _ in range(2)]
        callers[0].predict(handle_file(make_text()), "", api_name="/score")
        for caller in callers:
            caller.submit(None, "Once", "", keep=1.0, num_bytes=1_000_000, api_name="/generate")
        wait_until(lambda: len(list(temporary.glob("jobs-*/*"))) == 3, every_s=0.05)
        children = Path(f"/proc/{page.pid}/task/{page.pid}/children").read_text().split()
        page.send_signal(signal.SIGTERM)
        _, err = page.communicate(timeout=10)
    assert (page.returncode, len(err.splitlines())) == (143, 1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert [path for path in temporary.rglob("*") if path.is_file()] == []
    assert not list(temporary.glob("jobs-*"))


def test_endpoints_refuse_in_the_words_of_the_service(client):
    with pytest.raises(AppError, match="temperature=-1"):
        client.predict(None, "some text", "", 0.5, 10, 1, -1.0, 0, 1.0, 0, api_name="/generate")
    with pytest.raises(AppError, match="nothing to score"):
        client.predict(None, "", api_name="/score")
    with pytest.raises(AppError, match="no TOML"):
        client.predict(None, "[[", api_name="/batch")


@pytest.mark.parametrize("make", ["make_text", "make_png"])
@pytest.mark.parametrize("keep", [-1, None, 0.5])
def test_a_file_cut_short_keeps_what_the_command_line_keeps(service, make_text, make_png, make, keep):
    path = {"make_text": make_text, "make_png": lambda: make_png(width=64, height=64)}[make]()
    if make == "make_png":
        path.write_bytes(path.read_bytes()[:6000])
    form = completion_form(str(path), None, keep, None, **NOTHING_SAID)
    assert service.complete(**form).plan == service.complete(path, keep=0.5 if keep == 0.5 else None).plan
    if make == "make_png":
        assert service.complete(**form).given.is_cut


def test_null_arguments_are_as_if_they_were_not_given(client, make_text):
    path = make_text(content=b"The lamp was lit.")
    nulls = dict.fromkeys([*NOTHING_SAID, "text", "keep", "keep_bytes"])
    (_, facts), (_, expected) = (
        client.predict(handle_file(path), api_name="/generate", **settings)
        for settings in (nulls | {"num_bytes": 9}, {"text": "", "model": "", "num_bytes": 9})
    )
    assert [each["bits_per_byte"] for each in facts] == [each["bits_per_byte"] for each in expected]
    assert client.predict(handle_file(path), None, None, None, api_name="/score")["scored_as"] == "media"
    with pytest.raises(AppError, match=r"recipe|job"):
        client.predict(None, None, api_name="/batch")


def test_file_and_text_exclude_each_other_and_keep_has_a_range(client, make_text):
    path = handle_file(make_text())
    with pytest.raises(AppError, match="either a file or a text"):
        client.predict(path, "some text", "", api_name="/generate")
    with pytest.raises(AppError, match="nothing to complete"):
        client.predict(None, "", "", api_name="/generate")
    for keep in (1.5, -0.5):
        with pytest.raises(AppError, match=f"keep={keep} must lie in 0..1"):
            client.predict(path, "", "", keep=keep, api_name="/generate")


@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
@pytest.mark.parametrize("form", ["npz", "csv", "png", "html"])
def test_exports_are_those_of_the_service(client, service, request, make, form, tmp_path):
    path = request.getfixturevalue(make)()
    file, facts = client.predict(handle_file(path), form, "rank", "grey", api_name="/export")
    result = service.score_file(path, detailed=True)
    assert Path(file).name == f"{path.stem}.{form}"
    assert facts["total_bits"] == pytest.approx(result.total_bits)
    if form == "npz":
        with np.load(file) as arrays:
            np.testing.assert_array_equal(arrays["bits"], result.bits)
            np.testing.assert_array_equal(arrays["rank"], result.expected.rank)
    elif form == "html":
        assert path.name in Path(file).read_text()
    else:
        write = {"csv": write_csv, "png": functools.partial(write_png, measure="rank", palette="grey")}[form]
        write(result, tmp_path / "expected")
        assert Path(file).read_bytes() == (tmp_path / "expected").read_bytes()


def test_two_files_are_compared_byte_by_byte(client, service, make_text, tmp_path):
    paths = make_text("a.txt", b"The lamp was lit."), make_text("b.txt", b"The door was shut, mostly.")
    picture, facts = client.predict(*map(handle_file, paths), api_name="/compare")
    first, second = (service.score_file(path, detailed=True) for path in paths)
    values = first.bits - second.bits[: len(first.bits)]
    assert (facts["file"]["file"], facts["other"]["file"]) == ("a.txt", "b.txt")
    assert facts["difference"] == {
        "num_bytes": 17,
        "total_bits": pytest.approx(values.sum(dtype=np.float64), rel=1e-4),
        "bits_per_byte": pytest.approx(values.mean(dtype=np.float64), rel=1e-4),
    }
    write_png(first, tmp_path / "expected.png", "difference", other=second)
    assert Path(picture).read_bytes() == (tmp_path / "expected.png").read_bytes()
    page, _ = client.predict(*map(handle_file, paths), form="html", api_name="/compare")
    assert all(path.name in Path(page).read_text() for path in paths)


def test_two_models_are_compared_on_one_file(client, make_text):
    path = make_text()
    _, facts = client.predict(handle_file(path), None, "text", "image32", scored_as="file", api_name="/compare")
    here, there = (client.predict(handle_file(path), model, "file", api_name="/score") for model in ("text", "image32"))
    assert (facts["file"], facts["other"]) == (here, there)
    assert facts["difference"]["total_bits"] == pytest.approx(here["total_bits"] - there["total_bits"], abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"form": "exe", "api_name": "/export"}, "exe"),
        ({"measure": "difference", "api_name": "/export"}, "difference"),
        ({"other": None, "api_name": "/compare"}, "nothing to compare with"),
        ({"other": None, "other_model": "text", "model": "text", "api_name": "/compare"}, "nothing to compare with"),
    ],
)
def test_exports_that_there_are_not_are_refused_in_words(client, make_text, arguments, words):
    with pytest.raises(AppError, match=words):
        client.predict(handle_file(make_text()), **arguments)


@pytest.mark.parametrize("name", ["keep", "num_bytes", "samples", "temperature", "top_k", "top_p", "seed", "keep_bytes"])
def test_numbers_of_hundreds_of_digits_are_refused_in_words(client, name):
    with pytest.raises(AppError, match=r"must lie in|too large"):
        client.predict(None, "Once", **{"num_bytes": 8} | {name: 10**400}, api_name="/generate")


def test_files_of_other_kinds_are_not_compared(client, make_text, make_wav):
    with pytest.raises(AppError, match="do not lie byte on byte"):
        client.predict(handle_file(make_text()), handle_file(make_wav()), api_name="/compare")


@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
def test_alternatives_and_branches_are_those_of_the_page(client, service, request, make):
    path = request.getfixturevalue(make)()
    settings = {"num_bytes": 48, "samples": 2, "seed": 5}
    _, facts = client.predict(handle_file(path), "", "", **settings, api_name="/generate")
    place = {"job": facts[1]["job"], "sample": 1, "number": 7}
    found = client.predict(**place, api_name="/alternatives")
    job = service.complete(path, **settings)
    list(job.run())
    made = job.results[1]
    assert [(each["value"], each["probability"]) for each in found] == job.alternatives(made.made, 7)
    [file], [branch] = client.predict(**place, value=found[1]["value"], api_name="/branch")
    branched = job.branched(made.made, 7, found[1]["value"])
    list(branched.run())
    assert branched.results[0].made[7] == found[1]["value"]
    assert Path(file).suffix == Path(branch["output"]).suffix == made.codec.suffix
    assert branch["bits_per_byte"] == pytest.approx(branched.results[0].bits_per_byte)
    assert client.predict(branch["job"], api_name="/result")[1] == [branch]


@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
def test_a_result_is_made_again_by_its_settings(client, request, make, tmp_path):
    path = request.getfixturevalue(make)()
    [_, second], facts = client.predict(handle_file(path), num_bytes=48, samples=2, seed=5, api_name="/generate")
    result = shutil.copy(second, tmp_path / f"result{path.suffix}")
    if make == "make_text":
        with pytest.raises(AppError, match="holds no settings"):
            client.predict(handle_file(result), api_name="/repeat")
        return
    [_, again], facts_again = client.predict(handle_file(result), api_name="/repeat")
    assert [each["bits_per_byte"] for each in facts_again] == [each["bits_per_byte"] for each in facts]
    np.testing.assert_array_equal(*(vars(read_media(Path(file)))[MEDIA[make]] for file in (again, second)))


def test_a_client_lists_stops_and_reads_its_own_jobs_alone(page_url, make_text):
    client, other = (client_of(page_url) for _ in range(2))
    assert client.predict(api_name="/jobs") == []
    call = client.submit(None, "Once", "", keep=1.0, num_bytes=1_000_000, api_name="/generate")
    wait_until(lambda: any(job["num_reports"] >= 5 for job in client.predict(api_name="/jobs")), every_s=0.05)
    [job] = client.predict(api_name="/jobs")
    assert (job["kind"], job["state"]) == ("generate by a script", "running")
    for endpoint in ("/stop", "/result"):
        with pytest.raises(AppError, match="no such job"):
            other.predict(job["job"], api_name=endpoint)
    started = time.monotonic()
    assert client.predict(job["job"], api_name="/stop")["state"] == "stopped"
    assert time.monotonic() - started < 1.5
    with pytest.raises(AppError, match="stopped"):
        call.result()
    [file, sidecar_facts] = [each[0] for each in client.predict(job["job"], api_name="/result")]
    assert Path(file).read_bytes().startswith(b"Once")
    assert 0 < sidecar_facts["num_bytes_generated"] < 1_000_000
    assert other.predict(api_name="/jobs") == []


@pytest.mark.parametrize(
    ("endpoint", "change", "words"),
    [
        ("/alternatives", {"sample": 3}, "sample=3 is none"),
        ("/alternatives", {"number": 48}, "number=48 must lie in 0..47"),
        ("/branch", {"value": 256}, "value=256 must lie in 0..255"),
        ("/branch", {"job": "gone"}, "no such job"),
        ("/branch", {"number": 47}, "none is left"),
    ],
)
def test_places_that_there_are_not_are_refused_in_words(client, endpoint, change, words):
    _, [facts] = client.predict(None, "Once", "", num_bytes=48, api_name="/generate")
    place = {"job": facts["job"], "sample": 0, "number": 1} | ({"value": 65} if endpoint == "/branch" else {})
    with pytest.raises(AppError, match=words):
        client.predict(**place | change, api_name=endpoint)


def test_models_of_other_folders_are_not_opened_for_scripts(client, tiny_models, make_text):
    for model in (str(tiny_models / "text"), "../text", "/etc"):
        with pytest.raises(AppError, match="on this page; it has audio, image32, text"):
            client.predict(handle_file(make_text()), model, api_name="/score")
    recipe = f'[[jobs]]\ntext = "Once"\nmodel = "{tiny_models / "text"}"'
    [item] = client.predict(None, recipe, api_name="/batch_plan")["items"]
    assert "on this page" in item["error"]


def test_calls_without_a_session_share_no_jobs():
    first, second = (owner_of(SimpleNamespace(session_hash=None)) for _ in range(2))
    assert first
    assert first != second
    assert owner_of(SimpleNamespace(session_hash="mine")) == "mine"


def test_files_of_this_machine_cannot_be_scored_by_their_path(page_url, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("not yours")
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [file, "", "media", False]}).encode()
    request = urllib.request.Request(f"{page_url}gradio_api/call/score", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{page_url}gradio_api/call/score/{event}") as stream:
        assert "bits_per_byte" not in stream.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{page_url}gradio_api/file={secret}")
