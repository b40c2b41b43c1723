"""Schemathesis, the command, against a real gunicorn: no 5xx, no answer outside the document."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.schemathesis_hooks import MAX_NEW_TOKENS
from tests.e2e.server import FAKE, ROOT, Server


def run(server: Server, folder: Path, *options: str) -> tuple[int, str]:
    """How many cases passed, and the report. Fails where one did not."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    config = ROOT / "tests/e2e/schemathesis.toml"
    command[3:3] = ["--config-file", str(config)]
    command += [
        "--continue-on-failure",
        "--no-color",
        "--seed",
        "1",
        "--generation-database",
        "none",
        *options,
    ]
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "SCHEMATHESIS_HOOKS": "tests.e2e.schemathesis_hooks",
    }
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found and found[1] == found[2], done.stdout
    return int(found[1]), done.stdout


def answered(server: Server, route: str) -> set[str]:
    """The statuses that the server has logged of a route."""
    return set(re.findall(rf"route={route} status=(\d+)", server.log.read_text()))


def test_a_hundred_cases(tmp_path: Path):
    """Without a model: this is about what is read and how it is answered."""
    with Server(tmp_path / "log", FAKE) as server:
        server.wait()
        cases, _ = run(server, tmp_path, "--phases", "examples,fuzzing", "-n", "15")
        assert cases >= 100
        assert {"200", "400", "422"} <= answered(server, "/v1/image/recognize")
        assert {"200", "400"} <= answered(server, "/v1/chat/completions")


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_two_thousand_cases_with_the_demo_model(tmp_path: Path):
    with Server(tmp_path / "log", QWENVL_MAX_NEW_TOKENS=str(MAX_NEW_TOKENS)) as server:
        server.wait()
        cases, _ = run(server, tmp_path, "-n", "200")
        assert cases >= 2000
        assert {"200", "400", "422"} <= answered(server, "/v1/image/recognize")
        assert {"200", "400"} <= answered(server, "/v1/chat/completions")
        assert "Traceback" not in server.log.read_text()
