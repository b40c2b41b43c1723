"""Debian's Chromium, driven by Playwright; it reaches nothing but 127.0.0.1."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

BINARY = shutil.which("chromium", path=os.environ.get("PATH", "") + ":/usr/bin")
_OPTIONS = [
    "--no-sandbox",  # CI runs as root
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BINARY, args=_OPTIONS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **context: object) -> Iterator[Page]:
    """A page at ``url``, in a context of its own. Fails where a script failed or a request left."""
    faults: list[str] = []
    with browser.new_context(**context) as fresh:  # type: ignore[arg-type]
        page = fresh.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: _check(request.url, url, faults))
        page.goto(url)
        yield page
    assert not faults


def _check(asked: str, url: str, faults: list[str]) -> None:
    if not asked.startswith((url, "blob:" + url)):
        faults.append(f"asked {asked}")
