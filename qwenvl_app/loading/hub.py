"""ModelScope: a checkpoint is downloaded once, and from then on no network is needed.

``modelscope_hub`` does the transfer: resuming at the byte where it stopped, comparing every file
with the hash that the hub has announced, and only then giving it its name. Here is what it lacks:
a word on how far it is, which files are wanted, what failed in a sentence, and a record of what a
whole checkpoint consists of, so that the next start need not ask. Nobody logs in, and the hub is
not told who asks.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import requests
from modelscope_hub import HubApi, HubConfig, ProgressCallback, errors

from qwenvl_app import process
from qwenvl_app.errors import ModelLoadError

log = logging.getLogger(__name__)

Say = Callable[[str], None]

DEFAULT_REVISION = "master"
RECORD = ".downloaded.json"
# Never pickles, never code; and a name that is no path, whatever the hub says.
_WANTED = re.compile(r"\w[\w.-]*\.(safetensors|json|txt|jinja)")
_SAY_EVERY_S = 0.2
_LONGEST_S = 7 * 86_400
_AT_ONCE = 4  # the client's own default
_AGAIN = "what has come is kept, and the next start goes on there"

_SENTENCES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (
        errors.NotExistError,
        "{name} is no directory here, and ModelScope does not have it, or not all of its revision "
        "{revision}: look at the spelling",
    ),
    (
        (errors.AuthenticationError, errors.PermissionDeniedError),
        "ModelScope gives {name} only to those who log in, which the service does not: download it "
        "by hand, and let QWENVL_MODEL name its directory",
    ),
    (
        errors.FileIntegrityError,
        "a file of {name} came several times otherwise than ModelScope had announced it, and was "
        "thrown away: start again; if that does not help, look for a proxy that changes files",
    ),
    (
        (errors.NetworkError, requests.RequestException),
        f"ModelScope cannot be reached, and {{name}} is not here, or not all of it; {_AGAIN}. Look "
        "at the network and the proxy, or let QWENVL_MODEL name a directory",
    ),
)


def cached(name: str, revision: str) -> Path | None:
    """The directory of a checkpoint of which everything is there; asks nobody."""
    directory = _directory(_config(), name, revision)
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        commit, sizes = record["commit"], record["files"]
        if any((directory / file).stat().st_size != size for file, size in sizes.items()):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    log.info("revision %s of %s is here (newest commit %s)", revision, name, commit)
    return directory


def download(name: str, revision: str, say: Say) -> Path:
    """Download ``revision`` (a branch, a tag or a commit) of ``name``, or the rest of it.

    Blocks, for hours perhaps. ``say`` is told, often, how far it is, and may raise LoadStopped.
    Raises ModelLoadError.
    """
    config = _config()
    directory = _directory(config, name, revision)
    process.quiet_modelscope(_LONGEST_S)
    api = HubApi(config)
    try:
        say(f"asking ModelScope for the files of {name}")
        files, commit = _list(api, name, revision)
        directory.mkdir(parents=True, exist_ok=True)
        sizes = {file["Path"]: int(file["Size"]) for file in files}
        progress = _Progress(directory, sizes)
        _refuse_full_disk(directory, progress.missing)
        get = partial(
            api.downloader.download_file,
            *(name, "model"),
            revision=revision,
            cache_dir=config.cache_dir,  # of the locks
            local_dir=directory,
            progress_callbacks=[progress.callback],
        )
        _transfer(get, files, lambda: say(f"downloading {name}: {progress}"))
        _write_record(directory, {"commit": commit, "files": sizes})
    except (errors.HubError, OSError) as error:
        log.error("the download of %s failed: %s", name, error)
        raise ModelLoadError(_sentence(name, revision, error)) from None
    return directory


class _Anonymous(HubConfig):
    """The client's settings, from its own environment variables, without who we are."""

    def get_session_id(self) -> str:
        """The client would keep a number for this machine, and send it with every request."""
        return "0"


def _config() -> HubConfig:
    return _Anonymous(token="")  # none; else it would look for one that was kept


def _directory(config: HubConfig, name: str, revision: str) -> Path:
    """Where the client itself would put it."""
    return config.cache_dir / "models" / name.replace("/", "--") / "snapshots" / revision


def _list(api: HubApi, name: str, revision: str) -> tuple[list[dict[str, Any]], str | None]:
    """What the hub says of the wanted files (``Path``, ``Size``, ``Sha256``); the last commit."""
    listed = api.legacy.list_repo_files(name, "model", revision)
    if not listed:  # no error: the hub has an empty list for a revision that it does not know
        raise ModelLoadError(
            f"ModelScope has no revision {revision} of {name}: name a tag, a branch or a commit of "
            "it after the @ in QWENVL_MODEL, or leave both out"
        )
    files = [file for file in listed if _WANTED.fullmatch(file.get("Path", ""))]
    commit = max(listed, key=lambda file: file.get("CommittedDate") or 0).get("Revision")
    size = _size(sum(int(file["Size"]) for file in files))
    log.info(
        "taking revision %s of %s (newest commit %s): %d files of %d, %s",
        *(revision, name, commit, len(files), len(listed), size),
    )
    return files, commit


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    new = directory / f"{RECORD}.new"
    new.write_text(json.dumps(record, indent=1), encoding="utf-8")
    new.replace(directory / RECORD)


def _transfer(
    get: Callable[..., Path], files: list[dict[str, Any]], tell: Callable[[], None]
) -> None:
    """Get them all, a few at a time. The first that fails ends it, and so does ``tell``."""
    stop = threading.Event()
    with ThreadPoolExecutor(_AT_ONCE, "download") as pool:
        try:
            jobs = [
                pool.submit(
                    get,
                    file_path=file["Path"],
                    expected_sha256=file.get("Sha256") or None,
                    file_size=int(file["Size"]),
                    _cancel_event=stop,
                )
                for file in files
            ]
            under_way = True
            while under_way:
                tell()
                done, not_done = wait(jobs, _SAY_EVERY_S, FIRST_EXCEPTION)
                under_way = bool(not_done)
                for job in done:
                    job.result()
            tell()
        finally:
            stop.set()


class _Progress:
    """How many bytes there are, of how many; counted by all threads of a download."""

    def __init__(self, directory: Path, sizes: dict[str, int]):
        self._total = sum(sizes.values())
        # Of what is on its way the client itself counts what there is.
        self._done = sum(n for file, n in sizes.items() if _length(directory / file) == n)
        halves = sum(_length(directory / f"{file}.incomplete") for file in sizes)
        self.missing = max(0, self._total - self._done - halves)
        self._lock = threading.Lock()

    def __str__(self) -> str:
        done = min(self._done, self._total)  # a damaged file comes twice
        return f"{_size(done)} of {_size(self._total)}"

    def _add(self, size: int) -> None:
        with self._lock:
            self._done += size

    @property
    def callback(self) -> type[ProgressCallback]:
        """The client makes one of these for every file."""
        add = self._add

        class Callback(ProgressCallback):
            def update(self, size: int) -> None:
                add(size)

        return Callback


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _refuse_full_disk(directory: Path, missing: int) -> None:
    if missing > (free := shutil.disk_usage(directory).free):
        raise ModelLoadError(
            f"{_size(missing)} are still to be downloaded, and there are {_size(free)} free: make "
            "room, or let MODELSCOPE_CACHE name a directory on another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _sentence(name: str, revision: str, error: Exception) -> str:
    for kinds, sentence in _SENTENCES:
        if isinstance(error, kinds):
            return sentence.format(name=name, revision=revision)
    if isinstance(error, errors.HubError):
        return f"ModelScope answers with an error ({type(error).__name__}); {_AGAIN}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of MODELSCOPE_CACHE is full; {_AGAIN}: make room first"
    why = getattr(error, "strerror", None)
    return (
        f"the directory that MODELSCOPE_CACHE names can't be written to ({why}); it must belong to "
        "the service's user"
    )
