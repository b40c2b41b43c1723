"""LangChain and Vercel's ``ai``, unmodified, and the examples of docs/clients.md."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.e2e.server import ROOT, Server
from tests.waiting import until
from tests.wire import picture, send

PICTURE = base64.b64encode(picture("circle", "blue")).decode()
QUESTION = {"type": "text", "text": "what is the blue shape?"}
OPENAIS = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
OWN = {"type": "image", "base64": PICTURE, "mime_type": "image/png"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Shape(BaseModel):
    shape: Literal["circle", "triangle"]
    sides: Literal[0, 3, 4]


def chain(server: Server, **options: Any) -> ChatOpenAI:
    asked = {"temperature": 0, "max_retries": 0, "stream_usage": True} | options
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="demo", **asked)


def later(server: Server, ask: Callable[[ChatOpenAI], Awaitable[Any]]) -> Any:
    """What ``ask`` gets on a loop of its own.

    LangChain keeps its client of asyncio for good, with connections of a loop that has ended.
    """

    async def asked() -> Any:
        async with openai.DefaultAsyncHttpxClient() as client:
            return await ask(chain(server, http_async_client=client))

    return asyncio.run(asked())


def test_langchain_answers(server: Server):
    """In both its forms of a picture, and however much longer its answer might be."""
    for part in (OPENAIS, OWN):
        answer = chain(server, max_tokens=9999).invoke([HumanMessage([part, QUESTION])])
        assert answer.content == "circle"
        assert answer.response_metadata["finish_reason"] == "stop"
        assert answer.usage_metadata["output_tokens"] == 2
    scored = chain(server).bind(logprobs=True, top_logprobs=2).invoke("hello")
    assert len(scored.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_langchain_streams(server: Server):
    model, asked = chain(server), [HumanMessage([OWN, QUESTION])]
    pieces = list(model.stream(asked))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert (whole.content, whole.usage_metadata["output_tokens"]) == ("circle", 2)

    async def pieced(model: ChatOpenAI) -> str:
        return "".join([str(piece.content) async for piece in model.astream(asked)])

    assert later(server, pieced) == "circle"


def test_langchain_goes_on_with_a_conversation(server: Server):
    """The messages of answers come back, with all that LangChain writes into them."""
    model = chain(server)
    messages = [SystemMessage("be brief"), HumanMessage([OWN, QUESTION])]
    messages += [model.invoke(messages), HumanMessage("sure?")]
    assert isinstance(messages[2], AIMessage)
    answer = model.invoke(messages)
    assert answer.content
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 0


def test_langchain_gets_what_a_schema_says(server: Server):
    for options in ({}, {"method": "json_schema"}, {"method": "json_schema", "strict": True}):
        model = chain(server).with_structured_output(Shape, **options)
        assert isinstance(model.invoke([HumanMessage([OWN, QUESTION])]), Shape)


@tool
def count(shape: Literal["circle", "triangle"], at: int) -> int:
    """Count shapes."""
    return at


ONE = {"tool_choice": "count", "parallel_tool_calls": False}  # the small model would go on and on


def summed(pieces: Iterator[Any]) -> Any:
    whole, *rest = pieces
    for piece in rest:
        whole += piece
    return whole


def test_langchain_calls_tools(server: Server):
    """Whole, streamed and later; and the messages of calls and results come back."""
    asked = [HumanMessage([OWN, QUESTION])]
    bound = chain(server).bind_tools([count], **ONE)
    pieces = list(bound.stream(asked))
    assert len([piece for piece in pieces if piece.tool_call_chunks]) > 3
    called = later(server, lambda model: model.bind_tools([count], **ONE).ainvoke(asked))
    answers = [bound.invoke(asked), summed(iter(pieces)), called]
    for answer in answers:
        (call,) = answer.tool_calls
        assert call["name"] == "count"
        assert call["args"] == answers[0].tool_calls[0]["args"]
        assert (answer.content, answer.invalid_tool_calls) == ("", [])
        assert answer.response_metadata["finish_reason"] == "tool_calls"
        result = count.invoke(call)
        assert isinstance(result, ToolMessage)
        then = chain(server, max_tokens=4).bind_tools([count])
        assert then.invoke([*asked, answer, result]).usage_metadata["output_tokens"] == 4
    strict = chain(server).bind_tools([count], strict=True, **ONE)
    assert strict.invoke(asked).tool_calls[0]["args"].keys() == {"shape", "at"}


def test_langchain_gets_a_schema_by_a_tool(server: Server):
    model = chain(server).with_structured_output(Shape, method="function_calling")
    assert isinstance(model.invoke([HumanMessage([OWN, QUESTION])]), Shape)


def test_langchain_is_told_what_is_refused(server: Server):
    with pytest.raises(openai.BadRequestError, match=r"messages.0.name: it is not supported"):
        chain(server).invoke([HumanMessage("hello", name="bob")])
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        chain(server, logit_bias={"1": 2}).invoke("hello")


@pytest.fixture(scope="session")
def node(pytestconfig: pytest.Config) -> Path:
    """A folder with the packages of tests/js and its programs. Fetched once; npm verifies them."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm: install nodejs and npm")
    folder = pytestconfig.cache.mkdir("tests-js")
    lock = ROOT / "tests/js/package-lock.json"
    installed = folder / "node_modules/.package-lock.json"  # npm writes it last
    if not installed.exists() or (folder / lock.name).read_bytes() != lock.read_bytes():
        for name in ("package.json", lock.name):
            shutil.copy(ROOT / "tests/js" / name, folder)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=folder, check=True, timeout=100)
    shutil.copy(ROOT / "tests/js/clients.js", folder)
    return folder


def run(*command: str | Path) -> str:
    told = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


@pytest.fixture(scope="module")
def made(server: Server, node: Path) -> dict[str, dict[str, Any]]:
    """What each provider of the package made of each call."""
    answers: dict[str, dict[str, Any]] = json.loads(
        run("node", node / "clients.js", f"{server.url}/v1")
    )
    return answers


@pytest.mark.parametrize("provider", ["qwenvl", "openai"])
def test_vercels_package(server: Server, made: dict[str, dict[str, Any]], provider: str):
    calls = made[provider]
    for how in ("whole", "stream"):
        assert (calls[how]["text"], calls[how]["finish"]) == ("circle", "stop")
        assert calls[how]["usage"]["outputTokens"] == 2
    assert calls["turns"]["cachedInputTokens"] > 0
    assert Shape.model_validate(calls["object"])
    assert calls["options"] == "circle"
    whole, streamed = calls["tools"]["whole"], calls["tools"]["stream"]
    for called in (whole, streamed):
        (call,) = called["calls"]
        assert (call["name"], called["finish"]) == ("count", "tool-calls")
        assert call["input"].keys() == {"shape", "at"}
    assert whole["calls"] == streamed["calls"]
    assert streamed["deltas"] > 3
    assert (calls["tools"]["results"], calls["tools"]["next"]) == ([call["input"]["at"]], 4)
    refused = {"error": "AI_APICallError", "status": 400}
    assert calls["refused"] == {**refused, "message": "reasoning_effort: it is not supported"}
    assert calls["aborted"] is True

    # OpenAI's provider can't ask for an endless answer: ten tokens may be there before it leaves.
    gone = (
        "reason=client_gone" if provider == "qwenvl" else "(reason=client_gone|finish_reason=stop)"
    )
    left = re.compile(rf"\[js-{provider}\].* {gone}\n")
    until(lambda: left.search(server.log.read_text()), said=server.log.read_text)
    until(lambda: b"\nqwenvl_num_requests_running 0.0\n" in send(server.port, "GET", "/metrics")[2])


def examples() -> Iterator[tuple[str, str, str]]:
    """A word of each example on the page that speaks to a server, its language and its text."""
    for language, text in BLOCK.findall((ROOT / "docs/clients.md").read_text(encoding="utf-8")):
        for word in ("requests.post", "import OpenAI", "langchain_openai", "streamText"):
            if word in text:
                yield word, language, text
        if "import OpenAI" in text:
            client = text
        if "tools=[weather]" in text:  # it goes on with the client of the one before
            yield "tools=[weather]", language, client + text


def test_the_examples_of_the_page(server: Server, node: Path):
    """As they stand, but for the address. What they print stands beside them."""
    found = list(examples())
    assert len(found) == 5
    for word, language, text in found:
        here = text.replace("http://127.0.0.1:8000", server.url)
        assert here != text
        if language == "js":
            (node / "example.js").write_text(here, encoding="utf-8")
            printed = run("node", node / "example.js")
        else:
            printed = run(sys.executable, "-c", here)
        assert printed.strip(), word
        if expected := re.search(r"(?:#|//) (\w+)\n$", text):
            assert printed.strip() == expected[1]
