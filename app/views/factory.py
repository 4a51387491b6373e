"""The page's canvas views: each is a `gr.HTML` made of an .html and a .js file that lie beside this one.

The views are functions and not subclasses: Gradio writes a stub file next to every module that subclasses `gr.HTML`.
All of them draw text on a canvas or set it as `textContent`, so that no file name and no content is ever read as HTML.
"""

import base64
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from app.render import CLIPPED, VIRIDIS

HERE = Path(__file__).parent


def stylesheet() -> str:
    """The CSS of all views, in the colours of the page's theme."""
    return _asset("views.css") + _asset("batch.css")


def picture_view() -> gr.HTML:
    """A scored picture under its bits, with an opacity slider."""
    return _view("picture")


def waveform_view() -> gr.HTML:
    """A scored sound as a waveform in the colours of its bits, with a play button."""
    return _view("waveform")


def text_view() -> gr.HTML:
    """A scored text in the colours of its characters; any length, invalid UTF-8 included."""
    return _view("text")


def hex_view() -> gr.HTML:
    """The bytes of any scored file with their offsets, and an overview of the whole."""
    return _view("hex")


def legend_view() -> gr.HTML:
    """The colour scale and a line about the byte under the cursor."""
    return _view("legend")


def summary_view(value: dict[str, Any]) -> gr.HTML:
    """Totals of one file, or the empty, working and error states; `value` is one of the dicts of `app.views.score_values`."""
    return _view("summary", value)


def results_view(value: dict[str, Any]) -> gr.HTML:
    """Source and samples of a completion; `value` is one of the dicts of `app.views.cards`."""
    return _view("results", value)


def batch_view(value: dict[str, Any]) -> gr.HTML:
    """The table of a batch; `value` is one of the dicts of `app.views.batch_values`."""
    return _view("batch", value)


def _view(name: str, value: dict[str, Any] | None = None) -> gr.HTML:
    return gr.HTML(
        value=value,
        html_template=_asset(f"{name}.html"),
        js_on_load=_library() + _asset(f"{name}.js"),
        apply_default_css=False,
        elem_id=f"{name}-view",
    )


@cache
def _library() -> str:
    palette = base64.b64encode(VIRIDIS.tobytes() + bytes(CLIPPED)).decode()
    return _asset("shared.js").replace("@palette@", palette)


@cache
def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
