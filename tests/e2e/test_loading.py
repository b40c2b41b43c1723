"""A model that takes long to load, behind a real gunicorn."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.e2e.server import Server
from tests.test_metrics import parse
from tests.wire import GOOD, post, send


@pytest.mark.parametrize("loading", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_everything_answers_while_it_loads(tmp_path: Path, loading: float):
    """Nothing listened for minutes, and nobody could tell a slow load from one that hangs."""
    began = time.monotonic()
    with Server(tmp_path / "log", "tests.e2e.apps:app", FAKE_LOADING_S=str(loading)) as server:
        assert server.wait("loading")["message"] == "loading the weights: 3 of 9 tensors"
        ages = []
        while True:
            ready = send(server.port, "GET", "/readyz")
            now = json.loads(ready.body)
            samples = parse(send(server.port, "GET", "/metrics").body.decode())
            assert send(server.port, "GET", "/livez").status == 200
            if now["phase"] == "ready":
                break
            assert ready.status == 503
            assert now["phase"] == "loading"
            ages.append(now["phase_seconds"])
            assert ages == sorted(ages)
            assert 0 <= ages[-1] <= time.monotonic() - began
            if samples['qwenvl_phase{phase="loading"}']:
                assert samples['qwenvl_phase{phase="ready"}'] == 0
                assert ages[-1] - 0.1 <= samples["qwenvl_phase_age_seconds"]
            assert post(server.port, GOOD).status in (503, 200)
            time.sleep(0.1)
        assert len(ages) > 3
        assert ages[-1] <= loading + 0.1
        assert samples['qwenvl_phase{phase="ready"}'] == 1
        assert samples["qwenvl_phase_age_seconds"] < loading
        assert samples['qwenvl_request_rejected_total{reason="loading"}'] >= len(ages) - 1
        assert post(server.port, GOOD).status == 200
