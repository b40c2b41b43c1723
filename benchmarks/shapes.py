"""The published 8B model's shape without its weights: files that take no room, numbers at random.

The checkpoint is loaded as any other is. Its weights are zeros that the file system does not store;
whoever needs numbers that tell rows apart draws them on the device, see ``randomise``.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from qwenvl_app.loading.checkpoint import DEMO
from tests.real_shape import config

_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Shape:
    """Sizes as ``tests.real_shape.config`` takes them, and the largest picture."""

    width: int = 4096
    layers: int = 36
    depth: int = 27
    max_pixels: int = 16_777_216

    def write(self, directory: Path) -> Path:
        """The checkpoint, in bfloat16, with the embedded model's tokenizer, which is at hand."""
        directory.mkdir(parents=True)
        for file in DEMO.iterdir():
            if file.name not in ("README.md", "model.safetensors"):
                shutil.copy(file, directory)
        demo = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
        settings = config(self.width, self.layers, self.depth) | {n: demo[n] for n in _IDS}
        settings["text_config"] |= {"eos_token_id": None, "bos_token_id": None}
        _write(directory / "config.json", settings)
        pictures = directory / "preprocessor_config.json"
        size = {"shortest_edge": 65_536, "longest_edge": self.max_pixels}
        _write(pictures, json.loads(pictures.read_text(encoding="utf-8")) | {"size": size})
        with torch.device("meta"):
            model: Any = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(settings))
        _zeros(directory / "model.safetensors", model.state_dict())
        return directory


def randomise(model: Any) -> None:
    """Draw all matrices, the same each time: every position counts, and every answer differs."""
    torch.manual_seed(0)
    spread = 0.12 * (128 / model.config.text_config.hidden_size) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, spread)
            else:
                parameter.fill_(not name.endswith("bias"))


def _zeros(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file of which only the header is on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        shape = list(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
