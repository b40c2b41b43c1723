"""JSON schemas, made at random of the kinds that JSON-Schema-Test-Suite has files for."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
_WORDS = ("name", "shape", "颜色", "count", "a b", 'q"x', "left", "x1", "données", "id", "🎉")
_PATTERNS = (
    *("^[A-Z]{3}-[0-9]{4}$", "^(a|bc)+$", r"^\d{4}年$", "^.{2,5}$", "o", r"^\w+@\w+\.(cn|com)$"),
    *(r"^[^\s\"\\]{1,8}$", "^(red|green|blue)?$"),
)
_FORMATS = ("date", "date-time", "time", "email", "ipv4", "ipv6", "uuid", "duration", "hostname")


def _type(rng: random.Random, _depth: int) -> Schema:
    kinds = ["integer", "boolean", "null", "string", "number"]
    return {"type": rng.choice([rng.choice(kinds), rng.sample(kinds, 2)])}


def _enum(rng: random.Random, _depth: int) -> Schema:
    values = [1, -2.5, None, True, "红色", 'a"b', [1, 2], {"k": []}, "", "x" * 40]
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _const(rng: random.Random, _depth: int) -> Schema:
    return {"const": rng.choice([0, "正方形", None, [1, "two"], {"deep": {"er": False}}, "\n\t"])}


def _integer(rng: random.Random, _depth: int) -> Schema:
    low = rng.randint(-1000, 1000)
    ends = (("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum"))
    schema = {"type": "integer"} | dict(
        zip(rng.choice(ends), (low, low + rng.randint(2, 5000)), strict=True)
    )
    return schema | rng.choice([{}, {"multipleOf": 1}])


def _multiple(rng: random.Random, _depth: int) -> Schema:
    return {"type": "integer", "multipleOf": rng.choice((2, 3, 5, 7, 10, 12, 25))}


def _number(rng: random.Random, _depth: int) -> Schema:
    low = rng.choice((-1.5, 0, 0.25, 10))
    return {"type": "number", "minimum": low, "maximum": low + rng.choice((0.5, 3, 100))}


def _string(rng: random.Random, _depth: int) -> Schema:
    least = rng.randint(0, 5)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 12)}


def _pattern(rng: random.Random, _depth: int) -> Schema:
    return {"type": "string", "maxLength": 30, "pattern": rng.choice(_PATTERNS)}


def _format(rng: random.Random, _depth: int) -> Schema:
    return {"type": "string", "format": rng.choice(_FORMATS)}


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    ends = {"minItems": least, "maxItems": least + rng.randint(0, 3)}
    return {"type": "array", "items": schema(rng, depth + 1)} | ends


def _tuple(rng: random.Random, depth: int) -> Schema:
    items = [schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "description": "of several",
        "properties": {name: schema(rng, depth + 1) for name in names},
        "required": names[: rng.randint(0, len(names))],
        "additionalProperties": False,
    }


def _map(rng: random.Random, depth: int) -> Schema:
    return {"type": "object", "additionalProperties": schema(rng, depth + 1), "maxProperties": 1}


def _pattern_properties(rng: random.Random, depth: int) -> Schema:
    letter = rng.choice(string.ascii_lowercase)
    return {
        "type": "object",
        "patternProperties": {f"^{letter}[0-9]{{1,2}}$": schema(rng, depth + 1)},
        "additionalProperties": False,
        "maxProperties": 1,
    }


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [schema(rng, depth + 1) for _ in range(rng.randint(2, 4))]}


def _one_of(rng: random.Random, depth: int) -> Schema:
    """As pydantic writes a union that one field tells apart."""
    kinds = rng.sample(("circle", "square", "triangle"), 2)
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "value": schema(rng, depth + 1)},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
            for kind in kinds
        ]
    }


def _all_of(rng: random.Random, _depth: int) -> Schema:
    low = rng.randint(0, 50)
    return {"allOf": [{"type": "integer"}, {"minimum": low}, {"maximum": low + 60}]}


def _ref(rng: random.Random, depth: int) -> Schema:
    if depth:  # references begin at the root
        return _object(rng, depth)
    return {
        "$defs": {"each": schema(rng, 2)},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/each"}, "b": {"$ref": "#/$defs/each"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }


def _recursive(rng: random.Random, depth: int) -> Schema:
    if depth:
        return _array(rng, depth)
    node = {
        "type": "object",
        "properties": {
            "value": schema(rng, 2),
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
        },
        "required": ["value", "children"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


_LEAVES: tuple[Callable[[random.Random, int], Schema], ...] = (
    *(_type, _enum, _const, _integer, _multiple, _number, _string, _pattern, _format, _all_of),
)
KINDS = (
    *_LEAVES,
    *(_array, _tuple, _object, _map, _pattern_properties, _any_of, _one_of, _ref, _recursive),
)


def schema(rng: random.Random, depth: int = 0) -> Schema:
    """One of any kind; deep inside, of those that have nothing inside."""
    return rng.choice(_LEAVES if depth > 1 else KINDS)(rng, depth)


def schemas(seed: int, count: int) -> list[Schema]:
    """Every kind comes up as often as any other; all differ from one another, or nearly."""
    rng = random.Random(seed)
    return [KINDS[number % len(KINDS)](rng, 0) for number in range(count)]
