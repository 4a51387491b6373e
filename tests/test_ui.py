"""The page's handlers without a browser."""

import base64
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app import ui
from app.gallery import Gallery, Made, character_starts, gallery_work
from app.jobs import JobLimits, JobStore, JobView
from app.palette import DIVERGING
from app.provenance import read_provenance, sidecar_of
from app.service import Service
from app.tabs import complete, likelihood
from app.tabs.following import follower
from app.tabs.refusals import PAGE_WORDS
from app.views import cards, score_values
from core.errors import UserError

SETTINGS = {"model": "", "num_bytes": None, "samples": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 3,
            "framing": "tiles", "upside_down": False}  # fmt: skip


@pytest.fixture(scope="module")
def service(tiny_models: Path) -> Service:
    return Service(weights=tiny_models, runs=tiny_models / "no-runs")


@pytest.fixture
def store() -> Iterator[JobStore]:
    store = JobStore()
    yield store
    store.close()


@pytest.fixture
def scored(service: Service, store: JobStore) -> Callable[..., JobView]:
    """Scores files as a job of the page."""

    def scored(*paths: Path, scored_as: str = "media", adapt: bool = False, models: Sequence[str | None] = (None,)) -> JobView:
        work = likelihood.scoring_work(service, paths, models, scored_as, adapt)
        return store.look("me", store.submit("me", likelihood.KIND, "", work), wait_s=60)

    return scored


def shown(view: JobView) -> tuple[dict, list[dict]]:
    """The message and the items that the page shows of a job."""
    _, message, value = likelihood.new_display()(view)
    return message, value["items"]


def form(path: Path | None = None, text: str = "", keep_bytes: int = complete.ALL, **settings) -> dict | None:
    source = complete.FROM_TEXT if text else complete.FROM_FILE
    return complete.request(source, None if path is None else str(path), text, keep_bytes, **SETTINGS | settings)


def completed(store: JobStore, service: Service, request: dict, earlier: Sequence[Made] = ()) -> Gallery:
    """The gallery of a job of the page that is done."""
    work = gallery_work(lambda: service.complete(**request), earlier=earlier)
    view = store.look("me", store.submit("me", complete.KIND, "", work), wait_s=60)
    assert view.state == "done", view.problem
    return view.result


@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
def test_sidecars_hold_the_score_in_media_order(service, scored, make, request):
    path = request.getfixturevalue(make)(**({"width": 11, "height": 9} if make == "make_png" else {}))
    _, [item] = shown(scored(path))
    document = item["document"]
    stored, likeliest = (Path(document[name]["path"]).read_bytes() for name in ("file", "likeliest_file"))

    score = service.score_file(path, detailed=True)
    count, num_samples = document["count"], document["num_samples"]
    bits, entropy, context = np.frombuffer(stored, "<u2", 3 * count).reshape(3, count)
    rest = np.frombuffer(stored, np.uint8, offset=6 * count + 2 * num_samples)
    values, ranks = rest[:count], rest[count:]
    expected = score_values.in_media_order(score, score.expected.rank)
    assert len(ranks) == count
    assert (ranks == expected).all()
    np.testing.assert_allclose(bits / 1024, score_values.in_media_order(score, score.bits), atol=1 / 1024)
    np.testing.assert_allclose(entropy / 1024, score_values.in_media_order(score, score.expected.entropy), atol=5e-3)
    five = np.frombuffer(likeliest, np.uint8).reshape(count, 10)
    assert (five[:, :5] == score_values.in_media_order(score, score.expected.likeliest)).all()
    assert context.min() == 0
    if make == "make_png":
        assert (document["kind"], document["width"], document["height"]) == ("image", 11, 9)
        assert values.tobytes() == np.asarray(Image.open(path)).tobytes()
        np.testing.assert_allclose(bits / 1024, score.media_bits.reshape(-1), atol=1 / 1024)
    if make == "make_wav":
        samples = np.frombuffer(stored, "<i2", num_samples, offset=6 * count)
        assert (samples == score.media.samples).all()


def test_an_item_has_the_totals_and_then_what_other_coders_need(service, scored, make_png, tmp_path):
    path = make_png()
    score = service.score_file(path, detailed=True)
    board = likelihood.Board(tmp_path)
    board.take(score)
    assert board.items[0]["references"] is None
    message, [item] = shown(view := scored(path))
    assert [reference["name"] for reference in item["references"]] == ["xz", "PNG"]
    assert item["bits_per_byte"] == pytest.approx(score.bits_per_byte)
    assert message == score_values.done()
    assert list(view.result.scored) == [item["id"]] == [item["document"]["id"]]


def test_each_kind_opens_the_view_that_fits(scored, make_png, make_wav, make_text, tmp_path):
    binary = tmp_path / "noise.bin"
    binary.write_bytes(np.random.default_rng(0).bytes(300))
    _, items = shown(scored(make_png(), make_wav(), make_text(), binary))
    assert [item["kind"] for item in items] == ["image", "audio", "text", "raw"]
    assert [item["kind"] for item in shown(scored(make_png(), scored_as="file"))[1]] == ["raw"]


def test_a_bad_file_among_others_is_a_line_of_the_list(service, scored, make_text, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    _, items = shown(scored(empty, make_text()))
    assert [item["state"] for item in items] == ["error", "done"]
    with pytest.raises(ValueError, match=r".") as refusal:
        service.score_file(empty)
    assert items[0]["message"] == str(refusal.value)


def test_a_second_model_scores_the_files_again(scored, make_text):
    _, items = shown(scored(make_text(), models=[None, "audio"], scored_as="file"))
    assert [item["model"] for item in items] == ["text", "audio"]
    assert items[0]["document"]["count"] == items[1]["document"]["count"]


@pytest.mark.parametrize(("content", "option"), [(b"%PDF-1.7", "--bytes file"), (None, "--adapt"), (b"", None)])
def test_a_refusal_is_said_on_the_page_and_in_a_message_in_the_words_of_the_page(
    service, store, scored, make_wav, make_text, content, option
):
    path = make_wav(sample_rate=22050) if content is None else make_text(content=content)
    view = scored(path)
    message, items = shown(view)
    with pytest.raises(gr.Error) as error:
        list(follower(store, likelihood.new_display)("me", view.id))
    assert (message["state"], items) == ("error", [])
    assert message["text"] == error.value.message
    assert "--" not in error.value.message
    if option is None:
        with pytest.raises(ValueError, match=r".") as refusal:
            service.score_file(path)
        assert message["text"] == str(refusal.value)
    else:
        assert PAGE_WORDS[option] in message["text"]


def test_adapting_is_said_under_the_totals(scored, make_wav):
    _, [item] = shown(scored(make_wav(sample_rate=16000), adapt=True))
    assert item["notes"][0] == "resampled from 16000 Hz to 8000 Hz"
    assert (item["document"]["sample_rate"], item["document"]["num_samples"]) == (8000, 200)


def test_more_bits_than_a_guess_needs_are_explained(scored, make_wav, make_png):
    for path in (make_wav(), make_png()):
        _, [item] = shown(scored(path))
        assert (score_values.WORSE_THAN_A_GUESS in item["notes"]) == (item["bits_per_byte"] > 8)


def test_the_window_rule_is_said_for_long_files_only(scored, make_text, make_png):
    _, [short] = shown(scored(make_text(content=b"The lamp.")))
    assert "fits into the model's 128 bytes" in short["facts"]
    _, [long] = shown(scored(make_text(content=b"x" * 300)))
    assert "windows of 128 bytes, one every 128; each begins without context" in long["facts"]
    _, [tiles] = shown(scored(make_png(width=16, height=16)))
    assert "in 4 tiles" in tiles["facts"]


def test_a_stopped_scoring_says_so_and_frees_the_model(service, store, make_text):
    path = make_text(content=b"The lamp was lit.\n" * 20_000)
    job_id = store.submit("me", likelihood.KIND, "", likelihood.scoring_work(service, [path], [None], "media", False))
    while (view := store.look("me", job_id)).latest is None or not view.latest.progress.num_scored:
        time.sleep(0.01)
    assert "bytes" in shown(view)[0]["title"]
    store.stop("me", job_id)
    assert shown(store.look("me", job_id, wait_s=10)) == (likelihood.STOPPED, [])
    assert not service.model("text").lock.locked()


def test_the_list_of_files_is_sent_only_if_it_has_changed(scored, make_text):
    view, display = scored(make_text()), likelihood.new_display()
    assert display(view)[2]["items"] == view.result.items
    assert display(view)[2] == gr.skip()


def test_the_difference_of_two_files_is_exported_as_drawn(store, scored, make_text):
    view = scored(make_text("a.txt", b"The lamp was lit."), make_text("b.txt", b"The door was open."))
    first, second = view.result.items
    kept = likelihood.kept_scores(store, "me", view.id)
    asked = {"id": first["id"], "other": second["id"], "form": "png", "measure": "difference", "palette": "viridis"}
    value = next(steps := likelihood.export_steps(kept, gr.EventData(None, asked)))
    with Image.open(value["file"]["path"]) as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (colours == DIVERGING[0]).all(axis=1).any()
    steps.close()
    with pytest.raises(gr.Error, match="choose a file to compare with"):
        next(likelihood.export_steps(kept, gr.EventData(None, asked | {"other": ""})))


@pytest.mark.parametrize(
    "wrong",
    [
        {"measure": "depth"},
        {"palette": "jet"},
        {"form": "../x"},
        {"form": "exe"},
        {"measure": None},
        {"id": ["x"]},
        {"other": {}},
    ],
)
def test_an_export_that_there_is_not_is_refused(store, scored, make_text, wrong):
    view = scored(make_text())
    kept = likelihood.kept_scores(store, "me", view.id)
    asked = {"id": view.result.items[0]["id"], "other": "", "form": "png", "measure": "bits", "palette": "viridis"}
    with pytest.raises(gr.Error, match="no such export"):
        next(likelihood.export_steps(kept, gr.EventData(None, asked | wrong)))


@pytest.mark.parametrize("form", ["png", "csv", "npz", "html"])
def test_exports_are_files_of_the_asked_form(store, scored, make_png, form):
    view = scored(make_png("lake.png"))
    [item] = view.result.items
    kept = likelihood.kept_scores(store, "me", view.id)
    asked = {"id": item["id"], "other": "", "form": form, "measure": "rank", "palette": "grey"}
    steps = likelihood.export_steps(kept, gr.EventData(None, asked))
    value = next(steps)
    starts = {"png": b"\x89PNG", "csv": b"offset,value,bits", "npz": b"PK", "html": b"<!doctype html>"}
    assert value["file"]["orig_name"] == f"lake.{form}"
    assert Path(value["file"]["path"]).read_bytes().startswith(starts[form])
    steps.close()
    assert not Path(value["file"]["path"]).exists()
    for nobodys in (likelihood.kept_scores(store, "you", view.id), likelihood.kept_scores(store, "me", "")):
        with pytest.raises(gr.Error, match="no longer kept"):
            next(likelihood.export_steps(nobodys, gr.EventData(None, asked)))


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
    assert (prompt["state"], prompt["text"]) == ("error", words)


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


def test_scripts_of_the_views_never_parse_html():
    folder = Path(ui.__file__).parent / "views"
    assert len(list(folder.glob("*.js"))) >= 8
    for script in folder.glob("*.js"):
        assert not {"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"} & set(script.read_text().split())
        assert "innerHTML" not in script.read_text()
    for template in folder.glob("*.html"):
        assert "${" not in template.read_text()
        assert "{{" not in template.read_text()


def test_busy_port_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port {port} .*--port$"):
            ui.check_port("127.0.0.1", port)
