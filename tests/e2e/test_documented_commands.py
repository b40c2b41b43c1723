"""Every command of README and docs/: run here as it stands, run by another test, or listed here.

A command that is new is run here, unless it is listed. What is replaced is what readers have of
their own: an address, a port, a directory, a hub.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwenvl_app.engine.native import library
from qwenvl_app.loading.checkpoint import DEMO
from tests.documented import Command, commands, programs
from tests.e2e.server import ROOT, Server
from tests.e2e.test_command_line import COMMANDS
from tests.hub import Hub, publish
from tests.waiting import until
from tests.wire import GOOD, post, send

# What can't be run in a test: a pattern of pages, one of commands, and why.
NOT_HERE = [
    (
        r"docs/operating\.md",
        ".",
        "root, systemd, nginx: tests/walk.py runs every block of the page",
    ),
    (
        r"deploy/cluster/.*",
        "docker|kubectl|curl",
        "a cluster: tests/test_cluster.py has the schemas",
    ),
    (r"deploy/cluster/.*", "ray|vllm", "several machines with GPUs"),
    (".*", "docker", "Docker, which is not here; hadolint and tests/test_deploy.py read the files"),
    (".*", "nvidia-smi|make test-gpu|make bench-gpu|.* --device cuda ", "a GPU"),
    (".*", "git clone REPOSITORY", "the reader's address; tests/walk.py fills it in"),
    (".*", ".*download.pytorch.org|env -u .* https://pypi.org", "the internet, gigabytes of it"),
    (".*", ".*pip uninstall -y torch", "it would take torch from all other tests"),
    (".*", "make test$", "this test is part of it"),
    (".*", "make bench$|.*-m demo.evaluate|.*-m benchmarks.capacity", "minutes of all cores"),
]
# What other tests run: a pattern of commands, and where.
ELSEWHERE = [
    ("qwenvl (ask|batch|bench)", "tests/e2e/test_command_line.py"),
    (r"pip install (--no-deps )?\.$", "tests/test_wheel.py"),
]
# Longer than a few seconds, and the proof is another's: what a model's name may be.
SLOW = (
    r".*MODEL=|make run PORT=8000|.* download|.*benchmarks.original|.* doctor|qwenvl serve"
    r"|.*import torch"
)
SERVES = r"make run|.*gunicorn -c|qwenvl serve"


def listed(command: Command) -> list[str]:
    """Where else it is run, or why it is not."""
    where = [where for pattern, where in ELSEWHERE if re.match(pattern, command.text)]
    why = [
        why
        for page, pattern, why in NOT_HERE
        if re.fullmatch(page, command.page) and re.match(pattern, command.text)
    ]
    return where + why


def here() -> list[object]:
    """Each once, however many pages have it."""
    rows: dict[object, Command] = {}
    for one in commands():
        if not listed(one):
            rows.setdefault((one.text, one.exports), one)
    return [
        pytest.param(
            one,
            id=f"{one.page}: {one.text}",
            marks=[pytest.mark.slow] if re.match(SLOW, one.text) or one.exports else [],
        )
        for one in rows.values()
    ]


class Reader:
    """Types commands in a checkout; what they would change lies in a directory of their own."""

    def __init__(self, directory: Path, server: Server, hub: Hub):
        self._directory, self._server = directory, server
        self._venv = directory / "venv"
        (self._venv / "bin").mkdir(parents=True)
        for name in ("pip", "flask", "gunicorn"):
            self._program(name, f"-m {name}")
        self._program("python", "")
        self._program("qwenvl", "-c 'from qwenvl_app.cli import main; main()'")
        for stamp in ("created", "runtime", "dev"):  # make finds nothing to install
            (self._venv / stamp).touch()
        (directory / ".cache").mkdir()  # what is compiled at the first start is there
        (directory / ".cache/qwenvl").symlink_to(library._CACHE.expanduser())
        (directory / ".curlrc").write_text("fail\nsilent\nshow-error\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        clean = {n: v for n, v in os.environ.items() if not n.startswith(("QWENVL_", "HF_"))}
        self._environ = clean | {
            "HOME": str(directory),
            "PATH": f"{self._venv / 'bin'}:{os.environ['PATH']}",
            "MAKEFLAGS": f"VENV={self._venv}",
            "PORT": str(self._port),
            "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{self._port}",
            "PIP_DRY_RUN": "1",  # all of it is there, in the versions that are asked for
            "PIP_NO_INDEX": "1",
            **dict.fromkeys(("MODELSCOPE_ENDPOINT", "HF_ENDPOINT"), hub.url),
            **{name: f"{directory}/{name}" for name in ("MODELSCOPE_CACHE", "HF_HUB_CACHE")},
        }

    def _program(self, name: str, arguments: str) -> None:
        program = self._venv / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        program.chmod(0o755)

    def _own(self, text: str) -> str:
        for documented, own in {
            "http://10.0.0.1:8000,http://10.0.0.2:8000": self._server.url,
            "QWENVL_REMOTE_MODEL=Qwen/Qwen3-VL-8B-Instruct": "QWENVL_REMOTE_MODEL=demo",
            "http://127.0.0.1:8000": self._server.url,
            "--bind 127.0.0.1:8000": f"--bind 127.0.0.1:{self._port}",
            "PORT=8000": f"PORT={self._port}",
            "/data/LLM/Qwen/Qwen3-VL-8B-Instruct": str(DEMO),
            ".venv/bin/": f"{self._venv}/bin/",
            "photo.heic;": f"{ROOT}/demo/samples/red-circle.png;",
            "' ...": f"' -F prompt=what? {self._server.url}/v1/image/recognize",
        }.items():
            text = text.replace(documented, own)
        text = re.sub("doctor$", f"doctor --bind 127.0.0.1:{self._port}", text)
        return re.sub("qwenvl serve$", f"qwenvl serve --bind 127.0.0.1:{self._port}", text)

    def start(self, command: Command) -> subprocess.Popen[bytes]:
        script = "\n".join([*command.exports, command.text])
        with (self._directory / "out").open("wb") as output:
            return subprocess.Popen(
                ["bash", "-ec", self._own(script)],
                cwd=ROOT,
                env=self._environ,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def said(self) -> str:
        return (self._directory / "out").read_text()

    def asks_what_was_started(self, command: Command) -> None:
        """Waits for it, asks, and ends it as Ctrl-C would: make and what it has started."""
        process = self.start(command)
        try:

            def ready() -> bool:
                assert process.poll() is None, self.said()
                return send(self._port, "GET", "/readyz").status == 200

            until(ready, 90, self.said)
            assert post(self._port, GOOD).status == 200
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(40)


@pytest.fixture
def reader(tmp_path: Path, server: Server, hub: Hub) -> Reader:
    return Reader(tmp_path, server, hub)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    published = publish(tmp_path_factory.mktemp("published") / "model")
    revisions = ("master", "main", "REVISION")
    hub = Hub(models={("Qwen/Qwen3-VL-8B-Instruct", revision): published for revision in revisions})
    yield hub
    hub.close()


@pytest.mark.parametrize("command", here())
def test_a_command(command: Command, reader: Reader):
    if re.match(SERVES, command.text):
        reader.asks_what_was_started(command)
        return
    process = reader.start(command)
    assert process.wait(100) == 0, reader.said()
    assert command.answer in reader.said()


def test_what_the_page_of_the_command_line_shows_is_run():
    shown = [one.text for one in commands() if re.match(r"qwenvl (ask|batch|bench) ", one.text)]
    assert set(shown) == {" ".join(command.split()) for command in COMMANDS}


@pytest.mark.parametrize("entry", [*NOT_HERE, *ELSEWHERE], ids=lambda entry: entry[-1])
def test_the_list_has_nothing_that_is_gone(entry: tuple[str, ...]):
    page, pattern = entry[0] if len(entry) == 3 else ".*", entry[-2]
    assert any(re.fullmatch(page, one.page) and re.match(pattern, one.text) for one in commands())


def test_every_program_is_run():
    """Those in Python and JavaScript, by a word of each: the test that runs them looks for it."""
    words = {
        "tests/e2e/test_clients.py": (
            "requests.post",
            "import OpenAI",
            "langchain_openai",
            "streamText",
            "tools=[weather]",
        ),
        "tests/test_testing.py": ("conftest.py", "test_shop.py", "create_app().test_client()"),
    }
    for test, found in words.items():
        for word in found:
            assert word in (ROOT / test).read_text(encoding="utf-8"), (test, word)
    for page, text in programs():
        assert any(word in text for found in words.values() for word in found), (page, text)
