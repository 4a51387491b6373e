"""Many users of the page at once: no error, the bytes of their own seeds, no memory lost."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from page_server import ROOT, PageProcess, page_process


def load(page: PageProcess, weights: Path, num_users: int, seconds: float) -> dict:
    script = Path(__file__).with_name("load.py")
    command = [sys.executable, script, page.url, str(page.process.pid), weights, str(num_users), str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 180)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


EVENTS_OF_A_SESSION = """
import asyncio
from app import ui
import gradio as gr
from gradio.state_holder import SessionState

with ui.Page() as page:
    gr.Button().click(lambda: None, None, [gr.JSON(), gr.JSON()])
state, [event] = SessionState(page), page.fns.values()

async def happen():
    for number in range(10):
        await page.postprocess_data(event, [gr.skip(), gr.skip()], state)
        await page.postprocess_data(event, [{"number": number}, {}], state)

before = set(state.blocks_config.blocks)
asyncio.run(happen())
assert set(state.blocks_config.blocks) == before, "components"
assert set(state.config_values) <= before, "values"
"""


def test_a_session_does_not_grow_with_its_events():
    """In a process of its own: Gradio leaves an event loop open."""
    subprocess.run([sys.executable, "-c", EVENTS_OF_A_SESSION], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("num_users", "seconds"),
    [(4, 6), pytest.param(10, 120, marks=pytest.mark.slow), pytest.param(50, 600, marks=pytest.mark.slow)],
)
def test_users_at_once_get_the_bytes_of_their_own_seeds(tiny_models, tmp_path, num_users, seconds):
    with page_process(tiny_models, tmp_path) as page:
        found = load(page, tiny_models, num_users, seconds)
        said = page.log.read_text(errors="replace")
    memory = np.array(found.pop("memory_mb"))
    parts = np.array_split(memory, min(20, len(memory)))
    print(json.dumps(found), "MB in equal parts of the time:", *(round(np.median(part)) for part in parts))
    assert found["problems"] == []
    assert "Traceback" not in said
    assert sum(found["counts"].values()) >= 2 * num_users
    assert set(found["counts"]) == {"complete", "score", "plan", "cancel"} or seconds < 60
    if seconds >= 120:
        middle, last = np.array_split(memory, 3)[1:]
        assert np.median(last) < 1.03 * np.median(middle) + 5  # no upward slope after the warm-up
        assert found["p95_seconds"] < 60
        assert found["page_p95_seconds"] < 1
