"""What only a checkpoint's ``generation_config.json`` can ask for, and transformers has done.

No request names any of it, and few checkpoints do. Which values count, and that they can be used,
is settled before (``loading/generation_defaults.py``): here what is not None is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import GenerationConfig

# As ``GenerationMixin._get_logits_processor`` orders them: ahead of the repetition penalty, after
# it, and after the steps of sampling. Each is made from the configuration, the prompt's ids, and
# scores (1, vocabulary) that say where and how many.
_Maker = Callable[[GenerationConfig, list[int], Any], Any]
FIRST: dict[str, _Maker] = {
    "sequence_bias": lambda config, _prompt, _scores: hf.SequenceBiasLogitsProcessor(
        config.sequence_bias
    ),
    "encoder_repetition_penalty": lambda config, prompt, scores: (
        hf.EncoderRepetitionPenaltyLogitsProcessor(
            config.encoder_repetition_penalty, _ids(prompt, scores)
        )
    ),
}
PENALTIES: dict[str, _Maker] = {
    "no_repeat_ngram_size": lambda config, _prompt, _scores: hf.NoRepeatNGramLogitsProcessor(
        config.no_repeat_ngram_size
    ),
    "encoder_no_repeat_ngram_size": lambda config, prompt, scores: (
        hf.EncoderNoRepeatNGramLogitsProcessor(
            config.encoder_no_repeat_ngram_size, _ids(prompt, scores)
        )
    ),
    "bad_words_ids": lambda config, _prompt, _scores: hf.NoBadWordsLogitsProcessor(
        config.bad_words_ids, config.eos_token_id
    ),
    "min_length": lambda config, _prompt, scores: hf.MinLengthLogitsProcessor(
        config.min_length, config.eos_token_id, device=scores.device
    ),
    "min_new_tokens": lambda config, prompt, scores: hf.MinNewTokensLengthLogitsProcessor(
        len(prompt), config.min_new_tokens, config.eos_token_id, device=scores.device
    ),
    "exponential_decay_length_penalty": lambda config, prompt, _scores: (
        hf.ExponentialDecayLengthPenalty(
            config.exponential_decay_length_penalty, config.eos_token_id, len(prompt)
        )
    ),
    "suppress_tokens": lambda config, _prompt, scores: hf.SuppressTokensLogitsProcessor(
        config.suppress_tokens, device=scores.device
    ),
    "begin_suppress_tokens": lambda config, prompt, scores: hf.SuppressTokensAtBeginLogitsProcessor(
        config.begin_suppress_tokens, len(prompt), device=scores.device
    ),
}
LAST: dict[str, _Maker] = {
    "watermarking_config": lambda config, _prompt, scores: (
        config.watermarking_config.construct_processor(scores.shape[-1], scores.device)
    ),
}
# Of a draw, beside temperature, top_k, top_p and min_p.
WARPERS: dict[str, _Maker] = {
    "top_h": lambda config, _prompt, _scores: hf.TopHLogitsWarper(config.top_h),
    "typical_p": lambda config, _prompt, _scores: hf.TypicalLogitsWarper(config.typical_p),
    "epsilon_cutoff": lambda config, _prompt, _scores: hf.EpsilonLogitsWarper(
        config.epsilon_cutoff
    ),
    "eta_cutoff": lambda config, _prompt, scores: hf.EtaLogitsWarper(
        config.eta_cutoff, device=scores.device
    ),
}


def _ids(prompt: list[int], scores: torch.Tensor) -> Any:
    return torch.tensor([prompt], device=scores.device)


class _Late:
    """A processor that is made at its first use: copying to a GPU is for the engine's thread."""

    def __init__(self, make: Callable[[torch.Tensor], Any]):
        self._make = make
        self._made: Any = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """``input_ids`` (1, prompt and answer), ``scores`` (1, vocabulary)."""
        if self._made is None:
            self._made = self._make(scores)
        processed: torch.Tensor = self._made(input_ids, scores)
        return processed


def asked_for(makers: dict[str, _Maker], config: GenerationConfig, prompt: list[int]) -> list[Any]:
    """The processors of ``makers`` that ``config`` has a value for, for one sequence."""

    def late(make: _Maker) -> _Late:
        return _Late(lambda scores: make(config, prompt, scores))

    return [late(make) for name, make in makers.items() if getattr(config, name) is not None]


def warpers(
    config: GenerationConfig, temperature: float, top_k: int, top_p: float, min_p: float
) -> list[Any]:
    """All steps of a draw, in ``generate``'s order."""
    steps: list[Any] = []
    if temperature != 1.0:
        steps.append(hf.TemperatureLogitsWarper(temperature))
    own = {name: asked_for({name: make}, config, []) for name, make in WARPERS.items()}
    steps += own.pop("top_h")
    if top_k:
        steps.append(hf.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        steps.append(hf.TopPLogitsWarper(top_p))
    if min_p:
        steps.append(hf.MinPLogitsWarper(min_p))
    return [*steps, *(step for each in own.values() for step in each)]
