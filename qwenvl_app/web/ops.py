"""``/livez``, ``/readyz``, ``/health`` and ``/metrics``: for whoever watches the service."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify

from qwenvl_app.backends import Backend
from qwenvl_app.generation import Phase
from qwenvl_app.metrics import CONTENT_TYPE, Metrics


def blueprint(backend: Backend, metrics: Metrics) -> Blueprint:
    """The routes, bound to what they tell of."""
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

    @routes.get("/metrics", provide_automatic_options=False)
    def scrape() -> Response:
        """Prometheus' text format."""
        return Response(metrics.render(), content_type=CONTENT_TYPE)

    return routes
