"""What the command line says: results on stdout, everything else on stderr, one line an event, nothing that moves a cursor."""

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from core.errors import shown


def emit(line: str) -> None:
    """Prints a result at once, so that a reader at the other end of a pipe sees it when it is made."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(shown(line), flush=True)


def say(line: str) -> None:
    """Prints something a person may want to know, above a progress bar if there is one; that nobody can read it stops no work."""
    with contextlib.suppress(OSError), tqdm.external_write_mode(file=sys.stderr):
        print(shown(line), file=sys.stderr, flush=True)


def complain(sentence: str) -> None:
    say(f"error: {sentence}")


class LogHandler(logging.Handler):
    """Log lines as the other lines on stderr, with the traceback of a fault."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")
        if record.exc_info:
            for line in "".join(traceback.format_exception(*record.exc_info)).splitlines():
                say(line)


class Report:
    """The results of a call, one after another, and whether something failed on the way."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.exit_code = 0

    def result(self, facts: dict[str, Any], line: str) -> None:
        """Prints a result: its facts as one JSON object, or a line for a person."""
        emit(json.dumps(facts) if self.as_json else line)

    def notes(self, file: Path | None, notes: tuple[str, ...]) -> None:
        for note in notes:
            say(f"note: {_prefix(file)}{note}")

    def failure(self, file: Path | None, sentence: str) -> None:
        complain(f"{_prefix(file)}{sentence}")
        self.exit_code = 1


@contextmanager
def progress_bar(total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar of bytes with speed and remaining time, nothing where stderr is no terminal.

    It is moved by calling what this gives with the bytes done so far and, if that has changed, the total.
    """
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def advance(num_done: int, num_total: int | None = total) -> None:
            bar.total = num_total
            bar.update(num_done - bar.n)

        yield advance


def _prefix(file: Path | None) -> str:
    return "" if file is None else f"{file}: "
