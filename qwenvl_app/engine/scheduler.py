"""Who runs in the next step. Pure Python: no torch, no clock, no thread.

Requests are served first come, first served. ``running[i]`` has slot ``i`` of the KV cache:
there are never holes, so that one decode call covers them all (the idea of nano-vllm's
``scheduler.py``, two queues and no policy elsewhere).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenvl_app.engine.sequence import Sequence


@dataclass
class Vision:
    """Run layers ``first`` to ``last`` (exclusive) of the vision tower on some pictures."""

    jobs: list[Sequence]
    first: int
    last: int


@dataclass
class Step:
    """What comes before a step's decode; prefill: (sequence, tokens)."""

    vision: Vision | None = None
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)


class Scheduler:
    """Slots, a queue for them, and a budget. Used by the engine's thread alone.

    ``budget`` is in tokens of KV cache: its rectangle of slots times the longest is held under
    it, counting what each sequence may still grow to, so that nothing that runs ever has to stop
    for want of memory; the cache keeps to ``cache_limit``. ``chunk`` bounds the prompt tokens of a
    step, and so how long the others wait for their next token; ``patches`` does the same for whole
    passes of the vision tower, whose ``depth`` layers are spread over several steps for a picture
    that has more. ``cost`` is what a patch takes of the budget, in tokens: while it is in the
    tower, and until it is prefilled.
    """

    def __init__(
        self,
        slots: int,
        budget: int,
        chunk: int,
        patches: int,
        depth: int,
        cost: tuple[float, float] = (0.0, 0.0),
    ):
        self.slots, self.budget, self.chunk, self._cost = slots, budget, chunk, cost
        self._patches, self._depth = patches, depth
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by their slots
        # The same in the order of arrival: one that is moved into a hole overtakes nobody.
        self._order: list[Sequence] = []
        self._vision: Vision | None = None

    def fill_slots(self) -> list[Sequence]:
        """Move those who can start from the queue to slots; returns them, in order of slots."""
        first = len(self.running)
        while self.waiting and len(self.running) < self.slots and self._fits(self.waiting[0]):
            if self._will_be_shared(self.waiting[0]):
                break  # a moment later its picture need not be computed again
            self.running.append(self.waiting.popleft())
        self._order += self.running[first:]
        return self.running[first:]

    def next_step(self) -> Step:
        """What the next step prefills. Sequences whose picture it finishes are in it too."""
        step: Step = Step(vision=self._next_vision())
        done = step.vision.jobs if step.vision and step.vision.last == self._depth else []
        widest = 0
        for job in self._order:
            boundary = job.inputs.boundary
            end = boundary if job.computed < boundary else job.prompt_length
            width = min(end - job.computed, self.chunk)
            if width <= 0:
                continue
            # A prefill call is a rectangle too: a short prompt beside a long one is mostly padding.
            area = (len(step.prefill) + 1) * max(widest, width)
            if (job.seen or job in done) and (not step.prefill or area <= self.chunk):
                step.prefill.append((job, width))
                widest = max(widest, width)
        return step

    def complete(self) -> list[Sequence]:
        """Those that get a token by decoding, in order of slots."""
        return [job for job in self.running if job.computed >= job.prompt_length]

    def remove(self, job: Sequence) -> tuple[int, int] | None:
        """Take ``job`` out wherever it is; returns (from, to) if a slot has to move for that."""
        if self._vision and job in self._vision.jobs:
            # Its pictures are one batch in the vision tower: the others start again.
            self._vision = None
        if job not in self.running:
            self.waiting.remove(job)
            return None
        self._order.remove(job)
        hole, last = self.running.index(job), len(self.running) - 1
        moved = self.running.pop()
        if hole == last:
            return None
        self.running[hole] = moved
        return last, hole

    def longest(self, patches: int) -> int:
        """Tokens that a job with such a picture may have, with nobody beside it; 0: none."""
        tower, features = (math.ceil(patches * cost) for cost in self._cost)
        return self.budget - features if tower + features <= self.budget else 0

    def cache_limit(self) -> int:
        """Tokens that the KV cache may hold now: what the pictures of those that run leave.

        At least what those may grow to. But who is alone has none while its picture is
        in the tower.
        """
        return max(0, self.budget - sum(self._pictures(self.running)))

    def _fits(self, job: Sequence) -> bool:
        jobs = [*self.running, job]
        rectangle = len(jobs) * max(each.reserved for each in jobs)
        tower, features = self._pictures(jobs)
        # Who is alone has no tokens yet while its picture is in the tower.
        taken = max(rectangle, tower) if len(jobs) == 1 else rectangle + tower
        return taken + features <= self.budget

    def _pictures(self, jobs: list[Sequence]) -> tuple[int, int]:
        """Tokens of the budget: what the tower may take for ``jobs``, and what of it is unread."""
        unseen = [job.patches for job in jobs if not job.seen]
        # One large picture is in the tower at a time, or several small ones.
        most = max([min(sum(unseen), self._patches), *unseen])
        unread = sum(job.patches for job in jobs if job.computed < job.prompt_length)
        return math.ceil(self._cost[0] * most), math.ceil(self._cost[1] * unread)

    def _will_be_shared(self, job: Sequence) -> bool:
        key = job.inputs.prefix_key
        if key is None or job.seen:
            return False
        prefilled = [each for each in self.running if each.computed < each.prompt_length]
        return any(each.inputs.prefix_key == key for each in prefilled)

    def _next_vision(self) -> Vision | None:
        if self._vision is None:
            jobs: list[Sequence] = []
            for job in self._order:
                if not job.seen and (
                    not jobs or sum(j.patches for j in [*jobs, job]) <= self._patches
                ):
                    jobs.append(job)
            if not jobs:
                return None
            self._vision = Vision(jobs, 0, 0)
        vision = self._vision
        work = sum(job.patches for job in vision.jobs)
        layers = max(1, self._depth * self._patches // work)
        vision = Vision(vision.jobs, vision.last, min(self._depth, vision.last + layers))
        self._vision = vision if vision.last < self._depth else None
        return vision
