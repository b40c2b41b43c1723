"""What was generated, as OpenAI's clients read it: a completion, or its chunks as events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from qwenvl_app.generation import Delta, FinishReason, TokenLogprob, Usage
from qwenvl_app.service.record import RequestRecord
from qwenvl_app.web import sse
from qwenvl_app.web.answering import Answering
from qwenvl_app.web.chat.schema import ChatRequest
from qwenvl_app.web.chat.tool_calls import CallReader
from qwenvl_app.web.errors import as_service_error, dumps, openai_error

Json = dict[str, Any]


class Completion:
    """Renders one answer."""

    def __init__(self, asked: ChatRequest, answering: Answering, model: str):
        self._asked, self._answering = asked, answering
        self._reader = CallReader(asked.offered)
        self._head: Json = {
            "id": f"chatcmpl-{answering.request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, deltas: Iterator[Delta]) -> Json:
        """A ``chat.completion``."""
        parts = list(deltas)
        read = self._reader.message("".join(part.text for part in parts))
        message: Json = {"role": "assistant", **read}
        if reasoning := "".join(part.reasoning for part in parts):
            message["reasoning_content"] = reasoning
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(tuple(one for part in parts for one in part.logprobs)),
            "finish_reason": self._finish(),
        }
        return self._head | {"object": "chat.completion", "choices": [choice]} | self._account()

    def events(self, deltas: Iterator[Delta]) -> Iterator[str]:
        """``chat.completion.chunk`` events; an error in mid-stream is one, too.

        Those that are there together come together: each piece is a call into the kernel.
        """
        ready = self._chunk({"role": "assistant", "content": ""})
        try:
            for delta in deltas:
                if ready := ready + self._chunks(delta):
                    yield ready
                    ready = ""
            ready += self._chunk({}, finish=self._finish())
            if self._asked.include_usage:
                ready += self._event({"choices": []} | self._account())
        except Exception as failure:
            error = as_service_error(failure, self._answering.request_id)
            self._answering.record.reason = error.reason
            ready += sse.event(dumps(openai_error(error, self._answering.request_id)))
        yield ready + sse.DONE

    def _chunks(self, delta: Delta) -> str:
        said = [{"reasoning_content": delta.reasoning}] if delta.reasoning else []
        said += self._reader.push(delta.text, last=delta.finish_reason is not None)
        if delta.logprobs and not said:
            said = [{}]
        # The tokens of a text are told with its last piece, if it has several.
        return "".join(
            self._chunk(each, self._logprobs(delta.logprobs if number == len(said) else ()))
            for number, each in enumerate(said, 1)
        )

    def _account(self) -> Json:
        record = self._answering.record
        return {"usage": _usage(record.usage), "timings": _timings(record)}

    def _chunk(self, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._event({"choices": [choice]})

    def _event(self, content: Json) -> str:
        return sse.event(dumps(self._head | {"object": "chat.completion.chunk"} | content))

    def _finish(self) -> str:
        """In OpenAI's words; an answer that repeats itself was cut."""
        if self._answering.record.finish_reason is not FinishReason.STOP:
            return "length"
        return "tool_calls" if self._reader.complete else "stop"

    def _logprobs(self, tokens: tuple[TokenLogprob, ...]) -> Json | None:
        if not self._asked.logprobs:
            return None
        return {
            "content": [_token(one) | {"top_logprobs": [*map(_token, one.top)]} for one in tokens]
        }


def _token(token: TokenLogprob) -> Json:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": token.logprob}


def _timings(record: RequestRecord) -> Json:
    """Milliseconds of each stage; a field of that name is llama-server's, too."""
    seconds = {name: record.stages.get(name, 0.0) for name in ("read", "queue", "image")}
    if timings := record.timings:
        seconds["queue"] += timings.queue
        seconds |= {
            "preprocess": timings.preprocess,
            "prefill": timings.prefill,
            "decode": timings.decode,
        }
    return {f"{name}_ms": round(value * 1000, 1) for name, value in seconds.items()}


def _usage(usage: Usage | None) -> Json:
    read, written = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens if usage else 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens if usage else 0},
    }
