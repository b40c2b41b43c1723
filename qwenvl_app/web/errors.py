"""Every error to JSON, in one place."""

from __future__ import annotations

import logging

import gunicorn.http.errors as framing
from flask import Flask, Response, current_app, g, jsonify
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from qwenvl_app.errors import (
    INTERNAL_PREFIX,
    InternalError,
    ServiceError,
    TooLarge,
    Unauthorized,
    Unavailable,
    is_out_of_memory,
)
from qwenvl_app.server import refusals
from qwenvl_app.web import accounts

log = logging.getLogger(__name__)


def register(app: Flask) -> None:
    """Install the handlers."""
    app.register_error_handler(ServiceError, _service_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(framing.ParseException, _broken_body)
    app.register_error_handler(framing.NoMoreData, _broken_body)
    app.register_error_handler(Exception, _unexpected)


def _service_error(error: ServiceError) -> Response:
    detail, accounts.current().reason = error.detail, error.reason
    if isinstance(error, InternalError):
        detail = f"{INTERNAL_PREFIX}{detail}（请求编号 {g.request_id}）"
    response = jsonify(detail=detail)
    response.status_code = error.status
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _http_error(error: HTTPException) -> Response:
    """Routing and framing errors: the status's own name, as Starlette has it."""
    if isinstance(error, RequestEntityTooLarge):
        limit = current_app.config["MAX_CONTENT_LENGTH"] // 2**20
        return _service_error(TooLarge(f"上传的内容超过 {limit} MB 的限制。"))
    accounts.current().reason = error.name.lower().replace(" ", "_")
    response = jsonify(detail=error.name)
    response.status_code = error.code or 500
    for name, value in error.get_headers():
        if name.lower() != "content-type":
            response.headers[name] = value
    return response


def _broken_body(error: Exception) -> Response:
    """A chunked body whose frame is wrong: gunicorn says so only while it is read."""
    return _service_error(refusals.of(error))


def _unexpected(error: Exception) -> Response:
    log.error("unexpected error (request %s)", g.request_id, exc_info=error)
    if is_out_of_memory(error):
        return _service_error(Unavailable.exhausted())
    return _service_error(InternalError("处理请求时发生意外错误，请稍后重试。"))
