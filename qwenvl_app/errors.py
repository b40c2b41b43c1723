"""Errors that a client may see: each carries its status and its detail, in Chinese as documented.

Raised anywhere, rendered in one place (``web/errors.py``).
"""

from __future__ import annotations

from typing import Any

INTERNAL_PREFIX = "服务器内部错误: "


class ServiceError(Exception):
    """Ends a request with ``status`` and ``{"detail": detail}``.

    ``retry_after`` is in seconds and becomes the header of that name. ``reason`` is a word for
    metrics and logs; see ``metrics.REASONS``.
    """

    status = 500
    reason = "internal"

    def __init__(self, detail: Any, *, retry_after: int | None = None, reason: str | None = None):
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        self.reason = reason or self.reason


class BadRequest(ServiceError):
    """The request can't be understood, or its file is no picture.

    ``english`` says what ``detail`` does, for the routes whose errors are in English.
    """

    status = 400
    reason = "bad_request"

    def __init__(self, detail: str, english: str | None = None):
        super().__init__(detail)
        self.english = english


class BadSchema(BadRequest):
    """A JSON schema that answers can't be held to.

    ``problem`` is in English, and ``keyword`` the one that it is about, if it is about one.
    """

    def __init__(self, problem: str, *, keyword: str | None = None):
        which = f" “{keyword}”" if keyword else ""
        named = f" (keyword: {keyword})" if keyword else ""
        super().__init__(
            f"JSON Schema{which} 不受支持：{problem}。",
            f"The JSON schema is not supported{named}: {problem}.",
        )
        self.keyword = keyword

    @classmethod
    def too_complex(cls) -> BadSchema:
        """What a schema gets that would take too much time or memory."""
        return cls("too complex")


class Unauthorized(ServiceError):
    """An API key is asked for, and none that is known came with the request."""

    status = 401
    reason = "unauthorized"

    def __init__(self) -> None:
        super().__init__("缺少有效的 API 密钥。")


class KeyLimit(ServiceError):
    """The owner of this API key has as many requests in the service as one may have."""

    status = 429
    reason = "key_limit"

    def __init__(self) -> None:
        super().__init__("此 API 密钥同时进行的请求已达上限，请稍后重试。", retry_after=5)


class TooLarge(ServiceError):
    """The body or the picture is over a limit."""

    status = 413
    reason = "too_large"


class InvalidForm(ServiceError):
    """Fields are missing or of the wrong kind. ``detail`` is pydantic's list of errors."""

    status = 422
    reason = "invalid_form"


class InternalError(ServiceError):
    """Something failed in here. ``detail`` is a fixed sentence; the cause goes to the log."""


class Unavailable(ServiceError):
    """Not now: loading, draining, or more requests than there is room for."""

    status = 503
    reason = "busy"

    @classmethod
    def exhausted(cls) -> Unavailable:
        """What a request gets when there is no memory left for it."""
        return cls("显存或内存不足，请稍后重试或缩小图片。", retry_after=5, reason="memory")

    @classmethod
    def stopping(cls) -> Unavailable:
        """What a request gets that comes too late."""
        return cls("服务正在停止，请稍后重试。", retry_after=10, reason="draining")


class DeadlineExceeded(ServiceError):
    """The answer was not ready in time."""

    status = 504
    reason = "deadline"

    def __init__(self) -> None:
        super().__init__("请求处理超时，请稍后重试。")


class ClientGone(ServiceError):
    """The client closed its connection. Nobody reads the answer: the status, nginx's, is logged."""

    status = 499
    reason = "client_gone"

    def __init__(self) -> None:
        super().__init__("Client Closed Request")


# What else tells of it but torch's class: its CPU allocator; the CUDA runtime, when it is not
# torch's allocator that asks; cuBLAS and cuDNN, which make their workspaces at their first use.
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is about memory. torch, which has a class for that, is not known here."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY))
    )


class ModelLoadError(Exception):
    """The model can't be loaded. The message is for the operator and names no directory."""


class LoadStopped(BaseException):
    """Ends a load that nobody waits for any longer; no library takes it for a failure."""
