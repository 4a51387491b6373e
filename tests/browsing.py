"""The page in a real headless Chromium, for the tests of what a person sees, clicks and downloads."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror='window.hacked=1'>"
READY_LIMIT_S = 15.0


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; tests/requirements.txt has it")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, page_url: str) -> Iterator[Callable[..., Any]]:
    """Opens the page in a fresh profile; a request to another machine or a script error fails the test at its end."""
    contexts, complaints = [], []

    def open_page(width: int = 1280, height: int = 900, color_scheme: str = "light", url: str = page_url) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=color_scheme)
        contexts.append(context)
        context.on("request", lambda request: note_foreign(request.url))
        context.on("weberror", lambda found: complaints.append(f"script error: {found.error}"))
        context.on("console", note_caught)
        context.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page = context.new_page()
        page.goto(url)
        if url == page_url:
            page.wait_for_function("localStorage.getItem('megabyte-visitor')")  # its events are bound, the first has run
        return page

    def note_foreign(address: str) -> None:
        if not address.startswith((page_url, "file://", "data:", "blob:")):
            complaints.append(f"request to {address}")

    def note_caught(message: Any) -> None:
        """Gradio catches the errors of a view's script and only writes them to the console."""
        if message.type == "error" and message.text.startswith(("Error in watch callback", "Error executing js_on_load")):
            complaints.append(f"script error: {message.text}")

    yield open_page
    found = list(complaints)  # closing breaks off requests that are under way, which scripts may report
    for context in contexts:
        context.close()
    if found:
        pytest.fail("; ".join(found))


def upload(page: Any, *paths: Path, field: str = "score-file") -> None:
    page.set_input_files(f"#{field} input[type=file]", [str(path) for path in paths])


def seconds_from_click(page: Any, button: str, is_seen: str) -> float:
    """Clicks, and tells how long after that a person sees what a JavaScript expression looks for, by the page's own clock."""
    page.evaluate(
        f"""(button) => {{ window.secondsFromClick = null; document.querySelector(button).addEventListener('click', (click) => {{
        const look = () => {{
          if ({is_seen}) window.secondsFromClick = (performance.now() - click.timeStamp) / 1000;
          else requestAnimationFrame(look);
        }};
        look();
        }}, {{ once: true, capture: true }}); }}""",
        button,
    )
    page.click(button)
    return page.wait_for_function("window.secondsFromClick").json_value()
