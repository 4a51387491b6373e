"""Batches and jobs in a real headless Chromium: plans and results, and work that outlives its page."""

import time
import zipfile
from typing import Any

import pytest
from browsing import HOSTILE, seconds_from_click, upload
from test_browser_complete import set_number, wait_for_more, wait_for_plan

pytestmark = pytest.mark.browser
STOP_LIMIT_S = 1.0
NOTHING_IS_STORED = """Object.defineProperty(window, 'localStorage', { value: {
  getItem() { return null; },
  setItem(key) { window.isGreeted ||= key === 'megabyte-visitor'; throw new DOMException('', 'QuotaExceededError'); },
} });"""
LONG = '[[jobs]]\ntext = "{}"\nnum_bytes = 1000000'


def open_batch(page: Any) -> None:
    page.get_by_role("tab", name="Batch").click()
    page.wait_for_selector("#batch-start", state="visible")


def start(page: Any, recipe: str) -> None:
    page.fill("#batch-recipe textarea", recipe)
    page.wait_for_selector("#batch-view [data-state=plan], #batch-view[data-state=plan]")
    page.click("#batch-start")


def wait_for_state(page: Any, state: str) -> None:
    page.wait_for_selector(f"#batch-view [data-state={state}], #batch-view[data-state={state}]")


def names(page: Any) -> list[str]:
    return page.locator("#batch-view td.says").all_inner_texts()


def come_back(page: Any) -> None:
    page.wait_for_selector("#batch-start", state="visible")
    wait_for_state(page, "running")


def test_files_are_planned_made_and_downloaded(open_page, service, make_png, make_text, tmp_path):
    picture, text, bad = make_png(), make_text(f"{HOSTILE}.txt"), make_text("c.txt", b"%PDF-1.7")
    page = open_page()
    open_batch(page)
    page.set_input_files("#batch-files input[type=file]", [str(path) for path in (picture, text, bad)])
    wait_for_state(page, "plan")
    assert page.inner_text("#batch-view .headline strong") == "2 items"
    assert "1 cannot be done" in page.inner_text("#batch-view .headline span")
    assert "eeps top 4 of 8 rows" in names(page)[0]
    page.click("#batch-start")
    wait_for_state(page, "done")
    assert page.locator("#batch-view td.state .word").all_inner_texts() == ["done", "done", "failed"]
    with page.expect_download() as download:
        page.click("#batch-view .headline a")
    job = service.complete(picture, keep=0.5)
    list(job.run())
    expected = service.write_completion(job.results[0], tmp_path).read_bytes()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.read("picture-s0-1.png") == expected
    assert page.evaluate("window.hacked") is None


def test_a_reload_finds_the_job_again_and_stop_ends_it_within_a_second(open_page):
    page = open_page()
    open_batch(page)
    start(page, LONG.format("Once"))
    wait_for_state(page, "running")
    page.reload()
    come_back(page)
    before = page.inner_text("#batch-view .headline span")
    page.wait_for_function(f"document.querySelector('#batch-view .headline span').textContent !== {before!r}")
    is_stopped = "document.querySelector('#batch-view [data-state=stopped], #batch-view[data-state=stopped]')"
    assert seconds_from_click(page, "#batch-stop", is_stopped) < STOP_LIMIT_S
    page.reload()
    page.wait_for_selector("#batch-start:not([disabled])", state="visible")
    wait_for_state(page, "stopped")


def test_a_job_whose_tab_was_closed_is_found_on_return(open_page):
    page = open_page()
    context = page.context
    open_batch(page)
    start(page, LONG.format("Once"))
    wait_for_state(page, "running")
    url = page.url
    page.close()
    time.sleep(2)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#score-sample-text")
    open_batch(page)
    come_back(page)
    page.click("#batch-stop")
    wait_for_state(page, "stopped")


def test_two_tabs_and_two_visitors_do_not_mix(open_page):
    first = open_page()
    second = first.context.new_page()
    second.goto(first.url)
    second.wait_for_selector("#score-sample-text")
    second.wait_for_timeout(500)
    pages = {"aa": first, "bbbb": second}
    for text, page in pages.items():
        open_batch(page)
        start(page, LONG.format(text))
        wait_for_state(page, "running")
    for page in pages.values():
        page.reload()
    for text, page in pages.items():
        come_back(page)
        assert f"{len(text)} bytes" in names(page)[0]
    stranger = open_page()
    open_batch(stranger)
    stranger.wait_for_timeout(1000)
    assert stranger.locator("#batch-view .message").is_visible()
    first.click("#batch-stop")
    wait_for_state(first, "stopped")
    second.wait_for_timeout(500)
    assert second.locator("#batch-stop").is_enabled()
    second.click("#batch-stop")
    wait_for_state(second, "stopped")


def test_visitors_whose_browser_stores_nothing_share_nothing(open_page, make_text):
    pages = [open_page(script=NOTHING_IS_STORED, greeted="window.isGreeted") for _ in range(2)]
    for number, page in enumerate(pages):
        upload(page, make_text(f"{number}.txt"))
        page.wait_for_selector(f"#headline-view .subtitle:has-text('{number}.txt')")
    for number, page in enumerate(pages):
        page.get_by_role("tab", name="Jobs").click()
        page.wait_for_selector("#jobs-view tbody tr")
        assert page.locator("#jobs-view td.source").all_inner_texts() == [f"{number}.txt"]


def test_a_phone_shows_the_table_without_sideways_scroll(open_page):
    page = open_page(width=390, height=844)
    open_batch(page)
    start(page, '[[jobs]]\ntext = "Once upon a time"\nnum_bytes = 10')
    wait_for_state(page, "done")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_scoring_goes_on_through_a_reload_and_is_in_no_other_visitor_s_page(open_page, service, make_text):
    path = make_text("long.txt", b"The lamp was lit.\n" * 20_000)
    page = open_page()
    upload(page, path)
    page.wait_for_selector("#message-view .message.working:has-text('Scored ')")
    page.reload()
    page.wait_for_selector("#message-view .message.working:has-text('Scored ')")
    page.wait_for_selector("#hex-view[data-ready]", timeout=120_000)
    page.wait_for_selector("#message-view [data-state=done]", state="attached")
    number = page.inner_text("#headline-view .number strong")
    assert number == f"{service.score_file(path).bits_per_byte:.3f}"
    page.reload()
    page.wait_for_selector("#hex-view[data-ready]")
    assert page.inner_text("#headline-view .number strong") == number
    assert "long.txt" in page.inner_text("#headline-view .subtitle")
    other = open_page()
    other.wait_for_timeout(500)
    assert other.locator("#message-view .message.empty").is_visible()


def test_eight_samples_go_on_through_a_reload_and_keep_what_is_there(open_page):
    page = open_page()
    page.get_by_role("tab", name="Complete").click()
    page.get_by_label("Typed text").check()
    page.fill("#complete-text textarea", "The lamp")
    page.get_by_text("Model and sampling").click()
    set_number(page, "num-bytes", 1_000_000)
    set_number(page, "samples", 8)
    wait_for_plan(page, "makes 1000000 bytes with text, 8 times")
    page.click("#complete-start")
    made = "#results-view .card:nth-child(8) .made"
    page.wait_for_function(f"document.querySelector('{made}')?.textContent.length > 10")
    page.reload()
    page.wait_for_selector("#complete-stop:not([disabled])", state="visible")
    wait_for_more(page, ".card:nth-child(8)")
    page.click("#complete-stop")
    page.wait_for_selector("#results-view .card:nth-child(8) .caption:has-text('stopped after')")
    assert page.locator("#results-view .actions a").count() == 8 * 2  # each text so far, and its settings


def test_the_jobs_tab_lists_stops_and_shows_the_jobs_of_this_browser(open_page):
    page = open_page(width=390)
    open_batch(page)
    start(page, LONG.format("Once"))
    wait_for_state(page, "running")
    page.get_by_role("tab", name="Jobs").click()
    row = page.locator("#jobs-view tbody tr")
    row.wait_for()
    assert page.eval_on_selector("#jobs-view .scroller", "table => table.scrollWidth <= table.clientWidth")
    row.get_by_role("button", name="Stop").click()
    page.wait_for_selector("#jobs-view tr.stopped")
    assert row.count() == 1
    page.evaluate("sessionStorage.removeItem('megabyte-batch')")
    row.get_by_role("button", name="Show").click()
    page.wait_for_selector("#batch-start", state="visible")
    wait_for_state(page, "stopped")
