"""Pictures by https address, from the hosts that the operator names (``image_hosts``)."""

from __future__ import annotations

import logging
import re
import ssl
import time
from collections.abc import Mapping

from qwenvl_app.errors import TooLarge
from qwenvl_app.service.admission import Admission
from qwenvl_app.service.deadline import Deadline
from qwenvl_app.settings import Settings
from qwenvl_app.web.chat.transfer import Place, TooManyBytes, TooSlow, Transfer, TransferError
from qwenvl_app.web.errors import InvalidParameter

log = logging.getLogger(__name__)

_MOST = 16  # addresses in one request
_TOTAL_S = 10.0  # for all of them
_LONGEST = 8192  # characters; those of S3 that are signed with a session have some 2,000
_PORT = 443
# What RFC 3986 allows, and nothing that two readers could read in two ways: no user, no escapes in
# the host, no IPv6, no backslash, no space. ASCII: or ſ and K would match s and k.
_HTTPS = re.compile(
    r"https://(?P<host>[a-z0-9.-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[a-z0-9._~:/@!$&'()*+,;=%\[\]-]*)?(?P<query>\?[a-z0-9._~:/@!$&'()*+,;=%\[\]?-]*)?"
    r"(?:#[a-z0-9._~:/@!$&'()*+,;=%\[\]?-]*)?",
    re.ASCII | re.IGNORECASE,
)


class Fetcher:
    """Fetches pictures before their request has a permit. ``fetch`` may be called on any thread.

    As many requests may fetch at once as may run and wait; one more is refused. Each has a thread
    of the server for it: see ``threads`` in config/gunicorn.conf.py.
    """

    def __init__(self, settings: Settings):
        self._hosts = frozenset(map(_host_and_port, settings.image_hosts))
        self._max_bytes = settings.max_upload_mb * 2**20
        self._context = ssl.create_default_context() if self._hosts else None
        self.admission = Admission(settings.max_concurrency + settings.max_waiting, 0, 0.0)

    def fetch(
        self, urls: Mapping[str, str], spent: int, deadline: Deadline, request_id: str
    ) -> dict[str, bytes]:
        """The bytes behind those of ``urls`` that are https, each with the field it stands in.

        They and the ``spent`` bytes of the request's body together have the limit of a body. Raises
        ServiceError; nothing has been fetched if one of the addresses is refused.
        """
        places = {url: self._place(url, param) for url, param in urls.items() if _is_https(url)}
        if not places or not self._context:
            return {}
        if len(places) > _MOST:
            raise InvalidParameter(
                f"messages: more than {_MOST} addresses of pictures.", "messages"
            )
        bodies: dict[str, bytes] = {}
        left = self._max_bytes - spent
        with self.admission.admit(deadline):
            ends = time.monotonic() + _TOTAL_S
            for url, place in places.items():
                transfer = Transfer(place, left, self._context)
                try:
                    bodies[url] = transfer.get(deadline, ends)
                except TransferError as error:
                    log.warning(
                        "no picture from %s (request %s): %s", place.host, request_id, error
                    )
                    raise self._refusal(error, urls[url]) from None
                left -= len(bodies[url])
        return bodies

    def _place(self, url: str, param: str) -> Place:
        found = _HTTPS.fullmatch(url) if len(url) <= _LONGEST else None
        if found:
            place = (found["host"].lower(), int(found["port"] or _PORT))
            if place in self._hosts:
                return Place(*place, (found["path"] or "/") + (found["query"] or ""))
        raise not_supported(param)

    def _refusal(self, error: TransferError, param: str) -> InvalidParameter | TooLarge:
        """What the client is told: nothing of what the host said, or of where it is."""
        if isinstance(error, TooManyBytes):
            limit = self._max_bytes // 2**20
            return TooLarge(f"{param}: the body and the pictures are over {limit} MB together.")
        if isinstance(error, TooSlow):
            return InvalidParameter(f"{param}: its host did not send the picture in time.", param)
        return InvalidParameter(f"{param}: the picture cannot be fetched from its host.", param)


def not_supported(param: str) -> InvalidParameter:
    """What every URL gets that is neither a picture itself nor an address that may be fetched."""
    return InvalidParameter(
        f"{param}: only data:image/...;base64,... is supported, "
        "and https addresses on hosts that the operator has named.",
        param,
    )


def _is_https(url: str) -> bool:
    return url[:6].lower() == "https:"


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.partition(":")
    return host, int(port or _PORT)
