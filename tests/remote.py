"""The service in front of others, with sockets of 127.0.0.1 between them."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flask import Flask
from werkzeug.serving import WSGIRequestHandler, make_server

from qwenvl_app import create_app
from qwenvl_app.backends.remote.backend import RemoteBackend
from qwenvl_app.generation import Phase
from qwenvl_app.settings import load_settings
from qwenvl_app.testing import ScriptedBackend
from tests.waiting import until

PROBE_S = 0.1


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        """Nothing: the application has a line of its own."""


@contextmanager
def served(
    backend: ScriptedBackend, tls: ssl.SSLContext | None = None, **settings: str
) -> Iterator[str]:
    """The address of a service around ``backend``."""
    app = create_app(load_settings(settings), backend)
    server = make_server(
        "127.0.0.1", 0, app, threaded=True, request_handler=_Quiet, ssl_context=tls
    )
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    app.extensions["qwenvl"]["close"]()


@contextmanager
def fronted(
    *urls: str, wait: bool = True, **settings: str
) -> Iterator[tuple[Flask, RemoteBackend]]:
    """The service in front of ``urls``, once one of them is well."""
    environ = {
        "QWENVL_BACKEND": "remote",
        "QWENVL_REMOTE_URL": ",".join(urls),
        "QWENVL_REMOTE_MODEL": "demo",
        **settings,
    }
    loaded = load_settings(environ)
    backend = RemoteBackend(loaded, PROBE_S)
    app = create_app(loaded, backend)
    try:
        if wait:
            until(
                lambda: all(each.problem is None for each in backend.upstreams.all),
                10,
                backend.status,
            )
            assert backend.status().phase is Phase.READY
        yield app, backend
    finally:
        app.extensions["qwenvl"]["close"]()
