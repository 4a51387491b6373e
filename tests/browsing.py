"""The page in a real headless Chromium, for the tests of what a person sees, clicks and downloads."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.page_server import PageProcess

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


@pytest.fixture(scope="session")
def profiles(browser: Any) -> Iterator[list[Any]]:
    """Browser profiles that tests use one after another, so that the scripts of the page are fetched and compiled once."""
    profiles: list[Any] = []
    yield profiles
    for profile in profiles:
        profile.close()


@pytest.fixture
def open_page(browser: Any, profiles: list[Any], page_server: PageProcess) -> Iterator[Callable[..., Any]]:
    """Opens the page for another visitor; a request to another machine or a script error fails the test at its end.

    What a profile keeps of its visitor is forgotten before the next one, and no job is left when the test is over.
    """
    page_url, used, complaints = page_server.url, [], []

    def open_page(
        width: int = 1280,
        height: int = 900,
        color_scheme: str = "light",
        url: str = page_url,
        script: str = "",
        greeted: str = "localStorage.getItem('megabyte-visitor')",
    ) -> Any:
        if len(used) == len(profiles):
            profiles.append(browser.new_context(viewport={"width": 1280, "height": 900}))
            # A page that stays open, without scripts: with the last page of a profile goes its process and all it compiled.
            profiles[-1].new_page().goto(f"{page_url}robots.txt")
        profile = profiles[len(used)]
        used.append(profile)
        profile.on("page", watch)
        page = profile.new_page()
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=color_scheme)
        kept = {"origin": page_url.rstrip("/"), "storageTypes": "all"}
        profile.new_cdp_session(page).send("Storage.clearDataForOrigin", kept)
        page.add_init_script(script)
        page.goto(url)
        if url == page_url:
            page.wait_for_function(greeted)  # its events are bound, the first has run
        return page

    def watch(page: Any) -> None:
        page.on("request", lambda request: note_foreign(request.url))
        page.on("pageerror", lambda error: complaints.append(f"script error: {error}"))
        page.on("console", note_caught)
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def note_foreign(address: str) -> None:
        if not address.startswith((page_url, "file://", "data:", "blob:")):
            complaints.append(f"request to {address}")

    def note_caught(message: Any) -> None:
        """Gradio catches the errors of a view's script and only writes them to the console."""
        if message.type == "error" and message.text.startswith(("Error in watch callback", "Error executing js_on_load")):
            complaints.append(f"script error: {message.text}")

    yield open_page
    found = list(complaints)  # closing breaks off requests that are under way, which scripts may report
    for profile in used:
        profile.remove_listener("page", watch)
        for page in profile.pages[1:]:
            page.close()
    page_server.end_jobs()
    if found:
        pytest.fail("; ".join(found))


def upload(page: Any, *paths: Path, field: str = "score-file") -> None:
    page.set_input_files(f"#{field} input[type=file]", [str(path) for path in paths])


def clear(page: Any, field: str) -> None:
    """Takes the files out of a field again."""
    page.locator(f"#{field} [aria-label*='emove'], #{field} [aria-label*='lear']").first.click()


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
