"""Every error to JSON, in one place: the routes' and those that the server itself answers."""

from __future__ import annotations

import json
import logging
import re

from flask import Flask, Response, current_app, g, request
from gunicorn.http import errors as http
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from qwenvl_app.errors import (
    INTERNAL_PREFIX,
    BadRequest,
    InternalError,
    ServiceError,
    TooLarge,
    Unauthorized,
    Unavailable,
    is_out_of_memory,
)
from qwenvl_app.web import request_log

log = logging.getLogger(__name__)


# What gunicorn's parser raises; of the others that it calls a ParseException, ``malformed`` tells.
_KINDS = {
    http.LimitRequestLine: (414, "请求的网址过长。", "The URL is too long."),
    http.LimitRequestHeaders: (
        431,
        "请求的首部过多或过长。",
        "The headers are too many or too long.",
    ),
    http.ExpectationFailed: (
        417,
        "不支持请求首部 Expect 的内容。",
        "This value of the header Expect is not supported.",
    ),
    http.UnsupportedTransferCoding: (
        501,
        "不支持请求的传输编码。",
        "This Transfer-Encoding is not supported.",
    ),
}


class HttpError(ServiceError):
    """A status that only HTTP itself has; ``english`` as of ``BadRequest``."""

    status = 400
    reason = "bad_request"

    def __init__(self, status: int, detail: str, english: str | None = None):
        super().__init__(detail)
        self.status, self.english = status, english


class InvalidParameter(ServiceError):
    """A body in OpenAI's form is wrong. ``detail`` is English; ``param`` names the field."""

    status = 400
    reason = "bad_request"

    def __init__(self, detail: str, param: str | None = None):
        super().__init__(detail)
        self.param = param


class UnknownModel(ServiceError):
    """No model of this id is served. As OpenAI's own, whose code clients look at."""

    status = 404
    reason = "model_not_found"

    def __init__(self) -> None:
        super().__init__("No model of this id is served here; GET /v1/models has those that are.")


# The routes whose errors are OpenAI's, and what those say in English, by reason.
_OPENAI_ROUTES = re.compile("/v1/(chat/completions|models(/.*)?)", re.DOTALL)
_ENGLISH = {
    "bad_request": "The request cannot be understood.",
    "unauthorized": "A valid API key is missing.",
    "key_limit": "This API key has as many requests under way as one may have; try again later.",
    "too_large": "The body, a picture, or the conversation is larger than the limit.",
    "busy": "The service is busy; try again later.",
    "queue_full": "The service is busy; try again later.",
    "queue_timeout": "The service is busy; try again later.",
    "loading": "The model is loading; try again later.",
    "draining": "The service is stopping; try again later.",
    "memory": "There is not enough memory; try again later or send a smaller picture.",
    "client_gone": "The client closed its connection.",
    "deadline": "The answer was not ready in time; try again later.",
    "model_failed": "The model failed to load or has stopped working.",
    "upstream_busy": "The service is busy; try again later.",
    "upstream_down": "The model server cannot be reached; try again later.",
    "upstream_denied": "The model server does not let this service in.",
    "upstream_failed": "The model server failed; try again later.",
}


def openai_error(error: ServiceError, request_id: str) -> dict[str, object]:
    """The answer to ``error`` in OpenAI's shape (openai-openapi, ``ErrorResponse``)."""
    message = error.english if isinstance(error, BadRequest | HttpError) else None
    if message is None and isinstance(error.detail, str) and error.detail.isascii():
        message = error.detail
    message = message or _ENGLISH.get(error.reason, "Something failed in here.")
    if error.status >= 500:
        kind = "server_error"
        message += f" (request {request_id})"
    else:
        kind = "authentication_error" if error.status == 401 else "invalid_request_error"
    param = error.param if isinstance(error, InvalidParameter) else None
    return {"error": {"message": message, "type": kind, "param": param, "code": error.reason}}


def as_service_error(error: Exception, request_id: str) -> ServiceError:
    """What a client is told about any error; one that nobody expected is logged."""
    if isinstance(error, ServiceError):
        return error
    log.error("unexpected error (request %s)", request_id, exc_info=error)
    return Unavailable.exhausted() if is_out_of_memory(error) else _ours()


def render(
    error: ServiceError, request_id: str, path: str = ""
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to ``error``. Any thread, in or out of a request.

    ``path`` is what was asked for, which decides the shape; "" if that is not known.
    """
    headers = {"Content-Type": "application/json"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return error.status, headers, dumps(_content(error, request_id, path)).encode()


def _content(error: ServiceError, request_id: str, path: str) -> dict[str, object]:
    if _OPENAI_ROUTES.fullmatch(path):
        return openai_error(error, request_id)
    if isinstance(error, InternalError):
        return {"detail": f"{INTERNAL_PREFIX}{error.detail}（请求编号 {request_id}）"}
    return {"detail": error.detail}


def dumps(content: dict[str, object]) -> str:
    """JSON as the contract has it."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def too_large(max_body: int) -> ServiceError:
    """A body over the limit of ``max_body`` bytes."""
    return TooLarge(f"上传的内容超过 {max_body // 2**20} MB 的限制。")


def malformed() -> ServiceError:
    """What is no HTTP, or not all of it."""
    return BadRequest(
        "请求不符合 HTTP 协议，无法解析。", "The request is no valid HTTP, or not all of it came."
    )


def of_http(error: BaseException) -> ServiceError:
    """What the client is told about an error that gunicorn reports; logged if it is our fault."""
    if isinstance(error, http.InvalidHTTPVersion) and isinstance(error.version, tuple):
        # And no other text in its place.
        return HttpError(505, "不支持请求的 HTTP 版本。", "This version of HTTP is not supported.")
    if type(error) in _KINDS:
        return HttpError(*_KINDS[type(error)])
    ours = (http.InvalidResponseHeader, http.InvalidResponseHeaderName)
    if isinstance(error, http.ParseException | http.NoMoreData) and not isinstance(error, ours):
        return malformed()
    log.error("unexpected error", exc_info=error)
    return _ours()


def _ours() -> ServiceError:
    """Our own fault."""
    return InternalError("处理请求时发生意外错误，请稍后重试。")


def register(app: Flask) -> None:
    """Install the handlers."""
    app.register_error_handler(ServiceError, _service_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(http.ParseException, _broken_body)
    app.register_error_handler(http.NoMoreData, _broken_body)
    app.register_error_handler(Exception, _unexpected)


def _service_error(error: ServiceError) -> Response:
    request_log.current().reason = error.reason
    status, headers, body = render(error, g.request_id, request.path)
    return Response(body, status, headers)


def _http_error(error: HTTPException) -> Response:
    """Routing and framing errors: the status's own name, as Starlette has it."""
    if isinstance(error, RequestEntityTooLarge):
        return _service_error(too_large(current_app.config["MAX_CONTENT_LENGTH"]))
    request_log.current().reason = error.name.lower().replace(" ", "_")
    body = dumps(_content(HttpError(error.code or 500, error.name), g.request_id, request.path))
    response = Response(body, error.code or 500, mimetype="application/json")
    for name, value in error.get_headers():
        if name.lower() != "content-type":
            response.headers[name] = value
    return response


def _broken_body(error: Exception) -> Response:
    """A chunked body whose frame is wrong: gunicorn says so only while it is read."""
    return _service_error(of_http(error))


def _unexpected(error: Exception) -> Response:
    return _service_error(as_service_error(error, g.request_id))
