"""The Jobs tab: everything this browser has asked for, whether or not a page still shows it."""

from contextlib import suppress
from typing import Any

import gradio as gr

from app.jobs import JobStore, UnknownJobError
from app.messages import duration
from app.tabs.following import AT_ONCE
from app.tabs.refusals import event_value, refusals_shown
from app.views import factory

REFRESH_EVERY_S = 1.0


def build_tab(store: JobStore, visitor: gr.BrowserState, tabs: gr.Tabs, tab: gr.Tab) -> None:
    """Lays out the tab inside the current `gr.Tab`, which is `tab`, and connects it; it is kept fresh while it is open."""
    view = factory.jobs_view(listed(store, ""))
    timer = gr.Timer(REFRESH_EVERY_S, active=False)

    def show(visitor: str) -> dict[str, Any]:
        return listed(store, visitor)

    def stop(visitor: str, event: gr.EventData) -> dict[str, Any]:
        with refusals_shown(), suppress(UnknownJobError):  # it is gone, as the list will show
            job_id = event_value(event, "id", str)
            store.stop(visitor, job_id)
            store.look(visitor, job_id, wait_s=REFRESH_EVERY_S)
        return listed(store, visitor)

    def refresh_if_open(event: gr.EventData) -> gr.Timer:
        with refusals_shown():
            return gr.Timer(active=event_value(event, "value", str) == tab.label)

    tab.select(show, visitor, view, **AT_ONCE)
    tabs.select(refresh_if_open, None, timer, **AT_ONCE)
    timer.tick(show, visitor, view, **AT_ONCE)
    view.stop(stop, visitor, view, **AT_ONCE)


def listed(store: JobStore, visitor: str) -> dict[str, Any]:
    """What the view shows of a visitor's jobs."""
    limits = store.limits
    jobs = [
        {"id": job.id, "kind": job.kind, "tab": job.kind.capitalize(), "title": job.title, "state": job.state,
         "problem": job.problem, "time": duration(job.seconds)}
        for job in store.list(visitor)
    ]  # fmt: skip
    return {
        "jobs": jobs,
        "title": "No jobs yet",
        "text": "What you start in the other tabs is listed here, also after a reload or when its tab was closed.",
        "note": f"Results stay on the machine that serves this page for {limits.retention_s / 3600:.0f} hours, your newest "
        f"{limits.max_kept_of_owner} of them; scores go when their tab scores something else. "
        f"Work ends after {limits.time_limit_s / 60:.0f} minutes, or when no page has "
        f"shown it for {limits.unseen_s / 60:.0f} minutes.",
    }
