from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from qwenvl_app.settings import DEFAULTS, Settings, SettingsError, explain, load_settings

REMOTE = {
    "QWENVL_BACKEND": "remote",
    "QWENVL_REMOTE_URL": "http://127.0.0.1:9",
    "QWENVL_REMOTE_MODEL": "demo",
}


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
        (
            {"QWENVL_WORKERS": "2"},
            "setting 'workers' (environment): .*each would load the model.*but it is '2'",
        ),
        (
            REMOTE | {"QWENVL_WORKERS": "5"},
            "setting 'max_concurrency' (config/default.toml): .*each of the workers needs one",
        ),
        ({"QWENVL_CONFIG": "/does/not/exist.toml"}, "cannot read /does/not/exist.toml"),
    ],
)
def test_a_wrong_setting_is_named(environ, message):
    with pytest.raises(SettingsError) as error:
        load_settings(environ)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    assert re.search(pattern, str(error.value))


def test_each_worker_has_its_share_of_what_is_the_services():
    limits = {"MAX_CONCURRENCY": "64", "MAX_WAITING": "2", "UPLOAD_BUFFER_MB": "100"}
    environ = {f"QWENVL_{key}": value for key, value in limits.items()}
    settings = load_settings(environ | REMOTE | {"QWENVL_WORKERS": "3"})
    each = settings.of_one_worker
    assert (each.max_concurrency, each.max_waiting, each.upload_buffer_mb) == (21, 1, 33)
    assert each.max_connections == settings.max_connections // 3
    assert each.max_requests_per_key == settings.max_requests_per_key
    assert load_settings(REMOTE | {"QWENVL_MAX_WAITING": "0"}).of_one_worker.max_waiting == 0


def test_a_file_that_is_no_toml_is_named(tmp_path: Path):
    file = tmp_path / "my.toml"
    file.write_text("model = demo", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"my\.toml is not valid TOML"):
        load_settings({"QWENVL_CONFIG": str(file)})


# (environment, what the one line says): for somebody who is called at night.
WRONG = [
    ({"MODEL": ""}, "setting 'model' (environment): String should have at least 1 character"),
    ({"DEVICE": "gpu"}, "setting 'device' (environment): String should match .*cpu|cuda.*'gpu'"),
    ({"DEVICE": "cuda:x"}, "setting 'device' (environment): .*'cuda:x'"),
    ({"DTYPE": "fp16"}, "'dtype' .*'auto', 'float32', 'bfloat16' or 'float16', but it is 'fp16'"),
    ({"ATTENTION": "flash"}, "'attention' .*'auto', 'sdpa' or 'eager', but it is 'flash'"),
    ({"MAX_CONCURRENCY": "0"}, "'max_concurrency' .*greater than or equal to 1, but it is '0'"),
    ({"MAX_CONCURRENCY": "999"}, "'max_concurrency' .*less than or equal to 256"),
    ({"MAX_CONCURRENCY": "4.5"}, "'max_concurrency' .*valid integer, .*but it is '4.5'"),
    ({"MAX_WAITING": "-1"}, "'max_waiting' .*greater than or equal to 0, but it is '-1'"),
    ({"MAX_WAITING": "many"}, "'max_waiting' .*valid integer, .*but it is 'many'"),
    ({"QUEUE_TIMEOUT_S": "30s"}, "'queue_timeout_s' .*valid number, .*but it is '30s'"),
    ({"QUEUE_TIMEOUT_S": "inf"}, "'queue_timeout_s' .*finite number, but it is 'inf'"),
    ({"MAX_NEW_TOKENS": "0"}, "'max_new_tokens' .*greater than or equal to 1"),
    ({"REPETITION_LIMIT": "off"}, "'repetition_limit' .*valid integer, .*but it is 'off'"),
    ({"PREFILL_CHUNK": "0"}, "'prefill_chunk' .*greater than or equal to 1"),
    ({"KV_CACHE_MB": "8G"}, "'kv_cache_mb' .*valid integer, .*but it is '8G'"),
    ({"PREFIX_CACHE_MB": "-5"}, "'prefix_cache_mb' .*greater than or equal to 0"),
    ({"MAX_UPLOAD_MB": "20MB"}, "'max_upload_mb' .*valid integer, .*but it is '20MB'"),
    ({"MAX_UPLOAD_MB": "5000"}, "'max_upload_mb' .*less than or equal to 1024"),
    ({"MAX_IMAGE_MEGAPIXELS": "0"}, "'max_image_megapixels' .*greater than 0"),
    ({"REQUEST_TIMEOUT_S": "0"}, "'request_timeout_s' .*greater than 0, but it is '0'"),
    ({"CORS_ORIGINS": "a.example"}, "'cors_origins' .*should match"),
    ({"LOG_FORMAT": "xml"}, "'log_format' .*'text' or 'json', but it is 'xml'"),
    ({"TRUSTED_HOPS": "yes"}, "'trusted_hops' .*valid integer, .*but it is 'yes'"),
    ({"MAX_WAITNG": "1"}, "unknown setting 'max_waitng' (environment); did you mean 'max_waiting'"),
    ({"PORT": "8000"}, "unknown setting 'port' (environment)"),
    ({"MAX_WAITING": "1\n2"}, "'max_waiting' .*but it is '1\\n2'"),
]


@pytest.mark.parametrize(("environ", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_each_wrong_setting_is_one_line_that_helps(environ: dict[str, str], message: str):
    """It names the key, where it was set, what is allowed and what was there instead."""
    with pytest.raises(SettingsError) as error:
        load_settings({f"QWENVL_{key}": value for key, value in environ.items()})
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert "(environment)" in line
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), line), line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_waiting = true\n", "'max_waiting' (FILE): no key is true or false"),
        ('max_waitin = "1"\n', "unknown setting 'max_waitin' (FILE); did you mean 'max_waiting'?"),
        ("[server]\nport = 1\n", "unknown setting 'server' (FILE)"),
        ("max_waiting = 1\nmax_waiting = 2\n", "FILE is not valid TOML: .*line 2"),
        ("model = '\xff'\n", "FILE is not valid TOML"),
    ],
)
def test_each_wrong_line_of_a_file_is_told(tmp_path: Path, content: str, message: str):
    file = tmp_path / "my.toml"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(SettingsError) as error:
        load_settings({"QWENVL_CONFIG": str(file)})
    line = str(error.value)
    assert len(line.splitlines()) == 1
    expected = re.escape(message).replace(r"\.\*", ".*").replace("FILE", re.escape(str(file)))
    assert re.search(expected, line), line


def test_where_each_value_came_from(tmp_path: Path):
    file = tmp_path / "my.toml"
    file.write_text("max_waiting = 3\n", encoding="utf-8")
    environ = {"QWENVL_CONFIG": str(file), "QWENVL_MODEL": "/x"}
    settings, origins = explain(environ, dtype="float16")
    assert (settings.max_waiting, origins["max_waiting"]) == (3, str(file))
    assert origins["model"] == "environment"
    assert origins["dtype"] == "overrides"
    assert origins["device"] == "config/default.toml"
    assert list(origins) == list(Settings.model_fields)
