"""Every command of the page about the command line, as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.commands import ROOT, invoke
from tests.e2e.server import Server

PAGE = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^qwenvl .+$", PAGE, re.MULTILINE)
ANSWERS = {json.loads(line)["result"] for line in re.findall(r'^\{.*"result".*\}$', PAGE, re.M)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "demo/samples", tmp_path / "demo/samples")
    (table,) = re.findall(r"^```csv\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "questions.csv").write_text(table)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_it_does_what_the_page_says(server: Server, folder: Path, command: str):
    command, _, stdin = command.replace("http://127.0.0.1:8000", server.url).partition(" < ")
    _, *arguments = shlex.split(command)
    data = (folder / stdin).read_bytes() if stdin else b""
    done = invoke(*arguments, cwd=folder, stdin=data)
    assert done.returncode == 0, done.stderr
    match arguments:
        case ["ask", *_, "--json", "--url", _]:
            assert {json.loads(done.stdout)["result"]} == ANSWERS
        case ["ask", _, "这张图里有什么？", *_]:
            assert done.stdout == "图中有一个红色的圆形。\n"
        case ["ask", *_]:
            assert done.stdout.strip()
        case ["batch", source, *_]:
            (output,) = folder.glob("*.jsonl")
            rows = [json.loads(line) for line in output.read_text().splitlines()]
            told = {row["id"]: row["result"] for row in rows}
            assert told == (
                {"a": "circle", "b": "teal"}
                if source == "questions.csv"
                else {
                    "red-circle.png": "circle",
                    "teal-triangle.jpg": "triangle",
                    "yellow-rectangle.webp": "rectangle",
                }
            )
        case ["bench", *_, "--json"]:
            runs = json.loads(done.stdout)["runs"]
            assert [(run["clients"], run["answered"]) for run in runs] == [(1, 10), (8, 10)]
        case _:
            (head,) = re.findall(r"^ +clients .*$", PAGE, re.MULTILINE)
            assert done.stdout.splitlines()[0] == head
            assert [line.split()[:3] for line in done.stdout.splitlines()[1:]] == [
                ["1", "20", "0"],
                ["4", "20", "0"],
            ]


def test_the_page_has_every_command_that_asks():
    assert {command.split()[1] for command in COMMANDS} == {"ask", "batch", "bench"}
