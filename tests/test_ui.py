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


def score_steps(service: Service, path: Path | None, scored_as: str = "media", adapt: bool = False) -> Iterator:
    return likelihood.score_steps(service, None if path is None else str(path), "", scored_as, adapt)


def form(path: Path | None = None, text: str = "", keep: float = 50, **settings) -> dict | None:
    source = complete.FROM_TEXT if text else complete.FROM_FILE
    return complete.request(source, None if path is None else str(path), text, keep, **SETTINGS | settings)


def test_no_file_shows_the_empty_state(service):
    assert list(score_steps(service, None)) == [(likelihood.EMPTY, None)]


def test_sidecar_holds_pixels_in_rows_and_their_bits(service, make_png):
    path = make_png(width=11, height=9)
    steps = score_steps(service, path)
    assert next(steps)[0]["state"] == "working"
    summary, document = next(steps)
    sidecar = Path(document["file"]["path"])
    stored = sidecar.read_bytes()
    steps.close()

    score = service.score_file(path)
    count = 11 * 9 * 3
    units = np.frombuffer(stored, "<u2", count, offset=count + count % 2)
    assert (document["kind"], document["width"], document["height"], document["count"]) == ("image", 11, 9, count)
    assert stored[:count] == np.asarray(Image.open(path)).tobytes()
    np.testing.assert_allclose(units / 1024, score.media_bits.reshape(-1), atol=1 / 1024)
    assert summary["headline"] == f"{score.bits_per_byte:.3f}"
    assert [bar["label"] for bar in summary["bars"]] == ["image32", "xz", "PNG", "random bytes"]
    assert not sidecar.exists()


def test_each_kind_opens_the_view_that_fits(service, make_png, make_wav, make_text, tmp_path):
    binary = tmp_path / "noise.bin"
    binary.write_bytes(np.random.default_rng(0).bytes(300))

    def kind(path: Path, scored_as: str = "media") -> str:
        return list(score_steps(service, path, scored_as))[-1][1]["kind"]

    assert [kind(make_png()), kind(make_wav()), kind(make_text())] == ["image", "audio", "text"]
    assert [kind(binary), kind(make_png(), "file")] == ["raw", "raw"]


def test_refused_file_says_the_same_sentence_twice(service, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match=r".") as refusal:
        service.score_file(empty)
    steps = score_steps(service, empty)
    next(steps)
    summary, document = next(steps)
    with pytest.raises(gr.Error) as error:
        next(steps)
    assert summary["state"] == "error"
    assert document is None
    assert summary["text"] == error.value.message == str(refusal.value)


@pytest.mark.parametrize(("content", "option"), [(b"%PDF-1.7", "--bytes file"), (None, "--adapt")])
def test_a_refusal_names_what_the_page_has(service, make_wav, make_text, content, option):
    path = make_wav(sample_rate=22050) if content is None else make_text(content=content)
    with pytest.raises(gr.Error) as error:
        list(score_steps(service, path))
    assert PAGE_WORDS[option] in error.value.message
    assert "--" not in error.value.message


def test_adapting_is_said_under_the_totals(service, make_wav):
    *_, (summary, document) = score_steps(service, make_wav(sample_rate=16000), adapt=True)
    assert summary["notes"][0] == "resampled from 16000 Hz to 8000 Hz"
    assert (document["sample_rate"], document["num_samples"]) == (8000, 200)


def test_more_bits_than_a_guess_needs_are_explained(service, make_wav, make_png):
    for path in (make_wav(), make_png()):
        *_, (summary, _) = score_steps(service, path)
        assert (score_values.WORSE_THAN_A_GUESS in summary["notes"]) == (float(summary["headline"]) > 8)


def test_a_closed_scoring_frees_the_model(service, make_text):
    steps = score_steps(service, make_text(content=b"The lamp was lit.\n" * 20_000))
    while "bytes" not in next(steps)[0]["title"]:
        pass
    assert service.model("text").lock.locked()
    steps.close()
    assert not service.model("text").lock.locked()


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
