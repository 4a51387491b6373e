"""Recipes: many completions in one TOML text. Imports nothing heavy.

    [defaults]                       # settings for every job; a job's own come first
    seed = 7

    [[jobs]]
    files = ["photos/*.png", "lake.png"]
    keep = 0.5
    samples = 2

    [[jobs]]
    text = "Once upon a time"
    num_bytes = 300

Settings are those of `app.settings.CompletionSettings` and `model`. A job without `files` and `text` starts from nothing.
"""

import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.settings import CompletionSettings
from core.errors import shortened, shown

_SETTINGS = typing.get_type_hints(CompletionSettings)
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list"}
MAX_ITEMS = 100_000
MAX_RECIPE_BYTES = 16 * 2**20
_PART = r"""(?:[\w-]++|"(?:\\.|[^"\\\n]){0,100}"|'[^'\n]{0,100}')"""
_DEEP_KEY = re.compile(rf"(?<![\w-]){_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{100}}")  # tomllib takes the square of its length


@dataclass(frozen=True, kw_only=True)
class Item:
    """One file, text or nothing to complete.

    Attributes:
        job: the number of its job in the recipe, from 1.
        settings: None if the job cannot be done.
        problem: why it cannot, in one plain sentence.
    """

    job: int
    source: Path | None = None
    text: bytes | None = None
    model: str | None = None
    settings: CompletionSettings | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        """What a table calls it."""
        if self.source is not None:
            return str(self.source)
        return "typed text" if self.text is not None else f"job {self.job}"


@dataclass(frozen=True)
class _Job:
    number: int
    table: dict[str, Any] = field(repr=False)

    def items(self, find: Callable[[str], list[Path]]) -> Iterator[Item]:
        try:
            settings, model, text = self._settings(), self._value("model", str), self._value("text", str)
            patterns = self._patterns()
        except ValueError as error:
            yield Item(job=self.number, problem=str(error))
            return
        made = {"job": self.number, "model": model, "settings": settings}
        if patterns is None:
            yield Item(text=None if text is None else text.encode(), **made)
            return
        for pattern in patterns:
            try:
                yield from (Item(source=file, **made) for file in find(pattern))
            except ValueError as error:
                yield Item(source=Path(pattern), job=self.number, problem=str(error))

    def _settings(self) -> CompletionSettings:
        _check_names(self.table)
        return CompletionSettings(**{name: self._value(name, _SETTINGS[name]) for name in set(_SETTINGS) & set(self.table)})

    def _value(self, name: str, kind: Any) -> Any:
        return None if name not in self.table else _checked(name, self.table[name], kind)

    def _patterns(self) -> list[str] | None:
        if "files" not in self.table:
            return None
        if "text" in self.table:
            raise ValueError("files and text exclude each other; make two jobs of them")
        given = self.table["files"]
        patterns = [given] if isinstance(given, str) else given
        if not (isinstance(patterns, list) and patterns and all(isinstance(each, str) and each for each in patterns)):
            raise ValueError("files must be a name or a pattern, or a list of them")
        if any("\0" in each for each in patterns):
            raise ValueError("files holds a zero byte, which no name has; leave it out")
        return patterns


def read_recipe(path: Path) -> str:
    """The text of a recipe's file.

    Raises:
        ValueError: if it is no text, or cannot be read.
    """
    from core.codecs.files import open_regular, require_size

    try:
        with open_regular(path) as file:
            require_size(file, shown(path), MAX_RECIPE_BYTES)
            return file.read(MAX_RECIPE_BYTES).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{shown(path)} is no text in UTF-8; a recipe is a TOML file") from None


def parse_recipe(text: str, find: Callable[[str], list[Path]]) -> list[Item]:
    """Everything a recipe asks for, in its order; what is wrong with one job is said in its items and stops no other.

    Args:
        text: the recipe.
        find: the files that a pattern of the recipe means; it raises ValueError if there are none.

    Raises:
        ValueError: if the text is no recipe.
    """
    try:
        if _DEEP_KEY.search(text):
            raise RecursionError
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the recipe is no TOML: {error}") from None
    except (ValueError, RecursionError):
        raise ValueError("the recipe has a number of too many digits, or too many brackets or dots in one") from None
    defaults, tables = recipe.pop("defaults", {}), recipe.pop("jobs", None)
    if recipe:
        raise ValueError(f"{next(iter(recipe))} is no part of a recipe; it has [defaults] and a [[jobs]] table for each job")
    if not isinstance(defaults, dict) or {"files", "text"} & set(defaults):
        raise ValueError("[defaults] must be a table of settings, without files and text")
    _check_names(defaults)
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        raise ValueError("the recipe has no job; begin each with a line [[jobs]]")
    items: list[Item] = []
    for number, table in enumerate(tables, start=1):
        merged = defaults | table
        for one, other in (("keep", "keep_bytes"), ("keep_bytes", "keep")):
            if one in table and other not in table:
                merged.pop(other, None)
        for item in _Job(number, merged).items(find):
            items.append(item)
            if len(items) > MAX_ITEMS:
                raise ValueError(f"the recipe asks for more than {MAX_ITEMS} files; split it")
    return items


def _check_names(table: dict[str, Any]) -> None:
    """Raises:
    ValueError: naming a key that is no setting.
    """
    if unknown := sorted(set(table) - set(_SETTINGS) - {"files", "text", "model"}):
        raise ValueError(f"{shortened(unknown[0])} is no setting; there are files, text, model, {', '.join(sorted(_SETTINGS))}")


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value if it has the kind of the setting; whole numbers are also fractional ones, truth is no number.

    Raises:
        ValueError: naming the kind that is expected.
    """
    kinds = [each for each in typing.get_args(kind) or (kind,) if each is not types.NoneType]
    accepted = {*kinds, int} if float in kinds else set(kinds)
    if type(value) not in accepted:
        is_long = isinstance(value, dict | list) or (isinstance(value, int) and abs(value) >= 10**40)
        given = "what stands there" if is_long else shortened(repr(value))
        raise ValueError(f"{name} must be {_WORDS.get(kinds[0], kinds[0])}, not {given}")
    return value
