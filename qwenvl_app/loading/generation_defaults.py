"""What a checkpoint's ``generation_config.json`` asks for, settled before anything is loaded.

Afterwards each value can be used as it is, and None says that nothing is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from qwenvl_app.engine.processors import LAST, PENALTIES, WARPERS, processors
from qwenvl_app.errors import ModelLoadError

log = logging.getLogger(__name__)

FILE = "generation_config.json"
# What a request may name too (engine/sampling.py).
_REQUESTED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_USED = (*_REQUESTED, *PENALTIES, *WARPERS, *LAST)
# When a value switches its step off: as in ``generate``, or meant so, such as vLLM's top_k of -1.
_OFF: dict[str, Callable[[Any], bool]] = {
    "temperature": lambda value: value == 0,
    **dict.fromkeys(("top_p", "typical_p"), lambda value: value >= 1),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), lambda value: not 0 < value < 1),
    "min_p": lambda value: value == 0,
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), lambda value: value == 1),
    **dict.fromkeys(
        (
            *("top_k", "min_length", "min_new_tokens"),
            *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        ),
        lambda value: value <= 0,
    ),
    **dict.fromkeys(
        ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
        lambda value: not value,
    ),
}
# What changes no answer here, or is the service's to decide, as it was of the replaced one.
_ELSEWHERE = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample"),
    *("max_length", "max_new_tokens", "use_cache", "cache_implementation", "transformers_version"),
    *("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
    *("return_dict_in_generate", "renormalize_logits", "forced_bos_token_id"),
}
# What beam search and others say where they are not on.
_NOTHING: tuple[Any, ...] = (None, 0, 1, "", [], {})


def load(directory: Path, config: Any) -> GenerationConfig:
    """Of the checkpoint in ``directory``; ``config`` is the model's. Raises ModelLoadError.

    What can't be honoured is named in one warning.
    """
    try:
        if (directory / FILE).is_file():
            defaults = GenerationConfig.from_pretrained(directory, local_files_only=True)
        else:
            defaults = GenerationConfig.from_model_config(config)
    except Exception:  # some values are checked as they are read, each with an error of its own
        log.exception("%s can't be used", FILE)
        raise ModelLoadError(
            f"{FILE} can't be used, the log has why; take the checkpoint's own"
        ) from None
    vocabulary = config.get_text_config().vocab_size
    defaults.eos_token_id = _ends(defaults.eos_token_id, vocabulary)
    if defaults.do_sample not in (None, True, False):
        raise ModelLoadError(f"{FILE} has do_sample {defaults.do_sample!r}; it is true or false")
    for name in _USED:
        if getattr(defaults, name) is not None:
            _settle(defaults, name, vocabulary)
    ignored = [
        name
        for name, value in defaults.to_diff_dict().items()
        if name not in (*_ELSEWHERE, *_USED) and (value is True or value not in _NOTHING)
    ]
    if ignored:
        log.warning("%s has what is not used here: %s", FILE, ", ".join(ignored))
    return defaults


def _ends(ends: Any, vocabulary: int) -> list[int]:
    """The tokens that end an answer. Raises ModelLoadError."""
    if ends is None or ends == []:
        raise ModelLoadError(f"{FILE} has no eos_token_id: no answer would ever end")
    each = ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) and 0 <= end < vocabulary for end in each):
        raise ModelLoadError(f"{FILE} has eos_token_id {ends!r}, which is no token's")
    return each


def _settle(defaults: GenerationConfig, name: str, vocabulary: int) -> None:
    """Switch a step off that is off by its value; the others' are tried on numbers that are none.

    transformers alone knows what its steps take. Raises ModelLoadError.
    """
    value = getattr(defaults, name)
    scores = torch.zeros(1, vocabulary)
    try:
        if name in _OFF and _OFF[name](value):
            setattr(defaults, name, 0 if name == "top_k" else None)  # None would be generate's 50
            if name == "temperature":
                defaults.do_sample = False
        else:
            asked = {name: value, "do_sample": True}
            made = processors(asked, defaults.eos_token_id, [0], scores, own=())
            made(torch.tensor([[0, 0]]), scores)
    except Exception:
        log.exception("%s in %s can't be used", name, FILE)
        raise ModelLoadError(
            f"{FILE} has {name} {value!r:.80}, which can't be used; the log has why"
        ) from None
