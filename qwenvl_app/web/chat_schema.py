"""The body of ``POST /v1/chat/completions``, in OpenAI's words. Unknown fields are refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from qwenvl_app.generation import Constraint, SamplingParams
from qwenvl_app.web.chat_neutral import Label, NeutralMessage, NeutralRequest, Off
from qwenvl_app.web.complaints import complaint
from qwenvl_app.web.errors import InvalidParameter
from qwenvl_app.web.sampling_fields import SamplingFields, StopText

_MAX_MESSAGES = 1000
_MAX_PARTS = 1000
_MAX_SCHEMA = 1_000_000


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _expect_ascii(url: str) -> str:
    """A picture of 20 MB with one Chinese character in it would be kept as 40, and be none."""
    if url.startswith("data:") and not url.isascii():
        raise PydanticCustomError("base64", "it is not valid base64.")
    return url


def _expect_short(schema: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(schema, ensure_ascii=False)) > _MAX_SCHEMA:
        raise PydanticCustomError("too_long", f"it has more than {_MAX_SCHEMA} characters")
    return schema


class ImageURL(_Model):
    """Where a picture is; of ``detail`` there is the highest level only."""

    url: Annotated[str, AfterValidator(_expect_ascii)]
    detail: Literal["auto", "high"] | None = None


class TextPart(_Model):
    """A text."""

    type: Literal["text"]
    text: str


class ImagePart(_Model):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Model, NeutralMessage):
    """One turn; ``developer`` is a newer name of ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=_MAX_PARTS, fail_fast=True)]
    reasoning_content: str | None = None
    tool_calls: None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


class TemplateOptions(_Model):
    """What the published templates ask for: Qwen3.5's switch for its reasoning."""

    enable_thinking: bool | None = None


class PixelLimits(_Model):
    """What a picture is scaled to, in pixels."""

    min_pixels: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_pixels: int | None = Field(default=None, ge=1, le=2**31 - 1)


class StreamOptions(_Model):
    """What a stream says beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Off | None = None


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


class ChatRequest(_Model, SamplingFields, NeutralRequest):
    """``model`` has no effect: there is one. A longest answer over the service's own is that."""

    model: Label | None = None
    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: TemplateOptions | None = None
    mm_processor_kwargs: PixelLimits | None = None
    response_format: ResponseFormat | None = None

    @classmethod
    def parse(cls, body: dict[str, Any]) -> ChatRequest:
        """Validate ``body``. Raises InvalidParameter, which names the first wrong field."""
        try:
            parsed = cls.model_validate(body)
        except ValidationError as error:
            raise complaint(error, body) from None
        both = (parsed.max_tokens, parsed.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise InvalidParameter(
                "max_tokens and max_completion_tokens differ: send one of them.", "max_tokens"
            )
        if parsed.top_logprobs and not parsed.logprobs:
            raise InvalidParameter("top_logprobs: only with logprobs.", "top_logprobs")
        if parsed.include_usage and not parsed.stream:
            raise InvalidParameter("stream_options: only with stream.", "stream_options")
        return parsed

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def limit(self) -> int | None:
        """The longest answer, in tokens; the engine has a limit of its own."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def template_options(self) -> dict[str, Any]:
        """For the chat template; what was not sent is its own."""
        options = self.chat_template_kwargs
        return options.model_dump(exclude_none=True) if options else {}

    @property
    def pixels(self) -> tuple[int | None, int | None]:
        """The least and the most of a picture; None leaves the checkpoint's."""
        limits = self.mm_processor_kwargs or PixelLimits()
        return limits.min_pixels, limits.max_pixels

    @property
    def constraint(self) -> Constraint | None:
        """What the answer has to be; None if it may be any text."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return Constraint("json", self.response_format.json_schema.schema_)
        if isinstance(self.response_format, JsonObject):
            return Constraint("json", {"type": "object"})
        return None

    def sampling(self, repetition_limit: int) -> SamplingParams:
        """How to generate; what was not sent is the checkpoint's."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            **self.sent(),
            max_new_tokens=self.limit,
            stop=stop,
            ignore_eos=bool(self.ignore_eos),
            repetition_limit=repetition_limit,
        )
