"""The service with a script for a model: it tells the picture's number and the question.

``FAKE_SECONDS`` is how long an answer takes. A question that begins with "wait" gets its first
piece and then nothing; "cut" gets an answer that is not whole, and "fail" a 500.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator

from PIL import Image

from qwenvl_app import create_app
from qwenvl_app.errors import InternalError
from qwenvl_app.generation import BackendStats, Delta, FinishReason, GenerationRequest, Usage
from tests.fakes import FakeBackend, FakeGeneration, prompt_of

SLOTS = 3


def picture(number: int) -> bytes:
    """A PNG that ``number`` can be read from."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number >> 16, number >> 8 & 255, number & 255)).save(buffer, "PNG")
    return buffer.getvalue()


def expected(*numbers: int, prompt: str) -> str:
    """What is answered about those pictures."""
    return f"图 {numbers}：{prompt}"


def _number(image: Image.Image) -> int:
    red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]
    return int(red << 16 | green << 8 | blue)


class ScriptedGeneration(FakeGeneration):
    prompt = ""

    def __iter__(self) -> Iterator[Delta]:
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        if self.prompt.startswith("fail"):
            raise InternalError("没有做到。")
        for piece in self.pieces:
            yield Delta(piece)
            while self.prompt.startswith("wait") and not self.cancelled:
                time.sleep(0.01)
        reason = FinishReason.LENGTH if self.prompt.startswith("cut") else FinishReason.STOP
        yield Delta("", reason, Usage(10, len(self.pieces)))


class ScriptedBackend(FakeBackend):
    def stats(self) -> BackendStats:
        return BackendStats(slots=SLOTS)

    def generate(self, request: GenerationRequest) -> FakeGeneration:
        parts = request.messages[-1].content
        numbers = [_number(part) for part in parts if isinstance(part, Image.Image)]
        prompt = prompt_of(request)
        pieces = list(expected(*numbers, prompt=prompt))[: request.sampling.max_new_tokens]
        made = ScriptedGeneration(pieces, self.go, self.failure, request.deadline)
        made.prompt = prompt
        return made


app = create_app(backend=ScriptedBackend())
