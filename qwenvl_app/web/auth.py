"""Who may ask: API keys."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence

from flask import Flask, request
from pydantic import SecretStr

from qwenvl_app.errors import Unauthorized

# For whoever watches the service; they tell nothing about requests.
OPEN = frozenset(("/livez", "/readyz", "/health", "/metrics"))


KeyCheck = Callable[[str], bool]


def key_check(keys: Sequence[SecretStr]) -> KeyCheck:
    """Whether a request with this ``Authorization``, "" for none, has one of ``keys``.

    No keys: everyone has.
    """
    known = [key.get_secret_value().encode() for key in keys]

    def has_key(authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        sent = token.strip().encode("latin-1", "replace")  # the bytes that WSGI made a string of
        # All of them, so that the time taken does not tell which one was near.
        matches = [hmac.compare_digest(sent, key) for key in known]
        return not known or (scheme.lower() == "bearer" and any(matches))

    return has_key


def register(app: Flask, has_key: KeyCheck) -> None:
    """Ask every request but those for ``OPEN`` for a key, before its body is read.

    The worker, if it is ours, asks the same check as soon as the head is there, so that it waits
    for no body without a key, wherever it is sent (``worker.py``).
    """

    @app.before_request
    def check() -> None:
        if request.path not in OPEN and not has_key(request.headers.get("Authorization", "")):
            raise Unauthorized
