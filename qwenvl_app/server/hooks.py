"""What an application offers to the server that it runs in: ``app.extensions["qwenvl"]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def hook(app: Any, name: str) -> Callable[..., Any] | None:
    """A function of ``create_app``'s; None of any other WSGI application, which has none."""
    hooks = getattr(app, "extensions", {}).get("qwenvl", {})
    found: Callable[..., Any] | None = hooks.get(name)
    return found
