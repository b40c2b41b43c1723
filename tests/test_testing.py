"""The kit for integrators: without a model and torch, as their own pytest would use it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_app.errors import Unavailable
from qwenvl_app.generation import FinishReason, Phase, Status
from qwenvl_app.testing import ScriptedBackend
from tests.commands import only_in_the_whole
from tests.wire import ROUTE

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_the_example_of_the_documentation(tmp_path: Path):
    """Run as an integrator would, in a directory of their own. Both languages show the same."""
    pages = ("docs/testing.md", "docs/testing.zh-CN.md")
    codes = [re.findall(r"```python\n# (\S+)\n(.*?)```", read(page), re.DOTALL) for page in pages]
    assert codes[0] == codes[1]
    assert [name for name, _ in codes[0]] == ["conftest.py", "test_shop.py"]
    for name, code in codes[0]:
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "test_torch.py").write_text(
        "import sys\ndef test_no_torch(qwenvl_client):\n    assert sys.modules['torch'] is None\n"
    )
    # The page has requirements-remote.txt installed: what else is here is not there.
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({only_in_the_whole()!r}))\n"
    )
    # What registers as a plugin here, as langsmith does, is no part of the example.
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    environ = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.slow
def test_the_example_with_the_demo_model():
    (code,) = re.findall(r"```python\n(import time\n.*?)```", read("docs/testing.md"), re.DOTALL)
    assert "create_app().test_client()" in code
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "图中有一个红色的圆形。\n"


def test_a_script_for_each_question(qwenvl_client, qwenvl_backend: ScriptedBackend):
    qwenvl_backend.answer = lambda request: [request.messages[-1].content[0].upper()]
    answer = qwenvl_client.post(CHAT, json=HELLO).json
    assert answer["choices"][0]["message"]["content"] == "HELLO"
    assert qwenvl_backend.requests[0].messages[0].content == ("hello",)


def test_failures(qwenvl_client, qwenvl_backend: ScriptedBackend):
    qwenvl_backend.refusal = Unavailable("忙", retry_after=3)
    refused = qwenvl_client.post(CHAT, json=HELLO)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "3")
    qwenvl_backend.refusal, qwenvl_backend.failure = None, RuntimeError("secret")
    failed = qwenvl_client.post(CHAT, json=HELLO)
    assert failed.status_code == 500
    assert "secret" not in failed.text
    qwenvl_backend.phase = Status(Phase.LOADING, "weights")
    assert qwenvl_client.get("/readyz").json["phase"] == "loading"
    assert qwenvl_client.post(CHAT, json=HELLO).status_code == 503


def test_streams_and_an_answer_that_is_cut(qwenvl_client, qwenvl_backend: ScriptedBackend):
    qwenvl_backend.pieces, qwenvl_backend.finish_reason = ["a", "b"], FinishReason.LENGTH
    qwenvl_backend.delay_s = qwenvl_backend.apart_s = 0.01
    lines = qwenvl_client.post(CHAT, json=HELLO | {"stream": True}).text.split("\n\n")
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert [choice["delta"].get("content") for choice in choices] == ["", "a", "b", None]
    assert choices[-1]["finish_reason"] == "length"


def test_a_program_on_a_real_socket(qwenvl_url: str):
    command = ["curl", "-sS", "-F", "image=@demo/samples/red-circle.png", "-F", "prompt=what?"]
    done = subprocess.run(
        [*command, qwenvl_url + ROUTE],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert json.loads(done.stdout) == {"status": "success", "result": "A scripted answer."}
