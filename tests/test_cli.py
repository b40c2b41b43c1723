"""The operator's commands, run as they are documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_app.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


def flask(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("QWENVL_")}
    return subprocess.run(
        [sys.executable, "-m", "flask", "--app", "wsgi", *arguments],
        cwd=ROOT,
        env=clean | environ,
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


@pytest.mark.parametrize("command", ["check-config", "doctor"])
def test_a_wrong_setting_is_one_line(command: str):
    done = flask(command, QWENVL_MAX_WAITING="many")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "max_waiting" in done.stderr


def test_commands_load_no_model():
    """wsgi.py made an application, and with it a loader, for whoever only wanted a command."""
    code = (
        "import threading, sys, wsgi\n"
        "assert threading.active_count() == 1\n"
        "assert 'torch' not in sys.modules\n"
        "assert list(wsgi.app.cli.commands) == ['check-config', 'doctor', 'download']\n"
    )
    environ = os.environ | {"FLASK_RUN_FROM_CLI": "true"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environ, timeout=60)


def test_doctor_on_this_machine():
    done = flask("doctor", "--bind", "127.0.0.1:0")
    levels = {line.split()[1].rstrip(":"): line.split()[0] for line in done.stdout.splitlines()}
    assert done.returncode == 0, done.stdout + done.stderr
    expected = ("versions", "device", "port", "model", "memory", "process")
    assert levels == dict.fromkeys(expected, "ok")


def test_doctor_fails_if_the_service_would(tmp_path: Path):
    done = flask("doctor", "--bind", "127.0.0.1:0", QWENVL_MODEL=str(tmp_path))
    assert done.returncode == 1
    assert "FAIL  model: the model directory is empty" in done.stdout


def test_secrets_are_not_shown():
    done = flask("check-config", QWENVL_API_KEYS="sekret,other")
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["api_keys"] == ["(set)", "environment"]
    assert "sekret" not in done.stdout
    assert flask("check-config").stdout.count("(unset)") == 1
