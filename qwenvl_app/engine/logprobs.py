"""How likely a model found a token, for those who ask."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

import torch

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


def render(score: Score, spellings: Many[bytes]) -> TokenLogprob:
    """``score`` for who asked; ``spellings``: the bytes of every token."""

    def told(token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        raw = spellings[token]
        return TokenLogprob(raw.decode("utf-8", "replace"), raw, logprob, top)

    return told(score.token, score.logprob, tuple(told(*each) for each in score.top))
