"""Other servers as the backend: what they do wrong, and what a client sees of it."""

from __future__ import annotations

import json
import logging
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flask import Flask

from qwenvl_app.backends.remote.backend import RemoteBackend
from qwenvl_app.backends.remote.request import body_of
from qwenvl_app.generation import GenerationRequest, Phase, question
from qwenvl_app.images.decode import decode_image
from qwenvl_app.service.metrics import REASONS
from qwenvl_app.testing import ScriptedBackend
from tests.broken_upstream import SECRET, WAYS, BrokenUpstream, once
from tests.image_host import certificate
from tests.remote import fronted, served
from tests.waiting import until
from tests.wire import END, GOOD, MULTIPART, PROMPT, ROUTE, part, picture

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
HEAVY = ("torch", "transformers", "modelscope", "modelscope_hub", "accelerate", "llguidance")
BLOCKED = (*HEAVY, "psutil", "requests", "tqdm", "huggingface_hub", "httpx2")

Front = tuple[Flask, RemoteBackend, BrokenUpstream]


@contextmanager
def behind_broken(seconds: str) -> Iterator[Front]:
    """One upstream, and so long for an answer."""
    with (
        BrokenUpstream() as upstream,
        fronted(upstream.url, QWENVL_REQUEST_TIMEOUT_S=seconds) as (app, backend),
    ):
        yield app, backend, upstream


@pytest.fixture(scope="module")
def broken() -> Iterator[Front]:
    with behind_broken("20") as front:
        yield front


@pytest.fixture(scope="module")
def broken_in_haste() -> Iterator[Front]:
    with behind_broken("0.5") as front:
        yield front


def ask(app: Flask, body: bytes = GOOD):  # type: ignore[no-untyped-def]
    return app.test_client().post(ROUTE, data=body, content_type=MULTIPART)


def test_there_are_enough_ways():
    assert len(WAYS) >= 50
    assert {way.reason for way in WAYS.values()} <= set(REASONS)


@pytest.mark.parametrize("name", WAYS)
def test_each_way_to_fail_has_its_answer(broken: Front, broken_in_haste: Front, name: str, caplog):
    way = WAYS[name]
    app, backend, upstream = broken_in_haste if way.status == 504 else broken
    upstream.way = way.act
    counted = f'reason="{way.reason}"}} '

    def count() -> float:
        lines = app.test_client().get("/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if counted in line)

    before = count()
    answer = ask(app)
    assert (answer.status_code, answer.headers.get("Retry-After")) == (way.status, way.retry_after)
    assert count() == before + 1
    assert SECRET not in answer.text
    assert list(answer.json) == ["detail"]
    assert SECRET not in caplog.text
    until(lambda: backend.upstreams.all[0].running == 0)


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.status != 504])
def test_in_a_stream_too(broken: Front, name: str):
    """Before the first piece an error has a status of its own, after it it is an event."""
    app, _, upstream = broken
    way = WAYS[name]
    upstream.way = way.act
    answer = app.test_client().post(CHAT, json=HELLO | {"stream": True})
    if name.startswith("half a stream"):
        assert answer.status_code == 200
        error = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))["error"]
    else:
        assert (answer.status_code, answer.headers.get("Retry-After")) == (
            way.status,
            way.retry_after,
        )
        error = answer.json["error"]
        assert SECRET not in answer.text
    assert error["code"] == way.reason
    assert error["message"].isascii()


def favourite(backend: RemoteBackend, url: str) -> bytes:
    """A form whose picture has the upstream at ``url`` as its favourite."""
    for size in range(40, 80):
        file = picture(size=(size, 64))
        image = decode_image(file, max_megapixels=1)
        asked = GenerationRequest(question(image, "?"), "id", originals=(file,))
        affinity = body_of(asked, "demo", 1).affinity
        assert affinity
        if max(backend.upstreams.all, key=lambda each: each.weight(affinity)).name in url:
            return part("image", file, "a.png", "image/png") + PROMPT + END
    raise AssertionError("the hash has no favourites")


def test_another_upstream_answers_where_nothing_was_generated():
    with (
        BrokenUpstream() as upstream,
        served(ScriptedBackend("from the other")) as good,
        fronted(upstream.url, good) as (app, backend),
    ):
        body = favourite(backend, upstream.url)
        for name, way in WAYS.items():
            if way.status == 504:
                continue
            backend.upstreams.all[0].succeeded()
            backend.upstreams.all[0]._busy_until = 0.0
            backend.budget._left = 10.0
            upstream.way, asked = way.act, upstream.asked
            answer = ask(app, body)
            assert upstream.asked > asked, name
            assert answer.status_code == (200 if way.elsewhere else way.status), name


def test_nothing_is_sent_again_once_the_budget_is_spent():
    """Where everything fails, asking more often makes it worse."""
    with (
        BrokenUpstream(WAYS["500"].act) as one,
        BrokenUpstream(WAYS["500"].act) as two,
        fronted(one.url, two.url) as (app, _),
    ):
        for _ in range(30):
            assert ask(app).status_code == 500
        assert one.asked + two.asked <= 30 + 10 + 30 * 0.2


def test_a_kept_connection_that_ends_as_it_is_used_is_no_fault_of_the_server(caplog):
    """As llama-server ends them now and then; more often than requests may be sent again."""
    with BrokenUpstream(once) as upstream, fronted(upstream.url) as (app, backend):
        left = backend.budget._left
        for _ in range(40):
            assert ask(app).status_code == 200
        assert upstream.asked == 40
        assert backend.budget._left == left
    # That it is well may be told once, as its first probe ends.
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_refused_and_back_again():
    with BrokenUpstream() as upstream, fronted(upstream.url) as (app, backend):
        upstream.stop()
        answer = ask(app)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        until(lambda: backend.status().phase is Phase.LOADING)
        assert ask(app).status_code == 503
        assert app.test_client().get("/readyz").status_code == 503


def test_health_is_followed():
    with (
        BrokenUpstream(WAYS["500"].act) as upstream,
        served(ScriptedBackend("well")) as good,
        fronted(upstream.url, good) as (app, backend),
    ):
        body = favourite(backend, upstream.url)
        upstream.well = "503 Service Unavailable"
        until(lambda: backend.upstreams.all[0].problem)
        asked = upstream.asked
        assert ask(app, body).status_code == 200
        assert upstream.asked == asked
        assert "1 of 2" in backend.status().message
        upstream.well = "200 OK"
        until(lambda: backend.upstreams.all[0].problem is None)
        ask(app, body)
        assert upstream.asked > asked


def test_a_model_that_is_not_there_is_the_operators_to_mend():
    with (
        BrokenUpstream() as upstream,
        fronted(upstream.url, wait=False, QWENVL_REMOTE_MODEL="other") as (app, backend),
    ):
        until(lambda: backend.status().phase is Phase.FAILED)
        told = app.test_client().get("/readyz").json
        assert "QWENVL_REMOTE_MODEL" in told["message"]
        assert "127.0.0.1" not in told["message"]  # anybody may ask
        assert ask(app).status_code == 500


def test_those_who_wait_at_one_that_hangs_are_sent_to_another():
    """It accepted and says nothing; its probes fail, and nobody waits for the deadline."""
    with (
        BrokenUpstream(WAYS["never a byte"].act) as upstream,
        served(ScriptedBackend("from the other")) as good,
        fronted(upstream.url, good) as (app, backend),
    ):
        body = favourite(backend, upstream.url)

        def falls_ill() -> None:
            until(lambda: upstream.asked)
            upstream.well = "500 Internal Server Error"

        thread = threading.Thread(target=falls_ill)
        thread.start()
        answer = ask(app, body)
        thread.join()
        assert (answer.status_code, answer.json["result"]) == (200, "from the other")


def test_one_picture_one_upstream():
    """As long as it is not overloaded: its cache knows the picture."""
    backends = [ScriptedBackend("x") for _ in range(3)]
    with (
        served(backends[0]) as one,
        served(backends[1]) as two,
        served(backends[2]) as three,
        fronted(one, two, three) as (app, _),
    ):
        for size in (40, 50, 60):
            file = part("image", picture(size=(size, 64)), "a.png", "image/png")
            before = [len(backend.requests) for backend in backends]
            for _ in range(4):
                assert ask(app, file + PROMPT + END).status_code == 200
            asked = [len(each.requests) - n for each, n in zip(backends, before, strict=True)]
            assert sorted(asked) == [0, 0, 4]


def test_a_favourite_that_is_overloaded_is_no_favourite():
    """A quarter more than the mean, and the least busy one is asked."""
    with (
        served(ScriptedBackend("x")) as one,
        served(ScriptedBackend("x")) as two,
        fronted(one, two) as (_, backend),
    ):
        upstreams = backend.upstreams
        favourite = upstreams.choose(b"picture", ())
        other = next(each for each in upstreams.all if each is not favourite)
        assert favourite
        favourite.running = 4  # among so few, that is no overload
        assert upstreams.choose(b"picture", ()) is favourite
        favourite.running = 5
        assert upstreams.choose(b"picture", ()) is other
        favourite.running = 20
        assert upstreams.choose(b"picture", ()) is other
        assert upstreams.choose(None, ()) is other
        other.running = 20
        assert upstreams.choose(b"picture", ()) is favourite
        assert upstreams.choose(b"picture", [favourite]) is other
        assert upstreams.choose(b"picture", [favourite, other]) is None


def test_the_key_is_sent_and_never_told(caplog):
    with served(ScriptedBackend("let in"), QWENVL_API_KEYS="sekret-key") as url:
        with fronted(url, QWENVL_REMOTE_API_KEY="sekret-key") as (app, _):
            assert ask(app).json["result"] == "let in"
        with fronted(url, wait=False, QWENVL_REMOTE_API_KEY="sekret-other") as (app, backend):
            until(lambda: backend.status().phase is Phase.FAILED)
            told = app.test_client().get("/readyz").text + ask(app).text
    assert "401" in told
    assert "sekret" not in told + caplog.text


def test_a_certificate_that_nobody_knows_is_not_believed(tmp_path: Path, monkeypatch):
    """And one that the operator names is."""
    cert, key = certificate(tmp_path, "localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    with served(ScriptedBackend("in secret"), tls=context) as url:
        address = url.replace("http://127.0.0.1", "https://localhost")
        with fronted(address, wait=False) as (app, backend):
            until(lambda: "SSLError" in backend.status().message)
            assert ask(app).status_code == 503
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        with fronted(address) as (app, _):
            assert ask(app).json["result"] == "in secret"


def test_the_environments_proxies_are_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with served(ScriptedBackend("straight")) as url, fronted(url) as (app, _):
        assert ask(app).json["result"] == "straight"


def test_closing_ends_what_is_under_way():
    """At once: an upstream that says nothing holds nobody."""
    with BrokenUpstream(WAYS["never a byte"].act) as upstream, fronted(upstream.url) as (app, back):
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(ask(app).status_code))
        thread.start()
        until(lambda: upstream.asked)
        back.close()
        thread.join()
        assert answers == [503]
        assert ask(app).status_code == 503


def test_the_service_starts_without_torch():
    """Nor what comes with it; an answer is given, too."""
    with served(ScriptedBackend("no torch")) as url:
        code = f"""
import sys, time
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from qwenvl_app import create_app
from qwenvl_app.server import worker
app = create_app()
client = app.test_client()
until = time.monotonic() + 20
while client.get("/readyz").status_code != 200 and time.monotonic() < until:
    time.sleep(0.01)
body = {{"messages": [{{"role": "user", "content": "hello"}}]}}
print(client.post("/v1/chat/completions", json=body).json["choices"][0]["message"]["content"])
app.extensions["qwenvl"]["close"]()
assert not set(sys.modules) & set({HEAVY!r}) and "qwenvl_app.prompts" not in sys.modules
"""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("QWENVL_")} | {
            "QWENVL_BACKEND": "remote",
            "QWENVL_REMOTE_URL": url,
            "QWENVL_REMOTE_MODEL": "demo",
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == "no torch\n"


def test_the_doctor_asks_the_upstreams():
    with BrokenUpstream() as ill, served(ScriptedBackend("x")) as url:
        ill.well = "503 Service Unavailable"
        environ = {k: v for k, v in os.environ.items() if not k.startswith("QWENVL_")} | {
            "QWENVL_BACKEND": "remote",
            "QWENVL_REMOTE_URL": f"{url},{ill.url}",
            "QWENVL_REMOTE_MODEL": "demo",
        }
        done = subprocess.run(
            [sys.executable, "-m", "flask", "--app", "wsgi", "doctor"],
            check=True,
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
    names = [each.removeprefix("http://") for each in (url, ill.url)]
    assert done.stdout.splitlines() == [
        f"ok    upstream {names[0]}: well",
        f"FAIL  upstream {names[1]}: its /health says 503",
    ]


def test_the_requirements_are_some_of_those_of_the_whole():
    whole, remote = (
        [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        for name in ("requirements.txt", "requirements-remote.txt")
    )
    assert set(remote) < set(whole)
    assert not [line for line in remote if line.split("=")[0] in HEAVY]
