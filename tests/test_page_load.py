"""Many users of the page at once: no error, the bytes of their own seeds, no memory lost."""

import json
import subprocess
import sys
import time
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from page_server import ROOT, PageProcess, page_process

from tests.forked_run import PROCESSES
from tests.page_session import events_of_a_session


def load(page: PageProcess, weights: Path, num_users: int, seconds: float) -> dict:
    """What the users found, and from here, where nothing else is at work, the page's memory and how long it took to come."""
    script = Path(__file__).with_name("load.py")
    command = [sys.executable, script, page.url, weights, str(num_users), str(seconds)]
    memory, page_seconds, began = [], [], time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as users:
        while True:
            try:
                out, err = users.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                assert time.monotonic() - began < seconds + 180
                memory.append(memory_of(page.process.pid))
                page_seconds.append(seconds_of_page(page.url))
    assert users.returncode == 0, err
    return json.loads(out.splitlines()[-1]) | {"memory_mb": memory, "page_seconds": page_seconds}


def memory_of(pid: int) -> float:
    """Resident memory of a process in MB."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def seconds_of_page(url: str) -> float:
    """How long the page takes to come."""
    started = time.monotonic()
    with urllib.request.urlopen(url, timeout=60) as page:
        page.read()
    return time.monotonic() - started


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


def test_a_session_does_not_grow_with_its_events():
    """In a process of its own: Gradio leaves an event loop open. Not forked from this one, which has threads."""
    process = PROCESSES.Process(target=events_of_a_session)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("num_users", "seconds"),
    [(4, 2), pytest.param(10, 120, marks=pytest.mark.slow), pytest.param(50, 600, marks=pytest.mark.slow)],
)
def test_users_at_once_get_the_bytes_of_their_own_seeds(page_server, tiny_models, tmp_path, num_users, seconds):
    is_long = seconds >= 120
    with page_process(tiny_models, tmp_path) if is_long else nullcontext(page_server) as page:
        logged = page.log.stat().st_size
        found = load(page, tiny_models, num_users, seconds)
        said = page.log.read_bytes()[logged:].decode(errors="replace")
    memory, waited = np.array(found.pop("memory_mb")), {name: found.pop(name) for name in ("seconds", "page_seconds")}
    found |= {f"{name}_p95": p95(values) for name, values in waited.items() if values}
    parts = np.array_split(memory, min(20, len(memory)))
    print(json.dumps(found), "MB in equal parts of the time:", *(round(np.median(part)) for part in parts))
    assert found["problems"] == []
    assert "Traceback" not in said
    assert sum(found["counts"].values()) >= 4 * num_users
    assert set(found["counts"]) == {"complete", "score", "plan", "cancel"} or seconds < 60
    if is_long:
        middle, last = np.array_split(memory, 3)[1:]
        # No upward slope after the warm-up, which takes a minute or two.
        assert np.median(last) < (1.015 if seconds >= 600 else 1.04) * np.median(middle)
        assert found["seconds_p95"] < 60
        assert found["page_seconds_p95"] < 1
