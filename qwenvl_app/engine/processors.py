"""What only a checkpoint's ``generation_config.json`` can ask for: transformers makes it.

No request names any of it, and few checkpoints do. Which values count, and that they can be used,
is settled before (``loading/generation_defaults.py``): here what is not None is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig

PENALTIES = (
    *("sequence_bias", "encoder_repetition_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
)
# Of a draw, beside temperature, top_k, top_p and min_p.
WARPERS = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
LAST = ("watermarking_config",)


class _Steps(GenerationMixin):
    """As much of a model as ``generate`` looks at to make its steps."""

    def __init__(self, vocabulary: int):
        config: Any = PreTrainedConfig  # its annotations leave out what subclasses have
        self.config = config(vocab_size=vocabulary)


def processors(
    asked: dict[str, Any], ends: Any, prompt: list[int], scores: torch.Tensor, own: Iterable[Any]
) -> Any:
    """All steps that ``asked``, by their names in a ``GenerationConfig``, has a value for.

    In ``generate``'s order; ``own`` ones come before those of a draw, which there are with
    ``do_sample``. ``ends``: as ``eos_token_id``. ``scores`` (1, vocabulary) say where and how many.
    Copies to a GPU.
    """
    device = scores.device
    model: Any = _Steps(scores.shape[-1])
    config = GenerationConfig(**asked)  # type: ignore[no-untyped-call]
    config._eos_token_tensor = (
        None if ends is None else torch.tensor(ends, device=device).reshape(-1)
    )
    return model._get_logits_processor(
        config,
        len(prompt),
        torch.tensor([prompt], device=device),
        logits_processor=list(own),
        device=device,
    )
