"""What the page's server refuses before Gradio looks at it, and what it lets through unchanged."""

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.guard import Guard, make_room


def answer(cache: Path, path: str, *bodies: bytes, method: str = "POST", cancel: Any = None, **limits: int) -> tuple[int, bytes]:
    """The status and the body of an answer; what gets through is echoed with status 200."""
    sent: list[dict[str, Any]] = []
    arriving = [{"type": "http.request", "body": body, "more_body": True} for body in bodies[:-1]]
    arriving.append({"type": "http.request", "body": bodies[-1] if bodies else b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return arriving.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
        content, has_more = b"", True
        while has_more:
            message = await receive()
            content, has_more = content + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})

    call = Guard(echo, cache, cancel or (lambda event, endpoint: False), **limits)(
        {"type": "http", "path": path, "method": method}, receive, send
    )
    with ThreadPoolExecutor(1) as thread:  # the loop of a browser may be running in this one
        thread.submit(asyncio.run, call).result()
    return sent[0]["status"], sent[1]["body"]


def file_at(path: str) -> bytes:
    return json.dumps({"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, ""]}).encode()


def test_a_call_is_handed_on_as_it_came(tmp_path):
    for bodies in ([file_at("/tmp/a.txt")], [b'{"data": [', b'"a"]}'], [b"no JSON"], [b"[" * 100_000]):
        assert answer(tmp_path, "/gradio_api/queue/join", *bodies) == (200, b"".join(bodies))


@pytest.mark.parametrize("address", ["http://10.0.0.1/a", "HTTPS://example.org/a.png", " http://[::1]/", "ftp://example.org/a"])
def test_a_file_on_another_machine_is_refused(tmp_path, address):
    for body in (file_at(address), json.dumps({"data": [[{"deep": json.loads(file_at(address))}]]}).encode()):
        status, said = answer(tmp_path, "/gradio_api/queue/join", body)
        assert status == 400
        assert b"upload the file instead" in said
    for route in ("file", "proxy"):
        assert answer(tmp_path, f"/gradio_api/{route}={address}", method="GET")[0] == 403
    assert answer(tmp_path, f"/gradio_api/file/{address}", method="GET")[0] == 403


@pytest.mark.parametrize("path", ["/gradio_api/run/upload", "/gradio_api/call/upload/", "/gradio_api/run/gradio_api/upload"])
def test_a_call_that_is_named_like_an_upload_is_none(tmp_path, path):
    assert answer(tmp_path, path, file_at("https://example.org/a.png"))[0] == 400
    assert answer(tmp_path, path, b"x" * 1025, max_body_bytes=1024)[0] == 413
    assert answer(tmp_path, "/gradio_api/upload", b"x" * 1025, max_body_bytes=1024)[0] == 200


@pytest.mark.parametrize("route", ["cancel", "reset"])
def test_a_cancelled_call_is_ended_here_or_handed_on(tmp_path, route):
    heard = []

    def cancel(event: str, endpoint: int | None) -> bool:
        heard.append((event, endpoint))
        return event == "ours"

    ours, unknown = (json.dumps({"event_id": event, "fn_index": 3}).encode() for event in ("ours", "unknown"))
    path = f"/gradio_api/{route}"
    assert answer(tmp_path, path, ours, cancel=cancel) == (200, b'{"success": true}')
    for body in (unknown, b'{"event_id": ["ours"]}', b'["event_id"]', b"no JSON"):
        assert answer(tmp_path, path, body, cancel=cancel) == (200, body)
    assert answer(tmp_path, path, b'{"event_id": "other", "fn_index": [3]}', cancel=cancel)[0] == 200
    assert heard == [("ours", 3), ("unknown", 3), ("other", None)]
    assert answer(tmp_path, f"/gradio_api/call/{route}", ours, cancel=cancel) == (200, ours)


def test_a_body_is_read_up_to_its_limit_only(tmp_path):
    assert answer(tmp_path, "/call", b"x" * 500, b"x" * 524, max_body_bytes=1024)[0] == 200
    status, said = answer(tmp_path, "/call", b"x" * 500, b"x" * 525, b"never read", max_body_bytes=1024)
    assert status == 413
    assert b"send long texts as files" in said


def test_old_uploads_make_room_for_new_ones_and_young_ones_do_not(tmp_path):
    (tmp_path / "sub").mkdir()
    for number in range(10):
        path = tmp_path / "sub" / str(number)
        path.write_bytes(bytes(100))
        os.utime(path, (time.time() - 7000 + number,) * 2)
    assert make_room(tmp_path, 1000)
    assert len(list((tmp_path / "sub").iterdir())) == 10
    assert make_room(tmp_path, 450)
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["6", "7", "8", "9"]
    (tmp_path / "young").write_bytes(bytes(500))
    assert not make_room(tmp_path, 450)
    assert (tmp_path / "young").exists()
    status, said = answer(tmp_path, "/gradio_api/upload", b"file", max_cache_bytes=450)
    assert (status, b"no room" in said) == (507, True)
    assert answer(tmp_path, "/gradio_api/upload", b"file") == (200, b"file")


def test_a_thousand_uploads_take_no_more_room_than_the_limit(tmp_path):
    for number in range(1000):
        assert answer(tmp_path, "/gradio_api/upload", b"file", max_cache_bytes=20_000)[0] == 200
        path = tmp_path / f"{number}.bin"
        path.write_bytes(bytes(1000))
        os.utime(path, (time.time() - 700,) * 2)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 21_000
