"""The tokens of an answer to what its reader gets. On the thread that asked."""

from __future__ import annotations

from collections.abc import Sequence as Many
from collections.abc import Set

from qwenvl_app.engine.detokenizer import Detokenizer, StopStrings
from qwenvl_app.engine.logprobs import Score, render
from qwenvl_app.generation import Delta, TokenLogprob


class Renderer:
    """Of one answer: text, reasoning, logprobs, up to a stop string.

    ``spellings``: the bytes of every token. ``hidden``: ids that are no part of the text, as those
    that end an answer.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: tuple[str, ...],
        spellings: Many[bytes],
        hidden: Set[int],
    ):
        self._detokenizer, self._stops = detokenizer, StopStrings(stops)
        self._spellings, self._hidden = spellings, hidden
        self._logprobs: list[TokenLogprob] = []  # of text that is held back
        self.stopped = False  # a stop string was found

    @property
    def reasoned(self) -> int:
        """Tokens so far that are not the answer's."""
        return self._detokenizer.reasoned

    def push(self, ids: list[int], scores: list[Score]) -> Delta:
        """What became certain with these tokens. ``scores`` may be empty."""
        before = self.reasoned
        text, self.stopped = self._stops.push(self._detokenizer.push(ids))
        for score in scores[self.reasoned - before :]:
            if score.token not in self._hidden:
                self._logprobs.append(render(score, self._spellings))
        return self._delta(text, at_end=self.stopped)

    def flush(self) -> Delta:
        """What is still held back, at the end of the answer."""
        text, self.stopped = self._stops.push(self._detokenizer.flush())
        return self._delta(text + self._stops.flush(), at_end=True)

    def _delta(self, text: str, *, at_end: bool) -> Delta:
        logprobs: tuple[TokenLogprob, ...] = ()
        if text or at_end:
            logprobs, self._logprobs = tuple(self._logprobs), []
        return Delta(text, reasoning=self._detokenizer.pop_reasoning(), logprobs=logprobs)
