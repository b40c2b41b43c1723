"""The package: built, installed where nothing else is, and served from another directory."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qwenvl_app.version import VERSION
from tests.waiting import until
from tests.wire import GOOD, post, send

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path) -> Path:
    """A wheel of what git knows, so that no leftover of an earlier build is in it."""
    source = folder / "source"
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT).decode().split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_every_package_is_named():
    """pyproject.toml lists them, since config/ lies beside the others."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("qwenvl_app/**/__init__.py")}
    assert set(listed) == {name.replace("/", ".") for name in found} | {"qwenvl_app.config"}


@pytest.mark.slow
@pytest.mark.timeout(900)  # torch is installed anew
def test_it_answers_from_an_empty_environment(tmp_path: Path):
    wheel = build(tmp_path / "built")
    assert wheel.name.startswith(f"qwenvl-{VERSION}-")
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, timeout=120)
    pip = [str(place / "bin/pip"), "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=800)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environ = {n: v for n, v in os.environ.items() if not n.startswith(("QWENVL_", "PYTHON"))}
    qwenvl = str(place / "bin/qwenvl")
    told = subprocess.check_output([qwenvl, "--version"], cwd=elsewhere, env=environ, text=True)
    assert re.search(r"[\d.]+$", told.strip())[0] == VERSION
    checked = [qwenvl, "doctor", "--bind", "127.0.0.1:0"]
    subprocess.run(checked, cwd=elsewhere, env=environ, check=True, timeout=120)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [qwenvl, "serve", "--bind", f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, cwd=elsewhere, env=environ)
    try:
        until(lambda: send(port, "GET", "/readyz").status == 200, 120)
        assert post(port, GOOD).body == b'{"status":"success","result":"circle"}'
        for path in ("/", "/static/page.js", "/samples/red-circle.png", "/docs", "/openapi.json"):
            assert send(port, "GET", path).status in (200, 308), path
    finally:
        process.terminate()
        assert process.wait(30) == 0
    assert list(elsewhere.iterdir()) == []
