"""What the operations of the OpenAPI document share: schemas, headers, errors."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from qwenvl_app.web.chat.schema import ChatRequest
from qwenvl_app.web.forms import Upload
from qwenvl_app.web.openapi import answers, chat_answers, examples
from qwenvl_app.web.schema import RecognizeForm

Json = dict[str, Any]

_MODELS: tuple[type[BaseModel], ...] = (
    *(RecognizeForm, answers.RecognizeAnswer, answers.Error, answers.FormError),
    *(answers.RecognizeDelta, answers.RecognizeEnd),
    *(
        ChatRequest,
        chat_answers.ChatCompletion,
        chat_answers.ChatCompletionChunk,
        chat_answers.ChatError,
    ),
    *(chat_answers.ModelList, answers.Alive, answers.Readiness),
)
# What any request may get, of the worker before a route is asked, or of Flask.
EVERYWHERE = (400, 404, 405, 408, 413, 414, 417, 431, 500, 501, 503, 505)
WITH_KEY = (*EVERYWHERE, 401)
GENERATING = (*WITH_KEY, 429, 504)
_OF_STATUS = {401: "WWW-Authenticate", 405: "Allow", 429: "Retry-After", 503: "Retry-After"}


def components() -> Json:
    """The ``components`` of the document."""
    return {
        "schemas": _schemas(),
        "headers": _headers(),
        "responses": {f"error{status}": _error(status) for status in examples.DETAILS}
        | {f"chatError{status}": _chat_error(status) for status in GENERATING},
        "parameters": {
            "requestId": {
                "name": "X-Request-ID",
                "in": "header",
                "description": "Letters, digits, `.`, `_`, `-`. 由字母、数字和这些符号组成的编号。",
                "schema": {"type": "string"},
            }
        },
        "securitySchemes": {
            "key": {
                "type": "http",
                "scheme": "bearer",
                "description": "Only if the operator set `api_keys`. 仅在运维者设置后需要。",
            }
        },
    }


def _schemas() -> Json:
    _, made = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    schemas: Json = made["$defs"]
    del schemas[Upload.__name__]  # pydantic's view of what a file becomes
    for schema in schemas.values():  # what is required is what one looks for first
        required = schema.get("required", ())
        fields = schema.get("properties", {}).items()
        schema["properties"] = dict(sorted(fields, key=lambda field: field[0] not in required))
    # A form has no null: a field is sent or not, and an empty one counts as not sent. Swagger UI
    # would send the word, or the bound of a number.
    for field in schemas[RecognizeForm.__name__]["properties"].values():
        if kinds := field.pop("anyOf", None):
            del field["default"]
            field.update(next(kind for kind in kinds if kind != {"type": "null"}), examples=[""])
    return schemas


def _headers() -> Json:
    whole = {"type": "integer", "minimum": 0}
    told = {
        "X-Request-ID": ("The request's id, which the log has too. 请求编号。", {"type": "string"}),
        "Retry-After": ("Seconds until it is worth trying again. 重试前等待的秒数。", whole),
        "WWW-Authenticate": ("Always `Bearer`.", {"const": "Bearer"}),
        "Allow": ("The methods that the route has.", {"type": "string"}),
        "X-Finish-Reason": (
            "Why the answer ended; anything but `stop` means that it was cut. 回答结束的原因。",
            {"enum": ["stop", "length", "repetition"]},
        ),
        "X-Prompt-Tokens": ("Tokens of picture and prompt.", whole),
        "X-Cached-Tokens": ("Those of them that were computed for an earlier request.", whole),
        "X-Completion-Tokens": ("Tokens of the answer, its reasoning included.", whole),
        "X-Reasoning-Tokens": ("Those of them that are reasoning.", whole),
    }
    return {
        name: {
            "description": text,
            "schema": schema,
            "required": name in ("X-Request-ID", "WWW-Authenticate", "Allow"),
        }
        for name, (text, schema) in told.items()
    }


def schema_of(*models: type[BaseModel]) -> Json:
    """A reference to the schema of one of ``models``."""
    refs = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    return refs[0] if len(refs) == 1 else {"anyOf": refs}


def response(description: str, content: Json, *headers: str) -> Json:
    """A response; all have ``X-Request-ID``."""
    names = ("X-Request-ID", *headers)
    refs = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return {"description": description, "headers": refs, "content": content}


def json_of(schema: Json, **more: Any) -> Json:
    """The content of a body in JSON."""
    return {"application/json": {"schema": schema, **more}}


def events_of(told: str, shown: examples.Examples, *models: type[BaseModel]) -> Json:
    """The content of a stream (WHATWG HTML, 9.2): the schema is that of one event.

    OpenAPI has words for that from 3.2 on. ``data`` is JSON of one of ``models``, or ``[DONE]``.
    """
    told_json = {"contentMediaType": "application/json", "contentSchema": schema_of(*models)}
    schema = {
        "type": "object",
        "description": told,
        "properties": {
            "data": {"type": "string", "anyOf": [{"const": "[DONE]"}, told_json]},
            "event": {"enum": ["message", "error"]},
        },
        "required": ["data"],
    }
    return {"text/event-stream": {"schema": schema, "examples": shown}}


def _error(status: int) -> Json:
    """A refusal as most routes have it, and as the worker has it on all."""
    content = json_of(schema_of(answers.Error), example={"detail": examples.DETAILS[status]})
    headers = [_OF_STATUS[status]] if status in _OF_STATUS else []
    return response(HTTPStatus(status).phrase, content, *headers)


def _chat_error(status: int) -> Json:
    """OpenAI's form, in which the worker refuses too what it knows to be for these routes."""
    content = json_of(schema_of(chat_answers.ChatError), example=examples.CHAT_ERROR)
    return _error(status) | {"content": content}
