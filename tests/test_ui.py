"""The page as a whole without a browser: the scripts of its views, and its port."""

import ast
import inspect
import runpy
import socket
from pathlib import Path

import pytest
from gradio.components import number
from page_server import note_stubs

from app import ui
from app.without_stubs import import_page
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


def test_the_page_is_imported_without_stubs(page_server, monkeypatch):
    assert "a stub" not in page_server.log.read_text(errors="replace").splitlines()
    find, stubs = inspect.getfile, []
    import_page()
    assert inspect.getfile is find
    monkeypatch.setattr(ast, "parse", ast.parse)  # as it is again at the end
    note_stubs(lambda: stubs.append("a stub"))
    runpy.run_path(number.__file__)
    assert stubs  # the watch sees one, so it would have seen those of the page
