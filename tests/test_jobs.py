"""Jobs: they outlive their page, end for four reasons only, belong to one owner, and share a model fairly."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from waiting import wait_until

from app.jobs import Job, JobLimits, JobStore, UnknownJobError
from app.messages import OUR_FAULT
from app.service import Service
from app.tabs import likelihood
from app.turns import party

CANCEL_LIMIT_S = 1.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock) -> Iterator[JobStore]:
    store = JobStore(clock=clock)
    yield store
    store.close()


def endless(job: Job) -> None:
    step = 0
    while True:
        job.report(step)
        step += 1
        time.sleep(0.001)


def quick(job: Job) -> str:
    (job.folder / "made.txt").write_text("made")
    return "a result"


def ended(store: JobStore, owner: str, job_id: str):
    view = store.look(owner, job_id, wait_s=10)
    assert not view.is_running
    return view


def test_a_job_reports_and_gives_its_result(store):
    may_end = threading.Event()

    def work(job: Job) -> str:
        while not may_end.is_set():
            job.report("half")
        return "whole"

    job_id = store.submit("me", "score", "a.txt", work)
    wait_until(lambda: store.look("me", job_id).latest == "half")
    assert store.look("me", job_id).state == "running"
    may_end.set()
    view = ended(store, "me", job_id)
    assert (view.state, view.result, view.title, view.problem) == ("done", "whole", "a.txt", "")


def test_nobody_sees_or_stops_a_job_of_somebody_else(store):
    job_id = store.submit("me", "score", "a.txt", endless)
    for owner in ("", "you", "m"):
        assert store.list(owner) == []
        assert store.left_alone(owner, "score") is None
        for refused in (store.look, store.stop):
            with pytest.raises(UnknownJobError, match="no such job"):
                refused(owner, job_id)
    assert store.look("me", job_id).is_running
    assert len(job_id) >= 20


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([(599, True)] * 5, None),  # somebody looks every ten minutes
        ([(601, False)], "nobody looked at it for 10 minutes"),
        ([(500, True)] * 7 + [(101, True)], "time limit of 60 minutes"),
    ],
)
def test_time_ends_a_job_at_its_limit_or_when_nobody_looks(store, clock, steps, reason):
    job_id = store.submit("me", "score", "a.txt", endless)
    for seconds, is_seen in steps:
        clock.now += seconds
        if is_seen:
            store.look("me", job_id)
    if reason is None:
        assert store.look("me", job_id, wait_s=0.1).is_running
    else:
        view = ended(store, "me", job_id)
        assert view.state == "stopped"
        assert reason in view.problem


def test_a_list_is_no_look(store, clock):
    job_id = store.submit("me", "score", "a.txt", endless)
    clock.now += 601
    store.list("me")
    assert ended(store, "me", job_id).state == "stopped"


def test_an_empty_owner_owns_nothing(store):
    with pytest.raises(ValueError, match="needs an owner"):
        store.submit("", "score", "a.txt", quick)
    job_id = store.submit("me", "score", "a.txt", quick)
    assert store.list("") == []
    assert store.left_alone("", "score") is None
    with pytest.raises(UnknownJobError):
        store.look("", job_id)


@pytest.mark.parametrize("wrong", [None, 5, True, [1], {"a": 1}, "\ud800", "a\0", "x" * 201])
def test_what_is_no_short_text_owns_nothing_and_disturbs_nobody(store, wrong):
    with pytest.raises(ValueError, match="needs an owner"):
        store.submit(wrong, "score", "a.txt", quick)
    job_id = store.submit("me", "score", "a.txt", quick)
    assert store.list(wrong) == []
    assert store.left_alone(wrong, "score") is None
    for owner, name in ((wrong, job_id), ("me", wrong)):
        store.forget(owner, name)
        for refused in (store.look, store.stop):
            with pytest.raises(UnknownJobError, match="no such job"):
                refused(owner, name)
    assert ended(store, "me", job_id).state == "done"


def test_each_job_is_stopped_on_its_own_and_keeps_what_it_reported(store):
    first, second = (store.submit("me", "complete", name, endless) for name in "ab")
    wait_until(lambda: (store.look("me", first).latest or 0) > 2)
    store.stop("me", first)
    view = ended(store, "me", first)
    assert (view.state, view.problem) == ("stopped", "stopped")
    assert view.latest > 2
    assert store.look("me", second).is_running
    store.stop("me", first)  # again: nothing happens
    assert store.look("me", first).state == "stopped"


def test_a_stop_in_the_middle_of_a_report_is_not_lost(store, monkeypatch):
    reason_to_end = store.reason_to_end

    def stopped_meanwhile(job: Job) -> str:
        store.stop("me", job.id)
        return reason_to_end(job)

    monkeypatch.setattr(store, "reason_to_end", stopped_meanwhile)
    view = ended(store, "me", store.submit("me", "score", "a.txt", lambda job: [job.report(step) for step in range(3)]))
    assert (view.state, view.latest) == ("stopped", 0)


def test_a_failure_is_one_sentence_and_our_own_fault_is_said_to_be_ours(store, caplog):
    def refused(job: Job) -> None:
        raise ValueError("top_k=300 must lie in 1..256")

    def broken(job: Job) -> None:
        raise KeyError("oops")

    assert ended(store, "me", store.submit("me", "x", "", refused)).problem == "top_k=300 must lie in 1..256"
    view = ended(store, "me", store.submit("me", "x", "", broken))
    assert (view.state, view.problem) == ("failed", OUR_FAULT)
    assert "oops" in caplog.text


def test_results_are_kept_for_their_time_and_go_with_their_files(store, clock):
    job_id = store.submit("me", "score", "a.txt", quick)
    folder: Path = ended(store, "me", job_id).folder
    clock.now += store.limits.retention_s - 1
    assert (store.look("me", job_id).folder / "made.txt").exists()
    clock.now += 2
    assert store.list("me") == []
    assert not folder.exists()
    with pytest.raises(UnknownJobError, match="6 hours"):
        store.look("me", job_id)


def test_the_newest_results_of_an_owner_are_kept(clock):
    store = JobStore(JobLimits(max_kept_of_owner=3), clock)
    ids = [store.submit("me", "score", str(number), quick) for number in range(3)]
    for job_id in ids:
        ended(store, "me", job_id)
    others = store.submit("you", "score", "", quick)
    ended(store, "you", others)
    ids.append(store.submit("me", "score", "3", quick))
    ended(store, "me", ids[-1])
    assert [view.id for view in store.list("me")] == ids[:0:-1]
    assert len(store.list("you")) == 1
    store.close()


def test_more_jobs_than_the_machine_takes_are_refused_in_words(clock):
    store = JobStore(JobLimits(max_running=3, max_running_of_owner=2), clock)
    for _ in range(2):
        store.submit("me", "score", "", endless)
    with pytest.raises(ValueError, match="2 of your jobs"):
        store.submit("me", "score", "", endless)
    store.submit("you", "score", "", endless)
    with pytest.raises(ValueError, match="as many as this machine takes"):
        store.submit("she", "score", "", endless)
    store.close()


def test_brief_work_of_one_owner_is_bounded_and_takes_the_turns_of_its_owner(clock):
    with closing(JobStore(JobLimits(max_short=3, max_short_of_owner=2), clock)) as store, ExitStack() as at_work:
        for _ in range(2):
            at_work.enter_context(store.short_work("me"))
        assert party.get() == "me"
        with pytest.raises(ValueError, match="2 of your questions"), store.short_work("me"):
            pass
        at_work.enter_context(store.short_work("you"))
        with pytest.raises(ValueError, match="more is asked of this machine"), store.short_work("she"):
            pass
        at_work.close()
        assert party.get(None) is None
        assert not store._short
        with store.short_work("me"):
            pass


def test_a_page_that_comes_back_finds_what_nobody_looks_at(store, clock):
    job_id = store.submit("me", "complete", "a.txt", endless)
    assert store.left_alone("me", "complete") is None  # its own page has just begun to look
    clock.now += 10
    assert store.left_alone("me", "complete") == job_id
    assert store.left_alone("me", "score") is None
    store.look("me", job_id)
    assert store.left_alone("me", "complete") is None
    store.stop("me", job_id)
    clock.now += 1
    wait_until(lambda: store.list("me")[0].state == "stopped")
    assert store.left_alone("me", "complete") == job_id  # it ended unseen
    clock.now += 1
    store.look("me", job_id)
    assert store.left_alone("me", "complete") is None


def test_closing_ends_everything_and_removes_the_files(clock):
    store = JobStore(clock=clock)
    job_id = store.submit("me", "x", "", endless)
    folder = store.look("me", job_id).folder
    store.close()
    assert store.list("me")[0].state == "stopped"
    assert not folder.parent.exists()
    with pytest.raises(ValueError, match="being closed"):
        store.submit("me", "x", "", endless)


def test_a_forgotten_job_ends_and_leaves_nothing(store):
    for work in (endless, quick):
        job_id = store.submit("me", "score", "a.txt", work)
        folder = store.look("me", job_id, wait_s=0.1).folder
        store.forget("you", job_id)
        assert store.look("me", job_id).id == job_id
        store.forget("me", job_id)
        store.forget("me", job_id)
        assert store.list("me") == []
        wait_until(lambda: not folder.exists())  # noqa: B023


def test_nobody_waits_while_large_results_of_somebody_else_are_removed(store, monkeypatch):
    removing, may_go, job_id = threading.Event(), threading.Event(), store.submit("you", "score", "", quick)
    ended(store, "you", job_id)

    def slow_removal(*_: object, **__: object) -> None:
        removing.set()
        may_go.wait(10)

    monkeypatch.setattr(shutil, "rmtree", slow_removal)
    thread = threading.Thread(target=store.forget, args=("you", job_id))
    thread.start()
    assert removing.wait(10)
    mine = threading.Thread(target=lambda: ended(store, "me", store.submit("me", "score", "", quick)))
    mine.start()
    mine.join(5)
    assert not mine.is_alive()
    may_go.set()
    thread.join()


def test_a_forgotten_job_counts_until_it_is_over(clock):
    store, may_go = JobStore(JobLimits(max_running=2), clock), threading.Event()

    def deaf(job: Job) -> None:
        may_go.wait(10)

    for owner in ("me", "you"):
        job_id = store.submit(owner, "score", "", deaf)
        store.forget(owner, job_id)
        assert store.list(owner) == []
    with pytest.raises(ValueError, match="2 jobs are running"):
        store.submit("she", "score", "", quick)
    may_go.set()
    wait_until(lambda: not store._forgotten)
    ended(store, "she", store.submit("she", "score", "", quick))
    store.close()


def test_closing_ends_a_forgotten_job_too(clock):
    store, left = JobStore(clock=clock), threading.Event()

    def slow(job: Job) -> None:
        try:
            endless(job)
        finally:
            time.sleep(0.2)
            left.set()

    store.forget("me", store.submit("me", "score", "", slow))
    store.close()
    assert left.is_set()


@pytest.mark.parametrize("limits", [JobLimits(max_kept=3), JobLimits(max_kept_bytes=3 * len("made"))])
def test_results_of_all_owners_together_are_bounded_and_the_oldest_ones_go(clock, limits):
    store = JobStore(limits, clock)
    long_one = store.submit("me", "score", "", endless)
    views = []
    for number in range(5):
        clock.now += 1
        owner = f"owner {number}"
        views.append(ended(store, owner, store.submit(owner, "score", "", quick)))
    kept = [bool(store.list(f"owner {number}")) for number in range(5)]
    assert kept == [False, False, True, True, True]
    assert [view.folder.exists() for view in views] == kept
    assert store.look("me", long_one).is_running  # work is not taken away
    store.close()


def test_the_newest_result_stays_however_large_it_is(clock):
    store = JobStore(JobLimits(max_kept_bytes=1), clock)
    for number in range(2):
        clock.now += 1
        ended(store, "me", store.submit("me", "score", str(number), quick))
    assert [view.title for view in store.list("me")] == ["1"]
    store.close()


def test_more_than_one_job_may_score_is_refused_in_words(service, tmp_path):
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(likelihood.MAX_BYTES // 2 + 1)
    likelihood.scoring_work(service, [path], [None], "media", False)
    with pytest.raises(ValueError, match=r"^the files have 128,000,002 bytes together, .* at most 128,000,000 .*fewer files"):
        likelihood.scoring_work(service, [path, path], [None], "media", False)


def completing(service: Service, path: Path, num_bytes: int) -> Callable[[Job], float]:
    """The work of a completion; its result is the moment it was done."""

    def work(job: Job) -> float:
        with closing(service.complete(path, num_bytes=num_bytes).run()) as steps:
            for progress in steps:
                job.report(progress)
        return time.monotonic()

    return work


MANY_TIMES = [5, pytest.param(50, marks=pytest.mark.slow)]


@pytest.mark.parametrize("times", MANY_TIMES)
def test_stop_frees_the_model_within_a_second(store, service, make_text, times):
    lock = service.model("text").lock
    for _ in range(times):
        job_id = store.submit("me", "complete", "", completing(service, make_text(), 1_000_000))
        wait_until(lambda: store.look("me", job_id).latest is not None)  # noqa: B023
        started = time.monotonic()
        store.stop("me", job_id)
        following = store.submit("you", "complete", "", completing(service, make_text(), 1_000_000))
        wait_until(lambda: store.look("you", following).latest is not None)  # noqa: B023
        assert time.monotonic() - started < CANCEL_LIMIT_S
        assert ended(store, "me", job_id).state == "stopped"
        store.stop("you", following)
        ended(store, "you", following)
        assert not lock.locked()


@pytest.mark.parametrize("times", MANY_TIMES)
def test_a_job_that_waits_for_the_model_can_be_stopped(store, service, make_text, times):
    lock = service.model("text").lock
    for _ in range(times):
        with lock:
            job_id = store.submit("me", "complete", "", completing(service, make_text(), 1_000_000))
            wait_until(lambda: lock.is_wanted)
            started = time.monotonic()
            store.stop("me", job_id)
            assert ended(store, "me", job_id).state == "stopped"
            assert time.monotonic() - started < CANCEL_LIMIT_S
            assert not lock.is_wanted
        assert not lock.locked()


def test_a_scoring_at_work_and_one_that_waits_stop_within_a_second(store, service, make_text):
    path = make_text(content=b"The lamp was lit.\n" * 50_000)

    def work(job: Job) -> None:
        service.score_file(path, progress=lambda done, known: job.report((done, known)))

    job_id = store.submit("me", "score", "", work)
    wait_until(lambda: (store.look("me", job_id).latest or (0, 0))[0] > 0)
    started = time.monotonic()
    store.stop("me", job_id)
    ended(store, "me", job_id)
    assert time.monotonic() - started < CANCEL_LIMIT_S
    assert not service.model("text").lock.locked()
    with service.model("text").lock:
        waiting = store.submit("me", "score", "", work)
        wait_until(lambda: service.model("text").lock.is_wanted)
        store.stop("me", waiting)
        assert ended(store, "me", waiting).state == "stopped"
    assert not service.model("text").lock.locked()


def test_a_short_job_is_not_stuck_behind_the_long_ones_of_somebody_else(store, service, make_text):
    path = make_text()
    long_ones = [store.submit("busy", "complete", "", completing(service, path, 1_000_000)) for _ in range(4)]
    wait_until(lambda: all(store.look("busy", job_id).latest is not None for job_id in long_ones))
    short = store.submit("me", "complete", "", completing(service, path, 50))
    assert ended(store, "me", short).state == "done"
    assert all(store.look("busy", job_id).is_running for job_id in long_ones)
