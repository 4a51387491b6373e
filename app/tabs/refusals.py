"""Bad input on the page: the sentence that the command line prints, in Gradio's error message and in the page's words."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import gradio as gr

from app.messages import plain_sentence
from core.errors import UserError

STORED_FILE = "The file as it is stored"
ADAPT = "Adapt it to the model"
# Sentences name options of the command line; on the page controls do the same, in the endpoints arguments.
PAGE_WORDS = {"--bytes file": f"“{STORED_FILE}”", "--adapt": f"“{ADAPT}”"}
ENDPOINT_WORDS = {"--bytes file": 'scored_as="file"', "--adapt": "adapt=True"}

Value = TypeVar("Value", str, int, float)


def reworded(sentence: str, words: Mapping[str, str] = PAGE_WORDS) -> str:
    """The sentence with the words for whoever reads it."""
    for option, name in words.items():
        sentence = sentence.replace(option, name)
    return sentence.encode(errors="replace").decode()  # no half of a character, which no browser can be sent


@contextmanager
def refusals_shown(words: Mapping[str, str] = PAGE_WORDS) -> Iterator[None]:
    """Turns a refusal (`UserError`, any other `ValueError`, or an error of the file system) into `gr.Error`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(reworded(plain_sentence(error, None), words), print_exception=False) from None
    except OverflowError:
        raise gr.Error("a number of this call is too large", print_exception=False) from None


def event_value(event: gr.EventData, name: str, kind: type[Value], lowest: int = 0, highest: int = 2**53) -> Value:
    """What an event of a view says: a text, or a number within bounds, cut to a whole one if `kind` is int.

    Raises:
        UserError: if it does not say that, as no view of this page does.
    """
    value = event._data.get(name) if isinstance(event._data, dict) else None
    if kind is str and isinstance(value, str):
        return value
    if kind is not str and type(value) in (int, float) and lowest <= value <= highest:  # which NaN does not
        return kind(value)
    raise UserError("this is none of the page's own events; reload the page and try again")


@contextmanager
def without_path(file: str | Path | None) -> Iterator[None]:
    """A refusal of a file speaks of "the file": where it lies on this machine is nobody's business.

    Raises:
        UserError: with the sentence of a refusal inside the block.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(plain_sentence(error, file)) from None
