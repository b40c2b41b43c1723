"""Many questions at once: by so many clients, or at random times whoever is served."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, count

from tqdm import tqdm

from benchmarks.serving.asking import Contender, Question, Sample
from benchmarks.serving.rows import Row

_MOST_CLIENTS = 256


def clients_at_once(
    contender: Contender, questions: list[Question], clients: int, *, stream: bool
) -> Row:
    """``clients`` ask one after another until all ``questions`` are answered: figures."""
    before, began = contender.used()[0], time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        samples = list(pool.map(lambda each: contender.ask(each, stream=stream), questions))
    spent = time.perf_counter() - began
    return figures(contender, questions, samples, spent, before) | {"clients": clients}


def arrivals(rng: random.Random, rate: float) -> Iterator[float]:
    """Seconds at which requests come, independent of one another: ``rate`` a second, endlessly."""
    return accumulate(rng.expovariate(rate) for _ in count())


def at_random(
    contender: Contender, questions: Iterable[Question], times: list[float], *, stream: bool = True
) -> Row:
    """A question at each of ``times``, whether or not the ones before are answered: figures."""
    taken = [question for question, _ in zip(questions, times, strict=False)]
    before, began = contender.used()[0], time.perf_counter()
    with ThreadPoolExecutor(_MOST_CLIENTS) as pool:
        running = []
        for question, at in zip(taken, times, strict=True):
            time.sleep(max(0.0, began + at - time.perf_counter()))
            running.append(pool.submit(contender.ask, question, stream=stream))
        samples = [each.result() for each in running]
    return figures(contender, taken, samples, time.perf_counter() - began, before)


def figures(
    contender: Contender,
    questions: list[Question],
    samples: list[Sample],
    spent: float,
    cpu_before: float,
) -> Row:
    """What is kept of a run. Milliseconds of each answer, so that runs can be put together."""
    good = [each for each in samples if not each.error]
    pairs = zip(samples, questions, strict=True)
    after, resident = contender.used()
    return {
        "name": contender.name,
        "seconds": round(spent, 4),
        "answered": len(good),
        "tokens": sum(each.tokens for each in good),
        "cpu_s": round(after - cpu_before, 3),
        "rss_mib": resident and round(resident, 1),
        "first_ms": [_ms(each.pieces[0]) for each in good],
        "token_ms": [_ms(gap) for each in good if (gap := each.per_token) is not None],
        "whole_ms": [_ms(each.pieces[-1]) for each in good],
        "errors": sorted({each.error for each in samples if each.error}),
        "failed": len(samples) - len(good),
        "wrong": sum(
            bool(asked.expected) and not each.error and each.text.strip() != asked.expected
            for each, asked in pairs
        ),
    }


def repeat(blocks: int, seconds: float, title: str) -> Iterator[int]:
    """Numbers of blocks: one at least, then up to ``blocks`` until ``seconds`` are gone."""
    until = time.monotonic() + seconds
    for block in tqdm(range(blocks), desc=title, leave=False):
        if block and time.monotonic() > until:
            return
        yield block


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
