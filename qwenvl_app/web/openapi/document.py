"""The API as an OpenAPI 3.1 document: schemas from the models, the rest from the tables here."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from pydantic import BaseModel

from qwenvl_app.version import VERSION
from qwenvl_app.web.chat.schema import ChatRequest
from qwenvl_app.web.openapi import answers, chat_answers, examples
from qwenvl_app.web.openapi.components import (
    EVERYWHERE,
    GENERATING,
    WITH_KEY,
    Json,
    components,
    events_of,
    json_of,
    response,
    schema_of,
)
from qwenvl_app.web.schema import RecognizeForm

_KEY: list[Json] = [{"key": []}, {}]  # or none: where no keys are set
_ABOUT = """Ask questions about pictures. 就图片提问。

Every answer has `X-Request-ID`: the client's own, if it sent a sane one. A 503 has `Retry-After`, in seconds.
Errors have a `detail`, in Chinese; those of `/v1/chat/completions` and `/v1/models...` are OpenAI's, in English.

每个响应都带 `X-Request-ID`。503 带有以秒为单位的 `Retry-After`，请等待后重试。
错误含中文的 `detail`；`/v1/chat/completions` 与 `/v1/models...` 的错误采用 OpenAI 的格式，文字为英文。"""  # noqa: E501


@cache
def document() -> bytes:
    """The document as JSON, the same for every installation: it tells nothing of this one."""
    content = {
        "openapi": "3.1.1",
        "info": {
            "title": "qwenvl",
            "version": VERSION,
            "description": _ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        # Relative to the document itself (OpenAPI 3.1.1, 4.8.5), and so right behind any prefix.
        "servers": [{"url": "."}],
        "paths": _recognize() | _chat() | _ops() | _about(),
        "components": components(),
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _refs(statuses: tuple[int, ...], prefix: str = "error") -> Json:
    return {
        str(status): {"$ref": f"#/components/responses/{prefix}{status}"} for status in statuses
    }


def _operation(name: str, tag: str, summary: str, responses: Json, **more: Any) -> Json:
    return {
        "operationId": name,
        "tags": [tag],
        "summary": summary,
        "parameters": [{"$ref": "#/components/parameters/requestId"}],
        **more,
        "responses": responses,
    }


def _recognize() -> Json:
    body = {
        "multipart/form-data": {
            "schema": schema_of(RecognizeForm),
            "encoding": {"image": {"contentType": "image/*"}},
        }
    }
    counts = [f"X-{name}-Tokens" for name in ("Prompt", "Cached", "Completion", "Reasoning")]
    events = events_of(
        "Sent to who asks with `Accept: text/event-stream`: pieces, and at last the whole answer. "
        "An event `error` ends it too.",
        examples.EVENTS,
        *(answers.RecognizeDelta, answers.RecognizeEnd, answers.Error),
    )
    answer = json_of(schema_of(answers.RecognizeAnswer), examples=examples.ANSWER) | events
    invalid = json_of(schema_of(answers.FormError), example=examples.FORM_ERROR)
    responses = {
        "200": response("The answer. 回答。", answer, "X-Finish-Reason", *counts),
        "422": response("A field is missing or wrong. 字段缺失或有误。", invalid),
    } | _refs(GENERATING)
    post = _operation(
        "recognize",
        "questions",
        "Ask about a picture. 就一张图片提问。",
        responses,
        security=_KEY,
        requestBody={"required": True, "content": body},
    )
    return {"/v1/image/recognize": {"post": post}}


def _chat() -> Json:
    events = events_of(
        "Sent with `stream`; `[DONE]` is the last.",
        examples.CHAT_EVENTS,
        *(chat_answers.ChatCompletionChunk, chat_answers.ChatError),
    )
    answer = json_of(schema_of(chat_answers.ChatCompletion), examples=examples.CHAT_ANSWER) | events
    post = _operation(
        "chat",
        "chat",
        "A conversation with pictures, as OpenAI's clients send it. 兼容 OpenAI 的图文对话。",
        {"200": response("The answer. 回答。", answer)} | _refs(GENERATING, "chatError"),
        security=_KEY,
        requestBody={
            "required": True,
            "content": json_of(schema_of(ChatRequest), examples=examples.CHAT_QUESTION),
        },
    )
    return {"/v1/chat/completions": {"post": post}} | _models()


def _models() -> Json:
    def got(name: str, summary: str, schema: type[BaseModel]) -> Json:
        answer = {"200": response("The one model. 唯一的模型。", json_of(schema_of(schema)))}
        refused = _refs(WITH_KEY, "chatError")
        return {"get": _operation(name, "chat", summary, answer | refused, security=_KEY)}

    named = {
        "name": "model_id",
        "in": "path",
        "required": True,
        "description": "With `/` as `%2F`, or as it is. 其中的 `/` 可以写作 `%2F`。",
        "schema": {"type": "string", "minLength": 1},
        "example": "demo",
    }
    listed = got("models", "The model that is served. 所服务的模型。", chat_answers.ModelList)
    one = got("model", "The same by its id. 按编号查询。", chat_answers.Model)
    one["get"]["parameters"].append(named)
    return {"/v1/models": listed, "/v1/models/{model_id}": one}


def _ops() -> Json:
    alive = {"200": response("It lives.", json_of(schema_of(answers.Alive)))} | _refs(EVERYWHERE)
    phase = json_of(schema_of(answers.Readiness))
    overloaded = json_of(schema_of(answers.Readiness, answers.Error))
    ready = _refs(EVERYWHERE) | {
        "200": response("A request would be answered. 可以应答。", phase),
        "503": response(
            "It would not, or too many are connected. 不可以。", overloaded, "Retry-After"
        ),
    }
    numbers = {"text/plain": {"schema": {"type": "string"}}}
    metrics = {"200": response("Prometheus' text format.", numbers)} | _refs(EVERYWHERE)
    gets = {
        "livez": ("Whether the process lives. 进程是否存活。", alive),
        "readyz": ("Whether it answers, and what it does if not. 是否就绪及其阶段。", ready),
        "health": ("As `/readyz`.", ready),
        "metrics": ("Figures for Prometheus. 供 Prometheus 采集的指标。", metrics),
    }
    return {
        f"/{name}": {"get": _operation(name, "operation", summary, responses)}
        for name, (summary, responses) in gets.items()
    }


def _about() -> Json:
    same = {"304": response("As it was when `If-None-Match` was told. 没有变化。", {})}
    same |= _refs(EVERYWHERE)
    page = {"text/html": {"schema": {"type": "string"}}}
    gets = {
        "/openapi.json": ("openapi", "This document. 本文档。", json_of({"type": "object"})),
        "/docs": ("docs", "The same for people. 供阅读的页面。", page),
    }
    return {
        path: {
            "get": _operation(name, "documentation", told, {"200": response(told, content)} | same)
        }
        for path, (name, told, content) in gets.items()
    }
