"""The model's work of one step: vision, prefill, decode, and the next token of each sequence."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from qwenvl_app.engine.model import Runner
from qwenvl_app.engine.prefix_cache import Prefix, PrefixCache
from qwenvl_app.engine.sampling import next_tokens
from qwenvl_app.engine.scheduler import Encode, Plan
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.engine.vision import Encoding
from qwenvl_app.errors import InternalError, ServiceError, is_out_of_memory

log = logging.getLogger(__name__)

FAILED = "推理时发生错误，请稍后重试。"

Outcome = tuple[Sequence, int | ServiceError]  # a sequence's next token, or why there is none


class Executor:
    """Carries out plans; decides nothing. Used by the engine's thread alone.

    ``rows`` is always the scheduler's list: row ``i`` of the cache belongs to ``rows[i]``.
    ``budget`` is the scheduler's, in tokens, and ``room`` how many of them are the cache's now.
    """

    def __init__(self, runner: Runner, prefixes: PrefixCache, budget: int, room: Callable[[], int]):
        self.runner, self.prefixes = runner, prefixes
        self.cache = runner.new_cache(budget)
        self._room = room
        self._encoding: Encoding | None = None
        self._encoded: list[Sequence] = []  # whose pictures are in it

    def reset(self) -> None:
        """Forget everything that was under way."""
        self.cache.reset()
        self._encoding, self._encoded = None, []

    def shrink(self, rows: list[Sequence]) -> None:
        """Give memory back that nobody needs any more."""
        self._fit([row.computed for row in rows])

    def remove(self, sequence: Sequence, moved: tuple[int, int] | None) -> None:
        """``sequence`` has left; for that a row has ``moved``, (from, to)."""
        if sequence in self._encoded:  # the others start again, see ``Scheduler.remove``
            self._encoding, self._encoded = None, []
        if moved:
            self.cache.move(*moved)

    def restore_prefixes(self, rows: list[Sequence]) -> None:
        """Begin the rows whose picture was asked about before with what was kept of it."""
        found = [(row, seq, seq.prefix) for row, seq in enumerate(rows) if seq.prefix]
        if not found:
            return
        self._fit([row.prefix.length if row.prefix else row.computed for row in rows])
        for row, sequence, prefix in found:
            self.cache.restore(row, prefix.layers)
            sequence.computed = sequence.cached = prefix.length
            sequence.prefix = sequence.inputs.pixels = None

    def prefill(self, plan: Plan[Sequence], rows: list[Sequence]) -> list[Outcome]:
        """A step's pictures and prompts: what became of each whose prompt is complete now."""
        if plan.encode:
            self._fit([row.computed for row in rows])  # what the tower takes is given back first
            self._encode(plan.encode)
        widths = {id(sequence): width for sequence, width in plan.prefill}
        ends = [row.computed + widths.get(id(row), 0) for row in rows]
        # Then all are in the decode call, and get a token there or what is written over.
        decodes = any(end >= row.prompt_length for row, end in zip(rows, ends, strict=True))
        self._fit([end + decodes for end in ends])
        if not plan.prefill:
            return []
        sequences = [sequence for sequence, _ in plan.prefill]
        logits = self.runner.prefill(
            self.cache,
            sequences,
            [rows.index(sequence) for sequence in sequences],
            [width for _, width in plan.prefill],
        )
        for sequence, width in plan.prefill:
            sequence.computed += width
        outcomes = self._pick(sequences, logits, rows)
        failed = [sequence for sequence, end in outcomes if isinstance(end, ServiceError)]
        self._save_prefixes([s for s in sequences if s not in failed], rows)
        return outcomes

    def decode(self, sequences: list[Sequence], rows: list[Sequence]) -> list[Outcome]:
        """One more token for each of ``sequences``, whose prompts are complete."""
        if not sequences:
            return []
        # All rows, so that they are one slice of the cache; also those being prefilled.
        others = [number for number, row in enumerate(rows) if row not in sequences]
        with self.cache.kept(others):
            logits = self.runner.decode(
                self.cache,
                [row.tokens[-1] if row.tokens else 0 for row in rows],
                [row.position for row in rows],
                [row.computed for row in rows],
            )
        for sequence in sequences:
            sequence.computed += 1
        if len(sequences) < len(rows):  # one by one: a list of indices would be copied to a GPU
            logits = torch.stack([logits[rows.index(sequence)] for sequence in sequences])
        return self._pick(sequences, logits, rows)

    def _fit(self, ends: list[int]) -> None:
        """Room for rows that end there, within what the scheduler leaves for it."""
        rows = max((row for row, end in enumerate(ends, 1) if end), default=0)
        length, most = max(ends, default=0), self._room()
        try:
            self.cache.fit(rows, length, most)
        except Exception as error:
            if not self._gives_way(error):
                raise
            self.cache.fit(rows, length, most)

    def _gives_way(self, error: Exception) -> bool:
        """Whether ``error`` is about memory and known pictures could be dropped for it."""
        if not is_out_of_memory(error) or not (freed := self.prefixes.clear()):
            return False
        log.warning("the memory ran out: known pictures are dropped, %d MiB", freed // 2**20)
        return True

    def _encode(self, encode: Encode[Sequence]) -> None:
        if encode.first == 0:
            self._encoding, self._encoded = self.runner.encode(encode.jobs), encode.jobs
        assert self._encoding is not None  # noqa: S101  # the scheduler begins at the first layer
        if features := self._encoding.advance(encode.first, encode.last):
            self._encoding, self._encoded = None, []
            for sequence, made in zip(encode.jobs, features, strict=True):
                sequence.features, sequence.inputs.pixels = made, None

    def _save_prefixes(self, sequences: list[Sequence], rows: list[Sequence]) -> None:
        for sequence in sequences:
            length = sequence.inputs.image_tokens.stop
            if sequence.features is None or sequence.computed < length:
                continue
            sequence.features = None  # they are in the cache now
            key = sequence.image_key
            if key is not None and self.prefixes.peek(key) is None:
                self._save_prefix(key, rows.index(sequence), length)

    def _save_prefix(self, key: bytes, row: int, length: int) -> None:
        """If there is memory for it: no answer depends on that."""
        if not self.prefixes.make_room(self.cache.layout.bytes(length, 1)):
            return
        try:
            self.prefixes.put(key, Prefix(length, self.cache.save(row, length)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("the memory ran out: a picture is not kept, nor are those that were")
            self.prefixes.clear()

    def _pick(
        self, sequences: list[Sequence], logits: torch.Tensor, rows: list[Sequence]
    ) -> list[Outcome]:
        """The next token of each sequence whose prompt is complete, or why there is none."""
        ready = [sequence.computed >= sequence.prompt_length for sequence in sequences]
        samplers = [
            sequence.sampler if is_ready else None
            for sequence, is_ready in zip(sequences, ready, strict=True)
        ]
        tokens = next_tokens(samplers, logits)
        outcomes: list[Outcome] = []
        for sequence, is_ready, token in zip(sequences, ready, tokens, strict=True):
            if isinstance(token, ServiceError):
                self.cache.clear(rows.index(sequence))
                outcomes.append((sequence, token))
            elif isinstance(token, Exception):
                raised = token if token.__traceback__ else None
                log.error("%s (request %s)", token, sequence.request_id, exc_info=raised)
                self.cache.clear(rows.index(sequence))
                outcomes.append((sequence, InternalError(FAILED)))
            elif is_ready:
                outcomes.append((sequence, token))
        return outcomes
