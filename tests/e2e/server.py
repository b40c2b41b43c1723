"""A real gunicorn with the embedded model, on a free port of 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.waiting import until
from tests.wire import send

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = "tests.e2e.fake_app:app"  # without a model: starts in a second


class Server:
    """A gunicorn that serves ``app``, with more ``options`` if need be.

    Started at once; as a context it is ended, by its process id, when the block ends.
    """

    def __init__(
        self, log: Path, app: str = "wsgi:app", options: tuple[str, ...] = (), **settings: str
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.tmp = log.parent / "tmp"  # where this server would put a temporary file
        self.tmp.mkdir()
        environ = {k: v for k, v in os.environ.items() if not k.startswith("QWENVL_")}
        environ["TMPDIR"] = str(self.tmp)
        command = [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py"]
        command += ["--bind", f"127.0.0.1:{self.port}", *options, app]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environ | settings, stdout=output, stderr=output
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self, phase: str = "ready", seconds: float = 90) -> dict[str, object]:
        """Wait until ``/readyz`` tells ``phase``; returns what it says."""

        def told() -> dict[str, object] | None:
            assert self.process.poll() is None, self.log.read_text()
            try:
                answer: dict[str, object] = json.loads(send(self.port, "GET", "/readyz").body)
            except (ValueError, IndexError):
                return None
            return answer if answer.get("phase") == phase else None

        answer = until(told, seconds, lambda: f"never {phase}: {self.log.read_text()}")
        assert answer
        return answer

    @property
    def worker(self) -> int:
        """Process id of the one worker."""
        (worker,) = self.workers
        return worker

    @property
    def workers(self) -> list[int]:
        """Process ids of all: two while one takes over from the other, none when it was killed."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in children.split()]

    def taken(self) -> tuple[int, int]:
        """File handles and threads of the worker."""
        proc = Path(f"/proc/{self.worker}")
        return len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
