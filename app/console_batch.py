"""A batch on the command line: its plan, its results as they come, and the table at the end."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.console import Report, emit, progress_bar

if TYPE_CHECKING:
    from app.batch import Batch, Row

_SHOWN_NAME = 48  # characters of a file's name in a table


def plan_batch(batch: "Batch", report: Report) -> None:
    """Prints what each item would cost, then all of them together."""
    for row in batch.plan():
        if row.state == "failed":
            report.failure(row.item.source, row.says)
        facts = row.to_dict() | {"plan": row.says, "estimate_seconds": round(row.estimate_seconds, 3)}
        report.result(facts, _planned(row))
    rows = [row for row in batch.rows if row.state != "failed"]
    num_bytes, seconds = sum(row.num_bytes for row in rows), sum(row.estimate_seconds for row in rows)
    total = {"num_items": len(rows), "num_failed": len(batch.rows) - len(rows), "num_bytes": num_bytes}
    bad = f"; {total['num_failed']} cannot be done" if total["num_failed"] else ""
    line = f"{len(rows)} items, {num_bytes} bytes to make, about {seconds:.1f} s{bad}; nothing was written"
    report.result({"plan": total | {"estimate_seconds": round(seconds, 3)}}, line)


def make_batch(batch: "Batch", report: Report, *, is_summed: bool) -> None:
    """Makes a batch and prints its results in their order; at the end the table of all items if it is to be summed up."""
    with progress_bar() as advance:
        states: dict[str, str] = {}  # of the rows met so far, by their stems
        told: set[tuple[str, int]] = set()  # stems and numbers of the samples printed
        for row, progress in batch.run():
            before, states[row.stem] = states.get(row.stem), row.state
            if before is None:
                report.notes(row.item.source, row.notes)
                for sample, facts in sorted(row.made.items()):
                    told.add((row.stem, sample))
                    report.result(facts, f"{_made(facts)}  (made before)")
            if progress is not None:
                advance(sum(row.done_bytes for row in batch.rows), sum(row.num_bytes for row in batch.rows))
            if row.state == "failed" != before:
                report.failure(row.item.source, row.says)
            for facts in _next_in_order(takewhile(lambda row: row.stem in states, batch.rows), told):
                report.result(facts, _made(facts))
    if is_summed:
        _sum_up(batch, report)


def _next_in_order(rows: "Iterable[Row]", told: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The finished samples before which none is at work and that were not `told` yet; they are then.

    Samples that are made side by side finish in any order.
    """
    for row in rows:
        for sample, facts in sorted(row.made.items()):
            if (row.stem, sample) in told:
                continue
            if sample and (row.stem, sample - 1) not in told and row.state != "failed":
                return
            told.add((row.stem, sample))
            yield facts
        if row.state in ("planned", "running"):
            return


def _sum_up(batch: "Batch", report: Report) -> None:
    if not report.as_json:
        for line in table([_cells(row) for row in batch.rows], ("job", "source", "state", "bytes", "results or reason")):
            emit(line)
    for row in batch.rows:
        if report.as_json and row.state == "failed":
            report.result(row.to_dict(), "")
    total = batch.summary
    line = (
        f"{total.done} done, {total.skipped} made before, {total.failed} failed; "
        f"{total.num_samples} results with {total.num_bytes} new bytes in {total.seconds:.1f} s"
    )
    report.result({"summary": total.to_dict()}, line)


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> list[str]:
    """Lines with columns as wide as their widest cell; the last one is not padded."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header) - 1)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in (header, *rows)]


def _cells(row: "Row") -> tuple[str, ...]:
    said = row.says if row.state == "failed" else ", ".join(Path(facts["output"]).name for facts in row.results)
    return str(row.item.job), _short(row.item.name), row.state, str(row.done_bytes), said


def _planned(row: "Row") -> str:
    if row.state == "failed":
        return f"{_short(row.item.name)}: cannot be done"
    samples = row.item.settings.samples if row.item.settings else 1
    each = f", {samples} times" if samples > 1 else ""
    return f"{_short(row.item.name)}: {row.says}{each}, about {row.estimate_seconds:.1f} s"


def _made(facts: dict) -> str:
    made = f"{facts['num_bytes_generated']} bytes made after {facts['num_bytes_kept']} kept"
    return f"{facts['bits_per_byte']:8.4f} bits/byte  {made}  {facts['output']}"


def _short(name: str) -> str:
    return name if len(name) <= _SHOWN_NAME else f"...{name[3 - _SHOWN_NAME :]}"
