"""The time that a plan says is the time that its samples take, on a machine with a clock of its own."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from app.service import Service
from core.law import Chunk
from core.models import ByteModel
from core.sample import Request

CORES = 2


class Machine:
    """Makes 16 bytes at a time of as many samples as it has cores; each of two at once takes longer than one alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds_of_byte = {1: 1.0, 2: 1.6}
        self.is_joint = False  # the bytes of two come at the same time

    def stream_batch(self, model: ByteModel, requests: Sequence[Request]) -> Iterator[tuple[int, Chunk]]:
        waiting, left = deque(range(len(requests))), [request.num_bytes for request in requests]
        running: list[int] = []
        while waiting or running:
            while waiting and len(running) < CORES:
                running.append(waiting.popleft())
                self.now += 5.0  # its prefix is read
            sizes = {index: min(16, left[index]) for index in running}
            seconds = [size * self.seconds_of_byte[len(running)] / len(running) for size in sizes.values()]
            for (index, size), own_seconds in zip(sizes.items(), [sum(seconds), 0] if self.is_joint else seconds, strict=False):
                self.now += own_seconds
                left[index] -= size
                yield index, Chunk(np.zeros(size, np.uint8), np.zeros(size, np.float32))
            running = [index for index in running if left[index]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    for module in ("app.store", "app.completion"):
        monkeypatch.setattr(f"{module}.stream_batch", machine.stream_batch)
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(perf_counter=lambda: machine.now))
    monkeypatch.setattr("app.store.num_at_once", lambda model: CORES)
    monkeypatch.setattr("app.completion.prepare", lambda model: iter(()))  # building the decoder takes other time
    return machine


@pytest.fixture
def service(tiny_models) -> Service:
    return Service(weights=tiny_models, runs=tiny_models / "no-runs")


def said_and_taken(service: Service, machine: Machine, num_samples: int) -> tuple[float, float]:
    job = service.complete(None, text=b"The lamp", samples=num_samples, num_bytes=640)
    said, started = job.estimate_seconds, machine.now
    list(job.run())
    return said, machine.now - started


@pytest.mark.parametrize("is_joint", [False, True])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 8])
def test_the_first_estimate_is_measured_with_as_many_samples_as_are_made_at_once(service, machine, num_samples, is_joint):
    machine.is_joint = is_joint
    said, taken = said_and_taken(service, machine, num_samples)
    assert 0.95 * taken < said < 1.05 * taken


@pytest.mark.parametrize("num_samples", [1, 2, 3, 8])
def test_the_next_estimate_is_what_the_last_work_took(service, machine, num_samples):
    said_and_taken(service, machine, num_samples)
    machine.seconds_of_byte = {1: 3.0, 2: 5.0}  # somebody else works here now
    _, before = said_and_taken(service, machine, num_samples)
    said, taken = said_and_taken(service, machine, num_samples)
    assert said == pytest.approx(before)
    assert taken == pytest.approx(before)


def test_work_of_others_that_takes_turns_is_in_the_estimate(service, machine):
    def said() -> float:
        return service.complete(None, text=b"The lamp", num_bytes=640).estimate_seconds

    alone = said()
    with service.model("text").lock:
        assert said() == pytest.approx(2 * alone)
    assert said() == pytest.approx(alone)


def test_a_context_with_room_for_the_first_bytes_alone_has_a_pace(service, machine):
    loaded = service.model(next(model.path for model in service.models() if model.modality == "text"))
    loaded.info = replace(loaded.info, max_seq_len=2 * loaded.info.patch_size)
    num_bytes = loaded.info.patch_size
    assert loaded.estimate_seconds(1, num_bytes) == pytest.approx(5 + num_bytes)
