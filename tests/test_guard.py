"""What the page's server refuses before Gradio looks at it, and what it lets through unchanged."""

import asyncio
import json
import os
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.guard import Guard
from app.uploads import MIN_FILE_BYTES, begun_files, make_room


def answer(cache: Path, path: str, *bodies: bytes, cancel: Any = None, **others: Any) -> tuple[int, bytes]:
    """The status and the body of an answer; what gets through is echoed with status 200."""
    app, request = others.pop("app", echo), {"type": "http", "path": path, "method": others.pop("method", "POST")}
    request["headers"] = [(name.encode(), value.encode()) for name, value in others.pop("headers", {}).items()]
    request["headers"] += others.pop("raw_headers", [])
    call = answer_of(Guard(app, cache, cancel or (lambda event, endpoint: False), **others), request, *bodies)
    with ThreadPoolExecutor(1) as thread:  # the loop of a browser may be running in this one
        return thread.submit(asyncio.run, call).result()


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    content, has_more = b"", True
    while has_more:
        message = await receive()
        content, has_more = content + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": content})


async def answer_of(guard: Guard, request: dict[str, Any], *bodies: bytes) -> tuple[int, bytes]:
    sent: list[dict[str, Any]] = []
    pieces = iter(bodies or (b"",))
    num_left = len(bodies)

    async def receive() -> dict[str, Any]:
        nonlocal num_left
        num_left -= 1
        return {"type": "http.request", "body": next(pieces), "more_body": num_left > 0}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await guard(request, receive, send)
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])


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


@pytest.mark.parametrize("path", ["/gradio_api/call/upload", "/gradio_api/call/upload/", "/gradio_api/call/v2/upload"])
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
    assert answer(tmp_path, path, unknown, cancel=cancel) == (200, unknown)
    assert answer(tmp_path, path, b'{"event_id": "other"}', cancel=cancel)[0] == 200
    assert heard == [("ours", 3), ("unknown", 3), ("other", None)]
    wrong = [b'["event_id"]', b"no JSON", b"", b'{"event_id": ["ours"]}', b'{"event_id": NaN}', b'{"fn_index": 3}']
    wrong += [b'{"event_id": "ours", "fn_index": %s}' % value for value in (b"[3]", b'"3"', b"1e400", b"3" * 5000, b"NaN")]
    for body in (*wrong, b'{"event_id": "ours", "session_hash": 3}', b'{"event_id": "ours"%s}' % (b" " * 5000)):
        status, said = answer(tmp_path, path, body, cancel=cancel)
        assert (status in (400, 413), len(json.loads(said)["detail"]) > 10) == (True, True), body
    assert len(heard) == 3
    assert answer(tmp_path, f"/gradio_api/call/{route}", ours, cancel=cancel) == (200, ours)


def test_a_body_is_read_up_to_its_limit_only(tmp_path):
    assert answer(tmp_path, "/gradio_api/call/score", b"x" * 500, b"x" * 524, max_body_bytes=1024)[0] == 200
    status, said = answer(tmp_path, "/gradio_api/call/score", b"x" * 500, b"x" * 525, b"never read", max_body_bytes=1024)
    assert status == 413
    assert b"send long texts as files" in said


@pytest.mark.parametrize("size", [300_000, 5_300_000])
def test_a_body_of_very_many_values_is_refused_before_it_is_read(tmp_path, size, monkeypatch):
    """They take a hundred times the memory, and a minute of everybody's time."""
    monkeypatch.setattr(json, "loads", lambda body: pytest.fail("it was read"))
    objects = b",".join([b"{}"] * (size // 3))
    for body in (b"[%s]" % objects, b"[" * size, b'""' * (size // 2), rb'{"\\":[%s]}' % objects):
        status, said = answer(tmp_path, "/gradio_api/queue/join", body)
        assert (status, b"send long texts as files" in said) == (413, True)
    wide = '["\\"", ' + "{}, " * (size // 10) + "1]"
    assert answer(tmp_path, "/gradio_api/queue/join", wide.encode("utf-16"))[0] == 413


def test_a_session_has_a_name(tmp_path):
    """Without one Gradio begins the call, and then fails aloud."""
    for session, status in (("", 400), ("a", 200), (None, 200)):
        body = json.dumps({"data": [], "session_hash": session}).encode()
        assert answer(tmp_path, "/gradio_api/queue/join", body)[0] == status


def test_what_a_text_holds_are_no_values(tmp_path):
    for text in ('{[,"\\' * 500_000, ",\n" * 1_000_000, '\\",' * 500_000, "\0" * 10):
        body = json.dumps({"data": [text, ""]}).encode()
        assert answer(tmp_path, "/gradio_api/queue/join", body) == (200, body)


def test_a_body_in_many_pieces_takes_no_more_memory_than_in_one(tmp_path):
    tracemalloc.start()
    try:
        assert answer(tmp_path, "/gradio_api/queue/join", *[b"1"] * 10_000)[0] == 200
        kept = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert kept < 400_000, kept


def test_only_what_the_page_and_its_clients_need_is_there(tmp_path):
    there = [
        "/", "/config", "/config/", "/theme.css", "/assets/a/b.js", "/static/img/logo.svg", "/manifest.json", "/favicon.ico",
        *(f"/gradio_api/{route}" for route in ("info", "info/", "queue/data", "call/score/4711", "call/v2/score/4711")),
        *(f"/gradio_api/{route}" for route in ("heartbeat/a", "file=/tmp/a\n.txt", "app_id", "upload_progress")),
    ]  # fmt: skip
    away = [
        "/monitoring", "/monitoring/summary", "/login", "/logout", "/nowhere", "/gradio_api/deep_link", "/gradio_api/dev/reload",
        "/gradio_api/proxy=a", "/gradio_api/vibe-code", "/gradio_api/runs", "/gradio_api/stream/a/b/1/playlist.m3u8", "/config/x",
    ]  # fmt: skip
    calls = ["call/score", "call/v2/score/", "queue/join", "run/predict", "cancel", "reset", "upload"]
    gone = [
        "component_server",
        "process_recording",
        "vibe-edit",
        "run/score",
        "api/score",
        "stream/a/close",
        "deep_link",
        "login",
    ]
    for method, routes, status in (
        *(("GET", there, 200), ("HEAD", there, 200), ("GET", away, 404), ("POST", away, 404)),
        *(("POST", [f"/gradio_api/{route}" for route in gone], 404), ("PUT", there, 404), ("DELETE", there, 404)),
        ("POST", [f"/gradio_api/{route}" for route in calls], 200),
    ):
        for route in routes:
            assert answer(tmp_path, route, b'{"event_id": ""}', method=method)[0] == status, (method, route)


def test_a_page_for_this_machine_answers_to_its_names_alone(tmp_path):
    def status(**headers: str) -> int:
        return answer(tmp_path, "/", method="GET", headers=headers, is_loopback=True)[0]

    for name in ("127.0.0.1", "localhost", "LocalHost", "[::1]"):
        assert [status(host=name), status(host=f"{name}:7860")] == [200, 200]
    for name in (
        "evil.example",
        "evil.example:7860",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "",
        ":7860",
        "[::1].a",
        "::1",
    ):
        assert status(host=name) == 403, name
        assert answer(tmp_path, "/", method="GET", headers={"host": name})[0] == 200
    assert status() == 403


def test_a_page_of_another_site_may_not_call(tmp_path):
    def status(origin: str, path: str = "/gradio_api/upload", host: str = "127.0.0.1:7860") -> int:
        return answer(tmp_path, path, b"file", headers={"host": host, "origin": origin})[0]

    for origin in (
        "http://evil.example",
        "http://127.0.0.1:8080",
        "http://127.0.0.1",
        "null",
        "",
        "https://evil.example/127.0.0.1:7860",
    ):
        assert [status(origin), status(origin, "/gradio_api/call/score")] == [403, 403], origin
    assert [status("http://127.0.0.1:7860"), status("https://Page.example", host="page.example")] == [200, 200]


def test_a_host_that_a_proxy_says_is_one_that_can_be(tmp_path):
    def status(**headers: str) -> int:
        return answer(tmp_path, "/", method="GET", headers={name.replace("_", "-"): value for name, value in headers.items()})[0]

    for host in ("page.example", "page.example:8443", "10.0.0.1", "[::1]:65535", "page.example, inner:80"):
        assert status(x_forwarded_host=host) == 200
    for host in ("a\x1b[31m", "[::", "a b", "a:123456", "a:b", "a/b", "user@a", "[:::::]", "999.1.1.1"):
        assert status(x_forwarded_host=host) == 400
    assert status(x_gradio_server="http://evil.example") == 400
    twice = [(b"x-forwarded-host", host) for host in (b"[::", b"page.example")]  # Gradio takes the first
    for headers in (twice, twice[::-1]):
        assert answer(tmp_path, "/", method="GET", raw_headers=headers)[0] == 400


def make_sparse(path: Path, size: int, age_s: float = 0.0) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    os.utime(path, (time.time() - age_s,) * 2)


def test_old_uploads_make_room_for_new_ones_and_young_ones_do_not(tmp_path):
    size = 2 * MIN_FILE_BYTES
    for number in range(10):
        make_sparse(tmp_path / str(number) / "file", size, age_s=7000 - number)
    assert make_room(tmp_path, 10 * size) == 10 * size
    assert len(list(tmp_path.iterdir())) == 10
    assert make_room(tmp_path, 5 * size - 1) == 4 * size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7", "8", "9"]
    make_sparse(tmp_path / "young", 5 * size)
    assert make_room(tmp_path, 5 * size - 1) == 5 * size
    assert list(tmp_path.iterdir()) == [tmp_path / "young"]
    status, said = answer(tmp_path, "/gradio_api/upload", b"file", max_cache_bytes=5 * size - 1)
    assert (status, b"no room" in said) == (507, True)
    assert answer(tmp_path, "/gradio_api/upload", b"file") == (200, b"file")


def test_very_many_small_uploads_take_the_room_that_their_folders_and_lists_take(tmp_path):
    for number in range(10):
        make_sparse(tmp_path / f"{number}", 1)
    assert make_room(tmp_path, 0) == 10 * MIN_FILE_BYTES

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        for number in range(2):
            await receive()
            begun_files.get().extend([tmp_path / f"new {number}"] * 10)
        await echo(scope, receive, send)

    status, said = answer(tmp_path, "/gradio_api/upload", *[b"1"] * 3, app=app, max_cache_bytes=29 * MIN_FILE_BYTES)
    assert (status, b"fewer files" in said) == (413, True)
    make_sparse(tmp_path / "young", 100 * MIN_FILE_BYTES)
    status, said = answer(tmp_path, "/gradio_api/upload", *[b"1"] * 3, app=app, max_cache_bytes=119 * MIN_FILE_BYTES)
    assert (status, b"no room" in said) == (507, True)
    assert make_room(tmp_path, 0, min_age_s=-1) == 0
    assert list(tmp_path.iterdir()) == []


def test_uploads_at_once_get_together_what_room_there_is(tmp_path):
    upload = {"type": "http", "path": "/gradio_api/upload", "method": "POST"}
    piece = bytes(200)
    inner: list[tuple[int, bytes]] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        """The first reads half, then the next comes and reads all, then the first goes on."""
        if not (tmp_path / "half").exists():
            make_sparse(tmp_path / "half", len((await receive())["body"]) * MIN_FILE_BYTES)
            inner.append(await answer_of(guard, upload, piece))
        await echo(scope, receive, send)

    unit = 200 * MIN_FILE_BYTES  # of the half that is there, which counts as much again as it comes
    for room, statuses in ((unit + 390, [200, 507]), (unit + 410, [200, 200])):
        (tmp_path / "half").unlink(missing_ok=True)
        guard = Guard(app, tmp_path, lambda event, endpoint: False, max_cache_bytes=4 * unit)
        make_sparse(tmp_path / "young", 4 * unit - room)
        with ThreadPoolExecutor(1) as thread:
            outer = thread.submit(asyncio.run, answer_of(guard, upload, piece, piece)).result()
        assert [inner.pop()[0], outer[0]] == statuses
    status, said = answer(tmp_path / "empty", "/gradio_api/upload", *[piece] * 3, max_cache_bytes=2000)
    assert (status, b"fewer files at a time" in said) == (413, True)


def test_calls_at_once_take_together_no_more_memory_than_the_limit(tmp_path):
    first, other = ({"type": "http", "path": f"/gradio_api/call/{name}", "method": "POST"} for name in ("first", "other"))
    statuses: list[int] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope is first:  # while this one is at work, others come
            for bodies in ([b"2" * 50], [b"3" * 30, b"3" * 25], [b"4" * 50]):
                statuses.append((await answer_of(guard, other, *bodies))[0])
        await echo(scope, receive, send)

    guard = Guard(app, tmp_path, lambda event, endpoint: False, max_waiting_bytes=100)
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(asyncio.run, answer_of(guard, first, b"1" * 48)).result() == (200, b"1" * 48)
    assert statuses == [200, 503, 200] * 2


@pytest.mark.parametrize("route", ["queue/join", "cancel"])
def test_a_call_whose_body_breaks_off_is_none(tmp_path, route):
    request = {"type": "http", "path": f"/gradio_api/{route}", "method": "POST"}
    messages = [{"type": "http.request", "body": b'{"event_id": "a"}', "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def fail(*anything: Any) -> None:
        pytest.fail("it was handed on")

    guard = Guard(fail, tmp_path, lambda event, endpoint: pytest.fail("it was cancelled"))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, guard(request, receive, fail)).result()


def test_what_goes_wrong_below_is_a_sentence_and_leaves_no_file(tmp_path):
    async def fails(scope: dict[str, Any], receive: Any, send: Any) -> None:
        begun_files.get().append(tmp_path / "begun")
        begun_files.get()[0].write_bytes(b"half of a fi")
        if scope["path"] == "/later":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError(3)

    status, said = answer(tmp_path, "/gradio_api/upload", b"file", app=fails)
    assert (status, b"cannot be answered" in said) == (400, True)
    assert list(tmp_path.iterdir()) == []


def test_a_thousand_uploads_take_no_more_room_than_the_limit(tmp_path):
    limit = 20 * MIN_FILE_BYTES
    for number in range(1000):
        assert answer(tmp_path, "/gradio_api/upload", b"file", max_cache_bytes=limit)[0] == 200
        make_sparse(tmp_path / f"{number}.bin", MIN_FILE_BYTES, age_s=700)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit + MIN_FILE_BYTES
