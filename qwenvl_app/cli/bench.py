"""``qwenvl bench``: a short load test of any server that answers questions about pictures."""

from __future__ import annotations

import io
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import click
import numpy as np
from PIL import Image

from qwenvl_app.cli.answers import Answer, Broken, Failed, Refused
from qwenvl_app.cli.client import Client, Picture, Pieces

_USUAL_CLIENTS = 4
_CENTILES = (50, 95, 99)


class Load(NamedTuple):
    """What is sent: so many ``requests`` by each number of ``clients`` in turn.

    Each has a picture of its own, ``side`` pixels wide and high.
    """

    route: str
    clients: list[int]
    requests: int
    prompt: str
    side: int
    model: str = ""


@dataclass
class Measured:
    """What so many clients got. Seconds; times to the first piece are of answers that came."""

    clients: int
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    tokens: int | None = 0
    errors: Counter[str] = field(default_factory=Counter)

    def report(self) -> dict[str, Any]:
        """Figures that may be printed."""
        answered, seconds = len(self.first), self.seconds
        figures: dict[str, Any] = {
            "clients": self.clients,
            "answered": answered,
            "errors": dict(self.errors),
            "seconds": round(seconds, 3),
            "requests_per_s": round(answered / seconds, 2),
            "tokens_per_s": None if self.tokens is None else round(self.tokens / seconds, 1),
        }
        for centile in _CENTILES:
            spent = float(np.percentile(self.first, centile)) * 1000 if self.first else None
            figures[f"ttft_p{centile}_ms"] = None if spent is None else round(spent, 1)
        return figures


def noise(rng: random.Random, side: int) -> bytes:
    """A PNG that no other is like, so that no server knows it from before."""
    grain = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grain).resize((side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def bench(client: Client, load: Load, *, as_json: bool) -> bool:
    """Measure and print; whether all was answered. Raises Failed if not even one request is."""
    load = _complete(client, load)
    rng = random.Random()
    try:
        for _ in _asked(client, load, _picture(load, rng)):  # the first one is slower than others
            pass
    except (Refused, Broken) as error:
        raise Failed(f"{client.url}: {error}") from None
    reports = []
    for count in load.clients:
        pictures = [_picture(load, rng) for _ in range(load.requests)]
        reports.append(_measure(client, load, count, pictures).report())
        if not as_json:
            _print(reports[-1], head=len(reports) == 1)
    if as_json:
        known = {"url": client.url, "route": load.route, "requests": load.requests}
        click.echo(json.dumps(known | {"runs": reports}, ensure_ascii=False))
    return not any(report["errors"] for report in reports)


def _complete(client: Client, load: Load) -> Load:
    """What the server is to say: a model's name, which others than ours want, and its clients."""
    try:
        if load.route == "chat" and not load.model:
            load = load._replace(model=next(iter(client.models()), ""))
        if not load.clients:
            load = load._replace(clients=sorted({1, client.slots() or _USUAL_CLIENTS}))
    except (Refused, Broken) as error:
        raise Failed(f"{client.url}: {error}") from None
    return load


def _picture(load: Load, rng: random.Random) -> Picture:
    return Picture(noise(rng, load.side), "image/png")


def _measure(client: Client, load: Load, count: int, pictures: list[Picture]) -> Measured:
    """All requests, ``count`` under way at any time."""
    measured, lock = Measured(count), threading.Lock()

    def one(picture: Picture) -> None:
        try:
            first, tokens = _time(_asked(client, load, picture))
        except (Refused, Broken) as error:
            with lock:
                measured.errors[str(getattr(error, "status", None) or error)] += 1
            return
        with lock:
            measured.first.append(first)
            known = measured.tokens is not None and tokens is not None
            measured.tokens = (measured.tokens or 0) + (tokens or 0) if known else None

    began = time.perf_counter()
    _at_once(one, pictures, count)
    measured.seconds = time.perf_counter() - began
    return measured


def _asked(client: Client, load: Load, picture: Picture) -> Pieces:
    if load.route == "chat":
        return client.chat([picture], load.prompt, load.model)
    return client.stream(picture, load.prompt)


def _at_once(one: Callable[[Picture], None], pictures: list[Picture], count: int) -> None:
    """In ``count`` threads, which are daemons: Ctrl-C waits for no answer."""
    left = iter(pictures)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                picture = next(left, None)
            if picture is None:
                return
            one(picture)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _time(pieces: Pieces) -> tuple[float, int | None]:
    """Seconds to the first piece, and tokens if the server counts them."""
    began, first = time.perf_counter(), None
    for piece in pieces:
        first = first or time.perf_counter() - began
        if isinstance(piece, Answer):
            return first, (piece.usage or {}).get("completion_tokens")
    raise Broken("the answer was broken off")


_COLUMNS = {
    "clients": "clients",
    "answered": "answered",
    "failed": "errors",
    "requests_per_s": "requests/s",
    "tokens_per_s": "tokens/s",
    "ttft_p50_ms": "TTFT p50",
    "ttft_p95_ms": "p95",
    "ttft_p99_ms": "p99 ms",
}


def _print(report: dict[str, Any], *, head: bool) -> None:
    """A row of the table, below what its columns are called."""
    if head:
        click.echo("  ".join(f"{name:>10}" for name in _COLUMNS.values()))
    figures = report | {"failed": sum(report["errors"].values())}
    cells = ["-" if (cell := figures[key]) is None else str(cell) for key in _COLUMNS]
    click.echo("  ".join(f"{cell:>10}" for cell in cells))
    for error, times in report["errors"].items():
        click.echo(f"qwenvl: {times} times {error}", err=True)
