"""The named endpoints for `gradio_client`: the verbs of the command line, with the same checks and the same answers.

Each call is a job of its caller, so that scripts and visitors share the models fairly.
"""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from app.batch import Batch
from app.jobs import Job, JobStore, JobView, Work
from app.service import Service
from app.settings import FRAMINGS
from app.tabs import batch, complete
from app.tabs.refusals import ENDPOINT_WORDS, refusals_shown
from app.tabs.sources import title_of
from app.views import batch_values

_LOOK_EVERY_S = 1.0


def add_endpoints(service: Service, store: JobStore) -> None:
    """`/score`, `/generate`, `/batch_plan` and `/batch`, inside the current `gr.Blocks`."""

    def finished(request: gr.Request, kind: str, title: str, work: Work) -> Generator[Any, None, JobView]:
        """Waits until the job is done; what ended it otherwise is raised. A caller who goes away ends it."""
        owner = request.session_hash or ""
        job_id = store.submit(owner, f"{kind} by a script", title, work)
        try:
            while (view := store.look(owner, job_id, wait_s=_LOOK_EVERY_S)).is_running:
                yield gr.skip()
        finally:
            store.stop(owner, job_id)
        if view.state != "done":
            raise ValueError(view.problem)
        return view

    def score(file: str | None, model: str, scored_as: str, adapt: bool, request: gr.Request) -> Iterator[Any]:
        """Bits of a file under a model; an empty model name takes the one that suits the file."""
        if file is None:
            raise gr.Error("There is nothing to score: give a file.", print_exception=False)

        def work(job: Job) -> dict[str, Any]:
            def progress(*done_and_known: int) -> None:
                job.report(done_and_known)

            options = {"model": model or None, "scored_as": scored_as, "adapt": adapt, "progress": progress}
            return service.score_file(Path(file), **options).to_dict()

        with refusals_shown(ENDPOINT_WORDS):
            view = yield from finished(request, "score", Path(file).name, work)
        yield view.result | {"file": Path(file).name}

    def generate(
        file: str | None, text: str, model: str, keep: float, num_bytes: int | None, samples: int,
        temperature: float, top_k: int, top_p: float, seed: int, keep_bytes: int | None, framing: str,
        upside_down: bool, first_bytes: str, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        """Completions of a file's first part or of a text: files in the order of the samples, and their facts.

        A `keep_bytes` of -1 leaves it to `keep`.
        """
        settings = (model, num_bytes, samples, temperature, top_k, top_p, seed, framing, upside_down, first_bytes)
        form = complete.request(complete.FROM_TEXT if text else complete.FROM_FILE, file, text, keep_bytes, *settings)
        if form is not None and form["keep_bytes"] is None:
            form["keep"] = 1.0 if text else keep
        if form is None:
            raise gr.Error("There is nothing to complete: give a file or a text.", print_exception=False)

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

    def batch_plan(files: list[str] | None, recipe: str) -> dict[str, Any]:
        """What a recipe would make of some files, and about how long it takes; names and patterns are those of the files."""
        with refusals_shown(ENDPOINT_WORDS):
            planned = Batch(service, batch.read_form(files, recipe), Path())
            rows = [row.to_dict() | {"plan": row.says, "estimate_seconds": row.estimate_seconds} for row in planned.plan()]
        names = [row.item.source.name if row.item.source else None for row in planned.rows]
        return {"items": [row | {"source": name} for row, name in zip(rows, names, strict=True)]}

    def run_batch(files: list[str] | None, recipe: str, request: gr.Request) -> Iterator[Any]:
        """A zip file with everything that a recipe makes of some files, and the facts of each sample and each failure."""
        with refusals_shown(ENDPOINT_WORDS):
            items = batch.read_form(files, recipe)
            view = yield from finished(
                request,
                "batch",
                title_of([batch_values.name_of(item) for item in items]),
                batch.batch_work(service, items, recipe),
            )
        yield str(view.folder / batch.ZIP_NAME), list(batch.facts_of(view.result))

    # Endpoints need components for their types; a row that is not visible is left out of the page altogether.
    with gr.Row(visible=False):
        file, model, text = gr.File(), gr.Textbox(), gr.Textbox()
        keep, temperature, top_p = gr.Number(0.5), gr.Number(1.0), gr.Number(1.0)
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
