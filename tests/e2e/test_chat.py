"""Chat completions through a real gunicorn, with the demo model."""

from __future__ import annotations

import base64
import json

import requests

from tests.e2e.server import Server
from tests.wire import picture


def ask(server: Server, **fields: object) -> requests.Response:
    url = "data:image/png;base64," + base64.b64encode(picture("circle", "blue")).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what is the blue shape?"},
    ]
    body = {"messages": [{"role": "user", "content": content}], **fields}
    return requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_an_answer_whole_and_streamed(server: Server):
    whole = ask(server, logprobs=True, top_logprobs=1).json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("circle", "stop")
    assert whole["logprobs"]["content"]
    lines = ask(server, stream=True).content.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "circle"


def test_an_error(server: Server):
    response = ask(server, n=2)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
