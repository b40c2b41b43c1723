"""The chat template and token ids of a conversation.

The small remaining job of ``Qwen3VLProcessor``, which insists on torchvision: see
transformers/models/qwen3_vl/processing_qwen3_vl.py. The checkpoint's template is rendered for every
request over the whole conversation, so that whatever it does to a text is done. Nothing a user
writes can become a control token (CVE-2026-44222 in vLLM): no text, tool or option.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qwenvl_app.errors import BadRequest
from qwenvl_app.generation import Message, ToolCall
from qwenvl_app.prompts.chat_encoder import ChatEncoder
from qwenvl_app.prompts.template_probes import PICTURE, TEXT, keeps_order, takes_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_PAD = "<|image_pad|>"

# A template's work grows with both: jinja's sandbox bounds ``range`` and nothing else.
_MAX_MESSAGES = 2048
_MAX_OPTIONS = 4096  # characters, as JSON: a template may write them in every turn

# Each in Chinese and in English.
_REFUSED = (
    "模型的对话模板不接受这样的对话：请检查消息的角色与顺序、工具和模板选项。",
    "The model's chat template refuses this conversation: check the roles and their order, the "
    "tools and the template's options.",
)
_MISPLACED = (
    "模型的对话模板不支持在这些位置放置图片。",
    "The model's chat template does not support pictures in these places.",
)
_TOO_MANY = (
    f"消息过多：最多 {_MAX_MESSAGES} 条。",
    f"There are more than {_MAX_MESSAGES} messages.",
)
_NO_TOOLS = (
    "模型的对话模板不支持工具（tools）。",
    "The model's chat template does not support tools: send no tools, tool_calls or results.",
)
_BAD_OPTIONS = (
    "模板选项的名称不可用，或内容过长。",
    "A template option has a name that can't be used, or the options are too long.",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reasoning:
    """The tokens around a model's reasoning, and whether the prompt itself opens it.

    The templates of Thinking variants do: then the answer begins within the reasoning.
    """

    begin: int
    end: int
    begun: bool

    @property
    def open_until(self) -> int | None:
        """The token that ends the reasoning within which the answer begins; None if it does not."""
        return self.end if self.begun else None


@dataclass(frozen=True)
class Prompt:
    """Token ids, and where each picture's features go, in the order of the pictures.

    ``reasoning`` is the builder's, but for this prompt: options such as ``enable_thinking`` and
    earlier turns decide whether it opens the reasoning.
    """

    input_ids: list[int]
    images: tuple[range, ...]
    reasoning: Reasoning | None


class PromptBuilder:
    """Builds prompts; may be called on any thread. ``reasoning`` is None if the tokenizer has none.

    Raises ValueError for a template that does not place one image and then the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, merge_size: int):
        self._tokenizer, self._template, self._merged = tokenizer, template, merge_size**2
        self._encoder = ChatEncoder(tokenizer)
        # Names that mean something on the way to the template, or are its end-of-turn token.
        own = signature(tokenizer.apply_chat_template).parameters
        self._reserved = {"self", "conversations", "messages", *own, *tokenizer.special_tokens_map}
        vocabulary = tokenizer.get_vocab()
        self._image = vocabulary[IMAGE_PAD]
        content = [PICTURE, {"type": "text", "text": TEXT}]
        rendered = self._render([{"role": "user", "content": content}])
        pieces = [self._encoder.encode(piece) for piece in rendered.split(TEXT)]
        if [piece.count(self._image) for piece in pieces] != [1, 0]:
            raise ValueError("the chat template does not place one image and the user's text")
        begin, end = (vocabulary.get(mark) for mark in ("<think>", "</think>"))
        self._marks = None if begin is None or end is None else (begin, end)
        self.reasoning = self._reasoning(chain(*pieces))
        self._in_order = keeps_order(self._render, self._pictures)
        self._takes_tools = takes_tools(self._render)

    def build(
        self,
        messages: Sequence[Message],
        grids: Sequence[tuple[int, int, int]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> Prompt:
        """Token ids of ``messages``, and of the assistant's next turn the beginning.

        ``grids``: (time, rows, columns) in patches, for each picture of ``messages`` in their
        order. ``tools`` and ``options`` are the template's: functions, ``enable_thinking``. Raises
        BadRequest if the template takes no such conversation, or not all of its pictures.
        """
        rendered = self._rendered(messages, tools, options)
        ids: list[int] = []
        images: list[range] = []
        encoded = self._encoder.encode(rendered)
        if encoded.count(self._image) != len(grids) or (len(grids) > 1 and not self._in_order):
            raise BadRequest(*_MISPLACED)
        rest = iter(grids)
        for token in encoded:
            if token == self._image:
                time, rows, columns = next(rest)
                features = time * rows * columns // self._merged
                images.append(range(len(ids), len(ids) + features))
                ids += [token] * features
            else:
                ids.append(token)
        return Prompt(ids, tuple(images), self._reasoning(encoded))

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> str:
        """All of it guarded and rendered. Raises BadRequest, with none of the template's words."""
        if len(messages) > _MAX_MESSAGES:
            raise BadRequest(*_TOO_MANY)
        if not self._takes_tools and (tools or any(map(_is_about_tools, messages))):
            raise BadRequest(*_NO_TOOLS)
        if not self._reserved.isdisjoint(options):
            raise BadRequest(*_BAD_OPTIONS)
        try:
            if options and len(json.dumps(dict(options))) > _MAX_OPTIONS:
                raise BadRequest(*_BAD_OPTIONS)
            return self._render(
                [self._turn(message) for message in messages],
                tools=self._guarded(tools) or None,
                **{name: self._guarded(value) for name, value in options.items()},
            )
        except (BadRequest, MemoryError):
            raise
        except Exception as error:  # any: a template is a program, and this its input
            log.info("the chat template refused a conversation: %s", type(error).__name__)
            raise BadRequest(*_REFUSED) from None

    def _pictures(self, rendered: str) -> int:
        return self._encoder.encode(rendered).count(self._image)

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
            {"type": "text", "text": guard(part)} if isinstance(part, str) else PICTURE
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


def _is_about_tools(message: Message) -> bool:
    return message.role == "tool" or bool(message.tool_calls)


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
