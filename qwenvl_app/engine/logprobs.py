"""How likely a model found a token, for those who ask."""

from __future__ import annotations

from collections.abc import Sequence as Many
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwenvl_app.generation import TokenLogprob


class Score(NamedTuple):
    """A token's logarithm of its probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_softmax(logits: torch.Tensor, wanted: Many[int | None]) -> torch.Tensor | None:
    """Of the rows of ``logits`` (rows, vocabulary) that want any; None if none does.

    Before any penalty, temperature or rule, and a copy: what samples may change ``logits``.
    """
    rows = [number for number, alternatives in enumerate(wanted) if alternatives is not None]
    if not rows:
        return None
    return torch.stack([logits[row] for row in rows]).float().log_softmax(-1)


def scores(
    logprobs: torch.Tensor, wanted: Many[int | None], tokens: Many[int | Exception]
) -> list[Score | None]:
    """Of each row, what ``wanted`` asks for about its token. Looks at the device once."""
    rows = [number for number, alternatives in enumerate(wanted) if alternatives is not None]
    most = max(1, *(wanted[row] or 0 for row in rows))
    chosen = [token if isinstance(token := tokens[row], int) else 0 for row in rows]
    top, order = logprobs.topk(most)
    own = logprobs.gather(-1, torch.tensor(chosen, device=logprobs.device)[:, None])
    looked = torch.cat([own.double(), top.double(), order.double()], dim=1).tolist()
    found: list[Score | None] = [None] * len(tokens)
    for row, token, (logprob, *rest) in zip(rows, chosen, looked, strict=True):
        pairs = zip(map(int, rest[most:]), rest[:most], strict=True)
        found[row] = Score(token, logprob, tuple(pairs)[: wanted[row]])
    return found


class TokenTexts:
    """The text and the bytes of single tokens of a byte-level BPE. May be used on any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        table: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
        self._bytes = {char: byte for byte, char in table.items()}

    @cached_property
    def _added(self) -> dict[int, str]:
        return {number: t.content for number, t in self._tokenizer.added_tokens_decoder.items()}

    def render(self, score: Score) -> TokenLogprob:
        """``score`` for who asked."""
        return self._render(score.token, score.logprob, tuple(self._render(*t) for t in score.top))

    def _render(
        self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        raw = self._raw(token)
        return TokenLogprob(raw.decode("utf-8", "replace"), raw, logprob, top)

    def _raw(self, token: int) -> bytes:
        if (added := self._added.get(token)) is not None:
            return added.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)  # None: of a padded vocabulary
        return bytes(self._bytes[char] for char in piece or "")
