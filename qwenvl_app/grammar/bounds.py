"""What a schema may cost, and what it is told that costs more or can't be done."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenvl_app.errors import BadSchema

_LONGEST = 4_096  # of a text in one: a step takes as long as the longest that is not yet written
_DEEPEST = 64
# Each bounds what a hostile schema may take of the engine's thread in one step, or of memory for
# one sequence (1 to 2 KB a state); llguidance's own defaults are four to twelve times that.
LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 50_000,
    "step_max_items": 12_500,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Keywords that hold values, and schemas by name.
_VALUES = frozenset({"const", "enum", "default", "examples"})
_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_CHECK = Path(__file__).with_name("check.py")
_PATIENCE_S = 10.0  # for the check, which has two seconds of CPU time: on a machine that is busy

# As ``json.dumps`` writes it, with an indent or without. More would let a model write blanks for
# ever, which is still JSON, and which models do whose next word is ruled out.
_BLANK = r" |\n[ \t]{0,16}"
# What the library says of a schema, and the keyword that it is about where that is not named.
_KEYWORDS = (
    (re.compile(r"Unimplemented keys: \[(.*)\]"), None),
    (re.compile(r"Expected .* for '(\w+)'"), None),
    (re.compile(r"\b(\w+) must be an? "), None),
    (re.compile(r"Value for '(\w+)'"), None),
    (re.compile(r"schema is false"), "false"),
    (re.compile(r"anyOf is empty"), "anyOf, enum"),
    (re.compile(r"oneOf constraints"), "oneOf"),
    (re.compile(r"Unknown format"), "format"),
    (re.compile(r"patternProperty"), "patternProperties"),
    (re.compile(r"regex"), "pattern"),
    (re.compile(r"Invalid type"), "type"),
    (re.compile(r"Resource|Pointer|Anchor|\$ref"), "$ref"),
    (re.compile(r"float range|integer range"), "minimum"),
)
# Where in our grammar it is, which nobody asked about.
_FRAME = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?|\n +\d+ \| .*", re.S)


def check_grammar(grammar: str) -> str:
    """What is wrong with ``grammar``, found out under limits of time and memory."""
    try:
        done = subprocess.run(  # noqa: S603  # this interpreter and a file of this package
            [sys.executable, "-I", str(_CHECK)],
            input=json.dumps({"grammar": grammar, "limits": LIMITS}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "too complex"
    return "too complex" if done.returncode else done.stdout


def checked_schema(schema: Mapping[str, Any]) -> str:
    """``schema`` as JSON, within bounds, and without what would steer the library."""
    for value, depth in _walk(schema):
        if depth > _DEEPEST:
            raise BadSchema(f"nested more than {_DEEPEST} deep")
        if isinstance(value, str) and len(value) > _LONGEST:
            raise BadSchema(f"a text of over {_LONGEST} characters")
    try:
        asked = {**_without_defaults(schema), "x-guidance": {"whitespace_pattern": _BLANK}}
        return json.dumps(asked, allow_nan=False)
    except ValueError:
        raise BadSchema("a number that is not finite") from None


def _without_defaults(schema: Any) -> Any:
    """``schema`` without ``uniqueItems: false``, the default, which the library knows no more of.

    Generators of schemas write it. What only looks like a keyword stays: a property of that name,
    and the values of ``_VALUES``.
    """
    if isinstance(schema, list | tuple):
        return [_without_defaults(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _VALUES:
            kept[key] = value
        elif key in _SCHEMAS and isinstance(value, Mapping):
            kept[key] = {name: _without_defaults(each) for name, each in value.items()}
        elif key != "uniqueItems" or value is not False:
            kept[key] = _without_defaults(value)
    return kept


def _walk(schema: Any) -> Iterator[tuple[Any, int]]:
    """All values and names in ``schema`` and how deep they are; without recursion."""
    todo: list[tuple[Any, int]] = [(schema, 0)]
    while todo:
        value, depth = todo.pop()
        yield value, depth
        if depth > _DEEPEST:
            continue
        if isinstance(value, Mapping):
            todo += [(each, depth + 1) for pair in value.items() for each in pair]
        elif isinstance(value, list | tuple):
            todo += [(each, depth + 1) for each in value]


def refusal(problem: str) -> BadSchema:
    """Of what the library says, which knows of nothing but the schema."""
    if "too complex" in problem or "fuel" in problem or "too large" in problem:
        return BadSchema.too_complex()
    said = " ".join(_FRAME.sub("", problem).split())[:200].rstrip(" .")
    for pattern, keyword in _KEYWORDS:
        if found := pattern.search(problem):
            named = keyword or found[1].replace('"', "")
            return BadSchema(said, keyword=named)
    return BadSchema(said)
