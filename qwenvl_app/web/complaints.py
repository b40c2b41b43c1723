"""What is wrong with a JSON body, by pydantic's errors: one sentence, and the field's place."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qwenvl_app.web.errors import InvalidParameter


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


def _place(error: ErrorDetails, body: Any) -> list[int | str]:
    """Where it is, without the names of pydantic's types, which are in ``loc`` but not in ``body``.

    A field that is missing is not there either, and the last step.
    """
    place: list[int | str] = []
    for step in error["loc"]:
        try:
            body = body[step]
        except (LookupError, TypeError):
            continue
        place.append(step)
    return [*place, error["loc"][-1]] if error["type"] == "missing" else place
