"""ModelScope, through ``modelscope_hub``.

It does the transfer: resuming at the byte where it stopped, comparing every file with the hash that
the hub has announced, and only then giving it its name. Nobody logs in, and the hub is not told who
asks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import requests
from modelscope_hub import HubApi, HubConfig, ProgressCallback, errors

from qwenvl_app import process
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.hub.base import Hub, Trouble
from qwenvl_app.hub.listing import File, Listing

_LONGEST_S = 7 * 86_400
_TROUBLES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Trouble], ...] = (
    (errors.NotExistError, Trouble.MISSING),
    ((errors.AuthenticationError, errors.PermissionDeniedError), Trouble.REFUSED),
    (errors.FileIntegrityError, Trouble.DAMAGED),
    ((errors.NetworkError, requests.RequestException), Trouble.AWAY),
    (errors.HubError, Trouble.OTHER),
)


class ModelScope(Hub):
    """See ``Hub``."""

    title = "ModelScope"
    cache = "MODELSCOPE_CACHE"
    default_revision = "master"
    login = "which the service does not:"
    private = ""
    raises = (errors.HubError, OSError)

    def __init__(self) -> None:
        self._config = _Anonymous(token="")  # none; else it would look for one that was kept

    @cached_property
    def _api(self) -> HubApi:
        process.quiet_modelscope(_LONGEST_S)
        return HubApi(self._config)

    def directory(self, name: str, revision: str) -> Path:
        """See ``Hub``."""
        models = self._config.cache_dir / "models"
        return models / name.replace("/", "--") / "snapshots" / revision

    def listing(self, name: str, revision: str) -> Listing:
        """See ``Hub``."""
        listed = self._api.legacy.list_repo_files(name, "model", revision)
        if not listed:  # no error: the hub has an empty list for a revision that it does not know
            sentence = Trouble.NO_REVISION.format(hub=self.title, name=name, revision=revision)
            raise ModelLoadError(sentence)
        newest = max(listed, key=lambda file: file.get("CommittedDate") or 0)
        files = [
            File(file.get("Path", ""), int(file.get("Size") or 0), file.get("Sha256") or None)
            for file in listed
        ]
        return Listing(files, newest.get("Revision"), self.directory(name, revision))

    def fetch(
        self,
        name: str,
        listing: Listing,
        file: File,
        arrived: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        """See ``Hub``."""

        class Progress(ProgressCallback):
            def update(self, size: int) -> None:
                arrived(size)

        self._api.downloader.download_file(
            *(name, "model"),
            file_path=file.name,
            revision=listing.directory.name,
            cache_dir=self._config.cache_dir,  # of the locks
            local_dir=listing.directory,
            expected_sha256=file.sha256,
            file_size=file.size,
            progress_callbacks=[Progress],
            _cancel_event=stop,
        )

    def trouble(self, error: Exception) -> Trouble | None:
        """See ``Hub``."""
        return next((each for kinds, each in _TROUBLES if isinstance(error, kinds)), None)


class _Anonymous(HubConfig):
    """The client's settings, from its own environment variables, without who we are."""

    def get_session_id(self) -> str:
        """The client would keep a number for this machine, and send it with every request."""
        return "0"
