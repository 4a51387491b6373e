"""The page among strangers: it serves no file of this machine, connects to nobody, and answers nonsense with sentences."""

import http.client
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from page_client import client_of
from page_server import ROOT, PageProcess
from waiting import wait_until

from app import ui

SECRET = "not for you: 4711"
FILE_DATA = {"meta": {"_type": "gradio.FileData"}}
CALLS = {
    "score": [None, "", "media", False],
    "generate": [None, "Once", "", -1, 8, 1, 1.0, 0, 1.0, 0, -1, "tiles", False, ""],
    "batch_plan": [None, '[[jobs]]\ntext = "Once"\nnum_bytes = 8'],
    "batch": [None, '[[jobs]]\ntext = "Once"\nnum_bytes = 8'],
}
WRONG = [
    None, True, -1, 1.5, 10**30, float("nan"), float("inf"), "", "x", "NaN", "1e400", "\0", "\ud800", "x" * 100_000, [], [1],
    [[[]]], {}, {"a": 1}, FILE_DATA | {"path": "/etc/passwd"}, [FILE_DATA | {"path": 5}], FILE_DATA | {"path": None},
]  # fmt: skip


@pytest.fixture(scope="module")
def without_network(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen]:
    """A page and a script in a network of their own with nothing in it where that is permitted.

    The page's own watch stands for it elsewhere.
    """
    command = [sys.executable, Path(__file__).with_name("offline.py"), tiny_models, tmp_path_factory.mktemp("offline")]
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0:
        command = ["unshare", "-n", *command, "alone"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module", autouse=True)
def _it_starts_beside_the_other_tests(request: pytest.FixtureRequest) -> None:
    of_module = (item for item in request.session.items if item.path == request.path)
    if any("without_network" in item.fixturenames for item in of_module):
        request.getfixturevalue("without_network")


def get(page: PageProcess, path: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers, with the path sent as it is and no redirect followed."""
    address = urllib.parse.urlsplit(page.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    try:
        connection.putrequest("GET", path, skip_host=False)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def post(page: PageProcess, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(f"{page.url}{path}", body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read().decode()
            return error.code, json.loads(said) if said.startswith("{") else {"detail": said}


def call(page: PageProcess, name: str, values: list[Any]) -> str:
    """All that a named endpoint answers, or what refuses the call."""
    status, answer = post(page, f"gradio_api/call/{name}", json.dumps({"data": values}).encode())
    if status != 200:
        assert status < 500, (name, values, answer)
        return json.dumps(answer)
    with urllib.request.urlopen(f"{page.url}gradio_api/call/{name}/{answer['event_id']}", timeout=60) as stream:
        return stream.read().decode()


def uploaded(page: PageProcess, name: str, content: bytes) -> tuple[int, Any]:
    head = f'--cut\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: text/plain\r\n\r\n'
    body = head.encode() + content + b"\r\n--cut--\r\n"
    return post(page, "gradio_api/upload", body, "multipart/form-data; boundary=cut")


def places(secret: Path) -> Iterator[str]:
    """A hundred ways to ask for files, by their path behind the address of the page."""
    files = [
        secret,
        Path("/etc/passwd"),
        Path("/proc/self/environ"),
        ROOT / "app" / "ui.py",
        ROOT / "weights" / "text" / "config.json",
    ]
    for file in files:
        up = "../" * 12 + str(file).lstrip("/")
        encoded = urllib.parse.quote(up, safe="")
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "gradio_api/stream/"):
            for path in (str(file), up, encoded):
                yield f"/{route}{path}"
    for file in (str(secret), "/etc/passwd"):
        yield f"/gradio_api/file={ROOT}/app/samples/../../../../../../../../..{file}"
        yield f"/gradio_api/file={ROOT}/app/samples/lamp.txt/../../../../../../../../../..{file}"
        yield f"/gradio_api/file=/{file}"
        yield f"/gradio_api/file=file://{file}"
        yield f"/gradio_api/file=%2e%2e/%2e%2e/%2e%2e{file}"
        yield f"/gradio_api/file=..\\..\\..{file}"
        yield f"/gradio_api/file={file}%00.png"
        yield f"/gradio_api/custom_component/x/client/component/../../../../..{file}"
        yield f"/theme.css?v=../../..{file}"
    for address in ("http://127.0.0.1:1/a", "https://example.org/a", "http://[::1]:1/a", "HTTP://169.254.169.254/a"):
        for route in ("gradio_api/file=", "gradio_api/file/", "gradio_api/proxy=", "proxy=", "file="):
            yield f"/{route}{address}"


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("private") / "secret.txt"
    path.write_text(SECRET)
    return path


def test_a_hundred_ways_to_read_a_file_of_this_machine_all_fail(page_server, secret):
    markers = (SECRET.encode(), b"root:", b"PATH=", b"def launch(", b"max_seq_len")
    asked = list(places(secret))
    assert len(asked) >= 100
    for path in asked:
        status, body, _ = get(page_server, path)
        assert status < 500, path
        assert not any(marker in body for marker in markers), path
    assert get(page_server, f"/gradio_api/file={ROOT}/app/samples/lamp.txt")[0] == 200  # the control: this one is allowed
    assert page_server.foreign_connections() == []


@pytest.mark.parametrize("name", ["score", "generate", "batch"])
def test_a_forged_file_is_neither_read_nor_fetched(page_server, secret, name):
    addresses = ["http://127.0.0.1:1/a", "https://example.org/a.png", "HTTPS://example.org/a.png"]
    paths = [str(secret), f"{ROOT}/app/samples/../../{ROOT}/{secret}", f"file://{secret}", "/etc/passwd", *addresses]
    for path, more in itertools.product(paths, ({}, {"url": "https://example.org/a"}, {"is_stream": True})):
        forged = FILE_DATA | {"path": path, "orig_name": "a.txt"} | more
        values = [[forged] if name == "batch" else forged, *CALLS[name][1:]]
        if name == "generate":
            values[1] = ""
        if name == "batch":
            values[1] = '[[jobs]]\nfiles = "*"'
        answer = call(page_server, name, values)
        assert "complete" not in answer or "bits_per_byte" not in answer, (path, answer)
        assert SECRET not in answer
        assert "Traceback" not in answer
    assert page_server.foreign_connections() == []


def test_a_file_of_another_visitor_needs_its_secret_name(page_server):
    status, [path] = uploaded(page_server, "mine.txt", b"mine")
    assert status == 200
    assert len(Path(path).parent.name) >= 20
    assert get(page_server, f"/gradio_api/file={Path(path).parent}")[0] in (403, 404)
    assert get(page_server, f"/gradio_api/file={Path(path).parents[1]}")[0] in (403, 404)


def wrong_calls() -> list[tuple[str, list[Any]]]:
    """Calls with one wrong value each, and some with a wrong number of values."""
    calls = [
        (name, [*values[:place], wrong, *values[place + 1 :]])
        for name, values in CALLS.items()
        for place in range(len(values))
        for wrong in WRONG
    ]
    return calls + [(name, values) for name in CALLS for values in ([], [None] * 40)]


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_wrong_values_are_refused_without_a_traceback(page_server, every):
    calls = wrong_calls()
    assert len(calls) >= 300
    logged = page_server.log.stat().st_size
    for name, values in calls[::every]:
        answer = call(page_server, name, values)
        shown = (name, str(values)[:200], answer[:500])
        assert "Traceback" not in answer, shown
        assert re.search("event: (complete|error)|detail", answer), shown
        # Nothing is said about the inside of the program.
        assert not re.search(r"site-packages|\.py\b|<class|object at|NoneType", answer), shown
    said = page_server.log.read_bytes()[logged:].decode(errors="replace")
    assert "Traceback" not in said, said[-3000:]


def test_a_text_of_ten_million_bytes_is_answered(page_server):
    started = time.monotonic()
    for name in ("generate", "batch_plan"):
        values = list(CALLS[name])
        values[1] = "x" * 10_000_000
        assert re.search("event: (complete|error)", call(page_server, name, values))
    status, answer = post(page_server, "gradio_api/call/generate", json.dumps({"data": ["x" * 17_000_000]}).encode())
    assert (status, "send long texts as files" in answer["detail"]) == (413, True)
    assert time.monotonic() - started < 60


def test_an_upload_beyond_the_limit_is_refused_and_leaves_nothing(page_server):
    before = {path for path in page_server.temporary.rglob("*") if path.is_file()}
    status, answer = uploaded(page_server, "large.bin", bytes(65 << 20))
    assert status == 413
    assert "exceeded maximum allowed size" in answer["detail"]
    assert {path for path in page_server.temporary.rglob("*") if path.is_file()} == before


def part(headers: str, content: bytes = b"abc") -> bytes:
    return f"--cut\r\nContent-Disposition: form-data{headers}\r\n\r\n".encode() + content


def test_an_upload_that_is_none_is_refused_and_leaves_nothing(page_server):
    before, logged = {path for path in page_server.temporary.rglob("*") if path.is_file()}, page_server.log.stat().st_size
    file, end = part('; name="files"; filename="a.bin"', bytes(100_000)), b"\r\n--cut--\r\n"
    bodies = [
        part('; name="files"'), part('; name="note"'), part('; name="other"; filename="a.bin"'), part('; filename="a.bin"'),
        part(""), file + b"\r\n" + part('; name="note"'), file + b"\r\n" + part(""),
    ]  # fmt: skip
    for query in ("", "?upload_id=4711"):
        for body in [*(body + end for body in bodies), file, file[:50_000], b""]:
            status, answer = post(page_server, f"gradio_api/upload{query}", body, "multipart/form-data; boundary=cut")
            assert (status, len(answer["detail"]) > 10) == (400, True), (body[:200], answer)
    address = urllib.parse.urlsplit(page_server.url)
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 9000000\r\n"
    with socket.create_connection((address.hostname, address.port)) as broken:
        broken.sendall(f"{head}Content-Type: multipart/form-data; boundary=cut\r\n\r\n".encode() + file)
        wait_until(lambda: {path for path in page_server.temporary.rglob("*") if path.is_file()} != before, every_s=0.01)
    wait_until(lambda: {path for path in page_server.temporary.rglob("*") if path.is_file()} == before, every_s=0.01)
    assert "Traceback" not in page_server.log.read_bytes()[logged:].decode(errors="replace")


def test_a_request_that_gradio_fails_at_is_refused_in_a_sentence(page_server):
    logged = page_server.log.stat().st_size
    unknown = {"data": [], "fn_index": 99999, "session_hash": "a"}
    for path, body in (
        ("queue/join", json.dumps(unknown)), ("run/predict", json.dumps(unknown)), ("call/v2/nothing", "{}"),
        ("call/v2/score", '{"nothing": NaN}'), ("cancel", '{"event_id": NaN}'), ("reset", '{"a": "\\ud800"}'),
        ("queue/join", "NaN"),
        ("cancel", '{"event_id": "a", "fn_index": NaN}'), ("component_server", "{}"), ("vibe-edit", "NaN"), ("run/score", "{}"),
    ):  # fmt: skip
        status, answer = post(page_server, f"gradio_api/{path}", body.encode())
        assert (status in range(400, 500), len(json.dumps(answer["detail"])) > 10) == (True, True), (path, body, status, answer)
    for path in ("call/score/unknown", "queue/data?session_hash=unknown"):
        status, body, _ = get(page_server, f"/gradio_api/{path}")
        assert (status, b"data: " in body) == (200, True)
    for path in (
        "/monitoring/summary",
        "/gradio_api/dev/reload",
        "/gradio_api/proxy=%00",
        "/gradio_api/deep_link?session_hash=a",
    ):
        assert get(page_server, path)[0] == 404
    for headers, expected in (({"X-Forwarded-Host": "a\x1b[31m"}, 400), ({"Host": "evil.example"}, 403), ({}, 200)):
        address = urllib.parse.urlsplit(page_server.url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
        connection.request("GET", "/config", headers=headers)
        assert connection.getresponse().status == expected, headers
        connection.close()
    assert page_server.log.read_bytes()[logged:] == b""


def test_a_page_leaves_no_folder_of_gradio_beside_its_uploads(page_server):
    assert [path.name for path in page_server.temporary.glob("gradio*")] == []


def test_no_name_of_an_upload_leads_out_of_its_folder(page_server):
    marker = "escaped-4711"
    names = [
        f"../{marker}", f"../../../{marker}", f"/tmp/{marker}", f"{ROOT}/{marker}", f"..\\..\\{marker}", f"C:\\{marker}",
        f"%2e%2e%2f{marker}", f"..%2f{marker}", f"..;/{marker}", f"a/../../../{marker}", f"{marker}\0.txt", f"~/{marker}",
        f"-rf {marker}", f"{marker}\u202etxt.exe", f"{marker}{'x' * 300}", f"file:///tmp/{marker}", ".", "..", "...", " ", "/",
    ]  # fmt: skip
    for name in names:
        status, answer = uploaded(page_server, name, name.encode())
        assert status < 500, (name, answer)
        if status == 200:
            [path] = map(Path, answer)
            assert path.resolve().is_relative_to(page_server.temporary.resolve()), name
            assert path.resolve().parents[1].name.startswith("uploads-"), path
            assert path.read_bytes() == name.encode(), name
    near = [*page_server.temporary.resolve().parents, page_server.temporary, Path.home(), Path("/tmp"), ROOT]
    assert not [path for folder in near for path in folder.glob(f"*{marker}*")]


def test_more_calls_of_one_caller_than_allowed_are_refused_in_words(page_url):
    caller = client_of(page_url)
    calls = [caller.submit(None, "Once", "", keep=1.0, num_bytes=1_000_000, api_name="/generate") for _ in range(9)]
    deadline = time.monotonic() + 30
    while not (refused := [call for call in calls if call.done()]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for each in calls:
        each.cancel()
    assert len(refused) == 1
    with pytest.raises(AppError, match="8 of your jobs are running; stop one or wait"):
        refused[0].result()


def test_limits_are_set():
    options = ui.launch_options(cancel=lambda event, endpoint: False)
    assert options["max_file_size"] == "64mb"
    assert options["share"] is False
    assert options["enable_monitoring"] is False
    for host, is_loopback in (("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("192.168.1.5", False)):
        [guard] = ui.launch_options(lambda event, endpoint: False, host)["app_kwargs"]["middleware"]
        assert guard.kwargs["is_loopback"] == is_loopback
    assert options["state_session_capacity"] <= 1000
    assert [str(path) for path in options["allowed_paths"]] == [str(ROOT / "app" / "samples")]
    assert ui.QUEUE_SIZE == 32
    assert max(ui.DELETE_CACHE) <= 6 * 3600
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@pytest.mark.parametrize("name", ["page.html", "drawing.svg", "script.js", "page.xhtml", "text.txt", "x.xml"])
def test_an_uploaded_page_is_a_download_and_never_shown(page_server, name):
    content = b"<html xmlns='http://www.w3.org/1999/xhtml'><script>alert(1)</script></html>"
    status, [path] = uploaded(page_server, name, content)
    assert status == 200
    status, body, headers = get(page_server, f"/gradio_api/file={urllib.parse.quote(path)}")
    assert (status, body) == (200, content)
    is_download = headers.get("content-disposition", "").startswith("attachment")
    assert is_download or headers["content-type"].startswith("text/plain"), headers


AT_ONCE = 8  # jobs that one caller may have
HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"><svg onload=alert(1)>", "javascript:alert(1)", "{{7*7}}",
    "${7*7}", "'; DROP TABLE jobs; --", "$(touch made)", "`touch made`", "| touch made", "../../etc/passwd", "%s%n%x",
    "\u202egpj.exe",
    "\u200b", "\ufeff", "NULL", "undefined", "-1", "1/0", "Ω≈ç√∫", "田中さん", "🙂", "ﷺ", "A\u0301" * 50, "\x7f", "<!--", "]]>",
    "<%= 7 %>", "COM1", "file:///etc/passwd", "\\\\server\\share", "a" * 1000,
]  # fmt: skip


@pytest.mark.parametrize("count", [len(HOSTILE), pytest.param(500, marks=pytest.mark.slow)])
def test_hostile_text_stays_the_same_text(page_server, page_url, tmp_path, count):
    client, choose = client_of(page_url), random.Random(0)
    texts = HOSTILE + ["".join(choose.choices(HOSTILE, k=choose.randint(2, 4))) for _ in range(count - len(HOSTILE))]
    for start in range(0, len(texts), AT_ONCE):
        group = texts[start : start + AT_ONCE]
        calls = [client.submit(None, text, "", num_bytes=4, seed=1, api_name="/generate") for text in group]
        for text, each in zip(group, calls, strict=True):
            [file], [facts] = each.result(timeout=60)
            assert Path(file).read_bytes()[:-4] == text.encode(), text
            assert facts["num_bytes_kept"] == len(text.encode())
        quoted = [json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in group]
        recipe = "".join(f"[[jobs]]\ntext = {text}\nnum_bytes = 4\n" for text in quoted)
        items = client.predict(None, recipe, api_name="/batch_plan")["items"]
        assert ["error" in item for item in items] == [False] * len(group), group
    names = [text.replace("/", "_").replace("\\", "_")[:100] + f"{number}.txt" for number, text in enumerate(texts[::3])]
    for start in range(0, len(names), AT_ONCE):
        paths = [tmp_path / name for name in names[start : start + AT_ONCE]]
        for path in paths:
            path.write_bytes(b"Once")
        for each in [client.submit(handle_file(path), "", api_name="/score") for path in paths]:
            answer = each.result(timeout=60)
            assert "/" not in answer["file"]
            assert answer["num_bytes"] == 4
    assert not list(page_server.temporary.rglob("made"))
    assert not (ROOT / "made").exists()


def test_everything_works_without_a_network(without_network):
    out, err = without_network.communicate(timeout=120)
    assert without_network.returncode == 0, err
    assert "bits per byte" in out
