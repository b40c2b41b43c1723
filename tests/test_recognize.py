"""The documented route around the backend: permits, errors, request ids, limits."""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time

import pytest
import torch

from qwenvl_app import create_app
from qwenvl_app.errors import InternalError
from qwenvl_app.generation import Phase, Status
from qwenvl_app.images.decode import decode_image
from qwenvl_app.settings import load_settings
from qwenvl_app.testing import ScriptedBackend, prompt_of
from qwenvl_app.version import VERSION
from tests.waiting import until
from tests.wire import END, GOOD, IMAGE, MULTIPART, PROMPT, ROUTE, part, picture


def detail(answer) -> str:
    return json.loads(answer.body)["detail"]


@pytest.mark.parametrize(
    ("phase", "status", "text", "retry"),
    [
        (Phase.LOADING, 503, "模型正在加载，请稍后重试。", "10"),
        (Phase.DRAINING, 503, "服务正在停止，请稍后重试。", "10"),
        (
            Phase.FAILED,
            500,
            "服务器内部错误: 模型加载失败或已停止工作，请联系管理员。（请求编号 ",
            None,
        ),
    ],
)
def test_not_ready(post, client, backend: ScriptedBackend, phase, status, text, retry):
    backend.phase = Status(phase, "weights are missing")
    answer = post(GOOD)
    assert answer.status == status
    assert detail(answer).startswith(text)
    assert answer.headers.get("retry-after") == retry
    for path in ("/readyz", "/health"):
        response = client.get(path)
        assert response.status_code == 503
        assert response.json["phase"] == phase
        assert response.json["message"] == "weights are missing"
        assert response.json["phase_seconds"] >= 0
    assert client.get("/livez").status_code == 200


def test_ready(client):
    response = client.get("/readyz")
    assert (response.status_code, response.json["phase"]) == (200, "ready")
    assert response.json["version"] == VERSION
    assert f'qwenvl_build_info{{version="{VERSION}"}} 1.0' in client.get("/metrics").text


def test_an_unexpected_error_is_a_fixed_sentence_and_goes_to_the_log_once(post, backend, caplog):
    """The original answered with str(exception): paths, addresses, library text."""
    backend.failure = RuntimeError("secret /data/path 0x7f00")
    answer = post(GOOD)
    assert answer.status == 500
    number = answer.headers["x-request-id"]
    assert (
        detail(answer)
        == f"服务器内部错误: 处理请求时发生意外错误，请稍后重试。（请求编号 {number}）"
    )
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "secret" in str(errors[0].exc_info[1])
    assert number in errors[0].getMessage()


def test_an_error_of_the_engine_keeps_its_sentence(post, backend: ScriptedBackend):
    backend.refusal = InternalError("推理时发生错误。")
    assert detail(post(GOOD)).startswith("服务器内部错误: 推理时发生错误。（请求编号 ")


@pytest.mark.parametrize("sent", ["abc-123", "A.b_c-1", "x" * 128])
def test_a_sane_request_id_is_kept(client, sent):
    assert client.get("/livez", headers={"X-Request-ID": sent}).headers["X-Request-ID"] == sent


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "é", "<script>", 'a"b'])
def test_any_other_request_id_is_replaced(client, sent):
    answered = client.get("/nope", headers={"X-Request-ID": sent}).headers["X-Request-ID"]
    assert len(answered) == 32
    assert answered.isalnum()


@pytest.mark.parametrize("length", ["announced", "chunked"])
def test_a_body_over_the_limit(backend, length):
    app = create_app(load_settings({}, max_upload_mb=1), backend)
    body = part("image", b"x" * 2**20, "a.png", "image/png") + PROMPT + END
    extra = {"wsgi.input_terminated": True} if length == "chunked" else {}
    response = app.test_client().post(
        ROUTE, data=body, content_type=MULTIPART, environ_overrides=extra
    )
    assert response.status_code == 413
    assert response.json == {"detail": "上传的内容超过 1 MB 的限制。"}


def test_four_permits_are_taken_before_decoding_and_given_back(app, backend: ScriptedBackend):
    backend.go.clear()
    admission = app.extensions["qwenvl"]["admission"]
    statuses: list[int] = []

    def ask() -> None:
        response = app.test_client().post(ROUTE, data=GOOD, content_type=MULTIPART)
        statuses.append(response.status_code)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len(backend.requests) == 4 and admission.waiting == 2)
    assert admission.free == 0
    # Waiting for a permit costs no decoding: this body would be refused after it.
    bad = part("image", b"no picture", "a.png", "image/png") + PROMPT + END
    late = threading.Thread(
        target=lambda: statuses.append(
            app.test_client().post(ROUTE, data=bad, content_type=MULTIPART).status_code
        )
    )
    late.start()
    until(lambda: admission.waiting == 3)
    assert statuses == []
    backend.go.set()
    for thread in [*threads, late]:
        thread.join()
    assert sorted(statuses) == [200] * 6 + [400]


@pytest.mark.parametrize("failure", [None, ValueError("boom")])
def test_a_permit_comes_back_whatever_happens(app, post, backend: ScriptedBackend, failure):
    backend.failure = failure
    for _ in range(10):
        post(GOOD)
        post(part("image", b"GIF89a broken", "a.gif", "image/gif") + PROMPT + END)
    assert app.extensions["qwenvl"]["admission"].free == 4


def test_a_full_waiting_room_is_a_503(backend: ScriptedBackend):
    app = create_app(load_settings({}, max_concurrency=1, max_waiting=0), backend)
    backend.go.clear()
    first = threading.Thread(
        target=lambda: app.test_client().post(ROUTE, data=GOOD, content_type=MULTIPART)
    )
    first.start()
    until(lambda: backend.requests)
    response = app.test_client().post(ROUTE, data=GOOD, content_type=MULTIPART)
    assert response.status_code == 503
    assert response.json == {"detail": "服务器繁忙，请稍后重试。"}
    assert int(response.headers["Retry-After"]) >= 1
    backend.go.set()
    first.join()


@pytest.mark.parametrize(
    ("data", "status", "expected"),
    [
        (b"", 400, "上传的文件无法作为图片读取，可能已损坏或格式不受支持。"),
        (b"not a picture", 400, "上传的文件无法作为图片读取，可能已损坏或格式不受支持。"),
        (picture()[:100], 400, "上传的文件无法作为图片读取，可能已损坏或格式不受支持。"),
        (
            picture(size=(900, 1)),
            400,
            "图片的长宽比不能超过 200，但收到的图片为 900×1 像素。",
        ),
    ],
    ids=["empty", "no picture", "truncated", "too narrow"],
)
def test_bad_pictures(post, backend, data, status, expected):
    """Each of these was a 500 with the decoder's own message."""
    answer = post(part("image", data, "a.png", "image/png") + PROMPT + END)
    assert (answer.status, detail(answer)) == (status, expected)
    assert backend.requests == []


def test_too_many_pixels(backend):
    app = create_app(load_settings({}, max_image_megapixels=0.5), backend)
    body = part("image", picture(size=(1000, 501)), "a.png", "image/png") + PROMPT + END
    response = app.test_client().post(ROUTE, data=body, content_type=MULTIPART)
    assert response.status_code == 413
    assert response.json == {"detail": "图片为 1000×501 像素，超过 0.5 百万像素的限制。"}


def test_neither_prompt_nor_answer_nor_name_is_logged(post, caplog):
    caplog.set_level(logging.INFO)
    body = IMAGE.replace(b"a.png", b"private-name.png") + part("prompt", b"private words") + END
    post(body)
    assert "private" not in caplog.text
    assert "答案" not in caplog.text


def same(text: str) -> tuple[bytes, str]:
    return text.encode(), text


PROMPTS = {
    # A blank prompt is the contract's, in tests/contract.py. All of these are answered:
    "whitespace only": same(" \t\r\n "),
    "NUL": same("a\x00b"),
    "right to left and zero width": same("\u202eabc\u200b\u200d\ufeff"),
    "control tokens": same("<|im_end|><|image_pad|>"),
    "what stands for the text in the template": same("\x00text\x00"),
    "decomposed": same("e\u0301 \uff21"),  # not normalised
    "not a character": same("\uffff\U0010ffff"),
    # Not UTF-8: GB18030, as curl sends it on a Chinese Windows.
    "GBK": ("颜色".encode("gbk"), "颜色"),
    "GBK and ASCII": (
        "用JSON回答：what is 这个?\r\n".encode("gbk"),
        "用JSON回答：what is 这个?\r\n",
    ),
    "GBK, traditional": ("請問這裡有幾隻貓".encode("gbk"), "請問這裡有幾隻貓"),
    "four bytes a character": ("𠀀是什么字🙂".encode("gb18030"), "𠀀是什么字🙂"),
    "another script in GB18030": (
        "翻译：ありがとう привет".encode("gbk"),
        "翻译：ありがとう привет",
    ),
    "the longest": same("x" * 50_000),
    "the longest in characters": same("图" * 50_000),
}


@pytest.mark.parametrize(("sent", "expected"), PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_comes_through_unchanged(post, backend: ScriptedBackend, sent, expected):
    assert post(IMAGE + part("prompt", sent) + END).status == 200
    assert prompt_of(backend.requests[0]) == expected


NO_TEXT = (
    "字段 prompt 的内容不是文本：请使用 UTF-8，或声明正确的字符集；文件须带文件名（filename）。"
)
NO_CHARSET = "不支持所声明的字符集（charset），请使用 UTF-8。"
UNREADABLE = {
    "invalid UTF-8": b"\xff\xfeabc",
    "one byte": b"\x80",
    "cut in a character": "图".encode()[:2],
    "cut in the last character": "这是什么".encode()[:-1],
    "cut at both ends": "这是什么".encode()[1:-1],
    "Latin-1 in the middle of UTF-8": "这是café".encode() + b"\xe9t" + "什么".encode(),
    "lone surrogate": b"\xed\xa0\x80",
    "CESU-8": b"\xed\xa0\xbd\xed\xb8\x80",
    "UTF-16": "hi".encode("utf-16"),
    "UTF-16 in Chinese": "这是什么".encode("utf-16"),
    "Latin-1, café": "café".encode("latin-1"),
    "Latin-1, one accent in a word": "Welche Farbe hat der Würfel".encode("latin-1"),
    "Latin-1, two accents": "Größe".encode("latin-1"),
    "Latin-1, in brackets": "[café]".encode("latin-1"),
    "Windows-1252": "“hello”".encode("cp1252"),
    "Windows-1251": "привет".encode("cp1251"),
    "Shift_JIS": "これは何ですか".encode("shift_jis"),
    "Big5": "請描述這張圖片的內容".encode("big5"),
    "GBK with NUL": "颜色\0".encode("gbk"),
    "for private use": b"\xaa\xa1\xaa\xa2",
    "not assigned": "颜色\u0378".encode("gb18030"),
}


@pytest.mark.parametrize("sent", UNREADABLE.values(), ids=UNREADABLE)
def test_no_answer_to_mojibake(post, backend: ScriptedBackend, sent):
    """They were read as Latin-1, and the model answered that."""
    answer = post(IMAGE + part("prompt", sent) + END)
    assert (answer.status, detail(answer)) == (400, NO_TEXT)
    assert backend.requests == []


CHARSETS = [
    ("GBK", "这张图片里有什么", "gbk"),
    ("gbk", "图片", "gbk"),  # as UTF-8 it would be "ͼƬ"
    ('"GBK"', "描述", "gbk"),
    ("GB2312", "朱镕基", "gbk"),  # has more than GB 2312 has, as from Windows
    ("gb18030", "𠀀🙂", "gb18030"),
    ("Big5", "功許蓋", "big5"),  # each ends in a backslash
    ("Shift_JIS", "表示①", "cp932"),
    ("EUC-JP", "日本語", "euc_jp"),
    ("EUC-KR", "무엇입니까", "euc_kr"),
    ("windows-1251", "привет", "cp1251"),
    ("ISO-8859-1", "café", "latin_1"),
    ("ISO-8859-1", "“café”", "cp1252"),
    ("ISO-8859-1", "颜色", "utf-8"),  # what libraries declare without a look at the text
    ("utf-8", "颜色", "utf-8"),
    ("utf8", "\0", "utf-8"),
]


@pytest.mark.parametrize(("charset", "text", "codec"), CHARSETS)
@pytest.mark.parametrize("where", ["request", "part", "field", "field behind", "before"])
def test_the_charset_that_was_declared(post, backend: ScriptedBackend, charset, text, codec, where):
    """It was ignored. As in Starlette the request's counts, and as RFC 7578 says the other two."""
    kind = f"text/plain; charset={charset}" if where == "part" else None
    name = "图表.png".encode(codec, "ignore")
    image = IMAGE.replace(b"a.png", name) if where == "request" else IMAGE
    body = image + part("prompt", text.encode(codec), None, kind)
    named = part("_charset_", charset.strip('"').encode())
    if where.startswith("field"):
        body = named + body if where == "field" else body + named
    request = {"request": f"{MULTIPART}; charset={charset}"}.get(where, MULTIPART)
    if where == "before":
        request = MULTIPART.replace(";", f"; Charset = {charset};", 1)
    assert post(body + END, request).status == 200
    assert prompt_of(backend.requests[0]) == text


def test_the_nearest_charset_counts(post, backend: ScriptedBackend):
    named, gbk = part("_charset_", b"koi8-r"), f"{MULTIPART}; charset=GBK"
    own = part("prompt", "圖片".encode("big5"), None, "text/plain; charset=big5")
    assert post(named + IMAGE + own + END, gbk).status == 200
    assert post(named + IMAGE + part("prompt", "图片".encode("gbk")) + END, gbk).status == 200
    assert [prompt_of(request) for request in backend.requests] == ["圖片", "图片"]


@pytest.mark.parametrize("where", ["request", "part", "field"])
@pytest.mark.parametrize(
    "charset",
    [
        *("no-such-charset", "x" * 5000, "utf-9", "颜色", "gbk2312", "utf-7", "hz", "cp037"),
        *("rot13", "zlib", "bz2", "base64", "idna", "punycode", "unicode_escape", "undefined"),
    ],
)
def test_no_such_charset(post, backend: ScriptedBackend, charset, where):
    """Python has codecs that are no charsets; some unpack megabytes from a few bytes."""
    kind = f"text/plain; charset={charset}" if where == "part" else None
    body = IMAGE + part("prompt", b"what?", None, kind) + END
    if where == "field":
        body = part("_charset_", charset.encode()) + body
    shown = charset.encode().decode("latin-1")
    answer = post(body, f"{MULTIPART}; charset={shown}" if where == "request" else MULTIPART)
    assert (answer.status, detail(answer)) == (400, NO_CHARSET)
    assert backend.requests == []


@pytest.mark.parametrize(
    ("charset", "sent"),
    [
        ("utf-8", "颜色".encode("gbk")),
        ("us-ascii", "颜色".encode()),
        ("GBK", b"\xff\xfe"),
        ("gbk", "颜色".encode("gbk")[:-1]),
        ("Shift_JIS", b"\x82"),
        ("ISO-8859-1", b"\x89PNG\r\n\x1a\n\0"),
        ("utf-16-le", b"a"),
    ],
)
def test_bytes_that_are_not_of_the_charset_that_was_declared(post, backend, charset, sent):
    body = IMAGE + part("prompt", sent, None, f"text/plain; charset={charset}") + END
    answer = post(body)
    assert (answer.status, detail(answer)) == (400, NO_TEXT)
    assert backend.requests == []


@pytest.mark.parametrize("data", [picture(file_format=name) for name in ("PNG", "JPEG", "BMP")])
@pytest.mark.parametrize("charset", ["", "; charset=gbk", "; charset=iso-8859-1"])
def test_a_picture_that_was_sent_as_text_does_not_come_back(post, data, charset):
    """It came back in ``input``."""
    body = part("image", data, None, "image/png" + charset) + PROMPT + END
    answer = post(body, MULTIPART + charset)
    assert answer.status == 400
    assert detail(answer) == NO_TEXT.replace("prompt", "image")


def test_a_prompt_that_is_too_long_takes_no_permit(app, post, backend: ScriptedBackend):
    admission = app.extensions["qwenvl"]["admission"]
    admission.drain()  # who asks for a permit now gets 503
    for length in (50_001, 100_000):
        answer = post(IMAGE + part("prompt", b"x" * length) + END)
        assert answer.status == 413
        assert detail(answer) == f"提示词为 {length} 个字符，超过 50000 个字符的限制。"
    assert backend.requests == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["python", "torch on a CPU", "torch on a GPU"],
)
def test_no_memory_for_a_picture(app, post, monkeypatch, error):
    """It was a 500; torch says it in a RuntimeError like any other."""

    def exhausted(_data, **_limits):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("qwenvl_app.web.recognize.decode_image", exhausted)
        answer = post(GOOD)
    assert (answer.status, detail(answer)) == (503, "显存或内存不足，请稍后重试或缩小图片。")
    assert answer.headers["retry-after"] == "5"
    assert app.extensions["qwenvl"]["admission"].free == 4
    assert post(GOOD).status == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [("//v1/image/recognize", 422), ("/v1//image/recognize", 404), ("//evil.example", 404)],
)
def test_slashes_are_no_redirect(client, path, status):
    """Werkzeug redirects, in HTML, to wherever the Host header says; the original did not."""
    headers, path = {"Host": "evil.example"}, {"PATH_INFO": path}
    answer = client.post("/", headers=headers, environ_overrides=path)
    assert (answer.status_code, "Location" in answer.headers) == (status, False)
    assert answer.json["detail"]


def test_an_absolute_url_without_a_path_is_no_redirect(client):
    """``GET http://evil.example HTTP/1.1``, of which a WSGI server makes an empty path."""
    for method, status in (("GET", 200), ("HEAD", 200), ("POST", 405)):
        answer = client.open("/", method=method, environ_overrides={"PATH_INFO": ""})
        assert answer.status_code == status
        assert "Location" not in answer.headers


def post_with(app, **environ):
    """What a worker's environment adds, and the answer in a thread of its own."""
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(
            app.test_client().post(
                ROUTE, data=GOOD, content_type=MULTIPART, environ_overrides=environ
            )
        )
    )
    thread.start()
    return thread, answers


LATE = (504, {"detail": "请求处理超时，请稍后重试。"})
GONE = (499, {"detail": "Client Closed Request"})


def ended(thread: threading.Thread, answers: list, seconds: float = 5) -> tuple[int, object]:
    thread.join(seconds)
    assert not thread.is_alive()
    return answers[0].status_code, answers[0].json


def test_the_deadline_of_a_generation(backend: ScriptedBackend, client, app):
    """It starts with the request's first byte: here most of the time went by before the view."""
    backend.go.clear()
    began = time.monotonic()
    assert ended(*post_with(app, **{"qwenvl.arrived": began - 119.9})) == LATE
    assert backend.requests[0].deadline == pytest.approx(began + 0.1)
    backend.go.set()
    assert client.post(ROUTE, data=GOOD, content_type=MULTIPART).status_code == 200


def test_the_deadline_in_the_queue_and_before(backend: ScriptedBackend):
    settings = load_settings({}, max_concurrency=1, request_timeout_s=60)
    app = create_app(settings, backend)
    backend.go.clear()
    first = post_with(app)
    until(lambda: backend.requests)
    for spent in (59.9, 60.0, 1000.0):
        assert ended(*post_with(app, **{"qwenvl.arrived": time.monotonic() - spent})) == LATE
    assert len(backend.requests) == 1
    backend.go.set()
    assert ended(*first)[0] == 200
    assert app.extensions["qwenvl"]["admission"].free == 1


@pytest.mark.parametrize("stage", ["before", "waiting", "generating"])
def test_a_client_that_leaves_frees_its_place(app, backend: ScriptedBackend, caplog, stage):
    """The generation went on to its end, for nobody, and nobody else had the permit meanwhile."""
    admission = app.extensions["qwenvl"]["admission"]
    backend.go.clear()
    others = []
    if stage == "waiting":
        others = [post_with(app) for _ in range(4)]
        until(lambda: admission.free == 0)
    theirs, ours = socket.socketpair()
    with ours:
        if stage == "before":
            theirs.close()
        thread, answers = post_with(app, **{"gunicorn.socket": ours})
        if stage == "waiting":
            until(lambda: admission.waiting)
        if stage == "generating":
            until(lambda: backend.generations)
        theirs.close()
        assert ended(thread, answers, 1) == GONE
    assert admission.waiting == 0
    assert admission.free == (0 if stage == "waiting" else 4)
    assert len(backend.requests) == {"before": 0, "waiting": 4, "generating": 1}[stage]
    backend.go.set()
    assert all(ended(*other)[0] == 200 for other in others)
    assert app.extensions["qwenvl"]["disconnects"].watched == 0
    assert not [record for record in caplog.records if record.exc_info]


def test_a_client_that_leaves_while_its_picture_is_decoded(app, backend, monkeypatch):
    theirs, ours = socket.socketpair()
    decoding, leave = threading.Event(), threading.Event()

    def slow(data: bytes, **limits):
        decoding.set()
        assert leave.wait(10)
        return decode_image(data, **limits)

    monkeypatch.setattr("qwenvl_app.web.recognize.decode_image", slow)
    disconnects = app.extensions["qwenvl"]["disconnects"]
    with ours:
        thread, answers = post_with(app, **{"gunicorn.socket": ours})
        assert decoding.wait(10)
        assert disconnects.watched == 1
        theirs.close()
        until(lambda: not disconnects.watched)
        leave.set()
        assert ended(thread, answers) == GONE
    assert backend.requests == []


def test_a_connection_that_breaks_during_the_upload(app, caplog):
    """A reset while the body is read was a 500 with a trace."""

    class Broken(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, _buffer):
            raise ConnectionResetError

    response = app.test_client().post(
        ROUTE,
        content_type=MULTIPART,
        environ_overrides={"wsgi.input": Broken(), "CONTENT_LENGTH": "1000"},
    )
    assert (response.status_code, response.json) == GONE
    assert not [record for record in caplog.records if record.exc_info]


def test_draining(app, backend: ScriptedBackend, client):
    """SIGTERM: what runs ends, what waits and what comes is refused, and /readyz says so."""
    extension = app.extensions["qwenvl"]
    backend.go.clear()
    running = [post_with(app) for _ in range(4)]
    until(lambda: len(backend.requests) == 4)
    waiting = [post_with(app) for _ in range(3)]
    until(lambda: extension["admission"].waiting == 3)
    extension["drain"]()
    extension["drain"]()
    stopping = (503, {"detail": "服务正在停止，请稍后重试。"})
    assert [ended(*each) for each in waiting] == [stopping] * 3
    assert waiting[0][1][0].headers["Retry-After"] == "10"
    assert ended(*post_with(app)) == stopping
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json["phase"]) == (503, "draining")
    assert ready.json["phase_seconds"] >= 0
    assert client.get("/livez").status_code == 200
    backend.go.set()
    assert [ended(*each)[0] for each in running] == [200] * 4


def test_a_long_field_of_the_wrong_kind_does_not_come_back_whole(client):
    """A megabyte of NULs was answered with six, of which a slow reader made a held thread."""
    body = part("image", b"\0" * 1_000_000) + PROMPT + END
    answer = client.post(ROUTE, data=body, content_type=MULTIPART)
    assert answer.status_code == 422
    assert answer.json["detail"][0]["input"] == "\0" * 1000
    assert len(answer.data) < 10_000
