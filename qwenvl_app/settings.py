"""Settings: the only reader of the environment and of ``config/``.

Parsed once, frozen, and wrong ones stop the start with the key's name (the way of Starlette's
``config.py``). Defaults live in ``config/default.toml`` and nowhere else.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)

PREFIX = "QWENVL_"
FILE_VARIABLE = PREFIX + "CONFIG"
SECRETS = frozenset(("api_keys", "remote_api_key"))  # never in a message
# Limits of the service of which each worker has its share.
DIVIDED = ("max_concurrency", "max_waiting", "upload_buffer_mb", "max_connections")
_PACKAGE = Path(__file__).resolve().parent
# In a checkout it lies beside the package, in a wheel inside it.
CONFIG = next(path for path in (_PACKAGE / "config", _PACKAGE.parent / "config") if path.is_dir())
DEFAULTS = CONFIG / "default.toml"


_for_workers: Settings | None = None


class SettingsError(Exception):
    """A setting is unknown or wrong. The message names the key and where it was set."""


def _split(value: Any) -> Any:
    """A list in the environment is a string with commas."""
    if not isinstance(value, str):
        return value
    return [part for word in value.split(",") if (part := word.strip())]


ApiKey = Annotated[SecretStr, Field(min_length=1)]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]


def _host(text: str) -> str:
    """A name as it stands in DNS, of two labels or more, and perhaps a port; no IP address."""
    host, _, port = text.partition(":")
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    name = re.fullmatch(rf"({label}\.)+(?=[a-z]){label}", host, re.ASCII)
    if not name or len(host) > 253 or (":" in text and not _is_port(port)):
        raise ValueError(f"'{text}' is no host such as 'a.example' or 'a.example:8443'")
    return text


def _is_port(text: str) -> bool:
    return bool(re.fullmatch("[1-9][0-9]{0,4}", text)) and int(text) < 65536


# No user, query or fragment; "/v1" at its end is the form in which OpenAI's clients take it.
RemoteUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$")]
ImageHost = Annotated[str, StringConstraints(to_lower=True), AfterValidator(_host)]


class Settings(BaseModel):
    """The effective settings; ``config/default.toml`` says what each is for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    backend: Literal["local", "remote"]
    remote_url: Annotated[tuple[RemoteUrl, ...], BeforeValidator(_split)]
    remote_model: str
    remote_api_key: SecretStr
    workers: int = Field(ge=1, le=64)
    device: str = Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attention: Literal["auto", "sdpa", "eager"]
    compile: Literal["auto", "off", "on"]
    cpu_threads: int = Field(ge=0, le=1024)
    max_concurrency: int = Field(ge=1, le=256)
    max_waiting: int = Field(ge=0, le=4096)
    queue_timeout_s: float = Field(ge=0, le=86_400, allow_inf_nan=False)
    request_timeout_s: float = Field(gt=0, le=86_400, allow_inf_nan=False)
    stall_timeout_s: float = Field(gt=0, le=86_400, allow_inf_nan=False)
    max_new_tokens: int = Field(ge=1)
    repetition_limit: int = Field(ge=0)
    prefill_chunk: int = Field(ge=1)
    kv_cache_mb: int = Field(ge=0)
    prefix_cache_mb: int = Field(ge=0)
    max_upload_mb: int = Field(ge=1, le=1024)
    upload_buffer_mb: int = Field(ge=1)
    header_timeout_s: float = Field(gt=0, le=86_400, allow_inf_nan=False)
    body_timeout_s: float = Field(gt=0, le=86_400, allow_inf_nan=False)
    max_connections: int = Field(ge=1, le=65536)
    max_image_megapixels: float = Field(gt=0, le=178, allow_inf_nan=False)
    max_parts: int = Field(ge=2)
    max_field_kb: int = Field(ge=1)
    max_prompt_chars: int = Field(ge=1)
    image_hosts: Annotated[tuple[ImageHost, ...], BeforeValidator(_split)]
    api_keys: Annotated[tuple[ApiKey, ...], BeforeValidator(_split)]
    max_requests_per_key: int = Field(ge=0, le=2**20)
    cors_origins: Annotated[tuple[Origin, ...], BeforeValidator(_split)]
    page: Literal["on", "off"]
    log_format: Literal["text", "json"]
    trusted_hops: int = Field(ge=0, le=16)

    @field_validator("remote_url", "remote_model")
    @classmethod
    def _is_there_if_needed(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("backend") == "remote" and not value:
            raise ValueError("needed where backend is remote")
        return value

    @field_validator("workers")
    @classmethod
    def _hold_no_model(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("backend") == "local":
            raise ValueError("each would load the model: more than one need backend = 'remote'")
        return value

    @field_validator("max_concurrency")
    @classmethod
    def _is_enough_for_all(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("workers", 1):
            raise ValueError("each of the workers needs one")
        return value

    @property
    def of_one_worker(self) -> Settings:
        """With the share of limits that one of ``workers`` processes has, of a number at least 1.

        Rounded down, so that they together have no more than the limit.
        """
        limits = {key: getattr(self, key) for key in DIVIDED}
        shares = {key: limit and max(1, limit // self.workers) for key, limit in limits.items()}
        return self.model_copy(update=shares)

    @property
    def served_model(self) -> str:
        """The model's name for clients; of a directory the last part, which tells no path."""
        if self.backend == "remote":
            return self.remote_model
        return Path(self.model).name if Path(self.model).is_absolute() else self.model


def load_settings(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Defaults, then the file named by ``QWENVL_CONFIG``, then ``QWENVL_<KEY>``, then overrides.

    Raises SettingsError.
    """
    return explain(environ, **overrides)[0]


def load_for_workers() -> Settings:
    """Load the settings anew, for ``current`` in this process and in those that it forks.

    Of limits each worker has its share. Called by gunicorn's configuration, in the master: at the
    start and at a reload. Raises SettingsError.
    """
    global _for_workers  # noqa: PLW0603  # what a fork inherits has no other place
    _for_workers = load_settings().of_one_worker
    return _for_workers


def current() -> Settings:
    """What ``load_for_workers`` loaded; where nobody called that, loaded now."""
    return _for_workers or load_settings()


def explain(
    environ: Mapping[str, str] | None = None, **overrides: Any
) -> tuple[Settings, dict[str, str]]:
    """As ``load_settings``, and where the value of each key came from."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def merge(source: str, more: Mapping[str, Any]) -> None:
        for key, value in more.items():
            if key not in Settings.model_fields:
                near = difflib.get_close_matches(key, Settings.model_fields, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise SettingsError(f"unknown setting '{key}' ({source}){hint}")
            if isinstance(value, bool):  # pydantic would read true as 1
                raise SettingsError(f"setting '{key}' ({source}): no key is true or false")
            values[key], origins[key] = value, source

    merge("config/default.toml", _read(DEFAULTS))
    if file := environ.get(FILE_VARIABLE):
        merge(file, _read(Path(file)))
    merge(
        "environment",
        {
            name.removeprefix(PREFIX).lower(): value
            for name, value in environ.items()
            if name.startswith(PREFIX) and name != FILE_VARIABLE
        },
    )
    merge("overrides", overrides)
    try:
        return Settings.model_validate(values), origins
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        given = "" if key in SECRETS else f", but it is {values.get(key)!r}"
        raise SettingsError(
            f"setting '{key}' ({origins.get(key, 'nowhere')}): {first['msg']}{given}"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None
