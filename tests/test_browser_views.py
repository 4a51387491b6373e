"""The linked views in a real headless Chromium: where they stand, what is selected, and what they do without a document."""

from pathlib import Path
from typing import Any

import pytest
from browsing import upload
from test_browser_likelihood import score, status

pytestmark = pytest.mark.browser


def open_file(page: Any, number: int) -> None:
    """Opens one of the scored files, counted from 1, by its row in the list."""
    page.click(f"#files-view tbody tr:nth-child({number}) button")
    page.wait_for_selector(f"#files-view tr.open:nth-child({number})")


def wait_for_selection(page: Any, num_bytes: int) -> None:
    """Until the statistics have counted as many selected bytes."""
    page.wait_for_selector(f"#statistics-view tbody tr:has-text('Bytes') td:nth-child(3):text-is('{num_bytes}')")


def test_a_view_that_was_scrolled_stays_there_while_bytes_are_selected(open_page, make_text):
    page = open_page()
    score(page, make_text(content=b"The lamp was lit.\n" * 500))
    for view in ("hex", "text"):
        stage = page.locator(f"#{view}-view .stage")
        stage.focus()
        page.keyboard.press("Home")
        page.wait_for_selector("#inspector-view .status:has-text('byte ')")
        stage.evaluate("stage => { stage.scrollTop = 2000; }")
        box = stage.bounding_box()
        page.mouse.move(box["x"] + 120, box["y"] + 100)
        page.mouse.down()
        page.mouse.move(box["x"] + 180, box["y"] + 100, steps=3)
        page.wait_for_selector("#statistics-view thead th:has-text('Selection')")
        assert stage.evaluate("stage => stage.scrollTop") == 2000
        page.mouse.up()
        assert 1 < int(page.inner_text("#statistics-view tbody tr:has-text('Bytes') td:nth-child(3)")) < 16
        page.keyboard.press("Escape")
        page.wait_for_selector("#statistics-view thead th:has-text('Selection')", state="detached")


def test_the_overview_of_a_sound_leads_away_from_the_cursor(open_page, make_wav):
    page = open_page()
    score(page, make_wav(num_samples=4000))
    page.focus("#waveform-view .stage")
    page.keyboard.press("Home")
    for _ in range(4):
        page.keyboard.press("+")
    assert page.inner_text("#waveform-view .seconds").startswith("0.000 to ")
    assert page.locator("#waveform-view .marker").is_visible()
    box = page.locator("#waveform-view .overview").bounding_box()
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 5)
    assert float(page.inner_text("#waveform-view .seconds").split()[0]) > 0.3
    assert page.locator("#waveform-view .marker").is_hidden()
    page.focus("#waveform-view .stage")
    page.keyboard.press("ArrowRight")
    assert page.locator("#waveform-view .marker").is_visible()


def test_shift_and_arrows_select_from_the_first_byte_and_start_anew_in_another_file(open_page, make_text):
    page = open_page()
    score(page, make_text("long.txt", b"The lamp was lit.\n" * 100), make_text("short.txt", b"Nobody came.\n"))
    page.focus("#hex-view .stage")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    wait_for_selection(page, 4)
    page.keyboard.press("End")
    open_file(page, 2)
    page.focus("#hex-view .stage")
    page.keyboard.press("Shift+ArrowRight")
    wait_for_selection(page, 2)


def test_an_export_is_saved_each_time_it_is_asked_for(open_page, make_text):
    page = open_page()
    score(page, make_text())
    names = []
    for _ in range(2):
        with page.expect_download() as download:
            page.click("#toolbar-view button[data-form=csv]")
        names.append(download.value.suggested_filename)
    assert names == ["text.csv"] * 2


def test_a_sound_falls_silent_when_another_file_is_opened(open_page, make_wav, make_png):
    page = open_page()
    score(page, make_wav(num_samples=80_000), make_png())
    page.click("#waveform-view .play")
    assert page.text_content("#waveform-view .play") == "Stop"
    open_file(page, 2)
    assert page.text_content("#waveform-view .play") == "Play from here"


def test_scores_that_cannot_be_read_leave_nothing_of_the_last_file(open_page, make_text):
    page = open_page()
    score(page, make_text("a.txt"), make_text("b.txt", b"Nobody came.\n"))
    page.wait_for_selector("#statistics-view .surprises li")
    page.route("**/scores.bin", lambda route: route.abort())
    open_file(page, 2)
    page.wait_for_selector("#headline-view :text('Its views cannot be shown')")
    for view in ("statistics", "hex", "text"):
        assert page.locator(f"#{view}-view").is_hidden()
    open_file(page, 1)
    page.wait_for_selector("#hex-view[data-ready]")
    page.select_option("#toolbar-view .other", index=1)
    page.wait_for_selector("#headline-view :text('It cannot be compared with b.txt')")
    assert page.input_value("#toolbar-view .other") == ""
    page.unroute("**/scores.bin")
    page.select_option("#toolbar-view .other", index=1)
    page.wait_for_selector("#toolbar-view label.difference input:checked", state="attached")
    assert page.locator("#headline-view :text('cannot be compared')").count() == 0


def test_two_models_are_compared_on_one_file(open_page, make_text):
    page = open_page()
    upload(page, make_text())
    page.wait_for_selector("#hex-view[data-ready]")
    page.click("#score-second input")
    page.locator("[role=listbox] [role=option]").last.click()
    page.wait_for_selector("#files-view tbody tr:nth-child(2)")
    page.wait_for_function(
        "document.querySelectorAll('#toolbar-view .other option').length === 2"
    )  # nothing, and the other model
    page.select_option("#toolbar-view .other", index=1)
    page.wait_for_selector("#toolbar-view label.difference input:checked", state="attached")
    page.focus("#hex-view .stage")
    page.keyboard.press("ArrowRight")
    assert "difference" in status(page)


def test_the_views_turn_dark_with_the_page(open_page, make_wav):
    page = open_page()
    score(page, make_wav())
    page.wait_for_selector("#statistics-view .surprises li")
    drawn = "[...document.querySelectorAll('#hex-view .stage canvas, #waveform-view .wave')].map((canvas) => canvas.toDataURL())"
    light = page.evaluate(drawn)
    page.evaluate("document.body.classList.toggle('dark')")
    page.wait_for_function(f"(light) => {drawn}.every((now, i) => now !== light[i])", arg=light)


def test_a_refused_choice_of_files_leaves_the_scoring_at_work(open_page, make_text, tmp_path: Path):
    page = open_page()
    upload(page, make_text("long.txt", b"The lamp was lit.\n" * 100_000))
    page.wait_for_selector("#message-view .message.working:has-text('Scored ')")
    too_much = []
    for number in range(3):
        path = tmp_path / f"{number}.txt"
        with path.open("wb") as file:
            file.truncate(50_000_000)
        too_much.append(path)
    upload(page, *too_much)
    page.wait_for_selector(".toast-body:has-text('in one go')")
    page.wait_for_selector("#message-view .message.working:has-text('Scored ')")
    page.click("#score-stop")
    page.wait_for_selector("#message-view .message.empty:has-text('Stopped')")


def test_of_two_changes_at_once_one_scoring_is_left(open_page, make_text):
    page = open_page()
    upload(page, make_text("long.txt", b"The lamp was lit.\n" * 100_000))
    page.wait_for_selector("#message-view .message.working:has-text('Scored ')")
    job = page.evaluate("sessionStorage.getItem('megabyte-likelihood')")
    changes = "#score-as input[value=file], #score-adapt input"
    page.evaluate(f"for (const input of document.querySelectorAll('{changes}')) input.click()")
    page.wait_for_function("job => sessionStorage.getItem('megabyte-likelihood') !== job", arg=job)
    page.get_by_role("tab", name="Jobs").click()
    page.wait_for_function("document.querySelectorAll('#jobs-view tbody tr').length === 1")
    page.wait_for_timeout(1500)  # the table is read anew every second
    assert page.locator("#jobs-view tbody tr").count() == 1
    page.locator("#jobs-view tbody tr").get_by_role("button", name="Stop").click()
    page.wait_for_selector("#jobs-view tr.stopped")
