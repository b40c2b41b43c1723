"""``POST /v1/image/recognize``: the documented route."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice

from flask import Blueprint, Response, jsonify, request
from werkzeug.exceptions import ClientDisconnected

from qwenvl_app.errors import BadRequest, ClientGone, InternalError, TooLarge
from qwenvl_app.generation import GenerationRequest, question
from qwenvl_app.images.decode import decode_image
from qwenvl_app.service.deadline import Deadline
from qwenvl_app.service.record import RequestRecord
from qwenvl_app.settings import Settings
from qwenvl_app.web import sse
from qwenvl_app.web.answering import Answering, Service
from qwenvl_app.web.errors import as_service_error, dumps, render
from qwenvl_app.web.forms import read_form
from qwenvl_app.web.schema import RecognizeForm

_ONLY_REASONING = "模型的思考没有得出答案，请简化问题后重试。"
_JSON = "application/json"
_EVENTS = ("text/event-stream", "text/event-stream;charset=utf-8")


def blueprint(service: Service) -> Blueprint:
    """The route, bound to what answers it."""
    routes = Blueprint("recognize", __name__)
    settings = service.settings

    # A slash at the end was a redirect to this route; here it is the route.
    @routes.post("/v1/image/recognize", strict_slashes=False, provide_automatic_options=False)
    def recognize() -> Response:
        """An answer in one piece, or as events."""
        with Answering(service) as answering:
            with answering.record.stage("read"):
                form = _read(settings, answering.deadline)
            streamed = _wants_events()
            answering.admit()
            texts = _texts(form, answering, settings, streamed)
            if not streamed:
                answer = jsonify(status="success", result="".join(texts))
                answer.headers.update(_headers(answering.record))
                return answer
            # What fails before the first piece has a status of its own.
            events = _events(chain([*islice(texts, 1)], texts), answering)
            return sse.response(events, answering.held.pop_all().close)

    return routes


def _read(settings: Settings, deadline: Deadline) -> RecognizeForm:
    """The form, within all limits that can be checked without work."""
    deadline.check()
    try:
        fields = read_form(request, RecognizeForm.model_fields)
    except ClientDisconnected:
        raise ClientGone from None
    deadline.check()
    form = RecognizeForm.parse(fields, settings.max_new_tokens)
    kind = form.image.content_type
    if not kind or not kind.startswith("image/"):
        raise BadRequest(f"上传的文件必须是图片类型，但收到的是 {kind}。")
    if (length := len(form.prompt)) > settings.max_prompt_chars:
        raise TooLarge(f"提示词为 {length} 个字符，超过 {settings.max_prompt_chars} 个字符的限制。")
    return form


def _wants_events() -> bool:
    """Whether the client named events, and JSON not before them (RFC 9110, 12.5.1).

    A wildcard names nothing: clients that send one have always had JSON.
    """
    accepted = request.accept_mimetypes
    named = any(kind.lower().startswith(_EVENTS[0]) for kind in accepted.values())
    return named and accepted.best_match([_JSON, *_EVENTS]) in _EVENTS


def _texts(
    form: RecognizeForm, answering: Answering, settings: Settings, streamed: bool
) -> Iterator[str]:
    """The answer's pieces, none of them empty. Raises ServiceError."""
    record = answering.record
    with record.stage("image"):
        image = decode_image(form.image.data, max_megapixels=settings.max_image_megapixels)
    answering.keep(form.image.data)
    record.pixels = image.width * image.height
    asked = GenerationRequest(
        question(image, form.prompt),
        answering.request_id,
        form.sampling(settings.repetition_limit),
        stream=streamed,
        deadline=answering.deadline.at,
        continues=False,
        originals=tuple(answering.originals),
        owner=answering.owner,
    )
    empty = True
    for delta in answering.generate(asked):
        if delta.text:
            empty = False
            yield delta.text
    if empty and record.usage and record.usage.reasoning_tokens:
        # Cut before the answer began, as a rule. An empty result would look like one.
        raise InternalError(_ONLY_REASONING, reason="no_answer")


def _events(texts: Iterator[str], answering: Answering) -> Iterator[str]:
    """A ``delta`` each, then the answer as without events and why it ended; or an ``error``."""
    record, pieces = answering.record, list[str]()
    try:
        for text in texts:
            pieces.append(text)
            yield sse.event(dumps({"delta": text}))
        last: dict[str, object] = {"status": "success", "result": "".join(pieces)}
        last["finish_reason"] = record.finish_reason
        last["usage"] = asdict(record.usage) if record.usage else None
        yield sse.event(dumps(last))
    except Exception as failure:
        error = as_service_error(failure, answering.request_id)
        record.reason = error.reason
        _, _, body = render(error, answering.request_id)
        yield sse.event(body.decode(), "error")


def _headers(record: RequestRecord) -> dict[str, str]:
    """Why the answer ended and what it took: the recorded bodies have no room for it."""
    headers = {"X-Finish-Reason": str(record.finish_reason)} if record.finish_reason else {}
    if record.usage:
        for name, count in asdict(record.usage).items():
            headers[f"X-{name.replace('_', '-').title()}"] = str(count)
    return headers
