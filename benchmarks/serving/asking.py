"""One question to one server, and what a client notices of the answer."""

from __future__ import annotations

import base64
import io
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import requests
from PIL import Image

from demo.evaluate import package_cases
from qwenvl_app.cli import answers
from qwenvl_app.cli.client import CHAT, ROUTE

TIMEOUT_S = 600


class Question(NamedTuple):
    """A picture of its own each, so that no cache helps. ``expected`` is "" where nobody reads."""

    image: bytes
    media_type: str
    prompt: str
    tokens: int  # at most; exactly where the checkpoint never ends by itself
    expected: str = ""


@dataclass(frozen=True)
class Sample:
    """One answer. ``pieces``: seconds until each piece of text, one if it came as a whole."""

    pieces: tuple[float, ...]
    tokens: int
    text: str = ""
    error: str = ""

    @property
    def per_token(self) -> float | None:
        """Seconds between tokens after the first; None if it did not come in pieces."""
        if len(self.pieces) < 2 or self.tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.tokens - 1)


class Contender(Protocol):
    """Who is asked. ``ask`` is called by any number of threads."""

    name: str

    def ask(self, question: Question, *, stream: bool) -> Sample:
        """Never raises: what goes wrong is the sample's ``error``."""

    def used(self) -> tuple[float, float | None]:
        """CPU seconds since its start, and resident MiB where that is its own."""


class _Sessions(threading.local):
    """A connection for each thread."""

    def __init__(self) -> None:
        self.session = requests.Session()
        self.session.trust_env = False


_sessions = _Sessions()


def chat(url: str, model: str, question: Question, *, stream: bool) -> Sample:
    """Through OpenAI's route, greedy. Raises Refused, Broken and requests' errors."""
    data = f"data:{question.media_type};base64,{base64.b64encode(question.image).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": question.prompt},
    ]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": question.tokens,
        "ignore_eos": not question.expected,  # as vLLM, SGLang, llama-server and ours call it
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    with _sessions.session.post(url + CHAT, json=body, stream=stream, timeout=TIMEOUT_S) as reply:
        if not stream:
            told = answers.read(reply)
            text = str(told["choices"][0]["message"]["content"] or "")
            spent = time.perf_counter() - began
            return Sample((spent,), int(told["usage"]["completion_tokens"]), text)
        pieces: list[float] = []
        for piece in answers.chunks(reply):
            if isinstance(piece, answers.Answer):
                tokens = (piece.usage or {}).get("completion_tokens", len(pieces))
                whole = time.perf_counter() - began
                return Sample(tuple(pieces) or (whole,), tokens, piece.result)
            pieces.append(time.perf_counter() - began)
    raise answers.Broken("the answer was broken off")


def recognize(url: str, question: Question, *, stream: bool) -> Sample:
    """Through the replaced service's route, which never streams. Raises as ``chat``."""
    began = time.perf_counter()
    with _sessions.session.post(
        url + ROUTE,
        files={"image": ("picture", question.image, question.media_type)},
        data={"prompt": question.prompt, "max_tokens": str(question.tokens)},
        timeout=TIMEOUT_S,
    ) as reply:
        told = answers.recognized(reply)
    spent = time.perf_counter() - began
    return Sample((spent,), (told.usage or {})["completion_tokens"], told.result)


def noise(rng: random.Random, side: int, tokens: int, media_type: str = "image/png") -> Question:
    """A picture that nobody has seen, with grain of an eighth of its side: as large as a photo."""
    coarse = max(8, side // 8)
    generator = np.random.default_rng(rng.getrandbits(32))
    grain = generator.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grain).resize((side, side)).save(buffer, media_type.removeprefix("image/"))
    return Question(buffer.getvalue(), media_type, "what is it?", tokens)


def easy_vqa(rng: random.Random) -> Iterator[Question]:
    """easy-VQA's, for ever, each picture with a pixel of its own: there are only 1,000."""
    cases = list(package_cases())
    while True:
        case = rng.choice(cases)
        image = Image.open(io.BytesIO(case.image)).convert("RGB")
        image.putpixel(
            (rng.randrange(image.width), rng.randrange(image.height)), tuple(rng.randbytes(3))
        )
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        yield Question(buffer.getvalue(), "image/png", case.prompt, 16, case.expected)
