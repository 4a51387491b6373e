"""Gradio's import without what it does for editors: it writes a stub beside the source of each of its components, or checks
the one that is there, and that takes as long as all the rest."""

import inspect
from types import ModuleType


def import_page() -> ModuleType:
    """`app.ui`, and Gradio (6.31) without stubs: while it is imported, nobody finds the source of a component.

    Before other threads run: `inspect.getfile` is replaced for all of them. No component is made meanwhile, for Gradio names
    some by their file.
    """
    find = inspect.getfile

    def find_unless_component(object: object) -> str:
        if type(object).__name__ == "ComponentMeta":
            raise OSError("not looked for: without_stubs")
        return find(object)

    inspect.getfile = find_unless_component
    try:
        from app import ui
    finally:
        inspect.getfile = find
    return ui
