"""What the server's errors mean, in English: the documented route's details are Chinese."""

from __future__ import annotations

import os

# By a part of the detail, the first that it has; docs/errors.md has all of them.
_BY_DETAIL = {
    "上传的文件": "this file can't be read as a picture",
    "长宽比": "the picture is too long and narrow",
    "百万像素": "the picture has too many pixels",
    "上传的内容超过": "the upload is too large",
    "提示词为": "the question is too long",
    "图片和提示词共": "picture and question are too long for the model",
    "字段": "the question is no text in UTF-8",
    "模型正在加载": "the model is still loading",
    "服务正在停止": "the server is stopping",
    "显存或内存不足": "the server has no memory left for this request",
    "模型的思考": "the model's reasoning was cut before its answer: raise max_new_tokens",
}
_BY_STATUS = {
    400: "the server can't accept this request",
    401: "the API key is missing or wrong",
    408: "the request was sent too slowly",
    413: "the request is too large",
    429: "this API key has as many requests under way as it may have",
    500: "the server failed",
    503: "the server is busy",
    504: "the answer was not ready in time",
}


def explained(status: int | None, detail: str) -> str:
    """An English sentence with ``detail`` after it, where the reader may not read Chinese.

    ``status`` is None for an error in a stream that had begun.
    """
    if _reads_chinese() or not any("\u4e00" <= one <= "\u9fff" for one in detail):
        return detail
    found = (sentence for part, sentence in _BY_DETAIL.items() if part in detail)
    sentence = next(found, _BY_STATUS.get(status or 0, "the server could not answer"))
    return f"{sentence} ({detail})"


def _reads_chinese() -> bool:
    """By the locale of messages, as POSIX finds it."""
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return next(filter(None, names), "").startswith("zh")
