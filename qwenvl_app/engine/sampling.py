"""Logits to the next token, as ``generate`` does it (transformers/generation/utils.py).

Everything here belongs to one sequence: its own processors, its own random numbers. So what it
says does not depend on who shares the batch. Greedy sequences without penalties, the usual case,
need none of it: the engine takes all their arg-maxima in one call.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from qwenvl_app.engine.processors import FIRST, LAST, PENALTIES, asked_for, warpers
from qwenvl_app.generation import SamplingParams

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


class Sampler:
    """Picks the tokens of one sequence. Used by the engine's thread alone.

    ``defaults`` decides what ``params`` leaves open.
    """

    def __init__(
        self,
        params: SamplingParams,
        defaults: GenerationConfig,
        prompt: list[int],
        device: torch.device,
    ):
        def chosen(name: str, fallback: Any) -> Any:
            for source in (params, defaults):
                if (value := getattr(source, name)) is not None:
                    return value
            return fallback

        temperature = chosen("temperature", 1.0)
        # Who names a temperature wants to sample; else the checkpoint decides.
        samples = bool(defaults.do_sample) if params.temperature is None else temperature > _COLD
        # In the order in which generate applies them.
        steps = asked_for(FIRST, defaults, prompt)
        if (penalty := chosen("repetition_penalty", 1.0)) != 1.0:
            steps.append(RepetitionPenaltyLogitsProcessor(penalty))
        steps += asked_for(PENALTIES, defaults, prompt)
        if params.presence_penalty or params.frequency_penalty:
            steps.append(
                PresenceFrequencyPenalty(
                    params.presence_penalty, params.frequency_penalty, len(prompt)
                )
            )
        # The answer's ids are needed by penalties only. On the CPU for now: this is a request's
        # thread, and copying to a GPU is for the engine's alone.
        last = asked_for(LAST, defaults, prompt)
        self._ids = torch.tensor([prompt]) if steps or last else None
        if samples:
            top_k, top_p, min_p = chosen("top_k", _TOP_K), chosen("top_p", 1.0), chosen("min_p", 0)
            steps += warpers(defaults, float(temperature), top_k, float(top_p), float(min_p))
        steps += last
        self._steps: Any = LogitsProcessorList(steps)
        self._generator: torch.Generator | None = None
        if samples:
            self._generator = torch.Generator(device)
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed)

    @property
    def is_argmax(self) -> bool:
        """Whether the token is simply the likeliest one."""
        return self._generator is None and not self._steps

    def sample(self, logits: torch.Tensor) -> int:
        """The next token from ``logits`` (vocabulary). Raises ValueError if there can be none."""
        scores = logits[None].float()
        if self._ids is not None:
            self._ids = self._ids.to(scores.device)
        scores = self._steps(self._ids, scores)
        if self._generator is None:
            token = scores.argmax(-1, keepdim=True)
        else:
            # What torch.multinomial does, but for its checks, each of which waits for the GPU.
            chances = scores.softmax(-1)
            noise = torch.empty_like(chances).exponential_(generator=self._generator)
            token = (chances / noise).argmax(-1, keepdim=True)
            token = torch.where(chances.isfinite().all(), token, -1)
        if self._ids is not None:
            self._ids = torch.cat([self._ids, token], dim=1)
        if (chosen := int(token)) < 0:
            raise ValueError("the penalties leave no finite probabilities")
        return chosen


def repeats_itself(tokens: list[int], limit: int) -> bool:
    """Whether the last ``limit`` tokens are one passage at least eight times over, verbatim.

    The smallest period of a string is its length less that of its longest border (Knuth, Morris,
    Pratt 1977). Tables and lists repeat their frame but not their content.
    """
    tail = tokens[-limit:]
    if len(tail) < limit:
        return False
    border = [0] * limit
    length = 0
    for place in range(1, limit):
        while length and tail[place] != tail[length]:
            length = border[length - 1]
        if tail[place] == tail[length]:
            length += 1
        border[place] = length
    return (limit - border[-1]) * 8 <= limit
