"""What the service adds in front of other servers: ``python -m benchmarks.gateway``.

A scripted upstream on loopback answers at once, so that all that is seen is the way through: small
chat requests without a picture, from so many connections that are kept, at one worker and at two.
The same requests are sent to the upstream itself. Of the service's processes also the CPU time is
told, which is what a request costs however busy the machine is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.e2e.server import Server
from tests.waiting import until
from tests.wire import send

ASKED = {"messages": [{"role": "user", "content": "what is a circle?"}], "max_tokens": 16}
PIECES = ("A", " round", " shape", ".")


def _event(delta: dict[str, str], finish: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    event = {"id": "x", "object": "chat.completion.chunk", "choices": [choice], **more}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def _http(body: bytes, kind: str) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


USAGE = {"prompt_tokens": 12, "completion_tokens": len(PIECES), "total_tokens": 12 + len(PIECES)}
STREAM = _http(
    b"".join(_event({"content": piece}) for piece in PIECES)
    + _event({}, "stop", usage=USAGE)
    + b"data: [DONE]\n\n",
    "text/event-stream",
)
MODELS = _http(json.dumps({"data": [{"id": "demo"}]}).encode(), "application/json")


class Upstream(asyncio.Protocol):
    """One connection: every request is answered with the same."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The loop's: a client has come."""
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        """The loop's: answer what is whole."""
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            _, _, length = head.partition(b"content-length: ")
            whole = end + 4 + int(length.split(b"\r\n")[0] or 0)
            if len(self.buffer) < whole:
                return
            self.buffer = self.buffer[whole:]
            self.transport.write(STREAM if head.startswith(b"post") else MODELS)
            if b"connection: close" in head:
                self.transport.close()


async def serve(port: int) -> None:
    """Answer on ``port`` until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    await server.serve_forever()


class Client(asyncio.Protocol):
    """A connection that asks again as soon as it has its answer."""

    def __init__(
        self, request: bytes, until: float, times: list[float], done: asyncio.Future[None]
    ):
        self.request, self.until, self.times, self.done = request, until, times, done
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The loop's: ask the first time."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        """Send the request, unless the time is up."""
        if (now := time.perf_counter()) >= self.until:
            self.transport.close()
            self.done.set_result(None)
            return
        self.began = now
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """The loop's: note the answer once it is whole."""
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
        if not found or len(body) < int(length):
            return
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(self.buffer[:500])
        self.buffer = b""
        self.times.append(time.perf_counter() - self.began)
        self.ask()


async def ask(port: int, connections: int, seconds: float) -> list[float]:
    """Seconds of every request of ``seconds`` of them, from ``connections`` at once."""
    body = json.dumps(ASKED).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    times: list[float] = []
    loop, end = asyncio.get_running_loop(), time.perf_counter() + seconds
    waiting = []
    for _ in range(connections):
        waiting.append(loop.create_future())
        done = waiting[-1]
        await loop.create_connection(
            lambda d=done: Client(request, end, times, d), "127.0.0.1", port
        )  # type: ignore[misc]
    await asyncio.gather(*waiting)
    return times


def cpu_s(pids: list[int]) -> float:
    """That the processes have had."""
    spent = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(f[11]) + int(f[12]) for f in spent) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def upstream() -> Iterator[int]:
    """The port of one, in a process of its own."""
    port = 18900 + os.getpid() % 90
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.gateway", "--serve", str(port)])
    try:
        until(lambda: send(port, "GET", "/v1/models").status == 200)
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def front(port: int, workers: int, connections: int) -> Iterator[Server]:
    """The service in front of ``port``, once all of its workers answer."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "QWENVL_BACKEND": "remote",
            "QWENVL_REMOTE_URL": f"http://127.0.0.1:{port}",
            "QWENVL_REMOTE_MODEL": "demo",
            "QWENVL_WORKERS": str(workers),
            "QWENVL_MAX_CONCURRENCY": str(2 * connections),
            "QWENVL_MAX_WAITING": str(2 * connections),
        }
        with Server(Path(folder) / "log", **settings) as server:
            server.wait()
            slots = f"qwenvl_batch_slots {2.0 * connections}"
            until(lambda: slots in send(server.port, "GET", "/metrics").body.decode())
            yield server


def tell(name: str, times: list[float], seconds: float, cpu: float | None = None) -> float:
    """Print one line; requests a second."""
    quiet, loud = np.percentile(times, (50, 99)) * 1000
    line = f"{name:12}{len(times) / seconds:8.0f} /s   p50 {quiet:6.1f} ms   p99 {loud:6.1f} ms"
    print(line + (f"   CPU {1000 * cpu / len(times):5.2f} ms a request" if cpu else ""))
    return len(times) / seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=int, metavar="PORT", help="be the upstream")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
    connections, seconds = arguments.connections, arguments.seconds
    with upstream() as port:
        alone = tell("upstream", asyncio.run(ask(port, connections, seconds)), seconds)
        for workers in arguments.workers:
            with front(port, workers, connections) as server:
                asyncio.run(ask(server.port, connections, 1))  # warms up
                before, pids = cpu_s(server.workers), server.workers
                times = asyncio.run(ask(server.port, connections, seconds))
                cpu = cpu_s(pids) - before
                rate = tell(f"{workers} worker(s)", times, seconds, cpu)
                print(f"{'':12}{rate / alone:8.3f} of the upstream's")


if __name__ == "__main__":
    main()
