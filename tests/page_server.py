"""The page in a process of its own, for the tests that talk to it as a browser or a script does.

A process of its own because Gradio leaves sockets and an event loop open when it stops, which warnings-as-errors would
count against whichever test runs then. It writes down every connection that it makes to anything but itself.
"""

import ast
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START_LIMIT_S = 180  # a busy machine takes long to import it all
OWN_HOSTS = ("127.0.0.1", "::1", "localhost", "0.0.0.0", None)


@dataclass(frozen=True)
class PageProcess:
    """A running page: its URL ends with a slash, its temporary files lie in `temporary`, what it says goes to `log`."""

    url: str
    process: subprocess.Popen
    temporary: Path
    log: Path

    def end_jobs(self) -> None:
        """Asks all jobs of the page to end, so that they take nothing from what comes after them."""
        self.process.send_signal(signal.SIGUSR1)

    def foreign_connections(self) -> list[str]:
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("connection: ")]

    def wait(self) -> None:
        """Until it answers."""
        wait_for_page(self.url, self.process)


@contextmanager
def page_process(weights: Path, folder: Path) -> Iterator[PageProcess]:
    """Serves the page, with its temporary files and its log in a folder; it must have connected to nobody at its end."""
    with starting_page(weights, folder) as page:
        page.wait()
        yield page


@contextmanager
def starting_page(weights: Path, folder: Path) -> Iterator[PageProcess]:
    """As `page_process`, but it answers only after a while."""
    port, temporary, log = free_port(), folder / "temporary", folder / "page.log"
    temporary.mkdir(parents=True)
    command = [sys.executable, __file__, str(weights), str(port)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with log.open("wb") as said, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said) as process:
        page = PageProcess(f"http://127.0.0.1:{port}/", process, temporary, log)
        try:
            yield page
        finally:
            process.terminate()
            process.wait()
            sys.stderr.write(log.read_text(errors="replace"))
    assert page.foreign_connections() == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_page(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url).close()
            return
        except urllib.error.URLError:
            assert server.poll() is None, "the page ended before it answered"
            time.sleep(0.1)
    raise AssertionError(f"the page did not answer within {START_LIMIT_S} s")


def note_stubs(note: Callable[[], object]) -> None:
    """Has `note` called from now on when Gradio makes or checks the stub of its Number: of the syntax tree of its source."""
    parse = ast.parse

    def parse_and_note(code: Any, *arguments: Any, **options: Any) -> ast.AST:
        if "class Number(" in str(code):
            note()
        return parse(code, *arguments, **options)

    ast.parse = parse_and_note


def main(weights: str, port: str) -> None:
    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            address = arguments[:2]
        elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
            address = arguments[1][:2]
        else:
            return
        host = address[0].decode() if isinstance(address[0], bytes) else address[0]
        if host not in OWN_HOSTS or (address[1] and int(address[1]) != int(port)):
            print(f"connection: {event} to {address}", file=sys.stderr, flush=True)

    sys.addaudithook(watch)
    sys.path.insert(0, str(ROOT))
    note_stubs(lambda: print("a stub", file=sys.stderr, flush=True))
    from app.without_stubs import import_page

    ui = import_page()
    from app.jobs import STOPPED, JobStore
    from app.service import Service

    def end_jobs(*_: object) -> None:
        for job in list(store._jobs.values()):
            job.must_end = job.must_end or STOPPED

    store = JobStore()
    signal.signal(signal.SIGUSR1, end_jobs)
    ui.JobStore = lambda: store
    ui.launch(
        Service(weights=Path(weights), runs=Path(weights) / "no-runs", listed_only=True), port=int(port), open_browser=False
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
