"""The model's work of one step: vision, prefill, decode, and the next token of each sequence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from qwenvl_app.engine.logprobs import Score, log_softmax, scores
from qwenvl_app.engine.prefix_cache import PrefixCache, Segment
from qwenvl_app.engine.runner import Runner
from qwenvl_app.engine.sampling import next_tokens
from qwenvl_app.engine.scheduler import Step, Vision
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.engine.vision import VisionPass
from qwenvl_app.errors import InternalError, ServiceError, is_out_of_memory

log = logging.getLogger(__name__)

FAILED = "推理时发生错误，请稍后重试。"


class Outcome(NamedTuple):
    """A sequence's next token, or why there is none."""

    sequence: Sequence
    token: int | ServiceError
    score: Score | None = None


class Executor:
    """Carries out steps; decides nothing. Used by the engine's thread alone.

    ``running`` is always the scheduler's list: ``running[i]`` has slot ``i`` of the cache.
    ``budget`` is the scheduler's, in tokens, and ``limit`` how many of them are the cache's now.
    """

    def __init__(
        self, runner: Runner, prefixes: PrefixCache, budget: int, limit: Callable[[], int]
    ):
        self.runner, self.prefixes = runner, prefixes
        self.cache = runner.new_cache(budget)
        self._limit = limit
        self._pass: VisionPass | None = None

    def reset(self) -> None:
        """Forget everything that was under way."""
        self.cache.reset()
        self._pass = None

    def rehearse(self, slots: int) -> None:
        """Record the decode steps that are usual, before the first request."""
        try:
            self.runner.rehearse(self.cache, slots)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("there is no memory to record decode steps in before the first request")
            self.cache.reset()

    def shrink(self, running: list[Sequence]) -> None:
        """Give memory back that nobody needs any more."""
        self._fit([each.computed for each in running])

    def remove(self, sequence: Sequence, moved: tuple[int, int] | None) -> None:
        """``sequence`` has left; for that a slot has ``moved``, (from, to)."""
        if self._pass and any(image in self._pass.images for image in sequence.inputs.images):
            self._pass = None  # the others start again: ``Scheduler.remove``
        if moved:
            self.cache.move(*moved)

    def restore_prefixes(self, running: list[Sequence]) -> None:
        """Begin slots whose prompts begin as earlier ones did with what was kept of those."""
        found = [(slot, seq, seq.prefix) for slot, seq in enumerate(running) if seq.prefix]
        if not found:
            return
        self._fit([seq.prefix.length if seq.prefix else seq.computed for seq in running])
        for slot, sequence, prefix in found:
            for segment in prefix.last.chain():
                self.cache.restore(slot, segment.layers, segment.start, prefix.length)
            sequence.computed = sequence.cached = prefix.length
            sequence.prefix = None

    def prefill(self, step: Step, running: list[Sequence]) -> list[Outcome]:
        """A step's pictures and prompts: what became of each whose prompt is complete now."""
        if step.vision:
            self.shrink(running)  # what the tower takes is given back first
            self._see(step.vision)
        widths = {id(sequence): width for sequence, width in step.prefill}
        ends = [each.computed + widths.get(id(each), 0) for each in running]
        # Then all are in the decode call, and get a token there or what is written over.
        decodes = any(end >= s.prompt_length for s, end in zip(running, ends, strict=True))
        self._fit([end + decodes for end in ends])
        if not step.prefill:
            return []
        sequences = [sequence for sequence, _ in step.prefill]
        logits = self.runner.prefill(
            self.cache,
            sequences,
            [running.index(sequence) for sequence in sequences],
            [width for _, width in step.prefill],
        )
        for sequence, width in step.prefill:
            sequence.computed += width
        outcomes = self._pick(sequences, logits, running)
        failed = [end.sequence for end in outcomes if isinstance(end.token, ServiceError)]
        for sequence in sequences:
            if sequence not in failed:
                self._release_features(sequence, running)
        return outcomes

    def decode(self, sequences: list[Sequence], running: list[Sequence]) -> list[Outcome]:
        """One more token for each of ``sequences``, whose prompts are complete."""
        if not sequences:
            return []
        # All slots, so that they are one slice of the cache; also those being prefilled.
        others = [slot for slot, each in enumerate(running) if each not in sequences]
        with self.cache.kept(others):
            logits = self.runner.decode(
                self.cache,
                [each.tokens[-1] if each.tokens else 0 for each in running],
                [each.position for each in running],
                [each.computed for each in running],
            )
        for sequence in sequences:
            sequence.computed += 1
        if len(sequences) < len(running):  # one by one: a list of indices would be copied to a GPU
            logits = torch.stack([logits[running.index(sequence)] for sequence in sequences])
        return self._pick(sequences, logits, running)

    def _fit(self, ends: list[int]) -> None:
        """Room for slots that end there, within what the scheduler leaves for it."""
        slots = max((slot for slot, end in enumerate(ends, 1) if end), default=0)
        length, most = max(ends, default=0), self._limit()
        try:
            self.cache.fit(slots, length, most)
        except Exception as error:
            if not is_out_of_memory(error) or not (freed := self.prefixes.clear()):
                raise
            log.warning("the memory ran out: kept prompts are dropped, %d MiB", freed // 2**20)
            self.cache.fit(slots, length, most)

    def _see(self, vision: Vision) -> None:
        if vision.first == 0:
            images = [image for sequence in vision.jobs for image in sequence.unseen]
            self._pass = self.runner.begin_vision(images)
        assert self._pass is not None  # noqa: S101  # the scheduler begins at the first layer
        if features := self._pass.advance(vision.first, vision.last):
            for image, made in zip(self._pass.images, features, strict=True):
                image.features, image.pixels = made, None
            self._pass = None

    def _release_features(self, sequence: Sequence, running: list[Sequence]) -> None:
        """Of pictures that are in the cache now; with the last one, what there is is kept."""
        read = [i for i in sequence.images if i.features and i.tokens.stop <= sequence.computed]
        for image in read:
            image.features = None
        if read and sequence.computed >= sequence.inputs.images_end:
            self._keep(sequence, running.index(sequence), sequence.inputs.images_end)

    def keep(self, sequence: Sequence, running: list[Sequence]) -> None:
        """``sequence`` is about to leave: keep prompt and answer for whoever goes on from them."""
        if sequence in running and sequence.computed >= sequence.prompt_length:
            self._keep(sequence, running.index(sequence), sequence.computed)

    def _keep(self, sequence: Sequence, slot: int, length: int) -> None:
        """A slot's first tokens, if there is memory for it: no answer depends on that."""
        if sequence.inputs.prefix_key is None:
            return
        text = sequence.inputs.text(sequence.tokens).first(length)
        base = self.prefixes.base(text)
        start = base.length if base else 0
        if start == length or not self.prefixes.make_room(
            self.cache.layout.bytes(length - start, 1)
        ):
            return
        try:
            self.prefixes.put(Segment(text, self.cache.save(slot, length, start), base))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("the memory ran out: a prompt is not kept, nor are those that were")
            del base
            self.prefixes.clear()

    def _pick(
        self, sequences: list[Sequence], logits: torch.Tensor, running: list[Sequence]
    ) -> list[Outcome]:
        """The next token of each sequence whose prompt is complete, or why there is none."""
        ready = [sequence.computed >= sequence.prompt_length for sequence in sequences]
        each = list(zip(sequences, ready, strict=True))
        wanted = [sequence.logprobs if is_ready else None for sequence, is_ready in each]
        logprobs = log_softmax(logits, wanted)
        tokens = next_tokens([s.sampler if is_ready else None for s, is_ready in each], logits)
        found = [None] * len(tokens) if logprobs is None else scores(logprobs, wanted, tokens)
        outcomes: list[Outcome] = []
        for (sequence, is_ready), token, score in zip(each, tokens, found, strict=True):
            if isinstance(token, ServiceError):
                self.cache.clear(running.index(sequence))
                outcomes.append(Outcome(sequence, token))
            elif isinstance(token, Exception):
                raised = token if token.__traceback__ else None
                log.error("%s (request %s)", token, sequence.request_id, exc_info=raised)
                self.cache.clear(running.index(sequence))
                outcomes.append(Outcome(sequence, InternalError(FAILED)))
            elif is_ready:
                outcomes.append(Outcome(sequence, token, score))
        return outcomes
