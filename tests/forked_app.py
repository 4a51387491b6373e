"""The command line in processes of its own that start in milliseconds: forked from one that has imported most of it.

They run all of `app/__main__.py`. The start of the interpreter is for tests that call `python -m app`.
"""

import functools
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from tqdm import tqdm

from app import service
from tests.forked_run import PROCESSES


class ForkedApp:
    """A call with the part of `subprocess.Popen` that tests use; `stdout` and `stderr` are pipes, or paths that are given.

    `weights` is the folder of its models, the shipped ones by default; `before` is what the process does first.
    """

    def __init__(
        self,
        *arguments: object,
        weights: Path | None = None,
        stdout: str | Path | None = None,
        stderr: str | Path | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        pipes = [Pipe(duplex=False) if path is None else (None, path) for path in (stdout, stderr)]
        ends = [end for _, end in pipes]
        call = ([str(argument) for argument in arguments], weights, ends, before)
        self._process = PROCESSES.Process(target=_run, args=call, daemon=True)
        self._process.start()
        self.pid = self._process.pid
        self.stdout, self.stderr = (reader and os.fdopen(os.dup(reader.fileno()), errors="replace") for reader, _ in pipes)
        for pipe in pipes:
            for end in pipe:
                if isinstance(end, Connection):
                    end.close()

    def __enter__(self) -> "ForkedApp":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """What it says on both streams until it ends; it is killed at the end of the time."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with ThreadPoolExecutor(2) as pool:
            out, err = pool.map(lambda stream: stream.read() if stream else "", (self.stdout, self.stderr))
        self.wait()
        timer.cancel()
        return out, err

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    arguments: list[str], weights: Path | None, ends: list[Connection | str | Path], before: Callable[[], object] | None
) -> None:
    for number, end in enumerate(ends, start=1):
        source = os.open(end, os.O_WRONLY | os.O_CREAT) if not isinstance(end, Connection) else end.fileno()
        os.dup2(source, number)
        os.close(source) if not isinstance(end, Connection) else end.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    if before is not None:
        before()
    if weights is not None:
        service.Service = functools.partial(service.Service, weights=weights, runs=weights / "no-runs")
    tqdm.set_lock(threading.RLock())
    sys.argv[1:] = arguments
    sys.modules.pop("app.__main__", None)  # a module with a test may have imported it
    runpy.run_module("app", run_name="__main__", alter_sys=False)
