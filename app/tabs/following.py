"""A tab and its job: submitted once, followed while the page is open, found again after a reload or on return.

A browser is known by a random text in its local storage; its jobs are its own. Each browser tab keeps the name of its job in
its session storage, so that two tabs do not mix. A tab without one takes up a job that was left alone.
"""

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from app.jobs import JobStore, JobView, UnknownJobError

FOLLOW_EVERY_S = 0.15  # often enough to look alive, seldom enough to cost the models nothing
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
# Whoever follows is answered at once and waits for no place in the queue.
AT_ONCE = QUIET | {"concurrency_limit": None}


def visitor_state() -> gr.BrowserState:
    """Who looks at the page, as an owner of jobs; `greet` fills it."""
    return gr.BrowserState("", storage_key="megabyte-visitor")


def greet(visitor: str | None) -> str:
    """The visitor's own secret name, a new one on the first visit."""
    return visitor or secrets.token_urlsafe(16)


def remember_tab(page: gr.Blocks, tabs: gr.Tabs) -> None:
    """A reload comes back to the tab that was open."""
    # The first tab is selected while the page loads, before the one that was open has been looked up.
    remember = "() => {{ if (window.tabIsRecalled) sessionStorage.setItem('megabyte-tab', '{}'); }}"
    recall = "() => { window.tabIsRecalled = true; return [sessionStorage.getItem('megabyte-tab') ?? '']; }"
    for tab in tabs.children:
        tab.select(None, None, None, js=remember.format(tab.id), **QUIET)
    chosen = gr.Textbox("", visible=False)
    page.load(lambda tab: gr.Tabs(selected=tab) if tab else gr.skip(), chosen, tabs, js=recall, **AT_ONCE)


def follower(store: JobStore, show: Callable[[JobView], Any]) -> Callable[[str, str], Iterator[Any]]:
    """An event handler that shows a visitor's job, again and again, until it is over."""

    def steps(visitor: str, job_id: str) -> Iterator[Any]:
        yield gr.skip()  # Gradio empties the outputs of a handler that yields nothing
        num_shown = -1  # reports
        while job_id:
            try:
                view = store.look(visitor, job_id, wait_s=0.0 if num_shown < 0 else FOLLOW_EVERY_S)
            except UnknownJobError:
                return  # its time is over
            if not view.is_running or view.num_reports > num_shown:
                num_shown = view.num_reports
                yield show(view)
            if not view.is_running:
                return

    return steps


class JobLink:
    """What ties a tab to one kind of job.

    Attributes:
        job: a hidden field with the name of the tab's job, or an empty text.
    """

    def __init__(self, store: JobStore, kind: str, visitor: gr.BrowserState) -> None:
        self.store = store
        self.kind = kind
        self.visitor = visitor
        self.job = gr.Textbox("", visible=False)

    def connect(self, started: Any, arrived: Any, show: Callable[[JobView], Any], outputs: list[Any], stop: gr.Button) -> None:
        """Follows the job that `started` submits, and after `arrived`, the page's load, the one that was left.

        Args:
            started: the event that puts the name of a new job into `job`.
            arrived: the event after which the visitor is known.
            show: what the outputs show of a job.
            stop: ends the job.
        """
        remember = f"(job) => {{ sessionStorage.setItem('megabyte-{self.kind}', job); }}"
        recall = f"(visitor, job) => [visitor, sessionStorage.getItem('megabyte-{self.kind}') ?? '']"
        inputs = [self.visitor, self.job]
        started.success(None, self.job, None, js=remember, **QUIET)
        found = arrived.then(self._find, inputs, self.job, js=recall, **AT_ONCE)
        found.then(None, self.job, None, js=remember, **QUIET)
        for event in (started.success, found.then):
            event(follower(self.store, show), inputs, outputs, **AT_ONCE)
        stop.click(self._stop, inputs, None, **AT_ONCE)

    def _find(self, visitor: str, job_id: str) -> str:
        try:
            return self.store.look(visitor, job_id).id
        except UnknownJobError:
            return self.store.left_alone(visitor, self.kind) or ""

    def _stop(self, visitor: str, job_id: str) -> None:
        try:
            self.store.stop(visitor, job_id)
        except UnknownJobError:
            return  # it is over and gone
