"""The Complete tab: keep the first part of a file or a typed text and let a model go on from there."""

from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from app.jobs import Job, JobEndedError, JobStore, JobView, Work
from app.service import CompletionJob, Progress, Service
from app.tabs.following import AT_ONCE, QUIET, JobLink
from app.tabs.refusals import refusals_shown
from app.tabs.sources import model_choices, sample_buttons
from app.views import cards, factory

KIND = "complete"
MAX_SAMPLES = 8
FROM_FILE, FROM_TEXT = "A file", "Typed text"
EMPTY = cards.empty(
    "Nothing to complete yet",
    "Drop a picture, a sound or a text, or try a sample. The page shows what is kept before anything is made.",
)
NO_PLAN = "Choose a source to see what will be kept, how much will be made and how long it takes."


class Painter:
    """What the page shows of one completion job, and the files it is downloaded from; its work keeps it up to date.

    Attributes:
        latest: how far the job is.
        is_stopped: whether it was ended before it was done.
    """

    def __init__(self, service: Service, job: CompletionJob, folder: Path) -> None:
        self.job = job
        self.latest: Progress | None = None
        self.is_stopped = False
        self._service = service
        self._folder = folder
        self._files: dict[int, Path] = {}  # of the samples

    def take(self, progress: Progress) -> None:
        """Notes how far the job is, and writes a sample that is finished."""
        self.latest = progress
        if progress.completion is not None:
            self._files[progress.sample] = self._service.write_completion(progress.completion, self._folder)

    def stop(self) -> None:
        """Writes the unfinished sample as far as it is made."""
        self.is_stopped = True
        progress = self.latest
        if progress is not None and progress.done_bytes and progress.sample not in self._files:
            name = f"stopped-s{self.job.settings.seed}-{progress.sample + 1}{self.job.codec.suffix}"
            self.job.codec.write(progress.partial, self._folder / name)
            self._files[progress.sample] = self._folder / name

    def results(self) -> dict[str, Any]:
        """Kept part, finished samples with their files, and the unfinished one."""
        shown, finished = [cards.kept_card(self.job)], list(self.job.results)
        for completion in finished:
            shown.append(self._with_file(cards.completion_card(self.job, completion), completion.sample))
        progress = self.latest
        if progress is not None and progress.sample >= len(finished):
            card = cards.progress_card(self.job, progress, is_stopped=self.is_stopped)
            shown.append(self._with_file(card, progress.sample))
        return cards.results(shown)

    def _with_file(self, card: dict[str, Any], sample: int) -> dict[str, Any]:
        return cards.with_file(card, self._files[sample]) if sample in self._files else card


def build_tab(service: Service, store: JobStore, visitor: gr.BrowserState, arrived: Any) -> None:
    """Lays out the tab inside the current `gr.Tab` and connects it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="controls"):
            source = gr.Radio([FROM_FILE, FROM_TEXT], value=FROM_FILE, label="Start from", elem_id="complete-source")
            with gr.Column(elem_classes="plain") as file_inputs:
                file = gr.File(label="File to complete", height=150, elem_id="complete-file")
                sample_buttons(file, "complete")
                keep = gr.Slider(0, 100, value=50, step=1, label="Keep the first … %", elem_id="complete-keep")
            with gr.Column(visible=False, elem_classes="plain") as text_inputs:
                text = gr.Textbox(label="Text to continue", lines=6, max_length=20_000, elem_id="complete-text")
            samples = gr.Slider(1, MAX_SAMPLES, value=1, step=1, label="Samples", elem_id="complete-samples")
            with gr.Accordion("Model and sampling", open=False):
                model = gr.Dropdown(model_choices(service), value="", label="Model", elem_id="complete-model")
                num_bytes = gr.Number(
                    0, label="Bytes to make", info="0: the rest of a picture, as much sound as was cut, 500 bytes of text",
                    precision=0, elem_id="complete-num-bytes",
                )  # fmt: skip
                temperature = gr.Slider(
                    0, 2, value=1.0, step=0.05, label="Temperature", info="0 takes the likeliest byte, 1 the model's law",
                    elem_id="complete-temperature",
                )  # fmt: skip
                top_k = gr.Slider(0, 256, value=0, step=1, label="Top-k", info="0: all bytes", elem_id="complete-top-k")
                top_p = gr.Slider(0.01, 1, value=1.0, step=0.01, label="Top-p", info="1: all bytes", elem_id="complete-top-p")
                seed = gr.Number(0, label="Seed", info="The same seed gives the same bytes", precision=0,
                                 elem_id="complete-seed")  # fmt: skip
            plan = gr.Textbox(NO_PLAN, label="Plan", lines=2, interactive=False, elem_id="complete-plan")
            with gr.Row(elem_classes="actions"):
                start = gr.Button("Complete", variant="primary", elem_id="complete-start")
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="complete-stop")
        with gr.Column(scale=3, min_width=320, elem_classes="content"):
            results = factory.results_view(EMPTY)

    form = [source, file, text, keep, model, num_bytes, samples, temperature, top_k, top_p, seed]
    link = JobLink(store, KIND, visitor)

    def show_plan(*values: Any) -> tuple[str, dict[str, Any]]:
        return preview(service, request(*values))

    def submit(visitor: str, *values: Any) -> tuple[str, str]:
        job = prepared(service, request(*values))
        title = "typed text" if job.source is None else job.source.name
        with refusals_shown():
            job_id = store.submit(visitor, KIND, title, completing_work(service, job))
        return job_id, job_id

    source.change(_show_inputs, source, [file_inputs, text_inputs], queue=False, **QUIET)
    gr.on(
        [source.change, file.change, text.change, keep.release, model.change, num_bytes.change, samples.change],
        show_plan, form, [plan, results], trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    following = link.follow(lambda: display, [start, stop, results])
    link.remember(start.click(submit, [visitor, *form], link.outputs, cancels=[following], **AT_ONCE))
    link.take_up(arrived)
    stop.click(link.stop, link.inputs, None, **AT_ONCE)


def request(
    source: str, file: str | None, text: str, keep: float, model: str, num_bytes: int | None,
    samples: int, temperature: float, top_k: int, top_p: float, seed: int | None,
) -> dict[str, Any] | None:  # fmt: skip
    """The form as arguments of `Service.complete`; None while it has no source."""
    if source == FROM_TEXT:
        given: dict[str, Any] = {"path": None, "text": text.encode(), "keep": 1.0}
        has_source = bool(text)
    else:
        given = {"path": file, "keep": keep / 100}
        has_source = file is not None
    if not has_source:
        return None
    return given | {
        "model": model or None,
        "num_bytes": num_bytes or None,
        "samples": int(samples),
        "temperature": temperature,
        "top_k": int(top_k) or None,
        "top_p": top_p,
        "seed": int(seed or 0),
    }


def preview(service: Service, request: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The plan in words and the kept part, for a form that was changed.

    A refusal is part of the plan here: somebody who is still filling in a form needs no error message.
    """
    if request is None:
        return NO_PLAN, EMPTY
    try:
        with refusals_shown():
            job = service.complete(**request)
            return plan_in_words(job), cards.results([cards.kept_card(job)])
    except gr.Error as error:
        return error.message, cards.empty("This cannot be completed", error.message)


def plan_in_words(job: CompletionJob) -> str:
    """One or two sentences: what is kept, what is made, about how long it takes."""
    each = f", {job.settings.samples} times" if job.settings.samples > 1 else ""
    sentence = f"{job.plan.says[0].upper()}{job.plan.says[1:]}{each}: about {_duration(job.plan.estimate_seconds)}."
    return " ".join([sentence, *(f"Note: {note}." for note in job.notes)])


def prepared(service: Service, request: dict[str, Any] | None) -> CompletionJob:
    """The job of a form.

    Raises:
        gr.Error: if the form has no source or the service refuses it.
    """
    if request is None:
        raise gr.Error("There is nothing to complete: drop a file, try a sample or type a text.", print_exception=False)
    with refusals_shown():
        return service.complete(**request)


def completing_work(service: Service, completion: CompletionJob) -> Work:
    """The work of a job that makes all samples; it reports a painter and gives it in the end."""

    def work(job: Job) -> Painter:
        painter = Painter(service, completion, job.folder)
        try:
            job.report(painter)
            with closing(completion.run()) as steps:
                for progress in steps:
                    painter.take(progress)
                    job.report(painter)
        except JobEndedError:
            painter.stop()
            raise
        return painter

    return work


def display(view: JobView) -> list[Any]:
    """Start, Stop and the results while a job runs and when it is over."""
    painter = view.result or view.latest
    shown = gr.skip() if painter is None else painter.results()
    return [gr.update(interactive=not view.is_running), gr.update(interactive=view.is_running), shown]


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _show_inputs(source: str) -> tuple[Any, Any]:
    return gr.update(visible=source == FROM_FILE), gr.update(visible=source == FROM_TEXT)
