"""The events of an upstream's answer (WHATWG HTML, 9.2; openai-openapi) to deltas, its models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from qwenvl_app.backends.remote.failures import broken, in_stream
from qwenvl_app.generation import CALL_MARKS, Delta, FinishReason, TokenLogprob, Usage

Json = dict[str, Any]
_LONGEST_EVENT = 4 * 2**20  # bytes
_LONGEST_ANSWER = 64 * 2**20  # of all events
_FINISHES = {
    "stop": FinishReason.STOP,
    "tool_calls": FinishReason.STOP,
    "function_call": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.LENGTH,  # it was cut
    "repetition": FinishReason.REPETITION,
}


def events(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each event. Raises UpstreamError for one that is too long."""
    begun, data = list[bytes](), list[bytes]()  # a line's pieces, an event's lines
    held = total = 0
    for piece in pieces:
        total, held = total + len(piece), held + len(piece)
        begun.append(piece)
        if b"\n" in piece:
            *lines, rest = b"".join(begun).split(b"\n")
            begun = [rest]
            for line in lines:
                text = line.removesuffix(b"\r")
                if not text and data:
                    yield b"\n".join(data)
                    data = []
                elif text.startswith(b"data:"):
                    data.append(text[5:].removeprefix(b" "))
            held = len(rest) + sum(map(len, data))
        if held > _LONGEST_EVENT or total > _LONGEST_ANSWER:
            raise broken("an endless event or answer")


def models(body: bytes) -> dict[str, str]:
    """Of each listed model the software, in ``owned_by``; none if ``body`` is no list."""
    try:
        listed = json.loads(body)["data"]
        return {str(model["id"]): str(model.get("owned_by")) for model in listed}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}


class AnswerReader:
    """Reads one answer. ``finish`` and ``usage`` are None until they were told."""

    def __init__(self) -> None:
        self.finish: FinishReason | None = None
        self.usage: Usage | None = None
        self._call: int | None = None  # the index of the call that is open
        self._arguments = ""  # of that call

    def read(self, data: bytes) -> Delta | None:
        """What an event says to the client, if it says anything. Raises UpstreamError."""
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise broken("an event that is no JSON") from None
        if not isinstance(event, dict):
            raise broken("an event that is no object")
        if error := event.get("error"):
            raise in_stream(error.get("code") if isinstance(error, dict) else None)
        try:
            delta = self._delta(event)
            (delta.text + delta.reasoning).encode()  # no half of a surrogate pair
        except (TypeError, ValueError, KeyError, AttributeError, IndexError):
            raise broken("an event of another form") from None
        return delta if delta.text or delta.reasoning or delta.logprobs else None

    def _delta(self, event: Json) -> Delta:
        if usage := event.get("usage"):
            self.usage = _usage(usage)
        if not event.get("choices"):
            return Delta("")
        choice = event["choices"][0]
        said = choice.get("delta") or {}
        text = _text(said.get("content"))
        if text.strip():
            text = self._end_call() + text
        for call in said.get("tool_calls") or ():
            text += self._tool_call(call)
        if finish := choice.get("finish_reason"):
            self.finish = _FINISHES[finish]
            if self.finish is FinishReason.STOP or _is_json(self._arguments):
                text += self._end_call()
        # Its name in OpenAI's clients so far, and the newer one of vLLM.
        reasoning = _text(said.get("reasoning_content") or said.get("reasoning"))
        scores = (choice.get("logprobs") or {}).get("content") or ()
        # Of reasoning there are none here.
        logprobs = () if reasoning and not text else tuple(map(_logprob, scores))
        return Delta(text, reasoning=reasoning, logprobs=logprobs)

    def _tool_call(self, call: Json) -> str:
        """As the model wrote it, in Hermes' form: the routes read calls in an answer's text."""
        function, index = call.get("function") or {}, call.get("index", 0)
        text = ""
        if index != self._call:
            name = function["name"]
            if not isinstance(name, str) or not isinstance(index, int):
                raise TypeError
            text = self._end_call()
            self._call, self._arguments = index, ""
            quoted = json.dumps(name, ensure_ascii=False)
            text += f'{CALL_MARKS[0]}\n{{"name": {quoted}, "arguments": '
        arguments = _text(function.get("arguments"))
        self._arguments += arguments
        return text + arguments

    def _end_call(self) -> str:
        if self._call is None:
            return ""
        self._call = None
        return ("" if self._arguments.strip() else "{}") + f"}}\n{CALL_MARKS[1]}"


def _is_json(text: str) -> bool:
    """Whether ``text`` is all of one: a call that was cut is none, and stays as it is."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError
    return value


def _usage(usage: Json) -> Usage:
    prompt = usage.get("prompt_tokens_details") or {}
    completion = usage.get("completion_tokens_details") or {}
    return Usage(
        _count(usage["prompt_tokens"]),
        _count(usage.get("completion_tokens")),
        _count(prompt.get("cached_tokens")),
        _count(completion.get("reasoning_tokens")),
    )


def _count(value: object) -> int:
    if value is None:
        return 0
    if not isinstance(value, int) or value < 0:
        raise TypeError
    return value


def _logprob(entry: Json) -> TokenLogprob:
    text, value = _text(entry["token"]), float(entry["logprob"])
    if math.isnan(value):
        raise ValueError
    known = entry.get("bytes")
    data = text.encode(errors="replace") if known is None else bytes(known)
    top = tuple(map(_logprob, entry.get("top_logprobs") or ()))
    return TokenLogprob(text, data, value, top)
