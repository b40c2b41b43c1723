"""The chat templates that the families were published with: see ``data/templates/README.md``."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from qwenvl_app.generation import Message, question
from qwenvl_app.prompts.builder import Prompt, PromptBuilder

_DIRECTORY = Path(__file__).parent / "data" / "templates"
# By the family's name in config.json.
FILES = {
    "qwen3_vl": ("qwen3_vl.jinja",),
    "qwen3_vl_moe": ("qwen3_vl.jinja",),
    "qwen2_5_vl": ("qwen2_5_vl.jinja",),
    "qwen3_5": ("qwen3_5_think.jinja", "qwen3_5_nothink.jinja"),
    "qwen3_5_moe": ("qwen3_5_think.jinja",),
}


def published(family: str, number: int = 0) -> str:
    """The text of a family's template."""
    return (_DIRECTORY / FILES[family][number]).read_text(encoding="utf-8")


ALL = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_DIRECTORY.glob("*.jinja"))}
PICTURE = Image.new("RGB", (1, 1))  # of which a prompt has the places alone


def asked(text: str) -> tuple[Message, ...]:
    """One picture and one question about it."""
    return question(PICTURE, text)


def build(prompts: PromptBuilder, text: str, grid: tuple[int, int, int] = (1, 2, 2)) -> Prompt:
    """The prompt of one picture of ``grid`` and one question about it."""
    return prompts.build(asked(text), [grid])
