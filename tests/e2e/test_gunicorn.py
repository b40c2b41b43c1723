"""The service as it runs: a real gunicorn, real sockets, the embedded model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import requests
from gunicorn.config import Config
from PIL import Image

from demo.evaluate import Case as Question
from demo.evaluate import ask, chinese_cases, package_cases
from qwenvl_app.loading.checkpoint import DEMO
from qwenvl_app.server.options import fault
from tests.contract import FROM_SOURCE, RECORDED, Case
from tests.e2e.server import FAKE, ROOT, Server
from tests.waiting import until
from tests.wire import END, GOOD, MULTIPART, PROMPT, ROUTE, encode, part, picture, post, send

SAMPLES = ROOT / "demo" / "samples"
GTHREAD = ("--worker-class", "gthread", "--threads", "1")
TLS = (
    "terminate TLS in nginx (deploy/nginx.conf): a handshake here would hold up the one loop that "
    "reads every request"
)


@pytest.mark.parametrize("case", RECORDED + FROM_SOURCE, ids=lambda case: case.name)
def test_contract(server: Server, case: Case):
    answer = send(server.port, case.method, case.path, case.body, case.content_type)
    expected = case.expected.replace("...", "circle")  # the picture is a blue circle
    assert (answer.status, answer.body) == (case.status, expected.encode())
    assert answer.headers["content-type"] == "application/json"
    for name, value in case.headers.items():
        assert answer.headers[name] == value


@pytest.mark.parametrize(
    ("file", "content_type", "chinese", "english"),
    [
        ("red-circle.png", "image/png", "图中有一个红色的圆形。", "circle"),
        ("teal-triangle.jpg", "image/jpeg", "图中有一个青色的三角形。", "triangle"),
        ("yellow-rectangle.webp", "image/webp", "图中有一个黄色的矩形。", "rectangle"),
    ],
)
def test_the_documented_client(server: Server, file, content_type, chinese, english):
    """The calls of the documented Python client: requests, files=, data=, a guessed type."""
    for prompt, expected in (("这张图里有什么？", chinese), ("what shape is present?", english)):
        with (SAMPLES / file).open("rb") as image:
            response = requests.post(
                server.url + ROUTE,
                files={"image": (file, image, content_type)},
                data={"prompt": prompt},
                timeout=60,
            )
        assert response.status_code == 200
        assert response.json() == {"status": "success", "result": expected}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Server):
    command = ["curl", "-sS", "-F", f"image=@{SAMPLES / 'red-circle.png'}"]
    command += ["-F", "prompt=是什么颜色？", server.url + ROUTE]
    output = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert output.decode() == '{"status":"success","result":"图中的圆形是红色的。"}'


@pytest.mark.parametrize("share", [15, pytest.param(1, marks=pytest.mark.slow)])
def test_a_sample_of_the_evaluation(server: Server, share: int):
    """``demo/evaluate.py`` asks all 9,673 and 1,600; here every 40th and every 8th, or fewer."""
    wrong: list[tuple[Question, str]] = []
    cases = [*list(package_cases())[:: 40 * share], *list(chinese_cases())[:: 8 * share]]
    for case in cases:
        answer = ask(server.url, case)
        if answer != case.expected:
            wrong.append((case, answer))
    assert len(wrong) <= len(cases) // 100, [
        (case.prompt, case.expected, answer) for case, answer in wrong
    ]


def test_an_upload_of_15_mb_touches_no_disk(server: Server):
    """Watched from outside: no file appears, and the worker writes no more than log and answer.

    ``wchar`` in /proc/PID/io counts the bytes of every write call, so that a file without a name,
    which no watcher would see, is seen too.
    """
    from inotify_simple import INotify, flags

    noise = np.random.default_rng(0).integers(0, 256, (2240, 2240, 3), dtype=np.uint8)
    image = encode(Image.fromarray(noise), "BMP")
    assert len(image) > 15_000_000
    body = part("image", image, "a.bmp", "image/bmp") + PROMPT + END

    def written() -> int:
        lines = Path(f"/proc/{server.worker}/io").read_text().split("\n")
        return int(dict(line.split(": ") for line in lines if line)["wchar"])

    assert post(server.port, GOOD).status == 200  # what the first request imports is imported
    with INotify() as watcher:
        for folder in (server.tmp, ROOT, ROOT / "qwenvl_app"):
            watcher.add_watch(folder, flags.CREATE | flags.MOVED_TO)
        before = written()
        assert post(server.port, body).status == 200
        after = written()
        (server.tmp / "proof that watching works").touch()
        events = [event.name for event in watcher.read(timeout=1000)]
    assert events == ["proof that watching works"]
    assert after - before < 100_000


def test_four_clients_are_answered_and_a_fifth_waits(server: Server):
    answers: list[int] = []

    def work() -> None:
        answers.extend(post(server.port, GOOD).status for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 40


def test_keep_alive_answers_pipelined_requests(server: Server):
    request = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: {MULTIPART}\r\n"
    request += f"Content-Length: {len(GOOD)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall((request + "\r\n").encode() + GOOD)
        connection.sendall((request + "Connection: close\r\n\r\n").encode() + GOOD)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert received.count(b'{"status":"success","result":"circle"}') == 2


def test_a_chunked_body(server: Server):
    def chunks():
        for start in range(0, len(GOOD), 100):
            yield GOOD[start : start + 100]

    response = requests.post(
        server.url + ROUTE, data=chunks(), headers={"Content-Type": MULTIPART}, timeout=30
    )
    assert response.content == b'{"status":"success","result":"circle"}'


def test_nothing_private_in_the_log(server: Server):
    body = part("image", picture(), "private-name.png", "image/png")
    body += part("prompt", b"private words") + END
    assert post(server.port, body).status == 200
    assert "private" not in server.log.read_text()


@pytest.mark.slow  # test_loading.py sees it of a model that is none, ``server`` of this one
def test_it_listens_while_it_loads_and_stops_when_told(tmp_path: Path):
    with Server(tmp_path / "log") as server:
        loading = server.wait("loading")
        assert str(loading["message"]).startswith(("loading the", "looking for"))
        answer = post(server.port, GOOD)
        assert answer.status == 503
        assert json.loads(answer.body) == {"detail": "模型正在加载，请稍后重试。"}
        assert answer.headers["retry-after"] == "10"
        assert send(server.port, "GET", "/livez").status == 200
        server.wait()
        assert post(server.port, GOOD).status == 200
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("missing", "incomplete")),
    ],
)
def test_a_broken_model_directory(tmp_path: Path, damage: str):
    directory = tmp_path / "secret-place"
    message = "the directory that QWENVL_MODEL names does not exist"
    if damage != "missing":
        shutil.copytree(DEMO, directory)
        file = directory / "model.safetensors"
        message = "the model directory lacks model.safetensors; copy or download it again"
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:1_000_000])
            message = "model.safetensors is truncated or damaged; copy or download it again"
        else:
            file.unlink()
    with Server(tmp_path / "log", QWENVL_MODEL=str(directory)) as server:
        assert server.wait("failed")["message"] == message
        answer = post(server.port, GOOD)
        number = answer.headers["x-request-id"]
        assert answer.status == 500
        assert json.loads(answer.body) == {
            "detail": "服务器内部错误: 模型加载失败或已停止工作，请联系管理员。"
            f"（请求编号 {number}）"
        }
        assert send(server.port, "GET", "/readyz").status == 503
    log = server.log.read_text()
    assert message in log
    assert "Traceback" not in log


def test_a_wrong_setting_stops_the_start_with_one_line(tmp_path: Path):
    """With a status of its own, after which systemd does not try again; a port in use has 1."""
    with Server(tmp_path / "log", QWENVL_MAX_CONCURENCY="4") as server:
        assert server.process.wait(30) == os.EX_CONFIG
    assert server.log.read_text().splitlines() == [
        "qwenvl: unknown setting 'max_concurency' (environment); did you mean 'max_concurrency'?"
    ]


OPTIONS = [
    (("--certfile", "README.md", "--keyfile", "README.md"), TLS),
    (("--limit-request-line", "0"), "a request line has to have a limit, from 1 to 8190"),
    (
        ("--proxy-protocol", "v1"),
        "let the proxy in front send X-Forwarded-For, and set trusted_hops",
    ),
    (("--protocol", "uwsgi"), "let the proxy in front speak HTTP/1.1 to this service"),
    (("--keyfile", "README.md"), TLS),
    (
        ("--workers", "2"),
        "set QWENVL_WORKERS: a model can't be shared by several, and limits are divided by it",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), OPTIONS)
def test_options_that_break_the_framing(options, sentence: str):
    cfg = Config()
    for name, value in vars(cfg.parser().parse_args(options)).items():
        if value is not None and name != "args":
            cfg.set(name, value)
    name = options[0].removeprefix("--").replace("-", "_")
    told = fault(cfg)
    assert told is not None
    assert told.startswith(f"gunicorn's option {name} = ")
    assert told.endswith(sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [OPTIONS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in OPTIONS[1:])],
)
def test_options_that_break_the_framing_stop_the_start(tmp_path: Path, options, sentence: str):
    server = Server(tmp_path / "log", FAKE, options)
    try:
        assert server.process.wait(30) == os.EX_CONFIG
    finally:
        server.stop()
    lines = server.log.read_text().splitlines()
    name = options[0].removeprefix("--").replace("-", "_")
    assert f"gunicorn's option {name} = " in lines[-1]
    assert lines[-1].endswith(sentence)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", ()),
        ("flask", GTHREAD),
        pytest.param("flask", (), marks=pytest.mark.slow),
        pytest.param("plain", GTHREAD, marks=pytest.mark.slow),
    ],
)
def test_the_configuration_serves_other_applications(tmp_path: Path, name: str, options):
    """docs/first-day.md has one: the model without the engine."""
    server = Server(tmp_path / "log", f"tests.e2e.other_apps:{name}", options)
    try:
        until(lambda: "Booting worker" in server.log.read_text(), 30)
        for method, body in (("GET", b""), ("POST", GOOD)):
            assert send(server.port, method, "/", body).body == name.encode()
        assert send(server.port, "GET", "nonsense").status == 400
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
    assert " ERROR " not in server.log.read_text()


def test_settings_are_read_at_the_start_and_at_a_reload(tmp_path: Path):
    """By the master alone: what a later worker would read might not fit the master's threads.

    A reload with a setting that is wrong is none; it ended the master, and with it the service.
    """
    file = tmp_path / "settings.toml"
    file.write_text("max_prompt_chars = 1\n")
    with Server(tmp_path / "log", FAKE, QWENVL_CONFIG=str(file)) as server:
        server.wait()
        assert post(server.port, GOOD).status == 413
        file.write_text("max_prompt_chars = 1000\n")
        first = server.worker
        os.kill(first, signal.SIGKILL)
        until(lambda: server.workers not in ([], [first]), 30)
        server.wait()
        assert post(server.port, GOOD).status == 413
        second = server.worker
        file.write_text('max_prompt_chars = "many"\n')
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "no reload, the workers go on" in server.log.read_text(), 30)
        assert "setting 'max_prompt_chars'" in server.log.read_text()
        assert (server.worker, post(server.port, GOOD).status) == (second, 413)
        file.write_text("max_prompt_chars = 1000\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: post(server.port, GOOD).status == 200, 30)


@pytest.mark.slow  # without a model the test above sees it
def test_a_killed_worker_comes_back(tmp_path: Path):
    with Server(tmp_path / "log") as server:
        server.wait()
        first = server.worker
        os.kill(first, signal.SIGKILL)
        until(lambda: server.workers not in ([], [first]), 30)
        server.wait()
        assert post(server.port, GOOD).status == 200
