"""A batch as the plain values that its table draws: a line for the whole, and a row for each item."""

from pathlib import Path
from typing import Any

from app.batch import Batch, Row
from app.jobs import JobView
from app.messages import duration
from app.recipe import Item
from app.views.score_values import file_value

WORDS = {"planned": "waiting", "running": "running", "done": "done", "skipped": "done", "failed": "failed"}


def message(title: str, text: str) -> dict[str, Any]:
    """A view without a table."""
    return {"state": "empty", "title": title, "text": text}


def plan(batch: Batch) -> dict[str, Any]:
    """What would be made and about how long it takes."""
    good = [row for row in batch.rows if row.state != "failed"]
    num_bytes, seconds = sum(row.num_bytes for row in good), sum(row.estimate_seconds for row in good)
    bad = len(batch.rows) - len(good)
    facts = [f"{num_bytes:,} bytes to make", f"about {duration(seconds)}", *([f"{bad} cannot be done"] if bad else [])]
    return {"state": "plan", "title": counted(len(good), "item"), "text": ", ".join(facts), "rows": [*map(_row, batch.rows)]}


def progress(batch: Batch, view: JobView, archive: Path | None) -> dict[str, Any]:
    """How far a job is, or what came of it."""
    states = [row.state for row in batch.rows]
    over, failed = sum(state in ("done", "skipped", "failed") for state in states), states.count("failed")
    done, total = sum(row.done_bytes for row in batch.rows), sum(row.num_bytes for row in batch.rows)
    title = {
        "running": f"{over} of {counted(len(states), 'item')}",
        "done": f"{counted(over - failed, 'item')} done",
        "failed": "The batch failed",
        "stopped": f"Stopped after {over} of {counted(len(states), 'item')}",
    }[view.state]
    facts = [f"{done:,} bytes made", duration(view.seconds), *([f"{failed} failed"] if failed else [])]
    if view.problem and view.problem != "stopped":
        facts.append(view.problem)
    value = {"state": view.state, "title": title, "text": ", ".join(facts), "rows": [*map(_row, batch.rows)]}
    value["done"] = done / max(1, total)
    return value | ({"name": archive.name, "file": file_value(archive)} if archive else {})


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def name_of(item: Item) -> str:
    """What the page calls an item: files by their names, without this machine's folders."""
    return item.source.name if item.source is not None else item.name


def _row(row: Row) -> dict[str, Any]:
    item = row.item
    return {
        "name": name_of(item),
        "state": row.state,
        "word": "planned" if row.state == "planned" and not row.done_bytes else WORDS[row.state],
        "says": row.says,
        "done": row.done_bytes / row.num_bytes if row.num_bytes else 0.0,
        "samples": item.settings.samples if item.settings else 0,
    }
