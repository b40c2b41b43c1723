"""Hugging Face, through ``huggingface_hub``: names, listings, tokens, mirrors, its cache's layout.

https://huggingface.co/docs/huggingface_hub/guides/manage-cache has that layout: files stand under
``snapshots/COMMIT``, and ``refs/main`` says which commit that was. The files' own names may be
links into ``blobs`` there, as the client makes them, or the files themselves, as here.

The transfer is ours. The client's throws half a file away when its process ends (its pull request
4228), and 17 GB come as four files at once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from qwenvl_app import process
from qwenvl_app.hub.base import RECORD, Hub, Trouble
from qwenvl_app.hub.listing import File, Listing, length

_TRIES = 5  # without a byte in between; the client's own number
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class _Damaged(Exception):
    """What came is not what was announced, twice."""


_TROUBLES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Trouble], ...] = (
    (_Damaged, Trouble.DAMAGED),
    (OfflineModeIsEnabled, Trouble.OFFLINE),
    (RevisionNotFoundError, Trouble.NO_REVISION),
    (GatedRepoError, Trouble.REFUSED),
    ((RepositoryNotFoundError, EntryNotFoundError, HFValidationError), Trouble.MISSING),
    (httpx2.TransportError, Trouble.AWAY),
)


class HuggingFace(Hub):
    """See ``Hub``."""

    title = "Hugging Face"
    cache = "HF_HUB_CACHE"
    default_revision = constants.DEFAULT_REVISION
    login = "and may have agreed to its terms: let HF_TOKEN hold such a user's token, or"
    private = ", or let HF_TOKEN hold the token of one who may see it"
    raises = (httpx2.HTTPError, OSError, _Damaged, ValueError, LookupError, TypeError)

    def __init__(self) -> None:
        process.quiet_huggingface()

    def directory(self, name: str, revision: str) -> Path:
        """See ``Hub``. Of a branch or a tag: of the commit that it was when it was downloaded."""
        model = self._model(name)
        try:
            commit = (model / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            commit = revision
        return model / "snapshots" / commit

    def listing(self, name: str, revision: str) -> Listing:
        """See ``Hub``."""
        wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = HfApi().model_info(name, revision=revision, timeout=wait, files_metadata=True)
        if not info.sha or not info.sha.isalnum() or info.siblings is None:
            raise ValueError("a listing without a commit or files")
        files = []
        for each in info.siblings:
            if each.size is None or each.blob_id is None:
                raise ValueError("a listing without sizes or hashes")
            sha256 = each.lfs.sha256 if each.lfs else None
            files.append(File(each.rfilename, each.size, sha256, each.blob_id))
        model = self._model(name)
        if revision != info.sha:
            (model / "refs").mkdir(parents=True, exist_ok=True)
            (model / "refs" / revision).write_text(info.sha, encoding="ascii")
        return Listing(files, info.sha, model / "snapshots" / info.sha)

    def fetch(
        self,
        name: str,
        listing: Listing,
        file: File,
        arrived: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        """See ``Hub``. A hub that is silent holds up ``stop`` for HF_HUB_DOWNLOAD_TIMEOUT."""
        path = listing.directory / file.name
        if length(path) == file.size and _is_announced(path, file):
            return
        half = path.with_name(f"{file.name}.incomplete")
        arrived(length(half))
        url = hf_hub_url(name, file.name, revision=listing.directory.name)
        for _ in range(2):
            _transfer(url, half, file.size, arrived, stop)
            if stop.is_set():
                return
            if _is_announced(half, file):
                half.replace(path)
                return
            half.unlink()
        raise _Damaged

    def trouble(self, error: Exception) -> Trouble | None:
        """See ``Hub``."""
        for kinds, each in _TROUBLES:
            if isinstance(error, kinds):
                return each
        if isinstance(error, HfHubHTTPError):
            refused = error.response.status_code in (401, 403)
            return Trouble.REFUSED if refused else Trouble.OTHER
        return None if isinstance(error, OSError) else Trouble.OTHER

    def kind(self, error: Exception) -> str:
        """See ``Hub``."""
        if isinstance(error, HfHubHTTPError):
            return f"status {error.response.status_code}"
        return super().kind(error)

    def copy(self, name: str, revision: str) -> Path | None:
        """See ``Hub``. What was begun here is not for the client to judge."""
        if (self.directory(name, revision) / RECORD).exists():
            return None
        try:
            found = snapshot_download(
                name,
                revision=revision,
                local_files_only=True,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"],
                ignore_patterns=["*/*"],
            )
        except (OSError, ValueError):
            return None
        return Path(found)

    def _model(self, name: str) -> Path:
        return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _transfer(
    url: str, half: Path, size: int, arrived: Callable[[int], None], stop: threading.Event
) -> None:
    """Get what ``half`` lacks of ``size`` bytes, connection after connection."""
    half.touch()
    tries = 0
    while (have := length(half)) < size and not stop.is_set():
        failure: httpx2.HTTPError = httpx2.RemoteProtocolError("fewer bytes than announced")
        try:
            _get_rest(url, half, have, arrived, stop)
        except httpx2.TransportError as error:
            failure = error
        except HfHubHTTPError as error:
            if error.response.status_code not in _TRY_AGAIN:
                raise
            failure = error
        else:
            if length(half) >= size:
                return
        tries = 0 if length(half) > have else tries + 1
        if tries > _TRIES:
            raise failure
        stop.wait(2**tries)


def _get_rest(
    url: str, half: Path, have: int, arrived: Callable[[int], None], stop: threading.Event
) -> None:
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # Follows redirects, and has the token for none to another host.
    with get_session().stream("GET", url, headers=headers, timeout=wait) as response:
        hf_raise_for_status(response)
        goes_on = response.status_code == httpx2.codes.PARTIAL_CONTENT
        if not goes_on:
            arrived(-have)
        with half.open("ab" if goes_on else "wb") as out:
            for piece in response.iter_bytes():
                out.write(piece)
                arrived(len(piece))
                if stop.is_set():
                    return


def _is_announced(path: Path, file: File) -> bool:
    if length(path) != file.size:
        return False
    with path.open("rb") as content:
        if file.sha256:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
        blob = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        blob.update(content.read())
        return blob.hexdigest() == file.git_id
