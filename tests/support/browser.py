"""A headless Chromium for tests of pages: the system's own, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


def executable() -> str:
    """Chromium's path; skips the test where there is none. `CHROMIUM` names one in an unusual place."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on this machine: install your system's package of it, or set CHROMIUM")
    return found


@contextmanager
def open_page(*, phone: bool = False, **context) -> Iterator:
    """A Playwright page. When the block ends, errors that its scripts threw, or logged, fail the test.

    Args:
      phone: a phone's size and touch screen.
      **context: further arguments of Playwright's `Browser.new_context`.
    """
    path = executable()
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        settings = {"viewport": PHONE if phone else DESKTOP, "has_touch": phone, "is_mobile": phone}
        page = browser.new_context(**settings | context).new_page()
        page.set_default_timeout(30_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        try:
            yield page
        finally:
            browser.close()
    assert not errors, errors
