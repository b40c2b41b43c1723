"""``POST /v1/chat/completions`` and ``GET /v1/models``, as OpenAI's clients use them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from flask import Blueprint, Response, jsonify, request
from PIL.Image import Image

from qwenvl_app.errors import TooLarge
from qwenvl_app.generation import (
    Delta,
    FinishReason,
    GenerationRequest,
    Message,
    TokenLogprob,
    Usage,
)
from qwenvl_app.service.record import RequestRecord
from qwenvl_app.settings import Settings
from qwenvl_app.web import sse
from qwenvl_app.web.answering import Answering, Service
from qwenvl_app.web.chat.image_parts import load_image
from qwenvl_app.web.chat.json_body import in_turn, read_json
from qwenvl_app.web.chat.schema import ChatMessage, ChatRequest, ImagePart, TextPart
from qwenvl_app.web.chat.tool_calls import CallReader
from qwenvl_app.web.errors import as_service_error, dumps, openai_error

Json = dict[str, Any]


def models(settings: Settings) -> Blueprint:
    """The list of models, which is one."""
    routes = Blueprint("models", __name__)
    started = int(time.time())

    @routes.get("/v1/models", provide_automatic_options=False)
    def listed() -> Response:
        """The one model."""
        model = {
            "id": settings.served_model,
            "object": "model",
            "created": started,
            "owned_by": "qwenvl",
        }
        return jsonify(object="list", data=[model])

    return routes


def blueprint(service: Service) -> Blueprint:
    """The route, bound to what answers it."""
    routes = Blueprint("chat", __name__)
    settings = service.settings

    @routes.post("/v1/chat/completions", provide_automatic_options=False)
    def chat() -> Response:
        """An answer in one piece, or as events."""
        with Answering(service) as answering:
            with answering.record.stage("read"), in_turn(request, answering.deadline):
                asked = ChatRequest.parse(read_json(request))
                _check_length(asked, settings.max_prompt_chars)
            fetched = answering.fetch(_addresses(asked))
            answering.admit()
            deltas = answering.generate(_request(asked, answering, settings, fetched))
            answer = _Answer(asked, answering, settings.served_model)
            if not asked.stream:
                return jsonify(answer.whole(deltas))
            # What fails before the first piece has a status of its own.
            events = answer.events(chain([*islice(deltas, 1)], deltas))
            return sse.response(events, answering.held.pop_all().close)

    return routes


def _check_length(asked: ChatRequest, most: int) -> None:
    if (length := asked.characters) > most:
        raise TooLarge(f"messages and tools: {length} characters, and the limit is {most}.")


def _addresses(asked: ChatRequest) -> dict[str, str]:
    """The URLs of pictures that are elsewhere, each with the field it stands in."""
    return {
        part.image_url.url: _where(number, place)
        for number, message in enumerate(asked.messages)
        for place, part in enumerate(message.parts)
        if isinstance(part, ImagePart) and not part.image_url.url.startswith("data:")
    }


def _where(number: int, place: int) -> str:
    return f"messages.{number}.content.{place}.image_url"


def _request(
    asked: ChatRequest, answering: Answering, settings: Settings, fetched: Mapping[str, bytes]
) -> GenerationRequest:
    """What the backend is asked; pictures are decoded here, under the permit."""
    with answering.record.stage("image"):
        messages = tuple(
            _message(message, number, answering, settings, fetched)
            for number, message in enumerate(asked.messages)
        )
    return GenerationRequest(
        messages,
        answering.request_id,
        asked.sampling(settings.repetition_limit),
        stream=bool(asked.stream),
        deadline=answering.deadline.at,
        template_options=asked.template_options,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        pixels=asked.pixels,
        tools=asked.offered,
        constraint=asked.constraint,
        originals=tuple(answering.originals),
    )


def _message(
    message: ChatMessage,
    number: int,
    answering: Answering,
    settings: Settings,
    fetched: Mapping[str, bytes],
) -> Message:
    content: list[str | Image] = []
    for place, part in enumerate(message.parts):
        if isinstance(part, TextPart):
            content.append(part.text)
            continue
        answering.deadline.check()
        where = _where(number, place)
        # The limit is for all of them: a small body may hold many that are large once decoded.
        pixels = answering.record.pixels or 0
        left = settings.max_image_megapixels - pixels / 1e6
        image, file = load_image(part.image_url.url, where, left, fetched)
        answering.keep(file)
        answering.record.pixels = pixels + image.width * image.height
        content.append(image)
    role = "system" if message.role == "developer" else message.role
    calls = tuple(call.as_call() for call in message.tool_calls or ())
    return Message(role, tuple(content), message.reasoning_content or "", calls)


class _Answer:
    """Renders one answer."""

    def __init__(self, asked: ChatRequest, answering: Answering, model: str):
        self._asked, self._answering = asked, answering
        self._reader = CallReader(asked.offered)
        self._head: Json = {
            "id": f"chatcmpl-{answering.request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, deltas: Iterator[Delta]) -> Json:
        """A ``chat.completion``."""
        parts = list(deltas)
        read = self._reader.message("".join(part.text for part in parts))
        message: Json = {"role": "assistant", **read}
        if reasoning := "".join(part.reasoning for part in parts):
            message["reasoning_content"] = reasoning
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(tuple(one for part in parts for one in part.logprobs)),
            "finish_reason": self._finish(),
        }
        return self._head | {"object": "chat.completion", "choices": [choice]} | self._account()

    def events(self, deltas: Iterator[Delta]) -> Iterator[str]:
        """``chat.completion.chunk`` events; an error in mid-stream is one, too."""
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            for delta in deltas:
                said = [{"reasoning_content": delta.reasoning}] if delta.reasoning else []
                said += self._reader.push(delta.text, last=delta.finish_reason is not None)
                if delta.logprobs and not said:
                    said = [{}]
                for number, each in enumerate(said):
                    # The tokens of a text are told with its last piece, if it has several.
                    tokens = delta.logprobs if number == len(said) - 1 else ()
                    yield self._chunk(each, self._logprobs(tokens))
            yield self._chunk({}, finish=self._finish())
            if self._asked.include_usage:
                yield self._event({"choices": []} | self._account())
        except Exception as failure:
            error = as_service_error(failure, self._answering.request_id)
            self._answering.record.reason = error.reason
            yield sse.event(dumps(openai_error(error, self._answering.request_id)))
        yield sse.DONE

    def _account(self) -> Json:
        record = self._answering.record
        return {"usage": _usage(record.usage), "timings": _timings(record)}

    def _chunk(self, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._event({"choices": [choice]})

    def _event(self, content: Json) -> str:
        return sse.event(dumps(self._head | {"object": "chat.completion.chunk"} | content))

    def _finish(self) -> str:
        """In OpenAI's words; an answer that repeats itself was cut."""
        if self._answering.record.finish_reason is not FinishReason.STOP:
            return "length"
        return "tool_calls" if self._reader.complete else "stop"

    def _logprobs(self, tokens: tuple[TokenLogprob, ...]) -> Json | None:
        if not self._asked.logprobs:
            return None
        return {
            "content": [_token(one) | {"top_logprobs": [*map(_token, one.top)]} for one in tokens]
        }


def _token(token: TokenLogprob) -> Json:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": token.logprob}


def _timings(record: RequestRecord) -> Json:
    """Milliseconds of each stage; a field of that name is llama-server's, too."""
    seconds = {name: record.stages.get(name, 0.0) for name in ("read", "queue", "image")}
    if timings := record.timings:
        seconds["queue"] += timings.queue
        seconds |= {
            "preprocess": timings.preprocess,
            "prefill": timings.prefill,
            "decode": timings.decode,
        }
    return {f"{name}_ms": round(value * 1000, 1) for name, value in seconds.items()}


def _usage(usage: Usage | None) -> Json:
    read, written = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens if usage else 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens if usage else 0},
    }
