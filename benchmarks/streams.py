"""What HTTP adds to the first token of a stream: ``python -m benchmarks.streams``.

Starts the service with a checkpoint on a free port, loads the same one in this process, and asks
both the same questions at one client, in turns, about a new picture each time. What both do: decode
the picture from its data URL, tokenise, prefill, make text of the token. What HTTP alone has: the
way to the service and back, on a connection that is there, the request's head and JSON, its
validation, a permit, the answer's head, the event. The client is a socket, so that what a client's
library takes for itself is not counted (Python's ``http.client`` adds half a millisecond). How the
tokens after it arrive is told by the gaps between the events, beside the engine's own.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.checkpoints import write_checkpoint
from qwenvl_app import process
from qwenvl_app.engine.engine import Engine, EngineOptions
from qwenvl_app.generation import GenerationRequest, SamplingParams, question
from qwenvl_app.loading.load import load, optimise
from qwenvl_app.web.chat.image_parts import load_image
from tests.e2e.server import Server

ASKED = "what is in this picture?"


def data_url(rng: np.random.Generator, edge: int) -> str:
    """A picture that nobody has seen."""
    noise = rng.integers(0, 256, (edge // 8, edge // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((edge, edge)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def of_engine(engine: Engine, url: str, sampling: SamplingParams) -> Iterator[None]:
    """One for each piece of text."""
    image, _ = load_image(url, "", 50.0, {})
    sequence = engine.submit(GenerationRequest(question(image, ASKED), "", sampling, stream=True))
    for delta in sequence:
        if delta.text:
            yield


def request(url: str, sampling: SamplingParams) -> bytes:
    """Head and body, as they are sent."""
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": ASKED},
    ]
    asked = {
        "messages": [{"role": "user", "content": content}],
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "max_tokens": sampling.max_new_tokens,
        "stream": True,
    }
    body = json.dumps(asked).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body


def of_http(connection: socket.socket, asked: bytes) -> Iterator[None]:
    """The same from events."""
    connection.sendall(asked)
    with connection.makefile("rb") as answer:
        if b" 200 " not in (status := answer.readline()):
            raise RuntimeError(status)
        for line in answer:
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if delta.get("content"):
                    yield
            elif line.startswith(b"data: [DONE]"):
                return
    raise RuntimeError("the stream has no end")


def times(pieces: Iterator[None], began: float) -> tuple[float, list[float]]:
    """Milliseconds to the first piece, and between each and the next."""
    at = [began, *(time.perf_counter() for _ in pieces)]
    gaps = [1000 * (later - earlier) for earlier, later in itertools.pairwise(at)]
    return gaps[0], gaps[1:]


def compare(model: str, edge: int, rounds: int, tokens: int) -> None:
    """Measure one model with pictures of one size, and print."""
    rng = np.random.default_rng(0)
    first: dict[str, list[float]] = {"engine": [], "http": []}
    gaps: dict[str, list[float]] = {"engine": [], "http": []}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(Server(directory / "log", QWENVL_MODEL=model))
        server.wait()
        loaded = optimise(load(model), cpp=True)
        engine = Engine(loaded, EngineOptions(4, 1024, 2**29, 2**28, 1024))
        stack.callback(engine.close)
        for number in range(-3, rounds):
            url = data_url(rng, edge)  # each of the two has a prefix cache of its own
            sampling = SamplingParams(temperature=1.0, seed=number + 3, max_new_tokens=tokens)
            for kind in ("engine", "http") if number % 2 else ("http", "engine"):
                with socket.create_connection(("127.0.0.1", server.port), 120) as connection:
                    asked = request(url, sampling)
                    time.sleep(0.01)  # until the service has accepted it
                    began = time.perf_counter()
                    if kind == "engine":
                        ttft, between = times(of_engine(engine, url, sampling), began)
                    else:
                        ttft, between = times(of_http(connection, asked), began)
                if number >= 0:
                    first[kind].append(ttft)
                    gaps[kind] += between
    pairs = zip(first["http"], first["engine"], strict=True)
    ratio = statistics.median(http / own for http, own in pairs)
    print(f"{Path(model).name}, {edge} x {edge} pixels, {rounds} pairs, {tokens} tokens")
    for kind, each in first.items():
        quiet, loud = np.percentile(gaps[kind], (50, 99))
        print(
            f"{kind:7}first token {statistics.median(each):7.1f} ms"
            f" (best {min(each):.1f}), gaps {quiet:.2f} ms, 99 % within {loud:.2f}"
        )
    print(
        f"http / engine {ratio:.2f}, best of each {min(first['http']) / min(first['engine']):.2f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    process.use_threads(0)  # as the service does
    sys.setswitchinterval(0.0002)
    compare("demo", 64, arguments.rounds, arguments.tokens)
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory))
        for edge in (256, 1024):
            compare(directory, edge, arguments.rounds, arguments.tokens)


if __name__ == "__main__":
    main()
