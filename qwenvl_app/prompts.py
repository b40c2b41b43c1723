"""The chat template and token ids of a conversation.

The small remaining job of ``Qwen3VLProcessor``, which insists on torchvision: see
transformers/models/qwen3_vl/processing_qwen3_vl.py. The checkpoint's template is rendered for every
request over the whole conversation, so that whatever it does to a text is done. Nothing a user
writes can become a control token (CVE-2026-44222 in vLLM): no text, tool or option.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from qwenvl_app.generation import Message, ToolCall

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

IMAGE_PAD = "<|image_pad|>"
_PROBE = "\x00text\x00"  # a text that no template has of its own
_PICTURE = {"type": "image"}


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
    """Token ids, and where each picture's features go, in the order of the pictures.

    ``reasoning`` is the builder's, but for this prompt: options such as ``enable_thinking`` and
    earlier turns decide whether it opens the reasoning.
    """

    input_ids: list[int]
    images: tuple[range, ...]
    reasoning: Reasoning | None


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
        content = [_PICTURE, {"type": "text", "text": _PROBE}]
        rendered = self._render([{"role": "user", "content": content}])
        pieces = [self._encoder.encode(piece) for piece in rendered.split(_PROBE)]
        if [piece.count(self._image) for piece in pieces] != [1, 0]:
            raise ValueError("the chat template does not place one image and the user's text")
        begin, end = (vocabulary.get(mark) for mark in ("<think>", "</think>"))
        self._marks = None if begin is None or end is None else (begin, end)
        self.reasoning = self._reasoning(chain(*pieces))

    def build(
        self,
        messages: Sequence[Message],
        grids: Sequence[tuple[int, int, int]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> Prompt:
        """Token ids of ``messages``, and of the assistant's next turn the beginning.

        ``grids``: (time, rows, columns) in patches, for each picture of ``messages`` in their
        order. ``tools`` and ``options`` are the template's: functions, ``enable_thinking``.
        """
        rendered = self._render(
            [self._turn(message) for message in messages],
            tools=self._guarded(tools) or None,
            **{name: self._guarded(value) for name, value in options.items()},
        )
        ids: list[int] = []
        images: list[range] = []
        rest = iter(grids)
        for token in (encoded := self._encoder.encode(rendered)):
            if token == self._image:
                time, rows, columns = next(rest)
                features = time * rows * columns // self._merged
                images.append(range(len(ids), len(ids) + features))
                ids += [token] * features
            else:
                ids.append(token)
        return Prompt(ids, tuple(images), self._reasoning(encoded))

    def _reasoning(self, ids: Iterable[int]) -> Reasoning | None:
        """That of a prompt of ``ids``: the last mark in it says whether reasoning is open."""
        if self._marks is None:
            return None
        marks = [token for token in ids if token in self._marks]
        return Reasoning(*self._marks, begun=marks[-1:] == [self._marks[0]])

    def _turn(self, message: Message) -> dict[str, Any]:
        """A message as the templates take it: of texts alone, its content is one text."""
        guard = self._encoder.guard
        parts = [
            {"type": "text", "text": guard(part)} if isinstance(part, str) else _PICTURE
            for part in message.content
        ]
        texts = [part for part in message.content if isinstance(part, str)]
        content = parts if len(texts) < len(parts) else "".join(map(guard, texts))
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.reasoning:
            turn["reasoning_content"] = guard(message.reasoning)
        if message.tool_calls:
            turn["tool_calls"] = [self._guarded(_as_dict(call)) for call in message.tool_calls]
        return turn

    def _guarded(self, value: Any) -> Any:
        """A JSON ``value``, every text of which is guarded, names too."""
        if isinstance(value, str):
            return self._encoder.guard(value)
        if isinstance(value, Mapping):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item) for item in value]
        return value

    def _render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """What the template makes of ``messages``, whose texts are guarded."""
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **variables,
            )
        )


def _as_dict(call: ToolCall) -> dict[str, Any]:
    """As the templates take it: with arguments as an object, where their JSON is one."""
    arguments: Any = call.arguments
    try:
        parsed = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):  # the template's business, as all that is no object
        parsed = None
    if isinstance(parsed, dict):
        arguments = parsed
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
