"""The page as a whole without a browser: the scripts of its views, and its port."""

import inspect
import socket
from pathlib import Path

import gradio as gr
import pytest
from gradio import component_meta

from app import ui
from app.without_stubs import without_stubs
from core.errors import UserError


def test_scripts_of_the_views_never_parse_html():
    folder = Path(ui.__file__).parent / "views"
    assert len(list(folder.glob("*.js"))) >= 8
    for script in folder.glob("*.js"):
        assert not {"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"} & set(script.read_text().split())
        assert "innerHTML" not in script.read_text()
    for template in folder.glob("*.html"):
        assert "${" not in template.read_text()
        assert "{{" not in template.read_text()


def test_busy_port_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port {port} .*--port$"):
            ui.check_port("127.0.0.1", port)


def test_gradio_makes_no_stubs_where_they_are_not_wanted(monkeypatch):
    made = []
    monkeypatch.setattr(component_meta, "create_pyi", lambda code, events: made.append(code) or code)
    find = inspect.getfile
    with without_stubs():
        component_meta.create_or_modify_pyi(gr.Number, "Number", [])
        assert inspect.getfile(ui.Page) == ui.__file__
    assert not made
    assert inspect.getfile is find
    monkeypatch.setattr(Path, "exists", lambda path: True)  # outside it would be written
    monkeypatch.setattr(Path, "write_text", lambda path, text: None)
    component_meta.create_or_modify_pyi(gr.Number, "Number", [])
    assert len(made) == 1
