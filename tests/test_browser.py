"""The page in a real headless Chromium: what all tabs have in common."""

import time

import pytest
from browsing import READY_LIMIT_S

pytestmark = pytest.mark.browser


def test_page_is_ready_in_time_and_asks_no_other_machine(open_page):
    started = time.monotonic()
    page = open_page()
    assert time.monotonic() - started < READY_LIMIT_S
    assert page.title() == "Megabyte"
    assert page.locator("#message-view .message.empty").count() == 1
