"""A host of pictures on this machine: TLS, and every way to answer badly. Also a false DNS."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.wire import PNG

NAME = "img.example"
OK = b"HTTP/1.1 200 OK\r\n"
Behaviour = Callable[["ImageHost", socket.socket], None]


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    about = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run(
        [*make.split(), *about, "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return cert, key


def whole(body: bytes, *headers: str, length: int | None = None) -> Behaviour:
    """Answers 200 with ``body``, and says that it is ``length`` long."""
    lines = [f"Content-Length: {len(body) if length is None else length}", *headers]
    return raw(OK + "".join(line + "\r\n" for line in lines).encode() + b"\r\n" + body)


def raw(answer: bytes) -> Behaviour:
    return lambda host, connection: connection.sendall(answer)


def repeated(first: bytes, piece: bytes, pause_s: float) -> Behaviour:
    """``first``, and then ``piece`` for ever."""

    def answer(host: ImageHost, connection: socket.socket) -> None:
        connection.sendall(first)
        while not host.closing.wait(pause_s):
            connection.sendall(piece)

    return answer


def reset(host: ImageHost, connection: socket.socket) -> None:
    connection.sendall(OK)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"
WELL: dict[str, Behaviour] = {
    "/a.png": whole(PNG, "Content-Type: text/plain"),
    "/chunked": raw(CHUNKS + b"%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG)),
    "/until-the-end": raw(OK + b"\r\n" + PNG),
    "/identity": whole(PNG, "Content-Encoding: identity"),
}
NOT_FETCHED: dict[str, Behaviour] = {
    "/302": raw(b"HTTP/1.1 302 Found\r\nLocation: /a.png\r\nContent-Length: 0\r\n\r\n"),
    "/404": raw(b"HTTP/1.1 404 Secret\r\nContent-Length: 6\r\n\r\nsecret"),
    "/206": raw(b"HTTP/1.1 206 Partial\r\nContent-Length: %d\r\n\r\n%b" % (len(PNG), PNG)),
    "/garbage": raw(b"secret\0" * 99),
    "/nothing": raw(b""),
    "/reset": reset,
    "/half": whole(PNG[:99], length=len(PNG)),
    "/half-a-chunk": raw(CHUNKS + b"fff\r\nsecret"),
    "/a-bad-chunk": raw(CHUNKS + b"-5\r\nsecret\r\n0\r\n\r\n"),
    "/a-long-header": raw(OK + b"X: " + b"secret" * 20_000 + b"\r\n\r\n"),
    "/many-headers": raw(OK + b"X: secret\r\n" * 200 + b"\r\n"),
    "/gzip": whole(PNG, "Content-Encoding: gzip"),
    "/unknown-encoding": whole(PNG, "Content-Encoding: identity, br"),
}
NO_PICTURE: dict[str, Behaviour] = {
    "/text": whole(b"secret", "Content-Type: image/png"),
    "/empty": whole(b""),
    "/too-short-a-length": whole(PNG, length=99),
    "/svg": whole(b"<svg xmlns='http://www.w3.org/2000/svg'>secret</svg>"),
}
TOO_LARGE: dict[str, Behaviour] = {
    "/endless": repeated(OK + b"\r\n", b"secret" * 10_000, 0),
    "/endless-chunks": repeated(CHUNKS, b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n", 0),
    "/a-length-over-the-limit": repeated(OK + b"Content-Length: 99999999\r\n\r\n", b"x", 0.01),
}
TOO_SLOW: dict[str, Behaviour] = {
    "/silence": repeated(b"", b"", 0.01),
    "/a-trickle": repeated(OK + b"\r\n", b"x", 0.01),
    "/a-trickle-that-closes": repeated(OK + b"Connection: close\r\n\r\n", b"x", 0.01),
    "/a-trickle-of-a-header": repeated(OK + b"X: ", b"x", 0.01),
    "/a-trickle-of-headers": repeated(
        b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 C\r\n\r\n", 0.01
    ),
    "/a-trickle-of-chunks": repeated(CHUNKS, b"1\r\nx\r\n", 0.01),
}
ANSWERS = WELL | NOT_FETCHED | NO_PICTURE | TOO_LARGE | TOO_SLOW


class ImageHost:
    """Counts who connects and notes what is asked. Without a certificate it never answers."""

    def __init__(self, files: tuple[Path, Path] | None = None):
        self._context = None
        if files:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*files)
        self.closing = threading.Event()
        self.accepted = 0
        self.heads: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, name="host")]
        self._threads[0].start()

    def close(self) -> None:
        self.closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        self._listener.close()

    def _accept(self) -> None:
        while not self.closing.is_set():
            with suppress(OSError):
                connection, _ = self._listener.accept()
                self.accepted += 1
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        with connection, suppress(OSError):
            if not self._context:
                self.closing.wait(10)
                return
            with self._context.wrap_socket(connection, server_side=True) as secured:
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (piece := secured.recv(9999)):
                        return
                    head += piece
                self.heads.append(head.decode())
                ANSWERS[head.split()[1].decode().split("?")[0]](self, secured)


class FalseDNS:
    """In place of ``socket.getaddrinfo``. ``answers`` by name: each once, the last for ever."""

    def __init__(self, **answers: list[list[str]]):
        self.real = socket.getaddrinfo
        self.answers = {name.replace("_", "."): answer for name, answer in answers.items()}
        self.asked: list[str] = []

    def __call__(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host[-1].isdigit() or ":" in host:  # an address already: no look-up
            return self.real(host, port, *args, **kwargs)
        self.asked.append(host)
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        answers = self.answers[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for each in found for entry in self.real(each, port, *args, **kwargs)]
