"""The body of ``POST /v1/chat/completions``, in OpenAI's words. Unknown fields are refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from qwenvl_app.generation import CALL_MARKS, Constraint, SamplingParams
from qwenvl_app.web.chat.complaints import complaint
from qwenvl_app.web.chat.neutral import Label, NeutralMessage, NeutralRequest, Off
from qwenvl_app.web.chat.response_format import JsonObject, JsonSchemaFormat, ResponseFormat
from qwenvl_app.web.chat.strict_model import StrictModel as _Model
from qwenvl_app.web.chat.tool_schema import (
    MAX_TOOLS,
    Calls,
    NamedTool,
    Tool,
    ToolChoice,
    check_choice,
    for_template,
    in_order,
)
from qwenvl_app.web.errors import InvalidParameter
from qwenvl_app.web.sampling_fields import SamplingFields, StopText

_MAX_MESSAGES = 1000
_MAX_PARTS = 1000


def _expect_ascii(url: str) -> str:
    """A picture of 20 MB with one Chinese character in it would be kept as 40, and be none."""
    if url.startswith("data:") and not url.isascii():
        raise PydanticCustomError("base64", "it is not valid base64.")
    return url


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
    """One turn; ``developer`` is a newer name of ``system``.

    An assistant's with ``tool_calls`` may have no content. A ``tool``'s is the result of a call,
    and its ``name`` that of the call's function; no template has a place for another ``name``.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=_MAX_PARTS, fail_fast=True)] | None = None
    reasoning_content: str | None = None
    tool_calls: Calls | None = None
    tool_call_id: str | None = None
    name: Label | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content or []


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
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

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
        check_choice(parsed.tools or (), parsed.tool_choice)
        if parsed.offered and parsed.constraint and parsed.constraint.kind == "json":
            said = "not together with tools, but for the tool_choice none"
            raise InvalidParameter(f"response_format: {said}.", "response_format")
        return parsed.model_copy(update={"messages": in_order(parsed.messages)})

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
    def characters(self) -> int:
        """Of all that becomes text in the prompt."""
        texts = [message.reasoning_content or "" for message in self.messages]
        parts = [part for message in self.messages for part in message.parts]
        texts += [part.text for part in parts if isinstance(part, TextPart)]
        calls = [call for message in self.messages for call in message.tool_calls or ()]
        texts += [call.function.name + call.function.arguments for call in calls]
        texts += [json.dumps(tool, ensure_ascii=False) for tool in self.offered]
        return sum(map(len, texts))

    @property
    def offered(self) -> tuple[dict[str, Any], ...]:
        """The tools that the model is told of."""
        return () if self.tool_choice == "none" else for_template(self.tools or ())

    @property
    def constraint(self) -> Constraint | None:
        """What the answer has to be; None if it may be any text."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return Constraint("json", self.response_format.json_schema.schema_)
        if isinstance(self.response_format, JsonObject):
            return Constraint("json", {"type": "object"})
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            named = (tool for tool in self.offered if tool["function"]["name"] == name)
            return Constraint("tools", tools=tuple(named), single=True)
        if self.tool_choice == "required":
            return Constraint("tools", tools=self.offered, single=self.parallel_tool_calls is False)
        return None

    def sampling(self, repetition_limit: int) -> SamplingParams:
        """How to generate; what was not sent is the checkpoint's."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if self.offered and self.parallel_tool_calls is False and not self.constraint:
            stop = (*stop, CALL_MARKS[1])  # after which another call would begin
        return SamplingParams(
            **self.sent(),
            max_new_tokens=self.limit,
            stop=stop,
            ignore_eos=bool(self.ignore_eos),
            repetition_limit=repetition_limit,
        )
