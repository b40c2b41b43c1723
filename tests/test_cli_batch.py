"""``qwenvl batch``: every picture is answered once, whoever is killed meanwhile."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenvl_app.cli.answers import Failed
from qwenvl_app.cli.batch_output import Output
from qwenvl_app.cli.batch_source import Item
from tests.commands import invoke, start
from tests.e2e.scripted_app import expected, picture
from tests.e2e.server import Server
from tests.waiting import until
from tests.wire import send

APP = "tests.e2e.scripted_app:app"


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("scripted") / "log", APP) as server:
        server.wait()
        yield server


def write_source(folder: Path, count: int) -> Path:
    """A CSV with a picture and a question of its own for each row."""
    source = folder / "questions.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "prompt"])
        for number in range(count):
            (folder / f"{number}.png").write_bytes(picture(number))
            rows.writerow([f"{number}.png", f"第 {number} 个问题，“是\n什么”？"])
    return source


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def check(output: Path, count: int) -> None:
    """Each question's answer is there once, and right."""
    rows = {row["id"]: row for row in read(output)}
    assert len(read(output)) == len(rows) == count
    for number in range(count):
        row = rows[number + 1]
        prompt = f"第 {number} 个问题，“是\n什么”？"
        assert row["image"] == f"{number}.png"
        assert row["prompt"] == prompt
        assert row["result"] == expected(number, prompt=prompt)
        assert row["finish_reason"] == "stop"
        assert row["usage"]["completion_tokens"] == len(row["result"])


@pytest.mark.parametrize(
    ("count", "end"),
    [
        (30, "kill"),
        pytest.param(500, "kill", marks=pytest.mark.slow),
        pytest.param(500, "stop", marks=pytest.mark.slow),
    ],
)
def test_killed_twice_and_the_server_restarted(tmp_path: Path, count: int, end: str):
    source, output = write_source(tmp_path, count), tmp_path / "answers.jsonl"
    port, seconds = free_port(), "0.2" if count == 30 else "0.05"
    arguments = ("batch", str(source), "-o", str(output), "--url", f"http://127.0.0.1:{port}")

    def written() -> int:
        return len(output.read_bytes().splitlines()) if output.exists() else 0

    def serve(number: int) -> Server:
        (tmp_path / str(number)).mkdir()
        options = ("--bind", f"127.0.0.1:{port}")
        return Server(tmp_path / str(number) / "log", APP, options, FAKE_SECONDS=seconds)

    first = serve(1)
    try:
        for part in (1, 2):  # the server need not be there yet
            with start(*arguments) as process:
                until(lambda part=part: written() >= part * count // 5, 90)
                process.kill()
        with output.open("ab") as file:
            file.write(b'{"id": 29, "image": "28.p')  # as if the system had torn it
        with start(*arguments) as process:
            until(lambda: written() >= 3 * count // 5, 90)
            assert written() < count
            if end == "kill":  # and what it was answering is lost
                for each in (first.process.pid, first.worker):
                    os.kill(each, signal.SIGKILL)
            else:
                first.stop()
            with serve(2):
                _, said = process.communicate(timeout=110)
        assert process.returncode == 0, said
        assert said.decode() == f"qwenvl: {count} of {count} answered, 0 failed\n"
    finally:
        first.stop()
    check(output, count)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_folder_with_one_question(scripted: Server, tmp_path: Path):
    folder, output = tmp_path / "photos", tmp_path / "answers.jsonl"
    (folder / "more").mkdir(parents=True)
    for name, number in (("b.png", 1), ("more/c.PNG", 2), (".hidden.png", 3), ("a.txt", 4)):
        (folder / name).write_bytes(picture(number))
    arguments = ("batch", str(folder), "-o", str(output), "--url", scripted.url)
    assert invoke(*arguments).stderr == "qwenvl: a folder of pictures needs --prompt\n"
    done = invoke(*arguments, "--prompt", "?")
    assert (done.returncode, done.stdout) == (0, "")
    told = {row["id"]: row["result"] for row in read(output)}
    assert told == {"b.png": expected(1, prompt="?"), "more/c.PNG": expected(2, prompt="?")}
    before = output.read_bytes()
    again = invoke(*arguments, "--prompt", "?")
    assert (again.returncode, again.stderr) == (0, "qwenvl: 2 of 2 answered, 0 failed\n")
    assert output.read_bytes() == before
    other = invoke(*arguments, "--prompt", "another question")
    assert other.returncode == 2
    assert "is another question there" in other.stderr


def test_json_lines_what_fails_and_asking_that_again(scripted: Server, tmp_path: Path):
    source, output = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [
        {"id": "good", "image": "1.png", "prompt": "一？"},
        {"id": "bad", "image": "bad.png"},
        {"id": 3, "image": str(tmp_path / "none.png")},
        {"image": "1.png", "prompt": "cut"},
    ]
    source.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    arguments = ("batch", str(source), "-o", str(output), "--url", scripted.url, "--prompt", "?")
    done = invoke(*arguments)
    assert done.returncode == 1
    assert done.stderr == "qwenvl: 2 of 4 answered, 2 failed: --retry-failed asks those again\n"
    told = {row["id"]: row for row in read(output)}
    assert told["good"]["result"] == expected(1, prompt="一？")
    detail = "上传的文件无法作为图片读取，可能已损坏或格式不受支持。"
    assert told["bad"]["error"] == f"400: this file can't be read as a picture ({detail})"
    assert told[3]["error"] == "No such file or directory"
    assert told[4]["finish_reason"] == "length"
    assert list(told["good"]) == ["id", "image", "prompt", "result", "finish_reason", "usage"]

    (tmp_path / "bad.png").write_bytes(picture(5))
    assert invoke(*arguments).returncode == 1  # they are not asked again of itself
    assert len(read(output)) == 4
    done = invoke(*arguments, "--retry-failed")
    assert done.stderr == "qwenvl: 3 of 4 answered, 1 failed: --retry-failed asks those again\n"
    assert len(read(output)) == 4
    assert {row["id"]: row for row in read(output)}["bad"]["result"] == expected(5, prompt="?")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png") == [
        "answers.jsonl",
        "questions.jsonl",
    ]


def test_a_file_that_excel_wrote_on_a_chinese_windows(scripted: Server, tmp_path: Path):
    source, output = tmp_path / "问题.CSV", tmp_path / "answers.jsonl"
    (tmp_path / "图.png").write_bytes(picture(6))
    source.write_bytes("id,image,prompt\r\n甲,图.png,这是什么？\r\n".encode("gbk"))
    done = invoke("batch", str(source), "-o", str(output), "--url", scripted.url)
    assert done.returncode == 0, done.stderr
    (row,) = read(output)
    assert (row["id"], row["result"]) == ("甲", expected(6, prompt="这是什么？"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "image,prompt\n1.png,\n", "row 1: it has no prompt"),
        ("a.csv", "picture,prompt\n1.png,?\n", "row 1: it has no image"),
        ("a.csv", "id,image,prompt\nx,1.png,?\nx,2.png,?\n", "the id x is there twice"),
        ("a.csv", "image,prompt\n", "there are no pictures in it"),
        ("a.jsonl", '{"image": "1.png", "prompt": "?"}\n[1]\n', "row 2: it is no JSON object"),
        ("a.jsonl", '{"id": 1.5, "image": "1.png", "prompt": "?"}', "row 1: the id is neither"),
        ("a.jsonl", '{"image": ["1.png"], "prompt": "?"}', "row 1: it has no image"),
        ("a.txt", "1.png", "neither a folder nor"),
        ("a.ndjson", "", "there are no pictures in it"),
    ],
)
def test_a_source_that_is_wrong_is_one_line(tmp_path: Path, name: str, text: str, said: str):
    (tmp_path / name).write_text(text)
    done = invoke("batch", name, "-o", "out.jsonl", "--url", "http://127.0.0.1:1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("qwenvl: a.")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("text", ["an essay", "one line\n", '{"id": 1}\n', '[1]\n{"id"'])
def test_a_file_that_is_no_output_is_left_alone(tmp_path: Path, text: str):
    source, output = write_source(tmp_path, 1), tmp_path / "essay.txt"
    output.write_text(text)
    done = invoke("batch", str(source), "-o", str(output), "--url", "http://127.0.0.1:1")
    assert done.returncode == 2
    assert "name another file with -o" in done.stderr
    assert output.read_text() == text


@pytest.mark.parametrize("target", ["questions.csv", ".", "none/answers.jsonl", "/dev/null"])
def test_an_output_that_can_not_be(tmp_path: Path, target: str):
    source = write_source(tmp_path, 1)
    before = source.read_bytes()
    arguments = ("batch", source.name, "-o", target, "--url", "http://127.0.0.1:1")
    done = invoke(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"qwenvl: {target}: ")
    assert source.read_bytes() == before


def test_two_do_not_write_one_file(scripted: Server, tmp_path: Path):
    source, output = write_source(tmp_path, 1), tmp_path / "answers.jsonl"
    with output.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = invoke("batch", str(source), "-o", str(output), "--url", scripted.url)
    assert done.returncode == 2
    assert done.stderr == f"qwenvl: {output}: another batch is writing it\n"
    assert output.read_bytes() == b""


def test_a_last_line_that_lacks_only_its_end_counts(scripted: Server, tmp_path: Path):
    source, output = write_source(tmp_path, 2), tmp_path / "answers.jsonl"
    arguments = ("batch", str(source), "-o", str(output), "--url", scripted.url)
    assert invoke(*arguments).returncode == 0
    output.write_bytes(output.read_bytes()[:-1])
    assert invoke(*arguments).returncode == 0
    check(output, 2)


def test_a_busy_server_is_asked_again(tmp_path: Path):
    """Four at once, where one is answered and none may wait: the others get 503."""
    source, output = write_source(tmp_path, 5), tmp_path / "answers.jsonl"
    (tmp_path / "server").mkdir()
    few = {"QWENVL_MAX_CONCURRENCY": "1", "QWENVL_MAX_WAITING": "0", "FAKE_SECONDS": "0.1"}
    with Server(tmp_path / "server" / "log", APP, **few) as server:
        server.wait()
        arguments = ("batch", str(source), "-o", str(output), "--url", server.url)
        done = invoke(*arguments, "--concurrency", "4")
        assert b'status="503"' in send(server.port, "GET", "/metrics").body
    assert done.returncode == 0, done.stderr
    check(output, 5)


def test_ctrl_c_goes_on_later(scripted: Server, tmp_path: Path):
    source, output = tmp_path / "questions.csv", tmp_path / "answers.jsonl"
    (tmp_path / "1.png").write_bytes(picture(1))
    source.write_text("image,prompt\n1.png,?\n1.png,wait\n")
    with start("batch", str(source), "-o", str(output), "--url", scripted.url) as process:
        until(lambda: output.read_bytes().endswith(b"\n"))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode().splitlines() == [
        "qwenvl: 1 of 2 answered, 0 failed, 1 left: the same command goes on",
        "qwenvl: stopped",
    ]
    assert [row["id"] for row in read(output)] == [1]


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk was full for a moment: another thread's line went on where one was cut."""
    output = Output(tmp_path / "answers.jsonl")
    real, left = os.write, [10, 0]

    def write(file: int, data: bytes) -> int:
        if not left:
            return real(file, data)
        if space := left.pop(0):
            return real(file, data[:space])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(Failed):
        output.add(Item(1, "a.png", "?", tmp_path), {"result": "one"})
    output.add(Item(2, "b.png", "?", tmp_path), {"result": "two"})
    output.close()
    assert [row["id"] for row in read(output.path)] == [2]
