"""The page: theme, layout and named endpoints around the tabs, and the server that shows it."""

import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Gradio reads these: no start-up ping, no version check, nothing leaves the machine; few past events are kept in memory.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"

import gradio as gr
from gradio import route_utils, routes
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from app.calls import Calls
from app.endpoints import add_endpoints
from app.guard import Guard
from app.jobs import JobStore
from app.service import Service
from app.tabs import batch, complete, jobs, likelihood
from app.tabs.following import QUIET, greet, remember_tab, visitor_state
from app.tabs.refusals import reworded
from app.tabs.sources import SAMPLES_FOLDER
from app.upload_parser import UploadParser
from app.views import factory
from core import native
from core.allocator import trim_freed_memory
from core.errors import UserError

MAX_FILE_SIZE = "64mb"
QUEUE_SIZE = 32
MAX_SESSIONS = 500  # that are remembered, a quarter of a megabyte each
# Seconds between clean-ups of Gradio's cache, and the age at which a file goes: long enough for an open page.
DELETE_CACHE = (1800, 6 * 3600)
TRIM_EVERY_S = 10.0
SYSTEM_FONT = ["ui-sans-serif", "system-ui", "sans-serif"]
MONO_FONT = ["ui-monospace", "DejaVu Sans Mono", "monospace"]
PAGE_CSS = Path(__file__).with_name("ui.css")
HEADER = """
<header class="page-header">
  <h1>Megabyte</h1>
  <p>Pictures, sounds and text, read as plain bytes. See what a model expects of a file, or let it go on from there.</p>
</header>
"""


class Page(gr.Blocks):
    """Blocks that refuse a value of the wrong kind in a sentence, and whose sessions do not grow with every event.

    Gradio's own answer to a wrong value is a traceback on the terminal.
    """

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        values = await super().postprocess_data(block_fn, predictions, state)
        if state is not None:
            # Gradio 6.31 keeps what an update turns a component into under a number of its own, and the value with it, for ever.
            for kept in (state.blocks_config.blocks, state.config_values):
                for number in [number for number in kept if number not in self.blocks]:
                    kept.pop(number, None)
        return values

    async def preprocess_data(self, block_fn: Any, *arguments: Any, **options: Any) -> list[Any]:
        try:
            values = await super().preprocess_data(block_fn, *arguments, **options)
            for block, value in zip(block_fn.inputs, values, strict=True):
                if isinstance(block, gr.Number) and not isinstance(value, int | float | None):
                    raise TypeError
            return values
        except gr.Error as error:
            said = reworded(re.sub(r" \(type: .*?\)", "", str(error.message)))
        except Exception:
            said = "a value of this call is of the wrong kind; “Use via API” at the foot of the page says what each must be"
        raise gr.Error(said, print_exception=False)


def launch(service: Service, host: str = "127.0.0.1", port: int = 7860, open_browser: bool = True) -> None:
    """Serves the page until the process is interrupted.

    Raises:
        UserError: if another program has the port.
    """
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="uploads-", ignore_cleanup_errors=True) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # read when components are made
        route_utils.GradioMultiPartParser, routes.DEFAULT_TEMP_DIR = UploadParser, uploads
        calls = Calls(JobStore())
        page = build(service, calls)
        options = launch_options(calls.cancel, host)
        _, url, _ = page.launch(
            server_name=host, server_port=port, inbrowser=open_browser, quiet=True, prevent_thread_lock=True, **options
        )
        if service.is_on_cpu:
            threading.Thread(target=native.build, name="build", daemon=True).start()
        threading.Thread(target=_trim_memory, name="trim", daemon=True).start()
        print(f"The page is at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        try:
            page.block_thread()
        finally:
            calls.store.close()


def _trim_memory() -> None:
    while True:
        time.sleep(TRIM_EVERY_S)
        trim_freed_memory()


def check_port(host: str, port: int) -> None:
    """Refuses a port that is taken, before anything slow is done.

    Raises:
        UserError: naming the port.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port {port} on {host} cannot be used ({error.strerror}); choose another with --port") from None


def launch_options(cancel: Callable[[str, int | None], bool], host: str = "127.0.0.1") -> dict[str, Any]:
    """What `Blocks.launch` needs for this page, whoever calls it; `cancel` is that of `Calls`."""
    guard = Middleware(
        Guard, cache=Path(get_upload_folder()), cancel=cancel, is_loopback=host in ("127.0.0.1", "localhost", "::1")
    )
    return {
        "theme": theme(),
        "css": PAGE_CSS.read_text(encoding="utf-8") + factory.stylesheet(),
        "share": False,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "max_threads": 200,  # whoever follows a job holds one, most of the time asleep
        "max_file_size": MAX_FILE_SIZE,
        "state_session_capacity": MAX_SESSIONS,
        "footer_links": ["api", "settings"],
        "allowed_paths": [str(SAMPLES_FOLDER)],
        "app_kwargs": {"middleware": [guard]},
    }


def theme() -> gr.Theme:
    """Calm neutral surfaces, one accent from the palette of the views, and fonts that every system has."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_md,
        font=SYSTEM_FONT,
        font_mono=MONO_FONT,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        checkbox_background_color_selected_dark="*primary_500",
        block_border_width="1px",
        block_label_background_fill="transparent",
        color_accent="*primary_700",
        color_accent_soft="*primary_50",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
    )


def build(service: Service, calls: Calls) -> gr.Blocks:
    """The page with its tabs and endpoints; its jobs are kept in the store of the calls."""
    store = calls.store
    with Page(title="Megabyte", analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        add_endpoints(service, calls)  # first, because an event of the page may not take the name of an endpoint
        visitor = visitor_state()
        arrived = page.load(greet, visitor, visitor, queue=False, **QUIET)
        gr.HTML(HEADER, apply_default_css=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Likelihood", id="likelihood"):
                likelihood.build_tab(service, store, visitor, arrived)
            with gr.Tab("Complete", id="complete"):
                complete.build_tab(service, store, visitor, arrived)
            with gr.Tab("Batch", id="batch"):
                batch.build_tab(service, store, visitor, arrived)
            with gr.Tab("Jobs", id="jobs") as jobs_tab:
                jobs.build_tab(store, visitor, tabs, jobs_tab)
        remember_tab(page, tabs)
    return page.queue(max_size=QUEUE_SIZE, default_concurrency_limit=4)
