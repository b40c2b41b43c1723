"""``POST /v1/image/recognize``: the documented route."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify, request
from werkzeug.exceptions import ClientDisconnected

from qwenvl_app.errors import BadRequest, ClientGone, InternalError, TooLarge
from qwenvl_app.generation import GenerationRequest, SamplingParams, question
from qwenvl_app.images.decode import decode_image
from qwenvl_app.service.deadline import Deadline
from qwenvl_app.settings import Settings
from qwenvl_app.web.answering import Answering, Service
from qwenvl_app.web.forms import read_form
from qwenvl_app.web.schema import RecognizeForm

_ONLY_REASONING = "模型的思考没有得出答案，请简化问题后重试。"


def blueprint(service: Service) -> Blueprint:
    """The route, bound to what answers it."""
    routes = Blueprint("recognize", __name__)
    settings = service.settings
    sampling = SamplingParams(repetition_limit=settings.repetition_limit)

    # A slash at the end was a redirect to this route; here it is the route.
    @routes.post("/v1/image/recognize", strict_slashes=False, provide_automatic_options=False)
    def recognize() -> Response:
        with Answering(service) as answering:
            with answering.record.stage("read"):
                form = _read(settings, answering.deadline)
            answering.admit()
            result = _answer(form, answering)
        return jsonify(status="success", result=result)

    def _answer(form: RecognizeForm, answering: Answering) -> str:
        record = answering.record
        with record.stage("image"):
            image = decode_image(form.image.data, max_megapixels=settings.max_image_megapixels)
        record.pixels = image.width * image.height
        asked = GenerationRequest(
            question(image, form.prompt),
            answering.request_id,
            sampling,
            deadline=answering.deadline.at,
            continues=False,
        )
        result = "".join(delta.text for delta in answering.generate(asked))
        if not result and record.usage and record.usage.reasoning_tokens:
            # Cut before the answer began, as a rule. An empty result would look like one.
            raise InternalError(_ONLY_REASONING, reason="no_answer")
        return result

    return routes


def _read(settings: Settings, deadline: Deadline) -> RecognizeForm:
    """The form, within all limits that can be checked without work."""
    deadline.check()
    try:
        fields = read_form(request, RecognizeForm.model_fields)
    except ClientDisconnected:
        raise ClientGone from None
    deadline.check()
    form = RecognizeForm.parse(fields)
    kind = form.image.content_type
    if not kind or not kind.startswith("image/"):
        raise BadRequest(f"上传的文件必须是图片类型，但收到的是 {kind}。")
    if (length := len(form.prompt)) > settings.max_prompt_chars:
        raise TooLarge(f"提示词为 {length} 个字符，超过 {settings.max_prompt_chars} 个字符的限制。")
    return form
