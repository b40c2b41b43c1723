"""Token ids to text, piece by piece, without ever splitting a character or a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenvl_app.prompts import Reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class Detokenizer:
    """Text of one answer so far. Used by one thread at a time.

    A Chinese character or an emoji is often several byte tokens, so text is held back while it
    ends in an unfinished character. Each step decodes a short window, not the whole answer.

    What a model reasons before it answers is left out: all up to ``reasoning.end``, if the prompt
    opened the reasoning or the first token does. Elsewhere these tokens are text as any other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reasoning: Reasoning | None = None):
        self._tokenizer, self._reasoning = tokenizer, reasoning
        self.reasoned = 0  # ids that were left out
        self._said = False  # whether there was text, but for blank lines behind the reasoning
        self._ids: list[int] = []
        self._window = 0  # where the window begins: ids before it can't change what follows
        self._emitted = 0  # ids before it have been given out as text

    def push(self, ids: list[int]) -> str:
        """Text that became certain with ``ids``; empty while a character is unfinished."""
        self._ids += self._answer(ids)
        known, text = self._decode(self._emitted), self._decode(len(self._ids))
        if len(text) <= len(known) or text.endswith(_REPLACEMENT):
            return ""
        self._window, self._emitted = self._emitted, len(self._ids)
        return self._trim(text[len(known) :])

    def flush(self) -> str:
        """What is still held back, at the end of the answer."""
        known, text = self._decode(self._emitted), self._decode(len(self._ids))
        self._window = self._emitted = len(self._ids)
        return self._trim(text[len(known) :])

    def _answer(self, ids: list[int]) -> list[int]:
        """``ids`` without those of the reasoning."""
        marks = self._reasoning
        if marks is None or not ids:
            return ids
        if not marks.begun and not self.reasoned and ids[0] != marks.begin:
            self._reasoning = None
            return ids
        ended = marks.end in ids
        length = ids.index(marks.end) + 1 if ended else len(ids)
        self.reasoned += length
        if ended:
            self._reasoning = None
        return ids[length:]

    def _trim(self, text: str) -> str:
        if self.reasoned and not self._said:
            text = text.lstrip()
            self._said = bool(text)
        return text

    def _decode(self, end: int) -> str:
        text = self._tokenizer.decode(
            self._ids[self._window : end],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return str(text)


class StopStrings:
    """Cuts a text at the first of some strings, which may come in pieces."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops, self._held = stops, ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certainly before any stop string, and whether one was found."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The length of the longest end of ``text`` that ``stop`` begins with."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
