"""The handlers of the Complete tab without a browser."""

import base64
import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_until

from app import gallery as gallery_module
from app.gallery import Gallery, Made, character_starts, gallery_work
from app.job_endpoints import add_job_endpoints
from app.jobs import JobLimits, JobStore
from app.provenance import read_provenance, sidecar_of
from app.service import Service
from app.tabs import complete
from app.views import cards

SETTINGS = {"model": "", "num_bytes": None, "samples": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 3,
            "framing": "tiles", "upside_down": False}  # fmt: skip


def form(path: Path | None = None, text: str = "", keep_bytes: int = complete.ALL, **settings) -> dict | None:
    source = complete.FROM_TEXT if text else complete.FROM_FILE
    return complete.request(source, None if path is None else str(path), text, keep_bytes, **SETTINGS | settings)


def completed(store: JobStore, service: Service, request: dict, earlier: Sequence[Made] = ()) -> Gallery:
    """The gallery of a job of the page that is done."""
    work = gallery_work(lambda: service.complete(**request), earlier=earlier)
    view = store.look("me", store.submit("me", complete.KIND, "", work), wait_s=60)
    assert view.state == "done", view.problem
    return view.result


def test_form_without_a_source_is_no_request():
    assert form() is None
    assert form(text="a")["text"] == b"a"


def test_plan_and_prompt_are_shown_before_anything_is_made(service, make_png):
    prompt, words = complete.preview(service, form(make_png(), samples=3))
    assert words.startswith("Keeps top 4 of 8 rows")
    assert "3 times" in words
    assert (prompt["cut"], prompt["count"], prompt["whole"], prompt["unit"]) == (96, 192, 192, 96)
    assert json.dumps(prompt)
    moved, words = complete.replan(service, form(make_png(), keep_bytes=100))
    assert moved == {"cut": 96, "says": "top 4 of 8 rows"}
    assert "rounded down from 100 to 96 bytes" in words


def test_a_refused_setting_is_said_in_the_plan_beside_the_source(service, make_png):
    prompt, words = complete.preview(service, form(make_png(), num_bytes=5000))
    assert "at most 96" in words
    assert prompt["media"]
    prompt, words = complete.preview(service, form(make_png(), model="text"))
    assert (prompt["state"], prompt["text"].lower()) == ("error", words.lower())


def test_a_refused_file_is_not_told_by_its_path(service, make_text):
    _, words = complete.preview(service, form(make_text(content=b"%PDF-1.7")))
    assert words.startswith("The file is a PDF document")
    assert "--" not in words


def test_the_prompt_of_a_cut_file_says_how_far_it_reaches(service, make_png, make_wav):
    path = make_png(width=16, height=16)
    path.write_bytes(path.read_bytes()[:500])
    prompt, words = complete.preview(service, form(path))
    assert prompt["cut"] == prompt["count"] < prompt["whole"] == 768
    assert "cut short: the top" in words
    path = make_wav(num_samples=400)
    path.write_bytes(path.read_bytes()[: 44 + 600])
    prompt, words = complete.preview(service, form(path))
    assert (prompt["cut"], prompt["whole"]) == (300, 400)
    assert "ends early: 0.04 s of 0.05 s are there" in words.lower()


@pytest.mark.parametrize("kind", ["png", "wav", "text"])
def test_finished_cards_carry_the_bytes_of_the_service(service, store, make_png, make_wav, make_text, kind, tmp_path):
    path = {"png": make_png, "wav": make_wav, "text": make_text}[kind]()
    request = form(path, samples=2, num_bytes=40 if kind != "png" else None)
    job = service.complete(**request)
    list(job.run())
    expected = [service.write_completion(result, tmp_path) for result in job.results]
    shown = cards.Display().results(completed(store, service, request), is_running=False)
    stored = [Path(card["files"][0]["file"]["path"]).read_bytes() for card in shown["items"]]
    assert stored == [output.read_bytes() for output in expected]
    assert [len(card["files"]) for card in shown["items"]] == [2 if kind == "text" else 1] * 2
    assert json.dumps(shown)


def test_only_what_is_new_of_a_picture_is_sent_and_a_new_page_gets_all(service, make_png):
    path = make_png(width=16, height=16)
    gallery, display = Gallery(service.complete(path), "Sample"), cards.Display()
    canvas = np.zeros((16, 16, 4), np.uint8)
    sizes = []
    for progress in gallery.job.run():
        if progress.completion is None:
            gallery.take(progress, Path())
            [card] = display.results(gallery, is_running=True)["items"]
            media = card["media"]
            box = np.frombuffer(base64.b64decode(media["rgba"]), np.uint8).reshape(-1, media["box_width"], 4)
            canvas[media["top"] :][: len(box), media["left"] :][:, : media["box_width"]] = box
            sizes.append(len(box))
            partial = progress.partial
    assert sizes[0] == 12  # the kept rows with the first blocks
    assert max(sizes[1:]) <= 4
    np.testing.assert_array_equal(canvas[..., :3][partial.known], partial.pixels[partial.known])
    np.testing.assert_array_equal(canvas[..., 3] == 255, partial.known)
    [card] = cards.Display().results(gallery, is_running=True)["items"]
    assert len(base64.b64decode(card["media"]["rgba"])) == 4 * 16 * 16


@pytest.mark.parametrize("step", [300, 5_000])
def test_only_what_is_new_of_a_text_is_sent_and_at_last_the_end_of_all_of_it_is_there(service, tmp_path, step):
    gallery, display = Gallery(service.complete(**form(text="The lamp", num_bytes=30_000)), "Sample"), cards.Display()
    shown, sizes, wanted = "", [], 0
    for progress in gallery.job.run():
        gallery.take(progress, tmp_path)
        if progress.done_bytes < wanted:
            continue
        wanted = min(progress.done_bytes + step, 30_000)
        if media := display.results(gallery, is_running=True)["items"][0]["media"]:
            assert ("kept_text" in media) == (not sizes)
            shown = ("" if media["is_anew"] else shown) + media["new_text"]
            sizes.append(len(media["new_text"]))
    whole = gallery.own[0].made.tobytes().decode(errors="replace")
    assert shown[-cards.SHOWN_MADE :] == whole[-cards.SHOWN_MADE :]
    assert max(sizes[:-1]) <= (cards.SHOWN_AT_ONCE + 1 if step == 5_000 else step + 100)
    assert [card["media"] for card in display.results(gallery, is_running=False)["items"]] == [None]


def test_stop_keeps_what_is_there_and_frees_the_model(service, store):
    request = form(text="The lamp", num_bytes=100_000)
    job_id = store.submit("me", complete.KIND, "", gallery_work(lambda: service.complete(**request)))
    while (view := store.look("me", job_id)).latest is None or not view.latest.at_work:
        time.sleep(0.01)
    show = complete.new_display()
    assert "bytes/s" in show(view)[2]["items"][0]["caption"]
    store.stop("me", job_id)
    view = store.look("me", job_id, wait_s=10)
    assert not service.model("text").lock.locked()
    [card] = show(view)[2]["items"]
    assert card["caption"].startswith("stopped after")
    kept = Path(card["files"][0]["file"]["path"]).read_bytes()
    assert kept.startswith(b"The lamp")
    assert len(kept) > len(b"The lamp")


def test_no_card_is_missing_while_samples_are_stopped(service, make_png, monkeypatch, tmp_path):
    gallery, display = Gallery(service.complete(make_png(width=16, height=16), samples=2), "Sample"), cards.Display()
    with closing(gallery.job.run()) as steps:
        while len(gallery.at_work) < 2:
            gallery.take(next(steps), tmp_path)
    kept = display.results(gallery, is_running=True)["items"]
    seen, write = [], gallery_module.write_completion

    def write_while_shown(*arguments, **options) -> Path:
        seen.append([card["id"] for card in display.results(gallery, is_running=True)["items"]])
        return write(*arguments, **options)

    monkeypatch.setattr(gallery_module, "write_completion", write_while_shown)
    gallery.stop(tmp_path)
    assert seen == [[card["id"] for card in kept]] * 2
    assert not gallery.at_work


def test_a_picture_that_was_not_shown_for_a_moment_is_sent_whole_again(service, make_png):
    gallery, display = Gallery(service.complete(make_png(width=16, height=16)), "Sample"), cards.Display()
    with closing(gallery.job.run()) as steps:
        gallery.take(next(steps), Path())
    before = display.results(gallery, is_running=True)
    assert display.results(gallery, is_running=False)["items"] == []
    assert display.results(gallery, is_running=True)["items"][0]["media"] == before["items"][0]["media"]


@pytest.mark.parametrize("kind", ["png", "wav", "text"])
def test_stopped_samples_carry_the_settings_that_make_them_again(service, request, kind, tmp_path):
    path = request.getfixturevalue(f"make_{kind}")(**({"width": 32, "height": 32} if kind == "png" else {}))
    gallery = Gallery(service.complete(**form(path, samples=2, seed=5, num_bytes=None if kind == "png" else 400)), "Sample")
    with closing(gallery.job.run()) as steps:
        for progress in steps:
            gallery.take(progress, tmp_path)
            if progress.done_bytes > 200 and len(gallery.at_work) + len(gallery.own) == 2:
                break
    gallery.stop(tmp_path)
    stopped = [made for made in gallery.made if not made.completion.is_whole]
    assert stopped
    for made in stopped:
        assert made.path.name == f"stopped-s5-{made.completion.sample + 1}{made.completion.codec.suffix}"
        again = service.repeat(made.path if kind != "text" else sidecar_of(made.path))
        list(again.run())
        np.testing.assert_array_equal(again.results[made.completion.sample].made, made.made)
        shown = cards.Display().results(gallery, is_running=False)["items"][made.completion.sample]
        assert shown["caption"].startswith(f"stopped after {len(made.made)} of ")


@pytest.mark.parametrize("kind", ["png", "wav", "text"])
def test_a_place_leads_to_alternatives_and_to_a_branch_beside_the_sample(service, store, request, kind):
    path = request.getfixturevalue(f"make_{kind}")()
    gallery = completed(store, service, form(path, num_bytes=None if kind == "png" else 40))
    [made] = gallery.made
    place = {"png": 7 * 8 + 7, "wav": 0.99, "text": 3}[kind]
    assert made.number_at({"png": 0, "wav": 0.0, "text": 40_000}[kind]) is None
    number = made.number_at(place)
    if kind == "png":
        x, y = 7, 7
        assert made.media.pixels[y, x, 0] == made.made[number]
    shown = complete.choices_at(made, number)
    assert len(shown["choices"]) == 5
    assert shown["stands"] == made.made[number]
    assert json.dumps(shown)
    job = made.job.branched(made.made, number, shown["choices"][1]["value"])
    work = gallery_work(lambda: job, "Branch", gallery.made)
    view = store.look("me", store.submit("me", complete.KIND, "", work), wait_s=60)
    branched = view.result
    assert [sample.title for sample in branched.made] == ["Sample", "Branch"]
    assert branched.made[1].made[number] == shown["choices"][1]["value"]
    for visitor, job_id, name in [("you", view.id, made.id), ("me", "gone", made.id), ("me", view.id, "gone")]:
        with pytest.raises(gr.Error, match="no longer kept"):
            complete.found_sample(store, visitor, job_id, name)
    assert complete.found_sample(store, "me", view.id, made.id)[0] is branched


def test_questions_about_samples_take_the_turns_of_their_owner_and_are_few_at_a_time(service, store):
    endpoints = {}
    add_job_endpoints(SimpleNamespace(store=store, add_endpoint=lambda name, answer, *_: endpoints.update({name: answer})))
    [made] = completed(store, service, form(text="The lamp", num_bytes=8)).made
    [view], lock = store.list("me"), service.model("text").lock
    place = gr.EventData(None, {"id": made.id, "place": -1, "number": 0})
    for ask in (
        lambda: endpoints["alternatives"](view.id, 0, 0, SimpleNamespace(session_hash="me")),
        lambda: complete.picked(store, "me", view.id, place),
        lambda: complete.stepped(store, "me", view.id, place),
    ):
        with ThreadPoolExecutor(3) as pool:
            with lock:
                at_work = [pool.submit(ask) for _ in range(2)]
                wait_until(lambda: len(lock._waiting) == 2)
                assert [ticket.party for ticket in lock._waiting] == ["me", "me"]
                with pytest.raises(gr.Error, match="2 of your questions are at work"):
                    pool.submit(ask).result(timeout=2)
            assert at_work[0].result() == at_work[1].result()


def test_branches_keep_the_samples_whose_job_is_forgotten(service):
    with closing(JobStore(JobLimits(max_kept_of_owner=1))) as store:
        gallery, paths = completed(store, service, form(text="The lamp", num_bytes=8, samples=2)), []
        for number in range(3):
            work = gallery_work(lambda job=gallery.made[0].job: job, f"Branch {number}", gallery.made)
            paths += [made.path for made in gallery.made]
            gallery = store.look("me", store.submit("me", complete.KIND, "", work), wait_s=60).result
        assert [made.title for made in gallery.made][:3] == ["Sample 1", "Sample 2", "Branch 0 1"]
        store.list("me")
        assert not any(path.exists() for path in paths)  # the folders of all jobs but the last are gone
        for card in cards.Display().results(gallery, is_running=False)["items"]:
            assert [Path(file["file"]["path"]).exists() for file in card["files"]] == [True, True]
        work = gallery_work(lambda: gallery.made[0].job, "Late", gallery.made)
        shutil.rmtree(gallery.made[0].path.parent)
        late = store.look("me", store.submit("me", complete.KIND, "", work), wait_s=60).result
        assert [made.id for made in late.made[:2]] == [made.id for made in gallery.made[1:3]]


def test_fields_that_were_emptied_have_their_defaults(service):
    emptied = dict.fromkeys(("samples", "temperature", "top_p", "top_k", "seed", "num_bytes", "model"))
    job = service.complete(**form(text="The lamp", **emptied))
    assert job.settings == service.complete(**form(text="The lamp", seed=0)).settings


def test_a_result_that_exceeds_the_form_is_brought_into_it_in_words(service, store, make_png):
    path = completed(store, service, form(make_png(), temperature=1.5)).made[0].path
    made = read_provenance(path)
    settings = replace(made.settings, samples=1000, temperature=100, top_p=1e-6)
    restored, changes = complete.settings_of(replace(made, model="gone", settings=settings), {"", "image32"})
    assert restored == ["", 96, 8, 2, 0, 0.01, 3, "tiles", False]
    assert changes == [
        "there is no model gone here, so one is chosen by the content",
        "samples is 8 instead of 1000",
        "temperature is 2 instead of 100",
        "top_p is 0.01 instead of 1e-06",
    ]


def test_a_card_shows_the_end_of_a_long_text(service, store):
    text = "é" * 600 + "ab"
    [card] = cards.Display().results(completed(store, service, form(text=text, num_bytes=3)), is_running=False)["items"]
    assert card["media"]["kept_text"] == "…" + text[-cards.SHOWN_KEPT :]


@given(st.binary(max_size=40))
def test_each_character_is_known_by_its_first_byte(content):
    starts, text = character_starts(content), content.decode("utf-8", "replace")
    assert [content[a:b].decode("utf-8", "replace") for a, b in pairwise([*starts, len(content)])] == list(text)


@pytest.mark.parametrize("kind", ["png", "wav", "text"])
def test_a_result_restores_its_settings_on_the_page_and_gives_the_same_bytes(service, store, request, kind):
    path = request.getfixturevalue(f"make_{kind}")()
    num_bytes = None if kind == "png" else 40
    settings = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 12, "samples": 2, "num_bytes": num_bytes}
    made = completed(store, service, form(path, **settings)).made[1]
    given = sidecar_of(made.path) if kind == "text" else made.path
    restored, changes = complete.settings_of(provenance := read_provenance(given), {"image32", "audio", "text"})
    assert not changes
    wanted = complete.request(complete.FROM_FILE, str(given), "", provenance.settings.keep_bytes, *restored)
    assert (wanted["seed"], wanted["temperature"], wanted["top_k"]) == (12, 0.7, 9)
    again = completed(store, service, wanted).made[1]
    np.testing.assert_array_equal(again.made, made.made)
