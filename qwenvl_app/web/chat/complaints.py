"""What is wrong with a JSON body, by pydantic's errors: one sentence, and the field's place."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qwenvl_app.web.errors import InvalidParameter

Place = list[int | str]


def complaint(error: ValidationError, body: object) -> InvalidParameter:
    """The error of the first wrong field of ``body``.

    Of a field that may be of several kinds pydantic tells what is wrong with it as each of them.
    What is deepest, and not about the kind itself, is about the one that was meant.
    """
    errors = error.errors(include_url=False, include_input=False)
    field = errors[0]["loc"][:1]
    about = max((each for each in errors if each["loc"][:1] == field), key=_nearness)
    param = ".".join(str(step)[:100] for step in _place(about, body))
    nothing_allowed = about.get("ctx", {}).get("max_length") == 0
    said = about["msg"]
    if nothing_allowed or about["type"] in {"extra_forbidden", "none_required"}:
        said = "it is not supported"
    elif about["type"] == "union_tag_invalid":  # else with the tag, however long
        said = f"The type should be one of {about['ctx']['expected_tags']}"
    return InvalidParameter(f"{param}: {said}", param)


def _nearness(error: ErrorDetails) -> tuple[int, bool]:
    return len(error["loc"]), not error["type"].endswith("_type")


def _place(error: ErrorDetails, body: Any) -> Place:
    """Where it is, without the names of pydantic's types, which are in ``loc`` but not in ``body``.

    A field that is missing is not there either, and the last step.
    """
    *way, last = error["loc"]
    if error["type"] == "missing":
        return [*(_follow(way, body) or ()), last]
    return _follow([*way, last], body, to_the_end=error["type"] == "extra_forbidden") or [last]


def _follow(steps: Place, body: Any, *, to_the_end: bool = False) -> Place | None:
    """Those of ``steps`` that lead into ``body``; None if the last has to and does not.

    A type may have the name of a field beside the one that is meant, so both are tried.
    """
    if not steps:
        return []
    step, *others = steps
    if _leads(step, body):
        rest = _follow(others, body[step], to_the_end=to_the_end)
        if rest is not None:
            return [step, *rest]
    return None if to_the_end and not others else _follow(others, body, to_the_end=to_the_end)


def _leads(step: int | str, body: Any) -> bool:
    if isinstance(body, dict):
        return step in body
    return isinstance(body, list) and isinstance(step, int)
