"""What a hub has of a model, and how much of that is here."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class File:
    """One that the hub has: its path there, its bytes, and its hashes as far as they are known."""

    name: str
    size: int
    sha256: str | None
    git_id: str | None = None  # SHA-1 of git's blob


@dataclass(frozen=True)
class Listing:
    """All files of a revision; ``commit``: the newest that made it; where they belong."""

    files: list[File]
    commit: str | None
    directory: Path


class Progress:
    """How many bytes there are, of how many; counted by all threads of a download."""

    def __init__(self, directory: Path, files: list[File]):
        self._total = sum(file.size for file in files)
        # Of what is on its way ``fetch`` itself counts what there is.
        whole = [file.size for file in files if length(directory / file.name) == file.size]
        self._done = sum(whole)
        halves = sum(length(directory / f"{file.name}.incomplete") for file in files)
        self.missing = max(0, self._total - self._done - halves)
        self._lock = threading.Lock()

    def __str__(self) -> str:
        done = min(self._done, self._total)  # a damaged file comes twice
        return f"{size_text(done)} of {size_text(self._total)}"

    def add(self, size: int) -> None:
        """So many bytes more."""
        with self._lock:
            self._done += size


def length(path: Path) -> int:
    """In bytes; 0 of what is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def size_text(count: int) -> str:
    """Bytes, as a reader has them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
