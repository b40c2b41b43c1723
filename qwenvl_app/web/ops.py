"""``/livez``, ``/readyz`` and ``/health``: for whoever watches the service."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify

from qwenvl_app.backends import Backend
from qwenvl_app.generation import Phase


def blueprint(backend: Backend) -> Blueprint:
    """The routes, bound to the backend whose state they tell."""
    routes = Blueprint("ops", __name__)

    @routes.get("/livez", provide_automatic_options=False)
    def livez() -> Response:
        """200 while the process lives."""
        return jsonify(status="alive")

    @routes.get("/readyz", provide_automatic_options=False)
    @routes.get("/health", provide_automatic_options=False)
    def readyz() -> Response:
        """200 only when a request would be answered; else 503, with the phase and its age."""
        status = backend.status()
        response = jsonify(
            phase=status.phase, phase_seconds=round(status.age, 1), message=status.message
        )
        response.status_code = 200 if status.phase is Phase.READY else 503
        return response

    return routes
