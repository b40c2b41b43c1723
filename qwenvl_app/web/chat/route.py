"""``POST /v1/chat/completions``, as OpenAI's clients use it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, islice

from flask import Blueprint, Response, jsonify, request
from PIL.Image import Image

from qwenvl_app.errors import TooLarge
from qwenvl_app.generation import GenerationRequest, Message
from qwenvl_app.settings import Settings
from qwenvl_app.web import sse
from qwenvl_app.web.answering import Answering, Service
from qwenvl_app.web.chat.completion import Completion
from qwenvl_app.web.chat.image_parts import load_image
from qwenvl_app.web.chat.json_body import in_turn, read_json
from qwenvl_app.web.chat.schema import ChatMessage, ChatRequest, ImagePart, TextPart


def blueprint(service: Service) -> Blueprint:
    """The route, bound to what answers it."""
    routes = Blueprint("chat", __name__)
    settings = service.settings

    @routes.post("/v1/chat/completions", provide_automatic_options=False)
    def chat() -> Response:
        """An answer in one piece, or as events."""
        with Answering(service) as answering:
            with answering.record.stage("read"), in_turn(request, answering.deadline):
                body, size = read_json(request)
                asked = ChatRequest.parse(body)
                del body  # with its pictures, which are in ``asked`` too
                _check_length(asked, settings.max_prompt_chars)
            fetched = answering.fetch(_addresses(asked), size)
            answering.admit()
            deltas = answering.generate(_request(asked, answering, settings, fetched))
            answer = Completion(asked, answering, settings.served_model)
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
        owner=answering.owner,
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
