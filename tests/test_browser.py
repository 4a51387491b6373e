"""The page in a real headless Chromium: what a person sees, clicks and downloads."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_server import served_page
from PIL import Image

from app.service import Service

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; tests/requirements.txt has it")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror='window.hacked=1'>"
READY_LIMIT_S = 15.0
STOP_LIMIT_S = 1.0
SCROLL_LIMIT_MS = 16.0


@pytest.fixture(scope="module")
def url(tiny_models: Path) -> Iterator[str]:
    with served_page(tiny_models) as url:
        yield url


@pytest.fixture(scope="module")
def service(tiny_models: Path) -> Service:
    return Service(weights=tiny_models, runs=tiny_models / "no-runs")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Opens the page in a fresh profile; a request to another machine or a script error fails the test at its end."""
    contexts, complaints = [], []

    def open_page(width: int = 1280, height: int = 900, color_scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=color_scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: note_foreign(request.url))
        page.on("pageerror", lambda error: complaints.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.goto(url)
        page.wait_for_selector("#score-sample-text")
        page.wait_for_timeout(500)  # Gradio binds its events a moment after it draws the components
        return page

    def note_foreign(address: str) -> None:
        if not address.startswith((url, "data:", "blob:")):
            complaints.append(f"request to {address}")

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def upload(page: Any, path: Path, field: str = "score-file") -> None:
    page.set_input_files(f"#{field} input[type=file]", str(path))


def wait_for_score(page: Any, view: str) -> None:
    page.wait_for_selector(f"#{view}-view [data-ready], #{view}-view[data-ready]")


def open_complete(page: Any) -> None:
    page.get_by_role("tab", name="Complete").click()
    page.wait_for_selector("#complete-start", state="visible")


def status(page: Any) -> str:
    return page.inner_text("#legend-view .status")


def test_page_is_ready_in_time_and_asks_no_other_machine(open_page):
    started = time.monotonic()
    page = open_page()
    assert time.monotonic() - started < READY_LIMIT_S
    assert page.title() == "Megabyte"
    assert page.locator("#summary-view .message.empty").count() == 1


def test_picture_and_hex_share_one_cursor(open_page, service, make_png):
    path = make_png(width=16, height=16)
    page = open_page()
    upload(page, path)
    wait_for_score(page, "picture")
    wait_for_score(page, "hex")
    score = service.score_file(path)
    assert page.inner_text("#summary-view .headline strong") == f"{score.bits_per_byte:.3f}"

    box = page.locator("#picture-view .heat").bounding_box()
    page.locator("#picture-view .heat").click(position={"x": 3.5 * box["width"] / 16, "y": 2.5 * box["height"] / 16})
    value = np.asarray(Image.open(path))[2, 3, 0]
    assert status(page).startswith("byte 105")
    assert "x 3, y 2, red" in status(page)
    assert f"value {value} " in status(page)
    assert f"{score.media_bits[2, 3, 0]:.2f} bits" in status(page)

    page.focus("#hex-view .stage")
    page.keyboard.press("ArrowRight")
    assert "x 3, y 2, green" in status(page)
    page.focus("#picture-view .stage")
    page.keyboard.press("ArrowDown")
    assert "x 3, y 3, green" in status(page)


def test_sound_and_text_get_their_views(open_page, make_wav, make_text):
    page = open_page()
    upload(page, make_wav())
    wait_for_score(page, "waveform")
    assert page.locator("#waveform-view canvas").is_visible()
    assert page.locator("#picture-view .stage").is_hidden()
    page.click("#score-sample-text")
    wait_for_score(page, "text")
    assert page.locator("#waveform-view canvas").is_hidden()
    page.locator("#text-view .stage canvas").click(position={"x": 14, "y": 12})
    assert "“T”" in status(page)


def test_hostile_names_and_contents_stay_text(open_page, tmp_path):
    path = tmp_path / f"{HOSTILE}.txt"
    path.write_text(f"{HOSTILE} <script>window.hacked=1</script>")
    page = open_page()
    upload(page, path)
    wait_for_score(page, "text")
    open_complete(page)
    page.get_by_label("Typed text").check()
    page.fill("#complete-text textarea", HOSTILE)
    page.wait_for_selector("#results-view .words")
    assert page.inner_text("#results-view .words") == HOSTILE
    assert page.evaluate("window.hacked") is None


def test_refused_file_is_told_in_a_sentence(open_page, make_png):
    path = make_png("cut.png")
    path.write_bytes(path.read_bytes()[:100])
    page = open_page()
    upload(page, path)
    page.wait_for_selector("#summary-view .message.error")
    sentence = page.text_content("#summary-view .message.error p")
    assert "cut" in sentence
    assert "Traceback" not in page.content()
    assert sentence in page.text_content(".toast-body")


def test_completed_picture_downloads_the_bytes_of_the_service(open_page, service, make_png, tmp_path):
    path = make_png()
    page = open_page()
    open_complete(page)
    upload(page, path, "complete-file")
    page.wait_for_selector("#results-view .card")
    assert "top 4 of 8 rows" in page.input_value("#complete-plan textarea")
    page.click("#complete-start")
    page.wait_for_selector("#results-view .actions a")
    with page.expect_download() as download:
        page.click("#results-view .actions a")
    job = service.complete(path, keep=0.5)
    list(job.run())
    expected = service.write_completion(job.results[0], tmp_path)
    assert download.value.suggested_filename == expected.name
    assert download.value.path().read_bytes() == expected.read_bytes()


def test_stop_ends_within_a_second_and_keeps_what_is_there(open_page):
    page = open_page()
    open_complete(page)
    page.get_by_label("Typed text").check()
    page.fill("#complete-text textarea", "The lamp")
    page.get_by_text("Model and sampling").click()
    page.fill("#complete-num-bytes input", "1000000")
    page.wait_for_function("document.querySelector('#complete-plan textarea').value.includes('1000000')")
    page.click("#complete-start")
    page.wait_for_function("document.querySelector('#results-view .card:nth-child(2) .made')?.textContent.length > 10")
    started = time.monotonic()
    page.click("#complete-stop")
    page.wait_for_selector("#results-view .caption:has-text('stopped after')")
    assert time.monotonic() - started < STOP_LIMIT_S
    assert len(page.inner_text("#results-view .card:nth-child(2) .made")) > 10
    page.wait_for_selector("#complete-start:not([disabled])")

    # The model is free again: another completion runs to its end.
    page.fill("#complete-num-bytes input", "8")
    page.wait_for_function("document.querySelector('#complete-plan textarea').value.includes('makes 8 ')")
    page.click("#complete-start")
    page.wait_for_selector("#results-view .caption:has-text('bits/byte')")


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_long_scoring_gives_way_to_a_stop_and_to_another_file(open_page, make_text, is_stopped):
    page = open_page()
    upload(page, make_text("long.txt", b"The lamp was lit.\n" * 100_000))
    page.wait_for_selector("#summary-view .message.working:has-text('Scored ')")
    if is_stopped:
        page.click("#score-stop")
        page.wait_for_selector("#summary-view .message.empty:has-text('Stopped')")
    page.click("#score-sample-text")
    wait_for_score(page, "text")
    assert "lamp.txt" in page.inner_text("#summary-view .subtitle")
    assert page.is_disabled("#score-stop")


def test_long_file_scrolls_smoothly(open_page, tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 123, 200_000, dtype=np.uint8).tobytes())
    page = open_page()
    upload(page, path)
    wait_for_score(page, "hex")
    slowest = 0.0
    for share in np.linspace(0, 1, 12):
        page.evaluate(f"(e => e.scrollTop = {share} * e.scrollHeight)(document.querySelector('#hex-view .stage'))")
        page.wait_for_timeout(40)
        slowest = max(slowest, float(page.get_attribute("#hex-view .stage", "data-drawms")))
    assert slowest < SCROLL_LIMIT_MS
    page.focus("#hex-view .stage")
    page.keyboard.press("End")
    assert status(page).startswith("byte 199,999")


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_phone_has_no_sideways_scroll(open_page, color_scheme):
    page = open_page(width=390, height=844, color_scheme=color_scheme)
    page.click("#score-sample-text")
    wait_for_score(page, "text")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for view in ("text", "hex"):
        assert page.locator(f"#{view}-view .stage").bounding_box()["width"] > 250
    open_complete(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", background)[:3]) / 3
    assert (brightness > 128) == (color_scheme == "light")
