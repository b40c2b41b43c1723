"""Every request's record: opened when it comes, counted and logged once when it is answered.

One line for every request. No prompt, no answer, no file name, no query string.
"""

from __future__ import annotations

import logging
from typing import cast

from flask import Flask, Request, Response, g, request

from qwenvl_app.errors import ClientGone
from qwenvl_app.service.metrics import Metrics
from qwenvl_app.service.record import RequestRecord
from qwenvl_app.service.tracing import HEADERS, Traces

log = logging.getLogger("qwenvl_app.access")

Fields = dict[str, str | int | float | None]
_LONGEST_PATH = 200
# Blueprints whose views ask the backend; the others' requests have no outcome but a status.
GENERATING = frozenset({"recognize", "chat"})
UNMATCHED = "unmatched"


def register(app: Flask, metrics: Metrics, traces: Traces) -> None:
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
        about = _describe(request, response, route)
        method, status = request.method, response.status_code
        sent = {name: request.headers[name] for name in HEADERS if name in request.headers}

        def finish() -> None:
            if generates and response.is_streamed and record.finish_reason is None:
                # It is closed before its end: it could not be sent.
                record.reason = record.reason or ClientGone.reason
            metrics.count(record, route, status, generates=generates)
            if generates:
                about["trace_id"] = traces.export(record, method, route, status, sent)
            _write(request_id, about, record)

        # Before an answer in one piece is sent, so that who has it finds it counted; of one that
        # is streamed nothing is known before its end.
        if response.is_streamed:
            response.call_on_close(finish)
        else:
            finish()
        return response


def current() -> RequestRecord:
    """The record of the request that is being answered."""
    return cast(RequestRecord, g.record)


def _describe(request: Request, response: Response, route: str) -> Fields:
    """What is known of a request and its answer without its record; sizes in bytes."""
    return {
        "method": request.method,
        "route": route,
        # Of a route that we have, the path says no more; of another one it is what was looked for.
        "path": None if request.url_rule else request.path[:_LONGEST_PATH],
        "status": response.status_code,
        "client": request.remote_addr,
        "bytes_in": request.content_length,
        # To ask a stream for its length is to read all of it.
        "bytes_out": None if response.is_streamed else response.calculate_content_length(),
    }


def _write(request_id: str, about: Fields, record: RequestRecord) -> None:
    """Log the line; what is not known is left out. Control characters: see ``logs``."""
    fields: Fields = about | {"total_s": record.age}
    fields |= {f"{name}_s": seconds for name, seconds in record.stages.items()}
    if timings := record.timings:
        fields |= {
            "preprocess_s": timings.preprocess,
            "slot_s": timings.queue,
            "prefill_s": timings.prefill,
            "decode_s": timings.decode,
        }
    fields["pixels"] = record.pixels
    if usage := record.usage:
        fields |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "tokens": usage.completion_tokens,
            "reasoning_tokens": usage.reasoning_tokens or None,
        }
    fields |= {"finish_reason": record.finish_reason, "reason": record.reason, "key": record.key}
    known = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in fields.items()
        if value is not None
    }
    log.info("request", extra={"request_id": request_id, "fields": known})
