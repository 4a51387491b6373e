"""The Likelihood tab: drop a file, see which of its bytes the model expects and which surprise it."""

import tempfile
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import gradio as gr

from app.service import FileScore, Service
from app.tabs.refusals import ADAPT, STORED_FILE, refusals_shown
from app.tabs.sources import model_choices, sample_buttons
from app.views import factory, score_values

SCORED_AS = [("Pixels, sound or text", "media"), (STORED_FILE, "file")]
EMPTY = score_values.message(
    "empty",
    "Drop a file, or try a sample",
    "Every byte gets a colour: how many bits the model needs to name it after all bytes before it. "
    "Dark bytes were expected, bright ones are news.",
)
OUR_MISTAKE = score_values.message(
    "error", "Scoring failed", "This is a fault of the program, not of your file; the terminal it runs in says more."
)
STOPPED = score_values.message("empty", "Stopped", "Choose a file, or change a setting, to score again.")
WORKING_TEXT = "The model reads every byte once; long files are read in windows."
REPORT_EVERY_S = 0.4


class StoppedError(Exception):
    """Ends a scoring that nobody waits for any more."""


def build_tab(service: Service) -> None:
    """Lays out the tab inside the current `gr.Tab` and connects it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="controls"):
            file = gr.File(label="File to score", height=150, elem_id="score-file")
            sample_buttons(file, "score")
            model = gr.Dropdown(model_choices(service), value="", label="Model", elem_id="score-model")
            scored_as = gr.Radio(SCORED_AS, value="media", label="Bytes to score", elem_id="score-as")
            adapt = gr.Checkbox(
                label=ADAPT, info="Resample a sound of another rate, enlarge a picture that is too small",
                elem_id="score-adapt",
            )  # fmt: skip
            stop = gr.Button("Stop", size="sm", interactive=False, elem_id="score-stop")
        with gr.Column(scale=3, min_width=320, elem_classes="content"):
            summary = factory.summary_view(EMPTY)
            legend = factory.legend_view()
            with gr.Row(equal_height=False, elem_classes="linked-views"):
                media_views = [factory.picture_view(), factory.waveform_view(), factory.text_view()]
                hex_view = factory.hex_view()
    linked_views = [legend, *media_views, hex_view]

    def shown(summary_value: dict[str, Any], document: dict[str, Any] | None) -> list[Any]:
        is_working = summary_value["state"] == "working"
        return [gr.update(interactive=is_working), summary_value, *[document] * len(linked_views)]

    def show_score(wanted: list[Any]) -> Iterator[list[Any]]:
        for step in score_steps(service, *wanted):
            yield shown(*step)

    form, outputs, wanted = [file, model, scored_as, adapt], [stop, summary, *linked_views], gr.State()
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    scoring = wanted.change(show_score, wanted, outputs, trigger_mode="multiple", **quiet)
    # A new wish ends the scoring of the last one. Neither it nor a stop waits for a place in the queue.
    ending = {"cancels": [scoring], "concurrency_limit": None, "trigger_mode": "multiple", **quiet}
    gr.on([control.change for control in form], lambda *values: list(values), form, wanted, **ending)
    stop.click(lambda: shown(STOPPED, None), None, outputs, **ending)


def score_steps(
    service: Service, path: str | None, model: str, scored_as: str, adapt: bool
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """What the summary and the linked views show, one after another, for a file that was chosen or taken away.

    Raises:
        gr.Error: if the file cannot be scored, after a summary that says the same.
    """
    if path is None:
        yield EMPTY, None
        return
    try:
        with refusals_shown():
            options = {"model": model or None, "scored_as": scored_as, "adapt": adapt}
            score = yield from _score_with_reports(service, Path(path), options)
            sizes = service.reference_sizes(score)
    except gr.Error as error:
        yield score_values.message("error", "This file cannot be scored", error.message), None
        raise
    except Exception:
        # Our own mistake: the log has the traceback, and the page must not look busy for ever.
        yield OUR_MISTAKE, None
        raise
    # Gradio copies the sidecar into its cache while the generator waits here, so the folder may go afterwards.
    with tempfile.TemporaryDirectory(prefix="scores-") as folder:
        yield score_values.summary(score, sizes), score_values.document(score, Path(folder))


def _score_with_reports(
    service: Service, path: Path, options: dict[str, Any]
) -> Generator[tuple[dict[str, Any], None], None, FileScore]:
    """Scores in a thread of its own and says how far it is until the score is there; closing it frees the model."""
    progress, is_closed = (0, 0), threading.Event()

    def note(num_scored: int, num_bytes: int) -> None:
        nonlocal progress
        progress = num_scored, num_bytes
        if is_closed.is_set():
            raise StoppedError

    with ThreadPoolExecutor(max_workers=1) as worker:
        yield score_values.working("Scoring", WORKING_TEXT), None
        scoring = worker.submit(service.score_file, path, progress=note, **options)
        try:
            while not wait([scoring], timeout=REPORT_EVERY_S).done:
                num_scored, num_bytes = progress
                title = f"Scored {num_scored:,} of {num_bytes:,} bytes" if num_bytes else "Scoring"
                yield score_values.working(title, WORKING_TEXT, num_scored / max(1, num_bytes)), None
            return scoring.result()
        finally:
            is_closed.set()
