"""The page as a whole without a browser: the scripts of its views, and its port."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from app import ui
from core.errors import UserError

ROOT = Path(__file__).parents[1]


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


# A stub is made of the syntax tree of its component's source.
IMPORT = """
import ast
parsed, parse = [], ast.parse
ast.parse = lambda code, *arguments, **options: (parsed.append(code), parse(code, *arguments, **options))[1]
import inspect
find = inspect.getfile
{how}
assert inspect.getfile is find
print(sum("class Number(" in str(code) for code in parsed))
"""


def test_the_page_is_imported_without_stubs():
    ways = ("from app.without_stubs import import_page; import_page()", "import gradio")
    calls = [[sys.executable, "-B", "-c", IMPORT.format(how=how)] for how in ways]
    with_page, alone = (subprocess.run(call, cwd=ROOT, check=True, capture_output=True, text=True).stdout for call in calls)
    assert int(with_page) == 0
    assert int(alone) > 0
