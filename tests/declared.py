"""Answers held to ``/openapi.json``: status, kind, headers, and JSON to its schema."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from flask import Flask, Response, request
from jsonschema import Draft202012Validator

from qwenvl_app.errors import ClientGone
from qwenvl_app.web.openapi import document as openapi

DOCUMENT: dict[str, Any] = json.loads(openapi.document())


def resolve(item: dict[str, Any]) -> dict[str, Any]:
    """What ``item`` refers to, or itself."""
    if "$ref" not in item:
        return item
    found = DOCUMENT
    for step in item["$ref"].removeprefix("#/").split("/"):
        found = found[step]
    return found


def path_of(rule: str) -> str:
    """A rule of Flask's as the document spells it."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)


def operation(path: str, method: str) -> dict[str, Any] | None:
    """What is declared; a GET stands for its HEAD too."""
    name = "get" if method == "HEAD" else method.lower()
    return DOCUMENT["paths"].get(path_of(path), {}).get(name)


@cache
def _validator(schema: str) -> Draft202012Validator:
    whole = json.loads(schema) | {"components": DOCUMENT["components"]}
    return Draft202012Validator(whole)


def problems(value: Any, schema: dict[str, Any]) -> list[str]:
    """Why ``value`` does not fit ``schema``, whose references are into the document."""
    return [error.message for error in _validator(json.dumps(schema)).iter_errors(value)]


def wrong(path: str, method: str, response: Response) -> str | None:
    """What of ``response`` is not declared; a stream is not read."""
    declared = operation(path, method)
    # tests/test_openapi.py holds that all of ours are; 499 is for the log, nobody reads it.
    if declared is None or response.status_code == ClientGone.status:
        return None
    status = str(response.status_code)
    if status not in declared["responses"]:
        return f"{status} is not declared"
    told = resolve(declared["responses"][status])
    needed = {name for name, header in told["headers"].items() if resolve(header)["required"]}
    found = [f"{status} has no {name}" for name in needed if name not in response.headers]
    if told["content"] and response.mimetype not in told["content"]:
        found.append(f"{status} is {response.mimetype}")
    elif "application/json" in told["content"] and response.is_json and method != "HEAD":
        found += problems(response.json, told["content"]["application/json"]["schema"])
    return "; ".join(found) or None


def watch(app: Flask) -> list[str]:
    """Collects what ``app`` answers from now on that is not declared."""
    found: list[str] = []

    def look(response: Response) -> Response:
        if request.url_rule and (problem := wrong(request.url_rule.rule, request.method, response)):
            found.append(f"{request.method} {request.path}: {problem}")
        return response

    # Those registered first see an answer last, with all its headers.
    app.after_request_funcs.setdefault(None, []).insert(0, look)
    return found
