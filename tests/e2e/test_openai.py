"""The ``openai`` package, unmodified, against a real gunicorn with the demo model."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.e2e.server import Server
from tests.waiting import until
from tests.wire import picture, send

URL = "data:image/png;base64," + base64.b64encode(picture("circle", "blue")).decode()
QUESTION = {"type": "text", "text": "what is the blue shape?"}
SHAPE = {"type": "image_url", "image_url": {"url": URL}}
ASKED = [{"role": "user", "content": [SHAPE, QUESTION]}]


class Shape(BaseModel):
    shape: Literal["circle", "triangle"]
    sides: Literal[0, 3, 4]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, **options):
    return client.chat.completions.create(
        model="demo", messages=options.pop("messages", ASKED), temperature=0, **options
    )


def test_an_answer(client):
    answer = create(client, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("circle", "stop")
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert choice.logprobs.content[0].logprob <= 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"


def test_a_stream(client):
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "circle"
    assert chunks[-1].usage.completion_tokens > 0


def test_pictures_in_several_turns(client):
    """The next turn begins where the last one ended."""
    first = create(client)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    answer = create(client, messages=[*ASKED, said, {"role": "user", "content": [SHAPE, QUESTION]}])
    assert answer.choices[0].message.content
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens


def test_an_answer_of_a_schema(client):
    answer = client.chat.completions.parse(
        model="demo", messages=ASKED, response_format=Shape, max_tokens=400
    )
    assert isinstance(answer.choices[0].message.parsed, Shape)


class Mark(BaseModel):
    """Marks a shape."""

    shape: Literal["circle", "triangle"]
    at: tuple[int, int] | None


REQUIRED = {"tools": [openai.pydantic_function_tool(Mark)], "tool_choice": "required"}


def test_tools_and_a_turn_with_their_results(client):
    answer = client.chat.completions.parse(
        model="demo", messages=ASKED, parallel_tool_calls=False, **REQUIRED
    )
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "Mark")
    assert isinstance(call.function.parsed_arguments, Mark)
    result = {"role": "tool", "tool_call_id": call.id, "name": "Mark", "content": "marked"}
    for said in (choice.message, choice.message.model_dump()):
        turns = [*ASKED, said, result]
        answer = create(client, messages=turns, tools=REQUIRED["tools"], max_tokens=20)
        assert answer.usage.prompt_tokens_details.cached_tokens > 0
        assert answer.choices[0].message.tool_calls is None


def test_tools_in_a_stream(client):
    named = {"type": "function", "function": {"name": "Mark"}}
    with client.chat.completions.stream(
        model="demo", messages=ASKED, tools=REQUIRED["tools"], tool_choice=named
    ) as stream:
        kinds = [event.type for event in stream]
        (choice,) = stream.get_final_completion().choices
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert kinds.count("tool_calls.function.arguments.delta") > 2
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Mark)
    result = {"role": "tool", "tool_call_id": call.id, "content": "marked"}
    turns = [*ASKED, choice.message, result]
    assert create(client, messages=turns, tools=REQUIRED["tools"], max_tokens=4).choices
    with pytest.raises(openai.BadRequestError, match="nope"):
        create(client, **REQUIRED | {"tool_choice": {**named, "function": {"name": "nope"}}})


def test_errors_are_what_the_package_raises(client):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, n=2)
    assert caught.value.param == "n"
    odd = {"name": "x", "schema": {"type": "array", "contains": {"type": "null"}}}
    with pytest.raises(openai.BadRequestError, match="contains"):
        create(client, response_format={"type": "json_schema", "json_schema": odd})
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("none/of that name")
    assert missing.value.code == "model_not_found"


def endless(client: openai.OpenAI, request_id: str, **options):
    """1,000 tokens, which take seconds."""
    headers = {"X-Request-ID": request_id}
    asked = {"max_tokens": 1000, "extra_body": {"ignore_eos": True}, "extra_headers": headers}
    return create(client, **asked, **options)


def cut(server: Server, request_id: str) -> int:
    """How many answers to ``request_id`` were not made to their end, since nobody waited."""
    lines = server.log.read_text().splitlines(keepends=True)
    left = [line for line in lines if f"[{request_id}]" in line]
    return sum(line.endswith("reason=client_gone\n") for line in left)


def until_idle(server: Server) -> None:
    def samples() -> str:
        return send(server.port, "GET", "/metrics").body.decode()

    until(lambda: "\nqwenvl_num_requests_running 0.0\n" in samples(), said=samples)


def test_a_stream_that_is_closed_half_way_frees_its_slot(client, server: Server):
    stream = endless(client, "closed", stream=True)
    next(iter(stream))
    stream.close()
    until_idle(server)
    until(lambda: cut(server, "closed") == 1, said=server.log.read_text)
    assert create(client).choices[0].message.content == "circle"


def test_clients_that_wait_no_longer_and_try_again_leave_nothing_behind(client, server: Server):
    """Twice as many as there are slots, three times each: what they left behind would be 24."""
    hasty = client.with_options(timeout=0.5, max_retries=2)

    def ask(number: int) -> None:
        with pytest.raises(openai.APITimeoutError):
            endless(hasty, f"hasty-{number}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [None] * 8
    until_idle(server)
    assert create(client).choices[0].message.content == "circle"

    def reasons() -> set[str]:
        log = server.log.read_text()
        return set(re.findall(r"\[hasty-\d\].* status=(\d+ .* reason=\w+)\n", log))

    until(reasons, said=server.log.read_text)
    assert all(re.fullmatch("499 .* reason=client_gone", reason) for reason in reasons())


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the package's, of its class
def test_a_message_of_an_answer_may_be_handed_back_whole(client):
    """One that was parsed too: what the package read of it goes with it."""
    first = create(client).choices[0].message
    parsed = client.chat.completions.parse(
        model="demo", messages=ASKED, response_format=Shape, max_tokens=400
    )
    shape = parsed.choices[0].message
    more = {"role": "user", "content": "sure?"}
    for said in (first, first.model_dump(), shape):
        answer = create(client, messages=[*ASKED, said, more], max_completion_tokens=9999)
        assert answer.choices[0].finish_reason == "stop"
