"""The operator's commands, run as they are documented."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenvl_app.settings import Settings
from tests.commands import invoke
from tests.wire import ROUTE, post, send

ROOT = Path(__file__).resolve().parent.parent
# Where it does not matter what answers: torch takes four seconds.
REMOTE = {
    "QWENVL_BACKEND": "remote",
    "QWENVL_REMOTE_URL": "http://127.0.0.1:9",
    "QWENVL_REMOTE_MODEL": "none",
}


def flask(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("QWENVL_")}
    return subprocess.run(
        [sys.executable, "-m", "flask", "--app", "wsgi", *arguments],
        cwd=ROOT,
        env=clean | environ,
        input="print(app.test_client().get('/livez').json)\n",  # for shell
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_check_config_says_where_each_value_came_from(tmp_path: Path):
    file = tmp_path / "my.toml"
    file.write_text("max_waiting = 3\nmax_concurrency = 2\n", encoding="utf-8")
    done = flask("check-config", QWENVL_CONFIG=str(file), QWENVL_MAX_WAITING="7")
    assert done.returncode == 0
    assert done.stderr == ""
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert list(rows) == list(Settings.model_fields)
    assert rows["max_waiting"] == ["7", "environment"]
    assert rows["max_concurrency"] == ["2", str(file)]
    assert rows["model"] == ["demo", "config/default.toml"]


@pytest.mark.parametrize(
    "command",
    [
        "check-config",
        "run",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("doctor", "routes", "shell")),
    ],
)
def test_a_wrong_setting_is_one_line(command: str):
    done = flask(command, QWENVL_MAX_WAITING="many")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "max_waiting" in done.stderr


def test_commands_load_no_model():
    """wsgi.py made an application, and with it a loader, for whoever only wanted a command."""
    code = (
        "import threading, sys\n"
        "from click.testing import CliRunner\n"
        "from flask.cli import cli\n"
        "for command in sys.argv[1:]:\n"
        "    done = CliRunner().invoke(cli, ['--app', 'wsgi', *command.split()])\n"
        "    assert done.exit_code == 0, command\n"
        "    assert threading.active_count() == 1, command\n"
        "    assert 'torch' not in sys.modules, command\n"
        "app = sys.modules['wsgi'].app\n"
        "assert list(app.cli.commands)[3:] == ['ask', 'batch', 'bench']\n"
    )
    command = [sys.executable, "-c", code, "check-config", "--help", "doctor --help"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60)


def test_routes_are_those_that_are_served():
    """They were the commands' application's, which has none."""
    done = flask("routes", **REMOTE)
    assert done.returncode == 0, done.stderr
    assert {"/livez", "/readyz", "/health", "/metrics", ROUTE} <= set(done.stdout.split())


def test_the_shell_has_the_application():
    done = flask("shell", **REMOTE)
    assert done.returncode == 0, done.stderr
    assert "{'status': 'alive'}" in done.stdout


def test_the_development_server_serves_the_application(tmp_path: Path):
    """It answered 404 to everything."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A job in the background inherits that Ctrl-C is ignored.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "flask", "--app", "wsgi"]
    command += ["run", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        environ = os.environ | REMOTE
        server = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                assert send(port, "GET", "/livez").status == 200
                break
            except OSError:
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
        assert post(port, b"").status == 422
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    assert f"route={ROUTE} status=422" in text


def test_doctor_on_this_machine():
    done = invoke("doctor", "--bind", "127.0.0.1:0")
    levels = {line.split()[1].rstrip(":"): line.split()[0] for line in done.stdout.splitlines()}
    assert done.returncode == 0, done.stdout + done.stderr
    expected = ("versions", "device", "port", "model", "memory", "process")
    assert levels == dict.fromkeys(expected, "ok")


def test_doctor_fails_if_the_service_would(tmp_path: Path):
    done = invoke("doctor", "--bind", "127.0.0.1:0", QWENVL_MODEL=str(tmp_path))
    assert done.returncode == 1
    assert "FAIL  model: the model directory is empty" in done.stdout


def test_secrets_are_not_shown():
    keys = {"QWENVL_API_KEYS": "sekret,other", "QWENVL_REMOTE_API_KEY": "sekret"}
    done = flask("check-config", **keys)
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["api_keys"] == rows["remote_api_key"] == ["(set)", "environment"]
    assert "sekret" not in done.stdout
    assert invoke("check-config").stdout.count("(unset)") == 2


def test_the_list_of_commands_is_whole():
    """click cuts a summary that is too long for its line, in the middle of a sentence."""
    listed = invoke("--help").stdout
    assert "batch" in listed
    assert "..." not in listed.partition("Commands:")[2]
