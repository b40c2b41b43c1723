"""Pictures by https address: what is fetched, from whom, and what it may cost."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.test import EnvironBuilder

from qwenvl_app import create_app
from qwenvl_app.generation import Phase, Status
from qwenvl_app.settings import SettingsError, load_settings
from qwenvl_app.testing import ScriptedBackend
from qwenvl_app.web.chat import image_urls, transfer
from tests import image_host
from tests.image_host import NAME, FalseDNS, ImageHost
from tests.waiting import until

ROUTE = "/v1/chat/completions"
ROOT = Path(__file__).resolve().parent.parent
REAL_CHECK = transfer.is_public
Make = Callable[..., FlaskClient]

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def ask(*urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Of the host that is trusted, and of one that is not."""
    folder = tmp_path_factory.mktemp("tls")
    return {name: image_host.certificate(folder, name) for name in (NAME, "false.example")}


@pytest.fixture
def host(certificates) -> Iterator[ImageHost]:
    host = ImageHost(certificates[NAME])
    yield host
    host.close()


@pytest.fixture
def private() -> Iterator[ImageHost]:
    """What nobody may reach."""
    host = ImageHost()
    yield host
    host.close()
    assert host.accepted == 0


@pytest.fixture
def dns(monkeypatch) -> FalseDNS:
    dns = FalseDNS(img_example=[["127.0.0.1"]])
    monkeypatch.setattr(socket, "getaddrinfo", dns)
    return dns


@pytest.fixture
def reachable(monkeypatch, certificates, dns) -> None:
    """This machine counts as a public one, and its host's certificate is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates[NAME][0]))
    monkeypatch.setattr(
        transfer, "is_public", lambda address: address == "127.0.0.1" or REAL_CHECK(address)
    )


@pytest.fixture
def make(backend: ScriptedBackend) -> Iterator[Make]:
    """Applications that fetch from the given hosts."""
    apps = []

    def make(*hosts: str, **overrides: object) -> FlaskClient:
        app = create_app(load_settings({}, image_hosts=hosts, **overrides), backend)
        apps.append(app)
        return app.test_client()

    yield make
    for app in apps:
        app.extensions["qwenvl"]["disconnects"].close()
        admission = app.extensions["qwenvl"]["admission"]
        assert admission.free == admission.permits


@pytest.fixture
def client(make: Make, host: ImageHost, reachable) -> FlaskClient:
    return make(f"{NAME}:{host.port}", max_upload_mb=1)


@pytest.fixture
def url(host: ImageHost) -> str:
    return f"https://{NAME}:{host.port}"


def refused(response, status: int = 400) -> str:
    """The message; nothing of what the host said, and nothing of where it is, is in an answer."""
    assert response.status_code == status, response.text
    error = response.json["error"]
    assert error["type"] == "invalid_request_error"
    for leak in ("secret", NAME, "127.0.0.1", "token", "302", "404"):
        assert leak not in response.text
    if status == 400:
        assert error["param"].startswith("messages")
    return error["message"]


@pytest.mark.parametrize("path", image_host.WELL)
def test_a_picture(client, backend: ScriptedBackend, host: ImageHost, url: str, dns, path: str):
    assert client.post(ROUTE, json=ask(f"{url}{path}?token=1&b=%20#top")).status_code == 200
    assert [picture.size for picture in backend.requests[0].images] == [(64, 64)]
    first, *lines = host.heads[0].split("\r\n")
    assert first == f"GET {path}?token=1&b=%20 HTTP/1.1"
    assert f"Host: {NAME}:{host.port}" in lines
    assert "Accept-Encoding: identity" in lines
    assert dns.asked == [NAME]


def test_beside_data_urls_and_more_than_once(client, backend, host: ImageHost, url: str):
    small = io.BytesIO()
    Image.new("RGB", (32, 48)).save(small, "PNG")
    data = "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()
    asked = ask(data, f"{url}/a.png", f"{url.replace('https', 'HTTPS')}/a.png", f"{url}/a.png")
    assert client.post(ROUTE, json=asked).status_code == 200
    assert [picture.size for picture in backend.requests[0].images] == [(32, 48), *[(64, 64)] * 3]
    assert host.accepted == 2, "the same address was asked twice"


def test_a_host_without_a_port_is_that_of_https(make: Make, reachable, host: ImageHost, url):
    assert "only data:" in refused(make(NAME).post(ROUTE, json=ask(f"{url}/a.png")))
    assert host.accepted == 0
    assert image_urls.Fetcher(load_settings({}, image_hosts=f"{NAME}, b.example:81"))._hosts == {
        (NAME, 443),
        ("b.example", 81),
    }


def test_nothing_is_fetched_unless_a_host_is_named(make: Make, reachable, host, url, dns):
    assert "only data:" in refused(make().post(ROUTE, json=ask(f"{url}/a.png")))
    assert (host.accepted, dns.asked) == (0, [])


SPELLINGS = [
    "http://NAME:PORT/a.png",
    "//NAME:PORT/a.png",
    "https:NAME:PORT/a.png",
    "https:/NAME:PORT/a.png",
    "https:///NAME:PORT/a.png",
    "https://",
    "https://:PORT/",
    "https://NAME:PORT@127.0.0.1:PORT/a.png",
    "https://user@NAME:PORT/a.png",
    "https://user:password@NAME:PORT/",
    "https://127.0.0.1:PORT#@NAME:PORT/",
    "https://127.0.0.1:PORT?@NAME:PORT/",
    "https://127.0.0.1:PORT/@NAME:PORT/",
    "https://127.0.0.1:PORT\\@NAME:PORT/",
    "https://NAME:PORT\\@127.0.0.1:PORT/",
    "https://NAME.:PORT/a.png",
    "https://.NAME:PORT/",
    "https://NAME.127.0.0.1:PORT/",
    "https://a.NAME:PORT/",
    "https://NAME/a.png",
    "https://NAME:/a.png",
    "https://NAME:0PORT0/",
    "https://NAME:+PORT/",
    "https://NAME:PORT:PORT/",
    "https://NAME: PORT/",
    "https://127.0.0.1:PORT/",
    "https://127.1:PORT/",
    "https://2130706433:PORT/",
    "https://017700000001:PORT/",
    "https://0x7f000001:PORT/",
    "https://0x7f.0.0.1:PORT/",
    "https://0:PORT/",
    "https://[::1]:PORT/",
    "https://[::]:PORT/",
    "https://[::ffff:127.0.0.1]:PORT/",
    "https://[64:ff9b::7f00:1]:PORT/",
    "https://[::1%25lo]:PORT/",
    "https://169.254.169.254/latest/meta-data/",
    "https://localhost:PORT/",
    "https://１２７.０.０.１:PORT/",
    "https://127。0。0。1:PORT/",
    "https://img。example:PORT/",
    "https://ⓘmg.example:PORT/",
    "https://img.exampſe:PORT/",
    "https://%69mg.example:PORT/",
    "https://127.0.0.1%00.NAME:PORT/",
    "https://127.0.0.1%23.NAME:PORT/",
    "https://NAME\t:PORT/",
    "ht\ntps://NAME:PORT/a.png",
    "https://NA\nME:PORT/",
    "https://NAME:PORT/a b",
    "https://NAME:PORT/a\r\nHost: 127.0.0.1",
    "https://NAME:PORT/a\x00",
    "https://NAME:PORT/图.png",
    "https://NAME:PORT/ſ.png",
    " https://NAME:PORT/a.png",
    "https://NAME:PORT/a.png\n",
    "https://NAME:PORT/" + "a" * 9000,
    "file:///etc/passwd",
    "file://NAME/etc/passwd",
    "ftp://NAME:PORT/a.png",
    "gopher://127.0.0.1:PORT/_GET",
    "data:https://NAME:PORT/a.png",
    "data:image/png;base64,https://NAME:PORT/a.png",
    "jar:https://NAME:PORT/a.png",
    "url:https://NAME:PORT/a.png",
    "javascript:fetch('https://NAME:PORT')",
    "unix:/run/x.sock:https://NAME:PORT/",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_address_that_could_mean_another_host(
    make: Make, backend, reachable, private: ImageHost, dns: FalseDNS, spelling: str
):
    """Refused before a name is looked up, though here the private host would count as public."""
    client = make(f"{NAME}:{private.port}")
    text = spelling.replace("NAME", NAME).replace("PORT", str(private.port))
    refused(client.post(ROUTE, json=ask(text)))
    assert (dns.asked, backend.requests) == ([], [])


def test_all_addresses_are_judged_before_one_is_fetched(client, host: ImageHost, url: str):
    message = refused(client.post(ROUTE, json=ask(f"{url}/a.png", "https://other.example/a.png")))
    assert message.startswith("messages.0.content.1.image_url: only")
    refused(client.post(ROUTE, json=ask(*[f"{url}/a.png?{number}" for number in range(17)])))
    assert host.accepted == 0


PRIVATE = [
    "127.0.0.1",
    "127.1.2.3",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "100.100.100.200",
    "192.0.0.192",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:a9fe:a9fe",
    "::127.0.0.1",
    "fe80::1",
    "fe80::1%lo",
    "fc00::1",
    "fd00:ec2::254",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "2001:db8::1",
    "2002:7f00:1::1",
    "2002:808:808::1",
    "2001:0:808:808::1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "5f00::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str):
    assert not transfer.is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "223.5.5.5", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_addresses_that_are_public(address: str):
    assert transfer.is_public(address)


@pytest.mark.parametrize(
    "answers",
    [
        [["127.0.0.1"]],
        [["8.8.8.8", "127.0.0.1"]],
        [["127.0.0.1", "8.8.8.8"]],
        [["::ffff:127.0.0.1"]],
        [["169.254.169.254"]],
        [["127.0.0.1"], ["8.8.8.8"]],
    ],
    ids=str,
)
def test_a_name_that_leads_to_a_private_address(
    make: Make, private: ImageHost, dns: FalseDNS, answers: list[list[str]]
):
    """One private address among several is enough: no connection, not to the others either."""
    dns.answers[NAME] = answers
    client = make(f"{NAME}:{private.port}")
    message = refused(client.post(ROUTE, json=ask(f"https://{NAME}:{private.port}/a.png")))
    assert message.endswith("the picture cannot be fetched from its host.")
    assert dns.asked == [NAME]


def test_a_name_whose_answer_changes(client, host: ImageHost, url: str, dns: FalseDNS):
    """What was checked is what is connected to: there is no second look-up."""
    dns.answers[NAME] = [["127.0.0.1"], ["127.0.0.2"]]
    assert client.post(ROUTE, json=ask(f"{url}/a.png")).status_code == 200
    assert (dns.asked, host.accepted) == ([NAME], 1)


def test_the_next_address_where_one_does_not_answer(client, url: str, dns: FalseDNS, monkeypatch):
    monkeypatch.setattr(transfer, "is_public", lambda address: True)
    dns.answers[NAME] = [["127.0.0.2", "127.0.0.1"]]
    assert client.post(ROUTE, json=ask(f"{url}/a.png")).status_code == 200


def test_nothing_is_fetched_for_a_model_that_is_loading(client, backend, host, url: str):
    backend.phase = Status(Phase.LOADING)
    response = client.post(ROUTE, json=ask(f"{url}/a.png"))
    assert (response.status_code, response.json["error"]["code"]) == (503, "loading")
    assert host.accepted == 0


def test_a_name_that_is_unknown(client, url: str, dns: FalseDNS):
    del dns.answers[NAME]
    assert "cannot be fetched" in refused(client.post(ROUTE, json=ask(f"{url}/a.png")))


def test_nobody_listens(make: Make, reachable):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    client = make(f"{NAME}:{port}")
    message = refused(client.post(ROUTE, json=ask(f"https://{NAME}:{port}/")))
    assert "cannot be fetched" in message


@pytest.mark.parametrize("path", image_host.NOT_FETCHED)
def test_answers_that_are_none(client, backend, host: ImageHost, url: str, caplog, path: str):
    caplog.set_level(logging.DEBUG)
    message = refused(client.post(ROUTE, json=ask(f"{url}{path}?token=1")))
    assert message == "messages.0.content.0.image_url: the picture cannot be fetched from its host."
    assert (host.accepted, backend.requests) == (1, [])
    assert f"no picture from {NAME}" in caplog.text
    for leak in ("token", path, "secret", "127.0.0.1:"):
        assert leak not in caplog.text


@pytest.mark.parametrize("path", image_host.NO_PICTURE)
def test_bodies_that_are_no_picture(client, url: str, path: str):
    assert "damaged" in refused(client.post(ROUTE, json=ask(url + path)))


@pytest.mark.parametrize("path", image_host.TOO_LARGE)
def test_bodies_that_are_too_large(client, url: str, path: str):
    message = refused(client.post(ROUTE, json=ask(url + path)), 413)
    assert message.endswith("over 1 MB together.")


def test_pictures_and_body_have_one_limit(client, monkeypatch, host: ImageHost, url: str):
    noise = io.BytesIO()
    Image.frombytes("L", (600, 1000), os.urandom(600_000)).save(noise, "PNG")
    monkeypatch.setitem(image_host.ANSWERS, "/noise", image_host.whole(noise.getvalue()))
    assert client.post(ROUTE, json=ask(f"{url}/noise")).status_code == 200
    message = refused(client.post(ROUTE, json=ask(f"{url}/noise?1", f"{url}/noise?2")), 413)
    assert message.startswith("messages.0.content.1.image_url")
    asked = json.dumps(ask(f"{url}/noise")) + " " * 500_000
    refused(client.post(ROUTE, data=asked, content_type="application/json"), 413)
    chunked = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    body = EnvironBuilder(
        path=ROUTE,
        method="POST",
        input_stream=io.BytesIO(asked.encode()),
        content_type="application/json",
        environ_overrides=chunked,
    )
    refused(client.open(body), 413)  # its length is told by nobody


@pytest.mark.parametrize("path", image_host.TOO_SLOW)
def test_a_host_that_is_slow(client, monkeypatch, url: str, path: str):
    """The time is for all: each byte of a trickle is in time."""
    monkeypatch.setattr(image_urls, "_TOTAL_S", 0.2)
    assert "in time" in refused(client.post(ROUTE, json=ask(url + path)))
    # While the host goes on: its connection has been cut.
    until(lambda: "transfer" not in {thread.name for thread in threading.enumerate()}, 5)


def test_a_handshake_that_does_not_end(make: Make, monkeypatch, reachable):
    monkeypatch.setattr(image_urls, "_TOTAL_S", 0.2)
    mute = ImageHost()
    client = make(f"{NAME}:{mute.port}")
    assert "in time" in refused(client.post(ROUTE, json=ask(f"https://{NAME}:{mute.port}/")))
    mute.close()


def test_a_look_up_that_hangs(client, monkeypatch, url: str):
    """Nothing interrupts it: it is left alone."""
    released = threading.Event()

    def hang(*args: object, **kwargs: object) -> None:
        released.wait(20)
        raise socket.gaierror

    monkeypatch.setattr(image_urls, "_TOTAL_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert "in time" in refused(client.post(ROUTE, json=ask(f"{url}/a.png")))
    released.set()


def test_the_time_of_the_request_itself(make: Make, reachable, host: ImageHost, url: str):
    client = make(f"{NAME}:{host.port}", request_timeout_s=0.3)
    response = client.post(ROUTE, json=ask(f"{url}/a-trickle"))
    assert (response.status_code, response.json["error"]["code"]) == (504, "deadline")


def test_certificates(make: Make, reachable, certificates, dns: FalseDNS, host: ImageHost):
    """Of an unknown authority; of a known one for another name."""
    false = ImageHost(certificates["false.example"])
    dns.answers |= {"false.example": [["127.0.0.1"]], "other.example": [["127.0.0.1"]]}
    for name, port in (("false.example", false.port), ("other.example", host.port)):
        client = make(f"{name}:{port}")
        message = refused(client.post(ROUTE, json=ask(f"https://{name}:{port}/a.png")))
        assert "cannot be fetched" in message
    assert (false.accepted, false.heads, host.accepted, host.heads) == (1, [], 1, [])
    false.close()


def test_proxies_of_the_environment_are_not_asked(client, monkeypatch, private, url: str):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{private.port}")
    assert client.post(ROUTE, json=ask(f"{url}/a.png")).status_code == 200


def test_a_client_that_leaves(client, backend, host: ImageHost, url: str):
    """Its transfer ends at once, and it held no permit."""
    ours, theirs = socket.socketpair()
    statuses = []

    def post() -> None:
        environ = {"gunicorn.socket": ours}
        asked = ask(f"{url}/a-trickle")
        statuses.append(client.post(ROUTE, json=asked, environ_overrides=environ).status_code)

    thread = threading.Thread(target=post)
    thread.start()
    until(lambda: host.heads)
    theirs.close()
    thread.join(5)  # of ten seconds that a host has
    ours.close()
    assert (statuses, backend.requests) == ([499], [])


def test_a_slow_host_holds_no_permit(make: Make, backend, reachable, host: ImageHost, url: str):
    """Who fetches is bounded by itself, and stops nobody who does not."""
    client = make(f"{NAME}:{host.port}", max_concurrency=1, max_waiting=1)
    slow = [
        threading.Thread(target=client.post, args=(ROUTE,), kwargs={"json": ask(f"{url}/silence")})
        for _ in range(2)
    ]
    for thread in slow:
        thread.start()
    until(lambda: len(host.heads) == 2)
    third = client.post(ROUTE, json=ask(f"{url}/a.png"))
    assert (third.status_code, third.json["error"]["code"]) == (503, "queue_full")
    assert third.headers["Retry-After"]
    assert host.accepted == 2
    plain = {"messages": [{"role": "user", "content": "hello"}]}
    assert client.post(ROUTE, json=plain).status_code == 200
    host.closing.set()  # and so it ends what it began
    for thread in slow:
        thread.join(20)
    assert len(backend.requests) == 1


def test_who_fetches_counts_for_its_key(make: Make, reachable, host: ImageHost, url: str):
    """One owner could fetch in all places at once, and so keep everybody else from fetching."""
    client = make(f"{NAME}:{host.port}", api_keys=("a:one", "b:two"), max_requests_per_key=1)
    headers = {"Authorization": "Bearer one"}
    slow = threading.Thread(
        target=client.post,
        args=(ROUTE,),
        kwargs={"json": ask(f"{url}/silence"), "headers": headers},
    )
    slow.start()
    until(lambda: len(host.heads) == 1)
    second = client.post(ROUTE, json=ask(f"{url}/a.png"), headers=headers)
    assert (second.status_code, second.json["error"]["code"]) == (429, "key_limit")
    assert host.accepted == 1
    host.closing.set()
    slow.join(20)
    plain = {"messages": [{"role": "user", "content": "hello"}]}
    assert client.post(ROUTE, json=plain, headers=headers).status_code == 200


def test_who_fetches_has_threads_of_their_own():
    code = "import runpy; print(runpy.run_path('config/gunicorn.conf.py')['threads'])"
    counts = [
        int(
            subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | {"QWENVL_IMAGE_HOSTS": hosts},
                cwd=ROOT,
                check=True,
                capture_output=True,
                timeout=60,
            ).stdout
        )
        for hosts in ("", NAME)
    ]
    fetcher = image_urls.Fetcher(load_settings({}))
    assert counts[1] - counts[0] == fetcher.admission.permits == 20


@pytest.mark.parametrize(
    "value",
    [
        "https://a.example",
        "a.example/",
        "*.example.com",
        "localhost",
        "127.0.0.1",
        "127.0.0.1:443",
        "::1",
        "a.example:",
        "a.example:0",
        "a.example:65536",
        "a.example:x",
        "a.example.",
        "图片.example",
        "a_b.example",
        "-a.example",
        "a.b@c.example",
        "a" * 64 + ".example",
        "a." * 127 + "example",
    ],
)
def test_names_that_are_no_host(value: str):
    with pytest.raises(SettingsError, match="'image_hosts'"):
        load_settings({"QWENVL_IMAGE_HOSTS": value})


def test_names_of_hosts():
    hosts = load_settings({"QWENVL_IMAGE_HOSTS": "A.Example, xn--fsq.example:8443"}).image_hosts
    assert hosts == ("a.example", "xn--fsq.example:8443")
