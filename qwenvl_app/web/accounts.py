"""Every request's account: opened when it comes, counted and logged once when it is answered."""

from __future__ import annotations

from typing import cast

from flask import Flask, Response, g, request

from qwenvl_app.service.metrics import Metrics
from qwenvl_app.service.record import RequestRecord
from qwenvl_app.web import request_log

# Blueprints whose views ask the backend; the others' requests have no outcome but a status.
GENERATING = frozenset({"recognize"})
UNMATCHED = "unmatched"


def register(app: Flask, metrics: Metrics) -> None:
    """Install the hooks: before all others, since any of those may answer a request."""

    @app.before_request
    def begin() -> None:
        arrived = request.environ.get("qwenvl.arrived")  # the worker's, from the first byte on
        g.record = RequestRecord() if arrived is None else RequestRecord(arrived)

    @app.after_request
    def end(response: Response) -> Response:
        record, rule = current(), request.url_rule
        route = rule.rule if rule else UNMATCHED
        generates = request.blueprint in GENERATING
        request_id: str = g.request_id
        about = request_log.describe(request, response, route)

        def finish() -> None:
            metrics.count(record, route, response.status_code, generates=generates)
            request_log.write(request_id, about, record)

        # Before an answer in one piece is sent, so that who has it finds it counted; of one that
        # is streamed nothing is known before its end.
        if response.is_streamed:
            response.call_on_close(finish)
        else:
            finish()
        return response


def current() -> RequestRecord:
    """The account of the request that is being answered."""
    return cast(RequestRecord, g.record)
