"""Token ids to text, piece by piece, without ever splitting a character or a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenvl_app.generation import CALL_MARKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwenvl_app.prompts.builder import Reasoning

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class Pieces:
    """Text of ids that come in pieces. Used by one thread at a time.

    A Chinese character or an emoji is often several byte tokens, so text is held back while it
    ends in an unfinished character. Each step decodes a short window, not the whole answer.
    Special tokens are no text, but for the marks of calls, which some vocabularies have as such.
    ``trims``: white space before all other text is left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, trims: bool = False):
        self._tokenizer, self.trims = tokenizer, trims
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        special = (number for number, token in added.items() if token.special)
        self._hidden = {each for each in special if added[each].content not in CALL_MARKS}
        self._ids: list[int] = []
        self._window = 0  # where the window begins: ids before it can't change what follows
        self._emitted = 0  # ids before it have been given out as text

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """Text that became certain with ``ids``; with the ``last`` of them, all there is."""
        self._ids += ids
        given, text = self._decode(self._emitted), self._decode(len(self._ids))
        if not last and (len(text) <= len(given) or text.endswith(_REPLACEMENT)):
            return ""
        self._window, self._emitted = self._emitted, len(self._ids)
        text = text[len(given) :]
        if self.trims:
            text = text.lstrip()
            self.trims = not text
        return text

    def _decode(self, end: int) -> str:
        text = self._tokenizer.decode(
            [each for each in self._ids[self._window : end] if each not in self._hidden],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return str(text)


class Detokenizer:
    """Text of one answer so far. Used by one thread at a time.

    What a model reasons before it answers is no part of it: all up to ``reasoning.end``, if the
    prompt opened the reasoning or the first token does. Elsewhere these tokens are text as any
    other. ``pop_reasoning`` has them, without the white space around.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reasoning: Reasoning | None = None):
        self._marks = reasoning
        self.reasoned = 0  # ids that are not the answer's
        self._answer, self._thought = Pieces(tokenizer), Pieces(tokenizer, trims=True)
        self._reasoning, self._held = "", ""  # not taken yet; white space that may be its end

    def push(self, ids: list[int]) -> str:
        """Text of the answer that became certain; empty while a character is unfinished."""
        return self._answer.push(ids[self._split(ids) :])

    def flush(self) -> str:
        """What is still held back, at the end of the answer."""
        self._think([], last=True)
        return self._answer.push([], last=True)

    def pop_reasoning(self) -> str:
        """Text of the reasoning that became certain since the last call."""
        popped, self._reasoning = self._reasoning, ""
        return popped

    def _split(self, ids: list[int]) -> int:
        """How many of ``ids`` are the reasoning's, its marks included."""
        marks = self._marks
        if marks is None or not ids:
            return 0
        if not marks.begun and not self.reasoned and ids[0] != marks.begin:
            self._marks = None
            return 0
        ended = marks.end in ids
        length = ids.index(marks.end) if ended else len(ids)
        opened = not self.reasoned and ids[0] == marks.begin
        self._think(ids[opened:length], last=ended)
        if ended:
            self._marks, self._answer.trims = None, True
        self.reasoned += length + ended
        return length + ended

    def _think(self, ids: list[int], *, last: bool) -> None:
        text = self._held + self._thought.push(ids, last=last)
        told = text.rstrip()
        self._held = text[len(told) :]
        self._reasoning += told


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
