"""What README and docs/ tell a reader to type, as it stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README*.md", "docs/*.md", "deploy/cluster/README.md")
    for path in ROOT.glob(pattern)
)
SHELL = ("", "sh", "bash")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$(?:\n\n```json\n(.*?)\n```$)?", re.MULTILINE | re.DOTALL)
_PROGRAMS = "make|pip|python|flask|qwenvl|gunicorn|docker|kubectl|systemctl|ray|vllm"
_SPAN = re.compile(rf"`((?:\.venv/bin/)?(?:{_PROGRAMS}) [^`\n]+)(?<!--app wsgi)`")


class Command(NamedTuple):
    """One command of a page. ``exports`` are the page's before it, ``answer`` what it prints."""

    page: str
    text: str
    exports: tuple[str, ...] = ()
    answer: str = ""


def commands() -> Iterator[Command]:
    """Every command in a block of a shell, and in a line of text where it has an argument."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        exports: list[str] = []
        for language, block, answer in _BLOCK.findall(text):
            for line in _lines(block) if language in SHELL else ():
                if line.startswith("export "):
                    exports.append(line)
                else:
                    yield Command(page, line, tuple(exports), answer)
        for span in _SPAN.findall(_BLOCK.sub("", text)):
            yield Command(page, span)


def programs() -> Iterator[tuple[str, str]]:
    """Page and text of every block in a language that is run."""
    for page in PAGES:
        for language, block, _ in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
            if language in ("python", "js"):
                yield page, block


def _lines(block: str) -> Iterator[str]:
    """Commands without comments; one that goes on behind a backslash or a quote is one."""
    whole = ""
    for line in block.replace("\\\n", " ").splitlines():
        whole += " " + re.sub(r"(^|\s+)# .*$", "", line)
        if whole.count("'") % 2 == 0:
            if text := " ".join(whole.split()):
                yield text
            whole = ""
    assert not whole, block
