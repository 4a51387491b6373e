"""Jobs: work that goes on when whoever asked for it has closed the page, found again by its owner and by nobody else.

Every job has a thread; they take turns at the models (`app.turns`), one owner after another. A job ends by itself, by
`stop`, at the time limit, or when nobody has looked at it for ten minutes. It notices at its next `report`.
"""

import logging
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from app.messages import OUR_FAULT, plain_sentence
from app.turns import party

State = Literal["running", "done", "failed", "stopped"]
Work = Callable[["Job"], Any]

STOPPED = "stopped"
MAX_OWNER_LENGTH = 200
_GONE_AFTER_S = 1.5  # who watches a job looks several times a second
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """How long jobs and their results live, and how many there may be."""

    time_limit_s: float = 3600.0  # of a running job
    unseen_s: float = 600.0  # a running job that nobody looks at ends after this
    retention_s: float = 6 * 3600.0  # results are kept this long after the end
    max_running: int = 64
    max_running_of_owner: int = 8
    max_short: int = 32
    max_short_of_owner: int = 2
    max_kept_of_owner: int = 20  # older results go
    max_kept: int = 200  # over all owners
    max_kept_bytes: int = 4 << 30  # of files over all owners; the newest result stays whatever its size


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A job as it is at one moment.

    Attributes:
        latest: what the work reported last; it stays when a job is stopped.
        num_reports: how often it has reported, to tell whether there is news.
        result: what the work gave when it was done.
        problem: why it failed or was stopped, in one plain sentence.
        seconds: how long it has been running, or ran.
    """

    id: str
    kind: str
    title: str
    state: State
    latest: Any
    num_reports: int
    result: Any
    problem: str
    seconds: float
    folder: Path

    @property
    def is_running(self) -> bool:
        return self.state == "running"


def is_owner(value: Any) -> bool:
    """Whether a value that came from outside can own jobs: a short text that can be written down."""
    return isinstance(value, str) and 0 < len(value) <= MAX_OWNER_LENGTH and value.isprintable()


class JobEndedError(Exception):
    """Raised inside the work of a job that is to end; the work lets go of everything and lets it pass."""


class UnknownJobError(ValueError):
    """There is no such job, or it belongs to somebody else: nobody can tell which."""


class Job:
    """One job, as its own work sees it.

    Attributes:
        folder: for the files of its results; it goes with the job.
    """

    def __init__(self, store: "JobStore", owner: str, kind: str, title: str, folder: Path, now: float) -> None:
        self.id = folder.name
        self.owner = owner
        self.kind = kind
        self.title = title
        self.folder = folder
        self.state: State = "running"
        self.latest: Any = None
        self.num_reports = 0
        self.result: Any = None
        self.problem = ""
        self.started = self.seen = now
        self.ended: float | None = None
        self.num_bytes = 0  # of its files, once it is over
        self.is_over = threading.Event()
        self.must_end = ""  # the reason, once there is one
        self._store = store

    def report(self, latest: Any) -> None:
        """Says how far the work is.

        Raises:
            JobEndedError: if the job is to end.
        """
        self.latest = latest
        self.num_reports += 1
        if reason := self._store.reason_to_end(self):
            self.must_end = self.must_end or reason
        if self.must_end:
            raise JobEndedError

    def view(self, now: float) -> JobView:
        names = {field.name for field in fields(JobView)} - {"seconds"}
        return JobView(seconds=(self.ended or now) - self.started, **{name: getattr(self, name) for name in names})


class JobStore:
    """The jobs of everybody. An owner is any text that only its bearer knows."""

    def __init__(self, limits: JobLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or JobLimits()
        self._clock = clock
        self._jobs: dict[str, Job] = {}  # oldest first
        self._short: Counter[str] = Counter()  # short work of each owner
        self._forgotten: set[Job] = set()  # at work until they notice; nobody can find them any more
        self._mutex = threading.Lock()
        self._is_closed = False
        self._folder = tempfile.TemporaryDirectory(prefix="jobs-", ignore_cleanup_errors=True)

    def submit(self, owner: str, kind: str, title: str, work: Work) -> str:
        """Starts a job and gives its name. `work` reports through the job it is given and returns the result.

        Raises:
            ValueError: if there are too many jobs already, the store is closed, or the owner is none (`is_owner`).
        """
        if not is_owner(owner):
            raise ValueError("work needs an owner; reload the page and ask again")
        self._forget_old()
        with self._mutex:
            if self._is_closed:
                raise ValueError("this page is being closed and takes no more work")
            running = [job for job in (*self._jobs.values(), *self._forgotten) if not job.is_over.is_set()]
            if len(running) >= self.limits.max_running:
                raise ValueError(f"{len(running)} jobs are running, which is as many as this machine takes; try again soon")
            num_own = sum(job.owner == owner for job in running)
            if num_own >= self.limits.max_running_of_owner:
                raise ValueError(f"{num_own} of your jobs are running; stop one or wait for it")
            folder = Path(self._folder.name, secrets.token_urlsafe(16))
            folder.mkdir()
            job = Job(self, owner, kind, title, folder, self._clock())
            self._jobs[job.id] = job
        threading.Thread(target=self._run, args=(job, work), name=f"job {kind}", daemon=True).start()
        return job.id

    @contextmanager
    def short_work(self, owner: str) -> Iterator[None]:
        """Work within the block that takes a moment and is no job; its turns at the models are those of the owner's jobs.

        Raises:
            ValueError: if there is too much of it already.
        """
        with self._mutex:
            if self._short.total() >= self.limits.max_short:
                raise ValueError("more is asked of this machine than it can answer; try again soon")
            if self._short[owner] >= self.limits.max_short_of_owner:
                raise ValueError(f"{self._short[owner]} of your questions are at work; wait for an answer and ask again")
            self._short[owner] += 1
        token = party.set(owner)
        try:
            yield
        finally:
            party.reset(token)
            with self._mutex:
                self._short -= Counter([owner])  # which forgets those of whom there is none left

    def look(self, owner: str, job_id: str | None, wait_s: float = 0.0) -> JobView:
        """A job as it is now, or when it ends if that happens within `wait_s` seconds; looking keeps it alive.

        Raises:
            UnknownJobError: if the owner has no such job.
        """
        job = self._find(owner, job_id)
        job.is_over.wait(wait_s)
        job.seen = self._clock()
        return job.view(self._clock())

    def stop(self, owner: str, job_id: str | None) -> None:
        """Ends a job at its next report; one that is over stays as it is.

        Raises:
            UnknownJobError: if the owner has no such job.
        """
        job = self._find(owner, job_id)
        job.must_end = job.must_end or STOPPED

    def forget(self, owner: str, job_id: str | None) -> None:
        """Ends a job if need be and removes its result and its files; an unknown one is forgotten already."""
        try:
            job = self._find(owner, job_id)
        except UnknownJobError:
            return
        job.must_end = job.must_end or STOPPED
        with self._mutex:
            self._jobs.pop(job.id, None)
            if not (is_over := job.is_over.is_set()):
                self._forgotten.add(job)
        if is_over:
            shutil.rmtree(job.folder, ignore_errors=True)

    def list(self, owner: str) -> list[JobView]:
        """The jobs of an owner, newest first. This is no look: a list is shown to whoever returns."""
        self._forget_old()
        now = self._clock()
        with self._mutex:
            return [job.view(now) for job in reversed(self._jobs.values()) if job.owner == owner]

    def left_alone(self, owner: str, kind: str) -> str | None:
        """The newest job of a kind whose end nobody has seen and at which nobody looks now: for a page that comes back."""
        now = self._clock()
        with self._mutex:
            for job in reversed(self._jobs.values()):
                is_watched = now - job.seen < _GONE_AFTER_S if job.ended is None else job.seen >= job.ended
                if (job.owner, job.kind) == (owner, kind) and not is_watched:
                    return job.id
        return None

    def reason_to_end(self, job: Job) -> str:
        """Why a running job has to end now, apart from being stopped; an empty text if it has not."""
        now, limits = self._clock(), self.limits
        if now - job.started >= limits.time_limit_s:
            return f"ended at the time limit of {limits.time_limit_s / 60:.0f} minutes"
        if now - job.seen >= limits.unseen_s:
            return f"ended because nobody looked at it for {limits.unseen_s / 60:.0f} minutes"
        return ""

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends all jobs and removes their files; nothing more can be submitted."""
        with self._mutex:
            self._is_closed = True
            jobs = (*self._jobs.values(), *self._forgotten)
        for job in jobs:
            job.must_end = job.must_end or STOPPED
        deadline = time.monotonic() + timeout_s
        for job in jobs:
            job.is_over.wait(max(0.0, deadline - time.monotonic()))
        self._folder.cleanup()

    def _run(self, job: Job, work: Work) -> None:
        party.set(job.owner)
        try:
            job.result = work(job)
            state: State = "done"
        except JobEndedError:
            state, job.problem = "stopped", job.must_end
        except (ValueError, OSError) as error:
            state, job.problem = "failed", plain_sentence(error, None)
        except Exception:
            logger.exception("the job %s failed", job.kind)
            state, job.problem = "failed", OUR_FAULT
        job.num_bytes = _size_of(job.folder)
        job.ended = self._clock()
        job.state = state
        with self._mutex:
            job.is_over.set()
            self._forgotten.discard(job)
            is_forgotten = job.id not in self._jobs
        if is_forgotten:
            shutil.rmtree(job.folder, ignore_errors=True)

    def _find(self, owner: str, job_id: str | None) -> Job:
        self._forget_old()
        job = self._jobs.get(job_id) if isinstance(job_id, str) and is_owner(owner) else None
        if job is None or not secrets.compare_digest(job.owner.encode(), owner.encode()):
            hours = self.limits.retention_s / 3600
            raise UnknownJobError(f"there is no such job here; results are kept for {hours:.0f} hours")
        return job

    def _forget_old(self) -> None:
        """Removes the jobs that are over and past their time, and the oldest ones where an owner, or all, keep too much."""
        limits, oldest_end = self.limits, self._clock() - self.limits.retention_s
        kept_of_owner: Counter[str] = Counter()
        num_kept = num_bytes = 0
        gone: list[Path] = []
        with self._mutex:
            ended = [job for job in self._jobs.values() if job.is_over.is_set()]
            for job in sorted(reversed(ended), key=lambda job: job.ended, reverse=True):
                is_too_much = (
                    kept_of_owner[job.owner] >= limits.max_kept_of_owner
                    or num_kept >= limits.max_kept
                    or (num_kept > 0 and num_bytes + job.num_bytes > limits.max_kept_bytes)
                )
                if job.ended < oldest_end or is_too_much:
                    del self._jobs[job.id]
                    gone.append(job.folder)
                else:
                    kept_of_owner[job.owner] += 1
                    num_kept, num_bytes = num_kept + 1, num_bytes + job.num_bytes
        for folder in gone:  # large ones take a while, which nobody else should wait for
            shutil.rmtree(folder, ignore_errors=True)


def _size_of(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if it is being removed."""
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        return 0
