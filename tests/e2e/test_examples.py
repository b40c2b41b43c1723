"""Every program in examples/, run as its README says, against a real gunicorn."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.browser import BINARY, chromium
from tests.e2e.server import ROOT, Server
from tests.waiting import until

EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \[([^]]+)\]\S+ \| [^|]+ \| `?([^`|]+)`? \|$", README, re.MULTILINE)
COMMANDS = {name: command for name, command in ROWS if "examples/" in command}
ANSWER = "图中有一个红色的圆形。"


def run(command: str, server: Server, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    if words[0] in ("node", "java", "go") and shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    words[0] = sys.executable if words[0] == "python" else words[0]
    environ = os.environ | {
        "QWENVL_URL": server.url,
        "GOCACHE": str(tmp_path),
        "GO111MODULE": "off",
    }
    return subprocess.run(
        words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False
    )


def test_every_example_is_in_the_table():
    assert {name for name, _ in ROWS} == {one.name for one in EXAMPLES.iterdir()} - {"README.md"}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example(name: str, server: Server, tmp_path: Path):
    done = run(COMMANDS[name], server, tmp_path)
    assert done.returncode == 0, done.stderr
    if name == "structured_langchain.py":
        assert re.match(r"color='\w+' shape='\w+'", done.stdout)
    elif name == "chat_openai.py":
        first, second = done.stdout.splitlines()
        assert first == ANSWER
        assert "红" in second
    else:
        assert ANSWER in done.stdout


COMPILED = [pytest.param(name, marks=pytest.mark.slow) for name in ("Ask.java", "ask.go")]


@pytest.mark.parametrize("name", ["ask.sh", "ask.py", "ask.mjs", *COMPILED])
def test_an_error_is_told(name: str, server: Server, tmp_path: Path):
    command = COMMANDS[name].replace("demo/samples/red-circle.png", "examples/README.md")
    done = run(command, server, tmp_path)
    assert done.returncode != 0
    assert "无法作为图片读取" in done.stdout + done.stderr


@pytest.mark.skipif(BINARY is None, reason="Debian's package chromium is not installed")
def test_the_page(server: Server):
    with chromium() as browser, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{(EXAMPLES / 'ask.html').as_uri()}?url={server.url}")
        page.get_by_label("picture").set_input_files(ROOT / "demo/samples/red-circle.png")
        page.get_by_placeholder("Question").fill("这张图里有什么？")
        page.get_by_role("button", name="Ask").click()
        until(lambda: page.locator("p").inner_text() == ANSWER, 20)
