"""The Complete tab: keep the first part of a file or a typed text and let a model go on from there."""

import secrets
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import gradio as gr

from app.gallery import Gallery, Made, gallery_work
from app.jobs import STOPPED, JobStore, JobView, UnknownJobError
from app.messages import duration
from app.provenance import Provenance, read_provenance
from app.service import CompletionJob, Service
from app.settings import CompletionSettings
from app.tabs.following import AT_ONCE, QUIET, JobLink
from app.tabs.refusals import event_value, refusals_shown, reworded, without_path
from app.tabs.sources import model_choices, sample_buttons
from app.views import cards, factory
from core.errors import UserError

KIND = "complete"
# The form's settings with bounds, in its order, narrower than those of the command line.
BOUNDS = {"samples": (1, 8), "temperature": (0, 2), "top_k": (0, 256), "top_p": (0.01, 1)}
FROM_FILE, FROM_TEXT = "A file", "Typed text"
FRAMINGS = [("At its own size, in tiles", "tiles"), ("Scaled to the model's size", "fit")]
ALL = -1  # as kept bytes: as many as suit the source
EMPTY = cards.message(
    "Nothing to complete yet",
    "Drop a picture, a sound or a text, or try a sample. A file that is cut short is opened as far as its bytes reach, "
    "and what is missing can be made.",
)
NOTHING_MADE = cards.message("Samples appear here", "The bytes are painted as they come; Stop keeps what is there.")
WAITING = cards.message("The model reads what is kept", "The first bytes come in a moment.")
NO_PLAN = "Choose a source to see what will be kept, how much will be made and how long it takes."
NO_CHOICE: dict[str, Any] = {"state": "empty"}


def build_tab(service: Service, store: JobStore, visitor: gr.BrowserState, arrived: Any) -> None:
    """Lays out the tab inside the current `gr.Tab` and connects it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="controls"):
            source = gr.Radio([FROM_FILE, FROM_TEXT], value=FROM_FILE, label="Start from", elem_id="complete-source")
            with gr.Column(elem_classes="plain") as file_inputs:
                file = gr.File(label="File to complete, or a result to repeat", height=150, elem_id="complete-file")
                sample_buttons(file, "complete")
            with gr.Column(visible=False, elem_classes="plain") as text_inputs:
                text = gr.Textbox(label="Text to continue", lines=6, max_length=20_000, elem_id="complete-text")
            samples = gr.Slider(*BOUNDS["samples"], value=1, step=1, label="Samples", elem_id="complete-samples")
            num_bytes = gr.Number(
                0, label="Bytes to make", info="0: all that is missing of a picture or a sound, 500 bytes of text",
                precision=0, elem_id="complete-num-bytes",
            )  # fmt: skip
            with gr.Accordion("Model and sampling", open=False):
                models = model_choices(service)
                model = gr.Dropdown(models, value="", label="Model", elem_id="complete-model")
                framing = gr.Radio(
                    FRAMINGS, value="tiles", label="A picture larger than the model's",
                    info="Tiles read the rows above them, not their neighbours at the sides", elem_id="complete-framing",
                )  # fmt: skip
                upside_down = gr.Checkbox(
                    label="Upwards", info="Keep the bottom of a picture and make its top", elem_id="complete-upside-down"
                )
                temperature = gr.Slider(
                    *BOUNDS["temperature"], value=1.0, step=0.05, label="Temperature",
                    info="0 takes the likeliest byte, 1 the model's law", elem_id="complete-temperature",
                )  # fmt: skip
                top_k = gr.Slider(
                    *BOUNDS["top_k"], value=0, step=1, label="Top-k", info="Only the k likeliest bytes; 0: all",
                    elem_id="complete-top-k",
                )  # fmt: skip
                top_p = gr.Slider(
                    *BOUNDS["top_p"], value=1.0, step=0.01, label="Top-p",
                    info="Only the likeliest bytes that reach this probability", elem_id="complete-top-p",
                )  # fmt: skip
                seed = gr.Number(0, label="Seed", info="The same seed gives the same bytes", precision=0, elem_id="complete-seed")
                new_seed = gr.Button("Random seed", size="sm", elem_id="complete-new-seed")
            plan = gr.Textbox(NO_PLAN, label="Plan", lines=2, max_lines=12, interactive=False, elem_id="complete-plan")
            with gr.Row(elem_classes="actions"):
                start = gr.Button("Complete", variant="primary", elem_id="complete-start")
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="complete-stop")
        with gr.Column(scale=3, min_width=320, elem_classes="content"):
            prompt = factory.prompt_view(EMPTY)
            results = factory.results_view(NOTHING_MADE)
            choices = factory.alternatives_view(NO_CHOICE)
    link = JobLink(store, KIND, visitor)
    keep = gr.State(ALL)
    first_bytes = gr.State("")
    settings = [model, num_bytes, samples, temperature, top_k, top_p, seed, framing, upside_down]
    form = [source, file, text, keep, *settings, first_bytes]

    def open_source(*values: Any) -> list[Any]:
        """A new file or text, or another form of it: the prompt's end goes to where it suits it."""
        *values, _ = values
        values[3] = ALL
        return [*preview(service, request(*values)), ALL, ""]

    def open_file(file: str | None, *settings: Any) -> list[Any]:
        """A new file; a result of ours brings its settings with it."""
        made = None if file is None else _provenance(file)
        restored, changes = (list(settings), []) if made is None else settings_of(made, {name for _, name in models})
        kept = ALL if made is None else made.settings.keep_bytes
        first = "" if made is None else made.settings.first_bytes
        value, words = preview(service, request(FROM_FILE, file, "", kept, *restored, first))
        restored = [gr.skip()] * len(settings) if made is None else restored
        return [*restored, kept, first, value, words if made is None else f"{_says_origin(service, made, changes)}{words}"]

    def move_cut(event: gr.EventData, *values: Any) -> list[Any]:
        """Another end of the prompt; the first bytes of a branch belong to the old one."""
        *values, _ = values
        with refusals_shown():
            values[3] = event_value(event, "offset", int)
        return [*replan(service, request(*values)), values[3], ""]

    def submit(visitor: str, *values: Any) -> tuple[Any, ...]:
        with refusals_shown():
            wanted = request(*values)
            if wanted is None:
                raise UserError("there is nothing to complete: drop a file, try a sample or type a text")
            job = prepared(service, wanted)  # so that a refusal is said at once
            title = "typed text" if job.source is None else job.source.name
            job_id = store.submit(visitor, KIND, title, gallery_work(lambda: job))
        return job_id, job_id, NO_CHOICE

    def pick(visitor: str, job_id: str, event: gr.EventData) -> dict[str, Any]:
        return picked(store, visitor, job_id, event)

    def step(visitor: str, job_id: str, event: gr.EventData) -> dict[str, Any]:
        return stepped(store, visitor, job_id, event)

    def branch(visitor: str, job_id: str, event: gr.EventData) -> tuple[Any, ...]:
        with refusals_shown():
            gallery, made = found_sample(store, visitor, job_id, event_value(event, "id", str))
            number = event_value(event, "number", int, highest=len(made.made) - 1)
            with store.short_work(visitor):
                job = made.job.branched(made.made, number, event_value(event, "value", int, highest=255))
            title = f"Branch at byte {number:,}"
            job_id = store.submit(visitor, KIND, title, gallery_work(lambda: job, title, gallery.made))
        if gallery.at_work:
            gr.Info("What was being made goes on; the Jobs tab shows it.")
        return job_id, job_id, NO_CHOICE

    source.change(_show_inputs, source, [file_inputs, text_inputs], queue=False, **QUIET)
    file.change(open_file, [file, *settings], [*settings, keep, first_bytes, prompt, plan], trigger_mode="always_last", **QUIET)
    gr.on(
        [source.change, text.change, model.input, framing.input, upside_down.input],
        open_source, form, [prompt, plan, keep, first_bytes], trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    gr.on(
        [num_bytes.input, samples.release, temperature.release, top_k.release, top_p.release, seed.input],
        lambda *values: replan(service, request(*values))[1], form, plan, trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    prompt.cut(move_cut, form, [prompt, plan, keep, first_bytes], trigger_mode="always_last", **QUIET)
    new_seed.click(lambda: secrets.randbelow(2**31), None, seed, queue=False, **QUIET)
    link.follow(new_display, [start, stop, results])
    link.remember(start.click(submit, [visitor, *form], [*link.outputs, choices], **QUIET))
    link.remember(choices.branch(branch, link.inputs, [*link.outputs, choices], **QUIET))
    link.take_up(arrived)
    results.pick(pick, link.inputs, choices, **QUIET)
    choices.step(step, link.inputs, choices, **QUIET)
    stop.click(link.stop, link.inputs, None, **AT_ONCE)


def request(
    source: str, file: str | None, text: str | None, keep_bytes: int | None, model: str | None, num_bytes: int | None,
    samples: int | None, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None, framing: str,
    upside_down: bool, first_bytes: str = "",
) -> dict[str, Any] | None:  # fmt: skip
    """The form as arguments of `Service.complete`; None while it has no source. A field that was emptied has its default."""
    typed = (text or "").encode(errors="replace")
    given: dict[str, Any] = {"path": None, "text": typed} if source == FROM_TEXT else {"path": file}
    if not (text if source == FROM_TEXT else file):
        return None
    if source == FROM_FILE and (made := _provenance(file)) is not None and made.text is not None:
        given = {"path": None, "text": made.text}  # a file of settings stands for the text that it goes with
    return given | {
        "keep_bytes": None if keep_bytes in (None, ALL) else int(keep_bytes),
        "model": model or None,
        "num_bytes": num_bytes or None,
        "samples": 1 if samples is None else int(samples),
        "temperature": 1.0 if temperature is None else float(temperature),
        "top_k": int(top_k or 0) or None,
        "top_p": 1.0 if top_p is None else float(top_p),
        "seed": int(seed or 0),
        "framing": framing,
        "upside_down": upside_down,
        "first_bytes": first_bytes,
    }


def prepared(service: Service, wanted: dict[str, Any]) -> CompletionJob:
    """The completions that a form asks for.

    Raises:
        UserError: if the file or a setting cannot be used.
    """
    with without_path(wanted["path"]):
        return service.complete(**wanted)


def preview(service: Service, wanted: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """The source with the end of its kept part, and the plan in words, for a form that was changed.

    A refusal is part of the plan here: somebody who is still filling in a form needs no error message.
    """
    if wanted is None:
        return EMPTY, NO_PLAN
    try:
        with refusals_shown():
            job = prepared(service, wanted)
    except gr.Error as error:
        return _without_end(service, wanted, error.message), _capital(error.message)
    return cards.prompt(job), plan_in_words(job)


def replan(service: Service, wanted: dict[str, Any] | None) -> tuple[Any, str]:
    """The new end of the kept part and the plan, for a source that is shown already."""
    if wanted is None:
        return gr.skip(), NO_PLAN
    try:
        with refusals_shown():
            job = prepared(service, wanted)
    except gr.Error as error:
        return gr.skip(), _capital(error.message)
    return cards.cut(job), plan_in_words(job)


def plan_in_words(job: CompletionJob) -> str:
    """A few sentences: what is kept, what is made, about how long it takes, and what was done to the file."""
    each = f", {job.settings.samples} times" if job.settings.samples > 1 else ""
    sentence = f"{_capital(job.plan.says)}{each}: about {duration(job.estimate_seconds)}."
    return "\n".join([sentence, *(f"{_capital(note)}." for note in job.notes)])


def settings_of(made: Provenance, models: Collection[str]) -> tuple[list[Any], list[str]]:
    """The values of the form's settings, in their order, and in words those that had to change to fit the form.

    Args:
        models: the names that the form offers.
    """
    s: CompletionSettings = made.settings
    model, changes = made.model, []
    if model not in models:
        model = ""
        changes.append(f"there is no model {made.model} here, so one is chosen by the content")
    bounded = {"samples": s.samples, "temperature": s.temperature, "top_k": s.top_k or 0, "top_p": s.top_p}
    for name, value in bounded.items():
        lowest, highest = BOUNDS[name]
        bounded[name] = min(max(value, lowest), highest)
        if bounded[name] != value:
            changes.append(f"{name} is {bounded[name]} instead of {value}")
    return [model, s.num_bytes, *bounded.values(), s.seed, s.framing, s.upside_down], changes


def new_display() -> Callable[[JobView], list[Any]]:
    """What one page shows of a job, from now on."""
    display = cards.Display()

    def show(view: JobView) -> list[Any]:
        gallery: Gallery | None = view.result or view.latest
        if gallery is None or not (gallery.made or gallery.at_work):
            results = WAITING if view.is_running else cards.message("Nothing was made", reworded(view.problem))
        else:
            results = display.results(gallery, is_running=view.is_running)
        if view.state == "stopped" and view.problem != STOPPED:
            gr.Info(_capital(view.problem))
        return [gr.update(interactive=not view.is_running), gr.update(interactive=view.is_running), results]

    return show


def found_sample(store: JobStore, visitor: str, job_id: str, name: str) -> tuple[Gallery, Made]:
    """A visitor's own gallery and a sample of it.

    Raises:
        gr.Error: if it is not kept any more.
    """
    try:
        view = store.look(visitor, job_id)
        gallery: Gallery | None = view.result or view.latest
    except UnknownJobError:
        gallery = None
    made = None if gallery is None else gallery.find(name)
    if gallery is None or made is None:
        raise gr.Error("This sample is no longer kept on the server; make it again.", print_exception=False)
    return gallery, made


def picked(store: JobStore, visitor: str, job_id: str, event: gr.EventData) -> dict[str, Any]:
    """The choices at the place of a sample that an event of the results names.

    Raises:
        gr.Error: if there is no such sample or place, or the visitor has asked too much already.
    """
    with refusals_shown():
        _, made = found_sample(store, visitor, job_id, event_value(event, "id", str))
        with store.short_work(visitor):
            number = made.number_at(event_value(event, "place", float, lowest=-1))
            if number is None:
                raise UserError("Nothing new was made there; pick a place behind the kept part.")
            return choices_at(made, number)


def stepped(store: JobStore, visitor: str, job_id: str, event: gr.EventData) -> dict[str, Any]:
    """The same for the number of a new byte, which an event of the choices names."""
    with refusals_shown():
        _, made = found_sample(store, visitor, job_id, event_value(event, "id", str))
        with store.short_work(visitor):
            return choices_at(made, event_value(event, "number", int))


def choices_at(made: Made, number: int) -> dict[str, Any]:
    """The five likeliest bytes in place of a new one."""
    number = max(0, min(number, len(made.made) - 1))
    return cards.alternatives(made, number, made.job.alternatives(made.made, number))


def _without_end(service: Service, wanted: dict[str, Any], sentence: str) -> dict[str, Any]:
    """The source all the same, if it is only the end of the kept part or a setting that is refused."""
    try:
        neutral = {"keep_bytes": None, "num_bytes": 1, "samples": 1, "first_bytes": ""}
        return cards.prompt(prepared(service, wanted | neutral))
    except (ValueError, OSError):
        return cards.message("This cannot be completed", sentence, "error")


def _provenance(file: str) -> Provenance | None:
    try:
        return read_provenance(Path(file))
    except UserError:
        return None  # whoever opens it next says what is wrong


def _says_origin(service: Service, made: Provenance, changes: list[str]) -> str:
    if changes:
        return f"Settings restored as far as this form takes them, so the bytes may differ: {'; '.join(changes)}.\n"
    try:
        is_same = service.model_info(made.model).digest == made.model_sha256
    except (ValueError, OSError):
        is_same = False
    if is_same:
        return f"Settings restored: this is sample {made.sample + 1} of a completion, which the same model makes again.\n"
    return f"Settings restored, but this was made with another version of {made.model}, so the bytes will differ.\n"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _show_inputs(source: str) -> tuple[Any, Any]:
    return gr.update(visible=source == FROM_FILE), gr.update(visible=source == FROM_TEXT)
