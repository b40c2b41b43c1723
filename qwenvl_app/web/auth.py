"""Who may ask: API keys, each with the name of its owner."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence

from flask import Flask, request
from pydantic import SecretStr

from qwenvl_app.errors import Unauthorized
from qwenvl_app.web import request_log
from qwenvl_app.web.openapi import docs

# For whoever watches the service, what the API is, and the page, which must be there to be given a
# key; they tell nothing about requests.
OPEN = docs.PATHS | {"/", "/livez", "/readyz", "/health", "/metrics"}
_OPEN_FILES = ("/static/", "/samples/")
_NAMED = re.compile(r"([A-Za-z0-9._-]{1,32}):(.+)", re.DOTALL)


class Keys:
    """The keys of the settings, as ``name:key`` or ``key``. Any thread.

    A key without a name is called by its place: ``key-2``. Two keys may have one name, so that one
    can take the other's place.
    """

    def __init__(self, keys: Sequence[SecretStr]):
        self._known: list[tuple[str, bytes]] = []
        for place, key in enumerate(keys, 1):
            named = _NAMED.fullmatch(key.get_secret_value())
            name, secret = named.groups() if named else (f"key-{place}", key.get_secret_value())
            self._known.append((name, secret.encode()))

    def owner(self, authorization: str) -> str | None:
        """Whose key ``authorization`` holds; "" where none is asked for, None if it holds none."""
        if not self._known:
            return ""
        scheme, _, token = authorization.partition(" ")
        sent = token.strip().encode("latin-1", "replace")  # the bytes that WSGI made a string of
        # All of them, so that the time taken does not tell which one was near.
        matches = [name for name, key in self._known if hmac.compare_digest(sent, key)]
        return matches[0] if matches and scheme.lower() == "bearer" else None

    def admit(self, authorization: str) -> bool:
        """Whether to read on."""
        return self.owner(authorization) is not None


def register(app: Flask, keys: Keys) -> None:
    """Ask every request but those for ``OPEN`` for a key, before its body is read.

    The worker, if it is ours, asks the same keys as soon as the head is there, so that it waits
    for no body without a key, wherever it is sent (``worker.py``).
    """

    @app.before_request
    def check() -> None:
        if request.path in OPEN or request.path.startswith(_OPEN_FILES):
            return
        owner = keys.owner(request.headers.get("Authorization", ""))
        if owner is None:
            raise Unauthorized
        request_log.current().key = owner or None
