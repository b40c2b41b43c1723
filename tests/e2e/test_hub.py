"""MODEL is a hub's id, and nothing else is different: a real gunicorn, a stand-in hub."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.e2e.server import Server
from tests.hub import NAME, SHARDS, Hub, publish
from tests.waiting import until
from tests.wire import GOOD, post, send


def serve(hub: Hub, directory: Path, log: str, model: str) -> Server:
    (directory / log).mkdir()
    return Server(
        directory / log / "log",
        QWENVL_MODEL=model,
        MODELSCOPE_ENDPOINT=hub.url,
        MODELSCOPE_CACHE=str(directory / "cache"),
        HF_ENDPOINT=hub.url,
        HF_HUB_CACHE=str(directory / "cache"),
        HOME=str(directory),
    )


def message(server: Server) -> str:
    return str(server.wait("loading")["message"])


@pytest.mark.slow
@pytest.mark.parametrize(("prefix", "branch"), [("", "master"), ("hf:", "main")])
def test_from_an_id_to_an_answer(tmp_path: Path, prefix: str, branch: str):
    """Stopped in the middle, started again, and at last without the hub."""
    model = prefix + NAME
    hub = Hub(rate=1e6, models={(NAME, branch): publish(tmp_path / "published")})
    try:
        with serve(hub, tmp_path, "first", model) as server:
            under_way = re.compile(rf"downloading {NAME}: [1-9]\.\d MB of 15.6 MB")
            until(lambda: under_way.fullmatch(message(server)))
            assert send(server.port, "GET", "/livez").status == 200
            assert post(server.port, GOOD).status == 503
            began = time.monotonic()
            assert server.stop() == 0
        assert time.monotonic() - began < 15, "it waited for the download"
        got = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors*"))
        assert got > 1_000_000

        hub.rate, hub.requests, hub.sent = None, [], {}
        with serve(hub, tmp_path, "second", model) as server:
            server.wait()
            answer = post(server.port, GOOD)
            assert (answer.status, "success" in answer.body.decode()) == (200, True)
        assert any(start > 0 for file in SHARDS for start in hub.asked(file))
        size = sum((tmp_path / "published" / file).stat().st_size for file in SHARDS)
        assert sum(hub.sent[file] for file in SHARDS if file in hub.sent) <= size - got + 100_000
        assert f"taking revision {branch} of {NAME}" in server.log.read_text()
        assert "\r" not in server.log.read_text()
    finally:
        hub.close()

    with serve(hub, tmp_path, "third", model) as server:
        server.wait()
        assert post(server.port, GOOD).body == answer.body
    assert "downloading" not in server.log.read_text()
