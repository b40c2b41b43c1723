"""Servers for all tests that do them no harm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.server import FAKE, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("gunicorn") / "log") as server:
        server.wait("loading")  # it listens meanwhile
        server.wait()
        yield server


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without a model, and with no setting."""
    with Server(tmp_path_factory.mktemp("fake") / "log", FAKE) as server:
        server.wait()
        yield server
