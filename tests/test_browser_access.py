"""What people with a screen reader or a keyboard need of our own HTML, by the rules of axe-core, in every tab."""

import os
from typing import Any

import pytest
from browsing import clear, upload

pytestmark = pytest.mark.browser


@pytest.fixture
def page(open_page) -> Any:
    script = os.environ.get("AXE_SCRIPT")
    if not script:
        pytest.skip("AXE_SCRIPT does not name the axe.min.js of axe-core; `npm pack axe-core` fetches it")
    page = open_page()
    page.add_script_tag(path=script)
    page.add_style_tag(content="* { transition: none !important; }")  # or a colour would be judged on its way to another
    return page


def assert_no_rule_is_broken(page: Any, element: str) -> None:
    """In both colour schemes, one after the other."""
    assert page.locator(element).count() > 0
    for scheme in ("dark", "light"):
        page.evaluate("isDark => document.body.classList.toggle('dark', isDark)", scheme == "dark")
        found = page.evaluate("element => axe.run(element, { resultTypes: ['violations'] })", element)
        broken = [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]]
        assert broken == [], scheme


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()
    page.get_by_role("tab", name=name, selected=True).wait_for()


def test_likelihood(page, make_wav, make_png, make_text):
    assert_no_rule_is_broken(page, ".page-header")
    assert_no_rule_is_broken(page, ".byte-message")
    upload(page, make_text("paper.txt", b"%PDF-1.7 and so on"))
    page.wait_for_selector("#message-view .message.error")
    assert_no_rule_is_broken(page, ".byte-message")
    clear(page, "score-file")
    page.wait_for_selector("#message-view [data-state=empty]")
    upload(page, make_png(), make_wav(), make_text(), make_text("bad.txt", b"%PDF-1.7"))
    page.wait_for_selector("#hex-view[data-ready]")
    page.wait_for_selector("#message-view [data-state=done]", state="attached")
    page.focus("#hex-view .stage")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    page.wait_for_selector("#statistics-view li button")
    for row in (1, 2, 3):
        page.click(f"#files-view tbody tr:nth-child({row}) button")
        assert_no_rule_is_broken(page, ".byte-book")


@pytest.mark.parametrize("kind", ["png", "wav", "text"])
def test_complete(page, request, make_text, kind):
    open_tab(page, "Complete")
    if kind == "png":  # empty, and with a refusal, they are the same for every kind
        for view in (".byte-prompt", ".byte-results"):
            assert_no_rule_is_broken(page, view)
        upload(page, make_text("paper.txt", b"%PDF-1.7 and so on"), field="complete-file")
        page.wait_for_selector("#prompt-view .message.error")
        assert_no_rule_is_broken(page, ".byte-prompt")
        clear(page, "complete-file")
        page.wait_for_selector("#prompt-view .message.error", state="detached")
    upload(page, request.getfixturevalue(f"make_{kind}")(), field="complete-file")
    page.wait_for_selector("#prompt-view .source", state="visible")
    page.click("#complete-start")
    page.wait_for_selector("#results-view .actions a")
    page.click("#results-view .actions button")
    page.wait_for_selector("#alternatives-view .choice")
    for view in (".byte-prompt", ".byte-results", ".byte-alternatives"):
        assert_no_rule_is_broken(page, view)


def test_batch_and_jobs(page, make_text):
    open_tab(page, "Jobs")
    assert_no_rule_is_broken(page, "#jobs-view")
    open_tab(page, "Batch")
    assert_no_rule_is_broken(page, "#batch-view")
    upload(page, make_text(), make_text("bad.txt", b"%PDF-1.7"), field="batch-files")
    page.wait_for_selector("#batch-view [data-state=plan], #batch-view[data-state=plan]")
    assert_no_rule_is_broken(page, "#batch-view")
    page.click("#batch-start")
    page.wait_for_selector("#batch-view [data-state=done], #batch-view[data-state=done]")
    assert_no_rule_is_broken(page, "#batch-view")
    open_tab(page, "Jobs")
    page.wait_for_selector("#jobs-view td.actions button")
    assert_no_rule_is_broken(page, "#jobs-view")
