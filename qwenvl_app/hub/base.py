"""Hubs: a checkpoint is downloaded once, and from then on no network is needed.

What is the same for every hub: which files are wanted, a few of them at a time, a word on how far
it is, what failed in a sentence, and a record of what a whole checkpoint consists of, so that the
next start need not ask. ``modelscope.py`` and ``huggingface.py`` have what is not.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from qwenvl_app.errors import ModelLoadError
from qwenvl_app.hub.listing import File, Listing, Progress, size_text

log = logging.getLogger(__name__)

Say = Callable[[str], None]

RECORD = ".downloaded.json"
# Never pickles, never code; and a name that is no path, whatever the hub says.
_WANTED = re.compile(r"\w[\w.-]*\.(safetensors|json|txt|jinja)")
_SAY_EVERY_S = 0.2
_AT_ONCE = 4  # ModelScope's client's own default
_AGAIN = "what has come is kept, and the next start goes on there"


class Trouble(StrEnum):
    """What can be wrong at a hub, each with its sentence."""

    MISSING = (
        "{name} is no directory here, and {hub} does not have it, or not all of its revision "
        "{revision}: look at the spelling{private}"
    )
    NO_REVISION = (
        "{hub} has no revision {revision} of {name}: name a tag, a branch or a commit of it after "
        "the @ in QWENVL_MODEL, or leave both out"
    )
    REFUSED = (
        "{hub} gives {name} only to those who log in, {login} download it by hand, and let "
        "QWENVL_MODEL name its directory"
    )
    DAMAGED = (
        "a file of {name} came several times otherwise than {hub} had announced it, and was thrown "
        "away: start again; if that does not help, look for a proxy that changes files"
    )
    AWAY = (
        f"{{hub}} cannot be reached, and {{name}} is not here, or not all of it; {_AGAIN}. Look at "
        "the network and the proxy, or let QWENVL_MODEL name a directory"
    )
    OFFLINE = (
        "{name} is not here, or not all of it, and HF_HUB_OFFLINE forbids to download it: unset "
        "that for one start, or let QWENVL_MODEL name a directory"
    )
    OTHER = f"{{hub}} answers with an error ({{kind}}); {_AGAIN}"


class Hub(ABC):
    """One hub, with what its operator has set in its own environment variables."""

    title: ClassVar[str]
    cache: ClassVar[str]  # the variable that names the cache
    default_revision: ClassVar[str]
    login: ClassVar[str]  # what to do about a model that is not for everybody
    private: ClassVar[str]  # and about one that is not seen for that reason
    raises: ClassVar[tuple[type[Exception], ...]]  # OSError too

    @abstractmethod
    def directory(self, name: str, revision: str) -> Path:
        """Where the hub's own client would put it; asks nobody."""

    @abstractmethod
    def listing(self, name: str, revision: str) -> Listing:
        """Ask the hub. Raises ModelLoadError or one of ``raises``."""

    @abstractmethod
    def fetch(
        self,
        name: str,
        listing: Listing,
        file: File,
        arrived: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        """See that ``file`` is there and is what was announced; on a thread of its own.

        A file that is whole is left, half of one (``.incomplete``) is gone on with. ``arrived`` is
        told bytes, those of that half too. Ends soon after ``stop``. Raises as ``listing``.
        """

    @abstractmethod
    def trouble(self, error: Exception) -> Trouble | None:
        """What an error of the client or the network means; None for the disk's."""

    def kind(self, error: Exception) -> str:
        """An error that is like no other, in a word."""
        return type(error).__name__

    def copy(self, name: str, revision: str) -> Path | None:
        """One that the hub's own client downloaded and holds for whole; asks nobody."""
        return None

    def cached(self, name: str, revision: str) -> Path | None:
        """The directory of a checkpoint of which everything is there; asks nobody."""
        directory = self.directory(name, revision)
        try:
            record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
            commit, sizes = record["commit"], record["files"]
            if not record.get("whole", True) or any(
                (directory / file).stat().st_size != size for file, size in sizes.items()
            ):
                return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        log.info("revision %s of %s is here (newest commit %s)", revision, name, commit)
        return directory

    def download(self, name: str, revision: str, say: Say) -> Path:
        """Download ``revision`` (a branch, a tag or a commit) of ``name``, or the rest of it.

        Blocks, for hours perhaps. ``say`` is told, often, how far it is, and may raise LoadStopped.
        Raises ModelLoadError.
        """
        try:
            say(f"asking {self.title} for the files of {name}")
            listing = self.listing(name, revision)
            self._transfer(name, listing, _chosen(name, revision, listing), say)
        except self.raises as error:
            trouble = self.trouble(error)
            away = trouble in (Trouble.AWAY, Trouble.OFFLINE)
            if away and (copy := self.copy(name, revision)):
                log.warning("%s cannot be asked; taking the copy that is here", self.title)
                return copy
            log.error("the download of %s failed: %s", name, error)
            raise ModelLoadError(self._sentence(trouble, name, revision, error)) from None
        return listing.directory

    def _transfer(self, name: str, listing: Listing, files: list[File], say: Say) -> None:
        """Get them all, a few at a time. The first that fails ends it, and so does ``say``."""
        directory = listing.directory
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory, lambda: say(f"another process downloads {name}")):
            self._transfer_alone(name, listing, files, say)

    def _transfer_alone(self, name: str, listing: Listing, files: list[File], say: Say) -> None:
        directory = listing.directory
        progress = Progress(directory, files)
        self._refuse_full_disk(directory, progress.missing)
        sizes = {file.name: file.size for file in files}
        record = {"commit": listing.commit, "files": sizes, "whole": False}
        _write_record(directory, record)
        stop = threading.Event()
        with ThreadPoolExecutor(_AT_ONCE, "download") as pool:
            try:
                jobs = [
                    pool.submit(self.fetch, name, listing, file, progress.add, stop)
                    for file in files
                ]
                under_way = True
                while under_way:
                    say(f"downloading {name}: {progress}")
                    done, not_done = wait(jobs, _SAY_EVERY_S, FIRST_EXCEPTION)
                    under_way = bool(not_done)
                    for job in done:
                        job.result()
                say(f"downloading {name}: {progress}")
            finally:
                stop.set()
        _write_record(directory, record | {"whole": True})

    def _refuse_full_disk(self, directory: Path, missing: int) -> None:
        if missing > (free := shutil.disk_usage(directory).free):
            raise ModelLoadError(
                f"{size_text(missing)} are still to be downloaded, and there are {size_text(free)} "
                f"free: make room, or let {self.cache} name a directory on another disk"
            )

    def _sentence(self, trouble: Trouble | None, name: str, revision: str, error: Exception) -> str:
        if trouble:
            return trouble.format(
                name=name,
                revision=revision,
                hub=self.title,
                login=self.login,
                private=self.private,
                kind=self.kind(error),
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk of {self.cache} is full; {_AGAIN}: make room first"
        why = getattr(error, "strerror", None)
        return (
            f"the directory that {self.cache} names can't be written to ({why}); it must belong to "
            "the service's user"
        )


def _chosen(name: str, revision: str, listing: Listing) -> list[File]:
    files = [file for file in listing.files if _WANTED.fullmatch(file.name)]
    log.info(
        "taking revision %s of %s (newest commit %s): %d files of %d, %s",
        *(revision, name, listing.commit, len(files), len(listing.files)),
        size_text(sum(file.size for file in files)),
    )
    return files


@contextmanager
def _alone(directory: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Only one process within the block for each ``directory``; the others ``wait``, often."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                time.sleep(_SAY_EVERY_S)
            except OSError:  # a file system without locks
                break
            else:
                break
        yield
    finally:
        os.close(handle)


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    new = directory / f"{RECORD}.new"
    new.write_text(json.dumps(record, indent=1), encoding="utf-8")
    new.replace(directory / RECORD)
