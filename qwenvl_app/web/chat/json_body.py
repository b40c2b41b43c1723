"""A JSON body to Python values: in memory, under limits, with no value that JSON does not have."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from flask import Request
from werkzeug.exceptions import ClientDisconnected

from qwenvl_app.errors import ClientGone
from qwenvl_app.service.deadline import Deadline
from qwenvl_app.web.errors import InvalidParameter

_DEPTH = 64  # of arrays and objects in one another; Python's parser recurses
# More commas than any request has: 20 MB of "{}," would be half a gigabyte of objects.
_COMMAS = 200_000
# Of one object; each that is unknown is an error of pydantic's, of a kilobyte and more.
_KEYS = 10_000
# From this size on, in bytes, bodies are read one at a time.
_LARGE = 2**18


class Turn:
    """A lock whose waiters give up when their client leaves."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.taken = False

    def take(self, deadline: Deadline) -> bool:
        """Wait until nobody has it; whether it is had now. If not, nobody wants the answer."""
        with deadline.on_leaving(self._wake), self._changed:
            self._changed.wait_for(
                lambda: not (self.taken and deadline.wants_answer), deadline.remaining
            )
            free, self.taken = not self.taken, True
            return free

    def give_back(self) -> None:
        """To be called by who has it."""
        with self._changed:
            self.taken = False
            self._changed.notify()  # who gives up at the same time takes it and gives it back

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


turn = Turn()


@contextmanager
def in_turn(request: Request, deadline: Deadline) -> Iterator[None]:
    """A body of 20 MB is 200 while it is decoded, and as much again while it is validated.

    Two dozen threads may have one. At the same time they would be no faster: Python runs one.
    Raises what ``deadline`` does.
    """
    length = request.content_length
    if length is not None and length < _LARGE:
        yield
        return
    has_turn = turn.take(deadline)
    try:
        deadline.check()
        yield
    finally:
        if has_turn:
            turn.give_back()


def read_json(request: Request) -> tuple[dict[str, Any], int]:
    """The object that is the body, and the bytes that it came in.

    Raises InvalidParameter; over MAX_CONTENT_LENGTH Flask's 413.
    """
    if request.mimetype != "application/json":
        raise InvalidParameter("The Content-Type has to be application/json.")
    if request.mimetype_params.get("charset", "utf-8").lower() not in ("utf-8", "utf8"):
        raise InvalidParameter("The charset has to be utf-8, as RFC 8259 says.")
    try:
        data = request.get_data(cache=False)
    except ClientDisconnected:
        raise ClientGone from None
    if data.count(b",") > _COMMAS:
        raise InvalidParameter("The body has too many values.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidParameter("The body is not UTF-8.") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except (json.JSONDecodeError, RecursionError, ValueError):
        # ValueError: an integer of thousands of digits (Python's int_max_str_digits).
        raise InvalidParameter("The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise InvalidParameter("The body has to be a JSON object.")
    _check(value)
    return value, len(data)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _KEYS:
        raise InvalidParameter("A JSON object has too many keys.")
    values = dict(pairs)
    if len(values) != len(pairs):
        raise InvalidParameter("A key occurs twice in one JSON object.")
    return values


def _constant(name: str) -> NoReturn:
    raise InvalidParameter(f"{name} is no JSON value.")


def _check(value: Any) -> None:
    """Refuse lone surrogates, infinite numbers and too deep a value, without recursion."""
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if depth > _DEPTH:
            raise InvalidParameter(f"The JSON is nested deeper than {_DEPTH} levels.")
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise InvalidParameter("A text has a lone surrogate.") from None
        elif isinstance(item, float):
            if item in (float("inf"), float("-inf")):
                raise InvalidParameter("A number is too large.")
        elif isinstance(item, dict):
            waiting += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            waiting += [(part, depth + 1) for part in item]
