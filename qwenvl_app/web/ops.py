"""``/livez``, ``/readyz``, ``/health`` and ``/metrics``: for whoever watches the service."""

from __future__ import annotations

from collections.abc import Callable

from flask import Blueprint, Response, jsonify

from qwenvl_app.generation import Phase, Status
from qwenvl_app.service.metrics import CONTENT_TYPE, Metrics
from qwenvl_app.version import VERSION


def blueprint(status: Callable[[], Status], metrics: Metrics) -> Blueprint:
    """The routes, bound to what they tell of."""
    routes = Blueprint("ops", __name__)

    @routes.get("/livez", provide_automatic_options=False)
    def livez() -> Response:
        """200 while the process lives."""
        return jsonify(status="alive")

    @routes.get("/readyz", provide_automatic_options=False)
    @routes.get("/health", provide_automatic_options=False)
    def readyz() -> Response:
        """200 only when a request would be answered; else 503; the phase, its age, the version."""
        now = status()
        response = jsonify(
            phase=now.phase,
            phase_seconds=round(now.age, 1),
            message=now.message,
            version=VERSION,
        )
        response.status_code = 200 if now.phase is Phase.READY else 503
        return response

    @routes.get("/metrics", provide_automatic_options=False)
    def scrape() -> Response:
        """Prometheus' text format."""
        return Response(metrics.render(), content_type=CONTENT_TYPE)

    return routes
