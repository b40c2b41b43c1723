"""deploy/nginx.conf, as it is, in front of a real gunicorn."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from tests.e2e.apps import APART_S, PIECES
from tests.e2e.nginx import BINARY, Nginx
from tests.e2e.server import FAKE, Server
from tests.test_metrics import parse
from tests.waiting import until
from tests.wire import END, GOOD, MULTIPART, PROMPT, ROUTE, encode, part, send

pytestmark = [
    pytest.mark.skipif(BINARY is None, reason="Debian's package nginx is not installed"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
    # The certificate is signed by itself.
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]
ANSWER = '{"status":"success","result":"一个答案。"}'


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without a model: what is asked here is what nginx and the service make of one another."""
    log = tmp_path_factory.mktemp("behind") / "log"
    with Server(log, FAKE, QWENVL_TRUSTED_HOPS="1") as server:
        server.wait()
        yield server


@pytest.fixture(scope="module")
def nginx(behind: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    nginx = Nginx(tmp_path_factory.mktemp("nginx"), behind.port)
    try:
        yield nginx
    finally:
        nginx.stop()


def post(nginx: Nginx, body: bytes, **headers: str) -> requests.Response:
    return requests.post(
        nginx.url + ROUTE,
        data=body,
        headers={"Content-Type": MULTIPART, **headers},
        verify=False,
        timeout=60,
    )


def upload(nginx: Nginx, sent: int, address: str = "127.0.0.1") -> ssl.SSLSocket:
    """A connection from ``address`` on which ``sent`` bytes of GOOD have been uploaded."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    raw = socket.create_connection(("127.0.0.1", nginx.https), 10, (address, 0))
    connection = context.wrap_socket(raw)
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: {MULTIPART}\r\n"
    head += f"Content-Length: {len(GOOD)}\r\n\r\n"
    connection.sendall(head.encode() + GOOD[:sent])
    return connection


def test_a_request_through_tls(nginx: Nginx):
    answer = post(nginx, GOOD, **{"X-Request-ID": "through-nginx"})
    assert (answer.status_code, answer.text) == (200, ANSWER)
    assert answer.headers["X-Request-ID"] == "through-nginx"
    plain = requests.post(
        f"http://127.0.0.1:{nginx.http}{ROUTE}", data=GOOD, allow_redirects=False, timeout=60
    )
    assert plain.status_code == 308  # a POST stays one
    assert plain.headers["Location"].startswith("https://")


def test_an_upload_of_15_mb_is_not_written_to_disk(nginx: Nginx):
    noise = np.random.default_rng(0).integers(0, 256, (2240, 2240, 3), dtype=np.uint8)
    image = encode(Image.fromarray(noise), "BMP")
    assert len(image) > 15_000_000
    answer = post(nginx, part("image", image, "a.bmp", "image/bmp") + PROMPT + END)
    assert answer.status_code == 200
    assert "temporary file" not in nginx.errors.read_text()


@pytest.mark.parametrize("size", [20.5, 22])
def test_too_large_is_the_same_sentence_from_both(nginx: Nginx, size: float):
    answer = post(nginx, b"x" * int(size * 2**20))
    assert answer.status_code == 413
    assert answer.json() == {"detail": "上传的内容超过 20 MB 的限制。"}


def test_the_address_in_the_log_is_the_clients_own(nginx: Nginx, behind: Server):
    """One hop is trusted, and nginx writes over what the client says of itself."""
    ident = {"X-Request-ID": "who-am-i", "X-Forwarded-For": "6.6.6.6"}
    assert post(nginx, GOOD, **ident).status_code == 200
    (line,) = [line for line in behind.log.read_text().splitlines() if "[who-am-i]" in line]
    assert " client=127.0.0.1 " in line
    assert "6.6.6.6" not in line


def test_a_client_that_leaves_does_no_harm(nginx: Nginx, behind: Server):
    """It goes away in the middle of its upload, and then while it waits for its answer."""
    for sent in (len(GOOD) // 2, len(GOOD)):
        upload(nginx, sent).close()

    def idle() -> bool:
        samples = parse(send(behind.port, "GET", "/metrics").body.decode())
        held = ("qwenvl_num_requests_running", "qwenvl_num_requests_waiting")
        return not any(samples[name] for name in held)

    until(idle)
    assert post(nginx, GOOD).text == ANSWER


def chat(nginx: Nginx, number: str) -> requests.Response:
    """A stream that does not end by itself for a while."""
    asked = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    return requests.post(
        f"{nginx.url}/v1/chat/completions",
        json=asked | {"max_tokens": 1000, "ignore_eos": True},
        headers={"X-Request-ID": number},
        stream=True,
        verify=False,
        timeout=60,
    )


@pytest.fixture
def talking(tmp_path: Path) -> Iterator[tuple[Nginx, Server]]:
    """One whose answers take long, a piece of 1 kB every 10 ms."""
    long = {"FAKE_PIECES": "1000", "FAKE_SECONDS_APART": "0.01"}
    with Server(tmp_path / "log", FAKE, **long) as server:
        server.wait()
        (tmp_path / "nginx").mkdir()
        nginx = Nginx(tmp_path / "nginx", server.port)
        try:
            yield nginx, server
        finally:
            nginx.stop()


def test_a_stream_of_tokens_comes_as_they_are_made(talking: tuple[Nginx, Server]):
    """And whoever leaves in the middle of it is seen to leave, through nginx too."""
    nginx, behind = talking
    with chat(nginx, "half-way") as answer:
        assert "X-Accel-Buffering" not in answer.headers  # nginx has taken it for itself
        begun, pieces = b"", answer.iter_content(None)
        while begun.count(b"data: ") < 10:
            begun += next(pieces)
    assert b"[DONE]" not in begun

    def line() -> str:
        lines = behind.log.read_text().splitlines()
        return next((line for line in lines if "[half-way]" in line and " status=" in line), "")

    until(line)
    assert " reason=client_gone" in line() or " finish=cancelled" in line()
    written = re.search(r" tokens=(\d+)", line())
    assert written is None or int(written[1]) < 900


def test_slow_uploads_from_one_address_shut_out_neither_others_nor_probes(nginx: Nginx):
    """64 of them took every place there was, and health checks were refused too."""
    with contextlib.ExitStack() as held:
        for _ in range(16):
            held.enter_context(upload(nginx, 100))
        until(lambda: post(nginx, GOOD).status_code != 200, 10)  # all have been read
        refused = post(nginx, GOOD)
        assert refused.status_code == 503
        assert refused.json() == {"detail": "服务暂时不可用，请稍后重试。"}
        for path in ("/livez", "/readyz", "/health", "/metrics"):
            assert requests.get(nginx.url + path, verify=False, timeout=60).status_code == 200
        with upload(nginx, len(GOOD), "127.0.0.2") as other:
            assert other.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_reload_under_load_loses_no_request(nginx: Nginx, behind: Server):
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            answer = post(nginx, GOOD)
            answers.append((answer.status_code, answer.text))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for count in (10, 30, 50):
        until(lambda count=count: len(answers) >= count)
        nginx.reload()
    until(lambda: len(answers) >= 80)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(answers) == {(200, ANSWER)}
    # They were really other workers: the old ones said that they end.
    assert len(re.findall("gracefully shutting down", nginx.errors.read_text())) >= 6


def test_a_stream_arrives_piece_by_piece_and_a_stopped_service_is_told(tmp_path: Path):
    folder = tmp_path / "nginx"
    folder.mkdir()
    with Server(tmp_path / "log", "tests.e2e.apps:app") as server:
        server.wait("loading")
        nginx = Nginx(folder, server.port)
        try:
            with requests.get(
                nginx.url + "/stream", stream=True, verify=False, timeout=30
            ) as answer:
                pieces = [(time.monotonic(), piece) for piece in answer.iter_content(None)]
            assert b"".join(piece for _, piece in pieces).count(b"data: ") == PIECES
            assert len(pieces) == PIECES
            assert pieces[-1][0] - pieces[0][0] > APART_S  # not all at once, at the end
            server.stop()
            gone = post(nginx, GOOD)
            assert gone.status_code == 503
            assert gone.json() == {"detail": "服务暂时不可用，请稍后重试。"}
            assert gone.headers["Retry-After"] == "5"
        finally:
            nginx.stop()
