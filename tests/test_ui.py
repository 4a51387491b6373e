"""The page's handlers without a browser."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from app import ui
from app.service import Service
from app.tabs import complete, likelihood
from app.tabs.refusals import PAGE_WORDS
from app.views import score_values
from core.errors import UserError

SETTINGS = {"model": "", "num_bytes": None, "samples": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def service(tiny_models: Path) -> Service:
    return Service(weights=tiny_models, runs=tiny_models / "no-runs")


def score_steps(
    service: Service, *paths: Path, scored_as: str = "media", adapt: bool = False, second: str = ""
) -> Iterator[tuple]:
    return likelihood.score_steps(service, [str(path) for path in paths], "", second, scored_as, adapt)


def last_items(steps: Iterator[tuple]) -> list[dict]:
    *_, (message, items, _) = steps
    assert message == score_values.done()
    return items


def form(path: Path | None = None, text: str = "", keep: float = 50, **settings) -> dict | None:
    source = complete.FROM_TEXT if text else complete.FROM_FILE
    return complete.request(source, None if path is None else str(path), text, keep, **SETTINGS | settings)


def test_no_file_shows_the_empty_state(service):
    assert list(likelihood.score_steps(service, None, "", "", "media", False)) == [(likelihood.EMPTY, [], {})]


@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
def test_sidecars_hold_the_score_in_media_order(service, make, request):
    path = request.getfixturevalue(make)(**({"width": 11, "height": 9} if make == "make_png" else {}))
    steps = score_steps(service, path)
    assert next(steps)[0]["state"] == "working"
    document = next(items for _, items, _ in steps if items)[0]["document"]
    sidecar = Path(document["file"]["path"])
    stored, likeliest = sidecar.read_bytes(), Path(document["likeliest_file"]["path"]).read_bytes()
    steps.close()
    assert not sidecar.exists()

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


def test_an_item_has_the_totals_and_then_what_other_coders_need(service, make_png):
    path = make_png()
    score = service.score_file(path)
    _, (_, [first], _), *_, (message, [last], kept) = score_steps(service, path)
    assert first["references"] is None
    assert [reference["name"] for reference in last["references"]] == ["xz", "PNG"]
    assert last["bits_per_byte"] == pytest.approx(score.bits_per_byte)
    assert message == score_values.done()
    assert list(kept) == [last["id"]] == [first["id"]] == [last["document"]["id"]]


def test_each_kind_opens_the_view_that_fits(service, make_png, make_wav, make_text, tmp_path):
    binary = tmp_path / "noise.bin"
    binary.write_bytes(np.random.default_rng(0).bytes(300))
    items = last_items(score_steps(service, make_png(), make_wav(), make_text(), binary))
    assert [item["kind"] for item in items] == ["image", "audio", "text", "raw"]
    assert [item["kind"] for item in last_items(score_steps(service, make_png(), scored_as="file"))] == ["raw"]


def test_a_bad_file_among_others_is_a_line_of_the_list(service, make_text, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    items = last_items(score_steps(service, empty, make_text()))
    assert [item["state"] for item in items] == ["error", "done"]
    with pytest.raises(ValueError, match=r".") as refusal:
        service.score_file(empty)
    assert items[0]["message"] == str(refusal.value)


def test_a_second_model_scores_the_files_again(service, make_text):
    items = last_items(score_steps(service, make_text(), second="audio", scored_as="file"))
    assert [item["model"] for item in items] == ["text", "audio"]
    assert items[0]["document"]["count"] == items[1]["document"]["count"]


def test_refused_file_says_the_same_sentence_twice(service, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match=r".") as refusal:
        service.score_file(empty)
    shown = []
    with pytest.raises(gr.Error) as error:
        shown.extend(score_steps(service, empty))
    message, items, _ = shown[-1]
    assert (message["state"], items) == ("error", [])
    assert message["text"] == error.value.message == str(refusal.value)


@pytest.mark.parametrize(("content", "option"), [(b"%PDF-1.7", "--bytes file"), (None, "--adapt")])
def test_a_refusal_names_what_the_page_has(service, make_wav, make_text, content, option):
    path = make_wav(sample_rate=22050) if content is None else make_text(content=content)
    with pytest.raises(gr.Error) as error:
        list(score_steps(service, path))
    assert PAGE_WORDS[option] in error.value.message
    assert "--" not in error.value.message


def test_adapting_is_said_under_the_totals(service, make_wav):
    [item] = last_items(score_steps(service, make_wav(sample_rate=16000), adapt=True))
    assert item["notes"][0] == "resampled from 16000 Hz to 8000 Hz"
    assert (item["document"]["sample_rate"], item["document"]["num_samples"]) == (8000, 200)


def test_more_bits_than_a_guess_needs_are_explained(service, make_wav, make_png):
    for path in (make_wav(), make_png()):
        [item] = last_items(score_steps(service, path))
        assert (score_values.WORSE_THAN_A_GUESS in item["notes"]) == (item["bits_per_byte"] > 8)


def test_the_window_rule_is_said_for_long_files_only(service, make_text, make_png):
    [short] = last_items(score_steps(service, make_text(content=b"The lamp.")))
    assert "fits into the model's 128 bytes" in short["facts"]
    [long] = last_items(score_steps(service, make_text(content=b"x" * 300)))
    assert "windows of 128 bytes, one every 128; each begins without context" in long["facts"]
    [tiles] = last_items(score_steps(service, make_png(width=16, height=16)))
    assert "in 4 tiles" in tiles["facts"]


def test_a_closed_scoring_frees_the_model(service, make_text):
    steps = score_steps(service, make_text(content=b"The lamp was lit.\n" * 20_000))
    while "bytes" not in next(steps)[0]["title"]:
        pass
    assert service.model("text").lock.locked()
    steps.close()
    assert not service.model("text").lock.locked()


@pytest.mark.parametrize("form", ["png", "csv", "npz", "html"])
def test_exports_are_files_of_the_asked_form(service, make_png, form):
    *_, (_, [item], kept) = score_steps(service, make_png("lake.png"))
    asked = {"id": item["id"], "other": "", "form": form, "measure": "rank", "palette": "grey"}
    steps = likelihood.export_steps(kept, gr.EventData(None, asked))
    value = next(steps)
    starts = {"png": b"\x89PNG", "csv": b"offset,value,bits", "npz": b"PK", "html": b"<!doctype html>"}
    assert value["orig_name"] == f"lake.{form}"
    assert Path(value["path"]).read_bytes().startswith(starts[form])
    steps.close()
    assert not Path(value["path"]).exists()
    with pytest.raises(gr.Error, match="no longer kept"):
        next(likelihood.export_steps({}, gr.EventData(None, asked)))


def test_form_without_a_source_is_no_request():
    assert form() is None
    assert form(text="a")["keep"] == 1.0


def test_plan_is_told_before_anything_is_made(service, make_png):
    words, shown = complete.preview(service, form(make_png(), samples=3))
    assert words.startswith("Keeps top 4 of 8 rows")
    assert "3 times" in words
    assert [card["id"] for card in shown["items"]] == ["kept"]


def test_refused_settings_show_in_the_plan(service, make_png):
    words, shown = complete.preview(service, form(make_png(), num_bytes=5000))
    assert shown["state"] == "empty"
    assert shown["text"] == words != complete.NO_PLAN


@pytest.mark.parametrize("kind", ["png", "wav", "text"])
def test_finished_cards_carry_the_bytes_of_the_service(service, make_png, make_wav, make_text, kind, tmp_path):
    path = {"png": make_png, "wav": make_wav, "text": make_text}[kind]()
    request = form(path, samples=2, num_bytes=40 if kind != "png" else None)
    job = service.complete(**request)
    list(job.run())
    expected = [service.write_completion(result, tmp_path) for result in job.results]

    for shown, _ in complete.complete_steps(service, request):
        stored = [Path(card["file"]["path"]).read_bytes() for card in shown["items"] if "file" in card]
    assert stored == [output.read_bytes() for output in expected]
    assert [card["id"] for card in shown["items"]] == ["kept", "sample-0", "sample-1"]
    assert json.dumps(shown)


def test_stop_keeps_what_is_there_and_frees_the_model(service):
    steps = complete.complete_steps(service, form(text="The lamp", num_bytes=5000))
    next(steps)
    shown, painter = next(steps)
    assert painter.job.loaded.lock.locked()
    steps.close()
    assert not painter.job.loaded.lock.locked()

    stopping = complete.stopped_steps(painter)
    shown = next(stopping)
    kept = Path(shown["items"][-1]["file"]["path"]).read_bytes()
    stopping.close()
    assert shown["items"][-1]["caption"].startswith("stopped after")
    assert kept.startswith(b"The lamp")
    assert len(kept) > len(b"The lamp")


def test_no_source_is_refused_in_one_sentence(service):
    with pytest.raises(gr.Error, match="nothing to complete"):
        next(complete.complete_steps(service, None))


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
