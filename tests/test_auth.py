"""API keys: who may ask, and that a key is seen nowhere."""

from __future__ import annotations

import io
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import SecretStr

from qwenvl_app import create_app
from qwenvl_app.settings import SettingsError, load_settings
from qwenvl_app.web.auth import Keys
from tests.waiting import until
from tests.wire import GOOD, MULTIPART, ROUTE

KEYS = "first-key, 密钥,third-key"


@pytest.fixture
def guarded(backend):
    return create_app(load_settings({"QWENVL_API_KEYS": KEYS}), backend).test_client()


def ask(client, authorization: str | None = None):
    headers = {} if authorization is None else {"Authorization": authorization}
    return client.post(ROUTE, data=GOOD, content_type=MULTIPART, headers=headers)


def test_no_keys_no_question(client):
    assert ask(client).status_code == 200
    assert ask(client, "Bearer whatever").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        "Bearer first-key",
        "bearer third-key",
        "Bearer   first-key ",
        "Bearer " + "密钥".encode().decode("latin-1"),
    ],
)
def test_one_of_the_keys_is_enough(guarded, sent):
    assert ask(guarded, sent).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer first-ke",
        "Bearer first-key2",
        "Bearer FIRST-KEY",
        "Bearer first-key,third-key",
        "Bearer first-key, 密钥,third-key".encode().decode("latin-1"),
        "Basic first-key",
        "first-key",
        "Bearer \xff\xfe",
    ],
)
def test_anything_else_is_refused(guarded, backend, sent):
    answer = ask(guarded, sent)
    assert answer.status_code == 401
    assert answer.json == {"detail": "缺少有效的 API 密钥。"}
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["X-Request-ID"]
    assert backend.requests == []


def test_a_refusal_comes_before_the_body_is_read(guarded):
    class Untouchable(io.RawIOBase):
        def readinto(self, _buffer):
            raise AssertionError("the body was read")

    answer = guarded.post(ROUTE, environ_overrides={"wsgi.input": Untouchable()})
    assert answer.status_code == 401


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
def test_health_stays_open(guarded, path):
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/nope", ROUTE, "/livez/../x", "/livez/", "/LIVEZ"])
def test_nothing_else_does(guarded, path):
    assert guarded.get(path).status_code == 401


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", []), (" , ", []), ("a", ["a"]), ("a, b,", ["a", "b"]), (["a", "b,c"], ["a", "b,c"])],
)
def test_keys_in_the_settings(value, expected):
    settings = load_settings({}, api_keys=value)
    assert [key.get_secret_value() for key in settings.api_keys] == expected


@pytest.mark.parametrize("value", [["secret-1", ""], ["secret-1", 7], 12345])
def test_a_key_is_never_shown(value):
    """Not even the wrong one: the message goes to a log."""
    with pytest.raises(SettingsError) as error:
        load_settings({}, api_keys=value)
    assert "api_keys" in str(error.value)
    assert "secret" not in str(error.value)
    assert "12345" not in str(error.value)
    assert "secret" not in repr(load_settings({}, api_keys=["secret-1"]))
    assert "secret" not in load_settings({}, api_keys=["secret-1"]).model_dump_json()


@pytest.mark.parametrize("path", ["/", "", "/static/page.js", "/samples/red-circle.png"])
def test_the_page_stays_open_to_be_given_a_key(guarded, path):
    answer = guarded.get("/", environ_overrides={"PATH_INFO": path})
    answer.close()
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_names_and_whose_key_it_is():
    keys = Keys([SecretStr(key) for key in ("team-a:old", "team-a:new", "plain", "b b:c", "x:")])
    owners = {sent: keys.owner(f"Bearer {sent}") for sent in ("old", "new", "plain", "b b:c", "x:")}
    assert owners == {
        "old": "team-a",
        "new": "team-a",
        "plain": "key-3",
        "b b:c": "key-4",
        "x:": "key-5",
    }
    assert keys.owner("Bearer team-a:old") is None
    assert Keys([]).owner("") == ""


def test_the_log_and_the_metrics_show_the_name_and_no_key(backend, caplog):
    app = create_app(load_settings({"QWENVL_API_KEYS": "team-a:secret"}), backend)
    client = app.test_client()
    with caplog.at_level(logging.INFO, "qwenvl_app.access"):
        assert ask(client, "Bearer secret").status_code == 200
        assert ask(client, "Bearer wrong").status_code == 401
    shown = [record.fields.get("key") for record in caplog.records]
    assert shown == ["team-a", None]
    metrics = client.get("/metrics").text
    assert 'qwenvl_key_requests_total{key="team-a",status="200"} 1.0' in metrics
    assert 'qwenvl_key_generation_tokens_total{key="team-a"} 3.0' in metrics
    assert "secret" not in metrics + caplog.text


def test_one_owner_can_not_take_every_permit(backend):
    keys = {"QWENVL_API_KEYS": "a:one,a:two,b:three", "QWENVL_MAX_REQUESTS_PER_KEY": "2"}
    app = create_app(load_settings(keys), backend)
    backend.go.clear()
    with ThreadPoolExecutor(4) as pool:
        held = [pool.submit(ask, app.test_client(), f"Bearer {key}") for key in ("one", "two")]
        until(lambda: len(backend.requests) == 2, 5)
        refused = ask(app.test_client(), "Bearer two")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
        assert refused.json == {"detail": "此 API 密钥同时进行的请求已达上限，请稍后重试。"}
        held.append(pool.submit(ask, app.test_client(), "Bearer three"))
        until(lambda: len(backend.requests) == 3, 5)
        backend.go.set()
        assert [one.result().status_code for one in held] == [200, 200, 200]
    assert ask(app.test_client(), "Bearer two").status_code == 200
    assert (
        'request_rejected_total{reason="key_limit"} 1.0' in app.test_client().get("/metrics").text
    )


def test_the_backend_is_told_whose_request_it_is(backend):
    """Two keys of one name are one owner; without keys everybody is."""
    hello = {"messages": [{"role": "user", "content": "hello"}]}
    keyed = create_app(load_settings({"QWENVL_API_KEYS": "a:one,a:two,b:three,four"}), backend)
    client = keyed.test_client()
    for key in ("one", "two", "three", "four"):
        assert ask(client, f"Bearer {key}").status_code == 200
        headers = {"Authorization": f"Bearer {key}"}
        assert client.post("/v1/chat/completions", json=hello, headers=headers).status_code == 200
    assert (
        ask(create_app(load_settings({}), backend).test_client(), "Bearer one").status_code == 200
    )
    owners = [asked.owner for asked in backend.requests]
    assert owners == ["a", "a", "a", "a", "b", "b", "key-4", "key-4", ""]
