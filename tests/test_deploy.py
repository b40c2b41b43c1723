"""What is in deploy/ is valid, agrees with the settings and names only what exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from flask.testing import FlaskClient

from qwenvl_app.service.metrics import REASONS
from qwenvl_app.settings import load_settings
from tests.test_metrics import parse
from tests.wire import GOOD, MULTIPART, ROUTE

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
ROOT = DEPLOY.parent
UNIT = DEPLOY / "qwenvl.service"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"


def needs(tool: str, package: str) -> pytest.MarkDecorator:
    reason = f"{tool} is missing: install Debian's package {package}"
    return pytest.mark.skipif(shutil.which(tool) is None, reason=reason)


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload]
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )


def directives(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"(\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


@needs("systemd-analyze", "systemd")
def test_the_unit_is_valid(tmp_path: Path):
    """As it is, but for the program, which is not installed here."""
    text = UNIT.read_text(encoding="utf-8")
    path = tmp_path / UNIT.name
    program = re.search(r"^ExecStart=(\S+)", text, re.MULTILINE)
    assert program
    path.write_text(text.replace(program[1], sys.executable), encoding="utf-8")
    done = run("systemd-analyze", "verify", "--man=no", str(path))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs("systemd-analyze", "systemd")
def test_the_unit_is_hardened_and_says_why_it_is_not_more_so():
    done = run("systemd-analyze", "security", "--offline=yes", "--no-pager", str(UNIT))
    score = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert score, done.stdout + done.stderr
    assert float(score[1]) <= 2.0
    text = UNIT.read_text(encoding="utf-8")
    left_out = set(re.findall(r"^✗ (\w+)=", done.stdout, re.MULTILINE))
    assert "MemoryDenyWriteExecute" in left_out
    for directive in left_out:
        assert directive in text, f"{directive} is left out without a word"


def test_the_unit_agrees_with_the_rest():
    unit = directives(UNIT)
    # graceful_timeout in config/gunicorn.conf.py
    assert int(unit["TimeoutStopSec"][0]) > load_settings({}).request_timeout_s + 10
    install = (DEPLOY / "install.sh").read_text(encoding="utf-8")
    assert unit["WorkingDirectory"] == ["/opt/qwenvl/current"]
    assert "BASE=/opt/$NAME" in install
    assert "useradd --system --user-group --home-dir /var/lib/$NAME" in install
    assert unit["User"] == ["qwenvl"]
    # with which config/gunicorn.conf.py says that a setting is wrong
    assert unit["RestartPreventExitStatus"] == [str(os.EX_CONFIG)]
    assert unit["ExecStart"][0].endswith("gunicorn -c config/gunicorn.conf.py wsgi:app")


def test_nginx_agrees_with_the_settings():
    """Too large and too late are told by the service, in its words; nginx' limits lie behind."""
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    settings = load_settings({})

    def number(name: str) -> int:
        found = re.search(rf"\b{name} (\d+)[ms]?;", text)
        assert found, name
        return int(found[1])

    assert number("client_max_body_size") == settings.max_upload_mb + 1
    assert number("client_body_buffer_size") >= number("client_max_body_size")
    assert f"超过 {settings.max_upload_mb} MB" in text
    everybody = number("limit_conn qwenvl_all")
    assert everybody > settings.max_concurrency + settings.max_waiting
    assert everybody > number("limit_conn qwenvl_one") >= settings.max_concurrency
    assert number("proxy_read_timeout") > settings.request_timeout_s
    assert "proxy_buffering off" in text


@needs("promtool", "prometheus")
def test_promtool_accepts_the_metrics(client: FlaskClient):
    client.post(ROUTE, data=GOOD, content_type=MULTIPART)
    text = client.get("/metrics").text
    done = run("promtool", "check", "metrics", input=text)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs("promtool", "prometheus")
def test_promtool_accepts_configuration_and_rules():
    done = run("promtool", "check", "config", "prometheus.yml", cwd=ALERTS.parent)
    assert done.returncode == 0, done.stderr
    done = run("promtool", "test", "rules", "alerts_test.yml", cwd=ROOT / "tests" / "data")
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    """Every query of the alerts and the dashboard."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    found = [rule["expr"] for group in groups for rule in group["rules"]]
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found + [target["expr"] for panel in panels for target in panel["targets"]]


def test_alerts_and_dashboard_name_only_what_exists(client: FlaskClient):
    client.post(ROUTE, data=GOOD, content_type=MULTIPART)
    text = client.get("/metrics").text
    names = {sample.partition("{")[0] for sample in parse(text)}
    names |= {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    queries = expressions()
    assert len(queries) > 40
    for query in queries:
        for name in re.findall(r"\b(?:qwenvl|process)_\w+", query):
            assert name in names, f"{name} in {query}"
        for reason in re.findall(r'reason=~?"([\w|]+)"', query):
            assert set(reason.split("|")) <= set(REASONS), query
    used = set(re.findall(r"\bqwenvl_\w+", " ".join(queries)))
    assert len(used) > 25


def test_the_dashboard_can_be_drawn():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in cells, f"{panel['title']} lies on another panel"
                cells.add((x, y))


def test_the_dockerfile_passes_hadolint():
    """No Docker engine here: it was linted and never built."""
    hadolint = Path(sys.executable).parent / "hadolint"
    done = run(str(hadolint), "--no-color", str(DEPLOY / "Dockerfile"))
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_dockerfile_copies_is_there_and_not_ignored():
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    admitted = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        for source in line.split():
            found = {str(path.relative_to(ROOT)) for path in ROOT.glob(source)}
            assert found & set(admitted), source


def test_compose_names_files_that_exist():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert (DEPLOY / services["app"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / services["app"]["build"]["dockerfile"]).is_file()
    for service in services.values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (DEPLOY / volume.split(":")[0]).exists(), volume


def test_as_service_has_the_units_environment(tmp_path: Path):
    """The doctor saw neither the model in the service's cache nor what the secrets' file sets.

    Here setpriv is a script that prints what it was given, and /etc another directory.
    """
    script = tmp_path / "deploy" / "as-service"
    script.parent.mkdir()
    text = (DEPLOY / "as-service").read_text(encoding="utf-8")
    assert os.access(DEPLOY / "as-service", os.X_OK)
    unit = directives(UNIT)
    secrets = unit["EnvironmentFile"][0].removeprefix("-")
    assert f"SECRETS={secrets}" in text
    script.write_text(text.replace(f"={secrets}", f"={tmp_path}/secrets"), encoding="utf-8")
    (tmp_path / "secrets").write_text(
        '# keys\nQWENVL_API_KEYS=a b$c,d\nQWENVL_MODEL="x y"\n', encoding="utf-8"
    )
    setpriv = tmp_path / "setpriv"
    setpriv.write_text('#!/bin/sh\npwd\necho "$@"\nenv\n')
    setpriv.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "QWENVL_DEVICE": "cpu"}
    done = run("sh", str(script), "command", "-x", env=environ)
    assert done.stderr == ""
    told = done.stdout.splitlines()
    expected = " ".join(unit["Environment"]).split()
    user = f"--reuid={unit['User'][0]} --regid={unit['Group'][0]} --init-groups"
    assert told[:2] == [str(tmp_path), f"{user} -- command -x"]
    assert len(expected) == 4
    assert {*expected, "QWENVL_API_KEYS=a b$c,d", "QWENVL_MODEL=x y"} <= set(told)
    assert not any(line.startswith("QWENVL_DEVICE=") for line in told)


def test_the_installer_is_a_valid_script():
    script = DEPLOY / "install.sh"
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", str(script)).returncode == 0
    copied = re.search(r"cp -r ([^$]+?) \"\$RELEASE\"", script.read_text(encoding="utf-8"))
    assert copied
    for name in copied[1].replace("\\\n", " ").split():
        assert (ROOT / name).exists(), name


def test_what_is_installed_is_enough(tmp_path: Path):
    """In the release directory nothing else of the checkout is there."""
    script = (DEPLOY / "install.sh").read_text(encoding="utf-8")
    copied = re.search(r"cp -r ([^$]+?) \"\$RELEASE\"", script)
    assert copied
    for name in copied[1].replace("\\\n", " ").split():
        run("cp", "-r", str(ROOT / name), str(tmp_path))
    done = run(sys.executable, "-m", "flask", "--app", "wsgi", "check-config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
