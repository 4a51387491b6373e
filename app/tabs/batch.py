"""The Batch tab: many files and a recipe, the plan and its cost first, then a table with the state of each."""

import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from fnmatch import fnmatchcase
from json import dumps
from pathlib import Path
from typing import Any

import gradio as gr

from app.batch import Batch
from app.jobs import Job, JobEndedError, JobStore, JobView
from app.provenance import sidecar_of
from app.recipe import Item, parse_recipe
from app.service import Service
from app.tabs.following import AT_ONCE, QUIET, JobLink
from app.tabs.newest import Newest
from app.tabs.refusals import refusals_shown, reworded
from app.tabs.sources import sample_buttons, title_of
from app.views import batch_values, factory
from core.codecs import atomic_file

KIND = "batch"
MAX_ITEMS = 1000
MAX_RECIPE_LENGTH = 100_000
GIVE_EVERY_S = 0.2
RECIPE = """\
# One table a group of files.
# More settings: num_bytes,
# seed, temperature, top_k,
# top_p, keep_bytes, model
[[jobs]]
files = "*"
keep = 0.5
samples = 1
"""
COMMAND = "python -m app generate --recipe jobs.toml --out results"
EMPTY = batch_values.message(
    "Many files in one go",
    "Drop files and write down what to do with them, or try the samples. The plan and its cost come before anything is made.",
)
RECIPE_NAME, FACTS_NAME, ZIP_NAME = "jobs.toml", "results.jsonl", "results.zip"


def build_tab(service: Service, store: JobStore, visitor: gr.BrowserState, arrived: Any) -> None:
    """Lays out the tab inside the current `gr.Tab` and connects it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="controls"):
            files = gr.File(label="Files", file_count="multiple", height=150, elem_id="batch-files")
            sample_buttons(files, "batch")
            recipe = gr.Textbox(
                RECIPE, label="Recipe", lines=8, max_lines=24, max_length=MAX_RECIPE_LENGTH,
                elem_id="batch-recipe", elem_classes="code",
            )  # fmt: skip
            with gr.Row(elem_classes="actions"):
                start = gr.Button("Start", variant="primary", elem_id="batch-start")
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="batch-stop")
            gr.Textbox(
                COMMAND, label="The same on the command line", info="beside the files, with the recipe in jobs.toml",
                interactive=False, buttons=["copy"], elem_id="batch-command", elem_classes="code",
            )  # fmt: skip
        with gr.Column(scale=3, min_width=320, elem_classes="content"):
            table = factory.batch_view(EMPTY)

    link = JobLink(store, KIND, visitor)

    def submit(visitor: str, files: list[str] | None, recipe: str) -> tuple[str, str]:
        with refusals_shown():
            items = read_form(files, recipe)
            job_id = store.submit(
                visitor, KIND, title_of([batch_values.name_of(item) for item in items]), batch_work(service, items, recipe)
            )
            return job_id, job_id

    def show(view: JobView) -> tuple[Any, Any, dict[str, Any]]:
        return gr.update(interactive=not view.is_running), gr.update(interactive=view.is_running), shown(view)

    def plan(files: list[str] | None, recipe: str, request: gr.Request) -> Iterator[Any]:
        with newest_plan.begin(request) as goes_on:
            yield gr.skip()  # Gradio empties outputs if a handler yields nothing
            for seen in preview(service, files, recipe):
                if not goes_on():
                    return
                yield seen

    newest_plan = Newest()
    gr.on([files.change, recipe.change], plan, [files, recipe], table, trigger_mode="multiple", **QUIET)
    link.follow(lambda: show, [start, stop, table])
    link.remember(start.click(submit, [visitor, files, recipe], link.outputs, **AT_ONCE))
    link.take_up(arrived)
    stop.click(link.stop, link.inputs, None, **AT_ONCE)


def read_form(files: list[str] | None, recipe: str | None) -> list[Item]:
    """Everything that a recipe asks for, of files that were uploaded and no others.

    Raises:
        ValueError: if the text is no recipe, or asks for too much.
    """
    text = (recipe or "").encode(errors="replace").decode()
    if len(text) > MAX_RECIPE_LENGTH:
        raise ValueError(f"the recipe has {len(text):,} characters; the page takes {MAX_RECIPE_LENGTH:,}, the command line more")
    items = parse_recipe(text, _finder([Path(file) for file in files or []]))
    if len(items) > MAX_ITEMS:
        raise ValueError(f"the recipe asks for {len(items)} items; the page takes {MAX_ITEMS}, the command line any number")
    return items


def preview(service: Service, files: list[str] | None, recipe: str | None) -> Iterator[Any]:
    """The plan of a form that was changed; what is wrong with it is a part of it here.

    Until it is there, nothing new is given now and then, where whoever does not want it any more may let it go.
    """
    if not files and "text" not in (recipe or ""):
        yield EMPTY
        return
    try:
        with refusals_shown():
            batch = Batch(service, read_form(files, recipe), Path("results"))
            given = time.monotonic()
            for _ in batch.plan():
                if time.monotonic() - given >= GIVE_EVERY_S:
                    yield gr.skip()
                    given = time.monotonic()
            yield _worded(batch_values.plan(batch))
    except gr.Error as error:
        yield batch_values.message("This is no recipe yet", error.message)


def batch_work(service: Service, items: list[Item], recipe: str) -> Callable[[Job], Batch]:
    """The work of a job: all items, and a zip file with what was made, also if it is stopped."""

    def work(job: Job) -> Batch:
        out = job.folder / "results"
        batch = Batch(service, items, out)
        try:
            with closing(batch.run()) as steps:
                for _ in steps:
                    job.report(batch)
        except JobEndedError:
            write_zip(batch, recipe, job.folder / ZIP_NAME)
            raise
        write_zip(batch, recipe, job.folder / ZIP_NAME)
        return batch

    return work


def write_zip(batch: Batch, recipe: str, path: Path) -> None:
    """The results with their settings, their facts as JSON lines, and the recipe that made them."""
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(RECIPE_NAME, recipe)
        archive.writestr(FACTS_NAME, "".join(f"{dumps(facts)}\n" for facts in facts_of(batch)))
        for row in batch.rows:
            for made in row.results:
                for output in (Path(made["output"]), sidecar_of(Path(made["output"]))):
                    if output.exists():
                        archive.write(output, output.name)


def facts_of(batch: Batch) -> Iterator[dict[str, Any]]:
    """One JSON object a sample, and one for each item that failed; files by their names, without this machine's folders."""
    for row in batch.rows:
        source = None if row.item.source is None else row.item.source.name
        for made in row.results:
            yield {"job": row.item.job, **made, "source": source, "output": Path(made["output"]).name}
        if row.state == "failed":
            yield {"job": row.item.job, "source": source, "error": row.says}


def shown(view: JobView) -> dict[str, Any]:
    """The table of a job as it is now."""
    batch = view.result or view.latest
    if batch is None:
        return batch_values.message("Waiting", "The job has begun.") if view.is_running else EMPTY
    path = view.folder / ZIP_NAME
    has_results = not view.is_running and path.exists() and any(row.results for row in batch.rows)
    return _worded(batch_values.progress(batch, view, path if has_results else None))


def _worded(table: dict[str, Any]) -> dict[str, Any]:
    """A table with the words of the page in its rows."""
    return table | {"rows": [row | {"says": reworded(row["says"])} for row in table["rows"]]}


def _finder(files: list[Path]) -> Callable[[str], list[Path]]:
    def find(pattern: str) -> list[Path]:
        found = [file for file in files if fnmatchcase(file.name, pattern)]
        if not found:
            raise ValueError(f"none of the {len(files)} files fits {pattern}")
        return found

    return find
