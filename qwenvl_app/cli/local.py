"""The service in this process, for commands that were given no URL: the same way of asking."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from werkzeug.serving import make_server

from qwenvl_app import create_app
from qwenvl_app.cli.answers import Failed
from qwenvl_app.cli.client import Client
from qwenvl_app.cli.options import KEY_VARIABLE
from qwenvl_app.generation import Phase, Status
from qwenvl_app.settings import SettingsError, load_settings

_LINES_APART_S = 2.0


@contextmanager
def service(model: str | None, timeout: float, fields: dict[str, str]) -> Iterator[Client]:
    """Load the model and serve it on a free port of 127.0.0.1, to whoever has a random key.

    Flask's development server is enough for one client that means well; it ends with the process,
    however that ends. Raises Failed if the model can't be loaded.
    """
    key = secrets.token_urlsafe()
    environ = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    chosen = {"model": model} if model else {}
    try:
        settings = load_settings(environ, api_keys=(key,), **chosen)
    except SettingsError as error:
        raise Failed(str(error)) from None
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    app = create_app(settings)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, name="local-service", daemon=True)
    thread.start()
    try:
        _wait(app.extensions["qwenvl"]["status"])
        url = f"http://127.0.0.1:{server.server_port}"
        yield Client(url, key, timeout, fields, environment=False)
    finally:
        app.extensions["qwenvl"]["close"]()
        server.shutdown()
        server.server_close()
        thread.join()


def _wait(status: Callable[[], Status]) -> None:
    """Until the model is there; how far it is goes to stderr now and then."""
    said, next_line = "", 0.0
    while (now := status()).phase is Phase.LOADING:
        if now.message != said and time.monotonic() >= next_line:
            said, next_line = now.message, time.monotonic() + _LINES_APART_S
            click.echo(f"qwenvl: {said}", err=True)
        time.sleep(0.05)
    if now.phase is not Phase.READY:
        raise Failed(f"the model can't be loaded: {now.message}")
