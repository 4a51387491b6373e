"""Tiny runs in processes of their own that start in milliseconds: forked from one that has imported what they need."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch._dynamo  # noqa: F401  the first optimizer of every process would import it, for seconds
from tqdm import tqdm

from core.config import Config
from tests.tiny_run import run_tiny

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, "tests.forked_app"])


def start(run: Path, config: Config) -> multiprocessing.Process:
    """Begins a run in the folder `run`, or goes on with the one that is there."""
    process = PROCESSES.Process(target=_train, args=(run, config))
    process.start()
    return process


def _train(run: Path, config: Config) -> None:
    tqdm.set_lock(threading.RLock())  # one between processes would be left behind by those that are killed
    run_tiny(run.parent, run.name, config, resume=(run / "config.json").exists())


def wait_for(happened: Callable[[], bool], process: multiprocessing.Process) -> None:
    while process.is_alive() and not happened():
        time.sleep(0.0002)


def steps_reported(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
