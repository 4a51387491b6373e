"""Calls by scripts: each is a job of its caller, who is known by the session of the client and sees no other's."""

import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.context import LocalContext

from app.batch import Batch
from app.gallery import Gallery
from app.jobs import JobStore, JobView, UnknownJobError, Work
from app.tabs import batch
from core.errors import UserError

_LOOK_EVERY_S = 1.0
_REMEMBERED_EVENTS = 1000  # far more than wait to begin, which takes milliseconds: no limit of ours holds a call back
_MAX_EVENT_LENGTH = 100


@dataclass(frozen=True, eq=False)
class Answer:
    """What a call gives that is neither a gallery nor a batch."""

    files: tuple[Path, ...]
    facts: dict[str, Any]


class Calls:
    """The endpoints of scripts, their jobs in a store, and which calls were cancelled."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self._endpoints: set[int] = set()  # as Gradio numbers them
        self._at_work: dict[str, tuple[str, str]] = {}  # event of Gradio -> owner and job
        self._cancelled: deque[str] = deque(maxlen=_REMEMBERED_EVENTS)  # events that may be about to begin
        self._mutex = threading.Lock()

    def add_endpoint(self, name: str, answer: Callable[..., Any], inputs: list[Component], outputs: list[Component]) -> None:
        """Names a handler inside the current `gr.Blocks`; its arguments are those of the handler.

        Without a limit of Gradio's own, which would make short calls wait for long ones: the job store has limits.
        """
        event = gr.Button().click(answer, inputs, outputs, api_name=name, concurrency_limit=None)
        self._endpoints.add(event["id"])

    def cancel(self, event: str, endpoint: int | None) -> bool:
        """Ends the job of a call, now or when it is about to begin; whether it is ours, so that Gradio must not hear of it.

        Gradio 6.31 ends no call whose client gave up before it knew the event's name, and ends, without an answer, all calls
        of a session to one endpoint for the sake of one, even if that is over.

        Args:
            endpoint: where it was called, if the client says so.
        """
        is_ours = endpoint in self._endpoints
        with self._mutex:
            job = self._at_work.get(event)
            if job is None and (is_ours or endpoint is None):
                self._cancelled.append(event[:_MAX_EVENT_LENGTH])
        if job is not None:
            self._stop(*job)
        return is_ours or job is not None

    def finished(self, request: gr.Request, kind: str, title: str, work: Work) -> Generator[Any, None, JobView]:
        """Waits until the job is done; what ended it otherwise is raised. A caller who goes away ends it.

        Raises:
            ValueError: if the job failed or was stopped.
        """
        owner = owner_of(request)
        job_id = self.store.submit(owner, f"{kind} by a script", title, work)
        event = LocalContext.event_id.get(None) or job_id
        with self._mutex:
            self._at_work[event] = owner, job_id
            is_cancelled = event in self._cancelled
        try:
            if is_cancelled:
                self._stop(owner, job_id)
            while (view := self.store.look(owner, job_id, wait_s=_LOOK_EVERY_S)).is_running:
                yield gr.skip()
        finally:
            self._at_work.pop(event, None)
            self._stop(owner, job_id)
        if view.state != "done":
            raise ValueError(view.problem)
        return view

    def _stop(self, owner: str, job_id: str) -> None:
        with contextlib.suppress(UnknownJobError):  # it is over and gone
            self.store.stop(owner, job_id)


def owner_of(request: gr.Request) -> str:
    """Whose job a call is: its session's, or nobody else's if it has none."""
    return request.session_hash or secrets.token_urlsafe(16)


def answer_of(view: JobView) -> tuple[list[str], list[dict[str, Any]]]:
    """The files that a job has made so far, and the facts of each; names without this machine's folders."""
    match view.result or view.latest:
        case Answer(files, facts):
            return [str(path) for path in files], [facts]
        case Gallery() as gallery:
            facts = [
                made.completion.to_dict()
                | {"source": _name_of(made.completion.source), "output": made.path.name}
                | {"job": view.id, "sample": made.completion.sample}
                for made in gallery.made
            ]
            return [str(made.path) for made in gallery.made], facts
        case Batch() as made:
            archive = view.folder / batch.ZIP_NAME
            return [str(archive)] if archive.exists() else [], list(batch.facts_of(made))
        case _:
            return [], []


def found_gallery(view: JobView) -> Gallery:
    """The gallery of a job.

    Raises:
        UserError: if the job makes none.
    """
    gallery = view.result or view.latest
    if not isinstance(gallery, Gallery):
        raise UserError(f"the job {view.title} has no samples; give one that /generate or /branch has begun")
    return gallery


def _name_of(source: Path | None) -> str | None:
    return None if source is None else source.name
