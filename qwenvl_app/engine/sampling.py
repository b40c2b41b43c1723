"""Logits to the next token, as ``generate`` does it (transformers/generation/utils.py).

What is asked for, and the random numbers, belong to one sequence; the work is done for all rows of
a step in one call, with one look at the device. What a row gets does not depend on who shares the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from qwenvl_app.engine.drawing import NO_TOKEN, SORTED, TOO_NARROW, Rng, Rules, View, draw
from qwenvl_app.engine.processors import LAST, PENALTIES, WARPERS, processors
from qwenvl_app.errors import ServiceError
from qwenvl_app.generation import SamplingParams
from qwenvl_app.grammar.grammars import Matcher, penalties

# What ``generate`` takes where neither the caller nor the checkpoint says anything
# (GenerationConfig._get_default_generation_params).
_TOP_K = 50
_COLD = 1e-5  # a temperature up to this is greedy: dividing by it would leave no finite number


class PresenceFrequencyPenalty:
    """OpenAI's two penalties, on the tokens of the answer alone; transformers has neither."""

    def __init__(self, presence: float, frequency: float, prompt_length: int):
        self._presence, self._frequency = presence, frequency
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """``input_ids`` (1, prompt and answer), ``scores`` (1, vocabulary)."""
        written = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(
            1, written, torch.ones_like(written, dtype=scores.dtype)
        )
        return scores - self._frequency * counts - self._presence * (counts > 0)


def asked_for(defaults: GenerationConfig, *names: str) -> dict[str, Any]:
    """Those of ``names`` that have a value."""
    values = {name: getattr(defaults, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


class Sampler:
    """How the tokens of one sequence are picked. Used by the engine's thread alone, once made.

    ``defaults`` decides what ``params`` leaves open. ``rng``: None if the likeliest is taken.
    ``matcher`` rules tokens out before anything else is done; None allows all.
    """

    def __init__(
        self,
        params: SamplingParams,
        defaults: GenerationConfig,
        prompt: list[int],
        device: torch.device,
        matcher: Matcher | None = None,
    ):
        def chosen(name: str, fallback: Any) -> Any:
            for source in (params, defaults):
                if (value := getattr(source, name)) is not None:
                    return value
            return fallback

        # What needs all scores, and mostly the ids too, in generate's order: for one sequence at a
        # time, and most have none. The four rules of drawing come after it, see ``Rules``.
        asked = asked_for(defaults, *PENALTIES, *LAST)
        if (penalty := chosen("repetition_penalty", 1.0)) != 1.0:
            asked["repetition_penalty"] = penalty
        own = []
        if params.presence_penalty or params.frequency_penalty:
            penalties = params.presence_penalty, params.frequency_penalty
            own.append(PresenceFrequencyPenalty(*penalties, len(prompt)))
        temperature = float(chosen("temperature", 1.0))
        # Who names a temperature wants to sample; else the checkpoint decides.
        samples = params.temperature is not None or bool(defaults.do_sample)
        self.rng: Rng | None = None
        if samples and temperature > _COLD:
            top_k, top_p, min_p = chosen("top_k", _TOP_K), chosen("top_p", 1.0), chosen("min_p", 0)
            rules = Rules(temperature, int(top_k), float(top_p), float(min_p))
            if more := asked_for(defaults, *WARPERS, *LAST):  # drawing knows four rules alone
                asked |= more | rules._asdict() | {"do_sample": True}
                rules = Rules(1.0, 0, 1.0, 0.0)
            self.rng = Rng(rules, params.seed, device)
        self.matcher = matcher
        # Made later: this is a request's thread, and copying to a GPU is for the engine's.
        self._make = partial(processors, asked, defaults.eos_token_id, prompt, own=own)
        self._processors: Any = None
        self._ids = torch.tensor([prompt]) if asked or own else None

    @property
    def processes(self) -> bool:
        """Whether ``process`` does anything."""
        return self._ids is not None

    def process(self, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` (1, vocabulary) as the processors leave them."""
        if self._ids is None:
            return scores
        if self._processors is None:
            self._ids, self._processors = self._ids.to(scores.device), self._make(scores)
        processed: torch.Tensor = self._processors(self._ids, scores)
        return processed

    def append(self, token: int) -> None:
        """The sequence has one more token."""
        if self.matcher is not None:
            self.matcher.append(token)
        if self._ids is not None:
            self._ids = torch.cat([self._ids, self._ids.new_full((1, 1), token)], dim=1)


def next_tokens(samplers: Many[Sampler | None], logits: torch.Tensor) -> list[int | Exception]:
    """The next token of each row of ``logits`` (rows, vocabulary), or why there is none.

    A row without a sampler wants none: only its logits are checked, and its token means nothing.
    One row's failure is no other's. Looks at the device once, and again only where more tokens are
    about equally likely than were looked at.
    """
    scores = logits.float()
    # As good as isfinite().all(), which takes a CPU twenty times as long.
    finite = (scores.amax(-1) < math.inf) & (scores.amin(-1) > -math.inf)
    tokens: list[int | Exception] = [0] * len(scores)
    scores = _constrain(samplers, scores, tokens)
    rows = [scores[number : number + 1] for number in range(len(scores))]
    groups = _process(samplers, rows, tokens)
    alike = len(groups) == 1 and len(*groups.values()) == len(rows)
    as_they_were = alike and not any(sampler and sampler.processes for sampler in samplers)
    picked = [
        _pick(samplers, scores if as_they_were else rows, members, view)
        for view, members in groups.items()
    ]
    looked = torch.cat([finite.long(), *picked]).tolist()
    members = [number for group in groups.values() for number in group]
    for number, token in zip(members, looked[len(rows) :], strict=True):
        tokens[number] = token
    if narrow := [number for number in members if tokens[number] == TOO_NARROW]:
        again = _pick(samplers, rows, narrow, SORTED).tolist()
        for number, token in zip(narrow, again, strict=True):
            tokens[number] = token
    for number, sampler in enumerate(samplers):
        if not looked[number]:
            tokens[number] = ValueError("the logits are not finite")
        elif tokens[number] == NO_TOKEN:
            tokens[number] = ValueError("the processors leave no finite probabilities")
        elif sampler and isinstance(token := tokens[number], int):
            sampler.append(token)
    return tokens


def _constrain(
    samplers: Many[Sampler | None], scores: torch.Tensor, tokens: list[int | Exception]
) -> torch.Tensor:
    """``scores`` without what matchers do not allow; why they can't say is put into ``tokens``.

    Matchers work on the CPU, while a GPU still computes the logits; one copy goes there.
    """
    allowed: dict[int, bytes] = {}
    for number, sampler in enumerate(samplers):
        if sampler is not None and sampler.matcher is not None:
            try:
                allowed[number] = sampler.matcher.allowed()
            except ServiceError as error:
                tokens[number] = error
    if not allowed:
        return scores
    everything = b"\xff" * len(next(iter(allowed.values())))
    masks = [allowed.get(number, everything) for number in range(len(scores))]
    return penalties(masks, scores.shape[-1], scores.device).add_(scores)


def _process(
    samplers: Many[Sampler | None], rows: list[torch.Tensor], tokens: list[int | Exception]
) -> dict[View | None, list[int]]:
    """Which rows are picked in one way, having been processed, or their failure put in ``tokens``.

    None: the likeliest is taken.
    """
    groups: dict[View | None, list[int]] = {}
    for number, sampler in enumerate(samplers):
        if sampler is None or isinstance(tokens[number], Exception):
            continue
        try:
            rows[number] = sampler.process(rows[number])
        except Exception as error:
            tokens[number] = error
        else:
            view = sampler.rng.rules.view if sampler.rng else None
            groups.setdefault(view, []).append(number)
    return groups


def _pick(
    samplers: Many[Sampler | None],
    rows: torch.Tensor | list[torch.Tensor],
    members: list[int],
    view: View | None,
) -> torch.Tensor:
    """Tokens (members) of some of ``rows``, each (1, vocabulary), all with the same ``view``.

    Or of all rows, in one tensor (rows, vocabulary), which is not copied then.
    """
    scores = rows if isinstance(rows, torch.Tensor) else torch.cat([rows[n] for n in members])
    if view is None:
        return scores.argmax(-1)
    rngs = [sampler.rng for number in members if (sampler := samplers[number]) and sampler.rng]
    rules = torch.stack([rng.numbers(scores.device) for rng in rngs])
    return draw(scores, rules, torch.cat([rng.next(scores.device) for rng in rngs]), view)


def repeats_itself(tokens: list[int], limit: int) -> bool:
    """Whether the last ``limit`` tokens are one passage at least eight times over, verbatim.

    Tables and lists repeat their frame but not their content.
    """
    tail = tokens[-limit:]
    return len(tail) == limit and any(
        tail[period] == tail[0] and tail[period:] == tail[:-period]
        for period in range(1, limit // 8 + 1)
    )
