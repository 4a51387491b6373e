"""The Likelihood tab: drop files, see which of their bytes the model expects and which surprise it."""

import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from app.downloads import Export, write_export
from app.jobs import STOPPED as STOPPED_BY_HAND
from app.jobs import Job, JobStore, JobView, UnknownJobError, Work
from app.messages import Failure
from app.scoring import ReferenceSizes
from app.service import FileScore, Service
from app.tabs.following import AT_ONCE, QUIET, JobLink
from app.tabs.refusals import ADAPT, STORED_FILE, event_value, refusals_shown, reworded
from app.tabs.sources import model_choices, sample_buttons, title_of
from app.views import factory, score_values
from core.errors import UserError

KIND = "likelihood"
MAX_BYTES = 128_000_000  # of the files of one job: what is known of each byte takes some twenty bytes of memory
SCORED_AS = [("Pixels, sound or text", "media"), (STORED_FILE, "file")]
EMPTY = score_values.message(
    "empty",
    "Drop files, or try a sample",
    "Every byte gets a colour: how many bits the model needs to name it after all bytes before it. "
    "Dark bytes were expected, bright ones are news.",
)
STOPPED = score_values.message("empty", "Stopped", "Choose a file, or change a setting, to score again.")
WORKING_TEXT = "The model reads every byte once; long files are read in windows."

Item = dict[str, Any]
Scored = dict[str, tuple[FileScore, Item]]  # by the item's id, for exports


def build_tab(service: Service, store: JobStore, visitor: gr.BrowserState, arrived: Any) -> None:
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
    download = factory.download_view()
    link = JobLink(store, KIND, visitor)

    def submit(
        visitor: str, old: str, newest: str, files: list[str] | None, model: str, second: str, *options: Any
    ) -> tuple[str, str]:
        job_id = ""
        if files:
            with refusals_shown():
                paths, models = [Path(file) for file in files], [model or None, *([second] if second else [])]
                work = scoring_work(service, paths, models, *options)
                job_id = store.submit(visitor, KIND, title_of([path.name for path in paths]), work)
        for replaced in {old, newest}:  # two if the form was changed twice before the page knew of the first job
            store.forget(visitor, replaced)
        return job_id, job_id

    def export(visitor: str, job_id: str, event: gr.EventData) -> Iterator[Any]:
        yield from export_steps(kept_scores(store, visitor, job_id), event)

    form, outputs = [files, model, second, scored_as, adapt], [stop, message, view]
    link.follow(new_display, outputs, nothing=[gr.update(interactive=False), EMPTY, {"items": []}])
    changed = gr.on(
        [control.change for control in form], submit, [*link.inputs, link.now, *form], link.outputs,
        trigger_mode="multiple", concurrency_limit=1, **QUIET,  # one at a time, so that each finds the job before it
    )  # fmt: skip
    link.remember(changed)
    link.take_up(arrived)
    stop.click(link.stop, link.inputs, None, **AT_ONCE)
    view.export(export, link.inputs, download, **QUIET)


def scoring_work(service: Service, files: Sequence[Path], models: Sequence[str | None], scored_as: str, adapt: bool) -> Work:
    """The work of a job that scores files, with one model after another; it reports its board and gives it in the end.

    The work raises ValueError: if no file can be scored.

    Raises:
        ValueError: if the files are larger than `MAX_BYTES` together.
    """
    num_bytes = sum(file.stat().st_size for file in files)
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"the files have {num_bytes:,} bytes together, the page scores at most {MAX_BYTES:,} in one go; "
            "choose fewer files, or use the command line, which takes any number"
        )

    def work(job: Job) -> Board:
        board, started = Board(job.folder), time.monotonic()
        job.report(board)

        def note(num_scored: int, num_bytes: int) -> None:
            board.progress = Progress(num_scored, num_bytes, time.monotonic() - started)
            job.report(board)

        references = ReferenceSizes(lambda: job.report(board))
        for model in models:
            for result in service.score_files(files, model=model, scored_as=scored_as, adapt=adapt, detailed=True, progress=note):
                board.take(result)
                job.report(board)
                if isinstance(result, FileScore):
                    board.take(Sizes(result, references.of(result)))
        if not board.scored:
            raise ValueError(board.items[0]["message"])
        return board

    return work


def new_display() -> Callable[[JobView], list[Any]]:
    """A display that sends the list of files only if it has changed: it has large files in it."""
    sent: list[Item] | None = None

    def display(view: JobView) -> list[Any]:
        nonlocal sent
        board = view.result or view.latest
        items = [] if board is None or view.state == "failed" else board.items
        value = gr.skip() if items is sent else {"items": items}
        sent = items
        return [gr.update(interactive=view.is_running), _message(view, board), value]

    return display


def kept_scores(store: JobStore, visitor: str, job_id: str) -> "Scored":
    """The scores of a job, as far as they are there; none if the job is gone."""
    try:
        view = store.look(visitor, job_id)
    except UnknownJobError:
        return {}
    board = view.result or view.latest
    return {} if board is None else board.scored


class Board:
    """The list of files as it grows; each change makes a new list, because the page may still be sending the last one."""

    def __init__(self, folder: Path) -> None:
        self.items: list[Item] = []
        self.scored: Scored = {}
        self.progress = Progress(0, 0, 0.0)
        self._folder = folder

    def take(self, news: "News") -> None:
        match news:
            case FileScore():
                self._keep(news, score_values.item(news, self._folder))
            case Failure():
                self.items = [*self.items, score_values.failed_item(news.file, reworded(news.message))]
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


News = FileScore | Failure | Sizes


def export_steps(scored: Scored, event: gr.EventData) -> Iterator[Any]:
    """The file of an export that was asked for in the view; it may be deleted once the page has it.

    Raises:
        gr.Error: if the scores are no longer kept, or if the event asks for what there is not.
    """
    with refusals_shown():
        name, other_name, form, measure, palette = (
            event_value(event, name, str) for name in ("id", "other", "form", "measure", "palette")
        )
        wanted = Export(form, measure, palette)
        if name not in scored:
            raise UserError("these scores are no longer kept on the server; score the file again to export it")
        with tempfile.TemporaryDirectory(prefix="export-") as folder:
            file = score_values.file_value(write_export(wanted, Path(folder), scored[name], scored.get(other_name)))
            # The same export again is the same file: without the token the page would see no change.
            yield {"file": file, "token": secrets.token_hex(8)}


def _message(view: JobView, board: Board | None) -> dict[str, Any]:
    """What the page says about a job beside its results."""
    match view.state:
        case "running":
            return _working(board.progress if board else Progress(0, 0, 0.0))
        case "failed":
            title = "None of these files can be scored" if board and len(board.items) > 1 else "This file cannot be scored"
            return score_values.message("error", title, reworded(view.problem))
        case "stopped":
            return STOPPED if view.problem == STOPPED_BY_HAND else score_values.message("empty", "Stopped", view.problem)
        case _:
            return score_values.done()


def _working(progress: Progress) -> dict[str, Any]:
    num_scored, num_bytes, seconds = progress
    if not num_bytes:
        return score_values.working("Scoring", WORKING_TEXT)
    left = seconds * (num_bytes / num_scored - 1) if num_scored else 0.0
    about = f" About {left:.0f} s are left." if left > 5 else ""
    title = f"Scored {num_scored:,} of {num_bytes:,} bytes"
    return score_values.working(title, WORKING_TEXT + about, num_scored / num_bytes)
