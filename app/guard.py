"""What is refused before Gradio looks at it: other sites, routes without a use here, large bodies, uploads without room.

Gradio reads a body of any size into memory, fetches files that are named by an address, and keeps uploads until they are old.
Which calls are cancelled is heard here too, because Gradio does not tell those at work.
"""

import contextlib
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
from anyio import to_thread

from app.uploads import MIN_FILE_BYTES, leftovers_removed, make_room

MAX_BODY_BYTES = 16 << 20  # of a call; files come by themselves
MAX_VALUES = 100_000  # of a call; each takes Gradio a hundred bytes and a microsecond or more
MAX_CANCEL_BYTES = 4096
MAX_WAITING_BYTES = 256 << 20  # of all calls that are being read or begun
MAX_CACHE_BYTES = 4 << 30  # of uploads and of the copies that the page shows
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# What the page, its scripts and gradio_client ask for; Gradio has more, which write files, never end or fail aloud.
ROUTES = {
    "GET": re.compile(
        r"|/config|/theme\.css|/robots\.txt|/favicon\.ico|/manifest\.json|/pwa_icon(/[^/]+)?|/(static|assets)/.*|/gradio_api/("
        r"info|openapi\.json|app_id|login_check|startup-events|theme\.css|upload_progress|queue/(data|status)|heartbeat/[^/]+"
        r"|call/(v2/)?[^/]+/[^/]+|file=.*)",
        re.DOTALL,
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|upload|cancel|reset|run/predict|call/(v2/)?[^/]+)"),
}
UPLOAD_ROUTE = "/gradio_api/upload"
CANCEL_ROUTES = ("/gradio_api/cancel", "/gradio_api/reset")  # some clients know the name of their event for the second only
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]+://", re.IGNORECASE)

# Where a proxy says that it is reached: Gradio makes addresses of it when a call is at work, and fails aloud at others.
_FORWARDED = re.compile(rb"(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?(\s*,.*)?|", re.IGNORECASE)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _RefusalError(Exception):
    """What ends a request that has been handed on."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Guard:
    """ASGI middleware around the page's server; `cache` is the folder of uploads, `cancel` that of `Calls`.

    With `is_loopback` it answers to the names of this machine alone: one of another site may be made to lead here.
    """

    def __init__(
        self,
        app: Any,
        cache: Path,
        cancel: Callable[[str, int | None], bool],
        max_body_bytes: int = MAX_BODY_BYTES,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        is_loopback: bool = False,
    ) -> None:
        self._app = app
        self._cache = cache
        self._cancel = cancel
        self._max_body_bytes = max_body_bytes
        self._max_cache_bytes = max_cache_bytes
        self._max_upload_bytes = max_cache_bytes // 4
        self._max_waiting_bytes = max_waiting_bytes
        self._is_loopback = is_loopback
        self._room = 0  # when the latest upload began, less all that has come since
        self._waiting_bytes = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method, named = scope["path"], scope["method"], list(scope.get("headers", ()))
        headers = dict(named)
        route = path.removeprefix(scope.get("root_path", "")).rstrip("/")
        host, origin = (headers[name].decode("latin-1").lower() if name in headers else None for name in (b"host", b"origin"))
        if self._is_loopback and re.sub(r":\d+$", "", host or "") not in LOOPBACK:
            await _refuse(
                send, 403, "this page answers to the names of its own machine alone; to let others in, start it with --host"
            )
        elif method == "POST" and origin is not None and origin.partition("://")[2] != host:
            await _refuse(send, 403, "pages of other sites may not use this one; a proxy before it has to pass Host on")
        elif b"x-gradio-server" in headers or not all(_is_host(value) for name, value in named if name == b"x-forwarded-host"):
            await _refuse(send, 400, "the headers of this request name no host that could be")
        elif any(_is_address(path.partition(before)[2]) for before in ("/file=", "/file/", "/proxy=")):
            await _refuse(send, 403, "files of other machines are not served here")
        elif not _is_route(method, route):
            await _refuse(send, 404, "there is nothing here")
        elif method == "POST" and route == UPLOAD_ROUTE:
            await self._take_upload(scope, receive, send)
        elif method == "POST":
            await self._take_call(scope, receive, send, is_cancel=route in CANCEL_ROUTES)
        else:
            await self._hand_on(scope, receive, send)

    async def _hand_on(self, scope: Message, receive: Receive, send: Send) -> None:
        """To Gradio; what it raises, and would be written to the terminal, refuses the request, or ends its answer."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if has_begun:
                with contextlib.suppress(Exception):  # shorter than it was to be
                    await send({"type": "http.response.body", "body": b""})
            elif isinstance(error, _RefusalError):
                await _refuse(send, error.status, error.sentence)
            else:
                await _refuse(send, 400, "this request cannot be answered; it names something unknown or is damaged")

    async def _take_upload(self, scope: Message, receive: Receive, send: Send) -> None:
        used = await to_thread.run_sync(make_room, self._cache, self._max_cache_bytes - self._max_upload_bytes)
        self._room = self._max_cache_bytes - used
        num_bytes = num_files = 0

        async def counted() -> Message:
            nonlocal num_bytes, num_files
            message = await receive()
            size = len(message.get("body", b"")) + (len(begun) - num_files) * MIN_FILE_BYTES
            num_bytes, num_files = num_bytes + size, len(begun)
            self._room -= size
            if num_bytes > self._max_upload_bytes:
                most = f"{self._max_upload_bytes >> 20} MB"
                raise _RefusalError(413, f"more than {most} at once are not taken; upload fewer files at a time")
            if self._room < 0:
                raise _RefusalError(507, "there is no room for more uploads; try again in ten minutes")
            return message

        with leftovers_removed() as begun:
            await self._hand_on(scope, counted, send)

    async def _is_cancelled(self, said: Any) -> bool:
        """Whether what a client gives up was ours to end.

        Raises:
            _RefusalError: if it says nothing that Gradio understands.
        """
        if not isinstance(said, dict) or not isinstance(event := said.get("event_id"), str):
            raise _RefusalError(400, "a call is given up by its event_id")
        endpoint, session = said.get("fn_index"), said.get("session_hash")
        if not isinstance(endpoint, int | None) or not isinstance(session, str | None):
            raise _RefusalError(400, "fn_index is a number and session_hash a text")
        return await to_thread.run_sync(self._cancel, event, endpoint)

    async def _take_call(self, scope: Message, receive: Receive, send: Send, is_cancel: bool) -> None:
        body = bytearray()
        try:
            if not await self._read_body(receive, body, MAX_CANCEL_BYTES if is_cancel else self._max_body_bytes):
                return
            content = bytes(body)
            value = await to_thread.run_sync(_read_json, content)
            if is_cancel and await self._is_cancelled(value):
                await _answer(send, 200, {"success": True})
                return
            arrived = [{"type": "http.request", "body": content, "more_body": False}]

            async def replay() -> Message:
                return arrived.pop() if arrived else await receive()

            await self._hand_on(scope, replay, send)
        except _RefusalError as error:
            await _refuse(send, error.status, error.sentence)
        finally:
            self._waiting_bytes -= len(body)

    async def _read_body(self, receive: Receive, body: bytearray, most: int) -> bool:
        """Adds what comes to `body`; whether it has come to its end.

        Raises:
            _RefusalError: if it has more than `most` bytes, or too much comes at once.
        """
        has_more = True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            piece, has_more = message.get("body", b""), message.get("more_body", False)
            body += piece
            self._waiting_bytes += len(piece)
            if len(body) > most:
                size = f"{most >> 20} MB" if most >> 20 else f"{most} bytes"
                raise _RefusalError(413, f"a call of more than {size} is not read; send long texts as files")
            if self._waiting_bytes > self._max_waiting_bytes:
                raise _RefusalError(503, "too much is sent to this page at once; try again soon")
        return True


def _read_json(body: bytes) -> Any:
    """The value of a JSON body; None for what is none, which Gradio answers.

    Raises:
        _RefusalError: if it has too many values, names files of other machines, or has a session without a name.
    """
    if _count_values(body) > MAX_VALUES:
        raise _RefusalError(413, f"a call of more than {MAX_VALUES} values is not read; send long texts as files")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if _names_an_address(value):
        raise _RefusalError(400, "files of other machines are not fetched; upload the file instead")
    if isinstance(value, dict) and value.get("session_hash") == "":
        raise _RefusalError(400, "a session_hash has at least one character")
    return value


def _count_values(body: bytes) -> int:
    """How many values JSON has, or more, without reading it: brackets and commas outside of strings, and strings."""
    if b"\0" in body:  # UTF-16 and UTF-32, whose quotes and backslashes stand elsewhere
        return len(body)
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_strings = plain.count(b'"') // 2
    if num_strings > MAX_VALUES:
        return num_strings
    outside = b"".join(plain.split(b'"')[::2])
    return num_strings + sum(map(outside.count, (b",", b"{", b"[")))


def _names_an_address(value: Any) -> bool:
    """Whether there is a file in a JSON value whose path is an address."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value and _is_address(value["path"]):
                return True
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return False


def _is_route(method: str, route: str) -> bool:
    known = ROUTES.get("GET" if method == "HEAD" else method)
    return known is not None and known.fullmatch(route) is not None


def _is_address(path: Any) -> bool:
    return isinstance(path, str) and _ADDRESS.match(path) is not None


def _is_host(forwarded: bytes) -> bool:
    """Whether what a proxy says, the outermost first, is a host that Gradio can make an address of."""
    if not _FORWARDED.fullmatch(forwarded):
        return False
    try:
        httpx.URL(f"http://{forwarded.decode('latin-1').partition(',')[0].strip()}")
    except httpx.InvalidURL:
        return False
    return True


async def _refuse(send: Send, status: int, sentence: str) -> None:
    await _answer(send, status, {"detail": sentence})


async def _answer(send: Send, status: int, value: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})
