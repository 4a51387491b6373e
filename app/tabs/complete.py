"""The Complete tab: keep the first part of a file or a typed text and let a model go on from there."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from app.service import CompletionJob, Progress, Service
from app.tabs.refusals import refusals_shown
from app.tabs.sources import model_choices, sample_buttons
from app.views import cards, factory

PAINT_EVERY_S = 0.12  # often enough to look alive, seldom enough to cost the model nothing
MAX_SAMPLES = 8
FROM_FILE, FROM_TEXT = "A file", "Typed text"
EMPTY = cards.empty(
    "Nothing to complete yet",
    "Drop a picture, a sound or a text, or try a sample. The page shows what is kept before anything is made.",
)
NO_PLAN = "Choose a source to see what will be kept, how much will be made and how long it takes."


class Painter:
    """The cards of one running job. Each visitor's run has its own, so Stop finds what that run has made."""

    def __init__(self, service: Service, job: CompletionJob) -> None:
        self.service = service
        self.job = job
        self.latest: Progress | None = None
        self._files: dict[tuple[Path, int], Path] = {}  # (folder, sample) -> file, so that each is written once

    def results(self, folder: Path, *, is_stopped: bool = False) -> dict[str, Any]:
        """Kept part, finished samples with their files, and the unfinished one; files are written into `folder`."""
        finished = list(self.job.results)
        shown = [cards.kept_card(self.job)]
        for completion in finished:
            key = folder, completion.sample
            if key not in self._files:
                self._files[key] = self.service.write_completion(completion, folder)
            shown.append(cards.with_file(cards.completion_card(self.job, completion), self._files[key]))
        progress = self.latest
        if progress is not None and progress.sample >= len(finished):
            card = cards.progress_card(self.job, progress, is_stopped=is_stopped)
            if is_stopped and progress.done_bytes:
                path = folder / f"stopped-s{self.job.settings.seed}-{progress.sample + 1}{self.job.codec.suffix}"
                self.job.codec.write(progress.partial, path)
                card = cards.with_file(card, path)
            shown.append(card)
        return cards.results(shown)


def build_tab(service: Service) -> None:
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
    painter = gr.State(None)

    def show_plan(*values: Any) -> tuple[str, dict[str, Any]]:
        return preview(service, request(*values))

    def complete(*values: Any) -> Iterator[tuple[dict[str, Any], Painter]]:
        yield from complete_steps(service, request(*values))

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    source.change(_show_inputs, source, [file_inputs, text_inputs], queue=False, **quiet)
    gr.on(
        [source.change, file.change, text.change, keep.release, model.change, num_bytes.change, samples.change],
        show_plan, form, [plan, results], trigger_mode="always_last", **quiet,
    )  # fmt: skip
    started = start.click(_set_running, None, [start, stop, painter], queue=False, **quiet)
    running = started.then(complete, form, [results, painter], **quiet)
    running.then(_set_idle, None, [start, stop], queue=False, **quiet)
    # Without a concurrency limit, so that nobody waits for a place in the queue to stop.
    stopped = stop.click(stopped_steps, painter, results, cancels=[running], concurrency_limit=None, **quiet)
    stopped.then(_set_idle, None, [start, stop], queue=False, **quiet)


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


def complete_steps(service: Service, request: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], Painter]]:
    """The cards of a job as they fill, each with the painter that can still show them after a stop.

    Raises:
        gr.Error: if the form has no source or the service refuses it.
    """
    if request is None:
        raise gr.Error("There is nothing to complete: drop a file, try a sample or type a text.", print_exception=False)
    with refusals_shown(), tempfile.TemporaryDirectory(prefix="complete-") as folder:
        job = service.complete(**request)
        painter = Painter(service, job)
        yield painter.results(Path(folder)), painter
        painted = 0.0
        with closing(job.run()) as steps:
            for painter.latest in steps:
                if time.monotonic() - painted >= PAINT_EVERY_S:
                    painted = time.monotonic()
                    yield painter.results(Path(folder)), painter
        yield painter.results(Path(folder)), painter


def stopped_steps(painter: Painter | None) -> Iterator[dict[str, Any]]:
    """What was made before the stop, as files; the model is let go by the cancelled generator itself."""
    if painter is None:
        yield gr.skip()
        return
    with tempfile.TemporaryDirectory(prefix="complete-") as folder:
        yield painter.results(Path(folder), is_stopped=True)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _show_inputs(source: str) -> tuple[Any, Any]:
    return gr.update(visible=source == FROM_FILE), gr.update(visible=source == FROM_TEXT)


def _set_running() -> tuple[Any, Any, None]:
    """The last run's painter goes, so that an early Stop does not show old results."""
    return gr.update(interactive=False), gr.update(interactive=True), None


def _set_idle() -> tuple[Any, Any]:
    return gr.update(interactive=True), gr.update(interactive=False)
