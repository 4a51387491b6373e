"""Of the events of one kind in one open page, only the newest goes on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gradio as gr

_WAIT_S = 2.0  # for what an earlier event still sends, which comes before anything of the new one


class Newest:
    """The running events of one kind, one in each open page.

    An event that `cancels` another, Gradio's own way, ends all of the kind that run in the page when the order to cancel
    arrives, and with them the new one if that was quicker.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._running: dict[str, _Event] = {}  # by the open page

    @contextmanager
    def begin(self, request: gr.Request) -> Iterator[Callable[[], bool]]:
        """Begins an event once the earlier one in the same page has ended; gives a function that tells whether it may go on."""
        event, page = _Event(), request.session_hash
        if page is not None:
            with self._mutex:
                earlier, self._running[page] = self._running.get(page), event
            if earlier is not None:
                earlier.is_replaced.set()
                earlier.is_over.wait(_WAIT_S)
        try:
            yield lambda: not event.is_replaced.is_set()
        finally:
            event.is_over.set()
            with self._mutex:
                if self._running.get(page) is event:
                    del self._running[page]


class _Event:
    def __init__(self) -> None:
        self.is_replaced = threading.Event()
        self.is_over = threading.Event()
