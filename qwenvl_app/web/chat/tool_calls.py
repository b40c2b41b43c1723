"""Calls of tools in an answer's text, as it comes, to OpenAI's ``content`` and ``tool_calls``."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qwenvl_app.generation import CALL_MARKS
from qwenvl_app.web.chat.call_bodies import Body, NotACall, body_of

Json = dict[str, Any]
_BEGIN, _END = CALL_MARKS


@dataclass
class _Call:
    """One that is being read: the white space before its mark, and what was told of it."""

    blank: str
    body: Body | None = None
    named: bool = False
    told: int = 0  # characters of the body


class CallReader:
    """Reads one answer. With no ``tools`` all of it is content.

    ``complete``: calls that were read to their end. A call of a function that was not offered, or
    one that is broken or cut, stays content; if its name was told already, what was not told.
    White space around calls is no content.
    """

    def __init__(self, tools: Iterable[Mapping[str, Any]]):
        functions = (tool["function"] for tool in tools)
        self._functions = {each["name"]: each.get("parameters") or {} for each in functions}
        self.complete = 0
        self._text = ""  # that is not told yet; within a call its body, from its beginning on
        self._blanks: list[str] = []  # white space before that, looked at once however it comes
        self._call: _Call | None = None
        self._closing: list[str] = []  # what may still follow of the latest call
        self._named = 0  # calls that were told of

    def push(self, text: str, *, last: bool = False) -> list[Json]:
        """Deltas of ``text``, in OpenAI's form. Only what may be a call's beginning is kept back.

        A call that is not whole by the ``last`` text is none.
        """
        if not self._functions:
            return [{"content": text}] if text else []
        self._text += text
        deltas: list[Json] = []
        while self._step(deltas, last=last):
            pass
        return deltas

    def message(self, text: str) -> Json:
        """``content`` and, if there are any, ``tool_calls`` of a whole answer."""
        content, calls = "", []
        for delta in self.push(text, last=True):
            content += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({name: part for name, part in call.items() if name != "index"})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        if not calls:
            return {"content": content}
        return {"content": content or None, "tool_calls": calls}

    def _step(self, deltas: list[Json], *, last: bool) -> bool:
        """Whether there may be more to tell."""
        call = self._call
        if call is None:
            return self._closed(last=last) and self._outside(deltas, last=last)
        try:
            ended = self._inside(call, deltas, last=last)
        except NotACall:
            ended, last = False, True
        if last and not ended:
            if not call.named:
                deltas.append({"content": call.blank + _BEGIN})
            self._call, self._text = None, self._text[call.told :]
        return ended or last

    def _closed(self, *, last: bool) -> bool:
        """Whether the end of the latest call is behind us."""
        while self._closing:
            self._strip()
            mark = self._closing[0]
            if self._text.startswith(mark):
                self._text, self._blanks = self._text[len(mark) :], []
            elif mark.startswith(self._text):
                if not last:
                    return False
                self._text, self._blanks = "", []  # a mark that was cut
            self._closing.pop(0)
        return True

    def _strip(self) -> None:
        """Put the white space that the text begins with to what is before it."""
        text = self._text.lstrip()
        self._blanks.append(self._text[: len(self._text) - len(text)])
        self._text = text

    def _outside(self, deltas: list[Json], *, last: bool) -> bool:
        before, mark, after = self._text.partition(_BEGIN)
        self._text = "" if mark or last else before[len(before) - _overlap(before) :]
        before = before.removesuffix(self._text)
        ends = last and not mark and not self.complete  # with white space that is content
        told = before if ends else before.rstrip()
        if told or ends:
            said, self._blanks = "".join([*self._blanks, told]), []
            if said:
                deltas.append({"content": said})
        self._blanks.append(before[len(told) :])
        if mark:
            self._call, self._text = _Call("".join(self._blanks)), after
            self._blanks = []
        return bool(mark)

    def _inside(self, call: _Call, deltas: list[Json], *, last: bool) -> bool:
        """Whether the call is complete. Raises NotACall."""
        if call.body is None:
            self._strip()
        call.body = body = call.body or body_of(self._text, self._functions)
        if body is None:
            return False
        body.read(self._text)
        if last and not call.named and body.end is None:
            return False
        if body.name is not None and not call.named:
            call.named = True
            self._blanks = []
            self._named += 1
            function = {"name": body.name, "arguments": ""}
            name = f"call_{secrets.token_hex(12)}"
            deltas.append(self._delta({"id": name, "type": "function", "function": function}))
        if body.arguments:
            deltas.append(self._delta({"function": {"arguments": body.arguments}}))
        call.told = body.told if call.named else 0
        if body.end is None:
            return False
        self.complete += 1
        self._call, self._text = None, self._text[body.end :]
        self._closing = [mark for mark in (body.closing, _END) if mark]
        return True

    def _delta(self, call: Json) -> Json:
        return {"tool_calls": [{"index": self._named - 1, **call}]}


def _overlap(text: str) -> int:
    """The length of the longest end of ``text`` that may become a mark."""
    lengths = range(len(_BEGIN) - 1, 0, -1)
    return next((length for length in lengths if text.endswith(_BEGIN[:length])), 0)
