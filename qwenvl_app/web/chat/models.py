"""``GET /v1/models`` and ``GET /v1/models/{id}``, as OpenAI's clients use them."""

from __future__ import annotations

import time

from flask import Blueprint, Response, jsonify

from qwenvl_app.settings import Settings
from qwenvl_app.web.errors import UnknownModel


def blueprint(settings: Settings) -> Blueprint:
    """The list of models, which is one."""
    routes = Blueprint("models", __name__)
    model = {
        "id": settings.served_model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "qwenvl",
    }

    @routes.get("/v1/models", provide_automatic_options=False)
    def listed() -> Response:
        """The one model."""
        return jsonify(object="list", data=[model])

    @routes.get("/v1/models/<path:model_id>", provide_automatic_options=False)
    def one(model_id: str) -> Response:
        """The same, by its id, whose slashes may come as they are or as ``%2F``."""
        if model_id != settings.served_model:
            raise UnknownModel
        return jsonify(model)

    return routes
