"""The handlers of the Likelihood tab without a browser."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from app.jobs import JobEndedError, JobStore, JobView
from app.palette import DIVERGING
from app.service import Service
from app.tabs import likelihood
from app.tabs.following import follower
from app.tabs.refusals import PAGE_WORDS
from app.views import score_values


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


class _EndedAfterScoring:
    """A job that is told to end at its first report after the one of its score."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reports_with_a_score = folder, 0

    def report(self, board: likelihood.Board) -> None:
        self.reports_with_a_score += bool(board.scored)
        if self.reports_with_a_score == 2:
            assert board.items[0]["references"] is None
            raise JobEndedError


def test_a_job_ends_while_other_coders_are_at_work(service, make_text, tmp_path):
    work = likelihood.scoring_work(service, [make_text()], [None], "media", False)
    with pytest.raises(JobEndedError):
        work(_EndedAfterScoring(tmp_path))


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
        list(follower(store, likelihood.new_display)("me", view.id, gr.Request()))
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
    with pytest.raises(gr.Error, match=r"no such export|none of the page's own events"):
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
