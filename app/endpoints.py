"""The named endpoints for `gradio_client`: what the page does, with the same checks and the same bytes.

`/score`, `/export` and `/compare` do what the Likelihood tab does, `/generate` what the Complete tab does, `/batch_plan` and
`/batch` what the Batch tab does; `app.job_endpoints` has those that go on with a job.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from app.batch import Batch
from app.calls import Answer, Calls, answer_of
from app.downloads import FORMS, Export, write_export
from app.gallery import gallery_work
from app.job_endpoints import add_job_endpoints
from app.jobs import Job
from app.palette import SEQUENTIAL
from app.render import MEASURES, differences
from app.scoring import ReferenceSizes
from app.service import CompletionJob, FileScore, Service
from app.settings import FRAMINGS, CompletionSettings
from app.tabs import batch, complete
from app.tabs.refusals import ENDPOINT_WORDS, refusals_shown, without_path
from app.tabs.sources import title_of
from app.views import batch_values, score_values
from core.errors import UserError

_WITH_DEFAULTS = ("samples", "temperature", "top_p", "seed", "framing", "upside_down", "first_bytes")


def add_endpoints(service: Service, calls: Calls) -> None:
    """All endpoints, inside the current `gr.Blocks`."""
    # Endpoints need components for their types; a row that is not visible is left out of the page altogether.
    with gr.Row(visible=False):
        _add_scores(service, calls)
        _add_completions(service, calls)
        add_job_endpoints(calls)


def _add_scores(service: Service, calls: Calls) -> None:
    def score(
        file: str | None, model: str | None, scored_as: str | None, adapt: bool | None, request: gr.Request
    ) -> Iterator[Any]:
        """Bits of a file under a model; an empty model name takes the one that suits the file."""
        with refusals_shown(ENDPOINT_WORDS):
            name = _name_of(file)

            def work(job: Job) -> Answer:
                return Answer((), _scored(service, job, file, model, scored_as, adapt).to_dict() | {"file": name})

            view = yield from calls.finished(request, "score", name, work)
        yield view.result.facts

    def export(
        file: str | None, form: str | None, measure: str | None, palette: str | None, model: str | None,
        scored_as: str | None, adapt: bool | None, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        """What is known of every byte of a file, as npz, csv, png (in the colours of a measure) or html (a page for offline)."""
        with refusals_shown(ENDPOINT_WORDS):
            name, asked = _name_of(file), Export(form or "npz", measure or "bits", palette or "viridis")
            if asked.measure == "difference":
                raise UserError("a difference needs two scores; /compare takes them")

            def work(job: Job) -> Answer:
                result = _scored(service, job, file, model, scored_as, adapt, detailed=True)
                path = write_export(asked, job.folder, _with_item(result, asked, job))
                return Answer((path,), result.to_dict() | {"file": name})

            view = yield from calls.finished(request, "export", name, work)
        yield str(view.result.files[0]), view.result.facts

    def compare(
        file: str | None, other: str | None, model: str | None, other_model: str | None, form: str | None, palette: str | None,
        scored_as: str | None, adapt: bool | None, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        """Two models on one file, if `other` is null, or two files: bits minus those of the other, byte by byte (png or html)."""
        with refusals_shown(ENDPOINT_WORDS):
            name, asked = _name_of(file), Export(form or "png", "difference", palette or "viridis")
            if asked.form not in ("png", "html"):
                raise UserError("a difference is exported as png or html")
            if not other and (other_model or None) == (model or None):
                raise UserError("there is nothing to compare with: give another file, or another model")

            def work(job: Job) -> Answer:
                files, models = (file, other or file), (model, other_model or (model if other else None))
                here, there = (
                    _scored(service, job, *given, scored_as, adapt, detailed=True) for given in zip(files, models, strict=True)
                )
                values = differences(here, there)
                path = write_export(asked, job.folder, *(_with_item(each, asked, job) for each in (here, there)))
                facts = {key: result.to_dict() | {"file": result.file.name} for key, result in (("file", here), ("other", there))}
                return Answer((path,), facts | {"difference": _sums(values)})

            view = yield from calls.finished(request, "compare", name, work)
        yield str(view.result.files[0]), view.result.facts

    file, other = gr.File(label="file"), gr.File(label="other")
    model, other_model = gr.Textbox("", label="model"), gr.Textbox("", label="other_model")
    scored_as, adapt = gr.Radio(["media", "file"], value="media", label="scored_as"), gr.Checkbox(label="adapt")
    form, against_form = gr.Radio(FORMS, value="npz", label="form"), gr.Radio(["png", "html"], value="png", label="form")
    measure = gr.Radio([name for name in MEASURES if name != "difference"], value="bits", label="measure")
    palette = gr.Radio(list(SEQUENTIAL), value="viridis", label="palette")
    exported, facts = gr.File(label="exported"), gr.JSON(label="facts")
    how = [scored_as, adapt]
    calls.add_endpoint("score", score, [file, model, *how], [facts])
    calls.add_endpoint("export", export, [file, form, measure, palette, model, *how], [exported, facts])
    calls.add_endpoint("compare", compare, [file, other, model, other_model, against_form, palette, *how], [exported, facts])


def _add_completions(service: Service, calls: Calls) -> None:
    def generate(
        file: str | None, text: str | None, model: str | None, keep: float | None, num_bytes: int | None,
        samples: int | None, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None,
        keep_bytes: int | None, framing: str | None, upside_down: bool | None, first_bytes: str | None, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        """Completions of a file's first part or of a text: files in the order of the samples, and their facts.

        What is null is as if it were not given, and so are a `keep` or `keep_bytes` of -1: half of a file is kept then,
        all of a file that is cut short, and all of a text.
        """
        with refusals_shown(ENDPOINT_WORDS):
            form = completion_form(
                file, text, keep, keep_bytes, model=model, num_bytes=num_bytes, samples=samples, temperature=temperature,
                top_k=top_k, top_p=top_p, seed=seed, framing=framing, upside_down=upside_down, first_bytes=first_bytes,
            )  # fmt: skip
            work = gallery_work(lambda: complete.prepared(service, form))
            view = yield from calls.finished(request, "generate", "text" if text else Path(file).name, work)
        yield answer_of(view)

    def repeat(file: str | None, request: gr.Request) -> Iterator[Any]:
        """The samples again that a result is one of, by the settings inside it; of a text, by the file of its settings."""
        with refusals_shown(ENDPOINT_WORDS):
            if not file:
                raise UserError("there is nothing to repeat: give a result")

            def prepare() -> CompletionJob:
                with without_path(file):
                    return service.repeat(Path(file))

            work = gallery_work(prepare)
            view = yield from calls.finished(request, "repeat", Path(file).name, work)
        yield answer_of(view)

    def batch_plan(files: list[str] | None, recipe: str | None, request: gr.Request) -> Iterator[Any]:
        """What a recipe would make of some files, and about how long it takes; names and patterns are those of the files."""
        with refusals_shown(ENDPOINT_WORDS):
            items = batch.read_form(files, recipe or "")

            def work(job: Job) -> Answer:
                planned = []
                for row in Batch(service, items, Path()).plan():
                    job.report(None)
                    name = row.item.source.name if row.item.source else None
                    told = {"source": name, "plan": row.says, "estimate_seconds": row.estimate_seconds}
                    planned.append(row.to_dict() | told)
                return Answer((), {"items": planned})

            title = title_of([batch_values.name_of(item) for item in items])
            view = yield from calls.finished(request, "batch_plan", title, work)
        yield view.result.facts

    def run_batch(files: list[str] | None, recipe: str | None, request: gr.Request) -> Iterator[Any]:
        """A zip file with everything that a recipe makes of some files, and the facts of each sample and each failure."""
        with refusals_shown(ENDPOINT_WORDS):
            items = batch.read_form(files, recipe or "")
            title = title_of([batch_values.name_of(item) for item in items])
            view = yield from calls.finished(request, "batch", title, batch.batch_work(service, items, recipe or ""))
        [archive], facts = answer_of(view)
        yield archive, facts

    file, model, text = gr.File(label="file"), gr.Textbox("", label="model"), gr.Textbox("", label="text")
    keep, temperature, top_p = gr.Number(complete.ALL), gr.Number(1.0), gr.Number(1.0)
    num_bytes, samples = gr.Number(0, precision=0), gr.Number(1, precision=0)
    top_k, seed = gr.Number(0, precision=0), gr.Number(0, precision=0)
    keep_bytes, framing = gr.Number(complete.ALL, precision=0), gr.Radio(list(FRAMINGS), value=FRAMINGS[0])
    upside_down, first_bytes = gr.Checkbox(), gr.Textbox("")
    sources, recipe = gr.File(label="files", file_count="multiple"), gr.Textbox(label="recipe")
    files, archive, facts = gr.File(label="files", file_count="multiple"), gr.File(label="zip"), gr.JSON(label="facts")
    drawing = [temperature, top_k, top_p, seed]
    settings = [file, text, model, keep, num_bytes, samples, *drawing, keep_bytes, framing, upside_down, first_bytes]
    calls.add_endpoint("generate", generate, settings, [files, facts])
    calls.add_endpoint("repeat", repeat, [file], [files, facts])
    calls.add_endpoint("batch_plan", batch_plan, [sources, recipe], [facts])
    calls.add_endpoint("batch", run_batch, [sources, recipe], [archive, facts])


def completion_form(
    file: str | None, text: str | None, keep: float | None, keep_bytes: int | None, **settings: Any
) -> dict[str, Any]:
    """The arguments of `/generate` as those of `Service.complete`; a setting that is None has its default.

    Raises:
        UserError: if there is not exactly one of file and text.
    """
    if bool(file) == bool(text):
        raise UserError(
            "give either a file or a text, not both" if file else "there is nothing to complete: give a file or a text"
        )
    defaults = {"top_k": 0} | {name: getattr(CompletionSettings, name) for name in _WITH_DEFAULTS}
    settings |= {name: default for name, default in defaults.items() if settings[name] is None}
    form = complete.request(complete.FROM_TEXT if text else complete.FROM_FILE, file, text, keep_bytes, **settings)
    return form | {"keep": None if keep in (None, complete.ALL) else keep}


def _name_of(file: str | None) -> str:
    if not file:
        raise UserError("there is nothing to score: give a file")
    return Path(file).name


def _scored(
    service: Service, job: Job, file: str, model: str | None, scored_as: str | None, adapt: bool | None, detailed: bool = False
) -> FileScore:
    def progress(*done_and_known: int) -> None:
        job.report(done_and_known)

    return service.score_file(
        Path(file), model=model or None, scored_as=scored_as or "media", adapt=bool(adapt), detailed=detailed, progress=progress
    )


def _with_item(result: FileScore, wanted: Export, job: Job) -> tuple[FileScore, dict[str, Any]]:
    """A score with as much of its item as an export takes."""
    if wanted.form != "html":
        return result, {"name": result.file.name}
    sizes = ReferenceSizes(lambda: job.report(None)).of(result)
    return result, score_values.with_references(score_values.item(result, job.folder), sizes)


def _sums(values: np.ndarray) -> dict[str, Any]:
    """The difference over the bytes that both have."""
    there = values[~np.isnan(values)].astype(np.float64)
    return {
        "num_bytes": there.size,
        "total_bits": float(there.sum()),
        "bits_per_byte": float(there.mean()) if there.size else None,
    }
