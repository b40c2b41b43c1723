"""``/docs`` in a real Chromium: all routes, tried out, and no request that leaves the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.declared import DOCUMENT
from tests.e2e.browser import BINARY, chromium, opened
from tests.e2e.server import ROOT, Server
from tests.wire import ROUTE

pytestmark = pytest.mark.skipif(BINARY is None, reason="Debian's package chromium is missing")
CIRCLE = ROOT / "demo" / "samples" / "red-circle.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def said() -> list[str]:
    """What the console says: the policy's refusals, too."""
    return []


@pytest.fixture
def page(browser: Browser, server: Server, said: list[str]) -> Iterator[Page]:
    with opened(browser, server.url) as page:
        page.goto("about:blank")  # nothing that the page at / asks for is taken for ours
        page.on("console", lambda message: said.append(message.text))
        yield page


def test_it_shows_every_route(page: Page, server: Server, said: list[str]):
    page.goto(f"{server.url}/docs")
    expect(page.locator(".opblock-summary-path")).to_have_text(
        [path.replace("/", "/\u200b") for path in DOCUMENT["paths"]]
    )
    expect(page.locator(".info")).to_contain_text(DOCUMENT["info"]["version"])
    page.locator("#operations-questions-recognize .opblock-summary").click()
    statuses = page.locator(".response-col_status")
    expect(statuses.first).to_be_visible()
    shown = {text for text in statuses.all_inner_texts() if text.isdecimal()}
    assert shown == set(DOCUMENT["paths"][ROUTE]["post"]["responses"])
    assert not said


def test_a_question_is_asked_from_it_behind_a_prefix(page: Page, server: Server, said: list[str]):
    """As behind a proxy that takes ``/qwen`` away, of which the service knows nothing."""
    prefix = f"{server.url}/qwen/"
    page.route(
        f"{prefix}**",
        lambda route: route.continue_(url=route.request.url.replace(prefix, f"{server.url}/")),
    )
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{prefix}docs")
    page.locator("#operations-questions-recognize .opblock-summary").click()
    page.get_by_role("button", name="Try it out").click()
    page.locator("input[type=file]").set_input_files(CIRCLE)
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table")).to_contain_text('"status": "success"')
    assert f"{prefix}v1/image/recognize" in asked
    assert all(url.startswith((prefix, "data:")) for url in asked), asked
    assert not said


@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.slow), "dark"])
def test_it_follows_the_system_s_colours(browser: Browser, server: Server, scheme: str):
    with opened(browser, server.url, color_scheme=scheme) as page:
        page.goto(f"{server.url}/docs")
        expect(page.locator(".info")).to_be_visible()
        assert page.evaluate("document.documentElement.className") == (
            "dark-mode" if scheme == "dark" else ""
        )
