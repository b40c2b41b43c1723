"""What the routes in OpenAI's form answer, as models; see ``answers.py``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ChatErrorBody(BaseModel):
    """What went wrong, in English; ``param`` is the field that is wrong."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "server_error"]
    param: str | None
    code: str


class ChatError(BaseModel):
    """An error in OpenAI's form."""

    error: ChatErrorBody


class TokenProbability(BaseModel):
    """A token that might have stood at a place, as text and as UTF-8."""

    token: str
    bytes: list[int]
    logprob: float


class Token(TokenProbability):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TokenProbability]


class Logprobs(BaseModel):
    """The answer's tokens."""

    content: list[Token]


class CalledFunction(BaseModel):
    """``arguments`` is a JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A function that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The model's turn; ``reasoning_content`` is what it wrote before its answer."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0]
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class PromptDetails(BaseModel):
    """Tokens of the prompt that were computed for an earlier one."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    """Tokens of the answer that are reasoning."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Timings(BaseModel):
    """What each stage took, in milliseconds; the last three are the model's."""

    read_ms: float
    queue_ms: float
    image_ms: float
    preprocess_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None


class ChatCompletion(BaseModel):
    """An answer in one piece; ``created`` is in seconds since 1970."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    timings: Timings


class FunctionDelta(BaseModel):
    """The name comes first, the arguments in pieces after it."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """A piece of the call with this ``index``."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta | None = None


class MessageDelta(BaseModel):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    """A piece of the one answer; the last one has ``finish_reason``."""

    index: Literal[0]
    delta: MessageDelta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """One event of a stream; with ``stream_options.include_usage`` the last has no choice."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All models, which is one."""

    object: Literal["list"]
    data: list[Model]
