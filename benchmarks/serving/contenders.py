"""Who is compared: ours, the replaced service, ``generate`` in this process, and any peer."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
import requests

from benchmarks.original import APP, OPTIONS, answer
from benchmarks.serving.asking import Contender, Question, Sample, chat, noise, recognize
from qwenvl_app.cli.answers import Broken, Failed, Refused
from qwenvl_app.cli.client import Client
from qwenvl_app.loading.load import load
from tests.e2e.server import Server

OURS, REPLACED, GENERATE = "qwenvl", "replaced service", "generate"
_MIB = 2**20


class Peer(NamedTuple):
    """One that runs already: where it serves the embedded model, and the benchmark's checkpoint."""

    name: str
    demo: str
    long: str

    @classmethod
    def parse(cls, text: str) -> Peer:
        """``name=URL,URL``; either URL may be empty. Raises ValueError."""
        name, _, urls = text.partition("=")
        demo, comma, long = urls.partition(",")
        if not (name and comma and (demo or long)):
            raise ValueError(f"{text!r} is not NAME=URL_OF_THE_DEMO,URL_OF_THE_CHECKPOINT")
        return cls(name, demo.rstrip("/"), long.rstrip("/"))


class Service:
    """A server of this machine, asked over HTTP. ``way`` is how; its processes go by the port."""

    def __init__(self, name: str, url: str, way: Callable[..., Sample]):
        self.name, self._url, self._way = name, url, way
        self._roots = _listening(urlsplit(url).port or 80)

    def ask(self, question: Question, *, stream: bool) -> Sample:
        """See Contender."""
        try:
            return self._way(self._url, question, stream=stream)
        except (Refused, Broken, requests.RequestException, KeyError) as error:
            return Sample((), 0, error=str(error)[:120] or type(error).__name__)

    def used(self) -> tuple[float, float | None]:
        """See Contender. Memory that processes share counts for each."""
        tree = [each for root in self._roots for each in (root, *root.children(recursive=True))]
        times = [each.cpu_times() for each in tree]
        resident = sum(each.memory_info().rss for each in tree) / _MIB
        return sum(spent.user + spent.system for spent in times), resident

    def settle(self, seconds: float) -> None:
        """Wait until it does nothing. ``seconds`` at most."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            before = self.used()[0]
            time.sleep(1)
            if self.used()[0] - before < 0.1:
                return


class Generate:
    """``model.generate`` by itself: no server, the picture from a file, as the replaced script."""

    name = GENERATE

    def __init__(self, checkpoint: str, folder: Path):
        self._loaded, self._picture = load(checkpoint), folder / "picture"

    def ask(self, question: Question, *, stream: bool) -> Sample:
        """See Contender; one thread, and the answer comes as a whole."""
        began = time.perf_counter()
        self._picture.write_bytes(question.image)
        text, tokens = answer(self._loaded, self._picture, question.prompt, question.tokens)
        return Sample((time.perf_counter() - began,), tokens, text)

    def used(self) -> tuple[float, float | None]:
        """See Contender."""
        times = os.times()
        return times.user + times.system, None


def _listening(port: int) -> list[psutil.Process]:
    """The processes that listen there, without their children. Raises ValueError for none."""
    found = {
        each.pid
        for each in psutil.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr[1] == port and each.pid
    }
    if not found:
        raise ValueError(f"no process of this machine listens at port {port}")
    return [each for each in map(psutil.Process, found) if each.ppid() not in found]


def over_chat(name: str, url: str) -> Service:
    """A server with OpenAI's route. Raises ValueError if there is none."""
    try:
        model = Client(url, None, 10, environment=False).models()[0]
    except (Failed, Refused, Broken, IndexError) as error:
        raise ValueError(f"{name} at {url}: {error}") from None
    return Service(
        name, url, lambda url, question, *, stream: chat(url, model, question, stream=stream)
    )


def _replaced(url: str) -> Service:
    return Service(REPLACED, url, recognize)


def start(stack: ExitStack, app: str, options: tuple[str, ...], **settings: str) -> str:
    """A service that ends with ``stack``, ready: its URL."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())  # no space: g++ would stumble
    server = stack.enter_context(Server(Path(folder) / "log", app, options, **settings))
    server.wait(seconds=300)
    return server.url


def ours(stack: ExitStack, name: str, checkpoint: str, **settings: str) -> Service:
    """Our service; as many wait as there are, as at the others."""
    settings = {"QWENVL_MODEL": checkpoint, "QWENVL_MAX_WAITING": "256"} | settings
    return over_chat(name, start(stack, "wsgi:app", (), **settings))


def compile_name(setting: str) -> str:
    """What ours is called with this ``compile``; the first one is ours as it comes."""
    return OURS if setting == "auto" else f"{OURS}, compile = {setting}"


def all_of(
    stack: ExitStack, checkpoint: str, compile_settings: list[str], peers: dict[str, str]
) -> list[Contender]:
    """All that serve ``checkpoint``, started, warm and at rest; without g++ nothing compiled."""
    services = []
    for setting in compile_settings:
        if setting != "on" or shutil.which("g++"):
            more = {"QWENVL_COMPILE": setting, "QWENVL_REPETITION_LIMIT": "0"}
            services.append(ours(stack, compile_name(setting), checkpoint, **more))
    services.append(_replaced(start(stack, APP, OPTIONS, QWENVL_MODEL=checkpoint)))
    services += [over_chat(name, url) for name, url in peers.items() if url]
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    generate = Generate(checkpoint, folder)
    them: list[Contender] = [*services, generate]
    for each in them:
        sample = each.ask(noise(random.Random(), 64, 16), stream=True)
        if sample.error:
            raise ValueError(f"{each.name}: {sample.error}")
    for service in services:
        service.settle(seconds=120)
    return them
