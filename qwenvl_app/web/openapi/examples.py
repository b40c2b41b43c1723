"""Requests, answers and errors as the API's documentation shows them, in Chinese and English."""

from __future__ import annotations

from typing import Any

Examples = dict[str, dict[str, Any]]

PROMPTS = ["这张图里有什么？", "what is the red shape?"]

_PIXELS = (  # 2 by 2, red
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGP8z8DAwMDA"
    "xMDAwMDAAAANHQEDasKb6QAAAABJRU5ErkJggg=="
)


def _both(chinese: Any, english: Any) -> Examples:
    return {
        "chinese": {"summary": "中文", "value": chinese},
        "english": {"summary": "English", "value": english},
    }


def _asked(question: str) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": _PIXELS}}
    content = [picture, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 64}


def _answered(text: str, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-6f1c2b0e",
        "created": 1795737600,
        "model": "demo",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        "timings": {"read_ms": 0.3, "queue_ms": 0.0, "image_ms": 1.1},
    }


def _chunk(text: str) -> dict[str, Any]:
    choice = f'{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":null}}'
    return {
        "data": '{"id":"chatcmpl-6f1c2b0e","created":1795737600,"model":"demo",'
        f'"object":"chat.completion.chunk","choices":[{choice}]}}'
    }


ANSWER = _both(
    {"status": "success", "result": "图中有一个红色的圆形。"},
    {"status": "success", "result": "circle"},
)
EVENTS = _both(
    {"data": '{"delta":"图中有"}'},
    {
        "data": '{"status":"success","result":"circle","finish_reason":"stop","usage":'
        '{"prompt_tokens":21,"completion_tokens":2,"cached_tokens":0,"reasoning_tokens":0}}'
    },
)
CHAT_QUESTION = _both(*map(_asked, PROMPTS)) | {
    "stream": {
        "summary": "Streamed, 边写边返回",
        "value": _asked(PROMPTS[0]) | {"stream": True, "stream_options": {"include_usage": True}},
    }
}
CHAT_ANSWER = _both(_answered("图中有一个红色的圆形。", 23, 11), _answered("circle", 21, 2))
CHAT_EVENTS = _both(_chunk("图中有"), _chunk("circle"))
CHAT_ERROR = {
    "error": {
        "message": "The service is busy; try again later. (request 6f1c2b0e)",
        "type": "server_error",
        "param": None,
        "code": "busy",
    }
}
FORM_ERROR = {
    "detail": [
        {"type": "missing", "loc": ["body", "image"], "msg": "Field required", "input": None}
    ]
}
# One sentence of each status; docs/errors.md has all.
DETAILS = {
    400: "上传的文件无法作为图片读取，可能已损坏或格式不受支持。",
    401: "缺少有效的 API 密钥。",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "请求没有在规定的时间内发送完毕。",
    413: "上传的内容超过 20 MB 的限制。",
    414: "请求的网址过长。",
    417: "不支持请求首部 Expect 的内容。",
    429: "此 API 密钥同时进行的请求已达上限，请稍后重试。",
    431: "请求的首部过多或过长。",
    500: "服务器内部错误: 处理请求时发生意外错误，请稍后重试。（请求编号 6f1c2b0e）",
    501: "不支持请求的传输编码。",
    503: "服务器繁忙，请稍后重试。",
    504: "请求处理超时，请稍后重试。",
    505: "不支持请求的 HTTP 版本。",
}
