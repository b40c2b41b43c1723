"""What is measured. Each part yields rows: figures of one contender in one block, beside ``part``.

The contenders take turns, so that a busy moment of the machine hits all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice

from benchmarks.serving import contenders as who
from benchmarks.serving.asking import Contender, Question, easy_vqa, noise
from benchmarks.serving.load import arrivals, at_random, clients_at_once, repeat
from benchmarks.serving.rows import Row

PROMPTS = ("what is it?", "which color?", "how many?", "is it red?", "what shape?", "is it round?")
# Answers of those who come at random: how many of them have so many tokens.
LENGTHS, WEIGHTS = (4, 16, 48, 128), (4, 3, 2, 1)
POINTS = 64  # of a curve against tokens


@dataclass(frozen=True)
class Size:
    """How much is measured: ``blocks`` at most, and at least one, within ``seconds`` of a cell."""

    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    blocks: int = 6
    questions: int = 48  # of easy-VQA in a block
    seconds: float = 40.0
    tokens: int = 256
    replaced_clients: tuple[int, ...] = (1, 4)  # more only wait there
    paired_clients: tuple[int, ...] = (1, 4)  # whose long answers have more blocks than one
    long_blocks: int = 3
    longest: int = 1024
    shares: tuple[float, ...] = (0.5, 0.8, 0.95)  # of capacity
    arriving: int = 150  # at each share; as many for all, since a long queue takes long to build
    capacity_requests: int = 48
    megapixels: tuple[float, ...] = (0.06, 0.25, 1.0, 4.0, 12.0, 33.0)
    rounds: int = 3
    about_one: int = 4  # questions
    slots: tuple[int, ...] = (1, 2, 4, 8, 16)


FULL = Size()
QUICK = replace(
    FULL,
    clients=(1, 4),
    blocks=2,
    long_blocks=1,
    tokens=64,
    longest=256,
    shares=(0.8,),
    arriving=60,
    capacity_requests=24,
    megapixels=(0.06, 1.0, 12.0),
    rounds=1,
    slots=(1, 4),
)
SMALLEST = replace(
    QUICK,
    clients=(1, 2),
    blocks=1,
    questions=4,
    tokens=4,
    longest=8,
    arriving=4,
    capacity_requests=4,
    megapixels=(0.06, 0.25),
    about_one=2,
    slots=(),
)


def questions_of_easy_vqa(size: Size, them: list[Contender], rng: random.Random) -> Iterator[Row]:
    """Short answers, as a whole."""
    endless = easy_vqa(rng)
    for clients in size.clients:
        for block in repeat(size.blocks, size.seconds, f"easy-VQA, {clients} client(s)"):
            for each in them:
                if each.name == who.GENERATE and clients > 1:
                    continue
                asked = list(islice(endless, size.questions))
                row = clients_at_once(each, asked, clients, stream=False)
                yield row | {"block": block}


def long_answers(size: Size, them: list[Contender], rng: random.Random) -> Iterator[Row]:
    """Answers of so many tokens, as a whole: the rates."""
    for clients in size.clients:
        blocks = size.long_blocks if clients in size.paired_clients else 1
        title = f"{size.tokens} tokens, {clients} client(s)"
        for block in repeat(blocks, 2 * size.seconds, title):
            for each in _able(size, them, clients):
                asked = [noise(rng, 128, size.tokens) for _ in range(clients)]
                row = clients_at_once(each, asked, clients, stream=False)
                yield row | {"block": block}


def streams(size: Size, them: list[Contender], rng: random.Random) -> Iterator[Row]:
    """The same piece by piece: time to the first token and between tokens."""
    for clients in size.clients:
        for each in _able(size, them, clients):
            asked = [noise(rng, 128, size.tokens) for _ in range(max(3, clients))]
            yield clients_at_once(each, asked, clients, stream=True)


def longest_answers(size: Size, them: list[Contender], rng: random.Random) -> Iterator[Row]:
    """Very long answers, piece by piece; when each token came, of one client's."""
    for clients in size.paired_clients:
        for each in _able(size, them, clients):
            if each.name == who.REPLACED and clients > 1:
                continue
            asked = [noise(rng, 128, size.longest) for _ in range(clients)]
            if clients == 1:
                sample = each.ask(asked[0], stream=True)
                row = {"name": each.name, "errors": [sample.error] if sample.error else []}
                step = max(1, len(sample.pieces) // POINTS)
                curve = [round(1000 * at, 1) for at in sample.pieces[::step]]
                whole = sample.pieces[-1] if sample.pieces else 0.0
                yield row | {
                    "clients": 1,
                    "curve_ms": curve,
                    "answered": int(not sample.error),
                    "tokens": sample.tokens,
                    "seconds": whole,
                }
            else:
                yield clients_at_once(each, asked, clients, stream=True)


def arrivals_at_random(size: Size, them: list[Contender], rng: random.Random) -> Iterator[Row]:
    """Poisson arrivals of mixed lengths, at shares of what each can do with the same mix.

    The same requests for all. The gaps scale with what each can do, so that queues are as long.
    """
    seed = rng.getrandbits(32)

    def mixed(mix: random.Random) -> Iterator[Question]:
        while True:
            yield noise(mix, 128, mix.choices(LENGTHS, WEIGHTS)[0])

    for each in _servers(them):
        mix = random.Random(seed)
        asked = list(islice(mixed(mix), size.capacity_requests))
        full = clients_at_once(each, asked, max(size.clients), stream=True)
        capacity = full["answered"] / full["seconds"]
        for share in size.shares:
            rate = share * capacity
            times = islice(arrivals(random.Random(seed), rate), size.arriving)
            row = at_random(each, mixed(mix), list(times))
            yield row | {"share": share, "rate": round(rate, 2), "capacity": round(capacity, 2)}


def pictures(size: Size, them: list[Contender], rng: random.Random) -> Iterator[Row]:
    """Time to the first and only token about a JPEG of so many megapixels."""
    for megapixels in size.megapixels:
        side = round((megapixels * 1e6) ** 0.5)
        for block in repeat(size.rounds, size.seconds, f"{megapixels} megapixels"):
            for each in _servers(them):
                row = clients_at_once(each, [noise(rng, side, 1, "image/jpeg")], 1, stream=True)
                yield row | {"megapixels": megapixels, "block": block}


def one_picture(size: Size, them: list[Contender], rng: random.Random) -> Iterator[Row]:
    """Several questions about one picture of a megapixel, one after another."""
    for block in repeat(size.rounds, size.seconds, "the same picture"):
        for each in _servers(them):
            first = noise(rng, 1024, 1, "image/jpeg")
            for number, prompt in enumerate(PROMPTS[: size.about_one], 1):
                asked = [first._replace(prompt=prompt)]
                row = clients_at_once(each, asked, 1, stream=True)
                yield row | {"number": number, "block": block}


def slots(size: Size, checkpoint: str, rng: random.Random) -> Iterator[Row]:
    """Ours with so many slots, under as many clients as the most."""
    for count in size.slots:
        with ExitStack() as stack:
            name = f"{count} slot(s)"
            service = who.ours(stack, name, checkpoint, QWENVL_MAX_CONCURRENCY=str(count))
            for tokens in (4, size.tokens // 2):  # the first ones warm up
                asked = [noise(rng, 128, tokens) for _ in range(max(size.slots))]
                row = clients_at_once(service, asked, len(asked), stream=True)
            yield row | {"slots": count}


def _servers(them: list[Contender]) -> list[Contender]:
    return [each for each in them if each.name != who.GENERATE]


def _able(size: Size, them: list[Contender], clients: int) -> list[Contender]:
    """Without those that serve one at a time anyway."""
    return [
        each
        for each in them
        if (each.name != who.REPLACED or clients in size.replaced_clients)
        and (each.name != who.GENERATE or clients == 1)
    ]


Part = Callable[[Size, list[Contender], random.Random], Iterator[Row]]
# By the checkpoint that they are about.
DEMO: dict[str, Part] = {"easy-VQA": questions_of_easy_vqa}
LONG: dict[str, Part] = {
    "long": long_answers,
    "streams": streams,
    "longest": longest_answers,
    "arrivals": arrivals_at_random,
    "pictures": pictures,
    "one picture": one_picture,
}
