"""A Hugging Face id, with the real client against a stand-in for the hub."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

from qwenvl_app.backends.local import LocalBackend
from qwenvl_app.cli import doctor
from qwenvl_app.cli.doctor import Level
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.loading.checkpoint import find
from qwenvl_app.loading.load import load
from qwenvl_app.settings import load_settings
from tests.hub import NAME, SHARDS, UNWANTED, Hub, commit, publish
from tests.test_cli import ROOT, flask
from tests.waiting import until

MODEL = f"hf:{NAME}"


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("published") / "main")


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client reads its environment when it is imported: ``test_the_command`` sets that."""
    hub = Hub(models={(NAME, "main"): published})
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DOWNLOAD_TIMEOUT": 2,
        "HF_HUB_DISABLE_TELEMETRY": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.close()


def environ(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": f"{tmp_path}/cache"}


def cache(tmp_path: Path, published: Path) -> Path:
    return tmp_path / "cache" / "models--Org--Some-Model.v1" / "snapshots" / commit(published)


def wanted(published: Path) -> set[str]:
    return {path.name for path in published.iterdir()} - {"onnx", *UNWANTED}


def fail(name: str = MODEL) -> str:
    with pytest.raises(ModelLoadError) as error:
        find(name)
    return str(error.value)


def test_a_model_is_downloaded_once(hub: Hub, published: Path, tmp_path: Path, caplog):
    """Only what is needed comes, whatever paths the hub has: above all no pickle and no code."""
    caplog.set_level("INFO")
    hub.listed = ["../../outside.json", "/tmp/outside.json", "sub/../../outside.json"]
    told: list[str] = []
    assert load(MODEL, say=told.append).model.config.model_type == "qwen3_vl"
    directory = cache(tmp_path, published)
    assert {path.name for path in directory.iterdir()} == wanted(published) | {".downloaded.json"}
    for file in wanted(published):
        assert (directory / file).read_bytes() == (published / file).read_bytes()
    assert not list(tmp_path.rglob("outside.json"))
    assert f"taking revision main of {NAME} (newest commit {commit(published)})" in caplog.text
    assert "/cdn/" not in caplog.text
    assert f"asking Hugging Face for the files of {NAME}" in told
    assert f"downloading {NAME}: 15.6 MB of 15.6 MB" in told

    hub.requests.clear()
    assert load(MODEL).model.config.model_type == "qwen3_vl"
    hub.close()
    assert find(MODEL).directory == directory
    assert hub.requests == []


def test_what_the_hub_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    """The operator's token, and where the bytes come from not even that."""
    hub.token = "hf_secret"
    assert fail() == (
        f"Hugging Face gives {NAME} only to those who log in, and may have agreed to its terms: "
        "let HF_TOKEN hold such a user's token, or download it by hand, and let QWENVL_MODEL name "
        "its directory"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    find(MODEL)
    elsewhere = [request for request in hub.requests if request.path.startswith("/cdn")]
    assert len(elsewhere) == len(SHARDS)
    for request in hub.requests[1:]:
        headers = {name.lower(): value for name, value in request.headers.items()}
        assert "torch" not in headers["user-agent"]
        assert ("authorization" in headers) == (request not in elsewhere)


def test_a_connection_that_is_cut(hub: Hub, published: Path, tmp_path: Path):
    """It goes on at the byte where it was cut, and what comes together is what it should be."""
    hub.cut = {SHARDS[0]: [1_000_000, 3_000_000], "config.json": [100]}
    told: list[str] = []
    find(MODEL, say=told.append)
    assert hub.asked(SHARDS[0]) == [0, 1_000_000, 3_000_000]
    for file in (SHARDS[0], "config.json"):
        expected = (published / file).read_bytes()
        assert (cache(tmp_path, published) / file).read_bytes() == expected
    assert told[-1].endswith("15.6 MB of 15.6 MB")
    megabytes = [float(line.split()[2]) for line in told[1:]]
    assert max(megabytes) == 15.6


def test_a_process_that_is_killed(hub: Hub, published: Path, tmp_path: Path, monkeypatch):
    """Without the hub, half of a model is not taken for a copy of the client's."""
    hub.rate = 1e6
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "download"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environ(hub, tmp_path) | {"QWENVL_MODEL": MODEL},
        stdout=subprocess.DEVNULL,
    )
    try:
        until(lambda: hub.sent.get(SHARDS[1], 0) >= 500_000, 60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    size = (cache(tmp_path, published) / f"{SHARDS[1]}.incomplete").stat().st_size
    assert size > 100_000
    findings = doctor.examine(load_settings({}, model=MODEL), "127.0.0.1:0")
    found = next(finding for finding in findings if finding.about == "model")
    assert found.level is Level.WARN
    assert found.text.startswith(f"{MODEL} is not in Hugging Face's cache yet, or not all of it")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to download it" in fail()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.rate, hub.status = None, 500
    assert fail() == (
        "Hugging Face answers with an error (status 500); what has come is kept, and the next "
        "start goes on there"
    )
    hub.status = None
    find(MODEL)
    assert hub.asked(SHARDS[1]) == [0, size]
    path = cache(tmp_path, published) / SHARDS[1]
    assert path.read_bytes() == (published / SHARDS[1]).read_bytes()


def test_two_at_a_time(hub: Hub, published: Path, tmp_path: Path):
    """A reload, or the command beside the service: both wrote into one half of a file."""
    hub.rate = 4e6
    told: list[str] = []
    first = threading.Thread(target=find, args=(MODEL,))
    first.start()
    until(lambda: hub.sent.get(SHARDS[0]))
    assert find(MODEL, say=told.append).directory == cache(tmp_path, published)
    first.join()
    assert f"another process downloads {NAME}" in told
    assert [len(hub.asked(shard)) for shard in SHARDS] == [1, 1, 1]


@pytest.mark.parametrize("file", [SHARDS[2], "tokenizer_config.json"])
def test_a_file_that_is_not_what_was_announced(
    hub: Hub, published: Path, tmp_path: Path, file: str
):
    """Weights have a SHA-256, small files the name that git gives their content."""
    hub.spoiled = {file}
    assert fail() == (
        f"a file of {NAME} came several times otherwise than Hugging Face had announced it, and "
        "was thrown away: start again; if that does not help, look for a proxy that changes files"
    )
    assert not list(cache(tmp_path, published).glob(f"{file}*"))
    whole = [shard for shard in SHARDS if (cache(tmp_path, published) / shard).exists()]
    hub.spoiled, hub.requests = set(), []
    find(MODEL)
    assert not any(hub.asked(shard) for shard in whole)
    for name in (file, *SHARDS):
        assert (cache(tmp_path, published) / name).read_bytes() == (published / name).read_bytes()


def test_what_has_gone_comes_again(hub: Hub, published: Path, tmp_path: Path):
    find(MODEL)
    (cache(tmp_path, published) / "generation_config.json").unlink()
    damaged = cache(tmp_path, published) / SHARDS[0]
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    hub.requests.clear()
    find(MODEL)
    assert [len(hub.asked(shard)) for shard in SHARDS] == [1, 0, 0]
    for file in ("generation_config.json", SHARDS[0]):
        got = (cache(tmp_path, published) / file).read_bytes()
        assert got == (published / file).read_bytes()


def test_a_revision_is_pinned(hub: Hub, published: Path, tmp_path: Path):
    old = tmp_path / "old"
    shutil.copytree(published, old)
    (old / "generation_config.json").write_text('{"eos_token_id": 1}')
    hub.models[NAME, "v1.0"] = old
    find(MODEL)
    for revision in ("v1.0", commit(old)):
        found = find(f"{MODEL}@{revision}").directory
        assert found == cache(tmp_path, old)
        assert json.loads((found / "generation_config.json").read_text()) == {"eos_token_id": 1}
    hub.close()
    for name in (MODEL, f"{MODEL}@v1.0", f"{MODEL}@{commit(old)}", f"{MODEL}@{commit(published)}"):
        assert find(name).chat_template


def test_what_the_client_downloaded_needs_no_hub(hub: Hub, published: Path, tmp_path: Path):
    """``hf download`` has the same cache. With the hub, what it left is compared with hashes."""
    snapshot_download(NAME, ignore_patterns=["README.md", "*.bin", "*.py", "onnx/*"])
    directory = cache(tmp_path, published)
    assert (directory / SHARDS[0]).is_symlink()
    hub.status = 503
    assert "status 503" in fail()
    hub.status = None
    hub.close()
    assert find(MODEL).directory == directory
    (directory / "generation_config.json").unlink()
    assert fail() == AWAY
    again = Hub(hub.port, models=hub.models)
    try:
        find(MODEL)
    finally:
        again.close()
    assert sum(len(again.asked(shard)) for shard in SHARDS) == 0
    assert (directory / "generation_config.json").is_file()


AWAY = (
    f"Hugging Face cannot be reached, and {NAME} is not here, or not all of it; what has come is "
    "kept, and the next start goes on there. Look at the network and the proxy, or let "
    "QWENVL_MODEL name a directory"
)


def test_a_hub_that_is_away(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fail() == (
        f"{NAME} is not here, or not all of it, and HF_HUB_OFFLINE forbids to download it: unset "
        "that for one start, or let QWENVL_MODEL name a directory"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.close()
    assert fail() == AWAY


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            f"{MODEL}@v9",
            f"Hugging Face has no revision v9 of {NAME}: name a tag, a branch or a commit of it "
            "after the @ in QWENVL_MODEL, or leave both out",
        ),
        (
            "hf:Org/Other",
            "Org/Other is no directory here, and Hugging Face does not have it, or not all of its "
            "revision main: look at the spelling, or let HF_TOKEN hold the token of one who may "
            "see it",
        ),
        ("hf:Org/Oth--er", "Org/Oth--er is no directory here, and Hugging Face does not have it"),
        ("hf:Qwen3-VL", "what QWENVL_MODEL has after hf: is no name on Hugging Face; such are"),
        (f"{MODEL}@../..", "what QWENVL_MODEL has after hf: is no name on Hugging Face; such are"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path, name: str, message: str):
    assert fail(name).startswith(message)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({}, "KeyError"),
        ([], "TypeError"),
        ({"id": NAME, "sha": "../..", "siblings": []}, "ValueError"),
        ({"id": NAME, "sha": "0" * 40, "siblings": [{"rfilename": "config.json"}]}, "ValueError"),
    ],
)
def test_a_mirror_that_is_none(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, error: str
):
    """Whatever answers with 200, such as a login page of the network."""
    monkeypatch.setattr(
        "tests.hub._Handler._hugging_listing", lambda self, *_, **__: self._json(answer)
    )
    assert fail().startswith(f"Hugging Face answers with an error ({error})")
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_is_too_small(hub: Hub):
    hub.announced = {SHARDS[0]: 10**18}
    assert fail().endswith("free: make room, or let HF_HUB_CACHE name a directory on another disk")
    assert not any(request.file for request in hub.requests)


def test_a_disk_that_is_full(hub: Hub, published: Path, tmp_path: Path):
    cache(tmp_path, published).mkdir(parents=True)
    (cache(tmp_path, published) / f"{SHARDS[0]}.incomplete").symlink_to("/dev/full")
    assert fail().startswith("the disk of HF_HUB_CACHE is full; what has come is kept")


def test_a_cache_that_can_not_be_written(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/sys/qwenvl")
    message = fail()
    assert message.startswith("the directory that HF_HUB_CACHE names can't be written to (")
    assert "/sys" not in message


@pytest.mark.slow  # test_hub.py has it with ModelScope, and the process that is killed with this
def test_the_command(hub: Hub, published: Path, tmp_path: Path):
    """A mirror is named by the client's own variable."""
    done = flask("download", QWENVL_MODEL=MODEL, **environ(hub, tmp_path))
    assert (done.returncode, "\r" in done.stderr) == (0, False), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"asking Hugging Face for the files of {NAME}"
    assert lines[-1] == f"{MODEL} is in {cache(tmp_path, published)}"


@pytest.mark.parametrize("trouble", ["none", "stall", "away"])
def test_a_download_ends_with_the_service(hub: Hub, trouble: str):
    hub.rate = 1e6
    hub.stall = SHARDS[0] if trouble == "stall" else ""
    before = set(threading.enumerate())
    backend = LocalBackend(load_settings({}, model=MODEL))
    until(lambda: hub.sent.get(SHARDS[0], 0) >= 300_000, 60, backend.status)
    if trouble == "away":
        hub.close()
    backend.close()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith(("download", "local-backend")):
            thread.join(5)
            assert not thread.is_alive(), thread
