"""Options of gunicorn's under which this worker would misread requests."""

from __future__ import annotations

from gunicorn.config import Config

from qwenvl_app.settings import current

_HTTP = "let the proxy in front speak HTTP/1.1 to this service"
_TLS = (
    "terminate TLS in nginx (deploy/nginx.conf): a handshake here would hold up the one loop that "
    "reads every request"
)


def fault(cfg: Config) -> str | None:
    """One sentence for the operator about the first of them; None if there is none.

    The loop finds out where a request ends before gunicorn's parser reads it (``framing.py``), and
    under these options that parser reads something else than HTTP/1.1, or without a bound. TLS
    would have to be read by the loop too, and its records told apart there. The number of workers
    has to be the setting's.
    """
    wrong = {
        "workers": (
            cfg.workers != current().workers,
            "set QWENVL_WORKERS: a model can't be shared by several, and limits are divided by it",
        ),
        "certfile": (cfg.certfile is not None, _TLS),
        "keyfile": (cfg.keyfile is not None, _TLS),
        "limit_request_line": (
            cfg.limit_request_line == 0,
            "a request line has to have a limit, from 1 to 8190",
        ),
        "proxy_protocol": (
            cfg.proxy_protocol != "off",
            "let the proxy in front send X-Forwarded-For, and set trusted_hops",
        ),
        "protocol": (cfg.protocol != "http", _HTTP),
        "http2_cleartext": (cfg.http2_cleartext != "off", _HTTP),
    }
    for name, (is_set, remedy) in wrong.items():
        if is_set:
            value = getattr(cfg, name)
            return f"gunicorn's option {name} = {value!r} does not work with this worker; {remedy}"
    return None
