"""What a batch asks: a folder, a CSV or a JSON-lines file to a list of questions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qwenvl_app.cli.answers import Failed

_PICTURES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
_ROWS = {".csv": ",", ".tsv": "\t"}
_OBJECTS = (".jsonl", ".ndjson")


class Item(NamedTuple):
    """One question. ``image`` is as it was written, ``path`` where it lies."""

    id: str | int
    image: str
    prompt: str
    path: Path


def load(source: Path, prompt: str | None) -> list[Item]:
    """All questions, each with an id of its own; ``prompt`` for those that have none.

    Paths in a file are relative to that file. Raises Failed.
    """
    try:
        if source.is_dir():
            items = list(_of_folder(source, prompt))
        elif source.suffix.lower() in _ROWS:
            items = list(_of_rows(source, prompt))
        elif source.suffix.lower() in _OBJECTS:
            items = list(_of_objects(source, prompt))
        elif source.exists():
            raise Failed(f"{source}: neither a folder nor .csv, .tsv, .jsonl or .ndjson", code=2)
        else:
            raise Failed(f"{source}: there is no such file or folder", code=2)
    except OSError as error:
        raise Failed(f"{source}: {error.strerror}", code=2) from None
    if not items:
        raise Failed(f"{source}: there are no pictures in it", code=2)
    seen: set[str] = set()
    for item in items:
        if str(item.id) in seen:
            raise Failed(f"{source}: the id {item.id} is there twice", code=2)
        seen.add(str(item.id))
    return items


def _of_folder(folder: Path, prompt: str | None) -> Iterator[Item]:
    if not prompt:
        raise Failed("a folder of pictures needs --prompt", code=2)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if path.suffix.lower() in _PICTURES and path.is_file() and not hidden:
            yield Item(name, name, prompt, path)


def _of_rows(file: Path, prompt: str | None) -> Iterator[Item]:
    reader = csv.DictReader(
        io.StringIO(_text(file), newline=""), delimiter=_ROWS[file.suffix.lower()]
    )
    try:
        for number, row in enumerate(reader, 1):
            yield _item(file, number, row, prompt)
    except csv.Error as error:
        raise Failed(f"{file}, line {reader.line_num}: {error}", code=2) from None


def _of_objects(file: Path, prompt: str | None) -> Iterator[Item]:
    lines = [line for line in _text(file).split("\n") if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise Failed(f"{file}, row {number}: it is no JSON object", code=2)
        yield _item(file, number, row, prompt)


def _text(file: Path) -> str:
    """UTF-8, or GB18030, which Excel writes on a Chinese Windows."""
    data = file.read_bytes()
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise Failed(f"{file}: it is no text in UTF-8 or GB18030", code=2)


def _item(file: Path, number: int, row: dict[Any, Any], prompt: str | None) -> Item:
    """A row; without an id of its own it goes by its number, from 1 on."""
    image, asked, name = row.get("image"), row.get("prompt") or prompt, row.get("id")
    for column, value in (("image", image), ("prompt", asked)):
        if not isinstance(value, str) or not value or "\0" in value:
            raise Failed(f"{file}, row {number}: it has no {column}", code=2)
    if name is None or name == "":
        name = number
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise Failed(f"{file}, row {number}: the id is neither a text nor a whole number", code=2)
    return Item(name, str(image), str(asked), file.parent / str(image))
