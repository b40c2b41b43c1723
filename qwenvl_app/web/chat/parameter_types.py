"""What a text in tags means, by the JSON schema of its parameter."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_PYTHON = {"True": True, "False": False, "None": None}  # Qwen3.5's template writes them so
_KINDS: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
}


def written_value(text: str, schema: Mapping[str, Any], name: str) -> Any:
    """The value of the parameter ``name``: the text, if that or nothing else may be meant."""
    properties = schema.get("properties")
    parameter = properties.get(name) if isinstance(properties, Mapping) else None
    kinds = _kinds(parameter, schema)
    try:
        value = _PYTHON[text] if text in _PYTHON else json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    if value is None and "null" in kinds:
        return None
    if not kinds or "string" in kinds or not _is_one_of(value, kinds):
        return text
    return value


def _is_one_of(value: Any, kinds: set[str]) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, bool):
        return "boolean" in kinds
    return any(isinstance(value, _KINDS.get(kind, ())) for kind in kinds)


def _kinds(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """The types that ``schema`` speaks of; none if it speaks of none. Each reference goes once."""
    kinds: set[str] = set()
    seen: set[str] = set()
    waiting = [schema]
    while waiting:
        if not isinstance(each := waiting.pop(), Mapping):
            continue
        named = each.get("type")
        kinds.update(kind for kind in [*_list(named), named] if isinstance(kind, str))
        kinds.update(map(_kind, _list(each.get("enum"))))
        if "const" in each:
            kinds.add(_kind(each["const"]))
        for keyword in ("anyOf", "oneOf", "allOf"):
            waiting += _list(each.get(keyword))
        reference = each.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            waiting.append(_resolved(reference, root))
    return kinds


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """Of a JSON pointer within ``root`` (RFC 6901); None for any other."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for step in reference[1:].split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kind(value: Any) -> str:
    kinds = (kind for kind, types in _KINDS.items() if isinstance(value, types))
    return next(kinds, "string")


def _refuse(name: str) -> None:
    raise ValueError(name)
