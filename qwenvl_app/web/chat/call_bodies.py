"""What stands between ``<tool_call>`` and its end, read as it comes: JSON, or Qwen3.5's tags.

The forms are those that the chat templates ask for. vLLM reads them in hermes_tool_parser.py and
qwen3coder_tool_parser.py (vllm/tool_parsers).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from qwenvl_app.web.chat.parameter_types import written_value

Functions = Mapping[str, Mapping[str, Any]]  # the schema of each one's arguments, by its name

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("[^"\x00-\x1f]*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_LONGEST_HEAD = 1000  # characters; behind it a call is told when all of it is there
_BETWEEN = frozenset(" \t\r\n,:+-.0123456789eEtrufalsn")  # in JSON, outside of texts and brackets
_FUNCTION = re.compile(r"\s*<function=([^<>\n]{1,100})>")
_BLANK = re.compile(r"\s*")
_PARAMETER = re.compile(r"<parameter=([^<>\n]{1,1000})>(.*?)</parameter>", re.DOTALL)
_PARAMETER_END = "</parameter>"
_FUNCTION_END = "</function>"


class NotACall(Exception):
    """The text is something else."""


class _Body:
    """How far the body of one call has been read.

    ``read`` takes all of the body that there is, more of it each time. ``name`` is None until it
    is known; ``arguments`` is what the latest ``read`` added to them. Of the body ``told``
    characters are in them. ``end`` is where the call is complete, None before that; ``closing`` may
    follow there.
    """

    def __init__(self, functions: Functions):
        self._functions = functions
        self.name: str | None = None
        self.arguments = ""
        self.told = 0
        self.end: int | None = None


class JsonBody(_Body):
    """``{"name": ..., "arguments": {...}}``. ``arguments`` is as the model wrote it."""

    starts = "{"
    closing = "}"

    def __init__(self, functions: Functions):
        super().__init__(functions)
        self._begin: int | None = None  # of the arguments, if they are told as they come
        self._at = 0
        self._open: list[str] = []  # the brackets that will close
        self._quoted = self._escaped = False

    def read(self, body: str) -> None:
        """Raises NotACall."""
        if self._begin is None and (head := _HEAD.match(body, 0, _LONGEST_HEAD)):
            self.name = self._known(_parsed(head[1]))
            self._begin = head.end()
        before, end = self._at, self._scan(body)
        if self._begin is not None:
            self.arguments, self.told = body[max(self._begin, before) : self._at], self._at
            if end is not None:
                _parsed(body[self._begin : end])
                self.end = end
        elif end is not None:
            self._take(_parsed(body[:end]))
            self.end = self.told = end

    def _scan(self, body: str) -> int | None:
        """Where the arguments end, if they are told as they come, else the call; or None."""
        for at in range(self._at, len(body)):
            self._step(body[at])
            outer = 0 if self._begin is None or at < self._begin else 1
            if body[at] in "}]" and not self._quoted and len(self._open) == outer:
                self._at = at + 1
                return self._at
        self._at = len(body)
        return None

    def _step(self, char: str) -> None:
        if self._quoted:
            if char < " ":
                raise NotACall
            self._quoted = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._open.append("}" if char == "{" else "]")
        elif char in "}]":
            if not self._open or self._open.pop() != char:
                raise NotACall
        elif char not in _BETWEEN:
            raise NotACall

    def _take(self, call: Any) -> None:
        """Of a call whose parts come in another order, or with no arguments at all."""
        arguments = call.get("arguments", {})
        if not call.keys() <= {"name", "arguments"} or not isinstance(arguments, dict):
            raise NotACall
        self.name = self._known(call.get("name"))
        self.arguments = _written(arguments)

    def _known(self, name: Any) -> str:
        if not isinstance(name, str) or name not in self._functions:
            raise NotACall
        return name


class TaggedBody(_Body):
    """``<function=NAME>`` and for each argument ``<parameter=NAME>`` around a text.

    What a text means its schema says; one that can't be meant stays a text.
    """

    starts = "<function="
    closing = ""

    def __init__(self, functions: Functions):
        super().__init__(functions)
        self._names: set[str] = set()
        self._sought = 0  # up to there no parameter ends that was not taken

    def read(self, body: str) -> None:
        """Raises NotACall."""
        self.arguments = ""
        if self.name is None:
            head = _FUNCTION.match(body)
            if head is None:
                if len(body) > 200 or "\n" in body.strip():
                    raise NotACall
                return
            if head[1] not in self._functions:
                raise NotACall
            self.name = head[1]
            self._pass(body, head.end())
        self._pass(body, self.told)
        while self._has_an_end(body) and (found := _PARAMETER.match(body, self.told)):
            self._take(found[1], found[2])
            self._sought = found.end()
            self._pass(body, found.end())
        if body.startswith(_FUNCTION_END, self.told):
            self.arguments += "}" if self._names else "{}"
            self.end = self.told = self.told + len(_FUNCTION_END)
        elif not _may_become(body[self.told : self.told + 20], "<parameter=", _FUNCTION_END):
            raise NotACall

    def _pass(self, body: str, place: int) -> None:
        """All up to ``place`` is told, and the white space there, which is looked at once."""
        blank = _BLANK.match(body, place)
        self.told = blank.end() if blank else place

    def _has_an_end(self, body: str) -> bool:
        """Whether a parameter ends behind what is told: a long one is looked through once."""
        found = body.find(_PARAMETER_END, self._sought)
        self._sought = max(self._sought, len(body) - len(_PARAMETER_END) if found < 0 else found)
        return found >= 0

    def _take(self, name: str, text: str) -> None:
        if name in self._names:
            raise NotACall
        begin = ", " if self._names else "{"
        self._names.add(name)
        text = text.removeprefix("\n").removesuffix("\n")
        value = written_value(text, self._functions[self.name or ""], name)
        self.arguments += f"{begin}{_written(name)}: {_written(value)}"


Body = JsonBody | TaggedBody


def body_of(text: str, functions: Functions) -> Body | None:
    """What reads a body that begins with ``text``; None if that can't be told. Or NotACall."""
    for kind in (JsonBody, TaggedBody):
        if text.startswith(kind.starts):
            return kind(functions)
    if not _may_become(text, JsonBody.starts, TaggedBody.starts):
        raise NotACall
    return None


def _may_become(text: str, *beginnings: str) -> bool:
    return any(each.startswith(text) or text.startswith(each) for each in beginnings)


def _parsed(text: str) -> Any:
    """Of JSON in which no name occurs twice, and that has JSON's own values alone."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError):
        raise NotACall from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise NotACall
    return values


def _constant(_: str) -> NoReturn:
    raise NotACall


def _written(value: Any) -> str:
    """As JSON; in ASCII where it has what no encoding has."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)
