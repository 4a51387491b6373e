"""Gradio's import without what it does for editors: it writes a stub beside the source of each of its components, or checks
the one that is there, and that takes as long as all the rest."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_stubs() -> Iterator[None]:
    """Inside, components are classes whose source nobody finds, for which Gradio (6.31) makes no stub."""
    find = inspect.getfile

    def find_unless_component(thing: object) -> str:
        if type(thing).__name__ == "ComponentMeta":
            raise OSError("a component")
        return find(thing)

    inspect.getfile = find_unless_component
    try:
        yield
    finally:
        inspect.getfile = find
