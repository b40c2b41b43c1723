"""What a browser is told about asking from another origin."""

from __future__ import annotations

import pytest

from qwenvl_app import create_app
from qwenvl_app.settings import SettingsError, load_settings
from tests.wire import GOOD, MULTIPART, ROUTE

ORIGIN = "https://a.example"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}


def make(backend, **settings):
    return create_app(load_settings({}, **settings), backend).test_client()


def test_any_origin_by_default_and_never_with_credentials(client):
    """The original reflected every origin and allowed credentials with it."""
    headers = {"Origin": ORIGIN, "Cookie": "a=b"}
    answer = client.post(ROUTE, data=GOOD, content_type=MULTIPART, headers=headers)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"X-Request-ID", "Retry-After", "X-Finish-Reason", "X-Completion-Tokens"} <= {*exposed}
    assert {name for name, _ in answer.headers if name.startswith("X-")} <= {*exposed}
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert "Vary" not in answer.headers


@pytest.mark.parametrize("path", [ROUTE, "/livez", "/nope"])
def test_a_preflight(client, path):
    answer = client.options(path, headers=PREFLIGHT)
    assert (answer.status_code, answer.data) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST"
    # What the openai package sends, such as X-Stainless-Lang, was refused.
    assert answer.headers["Access-Control-Allow-Headers"] == "Authorization, *"
    assert answer.headers["Access-Control-Max-Age"] == "7200"
    assert answer.headers["X-Request-ID"]


def test_options_that_is_no_preflight(client):
    for headers in ({}, {"Origin": ORIGIN}, {"Access-Control-Request-Method": "POST"}):
        answer = client.options(ROUTE, headers=headers)
        assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_errors_can_be_read_by_the_page_too(client):
    answer = client.post(ROUTE, headers={"Origin": ORIGIN})
    assert answer.status_code == 422
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


def test_a_list_of_origins(backend):
    client = make(backend, cors_origins="https://b.example, https://a.example")
    answer = client.get("/livez", headers={"Origin": ORIGIN})
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert answer.headers["Vary"] == "Origin"
    assert client.options(ROUTE, headers=PREFLIGHT).headers["Access-Control-Allow-Origin"] == ORIGIN
    for other in ("https://a.example.evil", "http://a.example", "null", "https://A.example"):
        for answer in (
            client.get("/livez", headers={"Origin": other}),
            client.options(ROUTE, headers=PREFLIGHT | {"Origin": other}),
        ):
            assert "Access-Control-Allow-Origin" not in answer.headers
            assert answer.headers["Vary"] == "Origin"
    without = client.get("/livez")
    assert "Access-Control-Allow-Origin" not in without.headers
    assert without.headers["Vary"] == "Origin"


def test_off(backend):
    client = make(backend, cors_origins="")
    assert client.options(ROUTE, headers=PREFLIGHT).status_code == 405
    answer = client.get("/livez", headers={"Origin": ORIGIN})
    assert not [name for name, _ in answer.headers if name.startswith("Access-Control")]


def test_with_keys_a_preflight_needs_none_and_a_refusal_can_be_read(backend):
    client = make(backend, api_keys=["k"])
    assert client.options(ROUTE, headers=PREFLIGHT).status_code == 204
    answer = client.post(ROUTE, headers={"Origin": ORIGIN})
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (401, "*")


@pytest.mark.parametrize("value", ["a.example", "https://a.example/", "https://a.example/x", "**"])
def test_what_is_no_origin_stops_the_start(value):
    with pytest.raises(SettingsError, match="cors_origins"):
        load_settings({}, cors_origins=value)
