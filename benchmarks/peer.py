"""Beside another server: ``python -m benchmarks.peer --url http://127.0.0.1:8999 --model demo``.

It has to serve the same checkpoint, on this machine, through OpenAI's route for chats; how vLLM
does is in ``benchmarks/RESULTS.md``. Ours, ours with ``compile = "on"``, the replaced service and
the peer take turns with the same work. No picture is asked about twice, so no cache helps anybody.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import requests
from PIL import Image

from benchmarks.checkpoints import write_checkpoint
from benchmarks.original import APP, OPTIONS
from benchmarks.throughput import NEW_TOKENS, answered, paired, ratio
from demo.evaluate import Case, ask, package_cases
from qwenvl_app.cli.bench import noise
from tests.e2e.server import Server

REPLACED = "the replaced service"
_local = threading.local()


class Work(NamedTuple):
    """What is asked. ``exact``: answers have this many tokens, and nobody reads them."""

    cases: Iterator[Case]
    each: int  # questions of a client in one turn
    tokens: int
    exact: bool
    unit: str


def ask_peer(url: str, model: str, work: Work, case: Case) -> str:
    """The peer's answer. Raises requests.HTTPError, and RuntimeError when it ends too early."""
    if not hasattr(_local, "session"):
        _local.session = requests.Session()
    data = f"data:{case.image_type};base64,{base64.b64encode(case.image).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": case.prompt},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": work.tokens,
        "ignore_eos": work.exact,  # as vLLM, SGLang and others call it
    }
    response = _local.session.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    response.raise_for_status()
    answer = response.json()
    if work.exact and (count := answer["usage"]["completion_tokens"]) != work.tokens:
        raise RuntimeError(f"{count} tokens, not {work.tokens}")
    return str(answer["choices"][0]["message"]["content"])


def long_cases(rng: random.Random) -> Iterator[Case]:
    """Small pictures, and an answer that nobody reads."""
    while True:
        yield Case("", noise(rng, 128), "image/png", "what is it?", "")


def short_cases(rng: random.Random) -> Iterator[Case]:
    """easy-VQA's, each picture with a pixel of its own: there are fewer than are asked about."""
    cases = list({case.image: case for case in package_cases()}.values())
    while True:
        rng.shuffle(cases)
        for case in cases:
            image = Image.open(io.BytesIO(case.image)).convert("RGB")
            spot = rng.randrange(image.width), rng.randrange(image.height)
            image.putpixel(spot, tuple(rng.randbytes(3)))
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            yield case._replace(image=buffer.getvalue(), image_type="image/png")


def measure(ways: dict[str, Callable[[Case], str]], work: Work, clients: int, blocks: int) -> None:
    """Let all ``ways`` take turns, and print how fast they are and how often wrong."""
    wrong = dict.fromkeys(ways, 0)

    def turn(name: str) -> float:
        cases = list(islice(work.cases, work.each * clients))
        spent, answers = answered(ways[name], cases, clients)
        if not work.exact:
            pairs = zip(answers, cases, strict=True)
            wrong[name] += sum(answer.strip() != case.expected for answer, case in pairs)
        return spent

    turns = {name: partial(turn, name) for name in ways}
    seconds = paired(turns, blocks, f"{clients} client(s)")
    for name, spent in seconds.items():
        amount = clients * work.each * (work.tokens if work.exact else 1)
        print(
            f"{clients} client(s), {name}: {amount / statistics.median(spent):.1f} {work.unit}/s;"
            f" ours / it {ratio(seconds, name, 'ours'):.2f},"
            f" it / {REPLACED} {ratio(seconds, REPLACED, name):.2f}; {wrong[name]} wrong"
        )


def main() -> None:
    """Start ours and the replaced service, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="the peer's, without /v1")
    parser.add_argument("--model", required=True, help="the model's name there")
    parser.add_argument("--long", type=Path, help="256 tokens; a checkpoint, made if not there")
    parser.add_argument("--blocks", type=int, default=10)
    arguments = parser.parse_args()
    rng = random.Random()
    work = Work(short_cases(rng), 20, 16, False, "requests")
    if checkpoint := arguments.long:
        if not checkpoint.exists():
            checkpoint.mkdir(parents=True)
            write_checkpoint(checkpoint)
            parser.exit(0, f"{checkpoint} is written: serve it at {arguments.url}, then again\n")
        work = Work(long_cases(rng), 1, NEW_TOKENS, True, "tokens")
    settings = {
        "QWENVL_MODEL": str(checkpoint or "demo"),
        "QWENVL_MAX_NEW_TOKENS": str(work.tokens),
        "QWENVL_REPETITION_LIMIT": "0",
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ways = {"the peer": partial(ask_peer, arguments.url, arguments.model, work)}
        for name, app, options, more in (
            ("ours", "wsgi:app", (), {}),
            ("ours, compiled", "wsgi:app", (), {"QWENVL_COMPILE": "on"}),
            (REPLACED, APP, OPTIONS, {}),
        ):
            place = Path(folder, str(len(ways)))  # no space: g++ would stumble
            place.mkdir()
            server = Server(place / "log", app, options, **settings | more)
            stack.callback(server.stop)
            server.wait(seconds=200)
            ways[name] = partial(ask, server.url)
        for clients in (1, 4):
            measure(ways, work, clients, arguments.blocks)


if __name__ == "__main__":
    main()
