"""Tokens drawn at random, for many rows in one call: temperature, top-k, top-p and min-p.

The rules are those of transformers' warpers of these names, in ``generate``'s order. But of 150,000
tokens all but the likeliest few are dropped: so these are taken first, and the rules are applied to
them alone. A temperature does not change their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NO_TOKEN, TOO_NARROW = -1, -2  # what ``draw`` says in place of a token


class View(NamedTuple):
    """What of a row has to be looked at: so many of the likeliest, and the ``mass`` of all."""

    width: int
    mass: bool


SORTED = View(2**62, mass=False)
UNSORTED = View(0, mass=False)  # all, as they lie: no rule drops any
_LEAST, _MOST = 128, 1024  # the usual top-k is 20 or 50


class Rules(NamedTuple):
    """Which tokens of a row may be drawn. What is off: ``top_k`` 0, ``top_p`` 1, ``min_p`` 0."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @property
    def view(self) -> View:
        """It follows from the rules alone, so that it does not matter who shares the batch."""
        if self.top_k > 0:
            # Twice as many: top-k lets through all that are equal to the last one.
            width = max(_LEAST, 1 << (2 * self.top_k - 1).bit_length())
            return View(width, mass=False) if width <= _MOST else SORTED
        return View(_MOST, mass=True) if self.top_p < 1.0 or self.min_p > 0 else UNSORTED


class Rng:
    """The random numbers of one sequence, and its rules. Used by the engine's thread alone.

    But it is made on a request's thread, which copies nothing to a GPU.
    """

    def __init__(self, rules: Rules, seed: int | None, device: torch.device):
        self.rules = rules
        self._numbers: torch.Tensor | None = None
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def numbers(self, device: torch.device) -> torch.Tensor:
        """The rules on ``device``, which is waited for the first time only."""
        if self._numbers is None:
            self._numbers = torch.tensor(self.rules, dtype=torch.double).to(device)
        return self._numbers

    def next(self, device: torch.device) -> torch.Tensor:
        """The next random number: (1), of [0, 1)."""
        return torch.rand(1, dtype=torch.double, device=device, generator=self._generator)


def draw(
    scores: torch.Tensor, rules: torch.Tensor, chances: torch.Tensor, view: View
) -> torch.Tensor:
    """A token for each row of ``scores`` (rows, vocabulary), which are float32: int64 (rows).

    ``rules`` (rows, 4) as in ``Rules``, ``chances`` (rows): a random number of [0, 1) for each.
    ``view``: that of the rules; SORTED for rows for which that was TOO_NARROW. NO_TOKEN: a score is
    not finite or nothing is left. Waits for nothing.
    """
    temperature = rules[:, :1].float()
    values, places = _likeliest(scores, view)
    scaled = values / temperature
    best = scaled.amax(-1, keepdim=True)
    # In double precision: the product below is then always less than the last sum.
    weights = (scaled - best).double().exp()
    narrow = torch.zeros_like(best, dtype=torch.bool)
    if view != UNSORTED:
        whole = None
        if view.mass:
            whole = (scores / temperature - best).exp().sum(-1, keepdim=True).double()
        weights, narrow = _ruled(scaled, weights, rules, whole)
    sums = weights.cumsum(-1)
    drawn = (sums <= chances[:, None] * sums[:, -1:]).sum(-1, keepdim=True)
    tokens = places.gather(-1, drawn.clamp(max=places.shape[-1] - 1))
    if places.shape[-1] < scores.shape[-1]:
        tokens = tokens.masked_fill(narrow, TOO_NARROW)
    return tokens.masked_fill(~best.isfinite(), NO_TOKEN).squeeze(-1)


def _ruled(
    scaled: torch.Tensor, weights: torch.Tensor, rules: torch.Tensor, whole: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``weights`` (rows, candidates) of those that ``rules`` let through, and 0 of all others.

    And whether (rows, 1) the last candidate is let through too, or equals one that is: then others
    might be that are no candidates. ``whole`` (rows, 1): the weight of all, without top-k.
    """
    _, top_k, top_p, min_p = rules[..., None].unbind(1)
    last = scaled.gather(-1, (top_k.long() - 1).clamp(0, scaled.shape[-1] - 1))
    kept = ((scaled >= last) | (top_k <= 0)) & (weights > 0)
    narrow = kept[:, -1:] & (top_k > 0)
    sums = (weights * kept).cumsum(-1)
    total = sums[:, -1:]
    if whole is not None:
        total = torch.where(top_k > 0, total, whole)
    # Those before which there is less than top_p of it: at least the first. Then min_p, which is a
    # share of the likeliest's: its weight is 1.
    kept &= (sums - weights < top_p.clamp(min=1e-9) * total) | (top_p >= 1)
    kept &= weights >= min_p
    lowest = scaled.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    return weights * kept, narrow | (scaled[:, -1:] >= lowest)


def _likeliest(scores: torch.Tensor, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and tokens (rows, candidates), the likeliest first.

    Among equals the later token comes first, in every batch and on every device. It decides which
    of those at top-p's end are dropped; ``generate`` leaves that to a sort that is not stable.
    """
    vocabulary = scores.shape[-1]
    if view == UNSORTED:
        return scores, torch.arange(vocabulary, device=scores.device).expand_as(scores)
    if view.width >= vocabulary:
        values, order = scores.flip(-1).sort(dim=-1, descending=True, stable=True)
        return values, vocabulary - 1 - order
    # Of equals, topk says which first as it likes.
    places = scores.topk(view.width).indices.sort(-1, descending=True).values
    values, order = scores.gather(-1, places).sort(dim=-1, descending=True, stable=True)
    return values, places.gather(-1, order)
