"""The page's canvas views: each is a `gr.HTML` made of an .html and a .js file that lie beside this one.

The views are functions and not subclasses: Gradio writes a stub file next to every module that subclasses `gr.HTML`,
unless `app.without_stubs` imports it.
All of them draw text on a canvas or set it as `textContent`, so that no file name and no content is ever read as HTML.
"""

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from app.palette import ABOVE, BELOW, DIVERGING, NO_VALUE, SEQUENTIAL

HERE = Path(__file__).parent
# Each is a part of the likelihood view with a script of its own, and lies in the element `NAME-view`.
PARTS = ("files", "headline", "toolbar", "picture", "waveform", "text", "hex", "inspector", "statistics")


def stylesheet() -> str:
    """The CSS of all views, in the colours of the page's theme."""
    return asset("views.css") + asset("complete.css") + asset("likelihood.css") + asset("tables.css")


def likelihood_view() -> gr.HTML:
    """Scored files and their linked views; the value has a list `items` of the dicts of `app.views.score_values`.

    Its event `export` carries the `id` of an item and the `form` of the file that is wanted.
    """
    return _view("likelihood", None, likelihood_script())


def message_view(value: dict[str, Any]) -> gr.HTML:
    """The empty, working and error states; `value` is one of the dicts of `app.views.score_values`."""
    return _view("message", value)


def download_view() -> gr.HTML:
    """Nothing to see: it saves the `file` of each new value, one of `app.views.score_values.file_value`."""
    return _view("download")


def prompt_view(value: dict[str, Any]) -> gr.HTML:
    """What is to be completed, with a line, a handle or a caret where its kept part ends; it triggers `cut` with `offset`."""
    return _view("prompt", value)


def alternatives_view(value: dict[str, Any]) -> gr.HTML:
    """The likeliest bytes at a place; it triggers `step` and `branch` with the sample's `id`, a `number` and a `value`."""
    return _view("alternatives", value)


def results_view(value: dict[str, Any]) -> gr.HTML:
    """Samples of a completion; it triggers `pick` with the `id` of a sample and a `place` in it."""
    return _view("results", value)


def batch_view(value: dict[str, Any]) -> gr.HTML:
    """The table of a batch; `value` is one of the dicts of `app.views.batch_values`."""
    return _view("batch", value)


def jobs_view(value: dict[str, Any]) -> gr.HTML:
    """The list of a visitor's jobs with their buttons; it triggers `stop` with the `id` of a job."""
    return _view("jobs", value)


def likelihood_script() -> str:
    """The likelihood view's parts as one script, which expects Gradio's `element`, `props`, `watch` and `trigger`."""
    parts = "".join(f"((element) => {{\n{asset(f'{part}.js')}}})(root.querySelector('#{part}-view'));\n" for part in PARTS)
    return f"{library()}const root = element.querySelector('.byte-book');\n{asset('book.js')}{parts}{asset('likelihood.js')}"


@cache
def library() -> str:
    """The script that stands in front of every view's own."""
    beyond = np.array([ABOVE, BELOW, NO_VALUE], dtype=np.uint8)
    tables = {**SEQUENTIAL, "difference": DIVERGING, "beyond": beyond}
    encoded = {name: base64.b64encode(table.tobytes()).decode() for name, table in tables.items()}
    return asset("shared.js").replace("@palettes@", json.dumps(encoded))


@cache
def asset(name: str) -> str:
    """The text of one of the files beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


def _view(name: str, value: dict[str, Any] | None = None, script: str | None = None) -> gr.HTML:
    return gr.HTML(
        value=value,
        html_template=asset(f"{name}.html"),
        js_on_load=script or library() + asset(f"{name}.js"),
        apply_default_css=False,
        elem_id=f"{name}-view",
    )
