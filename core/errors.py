"""The one exception for input that cannot be used, and how its sentences name files. Imports nothing heavy."""

import os


class UserError(ValueError):
    """Its text is one plain sentence for a person: what was given, what is expected, what to do."""


def shown(path: str | os.PathLike[str]) -> str:
    """A path, or any text, for messages: in one line, with whatever could move a cursor or break the line escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fsdecode(path))


def shortened(text: str, most: int = 60) -> str:
    """A text that somebody gave, for messages: no more than the characters that a person needs to know it again."""
    return text if len(text) <= most else f"{text[:most]}..."
