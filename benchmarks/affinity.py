"""What it gains that questions about a picture go to one server: ``python -m benchmarks.affinity``.

The remote backend with four scripted servers on loopback. Each knows the pictures it was asked
about last: an unknown one takes ``COLD_S`` of it before the first token, a known one ``KNOWN_S``,
one after the other as a GPU does it; then each answer takes ``DECODE_S``, beside the others. Users
ask several questions about a picture, one after the other, and then about another picture. All of
it waits and computes nothing, so that a busy machine tells the same.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from PIL import Image

from benchmarks.gateway import MODELS, STREAM
from qwenvl_app.backends.remote import upstreams
from qwenvl_app.backends.remote.backend import RemoteBackend
from qwenvl_app.generation import GenerationRequest, Phase, question
from qwenvl_app.settings import load_settings
from tests.waiting import until

COLD_S, KNOWN_S, DECODE_S = 0.2, 0.02, 0.3
PORT = 18960


class Engine:
    """A server with a cache of ``size`` pictures, told apart by the bytes of the request."""

    def __init__(self, size: int):
        self.size = size
        self.cache: OrderedDict[bytes, None] = OrderedDict()
        self.asked = self.known = 0
        self.prefill = asyncio.Lock()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until its client closes it."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if not head.startswith(b"post"):
                    writer.write(MODELS)
                    continue
                length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                await self.work(body.partition(b"base64,")[2].partition(b'"')[0])
                writer.write(STREAM)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def work(self, picture: bytes) -> None:
        """Take the time."""
        async with self.prefill:
            known = picture in self.cache
            self.asked, self.known = self.asked + 1, self.known + known
            self.cache[picture] = None
            self.cache.move_to_end(picture)
            if len(self.cache) > self.size:
                self.cache.popitem(last=False)
            await asyncio.sleep(KNOWN_S if known else COLD_S)
        await asyncio.sleep(DECODE_S)


@contextmanager
def engines(count: int, size: int) -> Iterator[list[Engine]]:
    """So many, on a thread; always at the same addresses, from which favourites follow."""
    made = [Engine(size) for _ in range(count)]
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        for number, engine in enumerate(made, 1):
            await asyncio.start_server(engine.answer, f"127.0.0.{number}", PORT)
        ready.set()
        await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    ready.wait(10)
    try:
        yield made
    finally:
        stop.set()
        thread.join()


def pictures(count: int) -> list[Image.Image]:
    """Small ones, all different."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in noise]


def measure(floor: float | None, users: int, count: int, asked: int, size: int) -> str:
    """One line; ``floor`` None: least busy, whatever the picture."""
    with engines(count, size) as made:
        urls = [f"http://127.0.0.{number}:{PORT}" for number in range(1, count + 1)]
        settings = load_settings(
            {}, backend="remote", remote_url=urls, remote_model="demo", max_concurrency=users
        )
        backend = RemoteBackend(settings)
        until(lambda: all(each.problem is None for each in backend.upstreams.all))
        assert backend.status().phase is Phase.READY
        choose = backend.upstreams.choose
        if floor is None:
            backend.upstreams.choose = lambda _, tried: choose(None, tried)  # type: ignore[method-assign]
        else:
            upstreams.FLOOR = floor
        times: list[float] = []

        def user(number: int) -> None:
            pause = random.Random(number)
            for picture in pictures(4 * users)[number::users]:
                for _ in range(asked):
                    time.sleep(pause.expovariate(1 / 0.1))
                    began = time.monotonic()
                    list(backend.generate(GenerationRequest(question(picture, "what?"), "x")))
                    times.append(time.monotonic() - began)

        with ThreadPoolExecutor(users) as pool:
            list(pool.map(user, range(users)))
        backend.close()
        known, total = (sum(getattr(e, name) for e in made) for name in ("known", "asked"))
        most = max(engine.asked for engine in made) / total * count
        quiet, loud = (1000 * float(np.percentile(times, p)) for p in (50, 95))
        name = "least busy" if floor is None else f"floor of {floor:g}"
        return (
            f"{name:12} known {known / total:4.0%}   median {quiet:4.0f} ms   95 % {loud:5.0f} ms"
            f"   the busiest has {most:.2f} of the mean"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--users", type=int, nargs="+", default=[4, 8, 24])
    parser.add_argument("--asked", type=int, default=5, help="questions about a picture")
    parser.add_argument("--cached", type=int, default=32, help="pictures that a server knows")
    arguments = parser.parse_args()
    for users in arguments.users:
        print(f"{arguments.engines} servers, {users} users")
        for floor in (None, 1.0, 2.0, 4.0):
            print(measure(floor, users, arguments.engines, arguments.asked, arguments.cached))


if __name__ == "__main__":
    main()
