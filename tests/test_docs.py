"""What the documents say is what the code has."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

from qwenvl_app import backends, errors
from qwenvl_app.images import decode
from qwenvl_app.settings import DEFAULTS, PREFIX, Settings
from qwenvl_app.web.openapi import examples

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ["", ".zh-CN"]
READMES = [f"README{language}.md" for language in LANGUAGES]
PAGES = [*READMES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    """What a page's code blocks say, without comments and Chinese or English text in quotes."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)
    lines = [
        re.sub(r"\s*#.*|(?<='prompt=).*?(?=')", "", line) for line in "".join(blocks).split("\n")
    ]
    return [line for line in lines if not re.search("[^\x00-\x7f]|[\"']prompt", line)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_settings_table(language: str):
    page = read(f"docs/settings{language}.md")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(.+?)` \| .+ \|$", page, re.MULTILINE)
    defaults = tomllib.loads(DEFAULTS.read_text(encoding="utf-8"))
    expected = [(key, PREFIX + key.upper(), json.dumps(defaults[key])) for key in defaults]
    assert rows == expected
    assert list(defaults) == list(Settings.model_fields)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_errors_table_has_every_chinese_detail(language: str):
    """Every sentence that the code can answer with begins as one in the table does."""
    name = f"docs/errors{language}.md"
    table = read(name)
    sources = [Path(module.__file__ or "") for module in (backends, errors, decode)]
    sources += sorted((ROOT / "qwenvl_app").rglob("*.py"))
    sources.remove(Path(examples.__file__))  # tests/test_openapi.py holds its errors
    found = set()
    for path in sources:
        found |= set(re.findall(r'"([^"\x00-\x7f][^"{]*)[^"]*"', path.read_text(encoding="utf-8")))
    sentences = {text for text in found if not text.startswith(("模型加载失败", "推理", "处理"))}
    assert len(sentences) >= 7
    for sentence in sentences - {errors.INTERNAL_PREFIX}:
        assert sentence.strip() in table, f"{sentence} is not in {name}"


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_linked_exist(name: str):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", read(name)):
        assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_found_from_the_readme(name: str):
    """From that of its own language; the page in the other language is linked at its top."""
    if name not in READMES:
        readme = "README.zh-CN.md" if ".zh-CN" in name else "README.md"
        assert f"({name})" in read(readme)


@pytest.mark.parametrize("name", READMES)
def test_a_readme_is_one_screen_of_text(name: str):
    assert len(read(name).splitlines()) <= 120


@pytest.mark.parametrize("name", [page for page in PAGES if ".zh-CN" in page])
def test_both_languages_name_the_same(name: str):
    english, chinese = read(name.replace(".zh-CN", "")), read(name)
    assert commands(name) == commands(name.replace(".zh-CN", ""))
    # What stands in a code span: settings, paths, values; sentences differ by language.
    spans = [
        sorted({span for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page) if span.isascii()})
        for page in (english, chinese)
    ]
    assert spans[0] == spans[1]
    # Statuses of errors, and each row's sentences.
    rows = [
        re.findall(r"^\| (\d{3}(?:\D+\d{3})?) \| (.+?) \|", page, re.MULTILINE)
        for page in (english, chinese)
    ]
    told = [
        [(re.findall(r"\d{3}", row), re.findall(r"`([^`]+)`", text)) for row, text in page]
        for page in rows
    ]
    assert told[0] == told[1]


def test_every_dependency_has_its_reason():
    table = read("CONTRIBUTING.md")
    for file in ("requirements.txt", "requirements-remote.txt", "requirements-dev.txt"):
        for line in read(file).splitlines():
            if name := re.match(r"[a-z][\w-]*", line):
                assert name[0] in table or name[0].startswith("types-"), name[0]


def texts(path: Path) -> list[str]:
    """All strings of a module, and what an f-string has between its values."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str)]


SOURCES = sorted((ROOT / "qwenvl_app").rglob("*.py"))
_KEYS = "|".join(key.upper() for key in Settings.model_fields)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_name_settings_as_they_are_typed(path: Path):
    """They said "set COMPILE=off" and `MAX_CONCURRENCY=2`, which do nothing in an environment."""
    for text in texts(path):
        assert not re.findall(rf"(?<![A-Z_])(?:{_KEYS})(?![A-Z_])", text), text
        for key in re.findall(rf"{PREFIX}([A-Z_]+)", text):
            assert key in ("CONFIG", "API_KEY") or key.lower() in Settings.model_fields, text


def test_the_check_of_messages_can_fail():
    assert any(PREFIX + "COMPILE=off" in text for path in SOURCES for text in texts(path))
