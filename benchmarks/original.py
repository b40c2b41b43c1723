"""The replaced service, to compare with: all of a request in one thread, one request at a time.

It did everything inside an ``async def``: wrote the upload to disk, read it back, prepared it with
transformers' own processor, called ``generate`` and deleted the file, while everybody else waited.
So does this one, in gunicorn's stock worker with one thread (``OPTIONS``). Under FastAPI and
uvicorn, as it was, it is a little faster still (``benchmarks/peers.md``).
"""

from __future__ import annotations

import uuid
from pathlib import Path
from tempfile import gettempdir

import torch
from flask import Flask, Response, jsonify, request
from PIL import Image

from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.loading.load import load
from qwenvl_app.settings import load_settings

APP = "benchmarks.original:create_app()"
OPTIONS = ("--worker-class", "gthread", "--threads", "1", "--timeout", "600")


def prepare(loaded: LoadedModel, picture: Path, prompt: str) -> dict[str, torch.Tensor]:
    """Inputs of ``generate``, as the processor's ``apply_chat_template`` makes them.

    The processor itself wants torchvision, see ``loading/processing.py``; its parts do not.
    """
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    image = Image.open(picture).convert("RGB")
    inputs = dict(loaded.patcher.processor(images=[image], return_tensors="pt"))
    pad = loaded.tokenizer.convert_ids_to_tokens(loaded.model.config.image_token_id)
    merged = int(inputs["image_grid_thw"].prod()) // loaded.patcher.processor.merge_size**2
    inputs |= dict(loaded.tokenizer([str(text).replace(pad, pad * merged)], return_tensors="pt"))
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == loaded.model.config.image_token_id).long()
    return {name: tensor.to(loaded.model.device) for name, tensor in inputs.items()}


def answer(loaded: LoadedModel, picture: Path, prompt: str, max_new_tokens: int) -> tuple[str, int]:
    """Inputs, ``generate``, text; and how many tokens it has."""
    inputs = prepare(loaded, picture, prompt)
    output = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens)
    ids = output[:, inputs["input_ids"].shape[1] :]
    return str(loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)[0]), ids.shape[1]


def create_app() -> Flask:
    """The one route, and what ``tests.e2e.server`` waits for."""
    settings = load_settings()
    loaded = load(settings.model)
    app = Flask(__name__)

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"phase": "ready"}

    @app.post("/v1/image/recognize")
    def recognize() -> Response:
        picture = Path(gettempdir()) / f"{uuid.uuid4()}.png"
        try:
            picture.write_bytes(request.files["image"].read())
            # It had no such field: for the benchmark's answers of many lengths.
            most = int(request.form.get("max_tokens", settings.max_new_tokens))
            text, tokens = answer(loaded, picture, request.form["prompt"], most)
            response = jsonify(status="success", result=text)
            response.headers["X-Completion-Tokens"] = str(tokens)
            return response
        finally:
            picture.unlink()

    return app
