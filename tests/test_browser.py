"""The page in a real headless Chromium: what all tabs have in common."""

import re
import time
from typing import Any

import pytest
from browsing import HOSTILE, READY_LIMIT_S, upload

pytestmark = pytest.mark.browser


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
    page.wait_for_selector("#prompt-view .words")
    assert page.text_content("#prompt-view .words") == HOSTILE
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("color_scheme", ["dark", pytest.param("light", marks=pytest.mark.slow)])
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
