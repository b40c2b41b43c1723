"""What Schemathesis can't know: a picture, and that long answers take their time."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import strategies

from tests.wire import picture

MAX_NEW_TOKENS = 8

schemathesis.openapi.media_type(
    "image/*",
    strategies.sampled_from(
        [picture("circle", "blue"), picture("triangle", "red"), b"", b"GIF89a"]
    ),
)


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """A valid limit of tokens stays one, whatever the server allows."""
    for name in ("max_tokens", "max_completion_tokens", "max_new_tokens"):
        if isinstance(body, dict) and type(body.get(name)) is int:
            body[name] = min(body[name], MAX_NEW_TOKENS)
    return body
