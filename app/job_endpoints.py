"""The endpoints that go on with a job: `/jobs`, `/result` and `/stop`, and for its samples `/alternatives` and `/branch`.

A job belongs to the client that has begun it; while one call waits for its job, the same client may ask for it in others.
"""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.calls import Calls, answer_of, found_gallery, owner_of
from app.gallery import Made, gallery_work
from app.jobs import JobView
from app.tabs.refusals import ENDPOINT_WORDS, refusals_shown
from core.errors import UserError

_STOPS_WITHIN_S = 1.0


def add_job_endpoints(calls: Calls) -> None:
    """Adds them inside the current `gr.Blocks`."""
    store = calls.store

    def jobs(request: gr.Request) -> list[dict[str, Any]]:
        """The jobs of this client, newest first."""
        return [_facts_of(view) for view in store.list(owner_of(request))]

    def stop(job: str | None, request: gr.Request) -> dict[str, Any]:
        """Ends a job; what it has made stays."""
        with refusals_shown(ENDPOINT_WORDS):
            store.stop(owner_of(request), job)
            return _facts_of(store.look(owner_of(request), job, wait_s=_STOPS_WITHIN_S))

    def result(job: str | None, request: gr.Request) -> tuple[list[str], list[dict[str, Any]]]:
        """The files that a job has made so far, and their facts."""
        with refusals_shown(ENDPOINT_WORDS):
            return answer_of(store.look(owner_of(request), job))

    def alternatives(job: str | None, sample: int | None, number: int | None, request: gr.Request) -> list[dict[str, Any]]:
        """The five likeliest bytes, with their probabilities, in place of new byte `number` of a sample of a job."""
        with refusals_shown(ENDPOINT_WORDS):
            owner = owner_of(request)
            made = _sample(store.look(owner, job), sample)
            with store.short_work(owner):
                found = made.job.alternatives(made.made, _number(made, number))
        return [{"value": value, "probability": probability} for value, probability in found]

    def branch(job: str | None, sample: int | None, number: int | None, value: int | None, request: gr.Request) -> Iterator[Any]:
        """A sample of a job again up to new byte `number`, in whose place stands `value`, and what the model makes behind it."""
        with refusals_shown(ENDPOINT_WORDS):
            owner = owner_of(request)
            made = _sample(store.look(owner, job), sample)
            if value is None or not 0 <= value <= 255:
                raise UserError(f"value={value} must lie in 0..255")
            with store.short_work(owner):
                branched = made.job.branched(made.made, _number(made, number), int(value))
            title = f"{made.title}, branch at byte {number:,}"
            view = yield from calls.finished(request, "branch", title, gallery_work(lambda: branched))
        yield answer_of(view)

    job, facts = gr.Textbox(label="job"), gr.JSON(label="facts")
    sample, number, value = (gr.Number(0, precision=0, label=name) for name in ("sample", "number", "value"))
    files = gr.File(label="files", file_count="multiple")
    calls.add_endpoint("jobs", jobs, [], [facts])
    calls.add_endpoint("stop", stop, [job], [facts])
    calls.add_endpoint("result", result, [job], [files, facts])
    calls.add_endpoint("alternatives", alternatives, [job, sample, number], [facts])
    calls.add_endpoint("branch", branch, [job, sample, number, value], [files, facts])


def _facts_of(view: JobView) -> dict[str, Any]:
    names = ("kind", "title", "state", "problem", "num_reports")
    return {"job": view.id, **{name: getattr(view, name) for name in names}, "seconds": round(view.seconds, 3)}


def _sample(view: JobView, sample: int | None) -> Made:
    made = {each.completion.sample: each for each in found_gallery(view).made}
    if sample not in made:
        there = ", ".join(map(str, sorted(made))) or "none yet"
        raise UserError(f"sample={sample} is none of those that are made; there are {there}")
    return made[sample]


def _number(made: Made, number: int | None) -> int:
    if number is None or not 0 <= number < len(made.made):
        raise UserError(f"number={number} must lie in 0..{len(made.made) - 1}, the new bytes of this sample")
    return int(number)
