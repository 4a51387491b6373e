"""Turns at a model: nobody is locked out, nobody gets two turns while another party waits, and sharing changes no byte."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
from waiting import wait_until

from app import turns
from app.turns import FairLock, Turn, party


def in_thread(work: Callable[[], object], name: str | None = None) -> threading.Thread:
    def run() -> None:
        if name is not None:
            party.set(name)
        work()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def order_of_turns(names: list[str], each: int = 1) -> list[str]:
    """Who gets the lock after whom, if threads of these parties begin to wait in this order and all want it `each` times."""
    lock, order, left = FairLock(), [], [each] * len(names)

    def work(own: int) -> None:
        for _ in range(each):
            with lock:
                order.append(names[own])
                left[own] -= 1
                # Whoever had a turn before is waiting again when this one ends.
                wait_until(lambda: len(lock._waiting) == sum(left[n] > 0 for n in range(len(names)) if n != own))

    with lock:
        threads = []
        for number, name in enumerate(names):
            threads.append(in_thread(lambda number=number: work(number), name))
            wait_until(lambda number=number: len(lock._waiting) == number + 1)
    for thread in threads:
        thread.join()
    return order


def test_turns_go_round_among_parties_and_not_among_threads():
    assert order_of_turns(["busy", "busy", "busy", "rare"])[:2] == ["busy", "rare"]


def test_a_party_that_comes_back_waits_for_the_others():
    order = order_of_turns(["a", "b", "c"], each=5)
    assert order == ["a", "b", "c"] * 5


def test_waiting_ends_at_its_limit_and_takes_nothing():
    lock = FairLock()
    with lock:
        results: list[bool] = []
        waiting = in_thread(lambda: results.append(lock.acquire(0.01)))
        waiting.join()
        assert results == [False]
        assert not lock.is_wanted
    assert not lock.locked()


def test_a_slice_is_kept_until_it_is_over_and_then_given_away(monkeypatch):
    monkeypatch.setattr(turns, "SLICE_S", 0.05)
    lock, counts = FairLock(), Counter()
    ends = time.monotonic() + 0.5

    def work(name: str) -> None:
        with Turn(lock) as turn:
            while time.monotonic() < ends:
                if turn.take():
                    counts[name] += 1
                    time.sleep(0.001)

    threads = [in_thread(lambda name=name: work(name)) for name in "ab"]
    for thread in threads:
        thread.join()
    assert min(counts.values()) > 0.3 * sum(counts.values())
    assert not lock.locked()


def test_a_short_completion_passes_a_long_one(service, make_text):
    path = make_text()
    is_short_done = threading.Event()

    def long_work() -> None:
        with closing(service.complete(path, num_bytes=1_000_000).run()) as steps:
            for _ in steps:
                if is_short_done.is_set():
                    return
        raise AssertionError("the long one came to its end first")

    thread = in_thread(long_work)
    wait_until(service.model("text").lock.locked)
    list(service.complete(path, num_bytes=50).run())
    is_short_done.set()
    thread.join(timeout=5)
    assert not thread.is_alive()


@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
def test_completions_and_scores_that_share_a_model_are_those_made_alone(service, request, monkeypatch, make):
    monkeypatch.setattr(turns, "SLICE_S", 0.0)  # a turn for every step
    path = request.getfixturevalue(make)()

    def completed(seed: int) -> np.ndarray:
        job = service.complete(path, num_bytes=96, seed=seed)
        list(job.run())
        return job.results[0].bits

    def scored(_: int) -> np.ndarray:
        return service.score_file(path).bits

    tasks = [(completed, 0), (completed, 1), (scored, 0), (completed, 2)]
    alone = [task(seed) for task, seed in tasks]
    together: dict[int, np.ndarray] = {}
    threads = [in_thread(lambda n=n: together.update({n: tasks[n][0](tasks[n][1])})) for n in range(len(tasks))]
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        np.testing.assert_array_equal(together[number], expected)
