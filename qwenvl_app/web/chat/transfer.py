"""One GET over TLS, to addresses that were checked, bounded in bytes and in time.

With http.client, and without what is built on it: urllib3 logs the whole URL where the headers of
an answer are broken, and a URL may hold a token. requests would follow redirects, take proxies from
the environment and decode what is encoded.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple

from qwenvl_app.service.deadline import Deadline
from qwenvl_app.version import VERSION

_PIECE = 64 * 1024
_CONNECT_S = 3.0  # of one address, so that there is time for the next one
_PROTOCOLS = IPv4Network("192.0.0.0/24")  # IANA; Python has all of it since 3.12.4
_UNICAST = IPv6Network("2000::/3")  # all that IANA has given out
_TUNNELS = (IPv6Network("2002::/16"), IPv6Network("2001::/32"))  # 6to4 and Teredo
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: IPv4 as an IPv6-only network reaches it


class TransferError(Exception):
    """There are no bytes. The message is for the log: it has no URL and no address."""


class TooManyBytes(TransferError):
    """The body is over the limit."""


class TooSlow(TransferError):
    """The time is up."""


class Place(NamedTuple):
    """What is asked of whom: ``target`` is a path with its query, in ASCII."""

    host: str
    port: int
    target: str


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, as is what it stands for if it is mapped.

    Not: loopback, private, link-local, shared (RFC 6598), multicast and reserved ones, tunnels.
    """
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return is_public(str(ip_address(ip.packed[-4:])))
        return ip in _UNICAST and ip.is_global and not any(ip in net for net in _TUNNELS)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip in _PROTOCOLS)


class Transfer:
    """One body on its way, on a thread of its own: nothing interrupts the look-up of a name."""

    def __init__(self, place: Place, limit: int, context: ssl.SSLContext):
        self._place, self._limit, self._context = place, limit, context
        self._lock = threading.Lock()
        self._socket: ssl.SSLSocket | None = None
        self._aborted = False
        self._settled = threading.Event()
        self._body = b""
        self._failure: Exception | None = None

    def get(self, deadline: Deadline, ends: float) -> bytes:
        """The body, of at most ``limit`` bytes. Once.

        ``ends`` is of ``time.monotonic()``. Raises TransferError, and what ``deadline`` does; at
        once if the client leaves.
        """
        ends = min(ends, deadline.at)
        threading.Thread(target=self._run, args=(ends,), name="transfer", daemon=True).start()
        with deadline.on_leaving(self._abort):
            in_time = self._settled.wait(max(0.0, ends - time.monotonic()))
        self._abort()
        deadline.check()
        if not in_time:  # what the thread has by now may have been cut by the line above
            raise TooSlow("it was too slow")
        if self._failure:
            raise self._failure
        return self._body

    def _run(self, ends: float) -> None:
        try:
            self._body = self._receive(ends)
        except TimeoutError:
            self._failure = TooSlow("it was too slow")
        except (OSError, http.client.HTTPException, ValueError) as error:
            # The class alone: a message may quote what the host sent. ValueError is http.client's
            # for a broken chunk.
            self._failure = TransferError(type(error).__name__)
        except Exception as error:
            self._failure = error
        finally:
            with self._lock:
                if self._socket:
                    self._socket.close()
            self._settled.set()

    def _abort(self) -> None:
        """End the wait, and the thread as soon as it has a socket. Any thread, any time."""
        with self._lock:
            self._aborted = True
            if self._socket:
                # Of the plain socket: SSLSocket's own drops the TLS state under the reading thread.
                with suppress(OSError):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        self._settled.set()

    def _receive(self, ends: float) -> bytes:
        host, port, target = self._place
        # Looked up once: what is connected to is what was checked, whatever the name says later.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not all(map(is_public, addresses)):
            raise TransferError("its name leads to an address that is not public")
        connection = http.client.HTTPConnection(host, port)
        with _connect(addresses, port, ends) as plain:
            connection.sock = self._secure(plain, ends)
        headers = {
            "Host": host if port == http.client.HTTPS_PORT else f"{host}:{port}",
            "User-Agent": f"qwenvl/{VERSION}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            return self._read(response)

    def _secure(self, plain: socket.socket, ends: float) -> ssl.SSLSocket:
        """TLS with the host that was named. From here on ``_abort`` ends the thread."""
        plain.settimeout(_left(ends))
        secured = self._context.wrap_socket(
            plain, server_hostname=self._place.host, do_handshake_on_connect=False
        )
        with self._lock:
            self._socket = secured
            if self._aborted:
                raise TooSlow("nobody waits for it")
        secured.do_handshake()
        return secured

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != http.client.OK:
            raise TransferError(f"status {response.status}")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise TransferError("the body is encoded")
        if (response.length or 0) > self._limit:
            raise TooManyBytes("the body is too large")
        body = bytearray()
        while piece := response.read(_PIECE):
            body += piece
            if len(body) > self._limit:
                raise TooManyBytes("the body is too large")
        if response.length:  # what is left of it
            raise TransferError("the body ended too early")
        return bytes(body)


def _connect(addresses: list[str], port: int, ends: float) -> socket.socket:
    """A connection to the first that takes one. Raises OSError of the last."""
    failure = OSError("no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), min(_CONNECT_S, _left(ends)))
        except OSError as error:
            failure = error
    raise failure


def _left(ends: float) -> float:
    if (left := ends - time.monotonic()) <= 0:
        raise TimeoutError
    return left
