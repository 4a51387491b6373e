"""How long the first answers take: the command line's help, the page, and the first byte of a completion on both.

python -m tests.benchmarks.startup [--rounds N] [--json]

A page and a process are started anew for every round. The first completion on a page also loads its model; the decoder is built
before, so what building it takes, once on a machine, is measured apart, in an empty cache folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from gradio_client import Client, handle_file

from core import native
from core.bench import spread
from tests.page_server import free_port, wait_for_page

ROOT = Path(__file__).parents[2]
SAMPLE = "app/samples/lamp.txt"


def app(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "app", *arguments]


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run(*arguments: str, **environment: str) -> None:
    subprocess.run(app(*arguments), cwd=ROOT, env=os.environ | environment, check=True, capture_output=True)


def page_round() -> dict[str, float]:
    """A page from its start to its second completion of one byte."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    started = time.perf_counter()
    with subprocess.Popen(app("ui", "--port", str(port), "--no-browser"), cwd=ROOT, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for_page(url, server)
            ready = time.perf_counter() - started
            client = Client(url, verbose=False)

            def complete() -> None:
                client.predict(handle_file(ROOT / SAMPLE), "", keep=0.5, num_bytes=1, api_name="/generate")

            return {"page ready": ready, "page, first completion": seconds_of(complete), "page, next one": seconds_of(complete)}
        finally:
            server.terminate()


def one_round() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        generate = ("generate", SAMPLE, "--num-bytes", "1", "--out", folder, "--force")
        return {
            "--help": seconds_of(lambda: run("--help")),
            **page_round(),
            "command line, whole process": seconds_of(lambda: run(*generate)),
            "the same, decoder not built": seconds_of(lambda: run(*generate, XDG_CACHE_HOME=folder)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    native.build()
    rounds = [one_round() for _ in range(options.rounds)]
    seconds = {name: [each[name] for each in rounds] for name in rounds[0]}
    if options.json:
        print(json.dumps({name: {"seconds": median(taken), "spread": spread(taken)} for name, taken in seconds.items()}))
        return
    for name, taken in seconds.items():
        print(f"{name:<28} {median(taken):6.2f} s (spread {spread(taken):.0%})")


if __name__ == "__main__":
    main()
