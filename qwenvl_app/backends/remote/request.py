"""A GenerationRequest as the body of ``POST /v1/chat/completions`` (openai-openapi).

Beyond OpenAI's fields it has those that vLLM, SGLang and LMDeploy share: ``top_k``, ``min_p``,
``repetition_penalty``, ``ignore_eos``, ``chat_template_kwargs``, ``mm_processor_kwargs``. They are
sent only where they were asked for.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwenvl_app.generation import (
    CALL_MARKS,
    Constraint,
    GenerationRequest,
    Message,
    SamplingParams,
)
from qwenvl_app.images.encode import encode

if TYPE_CHECKING:
    from PIL.Image import Image

Json = dict[str, Any]
# Tokens that a penalty is for: elsewhere all, at llama-server the last 64, and it takes no -1.
_WHOLE = 2**15


@dataclass(frozen=True)
class Body:
    """Pieces of JSON in order, and what requests about one picture have in common.

    ``affinity`` is a hash of the first picture, None without one. ``llama`` has what llama-server
    calls otherwise.
    """

    pieces: tuple[bytes, ...]
    affinity: bytes | None
    llama: Json = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Bytes."""
        return sum(map(len, self.pieces))

    def to(self, software: str) -> Body:
        """As a server of that ``software`` takes it: others may refuse fields of llama-server's."""
        if software != "llamacpp" or not self.llama:
            return self
        more = json.dumps(self.llama, separators=(",", ":")).encode()
        last = self.pieces[-1].removesuffix(b"}") + b"," + more.removeprefix(b"{")
        return Body((*self.pieces[:-1], last), self.affinity)


def body_of(request: GenerationRequest, model: str, max_new_tokens: int) -> Body:
    """Encode the pictures too, on the caller's thread.

    A picture is in memory once more, as base64, and not in the text of the JSON. ``max_new_tokens``
    is for a request that names no limit.
    """
    # Stands for a picture until the JSON is written.
    mark = secrets.token_hex(16) if request.images else ""
    fields = {
        "model": model,
        "messages": list(_messages(request.messages, mark)),
        "stream": True,
        "stream_options": {"include_usage": True},
        **_sampling(request, max_new_tokens),
        **_constraint(request.constraint),
    }
    if request.tools:
        held = request.constraint is not None and request.constraint.kind == "tools"
        fields["tools"] = [_strict(tool) if held else tool for tool in request.tools]
    if request.logprobs is not None:
        fields["logprobs"] = True
        if request.logprobs:
            fields["top_logprobs"] = request.logprobs
    if request.template_options:
        fields["chat_template_kwargs"] = dict(request.template_options)
    limits = zip(("min_pixels", "max_pixels"), request.pixels, strict=True)
    if pixels := {name: value for name, value in limits if value is not None}:
        fields["mm_processor_kwargs"] = pixels
    text = json.dumps(fields, separators=(",", ":")).encode()
    return _filled(text.split(mark.encode()) if mark else [text], request)


def _filled(texts: Sequence[bytes], request: GenerationRequest) -> Body:
    """``texts`` with the pictures between them."""
    pieces, affinity = [texts[0]], None
    originals: Sequence[bytes | None] = request.originals or [None] * len(request.images)
    for image, original, text in zip(request.images, originals, texts[1:], strict=True):
        kind, data = encode(image, original)
        affinity = affinity or hashlib.blake2b(data, digest_size=16).digest()
        pieces += [
            f"data:{kind};base64,".encode(),
            binascii.b2a_base64(data, newline=False),
            text,
        ]
    return Body(tuple(pieces), affinity, _llama(request))


def _messages(messages: Iterable[Message], mark: str) -> Iterable[Json]:
    """In OpenAI's form. A result has the id of its call: they are in the order of the calls."""
    called: list[str] = []
    for message in messages:
        turn: Json = {"role": message.role, "content": _content(message.content, mark)}
        if message.reasoning:
            turn["reasoning_content"] = message.reasoning
        if message.tool_calls:
            called = [call.id for call in message.tool_calls]
            turn["content"] = turn["content"] or None
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in message.tool_calls
            ]
        if message.role == "tool" and called:
            turn["tool_call_id"] = called.pop(0)
        yield turn


def _content(parts: tuple[str | Image, ...], mark: str) -> str | list[Json]:
    """A text, if there is nothing else: not every server takes parts where it expects none."""
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) == len(parts):
        return "".join(texts)
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": mark}}
        for part in parts
    ]


def _sampling(request: GenerationRequest, max_new_tokens: int) -> Json:
    """What was asked for, and no default of ours: those are the checkpoint's, over there."""
    sampling = request.sampling
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    fields: Json = {name: value for name in names if (value := getattr(sampling, name)) is not None}
    fields["max_tokens"] = sampling.max_new_tokens or max_new_tokens
    for name in ("presence_penalty", "frequency_penalty", "ignore_eos"):
        if value := getattr(sampling, name):
            fields[name] = value
    if stop := _stop(request.sampling):
        fields["stop"] = stop
    if request.tools and CALL_MARKS[1] in sampling.stop:
        fields["parallel_tool_calls"] = False
    return fields


def _strict(tool: Mapping[str, Any]) -> Json:
    """Only then is a required call held to the tool's schema by vLLM (0.32)."""
    return {**tool, "function": {**tool["function"], "strict": True}}


def _llama(request: GenerationRequest) -> Json:
    """As llama.cpp's tools/server/README.md names it."""
    penalty = request.sampling.repetition_penalty
    return {} if penalty is None else {"repeat_penalty": penalty, "repeat_last_n": _WHOLE}


def _stop(sampling: SamplingParams) -> list[str]:
    """Without the mark behind a call, which is how ``parallel_tool_calls: false`` is done here."""
    return [text for text in sampling.stop if text != CALL_MARKS[1]]


def _constraint(constraint: Constraint | None) -> Json:
    if constraint is None:
        return {}
    if constraint.kind == "json":
        if constraint.schema == {"type": "object"}:
            return {"response_format": {"type": "json_object"}}
        schema = {"name": "answer", "schema": constraint.schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    if constraint.single and len(constraint.tools) == 1:
        name = constraint.tools[0]["function"]["name"]
        return {"tool_choice": {"type": "function", "function": {"name": name}}}
    single = {"parallel_tool_calls": False} if constraint.single else {}
    return {"tool_choice": "required", **single}
