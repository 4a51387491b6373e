"""Plain sentences about files that could not be used, for the page and the command line. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from core.errors import shown

OUR_FAULT = "this is a fault of the program, not of your file; the terminal it runs in says more"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A file that could not be used, and one plain sentence why; whoever shows it adds the file's name."""

    file: Path
    message: str


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def plain_sentence(error: Exception, file: Path | str | None) -> str:
    """What a person is told about an error: our own words, or the system's where it refuses a file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename in (None, str(file)) else f"{error.filename}: "
        text = f"{place}{error.strerror}"
    name = shown(str(file))
    return "the file" + text.removeprefix(name) if text.startswith(f"{name} ") else text
