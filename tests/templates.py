"""The chat templates that the families were published with: see ``data/templates/README.md``."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from qwenvl_app.generation import question
from qwenvl_app.prompts import Prompt, PromptBuilder

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


def build(prompts: PromptBuilder, text: str, grid: tuple[int, int, int]) -> Prompt:
    """The prompt of one picture and ``text``."""
    return prompts.build(question(Image.new("RGB", (1, 1)), text), [grid])
