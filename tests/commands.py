"""The command ``qwenvl``, run as a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from qwenvl_app.cli import main

ROOT = Path(__file__).resolve().parent.parent
QWENVL = (sys.executable, "-c", "from qwenvl_app.cli import main; main(prog_name='qwenvl')")


def environment(**more: str) -> dict[str, str]:
    """This process's, without settings, and with ``more``."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("QWENVL_")}
    return clean | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"} | more


def qwenvl(
    *arguments: str, cwd: Path = ROOT, stdin: bytes = b"", **environ: str
) -> subprocess.CompletedProcess[str]:
    """Its exit status and what it printed."""
    done = subprocess.run(
        [*QWENVL, *arguments],
        cwd=cwd,
        env=environment(**environ),
        input=stdin,
        capture_output=True,
        timeout=90,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def invoke(
    *arguments: str, cwd: Path = ROOT, stdin: bytes = b"", **environ: str
) -> subprocess.CompletedProcess[str]:
    """The same without a process, which takes a second each."""
    clean: dict[str, str | None] = {n: None for n in os.environ if n.startswith("QWENVL_")}
    clean["LC_ALL"] = "C.UTF-8"
    with contextlib.chdir(cwd):
        done = CliRunner().invoke(main, arguments, input=stdin, env=clean | environ)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def start(*arguments: str, cwd: Path = ROOT, **environ: str) -> subprocess.Popen[bytes]:
    """Running; it obeys Ctrl-C: a job in the background inherits that it does not."""
    return subprocess.Popen(
        ["env", "--default-signal=INT", *QWENVL, *arguments],
        cwd=cwd,
        env=environment(**environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def only_in_the_whole() -> list[str]:
    """Modules that requirements.txt installs and requirements-remote.txt does not."""
    whole, remote = (
        set(re.findall(r"^[\w-]+", (ROOT / name).read_text(), re.MULTILINE))
        for name in ("requirements.txt", "requirements-remote.txt")
    )
    return [*(name.replace("-", "_") for name in whole - remote), "safetensors"]
