"""The command line in a process of its own, on other weights than the shipped ones."""

import sys
from pathlib import Path

_PROGRAM = """
import functools, runpy, sys
from pathlib import Path
from app import service
weights = Path(sys.argv[1])
sys.argv[1:] = sys.argv[2:]
service.Service = functools.partial(service.Service, weights=weights, runs=weights / "no-runs")
runpy.run_module("app", run_name="__main__", alter_sys=False)
"""


def command_line(weights: Path, *arguments: object) -> list[str]:
    """A command that does what `python -m app` with these arguments does."""
    return [sys.executable, "-c", _PROGRAM, str(weights), *map(str, arguments)]
