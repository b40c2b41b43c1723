"""The chat template and token ids of one picture and one prompt.

The small remaining job of ``Qwen3VLProcessor``, which insists on torchvision: see
transformers/models/qwen3_vl/processing_qwen3_vl.py. User text is encoded on its own, with special
tokens split, so that nothing a user writes can become a control token (CVE-2026-44222 in vLLM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_PAD = "<|image_pad|>"
# Stands for the user's text while the template is rendered; cut out again before encoding.
_TEXT = "\x00text\x00"


@dataclass(frozen=True)
class Reasoning:
    """The tokens around a model's reasoning, and whether the prompt itself opens it.

    The templates of Thinking variants do: then the answer begins within the reasoning.
    """

    begin: int
    end: int
    begun: bool


@dataclass(frozen=True)
class Prompt:
    """Token ids, and for each its kind: 1 where the picture's features go, else 0."""

    input_ids: list[int]
    token_types: list[int]


class PromptBuilder:
    """Builds prompts; may be called on any thread. ``reasoning`` is None if the tokenizer has none.

    Takes two tokenizer objects: a fast tokenizer keeps ``split_special_tokens`` as state on the
    shared object, and threads that mixed both values got wrong encodings (vllm #40949). So each
    of these two is only ever called with one value.
    """

    def __init__(
        self,
        control_tokenizer: PreTrainedTokenizerBase,
        text_tokenizer: PreTrainedTokenizerBase,
        template: str,
        merge_size: int,
    ):
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _TEXT}]}
        ]
        rendered = control_tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        if not isinstance(rendered, str) or rendered.count(_TEXT) != 1 or IMAGE_PAD not in rendered:
            raise ValueError("the chat template does not place one image and the user's text")
        before, after = rendered.split(_TEXT)
        opening, closing = before.split(IMAGE_PAD)
        self._opening = control_tokenizer.encode(opening, add_special_tokens=False)
        self._closing = control_tokenizer.encode(closing, add_special_tokens=False)
        self._turn = control_tokenizer.encode(after, add_special_tokens=False)
        self._image = control_tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        vocabulary = control_tokenizer.get_vocab()
        begin, end = (vocabulary.get(mark) for mark in ("<think>", "</think>"))
        self.reasoning: Reasoning | None = None
        if begin is not None and end is not None:
            marks = [token for token in self._turn if token in (begin, end)]
            self.reasoning = Reasoning(begin, end, begun=marks[-1:] == [begin])
        self._text_tokenizer = text_tokenizer
        self._merged = merge_size**2

    def build(self, text: str, grid: tuple[int, int, int]) -> Prompt:
        """Token ids for one picture of ``grid`` (time, rows, columns) patches and ``text``."""
        patches = grid[0] * grid[1] * grid[2] // self._merged
        words = self._text_tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids = [*self._opening, *[self._image] * patches, *self._closing, *words, *self._turn]
        types = [0] * len(ids)
        first = len(self._opening)
        types[first : first + patches] = [1] * patches
        return Prompt(ids, types)
