from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from qwenvl_app.settings import DEFAULTS, Settings, SettingsError, load_settings


def test_defaults_are_all_in_the_file():
    settings = load_settings({})
    assert settings.model == "demo"
    assert (settings.max_concurrency, settings.max_new_tokens) == (4, 1024)
    keys = re.findall(r"^(\w+) = ", DEFAULTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert keys == list(Settings.model_fields)


def test_file_then_environment(tmp_path: Path):
    file = tmp_path / "my.toml"
    file.write_text('model = "/from/file"\nmax_waiting = 3\n', encoding="utf-8")
    environ = {"QWENVL_CONFIG": str(file), "QWENVL_MAX_WAITING": "7", "OTHER": "x"}
    settings = load_settings(environ)
    assert (settings.model, settings.max_waiting) == ("/from/file", 7)


def test_frozen(settings: Settings):
    with pytest.raises(ValidationError):
        settings.model = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"QWENVL_MAX_CONCURENCY": "4"},
            "unknown setting 'max_concurency' (environment); did you mean 'max_concurrency'?",
        ),
        ({"QWENVL_ZZZ": "4"}, "unknown setting 'zzz' (environment)"),
        ({"QWENVL_MAX_CONCURRENCY": "four"}, "setting 'max_concurrency' (environment): .*'four'"),
        ({"QWENVL_MAX_CONCURRENCY": "0"}, "setting 'max_concurrency' .*greater than or equal to 1"),
        ({"QWENVL_QUEUE_TIMEOUT_S": "nan"}, "setting 'queue_timeout_s'"),
        ({"QWENVL_MODEL": ""}, "setting 'model' (environment)"),
        ({"QWENVL_CONFIG": "/does/not/exist.toml"}, "cannot read /does/not/exist.toml"),
    ],
)
def test_a_wrong_setting_is_named(environ, message):
    with pytest.raises(SettingsError) as error:
        load_settings(environ)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    assert re.search(pattern, str(error.value))


def test_a_file_that_is_no_toml_is_named(tmp_path: Path):
    file = tmp_path / "my.toml"
    file.write_text("model = demo", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"my\.toml is not valid TOML"):
        load_settings({"QWENVL_CONFIG": str(file)})
