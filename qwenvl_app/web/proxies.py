"""The client's address, where a request came through proxies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from werkzeug.middleware.proxy_fix import ProxyFix

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment


def trust(app: WSGIApplication, hops: int) -> ProxyFix:
    """``app``, told the address and the scheme that the last ``hops`` proxies say."""
    return ProxyFix(app, x_for=hops, x_proto=hops)


def client(peer: object, headers: Iterable[tuple[str, str]], hops: int) -> str:
    """The address that ``trust`` tells an application; "-" for one that has none.

    ``peer`` is as of ``accept``; ``headers`` are gunicorn's, with names in upper case.
    """
    address = str(peer[0]) if isinstance(peer, tuple) else "-"
    sent = [value for name, value in headers if name == "X-FORWARDED-FOR"]
    environ: WSGIEnvironment = {"REMOTE_ADDR": address, "HTTP_X_FORWARDED_FOR": ",".join(sent)}
    trust(lambda _environ, _start: [], hops)(environ, lambda *_: lambda _: None)
    return str(environ["REMOTE_ADDR"])
