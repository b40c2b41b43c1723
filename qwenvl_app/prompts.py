"""The chat template and token ids of one picture and one prompt.

The small remaining job of ``Qwen3VLProcessor``, which insists on torchvision: see
transformers/models/qwen3_vl/processing_qwen3_vl.py. The checkpoint's template is rendered for every
request with the user's own text, so that whatever it does to a text is done. Nothing a user writes
can become a control token (CVE-2026-44222 in vLLM).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from PIL import Image
from tokenizers import Tokenizer

from qwenvl_app.generation import Message

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

IMAGE_PAD = "<|image_pad|>"
_PROBE = "\x00text\x00"  # a text that no template has of its own


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
    """Token ids, and where in them the features of each picture go, in order."""

    input_ids: list[int]
    images: tuple[range, ...]


class ChatEncoder:
    """A rendered template to token ids, as the tokenizer's own; may be called on any thread.

    Added tokens are found here and not by the tokenizer, which would find a user's too: it can
    leave out special ones alone (``split_special_tokens``), and keeps that as state on an object
    that all threads share (vllm #40949). What lies between is encoded by its model without any.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend: Tokenizer = tokenizer.backend_tokenizer
        self._plain = Tokenizer(backend.model)  # the same object: its tables are there once
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        added = backend.get_added_tokens_decoder()
        self._ids = {token.content: number for number, token in added.items()}
        # The longest of those that begin at one place, as the tokenizer takes it.
        longest_first = map(re.escape, sorted(self._ids, key=len, reverse=True))
        self._token = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        # Lone surrogates, which no text has that came as UTF-8: nobody can write them.
        guarded = sorted({_first(token.content) for token in added.values() if _is_control(token)})
        self._guards = {ord(own): chr(0xD800 + place) for place, own in enumerate(guarded)}
        self._restored = {ord(guard): own for own, guard in self._guards.items()}

    def guard(self, text: str) -> str:
        """A user's ``text``, to be rendered: it has no control token, nor any part that begins one.

        Where such tokens begin it has a stand-in, of which ``encode`` makes the text again. So two
        texts that a template joins make no token either, and a template that looks for one finds
        none. White space stays, which templates trim.
        """
        return text.translate(self._guards)

    def encode(self, rendered: str) -> list[int]:
        """Token ids. A control token is only what the template wrote."""
        ids: list[int] = []
        for place, piece in enumerate(self._token.split(rendered)):
            if place % 2:
                ids.append(self._ids[piece])
            elif piece:
                text = piece.translate(self._restored)
                ids += self._plain.encode(text, add_special_tokens=False).ids
        return ids


def _is_control(token: AddedToken) -> bool:
    """Whether it means more than it says. Words that fine-tuning added to a vocabulary do not."""
    return token.special or not all(each.isalnum() or each.isspace() for each in token.content)


def _first(token: str) -> str:
    """What a guard stands for: white space goes unguarded, since templates trim it."""
    return token.strip()[:1] or token[0]


class PromptBuilder:
    """Builds prompts; may be called on any thread. ``reasoning`` is None if the tokenizer has none.

    Raises ValueError for a template that does not place one image and behind it the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, merge_size: int):
        self._tokenizer, self._template, self._merged = tokenizer, template, merge_size**2
        self._encoder = ChatEncoder(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self._image = vocabulary[IMAGE_PAD]
        probe = [Message("user", (Image.new("RGB", (1, 1)), _PROBE))]
        pieces = [self._encoder.encode(piece) for piece in self._render(probe).split(_PROBE)]
        if [piece.count(self._image) for piece in pieces] != [1, 0]:
            raise ValueError("the chat template does not place one image and the user's text")
        begin, end = (vocabulary.get(mark) for mark in ("<think>", "</think>"))
        self.reasoning: Reasoning | None = None
        if begin is not None and end is not None:
            marks = [token for token in chain(*pieces) if token in (begin, end)]
            self.reasoning = Reasoning(begin, end, begun=marks[-1:] == [begin])

    def build(
        self,
        messages: Many[Message],
        grids: Many[tuple[int, int, int]],
        tools: Many[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Token ids of a conversation whose pictures have ``grids`` (time, rows, columns)."""
        rendered = self._encoder.encode(self._render(messages, tools, options))
        ids: list[int] = []
        images: list[range] = []
        sizes = iter(grids)
        for token in rendered:
            if token != self._image:
                ids.append(token)
                continue
            time, rows, columns = next(sizes)
            images.append(range(len(ids), len(ids) + time * rows * columns // self._merged))
            ids += [token] * len(images[-1])
        return Prompt(ids, tuple(images))

    def _render(
        self,
        messages: Many[Message],
        tools: Many[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """What the template makes of ``messages``, whose texts are guarded."""
        return str(
            self._tokenizer.apply_chat_template(
                [self._message(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **(options or {}),
            )
        )

    def _message(self, message: Message) -> dict[str, Any]:
        content = [
            {"type": "text", "text": self._encoder.guard(part)}
            if isinstance(part, str)
            else {"type": "image"}
            for part in message.content
        ]
        return {"role": message.role, "content": content}
