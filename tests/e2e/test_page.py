"""The page in a real Chromium: by mouse, by keyboard, wide and narrow, light and dark."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from tests.e2e.browser import BINARY, chromium, opened
from tests.e2e.server import ROOT, Server
from tests.waiting import until
from tests.wire import send

pytestmark = pytest.mark.skipif(BINARY is None, reason="Debian's package chromium is missing")
CIRCLE = ROOT / "demo" / "samples" / "red-circle.png"
KEY = "open-sesame"
DROP = """(element, [name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], name, { type }));
  for (const kind of ["dragover", "drop"]) {
    const options = { dataTransfer: files, bubbles: true, cancelable: true };
    element.dispatchEvent(new DragEvent(kind, options));
  }
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("page") / "log"
    limits = {"QWENVL_MAX_CONCURRENCY": "1", "QWENVL_MAX_WAITING": "0", "QWENVL_MAX_UPLOAD_MB": "1"}
    with Server(log, "tests.e2e.page_app:app", QWENVL_API_KEYS=KEY, **limits) as server:
        server.wait()
        yield server


@pytest.fixture
def page(browser: Browser, scripted: Server) -> Iterator[Page]:
    """The page around the script, with the right key, in English."""
    with opened(browser, scripted.url, locale="en-GB") as page:
        page.get_by_label("This service asks for an API key").fill(KEY)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#access")).to_be_hidden()
        yield page


def drop(page: Page, data: bytes, name: str = "a.png", kind: str = "image/png") -> None:
    page.locator("body").evaluate(DROP, [name, kind, base64.b64encode(data).decode()])


def png(width: int, height: int, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def ask(page: Page, text: str) -> None:
    page.get_by_role("textbox", name=re.compile("question|picture|图片")).fill(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> list[str]:
    """Those that are complete."""
    return page.locator("article.assistant:has(footer:not([hidden])) .text").all_inner_texts()


def running(server: Server) -> float:
    found = re.search(r"^qwenvl_num_requests_running (\S+)", metrics(server), re.MULTILINE)
    assert found
    return float(found[1])


def metrics(server: Server) -> str:
    return send(server.port, "GET", "/metrics").body.decode()


def test_a_picture_two_questions_and_the_status_in_chinese(browser: Browser, server: Server):
    with opened(browser, server.url, locale="zh-CN") as page:
        expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
        expect(page.locator("#phase")).to_have_text("就绪")
        expect(page.locator("#demo")).to_be_visible()
        drop(page, CIRCLE.read_bytes())
        ask(page, "这张图里有什么？")
        until(lambda: answers(page) == ["图中有一个红色的圆形。"], 20)
        ask(page, "是什么颜色？")
        until(lambda: len(answers(page)) == 2, 20)
        assert "红" in answers(page)[1]
        assert "其中记得" in page.locator("article.assistant .times").nth(1).inner_text()
        page.get_by_role("button", name="运行状态").click()
        expect(page.locator("#figures")).to_contain_text("0 / 4")
        expect(page.locator("#figures")).to_contain_text("16,")  # tokens that the KV cache may hold


def test_an_answer_grows_and_is_stopped(page: Page, scripted: Server):
    drop(page, png(20, 10))
    ask(page, "count")
    text = page.locator("article.assistant .text")
    expect(text).to_contain_text("3 ")
    early = text.inner_text()
    expect(text).to_contain_text("9 ")
    assert text.inner_text().startswith(early)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("article.assistant .times")).to_contain_text("Stopped")
    until(lambda: running(scripted) == 0, 1)
    kept = text.inner_text()
    ask(page, "size?")  # the stopped answer is part of the conversation
    until(lambda: answers(page)[1:] == ["20 x 10, 3 messages"], 10)
    assert text.first.inner_text() == kept


def test_a_conversation_that_is_left_in_the_middle(page: Page, scripted: Server):
    """The answer that was coming became the first turn of the new conversation."""
    drop(page, png(20, 10))
    ask(page, "count")
    expect(page.locator("article.assistant .text")).to_contain_text("3 ")
    page.get_by_role("button", name="New conversation").click()
    until(lambda: running(scripted) == 0, 5)
    expect(page.locator("#send")).to_be_visible()
    drop(page, png(30, 10))
    ask(page, "size?")
    until(lambda: answers(page) == ["30 x 10, 1 messages"], 10)


def test_pictures_of_several_turns(page: Page):
    drop(page, png(20, 10))
    drop(page, png(30, 40))
    expect(page.locator("#attached li")).to_have_count(2)
    page.get_by_role("button", name="Remove a.png").first.click()
    ask(page, "size?")
    until(lambda: answers(page) == ["30 x 40, 1 messages"], 10)
    drop(page, png(50, 60))
    ask(page, "size?")
    until(lambda: answers(page)[1:] == ["50 x 60, 3 messages"], 10)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)


def test_large_photos_are_shrunk_if_asked(page: Page):
    page.get_by_label("Make large pictures smaller").check()
    drop(page, png(4096, 1024))
    ask(page, "size?")
    until(lambda: answers(page) == ["2048 x 512, 1 messages"], 10)


def test_marks_lie_where_the_answer_says(page: Page):
    page.set_viewport_size({"width": 800, "height": 600})
    drop(page, png(400, 400))
    ask(page, "find")
    picture = page.locator("article.assistant figure img")
    expect(page.locator(".marks rect")).to_be_visible()
    frame, box = picture.bounding_box(), page.locator(".marks rect").bounding_box()
    dot = page.locator(".marks circle").bounding_box()
    assert frame and box and dot
    expected = {
        "x": frame["x"] + 0.1 * frame["width"],
        "y": frame["y"] + 0.2 * frame["height"],
        "width": 0.4 * frame["width"],
        "height": 0.6 * frame["height"],
    }
    assert {name: pytest.approx(value, abs=3) for name, value in expected.items()} == box
    assert dot["x"] + dot["width"] / 2 == pytest.approx(frame["x"] + 0.9 * frame["width"], abs=3)
    assert dot["y"] + dot["height"] / 2 == pytest.approx(frame["y"] + 0.1 * frame["height"], abs=3)
    assert page.locator(".marks text").all_text_contents() == ["box", "dot"]
    lowest = page.locator("article.assistant .copies").bounding_box()
    form = page.locator("#ask").bounding_box()
    assert lowest and form
    assert lowest["y"] + lowest["height"] <= form["y"], "the picture pushed it under the form"


def test_errors_are_said_and_the_question_is_kept(page: Page, scripted: Server, browser: Browser):
    problem = page.locator("#problem")
    ask(page, "what?")
    expect(problem).to_have_text("Add a picture first.")
    drop(page, b"%PDF-1.7", "offer.pdf", "application/pdf")
    expect(problem).to_have_text("offer.pdf is not a picture.")
    drop(page, b"no picture at all")
    ask(page, "what?")
    expect(problem).to_contain_text("can't be read")
    expect(page.locator("#attached li")).to_have_count(1)
    expect(page.get_by_role("textbox", name="Ask something")).to_have_value("what?")
    page.get_by_role("button", name="Remove a.png").click()
    drop(page, bytes(1_500_000))
    ask(page, "what?")
    expect(problem).to_contain_text("too large")
    expect(problem).to_contain_text("Make large pictures smaller")
    page.get_by_role("button", name="Remove a.png").click()
    with opened(browser, scripted.url, locale="en") as other:
        other.evaluate(f"sessionStorage.setItem('key', '{KEY}')")
        other.reload()
        drop(other, png(10, 10))
        ask(other, "count")
        expect(other.locator("article.assistant .text")).to_contain_text("1 ")
        drop(page, png(10, 10))
        ask(page, "size?")
        expect(problem).to_contain_text("busy")
        other.get_by_role("button", name="Stop").click()
        expect(other.locator("article.assistant .times")).to_contain_text("Stopped")


def test_a_server_that_is_killed_and_loads_again(browser: Browser, tmp_path: Path):
    loading = tmp_path / "loading"
    with contextlib.ExitStack() as stack:
        one = Server(tmp_path / "log", "tests.e2e.page_app:app", PAGE_LOADING=str(loading))
        server = stack.enter_context(one)
        server.wait()
        page = stack.enter_context(opened(browser, server.url, locale="en"))
        problem, question = page.locator("#problem"), page.get_by_role("textbox")
        expect(page.locator("#phase")).to_have_text("Ready")
        drop(page, png(20, 10))
        ask(page, "count")
        expect(page.locator("article.assistant .text")).to_contain_text("3 ")
        loading.touch()
        os.kill(server.worker, signal.SIGKILL)
        expect(problem).to_have_text("The answer broke off. Try again.")
        expect(question).to_have_value("count")
        expect(page.locator("#attached li")).to_have_count(1)
        expect(page.locator("#phase")).to_contain_text("Loading the model", timeout=8000)
        question.press("Enter")
        expect(problem).to_contain_text("still loading")
        loading.unlink()
        expect(page.locator("#phase")).to_have_text("Ready")
        question.fill("size?")
        question.press("Enter")
        until(lambda: answers(page) == ["20 x 10, 1 messages"], 10)


@pytest.mark.parametrize("locale", ["en", "zh-CN"])
def test_a_phone(browser: Browser, server: Server, locale: str):
    """By finger: nothing depends on a pointer that rests, no keyboard comes up over an answer."""
    phone = {"viewport": {"width": 375, "height": 667}, "is_mobile": True, "has_touch": True}
    with opened(browser, server.url, locale=locale, **phone) as page:
        expect(page.locator("#welcome .phone")).to_be_visible()
        expect(page.locator("#welcome .desk")).to_be_hidden()
        page.locator("#samples button").first.tap()
        expect(page.locator("#attached li")).to_have_count(1)
        expect(page.locator("#question")).not_to_be_focused()
        page.locator("#shrink").tap()
        expect(page.locator("#shrink-hint")).to_contain_text(re.compile("2,?048"))
        page.locator("#send").tap()
        until(lambda: len(answers(page)) == 1, 20)
        expect(page.locator("#question")).not_to_be_focused()
        explain = page.locator("article.assistant .copies button").last
        form, button = page.locator("#ask").bounding_box(), explain.bounding_box()
        assert form and button
        # A page scrolls by whole pixels, and boxes end between them.
        assert button["y"] + button["height"] < form["y"] + 1, "the form lies over the buttons"
        meaning = page.locator("article.assistant .hint").first
        expect(meaning).to_be_hidden()
        explain.tap()
        expect(meaning).to_be_visible()
        expect(explain).to_have_attribute("aria-expanded", "true")
        page.locator("#show-status").tap()
        page.locator("#status button").tap()
        expect(page.locator("#figures .hint")).to_have_count(6)
        expect(page.locator("#figures .hint").last).to_be_visible()
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_a_wrong_key_is_told_beside_its_field(page: Page):
    key, problem = page.get_by_label("This service asks for an API key"), page.locator("#problem")
    page.evaluate("sessionStorage.setItem('key', 'wrong')")
    page.reload()
    expect(key).to_be_focused()
    expect(key).to_have_accessible_description("The API key is missing or wrong.")
    drop(page, png(10, 10))
    ask(page, "size?")
    expect(page.locator("article")).to_have_count(0)
    expect(key).to_be_focused()
    expect(key).to_be_in_viewport()
    expect(problem).to_be_empty()
    assert violations(page) == []
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(key).to_be_hidden()
    question = page.get_by_role("textbox", name="Ask something")
    expect(question).to_be_focused()
    expect(question).to_have_value("size?")
    page.keyboard.press("Enter")
    until(lambda: answers(page) == ["10 x 10, 1 messages"], 10)


def test_what_is_said_of_an_earlier_key_comes_too_late(page: Page):
    held: list[Route] = []

    def decide(route: Route) -> None:
        if route.request.headers.get("authorization") == f"Bearer {KEY}":
            route.continue_()
        else:
            held.append(route)

    page.route("**/v1/models", decide)
    page.evaluate("sessionStorage.removeItem('key')")
    page.reload()
    until(lambda: page.evaluate("true") and len(held) == 2)  # as it opens, and with the phase
    held.pop().continue_()
    page.get_by_label("This service asks for an API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#access")).to_be_hidden()
    with page.expect_response("**/v1/models") as refused:
        held.pop().continue_()
    assert refused.value.status == 401
    page.wait_for_timeout(100)  # for what is not to happen
    expect(page.locator("#access")).to_be_hidden()


@pytest.mark.parametrize("width", [375, 1280])
def test_the_status_leaves_the_answer_in_view(page: Page, width: int):
    page.set_viewport_size({"width": width, "height": 800})
    for number in range(4):  # more than a window of them
        drop(page, png(300, 300))
        ask(page, "size?")
        expect(page.locator("article.assistant footer:visible")).to_have_count(number + 1)
    page.wait_for_function("[...document.images].every((one) => one.complete)")
    answer = page.locator("article.assistant .text").last
    before = answer.bounding_box()
    page.get_by_role("button", name="Status").click()
    expect(page.locator("#figures div")).to_have_count(5)  # a script has no KV cache
    expect(page.locator("#status")).to_be_in_viewport(ratio=1)
    assert answer.bounding_box() == before
    middle = answer.evaluate(
        "(one) => { const box = one.getBoundingClientRect();"
        " return document.elementFromPoint(box.x + 2, box.y + box.height / 2) === one; }"
    )
    assert middle, "something lies over the answer"


def test_the_keyboard_alone(browser: Browser, server: Server):
    with opened(browser, server.url, locale="en") as page:
        expect(page.locator("#demo")).to_be_visible()
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.closest('#samples') !== null"):
                break
        page.keyboard.press("Enter")
        expect(page.get_by_role("textbox", name="Ask something")).to_be_focused()
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type("what shape is it?")
        page.keyboard.press("Enter")
        until(lambda: len(answers(page)) == 1, 20)
        assert "circle" in answers(page)[0]


def test_programs_that_ask_the_same(page: Page, scripted: Server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    drop(page, png(10, 10), "it's.png")
    ask(page, "it's 'what'?")
    until(lambda: len(answers(page)) == 1, 10)
    page.get_by_role("button", name="curl").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert f"{scripted.url}/v1/image/recognize" in copied
    assert KEY not in copied
    page.get_by_role("button", name="Python").click()
    compile(page.evaluate("navigator.clipboard.readText()"), "copied.py", "exec")


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_accessible_and_within_the_window(
    browser: Browser, server: Server, width: int, colours: str
):
    size = {"width": width, "height": 800}
    with opened(browser, server.url, locale="en", viewport=size, color_scheme=colours) as page:
        expect(page.locator("#demo")).to_be_visible()
        assert violations(page) == []
        drop(page, CIRCLE.read_bytes())
        ask(page, "what is it?")
        until(lambda: len(answers(page)) == 1, 20)
        page.get_by_role("button", name="Status").click()
        expect(page.locator("#figures div")).to_have_count(6)
        assert violations(page) == []
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {json.dumps(one['nodes'][0]['html'])}" for one in found]


def test_off(tmp_path: Path):
    options = {"QWENVL_PAGE": "off"}
    with Server(tmp_path / "log", "tests.e2e.page_app:app", **options) as server:
        server.wait()
        assert send(server.port, "GET", "/").status == 404
