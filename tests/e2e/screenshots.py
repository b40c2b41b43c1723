"""The pictures of the page in docs/: ``python -m tests.e2e.screenshots``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import Page

from tests.e2e.browser import chromium, opened
from tests.e2e.server import ROOT, Server

DOCS = ROOT / "docs"


def ask(page: Page, text: str, number: int) -> None:
    page.locator("#question").fill(text)
    page.keyboard.press("Enter")
    page.locator("article.assistant footer:not([hidden])").nth(number).wait_for()


def main() -> None:
    """Wide and light, in both languages; narrow and dark."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder) / "log") as server,
        chromium() as browser,
    ):
        server.wait()
        for locale, name, questions in (
            ("en", "page.png", ("what shape is it?", "what color is the triangle?")),
            ("zh-CN", "page.zh-CN.png", ("这张图里有什么？", "是什么颜色？")),
        ):
            size = {"width": 1100, "height": 1050}
            with opened(browser, server.url, viewport=size, locale=locale) as page:
                page.locator("#samples button").nth(1).click()
                for number, question in enumerate(questions):
                    ask(page, question, number)
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=DOCS / name)
        size, dark = {"width": 375, "height": 900}, {"locale": "en", "color_scheme": "dark"}
        with opened(browser, server.url, viewport=size, **dark) as page:
            page.locator("#samples button").nth(0).click()
            ask(page, "what shape is it?", 0)
            page.locator("#show-status").click()
            page.wait_for_timeout(3000)
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=DOCS / "page-phone.png")


if __name__ == "__main__":
    main()
