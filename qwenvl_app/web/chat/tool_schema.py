"""Tools in the body of ``POST /v1/chat/completions``, in OpenAI's words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from qwenvl_app.generation import ToolCall
from qwenvl_app.web.chat.strict_model import StrictModel
from qwenvl_app.web.errors import InvalidParameter

if TYPE_CHECKING:
    from qwenvl_app.web.chat.schema import ChatMessage

MAX_TOOLS = 128  # as OpenAI has it
# OpenAI's names, in any script and with dots: they stand in the prompt and between tags.
Name = Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]


class Function(StrictModel):
    """``parameters`` is a JSON schema of an object.

    ``strict`` has no effect: where a call is required it fits the schema anyhow, elsewhere it is
    as the model writes it.
    """

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A function that the model may ask for."""

    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    """The name of one."""

    name: Name


class NamedTool(StrictModel):
    """The one that has to be asked for."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(StrictModel):
    """``arguments`` is a JSON text. ``parsed_arguments``: the same read, by the openai package."""

    name: Name
    arguments: str
    parsed_arguments: Any = None


class CalledTool(StrictModel):
    """A call in an earlier answer; an ``index`` is of one that was streamed."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int, Field(ge=0)] | None = None

    def as_call(self) -> ToolCall:
        """For the backend."""
        return ToolCall(self.id, self.function.name, self.function.arguments)


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Calls = Annotated[list[CalledTool], Field(max_length=MAX_TOOLS)]


def for_template(tools: Iterable[Tool]) -> tuple[dict[str, Any], ...]:
    """As chat templates take them, which know nothing of ``strict``."""
    return tuple(
        tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools
    )


def check_choice(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Raises InvalidParameter for a name that occurs twice, or a choice that there is not."""
    names = [tool.function.name for tool in tools]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InvalidParameter(f"tools: the name {name} occurs twice.", "tools")
    if choice == "required" and not names:
        raise InvalidParameter("tool_choice: only with tools.", "tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        name = choice.function.name
        raise InvalidParameter(f"tool_choice: tools has no function {name}.", "tool_choice")


def in_order(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """``messages`` with the results of each turn in the order of its calls.

    Templates tell results apart by their order alone, OpenAI's clients by the id. Raises
    InvalidParameter if a message has what its role does not, or a call has not one result.
    """
    ordered: list[ChatMessage] = []
    called: dict[str, str] = {}  # the assistant's latest turn: ids, and names of functions
    results: dict[str, ChatMessage] = {}
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        _check_fields(message, where)
        _check_name(message, called, where)
        if message.role == "tool":
            name = message.tool_call_id or ""
            if name not in called or name in results:
                said = "it is of no call just before, or has a result already"
                raise InvalidParameter(f"{where}.tool_call_id: {said}.", f"{where}.tool_call_id")
            results[name] = message
            continue
        ordered += _results(called, results, where)
        ordered.append(message)
        calls = message.tool_calls or ()
        called, results = {call.id: call.function.name for call in calls}, {}
        if len(called) < len(calls):
            raise InvalidParameter(f"{where}.tool_calls: an id occurs twice.", where)
    return ordered + _results(called, results, f"messages.{len(messages)}")


def _results(
    called: dict[str, str], results: dict[str, ChatMessage], where: str
) -> list[ChatMessage]:
    if missing := [name for name in called if name not in results]:
        said = f"a message of the role tool has to come first, of the call {missing[0][:100]}"
        raise InvalidParameter(f"{where}: {said}.", where)
    return [results[name] for name in called]


def _check_name(message: ChatMessage, called: dict[str, str], where: str) -> None:
    """A result may have its function's, which OpenAI's examples write there."""
    if message.name is None:
        return
    if message.role != "tool":
        raise InvalidParameter(f"{where}.name: it is not supported", f"{where}.name")
    if message.name != called.get(message.tool_call_id or "", message.name):
        raise InvalidParameter(f"{where}.name: the call is of another function.", f"{where}.name")


def _check_fields(message: ChatMessage, where: str) -> None:
    if message.tool_calls and message.role != "assistant":
        param = f"{where}.tool_calls"
        raise InvalidParameter(f"{param}: only with the role assistant.", param)
    if (message.tool_call_id is None) is (message.role == "tool"):
        param = f"{where}.tool_call_id"
        raise InvalidParameter(f"{param}: with the role tool, and only there.", param)
    if message.content is None and not message.tool_calls:
        param = f"{where}.content"
        raise InvalidParameter(f"{param}: it may be left out with tool_calls alone.", param)
    if message.role == "tool" and any(part.type != "text" for part in message.parts):
        param = f"{where}.content"
        raise InvalidParameter(f"{param}: a tool's result has texts alone.", param)
