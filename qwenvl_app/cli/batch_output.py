"""Where a batch's answers go: JSON lines, one for each question, also after a kill -9."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from qwenvl_app.cli.answers import Failed
from qwenvl_app.cli.batch_source import Item

_BEGINNING = b'{"id":'


class Output:
    """A file that is added to, a whole line at a time, by one process at a time.

    ``answered``: ids that the file has an answer for; ``failed``: those with an error. Opening it
    cuts off a last line that was not written to its end. Raises Failed. ``add`` on any thread.
    """

    def __init__(self, path: Path):
        self.path = path
        self.answered: set[str] = set()
        self.failed: set[str] = set()
        self._lock = threading.Lock()
        self._file = _open(path)
        try:
            self._rows = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def check(self, items: list[Item]) -> None:
        """Raise Failed if the file has an id of ``items`` with another picture or question."""
        asked = {str(item.id): (item.image, item.prompt) for item in items}
        for number, row in enumerate(self._rows, 1):
            found = asked.get(str(row["id"]))
            if found and found != (row.get("image"), row.get("prompt")):
                raise Failed(
                    f"{self.path}, line {number}: {row['id']} is another question there: "
                    "these are answers to something else",
                    code=2,
                )

    def forget_failed(self) -> None:
        """Drop the lines with an error. The file changes at once or, killed before, not at all."""
        if not self.failed:
            return
        kept = [row for row in self._rows if str(row["id"]) not in self.failed]
        beside = self.path.with_name(self.path.name + ".new")
        beside.unlink(missing_ok=True)
        fresh = _open(beside)
        os.fchmod(fresh, os.fstat(self._file).st_mode & 0o7777)
        _write(fresh, b"".join(map(_line, kept)), self.path)
        os.fsync(fresh)
        beside.replace(self.path)  # locked already, so that nobody comes between
        os.close(self._file)
        self._file, self._rows = fresh, kept
        self.failed = set()

    def add(self, item: Item, result: dict[str, Any]) -> None:
        """Write the line of ``item``. Raises Failed."""
        row = {"id": item.id, "image": item.image, "prompt": item.prompt} | result
        with self._lock:
            size = os.fstat(self._file).st_size
            try:
                _write(self._file, _line(row), self.path)
            except Failed:
                os.ftruncate(self._file, size)  # or another thread's line would follow half of it
                raise
            (self.failed if "error" in row else self.answered).add(str(item.id))

    def close(self) -> None:
        """After the line that is being written; then nothing can be added."""
        self._lock.acquire()
        os.close(self._file)

    def _read(self) -> list[dict[str, Any]]:
        with os.fdopen(os.dup(self._file), "rb") as file:
            *lines, last = file.read().split(b"\n")
        rows = []
        for number, line in enumerate(lines, 1):
            if (row := _row(line)) is None:
                said = f"{self.path}, line {number}: it is no answer; name another file with -o"
                raise Failed(said, code=2)
            rows.append(row)
        if last:
            self._mend(last, rows)
        for row in rows:
            (self.failed if "error" in row else self.answered).add(str(row["id"]))
        self.failed -= self.answered
        return rows

    def _mend(self, last: bytes, rows: list[dict[str, Any]]) -> None:
        """End what was killed while it was written, or the disk was full: it is asked again."""
        if row := _row(last):
            _write(self._file, b"\n", self.path)
            rows.append(row)
        elif last[: len(_BEGINNING)] == _BEGINNING[: len(last)]:
            os.ftruncate(self._file, os.fstat(self._file).st_size - len(last))
        else:
            raise Failed(f"{self.path}: these are no answers; name another file with -o", code=2)


def _open(path: Path) -> int:
    """A locked file that grows at its end. Raises Failed."""
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}", code=2) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Not one that --retry-failed has replaced since it was opened.
        if os.fstat(file).st_ino == path.stat().st_ino and path.is_file():
            return file
        said = "it is no file that answers can be added to"
    except BlockingIOError:
        said = "another batch is writing it"
    except OSError as error:
        said = str(error.strerror)
    os.close(file)
    raise Failed(f"{path}: {said}", code=2)


def _line(row: dict[str, Any]) -> bytes:
    # What is no Unicode, such as an old file name, is escaped as JSON has it.
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _row(line: bytes) -> dict[str, Any] | None:
    """A line that ``Output`` has written, or None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and isinstance(row.get("id"), str | int)
    return row if known and ("result" in row or "error" in row) else None


def _write(file: int, data: bytes, path: Path) -> None:
    """To the system, where a kill does not reach it."""
    try:
        while data:
            data = data[os.write(file, data) :]
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from None
