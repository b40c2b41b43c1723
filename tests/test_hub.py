"""A ModelScope id, with the real client against a stand-in for the hub."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelscope_hub import HubApi, HubConfig

from qwenvl_app.backends.local import LocalBackend
from qwenvl_app.cli import doctor
from qwenvl_app.cli.doctor import Level
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.generation import Phase
from qwenvl_app.loading.checkpoint import find
from qwenvl_app.loading.load import load
from qwenvl_app.settings import load_settings
from tests.commands import invoke
from tests.hub import COMMITS, NAME, SHARDS, UNWANTED, Hub, publish
from tests.test_cli import ROOT, flask
from tests.waiting import until


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("published") / "master")


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(models={(NAME, "master"): published})
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield hub
    hub.close()


def cache(tmp_path: Path, revision: str = "master") -> Path:
    return tmp_path / "cache" / "models" / "Org--Some-Model.v1" / "snapshots" / revision


def wanted(published: Path) -> set[str]:
    return {path.name for path in published.iterdir()} - {"onnx", *UNWANTED}


def fail(name: str = NAME) -> str:
    with pytest.raises(ModelLoadError) as error:
        find(name)
    return str(error.value)


def test_a_model_is_downloaded_once(hub: Hub, published: Path, tmp_path: Path, caplog):
    """Every start asked the hub for its files, and with the hub away a model that was here failed.

    Nothing but what is needed comes, whatever paths the hub has: above all no pickle and no code.
    """
    caplog.set_level("INFO")
    hub.listed = ["../../outside.json", "/tmp/outside.json", "sub/../../outside.json"]
    assert load(NAME).model.config.model_type == "qwen3_vl"
    directory = cache(tmp_path)
    files = {path.name for path in directory.iterdir()}
    assert files == wanted(published) | {".downloaded.json"}
    for file in wanted(published):
        assert (directory / file).read_bytes() == (published / file).read_bytes()
    assert not list(tmp_path.rglob("outside.json"))
    assert f"taking revision master of {NAME} (newest commit {COMMITS[1]}): 12 files" in caplog.text
    assert "\r" not in caplog.text

    hub.requests.clear()
    assert load(NAME).model.config.model_type == "qwen3_vl"
    assert hub.requests == []
    hub.close()
    assert find(NAME).directory == directory
    assert f"revision master of {NAME} is here (newest commit {COMMITS[1]})" in caplog.text


def test_how_far_it_is(hub: Hub, capfd):
    hub.rate = 4e6
    told: list[str] = []
    find(NAME, say=told.append)
    assert told[0] == f"asking ModelScope for the files of {NAME}"
    assert told[1] == f"downloading {NAME}: 0.0 MB of 15.6 MB"
    assert told[-1] == f"downloading {NAME}: 15.6 MB of 15.6 MB"
    megabytes = [float(line.split()[2]) for line in told[1:]]
    assert megabytes == sorted(megabytes)
    assert len(megabytes) > 4
    assert "\r" not in "".join(capfd.readouterr())


def test_the_hub_is_not_told_who_asks(hub: Hub, tmp_path: Path):
    """The client kept a number for the machine, and would have sent a login that it found."""
    find(NAME)
    for request in hub.requests:
        assert not {"Authorization", "Cookie"} & set(request.headers)
        assert "session_id/0;" in request.headers["User-Agent"]
    assert not (tmp_path / "home").exists()


def test_a_connection_that_is_cut(hub: Hub, published: Path, tmp_path: Path):
    """It goes on at the byte where it was cut, and what comes together is what it should be."""
    hub.cut = {SHARDS[0]: [1_000_000, 3_000_000]}
    told: list[str] = []
    find(NAME, say=told.append)
    assert hub.asked(SHARDS[0]) == [0, 1_000_000, 3_000_000]
    assert (cache(tmp_path) / SHARDS[0]).read_bytes() == (published / SHARDS[0]).read_bytes()
    assert told[-1].endswith("15.6 MB of 15.6 MB")


def test_a_process_that_is_killed(hub: Hub, published: Path, tmp_path: Path):
    hub.rate = 1e6
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "download"]
    environ = os.environ | {"QWENVL_MODEL": NAME}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL)
    try:
        until(lambda: hub.sent.get(SHARDS[1], 0) >= 500_000, 60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    size = (cache(tmp_path) / f"{SHARDS[1]}.incomplete").stat().st_size
    assert size > 100_000
    assert doctor_says(hub) == (
        Level.WARN,
        f"{NAME} is not in ModelScope's cache yet, or not all of it; `flask --app wsgi download` "
        "gets it, or else the first start",
    )
    hub.rate = None
    find(NAME)
    assert hub.asked(SHARDS[1]) == [0, size]
    assert (cache(tmp_path) / SHARDS[1]).read_bytes() == (published / SHARDS[1]).read_bytes()
    level, text = doctor_says(hub)
    assert level is Level.OK
    assert text.startswith("complete; 3.9 million parameters")


def doctor_says(hub: Hub) -> tuple[Level, str]:
    """Of the model; it never asks the hub."""
    before = len(hub.requests)
    findings = list(doctor.examine(load_settings({}, model=NAME), "127.0.0.1:0"))
    assert len(hub.requests) == before
    found = next(finding for finding in findings if finding.about == "model")
    return found.level, found.text


def test_a_file_that_is_not_what_was_announced(hub: Hub, tmp_path: Path):
    hub.spoiled = {SHARDS[2]}
    assert fail() == (
        f"a file of {NAME} came several times otherwise than ModelScope had announced it, and was "
        "thrown away: start again; if that does not help, look for a proxy that changes files"
    )
    assert not list(cache(tmp_path).glob(f"{SHARDS[2]}*"))
    hub.spoiled, hub.requests = set(), []
    find(NAME)
    assert [len(hub.asked(file)) for file in SHARDS] == [0, 0, 1]


def test_what_another_download_left_is_verified(hub: Hub, tmp_path: Path):
    """``modelscope download`` has the same cache; a part of it that is wrong comes again."""
    config = HubConfig(token="")
    HubApi(config).download_repo(NAME, "model", allow_patterns=["*.safetensors"])
    damaged = cache(tmp_path) / SHARDS[0]
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    hub.requests.clear()
    find(NAME)
    assert [len(hub.asked(file)) for file in SHARDS] == [1, 0, 0]


@pytest.mark.parametrize("damage", ["lost", "cut", "no record"])
def test_what_has_gone_comes_again(hub: Hub, published: Path, tmp_path: Path, damage: str):
    """A lost generation_config.json would have changed every answer without a word."""
    find(NAME)
    file = cache(tmp_path) / "generation_config.json"
    if damage == "lost":
        file.unlink()
    elif damage == "cut":
        file.write_text("{}")
    else:
        (cache(tmp_path) / ".downloaded.json").write_text("[]")
    hub.requests.clear()
    find(NAME)
    assert file.read_bytes() == (published / file.name).read_bytes()
    assert sum(len(hub.asked(shard)) for shard in SHARDS) == 0


def test_a_revision_is_pinned(hub: Hub, published: Path, tmp_path: Path):
    old = tmp_path / "old"
    shutil.copytree(published, old)
    (old / "generation_config.json").write_text('{"eos_token_id": 1}')
    for revision in ("v1.0", COMMITS[0]):
        hub.models[NAME, revision] = old
    find(NAME)
    assert find(f"{NAME}@v1.0").directory == cache(tmp_path, "v1.0")
    assert json.loads((cache(tmp_path, "v1.0") / "generation_config.json").read_text()) == {
        "eos_token_id": 1
    }
    assert find(f"{NAME}@{COMMITS[0]}").directory.name == COMMITS[0]
    hub.close()
    for name in (NAME, f"{NAME}@v1.0", f"{NAME}@{COMMITS[0]}"):
        assert find(name).chat_template


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            f"{NAME}@v9",
            f"ModelScope has no revision v9 of {NAME}: name a tag, a branch or a commit of it "
            "after the @ in QWENVL_MODEL, or leave both out",
        ),
        (
            "Org/Other",
            "Org/Other is no directory here, and ModelScope does not have it, or not all of its "
            "revision master: look at the spelling",
        ),
        (f"{NAME}@../..", "the directory that QWENVL_MODEL names does not exist"),
        (f"{NAME}@", "the directory that QWENVL_MODEL names does not exist"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path, name: str, message: str):
    """An unknown revision is no error to the hub, which has an empty list for it."""
    assert fail(name) == message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            403,
            f"ModelScope gives {NAME} only to those who log in, which the service does not: "
            "download it by hand, and let QWENVL_MODEL name its directory",
        ),
        (
            500,
            "ModelScope answers with an error (ServerError); what has come is kept, and the next "
            "start goes on there",
        ),
    ],
)
def test_a_hub_that_refuses(hub: Hub, status: int, message: str):
    hub.status = status
    assert fail() == message


def test_a_hub_that_is_away(hub: Hub):
    hub.close()
    assert fail() == (
        f"ModelScope cannot be reached, and {NAME} is not here, or not all of it; what has come is "
        "kept, and the next start goes on there. Look at the network and the proxy, or let "
        "QWENVL_MODEL name a directory"
    )


def test_a_disk_that_is_too_small(hub: Hub):
    """It is told before the first byte, not after an hour."""
    hub.announced = {SHARDS[0]: 10**18}
    message = fail()
    assert message.startswith("1000000000.0 GB are still to be downloaded, and there are ")
    assert message.endswith(
        "free: make room, or let MODELSCOPE_CACHE name a directory on another disk"
    )
    assert not any(request.file for request in hub.requests)


def test_a_disk_that_is_full(hub: Hub, tmp_path: Path):
    cache(tmp_path).mkdir(parents=True)
    (cache(tmp_path) / f"{SHARDS[0]}.incomplete").symlink_to("/dev/full")
    assert fail() == (
        "the disk of MODELSCOPE_CACHE is full; what has come is kept, and the next start goes on "
        "there: make room first"
    )


@pytest.mark.parametrize("place", ["/sys/qwenvl", str(Path(__file__) / "cache")])
def test_a_cache_that_can_not_be_written(hub: Hub, monkeypatch, place: str):
    """/sys is closed to root too."""
    monkeypatch.setenv("MODELSCOPE_CACHE", place)
    message = fail()
    assert message.startswith("the directory that MODELSCOPE_CACHE names can't be written to (")
    assert message.endswith("); it must belong to the service's user")
    assert place not in message


def test_the_command(hub: Hub, tmp_path: Path):
    done = flask("download", QWENVL_MODEL=NAME)
    assert (done.returncode, "\r" in done.stderr) == (0, False), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"asking ModelScope for the files of {NAME}"
    assert lines[-1] == f"{NAME} is in {cache(tmp_path)}"
    assert f"taking revision master of {NAME}" in done.stderr
    hub.close()
    assert invoke("download", QWENVL_MODEL=NAME).returncode == 0
    done = invoke("download", QWENVL_MODEL="/nowhere")
    assert done.returncode == 1
    assert done.stderr == "qwenvl: the directory that QWENVL_MODEL names does not exist\n"


@pytest.mark.parametrize("trouble", ["none", "stall", "away"])
def test_a_download_ends_with_the_service(hub: Hub, trouble: str):
    """Its threads are such as Python waits for: a stop took as long as the download."""
    hub.rate = 1e6
    hub.stall = SHARDS[0] if trouble == "stall" else ""
    before = set(threading.enumerate())
    backend = LocalBackend(load_settings({}, model=NAME))
    until(lambda: hub.sent.get(SHARDS[0], 0) >= 300_000, 60, backend.status)
    if trouble == "away":
        hub.close()
        time.sleep(0.5)  # it has begun to try again, later and later
    backend.close()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith(("download", "local-backend")):
            thread.join(5)
            assert not thread.is_alive(), thread
    assert backend.status().phase is Phase.DRAINING
