"""Who may ask: API keys."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from flask import Flask, request
from pydantic import SecretStr

from qwenvl_app.errors import Unauthorized

# For whoever watches the service; they tell nothing about requests.
OPEN = frozenset(("/livez", "/readyz", "/health", "/metrics"))


def register(app: Flask, keys: Sequence[SecretStr]) -> None:
    """Ask every request but those for ``OPEN`` for one of ``keys``, before its body is read.

    No keys: everyone may ask.
    """
    known = [key.get_secret_value().encode() for key in keys]

    def check() -> None:
        if request.path in OPEN:
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        sent = token.strip().encode("latin-1", "replace")  # the bytes that WSGI made a string of
        # All of them, so that the time taken does not tell which one was near.
        matches = [hmac.compare_digest(sent, key) for key in known]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized

    if known:
        app.before_request(check)
