"""The files that hold a checkpoint's weights: whether they are there, and whole.

Only their headers are read, which is quick however large they are.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qwenvl_app.errors import ModelLoadError
from qwenvl_app.loading.files import read_json, readable

log = logging.getLogger(__name__)

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
# What downloads leave that are under way: ModelScope's, Hugging Face's, browsers', aria2's.
_UNFINISHED = (
    *("._____temp", "*.incomplete", ".cache/huggingface/download/*.incomplete"),
    *("*.part", "*.crdownload", "*.aria2"),
)


def check(directory: Path, names: list[str]) -> None:
    """Raise ModelLoadError unless the weights are whole; ``names`` are all in ``directory``."""
    if _WEIGHTS in names and _INDEX in names and _WEIGHTS not in _shards(directory):
        log.warning("there are two sets of weights: %s is used", first(directory))
    if _WEIGHTS not in names and _INDEX not in names:
        _refuse_other_weights(directory, names)
    for file, expected in weight_files(directory).items():
        if file not in names:
            raise ModelLoadError(f"the model directory lacks {file}{_why(directory)}")
        with readable(file):  # safe_open has one error for all that it can't open
            (directory / file).open("rb").close()
        try:
            with safe_open(directory / file, framework="pt") as tensors:
                found = set(tensors.keys())
        except (SafetensorError, OSError):
            raise ModelLoadError(
                f"{file} is truncated or damaged; copy or download it again"
            ) from None
        if lost := sorted(expected - found):
            raise ModelLoadError(
                f"{file} lacks {len(lost)} tensors that {_INDEX} says it has, the first is "
                f"{lost[0]}: the files are not of one checkpoint; copy or download it again"
            )
    if first(directory) == _INDEX and "metadata" not in read_json(directory, _INDEX):
        raise ModelLoadError(f"{_INDEX} has no metadata; copy or download it again")


def _refuse_other_weights(directory: Path, names: list[str]) -> None:
    """Raise ModelLoadError with what there is instead of weights, if it is known."""
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in names):
        raise ModelLoadError(f"the model directory lacks {_INDEX}; copy or download it again")
    if unsafe := [n for n in names if re.fullmatch(r".*\.(bin|pt|pth|pkl|ckpt)", n)]:
        raise ModelLoadError(
            f"the weights are pickled ({unsafe[0]}), which may run any code and is not loaded; "
            "take the checkpoint in safetensors"
        )
    refuse_gguf(names)
    raise ModelLoadError(f"the model directory lacks {_WEIGHTS}{_why(directory)}")


def refuse_gguf(names: list[str]) -> None:
    """Raise ModelLoadError if there is a GGUF file."""
    if gguf := [n for n in names if n.endswith(".gguf")]:
        raise ModelLoadError(
            f"{gguf[0]} is GGUF, which is for llama.cpp; take the checkpoint in safetensors"
        )


def _why(directory: Path) -> str:
    if any(next(directory.glob(pattern), None) for pattern in _UNFINISHED):
        return ": its download has not finished; start it again, it goes on where it stopped"
    return "; copy or download it again"


def weight_files(directory: Path) -> dict[str, set[str]]:
    """The files that hold the weights, and which tensors of each are known from the index.

    The files may be missing. Raises ModelLoadError.
    """
    if first(directory) == _WEIGHTS:
        return {_WEIGHTS: set()}
    return _shards(directory)


def first(directory: Path) -> str:
    """The file to load from: an index of shards, or the one file that has all weights.

    Where both are, ``save_pretrained`` was there twice: it leaves an older file beside new shards,
    and an older index, but none of its shards, beside a new file. Raises ModelLoadError.
    """
    if not (directory / _INDEX).exists():
        return _WEIGHTS
    if not (directory / _WEIGHTS).exists():
        return _INDEX
    shards = _shards(directory)
    stale = _WEIGHTS not in shards and not any((directory / file).exists() for file in shards)
    return _WEIGHTS if stale else _INDEX


def _shards(directory: Path) -> dict[str, set[str]]:
    """By file of the index, the tensors that it should have. Raises ModelLoadError."""
    weight_map = read_json(directory, _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{_INDEX} has no weight_map; copy or download it again")
    files: dict[str, set[str]] = {}
    for tensor, file in sorted(weight_map.items(), key=lambda pair: str(pair[1])):
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelLoadError(f"{_INDEX} names {file!r}, which is no file beside it")
        files.setdefault(file, set()).add(tensor)
    return files
