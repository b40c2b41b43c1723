"""The service with a script for a model: it tells the picture's number and the question.

``FAKE_SECONDS`` is how long an answer takes. The question "wait" gets its first piece and then
nothing, "cut" an answer that is not whole, and "fail" a 500.
"""

from __future__ import annotations

import io
import os

from PIL import Image

from qwenvl_app import create_app
from qwenvl_app.errors import InternalError
from qwenvl_app.generation import BackendStats, FinishReason, GenerationRequest
from qwenvl_app.testing import ScriptedBackend, ScriptedGeneration, prompt_of

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


class Backend(ScriptedBackend):
    """Each answer has a script of its own."""

    def stats(self) -> BackendStats:
        return BackendStats(slots=SLOTS)

    def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        parts = request.messages[-1].content
        numbers = [_number(part) for part in parts if isinstance(part, Image.Image)]
        prompt = prompt_of(request)
        text = expected(*numbers, prompt=prompt)[: request.sampling.max_new_tokens]
        script = ScriptedBackend(*text)
        script.delay_s = float(os.environ.get("FAKE_SECONDS", "0"))
        match prompt:
            case "wait":
                script.apart_s = 600
            case "cut":
                script.finish_reason = FinishReason.LENGTH
            case "fail":
                script.pieces, script.failure = [], InternalError("没有做到。")
        return script.generate(request)


app = create_app(backend=Backend())
