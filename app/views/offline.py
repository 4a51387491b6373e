"""Scores as one web page that needs nothing else: no server, no network, the same views as in the app."""

import base64
import gzip
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from app.service import FileScore
from app.views import score_values
from app.views.factory import asset, likelihood_script
from core.codecs import atomic_file


def write_page(scored: Sequence[tuple[FileScore, dict[str, Any]]], path: Path) -> None:
    """Writes a page with detailed scores and their items, of which the first is open; the others can be compared with it."""
    value = {"is_offline": True, "items": [_with_contents(score, item) for score, item in scored]}
    # "<" cannot end the script element early when it is written as an escape, which JSON reads back.
    contents = {
        "title": html.escape(scored[0][1]["name"]),
        "style": asset("views.css") + asset("likelihood.css"),
        "template": asset("likelihood.html"),
        "script": likelihood_script(),
        "value": json.dumps(value).replace("<", "\\u003c"),
    }
    # All places at once: a name or a text that looks like one of them is not filled in.
    page = re.sub(f"@({'|'.join(contents)})@", lambda place: contents[place[1]], asset("offline.html"))
    with atomic_file(path) as file:
        file.write(page.encode("utf-8"))


def _with_contents(score: FileScore, item: dict[str, Any]) -> dict[str, Any]:
    """An item that carries the contents of its files instead of their addresses."""
    with TemporaryDirectory(prefix="page-") as folder:
        document = score_values.document(score, Path(folder))
        names = {"scores": document.pop("file"), "likeliest": document.pop("likeliest_file")}
        inline = {name: _packed(Path(file["path"])) for name, file in names.items()}
    return item | {"document": document | {"id": item["id"], "inline": inline}}


def _packed(path: Path) -> str:
    return base64.b64encode(gzip.compress(path.read_bytes(), mtime=0)).decode()
