"""What an answer has to be: ``response_format``, in OpenAI's words."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from qwenvl_app.web.chat.neutral import Label
from qwenvl_app.web.chat.strict_model import StrictModel as _Model

_MAX_SCHEMA = 1_000_000


def _expect_short(schema: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(schema, ensure_ascii=False)) > _MAX_SCHEMA:
        raise PydanticCustomError("too_long", f"it has more than {_MAX_SCHEMA} characters")
    return schema


class TextFormat(_Model):
    """Any text."""

    type: Literal["text"]


class JsonObject(_Model):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(_Model):
    """``schema`` is held to whether or not ``strict``; a ``description`` has no effect."""

    name: Label
    description: Annotated[str, Field(max_length=100_000)] | None = None
    schema_: Annotated[dict[str, Any], AfterValidator(_expect_short)] = Field(
        default_factory=dict, alias="schema"
    )
    strict: bool | None = None


class JsonSchemaFormat(_Model):
    """JSON that a schema admits."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObject | JsonSchemaFormat, Field(discriminator="type")]
