"""Bad input on the page: the sentence that the command line prints, in Gradio's error message."""

from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr


@contextmanager
def refusals_shown() -> Iterator[None]:
    """Turns a refusal (`UserError`, any other `ValueError`, or an error of the file system) into `gr.Error`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(_sentence(error), print_exception=False) from None


def _sentence(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
