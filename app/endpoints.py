"""The named endpoints for `gradio_client`: the verbs of the command line, with the same checks and the same answers.

Each call is a job of its caller, so that scripts and visitors share the models fairly.
"""

import secrets
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from app.batch import Batch
from app.jobs import Job, JobStore, JobView, Work
from app.service import Service
from app.settings import FRAMINGS, CompletionSettings
from app.tabs import batch, complete
from app.tabs.refusals import ENDPOINT_WORDS, refusals_shown
from app.tabs.sources import title_of
from app.views import batch_values
from core.errors import UserError

_LOOK_EVERY_S = 1.0
_WITH_DEFAULTS = ("samples", "temperature", "top_p", "seed", "framing", "upside_down", "first_bytes")


def add_endpoints(service: Service, store: JobStore) -> None:
    """`/score`, `/generate`, `/batch_plan` and `/batch`, inside the current `gr.Blocks`."""

    def finished(request: gr.Request, kind: str, title: str, work: Work) -> Generator[Any, None, JobView]:
        """Waits until the job is done; what ended it otherwise is raised. A caller who goes away ends it."""
        owner = owner_of(request)
        job_id = store.submit(owner, f"{kind} by a script", title, work)
        try:
            while (view := store.look(owner, job_id, wait_s=_LOOK_EVERY_S)).is_running:
                yield gr.skip()
        finally:
            store.stop(owner, job_id)
        if view.state != "done":
            raise ValueError(view.problem)
        return view

    def score(
        file: str | None, model: str | None, scored_as: str | None, adapt: bool | None, request: gr.Request
    ) -> Iterator[Any]:
        """Bits of a file under a model; an empty model name takes the one that suits the file."""
        if file is None:
            raise gr.Error("There is nothing to score: give a file.", print_exception=False)

        def work(job: Job) -> dict[str, Any]:
            def progress(*done_and_known: int) -> None:
                job.report(done_and_known)

            options = {"model": model or None, "scored_as": scored_as or "media", "adapt": bool(adapt), "progress": progress}
            return service.score_file(Path(file), **options).to_dict()

        with refusals_shown(ENDPOINT_WORDS):
            view = yield from finished(request, "score", Path(file).name, work)
        yield view.result | {"file": Path(file).name}

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

        def work(job: Job) -> list[tuple[Path, dict[str, Any]]]:
            completion_job = service.complete(**form)
            for progress in completion_job.run():
                job.report(progress.done_bytes)
            paths = [service.write_completion(completion, job.folder) for completion in completion_job.results]
            return [(path, made.to_dict()) for path, made in zip(paths, completion_job.results, strict=True)]

        with refusals_shown(ENDPOINT_WORDS):
            view = yield from finished(request, "generate", "text" if text else Path(file).name, work)
        made, names = view.result, {"source": Path(file).name if file else None}
        yield [str(path) for path, _ in made], [facts | names | {"output": path.name} for path, facts in made]

    def batch_plan(files: list[str] | None, recipe: str | None) -> dict[str, Any]:
        """What a recipe would make of some files, and about how long it takes; names and patterns are those of the files."""
        with refusals_shown(ENDPOINT_WORDS):
            planned = Batch(service, batch.read_form(files, recipe or ""), Path())
            rows = [row.to_dict() | {"plan": row.says, "estimate_seconds": row.estimate_seconds} for row in planned.plan()]
        names = [row.item.source.name if row.item.source else None for row in planned.rows]
        return {"items": [row | {"source": name} for row, name in zip(rows, names, strict=True)]}

    def run_batch(files: list[str] | None, recipe: str | None, request: gr.Request) -> Iterator[Any]:
        """A zip file with everything that a recipe makes of some files, and the facts of each sample and each failure."""
        with refusals_shown(ENDPOINT_WORDS):
            items = batch.read_form(files, recipe or "")
            view = yield from finished(
                request,
                "batch",
                title_of([batch_values.name_of(item) for item in items]),
                batch.batch_work(service, items, recipe or ""),
            )
        yield str(view.folder / batch.ZIP_NAME), list(batch.facts_of(view.result))

    # Endpoints need components for their types; a row that is not visible is left out of the page altogether.
    with gr.Row(visible=False):
        file, model, text = gr.File(), gr.Textbox(), gr.Textbox()
        keep, temperature, top_p = gr.Number(complete.ALL), gr.Number(1.0), gr.Number(1.0)
        num_bytes, samples = gr.Number(0, precision=0), gr.Number(1, precision=0)
        top_k, seed = gr.Number(0, precision=0), gr.Number(0, precision=0)
        scored_as, adapt = gr.Radio(["media", "file"], value="media"), gr.Checkbox()
        sources, recipe = gr.File(label="files", file_count="multiple"), gr.Textbox(label="recipe")
        files, archive, facts = gr.File(label="files", file_count="multiple"), gr.File(label="zip"), gr.JSON(label="facts")
        keep_bytes, framing = gr.Number(complete.ALL, precision=0), gr.Radio(list(FRAMINGS), value=FRAMINGS[0])
        upside_down, first_bytes = gr.Checkbox(), gr.Textbox("")
        drawing = [temperature, top_k, top_p, seed]
        settings = [file, text, model, keep, num_bytes, samples, *drawing, keep_bytes, framing, upside_down, first_bytes]
        # Without a limit of Gradio's own, which would make short calls wait for long ones: the job store has limits.
        for name, answer, inputs, outputs in (
            ("score", score, [file, model, scored_as, adapt], [facts]),
            ("generate", generate, settings, [files, facts]),
            ("batch_plan", batch_plan, [sources, recipe], [facts]),
            ("batch", run_batch, [sources, recipe], [archive, facts]),
        ):
            gr.Button().click(answer, inputs, outputs, api_name=name, concurrency_limit=None)


def owner_of(request: gr.Request) -> str:
    """Whose job a call is: its session's, or nobody else's if it has none."""
    return request.session_hash or secrets.token_urlsafe(16)


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
