"""What is wrong with a model directory is said in a sentence; nothing hangs, nothing leaks."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl_app import create_app
from qwenvl_app.backends.local import LocalBackend
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.generation import Phase
from qwenvl_app.loading import checkpoint as checkpoints
from qwenvl_app.loading import load as loading
from qwenvl_app.loading.checkpoint import DEMO
from qwenvl_app.loading.footprint import estimate
from qwenvl_app.loading.load import load
from qwenvl_app.prompts.builder import PromptBuilder
from qwenvl_app.settings import load_settings
from tests import templates
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


def change_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def save(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return save


def write(file: str, content: bytes) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_bytes(content)

    return change


def rename(file: str, name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / file).rename(directory / name) and None


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        for each in changes:
            each(directory)

    return change


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def inner(part: str, **changes: object) -> Callable[[Path], None]:
    """Change ``part`` of config.json."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content[part] |= changes
        path.write_text(json.dumps(content), encoding="utf-8")

    return change


def without_the_image_token(directory: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = directory / file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("<|image_pad|>", "<|picture|>"), encoding="utf-8")


def index_of_all(directory: Path) -> None:
    names = list(load_file(directory / WEIGHTS))
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}), encoding="utf-8")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4915962496\n"
WEIGHTS = "model.safetensors"
WEIGHT = "model.visual.merger.linear_fc2.weight"
AGAIN = "copy or download it again"
NO_LIMITS = (
    "preprocessor_config.json has no size with shortest_edge and longest_edge, both numbers above "
    "0; take the checkpoint's own"
)

# What is done to a checkpoint, and the whole of what is said. No path is in it.
BROKEN = {
    "no config": (remove("config.json"), "the model directory lacks config.json"),
    "no preprocessor": (
        remove("preprocessor_config.json"),
        "the model directory lacks preprocessor_config.json",
    ),
    "no tokenizer config": (
        remove("tokenizer_config.json"),
        "the model directory lacks tokenizer_config.json",
    ),
    "no tokenizer": (
        remove("tokenizer.json", "vocab.json"),
        "the model directory lacks tokenizer.json and vocab.json",
    ),
    "half a tokenizer": (
        cut("tokenizer.json", 0.5),
        f"tokenizer.json is not valid JSON; {AGAIN}",
    ),
    "another tokenizer's file": (
        write("tokenizer.json", b"{}"),
        "the tokenizer's files can't be used, the log has why; copy or download all that is not "
        "weights again",
    ),
    "a tokenizer without pictures": (
        without_the_image_token,
        "the tokenizer has no <|image_pad|>; copy or download the checkpoint's own tokenizer",
    ),
    "another tokenizer": (
        rewrite("config.json", image_token_id=7),
        "the tokenizer's <|image_pad|> is 1036, config.json says 7: the files are not of one "
        "checkpoint",
    ),
    "no template": (
        remove("chat_template.jinja"),
        "no chat template: looked in processor_config.json, chat_template.json, "
        "chat_template.jinja, tokenizer_config.json",
    ),
    "templates of which none is the default": (
        both(
            remove("chat_template.jinja"),
            rewrite("tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}]),
        ),
        "tokenizer_config.json has several chat templates, and none is named default",
    ),
    "a template in UTF-16": (
        write("chat_template.jinja", "{{ messages }}".encode("utf-16")),
        f"chat_template.jinja is not UTF-8; {AGAIN}",
    ),
    "JSON as Notepad saves it": (
        lambda directory: (
            (directory / "tokenizer_config.json").write_text(
                "\ufeff" + (directory / "tokenizer_config.json").read_text()
            )
            and None
        ),
        "tokenizer_config.json begins with a byte order mark; save it as UTF-8 without one",
    ),
    "another kind of processor": (
        rewrite("preprocessor_config.json", image_processor_type="CLIPImageProcessor"),
        "preprocessor_config.json has image_processor_type 'CLIPImageProcessor', which is no "
        "Qwen-VL's; take the checkpoint's own preprocessor_config.json",
    ),
    "sides in place of pixels": (
        rewrite("preprocessor_config.json", size={"height": 448, "width": 448}),
        NO_LIMITS,
    ),
    "half of the limits": (
        rewrite("preprocessor_config.json", size={"longest_edge": 50000}),
        NO_LIMITS,
    ),
    "a limit of nothing": (
        rewrite("preprocessor_config.json", size={"longest_edge": 0, "shortest_edge": 0}),
        NO_LIMITS,
    ),
    "a limit in quotes": (
        rewrite("preprocessor_config.json", size={"longest_edge": "50000", "shortest_edge": 1}),
        NO_LIMITS,
    ),
    "limits that transformers can't tell apart": (
        rewrite(
            "preprocessor_config.json",
            size={"longest_edge": 9, "shortest_edge": 9, "max_pixels": 9, "min_pixels": 9},
        ),
        "preprocessor_config.json can't be used, the log has why; take the checkpoint's own",
    ),
    "a template without pictures": (
        write("chat_template.jinja", b"{{ messages[0].content[1].text }}"),
        "the chat template does not place one image and then the user's text; take the "
        "checkpoint's own",
    ),
    "a template with an error": (
        write("chat_template.jinja", b"{% if"),
        "the chat template does not place one image and then the user's text; take the "
        "checkpoint's own",
    ),
    "half a config": (cut("config.json", 0.5), f"config.json is not valid JSON; {AGAIN}"),
    "a list": (write("config.json", b"[]"), f"config.json is not a JSON object; {AGAIN}"),
    "half a generation config": (
        cut("generation_config.json", 0.5),
        f"generation_config.json is not valid JSON; {AGAIN}",
    ),
    "no end": (
        write("generation_config.json", b"{}"),
        "generation_config.json has no eos_token_id: no answer would ever end",
    ),
    "another model": (
        rewrite("config.json", model_type="llama"),
        "config.json has model_type 'llama'; supported are qwen3_vl, qwen3_vl_moe, "
        "qwen2_5_vl, qwen3_5, qwen3_5_moe",
    ),
    "sliding windows": (
        inner("text_config", use_sliding_window=True),
        "config.json has use_sliding_window on, which is not supported",
    ),
    "a text model": (
        rewrite("config.json", vision_config=None),
        "config.json has no vision_config; take the checkpoint's own config.json",
    ),
    "an unknown dtype": (
        inner("text_config", dtype="int3"),
        "config.json has dtype 'int3'; it must be one of float32, bfloat16, float16",
    ),
    "gptq": (
        rewrite("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "the weights are quantised with gptq, which needs another package: "
        "pip install gptqmodel optimum; or take the checkpoint that is not quantised",
    ),
    "awq": (
        rewrite("config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        "the weights are quantised with awq, which needs another package: pip install gptqmodel; "
        "or take the checkpoint that is not quantised",
    ),
    "an unknown quantisation": (
        rewrite("config.json", quantization_config={"quant_method": "mystery"}),
        "config.json has quant_method 'mystery'; supported are awq, gptq, bitsandbytes, "
        "compressed-tensors, fp8",
    ),
    "a smaller model's config": (
        inner("text_config", hidden_size=96),
        "the weights do not fit config.json: model.language_model.embed_tokens.weight is "
        "(1088, 192) and should be (1088, 96); the files are not of one checkpoint",
    ),
    "another processor": (
        rewrite("preprocessor_config.json", patch_size=14),
        "preprocessor_config.json has patch_size 14, config.json has 16: the files are not of one "
        "checkpoint",
    ),
    "a processor that leaves out a step": (
        rewrite("preprocessor_config.json", do_normalize=False),
        "preprocessor_config.json has do_normalize off; it must be on",
    ),
    "nothing": (
        empty,
        "the model directory is empty; copy or download the checkpoint into it",
    ),
    "no weights": (
        remove("model.safetensors"),
        f"the model directory lacks model.safetensors; {AGAIN}",
    ),
    "half of the weights": (
        cut("model.safetensors", 0.5),
        f"model.safetensors is truncated or damaged; {AGAIN}",
    ),
    "a header's worth": (
        cut("model.safetensors", 0.0001),
        f"model.safetensors is truncated or damaged; {AGAIN}",
    ),
    "empty weights": (
        cut("model.safetensors", 0),
        f"model.safetensors is truncated or damaged; {AGAIN}",
    ),
    "git without lfs": (
        write("model.safetensors", POINTER),
        "model.safetensors is a git-lfs pointer and not the file: run `git lfs pull` in the "
        "directory, or download the checkpoint again",
    ),
    "git without lfs, the tokenizer": (
        write("tokenizer.json", POINTER),
        "tokenizer.json is a git-lfs pointer and not the file: run `git lfs pull` in the "
        "directory, or download the checkpoint again",
    ),
    "pickled weights": (
        rename("model.safetensors", "pytorch_model.bin"),
        "the weights are pickled (pytorch_model.bin), which may run any code and is not loaded; "
        "take the checkpoint in safetensors",
    ),
    "gguf": (
        rename("model.safetensors", "q4_k_m.gguf"),
        "q4_k_m.gguf is GGUF, which is for llama.cpp; take the checkpoint in safetensors",
    ),
    "nothing but gguf": (
        both(empty, write("q4_k_m.gguf", b"GGUF")),
        "q4_k_m.gguf is GGUF, which is for llama.cpp; take the checkpoint in safetensors",
    ),
    "half a download of Hugging Face": (
        both(
            remove("model.safetensors"),
            write(".cache/huggingface/download/Zx.incomplete", b"half"),
        ),
        "the model directory lacks model.safetensors: its download has not finished; start it "
        "again, it goes on where it stopped",
    ),
    "half a download of ModelScope": (
        both(
            index("model.safetensors", "model-00002-of-00002.safetensors"),
            write("._____temp/model-00002-of-00002.safetensors", b"half"),
        ),
        "the model directory lacks model-00002-of-00002.safetensors: its download has not "
        "finished; start it again, it goes on where it stopped",
    ),
    "a missing shard": (
        index("model.safetensors", "model-00002-of-00002.safetensors"),
        f"the model directory lacks model-00002-of-00002.safetensors; {AGAIN}",
    ),
    "shards without an index": (
        rename("model.safetensors", "model-00001-of-00002.safetensors"),
        f"the model directory lacks model.safetensors.index.json; {AGAIN}",
    ),
    "an empty index": (index(), f"model.safetensors.index.json has no weight_map; {AGAIN}"),
    "an index that leads outside": (
        index("../elsewhere.safetensors"),
        "model.safetensors.index.json names '../elsewhere.safetensors', which is no file beside it",
    ),
    "another checkpoint's index": (
        index("model.safetensors"),
        "model.safetensors lacks 1 tensors that model.safetensors.index.json says it has, the "
        f"first is tensor0: the files are not of one checkpoint; {AGAIN}",
    ),
    "one limit in two places": (
        rewrite(
            "preprocessor_config.json", size={"max_pixels": 9, "min_pixels": 1}, max_pixels=50000
        ),
        "preprocessor_config.json can't be used, the log has why; take the checkpoint's own",
    ),
    "an index without metadata": (
        index_of_all,
        f"model.safetensors.index.json has no metadata; {AGAIN}",
    ),
    "a missing tensor": (
        change_tensors(lambda tensors: tensors.pop(WEIGHT)),
        f"the weights lack 1 tensors, the first is {WEIGHT}",
    ),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_directories(checkpoint: Path, name: str):
    damage, message = BROKEN[name]
    damage(checkpoint)
    with pytest.raises(ModelLoadError) as error:
        load(str(checkpoint))
    assert str(error.value) == message
    assert str(checkpoint) not in str(error.value)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As nobody, if this is root, whom nothing is forbidden."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("", "the model directory"),
        ("config.json", "config.json"),
        ("chat_template.jinja", "chat_template.jinja"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_no_permission(file: str, what: str):
    """Copied by root, served by another user: the first thing that goes wrong under systemd."""
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        Path(parent).chmod(0o755)
        directory = Path(shutil.copytree(DEMO, Path(parent) / "checkpoint"))
        (directory / file).chmod(0)
        with unprivileged(), pytest.raises(ModelLoadError) as error:
            checkpoints.find(str(directory))
        (directory / file).chmod(0o755)
    assert str(error.value) == (
        f"{what} cannot be read (Permission denied); it must be readable for the service's user"
    )


def test_a_directory_in_a_directory_that_may_not_be_entered():
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        Path(parent).chmod(0)
        with (
            unprivileged(),
            pytest.raises(ModelLoadError, match="that QWENVL_MODEL names cannot be read"),
        ):
            checkpoints.find(f"{parent}/checkpoint")
        Path(parent).chmod(0o755)


def test_a_wrong_total_size_is_no_reason_to_refuse(checkpoint: Path):
    """Re-saved checkpoints often have one; whether all tensors are there is looked at itself."""
    names = list(load_file(checkpoint / "model.safetensors"))
    content = {"metadata": {"total_size": 7}, "weight_map": dict.fromkeys(names, WEIGHTS)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(content))
    checkpoints.find(str(checkpoint))


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.language_model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")


def test_weights_that_are_not_numbers_are_told_before_anybody_asks(checkpoint: Path, caplog):
    """Every request failed, and readiness said that all was well."""
    change_tensors(spoil)(checkpoint)
    backend = LocalBackend(load_settings({}, model=str(checkpoint)))
    wait_for(backend, Phase.FAILED)
    assert backend.status().message == (
        "the model fails on a test picture: if the log says that logits are not finite, its "
        "weights are damaged; copy or download them again"
    )
    assert "logits are not finite (request warm-up)" in caplog.text
    backend.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/does/not/exist", "the directory that QWENVL_MODEL names does not exist"),
        ("no-such-thing", "the directory that QWENVL_MODEL names does not exist"),
        (str(Path(__file__)), "QWENVL_MODEL is a file"),
    ],
)
def test_names_that_are_no_directory(name: str, message: str):
    with pytest.raises(ModelLoadError, match=message):
        load(name)


def test_a_template_in_json_will_do(checkpoint: Path):
    """The published checkpoints have chat_template.json; newer tools write the .jinja."""
    template = (checkpoint / "chat_template.jinja").read_text(encoding="utf-8")
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert checkpoints.find(str(checkpoint)).chat_template == template


def kept_in(file: str, template: str) -> Callable[[Path], None]:
    """The template, in ``file`` alone, in one of the forms that tools have written."""
    others = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    return {
        "chat_template.jinja": write("chat_template.jinja", template.encode()),
        "a byte order mark": write("chat_template.jinja", ("\ufeff" + template).encode()),
        "CRLF": write("chat_template.jinja", template.replace("\n", "\r\n").encode()),
        "processor_config.json": write(
            "processor_config.json", json.dumps({"chat_template": template}).encode()
        ),
        "named": rewrite("tokenizer_config.json", chat_template=others),
        "named, as an object": rewrite(
            "tokenizer_config.json", chat_template={"default": template, "rag": "x"}
        ),
        "JSON, named": write("chat_template.json", json.dumps({"chat_template": others}).encode()),
        "a byte order mark in JSON": rewrite(
            "tokenizer_config.json", chat_template="\ufeff" + template
        ),
    }[file]


@pytest.mark.parametrize(
    "file",
    [
        *("chat_template.jinja", "a byte order mark", "CRLF", "processor_config.json", "named"),
        *("named, as an object", "JSON, named", "a byte order mark in JSON"),
    ],
)
def test_wherever_the_template_is_the_prompt_is_the_same(checkpoint: Path, file: str):
    """A byte order mark, which editors leave, was a token of every prompt."""
    template = templates.published("qwen3_vl")
    expected = templates.build(
        PromptBuilder(load("demo").tokenizer, template, 2), "描述", (1, 4, 4)
    )
    remove("chat_template.jinja")(checkpoint)
    kept_in(file, template)(checkpoint)
    assert templates.build(load(str(checkpoint)).prompts, "描述", (1, 4, 4)) == expected


def test_of_several_templates_it_is_transformers_one(checkpoint: Path):
    """AutoProcessor's order, which the replaced service had."""
    remove("chat_template.jinja")(checkpoint)
    for source, change in (
        ("tokenizer", rewrite("tokenizer_config.json", chat_template="tokenizer")),
        ("jinja", write("chat_template.jinja", b"jinja")),
        ("json", write("chat_template.json", b'{"chat_template": "json"}')),
        ("processor", write("processor_config.json", b'{"chat_template": "processor"}')),
    ):
        change(checkpoint)
        assert checkpoints.find(str(checkpoint)).chat_template == source


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

    monkeypatch.setattr(loading, "load", explode)
    backend = LocalBackend(load_settings({}))
    wait_for(backend, Phase.FAILED)
    assert "secret" not in backend.status().message
    assert "secret" in caplog.text
    backend.close()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["Python", "CUDA", "CPU"],
)
def test_memory_that_runs_out_while_loading(monkeypatch, error: Exception):
    """Something else took it meanwhile: "an unexpected error" helped nobody."""

    def explode(_name: str, **_options: object) -> None:
        raise error

    monkeypatch.setattr(loading, "load", explode)
    backend = LocalBackend(load_settings({}))
    wait_for(backend, Phase.FAILED)
    assert backend.status().message.startswith("the memory ran out while loading: ")
    backend.close()


def test_a_model_that_does_not_fit_is_not_loaded(monkeypatch, caplog):
    """It died minutes later, or in the fourth request."""
    monkeypatch.setattr("qwenvl_app.loading.devices.free_memory", lambda _device: 300 * 2**20)
    monkeypatch.setattr(loading, "load", None)
    backend = LocalBackend(load_settings({}, device="cpu"))
    wait_for(backend, Phase.FAILED)
    message = backend.status().message
    assert message.startswith("not enough memory: 300 MiB free; weights 16 MiB, ")
    assert "; the weights do not fit; what would fit: " in message
    assert message in caplog.text
    backend.close()


def test_the_largest_picture_that_fits_is_told(monkeypatch):
    """And with it, the service starts."""
    free = 900 * 2**20
    monkeypatch.setattr("qwenvl_app.loading.devices.free_memory", lambda _device: free)
    backend = LocalBackend(load_settings({}, device="cpu"))
    wait_for(backend, Phase.FAILED)
    found = re.search(r"QWENVL_MAX_IMAGE_MEGAPIXELS=([\d.]+)", backend.status().message)
    backend.close()
    assert found
    backend = LocalBackend(load_settings({}, device="cpu", max_image_megapixels=float(found[1])))
    wait_for(backend, Phase.READY)
    backend.close()


def test_an_image_processor_among_all_processors(checkpoint: Path):
    """Newer tools save processor_config.json alone; where both are, transformers takes that."""
    own = checkpoint / "preprocessor_config.json"
    settings = json.loads(own.read_text())
    own.unlink()
    newer = {"image_processor": settings, "processor_class": "Qwen3VLProcessor"}
    (checkpoint / "processor_config.json").write_text(json.dumps(newer))
    loaded = load(str(checkpoint))
    assert loaded.patcher.side == settings["patch_size"]
    assert (
        estimate(checkpoints.find(str(checkpoint)), "auto", 1e9).pixels
        == settings["size"]["longest_edge"]
    )
    (checkpoint / "processor_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"lacks preprocessor_config\.json"):
        checkpoints.find(str(checkpoint))


@pytest.mark.parametrize(
    "kind",
    [
        *("Qwen2_5_VLImageProcessor", "Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"),
        *("Qwen2VLImageProcessorPil", "Qwen3VLImageProcessorFast", None),
    ],
)
def test_whatever_the_image_processor_was_called(checkpoint: Path, kind: str | None):
    """Qwen2.5-VL's was called so for a while, and is in the files of those who tuned it then."""
    rewrite("preprocessor_config.json", image_processor_type=kind)(checkpoint)
    assert load(str(checkpoint)).patcher.side == 16


def split(directory: Path, *, shards: bool = True, whole: bool = True) -> dict[str, torch.Tensor]:
    """Two shards and their index, and beside them an older file of other weights."""
    tensors = load_file(directory / WEIGHTS)
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    files = {name: file for file, own in parts.items() for name in own}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")
    for file, own in parts.items():
        if shards:
            save_file({name: tensors[name] for name in own}, directory / file, {"format": "pt"})
    if whole and shards:
        other = {name: torch.zeros(3) for name in names[:5]}
        save_file(other, directory / WEIGHTS, {"format": "pt"})
    return tensors


@pytest.mark.parametrize("shards", [True, False])
def test_of_two_sets_of_weights_the_whole_one_is_used(checkpoint: Path, shards: bool, caplog):
    """What ``save_pretrained`` leaves of an earlier save: one file, or an index without shards."""
    tensors = split(checkpoint, shards=shards)
    used = "model.safetensors.index.json" if shards else WEIGHTS
    loaded = load(str(checkpoint))
    assert f"there are two sets of weights: {used} is used" in caplog.text
    own = dict(loaded.model.named_parameters())
    assert torch.equal(own[WEIGHT], tensors[WEIGHT])
    assert (
        estimate(checkpoints.find(str(checkpoint)), "auto", 1e9).weights
        == estimate(checkpoints.find("demo"), "auto", 1e9).weights
    )


def test_half_of_the_shards_beside_an_older_file(checkpoint: Path):
    """Which is whole, but perhaps another model's: nothing is guessed."""
    split(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"lacks model-00002-of-00002\.safetensors"):
        load(str(checkpoint))


def test_the_weights_that_were_checked_are_loaded(checkpoint: Path):
    """transformers would take another file that config.json names, which nobody looked at."""
    rewrite("config.json", transformers_weights="other.safetensors")(checkpoint)
    assert load(str(checkpoint)).model.config.transformers_weights == WEIGHTS


def test_a_tokenizer_that_splits_its_own_control_tokens(checkpoint: Path):
    """The service was ready, and answered gibberish: the template's tokens were text to it."""
    rewrite("tokenizer_config.json", split_special_tokens=True)(checkpoint)
    prompt = templates.build(load(str(checkpoint)).prompts, "描述", (1, 4, 4))
    assert prompt == templates.build(load("demo").prompts, "描述", (1, 4, 4))


def test_closing_while_loading(monkeypatch):
    real = loading.load

    def slow(name: str, **_options: str):
        time.sleep(0.2)
        return real(name)

    monkeypatch.setattr(loading, "load", slow)
    backend = LocalBackend(load_settings({}))
    backend.close()
    assert backend.status().phase is Phase.DRAINING
