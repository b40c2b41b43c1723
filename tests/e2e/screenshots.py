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
    """Wide and on a phone, light and dark, in both languages."""
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
            size = {"width": 1280, "height": 1050}
            with opened(browser, server.url, viewport=size, locale=locale) as page:
                page.locator("#samples button").nth(1).click()
                for number, question in enumerate(questions):
                    ask(page, question, number)
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=DOCS / name)
        phone = {"viewport": {"width": 375, "height": 812}, "is_mobile": True, "has_touch": True}
        for locale, colours, name, question in (
            ("en", "dark", "page-phone.png", "what shape is it?"),
            ("zh-CN", "light", "page-phone.zh-CN.png", "这张图里有什么？"),
        ):
            look = {"locale": locale, "color_scheme": colours}
            with opened(browser, server.url, **phone, **look) as page:
                page.locator("#samples button").nth(0).tap()
                page.locator("#question").fill(question)
                page.locator("#send").tap()
                page.locator("article.assistant footer:not([hidden])").wait_for()
                if locale == "en":
                    page.locator("#show-status").tap()
                page.wait_for_timeout(3000)
                page.screenshot(path=DOCS / name)


if __name__ == "__main__":
    main()
