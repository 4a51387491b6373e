"""Many completions into one folder: what each will cost, made in turn, none stopped by another's fault, none made twice."""

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.completion import MAX_TOGETHER, Completion, CompletionJob, Progress, run_together
from app.ledger import LEDGER_NAME, Ledger, digest_of, key_of, open_ledger
from app.messages import OUR_FAULT, plain_sentence
from app.outputs import OutputNames, completion_paths, with_sidecar
from app.recipe import Item
from app.service import Service

State = Literal["planned", "running", "done", "skipped", "failed"]
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Row:
    """One item of a batch and how far it is.

    Attributes:
        says: the plan in words, or why it failed.
        num_bytes: bytes to make in all its samples; `done_bytes` are made.
        made: facts of the finished samples, as `Completion.to_dict` has them, by the sample's number.
        notes: what was done to the file before its first part was kept, in words.
    """

    item: Item
    stem: str
    state: State = "planned"
    says: str = ""
    num_bytes: int = 0
    done_bytes: int = 0
    estimate_seconds: float = 0.0
    made: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def results(self) -> list[dict[str, Any]]:
        """The facts of the finished samples in the order of their numbers."""
        return [self.made[sample] for sample in sorted(self.made)]

    def fail(self, error: Exception | str) -> None:
        """Notes why the item cannot be done; the traceback of a fault of the program goes to the log."""
        self.state = "failed"
        if isinstance(error, str):
            self.says = error
        elif isinstance(error, (ValueError, OSError)):
            self.says = plain_sentence(error, self.item.source)
        else:
            logger.error("an item of a batch failed", exc_info=error)
            self.says = OUR_FAULT

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        source = None if self.item.source is None else str(self.item.source)
        facts = {"job": self.item.job, "source": source, "state": self.state, "num_bytes": self.num_bytes}
        return facts | (
            {"error": self.says} if self.state == "failed" else {"outputs": [made["output"] for made in self.results]}
        )


@dataclass(frozen=True)
class _Task:
    """One sample that is still to be made."""

    row: Row
    job: CompletionJob
    sample: int
    paths: list[Path]  # the sample's own file first
    key: str

    @property
    def name(self) -> str:
        return self.paths[0].name


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The counts of a batch."""

    done: int
    skipped: int
    failed: int
    num_samples: int
    num_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


class Batch:
    """A list of items and the folder for their results.

    Attributes:
        rows: the items and how far each is, in their order.
    """

    def __init__(self, service: Service, items: Sequence[Item], out: Path, *, resume: bool = False, force: bool = False) -> None:
        """Reads and makes nothing yet.

        Args:
            resume: leave results alone that lie in `out` and are those this batch would make.
            force: overwrite other results.
        """
        self._service = service
        self._out = out
        self._resume = resume
        self._force = force
        self._outputs = OutputNames([item.source for item in items])
        self.rows = [Row(item=item, stem=stem) for item, (_, stem) in zip(items, self._outputs.stems(), strict=True)]
        self._started = time.perf_counter()

    @property
    def summary(self) -> Summary:
        states = [row.state for row in self.rows]
        results = [facts for row in self.rows for facts in row.results]
        return Summary(
            **{state: states.count(state) for state in ("done", "skipped", "failed")},
            num_samples=len(results),
            num_bytes=sum(facts["num_bytes_generated"] for facts in results),
            seconds=round(time.perf_counter() - self._started, 3),
        )

    def plan(self) -> Iterator[Row]:
        """Each row with what it will make and about how long that takes; nothing is written."""
        for row in self.rows:
            if (job := self._prepare(row)) is not None:
                row.estimate_seconds = job.estimate_seconds
            yield row

    def run(self) -> Iterator[tuple[Row, Progress | None]]:
        """Makes what is missing. Each step is a row that has changed, with the progress of its sample if one is at work.

        Raises:
            ValueError: if nothing can be written to the folder.
        """
        self._outputs.protect_sources([self._out / LEDGER_NAME])
        with open_ledger(self._out, resume=self._resume, force=self._force) as ledger:
            waiting: dict[int, list[_Task]] = {}  # of each model
            for row in self.rows:
                job = self._prepare(row)
                tasks = [] if job is None else self._tasks(row, job, ledger)
                yield row, None
                if not tasks:
                    continue
                group = waiting.setdefault(id(job.loaded), [])
                group.extend(tasks)
                while len(group) >= MAX_TOGETHER:
                    first, group[:] = group[:MAX_TOGETHER], group[MAX_TOGETHER:]
                    yield from self._make(first, ledger)
            for group in waiting.values():
                yield from self._make(group, ledger)

    def _prepare(self, row: Row) -> CompletionJob | None:
        """The job of a row with its plan filled in; None, and the row says why, if it cannot be done."""
        if row.item.settings is None:
            row.fail(row.item.problem or "the recipe says nothing to do")
            return None
        try:
            item = row.item
            job = self._service.complete(item.source, text=item.text, model=item.model, **asdict(item.settings))
        except Exception as error:
            row.fail(error)
            return None
        row.says, row.notes = job.plan.says, job.notes
        row.num_bytes = job.settings.samples * job.plan.num_bytes_to_generate
        return job

    def _tasks(self, row: Row, job: CompletionJob, ledger: Ledger) -> list[_Task]:
        """The samples of a row that are still to be made; the folder is ready for each of them."""
        tasks = []
        try:
            facts = _what_it_depends_on(row.item, job)
            for sample, path in enumerate(completion_paths(job, self._out, row.stem)):
                key = key_of(facts | {"sample": sample})
                if made := ledger.finished(path.name, key):
                    row.made[sample] = made
                    row.done_bytes += made["num_bytes_generated"]
                else:
                    tasks.append(_Task(row, job, sample, with_sidecar(job, path), key))
            for task in tasks:
                self._outputs.protect_sources(task.paths)
                ledger.claim(task.name, task.key, task.paths)
        except Exception as error:
            row.fail(error)
            return []
        row.state = "planned" if tasks else "skipped"
        return tasks

    def _make(self, tasks: list[_Task], ledger: Ledger) -> Iterator[tuple[Row, Progress | None]]:
        """Makes at most `MAX_TOGETHER` samples of one model; those of rows that have failed are left out."""
        groups = [tasks]
        while groups:
            if group := [task for task in groups.pop(0) if task.row.state != "failed"]:
                groups[:0] = yield from self._make_together(group, ledger)

    def _make_together(
        self, tasks: list[_Task], ledger: Ledger
    ) -> Generator[tuple[Row, Progress | None], None, list[list[_Task]]]:
        """Makes some samples at once; returns the groups of those that were given up and are to be begun anew."""
        by_sample = {(id(task.job), task.sample): task for task in tasks}
        left = by_sample.copy()
        drawn = dict.fromkeys(left, 0)  # bytes of each sample
        try:
            with closing(run_together([(task.job, task.sample) for task in tasks])) as steps:
                for progress in steps:
                    key = id(progress.job), progress.sample
                    task = by_sample[key]
                    num_new = 0 if progress.chunk is None else len(progress.chunk.byte_values)
                    task.row.done_bytes += num_new
                    drawn[key] += num_new
                    if task.row.state == "planned":
                        task.row.state = "running"
                    if progress.completion is not None:
                        del left[key]
                        if task.row.state != "failed":
                            self._write(task, progress.completion, ledger)
                    yield task.row, progress
                    if task.row.state == "failed" and _is_better_anew(left, drawn):
                        break
            groups = [list(left.values())]
        except Exception as error:
            rows = {id(task.row): task.row for task in left.values() if task.row.state != "failed"}
            if len(rows) == 1:  # so it is this one's fault
                [row] = rows.values()
                row.fail(error)
                yield row, None
            groups = [[task for task in left.values() if task.row is row] for row in rows.values()]
        for key, task in left.items():
            task.row.done_bytes -= drawn[key]
        return groups

    def _write(self, task: _Task, completion: Completion, ledger: Ledger) -> None:
        """Writes a sample; if that does not work, its row has failed."""
        row = task.row
        try:
            self._service.write_completion(completion, self._out, force=True, stem=row.stem)
            facts = completion.to_dict(task.paths[0])
            ledger.finish(task.name, task.key, task.paths, facts)
        except Exception as error:
            row.fail(error)
            return
        row.made[task.sample] = facts
        row.state = "done" if len(row.made) == task.job.settings.samples else "running"


def _is_better_anew(left: dict[tuple[int, int], _Task], drawn: dict[tuple[int, int], int]) -> bool:
    """Whether giving up the samples at work saves more bytes, those of failed rows, than it loses, those of the others."""
    saved = lost = 0
    for key, task in left.items():
        if task.row.state == "failed":
            saved += task.job.plan.num_bytes_to_generate - drawn[key]
        else:
            lost += drawn[key]
    return saved > lost


def _what_it_depends_on(item: Item, job: CompletionJob) -> dict[str, Any]:
    """Everything that the bytes of a sample follow from, but its number."""
    given = item.source if item.source is not None else item.text
    settings = {name: value for name, value in asdict(job.settings).items() if name != "samples"}
    return {
        "input": None if given is None else digest_of(given),
        "model": job.loaded.info.digest,
        "engine": job.engine,
        "settings": settings,
    }
