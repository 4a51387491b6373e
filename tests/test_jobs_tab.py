"""The Jobs tab without a browser: a visitor's own jobs, newest first, and how long they are kept."""

import json

from app.jobs import Job
from app.tabs.jobs import listed


def test_a_visitor_sees_the_own_jobs_newest_first(store):
    def refused(job: Job) -> None:
        raise ValueError("the file is empty")

    ids = [store.submit("me", "batch", name, work) for name, work in (("a", lambda job: 1), ("b", refused))]
    store.submit("you", "complete", "c", lambda job: 1)
    for job_id in ids:
        store.look("me", job_id, wait_s=10)
    value = listed(store, "me")
    assert [(job["title"], job["state"], job["tab"]) for job in value["jobs"]] == [
        ("b", "failed", "Batch"),
        ("a", "done", "Batch"),
    ]
    assert value["jobs"][0]["problem"] == "the file is empty"
    assert json.dumps(value)
    assert listed(store, "")["jobs"] == []


def test_the_retention_is_stated(store):
    assert "6 hours" in listed(store, "me")["note"]
    assert "10 minutes" in listed(store, "me")["note"]
