"""The page in a real headless Chromium: what all tabs have in common, and the completion of files."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from browsing import HOSTILE, READY_LIMIT_S, upload

from app.service import Service

pytestmark = pytest.mark.browser
STOP_LIMIT_S = 1.0


@pytest.fixture(scope="module")
def service(tiny_models: Path) -> Service:
    return Service(weights=tiny_models, runs=tiny_models / "no-runs")


def open_complete(page: Any) -> None:
    page.get_by_role("tab", name="Complete").click()
    page.wait_for_selector("#complete-start", state="visible")


def test_page_is_ready_in_time_and_asks_no_other_machine(open_page):
    started = time.monotonic()
    page = open_page()
    assert time.monotonic() - started < READY_LIMIT_S
    assert page.title() == "Megabyte"
    assert page.locator("#message-view .message.empty").count() == 1


def test_hostile_names_and_contents_stay_text(open_page, tmp_path):
    path = tmp_path / f"{HOSTILE}.txt"
    path.write_text(f"{HOSTILE} <script>window.hacked=1</script>")
    page = open_page()
    upload(page, path)
    page.wait_for_selector("#text-view[data-ready]")
    open_complete(page)
    page.get_by_label("Typed text").check()
    page.fill("#complete-text textarea", HOSTILE)
    page.wait_for_selector("#results-view .words")
    assert page.inner_text("#results-view .words") == HOSTILE
    assert page.evaluate("window.hacked") is None


def test_completed_picture_downloads_the_bytes_of_the_service(open_page, service, make_png, tmp_path):
    path = make_png()
    page = open_page()
    open_complete(page)
    upload(page, path, field="complete-file")
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


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_phone_has_no_sideways_scroll(open_page, color_scheme):
    page = open_page(width=390, height=844, color_scheme=color_scheme)
    page.click("#score-sample-text")
    page.wait_for_selector("#text-view[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for view in ("text", "hex"):
        assert page.locator(f"#{view}-view .stage").bounding_box()["width"] > 250
    open_complete(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", background)[:3]) / 3
    assert (brightness > 128) == (color_scheme == "light")
