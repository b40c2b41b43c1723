"""``POST /v1/image/recognize``: the documented route."""

from __future__ import annotations

from collections.abc import Callable

from flask import Blueprint, Response, g, jsonify, request
from werkzeug.exceptions import ClientDisconnected

from qwenvl_app.backends import Backend, require_ready
from qwenvl_app.errors import BadRequest, ClientGone, InternalError, TooLarge
from qwenvl_app.generation import GenerationRequest, SamplingParams, Status, question
from qwenvl_app.images.decode import decode_image
from qwenvl_app.service.admission import Admission
from qwenvl_app.service.deadline import Deadline
from qwenvl_app.settings import Settings
from qwenvl_app.web import request_log
from qwenvl_app.web.disconnects import Disconnects
from qwenvl_app.web.forms import read_form
from qwenvl_app.web.schema import RecognizeForm

_ONLY_REASONING = "模型的思考没有得出答案，请简化问题后重试。"


def blueprint(
    settings: Settings,
    backend: Backend,
    admission: Admission,
    disconnects: Disconnects,
    status: Callable[[], Status],
) -> Blueprint:
    """The route, bound to what answers it."""
    routes = Blueprint("recognize", __name__)

    # A slash at the end was a redirect to this route; here it is the route.
    @routes.post("/v1/image/recognize", strict_slashes=False, provide_automatic_options=False)
    def recognize() -> Response:
        record = request_log.current()
        deadline = Deadline(record.arrived + settings.request_timeout_s)
        with disconnects.watch(request.environ.get("gunicorn.socket"), deadline):
            with record.stage("read"):
                form = _read(settings, deadline)
            require_ready(status())
            with admission.admit(deadline) as waited:
                record.stages["queue"] = waited
                result = _answer(settings, backend, form, deadline)
        return jsonify(status="success", result=result)

    return routes


def _answer(settings: Settings, backend: Backend, form: RecognizeForm, deadline: Deadline) -> str:
    """What the model says of the picture; the caller holds a permit."""
    record = request_log.current()
    with record.stage("image"):
        image = decode_image(form.image.data, max_megapixels=settings.max_image_megapixels)
    record.pixels = image.width * image.height
    deadline.check()
    record.submit()
    sampling = SamplingParams(repetition_limit=settings.repetition_limit)
    generation = backend.generate(
        GenerationRequest(
            question(image, form.prompt), g.request_id, sampling, deadline=deadline.at
        )
    )
    try:
        with deadline.on_leaving(generation.cancel):
            result = "".join(record.take(delta) for delta in generation)
    finally:
        generation.cancel()
    deadline.check()
    if not result and record.usage and record.usage.reasoning_tokens:
        # Cut before the answer began, as a rule. An empty result would look like one.
        raise InternalError(_ONLY_REASONING, reason="no_answer")
    return result


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
