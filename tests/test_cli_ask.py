"""``qwenvl ask``, against a server and in process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT, invoke, only_in_the_whole, qwenvl, start
from tests.e2e.scripted_app import expected, picture
from tests.e2e.server import Server
from tests.waiting import until
from tests.wire import send

KEY = "sekret"


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("scripted") / "log"
    with Server(log, "tests.e2e.scripted_app:app", QWENVL_API_KEYS=KEY) as server:
        server.wait()
        yield server


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def test_an_answer_and_nothing_else(scripted: Server, files: Path):
    done = qwenvl("ask", "1.png", "什么？", "--url", scripted.url, "--key", KEY, cwd=files)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected(1, prompt="什么？") + "\n"


def test_as_json_with_the_key_from_the_environment(scripted: Server, files: Path):
    url = scripted.url + "/v1/"  # what OpenAI's clients call the base URL
    done = invoke("ask", "2.png", "?", "--json", "--url", url, cwd=files, QWENVL_API_KEY=KEY)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told.pop("seconds") >= 0
    assert told == {
        "result": expected(2, prompt="?"),
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": len(expected(2, prompt="?")),
            "cached_tokens": 0,
            "reasoning_tokens": 0,
        },
    }


def test_several_pictures_one_of_them_from_standard_input(scripted: Server, files: Path):
    arguments = ("ask", "1.png", "-", "2.png", "which?", "--json", "--url", scripted.url)
    done = invoke(*arguments, "--key", KEY, cwd=files, stdin=picture(7))
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["result"] == expected(1, 7, 2, prompt="which?")
    assert (told["finish_reason"], told["usage"]["prompt_tokens"]) == ("stop", 10)


def test_fields_go_along_on_either_route(scripted: Server, files: Path):
    asked = ("?", "--url", scripted.url, "--key", KEY, "-f", "stop=6")
    one = invoke("ask", "1.png", *asked, "-f", "max_new_tokens=3", cwd=files)
    assert (one.returncode, one.stdout) == (0, expected(1, prompt="?")[:3] + "\n")
    asked = (*asked[:-1], 'stop="6"')  # JSON there, where a number is no text
    two = invoke("ask", "1.png", "2.png", *asked, "-f", "max_tokens=4", cwd=files)
    assert (two.returncode, two.stdout) == (0, expected(1, 2, prompt="?")[:4] + "\n")
    for wrong in ("max_new_tokens", "=1", "prompt=other"):
        done = invoke("ask", "1.png", *asked, "-f", wrong, cwd=files)
        assert done.returncode == 2
        assert "write NAME=VALUE, such as max_new_tokens=200" in done.stderr


def test_a_terminal_that_lacks_characters(scripted: Server, files: Path):
    asked = ("ask", "1.png", "\U0001f600", "--url", scripted.url, "--key", KEY)
    done = qwenvl(*asked, cwd=files, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "? (1,)??\n"


def test_an_answer_that_was_cut_says_so(scripted: Server, files: Path):
    done = invoke("ask", "1.png", "cut", "--url", scripted.url, "--key", KEY, cwd=files)
    assert done.returncode == 0
    assert done.stdout == expected(1, prompt="cut") + "\n"
    assert done.stderr == "qwenvl: the answer is not whole (length)\n"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("1.png", "?"), 1, "401: the API key is missing or wrong (缺少有效的 API 密钥。)\n"),
        (("1.png", "?", "--key", "wrong"), 1, "401: the API key is missing or wrong (缺"),
        (("1.png", "2.png", "?"), 1, "401: A valid API key is missing."),
        (("none.png", "?", "--key", KEY), 2, "none.png: No such file or directory"),
        ((".", "?", "--key", KEY), 2, ".: Is a directory"),
        (("-", "-", "?", "--key", KEY), 2, "standard input has one picture only"),
        (("text.txt", "?", "--key", KEY), 1, "400: this file can't be read as a picture (上"),
        (("1.png", "", "--key", KEY), 1, "422: prompt: "),
        (("1.png", "fail", "--key", KEY), 1, "500: the server failed (服务器内部错误: 没有做到。"),
        (("1.png", "?", "--key", "密"), 2, "the key has characters that no header may have"),
        (("1.png", "?", "--key", KEY, "-f", "top_p=7"), 1, "422: top_p: "),
        (("1.png", "?", "--url", "ftp://x"), 2, "ftp://x is no URL such as"),
        (("1.png", "?", "--url", "http://[x"), 2, "http://[x is no URL such as"),
        (("1.png", "?", "--url", "http://127.0.0.1:1"), 1, "no answer from http://127.0.0.1:1: c"),
    ],
)
def test_an_error_is_one_line(
    scripted: Server, files: Path, arguments: tuple[str, ...], status: int, said: str
):
    (files / "text.txt").write_text("no picture")
    given = () if "--url" in arguments else ("--url", scripted.url)
    done = invoke("ask", *arguments, *given, cwd=files)
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith(f"qwenvl: {said}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "401: 缺少有效的 API 密钥。"),
        ({"LANG": "en_GB.UTF-8", "LC_ALL": "zh_CN.UTF-8"}, "401: 缺少有效的 API 密钥。"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "C"}, "401: the API key is"),
    ],
)
def test_a_chinese_reader_is_told_in_chinese_alone(
    scripted: Server, files: Path, environ: dict[str, str], said: str
):
    environ = {"LC_ALL": "", "LC_MESSAGES": "", **environ}
    done = invoke("ask", "1.png", "?", "--url", scripted.url, cwd=files, **environ)
    assert done.stderr.startswith(f"qwenvl: {said}")


def test_ctrl_c_ends_it_and_frees_its_place(scripted: Server, files: Path):
    arguments = ("ask", "1.png", "wait", "--url", scripted.url, "--key", KEY)
    with start(*arguments, cwd=files) as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(3) == "图".encode()  # as it was written, not at the end
        assert running(scripted) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == b"qwenvl: stopped\n"
    until(lambda: running(scripted) == 0)


def running(server: Server) -> int:
    text = send(server.port, "GET", "/metrics").body.decode()
    found = re.search(r"^qwenvl_num_requests_running (\d+)", text, re.MULTILINE)
    assert found
    return int(found[1])


def test_in_process():
    """The demo model; a key for servers is no setting of this one."""
    asked = ("ask", "demo/samples/red-circle.png", "这张图里有什么？")
    done = invoke(*asked, QWENVL_API_KEY="x")
    assert (done.returncode, done.stdout) == (0, "图中有一个红色的圆形。\n")
    assert all(line.startswith("qwenvl: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"QWENVL_MAX_WAITING": "many"}, "setting 'max_waiting'"),
        ({"QWENVL_MODEL": "/nowhere"}, "the model can't be loaded: "),
    ],
)
def test_a_model_that_can_not_be_had_is_one_line(environ: dict[str, str], said: str):
    done = invoke("ask", "demo/samples/red-circle.png", "?", **environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(f"qwenvl: {said}")


def _without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, where no more is installed than requirements-remote.txt."""
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({only_in_the_whole()!r}))\n"
        f"from qwenvl_app.cli import main\nmain({list(arguments)!r})\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("command", ["ask", "batch", "bench"])
def test_asking_a_server_needs_no_torch(command: str, tmp_path: Path):
    url = "http://127.0.0.1:1"
    output = str(tmp_path / "answers.jsonl")
    arguments = {
        "ask": ["demo/samples/red-circle.png", "?", "--url", url],
        "batch": ["demo/samples", "--prompt", "?", "-o", output, "--url", url, "--patience", "0"],
        "bench": [url],
    }
    done = _without_torch(command, *arguments[command])
    assert done.returncode == 1
    assert url in done.stderr
    assert all(line.startswith("qwenvl: ") for line in done.stderr.splitlines()), done.stderr


def test_in_process_without_torch():
    done = _without_torch("ask", "demo/samples/red-circle.png", "?")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"qwenvl: the model can't be loaded: \w+ is missing: install requirements.txt", last
    )
