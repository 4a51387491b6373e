"""The page in a process of its own, for the tests that talk to it as a browser or a script does.

A process of its own because Gradio leaves sockets and an event loop open when it stops, which warnings-as-errors would
count against whichever test runs then.
"""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_LIMIT_S = 60


@contextmanager
def served_page(weights: Path) -> Iterator[str]:
    """Serves the page with the models of a folder and answers its URL, which ends with a slash."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    with subprocess.Popen([sys.executable, __file__, str(weights), str(port)], cwd=ROOT) as server:
        try:
            wait_for_page(url, server)
            yield url
        finally:
            server.terminate()


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


def main(weights: str, port: str) -> None:
    sys.path.insert(0, str(ROOT))
    from app import ui
    from app.service import Service

    ui.launch(Service(weights=Path(weights), runs=Path(weights) / "no-runs"), port=int(port), open_browser=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
