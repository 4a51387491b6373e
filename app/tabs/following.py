"""A tab and its job: submitted once, followed while the page is open, found again after a reload or on return.

A browser is known by a random text in its local storage; its jobs are its own. Each browser tab keeps the name of its job in
its session storage, so that two tabs do not mix. A tab without one takes up a job that was left alone.
"""

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from app.jobs import JobStore, JobView, UnknownJobError, is_owner
from app.tabs.newest import Newest
from app.tabs.refusals import reworded

# A job is shown anew after a tenth of its age, within these bounds: often enough to look alive, seldom enough to leave a page
# on a busy machine time for whoever uses it.
FOLLOW_EVERY_S = (0.15, 0.5)
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
# Whoever follows is answered at once and waits for no place in the queue.
AT_ONCE = QUIET | {"concurrency_limit": None}


def visitor_state() -> gr.BrowserState:
    """Who looks at the page, as an owner of jobs; `greet` fills it."""
    return gr.BrowserState("", storage_key="megabyte-visitor")


def greet(visitor: Any) -> str:
    """The visitor's own secret name, a new one on the first visit or in place of what is none."""
    return visitor if is_owner(visitor) else secrets.token_urlsafe(16)


def remember_tab(page: gr.Blocks, tabs: gr.Tabs) -> None:
    """A reload comes back to the tab that was open."""
    # The first tab is selected while the page loads, before the one that was open has been looked up.
    remember = "() => {{ if (window.tabIsRecalled) sessionStorage.setItem('megabyte-tab', '{}'); }}"
    recall = "() => { window.tabIsRecalled = true; return [sessionStorage.getItem('megabyte-tab') ?? '']; }"
    for tab in tabs.children:
        tab.select(None, None, None, js=remember.format(tab.id), **QUIET)
    chosen = gr.Textbox("", visible=False)
    known = {tab.id for tab in tabs.children}
    page.load(lambda tab: gr.Tabs(selected=tab) if tab in known else gr.skip(), chosen, tabs, js=recall, **AT_ONCE)


Display = Callable[[JobView], Any]  # what the outputs of a tab show of a job


def follower(
    store: JobStore, new_display: Callable[[], Display], nothing: Any = None
) -> Callable[[str, str, gr.Request], Iterator[Any]]:
    """An event handler that shows a visitor's job, again and again, until it is over or the page follows another.

    Args:
        new_display: makes the display of one follower, which may remember what it has shown.
        nothing: what the outputs show without a job; None leaves them as they are.

    The handler raises gr.Error: at the end of a job that failed.
    """

    newest = Newest()

    def steps(visitor: str, job_id: str, request: gr.Request) -> Iterator[Any]:
        with newest.begin(request) as goes_on:
            yield gr.skip() if job_id or nothing is None else nothing  # Gradio empties outputs if a handler yields nothing
            display, num_shown, wait_s = new_display(), -1, 0.0  # reports
            while job_id:
                try:
                    view = store.look(visitor, job_id, wait_s)
                except UnknownJobError:
                    return  # its time is over
                if not goes_on():
                    return
                wait_s = min(max(view.seconds / 10, FOLLOW_EVERY_S[0]), FOLLOW_EVERY_S[1])
                if not view.is_running or view.num_reports > num_shown:
                    num_shown = view.num_reports
                    yield display(view)
                if view.state == "failed":
                    raise gr.Error(reworded(view.problem), print_exception=False)
                if not view.is_running:
                    return

    return steps


class JobLink:
    """What ties a tab to one kind of job.

    Attributes:
        job: the name of the tab's job, or an empty text; hidden on the page, where scripts can read it.
        now: the same, and whatever puts another name there makes the tab follow that job.
        inputs: the visitor and the job.
        outputs: what a handler fills that submits a job: both `job` and `now`, so it returns the name twice.
    """

    def __init__(self, store: JobStore, kind: str, visitor: gr.BrowserState) -> None:
        self.store = store
        self.kind = kind
        self.job = gr.Textbox("", visible=False)
        self.now = gr.State("")
        self.inputs = [visitor, self.job]
        self.outputs = [self.job, self.now]
        self._visitor = visitor

    def follow(self, new_display: Callable[[], Display], outputs: list[Any], nothing: Any = None) -> None:
        """Shows in `outputs` the job that `now` names."""
        steps = follower(self.store, new_display, nothing)
        self.now.change(steps, [self._visitor, self.now], outputs, trigger_mode="multiple", **AT_ONCE)

    def remember(self, submitted: Any) -> None:
        """Notes in the browser's tab the job that an event has submitted."""
        submitted.success(None, self.job, None, js=self._remember, **QUIET)

    def take_up(self, arrived: Any) -> None:
        """Finds the tab's job after `arrived`, an event after which the visitor is known."""
        recall = f"(visitor, job) => [visitor, sessionStorage.getItem('megabyte-{self.kind}') ?? '']"
        found = arrived.then(self._find, self.inputs, self.outputs, js=recall, **AT_ONCE)
        found.then(None, self.job, None, js=self._remember, **QUIET)

    def stop(self, visitor: str, job_id: str) -> None:
        """The handler of a Stop button, which takes `inputs`."""
        try:
            self.store.stop(visitor, job_id)
        except UnknownJobError:
            return  # it is over and gone

    @property
    def _remember(self) -> str:
        return f"(job) => {{ sessionStorage.setItem('megabyte-{self.kind}', job); }}"

    def _find(self, visitor: str, job_id: str) -> tuple[Any, Any]:
        try:
            found = self.store.look(visitor, job_id).id
        except UnknownJobError:
            found = self.store.left_alone(visitor, self.kind)
        # Without a find nothing is emptied: on a slow connection a job may have been submitted here meanwhile.
        return (found, found) if found else (gr.skip(), gr.skip())
