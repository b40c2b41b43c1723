"""What systemd would hear of a real gunicorn."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tests.e2e.server import Server


class Systemd:
    """The end of NOTIFY_SOCKET where systemd would listen."""

    def __init__(self, folder: Path):
        self.path = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self.told: list[str] = []

    def until(self, message: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while message not in self.told:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            self.told += self._socket.recv(4096).decode().split("\n")

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_ready_is_told_by_the_worker_once_the_model_answers(tmp_path: Path):
    """gunicorn's own READY came from the master, seconds before anything was loaded."""
    with (
        Systemd(tmp_path) as systemd,
        Server(tmp_path / "log", "tests.e2e.apps:app", NOTIFY_SOCKET=systemd.path) as server,
    ):
        systemd.until("WATCHDOG=1")
        assert "READY=1" not in systemd.told
        assert systemd.told[0].startswith("STATUS=loading: ")
        systemd.until("READY=1")
        assert server.wait(seconds=0.5)["phase"] == "ready"
        assert systemd.told.count("READY=1") == 1
        assert not any("unicorn" in told for told in systemd.told)


def test_another_application_is_ready_once_it_is_loaded(tmp_path: Path):
    with (
        Systemd(tmp_path) as systemd,
        Server(tmp_path / "log", "tests.e2e.other_apps:plain", NOTIFY_SOCKET=systemd.path),
    ):
        systemd.until("READY=1")
        assert systemd.told == ["READY=1"]


def test_a_model_that_cannot_be_loaded_triggers_the_watchdog(tmp_path: Path):
    with (
        Systemd(tmp_path) as systemd,
        Server(tmp_path / "log", NOTIFY_SOCKET=systemd.path, QWENVL_MODEL=os.devnull),
    ):
        systemd.until("WATCHDOG=trigger")
        assert "READY=1" not in systemd.told
        assert systemd.told[-2].startswith("STATUS=failed: ")
        assert systemd.told[-2].endswith("MODEL is a file; it must be a checkpoint's directory")
