"""What comes back over HTTP, read: answers, streams, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import requests
from urllib3.exceptions import HTTPError, NewConnectionError

from qwenvl_app.cli.sentences import explained

_COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
_LONGEST_DETAIL = 500
_UNREADABLE = (requests.RequestException, HTTPError, OSError)


class Failed(Exception):
    """Ends a command with one line and an exit status: 1 it failed, 2 it was asked wrongly."""

    def __init__(self, message: str, *, code: int = 1):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Answer:
    """A whole answer. ``finish_reason`` and ``usage`` are None where the server tells none."""

    result: str
    finish_reason: str | None = None
    usage: dict[str, int] | None = None


class Refused(Exception):
    """The server answered with an error. ``status`` is None where a stream had begun."""

    def __init__(self, status: int | None, detail: str, retry_after: int | None = None):
        told = explained(status, detail)
        super().__init__(f"{status}: {told}" if status else told)
        self.status, self.detail, self.retry_after = status, detail, retry_after


class Broken(Exception):
    """No answer: not connected (``sent`` is false), cut off, or too slow."""

    def __init__(self, text: str, *, sent: bool = True):
        super().__init__(text)
        self.sent = sent

    @classmethod
    def of(cls, error: Exception) -> Broken:
        """What a library raised, in a few words without addresses of objects."""
        if isinstance(error, requests.exceptions.ReadTimeout):
            return cls("no answer in time")
        if isinstance(error, requests.exceptions.ConnectTimeout):
            return cls("no connection in time", sent=False)
        reason = getattr(error.args[0] if error.args else None, "reason", None)
        return cls(why(error), sent=not isinstance(reason, NewConnectionError))


def why(error: BaseException) -> str:
    """The system's own words at the root of ``error``, if there are any."""
    found, each = "the connection was broken off", error.__cause__ or error.__context__
    while each is not None:
        if isinstance(each, OSError) and each.strerror:
            found = each.strerror.lower()
        each = each.__cause__ or each.__context__
    return found


def body(response: requests.Response) -> bytes:
    """All of it. Raises Broken."""
    try:
        return response.content
    except _UNREADABLE as error:
        raise Broken.of(error) from None


def read(response: requests.Response) -> dict[str, Any]:
    """The JSON object of an answer that is none of an error. Raises Refused and Broken."""
    content = json_object(body(response))
    if response.status_code == 200 and content:
        return content
    told = f"the server answered {response.reason or 'with what is no JSON object'}"
    after = response.headers.get("Retry-After", "")
    seconds = int(after) if after.isdecimal() else None
    raise Refused(response.status_code, _detail(content) or told, seconds)


def recognized(response: requests.Response) -> Answer:
    """The documented route's answer in one piece. Raises Refused and Broken."""
    content = read(response)
    if not isinstance(result := content.get("result"), str):
        raise Refused(response.status_code, "the answer has no result")
    headers = response.headers
    counts = {name: headers.get(f"X-{name.replace('_', '-')}", "") for name in _COUNTS}
    usage = {name: int(text) for name, text in counts.items() if text.isdecimal()}
    return Answer(result, headers.get("X-Finish-Reason"), usage or None)


def pieces(response: requests.Response) -> Iterator[str | Answer]:
    """The documented route's stream: pieces, then the answer. Raises Refused and Broken."""
    for name, data in _events(response):
        content = json_object(data)
        if name == "error":
            raise Refused(None, _detail(content) or "the answer failed")
        if "status" in content:
            text, reason = str(content.get("result")), content.get("finish_reason")
            yield Answer(text, reason, content.get("usage"))
            return
        yield str(content.get("delta", ""))
    raise Broken("the answer was broken off")


def chunks(response: requests.Response) -> Iterator[str | Answer]:
    """As ``pieces``, of OpenAI's route; reasoning is an empty piece."""
    texts: list[str] = []
    reason: str | None = None
    usage: dict[str, int] | None = None
    for _, data in _events(response):
        if data == b"[DONE]":
            yield Answer("".join(texts), reason, usage)
            return
        content = json_object(data)
        if "error" in content:
            raise Refused(None, _detail(content) or "the answer failed")
        usage = _usage(content["usage"]) if content.get("usage") else usage
        for choice in content.get("choices") or ():
            reason = choice.get("finish_reason") or reason
            delta = choice.get("delta") or {}
            texts.append(delta.get("content") or "")
            if texts[-1] or delta.get("reasoning_content") or delta.get("reasoning"):
                yield texts[-1]
    raise Broken("the answer was broken off")


def _events(response: requests.Response) -> Iterator[tuple[str, bytes]]:
    """Names and data of server-sent events (WHATWG HTML, 9.2). Raises Refused and Broken."""
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        read(response)
        raise Refused(response.status_code, "the server does not stream")
    # Where no chunks tell where a piece ends, a larger size would wait until so much has come.
    size = None if response.raw.chunked else 1
    rest, name, data = b"", "", list[bytes]()
    try:
        for piece in response.iter_content(size):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                field, _, value = line.rstrip(b"\r").partition(b":")
                value = value.removeprefix(b" ")
                if field == b"event":
                    name = value.decode(errors="replace")
                elif field == b"data":
                    data.append(value)
                elif not field and not value and data:
                    yield name, b"\n".join(data)
                    name, data = "", []
    except _UNREADABLE as error:
        raise Broken.of(error) from None


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object, or an empty one for what is none."""
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _detail(content: dict[str, Any]) -> str:
    """The sentence of an error, in any of the three shapes that servers use; on one line."""
    error, detail = content.get("error"), content.get("detail")
    if isinstance(error, dict):
        detail = error.get("message")
    if isinstance(detail, list):  # FastAPI's
        rows = [each for each in detail if isinstance(each, dict)]
        detail = "; ".join(f"{(row.get('loc') or [''])[-1]}: {row.get('msg')}" for row in rows)
    return " ".join(str(detail or "").split())[:_LONGEST_DETAIL]


def _usage(told: dict[str, Any]) -> dict[str, int]:
    """OpenAI's counts under the documented route's names."""
    cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens")
    reasoning = (told.get("completion_tokens_details") or {}).get("reasoning_tokens")
    counts = (told.get("prompt_tokens"), told.get("completion_tokens"), cached, reasoning)
    return {name: int(count or 0) for name, count in zip(_COUNTS, counts, strict=True)}
