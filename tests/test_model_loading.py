"""What is wrong with a model directory is said in a sentence; nothing hangs, nothing leaks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenvl_app import create_app
from qwenvl_app.backends.local import LocalBackend
from qwenvl_app.engine import checkpoint as checkpoints
from qwenvl_app.engine import model
from qwenvl_app.engine.checkpoint import DEMO
from qwenvl_app.engine.model import load
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.generation import Phase
from qwenvl_app.settings import load_settings
from tests.wire import GOOD, MULTIPART, ROUTE


def rewrite(file: str, **changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / file
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(content | changes), encoding="utf-8")

    return change


def remove(*files: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        for file in files:
            (directory / file).unlink()

    return change


def cut(file: str, share: float) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / file
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return change


def index(*shards: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        weight_map = {f"tensor{number}": shard for number, shard in enumerate(shards)}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")

    return change


def drop_a_tensor(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.visual.merger.linear_fc2.weight"]
    save_file(tensors, path, {"format": "pt"})


BROKEN = {
    "no config": (remove("config.json"), "the model directory lacks config.json"),
    "no preprocessor": (remove("preprocessor_config.json"), "lacks preprocessor_config.json"),
    "no tokenizer config": (remove("tokenizer_config.json"), "lacks tokenizer_config.json"),
    "no tokenizer": (remove("tokenizer.json", "vocab.json"), "lacks tokenizer.json and vocab.json"),
    "no template": (remove("chat_template.jinja"), "no chat template: looked in"),
    "no weights": (remove("model.safetensors"), "the model directory lacks model.safetensors"),
    "half of the weights": (cut("model.safetensors", 0.5), "model.safetensors is truncated"),
    "a header's worth": (cut("model.safetensors", 0.0001), "model.safetensors is truncated"),
    "empty weights": (cut("model.safetensors", 0), "model.safetensors is truncated"),
    "half a config": (cut("config.json", 0.5), "config.json is not valid JSON"),
    "another model": (rewrite("config.json", model_type="llama"), "model_type 'llama'"),
    "a missing shard": (
        index("model.safetensors", "model-00002-of-00002.safetensors"),
        "the model directory lacks model-00002-of-00002.safetensors",
    ),
    "an empty index": (index(), "has no weight_map"),
    "another tokenizer": (rewrite("config.json", image_token_id=7), "not of one checkpoint"),
    "a missing tensor": (drop_a_tensor, "the weights lack 1 tensors, the first is model.visual"),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_directories(checkpoint: Path, name: str):
    damage, message = BROKEN[name]
    damage(checkpoint)
    with pytest.raises(ModelLoadError, match=message.replace("(", r"\(")) as error:
        load(str(checkpoint))
    assert str(checkpoint) not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/does/not/exist", "the directory that MODEL names does not exist"),
        ("no-such-thing", "the directory that MODEL names does not exist"),
        (str(Path(__file__)), "MODEL is a file"),
    ],
)
def test_names_that_are_no_directory(name: str, message: str):
    with pytest.raises(ModelLoadError, match=message):
        load(name)


def test_a_modelscope_id_is_downloaded_and_then_loaded_as_a_directory(monkeypatch, checkpoint):
    """The hub itself can't be reached from here: a stand-in for its one function."""
    import modelscope

    asked: list[str] = []

    def snapshot_download(name: str) -> str:
        asked.append(name)
        return str(checkpoint)

    monkeypatch.setattr(modelscope, "snapshot_download", snapshot_download)
    assert load("Qwen/Qwen3-VL-8B-Instruct").model.config.model_type == "qwen3_vl"
    assert asked == ["Qwen/Qwen3-VL-8B-Instruct"]


def test_a_download_that_fails_is_told(monkeypatch):
    import modelscope

    def snapshot_download(name: str) -> str:
        raise ConnectionError("https://secret.example/path")

    monkeypatch.setattr(modelscope, "snapshot_download", snapshot_download)
    with pytest.raises(ModelLoadError, match=r"could not be had from ModelScope \(Connection"):
        load("Qwen/Qwen3-VL-8B-Instruct")


def test_a_template_in_json_will_do(checkpoint: Path):
    """The published checkpoints have chat_template.json; newer tools write the .jinja."""
    template = (checkpoint / "chat_template.jinja").read_text(encoding="utf-8")
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert checkpoints.check(checkpoint) == template


def wait_for(backend: LocalBackend, phase: Phase) -> None:
    deadline = time.monotonic() + 60
    while backend.status().phase is not phase:
        assert time.monotonic() < deadline, backend.status()
        time.sleep(0.01)


def test_a_failed_load_answers_500_and_says_why_to_the_operator(checkpoint: Path, caplog):
    (checkpoint / "model.safetensors").write_bytes(b"")
    backend = LocalBackend(load_settings({}, model=str(checkpoint)))
    client = create_app(load_settings({}), backend).test_client()
    wait_for(backend, Phase.FAILED)
    response = client.post(ROUTE, data=GOOD, content_type=MULTIPART)
    assert response.status_code == 500
    assert response.json["detail"].startswith(
        "服务器内部错误: 模型加载失败或已停止工作，请联系管理员。"
    )
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json["phase"] == "failed"
    assert "model.safetensors is truncated" in ready.json["message"]
    assert "model.safetensors is truncated" in caplog.text
    backend.close()


def test_an_unforeseen_error_while_loading_is_logged_not_shown(monkeypatch, caplog):
    def explode(_name: str, **_options: str) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(model, "load", explode)
    backend = LocalBackend(load_settings({}))
    wait_for(backend, Phase.FAILED)
    assert "secret" not in backend.status().message
    assert "secret" in caplog.text
    backend.close()


def test_closing_while_loading(monkeypatch):
    real = model.load

    def slow(name: str, **_options: str):
        time.sleep(0.2)
        return real(name)

    monkeypatch.setattr(model, "load", slow)
    backend = LocalBackend(load_settings({}))
    backend.close()
    assert backend.status().phase is Phase.DRAINING
