"""Finding a checkpoint's directory, and checking it before anything is loaded.

So that what is wrong with it is said in a sentence and not in a traceback. The layout is that of
``Qwen/Qwen3-VL-8B-Instruct``.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qwenvl_app.errors import ModelLoadError

log = logging.getLogger(__name__)

DEMO = Path(__file__).resolve().parent.parent / "demo_model"
MODEL_TYPE = "qwen3_vl"
_MODELSCOPE_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def find(name: str, *, download: bool = True) -> Path:
    """The directory of ``demo``, a directory, or a ModelScope id.

    Raises ModelLoadError, also for an id that is not in ModelScope's cache if not to ``download``.
    """
    if name == "demo":
        return DEMO
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError("MODEL is a file; it must be a checkpoint's directory")
    if not _MODELSCOPE_ID.fullmatch(name):
        raise ModelLoadError("the directory that MODEL names does not exist")
    # Only now: modelscope takes a second to import, and nothing else here talks to a network.
    from modelscope import snapshot_download

    if not download:
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception:  # a class of its own in each of its versions
            raise ModelLoadError(f"{name} is not in ModelScope's cache yet") from None
    log.info("looking for %s on ModelScope", name)
    try:
        return Path(snapshot_download(name))
    except Exception as error:
        log.exception("the download of %s failed", name)
        raise ModelLoadError(
            f"{name} is no directory here, and could not be had from ModelScope "
            f"({type(error).__name__})"
        ) from None


def check(directory: Path) -> str:
    """Check that ``directory`` holds a whole checkpoint; returns its chat template.

    Raises ModelLoadError.
    """
    for file in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        _read_json(directory, file)
    if not (directory / "tokenizer.json").is_file():
        for file in ("vocab.json", "merges.txt"):
            if not (directory / file).is_file():
                raise ModelLoadError(f"the model directory lacks tokenizer.json and {file}")
    model_type = _read_json(directory, "config.json").get("model_type")
    if model_type != MODEL_TYPE:
        raise ModelLoadError(
            f"config.json has model_type {model_type!r}; supported is {MODEL_TYPE!r}"
        )
    for file in weight_files(directory):
        try:
            with safe_open(directory / file, framework="pt") as tensors:
                tensors.keys()
        except FileNotFoundError:
            raise ModelLoadError(f"the model directory lacks {file}") from None
        except (SafetensorError, OSError):
            raise ModelLoadError(
                f"{file} is truncated or damaged; copy or download it again"
            ) from None
    return _chat_template(directory)


def _read_json(directory: Path, file: str) -> dict[str, Any]:
    try:
        content = json.loads((directory / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"the model directory lacks {file}") from None
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ModelLoadError(f"{file} is not valid JSON; copy or download it again") from None
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file} is not a JSON object; copy or download it again")
    return content


def weight_files(directory: Path) -> list[str]:
    """The names of the files that hold the weights; they may be missing. Raises ModelLoadError."""
    index = "model.safetensors.index.json"
    if not (directory / index).exists():
        return ["model.safetensors"]
    weight_map = _read_json(directory, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no weight_map; copy or download it again")
    return sorted(set(weight_map.values()))


def _chat_template(directory: Path) -> str:
    for file in _TEMPLATES:
        path = directory / file
        if not path.is_file():
            continue
        if path.suffix == ".jinja":
            return path.read_text(encoding="utf-8")
        template = _read_json(directory, file).get("chat_template")
        if isinstance(template, str):
            return template
    raise ModelLoadError(f"no chat template: looked in {', '.join(_TEMPLATES)}")
