"""Events of which only the newest goes on in each open page."""

import threading
from collections.abc import Iterator

import gradio as gr
import pytest
from waiting import wait_until

from app.tabs.following import follower
from app.tabs.newest import Newest


def page(name: str | None) -> gr.Request:
    return gr.Request(session_hash=name)


@pytest.mark.parametrize(("one", "other", "goes_on"), [("a", "a", False), ("a", "b", True), (None, None, True)])
def test_a_new_event_replaces_the_earlier_one_of_the_same_page_alone(one, other, goes_on):
    newest, replacing = Newest(), threading.Event()

    def replace() -> None:
        with newest.begin(page(other)) as other_goes_on:
            assert other_goes_on()
            order.append("new")
        replacing.set()

    order: list[str] = []
    with newest.begin(page(one)) as one_goes_on:
        thread = threading.Thread(target=replace)
        thread.start()
        if goes_on:
            assert replacing.wait(10)
        else:
            wait_until(lambda: not one_goes_on())
            order.append("old")
        assert one_goes_on() == goes_on
    thread.join(10)
    assert order == (["new"] if goes_on else ["old", "new"])


def test_an_event_that_is_left_without_an_end_of_its_own_is_forgotten():
    newest = Newest()

    def steps() -> Iterator[int]:
        with newest.begin(page("a")):
            yield 1

    left = steps()
    next(left)
    left.close()
    with newest.begin(page("a")) as goes_on:
        assert goes_on()
    assert newest._running == {}


def test_a_page_that_follows_another_job_is_shown_no_more_of_the_one_before(store):
    is_shown, may_end = threading.Event(), threading.Event()

    def work(job) -> None:
        while not may_end.wait(0.01):
            job.report("old")

    def follow(job_id: str) -> None:
        for seen in steps("me", job_id, page("a")):
            shown.append(seen)
            if seen == "old":
                is_shown.set()

    steps = follower(store, lambda: lambda view: view.result or view.latest)
    shown: list[str] = []
    old, new = store.submit("me", "any", "old", work), store.submit("me", "any", "new", lambda job: "new")
    first = threading.Thread(target=follow, args=(old,))
    first.start()
    assert is_shown.wait(10)
    follow(new)
    assert shown[-1] == "new"
    assert store.look("me", old).is_running
    first.join(10)
    may_end.set()
    assert shown[-1] == "new"
