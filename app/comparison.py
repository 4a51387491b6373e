"""The use case "compare": trains the models of a plan against each other, and draws what came out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.plot import Panel, draw_panels
from core.codecs import atomic_file
from core.compare import compare
from core.comparison import Result, groups_of
from core.plans import Size, build_plan


@dataclass(frozen=True)
class Comparison:
    """The models of a plan, in its order, and the table that says what they reached."""

    results: list[Result]
    table: str


def compare_models(
    plan_name: str,
    size: Size,
    root: Path,
    out: Path,
    *,
    budget: float = 0.0,
    resume: bool = False,
    device: str = "cpu",
    log: Callable[[str], None],
) -> Comparison:
    """Trains and scores the models of a plan in the folder `out`; tables, JSON and plot.png lie there afterwards.

    Raises:
        ValueError: if the plan, the data or the folder cannot be used.
    """
    plan = build_plan(plan_name, size)
    results = compare(plan, root, out, budget=budget, resume=resume, device=device, log=log)
    with atomic_file(out / "plot.png") as file:
        draw_panels(panels_of(results)).save(file, "PNG", optimize=True)
    return Comparison(results, (out / "table.txt").read_text(encoding="utf-8"))


def panels_of(results: list[Result]) -> list[Panel]:
    """One panel a group: bits per byte of the validation data against training FLOPs, a curve a model."""
    return [
        Panel(title=group, curves={result.name: result.curve for result in members})
        for group, members in groups_of(results).items()
    ]
