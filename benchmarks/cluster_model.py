"""A cluster as a discrete-event simulation: clients, front ends, engines.

``capacity.py`` asks and draws it. A *front end* is one process, a queue with one server: a request
costs it ``front_s``, once. An *engine* is one GPU: prefills run one after the other and stop
decoding as long as they run (mixed into its steps, as vLLM does it, they take the same time of the
GPU); each step then gives every live request a token. Where a request goes is decided as the remote
backend does: by each front end alone, which knows its own requests only.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

SHARE = 1.25  # of the mean load that a picture's favourite may have


@dataclass(frozen=True)
class Cluster:
    """What there is, and what work costs on it; seconds."""

    fronts: int
    engines: int
    slots: int
    front_s: float
    prefill_s: float  # picture and prompt
    known_s: float  # the prompt alone: the picture is cached
    step_s: Callable[[int], float]  # of so many rows
    cached: int = 0  # pictures that one engine's cache holds
    waiting: int = 128  # requests that may wait for one engine; one more is refused
    hashing: bool = True  # a picture has a favourite; else: the least busy
    floor: float = 1.0  # requests of one front end that a favourite may always have


@dataclass(frozen=True)
class Load:
    """Requests at random times, about picture ``k`` with a chance of 1 / k ** ``zipf``."""

    requests_per_s: float
    tokens: Callable[[np.random.Generator, int], np.ndarray]
    pictures: int = 1
    zipf: float = 0.8


@dataclass
class Outcome:
    """One entry for each request that was answered; ``nan`` in all for one that was refused."""

    arrived: np.ndarray
    front: np.ndarray  # seconds until it left its front end
    begun: np.ndarray  # seconds until it had a slot
    first: np.ndarray  # seconds until its first token
    ended: np.ndarray  # seconds in all
    known: np.ndarray  # whether its picture was cached
    prefill_s: float = 0.0  # of all engines

    def settled(self) -> np.ndarray:
        """Which requests count: answered, and not of the first fifth, when all was empty."""
        after = self.arrived >= self.arrived[0] + 0.2 * (self.arrived[-1] - self.arrived[0])
        return after & ~np.isnan(self.ended)

    @property
    def refused(self) -> float:
        """The share of requests for which there was no room."""
        return float(np.isnan(self.ended).mean())


@dataclass
class _Engine:
    cluster: Cluster
    now: float = 0.0
    steps: float = 0.0  # that it has made
    live: list[tuple[float, int]] = field(default_factory=list)  # (at which step it ends, request)
    queue: deque[int] = field(default_factory=deque)
    prefilling: tuple[float, int] | None = None  # (until when, request)
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def next_event(self) -> float:
        """When a prefill or an answer ends, if nobody comes before."""
        if self.prefilling:
            return self.prefilling[0]
        if not self.live:
            return np.inf
        return self.now + (self.live[0][0] - self.steps) * self.cluster.step_s(len(self.live))

    def knows(self, picture: int) -> bool:
        """Whether it is cached; from now on it is, in place of the one not asked for longest."""
        known = picture in self.cache
        self.cache[picture] = None
        self.cache.move_to_end(picture)
        if len(self.cache) > self.cluster.cached:
            self.cache.popitem(last=False)
        return known


class Simulation:
    """One run. ``run`` may be called once."""

    def __init__(self, cluster: Cluster, load: Load, requests: int, seed: int = 0):
        random = np.random.default_rng(seed)
        self.cluster, self.random = cluster, random
        arrived = np.cumsum(random.exponential(1 / load.requests_per_s, requests))
        self.front_of = random.integers(0, cluster.fronts, requests)
        self.tokens = load.tokens(random, requests)
        chances = 1 / np.arange(1, load.pictures + 1) ** load.zipf
        self.pictures = random.choice(load.pictures, requests, p=chances / chances.sum())
        # Rendezvous hashing with a perfect hash is an independent draw for each picture.
        self.favourite = random.integers(0, cluster.engines, load.pictures)
        self.running = np.zeros((cluster.fronts, cluster.engines), int)
        self.engine_of = np.zeros(requests, int)
        self.engines = [_Engine(cluster) for _ in range(cluster.engines)]
        empty = [np.full(requests, np.nan) for _ in range(4)]
        self.outcome = Outcome(arrived, *empty, np.zeros(requests, bool))
        self._events: list[tuple[float, int]] = []
        self._fill_caches(load.pictures)

    def run(self) -> Outcome:
        """To the end of the last answer."""
        outcome = self.outcome
        left = self._leave_fronts()
        outcome.front = left - outcome.arrived
        for request in np.argsort(left, kind="stable"):
            self._until(left[request])
            self._arrive(int(request), left[request])
        self._until(np.inf)
        return outcome

    def _fill_caches(self, pictures: int) -> None:
        """Each engine has what it is asked about most, as after some hours."""
        cached = self.cluster.cached
        for number, engine in enumerate(self.engines):
            asked = (
                np.flatnonzero(self.favourite == number)
                if self.cluster.hashing
                else np.arange(min(cached, pictures))
            )
            engine.cache.update(dict.fromkeys(asked[:cached][::-1].tolist()))

    def _leave_fronts(self) -> np.ndarray:
        """When each request leaves its front end (Lindley's recursion)."""
        free = np.zeros(self.cluster.fronts)
        left = np.empty(len(self.front_of))
        for request, (at, front) in enumerate(
            zip(self.outcome.arrived, self.front_of, strict=True)
        ):
            left[request] = free[front] = max(at, free[front]) + self.cluster.front_s
        return left

    def _choose(self, request: int) -> int:
        running = self.running[self.front_of[request]]
        if self.cluster.hashing:
            favourite = self.favourite[self.pictures[request]]
            mean = (running.sum() + 1) / len(running)
            if running[favourite] + 1 <= max(self.cluster.floor, SHARE * mean) + 1:
                return int(favourite)
        least = np.flatnonzero(running == running.min())
        return int(least[self.random.integers(len(least))])

    def _arrive(self, request: int, now: float) -> None:
        number = self._choose(request)
        engine = self.engines[number]
        if len(engine.queue) >= self.cluster.waiting:
            return
        self.engine_of[request] = number
        self.running[self.front_of[request], number] += 1
        self._advance(engine, now)
        engine.queue.append(request)
        self._begin(engine)
        self._announce(number)

    def _until(self, now: float) -> None:
        while self._events and self._events[0][0] <= now:
            at, number = heapq.heappop(self._events)
            engine = self.engines[number]
            if at != engine.next_event():
                continue  # somebody came, and it is later now
            self._advance(engine, at)
            self._end(engine)
            self._begin(engine)
            self._announce(number)

    def _announce(self, number: int) -> None:
        at = self.engines[number].next_event()
        if at < np.inf:
            heapq.heappush(self._events, (at, number))

    def _advance(self, engine: _Engine, now: float) -> None:
        """Time passes in which nothing begins or ends."""
        spent = now - engine.now
        if engine.prefilling:
            self.outcome.prefill_s += spent
        elif engine.live:
            engine.steps += spent / self.cluster.step_s(len(engine.live))
        engine.now = now

    def _end(self, engine: _Engine) -> None:
        """A prefill, whose request is decoded then, or an answer."""
        if engine.prefilling:
            _, request = engine.prefilling
            engine.prefilling = None
            self.outcome.first[request] = engine.now - self.outcome.arrived[request]
            heapq.heappush(engine.live, (engine.steps + self.tokens[request], request))
            return
        engine.steps, request = heapq.heappop(engine.live)
        self.outcome.ended[request] = engine.now - self.outcome.arrived[request]
        self.running[self.front_of[request], self.engine_of[request]] -= 1

    def _begin(self, engine: _Engine) -> None:
        if not engine.queue or engine.prefilling or len(engine.live) >= self.cluster.slots:
            return
        request = engine.queue.popleft()
        self.outcome.begun[request] = engine.now - self.outcome.arrived[request]
        known = engine.knows(int(self.pictures[request])) if self.cluster.cached else False
        self.outcome.known[request] = known
        took = self.cluster.known_s if known else self.cluster.prefill_s
        engine.prefilling = (engine.now + took, request)
