"""``POST /v1/image/recognize``: the documented route."""

from __future__ import annotations

from flask import Blueprint, Response, g, jsonify, request

from qwenvl_app.admission import Admission
from qwenvl_app.backends import Backend, require_ready
from qwenvl_app.errors import BadRequest
from qwenvl_app.generation import GenerationRequest, SamplingParams
from qwenvl_app.images import decode_image
from qwenvl_app.settings import Settings
from qwenvl_app.web import accounts
from qwenvl_app.web.forms import read_form
from qwenvl_app.web.schema import RecognizeForm


def blueprint(settings: Settings, backend: Backend, admission: Admission) -> Blueprint:
    """The route, bound to what answers it."""
    routes = Blueprint("recognize", __name__)
    sampling = SamplingParams(repetition_limit=settings.repetition_limit)

    # A slash at the end was a redirect to this route; here it is the route.
    @routes.post("/v1/image/recognize", strict_slashes=False, provide_automatic_options=False)
    def recognize() -> Response:
        record = accounts.current()
        with record.stage("read"):
            form = RecognizeForm.parse(read_form(request))
        kind = form.image.content_type
        if not kind or not kind.startswith("image/"):
            raise BadRequest(f"上传的文件必须是图片类型，但收到的是 {kind}。")
        require_ready(backend.status())
        with admission.admit() as waited:
            record.stages["queue"] = waited
            with record.stage("image"):
                image = decode_image(form.image.data, max_megapixels=settings.max_image_megapixels)
            record.pixels = image.width * image.height
            record.submit()
            generation = backend.generate(
                GenerationRequest(image, form.prompt, g.request_id, sampling)
            )
            try:
                result = "".join(record.take(delta) for delta in generation)
            finally:
                generation.cancel()
        return jsonify(status="success", result=result)

    return routes
