"""A loaded checkpoint: the model, and what turns requests into its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwenvl_app.engine.native import NONE, Native
from qwenvl_app.engine.pixels import Patcher
from qwenvl_app.grammar.grammars import Grammars
from qwenvl_app.prompts.builder import PromptBuilder


@dataclass(frozen=True)
class LoadedModel:
    """A model and what turns requests into its inputs. All threads share it; none changes it."""

    model: Any  # of a supported family, whose annotations admit no call of its parts
    patcher: Patcher
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptBuilder
    native: Native = NONE  # layers of ``model``

    @cached_property
    def grammars(self) -> Grammars:
        """Of its vocabulary."""
        width = self.model.config.get_text_config().vocab_size
        return Grammars(self.tokenizer, width, self.model.generation_config.eos_token_id)
