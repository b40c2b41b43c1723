"""Reading a checkpoint's files; what goes wrong is told in a sentence that names no path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwenvl_app.errors import ModelLoadError

_POINTER = b"version https://git-lfs"
PROCESSOR = "processor_config.json"
BOM = "\ufeff"


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Raise what the block raises as an OSError as a ModelLoadError about ``what``."""
    try:
        yield
    except FileNotFoundError:
        raise ModelLoadError(f"the model directory lacks {what}") from None
    except OSError as error:
        raise ModelLoadError(
            f"{what} cannot be read ({error.strerror}); it must be readable for the service's user"
        ) from None


def refuse_pointer(directory: Path, file: str) -> None:
    """Raise ModelLoadError for what a clone without git-lfs has in place of every large file."""
    path = directory / file
    with readable(file):
        if not path.is_file() or path.stat().st_size > 1024:
            return
        with path.open("rb") as stream:
            pointer = stream.read(len(_POINTER)) == _POINTER
    if pointer:
        raise ModelLoadError(
            f"{file} is a git-lfs pointer and not the file: run `git lfs pull` in the directory, "
            "or download the checkpoint again"
        )


def read_text(directory: Path, file: str) -> str:
    """What is in ``file``, which must be UTF-8. Raises ModelLoadError."""
    try:
        with readable(file):
            return (directory / file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelLoadError(f"{file} is not UTF-8; copy or download it again") from None


def read_json(directory: Path, file: str) -> dict[str, Any]:
    """The object in ``file``. Raises ModelLoadError."""
    text = read_text(directory, file)
    if text.startswith(BOM):  # transformers, which reads most of them too, can't
        raise ModelLoadError(f"{file} begins with a byte order mark; save it as UTF-8 without one")
    try:
        content = json.loads(text)
    except ValueError:
        raise ModelLoadError(f"{file} is not valid JSON; copy or download it again") from None
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file} is not a JSON object; copy or download it again")
    return content


def image_settings(directory: Path) -> dict[str, Any]:
    """Of the image processor; newer tools save all processors' in one file, which goes first.

    Raises ModelLoadError, if there are none too.
    """
    if (directory / PROCESSOR).is_file():
        own = read_json(directory, PROCESSOR).get("image_processor")
        if isinstance(own, dict):
            return own
    return read_json(directory, "preprocessor_config.json")
