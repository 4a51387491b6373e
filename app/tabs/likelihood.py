"""The Likelihood tab: drop files, see which of their bytes the model expects and which surprise it."""

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import gradio as gr

from app import exports
from app.messages import Failure
from app.service import FileScore, Service
from app.tabs.refusals import ADAPT, STORED_FILE, refusals_shown
from app.tabs.sources import model_choices, sample_buttons
from app.views import factory, offline, score_values

SCORED_AS = [("Pixels, sound or text", "media"), (STORED_FILE, "file")]
EMPTY = score_values.message(
    "empty",
    "Drop files, or try a sample",
    "Every byte gets a colour: how many bits the model needs to name it after all bytes before it. "
    "Dark bytes were expected, bright ones are news.",
)
OUR_MISTAKE = score_values.message(
    "error", "Scoring failed", "This is a fault of the program, not of your file; the terminal it runs in says more."
)
STOPPED = score_values.message("empty", "Stopped", "Choose a file, or change a setting, to score again.")
WORKING_TEXT = "The model reads every byte once; long files are read in windows."
REPORT_EVERY_S = 0.4
KEEP_FOR_EXPORT_S = 3600.0
WRITERS = {"csv": exports.write_csv, "npz": exports.write_npz}

Item = dict[str, Any]
Scored = dict[str, tuple[FileScore, Item]]  # by the item's id, for exports


class StoppedError(Exception):
    """Ends a scoring that nobody waits for any more."""


def build_tab(service: Service) -> None:
    """Lays out the tab inside the current `gr.Tab` and connects it."""
    models = model_choices(service)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="controls"):
            files = gr.File(label="Files to score", file_count="multiple", height=150, elem_id="score-file")
            sample_buttons(files, "score")
            model = gr.Dropdown(models, value="", label="Model", elem_id="score-model")
            second = gr.Dropdown(
                [("None", ""), *models[1:]], value="", label="Second model", info="Scores the files again, to compare",
                elem_id="score-second",
            )  # fmt: skip
            scored_as = gr.Radio(SCORED_AS, value="media", label="Bytes to score", elem_id="score-as")
            adapt = gr.Checkbox(
                label=ADAPT, info="Resample a sound of another rate, enlarge a picture that is too small",
                elem_id="score-adapt",
            )  # fmt: skip
            stop = gr.Button("Stop", size="sm", interactive=False, elem_id="score-stop")
        with gr.Column(scale=3, min_width=320, elem_classes="content"):
            message = factory.message_view(EMPTY)
            view = factory.likelihood_view()
    download, scored = factory.download_view(), gr.State({}, time_to_live=KEEP_FOR_EXPORT_S)

    def shown(message_value: dict[str, Any], items: list[Item], kept: Scored) -> list[Any]:
        return [gr.update(interactive=message_value["state"] == "working"), message_value, {"items": items}, kept]

    def show_scores(wanted: list[Any]) -> Iterator[list[Any]]:
        for step in score_steps(service, *wanted):
            yield shown(*step)

    form, outputs, wanted = [files, model, second, scored_as, adapt], [stop, message, view, scored], gr.State()
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    scoring = wanted.change(show_scores, wanted, outputs, trigger_mode="multiple", **quiet)
    # A new wish ends the scoring of the last one. Neither it nor a stop waits for a place in the queue.
    ending = {"cancels": [scoring], "concurrency_limit": None, "trigger_mode": "multiple", **quiet}
    gr.on([control.change for control in form], lambda *values: list(values), form, wanted, **ending)
    stopped = stop.click(lambda: shown(STOPPED, [], {}), None, outputs, **ending)
    # Again, because a step of the scoring may still have been on its way.
    stopped.then(lambda: shown(STOPPED, [], {}), None, outputs, concurrency_limit=None, **quiet)
    view.export(export_steps, scored, download, **quiet)


def score_steps(
    service: Service, files: Sequence[str] | None, model: str, second: str, scored_as: str, adapt: bool
) -> Iterator[tuple[dict[str, Any], list[Item], Scored]]:
    """What the message and the views show, one after another, for files that were chosen, and their scores for exports.

    Raises:
        gr.Error: if no file can be scored, after a message that says the same.
    """
    if not files:
        yield EMPTY, [], {}
        return
    models = [model or None, *([second] if second else [])]
    message = score_values.working("Scoring", WORKING_TEXT)
    yield message, [], {}
    # Gradio copies the sidecars into its cache at each step, so the folder must stay until the last of them.
    with tempfile.TemporaryDirectory(prefix="scores-") as folder:
        board = Board(Path(folder))
        try:
            with refusals_shown():
                for news in _news(service, [Path(file) for file in files], models, scored_as=scored_as, adapt=adapt):
                    message = _working(news) if isinstance(news, Progress) else message
                    board.take(news)
                    yield message, board.items, board.scored
                if not board.scored:
                    raise ValueError(board.items[0]["message"])
        except gr.Error as error:
            yield score_values.message("error", _cannot_be_scored(files), error.message), [], {}
            raise
        except Exception:
            # Our own mistake: the log has the traceback, and the page must not look busy for ever.
            yield OUR_MISTAKE, [], {}
            raise
        yield score_values.done(), board.items, board.scored


class Board:
    """The list of files as it grows; each change makes a new list, because the page may still be sending the last one."""

    def __init__(self, folder: Path) -> None:
        self.items: list[Item] = []
        self.scored: Scored = {}
        self._folder = folder

    def take(self, news: "News") -> None:
        match news:
            case FileScore():
                self._keep(news, score_values.item(news, self._folder))
            case Failure():
                self.items = [*self.items, score_values.failed_item(news)]
            case Sizes(score, references):
                item = next(item for item in self.items if item["id"] in self.scored and self.scored[item["id"]][0] is score)
                self._keep(score, score_values.with_references(item, references))

    def _keep(self, score: FileScore, item: Item) -> None:
        others = [other for other in self.items if other["id"] != item["id"]]
        place = next((i for i, other in enumerate(self.items) if other["id"] == item["id"]), len(others))
        self.items = [*others[:place], item, *others[place:]]
        self.scored = {**self.scored, item["id"]: (score, item)}


class Progress(NamedTuple):
    """How far a scoring is; `seconds` since it began."""

    num_scored: int
    num_bytes: int  # of the files read so far
    seconds: float


class Sizes(NamedTuple):
    """Bits per byte that other ways to store the bytes of a score need."""

    score: FileScore
    references: dict[str, float]


News = FileScore | Failure | Sizes | Progress


def _news(service: Service, files: Sequence[Path], models: Sequence[str | None], **options: Any) -> Iterator[News]:
    """Scores in a thread of its own and tells what happens there; closing it frees the model."""
    news: SimpleQueue[News | None] = SimpleQueue()
    started, latest, is_closed = time.monotonic(), (0, 0), threading.Event()

    def note(num_scored: int, num_bytes: int) -> None:
        nonlocal latest
        latest = num_scored, num_bytes
        if is_closed.is_set():
            raise StoppedError

    def work() -> None:
        for model in models:
            for result in service.score_files(files, model=model, detailed=True, progress=note, **options):
                news.put(result)
                if isinstance(result, FileScore):
                    news.put(Sizes(result, service.reference_sizes(result)))

    with ThreadPoolExecutor(max_workers=1) as worker:
        scoring = worker.submit(work)
        scoring.add_done_callback(lambda _: news.put(None))
        try:
            while True:
                try:
                    step = news.get(timeout=REPORT_EVERY_S)
                except Empty:
                    step = Progress(*latest, time.monotonic() - started)
                if step is None:
                    break
                yield step
            scoring.result()
        finally:
            is_closed.set()


def export_steps(scored: Scored, event: gr.EventData) -> Iterator[Any]:
    """The file of an export that was asked for in the view; it may be deleted once the page has it.

    Raises:
        gr.Error: if the scores are no longer kept.
    """
    if event.id not in scored:
        raise gr.Error("These scores are no longer kept on the server; score the file again to export it.", print_exception=False)
    score, item = scored[event.id]
    with refusals_shown(), tempfile.TemporaryDirectory(prefix="export-") as folder:
        path = Path(folder) / f"{Path(item['name']).stem}.{event.form}"
        if event.form == "html":
            offline.write_page([scored[event.id], *([scored[event.other]] if event.other in scored else [])], path)
        elif event.form == "png":
            exports.write_png(score, path, event.measure, event.palette)
        else:
            WRITERS[event.form](score, path)
        yield score_values.file_value(path)


def _working(progress: Progress) -> dict[str, Any]:
    num_scored, num_bytes, seconds = progress
    if not num_bytes:
        return score_values.working("Scoring", WORKING_TEXT)
    left = seconds * (num_bytes / num_scored - 1) if num_scored else 0.0
    about = f" About {left:.0f} s are left." if left > 5 else ""
    title = f"Scored {num_scored:,} of {num_bytes:,} bytes"
    return score_values.working(title, WORKING_TEXT + about, num_scored / num_bytes)


def _cannot_be_scored(files: Sequence[str]) -> str:
    return "This file cannot be scored" if len(files) == 1 else "None of these files can be scored"
