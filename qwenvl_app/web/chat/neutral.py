"""What OpenAI's clients send that asks for nothing beyond what is done anyway.

Frameworks write fields out with null or the default that OpenAI documents, and hand back whole
messages of answers. Such a value is taken; any other is refused with the field's name, since an
answer that ignores it would not be the one that was asked for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

Label = Annotated[str, Field(max_length=1000)]
EmptyDict = Annotated[dict[str, Any], Field(max_length=0)]
EmptyList = Annotated[list[Any], Field(max_length=0)]


def _is_off(value: bool) -> bool:
    if value:
        raise PydanticCustomError("unsupported", "it is not supported")
    return value


# Literal[False] would take 0, and Literal[1] true.
Off = Annotated[bool, AfterValidator(_is_off), WithJsonSchema({"type": "boolean", "const": False})]
One = Annotated[int, Field(ge=1, le=1)]


class NeutralMessage(BaseModel):
    """A message of an answer, as a client hands it back.

    ``parsed`` is the ``openai`` package's: its ``content``, read. ``provider_specific_fields`` is
    what LiteLLM found beside a message.
    """

    refusal: None = None
    parsed: Any = None
    provider_specific_fields: dict[str, Any] | None = None
    annotations: EmptyList | None = None
    audio: None = None
    function_call: None = None


class NeutralRequest(BaseModel):
    """The fields of OpenAI's that ask for nothing here.

    ``user``, ``metadata`` and what else is a label are taken whatever they say: nothing is stored,
    and prompts are cached anyway.
    """

    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None
    store: Off | None = None
    n: One | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    verbosity: Literal["medium"] | None = None
    logit_bias: EmptyDict | None = None
    reasoning_effort: None = None
    prediction: None = None
    audio: None = None
    moderation: None = None
    prompt_cache_options: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None
